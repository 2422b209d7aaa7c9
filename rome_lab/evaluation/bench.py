"""TODO evaluation/bench."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeAlias

from rome_lab.base import Json, Store, canonical_json, code_version
from rome_lab.editing import Method, Optima, Proposal, Request
from rome_lab.evaluation.bystanders import spared, unrelated_to
from rome_lab.evaluation.case import Case
from rome_lab.evaluation.judging import JudgeSettings, judge_all
from rome_lab.facts import Fact
from rome_lab.models import LanguageModel

CaseQuestions: TypeAlias = tuple[
    Case, Sequence[Method], Sequence[Sequence[Request]]
]  # of each method, what it is given


@dataclass(frozen=True, eq=False)
class RowRequest:
    """One row that is to be made: the case it is about, the method, and what the method is given.

    Attributes:
        judged, settings: what is judged, and how, see `Bench.sheet`.
        inputs: what the row is stored under.
    """

    case: Case
    method: Method
    requests: Sequence[Request]
    judged: Case
    settings: JudgeSettings
    inputs: dict[str, Json]


@dataclass(frozen=True, eq=False)
class Bench:
    """Where cases are judged: the model, and what all of them have in common."""

    lm: LanguageModel
    settings: JudgeSettings
    pool: tuple[Fact, ...]
    optima: Optima
    store: Store | None
    common: dict[str, Json]

    def at(self, lm: LanguageModel | None, store: Store | None) -> Bench:
        """The same for this model in another process, and a store there; for None it can travel."""
        return replace(self, lm=lm, store=store, optima=self.optima.at(lm, store))

    def sheet(self, case: Case, requests: Sequence[Request]) -> tuple[Case, JudgeSettings]:
        """What is judged, and how: no neighbour that is edited itself, and known facts that no request touches."""
        known = unrelated_to(case, requests, self.pool, self.settings.seed)
        return spared(case, requests), replace(self.settings, known=known)

    def asked(self, case: Case, methods: Sequence[Method], requests: Sequence[Sequence[Request]]) -> list[RowRequest]:
        """The row of each method for one case."""
        sheets = {given: self.sheet(case, given) for given in set(map(tuple, requests))}
        found = []
        for method, given in zip(methods, requests, strict=True):
            sheet = sheets[tuple(given)]
            inputs = evaluation_inputs(self.common, *sheet, method, given)
            found.append(RowRequest(case, method, given, *sheet, inputs))
        return found

    def rows(self, questions: Sequence[CaseQuestions]) -> list[dict]:
        """A row of each method for each case, from the store where it has them; the others are judged side by side."""
        rows = [(canonical_json(one.inputs), one) for question in questions for one in self.asked(*question)]
        asked = dict(rows)  # each once: two names may mean one method
        records = {key: self.store.load(one.inputs) if self.store else None for key, one in asked.items()}
        found = {key: dict(record.meta) for key, record in records.items() if record}
        made = {key: self.propose(one.method, one.requests) for key, one in asked.items() if key not in found}
        changes = {key: proposal for key, proposal in made.items() if isinstance(proposal, Proposal)}
        sheets = [(asked[key].judged, asked[key].settings, proposal) for key, proposal in changes.items()]
        judged = dict(zip(changes, judged_or_why(self.lm, sheets), strict=True))
        for key, proposal in made.items():
            found[key] = judged.get(key) or {"judged": False, "remark": proposal}
            if self.store:
                self.store.save(asked[key].inputs, {}, found[key])
        return [case_columns(one.case) | {"method": one.method.name} | found[key] for key, one in rows]

    def propose(self, method: Method, requests: Sequence[Request]) -> Proposal | str:
        """The method's change, or the reason why it makes none."""
        try:
            return method.change(self.lm, requests, self.optima)
        except ValueError as error:
            return str(error)


def case_columns(case: Case) -> dict[str, Json]:
    """What a row says of its case."""
    said = {"case": case.id, "form": case.form, "target": case.target}
    return said | {name: getattr(case.fact, name) for name in ("relation", "subject", "prompt", "object")}


def judged_or_why(lm: LanguageModel, sheets: Sequence[tuple[Case, JudgeSettings, Proposal]]) -> list[dict]:
    """What `judge_all` says of each, or why it can't; a change that breaks the model spoils its own row only."""
    try:
        found = judge_all(lm, [(case, proposal, settings) for case, settings, proposal in sheets])
    except ValueError as error:
        if len(sheets) == 1:
            return [{"judged": False, "remark": str(error)}]
        half = len(sheets) // 2
        return judged_or_why(lm, sheets[:half]) + judged_or_why(lm, sheets[half:])
    return [{"judged": True, "remark": sheet[2].remark} | row for sheet, row in zip(sheets, found, strict=True)]


def evaluation_inputs(
    common: Mapping[str, Json], case: Case, settings: JudgeSettings, method: Method, requests: Sequence[Request]
) -> dict[str, Json]:
    """Everything that determines one row, but for the method's name."""
    corpus = hashlib.sha256(canonical_json(list(settings.corpus)).encode()).hexdigest()
    return {
        **common,
        "what": "evaluation",
        "code": code_version(__name__),
        "case": asdict(case),
        "settings": asdict(settings) | {"corpus": corpus},
        "method": method.describe(),
        "requests": [[fact.template, fact.subject, target] for fact, target in requests],
    }
