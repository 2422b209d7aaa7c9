"""What rome_lab does beside tracing, by its own way and by the plain one: known facts, covariance, v* of one edit.

`TASKS` holds the ways of every task, tracing among them: each is prepared, and what it then does is measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from benchmarks.measure import Work
from benchmarks.plain import plain_loop
from benchmarks.plain_tracing import WAYS, Question, forward
from rome_lab import Fact, LanguageModel, known_facts, load_facts
from rome_lab.covariance import covariances, run_to_keys
from rome_lab.editing import default_settings
from rome_lab.edits import weight
from rome_lab.keys import k_star, sample_prefixes
from rome_lab.known import rank
from rome_lab.store import Json, Store
from rome_lab.update import precise
from rome_lab.values import Objective, optimise_value
from tests.oracle import plain_known_fact

NEW_TOKENS = 16  # within which an object must be named: the default of known_facts
PASSAGE = 64  # tokens
FACT, TARGET = Fact("Eiffel Tower", "The {} is located in the city of", "Paris"), "Rome"


@dataclass(frozen=True)
class Options:
    """How large the tasks are.

    Attributes:
        prompt, subject: of the trace, 9 tokens of the embedded model.
        samples, window: of the trace.
        dataset, facts: where known facts are sought, and how many.
        tokens: that C is measured on.
        steps: of Adam in an edit; the model's default by default.
    """

    prompt: str = FACT.prompt
    subject: str = FACT.subject
    samples: int = 10
    window: int = 10
    dataset: str = "embedded"
    facts: int = 20
    tokens: int = 8192
    steps: int | None = None


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


def plain_covariance(lm: LanguageModel, layer: int, passages: list[list[int]]) -> Tensor:
    """C of one layer, one passage after the other, in runs that stop at the layer, as those of the authors' code do."""
    sums = []
    for passage in passages:

        def receive(layer: int, keys: Tensor) -> None:
            flat = precise(keys.reshape(-1, keys.shape[-1]))
            sums.append(flat.T @ flat + (sums.pop() if sums else 0))

        run_to_keys(lm, torch.tensor([passage], device=lm.device), [layer], receive)
    return (sums[0] / sum(map(len, passages))).float().cpu()


def trace_ways(lm: LanguageModel, options: Options) -> dict[str, Work]:
    """One state trace; and one plain forward, below which no way can go."""
    asked = Question.ask(lm, options.prompt, options.subject, options.samples, options.window)
    ways = {name: partial(way, asked, ("state",)) for name, way in WAYS.items()}
    return ways | {"one plain forward": partial(forward, asked)}


def known_ways(lm: LanguageModel, options: Options) -> dict[str, Work]:
    """The known facts of a data set; both ways return them."""
    facts = load_facts(options.dataset)
    settings = {"n": options.facts, "max_new_tokens": NEW_TOKENS, "progress": False}
    return {
        "rome_lab": lambda: known_facts(lm, facts, **settings).facts,
        "one prompt after the other": partial(plain_known, lm, facts, options.facts),
    }


def covariance_ways(lm: LanguageModel, options: Options) -> dict[str, Work]:
    """C of the layer that is edited, from an empty store; both ways return it."""
    layer = edited_layer(lm)

    def shipped() -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            return covariances(lm, [layer], Sentences(), options.tokens, Store(folder), progress=False)[layer].C

    def plain() -> Tensor:
        return plain_covariance(lm, layer, Sentences().first(lm, options.tokens))

    return {"rome_lab": shipped, "one passage after the other": plain}


def edit_ways(lm: LanguageModel, options: Options) -> dict[str, Work]:
    """v* of one edit, with prefixes sampled beforehand; both ways return its change."""
    layer, settings = edited_layer(lm), default_settings(lm).settings
    settings = replace(settings, prefixes=sample_prefixes(lm, settings.prefix_lengths, settings.seed))
    settings = settings if options.steps is None else replace(settings, steps=options.steps)
    v = weight(lm, layer).double() @ k_star(lm, FACT, layer, "averaged", settings.prefixes)[:, 0].double()
    return {
        "rome_lab": lambda: optimise_value(Objective(lm, layer, (FACT, TARGET), v, settings), progress=False).delta,
        "plain loop": lambda: plain_loop(lm, layer, (FACT, TARGET), v, settings)[0],
    }


def edited_layer(lm: LanguageModel) -> int:
    """The layer of an edit by default, or one at a fifth of a model that has none."""
    layer = default_settings(lm).layer
    return lm.n_layers // 5 if layer is None else layer


TASKS = {"state trace": trace_ways, "known facts": known_ways, "covariance": covariance_ways, "edit": edit_ways}
"""Task -> its ways, prepared, ours first; what a way does when it is called is measured."""
