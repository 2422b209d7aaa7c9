"""Text for measuring keys: sampled from the model itself, in a folder, or Wikipedia.

A source is an endless or finite stream of passages, lists of token ids that begin as the model's texts begin. Passage
number i is always the same, so that what was measured over the first passages can be continued with the next.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rome_lab.base import Json, Store, check_whole, code_version, seed_from
from rome_lab.facts import load_relations
from rome_lab.models import Batching, LanguageModel, check_hub, continue_randomly, rows_at_once, text_bytes

# Sampled texts in one file of the store: what a killed process loses at most. With 64 tokens each they hold 8,192 tokens,
# and some texts to spare for those that end early.
TEXTS_A_FILE = 136
PIECE = 1 << 16  # characters of a file that are tokenised at once


class Source(Protocol):
    """A stream of passages that is the same at every reading."""

    def describe(self) -> dict[str, Json]:
        """All that determines the passages, besides the model and its tokenizer."""

    def passages(self, lm: LanguageModel, store: Store, begin: int) -> Iterator[list[int]]:
        """Token ids of the passages number `begin`, `begin + 1` and so on; `store` may keep what is costly to make."""


@dataclass(frozen=True)
class SampledText:
    """Text that the model itself writes about the subjects of the embedded facts; needs neither files nor network.

    Each text begins with a template that invites free text about a subject; the subjects take turns in a random order.
    The model goes on at temperature 1 until it ends the text or the text is `length` tokens long. A text depends on
    the model, `seed`, its own number and the options; not on the others, on the batch or on the device, but for
    rounding: where that moves one token the rest of the text is another. On one processor 49 of 896 texts were others with
    one thread than with two. Texts are kept in the store, so that other layers need not wait for them again.

    Attributes:
        seed: of the order of the subjects and of every text.
        length: most tokens in a text, those of its prompt included.
        top_k: draw only from this many of the most probable tokens; from all by default.
        batch_size: most texts sampled at once; fewer where memory is short.
        without: subjects that no text begins with, such as those that edits are judged by.
    """

    seed: int = 0
    length: int = 64
    top_k: int | None = None
    batch_size: int = TEXTS_A_FILE
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_whole("SampledText", seed=(self.seed, 0), length=(self.length, 2), batch_size=(self.batch_size, 1))
        if self.top_k is not None:
            check_whole("SampledText", top_k=(self.top_k, 1))
        object.__setattr__(self, "without", tuple(sorted(set(self.without))))
        if self.without and not self.subjects():
            raise ValueError("SampledText: no subject is left to write about; leave out fewer.")

    def subjects(self) -> list[tuple[str, tuple[str, ...]]]:
        """Every subject that texts begin with, with the templates that invite free text about it."""
        left_out = set(self.without)
        return [pair for pair in subjects_with_templates() if pair[0] not in left_out]

    def describe(self) -> dict[str, Json]:
        prompts = hashlib.sha256(json.dumps(self.subjects()).encode()).hexdigest()
        options = {"seed": self.seed, "length": self.length, "top_k": self.top_k}
        return {"kind": "sampled", "prompts": prompts, **options}

    def passages(self, lm: LanguageModel, store: Store, begin: int) -> Iterator[list[int]]:
        key = lm.identity().key() | {"what": "sampled-text", "code": code_version(__name__), "source": self.describe()}
        for number in itertools.count(begin // TEXTS_A_FILE):
            first = number * TEXTS_A_FILE
            inputs = {**key, "texts": [first, first + TEXTS_A_FILE]}
            record = store.load(inputs)
            if record is None:
                texts = self.texts(lm, range(first, first + TEXTS_A_FILE))
                ends = np.cumsum([len(text) for text in texts])
                store.save(inputs, {"ids": np.concatenate(texts).astype(np.int32), "ends": ends})
                record = store.load(inputs)
            texts = np.split(record.arrays["ids"], record.arrays["ends"][:-1])
            yield from (text.tolist() for text in texts[max(0, begin - first) :])

    def texts(self, lm: LanguageModel, numbers: Sequence[int]) -> list[list[int]]:
        """Token ids of the texts with these numbers, sampled now."""
        if self.length > lm.context_length:
            raise ValueError(
                f"SampledText: length is {self.length}, but {lm.name} reads at most {lm.context_length} tokens; "
                "give a smaller length."
            )
        together = Batching(
            lm,
            "SampledText",
            text_bytes(lm, self.length, cached=True),
            rows_at_once(lm.config.vocab_size, self.batch_size),
        )
        return [text for part in together.over(numbers, lambda part: self.sample(lm, part)) for text in part]

    def sample(self, lm: LanguageModel, numbers: Sequence[int]) -> list[list[int]]:
        """The texts with these numbers, sampled together."""
        prompts, draws = self.beginnings(lm, numbers)
        return continue_randomly(lm, prompts, draws, self.top_k)

    def beginnings(self, lm: LanguageModel, numbers: Sequence[int]) -> tuple[list[list[int]], Tensor]:
        """Token ids that the texts with these numbers begin with, and their uniform numbers (B, length)."""
        subjects = self.subjects()
        order = torch.randperm(len(subjects), generator=torch.Generator().manual_seed(self.seed)).tolist()
        prompts, draws = [], []
        for number in numbers:
            generator = torch.Generator().manual_seed(seed_from(json.dumps([self.seed, number])))
            draws.append(torch.rand(self.length, dtype=torch.float64, generator=generator))
            subject, templates = subjects[order[number % len(order)]]
            template = templates[int(torch.randint(len(templates), (), generator=generator))]
            before, _, after = template.partition("{}")
            prompts.append(lm.tokenizer(before + subject + after)["input_ids"][: self.length])
        return prompts, torch.stack(draws)


@dataclass(frozen=True)
class FolderText:
    """The *.txt files of a folder (UTF-8), in the order of their names, cut into passages one after the other.

    Attributes:
        folder: where the files are; what they hold, not where they are or what they are called, identifies the text.
        length: most tokens in a passage.
    """

    folder: str | Path
    length: int = 128

    def __post_init__(self) -> None:
        check_whole("FolderText", length=(self.length, 2))

    def files(self) -> list[Path]:
        """The files, in order; a FileNotFoundError where there are none."""
        files = sorted(Path(self.folder).expanduser().glob("*.txt"))
        if not files:
            raise FileNotFoundError(
                f"FolderText: there are no *.txt files in {self.folder}; give a folder that has some."
            )
        return files

    def describe(self) -> dict[str, Json]:
        digests = []
        for path in self.files():
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return {"kind": "folder", "files": digests, "length": self.length}

    def passages(self, lm: LanguageModel, store: Store, begin: int) -> Iterator[list[int]]:
        return itertools.islice(self.all_passages(lm), begin, None)

    def all_passages(self, lm: LanguageModel) -> Iterator[list[int]]:
        for path in self.files():
            try:
                with path.open(encoding="utf-8-sig") as file:
                    for text in iter(lambda: file.read(PIECE), ""):
                        yield from cut_passages(lm, text, self.length)
            except UnicodeDecodeError as error:
                raise ValueError(f"FolderText: {path} is not UTF-8 text ({error.reason}); save it as UTF-8.") from None


@dataclass(frozen=True)
class WikipediaText:
    """The beginnings of Wikipedia articles in random order, read from the Hugging Face hub as they are needed.

    Needs the package `datasets` and a network.

    Attributes:
        edition: date and language, as the data set "wikimedia/wikipedia" names them.
        seed: of the order.
        length: most tokens of each article.
    """

    edition: str = "20231101.en"
    seed: int = 0
    length: int = 128

    def __post_init__(self) -> None:
        check_whole("WikipediaText", seed=(self.seed, 0), length=(self.length, 2))

    def describe(self) -> dict[str, Json]:
        options = {"edition": self.edition, "seed": self.seed, "length": self.length}
        return {"kind": "wikipedia", **options}

    def passages(self, lm: LanguageModel, store: Store, begin: int) -> Iterator[list[int]]:
        for text in self.articles(begin):
            yield next(cut_passages(lm, text, self.length), [])

    def articles(self, begin: int) -> Iterator[str]:
        """The texts of the articles from number `begin` on."""
        check_hub()
        instead = "without a network, use SampledText() or FolderText(folder)"
        try:
            from datasets import load_dataset  # an optional package, and slow to import
        except ImportError as error:
            raise ImportError(
                f"WikipediaText needs the package datasets; install it with `pip install datasets`, or, {instead}."
            ) from error
        try:
            data = load_dataset("wikimedia/wikipedia", self.edition, split="train", streaming=True)
            for article in data.shuffle(seed=self.seed, buffer_size=10_000).skip(begin):
                yield article["text"]
        except OSError as error:
            raise ConnectionError(
                f"WikipediaText: Wikipedia ({self.edition}) could not be read from the Hugging Face hub "
                f"({type(error).__name__}); check the network and the edition, or, {instead}."
            ) from error


def source_of(name: str | Path) -> Source:
    """The source that a setting names: "sampled" from the model, "wikipedia", or a folder of text files."""
    named: dict[str | Path, Source] = {"sampled": SampledText(), "wikipedia": WikipediaText()}
    return named.get(name) or FolderText(name)


def cut_passages(lm: LanguageModel, text: str, length: int) -> Iterator[list[int]]:
    """`text` as consecutive passages of at most `length` tokens, each with the special tokens that begin a text."""
    start = lm.tokenizer("")["input_ids"]
    ids = lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = min(length, lm.context_length) - len(start)
    return (start + ids[begin : begin + step] for begin in range(0, len(ids), step))


def subjects_with_templates() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Every subject of the embedded facts, with the templates that invite free text about it."""
    templates: dict[str, dict[str, None]] = {}
    for relation in load_relations().values():
        for fact in relation.facts:
            templates.setdefault(fact.subject, {}).update(dict.fromkeys(relation.generations))
    return tuple((subject, tuple(own)) for subject, own in templates.items())
