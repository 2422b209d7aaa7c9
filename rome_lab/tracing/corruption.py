"""What makes a corrupted run corrupted: noise on the embeddings of the subject's tokens (B.1), or another subject.

Corruption         what a class must have to be one; add yours here, and its name to the front door
GaussianNoise      the paper's: independent, of a multiple of sigma_t, which `embedding_std` measures
FixedNoise         exactly the given noise
SubjectSwap        another subject of as many tokens in the subject's place, instead of noise
noise_key          which noise a fact gets
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Protocol

import numpy as np
import torch

from rome_lab.base import check_text, seed_from
from rome_lab.facts import Prompt, load_facts
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
        return torch.randn(shape, generator=generator, dtype=torch.float32) * self.std(lm)

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


@dataclass(frozen=True)
class SubjectSwap:
    """Another subject of as many tokens in the place of the subject: symmetric token replacement.

    Source: Zhang and Nanda 2024, arXiv 2309.16042. There is one corrupted run, the model's own run of the other prompt.

    Attributes:
        subject: the other subject.
        object: what the model says of it, by which the logit difference is against it; None where it does not matter.
    """

    subject: str
    object: str | None = None
    samples: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name, value in (("subject", self.subject), ("object", self.object)):
            if value is not None:
                check_text(f"SubjectSwap: the {name}", value)
                if not value.strip():
                    raise ValueError(f"SubjectSwap: the {name} is empty; write it out.")

    def swapped_ids(self, lm: LanguageModel, prompt: Prompt) -> torch.Tensor:
        """(T,) the tokens of the prompt with the other subject in it.

        Raises: ValueError: they are not as many, the others do not stay what they are, or nothing changes.
        """
        begin, end = prompt.subject_range
        offsets = lm.tokenizer(prompt.text, return_offsets_mapping=True)["offset_mapping"]
        place = prompt.text.index(prompt.subject, offsets[begin][0])
        text = prompt.text[:place] + self.subject + prompt.text[place + len(prompt.subject) :]
        ids = torch.tensor(lm.tokenizer(text)["input_ids"], device=lm.device)
        lm.check_ids(ids.tolist())
        tokens = len(ids) - len(prompt.ids) + end - begin
        if len(ids) != len(prompt.ids):
            raise ValueError(
                f"SubjectSwap: {self.subject!r} makes {tokens} tokens in {text!r} and {prompt.subject!r} {end - begin}; "
                "choose one of as many, such as swap_pairs(lm, facts) finds."
            )
        if not (torch.equal(ids[:begin], prompt.ids[:begin]) and torch.equal(ids[end:], prompt.ids[end:])):
            raise ValueError(
                f"SubjectSwap: {self.subject!r} changes other tokens of {prompt.text!r} than the subject's."
            )
        if torch.equal(ids, prompt.ids):
            raise ValueError(f"SubjectSwap: {self.subject!r} is the subject itself; choose another one.")
        return ids

    def std(self, lm: LanguageModel) -> float:
        """0: there is no noise."""
        return 0.0

    def measured(self, lm: LanguageModel) -> SubjectSwap:
        return self

    def describe(self, lm: LanguageModel) -> dict[str, object]:
        return {"swap": self.subject}


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
