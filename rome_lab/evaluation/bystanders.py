"""Which requests are met together, and what they touch: damage is measured, and neighbours are judged, elsewhere.

requests_by_case(cases, size)       the requests that are met together with each case
touched(requests)                   the names and relations in them
unrelated_to(case, requests, ...)   known facts that none of them touches
spared(case, requests)              the case without neighbours that are edited themselves
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace

from rome_lab.base import mentions, seed_from
from rome_lab.editing import Request
from rome_lab.evaluation.case import Case
from rome_lab.facts import Fact

UNRELATED = 12  # known facts that a case does not touch, of which "known" is the share that stays


def groups(cases: Iterable[Case], size: int) -> list[list[Case]]:
    """The cases in groups of at most `size`, in order, no subject twice in one group, since one key has one value."""
    found: list[list[Case]] = []
    for case in cases:
        free = (x for x in found if len(x) < size and case.fact.subject not in {other.fact.subject for other in x})
        place = next(free, None)
        if place is None:
            found.append(place := [])
        place.append(case)
    return found


def requests_by_case(cases: Iterable[Case], size: int) -> dict[str, list[Request]]:
    """Case id -> the requests that are met together with it, itself among them."""
    return {case.id: [(other.fact, other.target) for other in group] for group in groups(cases, size) for case in group}


def names_touched(requests: Iterable[Request]) -> tuple[set[str], set[str]]:
    """The subjects, objects and targets of the requests, and their relations."""
    requests = list(requests)
    names = {name for fact, target in requests for name in (fact.subject, fact.object, target)}
    return names, {fact.relation for fact, _ in requests if fact.relation is not None}


def unrelated_to(case: Case, requests: Sequence[Request], pool: Iterable[Fact], seed: int) -> tuple[Fact, ...]:
    """`UNRELATED` facts of the pool, at random by the seed and the case, that share nothing with what is edited.

    That is: neither the relation nor a name with the case and with the requests that are met together with it, nor a name
    with the case's neighbours.
    """
    names, relations = names_touched([(case.fact, case.target), *requests])
    names |= {*case.neighbour_subjects, *case.neighbour_answers}
    free = [fact for fact in pool if not {fact.subject, fact.object} & names and fact.relation not in relations]
    return tuple(sorted(free, key=lambda fact: seed_from(json.dumps([seed, case.id, fact.prompt])))[:UNRELATED])


def spared(case: Case, requests: Iterable[Request]) -> Case:
    """The case without the neighbours that mention the subject of another request: those are meant to change."""
    others = {fact.subject for fact, _ in requests} - {case.fact.subject}
    edited = [any(mentions(prompt, subject) for subject in others) for prompt in case.neighbours]

    def kept(several: Sequence[str]) -> tuple[str, ...]:
        return tuple(one for one, left_out in zip(several, edited, strict=False) if not left_out)

    return replace(
        case,
        neighbours=kept(case.neighbours),
        neighbour_answers=kept(case.neighbour_answers),
        neighbour_subjects=kept(case.neighbour_subjects),
    )
