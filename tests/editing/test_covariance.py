"""The covariance of the keys is that of a direct computation, whatever the batches, the layers or interruptions; and
the text it is measured on is what the model would write, the same in every batch, or the user's own files, whole."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import FAMILIES, tiny_model
from tokenizers import processors

import rome_lab.editing.second_moment as second_moment_module
import rome_lab.editing.texts as texts_module
import rome_lab.models.identity as identity_module
from rome_lab.base.store import Store
from rome_lab.editing.keys import run_to_keys
from rome_lab.editing.second_moment import Covariance, covariance, covariances
from rome_lab.editing.texts import TEXTS_A_FILE, FolderText, SampledText, WikipediaText, subjects_with_templates
from rome_lab.editing.update import ENOUGH, apply_update, constraint_error, factorise, penalty, solve_update
from rome_lab.facts.sources import load_facts
from rome_lab.models.language_model import LanguageModel
from rome_lab.models.sampling import continue_randomly, draw

ROOT = Path(__file__).parents[2]
LENGTHS = (1, 20, 7, 13, 2, 40)
PROMPTS = ("The Eiffel Tower", "In Paris, the", "Rome", "Windows 95 is developed by")


@dataclass
class Passages:
    """Random passages of different lengths; breaks down in front of number `breaks`, and counts what was asked for."""

    seed: int = 0
    breaks: int | None = None
    begins: tuple[int, ...] = ()
    end: int | None = None

    def describe(self) -> dict:
        return {"passages": self.seed, "end": self.end}

    def passages(self, lm: LanguageModel, store: Store, begin: int) -> Iterator[list[int]]:
        self.begins += (begin,)
        for number in itertools.count(begin):
            if number == self.breaks:
                raise InterruptedError("the passages broke down")
            if number == self.end:
                return
            yield self.passage(number)

    def passage(self, number: int) -> list[int]:
        generator = torch.Generator().manual_seed(1000 * self.seed + number)
        return torch.randint(2, 300, (LENGTHS[number % len(LENGTHS)],), generator=generator).tolist()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moment_module, "BATCH_TOKENS", 90)


def direct(lm: LanguageModel, layer: int, passages: list[list[int]]) -> np.ndarray:
    """Mean of k kT over every token, by one full forward a passage and numpy's float64."""
    keys = []
    handle = lm.memory(layer).register_forward_hook(lambda m, args, out: keys.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for passage in passages:
            lm.model(torch.tensor([passage]), use_cache=False)
    handle.remove()
    k = torch.cat(keys).double().numpy()
    return k.T @ k / len(k)


def first_passages(source: Passages, tokens: int) -> list[list[int]]:
    """The passages that hold the first `tokens` tokens."""
    chosen: list[list[int]] = []
    while sum(map(len, chosen)) < tokens:
        chosen.append(source.passage(len(chosen)))
    return chosen


def assert_close(C: torch.Tensor, expected: np.ndarray, rtol: float = 1e-5) -> None:
    """Entry by entry, on the scale of the two components that meet there."""
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert float((np.abs(C.double().numpy() - expected) / scale).max()) < rtol


def measure(
    lm: LanguageModel, layers: list[int], source: object, tokens: int | None, store: Store
) -> dict[int, Covariance]:
    return covariances(lm, layers, source, tokens, store, progress=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_covariance_is_the_mean_over_every_token_in_every_family(family: str, store: Store) -> None:
    lm, source = tiny_model(family), Passages()
    chosen = first_passages(source, 200)
    for layer, found in measure(lm, [2, 0], source, 200, store).items():
        expected = direct(lm, layer, chosen)
        assert found.C.dtype == torch.float32 and found.C.shape == expected.shape
        assert (found.tokens, found.layer) == (sum(map(len, chosen)), layer)
        assert_close(found.C, expected)


def test_covariance_gives_the_matrix_of_one_layer(store: Store) -> None:
    lm = tiny_model("llama")
    C = covariance(lm, 1, Passages(), tokens=100, store=store, progress=False)
    assert torch.equal(C, measure(lm, [1], Passages(), 100, store)[1].C)


def test_by_default_there_are_enough_tokens_for_every_component_of_the_key(store: Store) -> None:
    lm = tiny_model("gpt2")
    found = measure(lm, [1], Passages(), None, store)[1]
    assert ENOUGH * len(found.C) <= found.tokens < ENOUGH * len(found.C) + max(LENGTHS)
    factorise(found.C, found.tokens)


def test_sums_are_exact_to_float64_even_beside_an_outlier(store: Store) -> None:
    """First tokens can have keys a thousand times larger than others; a float32 sum would drown the small ones."""
    lm = tiny_model("llama")
    giant = Passages().passage(0)[0]
    with torch.no_grad():
        lm.mlp(1).up_proj.weight.mul_(1e3)
        lm.embedding.weight[giant] *= 1e3
    found = measure(lm, [1], Passages(), 2000, store)[1]
    assert_close(found.C, direct(lm, 1, first_passages(Passages(), 2000)), rtol=2e-6)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "opt"])
def test_nothing_above_the_highest_layer_runs_and_no_hook_stays(family: str, store: Store) -> None:
    lm, ran = tiny_model(family), []
    watched = {f"block {i}": block for i, block in enumerate(lm.blocks)}
    watched |= {"memory 1": lm.memory(1), "memory 2": lm.memory(2), "head": lm.model.get_output_embeddings()}
    for name, part in watched.items():
        part.register_forward_hook(lambda m, args, out, name=name: ran.append(name))
    measure(lm, [0, 2], Passages(), 50, store)
    assert set(ran) == {"block 0", "block 1", "memory 1"}
    ids = torch.tensor([Passages().passage(1)])
    lm.model(ids)
    assert set(ran) == set(watched)
    assert all(not part._forward_pre_hooks for part in lm.model.modules())


@pytest.mark.parametrize("places", [1, 60, 10_000])
def test_batches_do_not_change_the_result(places: int, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moment_module, "BATCH_TOKENS", places)
    lm = tiny_model("gpt_neox")
    assert_close(measure(lm, [3], Passages(), 300, store)[3].C, direct(lm, 3, first_passages(Passages(), 300)))


def test_asking_again_reads_no_text(store: Store) -> None:
    lm, source = tiny_model("gpt2"), Passages()
    before = measure(lm, [1], source, 100, store)[1]
    again = replace(source, breaks=0, begins=())
    assert torch.equal(measure(lm, [1], again, 100, store)[1].C, before.C) and again.begins == ()


def test_more_tokens_go_on_from_the_sums_that_are_there(store: Store) -> None:
    lm, source = tiny_model("gpt2"), Passages()
    measure(lm, [1], source, 100, store)
    seen = len(first_passages(source, 100))
    assert_close(measure(lm, [1], source, 400, store)[1].C, direct(lm, 1, first_passages(source, 400)))
    assert source.begins == (0, seen)


def test_fewer_tokens_give_the_covariance_of_those_tokens_and_lose_nothing(store: Store) -> None:
    lm, source = tiny_model("gpt2"), Passages()
    many = measure(lm, [1], source, 400, store)[1]
    few = measure(lm, [1], source, 100, store)[1]
    assert few.tokens < many.tokens
    assert_close(few.C, direct(lm, 1, first_passages(source, 100)))
    source.begins = ()
    measure(lm, [1], source, 500, store)
    assert source.begins == (len(first_passages(source, 400)),)


def test_a_layer_that_joins_later_sees_the_same_text(store: Store) -> None:
    """Layer 1 is ahead of layer 3; one pass brings both to the same place, and counts no token twice."""
    lm, source = tiny_model("llama"), Passages()
    measure(lm, [1], source, 130, store)
    both = measure(lm, [1, 3], source, 400, store)
    for layer in (1, 3):
        assert_close(both[layer].C, direct(lm, layer, first_passages(source, 400)))
        assert both[layer].tokens == sum(map(len, first_passages(source, 400)))
    assert source.begins == (0, 0)


def test_an_interrupted_sum_goes_on_where_it_was_saved(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moment_module, "SAVE_EVERY_S", 0)
    lm, source = tiny_model("gpt2"), Passages(breaks=20)
    with pytest.raises(InterruptedError):
        measure(lm, [0, 1], source, 400, store)
    source.breaks = None
    found = measure(lm, [0, 1], source, 400, store)
    assert 0 < source.begins[1] <= 20
    for layer in (0, 1):
        assert_close(found[layer].C, direct(lm, layer, first_passages(source, 400)))


KILLED = """
import sys, time
import importlib
module = importlib.import_module("rome_lab.editing.second_moment")
from test_covariance import Passages, Store, tiny_model

class Stuck(Passages):
    def passage(self, number):
        if number == 20:
            print("stuck", flush=True)
            time.sleep(60)
        return super().passage(number)

module.SAVE_EVERY_S, module.BATCH_TOKENS = 0, 90
module.covariance(tiny_model("gpt2"), 1, Stuck(), 400, Store(sys.argv[1]), progress=False)
"""


@pytest.mark.slow
def test_a_killed_process_loses_only_the_last_stretch(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))},
    )
    assert process.stdout.readline() == "stuck\n"
    process.kill()
    process.wait()
    lm, source = tiny_model("gpt2"), Passages()
    found = measure(lm, [1], source, 400, Store(tmp_path))[1]
    assert 0 < source.begins[0] <= 20
    assert_close(found.C, direct(lm, 1, first_passages(source, 400)))


def test_other_models_layers_sources_and_tokenizers_have_results_of_their_own(store: Store) -> None:
    lm, source = tiny_model("gpt2"), Passages()
    measure(lm, [1], source, 100, store)
    other_seed, other_layer, other_model = Passages(seed=1), Passages(), Passages()
    assert_close(measure(lm, [1], other_seed, 100, store)[1].C, direct(lm, 1, first_passages(other_seed, 100)))
    assert_close(measure(lm, [0], other_layer, 100, store)[0].C, direct(lm, 0, first_passages(other_layer, 100)))
    with torch.no_grad():
        lm.memory(0).weight[0, 0] += 1
    assert_close(measure(lm, [1], other_model, 100, store)[1].C, direct(lm, 1, first_passages(other_model, 100)))
    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokenizer.add_tokens(["Colosseum"])
    other_tokenizer = Passages()
    measure(lm, [1], other_tokenizer, 100, store)
    for read in (other_seed, other_layer, other_model, other_tokenizer):
        assert read.begins == (0,)


def test_a_damaged_result_is_made_again(store: Store) -> None:
    lm = tiny_model("gpt2")
    before = measure(lm, [1], Passages(), 100, store)[1].C
    for path in (store.folder / "covariance").iterdir():
        path.write_bytes(path.read_bytes()[:-8])
    assert torch.equal(measure(lm, [1], Passages(), 100, store)[1].C, before)


def test_a_source_that_ends_early_says_how_much_was_seen(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    lm, source = tiny_model("gpt2"), Passages(end=4)
    with caplog.at_level(logging.WARNING):
        found = measure(lm, [1], source, 10_000, store)[1]
    assert found.tokens == sum(LENGTHS[:4]) and f"saw {found.tokens} tokens of the 10000" in caplog.text
    with pytest.raises(ValueError, match=f"{found.tokens} tokens cannot be inverted"):
        factorise(found.C, found.tokens)
    with pytest.raises(ValueError, match="holds no text"):
        measure(lm, [1], Passages(end=0), 100, store)


@pytest.mark.parametrize(
    ("layers", "tokens", "words"),
    [
        ([], 10, "no layers"),
        ([4], 10, "layers 0 to 3"),
        ([-1], 10, "layers 0 to 3"),
        ([0], 0, "tokens is 0"),
        ([0], 1.5, "tokens is 1.5"),
    ],
)
def test_bad_arguments_are_refused(layers: list[int], tokens: int, words: str, store: Store) -> None:
    with pytest.raises(ValueError, match=words):
        measure(tiny_model("gpt2"), layers, Passages(), tokens, store)


def test_broken_weights_are_named_and_leave_nothing_behind(store: Store) -> None:
    lm = tiny_model("gpt2")
    with torch.no_grad():
        lm.memory(0).weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="h.0.mlp.c_proj.weight"):
        measure(lm, [1], Passages(), 100, store)
    assert not list(store.folder.rglob("*.safetensors"))
    assert all(not part._forward_pre_hooks for part in lm.model.modules())


def test_a_store_that_cannot_be_written_is_found_out_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = Passages()
    with pytest.raises(OSError, match="Cannot write to the folder"):
        measure(tiny_model("gpt2"), [1], source, 100, Store(tmp_path / "file"))
    assert source.begins == ()


def slow_continuation(lm: LanguageModel, ids: list[int], draws: np.ndarray, top_k: int | None) -> list[int]:
    """One text by full forwards without a cache, drawn by walking through the probabilities."""
    ids = list(ids)
    while len(ids) < len(draws):
        logits = lm.model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        if top_k:
            logits[logits < logits.sort(descending=True).values[top_k - 1]] = -torch.inf
        token, left = 0, float(draws[len(ids)])
        for p in logits.softmax(-1).tolist():
            left -= p
            if left < 0:
                break
            token += 1
        if token in lm.tokenizer.all_special_ids:
            break
        ids.append(token)
    return ids


@pytest.mark.parametrize("top_k", [None, 5])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_texts_are_drawn_from_the_models_own_probabilities(family: str, top_k: int | None) -> None:
    lm = tiny_model(family)
    lm.model.get_output_embeddings().weight.div_(20)  # less sure of every token
    prompts = [lm.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    draws = torch.rand(len(prompts), 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    texts = continue_randomly(lm, prompts, draws, top_k)
    assert texts == [slow_continuation(lm, *pair, top_k) for pair in zip(prompts, draws.numpy(), strict=True)]
    assert sum(len(text) > len(prompt) for text, prompt in zip(texts, prompts, strict=True)) > 1


@pytest.mark.parametrize(("top_k", "shares"), [(None, [0.5, 0, 0.2, 0.3]), (2, [0.625, 0, 0, 0.375])])
def test_tokens_are_drawn_as_often_as_they_are_probable(top_k: int | None, shares: list[float]) -> None:
    logits = torch.tensor([0.5, 0, 0.2, 0.3]).log().expand(10_000, -1)
    uniform = torch.arange(10_000, dtype=torch.float64) / 10_000
    counts = torch.bincount(draw(logits, uniform, top_k), minlength=4)
    np.testing.assert_allclose(counts / 10_000, shares, atol=2e-4)
    assert counts[1] == 0


@pytest.mark.parametrize("size", [1, 255, 256, 257, 3000])
def test_a_token_is_drawn_where_the_cumulative_probability_exceeds_the_number(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(500, size, generator=generator)
    uniform = torch.rand(500, dtype=torch.float64, generator=generator)
    cumulative = logits.double().softmax(-1).cumsum(-1).numpy()
    expected = [
        int(np.searchsorted(row, u * row[-1], side="right")) for row, u in zip(cumulative, uniform, strict=True)
    ]
    assert (draw(logits, uniform, None).numpy() == expected).mean() > 0.995  # float32 may decide otherwise at a border


def test_what_has_no_probability_is_never_drawn() -> None:
    logits = torch.full((3, 600), -torch.inf)
    logits[:, 300] = 0
    uniform = torch.tensor([0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits, uniform, None).tolist() == [300] * 3
    assert draw(torch.arange(600.0).expand(3, -1) / 600, uniform, 1).tolist() == [599] * 3


def test_of_tokens_that_are_alike_greedy_text_takes_the_one_that_scores_take() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0]])
    for luck in (0.0, 0.6, 0.9):
        assert draw(logits, torch.tensor([luck], dtype=torch.float64), 1).tolist() == logits.argmax(-1).tolist()


def test_sampled_texts_depend_on_their_number_and_the_seed_alone(store: Store) -> None:
    lm = tiny_model("llama")
    together = SampledText(length=48).texts(lm, range(12))
    assert SampledText(length=48, batch_size=1).texts(lm, range(7, 12)) == together[7:]
    assert SampledText(length=48, batch_size=5).texts(lm, [3, 11, 2]) == [together[3], together[11], together[2]]
    assert len({tuple(text) for text in together}) == 12
    assert SampledText(length=48, seed=1).texts(lm, range(12)) != together
    assert [text[:5] for text in SampledText(length=48, top_k=1).texts(lm, range(12))] == [t[:5] for t in together]


def test_sampled_texts_begin_with_the_subjects_in_turn() -> None:
    lm, known = tiny_model("gpt2"), [subject for subject, _ in subjects_with_templates()]
    assert set(known) == {fact.subject for fact in load_facts("embedded")} and len(set(known)) == len(known)
    texts = [lm.tokenizer.decode(ids) for ids in SampledText().texts(lm, range(0, len(known), 97))]
    subjects = [max((subject for subject in known if subject in text), key=len) for text in texts]
    assert len(set(subjects)) > 0.9 * len(subjects)


def test_sampled_texts_leave_subjects_out_and_are_another_source() -> None:
    lm, known = tiny_model("gpt2"), [subject for subject, _ in subjects_with_templates()]
    source = SampledText(without=known[10:])
    assert {subject for subject, _ in source.subjects()} == set(known[:10])
    texts = [lm.tokenizer.decode(ids) for ids in source.texts(lm, range(20))]
    assert all(any(subject in text for subject in known[:10]) for text in texts)
    assert source.describe() != SampledText().describe()
    assert SampledText(without=["nobody at all"]).describe() == SampledText().describe()
    with pytest.raises(ValueError, match="SampledText: no subject is left to write about"):
        SampledText(without=known)


def test_sampled_texts_are_kept_and_read_from_any_number_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, source = tiny_model("gpt2"), SampledText(length=8)
    count = TEXTS_A_FILE + 30
    texts = list(itertools.islice(source.passages(lm, store, 0), count))
    assert texts == source.texts(lm, range(count))
    monkeypatch.setattr(SampledText, "sample", None)
    assert (
        list(itertools.islice(source.passages(lm, store, TEXTS_A_FILE - 3), 20))
        == texts[TEXTS_A_FILE - 3 : TEXTS_A_FILE + 17]
    )
    again = replace(source, batch_size=3)
    assert next(again.passages(lm, store, TEXTS_A_FILE + 5)) == texts[TEXTS_A_FILE + 5]


def test_covariance_of_sampled_text_is_the_default_and_that_of_its_tokens(store: Store) -> None:
    lm = tiny_model("gpt2")
    found = covariances(lm, [1], tokens=300, store=store, progress=False)[1]
    texts = SampledText().texts(lm, range(TEXTS_A_FILE))
    ends = np.cumsum([len(text) for text in texts])
    chosen = texts[: int(np.searchsorted(ends, 300)) + 1]
    assert found.tokens == sum(map(len, chosen)) and found.source == SampledText().describe()
    assert_close(found.C, direct(lm, 1, chosen))


def test_a_folder_is_read_whole_in_the_order_of_names(tmp_path: Path, store: Store) -> None:
    lm, text = tiny_model("gpt2"), "The café in Zürich is called Rome.\n" * 40
    (tmp_path / "b.txt").write_text(text, encoding="utf-8")
    (tmp_path / "a.txt").write_text("Paris", encoding="utf-8")
    (tmp_path / "note.md").write_text("Tokyo", encoding="utf-8")
    passages = list(FolderText(tmp_path, length=20).passages(lm, store, 0))
    assert lm.tokenizer.decode(sum(passages, [])) == "Paris" + text
    assert all(len(passage) == 20 for passage in passages[1:-1])
    assert list(FolderText(tmp_path, length=20).passages(lm, store, 5)) == passages[5:]


def test_every_passage_begins_with_the_special_tokens_that_begin_a_text(tmp_path: Path, store: Store) -> None:
    lm = tiny_model("llama")
    lm.tokenizer = copy.deepcopy(lm.tokenizer)
    lm.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    (tmp_path / "a.txt").write_text("The Eiffel Tower is located in the city of Paris.", encoding="utf-8")
    passages = list(FolderText(tmp_path, length=6).passages(lm, store, 0))
    assert len(passages) > 1 and all(ids[0] == 0 and 0 not in ids[1:] and len(ids) <= 6 for ids in passages)


def test_a_folder_is_known_by_what_its_files_hold(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("Paris", encoding="utf-8")
    one, two = FolderText(tmp_path / "one"), FolderText(tmp_path / "two")
    assert one.describe() == two.describe() != replace(one, length=7).describe()
    (tmp_path / "two" / "a.txt").write_text("Rome", encoding="utf-8")
    assert one.describe() != two.describe()


def test_folders_without_readable_text_are_refused(tmp_path: Path, store: Store) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \*.txt files"):
        FolderText(tmp_path).describe()
    (tmp_path / "a.txt").write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(ValueError, match="a.txt is not UTF-8"):
        list(FolderText(tmp_path).passages(tiny_model("gpt2"), store, 0))


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the package datasets is installed")
def test_wikipedia_without_its_package_says_what_to_do(store: Store) -> None:
    with pytest.raises(ImportError, match=r"pip install datasets.*SampledText\(\) or FolderText"):
        measure(tiny_model("gpt2"), [1], WikipediaText(), 100, store)


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="the package datasets is not installed")
def test_wikipedia_without_a_network_says_what_to_do(store: Store) -> None:
    with pytest.raises(ConnectionError, match=r"check the network.*SampledText\(\) or FolderText"):
        measure(tiny_model("gpt2"), [1], WikipediaText(edition="20231101.none"), 100, store)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SampledText(seed=-1),
        lambda: SampledText(length=1),
        lambda: SampledText(top_k=0),
        lambda: FolderText(".", 0),
    ],
)
def test_bad_options_of_sources_are_refused(make) -> None:
    with pytest.raises(ValueError, match="expected a whole number of at least"):
        make()


def test_texts_longer_than_the_model_reads_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="length is 65.*at most 64"):
        measure(tiny_model("gpt2"), [1], SampledText(length=65), 100, store)


def test_the_embedded_model_takes_exact_updates_that_text_hardly_notices(
    lm: LanguageModel, tmp_path: Path, store: Store
) -> None:
    sentences = [f"{fact.prompt} {fact.object}.\n" for fact in load_facts("embedded")[::7]]
    (tmp_path / "facts.txt").write_text("".join(sentences), encoding="utf-8")
    measured = measure(lm, [6], FolderText(tmp_path, length=64), 3000, store)[6]
    W, keys = lm.memory(6).weight, []
    run_to_keys(lm, torch.tensor([lm.tokenizer("Paris is in France, and Rome is in Italy")["input_ids"]]), [6],
                lambda layer, k: keys.append(k[0, -2:].T))  # fmt: skip
    K, V = keys[0], 2 * W.detach() @ keys[0].flip(1)
    update = solve_update(W, factorise(measured.C, measured.tokens), K, V)
    assert float(constraint_error(apply_update(W, update, K, V), K, V).max()) < 1e-6
    least_squares = solve_update(W, torch.eye(len(K)), K, V)  # the smallest change of W, whatever text it disturbs
    assert penalty(update.delta, measured.C) < 0.5 * penalty(least_squares.delta, measured.C)


def test_a_store_is_named_by_its_folder_or_is_none(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    lm = tiny_model("gpt2")
    C = covariance(lm, 1, Passages(), 100, store="results", progress=False)
    assert list((tmp_path / "results" / "covariance").iterdir()) and not (tmp_path / "cache").exists()
    again = Passages()
    assert torch.equal(covariance(lm, 1, again, 100, store=Path("results"), progress=False), C) and not again.begins
    assert torch.equal(covariance(lm, 1, Passages(), 100, store=None, progress=False), C)
    assert not (tmp_path / "cache").exists()
    covariance(lm, 1, Passages(), 100, progress=False)
    assert list((tmp_path / "cache" / "covariance").iterdir())


@pytest.mark.parametrize("what", ["products", "torch", "code", "dtype"])
def test_products_and_versions_are_in_the_keys_of_C_and_of_sampled_text(what: str, tmp_path: Path, monkeypatch) -> None:
    lm, store = tiny_model("llama"), Store(tmp_path)

    def made() -> set[Path]:
        covariance(lm, 1, SampledText(length=16), 200, store, progress=False)
        return set(tmp_path.glob("*/*"))

    first = made()
    assert {path.parent.name for path in first} == {"covariance", "sampled-text"} and made() == first
    if what == "products":
        monkeypatch.setattr(identity_module, "precisions", lambda: ("tf32", "tf32", "tf32"))
    elif what == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    elif what == "dtype":
        lm.model.double()
    else:
        monkeypatch.setattr(second_moment_module, "code_version", lambda name: "another")
        monkeypatch.setattr(texts_module, "code_version", lambda name: "another")
    new = made() - first
    assert {path.parent.name for path in new} == {"covariance", "sampled-text"}, "both are to be made anew"
