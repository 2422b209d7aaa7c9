"""Many edits in one model: what they still do, and what they destroy, after 1, 3, 10, 30, 100 of them.

    many_edits(lm, cases, methods)      a row a method, number of edits, chain and case; resumable
    caption(table)                      what the numbers are of, in words

Cases are edited in chains, see `rome_lab.chains`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from rome_lab.case import Case
from rome_lab.chains import chains_of
from rome_lab.corruption import seed_from
from rome_lab.evaluation import Bench, judged_or_why, known_pool, methods_of
from rome_lab.facts import Fact
from rome_lab.judging import JudgeSettings, damage
from rome_lab.methods import Method, Proposal
from rome_lab.metrics import METRICS
from rome_lab.models import LanguageModel
from rome_lab.optimised import Optimised, Request
from rome_lab.sequence import sequence
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
    The scores ES to NM have a value for each case, nll and "known" one for each edited model, which stands in the row of
    the chain's first case, whether that could be judged or not. No neighbour is judged that another edit of the chain is
    about; a case with no other has no NS and NM. `summarise(table, ["method", "edits"])` gives the means: of scores over
    cases, of damage over models. Cases of one chain share a model, so the intervals of the scores are somewhat too narrow
    where it breaks.

    Args:
        sizes: numbers of edits.
        least: cases, at least, that each number of edits is judged on; decides how many chains there are.
        chains: chains, at least, of each number of edits.
        store: folder of results, written whenever a number of edits has been judged; v* is kept in it too, so that a chain
            that was interrupted comes quickly to where it was.
        settings: of the judging; its seed is that of the order of the cases in each chain, and no texts are written.
        unrelated: known facts, of which `KEPT` are asked about: those that the chain touches least, see `untouched`; by
            default `known_pool(lm)`. Where there are fewer, it is said in a warning.

    Returns: DataFrame: method, edits, chain, case, the metrics, judged, remark. An edit at which a method fails is left out
        of its chain and remarked on, and the chain goes on; where not one could be made, none of the cases is judged.

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
    with tqdm(total=len(methods) * sum(map(len, plan)), desc="editing", unit="edit", disable=not progress) as bar:
        for (place, chain), chosen in product(enumerate(plan), methods):
            here = [size for size in sizes if size <= len(chain)]
            for found in after_each_edit(bench, chain, here, chosen):
                rows += [{"method": chosen.name, "chain": place} | row for row in found]
                bar.update()
    table = pd.DataFrame(rows)
    metrics = [name for name in METRICS if name in table]
    return table[["method", "edits", "chain", "case", *metrics, "judged", "remark"]]


@dataclass(frozen=True, eq=False)
class State:
    """Where some edits have led.

    Attributes:
        proposal: what they come to; None where not one of them could be made.
        remarks: on each of them.
    """

    proposal: Proposal | None
    remarks: tuple[str, ...]


def after_each_edit(
    bench: Bench, chain: Sequence[Case], sizes: Collection[int], method: Method
) -> Iterator[list[dict]]:
    """For each number of edits up to the chain's length: the rows there, none where it is not one of `sizes`.

    They come from the store where it has them, and are put into it where it has not.
    """
    inputs = {size: state_inputs(bench, chain[:size], method) for size in sizes}
    records = {size: bench.store.load(x) if bench.store else None for size, x in inputs.items()}
    found = {size: list(record.meta["rows"]) for size, record in records.items() if record}
    missing = [size for size in sizes if size not in found]
    states = (at_once if method.together > 1 else in_turn)(bench, requests_of(chain), method)
    for done in range(1, len(chain) + 1):
        if done <= max(missing, default=0):
            state = next(states)
        if done in missing:
            found[done] = judge_state(bench, chain[:done], state())
            if bench.store:
                bench.store.save(inputs[done], {}, {"rows": found[done]})
        yield found.get(done, [])


def at_once(bench: Bench, requests: Sequence[Request], method: Method) -> Iterator[Callable[[], State]]:
    """For the first request, the first two, and so on: what makes the State of all these together."""

    def state(several: Sequence[Request]) -> State:
        found = bench.propose(method, several)
        if isinstance(found, str):
            return State(None, (found,) * len(several))
        return State(found, (found.remark, *[""] * (len(several) - 1)))

    for number in range(1, len(requests) + 1):
        yield partial(state, requests[:number])


def in_turn(bench: Bench, requests: Sequence[Request], method: Method) -> Iterator[Callable[[], State]]:
    """For the first request, the first two, and so on: the State of these, each an edit of the model with those before.

    Where a method fails, as it may in a broken model, its edit is left out.
    """
    remarks: list[str] = []
    made = False
    for proposal in sequence(bench.lm, requests, method, bench.optimised):
        remarks.append(proposal.remark)
        made = made or not proposal.failed
        state = State(proposal if made else None, tuple(remarks))
        yield lambda state=state: state


def judge_state(bench: Bench, chain: Sequence[Case], state: State) -> list[dict]:
    """A row a case of the chain, all of them edited; the first one also has the damage, whether it can be judged or not."""
    rows = [{"edits": len(chain), "case": case.id, "judged": False} for case in chain]
    if state.proposal is None:
        return [row | {"remark": remark} for row, remark in zip(rows, state.remarks, strict=True)]
    requests = requests_of(chain)
    settings = replace(bench.settings, known=(), text_tokens=0)
    for row, case, remark in zip(rows, chain, state.remarks, strict=True):
        (found,) = judged_or_why(bench.lm, [(spared(case, requests), settings, state.proposal)])
        found.pop("generations", None)
        row |= found | {"remark": said(remark, "" if found["judged"] else found["remark"])}
    try:
        rows[0] |= damage(bench.lm, state.proposal, replace(bench.settings, known=asked_about(chain, bench)))
    except ValueError as error:
        rows[0]["remark"] = said(rows[0]["remark"], str(error))
    return rows


def said(*remarks: str) -> str:
    """Remarks in one line, each once."""
    return "; ".join(dict.fromkeys(remark for remark in remarks if remark))


def asked_about(chain: Sequence[Case], bench: Bench) -> tuple[Fact, ...]:
    """`untouched`, with a warning where they are fewer than they should be."""
    known = untouched(chain, bench)
    if bench.pool and len(known) < KEPT:
        logger.warning(
            "many_edits: after %d edits %d known facts are asked about, not %d, since the other %d of those given name an "
            "edited subject; give more.", len(chain), len(known), KEPT, len(bench.pool) - len(known),
        )  # fmt: skip
    return known


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
    """How many cases and models stand behind each number of edits, and what could not be judged, as lines for a figure."""
    counted = table.groupby("edits")[["case", "chain"]].nunique()
    said = [f"{cases} in {models} after {edits}" for edits, cases, models in counted.itertuples()]
    alone = [str(edits) for edits, models in counted["chain"].items() if models == 1]
    sentences = [f"Cases, and models that they are in: {', '.join(said)}."]
    if alone:
        sentences.append(f"One model has no interval of perplexity and known: after {', '.join(alone)}.")
    lost = table[~table["judged"]].groupby(["method", "edits"], sort=False).size()
    sentences += [f"{n} cases of {method} could not be judged after {edits}." for (method, edits), n in lost.items()]
    if "nll" in table:
        damaged = table.groupby(["method", "edits", "chain"], sort=False)["nll"].count()
        broken = damaged[damaged == 0].groupby(["method", "edits"], sort=False).size()
        sentences += [
            f"{n} models of {method} have no perplexity after {edits}." for (method, edits), n in broken.items()
        ]
    return "\n".join(sentences)
