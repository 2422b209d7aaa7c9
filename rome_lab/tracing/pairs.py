"""Pairs of facts for symmetric token replacement: `swap_pairs` finds partners whose subjects can stand in one place.

Source: Zhang and Nanda 2024, arXiv 2309.16042.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from rome_lab.base import Store, check_whole, seed_from
from rome_lab.facts import Fact, known_among, known_facts, object_token, read_prompt
from rome_lab.models import LanguageModel
from rome_lab.tracing.corruption import SubjectSwap

logger = logging.getLogger(__name__)

AT_ONCE = 8  # partners asked of the model together


class SwapPair(NamedTuple):
    """A fact, and another of the same relation in the same words, whose subject has as many tokens; the model knows both."""

    fact: Fact
    partner: Fact

    @property
    def swap(self) -> SubjectSwap:
        """The corruption that puts the partner's subject in the place of the fact's."""
        return SubjectSwap(self.partner.subject, self.partner.object)


@dataclass(frozen=True, repr=False)
class SwapPairs(Sequence[SwapPair]):
    """Pairs in random order.

    Attributes:
        known: how many known facts were gone through for them.
        alone: those of them that no partner fits.
    """

    pairs: tuple[SwapPair, ...]
    known: int
    alone: tuple[Fact, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int | slice) -> SwapPair | tuple[SwapPair, ...]:
        return self.pairs[index]

    def __repr__(self) -> str:
        return f"SwapPairs({len(self)} pairs of {self.known} known facts; {len(self.alone)} without a partner)"


def swap_pairs(
    lm: LanguageModel,
    facts: Iterable[Fact],
    n: int | None = 100,
    seed: int = 0,
    *,
    progress: bool = True,
    store: Store | str | Path | None = None,
) -> SwapPairs:
    """Facts that `lm` knows, each with a partner that can stand in its place, drawn by the seed.

    The partner is another subject of the same relation, with another object (whose first token differs), that makes as many
    tokens in the fact's own prompt and leaves its other tokens as they are; there the model has to go on with the
    partner's object. Every fact is in one pair at most as the fact, in as many as it may be as the partner.

    Args:
        facts: any, with their relations; those without one have no partner.
        n: pairs; None for all that there are. Where there are fewer, all of them are returned, with a warning.
        seed: decides the order of the facts and which partner is taken.
        progress, store: of the search for known facts, see `known_facts`.

    Raises:
        ValueError: no facts, or none that the model knows has a partner.
    """
    if n is not None:
        check_whole("swap_pairs", n=(n, 1))
    given = list(dict.fromkeys(facts))
    pairs, alone = {}, []
    for size in (None,) if n is None else (2 * n, None):  # a larger sample begins with the smaller one
        known = known_facts(lm, given, size, seed, progress=progress, store=store)
        for fact in known[len(pairs) + len(alone) :]:
            if len(pairs) == n:
                break
            partner = partner_of(lm, fact, given, seed)
            pairs |= {fact: partner} if partner else {}
            alone += [] if partner else [fact]
        if len(pairs) == n or (size is not None and len(known) < size):  # of all facts, no more are known
            break
    tried = len(pairs) + len(alone)
    if not pairs:
        raise ValueError(
            f"swap_pairs: none of the {tried} facts that {lm.name} knows has a partner of as many subject tokens; give more "
            "facts of the same relations."
        )
    if n is not None and len(pairs) < n:
        logger.warning("swap_pairs: of %d known facts only %d have a partner; %d were asked for", tried, len(pairs), n)
    return SwapPairs(tuple(SwapPair(*pair) for pair in pairs.items()), tried, tuple(alone))


def partner_of(lm: LanguageModel, fact: Fact, facts: Sequence[Fact], seed: int) -> Fact | None:
    """The first partner that fits, in an order that the seed decides; in the fact's own words."""
    read, answer = read_prompt(lm, fact), object_token(lm, fact)
    others = {x.subject: x for x in facts if fact.relation and x.relation == fact.relation and x.object != fact.object}
    others.pop(fact.subject, None)
    fitting = []
    for other in sorted(others.values(), key=lambda x: seed_from(json.dumps([seed, fact.subject, x.subject]))):
        with suppress(ValueError):
            SubjectSwap(other.subject).swapped_ids(lm, read)
            fitting.append(replace(other, template=fact.template))
    fitting = [x for x in fitting if object_token(lm, x) != answer]
    for begin in range(0, len(fitting), AT_ONCE):
        if known := known_among(lm, fitting[begin : begin + AT_ONCE], "swap_pairs"):
            return known[0]
    return None
