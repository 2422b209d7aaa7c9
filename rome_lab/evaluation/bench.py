"""Where rows are made: `Bench` takes cases and methods, and gives a row each, from its store or judged side by side.

A row says the same whichever rows it is made with, and is kept under all that determines it but the method's name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeAlias

from rome_lab.base import Json, Store, canonical_json, code_version
from rome_lab.editing import Method, Optima, Proposal, Request, Rome, Sought
from rome_lab.evaluation.bystanders import known_pool, spared, unrelated_to
from rome_lab.evaluation.judging import JudgeSettings, judge_all
from rome_lab.evaluation.passages import passage_of
from rome_lab.facts import Case, Fact
from rome_lab.models import LanguageModel

CaseTask: TypeAlias = tuple[Case, Sequence[Method], Sequence[Sequence[Request]]]  # of each method, what it is given


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

    @property
    def change_key(self) -> str:
        """What the method and its requests determine: the change."""
        return canonical_json({name: self.inputs[name] for name in ("method", "requests")})

    @property
    def edited_by(self) -> dict[str, str]:
        """The method, and what tells the model that it edits: the same for cases whose requests it is given together."""
        given = canonical_json(self.inputs["requests"]).encode()
        return {"method": self.method.name, "model": hashlib.sha256(given).hexdigest()[:12]}


@dataclass(frozen=True, eq=False)
class Bench:
    """Where cases are judged: the model, and what all of them have in common.

    Attributes:
        settings: of the judging; `known` and `passages` in them are set for each case.
        pool: known facts, of which each case is given those that it does not touch.
        optima: v* and what it takes to find them.
        store: of rows; None keeps none.
        common: the part of what a row is stored under that all of them share: the model's identity.
    """

    lm: LanguageModel
    settings: JudgeSettings
    pool: tuple[Fact, ...]
    optima: Optima
    store: Store | None
    common: dict[str, Json]

    @classmethod
    def set_up(
        cls,
        lm: LanguageModel,
        settings: JudgeSettings,
        unrelated: Sequence[Fact] | None,
        store: Store | None,
        progress: bool,
    ) -> Bench:
        """A bench whose pool is `unrelated`, by default `known_pool(lm)`."""
        pool = known_pool(lm, store, progress) if unrelated is None else tuple(unrelated)
        optima = Optima(lm, store, progress)
        return cls(lm, settings, pool, optima, store, optima.common)

    def at(self, lm: LanguageModel | None, store: Store | None) -> Bench:
        """The same for this model in another process, and a store there; for None it can travel."""
        return replace(self, lm=lm, store=store, optima=self.optima.at(lm, store))

    def stored(self, inputs: Mapping[str, Json]) -> dict | None:
        """What the store keeps under these inputs, if anything."""
        record = self.store.load(inputs) if self.store else None
        return dict(record.meta) if record else None

    def keep(self, inputs: Mapping[str, Json], result: Mapping[str, Json]) -> None:
        """Put a result into the store, where there is one."""
        if self.store:
            self.store.save(inputs, {}, result)

    def sheet(self, case: Case, requests: Sequence[Request]) -> tuple[Case, JudgeSettings]:
        """What is judged, and how: no neighbour that is edited itself, known facts that no request touches, one passage."""
        known = unrelated_to(case, requests, self.pool, self.settings.seed)
        return spared(case, requests), replace(self.settings, known=known, passages=(passage_of(case.id),))

    def row_requests(
        self, case: Case, methods: Sequence[Method], requests: Sequence[Sequence[Request]]
    ) -> list[RowRequest]:
        """The row of each method for one case."""
        sheets = {given: self.sheet(case, given) for given in set(map(tuple, requests))}
        rows = []
        for method, given in zip(methods, requests, strict=True):
            sheet = sheets[tuple(given)]
            rows.append(RowRequest(case, method, given, *sheet, row_inputs(self.common, *sheet, method, given)))
        return rows

    def rows(self, tasks: Sequence[CaseTask]) -> list[dict]:
        """A row of each method for each case, from the store where it has them; the others are judged side by side."""
        rows = [(canonical_json(row.inputs), row) for task in tasks for row in self.row_requests(*task)]
        distinct = dict(rows)  # each once: two names may mean one method
        results = {key: result for key, row in distinct.items() if (result := self.stored(row.inputs)) is not None}
        missing = {key: row for key, row in distinct.items() if key not in results}
        self.optima.prepare(v_stars_of((row.method, row.requests) for row in missing.values()))
        needed = {row.change_key: row for row in missing.values()}  # cases that are edited together share a change
        proposed = {key: self.propose(row.method, row.requests) for key, row in needed.items()}
        proposals = {key: proposed[row.change_key] for key, row in missing.items()}
        changes = {key: proposal for key, proposal in proposals.items() if isinstance(proposal, Proposal)}
        sheets = [(missing[key].judged, missing[key].settings, proposal) for key, proposal in changes.items()]
        judged = dict(zip(changes, judged_or_why(self.lm, sheets), strict=True))
        for key, row in missing.items():
            results[key] = judged.get(key) or {"judged": False, "remark": proposals[key]}
            self.keep(row.inputs, results[key])
        return [case_columns(row.case) | row.edited_by | results[key] for key, row in rows]

    def propose(self, method: Method, requests: Sequence[Request]) -> Proposal | str:
        """The method's change, or the reason why it makes none."""
        try:
            return method.change(self.lm, requests, self.optima)
        except ValueError as error:
            return str(error)


def v_stars_of(pairs: Iterable[tuple[Method, Sequence[Request]]]) -> list[Sought]:
    """What methods of the ROME family are going to ask for, given these requests, each once."""
    rome = [(method, request) for method, some in pairs if isinstance(method, Rome) for request in some]
    return list(dict.fromkeys(method.sought(request) for method, request in rome))


def case_columns(case: Case) -> dict[str, Json]:
    """What a row says of its case."""
    own = {"case": case.id, "form": case.form, "target": case.target}
    return own | {name: getattr(case.fact, name) for name in ("relation", "subject", "prompt", "object")}


def judged_or_why(lm: LanguageModel, sheets: Sequence[tuple[Case, JudgeSettings, Proposal]]) -> list[dict]:
    """What `judge_all` says of each, or why it can't; a change that breaks the model spoils its own row only."""
    try:
        marks = judge_all(lm, [(case, proposal, settings) for case, settings, proposal in sheets])
    except ValueError as error:
        if len(sheets) == 1:
            return [{"judged": False, "remark": str(error)}]
        half = len(sheets) // 2
        return judged_or_why(lm, sheets[:half]) + judged_or_why(lm, sheets[half:])
    return [{"judged": True, "remark": sheet[2].remark} | row for sheet, row in zip(sheets, marks, strict=True)]


def row_inputs(
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
