"""Loading models, finding their parts, and refusing what is not a decoder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers as tf
from tiny import CONFIGS, FAMILIES, tiny_model, tokenizer

from rome_lab import LanguageModel, load_model
from rome_lab.models import packaged
from rome_lab.models.blocks import record_run


@pytest.mark.parametrize("family", FAMILIES)
def test_mlp_and_attention_outputs_are_what_the_residual_stream_gains(family):
    """In a pre-norm block, output = input + attention + MLP; OPT's post-norm variant normalises the sum."""
    if family == "opt-post-norm":
        pytest.skip("its block normalises the sum")

    lm = tiny_model(family)
    recording = record_run(lm, torch.randint(2, 300, (2, 7)), lambda x: x)
    for layer in range(lm.n_layers):
        gained = recording.attn[layer] + recording.mlp[layer]
        torch.testing.assert_close(recording.states[layer] + gained, recording.states[layer + 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_last_states_are_the_models_own(family):

    lm = tiny_model(family)
    recording = record_run(lm, torch.randint(2, 300, (2, 7)), lambda x: x)
    torch.testing.assert_close(lm.logits(recording.states[-1][:, -1]), recording.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_local_folder_loads_as_the_model_it_was_saved_from(family, tmp_path):
    lm = tiny_model(family)
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), device="cpu")
    assert again.fingerprint() == lm.fingerprint()
    assert again.name == tmp_path.name


def test_the_embedded_model_knows_where_the_eiffel_tower_is(lm):
    assert (lm.n_layers, lm.memory(0).weight.shape) == (30, (576, 1536))
    ids = torch.tensor([lm.tokenizer("The Eiffel Tower is located in the city of")["input_ids"]])
    with torch.no_grad():
        assert lm.tokenizer.decode([int(lm.model(ids).logits[0, -1].argmax())]) == " Paris"


def test_the_fingerprint_follows_the_weights_and_nothing_else():
    lm = tiny_model("gpt2")
    assert lm.fingerprint() == tiny_model("gpt2").fingerprint() != tiny_model("gpt2", seed=1).fingerprint()
    with torch.no_grad():
        lm.memory(0).weight[0, 0] += 1
    assert lm.fingerprint() != tiny_model("gpt2").fingerprint()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", packaged.HASHES])
def test_a_damaged_conversion_is_made_again(name, monkeypatch, tmp_path, caplog):
    source = packaged.packaged_folder(packaged.EMBEDDED_NAME)
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path))
    target = tmp_path / "models" / source.name
    shutil.copytree(source, target)
    assert packaged.is_whole(target)
    with (target / name).open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    assert not packaged.is_whole(target)
    assert "damaged" in caplog.text


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (tf.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=300), tf.BertLMHeadModel),
        (
            tf.T5Config(d_model=32, num_layers=2, num_heads=4, vocab_size=300, d_ff=32, d_kv=8),
            tf.T5ForConditionalGeneration,
        ),
    ],
)
def test_what_is_not_a_known_decoder_is_refused_by_naming_what_was_looked_for(config, kind):
    with pytest.raises(ValueError, match=r"not a decoder-only model.*(no decoder|encoder-decoder).*Looked for a list"):
        LanguageModel(kind(config), tokenizer())


def test_pickled_weights_are_refused_unless_opted_in(tmp_path):
    lm = tiny_model("gpt2")
    lm.tokenizer.save_pretrained(tmp_path)
    lm.model.config.save_pretrained(tmp_path)
    torch.save(lm.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="unsafe_weights=True"):
        load_model(str(tmp_path), device="cpu")
    assert load_model(str(tmp_path), device="cpu", unsafe_weights=True).n_layers == 4


def test_remote_code_never_runs_unless_opted_in(tmp_path):
    lm = tiny_model("gpt2")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('ran')\nclass Own: pass\n")
    with pytest.raises(ValueError, match="cannot load"):
        load_model(str(tmp_path), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_an_unknown_model_is_refused_in_one_line():
    with pytest.raises(ValueError, match="cannot load 'no-such-model'.*\"smollm2-135m\"") as caught:
        load_model("no-such-model")
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_or_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match="dtype must name"):
        load_model(dtype="int8")

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="no character offsets"):
        LanguageModel(tf.AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()), Slow())


def test_a_folder_that_cannot_be_written_is_refused_with_advice(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another folder"):
        tiny_model("gpt2").save_pretrained(tmp_path / "file" / "model")
