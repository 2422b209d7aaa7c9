"""Whatever is written into prompts, files and parameters: a right result, or one clear sentence, and never another error."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import nbformat
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from safetensors import safe_open
from safetensors.torch import save_file
from test_edit_files import same
from test_editing import FEW, covariance_of, make
from tiny import tiny_model

from rome_lab import Edit, Fact, causal_trace, describe_edit, load_edit, load_facts, rome
from rome_lab.editing.edit import VECTORS, checksum
from rome_lab.evaluation.cases import load_cases
from rome_lab.facts.prompts import continuation_ids
from rome_lab.lab import plots
from rome_lab.lab.batch import main, prepare, read_parameters_file
from rome_lab.lab.parameters import read_parameters

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
ODD = "\x00\n\r\t {}[]<>\"'\\$%&€é\u0301\u200b\u2028\u202e\ufeff\ufffd東🗼🇫🇷\ud83d\udc00aB1"
TEXT = st.text(st.sampled_from(ODD) | st.characters(), max_size=12)  # halves of characters too
WORD = TEXT.map(str.strip).filter(bool)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
T = TypeVar("T")


def sentence_or(call: Callable[[], T]) -> T | None:
    """What the call returns; None where it says in one sentence why it returns nothing."""
    try:
        return call()
    except (ValueError, OSError) as error:
        assert not isinstance(error, UnicodeError), "that is no sentence of ours"
        said = str(error)
        assert said.endswith((".", "...")) and len(said.splitlines()) == 1 and len(said.split()) > 4, repr(said)
        return None


@pytest.fixture(scope="module")
def gpt():
    """A model with positions of its own, which has no place for texts that are too long."""
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def C(gpt):
    return covariance_of(gpt, 1)


@pytest.fixture(scope="module")
def edit():
    return make(tiny_model("llama"))


# Prompts, subjects, targets


@settings(max_examples=60)
@given(TEXT, TEXT, TEXT)
def test_a_trace_of_any_text_follows_the_models_own_answer_at_the_tokens_of_the_subject(gpt, before, subject, after):
    t = sentence_or(lambda: causal_trace(gpt, before + subject + after, subject, samples=1))
    if t is None:
        return
    ids = torch.tensor(gpt.tokenizer(before + subject + after)["input_ids"])
    begin, end = t.subject_range
    assert subject in gpt.tokenizer.decode(ids[begin:end]) and subject not in gpt.tokenizer.decode(ids[begin + 1 : end])
    with torch.no_grad():
        assert t.p_clean == pytest.approx(float(gpt.model(ids[None]).logits[0, -1].softmax(-1).max()), rel=1e-4)
    assert t.p_restored.shape == (len(ids), gpt.n_layers) and ((t.p_restored >= 0) & (t.p_restored <= 1)).all()


@settings(max_examples=8)
@given(WORD)
def test_a_trace_of_any_text_can_be_drawn(gpt, subject):
    t = sentence_or(lambda: causal_trace(gpt, f"The {subject} is", subject, samples=1))
    if t is not None:
        figure = Figure()
        plots.heatmap(t, figure.subplots())
        figure.savefig(io.BytesIO(), format="png", dpi=20)


@settings(max_examples=60)
@given(WORD, TEXT, TEXT, WORD, TEXT)
def test_an_edit_of_any_text_meets_its_constraint_and_leaves_the_model_as_it_was(
    gpt, C, subject, before, after, said, target
):
    original = gpt.fingerprint()
    fact = sentence_or(lambda: Fact(subject, before.replace("{}", "") + "{}" + after, said))
    edit = fact and sentence_or(lambda: rome(gpt, fact, target, 1, C=C, hparams=FEW, progress=False))
    assert gpt.fingerprint() == original
    if edit is None:
        return
    begin, end = fact.subject_span
    assert fact.prompt[begin:end] == subject and edit.constraint_error < 1e-4
    with edit.applied(gpt):
        assert gpt.fingerprint() != original
    assert gpt.fingerprint() == original
    with tempfile.TemporaryDirectory() as folder:
        assert same(load_edit(edit.save(f"{folder}/x.safetensors")), edit)


@settings(max_examples=400)
@given(TEXT, TEXT)
def test_a_continuation_is_never_empty_and_says_what_it_was_asked_to(gpt, prompt, continuation):
    ids = sentence_or(lambda: continuation_ids(gpt, prompt, continuation))
    assert ids is None or gpt.tokenizer.decode(ids).lstrip(" ") == continuation.lstrip(" ")


# Files of facts


OWN = [
    {"subject": "Eiffel Tower", "template": "The {} is in", "object": "Paris", "relation": "city"},
    {"subject": "Big Ben", "template": "The {} is in", "object": "London", "relation": "city"},
]
REWRITE = {"prompt": "{} is in", "relation_id": "P1", "subject": "Lima", "target_new": {"str": "Chile"}}
COUNTERFACT = {
    "case_id": 1,
    "requested_rewrite": REWRITE | {"target_true": {"str": "Peru"}},
    "paraphrase_prompts": ["Where is Lima? In"],
    "neighborhood_prompts": ["Cusco is in", "Puno is in"],
    "attribute_prompts": ["Arica is in"],
    "generation_prompts": ["Lima is known for"],
}
QUESTION = {"subject": "Lima", "src": "Where is Lima?", "rephrase": "Lima lies where?", "alt": "Chile"}
ZSRE = QUESTION | {"answers": ["Peru"], "loc": "nq question: who", "loc_ans": "me"}
PUT = {"subject": "Lima", "attribute": "Peru", "template": "{} is in", "prompt": "Lima is in", "relation_id": "P1"}
CSV = 'subject,template,object\nLima,{} is in,Peru\n"Big, Ben",The {} is in,London\n'
FILES = [*(json.dumps(x) for x in (OWN, [COUNTERFACT], [ZSRE], [PUT])), CSV]


@st.composite
def mangled(draw, whole: st.SearchStrategy[bytes]) -> bytes:
    """Some bytes, of which a piece has been replaced by others, at a few places."""
    data = draw(whole)
    for _ in range(draw(st.integers(1, 3))):
        begin = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 20) | st.just(len(data)))
        data = data[:begin] + draw(st.binary(max_size=8) | TEXT.map(ascii).map(str.encode)) + data[begin + length :]
    return data


@st.composite
def changed(draw, whole: object) -> object:
    """A JSON value in which something, at whatever depth, has been replaced, removed or added."""
    if isinstance(whole, list | dict) and whole and draw(st.integers(0, 4)):
        place = draw(st.sampled_from(list(whole) if isinstance(whole, dict) else range(len(whole))))
        inner = draw(changed(whole[place]) | st.just(...))
        if isinstance(whole, dict):
            return {k: v for k, v in (whole | {place: inner}).items() if v is not ...}
        return [v for v in (*whole[:place], inner, *whole[place + 1 :]) if v is not ...]
    return draw(JSON)


def check_file_of_facts(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"facts.{suffix}"
        path.write_bytes(content)
        for fact in sentence_or(lambda: load_facts(path)) or ():
            assert isinstance(fact, Fact) and fact.subject in fact.prompt and fact.object.strip()
        for case in sentence_or(lambda: load_cases(path)) or ():
            assert case.paraphrases and case.neighbours and case.target.strip()


@settings(max_examples=400)
@given(mangled(st.sampled_from(FILES).map(str.encode)), st.sampled_from(["json", "csv", "txt"]))
def test_a_file_of_facts_with_any_bytes_gives_facts_or_a_sentence(content, suffix):
    check_file_of_facts(content, suffix)


@settings(max_examples=400)
@given(st.sampled_from([OWN, [COUNTERFACT], [ZSRE], [PUT]]).flatmap(changed))
def test_a_file_of_facts_with_any_values_gives_facts_or_a_sentence(records):
    check_file_of_facts(json.dumps(records).encode(), "json")


# Files of edits


@settings(max_examples=400)
@given(st.data())
def test_an_edit_file_with_any_bytes_is_refused_or_the_same_edit(edit, data):
    with tempfile.TemporaryDirectory() as folder:
        path = edit.save(f"{folder}/x.safetensors")
        path.write_bytes(data.draw(mangled(st.just(path.read_bytes()))))
        loaded = sentence_or(lambda: load_edit(path))
        assert loaded is None or same(loaded, edit)


@settings(max_examples=400)
@given(st.data())
def test_an_edit_file_forged_with_a_fitting_checksum_is_refused_or_can_be_undone(edit, data):
    lm = tiny_model("llama")
    with tempfile.TemporaryDirectory() as folder:
        path = edit.save(f"{folder}/x.safetensors")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in VECTORS}
        about = json.dumps(data.draw(changed(json.loads(metadata["about"]))))
        save_file(tensors, path, metadata=metadata | {"about": about, "sha256": checksum(tensors, about)})
        loaded = sentence_or(lambda: load_edit(path))
        sentence_or(lambda: describe_edit(path))
        if loaded is not None:
            assert isinstance(loaded, Edit) and str(loaded)
            original = lm.fingerprint()
            sentence_or(lambda: loaded.apply(lm))
            if lm.edits:
                loaded.undo(lm)
            assert lm.fingerprint() == original


# Parameters and notebooks


PARAMETERS = [{name: x.default for name, x in read_parameters(nbformat.read(p, 4), "").items()} for p in NOTEBOOKS]


@settings(max_examples=400)
@given(st.integers(0, len(NOTEBOOKS) - 1).flatmap(lambda i: st.tuples(st.just(NOTEBOOKS[i]), changed(PARAMETERS[i]))))
def test_parameters_of_any_type_fit_or_are_refused_in_a_sentence(notebook_and_values):
    notebook, values = notebook_and_values
    if isinstance(values, dict):
        sentence_or(lambda: prepare(notebook, values))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.yml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8", errors="surrogatepass")
        sentence_or(lambda: prepare(notebook, read_parameters_file(path)))


@settings(max_examples=400)
@given(mangled(st.sampled_from(PARAMETERS).map(yaml.safe_dump).map(str.encode)))
def test_a_parameters_file_with_any_bytes_is_read_or_refused_on_the_command_line_in_one_line(content):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()) as error:
        path = Path(folder) / "p.yml"
        path.write_bytes(content)
        if sentence_or(lambda: prepare(NOTEBOOKS[0], read_parameters_file(path))) is None:
            assert main([str(NOTEBOOKS[0]), "--params", str(path)]) == 2
            assert error.getvalue().count("\n") == 1 and error.getvalue().startswith("rome_lab.batch: ")


@settings(max_examples=400)
@given(mangled(st.just(NOTEBOOKS[0].read_bytes())) | changed(json.loads(NOTEBOOKS[0].read_text())).map(json.dumps))
def test_a_mangled_notebook_is_prepared_or_refused_in_a_sentence(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.ipynb"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        sentence_or(lambda: prepare(path, {}))
