"""Many edits in one model: what they still do, and what they destroy, after 1, 3, 10, 30, 100 of them.

    many_edits(lm, cases, methods)      a row a method, number of edits, chain and case; resumable
    chains_of(cases, sizes, ...)        which cases are edited one after the other
    cases_needed(sizes, ...)            how many cases it takes that no two chains share one
    caption(table)                      what the numbers are of, in words

A chain is a sequence of cases whose edits come into one model. There are many short chains and few long ones, so that
every number of edits is judged on enough cases.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from rome_lab.case import Case
from rome_lab.corruption import seed_from
from rome_lab.evaluation import Bench, judged_or_why, known_pool, methods_of
from rome_lab.facts import Fact
from rome_lab.judging import JudgeSettings
from rome_lab.methods import Method, Proposal, sequence
from rome_lab.metrics import METRICS
from rome_lab.models import LanguageModel
from rome_lab.optimised import Optimised, Request
from rome_lab.store import Json, Store
from rome_lab.touched import spared, touched

logger = logging.getLogger(__name__)

NUMERICS = 2  # raised when a change here or in judging moves any number, so that stored results are made again
SIZES = (1, 3, 10, 30, 100)
KEPT = 50  # known facts, of which "known" is the share that stays


def many_edits(
    lm: LanguageModel,
    cases: Iterable[Case],
    method: str | Method | Sequence[str | Method] = ("rome", "joint", "ft-linf"),
    sizes: Sequence[int] = SIZES,
    *,
    least: int = 30,
    chains: int = 1,
    store: Store | str | Path | None = None,
    progress: bool = True,
    settings: JudgeSettings | None = None,
    unrelated: Sequence[Fact] | None = None,
) -> pd.DataFrame:
    """Edit case after case in one model, and judge all of them so far at each of `sizes`, without generation.

    A method whose `together` is above 1 is given all requests at once; the others edit what the edits before have made.
    No neighbour is judged that another edit of the chain is about; a case with no other neighbour has no NS and NM.
    The scores ES to NM have a value for each case, nll and "known" one for each edited model, which stands in the row of
    the chain's first case. `summarise(table, ["method", "edits"])` gives the means: of scores over cases, of damage over
    models. Cases of one chain share a model, so the intervals of the scores are somewhat too narrow where it breaks.

    Args:
        sizes: numbers of edits.
        least: cases, at least, that each number of edits is judged on; decides how many chains there are.
        chains: chains, at least, of each number of edits.
        store: folder of results, written whenever a number of edits has been judged; v* is kept in it too, so that a chain
            that was interrupted comes quickly to where it was.
        settings: of the judging; its seed is that of the order of the cases in each chain, and no texts are written.
        unrelated: known facts, of which `KEPT` are asked about: those that the chain touches least, see `untouched`; by
            default `known_pool(lm)`. Where there are fewer, it is said in a warning.

    Returns: DataFrame: method, edits, chain, case, the metrics, judged, remark.

    Raises:
        ValueError: no cases, fewer than the least of `sizes`, an unknown method, or one that does not fit the model.
        OSError: the store cannot be written; found before any work is done.
    """
    methods = [chosen.settled(lm) for chosen in methods_of(method)]
    settings = replace(settings or JudgeSettings(), new_tokens=0)
    plan = chains_of(cases, sizes, least, chains, settings.seed)
    store = Store(store) if isinstance(store, str | Path) else store
    if store:
        store.check_writable()
    pool = known_pool(lm, store, progress) if unrelated is None else tuple(unrelated)
    bench = Bench(lm, settings, pool, Optimised(lm, store, progress), store, dict(lm.key) if store else {})
    rows: list[dict] = []
    total, ends = len(methods) * sum(map(len, plan)), 0
    with tqdm(total=total, desc="editing", unit="edit", disable=not progress) as bar:
        for (place, chain), chosen in product(enumerate(plan), methods):
            here = [size for size in sizes if size <= len(chain)]
            found = chain_rows(bench, chain, here, chosen, bar)
            rows += [{"method": chosen.name, "chain": place} | row for row in found]
            ends += len(chain)
            bar.update(ends - bar.n)  # what the store held, too
    table = pd.DataFrame(rows)
    metrics = [name for name in METRICS if name in table]
    return table[["method", "edits", "chain", "case", *metrics, "judged", "remark"]]


def chains_of(
    cases: Iterable[Case], sizes: Sequence[int], least: int = 30, chains: int = 1, seed: int = 0
) -> list[list[Case]]:
    """The cases of each chain in the order in which they are edited, long chains first; no subject twice in one chain.

    There are max(chains, least / size) chains of at least each size. A size for which there are too few subjects is left
    out, with a warning. No case is in two chains as long as there are cases that are in none; where there are too few,
    those come again first that are judged least often, with a warning.
    """
    cases = list(cases)
    subjects = len({case.fact.subject for case in cases})
    possible = [size for size in sizes if 1 <= size <= subjects]
    if not possible:
        raise ValueError(
            f"many_edits: {len(cases)} cases of {subjects} subjects are too few for {', '.join(map(str, sizes)) or 'no'} "
            "edits; give more cases or smaller sizes."
        )
    if len(possible) < len(sizes):
        logger.warning("many_edits: there are cases of %d subjects, so at most as many edits are made", subjects)
    plan: list[list[Case]] = []
    share: Counter[str] = Counter()  # of each case in what is judged so far
    for length in lengths_of(possible, least, chains):
        rank = {case.id: seed_from(json.dumps(["chain", seed, len(plan), case.id])) for case in cases}
        order = sorted(cases, key=lambda case: (share[case.id], rank[case.id]))
        first_of_each = {case.fact.subject: case for case in reversed(order)}
        chain = list(first_of_each.values())[::-1][:length]
        share.update({case.id: sum(1 / size for size in possible if place < size) for place, case in enumerate(chain)})
        plan.append(chain)
    places = Counter(case.id for chain in plan for case in chain)
    if again := sum(times > 1 for times in places.values()):
        logger.warning(
            "many_edits: the chains take %d cases, and there are %d: %d of them are in more than one chain, so the "
            "intervals are too narrow; give cases_needed(sizes, least, chains) cases, or a smaller least.",
            places.total(), len(cases), again,
        )  # fmt: skip
    return plan


def cases_needed(sizes: Sequence[int], least: int = 30, chains: int = 1) -> int:
    """How many cases `chains_of` takes, each for one chain; somewhat more where several are about one subject.

    >>> cases_needed((1, 3), least=4)  # two chains of three, and two of one
    8
    """
    return sum(lengths_of(sizes, least, chains))


def lengths_of(sizes: Sequence[int], least: int, chains: int) -> list[int]:
    """The length of each chain, the longest first, so that each size is reached by max(chains, least / size) of them."""
    wanted = {size: max(chains, -(-least // size)) for size in sizes}
    return [max(size for size in sizes if wanted[size] > place) for place in range(max(wanted.values()))]


def chain_rows(bench: Bench, chain: Sequence[Case], sizes: Sequence[int], method: Method, bar: tqdm) -> list[dict]:
    """The rows of one method at each of `sizes`, from the store where it has them."""
    inputs = {size: state_inputs(bench, chain[:size], method) for size in sizes}
    records = {size: bench.store.load(x) if bench.store else None for size, x in inputs.items()}
    found = {size: list(record.meta["rows"]) for size, record in records.items() if record}
    missing = [size for size in sizes if size not in found]
    for size, proposal, remarks in states(bench, chain, missing, method, bar):
        found[size] = judge_state(bench, chain[:size], proposal, remarks)
        if bench.store:
            bench.store.save(inputs[size], {}, {"rows": found[size]})
    return [row for size in sizes for row in found[size]]


def states(
    bench: Bench, chain: Sequence[Case], sizes: Sequence[int], method: Method, bar: tqdm
) -> Iterator[tuple[int, Proposal, list[str]]]:
    """At each of `sizes`: the number of edits, what they come to, and a remark for each of them.

    Where a method fails in the middle of a chain, as it may in a broken model, the chain ends there: what is judged at
    larger sizes is the model as it was before, and the edits that are missing are remarked on.
    """
    requests = requests_of(chain[: max(sizes, default=0)])
    if method.together > 1:
        for size in sizes:
            try:
                proposal = method.change(bench.lm, requests[:size], bench.optimised)
            except ValueError as error:
                proposal = Proposal(remark=str(error))
            yield size, proposal, [proposal.remark] + [""] * (size - 1)
        return
    proposal, remarks, failure = Proposal(), [], ""
    steps = sequence(bench.lm, requests, method, bench.optimised)
    for done in range(1, len(requests) + 1):
        try:
            proposal = proposal if failure else next(steps)
        except ValueError as error:
            failure = str(error)
        remarks.append(failure or proposal.remark)
        bar.update()
        if done in sizes:
            yield done, proposal, list(remarks)


def judge_state(bench: Bench, chain: Sequence[Case], proposal: Proposal, remarks: Sequence[str]) -> list[dict]:
    """A row a case of the chain, all of them edited; the first one also has the damage."""
    known = untouched(chain, bench)
    if bench.pool and len(known) < KEPT:
        logger.warning(
            "many_edits: after %d edits %d known facts are asked about, not %d, since the other %d of those given name an "
            "edited subject; give more.", len(chain), len(known), KEPT, len(bench.pool) - len(known),
        )  # fmt: skip
    settings = replace(bench.settings, known=known)
    requests = requests_of(chain)
    rows = []
    for case, remark in zip(chain, remarks, strict=True):
        (row,) = judged_or_why(bench.lm, (spared(case, requests), settings), [proposal])
        row.pop("generations", None)
        said = remark if row["judged"] else row["remark"]
        rows.append({"edits": len(chain), "case": case.id} | row | {"remark": said})
        settings = replace(bench.settings, known=(), text_tokens=0)
    return rows


def requests_of(chain: Sequence[Case]) -> list[Request]:
    return [(case.fact, case.target) for case in chain]


def untouched(chain: Sequence[Case], bench: Bench) -> tuple[Fact, ...]:
    """`KEPT` facts of the pool, at random by the seed, that share nothing with the chain.

    Many edits touch all relations. Where there are too few other facts, such follow as share a relation with the chain,
    and then such as share an object or a target. None has an edited subject.
    """
    names, relations = touched(requests_of(chain))
    edited = {case.fact.subject for case in chain}

    def rank(fact: Fact) -> tuple[bool, bool, int]:
        at_random = seed_from(json.dumps([bench.settings.seed, fact.prompt]))
        return bool({fact.subject, fact.object} & names), fact.relation in relations, at_random

    free = (fact for fact in bench.pool if not {fact.subject, fact.object} & edited)
    return tuple(sorted(free, key=rank)[:KEPT])


def state_inputs(bench: Bench, chain: Sequence[Case], method: Method) -> dict[str, Json]:
    """Everything that determines the rows of one method after the edits of `chain`."""
    return {
        **bench.common,
        "what": "many_edits",
        "numerics": NUMERICS,
        "cases": [asdict(case) for case in chain],
        "settings": asdict(replace(bench.settings, known=untouched(chain, bench))),
        "method": method.describe(),
        "together": method.together > 1,
    }


def caption(table: pd.DataFrame) -> str:
    """How many cases and models stand behind each number of edits, in sentences for a figure."""
    counted = table.groupby("edits")[["case", "chain"]].nunique()
    said = [f"{cases} in {models} after {edits}" for edits, cases, models in counted.itertuples()]
    alone = [str(edits) for edits, models in counted["chain"].items() if models == 1]
    sentences = [f"Cases, and models that they are in: {', '.join(said)}."]
    if alone:
        sentences.append(f"One model has no interval of perplexity and known: after {', '.join(alone)}.")
    return "\n".join(sentences)
