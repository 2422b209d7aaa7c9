"""Models and tokenizers as users have them: what is as good as the plain model, and what is refused in a sentence."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf
from oracle import FullForward
from tiny import LLAMA, known, scaled_up, tiny_model, tokenizer
from tokenizers import Tokenizer, normalizers, processors
from torch import nn

from rome_lab import (
    EditSettings,
    Fact,
    FixedNoise,
    GaussianNoise,
    LanguageModel,
    causal_trace,
    known_facts,
    load_model,
    rome,
)
from rome_lab.facts import read_prompt
from rome_lab.models import Change, Question, generate, product_error, record_run, score

PROMPT = ("The Eiffel Tower is located in the city of", "Eiffel Tower")
FACT = Fact("Eiffel Tower", "The {} is located in the city of", "Paris")
QUICK = EditSettings(key="bare", steps=8, prefix_lengths=(3,))


def llama(**changes):
    torch.manual_seed(0)
    return scaled_up(tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA | changes)))


def trace_of(lm):
    return causal_trace(lm, *PROMPT, "mlp", GaussianNoise(std=0.5), samples=2, window=2)


def edit_of(lm):
    return rome(lm, FACT, "Rome", layer=1, C=torch.eye(48), hparams=QUICK, progress=False)


def compiled(model):
    return torch.compile(model)


def compiled_in_place(model):
    model.compile()
    model.model.layers[1].compile()
    return model


def compiled_by_blocks(model):
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(block)
    return model


def checkpointing(model):
    model.gradient_checkpointing_enable()
    return model.train()


def returning_tuples(model):
    model.config.return_dict = False
    return model


def without_cache(model):
    model.config.use_cache = False
    return model


def hooked(model):
    """With hooks of the user's own: one that looks, one that changes."""
    model.seen = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: model.seen.append(output.shape))
    model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: output * 1.0)
    return model


@pytest.mark.parametrize(
    "wrap", [compiled, compiled_in_place, compiled_by_blocks, checkpointing, without_cache, hooked]
)
def test_a_wrapped_model_is_traced_edited_and_scored_as_the_plain_one(wrap):
    plain, lm = LanguageModel(llama(), tokenizer()), LanguageModel(wrap(llama()), tokenizer())
    np.testing.assert_allclose(trace_of(lm).p_restored, trace_of(plain).p_restored, atol=1e-7)
    assert lm.fingerprint() == plain.fingerprint()
    edit = edit_of(plain)
    edit.apply(lm)  # made on the plain one
    with edit.applied(plain):
        questions = [Question(0, (5, 6, 7), (8,))]
        assert score(lm, [Change()], questions)[0].total == pytest.approx(score(plain, [Change()], questions)[0].total)
    edit.undo(lm)
    assert lm.fingerprint() == plain.fingerprint()
    if wrap is hooked:
        assert lm.model.seen and len(lm.model.model.layers[0]._forward_hooks) == 1


def scaled_mlp(model):
    """A hook of the user's own that does the same to every token of a text."""
    model.model.layers[2].mlp.register_forward_hook(lambda module, args, output: output * 1.5)
    return model


@pytest.mark.parametrize("kind", ["state", "mlp"])
def test_a_hook_that_does_the_same_to_every_token_is_in_the_trace(kind):
    lm = LanguageModel(scaled_mlp(llama().double()), tokenizer())
    read = read_prompt(lm, *PROMPT)
    begin, end = read.subject_range
    noise = torch.randn(2, end - begin, 32, generator=torch.Generator().manual_seed(1))
    *_, table = FullForward(lm, read.ids, read.subject_range, noise).trace(kind, window=2, tokens=[3, 12])
    trace = causal_trace(lm, *PROMPT, kind, FixedNoise(noise), window=2)
    wanted = np.isfinite(table)
    np.testing.assert_allclose(trace.p_restored[wanted], table[wanted], atol=1e-12)
    assert not np.allclose(trace.p_restored, causal_trace(LanguageModel(llama().double(), tokenizer()), *PROMPT, kind,
                                                          FixedNoise(noise), window=2).p_restored, atol=1e-6)  # fmt: skip


def test_attention_without_a_mask_is_refused_whenever_it_was_chosen():
    lm = LanguageModel(llama(), tokenizer())
    lm.model.config._attn_implementation = "flex_attention"
    for call in (trace_of, edit_of, lambda lm: LanguageModel(lm.model, tokenizer())):
        with pytest.raises(ValueError, match="attention 'flex_attention' takes no explicit mask"):
            call(lm)


def add_at(place):
    def change(module, args, output):
        output = output.clone()
        if output.shape[1] > abs(place):
            output[:, place] += 1
        return output

    return change


HOOKS = {
    "a block is given something else": lambda model: model.model.layers[2].register_forward_pre_hook(
        lambda module, args: (args[0] + torch.linspace(-1, 1, 32), *args[1:])
    ),
    "an MLP says something else at one token": lambda model: model.model.layers[2].mlp.register_forward_hook(add_at(4)),
    "a block says something else near the end": lambda model: model.model.layers[1].register_forward_hook(add_at(-3)),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_does_something_else_on_a_part_of_a_text_is_found_before_any_number_is_given(hook):
    model = llama()
    handle = HOOKS[hook](model)
    lm = LanguageModel(model, tokenizer())
    for call in (trace_of, edit_of):
        with pytest.raises(ValueError, match=r"its hooks do on a part of a text what they do not on the whole"):
            call(lm)
    handle.remove()
    trace_of(lm), edit_of(lm)


class AddingLinear(nn.Linear):
    """As layers of adapters are: it adds something of low rank to its product."""

    def forward(self, x):
        return super().forward(x) + 0.1 * x[..., :1]


def with_another_class(model):
    model.model.layers[1].mlp.down_proj.__class__ = AddingLinear


def parametrised(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.down_proj)


def shared(model):
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight


UNEDITABLE = {
    r"says something else than its weight times what it is given \(by \d+%\)": with_another_class,
    "computes its weight anew": parametrised,
    "has its weight in common with another layer's": shared,
}


@pytest.mark.parametrize("reason", UNEDITABLE)
def test_a_matrix_whose_edit_would_not_do_what_it_says_is_traced_and_not_edited(reason):
    model = llama()
    UNEDITABLE[reason](model)
    lm = LanguageModel(model, tokenizer())
    before = lm.fingerprint()
    assert np.isfinite(trace_of(lm).p_restored).all()
    with pytest.raises(ValueError, match=rf"layer 1 of .* cannot be edited: model.layers.1.mlp.down_proj.*{reason}"):
        edit_of(lm)
    assert lm.fingerprint() == before
    if reason.startswith("has"):
        rome(lm, FACT, "Rome", layer=3, C=torch.eye(48), hparams=QUICK, progress=False)  # the others can be


class PackedLinear(nn.Module):
    """A matrix kept in 8 bits with a scale by row, as weight-only quantisation keeps it."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize("model_type", ["llama", "unheard-of"])
def test_packed_weights_are_traced_and_not_edited(model_type):
    model = llama()
    for block in model.model.layers:
        block.mlp.down_proj = PackedLinear(block.mlp.down_proj)
    model.config.model_type = model_type
    lm = LanguageModel(model, tokenizer())
    assert np.isfinite(trace_of(lm).p_restored).all()
    with pytest.raises(ValueError, match=r"layer 1 of .* cannot be edited: .*down_proj is packed \(PackedLinear, "):
        edit_of(lm)


def adapted():
    """As PEFT leaves a model: a matrix wrapped in a layer of its own."""
    model = llama()
    layer = type("Linear", (nn.Sequential,), {"__module__": "peft.tuners.lora.layer"})
    model.model.layers[0].mlp.down_proj = layer(model.model.layers[0].mlp.down_proj)
    return model


def made_under_inference():
    with torch.inference_mode():
        return llama()


REFUSED = {
    r"PEFT adapter \(model.layers.0.mlp.down_proj\).*merge_and_unload": adapted,
    "is quantised dynamically": lambda: torch.ao.quantization.quantize_dynamic(llama(), {nn.Linear}),
    "no output embeddings.*AutoModelForCausalLM": lambda: tf.LlamaForSequenceClassification(
        tf.LlamaConfig(**LLAMA | {"pad_token_id": 0})
    ),
    "made under torch.inference_mode": made_under_inference,
    "tokenizer has 300 tokens.*embeddings for 200": lambda: llama(vocab_size=200),
    "set to return tuples.*return_dict = True": lambda: returning_tuples(llama()),
    "is no model of transformers": lambda: nn.Linear(2, 2),
    r"both directions \(is_causal=False\)": lambda: llama(is_causal=False),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_traced_as_it_is_is_refused_in_a_sentence(message):
    with pytest.raises(ValueError, match=message) as caught:
        LanguageModel(REFUSED[message](), tokenizer())
    assert "\n" not in str(caught.value)


def test_tied_and_resized_embeddings_are_as_good_as_others():
    model = llama(tie_word_embeddings=True)
    model.resize_token_embeddings(320)
    lm = LanguageModel(model, tokenizer())
    assert np.isfinite(trace_of(lm).p_restored).all()
    with edit_of(lm).applied(lm):
        assert lm.weight(1).isfinite().all()


def test_a_v_star_that_overflows_sixteen_bits_is_refused_and_nothing_is_left_changed():
    lm = LanguageModel(llama().half(), tokenizer())
    before, edit = lm.fingerprint(), edit_of(LanguageModel(llama(), tokenizer()))
    object.__setattr__(edit, "fingerprint", before)
    object.__setattr__(edit, "Lambda", edit.Lambda * 1e7)
    with pytest.raises(ValueError, match=r"overflows torch.float16; use float32"):
        edit.apply(lm)
    assert lm.fingerprint() == before


def with_processor(template, sequence=False):
    """The tokenizer, with special tokens around every text."""
    changed = copy.deepcopy(tokenizer())
    special = [("<bos>", 0), ("<eos>", 1)]
    processor = processors.TemplateProcessing(single=template, special_tokens=special)
    if sequence:
        processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processor])
    changed.backend_tokenizer.post_processor = processor
    return changed


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize(
    ("template", "front"), [("$A <eos>", []), ("<bos> $A <eos>", [0]), ("<bos> $A <eos> <eos>", [0])]
)
def test_what_a_tokenizer_puts_behind_a_text_is_no_part_of_a_prompt(template, front, sequence, tmp_path):
    plain = LanguageModel(llama(), with_processor("<bos> $A" if front else "$A"))
    lm = LanguageModel(llama(), with_processor(template, sequence))
    bare = tokenizer()(PROMPT[0])["input_ids"]
    assert lm.tokenizer(PROMPT[0])["input_ids"] == front + bare
    ours, theirs = trace_of(lm), trace_of(plain)
    assert (ours.answer, ours.tokens, ours.subject_range) == (theirs.answer, theirs.tokens, theirs.subject_range)
    np.testing.assert_array_equal(ours.p_restored, theirs.p_restored)
    assert lm.tokenizer("")["input_ids"] == front  # what sampled text begins with
    lm.save_pretrained(tmp_path / "model")  # what is saved is the user's own tokenizer
    saved = json.loads((tmp_path / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    assert Tokenizer.from_str(json.dumps(saved)).encode("Paris").ids[-1] == 1


def test_a_tokenizer_that_strips_blanks_or_pads_with_its_end_reads_prompts_as_they_are():
    stripping = copy.deepcopy(tokenizer())
    stripping.backend_tokenizer.normalizer = normalizers.Strip()
    stripping.pad_token = stripping.eos_token
    plain, lm = LanguageModel(llama(), tokenizer()), LanguageModel(llama(), stripping)
    np.testing.assert_array_equal(trace_of(lm).p_restored, trace_of(plain).p_restored)
    assert lm.stops == {0, 1}


def test_known_facts_are_found_without_any_end_of_text(tmp_path):
    lm = tiny_model("llama", seed=3)
    lm.model.generation_config.eos_token_id = None
    facts = known(lm) or [FACT]
    assert known_facts(lm, facts, n=1, store=tmp_path) == known_facts(lm, facts, n=1)


def test_a_folder_that_lacks_weights_is_refused_naming_them(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    lm = tiny_model("llama")
    lm.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = {name: x for name, x in load_file(path).items() if "layers.1.mlp" not in name}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack the weights model\.layers\.1\.mlp\.down_proj\.weight, .*get all files"):
        load_model(str(tmp_path / "model"), device="cpu")


def test_the_users_home_is_expanded_and_a_missing_package_is_named(tmp_path, monkeypatch):
    lm = tiny_model("gpt2")
    lm.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_model("~/model", device="cpu").name == "model"
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"bitsandbytes.*To do: install the package") as caught:
        load_model("~/model", device="cpu")
    assert "safetensors" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_that_scales_its_logits_is_read_and_scored_as_it_says(dtype):
    """A Llama, rebuilt as a Granite whose logits are divided by 8, with an 8 times larger head: the same function."""
    plain = LanguageModel(llama().to(dtype), tokenizer())
    granite = tf.GraniteForCausalLM(
        tf.GraniteConfig(**LLAMA, logits_scaling=8.0, attention_multiplier=plain.model.config.head_dim**-0.5)
    )
    granite.load_state_dict(plain.model.state_dict())
    with torch.no_grad():
        granite.lm_head.weight.mul_(8)
    lm = LanguageModel(granite.to(dtype), tokenizer())
    states = record_run(lm, torch.arange(5, 12)[None], lambda x: x).states[-1]
    torch.testing.assert_close(lm.logits(states), plain.logits(states))
    np.testing.assert_allclose(trace_of(lm).p_restored, trace_of(plain).p_restored, atol=1e-6)
    questions = [Question(0, (5, 6, 7), (8, 9))]
    np.testing.assert_allclose(*(score(x, [Change()], questions)[0].log_p for x in (lm, plain)), atol=1e-5)


def test_a_token_that_was_added_to_the_tokenizer_and_not_to_the_model_is_refused_where_a_text_holds_it():
    added = copy.deepcopy(tokenizer())
    added.add_tokens(["<picture>"])
    lm = LanguageModel(llama(), added)
    trace_of(lm)
    for call in (
        lambda: causal_trace(lm, "The <picture> is in", "<picture>"),
        lambda: rome(lm, FACT, "<picture>", layer=1, C=torch.eye(48), progress=False),
    ):
        with pytest.raises(ValueError, match=r"holds '<picture>', a token for which .* has no embedding"):
            call()


def test_stored_results_know_where_the_parts_are_and_hooks_of_the_users_own_are_named(caplog):
    lm = LanguageModel(llama(), tokenizer())
    other = LanguageModel(lm.model, tokenizer(), layout=replace(lm.layout, attn="self_attn.o_proj"))
    assert other.identity().key() != lm.identity().key() and other.fingerprint() == lm.fingerprint()
    assert "hook" not in caplog.text
    lm.model.model.norm.register_forward_hook(lambda *args: None)
    lm.identity()
    assert "The hook on model.norm takes no part" in caplog.text


RUNS = {
    "trace": trace_of,
    "edit": edit_of,
    "score": lambda lm: score(lm, [Change()], [Question(0, (1, 2), (3,))]),
    "generate": lambda lm: generate(lm, [Change()], [["In"]], 3),
    "known": lambda lm: known_facts(lm, [FACT], progress=False),
}


@pytest.mark.parametrize("what", RUNS)
def test_a_model_in_training_mode_is_refused_until_it_is_put_back(what) -> None:
    lm = LanguageModel(llama(), tokenizer(), name="trained")
    lm.model.train()
    with pytest.raises(ValueError, match=r"trained is in training mode.*call lm\.model\.eval\(\) first"):
        RUNS[what](lm)
    lm.model.eval()
    RUNS[what](lm)


@pytest.mark.parametrize("what", RUNS)
def test_under_autocast_nothing_is_run(what) -> None:
    lm = LanguageModel(llama(), tokenizer(), name="cast")
    with torch.autocast("cpu"), pytest.raises(ValueError, match=r"torch\.autocast is on, so cast would be run"):
        RUNS[what](lm)


def test_the_noise_does_not_depend_on_the_default_dtype() -> None:
    lm = LanguageModel(llama(), tokenizer(), name="plain")
    noise = GaussianNoise(std=1.0).noise(lm, (2, 3, 4), "key")
    torch.set_default_dtype(torch.float64)
    try:
        torch.testing.assert_close(GaussianNoise(std=1.0).noise(lm, (2, 3, 4), "key"), noise, atol=0, rtol=0)
        assert product_error("cpu", 64) > 1e-9
    finally:
        torch.set_default_dtype(torch.float32)


class Shifted(tf.models.llama.modeling_llama.LlamaDecoderLayer):
    """A block that is given a share of the token before, too, as short convolutions do."""

    def forward(self, hidden_states, *args, **kwargs):
        before = torch.nn.functional.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
        return super().forward(hidden_states + 0.5 * before, *args, **kwargs)


def test_a_known_family_whose_blocks_are_of_the_users_own_is_looked_at_all_the_same() -> None:
    model = llama()
    for block in model.model.layers:
        block.__class__ = Shifted
    with pytest.raises(ValueError, match="makes something else of the last tokens of a text alone"):
        trace_of(LanguageModel(model, tokenizer(), name="shifted"))


def test_a_model_that_reads_in_both_directions_is_refused() -> None:
    config = tf.Gemma3TextConfig(**LLAMA | {"head_dim": 12}, use_bidirectional_attention=True)
    with pytest.raises(ValueError, match="reads in both directions"):
        LanguageModel(tf.Gemma3ForCausalLM(config), tokenizer())
