"""`rl.verify`: what it finds of models that are traced exactly, of one that is not, and what follows from that."""

from __future__ import annotations

import logging

import pandas as pd
import pytest
import torch
import transformers as tf
from tiny import LLAMA, scaled_up, tiny_model, tokenizer
from torch import nn
from unheard import unheard_model

from rome_lab import Fact, LanguageModel, causal_trace, load_model, trace_facts, verify
from rome_lab.base.versions import modules_behind
from rome_lab.editing import update, verifying
from rome_lab.lab import command
from rome_lab.models import blocks, verdicts, verdicts_of
from rome_lab.tracing import sweep

PROMPT = (verifying.TRIAL_PROMPT, verifying.TRIAL_SUBJECT)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path))


@pytest.mark.parametrize(
    ("dtype", "verdict"),
    [(torch.float64, "exact to float"), (torch.float32, "exact to float"), (torch.bfloat16, "exact to the dtype")],
)
def test_a_model_of_no_list_is_verified_in_every_precision(dtype, verdict):
    lm = unheard_model()
    lm.model.to(dtype)
    before = lm.fingerprint()
    table = verify(lm, progress=False)
    assert set(table.verdict[:-1]) == {verdict} and table.verdict.iloc[-1] == "exact to float"  # the last row is undo
    assert list(table.check[:3]) == ["readout", "score of a text", "trace state"] and len(table) == 9
    assert lm.fingerprint() == before
    assert [x.check for x in verdicts_of(lm)] == list(table.check)


class PlaceAware(nn.Module):
    """An MLP that also says how far into what it is given a token stands, so that parts of a text differ from the whole."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    @property
    def down_proj(self):
        return self.mlp.down_proj

    def forward(self, x):
        return self.mlp(x) * torch.linspace(0.5, 2, x.shape[1])[:, None]


def misled_model() -> LanguageModel:
    """A model that bears a known family's name and is not of it."""
    torch.manual_seed(0)
    model = scaled_up(tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)))
    for block in model.model.layers:
        block.mlp = PlaceAware(block.mlp)
    return LanguageModel(model, tokenizer(), name="misled")


def test_a_model_that_comes_out_wrong_is_found_and_no_longer_traced_unless_wanted():
    lm = misled_model()
    causal_trace(lm, *PROMPT, samples=1)  # never verified
    table = verify(lm, progress=False).set_index("check")
    assert table.verdict["trace state"] == "wrong" and table.difference["trace state"] > table.limit["trace state"]
    with pytest.raises(ValueError, match=r"causal_trace: rl.verify found that misled comes out wrong.*despite_verdict"):
        causal_trace(lm, *PROMPT, samples=1)
    with pytest.raises(ValueError, match="trace_facts: rl.verify found"):
        trace_facts(lm, [Fact("Eiffel Tower", "The {} is located in the city of", "Paris")], progress=False)
    assert causal_trace(lm, *PROMPT, samples=1, despite_verdict=True).samples == 1
    assert verdicts_of(tiny_model("qwen2")) is None  # another model


def test_a_verdict_is_on_models_with_the_same_modules_and_hooks():
    lm = misled_model()
    verify(lm, progress=False)
    plain = tiny_model("llama")
    assert lm.model.config.to_dict() == plain.model.config.to_dict() and verdicts_of(plain) is None
    causal_trace(plain, *PROMPT, samples=1)
    verify(plain, cells=1, progress=False)
    handle = plain.blocks[1].register_forward_hook(lambda module, args, output: None)
    assert verdicts_of(plain) is None
    handle.remove()
    assert verdicts_of(plain)


def test_what_an_edit_makes_is_read_off_the_models_own_run(monkeypatch):
    """A constraint that does not hold in the weights in force is wrong, however the edit itself came out."""
    lm, honest = unheard_model(), verifying.an_edit

    def weakened(*args):
        edit = honest(*args)
        object.__setattr__(edit, "v_star", 1.01 * edit.v_star)
        return edit

    monkeypatch.setattr(verifying, "an_edit", weakened)
    assert verify(lm, progress=False).set_index("check").verdict["edit of layer 1"] == "wrong"


def test_a_text_on_which_nothing_shows_is_not_called_exact():
    torch.manual_seed(0)
    lm = LanguageModel(tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA)), tokenizer())
    with torch.no_grad():
        lm.model.lm_head.weight.zero_()
    table = verify(lm, progress=False).set_index("check")
    assert table.verdict["trace state"] == "not possible" and "would not show" in table.remark["trace state"]


def test_loading_says_that_a_model_was_never_verified(tmp_path, caplog):
    lm = tiny_model("gpt2")
    lm.save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.INFO):
        load_model(str(tmp_path / "model"), device="cpu")
    assert "was never verified here; rl.verify(lm)" in caplog.text
    caplog.clear()
    verify(load_model(str(tmp_path / "model"), device="cpu"), progress=False)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load_model(str(tmp_path / "model"), device="cpu")
    assert "never verified" not in caplog.text


def test_the_embedded_model_is_exact(lm):
    table = verify(lm, progress=False)
    assert set(table.verdict) == {"exact to float"}


def test_broken_weights_are_no_verdict_on_the_kind_of_model():
    lm = tiny_model("llama")
    assert lm.readout  # made while the weights were intact
    with torch.no_grad():
        lm.mlp(2).down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"verify: .*layers\.2\.mlp\.down_proj\.weight hold NaN"):
        verify(lm, progress=False)
    assert verdicts_of(lm) is None


def test_where_no_verdict_can_be_kept_nothing_is_tried(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        verify(tiny_model("llama"), store=tmp_path / "file", progress=False)


def test_a_verdict_ends_with_the_code_that_it_is_on(monkeypatch):
    lm, wrong = tiny_model("llama"), verdicts.Verdict("trace state", 1.0, 0.1, "wrong", "")
    verdicts.keep_verdicts(lm, [wrong])
    assert verdicts_of(lm) == [wrong]
    behind = modules_behind(verdicts.VERIFYING)
    assert {verifying.__name__, sweep.__name__, update.__name__, blocks.__name__} <= set(behind)
    monkeypatch.setattr(verdicts, "code_version", lambda module: "mended")
    assert verdicts_of(lm) is None


@pytest.mark.parametrize(
    ("table", "status"),
    [
        (["exact to float", "not possible"], 0),
        (["exact to float", "wrong"], 1),
        (["not possible", "not possible"], 1),
    ],
)
def test_the_commands_status_is_1_where_anything_is_wrong_or_nothing_was_verified(table, status, tmp_path, monkeypatch):
    tiny_model("gpt2").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(command, "verify", lambda lm: pd.DataFrame({"verdict": table}))
    assert command.run_command(["verify", "--model", str(tmp_path / "model")]) == status
