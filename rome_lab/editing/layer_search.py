"""Which layer to edit in a model that nobody has edited: `suggest_layer` tries several on facts that the model knows.

suggest_layer(lm)             a LayerSuggestion: the layer, a table of all that were tried, what tracing says
settle(lm, methods, cases)    methods with nothing left to choose, the layer by a suggestion where none is known
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from rome_lab.base import (
    USER_CACHE,
    Json,
    Store,
    Tell,
    canonical_json,
    check_whole,
    code_version,
    opened,
)
from rome_lab.editing.keys import key_size
from rome_lab.editing.layer_suggestion import LayerSuggestion, best_layer, scores_by_layer, summed_up
from rome_lab.editing.methods import Method, Proposal, Rome
from rome_lab.editing.optima import Optima
from rome_lab.editing.requests import effects_at_subject
from rome_lab.editing.second_moment import covariances
from rome_lab.editing.settings import EditSettings, default_settings
from rome_lab.editing.texts import SampledText, Source
from rome_lab.editing.update import ENOUGH
from rome_lab.facts import (
    Case,
    Cases,
    Fact,
    answers_to,
    build_cases,
    known_among,
    known_facts,
    load_facts,
    shares_first_token,
    success,
)
from rome_lab.models import Change, LanguageModel, Score, check_verified

logger = logging.getLogger(__name__)

OF_NEIGHBOURS = ("neighbours", "neighbours_target")  # of `Case.pairs`
FIRST_LAYERS = 6  # tried at first, spread over the lower half of the model
STEPS, PREFIX_LENGTHS = 10, (5, 5, 10)  # of a trial's v*: fewer of both than an edit has, which is five times quicker
SPARE = 6  # known facts for each that is tried: not each of them gives a case


def suggest_layer(
    lm: LanguageModel,
    facts: Iterable[Fact | Case] | None = None,
    layers: Iterable[int] | None = None,
    n: int = 8,
    store: Store | str | Path | None = USER_CACHE,
    progress: bool = True,
    *,
    settings: EditSettings | None = None,
    source: Source | None = None,
    tokens: int | None = None,
    seed: int = 0,
    without: Collection[str] = (),
    tell: Tell | None = None,
) -> LayerSuggestion:
    """Which layer to edit: each of several is edited for each of `n` known facts, by ROME, and what follows is counted.

    A layer's scores are means over the facts, in %: rewrite, the share of the edited prompts at which the target becomes
    more probable than the true object; paraphrase, the same at the fact's other wordings, one of them after an unrelated
    sentence; neighbour, the share of prompts about other subjects with the same object, of those that the model gets right
    unedited, that stay so. The score is the harmonic mean of the three. No weight is touched: each edit is added to what W
    says while its own texts are run. Edits in force on `lm` are put aside meanwhile, and are bit for bit the same after it.

    Beside it stands what tracing would have said: the layer at which MLP outputs (runs of ten layers, ten samples of noise)
    restored at the last subject token have their largest indirect effect, averaged over the same facts.

    Args:
        facts: to choose from, those of a relation with its other facts, from which targets and neighbours come; or cases;
            by default the embedded facts.
        layers: to try; by default six, spread over the lower half of the model, and then those next to the best of them.
        n: number of facts.
        store: where it is kept, so that a second call takes no time, and an interrupted one goes on; None: nowhere, but for
            C, which is in the user's cache in any case.
        progress: show bars.
        settings: of the edits; by default the model's own with 10 steps and 3 prefixes, which takes a fifth of the time.
        source, tokens: text that C is measured on, and how many tokens; by default as for `covariances`, all layers in one
            pass.
        seed: of which facts, and of their targets and neighbours.
        without: subjects that no fact may be about, such as those that are judged later.
        tell: called with what is being done and how far it has come.

    Raises:
        ValueError: the model knows none of the facts, or none of those gives a case; it is right about none of their
            neighbours; no edit can be made; a layer is out of range or cannot be edited; `rl.verify` found that the model
            comes out wrong.
        OSError: the store cannot be written; found before any work is done.
    """
    check_whole("suggest_layer", n=(n, 1), seed=(seed, 0))
    chosen = layers_to_try(lm, layers)
    store = opened(store)
    if store:
        store.check_writable()
    check_verified(lm, "suggest_layer")
    tell = tell or (lambda doing, done: None)
    with lm.overlay.only([]):
        tell("Looking for facts that the model knows", 0.0)
        cases = cases_to_try(lm, facts, n, seed, frozenset(without), store, progress)
        default = default_settings(lm).settings
        settings = settings or replace(default, steps=min(STEPS, default.steps), prefix_lengths=PREFIX_LENGTHS)
        tokens = tokens or ENOUGH * max(key_size(lm, layer) for layer in chosen)
        source = source or SampledText()
        inputs: dict[str, Json] = {}
        if store:
            inputs = lm.identity().key() | {
                "what": "layer-suggestion",
                "code": code_version(__name__),
                "cases": hashlib.sha256(canonical_json([asdict(case) for case in cases]).encode()).hexdigest(),
                "layers": chosen,
                "refined": layers is None,
                "settings": asdict(settings),
                "C": {"source": source.describe(), "tokens": tokens},
            }
        record = store.load(inputs) if store else None
        if record is None:
            optima = Optima(lm, store, progress)
            trials = Trials(lm, cases, settings, source, tokens, optima, progress, tell)
            trials.run(chosen, refine=layers is None)
            tell("Tracing the same facts", 0.0)
            effects = effects_at_subject(lm, [case.fact for case in cases], progress).mean(axis=0)
            meta = {"rows": trials.rows, "effects": effects.tolist()}
            if store:
                store.save(inputs, {}, meta)
        else:
            meta = record.meta
    return summed_up(lm, cases, meta["rows"], np.array(meta["effects"]), settings, tokens)


def layers_to_try(lm: LanguageModel, layers: Iterable[int] | None) -> list[int]:
    """The layers that were given, or else some of the lower half; those that cannot be edited are refused, or left out."""
    if layers is None:
        dense = [layer for layer in range(lm.n_layers) if layer not in lm.sparse]
        if not dense:
            lm.memory(0)  # says why not
        lower = dense[: len(dense) // 2 + 1]
        places = np.linspace(0, len(lower) - 1, min(FIRST_LAYERS, len(lower)))
        chosen = [lower[int(place)] for place in places]
    else:
        chosen = list(dict.fromkeys(layers))
        if not chosen:
            raise ValueError("suggest_layer: there are no layers to try; name at least one, or leave `layers` out.")
        for layer in chosen:
            if not isinstance(layer, Integral) or isinstance(layer, bool) or layer not in range(lm.n_layers):
                raise ValueError(f"suggest_layer: layer is {layer!r}; {lm.name} has the layers 0 to {lm.n_layers - 1}.")
    for layer in chosen:
        lm.memory(layer)
    return sorted(map(int, chosen))


def cases_to_try(
    lm: LanguageModel,
    facts: Iterable[Fact | Case] | None,
    n: int,
    seed: int,
    without: frozenset[str],
    store: Store | None,
    progress: bool,
) -> Cases:
    """The first n cases, in random order, whose facts the model knows, about none of the subjects in `without`."""
    given = load_facts("embedded") if facts is None else tuple(facts)
    if not given:
        raise ValueError("suggest_layer: there are no facts; give some, or leave `facts` out for the embedded ones.")
    whole = [x for x in given if isinstance(x, Case)]
    if whole and len(whole) < len(given):
        raise TypeError("suggest_layer: facts and cases are mixed; give only one of them.")
    if whole:
        known = known_among(lm, [x.fact for x in whole], "suggest_layer")
        usable = usable_cases(lm, Cases(tuple(x for x in whole if x.fact in known)), without)
    for size in () if whole else (SPARE * n, 4 * SPARE * n, None):
        known = known_facts(lm, given, n=size and min(size, len(given)), seed=seed, progress=progress, store=store)
        # Where the model put in words of its own, other objects may not fit behind them.
        plain = [fact for fact in known if fact.template in (fact.templates or (fact.template,))]
        usable = usable_cases(lm, build_cases(plain, pool=given, seed=seed), without)
        if len(usable) >= n or known.report.tried == len(set(given)):
            break
    if not known:
        raise ValueError(
            f"suggest_layer: {lm.name} knows none of the {len(given)} facts, so there is nothing to change; give facts that "
            "it knows, or say the layer yourself."
        )
    if not usable:
        raise ValueError(
            f"suggest_layer: {lm.name} knows {len(known)} of the facts, but none of them can be tried{usable.reasons()}; "
            "give whole relations, each with several objects, several subjects for each, and more than one template."
        )
    if len(usable) < n:
        logger.warning("suggest_layer: %d facts were to be tried, but there are only %d", n, len(usable))
    return Cases(usable[:n])


def usable_cases(lm: LanguageModel, cases: Cases, without: frozenset[str]) -> Cases:
    """Those about no subject of `without` whose target the model can tell from the true object."""
    dropped = dict(cases.dropped)
    if elsewhere := sum(case.fact.subject in without for case in cases):
        dropped["the subject is judged later"] = elsewhere
    kept = [case for case in cases if case.fact.subject not in without and not shares_first_token(lm, case)]
    return Cases(tuple(kept), dropped)


@dataclass
class Trials:
    """Edits of several layers for the same facts, each judged as it is made.

    Attributes:
        rows: layer, case (its place), rewrite, paraphrase, neighbour, change (|dW| / |W|) and remark of each edit.
    """

    lm: LanguageModel
    cases: Cases
    settings: EditSettings
    source: Source
    tokens: int
    optima: Optima
    progress: bool
    tell: Tell

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Json]] = []
        answers = self.answers(Change(), self.cases)
        # Where the model is wrong about a neighbour unedited, no edit has harmed it.
        self.right = [more_probable(x["neighbours"], x["neighbours_target"]) for x in answers]
        if not any(map(any, self.right)):
            raise ValueError(
                f"suggest_layer: {self.lm.name} unedited is right about no neighbour of the {len(self.cases)} facts, so "
                "that nothing would tell whether an edit harms them; give other facts, a larger n, or the layer yourself."
            )

    def run(self, layers: Sequence[int], refine: bool) -> None:
        """Try these layers, and then, where they are to be refined, those next to the best of them."""
        expected = (len(layers) + 2 * refine) * len(self.cases)
        with tqdm(total=expected, desc="edits tried", disable=not self.progress) as bar:
            self.try_layers(layers, bar)
            if refine:
                best = best_layer(scores_by_layer(self.rows, len(self.cases)))
                beside = [x for x in (best - 1, best + 1) if 0 <= x < self.lm.n_layers]
                self.try_layers([x for x in beside if x not in layers and x not in self.lm.sparse], bar)
            bar.total = len(self.rows)
        if not any(row["change"] for row in self.rows):
            raise ValueError(
                f"suggest_layer: not one of the {len(self.rows)} edits that were tried changes {self.lm.name}; the first: "
                f"{self.rows[0]['remark'] or 'its change is 0'}"
            )

    def try_layers(self, layers: Sequence[int], bar: tqdm) -> None:
        if not layers:
            return
        measuring = f"Measuring how keys vary (C) at layers {', '.join(map(str, layers))}"
        seen = lambda count, of: self.tell(measuring, min(1.0, count / of))  # noqa: E731
        covariances(self.lm, layers, self.source, self.tokens, progress=self.progress, callback=seen)
        for layer in layers:
            for place, case in enumerate(self.cases):
                doing = f"Trying layer {layer}: fact {place + 1} of {len(self.cases)}"
                self.tell(doing, bar.n / bar.total)
                self.rows.append({"layer": layer, "case": place} | self.try_edit_of(layer, place, case))
                bar.update()
            self.optima.factors.clear()  # of each layer as large as its C, and not needed again

    def edit_of(self, layer: int, case: Case) -> Proposal:
        """The edit, or none, with the reason."""
        method = Rome(layer=layer, settings=self.settings, source=self.source, tokens=self.tokens)
        try:
            return method.change(self.lm, [(case.fact, case.target)], self.optima)
        except ValueError as error:
            return Proposal(remark=str(error), failed=True)

    def try_edit_of(self, layer: int, place: int, case: Case) -> dict[str, Json]:
        """Make one edit, and judge it; where there is none, it counts as one without effect, with the reason."""
        edit = self.edit_of(layer, case)
        (answers,) = self.answers(edit, [case])
        right = self.right[place]
        kept = {name: [x for x, was in zip(answers[name], right, strict=True) if was] for name in OF_NEIGHBOURS}
        marks = {
            "rewrite": share(answers["rewrite"], answers["rewrite_true"]),
            "paraphrase": share(answers["paraphrases"], answers["paraphrases_true"]),
            "neighbour": share(*kept.values()) if any(right) else None,
        }
        size = 0.0 if edit.delta is None else float(edit.delta.norm() / self.lm.weight(layer).float().norm())
        return marks | {"change": size, "remark": edit.remark}

    def answers(self, change: Change, cases: Iterable[Case]) -> list[dict[str, list[Score]]]:
        """What the model says of each case under one change."""
        return answers_to(self.lm, change, [case.pairs for case in cases], "suggest_layer")


def more_probable(own: Sequence[Score], other: Sequence[Score]) -> list[bool]:
    return [x.total > y.total for x, y in zip(own, other, strict=True)]


def share(own: Sequence[Score], other: Sequence[Score]) -> float:
    """The share of the prompts at which the one text is more probable than the other, in %."""
    return success([x.total for x in own], [x.total for x in other])


def settle(
    lm: LanguageModel,
    methods: Iterable[Method],
    cases: Iterable[Case] = (),
    store: Store | str | Path | None = USER_CACHE,
    progress: bool = True,
) -> list[Method]:
    """The methods with nothing left to choose, for judging them on `cases`.

    Where a method takes the model's own layer and none is known, it takes that of `suggest_layer`, found on facts about
    other subjects than those that are judged; what was taken is logged.

    Raises: ValueError: there is no such layer; see `suggest_layer`.
    """
    methods = list(methods)
    open_methods = [x for x in methods if isinstance(x, Rome) and x.layer is None]
    if not open_methods or default_settings(lm).layer is not None:
        return [method.settled(lm) for method in methods]
    names, judged = " and ".join(x.name for x in open_methods), {case.fact.subject for case in cases}
    try:
        suggestion = suggest_layer(lm, store=store or USER_CACHE, progress=progress, without=judged)
    except ValueError as error:
        raise ValueError(
            f"{names}: no layer is known for {lm.name}, and none could be suggested. {error} Or choose it: "
            f'dataclasses.replace(METHODS["{open_methods[0].name}"], layer=...).'
        ) from error
    logger.warning(
        "no layer is known for %s, so %s takes the one that suggest_layer finds on facts about other subjects than those "
        "judged. %s", lm.name, names, suggestion,
    )  # fmt: skip
    return [(replace(x, layer=suggestion.layer) if x in open_methods else x).settled(lm) for x in methods]
