"""The room of many_edits.ipynb: many edits in one model, and what becomes of it.

    cases_needed(sizes, ...)         how many cases it takes that no two chains share one
    chains_of(cases, sizes, ...)     the cases of each chain
    changes_in_turn(lm, requests, ...)    one change after the other, each found on the model with all before it
    judge_chains(lm, cases, ...)     a row a method, number of edits, chain and case: does the edit hold, what is damaged?
    judge_unedited(lm, cases, settings)   the same of no edits
    caption(table)                   how many cases and models stand behind each number of edits
    where_it_breaks(summary)         from which number of edits on S is below half of what it was
    norms_by_layer(table)            how far each edited matrix has grown
    curve_panels, plotted_numbers    a summary along the number of edits, drawn and written; see `studies.evaluation`
    scores_of(summary)               the scores that it has

A chain is a sequence of cases whose edits come into one model. There are many short chains and few long ones, so that
every number of edits is judged on enough cases.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from rome_lab.base import Json, MeanCI, Store, code_version, mean_ci, opened, seed_from
from rome_lab.editing import Method, Optima, Proposal, Request, settle
from rome_lab.evaluation import (
    METRICS,
    PASSAGES,
    Bench,
    Case,
    JudgeSettings,
    damage,
    evaluate,
    judged_or_why,
    methods_of,
    names_touched,
    spared,
)
from rome_lab.facts import Fact
from rome_lab.models import Change, LanguageModel
from rome_lab.studies.evaluation import curve_panels, plotted_numbers, scores_of  # noqa: F401  of this room's front door

logger = logging.getLogger(__name__)


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
        first_of_each: dict[str, Case] = {}
        for case in order:
            first_of_each.setdefault(case.fact.subject, case)
        chain = list(first_of_each.values())[:length]
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


def changes_in_turn(
    lm: LanguageModel, requests: Sequence[Request], method: Method, optima: Optima | None = None
) -> Iterator[Proposal]:
    """One change after the other, each found on the model with all before it in place.

    C and the prefixes are measured once, on the model as it is. `lm` is changed only while the next change is found:
    between two of them, and after the last, after an exception too, it is bit for bit what it was.

    Args:
        optima: for `lm` as it is; a new one that stores nothing by default.

    Yields: after each request the sum of the changes so far, with the remark of the last one. Where a change comes to
        nothing, or the method fails with a ValueError, the sum stays as it was.
    """
    optima = optima or Optima(lm)
    method = method.settled(lm)
    single = method.unfinished() if hasattr(method, "unfinished") else method
    total = Proposal()
    for request in requests:
        # The first change that needs C or the prefixes finds nothing in place yet: they are those of `lm` as it is.
        try:
            with total.applied(lm):
                change = single.change(lm, [request], optima.anew(total.keys))
        except ValueError as error:
            change = Proposal(remark=str(error), failed=True)
        total = total.followed_by(change)
        yield total if single is method else method.finished(lm, total)


SIZES = (1, 3, 10, 30, 100)
ASKED_AFTER_EDITS = 50  # known facts, of which "known" is the share that stays


def judge_chains(
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
    The scores ES to NM have a value for each case; nll, "known" and "norm" one for each edited model, which stands in the
    row of the chain's first case, whether that could be judged or not; `norms` has that of each matrix, by layer. No
    neighbour is judged that another edit of the chain is about; a case with no other has no NS and NM.
    `summarise(table, ["method", "edits"])` gives the means. Cases of one chain share a model, so all intervals are over
    models, and there is none of one model.

    Args:
        sizes: numbers of edits.
        least: cases, at least, that each number of edits is judged on; decides how many chains there are.
        chains: chains, at least, of each number of edits.
        store: folder of results, written whenever a number of edits has been judged; v* is kept in it too, so that a chain
            that was interrupted comes quickly to where it was.
        settings: of the judging; its seed is that of the order of the cases in each chain, and no texts are drawn. By
            default the model neither writes nor chooses.
        unrelated: known facts, of which `ASKED_AFTER_EDITS` are asked about: those that the chain touches least, see
            `untouched`; by default `known_pool(lm)`. Where there are fewer, it is said in a warning.

    Returns: DataFrame: method, edits, chain, case, the metrics, norms, judged, remark. An edit at which a method fails is
        left out of its chain and remarked on, and the chain goes on; where not one could be made, no case is judged.

    Raises:
        ValueError: no cases, fewer than the least of `sizes`, an unknown method, or one that does not fit the model.
        OSError: the store cannot be written; found before any work is done.
    """
    settings = replace(settings or JudgeSettings(written_tokens=0, choose=False), new_tokens=0)
    plan = chains_of(cases, sizes, least, chains, settings.seed)
    store = opened(store)
    if store:
        store.check_writable()
    methods = settle(lm, methods_of(method), [case for chain in plan for case in chain], store, progress)
    bench = Bench.set_up(lm, settings, unrelated, store, progress)
    rows: list[dict] = []
    with tqdm(total=len(methods) * sum(map(len, plan)), desc="editing", unit="edit", disable=not progress) as bar:
        for (place, chain), chosen in product(enumerate(plan), methods):
            here = [size for size in sizes if size <= len(chain)]
            for judged in after_each_edit(bench, chain, here, chosen):
                rows += [{"method": chosen.name, "chain": place} | row for row in judged]
                bar.update()
    table = pd.DataFrame(rows)
    kept = [name for name in (*METRICS, "norms") if name in table]
    return table[["method", "edits", "chain", "case", *kept, "judged", "remark"]]


def judge_unedited(
    lm: LanguageModel, cases: Iterable[Case], settings: JudgeSettings, store: Store | str | Path | None = None
) -> pd.DataFrame:
    """Rows of no edits to set beside `judge_chains`: those of "none" by `evaluate`, nll over all passages and a norm."""
    table = evaluate(lm, cases, "none", store=store, settings=replace(settings, text_tokens=0)).assign(edits=0)
    settings = replace(settings, known=(), passages=range(len(PASSAGES)))
    return table.assign(**damage(lm, Change(), settings), norm=1.0)


@dataclass(frozen=True, eq=False)
class EditedState:
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
    rows = {size: result["rows"] for size, x in inputs.items() if (result := bench.stored(x))}
    missing = [size for size in sizes if size not in rows]
    states = (at_once if method.together > 1 else in_turn)(bench, requests_of(chain), method)
    for done in range(1, len(chain) + 1):
        if done <= max(missing, default=0):
            state = next(states)
        if done in missing:
            rows[done] = judge_state(bench, chain[:done], state())
            bench.keep(inputs[done], {"rows": rows[done]})
        yield rows.get(done, [])


def at_once(bench: Bench, requests: Sequence[Request], method: Method) -> Iterator[Callable[[], EditedState]]:
    """For the first request, the first two, and so on: what makes the state of all these together."""

    def state(several: Sequence[Request]) -> EditedState:
        proposal = bench.propose(method, several)
        if isinstance(proposal, str):
            return EditedState(None, (proposal,) * len(several))
        return EditedState(proposal, (proposal.remark, *[""] * (len(several) - 1)))

    for number in range(1, len(requests) + 1):
        yield partial(state, requests[:number])


def in_turn(bench: Bench, requests: Sequence[Request], method: Method) -> Iterator[Callable[[], EditedState]]:
    """For the first request, the first two, and so on: the state of these, each an edit of the model with those before.

    Where a method fails, as it may in a broken model, its edit is left out.
    """
    remarks: list[str] = []
    any_edit = False
    for proposal in changes_in_turn(bench.lm, requests, method, bench.optima):
        remarks.append(proposal.remark)
        any_edit = any_edit or not proposal.failed
        state = EditedState(proposal if any_edit else None, tuple(remarks))
        yield lambda state=state: state


def judge_state(bench: Bench, chain: Sequence[Case], state: EditedState) -> list[dict]:
    """A row a case of the chain, all of them edited; the first one also has the damage, whether it can be judged or not."""
    rows = [{"edits": len(chain), "case": case.id, "judged": False} for case in chain]
    if state.proposal is None:
        return [row | {"remark": remark} for row, remark in zip(rows, state.remarks, strict=True)]
    requests = requests_of(chain)
    norms = grown(bench.lm, state.proposal)
    if norms:
        rows[0] |= {"norm": max(norms.values()), "norms": norms}
    settings = replace(bench.settings, known=(), text_tokens=0)
    for row, case, remark in zip(rows, chain, state.remarks, strict=True):
        (marks,) = judged_or_why(bench.lm, [(spared(case, requests), settings, state.proposal)])
        marks.pop("generations", None)
        row |= marks | {"remark": joined_remarks(remark, "" if marks["judged"] else marks["remark"])}
    try:
        settings = replace(bench.settings, known=asked_about(chain, bench), passages=range(len(PASSAGES)))
        rows[0] |= damage(bench.lm, state.proposal, settings)
    except ValueError as error:
        rows[0]["remark"] = joined_remarks(rows[0]["remark"], str(error))
    return rows


def grown(lm: LanguageModel, change: Change) -> dict[str, float]:
    """|W + delta| / |W|, Frobenius norms, of each matrix that a change edits, by its layer, as JSON has it."""
    return {
        str(layer): float((W + delta.to(W)).norm() / W.norm())
        for layer, delta in change.deltas.items()
        for W in [lm.weight(layer).detach().double()]
    }


def joined_remarks(*remarks: str) -> str:
    """Remarks in one line, each once."""
    return "; ".join(dict.fromkeys(remark for remark in remarks if remark))


def asked_about(chain: Sequence[Case], bench: Bench) -> tuple[Fact, ...]:
    """`untouched`, with a warning where they are fewer than they should be."""
    known = untouched(chain, bench)
    if bench.pool and len(known) < ASKED_AFTER_EDITS:
        logger.warning(
            "many_edits: after %d edits %d known facts are asked about, not %d, since the other %d of those given name an "
            "edited subject; give more.", len(chain), len(known), ASKED_AFTER_EDITS, len(bench.pool) - len(known),
        )  # fmt: skip
    return known


def requests_of(chain: Sequence[Case]) -> list[Request]:
    return [(case.fact, case.target) for case in chain]


def untouched(chain: Sequence[Case], bench: Bench) -> tuple[Fact, ...]:
    """`ASKED_AFTER_EDITS` facts of the pool, at random by the seed, that share nothing with the chain.

    Many edits touch all relations. Where there are too few other facts, such follow as share a relation with the chain,
    and then such as share an object or a target. None has an edited subject.
    """
    names, relations = names_touched(requests_of(chain))
    edited = {case.fact.subject for case in chain}

    def rank(fact: Fact) -> tuple[bool, bool, int]:
        at_random = seed_from(json.dumps([bench.settings.seed, fact.prompt]))
        return bool({fact.subject, fact.object} & names), fact.relation in relations, at_random

    free = (fact for fact in bench.pool if not {fact.subject, fact.object} & edited)
    return tuple(sorted(free, key=rank)[:ASKED_AFTER_EDITS])


def state_inputs(bench: Bench, chain: Sequence[Case], method: Method) -> dict[str, Json]:
    """Everything that determines the rows of one method after the edits of `chain`."""
    return {
        **bench.common,
        "what": "many_edits",
        "code": code_version(__name__),
        "cases": [asdict(case) for case in chain],
        "settings": asdict(replace(bench.settings, known=untouched(chain, bench))),
        "method": method.describe(),
        "together": method.together > 1,
    }


def caption(table: pd.DataFrame) -> str:
    """How many cases and models stand behind each number of edits, and what could not be judged, as lines for a figure."""
    counted = table.groupby("edits")[["case", "chain"]].nunique()
    counts = [f"{cases} in {models} after {edits}" for edits, cases, models in counted.itertuples()]
    alone = [str(edits) for edits, models in counted["chain"].items() if models == 1]
    sentences = [f"Cases, and models that they are in: {', '.join(counts)}."]
    if alone:
        sentences.append(f"One model has no interval: after {', '.join(alone)}.")
    lost = table[~table["judged"]].groupby(["method", "edits"], sort=False).size()
    sentences += [f"{n} cases of {method} could not be judged after {edits}." for (method, edits), n in lost.items()]
    if "nll" in table:
        damaged = table.groupby(["method", "edits", "chain"], sort=False)["nll"].count()
        broken = damaged[damaged == 0].groupby(["method", "edits"], sort=False).size()
        sentences += [
            f"{n} models of {method} have no perplexity after {edits}." for (method, edits), n in broken.items()
        ]
    return "\n".join(sentences)


def norms_by_layer(table: pd.DataFrame) -> pd.DataFrame:
    """How far each edited matrix has grown, with 95% t-intervals over the models of each number of edits.

    Args: table: what `judge_chains` returns.

    Returns: DataFrame: method, edits, layer, mean, ci_low, ci_high, n (models); a method that edits no matrix has no row.
    """
    by = ["method", "edits", "layer"]
    with_norms = table.dropna(subset="norms") if "norms" in table else table.head(0).assign(norms=None)
    rows = [
        (method, edits, int(layer), norm)
        for method, edits, norms in zip(with_norms["method"], with_norms["edits"], with_norms["norms"], strict=True)
        for layer, norm in norms.items()
    ]
    groups = pd.DataFrame(rows, columns=[*by, "norm"]).groupby(by, sort=False)["norm"]
    means = [(*key, *mean_ci(norms.to_numpy(float))) for key, norms in groups]
    return pd.DataFrame(means, columns=[*by, *MeanCI._fields])


def where_it_breaks(summary: pd.DataFrame) -> str:
    """A line for each method that edits: S at both ends, and from which number of edits on it is below half of the first.

    Args: summary: what `summarise(table, ["method", "edits"])` gives of `judge_chains`; rows of no edits are passed over.
        Where there is no S, it is the first of the scores that there are, of zsRE efficacy.
    """
    score = next(iter(scores_of(summary)), "S")
    rows = summary[(summary["metric"] == score) & (summary["edits"] > 0)].sort_values("edits")
    lines = []
    for method, points in rows.groupby("method", sort=False):
        first, last = points.iloc[0], points.iloc[-1]
        low, sure = (points.loc[points[bound] < first["mean"] / 2, "edits"].min() for bound in ("mean", "ci_high"))
        since = "never" if pd.isna(low) else str(low)
        untold = "never" if points["ci_high"].notna().all() else "one model does not tell"
        surely = untold if pd.isna(sure) else str(sure)
        lines.append(
            f"{method}: {score} {first['mean']:.1f} after {first['edits']}, {last['mean']:.1f} after {last['edits']} edits; "
            f"mean below half from: {since}; whole interval from: {surely}"
        )
    return "\n".join(lines)
