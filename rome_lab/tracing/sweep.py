"""The restored runs of one token at all layers, in one sweep through the blocks.

The naive way runs the whole model once for every (token, layer). But nothing before the restored layer and no token
left of the restored one depends on the restoration. So the layers are swept once for each token: at every layer the
texts that restore there join the batch, holding only the tokens from the restored one on, and all texts that have
joined go through the next block together. Of runs of layers that begin together only the longest is swept until another
ends, which then becomes a run of its own. In the last block only the last token goes through the MLP. This is exact:
the arithmetic that is left out would give what is kept, or what nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch

from rome_lab.models import Batching, at_least_float32, last_token_only, output_changed, run_block, text_bytes
from rome_lab.tracing.runs import Runs, probability

READ_TOGETHER = 80  # texts whose logits are made at once: those of more do not stay in a processor's cache


@dataclass(frozen=True)
class Column:
    """One column of the result: the layers `first`..`last` are restored, and `depth` blocks are as in the corrupted run.

    Attributes:
        trunk: another column that begins at the same layer and ends later, if there is one: both are one run up to `last`.
    """

    depth: int
    first: int
    last: int
    trunk: int | None = None

    @property
    def joins(self) -> int:
        """The block from which on it is a run of its own."""
        return self.depth if self.trunk is None else self.last + 1


def columns_of(kind: str, n_layers: int, window: int) -> list[Column]:
    """The L columns of one kind, by layer."""
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


@dataclass(frozen=True, eq=False)
class Sweep:
    """The restored runs of one token at all layers: one sweep through the blocks.

    Attributes:
        columns: what is restored, by layer.
        order: the columns in the order in which they become runs of their own.
    """

    runs: Runs
    token: int
    kind: str
    severed: str | None
    columns: list[Column]

    @cached_property
    def order(self) -> list[int]:
        return sorted(range(len(self.columns)), key=lambda place: self.columns[place].joins)

    @property
    def stays_clean(self) -> bool:
        """Whether all that follows at the restored token is as in the clean run: nothing left of it is corrupted."""
        begin, length = self.runs.prompt.subject_range[0], len(self.runs.prompt.ids)
        return self.kind == "state" and not self.severed and self.token == begin and begin + 1 < length

    def p_restored(self) -> np.ndarray:
        """(L,) mean over the samples of the answer's probability."""
        runs, samples = self.runs, self.runs.settings.samples
        together = Batching(runs.lm, "causal_trace", text_bytes(runs.lm, len(runs.prompt.ids)), runs.settings.max_rows)
        first = self.token + self.stays_clean
        # (C * S, N, D): the S texts of each column, in the order in which the columns join; `joined` of the texts have.
        texts = runs.recording.states[0].new_empty(
            len(self.columns) * samples, *runs.recording.states[0][0, first:].shape
        )
        begin = {column: index * samples for index, column in enumerate(self.order)}
        joined = 0
        for depth, states in enumerate(runs.recording.states):
            texts = texts.to(states.device)
            for column in (self.columns[place] for place in self.order if self.columns[place].joins == depth):
                trunk = None if column.trunk is None else begin[column.trunk]
                texts[joined : joined + samples] = (
                    states[1:, first:] if trunk is None else texts[trunk : trunk + samples]
                )
                if self.kind == "state" and not self.stays_clean:
                    texts[joined : joined + samples, 0] = states[0, self.token]
                joined += samples
            if depth < runs.lm.n_layers:
                together.each(range(joined), partial(self.go_through, depth, texts))
        few = replace(together, most=min(READ_TOGETHER, together.most or READ_TOGETHER))
        parts = few.over(texts[:, -1], lambda last: at_least_float32(runs.lm.logits(last)))
        p = np.concatenate([probability(logits, runs.answer_id) for logits in parts])
        means = np.empty(len(self.columns))
        means[self.order] = p.reshape(-1, samples).mean(axis=1)
        return means

    def go_through(self, layer: int, texts: torch.Tensor, rows: range) -> None:
        """Put what block `layer` makes of some rows of the texts, (C * S, N, D), in their place."""
        lm, part = self.runs.lm, slice(rows.start, rows.stop)
        continued = 1 + torch.arange(rows.start, rows.stop, device=texts.device) % self.runs.settings.samples
        if self.stays_clean:
            continued = torch.zeros_like(continued)  # the row of the clean run
        with ExitStack() as hooks:
            if layer == lm.n_layers - 1 and texts.shape[1] > 1:
                # Nothing reads the other tokens, what is held at the restored one among them.
                hooks.enter_context(last_token_only(lm.feed_forward(layer)))
            else:
                for module, change in self.held_outputs(layer, rows, continued):
                    hooks.enter_context(output_changed(module, change))
            texts[part] = run_block(lm, layer, texts[part], self.runs.recording, continued)

    def held_outputs(
        self, layer: int, rows: range, continued: torch.Tensor
    ) -> list[tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]]:
        """Modules of `layer` whose output at the token is held, each with the change that holds it."""
        name = self.severed or self.kind
        if name == "state":
            return []
        columns = [self.columns[self.order[row // self.runs.settings.samples]] for row in rows]
        held = [i for i, column in enumerate(columns) if self.severed or column.first <= layer <= column.last]
        if not held:
            return []
        lm, recording = self.runs.lm, self.runs.recording
        outputs = (recording.mlp if name == "mlp" else recording.attn)[layer]
        # Severed: each sample's own corrupted value (R, D). Restored: the clean value (D,).
        value = outputs[continued.to(outputs.device), self.token] if self.severed else outputs[0, self.token]

        def hold(output: torch.Tensor) -> torch.Tensor:
            output.view(len(rows), -1, output.shape[-1])[held, 0] = value
            return output

        return [(lm.mlp(layer) if name == "mlp" else lm.attn(layer), hold)]
