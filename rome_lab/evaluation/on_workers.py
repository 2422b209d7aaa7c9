"""Evaluation on the workers of a Dask cluster: `judge_on_workers` fills the store, of which `evaluate` makes its table.

First every v* that is missing is found, each once, by whichever worker is free; then every case is judged, with all v*
at hand. So cases whose requests are met together need not wait for each other, nor find the same v* twice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import TypeAlias

from tqdm.auto import tqdm

from rome_lab.base import Store
from rome_lab.editing import EditSettings, Request, Rome
from rome_lab.evaluation.bench import Bench, CaseQuestions
from rome_lab.models import LanguageModel, Workers

Sought: TypeAlias = tuple[Request, int, EditSettings]  # what `Optima.find` is asked for


def judge_on_workers(workers: Workers, bench: Bench, questions: Sequence[CaseQuestions], progress: bool) -> None:
    """Have the workers make, and put into the store, all rows that the store of the bench does not hold."""
    asked = [question for question in (unanswered(bench, one) for one in questions) if question[1]]
    rome = {method.name: method for _, methods, _ in asked for method in methods if isinstance(method, Rome)}
    missing = [one for one in sought(asked) if bench.optima.recall(*one) is None]
    with tqdm(desc="v*", unit="request", total=len(missing), disable=not (progress and missing)) as bar:
        workers.map(partial(find_there, bench.at(None, None)), missing, bar)
    for one in missing:
        bench.optima.recall(*one)
    for method in rome.values():
        # C is measured here, once, so that the workers use the same one and the user's cache keeps it.
        method.factor(bench.lm, bench.optima)
    done = len(questions) - len(asked)
    with tqdm(desc="judging", unit="case", total=len(questions), initial=done, disable=not progress) as bar:
        workers.map(partial(judge_there, bench.at(None, None)), asked, bar)


def unanswered(bench: Bench, question: CaseQuestions) -> CaseQuestions:
    """The question without the methods whose rows the store holds."""
    missing = [one for one in bench.asked(*question) if bench.store.load(one.inputs) is None]
    return question[0], [one.method for one in missing], [one.requests for one in missing]


def sought(questions: Sequence[CaseQuestions]) -> list[Sought]:
    """What the methods of the ROME family are going to ask for, each once."""
    given = [pair for _, methods, requests in questions for pair in zip(methods, requests, strict=True)]
    rome = [(method, request) for method, some in given if isinstance(method, Rome) for request in some]
    return list(dict.fromkeys(method.sought(request) for method, request in rome))


def find_there(bench: Bench, lm: LanguageModel, asked: Sought, store: Store) -> None:
    """On a worker: v* of one request, into the store."""
    with contextlib.suppress(ValueError):  # there is none; why is found again, and said, where the case is judged
        bench.at(lm, store).optima.find(*asked)


def judge_there(bench: Bench, lm: LanguageModel, question: CaseQuestions, store: Store) -> None:
    """On a worker: the rows of one case, into the store."""
    bench.at(lm, store).rows([question])
