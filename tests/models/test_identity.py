"""The one identity of a model: the weights, the function, the tokenizer and the arithmetic decide, and nothing else does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers as tf
from tiny import CONFIGS, FAMILIES, tiny_model, tokenizer
from transformers import PreTrainedConfig

from rome_lab import Fact, LanguageModel, known_facts
from rome_lab.models.identity import difference, digest_of_weights, function_of
from rome_lab.models.process import products

HARMLESS = {
    "use_cache": False,
    "output_hidden_states": True,
    "pad_token_id": 7,
    "bos_token_id": 8,
    "eos_token_id": 9,
    "attention_dropout": 0.3,
    "attn_pdrop": 0.3,
    "layerdrop": 0.3,
    "id2label": {0: "yes", 1: "no"},
    "initializer_range": 0.5,
    "a_note": "from my thesis",
    "_name_or_path": "somewhere/else",
    "transformers_version": "1.2.3",
    "architectures": ["Another"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_says_nothing_about_the_function_leaves_the_identity(family: str) -> None:
    lm = tiny_model(family)
    before = lm.identity()
    for name, value in HARMLESS.items():
        setattr(lm.model.config, name, value)
        assert lm.identity() == before, name


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        ("llama", "rms_norm_eps", 1e-3),
        ("llama", "rope_parameters", {"rope_theta": 500.0, "rope_type": "default"}),
        ("llama", "hidden_act", "gelu"),
        ("gpt2", "scale_attn_weights", False),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "activation_function", "relu"),
        ("gpt_neox", "use_parallel_residual", False),
        ("gemma2", "final_logit_softcapping", 3.0),
        ("gemma2", "query_pre_attn_scalar", 17),
        ("mistral", "sliding_window", 3),
        ("opt", "do_layer_norm_before", False),
    ],
)
def test_what_takes_part_in_the_function_changes_the_identity_and_is_named(family: str, name: str, value) -> None:
    lm = tiny_model(family)
    before = lm.identity()
    setattr(lm.model.config, name, value)
    now = lm.identity()
    assert now.fingerprint != before.fingerprint and now.key() != before.key()
    assert difference(before.function, now.function).startswith(f"{name} is {value!r}, not ")
    assert difference(before.function, before.function) == ""


def test_a_field_whose_name_would_break_the_line_is_shown_on_it():
    assert difference({"a\rb": 1}, {}) == "a␍b is None, not 1"


def flip_one_bit(weight: torch.Tensor) -> None:
    weight.view(torch.int32)[0, 0] ^= 1


def flip_two_signs(weight: torch.Tensor) -> None:
    weight[0, 0], weight[0, 1] = -weight[0, 0], -weight[0, 1]


def swap_pairs(weight: torch.Tensor) -> None:
    weight[0, :2], weight[0, 2:4] = weight[0, 2:4].clone(), weight[0, :2].clone()


@pytest.mark.parametrize("harm", [flip_one_bit, flip_two_signs, swap_pairs])
def test_any_change_of_a_weight_changes_the_identity_and_taking_it_back_restores_it(harm: Callable) -> None:
    lm = tiny_model("llama")
    before, weight = lm.fingerprint(), lm.memory(2).weight.data
    kept = weight.clone()
    harm(weight)
    assert lm.fingerprint() != before
    weight.copy_(kept)
    assert lm.fingerprint() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool])
def test_weights_of_every_dtype_shape_and_layout_are_read_whole(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).view(2, 3).to(dtype)
    digest = digest_of_weights([("w", tensor)])
    assert digest == digest_of_weights([("w", tensor.T.contiguous().T)])
    others = [("v", tensor), ("w", tensor.T), ("w", tensor[:1]), ("w", tensor.flip(1)), ("w", tensor.to(torch.float32))]
    assert digest not in {digest_of_weights([other]) for other in others}
    assert digest_of_weights([("scale", torch.tensor(2.0))]) != digest_of_weights([("scale", torch.tensor(3.0))])


def test_how_the_tokenizer_last_padded_and_truncated_leaves_the_identity() -> None:
    lm = tiny_model("llama")
    before = lm.identity()
    lm.tokenizer.pad_token = "<eos>"
    lm.tokenizer(["a", "a b c d"], padding=True, truncation=True, max_length=3)
    assert lm.identity() == before
    lm.tokenizer.pad_token = None


def test_another_tokenizer_is_another_key_but_the_same_fingerprint() -> None:
    lm = tiny_model("llama")
    copied = copy.deepcopy(tokenizer())
    same = LanguageModel(lm.model, copied)
    assert same.identity() == lm.identity()
    copied.add_tokens(["Eiffel"])
    assert same.identity().key() != lm.identity().key() and same.fingerprint() == lm.fingerprint()


def test_the_choice_of_products_is_in_the_key_and_not_in_the_fingerprint() -> None:
    lm = tiny_model("gpt2")
    before = lm.identity()
    with products("fast"):
        assert lm.identity().key() != before.key() and lm.fingerprint() == before.fingerprint


def test_where_texts_end_is_in_the_key_and_may_be_nowhere() -> None:
    lm = tiny_model("gpt2")
    before = lm.identity()
    lm.model.generation_config.eos_token_id = [1, 5]
    assert lm.stops == {0, 1, 5} and lm.identity().key() != before.key()
    assert lm.fingerprint() == before.fingerprint
    lm.model.generation_config.eos_token_id = None
    assert lm.stops == {0, 1}, "the special tokens of the tokenizer stay"


def test_facts_are_known_with_a_store_as_without_where_no_token_ends_a_text(tmp_path) -> None:
    lm, fact = tiny_model("gpt2"), Fact("Eiffel Tower", "The {} is in", "Paris")
    lm.model.generation_config.eos_token_id = None
    options = {"n": None, "max_new_tokens": 3, "progress": False}
    plain = known_facts(lm, [fact], **options)
    assert known_facts(lm, [fact], store=tmp_path, **options) == plain
    assert known_facts(lm, [fact], store=str(tmp_path), **options) == plain


class Doubling:
    """A change of one matrix."""

    def __init__(self, lm: LanguageModel, layer: int) -> None:
        self.layers, self.delta = (layer,), lm.weight(layer).double()

    def delta_at(self, layer: int) -> torch.Tensor:
        return self.delta


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_without_edits_the_identity_is_that_of_the_model_before_them(family: str) -> None:
    lm = tiny_model(family)
    before = lm.identity()
    with lm.overlay.only([Doubling(lm, 1), Doubling(lm, 3)]):
        assert lm.identity() != before and lm.identity(edited=False) == before
        for layer in range(lm.n_layers):
            original = lm.overlay.original(layer)
            assert torch.equal(original * (2 if layer in (1, 3) else 1), lm.memory(layer).weight)
        with lm.overlay.only([]):
            assert lm.identity() == before
    assert lm.identity() == before and lm.overlay.originals == {} and lm.edits == []


def test_a_weight_that_something_else_has_changed_is_found_when_an_edit_is_undone() -> None:
    lm = tiny_model("llama")
    lm.overlay.put([Doubling(lm, 1)])
    flip_one_bit(lm.memory(1).weight.data)
    with pytest.raises(ValueError, match="was changed by something else"):
        lm.overlay.put([])


def test_tied_weights_are_those_of_the_embedding() -> None:
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = True
    lm = LanguageModel(tf.AutoModelForCausalLM.from_config(config), tokenizer())
    before = lm.fingerprint()
    with torch.no_grad():
        lm.embedding.weight[3, 3] += 1
    assert lm.fingerprint() != before


class RemoteConfig(PreTrainedConfig):
    """As a repository's own code writes them: attributes that no field declares."""

    model_type = "remote"

    def __init__(self, blocks: int = 2, theta: float = 3.0, **others) -> None:
        self.blocks, self.theta, self.limits = blocks, theta, (0.0, float("inf"))
        super().__init__(**others)


def test_of_remote_code_every_field_that_may_take_part_counts() -> None:
    plain = function_of(RemoteConfig())
    assert plain == {"blocks": 2, "theta": 3.0, "limits": [0.0, "Infinity"], "model_type": "remote"}
    assert function_of(RemoteConfig(theta=4.0)) != plain
    assert function_of(RemoteConfig(use_cache=False, pad_token_id=3, attention_dropout=0.5)) == plain


def test_harmless_fields_of_a_configuration_within_another_are_harmless_too() -> None:
    def outer(**fields) -> RemoteConfig:
        config = RemoteConfig()
        config.text_config = tf.LlamaConfig(**fields)
        return config

    assert function_of(outer(use_cache=False)) == function_of(outer())
    assert function_of(outer(rms_norm_eps=1e-3)) != function_of(outer())


def test_an_identity_says_all_that_determines_the_answers() -> None:
    identity = tiny_model("llama").identity()
    for name in ("weights", "tokenizer", "dtype", "products", "versions", "stops", "places"):
        assert replace(identity, **{name: ("other",)}).key() != identity.key(), name
