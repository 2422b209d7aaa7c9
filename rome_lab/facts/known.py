"""Facts that a model knows.

known_facts(lm, facts)            those that it completes by itself, and the prompts that it completes (B.1)
facts_said_at_once(lm, facts)     those whose object comes first to it, after one template: fewer, and quicker to find
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from rome_lab.base import Json, Store, code_version, opened
from rome_lab.facts.completion import Outcome, Text, answers_of, go_on, in_word, next_tokens, object_token
from rome_lab.facts.fact import Fact, facts_digest
from rome_lab.facts.prompts import question
from rome_lab.models import LanguageModel

logger = logging.getLogger(__name__)

FACT_WAVE = 512  # facts tried together, at most; more would leave the prompts of one length no better filled
LEAST_WAVE = 16  # and at least, where few are sought


@dataclass(frozen=True)
class KnownReport:
    """How a search for known facts went.

    Attributes:
        tried, kept: numbers of facts; those after the last fact kept do not count.
        dropped: number of facts by reason. A fact whose templates failed for different reasons counts under the one
            that stands first in `Outcome`.
        prompts: number of prompts (a fact with one template) by outcome.
        own_words: number of kept facts whose prompts hold words of the model's own between template and object.
    """

    tried: int
    kept: int
    dropped: dict[Outcome, int]
    prompts: dict[Outcome, int]
    own_words: int

    def table(self) -> pd.DataFrame:
        """A row an outcome: facts and prompts."""
        facts = {Outcome.KNOWN: self.kept, **self.dropped}
        rows = [(outcome.value, facts.get(outcome, 0), self.prompts.get(outcome, 0)) for outcome in Outcome]
        return pd.DataFrame(rows, columns=["outcome", "facts", "prompts"]).set_index("outcome")

    def __str__(self) -> str:
        reasons = "".join(f"; {count} dropped: {outcome.value}" for outcome, count in self.dropped.items())
        own = f"{self.own_words} at prompts that hold words of the model's own"
        prompts = sum(self.prompts.values())
        return f"{self.kept} of {self.tried} facts tried are known ({prompts} prompts), {own}{reasons}"


@dataclass(frozen=True, repr=False)
class KnownFacts(Sequence[Fact]):
    """Facts that a model knows; the prompt of each ends where the model goes on to name the object."""

    facts: tuple[Fact, ...]
    report: KnownReport

    def __len__(self) -> int:
        return len(self.facts)

    def __getitem__(self, index: int | slice) -> Fact | tuple[Fact, ...]:
        return self.facts[index]

    def __repr__(self) -> str:
        return f"KnownFacts({self.report})"

    def table(self) -> pd.DataFrame:
        """A row a fact: relation, subject, prompt, object."""
        columns = ["relation", "subject", "prompt", "object"]
        return pd.DataFrame([[getattr(fact, name) for name in columns] for fact in self.facts], columns=columns)


@dataclass
class Trial:
    """A fact, its templates in the order in which they are tried, what came of each, and the known fact found."""

    fact: Fact
    templates: list[str]
    outcomes: list[Outcome] = field(default_factory=list)
    known: Fact | None = None

    @property
    def has_own_words(self) -> bool:
        """Whether the known fact's prompt holds words that the model put behind the template."""
        template = self.templates[len(self.outcomes) - 1]
        return self.known is not None and any(map(in_word, self.known.template[len(template) :]))

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to try."""
        return self.known is not None or len(self.outcomes) == len(self.templates)


def known_facts(
    lm: LanguageModel,
    facts: Iterable[Fact],
    n: int | None = 100,
    seed: int = 0,
    max_new_tokens: int = 16,
    batch_size: int = 64,
    progress: bool = True,
    store: Store | str | Path | None = None,
) -> KnownFacts:
    """A random sample of the facts that `lm` completes, with the prompts that it completes (B.1).

    The model goes on greedily from a template filled with the subject. Where the text names the object before any other
    capitalised word, and no negating word stands before it, the fact is known, and its prompt is the text up to, not
    including, the object. A fact's templates are tried in random order until one works, so each fact gives one prompt.

    Args:
        n: number of facts; None for all that are known. Where fewer are known, all of them are returned, with a warning.
        seed: decides, with nothing else but each fact itself, the order of the facts and of each fact's templates.
        max_new_tokens: tokens within which the object must be named, and the one behind it that shows where it ends.
        batch_size: most prompts in one forward; says nothing about the result.
        store: folder of results, in which the search is kept and found again.

    Returns: KnownFacts, a sequence of Fact with a report of what was tried, kept and dropped, and why.

    Raises:
        ValueError: no facts, or a number below 1; the model's weights hold NaN.
        OSError: the store cannot be written; found before any work is done.
    """
    for name, value in {"n": n, "max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        if not (isinstance(value, int) and value >= 1) and not (name == "n" and value is None):
            raise ValueError(f"known_facts: {name} is {value!r}; expected a whole number of at least 1.")
    order = in_order(facts, seed)
    if not order:
        raise ValueError("known_facts: there are no facts to try; load some with load_facts.")
    store = opened(store)
    inputs: dict[str, Json] = {}
    if store:
        store.check_writable()
        inputs = search_inputs(lm, order, {"what": "known", "n": n, "seed": seed, "max_new_tokens": max_new_tokens})
    if record := store.load(inputs) if store else None:
        known = from_meta(record.meta)
    else:
        known = search_summary(find_known(lm, order, n, seed, max_new_tokens, batch_size, progress), n)
    if len(known) < (n or 1):
        logger.warning(
            "known_facts: %s facts were asked for, but of the %d given %s knows %d; using all of these",
            *(n or "all", len(order), lm.name, len(known)),
        )
    if store and not record:
        store.save(inputs, {}, asdict(known))
    return known


def facts_said_at_once(
    lm: LanguageModel,
    facts: Iterable[Fact],
    n: int,
    seed: int = 0,
    progress: bool = True,
    store: Store | str | Path | None = None,
) -> tuple[Fact, ...]:
    """A random sample of the facts whose whole object `lm` finds most probable right after one template, at random.

    It takes one short pass a fact, where `known_facts` tries every template and lets the model go on from it.

    Args: as for `known_facts`. Where there are fewer than `n`, all of them are returned; texts that are too long for `lm`
        do not count.

    Raises:
        OSError: the store cannot be written; found before any work is done.
    """
    order, store = in_order(facts, seed), opened(store)
    inputs: dict[str, Json] = {}
    if store:
        store.check_writable()
        inputs = search_inputs(lm, order, {"what": "said", "n": n, "seed": seed})
        if record := store.load(inputs):
            return tuple(Fact(**fact) for fact in record.meta["facts"])
    knows: list[Fact] = []
    tried = 0
    with tqdm(total=n, desc="facts said at once", disable=not progress) as bar:
        while len(knows) < n and tried < len(order):
            several = order[tried : tried + wave_size(n - len(knows))]
            tried += len(several)
            wave = [replace(x, template=templates_in_order(x, seed)[0]) for x in several]
            questions = {fact: question(lm, 0, fact.prompt, fact.object) for fact in wave}
            fitting = {fact: x for fact, x in questions.items() if len(x.text) <= lm.context_length}
            answers = answers_of(lm, list(fitting.values()), "known_facts")
            knows += [fact for fact, answer in zip(fitting, answers, strict=True) if answer.greedy.all()]
            bar.update(min(n, len(knows)) - bar.n)
    if store:
        store.save(inputs, {}, {"facts": [asdict(fact) for fact in knows[:n]]})
    return tuple(knows[:n])


def in_order(facts: Iterable[Fact], seed: int) -> list[Fact]:
    """The facts, each once, in random order."""
    return sorted(dict.fromkeys(facts), key=lambda fact: rank(seed, fact))


def search_inputs(lm: LanguageModel, order: Sequence[Fact], settings: Mapping[str, Json]) -> dict[str, Json]:
    """All that determines a search among facts in their order."""
    return lm.identity().key() | settings | {"facts": facts_digest(tuple(order)), "code": code_version(__name__)}


def from_meta(meta: Mapping[str, Json]) -> KnownFacts:
    """What `dataclasses.asdict` made of a KnownFacts, put together again."""
    report = {
        name: {Outcome(key): count for key, count in value.items()} if isinstance(value, Mapping) else value
        for name, value in meta["report"].items()
    }
    return KnownFacts(tuple(Fact(**fact) for fact in meta["facts"]), KnownReport(**report))


def find_known(
    lm: LanguageModel,
    order: Sequence[Fact],
    n: int | None,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
    progress: bool,
) -> list[Trial]:
    """Try the facts in `order` until at least n are known.

    One template of each comes first. Where enough facts are known by then, those after the last that is needed count no
    more, and of the others alone the other templates are read.
    """
    enough = len(order) if n is None else n
    trials: list[Trial] = []
    kept = 0
    with tqdm(total=enough, desc="facts tried" if n is None else "known facts", disable=not progress) as bar:
        while kept < enough and (begin := len(trials)) < len(order):
            wave = order[begin : begin + wave_size(enough - kept)]
            trials += [Trial(fact, templates_in_order(fact, seed)) for fact in wave]
            for turns in (slice(1), slice(1, None)):
                try_templates(lm, trials[begin:], turns, max_new_tokens, batch_size)
                drop_repeated(trials)
                trials = up_to(trials, enough)
                kept = sum(trial.known is not None for trial in trials)
                bar.update((min(n, kept) if n else sum(trial.is_settled for trial in trials)) - bar.n)
    return trials


def wave_size(n: int) -> int:
    """How many facts are tried together where n more are sought: of those that are tried, half are known at best."""
    return min(FACT_WAVE, max(LEAST_WAVE, 2 * n))


def up_to(trials: list[Trial], n: int) -> list[Trial]:
    """The trials up to the nth that has found something; all, where fewer have."""
    places = [place for place, trial in enumerate(trials) if trial.known]
    return trials[: places[n - 1] + 1] if len(places) >= n else trials


def drop_repeated(trials: Sequence[Trial]) -> None:
    """Of facts that came to the same prompt, as templates that are each other's beginnings may, keep the first."""
    seen: set[tuple[str, str, str]] = set()
    for trial in trials:
        if trial.known:
            question = (trial.known.prompt, trial.known.subject, trial.known.object)
            if question in seen:
                trial.known, trial.outcomes[-1] = None, Outcome.REPEATED
            seen.add(question)


def rank(seed: int, fact: Fact, template: str = "") -> str:
    """A random key to sort by that depends on nothing but its arguments."""
    parts = [seed, fact.subject, fact.template, fact.object, fact.relation, template]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def templates_in_order(fact: Fact, seed: int) -> list[str]:
    """The templates that may state the fact, in random order."""
    return sorted(fact.templates or (fact.template,), key=lambda template: rank(seed, fact, template))


def try_templates(lm: LanguageModel, trials: Sequence[Trial], turns: slice, limit: int, batch_size: int) -> None:
    """Try the templates at `turns` of the trials that have found nothing yet; the first that works counts."""
    tried = [
        (trial, Text(lm, replace(trial.fact, template=template), lm.stops, limit))
        for trial in trials
        if not trial.known
        for template in trial.templates[turns]
    ]
    go_on(lm, [text for _, text in tried], batch_size)
    for trial, text in tried:
        if trial.known:
            continue
        if text.outcome is Outcome.KNOWN:
            trial.known = known_fact(lm, text)
            trial.outcomes.append(Outcome.KNOWN if trial.known else Outcome.OTHER_TOKEN)
        else:
            trial.outcomes.append(text.outcome)


@torch.no_grad()
def known_fact(lm: LanguageModel, text: Text) -> Fact | None:
    """The fact with the text before its object as its prompt; None where its first token does not come next there."""
    before = text.text[len(text.fact.prompt) : text.end]
    fact = replace(text.fact, template=text.fact.template + before)
    ids, read = lm.tokenizer(fact.prompt)["input_ids"], text.ids + text.new
    if read[: len(ids)] == ids and len(read) > len(ids):
        token = read[len(ids)]
    else:  # read afresh, the prompt is cut into other tokens than the model wrote
        token = int(next_tokens(lm, torch.tensor([ids], device=lm.device))[0])
    return fact if token == object_token(lm, fact) else None


def search_summary(trials: list[Trial], n: int | None) -> KnownFacts:
    """The first n known facts (None: all), and the report up to the last of them: what was tried beyond it is chance."""
    trials = up_to(trials, n or len(trials) + 1)
    order = list(Outcome)
    dropped = Counter(min(trial.outcomes, key=order.index) for trial in trials if not trial.known)
    prompts = Counter(outcome for trial in trials for outcome in trial.outcomes)
    kept = tuple(trial.known for trial in trials if trial.known)
    own_words = sum(trial.has_own_words for trial in trials)
    return KnownFacts(kept, KnownReport(len(trials), len(kept), dict(dropped), dict(prompts), own_words))
