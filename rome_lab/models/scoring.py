"""Log probabilities of given continuations under many changes at once, by whole texts (teacher forcing).

score(lm, changes, questions)        a Score for each Question, under the change that it names
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rome_lab.models.batching import Batching, text_bytes
from rome_lab.models.blocks import at_least_float32, output_changed
from rome_lab.models.changes import Change, side_by_side
from rome_lab.models.language_model import LanguageModel

PADDING = 8  # most tokens that a row is padded by
READ = 256  # places whose logits are in memory at once


@dataclass(frozen=True)
class Question:
    """A text and how it should go on, for one change.

    Attributes:
        owner: place of the change.
        context, said: token ids of the text, and of the continuation that is judged, all of them.
    """

    owner: int
    context: tuple[int, ...]
    said: tuple[int, ...]

    @property
    def text(self) -> tuple[int, ...]:
        """What the model reads: the continuation is read too, but for its last token (teacher forcing)."""
        return self.context + self.said[:-1]


@dataclass(frozen=True, eq=False)
class Score:
    """What the model makes of one question.

    Attributes:
        log_p: (tokens of the continuation,) float64, log probability of each after the context and those before it.
        greedy: of the same shape, whether each is the most probable token there.
    """

    log_p: np.ndarray
    greedy: np.ndarray

    @property
    def total(self) -> float:
        """Log probability of the whole continuation."""
        return float(self.log_p.sum())


@torch.no_grad()
def score(lm: LanguageModel, changes: Sequence[Change], questions: Sequence[Question]) -> list[Score]:
    """Log probabilities of every question's continuation under its own change, by whole texts (teacher forcing).

    Questions of one change whose texts are the same, or the beginning of another's, share a row.

    Raises: ValueError: a text is too long for the model, a delta does not fit, or the model gives what is not a number.
    """
    rows, row_of = shared_rows(questions)
    if (longest := max((len(text) for _, text in rows), default=0)) > lm.context_length:
        raise ValueError(
            f"judge: a text of {longest} tokens is more than {lm.name} reads, {lm.context_length}; shorten the prompt or "
            "the change's preamble, or set text_tokens lower."
        )
    asked: dict[int, list[int]] = {}
    for number, row in enumerate(row_of):
        asked.setdefault(row, []).append(number)

    def score_part(part: Sequence[int]) -> dict[int, Score]:
        numbers = [number for row in part for number in asked[row]]
        states = last_states(lm, changes, [rows[row] for row in part])
        place_of = {row: place for place, row in enumerate(part)}
        answers = read_scores(lm, states, [(place_of[row_of[number]], questions[number]) for number in numbers])
        return dict(zip(numbers, answers, strict=True))

    scores: dict[int, Score] = {}
    for alike in of_one_length(rows):
        together = Batching(lm, "judge", text_bytes(lm, max(len(rows[row][1]) for row in alike)))
        for found in together.over(alike, score_part):
            scores |= found
    for number, found in scores.items():
        if np.isnan(found.log_p).any():
            owner = questions[number].owner
            lm.check_finite(torch.tensor(found.log_p), f"judge, with change {owner} (at layer {changes[owner].layer})")
    return [scores[number] for number in range(len(questions))]


def shared_rows(questions: Sequence[Question]) -> tuple[list[tuple[int, tuple[int, ...]]], list[int]]:
    """Rows (owner, text) that hold every question's text at their beginning, and the row of each question."""
    wanted = sorted({(x.owner, x.text) for x in questions})
    rows: list[tuple[int, tuple[int, ...]]] = []
    held: dict[tuple[int, tuple[int, ...]], int] = {}
    for owner, text in reversed(wanted):  # what begins another text comes right before one that it begins
        if not (rows and rows[-1][0] == owner and rows[-1][1][: len(text)] == text):
            rows.append((owner, text))
        held[owner, text] = len(rows) - 1
    return rows, [held[x.owner, x.text] for x in questions]


def of_one_length(rows: Sequence[tuple[int, tuple[int, ...]]]) -> Iterator[list[int]]:
    """The places of `rows` in groups of nearly one length, the rows of a change side by side."""
    longest_first = sorted(range(len(rows)), key=lambda row: -len(rows[row][1]))
    begin = 0
    while begin < len(rows):
        length = len(rows[longest_first[begin]][1])
        part = [row for row in longest_first[begin:] if len(rows[row][1]) >= length - PADDING]
        yield sorted(part, key=lambda row: rows[row][0])
        begin += len(part)


def last_states(lm: LanguageModel, changes: Sequence[Change], rows: Sequence[tuple[int, tuple[int, ...]]]) -> Tensor:
    """(B, T, D) outputs of the last block, each row run under its own change."""
    length = max(len(text) for _, text in rows)
    # Padded at the right, where no token before it sees it: the causal mask is all that is needed.
    ids = torch.tensor([text + text[-1:] * (length - len(text)) for _, text in rows], device=lm.device)
    states: list[Tensor] = []
    with side_by_side(lm, changes, [owner for owner, _ in rows]), output_changed(lm.blocks[-1], states.append):
        lm.model.base_model(input_ids=ids, use_cache=False)
    return states[0].to(lm.device)


def read_scores(lm: LanguageModel, states: Tensor, asked: Sequence[tuple[int, Question]]) -> list[Score]:
    """The scores of questions, each with its row in `states` (B, T, D); logits are made only where they are read."""
    length = states.shape[1]
    places, said = [], []
    for row, question in asked:
        begin = row * length + len(question.context) - 1
        places += range(begin, begin + len(question.said))
        said += question.said
    # Two continuations of one text are read off the same logits.
    once, which = torch.tensor(places, device=lm.device).unique(return_inverse=True)
    order = which.argsort(stable=True)
    hidden, wanted = states.flatten(0, 1)[once], torch.tensor(said, device=lm.device)
    log_p = torch.empty(len(said), dtype=at_least_float32(states).dtype, device=lm.device)
    greedy = torch.empty(len(said), dtype=torch.bool, device=lm.device)
    for begin in range(0, len(once), READ):
        logits = at_least_float32(lm.logits(hidden[begin : begin + READ]))
        here = order[(which[order] >= begin) & (which[order] < begin + READ)]
        at = which[here] - begin
        log_p[here] = logits.log_softmax(-1)[at, wanted[here]]
        greedy[here] = logits.argmax(-1)[at] == wanted[here]
    sizes = [len(question.said) for _, question in asked]
    parts = zip(log_p.cpu().double().split(sizes), greedy.cpu().split(sizes), strict=True)
    return [Score(log_p.numpy(), greedy.numpy()) for log_p, greedy in parts]


BATCH = 8  # texts that are run together


@torch.no_grad()
def next_log_p(lm: LanguageModel, texts: Sequence[Sequence[int]], doing: str) -> Iterator[Float[Tensor, "T V"]]:
    """For each text (token ids) the log probabilities of the next token after each of its tokens.

    Raises:
        ValueError: a text is too long for the model, or it says what is not a number; `doing` names what it was asked for.
    """
    lm.check_length(max(map(len, texts), default=0), doing)
    for begin in range(0, len(texts), BATCH):
        batch = texts[begin : begin + BATCH]
        # Padding right of a text cannot reach it in a causal model.
        ids = pad_sequence([torch.tensor(text, device=lm.device) for text in batch], batch_first=True)
        for text, logits in zip(batch, lm.model(ids, use_cache=False).logits, strict=True):
            lm.check_finite(logits[: len(text)], doing)
            yield at_least_float32(logits[: len(text)]).log_softmax(-1)


def continuation_p(
    lm: LanguageModel, asked: Sequence[tuple[list[int], list[int]]], doing: str
) -> tuple[list[float], Float[Tensor, "Q V"]]:
    """For each text and continuation (token ids) the probability of all tokens of the continuation (teacher forcing); and
    the log probabilities of the token after each text."""
    p, following = [], []
    texts = [text + said[:-1] for text, said in asked]
    for (_, said), log_p in zip(asked, next_log_p(lm, texts, doing), strict=True):
        behind = log_p[len(log_p) - len(said) :]
        p.append(float(behind[range(len(said)), said].sum().exp()))
        following.append(behind[0])
    return p, torch.stack(following)
