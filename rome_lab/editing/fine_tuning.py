"""Fine-tuning of one W, to compare with: FT, and FT+L within an L-infinity bound (Zhu et al., 2020).

fine_tune(lm, requests, tuning)    the change of W that it ends with; `lm` is unchanged
default_tuning(lm, name)           layer and numbers of "ft" and "ft-linf" for the model

The change dW is a variable of its own, added to what W says at every token; no weight is written. Below the edited layer
nothing depends on it, so the texts are run once and recorded, and each step drives the blocks from that layer up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rome_lab.base import OneLine, check_whole
from rome_lab.editing.requests import Request
from rome_lab.editing.settings import known_as
from rome_lab.editing.target_texts import TargetTexts, record_texts
from rome_lab.facts import question
from rome_lab.models import Change, LanguageModel

TEXTS_TOGETHER = 16  # texts in one pass: more would only take more memory


@dataclass(frozen=True)
class Tuning:
    """How to fine-tune one W; but for the layer, the numbers published for GPT-2 XL by default.

    Attributes:
        layer: whose W to change.
        learning_rate: of Adam.
        steps: of Adam, at most.
        bound: greatest change of any one weight, for FT+L; None for FT.
        enough: loss, in nats, below which to stop.

    Raises:
        ValueError: one of them is out of its range.
    """

    layer: int
    learning_rate: float = 5e-4
    steps: int = 25
    bound: float | None = None
    enough: float = 1e-2

    def __post_init__(self) -> None:
        check_whole("Tuning", layer=(self.layer, 0), steps=(self.steps, 1))
        for name in ("learning_rate", "bound", "enough"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"Tuning: {name} is {value!r}; expected a finite number above 0.")


PUBLISHED_TUNINGS = {"ft": Tuning(21), "ft-linf": Tuning(0, bound=5e-4)}
PUBLISHED_LAYERS = 48  # of GPT-2 XL
TUNINGS = {  # those of the embedded model are the best of notebooks/search.ipynb
    "gpt2-xl": PUBLISHED_TUNINGS,
    "smollm2-135m": {"ft": Tuning(0, learning_rate=1e-3), "ft-linf": Tuning(0, bound=5e-3)},
}


def default_tuning(lm: LanguageModel, name: str) -> Tuning:
    """The entry "ft" or "ft-linf" of `TUNINGS` for the model; for others the published one, at the same relative depth."""
    published = PUBLISHED_TUNINGS[name]
    elsewhere = {name: replace(published, layer=published.layer * lm.n_layers // PUBLISHED_LAYERS)}
    return TUNINGS.get(known_as(lm), elsewhere)[name]


@dataclass(frozen=True, eq=False, repr=False)
class Tuned(OneLine):
    """Where the fine-tuning has come to.

    Attributes:
        delta: (D, H) W_hat - W, float32 at least.
        losses: before the first step and after each; the last one is that of `delta`.
    """

    delta: Float[Tensor, "D H"]
    losses: tuple[float, ...]


def fine_tune(lm: LanguageModel, requests: Sequence[Request], tuning: Tuning) -> Tuned:
    """Fine-tune one W by Adam until the model says the targets.

        loss = -1/R sum_r log P[target_r | prompt_r]

    After each step of FT+L every weight is brought back to within the bound of its original value (Zhu et al., 2020).

    Differs: the authors' code reads the probabilities of all tokens of a target at the prompt's last token, as if each
    of them came first, and takes their mean; here each token follows those before it, and all of them count. Several
    requests share each step, where the authors' code makes a step for each.

    Args:
        requests: R pairs of a fact and its target.

    Raises:
        ValueError: there are no requests, the model has no such layer, a text is too long, a target is empty, or the
            loss is NaN or infinite.
    """
    if not requests:
        raise ValueError("fine_tune: there is nothing to edit; give at least one fact with its target.")
    if tuning.layer >= lm.n_layers:
        raise ValueError(
            f"fine_tune: layer is {tuning.layer}; {lm.name} has the layers 0 to {lm.n_layers - 1}, so choose one of them."
        )
    batches = record_batches(lm, requests, tuning.layer)
    W = lm.weight(tuning.layer)
    delta = torch.zeros(W.shape, dtype=torch.promote_types(torch.float32, W.dtype), device=W.device, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=tuning.learning_rate)
    losses: list[float] = []
    while True:
        loss, delta.grad = loss_and_gradient(lm, batches, tuning.layer, delta, len(requests))
        losses.append(loss)
        if not math.isfinite(loss):
            raise ValueError(
                f"fine_tune: the loss is {loss} after {len(losses) - 1} steps, because {lm.name} overflows or the learning "
                f'rate {tuning.learning_rate} is too large; load it with dtype="float32", or lower the learning rate.'
            )
        if loss < tuning.enough or len(losses) > tuning.steps:
            return Tuned(delta.detach(), tuple(losses))
        adam.step()
        if tuning.bound is not None:
            with torch.no_grad():
                delta.clamp_(-tuning.bound, tuning.bound)


def record_batches(lm: LanguageModel, requests: Sequence[Request], layer: int) -> list[TargetTexts]:
    """The requests' texts, `TEXTS_TOGETHER` at a time, those of like length together."""
    texts = [question(lm, 0, fact.prompt, target) for fact, target in requests]
    texts.sort(key=lambda text: len(text.text))
    parts = [texts[i : i + TEXTS_TOGETHER] for i in range(0, len(texts), TEXTS_TOGETHER)]
    return [record_texts(lm, part, layer, "fine_tune") for part in parts]


def loss_and_gradient(
    lm: LanguageModel, batches: Sequence[TargetTexts], layer: int, delta: Tensor, n_requests: int
) -> tuple[float, Tensor]:
    """The loss at `delta`, and its gradient (D, H); a batch at a time, so that only one is held in memory."""
    total, gradient = 0.0, torch.zeros_like(delta)
    with torch.enable_grad():
        for batch in batches:
            loss = -batch.read(lm, Change(layer, delta))[0].sum() / n_requests
            gradient += torch.autograd.grad(loss, [delta])[0]
            total += float(loss.detach())
    return total, gradient
