"""Evaluation on the workers of a Dask cluster: `judge_on_workers` fills the store, of which `evaluate` makes its table.

First every v* that is missing is found, each once, by whichever worker is free; then every case is judged, with all v*
at hand. So cases whose requests are met together need not wait for each other, nor find the same v* twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial

from tqdm.auto import tqdm

from rome_lab.base import Store
from rome_lab.editing import Rome, Sought
from rome_lab.evaluation.bench import Bench, CaseTask, v_stars_of
from rome_lab.models import LanguageModel, Workers


def judge_on_workers(workers: Workers, bench: Bench, tasks: Sequence[CaseTask], progress: bool) -> None:
    """Have the workers make, and put into the store, all rows that the store of the bench does not hold."""
    open_tasks = [task for task in (unanswered(bench, whole) for whole in tasks) if task[1]]
    rome = {method.name: method for _, methods, _ in open_tasks for method in methods if isinstance(method, Rome)}
    pairs = [pair for _, methods, requests in open_tasks for pair in zip(methods, requests, strict=True)]
    missing = [v_star for v_star in v_stars_of(pairs) if bench.optima.recall(*v_star) is None]
    with tqdm(desc="v*", unit="request", total=len(missing), disable=not (progress and missing)) as bar:
        workers.map(partial(find_there, bench.at(None, None)), missing, bar)
    for v_star in missing:
        bench.optima.recall(*v_star)
    for method in rome.values():
        # C is measured here, once, so that the workers use the same one and the user's cache keeps it.
        method.factor(bench.lm, bench.optima)
    done = len(tasks) - len(open_tasks)
    with tqdm(desc="judging", unit="case", total=len(tasks), initial=done, disable=not progress) as bar:
        workers.map(partial(judge_there, bench.at(None, None)), open_tasks, bar)


def unanswered(bench: Bench, task: CaseTask) -> CaseTask:
    """The task without the methods whose rows the store holds."""
    missing = [row for row in bench.row_requests(*task) if bench.stored(row.inputs) is None]
    return task[0], [row.method for row in missing], [row.requests for row in missing]


def find_there(bench: Bench, lm: LanguageModel, v_star: Sought, store: Store) -> None:
    """On a worker: v* of one request, into the store."""
    with contextlib.suppress(ValueError):  # there is none; why is found again, and said, where the case is judged
        bench.at(lm, store).optima.find(*v_star)


def judge_there(bench: Bench, lm: LanguageModel, task: CaseTask, store: Store) -> None:
    """On a worker: the rows of one case, into the store."""
    bench.at(lm, store).rows([task])
