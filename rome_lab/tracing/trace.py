"""What one causal trace found: `Trace`, the record that tracing makes and everything else reads, and the `KINDS` of it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from rome_lab.tracing.metrics import TRACE_METRICS, Readings

KINDS: dict[str, tuple[str, str | None]] = {
    "state": ("state", None),
    "mlp": ("mlp", None),
    "attn": ("attn", None),
    "severed-mlp": ("state", "mlp"),
    "severed-attn": ("state", "attn"),
}
"""Label of a sort of trace by token and layer -> (what is restored, whose outputs are then held as they were)."""
HEAD = "head"
DIRECTIONS = ("denoise", "noise")
"""Which run is restored into which: clean into corrupted (does it suffice?), or corrupted into clean (is it needed?)."""


@dataclass(frozen=True, eq=False)
class Trace:
    """What is read of the answer in the clean, the corrupted and all restored runs of one prompt (B.1, B.2).

    Attributes:
        kind: what was restored: "state", "mlp", "attn" or "head".
        severed: module whose outputs were held at what they are in the run that is restored into, "mlp", "attn" or None.
        prompt, subject, answer: the answer is the one token whose probability is followed, as text.
        tokens: T strings, one a token of the prompt.
        subject_range: (begin, end) in tokens, end excluded.
        p_clean, p_corrupted: P[o] and P*[o], the latter a mean over the noise samples.
        p_restored: (T, L) float64, P*,clean[o]; row = restored token, column = restored layer, or the middle of
            the restored run of layers; a mean over the noise samples. Rows of tokens that were not restored are NaN.
            Of "head" it is (L, heads), all at one token.
        noise_std: nu, standard deviation of the noise on the subject's embeddings; 0 where another subject stands there.
        samples, window, seed: the settings; `window` is the length of the runs that "mlp" and "attn" restore.
        direction: of `DIRECTIONS`.
        metric: which of `TRACE_METRICS` `effect` is in.
        foil: text of the token that the logit difference is against, where there is one.
        swapped: the subject that stands in the subject's place in the corrupted run, where no noise does.
        token: where the heads were restored.
        relation: of the fact, where it is known.
        p_variance: variance of the effect on the probability over the samples, shaped as p_restored.
        further: the readings of the other metrics.
    """

    kind: str
    severed: str | None
    prompt: str
    subject: str
    answer: str
    tokens: tuple[str, ...]
    subject_range: tuple[int, int]
    p_clean: float
    p_corrupted: float
    p_restored: np.ndarray
    noise_std: float
    samples: int
    window: int
    seed: int
    direction: str = "denoise"
    metric: str = "probability"
    foil: str | None = None
    swapped: str | None = None
    token: int | None = None
    relation: str | None = None
    p_variance: np.ndarray | None = None
    further: Mapping[str, Readings] = field(default_factory=dict)

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update({"further": {}} | state)  # none, where it was pickled before there were other metrics

    def read(self, metric: str | None = None) -> Readings:
        """The readings of a metric, by default that of the trace.

        Raises: ValueError: the trace has no such metric.
        """
        metric = metric or self.metric
        if metric == "probability":
            variance = np.full_like(self.p_restored, np.nan) if self.p_variance is None else self.p_variance
            return Readings(self.p_clean, self.p_corrupted, self.p_restored, variance)
        if metric not in self.further:
            known = ", ".join(["probability", *self.further])
            raise ValueError(f"Trace: no metric {metric!r} was read, only {known}; a logit difference needs a foil.")
        return self.further[metric]

    def by(self, metric: str) -> Trace:
        """The same trace, its effects in another metric, which was read along with it."""
        self.read(metric)
        return replace(self, metric=metric)

    @property
    def base(self) -> float:
        """The metric in the run that is restored into: corrupted, or clean where the direction is "noise"."""
        return self.read().clean if self.direction == "noise" else self.read().corrupted

    @property
    def whole(self) -> float:
        """The metric's difference between the run that is restored from and `base`: what restoring everything does."""
        return (self.read().corrupted if self.direction == "noise" else self.read().clean) - self.base

    @property
    def effect(self) -> np.ndarray:
        """(T, L), or (L, heads): M(restored) - M(base), paired; in direction "noise" mostly below zero."""
        return self.read().restored - self.base

    @property
    def has_normalised(self) -> bool:
        """Whether `whole` is far enough from zero to divide by, see `TRACE_METRICS`."""
        return abs(self.whole) >= TRACE_METRICS[self.metric]

    @property
    def normalised_effect(self) -> np.ndarray:
        """(T, L): `effect` as a share of `whole`: 0 where restoring does nothing, 1 where it does all.

        Raises: ValueError: clean and corrupted run hardly differ, see `TRACE_METRICS`.
        """
        if not self.has_normalised:
            raise ValueError(
                f"Trace: of {self.prompt!r} clean and corrupted run differ by {abs(self.whole):.3g} in {self.metric}, less "
                f"than {TRACE_METRICS[self.metric]:g}, so that no share of it says anything; choose another fact or metric."
            )
        return self.effect / self.whole

    @property
    def total_effect(self) -> float:
        """P[o] - P*[o]."""
        return self.p_clean - self.p_corrupted

    @property
    def indirect_effect(self) -> np.ndarray:
        """(T, L): P*,clean[o] - P*[o], paired within the fact; in direction "noise" P restored - P[o]."""
        return replace(self, metric="probability").effect

    @property
    def label(self) -> str:
        """Key of `KINDS` that this trace is one of."""
        return f"severed-{self.severed}" if self.severed else self.kind

    @property
    def peak(self) -> tuple[int, int]:
        """Token and layer, or layer and head, of the largest effect towards what restoring everything does."""
        towards = self.effect * np.copysign(1.0, self.whole)
        row, layer = np.unravel_index(np.nan_to_num(towards, nan=-np.inf).argmax(), towards.shape)
        return int(row), int(layer)

    @property
    def n_layers(self) -> int:
        """L."""
        return self.p_restored.shape[1 if self.token is None else 0]

    def __repr__(self) -> str:
        return f"Trace({', '.join(f'{name} {value}' for name, value in self.in_short().items())})"

    def _repr_html_(self) -> str:
        return pd.DataFrame(self.in_short().items()).to_html(index=False, header=False)

    def in_short(self) -> dict[str, str]:
        """What a line or a small table says of the trace, without its numbers by token and layer."""
        row, column = self.peak
        place = f"{self.tokens[row]!r} in layer {column}" if self.token is None else f"head {column} of layer {row}"
        chosen = {"metric": self.metric} if self.metric != "probability" else {}
        chosen |= {"direction": self.direction} if self.direction != "denoise" else {}
        chosen |= {"in its place": repr(self.swapped)} if self.swapped else {}
        return {
            "kind": self.label,
            **chosen,
            "prompt": repr(textwrap.shorten(self.prompt, 80, placeholder=" ...")),
            "answer": repr(self.answer),
            "p_clean": f"{self.p_clean:.3f}",
            "p_corrupted": f"{self.p_corrupted:.3f}",
            "largest effect": f"{self.effect[row, column]:.3f} at {place}",
            "tokens": str(len(self.tokens)),
            "layers": str(self.n_layers),
        }
