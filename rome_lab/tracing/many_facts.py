"""Trace many facts: `trace_facts`, resumable through a store on disk; `TracePlan.inputs` is what a trace is stored under."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from rome_lab.base import Json, Record, Store, code_version, opened
from rome_lab.facts import Fact, read_prompt
from rome_lab.models import LanguageModel, check_verified
from rome_lab.tracing.averaging import Traces
from rome_lab.tracing.corruption import Corruption
from rome_lab.tracing.one_fact import trace_of_kind
from rome_lab.tracing.runs import TraceSettings, UnknownFactError, run_clean_and_corrupted
from rome_lab.tracing.trace import KINDS, Trace

if TYPE_CHECKING:
    from distributed import Client

    from rome_lab.models import Workers


logger = logging.getLogger(__name__)


def trace_facts(
    lm: LanguageModel,
    facts: Iterable[Fact],
    kinds: Iterable[str] = ("state", "mlp", "attn"),
    store: Store | str | Path | None = None,
    progress: bool = True,
    *,
    corruption: Corruption | None = None,
    samples: int = 10,
    window: int = 10,
    seed: int = 0,
    max_rows: int | None = None,
    client: Client | None = None,
    each: Callable[[Trace], object] | None = None,
) -> Traces:
    """Trace every fact, each kind from the same clean and corrupted runs; what the store holds is not traced again.

    The severed kinds are traced at the last subject token only, which is what Figure 3 shows.

    Args:
        kinds: labels of `KINDS`: "state", "mlp", "attn", "severed-mlp", "severed-attn".
        store: folder of results; written after every fact, so that an interrupted run goes on where it was.
        progress: show a bar over the facts.
        corruption, samples, window, seed, max_rows: as in `causal_trace`.
        client: of a Dask cluster, whose workers trace what the store does not hold; see `rome_lab.models.workers`.
        each: called with every trace as soon as it is there, those of the store among them.

    Returns: Traces, in the order of the facts. Facts that `lm` does not know are left out, with a warning.

    Raises:
        ValueError: a kind that is unknown or given twice, no facts, or none that `lm` knows.
        OSError: the store cannot be written; found before any work is done.
        RuntimeError: the cluster has failed, and what was finished is in the store; or the store loses what it is given.
    """
    kinds, facts = tuple(kinds), list(dict.fromkeys(facts))
    if others := set(kinds) - set(KINDS):
        raise ValueError(f"trace_facts: unknown kinds {sorted(others)}; choose from {', '.join(KINDS)}.")
    if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
        raise ValueError(f"trace_facts: the kinds {twice} are given more than once; name each once.")
    if not facts:
        raise ValueError("trace_facts: there are no facts to trace; known_facts(lm, facts) finds some.")
    store = opened(store)
    if store:
        store.check_writable()
    check_verified(lm, "trace_facts")
    settings = TraceSettings(corruption, samples, window, seed, max_rows)
    settings = replace(settings, corruption=settings.corruption.measured(lm))
    unknown: dict[Fact, str] = {}
    if client is None:
        plan = TracePlan(kinds, settings, corruption_inputs(lm, settings) | lm.identity().key() if store else {})
    else:
        from rome_lab.models import Workers  # needs dask.distributed, which is an optional extra

        workers = Workers(client, lm, store)
        plan, store = TracePlan(kinds, settings, corruption_inputs(lm, settings) | workers.key), workers.store
        unknown = trace_on_workers(workers, facts, plan, progress)
    traces = []
    for fact in tqdm(facts, desc="tracing", unit="fact", disable=not progress or client is not None):
        if fact not in unknown:
            try:
                traces += trace_fact(lm, fact, store, plan, each)
            except UnknownFactError as error:
                unknown[fact] = str(error)
    if unknown:
        first = next(unknown[fact] for fact in facts if fact in unknown)
        message = f"trace_facts: {len(unknown)} of {len(facts)} facts are not known to {lm.name}; the first: {first}"
        if not traces:
            raise ValueError(message)
        logger.warning("%s They are left out.", message)
    return Traces(traces)


def corruption_inputs(lm: LanguageModel, settings: TraceSettings) -> dict[str, Json]:
    """The corruption as a part of the inputs of a stored trace."""
    return {"corruption": settings.corruption.describe(lm)}


@dataclass(frozen=True)
class TracePlan:
    """What is traced of every fact.

    Attributes:
        kinds: labels of `KINDS`.
        common: what the store's inputs of all traces have in common: the model, and the corruption; of no use without one.
    """

    kinds: tuple[str, ...]
    settings: TraceSettings
    common: Mapping[str, Json]

    def inputs(self, lm: LanguageModel, fact: Fact) -> dict[str, dict[str, Json]]:
        """Label -> everything that determines this trace of the fact."""
        prompt, settings = read_prompt(lm, fact), self.settings
        of_fact = {
            **self.common,
            "what": "trace",
            "code": code_version(trace_of_kind.__module__),  # of what makes a trace, not of what stores it
            "prompt": fact.prompt,
            "subject": fact.subject,
            "object": fact.object,
            "ids": prompt.ids.tolist(),
            "subject_range": list(prompt.subject_range),
            "samples": settings.samples,
            "seed": settings.seed,
        }
        return {
            label: of_fact | {"kind": kind, "severed": severed, "window": None if kind == "state" else settings.window}
            for label, (kind, severed) in ((label, KINDS[label]) for label in self.kinds)
        }


def trace_fact(
    lm: LanguageModel,
    fact: Fact,
    store: Store | None,
    plan: TracePlan,
    each: Callable[[Trace], object] | None = None,
) -> list[Trace]:
    """The traces of one fact, from the store where it has them, else made, and saved there where there is one."""
    traces, runs = [], None
    inputs = plan.inputs(lm, fact) if store else dict.fromkeys(plan.kinds)
    for label in plan.kinds:
        record = store.load(inputs[label]) if store else None
        if record is None:
            runs = runs or run_clean_and_corrupted(lm, fact, None, plan.settings)
            traces.append(trace_of_kind(runs, label))
            if store:
                store.save(inputs[label], *trace_record(traces[-1]))
        else:
            traces.append(trace_from_record(record))
        if each:
            each(traces[-1])
    return traces


def trace_on_workers(workers: Workers, facts: Sequence[Fact], plan: TracePlan, progress: bool) -> dict[Fact, str]:
    """Have the workers trace what the store does not hold; returns the facts that the model does not know, and why."""

    def missing(fact: Fact, kinds: tuple[str, ...]) -> tuple[str, ...]:
        inputs = replace(plan, kinds=kinds).inputs(workers.lm, fact)
        return tuple(label for label in kinds if workers.store.load(inputs[label]) is None)

    tasks = [(fact, kinds) for fact in facts if (kinds := missing(fact, plan.kinds))]
    done = len(facts) - len(tasks)
    with tqdm(desc="tracing", unit="fact", total=len(facts), initial=done, disable=not progress) as bar:
        reasons = workers.map(partial(trace_there, plan=plan), tasks, bar)
    for (fact, kinds), reason in zip(tasks, reasons, strict=True):
        if not reason and missing(fact, kinds):
            raise RuntimeError(
                f"trace_facts: the workers have traced {fact.prompt!r}, and it was written to {workers.store.folder}, but "
                "is not there; see that nothing removes or alters files in the store, and call again."
            )
    return {fact: reason for (fact, _), reason in zip(tasks, reasons, strict=True) if reason}


def trace_there(lm: LanguageModel, task: tuple[Fact, tuple[str, ...]], store: Store, plan: TracePlan) -> str | None:
    """On a worker: trace some kinds of one fact into the store; returns why the model does not know it, or None."""
    fact, kinds = task
    try:
        trace_fact(lm, fact, store, replace(plan, kinds=kinds))
    except UnknownFactError as reason:
        return str(reason)
    return None


def trace_record(trace: Trace) -> tuple[dict, dict[str, Json]]:
    """A trace as arrays and JSON."""
    meta = {name: value for name, value in asdict(trace).items() if name != "p_restored"}
    return {"p_restored": trace.p_restored}, meta


def trace_from_record(record: Record) -> Trace:
    """The trace that `trace_record` took apart."""
    meta = dict(record.meta)
    meta |= {"tokens": tuple(meta["tokens"]), "subject_range": tuple(meta["subject_range"])}
    return Trace(p_restored=record.arrays["p_restored"], **meta)
