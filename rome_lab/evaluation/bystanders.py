"""Which requests are met together, and what they touch: damage is measured, and neighbours are judged, elsewhere.

requests_by_case(cases, size)       the requests that are met together with each case
names_touched(requests)             the names and relations in them
known_pool(lm)                      known facts, from which those are drawn that a case does not touch
unrelated_to(case, requests, ...)   known facts that none of them touches
text_about_others(lm, cases)        text for C that is about none of whom they are judged by
spared(case, requests)              the case without neighbours that are edited themselves
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from rome_lab.base import Store, mentions, seed_from
from rome_lab.editing import Request, SampledText
from rome_lab.facts import Case, Fact, facts_said_at_once, load_facts
from rome_lab.models import LanguageModel

POOL = 250  # known facts, among which those are chosen that a case does not touch
POOL_SEED = -1  # which no evaluation has: facts drawn by its own seed would be those of its cases
UNRELATED = 12  # known facts that a case does not touch, of which "known" is the share that stays


def groups(cases: Iterable[Case], size: int) -> list[list[Case]]:
    """The cases in groups of at most `size`, in order, no subject twice in one group, since one key has one value."""
    several: list[list[Case]] = []
    for case in cases:
        free = (x for x in several if len(x) < size and case.fact.subject not in {other.fact.subject for other in x})
        place = next(free, None)
        if place is None:
            several.append(place := [])
        place.append(case)
    return several


def requests_by_case(cases: Iterable[Case], size: int) -> dict[str, list[Request]]:
    """Case id -> the requests that are met together with it, itself among them."""
    return {case.id: [(other.fact, other.target) for other in group] for group in groups(cases, size) for case in group}


def names_touched(requests: Iterable[Request]) -> tuple[set[str], set[str]]:
    """The subjects, objects and targets of the requests, and their relations."""
    requests = list(requests)
    names = {name for fact, target in requests for name in (fact.subject, fact.object, target)}
    return names, {fact.relation for fact, _ in requests if fact.relation is not None}


def known_pool(
    lm: LanguageModel, store: Store | str | Path | None = None, progress: bool = True, n: int = POOL
) -> tuple[Fact, ...]:
    """Embedded facts whose object comes first to the model, as "known" asks: the same ones whatever it is evaluated on."""
    return facts_said_at_once(lm, load_facts("embedded"), n, POOL_SEED, progress, store)


def text_about_others(lm: LanguageModel, cases: Iterable[Case], store: Store | str | Path | None = None) -> SampledText:
    """Text to measure C on that begins with no subject by which these cases are judged.

    Left out are the subjects of the cases, of their neighbours and of `known_pool(lm)`. Where C is measured on text about
    them, it spares them in particular: of what C gains in NS about half was that.
    """
    judged = {name for case in cases for name in (case.fact.subject, *case.neighbour_subjects)}
    return SampledText(without=(*judged, *(fact.subject for fact in known_pool(lm, store))))


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
        return tuple(text for text, left_out in zip(several, edited, strict=False) if not left_out)

    lists = ("neighbours", "neighbour_answers", "neighbour_subjects")
    return replace(case, **{name: kept(getattr(case, name)) for name in lists})
