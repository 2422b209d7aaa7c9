"""What rome_lab does beside tracing, by its own way and by plain ones: known facts, covariance, v* of one edit.

`TASKS` holds the ways of every task, tracing among them. A way is prepared by a model and `Options`; what it gives then,
a function, is called and measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice

import torch
from torch import Tensor

from benchmarks.measure import Work
from benchmarks.plain import plain_loop
from benchmarks.plain_tracing import WAYS, Question, forward
from rome_lab import Fact, LanguageModel, known_facts, load_facts
from rome_lab.base.store import Json, Store
from rome_lab.editing.keys import k_star, run_to_keys, sample_prefixes
from rome_lab.editing.second_moment import covariances
from rome_lab.editing.settings import EditSettings, default_settings
from rome_lab.editing.update import precise
from rome_lab.editing.values import Objective, optimise_values
from rome_lab.facts.known import rank
from tests.oracle import plain_known_fact

NEW_TOKENS = 16  # within which an object must be named: the default of known_facts
PASSAGE = 64  # tokens
BATCH_TOKENS = 3072  # in a plain batch, three times what GPT-2 reads, as in the authors' code
FACT, TARGET = Fact("Eiffel Tower", "The {} is located in the city of", "Paris"), "Rome"


@dataclass(frozen=True)
class Options:
    """How large the tasks are.

    Attributes:
        prompt, subject: of the trace, 9 tokens of the embedded model.
        samples, window: of the trace.
        dataset, facts: where known facts are sought, and how many.
        tokens: that C is measured on.
        traced: known facts that are traced in every precision.
        steps: of Adam in an edit; the model's default by default.
    """

    prompt: str = "The Eiffel Tower is in the city of"
    subject: str = FACT.subject
    samples: int = 10
    window: int = 10
    dataset: str = "embedded"
    facts: int = 10
    tokens: int = 8192
    traced: int = 3
    steps: int | None = None


@dataclass(frozen=True, eq=False)
class GivenText:
    """Passages that are there already; a `Source` that takes no time at all."""

    texts: Sequence[list[int]]

    def describe(self) -> dict[str, Json]:
        return {"kind": "given", "tokens": sum(map(len, self.texts))}

    def passages(self, lm: LanguageModel, store: Store | None, begin: int) -> Iterator[list[int]]:
        return iter(self.texts[begin:])


@dataclass(frozen=True)
class Sentences:
    """The embedded facts as text, in passages of equal length; a `Source` that takes no time to make."""

    def describe(self) -> dict[str, Json]:
        return {"kind": "embedded sentences", "length": PASSAGE}

    def passages(self, lm: LanguageModel, store: Store | None, begin: int) -> Iterator[list[int]]:
        text = " ".join(f"{fact.prompt} {fact.object}." for fact in load_facts("embedded"))
        ids = lm.tokenizer(text, verbose=False)["input_ids"]
        for place in range(begin * PASSAGE, len(ids), PASSAGE):
            yield ids[place : place + PASSAGE]

    def first(self, lm: LanguageModel, tokens: int) -> list[list[int]]:
        """The passages that hold the first `tokens` tokens, whole."""
        return list(islice(self.passages(lm, None, 0), -(-tokens // PASSAGE)))


def plain_known(lm: LanguageModel, facts: Sequence[Fact], n: int) -> tuple[Fact, ...]:
    """The first n known facts in the order of seed 0, by transformers' own generation, one prompt after the other."""
    found = (plain_known_fact(lm, fact, 0, NEW_TOKENS) for fact in sorted(facts, key=lambda fact: rank(0, fact)))
    return tuple(islice(filter(None, found), n))


def plain_covariance(lm: LanguageModel, layer: int, passages: list[list[int]], together: int) -> Tensor:
    """C of one layer, in runs of so many passages of one length, sorted by it, which stop at the layer."""
    sums = []

    def receive(layer: int, keys: Tensor) -> None:
        flat = precise(keys.reshape(-1, keys.shape[-1]))
        sums.append(flat.T @ flat + (sums.pop() if sums else 0))

    for _, same in groupby(sorted(passages, key=len), key=len):
        rest = list(same)
        while rest:
            batch, rest = rest[:together], rest[together:]
            run_to_keys(lm, torch.tensor(batch, device=lm.device), [layer], receive)
    return (sums[0] / sum(map(len, passages))).float().cpu()


def trace(way: Callable[[Question, tuple[str, ...]], object], lm: LanguageModel, options: Options) -> Work:
    """One state trace."""
    return partial(way, question(lm, options), ("state",))


def one_forward(lm: LanguageModel, options: Options) -> Work:
    """One plain forward, below which no trace can go."""
    return partial(forward, question(lm, options))


def question(lm: LanguageModel, options: Options) -> Question:
    return Question.ask(lm, options.prompt, options.subject, options.samples, options.window)


def known(lm: LanguageModel, options: Options) -> Work:
    """The known facts of a data set."""
    facts = load_facts(options.dataset)
    return lambda: known_facts(lm, facts, n=options.facts, max_new_tokens=NEW_TOKENS, progress=False).facts


def known_one_by_one(lm: LanguageModel, options: Options) -> Work:
    return partial(plain_known, lm, load_facts(options.dataset), options.facts)


def covariance(lm: LanguageModel, options: Options) -> Work:
    """C of the layer that is edited, from an empty store."""
    layer = edited_layer(lm)

    def measure() -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            return covariances(lm, [layer], Sentences(), options.tokens, Store(folder), progress=False)[layer].C

    return measure


def covariance_together(together: int, lm: LanguageModel, options: Options) -> Work:
    """The same by `plain_covariance`, of so many passages together."""
    return lambda: plain_covariance(lm, edited_layer(lm), Sentences().first(lm, options.tokens), together)


@dataclass(frozen=True, eq=False)
class Sought:
    """v* of one edit, with prefixes sampled beforehand: what both ways are given.

    Attributes:
        original: W k* (D,), of the averaged key.
    """

    layer: int
    request: tuple[Fact, str]
    original: Tensor
    settings: EditSettings

    @classmethod
    def of(cls, lm: LanguageModel, layer: int, settings: EditSettings) -> Sought:
        prefixes = settings.prefixes or sample_prefixes(lm, settings.prefix_lengths, settings.seed)
        original = lm.weight(layer).double() @ k_star(lm, FACT, layer, "averaged", prefixes)[:, 0].double()
        return cls(layer, (FACT, TARGET), original, replace(settings, prefixes=prefixes))

    def shipped(self, lm: LanguageModel) -> Tensor:
        """The change of W k* by rome_lab."""
        objective = Objective(lm, self.layer, [self.request], self.original[None], self.settings)
        (value,) = optimise_values(objective, progress=False)
        return value.delta

    def plain(self, lm: LanguageModel) -> Tensor:
        """The same by the plain loop."""
        return plain_loop(lm, self.layer, self.request, self.original, self.settings)[0]


def sought(lm: LanguageModel, options: Options) -> Sought:
    return Sought.of(lm, edited_layer(lm), edit_settings(lm, options.steps))


def edited_layer(lm: LanguageModel) -> int:
    """The layer of an edit by default, or one at a fifth of a model that has none."""
    layer = default_settings(lm).layer
    return lm.n_layers // 5 if layer is None else layer


def edit_settings(lm: LanguageModel, steps: int | None) -> EditSettings:
    """The model's default settings of an edit, but for the number of steps where one is given."""
    settings = default_settings(lm).settings
    return settings if steps is None else replace(settings, steps=steps)


TASKS: Mapping[str, Mapping[str, Callable[[LanguageModel, Options], Work]]] = {
    "state trace": {name: partial(trace, way) for name, way in WAYS.items()} | {"one plain forward": one_forward},
    "known facts": {"rome_lab": known, "one prompt after the other": known_one_by_one},
    "covariance": {
        "rome_lab": covariance,
        "one passage after the other": partial(covariance_together, 1),
        "passages in batches": partial(covariance_together, BATCH_TOKENS // PASSAGE),
    },
    "edit": {
        "rome_lab": lambda lm, options: partial(sought(lm, options).shipped, lm),
        "plain loop": lambda lm, options: partial(sought(lm, options).plain, lm),
    },
}
"""Task -> way -> what prepares it; ours is the first."""


def prepared(task: str, lm: LanguageModel, options: Options) -> dict[str, Work]:
    """The ways of a task, ready to be called."""
    return {name: prepare(lm, options) for name, prepare in TASKS[task].items()}
