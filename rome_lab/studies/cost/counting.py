"""What tracing costs, counted: arithmetic and memory of a trace, of any model, from its shape alone.

    size_of(model)                      what of a model decides its cost
    published_sizes()                   the same of models too large to load here
    sweep_flops(size, trace, kind)      arithmetic of our sweep
    plain_flops(size, trace)            arithmetic of one forward of the whole model a cell
    sweep_bytes(size, trace, kind)      memory of our sweep beside the weights
    extrapolate(sizes, trace, ...)      the table: what many facts cost
    larger_models(lm, rate, facts)      the table of this model and of the published ones, here and on some GPU

A multiplication with the addition that follows it is two operations. Only matrix products are counted: the rest is
little arithmetic, though it takes time. Products are counted as they are made: a mask spares nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
import transformers as tf
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rome_lab.models import LanguageModel, find_layout, rows_at_once
from rome_lab.tracing import READ_TOGETHER, columns_of


@dataclass(frozen=True)
class Size:
    """What of a model decides its cost.

    Attributes:
        layers: L.
        width: D.
        mlp_width: H.
        query_width, key_width: heads times D_head, and key heads times D_head.
        block_weights: entries of all matrices of a block that a token's vector is multiplied with.
        mlp_weights: those of them that are the MLP's; none where it is no module, see `LanguageModel.feed_forward`.
        vocabulary: V.
        parameters: of the whole model, shared ones once.
    """

    layers: int
    width: int
    mlp_width: int
    query_width: int
    key_width: int
    block_weights: float
    mlp_weights: int
    vocabulary: int
    parameters: int


@dataclass(frozen=True)
class Shape:
    """What of a trace decides its cost.

    Attributes:
        tokens: T.
        begin: the subject's first token; those left of it cost nothing.
        samples: S.
        window: layers that MLP and attention restore.
    """

    tokens: int
    begin: int = 0
    samples: int = 10
    window: int = 10


def matrices(part: nn.Module) -> list[nn.Module]:
    """The modules of a block, or of a part of it, that multiply a token's vector with a matrix."""
    return [module for module in part.modules() if isinstance(module, nn.Linear | Conv1D)]


def entries(module: nn.Module) -> int:
    """Of all its matrices."""
    return sum(matrix.weight.numel() for matrix in matrices(module))


def size_of(model: PreTrainedModel) -> Size:
    """The size of a model; its weights may be on the device "meta", where they take no memory.

    Raises:
        ValueError: the parts are not where any known family has them.
    """
    layout, config = find_layout(model), model.config
    blocks = list(model.get_submodule(layout.blocks))
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Size(
        layers=len(blocks),
        width=config.hidden_size,
        mlp_width=max(blocks[0].get_submodule(layout.memory).weight.shape),
        query_width=heads * head_width,
        key_width=(getattr(config, "num_key_value_heads", None) or heads) * head_width,
        block_weights=sum(entries(block) for block in blocks) / len(blocks),
        mlp_weights=entries(blocks[-1].get_submodule(layout.feed_forward)) if layout.feed_forward else 0,
        vocabulary=config.vocab_size,
        parameters=sum(weight.numel() for weight in model.parameters()),
    )


def published_sizes() -> dict[str, Size]:
    """Sizes of models from the configurations that were published with them; nothing is loaded or downloaded."""
    large = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    configs: dict[str, PreTrainedConfig] = {
        "GPT-2 XL": gpt2_xl(),
        "GPT-J": tf.GPTJConfig(vocab_size=50400, n_positions=2048, n_embd=4096, n_layer=28, n_head=16),
        "Llama 2 7B": tf.LlamaConfig(
            hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
        ),
        "Llama 2 70B": tf.LlamaConfig(**large, num_key_value_heads=8),
    }
    with torch.device("meta"):
        return {name: size_of(tf.AutoModelForCausalLM.from_config(config)) for name, config in configs.items()}


def gpt2_xl() -> PreTrainedConfig:
    """The shape of the paper's model."""
    return tf.GPT2Config(vocab_size=50257, n_embd=1600, n_layer=48, n_head=25)


def forward_flops(size: Size, rows: int, queries: int, keys: int) -> float:
    """One block on the last `queries` of `keys` tokens of `rows` texts.

    2 (block weights) multiplications with matrices a token, 4 (query width) (keys) in its attention: q kT and p v.
    """
    return rows * queries * (2 * size.block_weights + 4 * size.query_width * keys)


def logit_flops(size: Size, rows: int) -> float:
    """Logits of `rows` last-block outputs: 2 D V each."""
    return 2 * rows * size.width * size.vocabulary


def columns_in_blocks(kind: str, layers: int, window: int) -> list[int]:
    """(L,) how many columns of the result pass through each block in a sweep: those that are runs of their own there."""
    columns = columns_of(kind, layers, window)
    return [sum(column.joins <= layer for column in columns) for layer in range(layers)]


def record_flops(size: Size, trace: Shape) -> float:
    """The clean and the corrupted runs, 1 + S rows of T tokens; logits at the last token only, read twice as a check."""
    rows = 1 + trace.samples
    return size.layers * forward_flops(size, rows, trace.tokens, trace.tokens) + logit_flops(size, 2 * rows)


def swept_tokens(trace: Shape, kind: str) -> list[int]:
    """How many tokens go through the blocks in each sweep, one for every token from the subject's first on.

    Where a state of that first token is restored, the token stays as in the clean run, and only the others are swept.
    """
    numbers = list(range(trace.tokens - trace.begin, 0, -1))
    return [max(1, numbers[0] - 1), *numbers[1:]] if kind == "state" else numbers


def sweep_flops(size: Size, trace: Shape, kind: str) -> float:
    """The restored runs of one kind, without the clean and corrupted runs that all kinds share (`record_flops`).

        sum over sweeps of n tokens, over blocks l:
            S c_l n (2 (block weights) + 4 (query width) T)
        - in the last block: S c_l (n - 1) 2 (MLP weights)
        + for each sweep, S L logits

    c_l is how many of the L columns pass through block l: l for states, so that with n tokens from the subject on, some
    S (L (L - 1) / 2) (n (n + 1) / 2) vectors go through the weights of a block, and (1 + S) (L T)^2 with one forward a cell.
    """
    passing = columns_in_blocks(kind, size.layers, trace.window)
    flops = 0.0
    for number in swept_tokens(trace, kind):
        flops += forward_flops(size, trace.samples * sum(passing), number, trace.tokens)
        flops -= trace.samples * passing[-1] * (number - 1) * 2 * size.mlp_weights
        flops += logit_flops(size, trace.samples * size.layers)
    return flops


def plain_flops(size: Size, trace: Shape) -> float:
    """One kind by one forward of 1 + S rows a cell, with logits at every token, as the authors' code has them."""
    rows = 1 + trace.samples
    blocks = size.layers * forward_flops(size, rows, trace.tokens, trace.tokens)
    return trace.tokens * size.layers * (blocks + logit_flops(size, rows * trace.tokens))


def recorded_bytes(size: Size, trace: Shape, item: int = 4) -> float:
    """What the clean and the corrupted runs leave behind: states, attention, MLP, keys and values of 1 + S rows."""
    vectors = size.layers * (3 * size.width + 2 * size.key_width) + size.width
    return (1 + trace.samples) * trace.tokens * vectors * item


def sweep_bytes(size: Size, trace: Shape, kind: str, item: int = 4) -> float:
    """About the most memory that a sweep takes beside the weights, with entries of `item` bytes and all rows in one batch.

    Beside what is recorded there are the rows of the longest sweep. A block adds some three vectors of the MLP's width and
    five of the model's to each token; reading the answer, two rows of float32 logits for each of the texts read together.
    Where less is free, the batch is cut, and these last two shrink.
    """
    rows, length = trace.samples * size.layers, max(swept_tokens(trace, kind))
    swept = rows * length * size.width * item
    block = rows * length * (3 * size.mlp_width + 5 * size.width) * item
    logits = 2 * rows_at_once(size.vocabulary, min(rows, READ_TOGETHER)) * size.vocabulary * 4
    return recorded_bytes(size, trace, item) + swept + max(block, logits)


def extrapolate(
    sizes: Mapping[str, Size], trace: Shape, kinds: Sequence[str], facts: int, rates: Mapping[str, float], item: int = 4
) -> pd.DataFrame:
    """What tracing `facts` facts costs: a row a model.

    Args:
        kinds: "state", "mlp", "attn": those that are traced.
        rates: by name of a machine, its operations a second, kept up throughout. Time is arithmetic over rate.
        item: bytes of a weight and of an activation.

    Returns: DataFrame: model, parameters (1e9), weights (GB), sweep memory (GB), TFLOP a fact, the plain way's multiple
        of it, and hours at each rate. Evicting, loading and waiting for weights that do not fit is not in it.
    """
    rows = []
    for name, size in sizes.items():
        flops = record_flops(size, trace) + sum(sweep_flops(size, trace, kind) for kind in kinds)
        counted = {
            "model": name,
            "parameters (1e9)": size.parameters / 1e9,
            "weights (GB)": size.parameters * item / 1e9,
            "sweep (GB)": max(sweep_bytes(size, trace, kind, item) for kind in kinds) / 1e9,
            "TFLOP a fact": flops / 1e12,
            "plain / sweep": len(kinds) * plain_flops(size, trace) / flops,
        }
        rows.append(counted | {f"hours, {machine}": facts * flops / rate / 3600 for machine, rate in rates.items()})
    return pd.DataFrame(rows)


def larger_models(lm: LanguageModel, rate: float, facts: int, tflops: float) -> pd.DataFrame:
    """`extrapolate` for `lm` and `published_sizes()`: facts of 9 tokens, the subject from the second on, all three kinds.

    Args: rate: 1e9 operations a second that were measured here. tflops: 1e12 that some GPU is assumed to keep up.
    """
    sizes = {lm.name: size_of(lm.model)} | published_sizes()
    rates = {"here": 1e9 * rate, f"{tflops:g} TFLOP/s": 1e12 * tflops}
    return extrapolate(sizes, Shape(tokens=9, begin=1), ("state", "mlp", "attn"), facts, rates, lm.dtype.itemsize)
