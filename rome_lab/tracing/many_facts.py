"""Trace many facts: `trace_facts`, resumable through a store on disk; `TracePlan.inputs` is what a trace is stored under."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from rome_lab.base import Json, Record, Store, code_version, opened
from rome_lab.facts import Fact, read_prompt
from rome_lab.models import LanguageModel, check_verified
from rome_lab.tracing.averaging import Traces
from rome_lab.tracing.corruption import Corruption
from rome_lab.tracing.metrics import TRACE_METRICS, Readings, check_metric
from rome_lab.tracing.one_fact import trace_of_kind
from rome_lab.tracing.pairs import SwapPair
from rome_lab.tracing.runs import TraceSettings, UnknownFactError, run_clean_and_corrupted
from rome_lab.tracing.trace import HEAD, KINDS, Trace

if TYPE_CHECKING:
    from distributed import Client

    from rome_lab.models import Workers


logger = logging.getLogger(__name__)


def trace_facts(
    lm: LanguageModel,
    facts: Iterable[Fact | SwapPair],
    kinds: Iterable[str] = ("state", "mlp", "attn"),
    store: Store | str | Path | None = None,
    progress: bool = True,
    *,
    corruption: Corruption | None = None,
    samples: int = 10,
    window: int = 10,
    seed: int = 0,
    max_rows: int | None = None,
    metric: str = "probability",
    direction: str = "denoise",
    client: Client | None = None,
    each: Callable[[Trace], object] | None = None,
) -> Traces:
    """Trace every fact, each kind from the same clean and corrupted runs; what the store holds is not traced again.

    The severed kinds are traced at the last subject token only, which is what Figure 3 shows.

    Args:
        facts: facts, or pairs that `swap_pairs` finds. In a pair the partner's object is the foil of the logit difference,
            and where no other corruption is given, the partner's subject stands in the corrupted run.
        kinds: "state", "mlp", "attn", "severed-mlp", "severed-attn", "head".
        store: folder of results; written after every fact, so that an interrupted run goes on where it was.
        progress: show a bar over the facts.
        corruption, samples, window, seed, max_rows, metric, direction: as in `causal_trace`; the store keeps all metrics.
        client: of a Dask cluster, whose workers trace what the store does not hold; see `rome_lab.models.workers`.
        each: called with every trace as soon as it is there, those of the store among them.

    Returns: Traces, in the order of the facts. Facts that `lm` does not know are left out, with a warning.

    Raises:
        ValueError: a kind that is unknown or given twice, no facts, or none that `lm` knows; facts among pairs without a
            corruption that is the same for both.
        OSError: the store cannot be written; found before any work is done.
        RuntimeError: the cluster has failed, and what was finished is in the store; or the store loses what it is given.
    """
    kinds, facts = tuple(kinds), list(dict.fromkeys(facts))
    if others := set(kinds) - {*KINDS, HEAD}:
        raise ValueError(f"trace_facts: unknown kinds {sorted(others)}; choose from {', '.join((*KINDS, HEAD))}.")
    if twice := sorted({kind for kind in kinds if kinds.count(kind) > 1}):
        raise ValueError(f"trace_facts: the kinds {twice} are given more than once; name each once.")
    if not facts:
        raise ValueError("trace_facts: there are no facts to trace; known_facts(lm, facts) finds some.")
    store = opened(store)
    if store:
        store.check_writable()
    check_verified(lm, "trace_facts")
    settings = TraceSettings(corruption, samples, window, seed, max_rows, direction)
    settings = replace(settings, corruption=settings.corruption.measured(lm))
    pairs = [x for x in facts if isinstance(x, SwapPair)]
    if corruption is None and 0 < len(pairs) < len(facts):
        raise ValueError(
            f"trace_facts: {len(pairs)} of {len(facts)} facts are pairs, in whose corrupted runs the partners would stand, "
            "and noise in those of the others; give only pairs, only facts, or a corruption."
        )
    check_metric("trace_facts", metric, settings.foil or (pairs if len(pairs) == len(facts) else None))
    plan = TracePlan(kinds, settings, corruption is None, metric)
    unknown: dict[Fact | SwapPair, str] = {}
    if client is None:
        plan = replace(plan, common=lm.identity().key() if store else {})
    else:
        from rome_lab.models import Workers  # needs dask.distributed, which is an optional extra

        workers = Workers(client, lm, store)
        plan, store = replace(plan, common=workers.key), workers.store
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


@dataclass(frozen=True)
class TracePlan:
    """What is traced of every fact.

    Attributes:
        kinds: labels of `KINDS`, or "head".
        swaps: whether the partner of a pair stands in its corrupted run.
        metric: what the effects are in; all are stored.
        common: what the store's inputs of all traces have in common: the model; of no use without one.
    """

    kinds: tuple[str, ...]
    settings: TraceSettings
    swaps: bool
    metric: str
    common: Mapping[str, Json] = field(default_factory=dict)

    def settings_for(self, fact: Fact | SwapPair) -> TraceSettings:
        """The settings, with what the partner of a pair brings."""
        if isinstance(fact, Fact):
            return self.settings
        swap = {"corruption": fact.swap} if self.swaps else {}
        return replace(self.settings, **swap, foil=self.settings.foil or fact.partner.object)

    def inputs(self, lm: LanguageModel, fact: Fact | SwapPair) -> dict[str, dict[str, Json]]:
        """Label -> everything that determines this trace of the fact."""
        settings, fact = self.settings_for(fact), fact_in(fact)
        prompt = read_prompt(lm, fact)
        of_fact = {
            **self.common,
            "what": "trace",
            "code": code_version(trace_of_kind.__module__),  # of what makes a trace, not of what stores it
            "prompt": fact.prompt,
            "subject": fact.subject,
            "object": fact.object,
            "ids": prompt.ids.tolist(),
            "subject_range": list(prompt.subject_range),
            "corruption": settings.corruption.describe(lm),
            "samples": settings.samples,
            "seed": settings.seed,
            "direction": settings.direction,
            "foil": settings.foil,
        }
        windows = {"mlp": settings.window, "attn": settings.window}
        return {label: of_fact | {"label": label, "window": windows.get(label)} for label in self.kinds}


def fact_in(fact: Fact | SwapPair) -> Fact:
    """The fact itself, or that of a pair."""
    return fact if isinstance(fact, Fact) else fact.fact


def trace_fact(
    lm: LanguageModel,
    fact: Fact | SwapPair,
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
            runs = runs or run_clean_and_corrupted(
                lm, fact_in(fact), None, plan.settings_for(fact), with_heads=HEAD in plan.kinds
            )
            trace = trace_of_kind(runs, label)
            if store:
                store.save(inputs[label], *trace_record(trace))
        else:
            trace = trace_from_record(record)
        # Which relation a fact is counted with is no part of what was traced.
        traces.append(replace(trace, relation=fact_in(fact).relation).by(plan.metric))
        if each:
            each(traces[-1])
    return traces


def trace_on_workers(
    workers: Workers, facts: Sequence[Fact | SwapPair], plan: TracePlan, progress: bool
) -> dict[Fact | SwapPair, str]:
    """Have the workers trace what the store does not hold; returns the facts that the model does not know, and why."""

    def missing(fact: Fact | SwapPair, kinds: tuple[str, ...]) -> tuple[str, ...]:
        inputs = replace(plan, kinds=kinds).inputs(workers.lm, fact)
        return tuple(label for label in kinds if workers.store.load(inputs[label]) is None)

    tasks = [(fact, kinds) for fact in facts if (kinds := missing(fact, plan.kinds))]
    done = len(facts) - len(tasks)
    with tqdm(desc="tracing", unit="fact", total=len(facts), initial=done, disable=not progress) as bar:
        reasons = workers.map(partial(trace_there, plan=plan), tasks, bar)
    for (fact, kinds), reason in zip(tasks, reasons, strict=True):
        if not reason and missing(fact, kinds):
            raise RuntimeError(
                f"trace_facts: the workers have traced {fact_in(fact).prompt!r}, and it was written to "
                f"{workers.store.folder}, but is not there; see that nothing alters files in the store, and call again."
            )
    return {fact: reason for (fact, _), reason in zip(tasks, reasons, strict=True) if reason}


def trace_there(
    lm: LanguageModel, task: tuple[Fact | SwapPair, tuple[str, ...]], store: Store, plan: TracePlan
) -> str | None:
    """On a worker: trace some kinds of one fact into the store; returns why the model does not know it, or None."""
    fact, kinds = task
    try:
        trace_fact(lm, fact, store, replace(plan, kinds=kinds))
    except UnknownFactError as reason:
        return str(reason)
    return None


def trace_record(trace: Trace) -> tuple[dict[str, np.ndarray], dict[str, Json]]:
    """A trace as arrays and JSON."""
    readings = {"probability": trace.read("probability"), **trace.further}
    arrays = {f"{part}_{name}": getattr(x, part) for name, x in readings.items() for part in ("restored", "variance")}
    meta = asdict(replace(trace, metric="probability", further={}))
    meta |= {name: {"clean": x.clean, "corrupted": x.corrupted} for name, x in trace.further.items()}
    return arrays, {name: value for name, value in meta.items() if name not in ("p_restored", "p_variance", "further")}


def trace_from_record(record: Record) -> Trace:
    """The trace that `trace_record` took apart."""
    meta, arrays = dict(record.meta), record.arrays
    further = {
        name: Readings(**meta.pop(name), restored=arrays[f"restored_{name}"], variance=arrays[f"variance_{name}"])
        for name in TRACE_METRICS
        if name in meta
    }
    meta |= {"tokens": tuple(meta["tokens"]), "subject_range": tuple(meta["subject_range"])}
    of_p = {"p_restored": arrays["restored_probability"], "p_variance": arrays["variance_probability"]}
    return Trace(**of_p, **meta, further=further)
