"""Tiny random models of every supported family with a byte-level tokenizer; large weights make their answers differ."""

from __future__ import annotations

import functools

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rome_lab.facts.fact import Fact
from rome_lab.facts.prompts import continuation_ids
from rome_lab.models.language_model import LanguageModel

TEXT = [
    "The Eiffel Tower is located in the city of Paris, and the Colosseum stands in Rome.",
    "Marie Curie was born in the city of Warsaw. She worked on physics and chemistry.",
    "The capital of France is Paris. The capital of Japan is Tokyo. Windows 95 is developed by Microsoft.",
]
SIZE = {
    "vocab_size": 300,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
LLAMA = SIZE | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
GPT = {
    "vocab_size": 300,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
}

CONFIGS = {
    "gpt2": lambda: tf.GPT2Config(**GPT),
    "gptj": lambda: tf.GPTJConfig(**GPT, rotary_dim=4),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**SIZE, intermediate_size=48, max_position_embeddings=64),
    "gpt_neox-serial": lambda: tf.GPTNeoXConfig(
        **SIZE, intermediate_size=48, max_position_embeddings=64, use_parallel_residual=False
    ),
    "llama": lambda: tf.LlamaConfig(**LLAMA),
    "qwen2": lambda: tf.Qwen2Config(**LLAMA),
    "qwen3": lambda: tf.Qwen3Config(**LLAMA, head_dim=8),
    "mistral": lambda: tf.MistralConfig(**LLAMA, sliding_window=6),
    "gemma2": lambda: tf.Gemma2Config(**LLAMA, head_dim=8, sliding_window=6),
    "opt": lambda: tf.OPTConfig(**SIZE, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16),
    "opt-post-norm": lambda: tf.OPTConfig(**SIZE, ffn_dim=48, max_position_embeddings=64, do_layer_norm_before=False),
}
FAMILIES = tuple(CONFIGS)

SCALES = {"lm_head": 50.0, "embed_out": 50.0, "embed": 10.0, "wte": 10.0, "wpe": 10.0, "": 6.0}  # by part of the name


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens, trained on `TEXT`."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<bos>", "<eos>"], show_progress=False
    )
    raw.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>")


def tiny_model(family: str, seed: int = 0) -> LanguageModel:
    """A random model whose matrices are scaled up, so that its blocks, not the last token's embedding, make its answer."""
    config = CONFIGS[family]()
    config.tie_word_embeddings = False
    torch.manual_seed(seed)
    return LanguageModel(scaled_up(tf.AutoModelForCausalLM.from_config(config)), tokenizer(), name=f"tiny-{family}")


@torch.no_grad()
def scaled_up(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """The model, its biases drawn anew and its matrices scaled by `SCALES`."""
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.normal_(std=0.1)
        elif weight.ndim == 2:
            weight.mul_(next(factor for part, factor in SCALES.items() if part in name))
    return model


TEMPLATE = "The city of {} is:\n"  # no space before what follows, since a tiny model rarely says one
SUBJECTS = ("Paris", "Eiffel Tower", "Marie Curie", "Rome", "Japan")


@torch.no_grad()
def known(lm: LanguageModel, subjects: tuple[str, ...] = SUBJECTS) -> list[Fact]:
    """Facts that a model knows: whatever token it says first is made the object."""
    facts = []
    for subject in subjects:
        prompt = TEMPLATE.replace("{}", subject)
        said = int(lm.model(torch.tensor([lm.tokenizer(prompt)["input_ids"]])).logits[0, -1].argmax())
        word = lm.tokenizer.decode([said]).strip()
        if word and continuation_ids(lm, prompt, word)[0] == said:
            facts.append(Fact(subject, TEMPLATE, word))
    return facts


def talkative_model() -> LanguageModel:
    """A tiny model that says something that can be an object, for most prompts."""
    return next(lm for lm in (tiny_model("llama", seed) for seed in range(200)) if len(known(lm)) >= 4)
