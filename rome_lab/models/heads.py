"""Where the heads of an attention are: the matrix that ends it, whose input is one head's values after the other's.

It is found by what it is given, not by its name. The first token of a text sees none but itself, so that each head hands on
exactly its value there, which the cache of keys and values holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from rome_lab.models.structure import probe

AGREES = {False: 1e-4, True: 3e-2}
"""Whether a model is rounded to 16 bits -> how far a value may be off, relative to the largest."""


@torch.no_grad()
def find_heads(model: nn.Module, blocks: Sequence[nn.Module], is_rounded: bool) -> list[nn.Module] | None:
    """The module that ends each block's attention, given the heads' values (B, T, heads * D_head); None where there is none.

    There is none where values are scaled, mixed or normalised before that matrix, as with attention sinks.
    """
    given: list[list[tuple[nn.Module, torch.Tensor]]] = [[] for _ in blocks]

    def keep(place: int, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            given[place].append((module, args[0].reshape(-1, args[0].shape[-1])[0].clone()))

    cache = DynamicCache()
    with ExitStack() as hooks:
        for place, block in enumerate(blocks):
            for module in block.modules():
                if getattr(getattr(module, "weight", None), "ndim", 0) == 2:
                    hooks.callback(module.register_forward_pre_hook(partial(keep, place)).remove)
        model(input_ids=probe(model), past_key_values=cache, use_cache=True)
    if len(cache.layers) != len(blocks):
        return None
    ends = []
    for inputs, layer in zip(given, cache.layers, strict=True):
        values = layer.values[0, :, 0]  # (key/value heads, D_head)
        fits = [module for module, x in inputs if is_of_heads(x, values, AGREES[is_rounded])]
        if not fits:
            return None
        ends.append(fits[0])
    return ends


def is_of_heads(given: torch.Tensor, values: torch.Tensor, tolerance: float) -> bool:
    """Whether `given` is the rows of `values`, each as often as there are heads that share it."""
    shared, rest = divmod(len(given), values.numel())
    if rest or not shared:
        return False
    expected = values.repeat_interleave(shared, dim=0).flatten().to(given)
    return bool((given - expected).abs().max() <= tolerance * expected.abs().max())
