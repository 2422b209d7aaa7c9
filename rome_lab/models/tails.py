"""How a model makes logits of what its last block returns: by its own forward without its blocks, and whether that is it.

own_readout(lm)             a Readout by the model's own forward, whatever norms, scales, caps and biases it has there
readout_error(lm, readout)  how far a Readout is from what the model itself gives, in what rounding explains
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from rome_lab.models.structure import probe

Readout: TypeAlias = Callable[[Tensor], Tensor]
"""Logits (..., V) of outputs of the last block (..., D)."""


class Readable(Protocol):
    """What has blocks and makes logits: a LanguageModel."""

    model: nn.Module
    blocks: list[nn.Module]
    layout: Any
    device: torch.device
    is_rounded: bool


class Stub(nn.Module):
    """Stands for a block of a model: returns what it is to, as the last of them would."""

    def __init__(self, block: nn.Module, returned: Any) -> None:
        super().__init__()
        self.__dict__["block"], self.__dict__["returned"] = block, returned  # no submodule: it is the model's

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.returned

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)  # some models ask a block which kind of attention it has


def own_readout(lm: Readable) -> Readout:
    """Logits by the model's own forward, with each block replaced by one that returns the given hidden states."""
    is_tuple = isinstance(run_on_probe(lm)[0], tuple)
    path, _, name = lm.layout.blocks.rpartition(".")
    parent = lm.model.get_submodule(path)

    def read(hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, 1, hidden.shape[-1])
        ids = probe(lm.model)[:, :1].expand(len(rows), 1)
        blocks = parent._modules[name]
        parent._modules[name] = nn.ModuleList([Stub(block, (rows, None) if is_tuple else rows) for block in lm.blocks])
        try:
            logits = lm.model(input_ids=ids, use_cache=False).logits
        finally:
            parent._modules[name] = blocks
        return logits.reshape(*hidden.shape[:-1], -1).to(lm.device)

    return read


def run_on_probe(lm: Readable) -> tuple[Any, Tensor]:
    """What the last block returns on a short text, and the model's logits (1, T, V)."""
    returned: list[Any] = []
    hook = lm.blocks[-1].register_forward_hook(lambda module, args, output: returned.append(output))
    try:
        with torch.no_grad():
            logits = lm.model(input_ids=probe(lm.model), use_cache=False).logits
    finally:
        hook.remove()
    return returned[0], logits


@torch.no_grad()
def readout_error(lm: Readable, readout: Readout) -> float:
    """Largest difference in log p between a Readout and the model's own forward; 1 is what rounding explains."""
    returned, logits = run_on_probe(lm)
    hidden = returned[0] if isinstance(returned, tuple) else returned
    return excess(readout(hidden), logits, lm.is_rounded)


def excess(ours: Tensor, own: Tensor, is_rounded: bool) -> float:
    """Largest difference between log p of two sets of logits (..., V), in what rounding of their numbers explains.

    The yardstick is the spread of log p, so that a model that says nearly the same of all words is no easier to match.

    Args: is_rounded: whether the model computes in 16 bits or with fast products, in whatever dtype its logits are.
    """
    ours, own = (x.double().cpu().log_softmax(-1) for x in (ours, own))
    allowed = (3e-2 if is_rounded else 1e-4) * (own.amax(-1) - own.amin(-1)) + 1e-6 * own.abs().amax(-1)
    return float(((ours - own).abs().amax(-1) / allowed).max())
