"""What one causal trace found: `Trace`, the record that tracing makes and everything else reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
