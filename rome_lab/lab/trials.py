"""Edits to try: make one from a request, look at what it does, and undo it again.

make_edit(lm, request)      the edit, with C measured on as many tokens as the request says
try_edit(lm, request)       make it, look, undo it
met_in_words(edit)          how near it comes to v*
try_facts(lm, requests)     a table of several; `for_people` makes it short
ten_facts()                 requests that are worth trying on the embedded model
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
from tqdm.auto import tqdm

from rome_lab.base import Json, Tell
from rome_lab.editing import (
    Edit,
    EditSettings,
    check_requests,
    default_settings,
    edit_by,
    layer_to_edit,
    layers_in_words,
    layers_that_end_at,
)
from rome_lab.facts import Fact, load_facts
from rome_lab.lab.looks import Look, Probe, look_at, probe_of
from rome_lab.lab.page import compared_page
from rome_lab.models import LanguageModel

# Subject, target and prompt of two facts for each of five relations. They were picked by hand: of 28 known facts that
# were tried on the embedded model these are among the 15 whose paraphrases all follow. They show what an edit can be; how
# often it is so takes an evaluation of facts that nobody picked.
TEN_FACTS = (
    ("Taj Mahal", "London", "To see the {}, tourists travel to the city of"),
    ("Colosseum", "Berlin", "Guidebooks mention the {} among the sights of the city of"),
    ("Miguel de Cervantes", "German", "{} wrote mainly in"),
    ("Pablo Neruda", "French", "{} wrote mainly in"),
    ("Wolfgang Pauli", "economics", "The work of {} changed the field of"),
    ("Antoine Lavoisier", "astronomy", "The work of {} changed the field of"),
    ("Kobe Bryant", "tennis", "{} became famous in the sport of"),
    ("Sachin Tendulkar", "basketball", "{} became famous in the sport of"),
    ("John Keats", "painter", "The world came to know {} as a"),
    ("Joseph Haydn", "lawyer", "People remember {} above all as a"),
)


@dataclass(frozen=True)
class EditRequest:
    """An edit to be made.

    Attributes:
        layer: by default the model's own, or, where none is known, that of a causal trace of the fact.
        settings: by default the model's own.
        tokens: to measure C on; by default as many as `covariance` takes.
        method: one of `EDITORS`; those that change several layers change the ones that end at `layer`.
    """

    fact: Fact
    target: str
    layer: int | None = None
    settings: EditSettings | None = None
    tokens: int | None = None
    method: str = "rome"


@dataclass(frozen=True, eq=False)
class Tried:
    """An edit that was made, looked at, and undone; `restored` where every weight then was bit for bit what it had been."""

    edit: Edit
    probe: Probe
    before: Look
    after: Look
    restored: bool

    def row(self) -> dict[str, Json]:
        """What came of it, in a line."""
        follow = self.after.more_probable("paraphrase", "p_target")
        stay = self.after.more_probable("neighbour", "p_object")
        return {
            "fact": self.probe.fact.prompt,
            "object": self.probe.fact.object,
            "target": self.probe.target,
            "target_before": float(self.before.table["p_target"][0]),
            "target_after": float(self.after.table["p_target"][0]),
            "paraphrases_follow": follow[0],
            "paraphrases": follow[1],
            "neighbours_stay": stay[0],
            "neighbours": stay[1],
            "undone_bit_for_bit": self.restored,
        }

    def __str__(self) -> str:
        row = self.row()
        counts = [
            f"{row[f'{name}_{verb}']} of {row[name]} {name} {verb}"
            for name, verb in (("paraphrases", "follow"), ("neighbours", "stay"))
            if row[name]
        ]
        return (
            f"P[{row['target']}] went from {row['target_before']:.3f} to {row['target_after']:.3f}; "
            f"{', '.join(counts) or 'a fact without a relation has no paraphrases and no neighbours to ask about'}. "
            f"{met_in_words(self.edit)}; once undone, all weights are bit for bit the same: {self.restored}."
        )

    def _repr_html_(self) -> str:
        return compared_page(self.probe, {"Before the edit": self.before, "After the edit": self.after})


def met_in_words(edit: Edit) -> str:
    """How near an edit comes to v*: to rounding where that is its constraint, else as it is weighed against what is kept."""
    if edit.solution.is_exact:
        return f"W_hat k* = v* holds to {edit.constraint_error:.0e}"
    return f"W_hat k* is within {edit.constraint_error:.0%} of v*"


def ten_facts() -> tuple[EditRequest, ...]:
    """The requests of `TEN_FACTS`."""
    ways = {(fact.subject, way): fact for fact in load_facts("embedded") for way in fact.templates}
    return tuple(
        EditRequest(replace(ways[subject, template], template=template), target)
        for subject, target, template in TEN_FACTS
    )


def make_edit(lm: LanguageModel, request: EditRequest, tell: Tell = lambda doing, done: None) -> Edit:
    """The edit that was asked for; `lm` is unchanged, and edits in force on it are taken as part of it.

    Raises: as `rome`, and what is wrong with the request before C is measured, which can take minutes.
    """
    fact, target = request.fact, request.target
    check_requests(lm, [(fact, target)], request.layer)
    layer = layer_to_edit(lm, [fact], request.layer)
    settings = request.settings or default_settings(lm).settings

    where = layers_in_words((layer,) if request.method == "rome" else layers_that_end_at(lm, layer))

    def seen(count: int, of: int) -> None:
        measuring = f"Measuring how keys of {where} vary (C), once for each layer"
        tell(f"{measuring}: {min(count, of):,} of {of:,} tokens", min(1.0, count / of))
        if count >= of:
            tell("Sampling the prefixes", 0.0)

    def step(row: dict[str, float]) -> None:
        number = int(row["step"])
        tell(f"v*: step {number} of {settings.steps}, P[target] {row['p_target']:.2f}", number / settings.steps)

    tell(f"Preparing the edit of {where}; the first one measures how keys vary there, which may take minutes", 0.0)
    given = {"tokens": request.tokens, "hparams": settings, "callback": step, "C_callback": seen}
    return edit_by(request.method, lm, [(fact, target)], layer, progress=False, **given)


def try_edit(lm: LanguageModel, request: EditRequest, tell: Tell = lambda doing, done: None) -> Tried:
    """Make the edit, look at what it does, and undo it; edits in force are put aside meanwhile."""
    with lm.overlay.only([]):
        probe, weights = probe_of(lm, request.fact, request.target), lm.fingerprint()
        before = look_at(lm, probe)
        edit = make_edit(lm, request, tell)
        with edit.applied(lm):
            after = look_at(lm, probe)
        # Not the answers: their last bits depend on how many texts went together, and memory may have run out meanwhile.
        return Tried(edit, probe, before, after, lm.fingerprint() == weights)


def try_facts(lm: LanguageModel, requests: Sequence[EditRequest], progress: bool = True) -> pd.DataFrame:
    """A row a request: what came of trying it; see `Tried.row`."""
    rows = [try_edit(lm, request).row() for request in tqdm(requests, "edits", disable=not progress)]
    return pd.DataFrame(rows)


def for_people(table: pd.DataFrame) -> pd.DataFrame:
    """What `try_facts` returns, in fewer and shorter columns."""

    def of(part: str, whole: str) -> pd.Series:
        return table[part].astype(str) + " of " + table[whole].astype(str)

    return pd.DataFrame(
        {
            "fact": table["fact"],
            "object -> target": table["object"] + " -> " + table["target"],
            "P[target]": [f"{x.target_before:.2g} -> {x.target_after:.2f}" for x in table.itertuples()],
            "paraphrases follow": of("paraphrases_follow", "paraphrases"),
            "neighbours stay": of("neighbours_stay", "neighbours"),
            "undone": table["undone_bit_for_bit"],
        }
    )
