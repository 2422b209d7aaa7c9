"""Which cases are edited one after the other, in one model.

    chains_of(cases, sizes, ...)    the cases of each chain
    cases_needed(sizes, ...)        how many cases it takes that no two chains share one

A chain is a sequence of cases whose edits come into one model. There are many short chains and few long ones, so that
every number of edits is judged on enough cases.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence

from rome_lab.case import Case
from rome_lab.corruption import seed_from

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
