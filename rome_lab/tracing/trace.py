"""What one causal trace found: `Trace`, the record that tracing makes and everything else reads, and the `KINDS` of it."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import numpy as np
import pandas as pd

KINDS: dict[str, tuple[str, str | None]] = {
    "state": ("state", None),
    "mlp": ("mlp", None),
    "attn": ("attn", None),
    "severed-mlp": ("state", "mlp"),
    "severed-attn": ("state", "attn"),
}
"""Label of a sort of trace -> (what is restored, whose outputs are then held at their corrupted values)."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Probabilities of the answer in the clean, the corrupted and all restored runs of one prompt (B.1, B.2).

    Attributes:
        kind: what was restored: "state", "mlp" or "attn".
        severed: module whose outputs were held at their corrupted values, "mlp", "attn" or None.
        prompt, subject, answer: the answer is the one token whose probability is followed, as text.
        tokens: T strings, one a token of the prompt.
        subject_range: (begin, end) in tokens, end excluded.
        p_clean, p_corrupted: P[o] and P*[o], the latter a mean over the noise samples.
        p_restored: (T, L) float64, P*,clean[o]; row = restored token, column = restored layer, or the middle of
            the restored run of layers; a mean over the noise samples. Rows of tokens that were not restored are NaN.
        noise_std: nu, standard deviation of the noise on the subject's embeddings.
        samples, window, seed: the settings; `window` is the length of the runs that "mlp" and "attn" restore.
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

    @property
    def total_effect(self) -> float:
        """P[o] - P*[o]."""
        return self.p_clean - self.p_corrupted

    @property
    def indirect_effect(self) -> np.ndarray:
        """(T, L): P*,clean[o] - P*[o], paired within the fact."""
        return self.p_restored - self.p_corrupted

    @property
    def label(self) -> str:
        """Key of `KINDS` that this trace is one of."""
        return f"severed-{self.severed}" if self.severed else self.kind

    @property
    def peak(self) -> tuple[int, int]:
        """Token and layer of the largest indirect effect."""
        row, layer = np.unravel_index(np.nan_to_num(self.indirect_effect, nan=-np.inf).argmax(), self.p_restored.shape)
        return int(row), int(layer)

    def __repr__(self) -> str:
        return f"Trace({', '.join(f'{name} {value}' for name, value in self.in_short().items())})"

    def _repr_html_(self) -> str:
        return pd.DataFrame(self.in_short().items()).to_html(index=False, header=False)

    def in_short(self) -> dict[str, str]:
        """What a line or a small table says of the trace, without its numbers by token and layer."""
        token, layer = self.peak
        return {
            "kind": self.label,
            "prompt": repr(textwrap.shorten(self.prompt, 80, placeholder=" ...")),
            "answer": repr(self.answer),
            "p_clean": f"{self.p_clean:.3f}",
            "p_corrupted": f"{self.p_corrupted:.3f}",
            "largest effect": f"{self.indirect_effect[token, layer]:.3f} at {self.tokens[token]!r} in layer {layer}",
            "tokens": str(len(self.tokens)),
            "layers": str(self.p_restored.shape[1]),
        }
