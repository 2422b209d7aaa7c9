"""Prompts as tokens.

read_prompt(lm, prompt, subject, prefix)        a Prompt: its tokens, and which of them are the subject's
continuation_ids(lm, prompt, continuation)      with which tokens a text goes on
question(lm, owner, prompt, continuation)       the same as a Question of `rome_lab.models.score`
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rome_lab.base import blank_behind, check_text, other_spelling, place_of, without_end
from rome_lab.facts.fact import Fact
from rome_lab.models import LanguageModel, Question


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


def read_prompt(lm: LanguageModel, prompt: str | Fact, subject: str | None = None, prefix: str = "") -> Prompt:
    """Tokenise a prompt and find its subject's tokens by the tokenizer's character offsets.

    A Fact says itself where its subject stands. In plain text it is the first place where the subject stands as whole
    words, or else the first place where its characters stand at all. Blanks at its end are left out.

    Args: prefix: what stands before the prompt; both are tokenised together.

    Raises:
        ValueError: the prompt or the subject is empty, the subject is not in the prompt, the text is too long, or the
            tokenizer drops the subject.
    """
    if isinstance(prompt, Fact):
        if subject not in (None, prompt.subject):
            raise ValueError(f"the Fact's subject is {prompt.subject!r}, not {subject!r}; give one of them.")
        text, subject, begin = prompt.prompt, prompt.subject, prompt.subject_span[0]
    else:
        begin = find_subject(prompt, subject)
        text = without_end(prompt)
    encoded = lm.tokenizer(prefix + text, return_offsets_mapping=True)
    if (length := len(encoded["input_ids"])) > lm.context_length:
        which = f" {text!r}" if prefix else ""
        behind = f" behind the prefix {prefix!r}" if prefix else ""
        raise ValueError(
            f"the prompt{which} has {length} tokens{behind}, but {lm.name} reads at most {lm.context_length}; shorten it."
        )
    lm.check_ids(encoded["input_ids"])
    begin, end = len(prefix) + begin, len(prefix) + begin + len(subject)
    inside = [i for i, (first, last) in enumerate(encoded["offset_mapping"]) if first < end and last > begin]
    if not inside:
        raise ValueError(
            f"the tokenizer of {lm.name} drops the subject {subject!r}; choose a subject that it can write."
        )
    ids = encoded["input_ids"]
    # SentencePiece puts a blank of its own before a text, and says that it stands where the first letter does.
    while len(inside) > 1 and lm.tokenizer.convert_ids_to_tokens(ids[inside[0]]) == "\u2581":
        inside.pop(0)
    return Prompt(prefix + text, subject, torch.tensor(ids, device=lm.device), (inside[0], inside[-1] + 1))


def find_subject(text: str, subject: str | None) -> int:
    """Where `subject` stands in a prompt, see `read_prompt`; an error says what is wrong with either."""
    check_text("the prompt", text)
    check_text("the subject", "" if subject is None else subject)
    if not text.strip():
        raise ValueError("the prompt is empty; write the beginning of a sentence about the subject.")
    if not subject or not subject.strip():
        raise ValueError("the subject is empty; name the part of the prompt that the sentence is about.")
    if (begin := place_of(text, subject)) < 0:
        why = other_spelling(text, subject)
        raise ValueError(
            f"the subject {subject!r} is not in the prompt {text!r}{why}; write it exactly as it stands there."
        )
    return begin


def continuation_ids(lm: LanguageModel, prompt: str, continuation: str) -> list[int]:
    """Ids of the tokens with which the tokens of `prompt` go on to say `continuation`, no special tokens among them.

    It is written as it would be there: behind a blank, or, in scripts without blanks and behind what opens, none.
    """
    check_text("the prompt", prompt)
    check_text("the continuation", continuation)
    if not continuation.strip():
        raise ValueError("the continuation is empty; name what the sentence should go on to say.")
    prompt = without_end(prompt)
    space = blank_behind(prompt)
    before = lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = lm.tokenizer(prompt + space + continuation, add_special_tokens=False)["input_ids"]
    if after[: len(before)] == before and len(after) > len(before):
        ids = after[len(before) :]
    else:
        # The continuation changes how the prompt's end is cut into tokens; the model is to go on from the prompt's own.
        ids = lm.tokenizer(space + continuation, add_special_tokens=False)["input_ids"]
    lm.check_ids(ids)
    return ids


def question(lm: LanguageModel, owner: int, prompt: str, continuation: str) -> Question:
    """How a text should go on, in tokens, for the change of that place."""
    ids = tuple(lm.tokenizer(without_end(prompt))["input_ids"])
    if not ids:
        raise ValueError(
            f"the prompt {prompt!r} has no tokens for {lm.name}, so nothing can follow; write its beginning."
        )
    lm.check_ids(ids)
    return Question(owner, ids, tuple(continuation_ids(lm, prompt, continuation)))
