"""Offloaded models: the plain model's numbers exactly, edits that reach what is kept elsewhere, no second copy."""

from __future__ import annotations

import gc
import hashlib

import accelerate
import numpy as np
import pandas as pd
import pytest
import torch
from bench import JUDGING, UNRELATED, case, small
from test_editing import FACT, FEW, OTHER, logits, make
from tiny import tiny_model, tokenizer
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from rome_lab import LanguageModel, causal_trace, covariance, evaluate, known_facts, load_edit, load_facts, load_model
from rome_lab.base.store import Store
from rome_lab.editing.values import Objective, optimise_values
from rome_lab.models.changes import Change
from rome_lab.models.weights import every_weight
from rome_lab.tracing.trace import KINDS

FAMILIES = ("gpt2", "llama")
PLACES = ("memory", "disk", "mixed")  # where the weights are kept
PROMPT = ("The Eiffel Tower is located in the city of", "Eiffel Tower")

pytestmark = pytest.mark.usefixtures("shared_cache")


@pytest.fixture(scope="module", params=[(family, place) for family in FAMILIES for place in PLACES], ids="-".join)
def pair(request, tmp_path_factory):
    """A plain model, and the same with its weights kept elsewhere."""
    family, place = request.param
    return tiny_model(family), offloaded(family, place, tmp_path_factory.mktemp("model"))


def offloaded(family, place, folder):
    """A tiny model with all weights in the CPU's memory, all on disk, or every other block on disk, between calls."""
    lm = tiny_model(family)
    if place == "memory":
        return LanguageModel(accelerate.cpu_offload(lm.model, torch.device("cpu")), tokenizer(), name=lm.name)
    lm.save_pretrained(folder / "saved")
    places = {name: "disk" for name, _ in lm.model.named_children()}
    if place == "mixed":
        base = lm.model.base_model_prefix
        places = {f"{base}.{name}": "cpu" for name, _ in lm.model.base_model.named_children()} | {"lm_head": "cpu"}
        del places[lm.layout.blocks]
        places |= {f"{lm.layout.blocks}.{layer}": ("cpu", "disk")[layer % 2] for layer in range(lm.n_layers)}
    loaded = load_model(str(folder / "saved"), device_map=places)
    return LanguageModel(loaded.model, loaded.tokenizer, name=lm.name)


def is_everywhere_equal(one, other):
    return all(
        torch.equal(x, y) and m == n for (m, x), (n, y) in zip(every_weight(one), every_weight(other), strict=True)
    )


def test_the_weights_are_elsewhere_and_the_model_is_the_same_to_every_cache(pair):
    plain, off = pair
    assert off.memory(1).weight.is_meta
    assert (off.device, off.dtype) == (torch.device("cpu"), torch.float32)
    assert off.identity().key() == plain.identity().key()
    assert is_everywhere_equal(plain.model, off.model)


@pytest.mark.parametrize("label", KINDS)
def test_traces_are_those_of_the_plain_model(pair, label):
    kind, severed = KINDS[label]
    one, other = (causal_trace(lm, *PROMPT, kind, samples=3, window=2, severed=severed) for lm in pair)
    assert (one.p_clean, one.p_corrupted) == (other.p_clean, other.p_corrupted)
    np.testing.assert_array_equal(one.p_restored, other.p_restored)
    assert one.p_restored.std() > 1e-4


def test_known_facts_are_those_of_the_plain_model(pair):
    facts = load_facts("embedded")[:6]
    one, other = (known_facts(lm, facts, None, max_new_tokens=4, batch_size=8, progress=False) for lm in pair)
    assert one == other and one.report.tried == 6


def test_the_covariance_is_that_of_the_plain_model(pair, tmp_path):
    stores = [Store(tmp_path / name) for name in ("plain", "off")]
    one, other = (covariance(lm, 1, tokens=500, store=at, progress=False) for lm, at in zip(pair, stores, strict=True))
    assert torch.equal(one, other)


def test_an_edit_is_that_of_the_plain_model_and_is_undone_bit_for_bit(pair, tmp_path):
    plain, off = pair
    before, said = off.fingerprint(), logits(off)
    edit = make(off)
    expected = make(plain)
    assert edit.digest == expected.digest and edit.constraint_error == expected.constraint_error < 1e-5
    other = load_edit(make(off, OTHER, "Tokyo").save(tmp_path / "other.safetensors"))
    with edit.applied(off), other.applied(off):
        with expected.applied(plain), other.applied(plain):
            assert off.fingerprint() == plain.fingerprint() != before
            assert torch.equal(logits(off), logits(plain)) and not torch.equal(logits(off), said)
        off.save_pretrained(tmp_path / "edited")
        again = load_model(str(tmp_path / "edited"), device="cpu")
        assert again.fingerprint() == off.fingerprint() and torch.equal(logits(again), logits(off))
        edit.undo(off)
        with other.applied(plain):
            assert off.fingerprint() == plain.fingerprint()
    assert off.fingerprint() == before and torch.equal(logits(off), said)


def test_a_checkpoint_on_disk_is_never_written_to(tmp_path):
    off = offloaded("llama", "disk", tmp_path)

    def on_disk():
        return {path: hashlib.sha256(path.read_bytes()).digest() for path in tmp_path.rglob("*") if path.is_file()}

    before = on_disk()
    with make(off).applied(off), Change(2, torch.ones_like(off.weight(2))).applied(off):
        assert on_disk() == before
    assert on_disk() == before


def test_a_change_in_place_reaches_what_is_kept_elsewhere_and_is_taken_back(pair):
    plain, off = pair
    change, before = Change(1, torch.full(plain.weight(1).shape, 0.5)), off.fingerprint()
    with change.applied(off), change.applied(plain):
        assert torch.equal(logits(off), logits(plain))
    assert off.fingerprint() == before


def test_evaluation_says_what_it_says_of_the_plain_model(pair):
    methods = [small(name) for name in ("none", "rome", "ft", "ft-linf")]
    tables = [
        evaluate(lm, [case(0, "Paris")], methods, settings=JUDGING, unrelated=UNRELATED, progress=False) for lm in pair
    ]
    assert tables[0]["judged"].all()
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_a_device_map_that_transformers_works_out_itself_is_taken(tmp_path):
    plain = tiny_model("gpt2")
    plain.save_pretrained(tmp_path / "saved")
    off = load_model(str(tmp_path / "saved"), device_map="auto", max_memory={"cpu": 100_000})
    assert set(off.model.hf_device_map.values()) == {"cpu", "disk"}
    assert off.fingerprint() == plain.fingerprint() and torch.equal(logits(off), logits(plain))


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"device": "cpu", "device_map": "auto"}, "device is 'cpu' and device_map 'auto'; give only one"),
        ({"device_map": "attic"}, "attic"),
    ],
)
def test_a_wrong_device_map_is_refused_in_a_sentence(tmp_path, wrong, sentence):
    tiny_model("gpt2").save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=sentence):
        load_model(str(tmp_path / "saved"), **wrong)


def test_a_model_without_values_is_refused_in_a_sentence():
    lm = tiny_model("gpt2")
    lm.model.to("meta")
    with pytest.raises(ValueError, match="on the meta device, without values; load the model"):
        _ = lm.fingerprint()


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors that an operation has read or made and that still exist; `peak` is the most.

    They are counted anew only where they may be more than ever: `bound` counts the ones that are gone, too.
    """

    def __init__(self):
        super().__init__()
        self.seen, self.bound, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen or self.seen[storage._cdata][0].expired():
                    self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self.bound += storage.nbytes()
        if self.bound > self.peak:
            self.bound = self.bytes
            self.peak = max(self.peak, self.bound)
        return result

    @property
    def bytes(self):
        self.seen = {key: value for key, value in self.seen.items() if not value[0].expired()}
        return sum(size for _, size in self.seen.values())


def sizes(lm):
    """Bytes of all weights, and of the largest."""
    each = [tensor.nbytes for _, tensor in every_weight(lm.model)]
    return sum(each), max(each)


def peak(work):
    gc.collect()
    with Ledger() as ledger:
        work()
    return ledger.peak


@pytest.fixture(scope="module", params=FAMILIES)
def on_disk(request, tmp_path_factory):
    """A plain model, and the same with its weights on disk."""
    return tiny_model(request.param), offloaded(request.param, "disk", tmp_path_factory.mktemp("model"))


def test_the_fingerprint_reads_one_weight_after_the_other(on_disk):
    plain, off = on_disk
    _, largest = sizes(plain)
    assert peak(lambda: off.fingerprint()) <= 2 * largest


def test_tracing_has_one_weight_in_memory_at_a_time(on_disk):
    total, largest = sizes(on_disk[0])
    whole, one = (peak(lambda lm=lm: causal_trace(lm, *PROMPT, samples=1, max_rows=1)) for lm in on_disk)
    assert one <= whole - total + largest


def test_the_gradient_of_v_star_comes_back_through_one_block_at_a_time(on_disk):
    def optimise(lm):
        objective = Objective(lm, 0, [(FACT, "Rome")], torch.ones(1, 32), FEW)
        found = {}
        return peak(lambda: found.update(v=optimise_values(objective, progress=False))), found["v"][0].delta

    (whole, one), (some, other) = map(optimise, on_disk)
    total, largest = sizes(on_disk[0])
    block = sum(parameter.nbytes for parameter in on_disk[0].blocks[0].parameters())
    assert torch.equal(one, other)
    # The block whose W is edited, the one that the gradient has come to, and the output embeddings; not all four.
    assert some <= whole - total + 2 * block + largest


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_keeps_the_original_of_its_own_matrix_and_no_other(family):
    lm = tiny_model(family)
    edit, W = make(lm), lm.weight(1)
    vectors = edit.Lambda.nbytes + edit.u.nbytes
    total, _ = sizes(lm)
    with Ledger() as ledger:
        edit.apply(lm)
        gc.collect()
        assert W.nbytes <= ledger.bytes - total <= W.nbytes + vectors
        edit.undo(lm)
        gc.collect()
        assert ledger.bytes - total <= vectors
