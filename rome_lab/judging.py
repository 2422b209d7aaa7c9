"""Judge: what a model says of a case under many changes at once, side by side.

judge(lm, case, changes, settings)   the metrics of `rome_lab.metrics.METRICS` for one case, a dictionary a change
damage(lm, change, settings)         nll and known of one change, whatever the case
score(lm, changes, questions)        log probabilities of given continuations, each under a change of its own
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rome_lab import metrics
from rome_lab.audit import TEXT
from rome_lab.blocks import at_least_float32, output_changed
from rome_lab.case import Case
from rome_lab.changes import Change, side_by_side
from rome_lab.facts import Fact
from rome_lab.generation import generate
from rome_lab.memory import Batching, text_bytes
from rome_lab.models import LanguageModel
from rome_lab.prompts import continuation_ids
from rome_lab.texts import check_whole

PADDING = 8  # most tokens that a row is padded by
READ = 256  # places whose logits are in memory at once


@dataclass(frozen=True)
class JudgeSettings:
    """How cases are judged, besides what the case itself asks.

    Attributes:
        new_tokens: length of the generated texts after their prompts; 0 generates nothing, and GE and RS are left out.
        top_k, seed: how they are drawn, see `rome_lab.generation.generate`; a top_k of 1 is greedy.
        text_tokens: how many tokens of `rome_lab.audit.TEXT` make up nll; 0 leaves nll out.
        known: facts that the unchanged model knows and the case does not touch; without any, "known" is left out.
        corpus: texts that RS takes its document frequencies from, such as the references of all cases.
    """

    new_tokens: int = 50
    top_k: int = 5
    seed: int = 0
    text_tokens: int = 128
    known: tuple[Fact, ...] = ()
    corpus: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_whole("JudgeSettings", new_tokens=(self.new_tokens, 0), top_k=(self.top_k, 1), seed=(self.seed, 0))
        check_whole("JudgeSettings", text_tokens=(self.text_tokens, 0))
        object.__setattr__(self, "known", tuple(self.known))
        object.__setattr__(self, "corpus", tuple(self.corpus))


SCORES_ONLY = JudgeSettings(new_tokens=0, text_tokens=0)


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


def judge(
    lm: LanguageModel, case: Case, changes: Sequence[Change], settings: JudgeSettings = JudgeSettings()
) -> list[dict[str, float | list[str]]]:
    """What becomes of one case under each of the changes, all of them judged side by side; `lm` is left as it is.

    A change's preamble stands before every prompt of the case, before the known facts and before the text of nll.

    Returns: a dictionary a change: the metrics of `METRICS` that the case's form has ("counterfact": ES, EM, PS, PM, NS,
        NM, GE, RS; "zsre": efficacy, paraphrase, specificity), nll and known, as numbers in the units given there, and
        "generations", the list of generated texts, prompts included. A metric that the case gives no prompts for is left
        out.

    Raises: ValueError: a text is too long for the model, a delta does not fit, or the model gives what is not a number.
    """
    sheets = [questions_of(lm, case, owner, change.preamble, settings) for owner, change in enumerate(changes)]
    scores = iter(score(lm, changes, [x for sheet in sheets for asked in sheet.values() for x in asked]))
    marks = [{name: [next(scores) for _ in asked] for name, asked in sheet.items()} for sheet in sheets]
    found = [marks_of(case.form, x) for x in marks]
    prompts = case.generation_prompts if settings.new_tokens and case.form == "counterfact" else ()
    written = generate(lm, changes, prompts, settings.new_tokens, settings.top_k, settings.seed)
    return [x | generation_marks(texts, case, settings) for x, texts in zip(found, written, strict=True)]


def damage(lm: LanguageModel, change: Change, settings: JudgeSettings) -> dict[str, float]:
    """The metrics of one change that no case has a part in: nll and known, as in `judge`; `lm` is left as it is.

    Raises: ValueError: a text is too long for the model, or the model gives what is not a number.
    """
    sheet = questions_of_damage(lm, 0, change.preamble, settings)
    scores = iter(score(lm, [change], [x for asked in sheet.values() for x in asked]))
    return marks_of_damage({name: [next(scores) for _ in asked] for name, asked in sheet.items()})


def questions_of(
    lm: LanguageModel, case: Case, owner: int, preamble: str, settings: JudgeSettings
) -> dict[str, list[Question]]:
    """All that is asked about one change, by what it is asked for."""

    def ask(prompt: str, continuation: str) -> Question:
        return question(lm, owner, preamble + prompt, continuation)

    return {
        "rewrite": [ask(case.fact.prompt, case.target)],
        "rewrite_true": [ask(case.fact.prompt, case.fact.object)],
        "paraphrases": [ask(prompt, case.target) for prompt in case.paraphrases],
        "paraphrases_true": [ask(prompt, case.fact.object) for prompt in case.paraphrases],
        "neighbours": [ask(*pair) for pair in zip(case.neighbours, case.neighbour_answers, strict=True)],
        "neighbours_target": [ask(prompt, case.target) for prompt in case.neighbours],
        **questions_of_damage(lm, owner, preamble, settings),
    }


def questions_of_damage(
    lm: LanguageModel, owner: int, preamble: str, settings: JudgeSettings
) -> dict[str, list[Question]]:
    """What is asked about a change whatever the case."""
    first, _, rest = TEXT.partition(" ")
    text = question(lm, owner, preamble + first, rest)
    return {
        "known": [question(lm, owner, preamble + fact.prompt, fact.object) for fact in settings.known],
        "text": [Question(owner, text.context, text.said[: settings.text_tokens])] if settings.text_tokens else [],
    }


def question(lm: LanguageModel, owner: int, text: str, continuation: str) -> Question:
    """How a text should go on, in tokens."""
    return Question(owner, tuple(lm.tokenizer(text)["input_ids"]), tuple(continuation_ids(lm, text, continuation)))


def marks_of(form: str, marks: dict[str, list[Score]]) -> dict[str, float]:
    """The metrics of one change that need no generated text."""
    found: dict[str, float] = {}
    if form == "zsre":
        for metric, asked in (("efficacy", "rewrite"), ("paraphrase", "paraphrases"), ("specificity", "neighbours")):
            if marks[asked]:
                found[metric] = metrics.token_accuracy([x.greedy for x in marks[asked]])
    else:
        for letter, wanted, other in (
            ("E", "rewrite", "rewrite_true"),
            ("P", "paraphrases", "paraphrases_true"),
            ("N", "neighbours", "neighbours_target"),
        ):
            if marks[wanted]:
                pair = [x.total for x in marks[wanted]], [x.total for x in marks[other]]
                found |= {f"{letter}S": metrics.success(*pair), f"{letter}M": metrics.magnitude(*pair)}
    return found | marks_of_damage(marks)


def marks_of_damage(marks: dict[str, list[Score]]) -> dict[str, float]:
    """nll and known."""
    found: dict[str, float] = {}
    if marks["text"]:
        found["nll"] = -float(marks["text"][0].log_p.mean())
    if marks["known"]:
        found["known"] = 100.0 * float(np.mean([x.greedy.all() for x in marks["known"]]))
    return found


def generation_marks(texts: list[str], case: Case, settings: JudgeSettings) -> dict[str, float | list[str]]:
    """GE and RS of one change's texts, and the texts."""
    found: dict[str, float | list[str]] = {"generations": texts}
    if texts:
        found["GE"] = metrics.generation_entropy(texts)
    if texts and case.references:
        found["RS"] = metrics.reference_score(texts, case.references, settings.corpus)
    return found


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
        answers = read(lm, states, [(place_of[row_of[number]], questions[number]) for number in numbers])
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


def read(lm: LanguageModel, states: Tensor, asked: Sequence[tuple[int, Question]]) -> list[Score]:
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
