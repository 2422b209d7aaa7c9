"""The restored runs of one token at all layers, in one sweep through the blocks.

The naive way runs the whole model once for every (token, layer). But nothing before the restored layer and no token
left of the restored one depends on the restoration. So the layers are swept once for each token: at every layer the
texts that restore there join the batch, holding only the tokens from the restored one on, and all texts that have
joined go through the next block together. Of runs of layers that begin together only the longest is swept until another
ends, which then becomes a run of its own. In the last block only the last token goes through the MLP. This is exact:
the arithmetic that is left out would give what is kept, or what nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch

from rome_lab.models import (
    Batching,
    at_least_float32,
    input_changed,
    last_token_only,
    output_changed,
    rows_at_once,
    run_block,
)
from rome_lab.tracing.metrics import read_metrics
from rome_lab.tracing.runs import Runs

READ_TOGETHER = 80  # texts whose logits are made at once: those of more do not stay in a processor's cache


def few_together(together: Batching) -> Batching:
    """The same for reading: so few texts that their logits are small, whatever the vocabulary."""
    most = min(READ_TOGETHER, together.most or READ_TOGETHER)
    few = copy(together)  # with what was found to be free
    few.most = rows_at_once(together.lm.config.vocab_size, most)
    return few


@dataclass(frozen=True)
class Column:
    """One column of the result: the layers `first`..`last` are restored, and `depth` blocks are as in the corrupted run.

    Attributes:
        trunk: another column that begins at the same layer and ends later, if there is one: both are one run up to `last`.
        heads: (layer, head) of each head that is restored, where heads are.
    """

    depth: int
    first: int
    last: int
    trunk: int | None = None
    heads: tuple[tuple[int, int], ...] = ()

    @property
    def joins(self) -> int:
        """The block from which on it is a run of its own."""
        return self.depth if self.trunk is None else self.last + 1


def columns_of(kind: str, n_layers: int, window: int, heads: int = 0) -> list[Column]:
    """The L columns of one kind, by layer; of kind "head" there is one for each head, by layer and head."""
    if kind == "head":
        return [column_of_heads([(x, head)]) for x in range(n_layers) for head in range(heads)]
    if kind == "state":
        return [Column(layer + 1, layer, layer) for layer in range(n_layers)]
    # Differs: the authors' published code restores [l - 5, l + 4]; this is the paper's [l - 4, l + 5] (B.2).
    runs = [(max(0, x - (window - 1) // 2), min(n_layers - 1, x + window // 2)) for x in range(n_layers)]
    longest = {
        first: x for x, (first, last) in enumerate(runs)
    }  # of several runs that begin together the last is longest
    return [
        Column(first, first, last, None if longest[first] == x else longest[first])
        for x, (first, last) in enumerate(runs)
    ]


def column_of_heads(heads: Iterable[tuple[int, int]]) -> Column:
    """The column in which these heads, (layer, head) each, are restored together."""
    heads = tuple(sorted(heads))
    return Column(heads[0][0], heads[0][0], heads[-1][0], heads=heads)


@dataclass(frozen=True, eq=False)
class Sweep:
    """The restored runs of one token at all layers: one sweep through the blocks.

    Attributes:
        columns: what is restored, by layer.
        along: (A,) how far each column's runs go from what stands there, 0, to what is restored, 1: there is one for each,
            and each of the S samples; by default all go the whole way.
        order: the columns in the order in which they become runs of their own.
    """

    runs: Runs
    token: int
    kind: str
    severed: str | None
    columns: list[Column]
    along: torch.Tensor | None = None

    @cached_property
    def order(self) -> list[int]:
        return sorted(range(len(self.columns)), key=lambda place: self.columns[place].joins)

    @property
    def stays_clean(self) -> bool:
        """Whether all that follows at the restored token is as in the run it comes from: nothing left of it differs."""
        begin, length = self.runs.prompt.subject_range[0], len(self.runs.prompt.ids)
        whole = self.kind == "state" and not self.severed and self.along is None
        return whole and self.token == begin and begin + 1 < length

    @property
    def rows_each(self) -> int:
        """Runs of one column: S, for each of the A ways along the restoration."""
        return self.runs.settings.samples * (1 if self.along is None else len(self.along))

    def restored(self, recorded: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """What of `recorded` (1 + S, T, ...) stands at the token in runs, by their place (R,) in their column."""
        sample = row % self.runs.settings.samples
        whole = recorded[self.runs.source[sample], self.token]
        if self.along is None:
            return whole
        here = recorded[self.runs.base[sample], self.token]
        along = self.along[row // self.runs.settings.samples].to(here)
        return here + along.view(-1, *[1] * (here.ndim - 1)) * (whole - here)

    def metrics(self) -> dict[str, np.ndarray]:
        """Metric -> (columns, S), see `read_metrics`."""
        return self.read(lambda logits: read_metrics(logits, self.runs.answer_id, self.runs.foil_id))

    def read(self, reader: Callable[[torch.Tensor], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Name -> (columns, A * S), what `reader` reads of the runs' logits (..., V) at the last token."""
        runs, samples = self.runs, self.rows_each
        first = self.token + self.stays_clean
        # (C * S, N, D): the S texts of each column, in the order in which the columns join; `joined` of the texts have.
        texts = runs.recording.states[0].new_empty(
            len(self.columns) * samples, *runs.recording.states[0][0, first:].shape
        )
        row = torch.arange(samples)
        base = runs.base[row % runs.settings.samples]
        begin = {column: index * samples for index, column in enumerate(self.order)}
        joined = 0
        for depth, states in enumerate(runs.recording.states):
            texts = texts.to(states.device)
            for column in (self.columns[place] for place in self.order if self.columns[place].joins == depth):
                trunk = None if column.trunk is None else begin[column.trunk]
                texts[joined : joined + samples] = (
                    states[base, first:] if trunk is None else texts[trunk : trunk + samples]
                )
                if self.kind == "state" and not self.stays_clean:
                    texts[joined : joined + samples, 0] = self.restored(states, row)
                joined += samples
            if depth < runs.lm.n_layers:
                runs.together.each(range(joined), partial(self.go_through, depth, texts))
        read = few_together(runs.together).over(
            texts[:, -1], lambda last: reader(at_least_float32(runs.lm.logits(last)))
        )
        parts = list(read)
        metrics = {}
        for name in parts[0]:
            metrics[name] = np.empty((len(self.columns), samples))
            metrics[name][self.order] = np.concatenate([part[name] for part in parts]).reshape(-1, samples)
        return metrics

    def go_through(self, layer: int, texts: torch.Tensor, rows: range) -> None:
        """Put what block `layer` makes of some rows of the texts, (C * S, N, D), in their place."""
        lm, part = self.runs.lm, slice(rows.start, rows.stop)
        row = torch.arange(rows.start, rows.stop) % self.rows_each
        sample = row % self.runs.settings.samples
        continued = (self.runs.source if self.stays_clean else self.runs.base)[sample].to(texts.device)
        with ExitStack() as hooks:
            if layer == lm.n_layers - 1 and texts.shape[1] > 1:
                # Nothing reads the other tokens, what is held at the restored one among them.
                hooks.enter_context(last_token_only(lm.feed_forward(layer)))
            else:
                self.hold(layer, rows, row, hooks)
            texts[part] = run_block(lm, layer, texts[part], self.runs.recording, continued)

    def hold(self, layer: int, rows: range, row: torch.Tensor, hooks: ExitStack) -> None:
        """Have modules of `layer` hold, in some rows, what they said or were given at the token in another run.

        Args: row: (R,) the rows' places in their columns.
        """
        name = self.severed or self.kind
        columns = [self.columns[self.order[place // self.rows_each]] for place in rows]
        held = [i for i, column in enumerate(columns) if self.severed or column.first <= layer <= column.last]
        if name == "state" or not held:
            return
        lm, recording, row = self.runs.lm, self.runs.recording, row[held]
        if name == "head":
            value = self.restored(recording.heads[layer], row)  # (R, heads, D_head)
            of_head = torch.zeros(len(held), value.shape[1], dtype=torch.bool)
            for place, i in enumerate(held):
                of_head[place, [head for where, head in columns[i].heads if where == layer]] = True
            hooks.enter_context(input_changed(lm.heads_out[layer], HoldAt(len(rows), held, value, of_head)))
            return
        outputs = (recording.mlp if name == "mlp" else recording.attn)[layer]
        module = lm.mlp(layer) if name == "mlp" else lm.attn(layer)
        # Severed: each sample's own value. Restored: that of the run which is restored from.
        own = self.runs.base[row % self.runs.settings.samples]
        value = outputs[own, self.token] if self.severed else self.restored(outputs, row)
        hooks.enter_context(output_changed(module, HoldAt(len(rows), held, value)))


@dataclass(frozen=True, eq=False)
class HoldAt:
    """A change of a tensor for `rows` texts of N tokens: the first token of some texts is given a value.

    Attributes:
        held: (R,) places of those texts.
        value: (R, D); or, of heads, (R, heads, D_head).
        of_head: (R, heads) which heads are given it.
    """

    rows: int
    held: list[int]
    value: torch.Tensor
    of_head: torch.Tensor | None = None

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        if self.of_head is None:
            given.view(self.rows, -1, given.shape[-1])[self.held, 0] = self.value
            return given
        given = given.clone()
        at_token = given.view(self.rows, -1, *self.value.shape[1:])  # (rows, N, heads, D_head)
        mask = self.of_head[..., None].to(given.device)
        at_token[self.held, 0] = torch.where(mask, self.value, at_token[self.held, 0])
        return given
