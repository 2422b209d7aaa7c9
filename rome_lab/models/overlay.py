"""The weights in force: originals, and the changes that lie over them, undone bit for bit in any order.

    overlay.put(changes)             exactly these changes are in force
    with overlay.only(changes): ...  within the context, whatever was in force before
    overlay.original(layer)          W as it is without any, as the model stores it
    with alone_with(lm)              no other thread may trace the model or change its weights

A matrix in force is always the original one plus the sum of its changes, rounded once. So changes can be undone in any
order, and what is left after the last one is the original itself.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rome_lab.models.weights import read_weight, write_weight


class WeightChange(Protocol):
    """What changes one matrix or several: an Edit, say.

    Attributes:
        layers: whose W it changes.
    """

    @property
    def layers(self) -> tuple[int, ...]: ...

    def delta_at(self, layer: int) -> Tensor:
        """(D, H) float64, W_hat - W of one of them in the paper's orientation, (out, in)."""


class Memories(Protocol):
    """The matrices that can be changed: a LanguageModel."""

    name: str
    n_layers: int

    def memory(self, layer: int) -> nn.Module: ...
    def memory_is_transposed(self, layer: int) -> bool: ...


model_locks: WeakKeyDictionary[Memories, threading.RLock] = WeakKeyDictionary()
"""A lock for each model that was worked on."""


@contextlib.contextmanager
def alone_with(lm: Memories) -> Iterator[None]:
    """Within the context no other thread may trace the model or change its weights: hooks act on the runs of all threads.

    Raises:
        RuntimeError: another thread works on it.
    """
    lock = model_locks.setdefault(lm, threading.RLock())
    if not lock.acquire(blocking=False):
        raise RuntimeError(
            f"{lm.name} is at work in another thread, whose hooks would act here, too; wait until it is done."
        )
    try:
        yield
    finally:
        lock.release()


class Overlay:
    """The changes in force on one model's matrices; nobody else writes those.

    Attributes:
        changes: those in force, in the order in which they came.
        originals: by layer, W as stored before any of them, on the CPU; of changed layers only.
    """

    def __init__(self, memories: Memories) -> None:
        self.memories = memories
        self.changes: list[WeightChange] = []
        self.originals: dict[int, Tensor] = {}

    def original(self, layer: int) -> Tensor:
        """W of `layer` without changes, as the model stores it, to read."""
        kept = self.originals.get(layer)
        return read_weight(self.memories.memory(layer)) if kept is None else kept

    @contextlib.contextmanager
    def only(self, changes: Sequence[WeightChange]) -> Iterator[None]:
        """Within the context exactly `changes` are in force; after it those that were before."""
        before = list(self.changes)
        self.put(changes)
        try:
            yield
        finally:
            self.put(before)

    @torch.no_grad()
    def put(self, changes: Sequence[WeightChange]) -> None:
        """Give every matrix its original weight plus its changes: all of them, or, after an error, none.

        Raises:
            ValueError: a weight is not what the changes in force had made of it, or it would overflow.
            RuntimeError: another thread works on the model.
        """
        with alone_with(self.memories):
            self.replace_changes(changes)

    def replace_changes(self, changes: Sequence[WeightChange]) -> None:
        """What `put` does, by whoever is alone with the model."""
        name, before = self.memories.name, list(self.changes)
        layers = [x for x in range(self.memories.n_layers) if changes_at(x, before) != changes_at(x, changes)]
        originals = {layer: self.original(layer).cpu().clone() for layer in layers}
        old = {layer: self.composed(layer, originals[layer], before) for layer in layers}
        new = {layer: self.composed(layer, originals[layer], changes) for layer in layers}
        for layer in layers:
            if not torch.equal(read_weight(self.memories.memory(layer)).cpu(), old[layer]):
                raise ValueError(
                    f"edits: the weight of layer {layer} of {name} was changed by something else since an edit was "
                    "applied, so that edit cannot be undone exactly; load the model again."
                )
            if not torch.isfinite(new[layer]).all():
                dtype = new[layer].dtype
                raise ValueError(f"edits: the edited weight of layer {layer} overflows {dtype}; use float32.")
        # The originals are kept before anything is written, so that an interruption anywhere leaves them to undo by.
        self.originals = {**self.originals, **originals}
        try:
            for layer in layers:
                write_weight(self.memories.memory(layer), new[layer])
            self.changes[:] = changes
        except BaseException:  # also Ctrl-C
            for layer in layers:
                write_weight(self.memories.memory(layer), old[layer])
            self.changes[:] = before
            raise
        finally:
            self.originals = {layer: x for layer, x in self.originals.items() if changes_at(layer, self.changes)}

    def composed(self, layer: int, original: Tensor, changes: Sequence[WeightChange]) -> Tensor:
        """The weight that is stored when `changes` are in force; in float64 on the CPU, rounded once."""
        total = original.to(torch.float64, copy=True)
        for change in changes_at(layer, changes):
            delta = change.delta_at(layer)
            total += delta.T if self.memories.memory_is_transposed(layer) else delta
        return total.to(original.dtype)


def changes_at(layer: int, changes: Sequence[WeightChange]) -> list[WeightChange]:
    """Those of `changes` that change `layer`."""
    return [change for change in changes if layer in change.layers]
