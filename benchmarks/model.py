"""Which model a benchmark measures: one by its name, or random weights of a shape, whose times are the same."""

from __future__ import annotations

from dataclasses import dataclass

from rome_lab import LanguageModel, load_model
from rome_lab.studies.cost.counting import gpt2_xl
from rome_lab.studies.cost.growth import random_model

SHAPES = {"gpt2-xl": gpt2_xl}


@dataclass(frozen=True)
class Chosen:
    """A model.

    Attributes:
        model: as `load_model` takes it; where `shape` is given, only its tokenizer is used.
        shape: a key of `SHAPES`, for random weights.
        device, dtype: as `load_model` takes them.
    """

    model: str = "smollm2-135m"
    shape: str | None = None
    device: str = "auto"
    dtype: str = "float32"


def load(chosen: Chosen) -> LanguageModel:
    lm = load_model(chosen.model, chosen.device, chosen.dtype)
    return lm if chosen.shape is None else random_model(SHAPES[chosen.shape](), lm)
