"""Evaluate methods on cases, side by side: `evaluate`, resumable through a store of results on disk.

evaluate(lm, cases, method)     a row a case and method: the metrics of `rome_lab.evaluation.metrics`, or why there are none
methods_of(method)              the methods meant by names
remarks(table)                  what was remarked on, with counts
reference_corpus(cases)         texts that RS takes its document frequencies from
story(table, case)              one case in words
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from tqdm.auto import tqdm

from rome_lab.base import Store, differing, opened, seed_from
from rome_lab.editing import METHODS, Method, settle
from rome_lab.evaluation.bench import Bench
from rome_lab.evaluation.bystanders import requests_by_case
from rome_lab.evaluation.judging import JudgeSettings
from rome_lab.evaluation.metrics import METRICS
from rome_lab.facts import Case, Fact
from rome_lab.models import LanguageModel

if TYPE_CHECKING:
    from distributed import Client


logger = logging.getLogger(__name__)

# Cases that are judged side by side: of more, little would be faster and more would be lost with a run.
CASES_TOGETHER = 4
CHANGES = 200_000_000  # weights of changes that are held in memory at once, at most
CORPUS = 500  # texts that are enough to tell rare words from frequent ones; all of them would be slow
TEXTS = {"generations": list, "written": dict, "verdicts": dict}  # columns of texts, and what makes an empty one
CASE_COLUMNS = ("form", "relation", "subject", "prompt", "object", "target")


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
    """Judge one or several methods by the metrics of `rome_lab.evaluation.metrics`, a row a case and method.

    All methods of a case are judged side by side. Results are kept by case and method, so another run goes on where one
    was interrupted, and adding a method judges only that one. A row says the same whichever methods it stands among.
    A method is given `Method.together` requests at once: those of the cases that come together in `groups`, each of which
    is judged with all of them in force. No neighbour is judged that another of them edits; a case with no other has no NS.
    A method that takes the model's own layer, where none is known, takes the one that `suggest_layer` finds on facts about
    other subjects than those of the cases; it is logged.

    Args:
        method: a name of `METHODS`, a Method, or several; no two of one name.
        store: folder of results, written after every few cases.
        progress: show a bar over the cases.
        settings: of the judging; `known` and `passages` are set for each case. `SCORES_ONLY` is faster: it writes no texts.
        unrelated: known facts, of which each case is given those that nothing edited with it touches, see `unrelated_to`; by
            default `known_pool(lm)`.
        client: of a Dask cluster, whose workers make what the store does not hold; see `rome_lab.models.workers`.

    Returns: DataFrame: case, method, model (the same where cases were edited together), form, relation, subject, prompt,
        object, target, the metrics, generations, written, verdicts (see `judge_all`), judged, remark. Where `judged` is
        False the method could not edit the case, or the outcome could not be judged: the metrics are NaN and the remark
        says why. A remark on a judged case says what to know of it, such as that v* did not converge. `remarks(table)`
        counts them.

    Raises:
        ValueError: no cases, an unknown method, two of one name, a method that does not fit the model, or no case at all
            that could be judged.
        OSError: the store cannot be written; found before any work is done.
        RuntimeError: the cluster has failed, or an editor is not trained; what was finished is in the store.
    """
    cases, methods = list(cases), methods_of(method)
    if not cases:
        raise ValueError("evaluate: there are no cases; known_cases(lm) finds some that the model knows.")
    if len({case.id for case in cases}) < len(cases):
        raise ValueError("evaluate: two cases have one id; give every case its own.")
    store = opened(store)
    if store:
        store.check_writable()
    methods = settle(lm, methods, cases, store, progress)
    if client is not None:
        from rome_lab.evaluation.on_workers import judge_on_workers
        from rome_lab.models import Workers  # needs dask.distributed, which is an optional extra

        workers = Workers(client, lm, store)
        store = workers.store
    bench = Bench.set_up(lm, settings or JudgeSettings(), unrelated, store, progress)
    given = {size: requests_by_case(cases, size) for size in {chosen.together for chosen in methods}}
    tasks = [(case, methods, [given[chosen.together][case.id] for chosen in methods]) for case in cases]
    if client is not None:
        judge_on_workers(workers, bench, tasks, progress)
    rows: list[dict] = []
    size = cases_together(lm, methods)
    with tqdm(desc="judging", unit="case", total=len(cases), disable=not progress or client is not None) as bar:
        for begin in range(0, len(tasks), size):
            rows += bench.rows(tasks[begin : begin + size])
            bar.update(len(tasks[begin : begin + size]))
    table = as_table(rows)
    log_remarks(table, lm.name)
    return table


def cases_together(lm: LanguageModel, methods: Sequence[Method]) -> int:
    """How many cases are judged side by side, as far as their changes may take memory."""
    matrices = sum(len(getattr(method, "layers", None) or [...]) for method in methods)
    return max(1, min(CASES_TOGETHER, CHANGES // (matrices * lm.config.hidden_size * lm.inner_width)))


def methods_of(method: str | Method | Sequence[str | Method]) -> list[Method]:
    """The methods meant, each once; a ValueError names the choices."""
    several = [method] if isinstance(method, str) or hasattr(method, "change") else list(method)
    for name in several:
        if isinstance(name, str) and name not in METHODS:
            raise ValueError(f"evaluate: there is no method {name!r}; choose from {', '.join(METHODS)}.")
    chosen = [METHODS[item] if isinstance(item, str) else item for item in several]
    names = [each.name for each in chosen]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"evaluate: the methods are {', '.join(names) or 'none'}; give at least one, and none twice.")
    return chosen


def as_table(rows: Sequence[dict]) -> pd.DataFrame:
    """Rows as a table; a metric that no row has gets no column."""
    table = pd.DataFrame(rows)
    for name, nothing in TEXTS.items():  # what was not judged has none
        table[name] = [row.get(name, nothing()) for row in rows]
    metrics = [name for name in METRICS if name in table]
    return table[["case", "method", "model", *CASE_COLUMNS, *metrics, *TEXTS, "judged", "remark"]]


def log_remarks(table: pd.DataFrame, name: str) -> None:
    """Log what was remarked on; raise where nothing could be judged."""
    remarked = table[table["remark"] != ""]
    if remarked.empty:
        return
    first = remarked.iloc[0]
    message = f"{first['method']}, case {first['case']}: {first['remark']}"
    if not table["judged"].any():
        raise ValueError(f"evaluate: none of {len(table)} rows could be judged on {name}; the first: {message}")
    failed = len(table) - int(table["judged"].sum())
    logger.warning(
        "evaluate: %d of %d rows could not be judged and %d others bear a remark; remarks(table) counts them; the first: %s",
        failed, len(table), len(remarked) - failed, message,
    )  # fmt: skip


def remarks(table: pd.DataFrame) -> pd.DataFrame:
    """What was remarked on: method, judged, remark (names and numbers left out), cases (their number)."""
    remarked = table[table["remark"] != ""]
    kind = remarked["remark"].str.replace(r"""'[^']*'|"[^"]*"|\d+(\.\d+)?""", "…", regex=True)
    counted = remarked.assign(remark=kind).groupby(["method", "judged", "remark"], sort=False).size()
    return counted.rename("cases").reset_index()


def reference_corpus(cases: Iterable[Case]) -> tuple[str, ...]:
    """References of all cases, each once, `CORPUS` of them at random: what RS takes its document frequencies from."""
    return tuple(sorted({text for case in cases for text in case.references}, key=seed_from)[:CORPUS])


def story(table: pd.DataFrame, case: str, methods: Sequence[str] = ("none", "rome")) -> str:
    """One case in words: what was asked, and its metrics and texts under each of the methods.

    In what is written at the rewrite prompt, stars stand around what differs from the text of the unedited model.
    """
    rows = table[(table["case"] == case) & table["method"].isin(methods)]
    if rows.empty:
        raise ValueError(f"story: the table has no case {case!r} of {', '.join(methods)}; see table['case'].")
    first = rows.iloc[0]
    lines = [f"{first['prompt']} -> {first['target']} (in truth {first['object']}); case {case}"]
    unedited = table[(table["case"] == case) & (table["method"] == "none")]
    before = unedited.iloc[0]["written"].get("rewrite", [""])[0] if len(unedited) else ""
    for row in rows.to_dict("records"):
        numbers = [f"{name} {row[name]:.4g}" for name in METRICS if name in row and not pd.isna(row[name])]
        lines += [f"\n{row['method']}: {', '.join(numbers)}{'; ' * bool(row['remark'])}{row['remark']}"]
        for text in row["written"].get("rewrite", []):
            words = " ".join(f"*{part}*" if is_new else part for part, is_new in differing(before or text, text))
            lines.append(f"    writes: {row['prompt']} {words}")
        lines += [f"    {' '.join(text.split())}" for text in row["generations"]]
    return "\n".join(lines)
