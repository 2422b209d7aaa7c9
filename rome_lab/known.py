"""Known facts (B.1): `known_facts` finds the facts that a model completes by itself, and the prompts it completes."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import pandas as pd
import torch
from tqdm.auto import tqdm

from rome_lab.facts import Fact
from rome_lab.models import LanguageModel
from rome_lab.prompts import continuation_ids

WAVE = 512  # facts tried together, at most; more would leave the prompts of one length no better filled

logger = logging.getLogger(__name__)


class Outcome(StrEnum):
    """What came of asking for a fact with one template; the nearer to knowing the fact, the earlier."""

    KNOWN = "known"
    OTHER_TOKEN = "object named, but not with its own first token right after the prompt"
    OTHER_WORD = "another capitalised word first"
    NOT_NAMED = "object not named within the limit"
    TOO_LONG = "prompt too long for the model"


@dataclass(frozen=True)
class KnownReport:
    """How a search for known facts went.

    Attributes:
        tried, kept: numbers of facts; those after the last fact kept do not count.
        dropped: number of facts by reason. A fact whose templates failed for different reasons counts under the one
            that stands first in `Outcome`.
        prompts: number of prompts (a fact with one template) by outcome.
    """

    tried: int
    kept: int
    dropped: dict[Outcome, int]
    prompts: dict[Outcome, int]

    def table(self) -> pd.DataFrame:
        """A row an outcome: facts and prompts."""
        facts = {Outcome.KNOWN: self.kept, **self.dropped}
        rows = [(outcome.value, facts.get(outcome, 0), self.prompts.get(outcome, 0)) for outcome in Outcome]
        return pd.DataFrame(rows, columns=["outcome", "facts", "prompts"]).set_index("outcome")

    def __str__(self) -> str:
        reasons = "".join(f"; {count} dropped: {outcome.value}" for outcome, count in self.dropped.items())
        return f"{self.kept} of {self.tried} facts tried are known ({sum(self.prompts.values())} prompts){reasons}"


@dataclass(frozen=True)
class KnownFacts(Sequence[Fact]):
    """Facts that a model knows; the prompt of each ends where the model goes on to name the object."""

    facts: tuple[Fact, ...]
    report: KnownReport

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, index):
        return self.facts[index]

    def __str__(self) -> str:
        return str(self.report)

    def table(self) -> pd.DataFrame:
        """A row a fact: relation, subject, prompt, object."""
        columns = ["relation", "subject", "prompt", "object"]
        return pd.DataFrame([[getattr(fact, name) for name in columns] for fact in self.facts], columns=columns)


@dataclass
class Trial:
    """A fact, its templates in the order in which they are tried, and what came of it so far."""

    fact: Fact
    templates: list[str]
    outcomes: list[Outcome] = field(default_factory=list)
    known: Fact | None = None


def known_facts(
    lm: LanguageModel,
    facts: Iterable[Fact],
    n: int | None = 100,
    seed: int = 0,
    max_new_tokens: int = 16,
    batch_size: int = 64,
    progress: bool = True,
) -> KnownFacts:
    """A random sample of the facts that `lm` completes, with the prompts that it completes (B.1).

    The model goes on greedily from a template filled with the subject. Where the text names the object before any other
    capitalised word, the fact is known, and its prompt is the text up to, not including, the object. A fact's templates
    are tried in random order until one works, so each fact gives one prompt.

    Args:
        n: number of facts; None for all that are known. Where fewer are known, all of them are returned, with a warning.
        seed: decides, with nothing else but each fact itself, the order of the facts and of each fact's templates.
        max_new_tokens: tokens within which the object must be named.
        batch_size: most prompts in one forward; says nothing about the result.

    Returns: KnownFacts, a sequence of Fact with a report of what was tried, kept and dropped, and why.

    Raises:
        ValueError: no facts, or a number below 1; the model's weights hold NaN.
    """
    for name, value in {"n": n, "max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if not (isinstance(value, int) and value >= 1) and not (name == "n" and value is None):
            raise ValueError(f"known_facts: {name} is {value!r}; expected a whole number of at least 1.")
    order = sorted(dict.fromkeys(facts), key=lambda fact: rank(seed, fact))
    if not order:
        raise ValueError("known_facts: there are no facts to try; load some with load_facts.")
    trials: list[Trial] = []
    kept = 0
    wanted = len(order) if n is None else n
    with tqdm(total=wanted, desc="known facts" if n else "facts tried", disable=not progress) as bar:
        while kept < wanted and len(trials) < len(order):
            size = min(WAVE, max(batch_size, 2 * (wanted - kept)))
            wave = [Trial(fact, shuffled(fact, seed)) for fact in order[len(trials) : len(trials) + size]]
            for trial in settle(lm, wave, max_new_tokens, batch_size):
                kept += trial.known is not None
                bar.update(min(1, bar.total - bar.n) if n is None or trial.known else 0)
            trials += wave
    known = summarise(trials, wanted)
    if n is not None and len(known) < n:
        logger.warning(
            "known_facts: %d facts were asked for, but %s knows %d of the %d given; using all of these",
            n, lm.name, len(known), len(order),
        )  # fmt: skip
    return known


def rank(seed: int, fact: Fact, template: str = "") -> str:
    """A random key to sort by that depends on nothing but its arguments."""
    parts = [seed, fact.subject, fact.template, fact.object, fact.relation, template]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def shuffled(fact: Fact, seed: int) -> list[str]:
    """The templates that may state the fact, in random order."""
    return sorted(fact.templates or (fact.template,), key=lambda template: rank(seed, fact, template))


def summarise(trials: Sequence[Trial], wanted: int) -> KnownFacts:
    """The first `wanted` known facts, and the report up to the last of them: what was tried beyond is chance."""
    places = [place for place, trial in enumerate(trials) if trial.known]
    if len(places) > wanted:
        trials = trials[: places[wanted - 1] + 1]
    order = list(Outcome)
    dropped = Counter(min(trial.outcomes, key=order.index) for trial in trials if not trial.known)
    prompts = Counter(outcome for trial in trials for outcome in trial.outcomes)
    kept = tuple(trial.known for trial in trials if trial.known)
    return KnownFacts(kept, KnownReport(len(trials), len(kept), dict(dropped), dict(prompts)))


def settle(lm: LanguageModel, trials: Sequence[Trial], limit: int, batch_size: int) -> Iterator[Trial]:
    """Try the trials' templates in turn, all trials' first ones together; yields each trial when it is settled."""
    for turn in range(max(len(trial.templates) for trial in trials)):
        open_ = [trial for trial in trials if not trial.known and turn < len(trial.templates)]
        texts = [Text(lm, replace(trial.fact, template=trial.templates[turn])) for trial in open_]
        for batch in batches([len(text.ids) for text in texts], batch_size):
            go_on(lm, [texts[i] for i in batch], limit)
            for i in batch:
                open_[i].outcomes.append(texts[i].outcome)
                open_[i].known = texts[i].known(lm) ...
