"""Trace many facts: `trace_facts`, resumable through a store of results on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from rome_lab.base import Json, Record, Store, code_version, opened
from rome_lab.facts import Fact, Prompt, read_prompt
from rome_lab.models import LanguageModel, Workers
from rome_lab.tracing.averaging import Traces
from rome_lab.tracing.corruption import Corruption
from rome_lab.tracing.one_fact import restore
from rome_lab.tracing.runs import TraceSettings, UnknownFactError, run_clean_and_corrupted
from rome_lab.tracing.trace import KINDS, Trace

if TYPE_CHECKING:
    from distributed import Client


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
) -> Traces:
    """Trace every fact, each kind from the same clean and corrupted runs; what the store holds is not traced again.

    The severed kinds are traced at the last subject token only, which is what Figure 3 shows.

    Args:
        kinds: labels of `KINDS`: "state", "mlp", "attn", "severed-mlp", "severed-attn".
        store: folder of results; written after every fact, so that an interrupted run goes on where it was.
        progress: show a bar over the facts.
        corruption, samples, window, seed, max_rows: as in `causal_trace`.
        client: of a Dask cluster, whose workers trace what the store does not hold; see `rome_lab.models.workers`.

    Returns: Traces, in the order of the facts. Facts that `lm` does not know are left out, with a warning.

    Raises:
        ValueError: an unknown kind, no facts, or none that `lm` knows.
        OSError: the store cannot be written; found before any work is done.
        RuntimeError: the cluster has failed, and what was finished is in the store; or the store loses what it is given.
    """
    kinds, facts = tuple(kinds), list(dict.fromkeys(facts))
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"trace_facts: unknown kinds {sorted(unknown)}; choose from {', '.join(KINDS)}.")
    if not facts:
        raise ValueError("trace_facts: there are no facts to trace; known_facts(lm, facts) finds some.")
    store = opened(store)
    if store:
        store.check_writable()
    settings = TraceSettings(corruption, samples, window, seed, max_rows)
    settings = replace(settings, corruption=settings.corruption.measured(lm))
    unknown: dict[Fact, str] = {}
    if client is None:
        common = lm.identity().key() | {"corruption": settings.corruption.describe(lm)} if store else {}
    else:
        from rome_lab.models import Workers  # needs dask.distributed, which is an optional extra

        workers = Workers(client, lm, store)
        store, common = workers.store, workers.key | {"corruption": settings.corruption.describe(lm)}
        unknown = trace_on_workers(workers, facts, kinds, settings, common, progress)
    traces, skipped = [], []
    for fact in tqdm(facts, desc="tracing", unit="fact", disable=not progress or client is not None):
        if fact in unknown:
            skipped.append(unknown[fact])
            continue
        try:
            traces += trace_fact(lm, fact, kinds, settings, store, common)
        except UnknownFactError as error:
            skipped.append(str(error))
    if skipped:
        message = (
            f"trace_facts: {len(skipped)} of {len(facts)} facts are not known to {lm.name}; the first: {skipped[0]}"
        )
        if not traces:
            raise ValueError(message)
        logger.warning("%s They are left out.", message)
    return Traces(traces)


def trace_fact(
    lm: LanguageModel,
    fact: Fact,
    kinds: tuple[str, ...],
    settings: TraceSettings,
    store: Store | None,
    common: dict[str, Json],
) -> list[Trace]:
    """The traces of one fact, from the store where it has them."""
    prompt = read_prompt(lm, fact)
    traces, runs = [], None
    for label in kinds:
        inputs = trace_inputs(common, fact, prompt, label, settings)
        record = store.load(inputs) if store else None
        if record is None:
            runs = runs or run_clean_and_corrupted(lm, fact, None, settings)
            kind, severed = KINDS[label]
            trace = restore(runs, kind, severed, [prompt.subject_range[1] - 1] if severed else None)
            if store:
                store.save(inputs, *trace_record(trace))
        else:
            trace = trace_from_record(record)
        traces.append(trace)
    return traces


def trace_on_workers(
    workers: Workers,
    facts: Sequence[Fact],
    kinds: tuple[str, ...],
    settings: TraceSettings,
    common: dict[str, Json],
    progress: bool,
) -> dict[Fact, str]:
    """Have the workers trace what the store does not hold; returns the facts that the model does not know, and why."""
    asked = []
    for fact in facts:
        prompt = read_prompt(workers.lm, fact)
        inputs = {label: trace_inputs(common, fact, prompt, label, settings) for label in kinds}
        if missing := tuple(label for label in kinds if workers.store.load(inputs[label]) is None):
            asked.append((fact, missing))
    done = len(facts) - len(asked)
    with tqdm(desc="tracing", unit="fact", total=len(facts), initial=done, disable=not progress) as bar:
        said = workers.map(partial(trace_there, settings=settings, common=common), asked, bar)
    for (fact, missing), why in zip(asked, said, strict=True):
        prompt = read_prompt(workers.lm, fact)
        wanted = (trace_inputs(common, fact, prompt, label, settings) for label in missing)
        if not why and any(workers.store.load(inputs) is None for inputs in wanted):
            raise RuntimeError(
                f"trace_facts: the workers have traced {fact.prompt!r}, and it was written to {workers.store.folder}, but "
                "is not there; see that nothing removes or alters files in the store, and call again."
            )
    return {fact: why for (fact, _), why in zip(asked, said, strict=True) if why}


def trace_there(
    lm: LanguageModel,
    asked: tuple[Fact, tuple[str, ...]],
    store: Store,
    settings: TraceSettings,
    common: dict[str, Json],
) -> str | None:
    """On a worker: trace one fact, each kind into the store; returns why the model does not know it, where it does not."""
    try:
        trace_fact(lm, *asked, settings, store, common)
    except UnknownFactError as reason:
        return str(reason)
    return None


def trace_inputs(
    common: dict[str, Json], fact: Fact, prompt: Prompt, label: str, settings: TraceSettings
) -> dict[str, Json]:
    """Everything that determines one trace."""
    kind, severed = KINDS[label]
    return common | {
        "what": "trace",
        "code": code_version(restore.__module__),
        "prompt": fact.prompt,
        "subject": fact.subject,
        "object": fact.object,
        "ids": prompt.ids.tolist(),
        "subject_range": list(prompt.subject_range),
        "kind": kind,
        "severed": severed,
        "samples": settings.samples,
        "window": None if kind == "state" else settings.window,
        "seed": settings.seed,
    }


def trace_record(trace: Trace) -> tuple[dict, dict[str, Json]]:
    """A trace as arrays and JSON."""
    meta = {name: value for name, value in asdict(trace).items() if name != "p_restored"}
    return {"p_restored": trace.p_restored}, meta


def trace_from_record(record: Record) -> Trace:
    """The trace that `to_record` took apart."""
    meta = dict(record.meta)
    meta |= {"tokens": tuple(meta["tokens"]), "subject_range": tuple(meta["subject_range"])}
    return Trace(p_restored=record.arrays["p_restored"], **meta)
