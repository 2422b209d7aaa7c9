"""Log probabilities of given continuations, by whole texts (teacher forcing): the one place that asks a model for them.

Question(owner, context, continuation)   a text, how it should go on, and under which change
score(lm, changes, questions)            a Score for each; as many rows together as fit, fewer where memory runs out
log_p_of(lm, states, tokens)             of given next tokens, where gradients pass
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from rome_lab.models.batching import Batching, rows_at_once, text_bytes
from rome_lab.models.blocks import at_least_float32, output_changed
from rome_lab.models.changes import Change, side_by_side
from rome_lab.models.language_model import LanguageModel

OwnedText: TypeAlias = tuple[int, tuple[int, ...]]
"""A change's place, and token ids that are read under it."""
PASS = 32  # tokens that take about as long as a pass takes besides: what a pass is spent on, or saved by, is worth more
READ = 256  # places whose logits are in memory at once, fewer where the vocabulary is large


@dataclass(frozen=True)
class Question:
    """A text and how it should go on, for one change.

    Attributes:
        owner: place of the change.
        context, continuation: token ids of the text, and of the continuation that is judged, all of them.
    """

    owner: int
    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def text(self) -> tuple[int, ...]:
        """What the model reads: the continuation is read too, but for its last token (teacher forcing)."""
        return self.context + self.continuation[:-1]


@dataclass(frozen=True, eq=False)
class Score:
    """What the model makes of one question.

    Attributes:
        log_p: (tokens of the continuation,) float64, log probability of each after the context and those before it.
        greedy: of the same shape, whether each is the most probable token there.
        following: (V,) log probability of every token after the context, at least float32; None where not asked for.
    """

    log_p: np.ndarray
    greedy: np.ndarray
    following: Float[Tensor, " V"] | None = None

    @property
    def total(self) -> float:
        """Log probability of the whole continuation."""
        return float(self.log_p.sum())

    @property
    def p(self) -> float:
        """Probability of the whole continuation."""
        return float(np.exp(self.log_p.sum()))


@torch.no_grad()
def score(
    lm: LanguageModel,
    changes: Sequence[Change],
    questions: Sequence[Question],
    doing: str = "judge",
    following: bool = False,
) -> list[Score]:
    """Log probabilities of every question's continuation under its own change, by whole texts (teacher forcing).

    Questions of one change whose texts are the same, or the beginning of another's, share a row; a context that goes on in
    several ways is read once, and its keys and values serve all of them.

    Args:
        changes: `Change()` leaves the model as it is.
        doing: what it is for, to begin a message with.
        following: whether each Score holds the whole distribution of the token after its context, too.

    Raises: ValueError: a text is too long for the model, a delta does not fit, or the model gives what is not a number.
    """
    rows, row_of = shared_rows(questions)
    if (longest := max((len(text) for _, text in rows), default=0)) > lm.context_length:
        raise ValueError(
            f"{doing}: a text of {longest} tokens is more than {lm.name} reads, {lm.context_length}; shorten the prompt or "
            "the change's preamble, or set text_tokens lower."
        )
    numbers_of: dict[int, list[int]] = {}
    for number, row in enumerate(row_of):
        numbers_of.setdefault(row, []).append(number)

    def score_part(part: Sequence[int], shared: int) -> dict[int, Score]:
        numbers = [number for row in part for number in numbers_of[row]]
        states = last_states(lm, changes, [rows[row] for row in part], shared)
        place_of = {row: place for place, row in enumerate(part)}
        places = [(place_of[row_of[number]], questions[number]) for number in numbers]
        answers = read_scores(lm, states, places, following)
        return dict(zip(numbers, answers, strict=True))

    scores: dict[int, Score] = {}
    for shared, some in by_shared_length(rows, shared_contexts(questions, row_of)).items():
        for alike in of_one_length(rows, some):
            longest = max(len(rows[row][1]) for row in alike)
            together = Batching(lm, doing, text_bytes(lm, longest, cached=shared > 0))
            for answers in together.over(alike, partial(score_part, shared=shared)):
                scores |= answers
    for number, answer in scores.items():
        if np.isnan(answer.log_p).any():
            owner = questions[number].owner
            where = f"{doing}, with change {owner} (at layer {changes[owner].layer})" if doing == "judge" else doing
            lm.check_finite(torch.tensor(answer.log_p), where)
    return [scores[number] for number in range(len(questions))]


def shared_rows(questions: Sequence[Question]) -> tuple[list[OwnedText], list[int]]:
    """Rows (owner, text) that hold every question's text at their beginning, and the row of each question."""
    texts = sorted({(x.owner, x.text) for x in questions})
    rows: list[OwnedText] = []
    held: dict[OwnedText, int] = {}
    for owner, text in reversed(texts):  # what begins another text comes right before one that it begins
        if not (rows and rows[-1][0] == owner and rows[-1][1][: len(text)] == text):
            rows.append((owner, text))
        held[owner, text] = len(rows) - 1
    return rows, [held[x.owner, x.text] for x in questions]


def shared_contexts(questions: Sequence[Question], row_of: Sequence[int]) -> dict[int, int]:
    """By row, the length of the longest context at its beginning that begins another row of the same change, too."""
    contexts = {(row, x.owner, x.context) for x, row in zip(questions, row_of, strict=True)}
    rows_with = Counter((owner, context) for _, owner, context in contexts)
    shared = sorted((row, len(context)) for row, owner, context in contexts if rows_with[owner, context] > 1)
    return dict(shared)


def by_shared_length(rows: Sequence[OwnedText], shared: Mapping[int, int]) -> dict[int, list[int]]:
    """The places of `rows` by how many tokens are read before they part; 0 where that would save less than a pass."""
    groups: dict[int, list[int]] = {}
    for row in range(len(rows)):
        groups.setdefault(shared.get(row, 0), []).append(row)
    for length, some in list(groups.items()):
        beginnings = {(owner, text[:length]) for owner, text in map(rows.__getitem__, some)}
        if length and length * (len(some) - len(beginnings)) <= PASS:
            groups[0] = sorted(groups.get(0, []) + groups.pop(length))
    return groups


def of_one_length(rows: Sequence[OwnedText], some: Sequence[int]) -> Iterator[list[int]]:
    """Some places of `rows` in groups of nearly one length, the rows of a change side by side."""
    part: list[int] = []
    padding = 0
    for row in sorted(some, key=lambda row: -len(rows[row][1])):
        padding += len(rows[part[0]][1]) - len(rows[row][1]) if part else 0
        if padding > PASS:
            yield sorted(part, key=lambda row: rows[row])
            part, padding = [], 0
        part.append(row)
    if part:
        yield sorted(part, key=lambda row: rows[row])


def last_states(lm: LanguageModel, changes: Sequence[Change], rows: Sequence[OwnedText], shared: int = 0) -> Tensor:
    """(B, T, D) outputs of the last block, each row run under its own change.

    Args: shared: how many tokens of every row are read in a pass before the others, once for all rows that begin alike.
    """
    lm.check_mode()
    states: list[Tensor] = []

    def read(part: Sequence[OwnedText], cache: Cache | None = None) -> Cache | None:
        ids = torch.tensor([text for _, text in part], device=lm.device)
        with side_by_side(lm, changes, [owner for owner, _ in part]), output_changed(lm.blocks[-1], states.append):
            output = lm.model.base_model(input_ids=ids, past_key_values=cache, use_cache=shared > 0)
        return output.past_key_values if shared else None

    longest = max(len(text) for _, text in rows)
    # Padded at the right, where no token before it sees it: the causal mask is all that is needed.
    rest = [(owner, text[shared:] + text[-1:] * (longest - len(text))) for owner, text in rows]
    if not shared:
        read(rest)
        return states[0].to(lm.device)
    begins = [(owner, text[:shared]) for owner, text in rows]
    place_of = {begin: place for place, begin in enumerate(dict.fromkeys(begins))}
    places = torch.tensor([place_of[begin] for begin in begins])
    cache = read(list(place_of))
    cache.batch_select_indices(places)  # on the CPU, whose indices pick from the keys of layers on any device
    read(rest, cache)
    before, after = (part.to(lm.device) for part in states)
    return torch.cat([before[places], after], 1)


def read_scores(
    lm: LanguageModel, states: Tensor, questions: Sequence[tuple[int, Question]], following: bool
) -> list[Score]:
    """The scores of questions, each with its row in `states` (B, T, D); logits are made only where they are read."""
    length = states.shape[1]
    sizes = [len(question.continuation) for _, question in questions]
    begins = [row * length + len(question.context) - 1 for row, question in questions]
    places = [place for begin, size in zip(begins, sizes, strict=True) for place in range(begin, begin + size)]
    # Two continuations of one text are read off the same logits.
    once, which = torch.tensor(places, device=lm.device).unique(return_inverse=True)
    order = which.argsort(stable=True)
    hidden = states.flatten(0, 1)[once]
    tokens = torch.tensor([token for _, question in questions for token in question.continuation], device=lm.device)
    log_p = torch.empty(len(tokens), dtype=at_least_float32(states).dtype, device=lm.device)
    greedy = torch.empty(len(tokens), dtype=torch.bool, device=lm.device)
    first = which[torch.tensor([0, *sizes[:-1]]).cumsum(0).to(which.device)].tolist() if following else []
    after: dict[int, Tensor] = {}  # by place in `once`, the whole distribution
    most = rows_at_once(lm.config.vocab_size, READ)
    for begin in range(0, len(once), most):
        logits = at_least_float32(lm.logits(hidden[begin : begin + most]))
        here = order[(which[order] >= begin) & (which[order] < begin + most)]
        at = which[here] - begin
        distributions = logits.log_softmax(-1)
        log_p[here] = distributions[at, tokens[here]]
        greedy[here] = logits.argmax(-1)[at] == tokens[here]
        after |= {place: distributions[place - begin].clone() for place in first if begin <= place < begin + most}
    whole = [after[place] for place in first] if following else [None] * len(sizes)
    parts = zip(log_p.cpu().double().split(sizes), greedy.cpu().split(sizes), whole, strict=True)
    return [Score(log_p.numpy(), greedy.numpy(), distribution) for log_p, greedy, distribution in parts]


def log_p_of(lm: LanguageModel, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log probabilities of given next tokens, and whole distributions after the states behind theirs; gradients pass.

    Args:
        states: (R, D) outputs of the last block.
        tokens: (N,) ids of the tokens after the first N of them.

    Returns: (N,) log P of the tokens, and (R - N, V) log P of every token after the others.
    """

    def read(part: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        log_p = at_least_float32(lm.logits(part)).log_softmax(-1)
        return log_p[: len(ids)].gather(1, ids[:, None])[:, 0], log_p[len(ids) :]

    most = rows_at_once(lm.config.vocab_size, len(states))
    if most == len(states):
        return read(states, tokens)
    # Logits of several parts would all be kept for the gradient; so each part's are made once more when it is computed.
    parts = [
        checkpoint(read, states[begin : begin + most], tokens[begin : begin + most], use_reentrant=False)
        for begin in range(0, len(states), most)
    ]
    given, whole = zip(*parts, strict=True)
    return torch.cat(given), torch.cat(whole)
