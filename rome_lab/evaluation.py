"""Evaluate methods on cases, side by side: `evaluate`, resumable through a store of results on disk.

evaluate(lm, cases, method)     a row a case and method: the metrics of `rome_lab.metrics`, or why there are none
known_pool(lm)                  known facts, from which those are drawn that a case does not touch
remarks(table)                  what was remarked on, with counts
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pandas as pd
from tqdm.auto import tqdm

from rome_lab.case import Case
from rome_lab.corruption import seed_from
from rome_lab.facts import Fact, load_facts
from rome_lab.judging import JudgeSettings, judge_all
from rome_lab.known import known_facts
from rome_lab.methods import METHODS, Method, Proposal, Request
from rome_lab.metrics import METRICS
from rome_lab.models import LanguageModel
from rome_lab.optimised import Optimised
from rome_lab.store import Json, Store, canonical_json
from rome_lab.touched import requests_by_case, spared, unrelated_to

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

NUMERICS = 2  # raised when a change here or in judging moves any number, so that stored results are made again
POOL = 400  # known facts, among which those are chosen that a case does not touch
POOL_SEED = -1  # which no evaluation has: facts drawn by its own seed would be those of its cases
TOGETHER = 4  # cases that are judged side by side: of more, little would be faster and more would be lost with a run
CHANGES = 200_000_000  # weights of changes that are held in memory at once, at most
CORPUS = 500  # texts that are enough to tell rare words from frequent ones; all of them would be slow
SAID = ("form", "relation", "subject", "prompt", "object", "target")

Question: TypeAlias = tuple[Case, Sequence[Method], Sequence[Sequence[Request]]]  # of each method, what it is given


def evaluate(
    lm: LanguageModel,
    cases: Iterable[Case],
    method: str | Method | Sequence[str | Method] = "rome",
    *,
    store: Store | str | Path | None = None,
    progress: bool = True,
    settings: JudgeSettings | None = None,
    unrelated: Sequence[Fact] | None = None,
    client: Client | None = None,
) -> pd.DataFrame:
    """Judge one or several methods by the metrics of `rome_lab.metrics`, a row a case and method.

    All methods of a case are judged side by side. Results are kept by case and method, so another run goes on where one
    was interrupted, and adding a method judges only that one. A row says the same whichever methods it stands among.
    A method is given `Method.together` requests at once: those of the cases that come together in `groups`, each of which
    is judged with all of them in force. No neighbour is judged that another of them edits; a case with no other has no NS.

    Args:
        method: a name of `METHODS`, a Method, or several; no two of one name.
        store: folder of results, written after every few cases.
        progress: show a bar over the cases.
        settings: of the judging; `known` in them is set for each case. `new_tokens=0` writes no texts, which is faster.
        unrelated: known facts, of which each case is given those that nothing edited with it touches, see `unrelated_to`; by
            default `known_pool(lm)`.
        client: of a Dask cluster, whose workers make what the store does not hold; see `rome_lab.cluster`.

    Returns: DataFrame: case, method, form, relation, subject, prompt, object, target, the metrics, generations, judged,
        remark. Where `judged` is False the method could not edit the case, or the outcome could not be judged: the
        metrics are NaN and the remark says why. A remark on a judged case says what to know of it, such as that v* did
        not converge. `remarks(table)` counts them.

    Raises:
        ValueError: no cases, an unknown method, two of one name, a method that does not fit the model, or no case at all
            that could be judged.
        OSError: the store cannot be written; found before any work is done.
        RuntimeError: the cluster has failed; what was finished is in the store.
    """
    cases, methods = list(cases), methods_of(method)
    if not cases:
        raise ValueError("evaluate: there are no cases; known_cases(lm) finds some that the model knows.")
    if len({case.id for case in cases}) < len(cases):
        raise ValueError("evaluate: two cases have one id; give every case its own.")
    methods = [chosen.settled(lm) for chosen in methods]
    store = Store(store) if isinstance(store, str | Path) else store
    if store:
        store.check_writable()
    if client is not None:
        from rome_lab.cluster import Workers  # needs dask.distributed, which is an optional extra
        from rome_lab.cluster_evaluation import judge_on_workers

        workers = Workers(client, lm, store)
        store = workers.store
    pool = known_pool(lm, store, progress) if unrelated is None else tuple(unrelated)
    optimised = Optimised(lm, store, progress)
    bench = Bench(lm, settings or JudgeSettings(), pool, optimised, store, optimised.common)
    given = {size: requests_by_case(cases, size) for size in {chosen.together for chosen in methods}}
    questions = [(case, methods, [given[chosen.together][case.id] for chosen in methods]) for case in cases]
    if client is not None:
        judge_on_workers(workers, bench, questions, progress)
    rows: list[dict] = []
    size = together(lm, len(methods))
    with tqdm(desc="judging", unit="case", total=len(cases), disable=not progress or client is not None) as bar:
        for begin in range(0, len(questions), size):
            part = questions[begin : begin + size]
            rows += bench.rows(part)
            bar.update(len(part))
    table = as_table(rows)
    report(table, lm.name)
    return table


def together(lm: LanguageModel, n_methods: int) -> int:
    """How many cases are judged side by side, as far as their changes may take memory."""
    return max(1, min(TOGETHER, CHANGES // (n_methods * lm.memory(0).weight.numel())))


def methods_of(method: str | Method | Sequence[str | Method]) -> list[Method]:
    """The methods meant, each once; a ValueError names the choices."""
    several = [method] if isinstance(method, str) or hasattr(method, "change") else list(method)
    for one in several:
        if isinstance(one, str) and one not in METHODS:
            raise ValueError(f"evaluate: there is no method {one!r}; choose from {', '.join(METHODS)}.")
    chosen = [METHODS[one] if isinstance(one, str) else one for one in several]
    names = [one.name for one in chosen]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"evaluate: the methods are {', '.join(names) or 'none'}; give at least one, and none twice.")
    return chosen


def known_pool(
    lm: LanguageModel, store: Store | str | Path | None = None, progress: bool = True, n: int = POOL
) -> tuple[Fact, ...]:
    """Embedded facts that the model knows: the same ones whatever it is evaluated on."""
    return known_facts(lm, load_facts("embedded"), n=n, seed=POOL_SEED, progress=progress, store=store).facts


@dataclass(frozen=True, eq=False)
class Asked:
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
    optimised: Optimised
    store: Store | None
    common: dict[str, Json]

    def at(self, lm: LanguageModel | None, store: Store | None) -> Bench:
        """The same for this model in another process, and a store there; for None it can travel."""
        return replace(self, lm=lm, store=store, optimised=self.optimised.at(lm, store))

    def sheet(self, case: Case, requests: Sequence[Request]) -> tuple[Case, JudgeSettings]:
        """What is judged, and how: no neighbour that is edited itself, and known facts that no request touches."""
        known = unrelated_to(case, requests, self.pool, self.settings.seed)
        return spared(case, requests), replace(self.settings, known=known)

    def asked(self, case: Case, methods: Sequence[Method], requests: Sequence[Sequence[Request]]) -> list[Asked]:
        """The row of each method for one case."""
        sheets = {given: self.sheet(case, given) for given in set(map(tuple, requests))}
        found = []
        for method, given in zip(methods, requests, strict=True):
            sheet = sheets[tuple(given)]
            inputs = evaluation_inputs(self.common, *sheet, method, given)
            found.append(Asked(case, method, given, *sheet, inputs))
        return found

    def rows(self, questions: Sequence[Question]) -> list[dict]:
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
        return [about(one.case) | {"method": one.method.name} | found[key] for key, one in rows]

    def propose(self, method: Method, requests: Sequence[Request]) -> Proposal | str:
        """The method's change, or the reason why it makes none."""
        try:
            return method.change(self.lm, requests, self.optimised)
        except ValueError as error:
            return str(error)


def about(case: Case) -> dict[str, Json]:
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
        "numerics": NUMERICS,
        "case": asdict(case),
        "settings": asdict(settings) | {"corpus": corpus},
        "method": method.describe(),
        "requests": [[fact.template, fact.subject, target] for fact, target in requests],
    }


def as_table(rows: Sequence[dict]) -> pd.DataFrame:
    """Rows as a table; a metric that no row has gets no column."""
    table = pd.DataFrame(rows)
    if "generations" not in table:
        table["generations"] = [[] for _ in rows]
    metrics = [name for name in METRICS if name in table]
    return table[["case", "method", *SAID, *metrics, "generations", "judged", "remark"]]


def report(table: pd.DataFrame, name: str) -> None:
    """Log what was remarked on; raise where nothing could be judged."""
    said = table[table["remark"] != ""]
    if said.empty:
        return
    first = said.iloc[0]
    message = f"{first['method']}, case {first['case']}: {first['remark']}"
    if not table["judged"].any():
        raise ValueError(f"evaluate: none of {len(table)} rows could be judged on {name}; the first: {message}")
    failed = len(table) - int(table["judged"].sum())
    logger.warning(
        "evaluate: %d of %d rows could not be judged and %d others bear a remark; remarks(table) counts them; the first: %s",
        failed, len(table), len(said) - failed, message,
    )  # fmt: skip


def remarks(table: pd.DataFrame) -> pd.DataFrame:
    """What was remarked on: method, judged, remark (names and numbers left out), cases (their number)."""
    said = table[table["remark"] != ""]
    kind = said["remark"].str.replace(r"""'[^']*'|"[^"]*"|\d+(\.\d+)?""", "…", regex=True)
    counted = said.assign(remark=kind).groupby(["method", "judged", "remark"], sort=False).size()
    return counted.rename("cases").reset_index()


def reference_corpus(cases: Iterable[Case]) -> tuple[str, ...]:
    """References of all cases, each once, `CORPUS` of them at random: what RS takes its document frequencies from."""
    return tuple(sorted({text for case in cases for text in case.references}, key=seed_from)[:CORPUS])


def story(table: pd.DataFrame, case: str, methods: Sequence[str] = ("none", "rome")) -> str:
    """One case in words: what was asked, and its metrics and texts under each of the methods."""
    rows = table[(table["case"] == case) & table["method"].isin(methods)]
    if rows.empty:
        raise ValueError(f"story: the table has no case {case!r} of {', '.join(methods)}; see table['case'].")
    first = rows.iloc[0]
    told = [f"{first['prompt']} -> {first['target']} (in truth {first['object']}); case {case}"]
    for row in rows.to_dict("records"):
        numbers = [f"{name} {row[name]:.4g}" for name in METRICS if name in row and not pd.isna(row[name])]
        told += [f"\n{row['method']}: {', '.join(numbers)}{'; ' * bool(row['remark'])}{row['remark']}"]
        told += [f"    {' '.join(text.split())}" for text in row["generations"]]
    return "\n".join(told)
