"""Files of edits: what was saved is loaded, and nothing else is."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from test_editing import FACT, FEW, OTHER, covariance_of, edit_of_embedded_model, logits, make
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rome_lab.editing.edit import FORMER_FORMATS, VECTORS, checksum, describe_edit, load_edit
from rome_lab.editing.exact import rome_many
from rome_lab.facts.fact import Fact

ODD = Fact('the "{}" of {x}', "On {} is", "naïve 東京", "odd relation", ("On {} is", "{}: "))


@pytest.fixture(scope="module")
def edit():
    return make(tiny_model("llama"))


def same(left, right) -> bool:
    for field in fields(left):
        x, y = getattr(left, field.name), getattr(right, field.name)
        if isinstance(x, torch.Tensor):
            if not (torch.equal(x, y) and x.dtype == y.dtype):
                return False
        elif isinstance(x, pd.DataFrame):
            if not x.reset_index(drop=True).equals(y.reset_index(drop=True)):
                return False
        elif x != y:
            return False
    return True


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def rewrite(path: Path, change_tensors=lambda x: x, **changes) -> None:
    """Write the file again with other content and a checksum that fits, as only a determined person would."""
    metadata = header(path)
    with safe_open(path, framework="pt") as file:
        tensors = change_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    about = json.dumps(json.loads(metadata["about"]) | changes)
    save_file(tensors, path, metadata=metadata | {"about": about, "sha256": checksum(tensors, about)})


def test_what_is_loaded_is_what_was_saved(tmp_path, edit) -> None:
    lm = tiny_model("gpt2")
    several = rome_many(
        lm, [(ODD, "Rome"), (OTHER, " x {y} '")], 2, C=covariance_of(lm, 2), hparams=FEW, progress=False
    )
    for saved in (edit, several):
        loaded = load_edit(saved.save(tmp_path / "folder" / "an edit.safetensors"))
        assert same(loaded, saved) and loaded.digest == saved.digest and str(loaded) == str(saved)
    assert loaded.settings.prefixes == FEW.prefixes, "tuples stay tuples"


def test_a_loaded_edit_is_the_same_edit(tmp_path, edit) -> None:
    lm = tiny_model("llama")
    loaded = load_edit(edit.save(tmp_path / "edit.safetensors"))
    edit.apply(lm)
    expected = logits(lm)
    with pytest.raises(ValueError, match="is in force already"):
        loaded.apply(lm)
    loaded.undo(lm)
    with loaded.applied(lm):
        assert torch.equal(logits(lm), expected)
    with pytest.raises(ValueError, match="is for another model"):
        loaded.apply(tiny_model("llama", seed=1))


def test_a_file_of_the_embedded_models_edit_is_small_and_says_what_it_is(tmp_path, lm) -> None:
    embedded_edit = edit_of_embedded_model(lm)
    path = embedded_edit.save(tmp_path / "rome.safetensors")
    assert path.stat().st_size < 100_000
    assert same(load_edit(path), embedded_edit)
    said = describe_edit(path)
    assert "'The Eiffel Tower is located in the city of' -> 'Rome' (was 'Paris')" in said
    assert "rank 2, of model.layers.6.mlp.down_proj (layer 6), key 'both'" in said
    assert embedded_edit.fingerprint[:12] in said and f"torch {torch.__version__}" in said


def former_file(edit, path: Path) -> Path:
    """The edit as it was saved before: no function of the model, and a fingerprint that nothing today has."""
    edit.save(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in VECTORS}
    about = json.loads(header(path)["about"]) | {"fingerprint": "0" * 64}
    for name in ("function", "below", "solution"):
        del about[name]
    text = json.dumps(about)
    metadata = {"format": FORMER_FORMATS[0], "about": text, "sha256": checksum(tensors, text, FORMER_FORMATS[0])}
    save_file(tensors, path, metadata=metadata)
    return path


def test_a_file_of_before_is_read_and_applied_to_its_own_model_with_a_warning(tmp_path, edit, caplog) -> None:
    lm = tiny_model("llama")
    former = load_edit(former_file(edit, tmp_path / "former.safetensors"))
    assert former.function is None and torch.equal(former.delta, edit.delta)
    with former.applied(lm):
        assert "does not say enough of its model" in caplog.text
        assert torch.equal(logits(lm), logits_with(edit))
    again = load_edit(former.save(tmp_path / "again.safetensors"))
    assert again.function is None and again.digest == former.digest
    for other in (tiny_model("llama", seed=1), tiny_model("gptj")):
        before = other.fingerprint()
        with pytest.raises(
            ValueError, match="is for another model than the tiny-.*misses v.*|does not fit the matrices"
        ):
            former.apply(other)
        assert other.fingerprint() == before and not other.edits


def test_files_of_before_that_were_made_apart_are_in_force_together(tmp_path, edit) -> None:
    other = make(tiny_model("llama"), OTHER)
    first, second = (load_edit(former_file(x, tmp_path / f"{x.target}.safetensors")) for x in (edit, other))
    for order in ((first, second), (second, first)):
        lm = tiny_model("llama")
        before = lm.fingerprint()
        for former in order:
            former.apply(lm)
        assert lm.edits == list(order)
        for former in order:
            former.undo(lm)
        assert lm.fingerprint() == before


def logits_with(edit) -> torch.Tensor:
    lm = tiny_model("llama")
    with edit.applied(lm):
        return logits(lm)


def test_the_function_of_the_model_is_kept_in_the_file(tmp_path, edit) -> None:
    function = load_edit(edit.save(tmp_path / "edit.safetensors")).function
    assert function == tiny_model("llama").identity().function and function["model_type"] == "llama"


def test_every_truncation_is_refused(tmp_path, edit) -> None:
    path = edit.save(tmp_path / "edit.safetensors")
    whole = path.read_bytes()
    for length in {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is no edit, or was truncated"):
            load_edit(path)


def test_every_altered_byte_is_refused(tmp_path, edit) -> None:
    path = edit.save(tmp_path / "edit.safetensors")
    whole = path.read_bytes()
    for place in range(0, len(whole), 37):
        altered = bytearray(whole)
        altered[place] ^= 1 << (place % 7)
        path.write_bytes(altered)
        with pytest.raises(ValueError, match="load_edit: "):
            load_edit(path)


@pytest.mark.parametrize(
    "alter, sentence",
    [
        (lambda path: rewrite(path, lambda t: t | {"u": t["u"][:-1]}), "the shapes are"),
        (lambda path: rewrite(path, lambda t: t | {"u": t["u"].double()}), "u is torch.float64"),
        (lambda path: rewrite(path, lambda t: t | {"u": t["u"].bfloat16()}), "u is torch.bfloat16"),
        (lambda path: rewrite(path, lambda t: t | {"Lambda": t["Lambda"] * float("nan")}), "or holds NaN"),
        (lambda path: rewrite(path, layer="1"), "layer is '1'"),
        (lambda path: rewrite(path, targets=[]), "it has 1 facts and 0 targets"),
        (lambda path: rewrite(path, extra=1), "expected the entries below, constraint_error"),
        (lambda path: rewrite(path, settings={"steps": 0}), "steps is 0"),
        (lambda path: rewrite(path, settings={"stops": 1}), "stops"),
        (lambda path: rewrite(path, facts=[asdict(FACT) | {"subject": ""}]), "the subject is empty"),
    ],
)
def test_content_that_is_no_edit_is_refused_though_its_checksum_fits(tmp_path, edit, alter, sentence) -> None:
    path = edit.save(tmp_path / "edit.safetensors")
    alter(path)
    with pytest.raises(ValueError, match=f"does not hold a possible edit: .*{sentence}"):
        load_edit(path)


def test_other_files_and_missing_ones_are_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file .*none.safetensors; give the path"):
        load_edit(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        describe_edit(tmp_path)
    save_file({"x": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not in the format 'rome_lab edit 3'"):
        load_edit(tmp_path / "other.safetensors")
    torch.save({"x": 1}, tmp_path / "pickle.safetensors")
    with pytest.raises(ValueError, match="is no edit"):
        load_edit(tmp_path / "pickle.safetensors")


def test_a_folder_that_cannot_be_written_is_an_error_and_keeps_the_old_file(tmp_path, edit, monkeypatch) -> None:
    path = edit.save(tmp_path / "edit.safetensors")
    whole = path.read_bytes()

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Cannot write to the folder .*read-only; choose another folder"):
        replace(edit, converged=False).save(path)
    assert path.read_bytes() == whole and [x.name for x in tmp_path.iterdir()] == [path.name]


def test_a_saved_edited_model_is_loaded_by_plain_transformers_with_identical_logits(tmp_path, edit) -> None:
    lm = tiny_model("llama")
    plain = logits(lm)
    with edit.applied(lm):
        lm.save_pretrained(tmp_path / "edited")
        expected = logits(lm)
    assert not torch.equal(plain, expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "edited").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "edited")
    ids = torch.tensor([tokenizer("The Eiffel Tower is in the city")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
