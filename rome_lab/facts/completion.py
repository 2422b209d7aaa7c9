"""What a model says after a prompt, and whether that names the object: the one place that asks whether it knows a fact.

completions(lm, pairs, doing)     how probable it finds texts after prompts, and whether it would say them: a Score each
answers_to(lm, change, sheets)    the same of several sheets of texts, such as cases have, under a change
object_token(lm, fact)            the token that it has to find most probable after the fact's prompt
known_among(lm, facts, doing)     the facts whose object it would begin to say
names_first(text, begin, answer)  where a text names an answer before anything else
Text, go_on(lm, texts)            greedy texts, judged as they grow until they name the object (B.1)
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from transformers import Cache

from rome_lab.base import is_unspaced
from rome_lab.facts.fact import Fact
from rome_lab.facts.prompts import continuation_ids, question
from rome_lab.models import (
    Batching,
    Change,
    LanguageModel,
    Question,
    Score,
    last_logits_only,
    rows_at_once,
    score,
    text_bytes,
)


def completions(
    lm: LanguageModel, pairs: Sequence[tuple[str, str]], doing: str, following: bool = False
) -> list[Score]:
    """How probable the model as it is finds each text behind its prompt (teacher forcing).

    Args:
        pairs: prompts, and the text behind each.
        doing, following: see `rome_lab.models.score`.

    Returns: a Score for each: `p` of the whole text, and `greedy`, whether the model would say each of its tokens.

    Raises: ValueError: they are too long for the model together, or it gives what is not a number.
    """
    return answers_of(lm, [question(lm, 0, prompt, text) for prompt, text in pairs], doing, following)


def answers_of(lm: LanguageModel, questions: Sequence[Question], doing: str, following: bool = False) -> list[Score]:
    """What the model as it is makes of questions, having refused those that it cannot read; see `completions`."""
    lm.check_length(max((len(x.text) for x in questions), default=0), doing)
    return score(lm, [Change()], questions, doing, following)


def object_token(lm: LanguageModel, fact: Fact) -> int:
    """First token of the fact's object: the model knows the fact where it finds none more probable after the prompt."""
    return continuation_ids(lm, fact.prompt, fact.object)[0]


def answers_to(
    lm: LanguageModel, change: Change, sheets: Sequence[Mapping[str, Sequence[tuple[str, str]]]], doing: str
) -> list[dict[str, list[Score]]]:
    """How probable a model under a change finds the texts of each sheet: by name pairs of a prompt and what follows.

    A sheet is, for one, what `Case.pairs` asks.
    """
    questions = [question(lm, 0, *pair) for sheet in sheets for pairs in sheet.values() for pair in pairs]
    scores = iter(score(lm, [change], questions, doing))
    return [{name: [next(scores) for _ in pairs] for name, pairs in sheet.items()} for sheet in sheets]


def known_among(lm: LanguageModel, facts: Sequence[Fact], doing: str) -> list[Fact]:
    """The facts whose object's first token is the one that the model finds most probable after the prompt."""
    questions = [question(lm, 0, fact.prompt, fact.object) for fact in facts]
    # Only the object's first token counts: a long object is no reason to refuse a prompt that fits.
    answers = answers_of(lm, [replace(x, continuation=x.continuation[:1]) for x in questions], doing)
    return [fact for fact, answer in zip(facts, answers, strict=True) if answer.greedy[0]]


NEGATING = re.compile(r"\b(?:not|cannot|never|no|nor|neither|nobody|nothing|nowhere|except|unlike)\b|n['’]t\b", re.I)


class Outcome(StrEnum):
    """What came of asking for a fact with one template; the nearer to knowing the fact, the earlier."""

    KNOWN = "known"
    OTHER_TOKEN = "object named, but not with its own first token right after the prompt"
    DENIED = "object named, but after a word that denies it"
    OTHER_WORD = "another capitalised word first"
    NOT_NAMED = "object not named within the limit"
    REPEATED = "same prompt as another fact's"
    TOO_LONG = "prompt too long for the model"


class Text:
    """A fact's prompt and what the model goes on to say, judged as it grows.

    Attributes:
        ids, new: tokens of the prompt and of what follows.
        limit: most tokens that may follow.
        text: both as text.
        outcome: what the text says; None while more text can change it.
        end: where the word that decides begins.
    """

    def __init__(self, lm: LanguageModel, fact: Fact, stops: frozenset[int], limit: int) -> None:
        self.fact = fact
        self.ids: list[int] = lm.tokenizer(fact.prompt)["input_ids"]
        self.new: list[int] = []
        self.text = fact.prompt
        self.end = len(self.text)
        self.outcome = Outcome.TOO_LONG if len(self.ids) + limit > lm.context_length else None
        self._tokenizer, self._stops, self.limit = lm.tokenizer, stops, limit
        self._begin = len(self._decode(self.ids))

    def add(self, token: int) -> None:
        """Take in the next token."""
        self.new.append(token)
        complete = token in self._stops
        more = self._decode(self.ids + self.new[: -1 if complete else None])[self._begin :]
        if not complete:
            more = more.rstrip("\ufffd")  # a character of which some bytes are still to come
        self.text = self.fact.prompt + more
        self.outcome, self.end = outcome_of_text(self.text, len(self.fact.prompt), self.fact.object, complete)
        if self.outcome is None and len(self.new) == self.limit:
            self.outcome = Outcome.NOT_NAMED

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def outcome_of_text(text: str, begin: int, answer: str, complete: bool) -> tuple[Outcome | None, int]:
    """Whether `text` from `begin` on names `answer` before any other capitalised word.

    Words are runs of letters, marks and digits, or single characters of scripts without blanks, and count as capitalised
    where they begin with an upper-case letter. The answer must be written as it is: "White" is not "white", but another
    capitalised word. Where a word of `NEGATING` stands before it ("is not in Paris"), the text does not state the fact, or
    may not ("not only in Paris").

    Returns: the outcome, None where more text could change it, and where the word that decides begins.
    """
    for i in range(begin, len(text)):
        if i and in_word(text[i - 1]) and not is_unspaced(text[i - 1]):
            continue
        rest = text[i:]
        if not complete and len(rest) <= len(answer) and answer.startswith(rest):
            return None, i
        after = rest[len(answer) : len(answer) + 1]
        goes_on = bool(after) and in_word(after) and in_word(answer[-1]) and not is_unspaced(answer[-1])
        if rest.startswith(answer) and not goes_on:
            return Outcome.DENIED if NEGATING.search(text[begin:i]) else Outcome.KNOWN, i
        if text[i].isupper():
            return Outcome.OTHER_WORD, i
    return (Outcome.NOT_NAMED if complete else None), len(text)


def names_first(text: str, begin: int, answer: str) -> int | None:
    """Where a whole `text` names `answer` as the model has to that knows a fact; None where it does not.

    That is: from `begin` on, before any other capitalised word, and not denied.
    """
    outcome, place = outcome_of_text(text, begin, answer, complete=True)
    return place if outcome is Outcome.KNOWN else None


def in_word(character: str) -> bool:
    """Whether it is a letter, a mark or a digit."""
    return unicodedata.category(character)[0] in "LMN"


@dataclass
class GrowingTexts:
    """Texts of equal length that are still undecided: the tokens to read next (B, T) and what was read before."""

    texts: list[Text]
    ids: torch.Tensor
    cache: Cache | None = None


def go_on(lm: LanguageModel, texts: Sequence[Text], batch_size: int) -> None:
    """Continue texts greedily, each until its outcome is decided; as many at once as have their keys and values fit."""
    undecided = sorted((text for text in texts if text.outcome is None), key=lambda text: len(text.ids))
    longest = max((len(text.ids) + text.limit for text in undecided), default=0)
    together = Batching(lm, "known_facts", text_bytes(lm, longest, cached=True))
    # Called again, it goes on from where each text has come to.
    most = rows_at_once(lm.config.vocab_size, batch_size)
    together.each(undecided, lambda part: grow(lm, part, most))


@torch.no_grad()
def grow(lm: LanguageModel, texts: Sequence[Text], batch_size: int) -> None:
    """Continue texts, at most `batch_size` in one forward, the keys and values of all of them in memory.

    Texts of different lengths are never padded to go through the model together. Instead the lengths are passed through
    once, upwards, and a prompt joins when the texts begun before it have grown to its own length.
    """
    waiting: dict[int, list[Text]] = defaultdict(list)
    for text in texts:
        if text.outcome is None:
            waiting[len(text.ids + text.new)].append(text)
    running: list[GrowingTexts] = []
    length = min(waiting, default=0)
    while waiting or running:
        same = waiting.pop(length, [])
        for begin in range(0, len(same), batch_size):
            part = same[begin : begin + batch_size]
            running.append(GrowingTexts(part, torch.tensor([text.ids + text.new for text in part], device=lm.device)))
        for batch in running:
            advance(lm, batch)
        running = merge(running, batch_size)
        length += 1


def advance(lm: LanguageModel, batch: GrowingTexts) -> None:
    """Let every text say its next token; those that this decides leave the batch."""
    best, batch.cache = next_tokens(lm, batch.ids, batch.cache)
    for text, token in zip(batch.texts, best.tolist(), strict=True):
        text.add(token)
    rows = [row for row, text in enumerate(batch.texts) if text.outcome is None]
    if len(rows) < len(batch.texts):
        # On the CPU, whose indices pick from the keys of layers on any device.
        batch.cache.batch_select_indices(torch.tensor(rows, dtype=torch.long))
    batch.texts, batch.ids = [batch.texts[row] for row in rows], best[rows, None]


def merge(batches: Sequence[GrowingTexts], batch_size: int) -> list[GrowingTexts]:
    """Batches that have read the same number of tokens, put together where they fit; empty ones left out."""
    merged: list[GrowingTexts] = []
    for batch in batches:
        if not batch.texts:
            continue
        if merged and len(merged[-1].texts) + len(batch.texts) <= batch_size:
            merged[-1].texts += batch.texts
            merged[-1].ids = torch.cat([merged[-1].ids, batch.ids])
            for layer, other in zip(merged[-1].cache.layers, batch.cache.layers, strict=True):
                layer.keys = torch.cat([layer.keys, other.keys])
                layer.values = torch.cat([layer.values, other.values])
        else:
            merged.append(batch)
    return merged


def next_tokens(lm: LanguageModel, ids: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
    """The most probable next token (B,) after `ids` (B, T), which follow what is in the cache; and the cache."""
    lm.check_mode()
    output = lm.model(ids, past_key_values=cache, use_cache=True, **last_logits_only(lm.model))
    logits = output.logits[:, -1]
    lm.check_finite(logits, "known_facts")
    return logits.argmax(-1), output.past_key_values
