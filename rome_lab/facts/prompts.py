"""Prompts as tokens: where the subject is, and with which tokens a text goes on."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from rome_lab.base import check_text
from rome_lab.facts.fact import Fact
from rome_lab.models import LanguageModel


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as the model reads it.

    Attributes:
        text: what the user wrote.
        subject: the part of `text` that names the subject.
        ids: (T,) token ids, with the special tokens that the tokenizer adds.
        subject_range: (begin, end) in tokens, end excluded: every token that holds a character of the subject.
    """

    text: str
    subject: str
    ids: torch.Tensor
    subject_range: tuple[int, int]

    def tokens(self, lm: LanguageModel) -> tuple[str, ...]:
        """The text of each token."""
        return tuple(lm.tokenizer.decode([i]) for i in self.ids.tolist())


def read_prompt(lm: LanguageModel, prompt: str | Fact, subject: str | None = None) -> Prompt:
    """Tokenise a prompt and find its subject's tokens by the tokenizer's character offsets.

    A Fact says itself where its subject stands. In plain text it is the first place where the subject stands as whole
    words, or else the first place where its characters stand at all.

    Raises:
        ValueError: the prompt or the subject is empty, the subject is not in the prompt, or the prompt is too long.
    """
    if isinstance(prompt, Fact):
        if subject not in (None, prompt.subject):
            raise ValueError(f"the Fact's subject is {prompt.subject!r}, not {subject!r}; give one of them.")
        text, subject, span = prompt.prompt, prompt.subject, prompt.subject_span
    else:
        text = prompt
        span = find_subject(text, subject)
    encoded = lm.tokenizer(text, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if len(ids) > lm.context_length:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, but {lm.name} reads at most {lm.context_length}; shorten it."
        )
    inside = [i for i, (begin, end) in enumerate(offsets) if begin < span[1] and end > span[0]]
    if not inside:
        raise ValueError(
            f"the tokenizer of {lm.name} drops the subject {subject!r}; choose a subject that it can write."
        )
    return Prompt(text, subject, torch.tensor(ids, device=lm.device), (inside[0], inside[-1] + 1))


def find_subject(text: str, subject: str | None) -> tuple[int, int]:
    """(begin, end) in characters of the first whole-word occurrence of `subject`, or else of its first occurrence."""
    check_text("the prompt", text)
    check_text("the subject", "" if subject is None else subject)
    if not text.strip():
        raise ValueError("the prompt is empty; write the beginning of a sentence about the subject.")
    if not subject or not subject.strip():
        raise ValueError("the subject is empty; name the part of the prompt that the sentence is about.")
    if subject not in text:
        raise ValueError(f"the subject {subject!r} is not in the prompt {text!r}; write it exactly as it stands there.")
    whole = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", text)
    begin = whole.start() if whole else text.index(subject)
    return begin, begin + len(subject)


def continuation_ids(lm: LanguageModel, prompt: str, continuation: str) -> list[int]:
    """Ids of the tokens with which the tokens of `prompt` go on to say `continuation`, no special tokens among them."""
    check_text("the prompt", prompt)
    check_text("the continuation", continuation)
    if not continuation.strip():
        raise ValueError("the continuation is empty; name what the sentence should go on to say.")
    space = "" if prompt[-1:].isspace() else " "
    before = lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = lm.tokenizer(prompt + space + continuation, add_special_tokens=False)["input_ids"]
    if after[: len(before)] == before and len(after) > len(before):
        return after[len(before) :]
    # The continuation changes how the prompt's end is cut into tokens; the model is to go on from the prompt's own.
    return lm.tokenizer(space + continuation, add_special_tokens=False)["input_ids"]
