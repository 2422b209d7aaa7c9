"""Models of families that no layout is known of: their parts are found by what they do, and said aloud."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import transformers as tf
from families import VERIFIED, family_model
from oracle import FullForward
from tiny import FAMILIES, LLAMA, tiny_model, tokenizer
from unheard import unheard_model

from rome_lab import Fact, FixedNoise, LanguageModel, causal_trace, rome
from rome_lab.editing import EditSettings
from rome_lab.facts import read_prompt
from rome_lab.models import Layout, UnfitModelError
from rome_lab.models.structure import find_structure, probe

PROMPT = ("The Eiffel Tower is located in the city of", "Eiffel Tower")
FACT = Fact("Eiffel Tower", "The {} is located in the city of", "Paris")
FOUND = Layout("unheard-of", "stack", "mix", "back", "back")


def test_the_tokens_that_a_model_is_looked_at_with_differ_in_every_vocabulary():
    for size in range(8, 400):
        model = torch.nn.Module()
        model.get_input_embeddings = lambda size=size: torch.nn.Embedding(size, 1)
        ids = probe(model)[0].tolist()
        assert len(set(ids)) == len(ids) and max(ids) < size - 1, size  # one is changed to the next


def test_a_model_of_no_list_is_found_and_the_find_is_said_aloud(caplog):
    with caplog.at_level(logging.WARNING):
        lm = unheard_model()
    assert lm.layout == FOUND
    assert "blocks stack, attention mix, MLP back, edited matrix back" in caplog.text and "rl.verify" in caplog.text


@pytest.mark.parametrize("kind", ["state", "mlp", "attn"])
def test_a_model_of_no_list_is_traced_exactly(kind):
    lm = unheard_model()
    lm.model.double()
    read = read_prompt(lm, *PROMPT)
    begin, end = read.subject_range
    noise = torch.randn(2, end - begin, 32, generator=torch.Generator().manual_seed(1))
    *_, table = FullForward(lm, read.ids, read.subject_range, noise).trace(kind, window=2, tokens=[3, 12, 18])
    trace = causal_trace(lm, *PROMPT, kind, FixedNoise(noise), window=2)
    spread = np.nanstd(table)
    assert spread > 1e-3
    assert np.nanmax(np.abs(trace.p_restored - table)) <= 1e-9 * spread


def test_a_model_of_no_list_is_edited_and_its_edit_undone():
    lm = unheard_model()
    before = lm.fingerprint()
    settings = EditSettings(key="bare", steps=10, prefix_lengths=(3,))
    edit = rome(lm, FACT, "Rome", layer=1, C=torch.eye(48), hparams=settings, progress=False)
    values = []
    lm.memory(1).register_forward_hook(lambda module, args, output: values.append(output))
    with edit.applied(lm), torch.no_grad():
        assert lm.fingerprint() != before
        lm.model(read_prompt(lm, *PROMPT).ids[None])
    last = read_prompt(lm, *PROMPT).subject_range[1] - 1
    torch.testing.assert_close(values[0][0, last], edit.v_star, rtol=1e-4, atol=1e-4)
    assert lm.fingerprint() == before


def test_a_layout_can_be_given_by_hand_and_one_that_does_not_fit_is_refused():
    model = unheard_model().model
    assert LanguageModel(model, tokenizer(), layout=FOUND).memory_name(2) == "stack.2.back"
    with pytest.raises(ValueError, match=r"does not fit Unheard: no stack\[0\]\.mlp"):
        LanguageModel(model, tokenizer(), layout=Layout("mine", "stack", "mix", "mlp", "back"))


@pytest.mark.parametrize("family", [x for x in FAMILIES if x != "opt-post-norm"])  # it normalises the sum
def test_a_look_finds_what_the_list_says(family):
    lm = tiny_model(family)
    found, known = find_structure(lm.model), lm.layout
    assert (found.blocks, found.attn, found.mlp, found.memory) == (known.blocks, known.attn, known.mlp, known.memory)


LOOKED_AT = [x for x in VERIFIED if x not in ("OPT (norms of sums)", "Falcon (alibi)", "gpt-oss (attention sinks)")]


@pytest.mark.parametrize("family", LOOKED_AT)
@pytest.mark.parametrize(("dtype", "huge"), [("float32", 3000), ("bfloat16", 0), ("bfloat16", 500), ("float16", 500)])
def test_a_look_finds_the_same_where_numbers_are_huge_or_have_16_bits_or_says_that_it_cannot_tell(family, dtype, huge):
    """States of real models have few huge numbers, beside which what a block adds to the others is next to nothing."""
    model = family_model(family).model
    known = find_structure(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] += huge
    try:
        found = find_structure(model.to(getattr(torch, dtype)))
    except UnfitModelError as reason:
        assert dtype != "float32" and (huge or "MoE" in family) and 'dtype="float32"' in str(reason)
    else:
        assert (found.attn, found.mlp, found.memory) == (known.attn, known.mlp, known.memory)


def test_a_layout_by_hand_that_takes_one_part_for_another_is_refused(caplog):
    def given(attn: str, mlp: str, memory: str | None) -> LanguageModel:
        return LanguageModel(
            tiny_model("llama").model, tokenizer(), layout=Layout("mine", "model.layers", attn, mlp, memory)
        )

    with pytest.raises(
        UnfitModelError, match="mlp is the attention and self_attn the MLP, but it is not mlp that keeps keys"
    ):
        given("mlp", "self_attn", "mlp.up_proj")
    with pytest.raises(
        UnfitModelError, match="says that mlp.up_proj ends the MLP, but in model.layers.0 what it returns"
    ):
        given("self_attn", "mlp", "mlp.up_proj")
    assert given("self_attn", "mlp", None).sparse == {0, 1, 2, 3} and not caplog.text
    with caplog.at_level(logging.WARNING):
        given("self_attn", "post_attention_layernorm", None)
    assert (
        "what self_attn and post_attention_layernorm return does not add up to what model.layers.0 adds" in caplog.text
    )


SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
UNFIT = {
    "an encoder-decoder": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=32, num_layers=2, num_heads=4, vocab_size=300, d_ff=32, d_kv=8)
    ),
    "its tokens see those behind them": lambda: tf.BertLMHeadModel(
        tf.BertConfig(**SMALL, num_attention_heads=4, intermediate_size=32)
    ),
    "keys and values": lambda: tf.MambaForCausalLM(tf.MambaConfig(**SMALL, state_size=4)),
    "no two modules' outputs add up": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**SMALL, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32, do_layer_norm_before=False)
    ),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_what_cannot_be_traced_is_refused_with_the_reason_and_what_was_looked_for(reason):
    model = UNFIT[reason]()
    model.config.model_type = "unheard-of"
    with pytest.raises(UnfitModelError, match=rf"{reason}.*Looked for a list of blocks") as caught:
        LanguageModel(model, tokenizer())
    assert "\n" not in str(caught.value)
    assert ("layout=" in str(caught.value)) == (reason == "no two modules' outputs add up"), "it helps there alone"


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_the_readout_is_the_models_own_whatever_scales_its_logits(spread):
    """A flat model is no easier: what counts is the difference in log p beside the spread of log p."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**LLAMA))
    with torch.no_grad():
        model.lm_head.weight.mul_(50 * spread)
    lm = LanguageModel(model, tokenizer())
    assert lm.readout == lm.plain_readout
    states = torch.randn(3, 5, 32)
    plain = lm.logits(states)
    model.lm_head.register_forward_hook(lambda module, args, output: output)  # hooks of the user's own do no harm
    own = model.forward
    model.forward = lambda *args, **kwargs: scaled(own(*args, **kwargs), 0.2)
    again = LanguageModel(model, tokenizer())
    assert again.readout != again.plain_readout
    torch.testing.assert_close(again.logits(states), 0.2 * plain)


def scaled(output, factor):
    output.logits = factor * output.logits
    return output
