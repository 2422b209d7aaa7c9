"""v* of each request, found once: by `rome` for its edit, by the methods of the ROME family for all they compare.

Optima(lm, store)                   finds v*, the keys, the prefixes and C, and keeps them in memory; v* in the store too
Optima.find(request, layer, ...)    an Optimum: from memory, from the store, or now
Optima.recall(request, layer, ...)  the same, or None where it would have to be found now
Optima.prepare(several)             finds several, side by side where they allow it
Optima.optimise(requests, ...)      now, side by side
Optima.k_star(fact, layer, ...)     the keys that an edit maps to v*
Optima.editor(training)             MEND or KE, where it was trained
Optima.factor(layer, source)        of C; Optima.factors_at(layers, source) of several, measured in one pass
mean_length(optima, requests, ...)  of v*, which norm control scales to
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rome_lab.base import Json, OneLine, Record, Store, canonical_json, code_version, opened
from rome_lab.editing.hypernetworks import Training
from rome_lab.editing.keys import one_key, sample_prefixes
from rome_lab.editing.requests import NothingToEdit, Request, check_news
from rome_lab.editing.second_moment import TokensSeen, covariances
from rome_lab.editing.settings import PARTS, EditSettings
from rome_lab.editing.texts import Source
from rome_lab.editing.trained_editors import TrainedEditor, trained_editor
from rome_lab.editing.update import Factor, factorise
from rome_lab.editing.values import Callback, Objective, optimise_values
from rome_lab.facts import Fact, read_prompt
from rome_lab.models import Batching, LanguageModel, text_bytes

Sought: TypeAlias = tuple[Request, int, EditSettings]
"""What `Optima.find` is asked for."""
SIDE_BY_SIDE = 4  # requests whose v* are found together: of more, little would be faster


@dataclass(frozen=True, eq=False, repr=False)
class Optimum(OneLine):
    """v* of one request.

    Attributes:
        v_star: (D,) float64, W k* + delta, where k* is the averaged key, or the bare one where that alone is mapped to v*;
            scaled where the settings have an anchor.
        history, converged: of the optimisation, see `rome_lab.editing.values.Value`.
    """

    request: Request
    v_star: Float[Tensor, " D"]
    history: pd.DataFrame
    converged: bool

    @property
    def best(self) -> pd.Series:
        """The step that v* is of."""
        return self.history.loc[self.history["loss"].idxmin()]

    def record(self) -> Record:
        """The same as arrays and JSON."""
        arrays = {"v_star": self.v_star.numpy(), "history": self.history.to_numpy(dtype=float)}
        return Record(arrays, {"columns": list(self.history), "converged": self.converged})


class Optima:
    """What an edit starts from, each found once: v*, the keys, the prefixes, and C.

    It is for `lm` as it is now. Where the weights have changed, `anew` makes one for them.

    Args:
        store: where v* is kept beyond this object; nowhere by default. C is in the user's cache in any case.
        progress: show a bar where C has to be measured.
    """

    def __init__(self, lm: LanguageModel, store: Store | str | Path | None = None, progress: bool = True) -> None:
        self.lm, self.store, self.progress = lm, opened(store), progress
        self.in_memory: dict[str, Optimum] = {}
        self.k_stars: dict[tuple[object, ...], Tensor] = {}
        self.prefixes: dict[tuple[tuple[int, ...], int], tuple[str, ...]] = {}
        self.factors: dict[tuple[int, str], Factor] = {}
        self.editors: dict[Training, TrainedEditor] = {}
        self.earlier: Mapping[int, Tensor] = {}

    def anew(self, earlier: Mapping[int, Float[Tensor, "H p"]] = MappingProxyType({})) -> Optima:
        """For `lm` with other weights: v* and keys are found afresh, C and the prefixes stay those that are here.

        Args: earlier: by layer, the keys that were given values since, which AlphaEdit keeps.
        """
        other = Optima(self.lm, self.store, self.progress)
        other.prefixes, other.factors, other.earlier = self.prefixes, self.factors, earlier
        other.editors = self.editors
        return other

    def at(self, lm: LanguageModel | None, store: Store | None) -> Optima:
        """The same, and all that was found, for this model in another process and a store there; for None it can travel."""
        other = Optima(lm, store, self.progress)
        other.in_memory, other.k_stars = dict(self.in_memory), dict(self.k_stars)
        other.prefixes, other.factors, other.common = self.prefixes, self.factors, self.common
        other.editors = self.editors
        return other

    @cached_property
    def common(self) -> dict[str, Json]:
        return dict(self.lm.identity().key()) if self.store else {}

    def factor(self, layer: int, source: Source | None = None, tokens: int | None = None) -> Factor:
        """The Cholesky factor of C, see `factors_at`."""
        return self.factors_at([layer], source, tokens)[layer]

    def factors_at(
        self,
        layers: Sequence[int],
        source: Source | None = None,
        tokens: int | None = None,
        callback: TokensSeen | None = None,
    ) -> dict[int, Factor]:
        """The Cholesky factors of C by layer, see `covariances`; measured without edits in force, so never to be anew."""
        about = canonical_json([source and source.describe(), tokens])
        if missing := [layer for layer in layers if (layer, about) not in self.factors]:
            with self.lm.overlay.only([]):
                C = covariances(self.lm, missing, source, tokens, progress=self.progress, callback=callback)
            self.factors |= {(layer, about): factorise(C[layer].C, C[layer].tokens) for layer in missing}
        return {layer: self.factors[layer, about] for layer in layers}

    def editor(self, training: Training) -> TrainedEditor:
        """MEND or KE, trained for the model without edits in force; read once from the user's cache."""
        if training not in self.editors:
            self.editors[training] = trained_editor(self.lm, training)
        return self.editors[training]

    def with_prefixes(self, settings: EditSettings) -> EditSettings:
        """The settings with prefixes sampled where they name none."""
        if settings.prefixes is not None:
            return settings
        key = (settings.prefix_lengths, settings.seed)
        if key not in self.prefixes:
            self.prefixes[key] = sample_prefixes(self.lm, *key)
        return replace(settings, prefixes=self.prefixes[key])

    def k_star(self, fact: Fact, layer: int, settings: EditSettings) -> Float[Tensor, "H n"]:
        """The keys that the settings name, as `rome_lab.editing.keys.k_star` finds them."""
        prefixes = self.with_prefixes(settings).prefixes
        for part in PARTS[settings.key]:
            if (fact, layer, part, prefixes) not in self.k_stars:
                self.k_stars[fact, layer, part, prefixes] = one_key(self.lm, fact, layer, part, prefixes)
        return torch.cat([self.k_stars[fact, layer, part, prefixes] for part in PARTS[settings.key]], dim=1)

    def find(self, request: Request, layer: int, settings: EditSettings) -> Optimum:
        """v* of a request: from memory, from the store, or now.

        Raises:
            NothingToEdit: the model says the target already.
            ValueError: a text is too long, or what the model says, or the loss, is no finite number.
        """
        optimum = self.recall(request, layer, settings)
        if optimum is None:
            check_news(self.lm, request)
            (optimum,) = self.optimise([request], layer, settings)
            self.keep(optimum, layer, settings)
        return optimum

    def prepare(self, several: Iterable[Sought]) -> None:
        """Find what `find` is going to be asked for; of what cannot be found, `find` will say why.

        What some of them come to is kept before the next are begun.
        """
        together: dict[tuple[int, EditSettings], list[Request]] = defaultdict(list)
        for request, layer, settings in several:
            with contextlib.suppress(ValueError):
                if self.recall(request, layer, settings) is None:
                    check_news(self.lm, request)
                    together[layer, settings].append(request)
        for (layer, settings), requests in together.items():
            for begin in range(0, len(requests), SIDE_BY_SIDE):
                with contextlib.suppress(ValueError):
                    for optimum in self.optimise(requests[begin : begin + SIDE_BY_SIDE], layer, settings):
                        self.keep(optimum, layer, settings)

    def keep(self, optimum: Optimum, layer: int, settings: EditSettings) -> None:
        """In memory, and in the store where there is one."""
        inputs, record = self.inputs(optimum.request, layer, settings), optimum.record()
        if self.store:
            self.store.save(inputs, record.arrays, record.meta)
        self.in_memory[canonical_json(inputs)] = optimum

    def recall(self, request: Request, layer: int, settings: EditSettings) -> Optimum | None:
        """v* of a request, where memory or the store has it."""
        inputs = self.inputs(request, layer, settings)
        key = canonical_json(inputs)
        if key not in self.in_memory and self.store and (record := self.store.load(inputs)):
            history = pd.DataFrame(record.arrays["history"], columns=record.meta["columns"]).astype({"step": int})
            v_star = torch.from_numpy(record.arrays["v_star"])
            self.in_memory[key] = Optimum(request, v_star, history, record.meta["converged"])
        return self.in_memory.get(key)

    def optimise(
        self,
        requests: Sequence[Request],
        layer: int,
        settings: EditSettings,
        progress: bool = False,
        callback: Callback | None = None,
    ) -> list[Optimum]:
        """v* of each request, found now, as many side by side as fit; other arguments as for `optimise_values`."""
        settings = self.with_prefixes(settings)
        W = self.lm.weight(layer).cpu().double()

        def optimised(part: Sequence[Request]) -> list[Optimum]:
            # The last key is the averaged one where there is one.
            keys = [self.k_star(fact, layer, settings)[:, -1].double() for fact, _ in part]
            originals = torch.stack([W @ k for k in keys])
            values = optimise_values(Objective(self.lm, layer, part, originals, settings), progress, callback)
            v_stars = [v + value.delta.cpu().double() for v, value in zip(originals, values, strict=True)]
            return [
                Optimum(request, anchored(request, v_star, settings.anchor), value.history, value.converged)
                for request, v_star, value in zip(part, v_stars, values, strict=True)
            ]

        together = Batching(self.lm, "rome", value_bytes(self.lm, layer, requests, settings), most=SIDE_BY_SIDE)
        return [optimum for part in together.over(requests, optimised) for optimum in part]

    def inputs(self, request: Request, layer: int, settings: EditSettings) -> Mapping[str, Json]:
        """Everything that determines an Optimum; of the keys that are mapped to v* only the one that it starts from."""
        fact, target = request
        settings = replace(self.with_prefixes(settings), key=settings.start)
        chosen = {name: value for name, value in asdict(settings).items() if name not in ("prefix_lengths", "seed")}
        about = {"template": fact.template, "subject": fact.subject, "target": target, "layer": layer}
        return {**self.common, "what": "optimum", "code": code_version(__name__), **about, "settings": chosen}


def value_bytes(lm: LanguageModel, layer: int, requests: Sequence[Request], settings: EditSettings) -> int:
    """Memory, in bytes, that finding v* of one of the requests takes, by estimate: what gradients pass through is kept."""
    longest = max(len(read_prompt(lm, fact).ids) for fact, _ in requests) + max(settings.prefix_lengths, default=0)
    return (len(settings.prefixes) + 2) * (lm.n_layers - layer) * text_bytes(lm, longest)


def anchored(request: Request, v_star: Float[Tensor, " D"], anchor: float | None) -> Float[Tensor, " D"]:
    """v* scaled to the length of the anchor, where there is one.

    Raises:
        NothingToEdit: it is more than twice as long, and left out.
    """
    if anchor is None:
        return v_star
    if (length := float(v_star.norm())) > 2 * anchor:
        raise NothingToEdit(
            f"rome: v* of {request[0].prompt!r} -> {request[1]!r} has the length {length:.3g}, more than twice the anchor "
            f"{anchor:.3g}, so norm control leaves the edit out; raise the anchor, lower the clamp, or take another target."
        )
    return v_star * (anchor / length)


def mean_length(optima: Optima, requests: Sequence[Request], layer: int, settings: EditSettings) -> float:
    """The mean length of v* of these requests in the model as it is: an anchor for norm control, `EditSettings.anchor`.

    Requests whose target the model says already do not count; the more others, the better.

    Raises:
        ValueError: there are none.
    """
    lengths = []
    for request in requests:
        with contextlib.suppress(NothingToEdit):
            lengths.append(float(optima.find(request, layer, replace(settings, anchor=None)).v_star.norm()))
    if not lengths:
        raise ValueError("mean_length: there is no request that the model does not meet already; give others.")
    return sum(lengths) / len(lengths)
