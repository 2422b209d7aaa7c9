"""A tiny Llama whose modules have other names, of a class and a type that no list has: a user's own model, say."""

from __future__ import annotations

import torch
import transformers as tf
from tiny import LLAMA, scaled_up, tokenizer
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding

from rome_lab.models.language_model import LanguageModel


class UnheardConfig(tf.LlamaConfig):
    model_type = "unheard-of"


class Layer(nn.Module):
    """What a Llama block does, with its MLP in the block itself."""

    def __init__(self, config, number):
        super().__init__()
        self.n1, self.n2 = LlamaRMSNorm(config.hidden_size), LlamaRMSNorm(config.hidden_size)
        self.mix = LlamaAttention(config, number)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.widen = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.back = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, stream, mask, angles, memory):
        stream = stream + self.mix(self.n1(stream), angles, mask, past_key_values=memory)[0]
        x = self.n2(stream)
        return (stream + self.back(nn.functional.silu(self.gate(x)) * self.widen(x)),)


class Unheard(tf.PreTrainedModel):
    config_class = UnheardConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
        self.last_norm, self.angles = LlamaRMSNorm(config.hidden_size), LlamaRotaryEmbedding(config)
        self.reader = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.reader

    def forward(self, input_ids, past_key_values=None, use_cache=True):
        stream = self.words(input_ids)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        places = torch.arange(seen, seen + stream.shape[1], device=stream.device)[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=stream,
            attention_mask=None,
            past_key_values=past_key_values,
            position_ids=places,
        )
        for number in range(self.config.num_hidden_layers):  # by their numbers, as some do
            stream = self.stack[number](stream, mask, self.angles(stream, places), past_key_values)[0]
        return CausalLMOutputWithPast(logits=3 * self.reader(self.last_norm(stream)), past_key_values=past_key_values)


def unheard_model(seed: int = 0) -> LanguageModel:
    """A random one, its matrices scaled up as those of `tiny_model` are."""
    torch.manual_seed(seed)
    return LanguageModel(scaled_up(Unheard(UnheardConfig(**LLAMA))), tokenizer(), name="unheard-of")
