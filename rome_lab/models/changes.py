"""Changes: what a method does to make a model say something else, as a thing that leaves the model as it is.

Change                              an addition to one W or to several, or words before every prompt, or nothing
side_by_side(lm, changes, owners)   within it, each row of a batch is run with a change of its own
OwnedRows                           the rows of that batch, of which some may leave between two passes
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rome_lab.models.language_model import LanguageModel
from rome_lab.models.weights import device_of, read_weight, write_weight


@dataclass(frozen=True, eq=False)
class Change:
    """What a method does to make a model say something else: an addition to W, or words before every prompt.

    Attributes:
        layer: where W is, or a tuple of layers; None where no weight changes.
        delta: (D, H) float32, W_hat - W in the paper's orientation, (out, in); of several layers a tuple of these.
        preamble: put before every prompt as it is, so it ends with the blank that parts it from the prompt.

    Raises:
        ValueError: a layer without a delta or a delta without a layer, one layer twice, or a delta that is no matrix of
            numbers.
    """

    layer: int | tuple[int, ...] | None = None
    delta: Float[Tensor, "D H"] | tuple[Float[Tensor, "D H"], ...] | None = None
    preamble: str = ""

    def __post_init__(self) -> None:
        if (self.layer is None) != (self.delta is None):
            raise ValueError(
                f"Change: the layer is {self.layer} and the delta is {'given' if self.layer is None else 'None'}; "
                "give both, or neither for a change that leaves the weights as they are."
            )
        several = isinstance(self.layer, tuple)
        if several != isinstance(self.delta, tuple) or (several and not len(set(self.layer)) == len(self.delta) > 0):
            raise ValueError(f"Change: the layers are {self.layer}; give each of them once, with a delta for each.")
        for delta in self.deltas.values():
            if not (delta.ndim == 2 and torch.isfinite(delta).all()):
                raise ValueError(
                    f"Change: delta has shape {tuple(delta.shape)} and may hold NaN or infinity; expected a (D, H) "
                    "matrix of finite numbers."
                )

    @classmethod
    def of(cls, deltas: Mapping[int, Float[Tensor, "D H"]], **others: object) -> Self:
        """The change with these deltas by layer, of none, one or several, and with these other attributes."""
        if len(deltas) > 1:
            return cls(tuple(deltas), tuple(deltas.values()), **others)
        return cls(*next(iter(deltas.items()), (None, None)), **others)

    @property
    def deltas(self) -> dict[int, Float[Tensor, "D H"]]:
        """W_hat - W by layer; empty where no weight changes."""
        if self.layer is None:
            return {}
        return (
            dict(zip(self.layer, self.delta, strict=True))
            if isinstance(self.layer, tuple)
            else {self.layer: self.delta}
        )

    @contextlib.contextmanager
    def applied(self, lm: LanguageModel) -> Iterator[LanguageModel]:
        """Within the context every W is W_hat; after it, also after an exception, it is bit for bit what it was.

        The preamble is not in any weight: whoever asks the model something puts it before the prompt. Edits in force
        stay so; applying or undoing one within the context is refused by the edit, which finds a weight that it did
        not make.

        Raises:
            ValueError: the delta does not fit the layer, or W_hat would overflow.
        """
        check_fits(lm, self)
        with torch.no_grad():
            originals = {layer: read_weight(lm.memory(layer)).clone() for layer in self.deltas}
            totals = {layer: changed_weight(lm, layer, W, self.deltas[layer]) for layer, W in originals.items()}
            try:
                for layer, total in totals.items():
                    write_weight(lm.memory(layer), total)
                yield lm
            finally:
                for layer, original in originals.items():
                    write_weight(lm.memory(layer), original)


def changed_weight(lm: LanguageModel, layer: int, original: Tensor, delta: Float[Tensor, "D H"]) -> Tensor:
    """W_hat as the model stores it."""
    delta = delta.to(original.device)
    total = (original.float() + (delta.T if lm.memory_is_transposed(layer) else delta)).to(original.dtype)
    if not torch.isfinite(total).all():
        raise ValueError(f"Change: the changed weight of layer {layer} overflows {lm.dtype}; use float32.")
    return total


class OwnedRows:
    """The rows of a batch, each with the change that it is run with.

    Attributes:
        owners: of each row, the place of its change.
        places: of each change, its rows, as a slice where they stand together.
    """

    def __init__(self, owners: Sequence[int]) -> None:
        self.assign(owners)

    def assign(self, owners: Sequence[int]) -> None:
        """From the next pass on the batch holds rows of these owners."""
        several: dict[int, list[int]] = {}
        for row, owner in enumerate(owners):
            several.setdefault(owner, []).append(row)
        self.owners, self.places = tuple(owners), {owner: together(rows) for owner, rows in several.items()}

    def keep(self, rows: Sequence[int]) -> None:
        """From the next pass on the batch holds these of its rows only."""
        self.assign([self.owners[row] for row in rows])


@contextlib.contextmanager
def side_by_side(lm: LanguageModel, changes: Sequence[Change], owners: Sequence[int]) -> Iterator[OwnedRows]:
    """Within the context, row i of a batch is run with changes[owners[i]]; no weight is touched.

    A row's W_hat k is computed as W k + delta k, so a forward here equals one under `Change.applied` up to rounding.
    It holds for any pass over as many rows as there are owners: whole texts, padded or not, or single tokens with
    cached keys and values. Rows of one change should stand together: they share one product. Rows whose change has no
    delta cost nothing.

    Raises:
        ValueError: an owner that is no change, a delta that does not fit, or, in a pass, another number of rows.
    """
    if not all(0 <= owner < len(changes) for owner in owners):
        raise ValueError(f"side_by_side: owners are {sorted(set(owners))}; expected places in {len(changes)} changes.")
    rows = OwnedRows(owners)
    changing: dict[int, dict[int, Tensor]] = {}  # by layer and owner
    for owner in rows.places:
        check_fits(lm, changes[owner])
        for layer, delta in changes[owner].deltas.items():
            changing.setdefault(layer, {})[owner] = delta.to(device_of(lm.memory(layer)), lm.dtype)
    with contextlib.ExitStack() as stack:
        for layer, deltas in changing.items():
            hook = partial(add_deltas, deltas=deltas, rows=rows)
            stack.callback(lm.memory(layer).register_forward_hook(hook).remove)
        stack.callback(lm.embedding.register_forward_pre_hook(partial(check_rows, rows=rows)).remove)
        yield rows


def add_deltas(
    module: nn.Module, inputs: tuple[Tensor], output: Tensor, deltas: Mapping[int, Tensor], rows: OwnedRows
) -> Tensor:
    """A forward hook of W: the output with delta k added on the rows of each delta."""
    n_rows = len(rows.owners)
    keys = inputs[0].view(n_rows, -1, inputs[0].shape[-1])  # OPT hands over (B * T, H)
    changed = output.view(n_rows, -1, output.shape[-1]).clone()
    for owner, delta in deltas.items():
        if (own := rows.places.get(owner)) is not None:
            changed[own] += keys[own] @ delta.T
    return changed.view(output.shape)


def check_rows(module: nn.Module, inputs: tuple[Tensor], rows: OwnedRows) -> None:
    """A forward pre-hook of the embedding: refuses a batch of another number of rows."""
    if len(inputs[0]) != len(rows.owners):
        raise ValueError(
            f"side_by_side: the batch has {len(inputs[0])} rows; expected {len(rows.owners)}, one for each owner."
        )


def together(rows: Sequence[int]) -> slice | Tensor:
    """Ascending rows as a slice where they stand together; else on the CPU, whose indices pick on any device."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows)


def check_fits(lm: LanguageModel, change: Change) -> None:
    for layer, delta in change.deltas.items():
        if not 0 <= layer < lm.n_layers:
            raise ValueError(f"Change: layer {layer} is not among layers 0 to {lm.n_layers - 1} of {lm.name}.")
        shape = tuple(lm.memory(layer).weight.shape)
        expected = shape[::-1] if lm.memory_is_transposed(layer) else shape
        if tuple(delta.shape) != expected:
            raise ValueError(
                f"Change: delta has shape {tuple(delta.shape)}; layer {layer} of {lm.name} takes {expected}, (D, H)."
            )
