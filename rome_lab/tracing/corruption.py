"""What makes a corrupted run corrupted: noise added to the embeddings of the subject's tokens (B.1).

Corruption         what a class must have to be one; add yours here, and its name to the front door
GaussianNoise      the paper's: independent, of a multiple of sigma_t, which `embedding_std` measures
FixedNoise         exactly the given noise
noise_key          which noise a fact gets
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import torch

from rome_lab.base import seed_from
from rome_lab.facts import load_facts
from rome_lab.models import LanguageModel


class Corruption(Protocol):
    """Anything that says how to disturb the subject's embeddings."""

    def noise(self, lm: LanguageModel, shape: tuple[int, int, int], key: str) -> torch.Tensor:
        """Noise (S, subject tokens, D) to add to the subject's embeddings; the same for the same `key`."""

    def std(self, lm: LanguageModel) -> float:
        """nu, the standard deviation of the noise."""

    def measured(self, lm: LanguageModel) -> Corruption:
        """The same corruption for this model, with nothing left to measure."""

    def describe(self, lm: LanguageModel) -> dict[str, object]:
        """All that determines the noise besides shape and key, as JSON."""


@dataclass(frozen=True)
class GaussianNoise:
    """Independent Gaussian noise of standard deviation nu = multiplier * sigma_t (B.1), or of a given one.

    Attributes:
        multiplier: nu / sigma_t, where sigma_t is measured by `embedding_std`.
        given: nu itself; the multiplier is not used then.
    """

    multiplier: float = 3.0
    given: float | None = None

    def __init__(self, multiplier: float = 3.0, *, std: float | None = None) -> None:
        for name, value in (("multiplier", multiplier), ("std", std)):
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"GaussianNoise: {name} is {value}; expected a finite number of at least 0.")
        object.__setattr__(self, "multiplier", float(multiplier))
        object.__setattr__(self, "given", None if std is None else float(std))

    def std(self, lm: LanguageModel) -> float:
        return self.multiplier * embedding_std(lm) if self.given is None else self.given

    def measured(self, lm: LanguageModel) -> GaussianNoise:
        return GaussianNoise(std=self.std(lm))

    def noise(self, lm: LanguageModel, shape: tuple[int, int, int], key: str) -> torch.Tensor:
        # Drawn on the CPU in float32, so that every device and dtype sees the same noise.
        generator = torch.Generator().manual_seed(seed_from(key))
        return torch.randn(shape, generator=generator) * self.std(lm)

    def describe(self, lm: LanguageModel) -> dict[str, object]:
        return {"gaussian": self.std(lm)}


class FixedNoise:
    """Exactly this noise, (S, subject tokens, D); for reproducing a published run."""

    def __init__(self, tensor: torch.Tensor) -> None:
        tensor = torch.as_tensor(tensor)
        if tensor.ndim != 3 or not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(
                f"FixedNoise: got {tensor.dtype} of shape {tuple(tensor.shape)}; expected finite floating-point noise "
                "of shape (samples, subject tokens, embedding width)."
            )
        self.tensor = tensor.detach().float().cpu()

    @property
    def samples(self) -> int:
        """S."""
        return self.tensor.shape[0]

    def std(self, lm: LanguageModel) -> float:
        return float(self.tensor.std(correction=0))

    def measured(self, lm: LanguageModel) -> FixedNoise:
        return self

    def noise(self, lm: LanguageModel, shape: tuple[int, int, int], key: str) -> torch.Tensor:
        if tuple(self.tensor.shape) != shape:
            raise ValueError(
                f"FixedNoise: the noise has shape {tuple(self.tensor.shape)}, but this prompt needs {shape} "
                "(samples, subject tokens, embedding width)."
            )
        return self.tensor

    def describe(self, lm: LanguageModel) -> dict[str, object]:
        return {"fixed": hashlib.sha256(self.tensor.contiguous().numpy().tobytes()).hexdigest()}


def noise_key(seed: int, prompt: str, subject_range: tuple[int, int]) -> str:
    """The key of one fact's noise: other facts, also ones of the same shape, get other noise."""
    return json.dumps([seed, prompt, *subject_range])


@torch.no_grad()
def embedding_std(lm: LanguageModel) -> float:
    """sigma_t: standard deviation over all entries of the embedding module's output, over the embedded facts' sentences.

    Measured on the module's output, since some families scale their embeddings there; each token counts as often as it
    occurs in the text.
    """
    text = [f"{fact.prompt} {fact.object}." for fact in load_facts("embedded")]
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens, counts = map(torch.from_numpy, np.unique(list(chain.from_iterable(ids)), return_counts=True))
    rows = lm.embedding(tokens.to(lm.device)).cpu().double()  # (different tokens, D)
    lm.check_finite(rows, "embedding_std")
    weight = (counts / counts.sum(dtype=torch.float64))[:, None] / rows.shape[1]
    mean = (weight * rows).sum()
    return float((weight * (rows - mean) ** 2).sum().sqrt())
