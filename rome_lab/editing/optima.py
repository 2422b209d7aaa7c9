"""What the methods of the ROME family share: v* and the keys of each request, found once; C and the prefixes.

Optima(lm, store)                     finds them, and keeps them in memory and in the store
Optima.find(request, layer, ...)      an Optimum: v*, the bare and the averaged key
Optima.factor(layer, source)          of C
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rome_lab.base import Json, Store, canonical_json, code_version, opened
from rome_lab.editing.exact import check_news
from rome_lab.editing.keys import k_star, sample_prefixes
from rome_lab.editing.second_moment import covariances
from rome_lab.editing.settings import EditSettings
from rome_lab.editing.texts import Source
from rome_lab.editing.update import Factor, factorise
from rome_lab.editing.values import Objective, optimise_value
from rome_lab.facts import Fact
from rome_lab.models import LanguageModel

Request: TypeAlias = tuple[Fact, str]  # a fact, and what is to be said instead of its object


@dataclass(frozen=True, eq=False)
class Optimum:
    """v* of one request, and the keys that may be mapped to it.

    Attributes:
        keys: (H, 2) float32, the bare and the averaged k*.
        v_star: (D,) float64, W k* + delta of the averaged k*.
        p_target: mean probability of the target, over the prefixes, that v* reaches.
        converged: whether that is enough.
    """

    request: Request
    keys: Float[Tensor, "H 2"]
    v_star: Float[Tensor, " D"]
    p_target: float
    converged: bool


class Optima:
    """What the methods of the ROME family have in common, each found once: v*, the keys, the prefixes, and C.

    It is for `lm` as it is now. Where the weights have changed, `anew` makes one for them.

    Args:
        store: where v* and keys are kept beyond this object; nowhere by default. C is in the user's cache in any case.
        progress: show a bar where C has to be measured.
    """

    def __init__(self, lm: LanguageModel, store: Store | str | Path | None = None, progress: bool = True) -> None:
        self.lm, self.progress = lm, progress
        self.store = opened(store)
        self.found: dict[str, Optimum] = {}
        self.prefixes: dict[tuple[tuple[int, ...], int], tuple[str, ...]] = {}
        self.factors: dict[tuple[int, str], Factor] = {}

    def anew(self) -> Optima:
        """For `lm` with other weights: v* and keys are found afresh, C and the prefixes stay those that are here."""
        other = Optima(self.lm, self.store, self.progress)
        other.prefixes, other.factors = self.prefixes, self.factors
        return other

    def at(self, lm: LanguageModel | None, store: Store | None) -> Optima:
        """The same, and all that was found, for this model in another process and a store there; for None it can travel."""
        other = Optima(lm, store, self.progress)
        other.found, other.prefixes, other.factors = dict(self.found), self.prefixes, self.factors
        other.common = self.common
        return other

    @cached_property
    def common(self) -> dict[str, Json]:
        return dict(self.lm.identity().key()) if self.store else {}

    def factor(self, layer: int, source: Source, tokens: int | None = None) -> Factor:
        """The Cholesky factor of C of so many tokens of `source`, by default enough; measured without edits in force."""
        key = (layer, canonical_json([source.describe(), tokens]))
        if key not in self.factors:
            with self.lm.overlay.only([]):
                measured = covariances(self.lm, [layer], source, tokens, progress=self.progress)[layer]
            self.factors[key] = factorise(measured.C, measured.tokens)
        return self.factors[key]

    def with_prefixes(self, settings: EditSettings) -> EditSettings:
        """The settings with prefixes sampled where they name none."""
        if settings.prefixes is not None:
            return settings
        key = (settings.prefix_lengths, settings.seed)
        if key not in self.prefixes:
            self.prefixes[key] = sample_prefixes(self.lm, *key)
        return replace(settings, prefixes=self.prefixes[key])

    def find(self, request: Request, layer: int, settings: EditSettings) -> Optimum:
        """v* and the keys of a request: from memory, from the store, or now.

        Raises:
            NothingToEdit: the model says the target already.
            ValueError: a text is too long, or what the model says, or the loss, is no finite number.
        """
        optimum = self.recall(request, layer, settings)
        if optimum is None:
            check_news(self.lm, *request)
            settings = self.with_prefixes(settings)
            optimum = self.optimise(request, layer, settings)
            inputs = optimum_inputs(self.common, request, layer, settings)
            if self.store:
                self.store.save(inputs, *optimum_record(optimum))
            self.found[canonical_json(inputs)] = optimum
        return optimum

    def recall(self, request: Request, layer: int, settings: EditSettings) -> Optimum | None:
        """v* and the keys of a request, where memory or the store has them."""
        inputs = optimum_inputs(self.common, request, layer, self.with_prefixes(settings))
        key = canonical_json(inputs)
        if key not in self.found and self.store and (record := self.store.load(inputs)):
            arrays = {name: torch.from_numpy(array) for name, array in record.arrays.items()}
            self.found[key] = Optimum(request, **arrays, **record.meta)
        return self.found.get(key)

    def optimise(self, request: Request, layer: int, settings: EditSettings) -> Optimum:
        """v* and the keys, as `rome` finds them with key="both"."""
        keys = k_star(self.lm, request[0], layer, "both", settings.prefixes)
        original = self.lm.weight(layer).cpu().double() @ keys[:, 1].double()
        value = optimise_value(Objective(self.lm, layer, request, original, settings), progress=False)
        p_target = float(value.history["p_target"][value.history["loss"].idxmin()])
        return Optimum(request, keys, original + value.delta.cpu().double(), p_target, value.converged)


def optimum_inputs(common: Mapping[str, Json], request: Request, layer: int, settings: EditSettings) -> dict[str, Json]:
    """Everything that determines an Optimum."""
    fact, target = request
    chosen = {name: value for name, value in asdict(settings).items() if name not in ("key", "prefix_lengths", "seed")}
    about = {"template": fact.template, "subject": fact.subject, "target": target, "layer": layer, "settings": chosen}
    return {**common, "what": "optimum", "code": code_version(__name__), **about}


def optimum_record(optimum: Optimum) -> tuple[dict[str, np.ndarray], dict[str, Json]]:
    """An Optimum as arrays and JSON."""
    arrays = {"keys": optimum.keys.numpy(), "v_star": optimum.v_star.numpy()}
    return arrays, {"p_target": optimum.p_target, "converged": optimum.converged}
