"""Judge: what a model says of a case under many changes at once, side by side.

judge_case(lm, case, changes, settings)   the metrics of `METRICS` for one case, a dictionary a change
judge_all(lm, sheets)                     those of several cases, each under a change of its own
damage(lm, change, settings)              nll and known of one change, whatever the case
questions_of(lm, case, ...)               what is asked about one change
marks_of, marks_of_damage, generation_marks    the metrics, computed from the answers: where a new one goes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rome_lab.base import check_whole
from rome_lab.evaluation.metrics import generation_entropy, magnitude, reference_score, token_accuracy
from rome_lab.evaluation.passages import PASSAGES
from rome_lab.evaluation.scorings import CASE_PARTS, OTHERS_OF, case_verdicts, ends_within, prompts_of, shares_of
from rome_lab.facts import Case, Fact, question
from rome_lab.models import Change, LanguageModel, Question, Score, generate, score


@dataclass(frozen=True)
class JudgeSettings:
    """How cases are judged, besides what the case itself asks.

    Attributes:
        new_tokens: length of the generated texts after their prompts; 0 generates nothing, and GE and RS are left out.
        top_k, seed: how they are drawn, see `rome_lab.models.sampling.generate`; a top_k of 1 is greedy.
        text_tokens: how many tokens of each passage make up nll; 0 leaves nll out.
        passages: places in `rome_lab.evaluation.passages.PASSAGES` of those that are read.
        written_tokens: most tokens of the greedy texts after the prompts, of which "written" is told: a text ends with its
            first sentence; 0 writes none.
        choose: whether the model is made to choose among the case's objects, as "choice" needs.
        known: facts that the unchanged model knows and the case does not touch; without any, "known" is left out.
        corpus: texts that RS takes its document frequencies from, such as the references of all cases.
    """

    new_tokens: int = 50
    top_k: int = 5
    seed: int = 0
    text_tokens: int = 128
    passages: tuple[int, ...] = (0,)
    written_tokens: int = 20
    choose: bool = True
    known: tuple[Fact, ...] = ()
    corpus: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_whole("JudgeSettings", new_tokens=(self.new_tokens, 0), top_k=(self.top_k, 1), seed=(self.seed, 0))
        check_whole("JudgeSettings", text_tokens=(self.text_tokens, 0), written_tokens=(self.written_tokens, 0))
        if not self.passages or not set(self.passages) <= set(range(len(PASSAGES))):
            raise ValueError(
                f"JudgeSettings: passages is {self.passages!r}; expected some of 0 to {len(PASSAGES) - 1}."
            )
        object.__setattr__(self, "passages", tuple(self.passages))
        object.__setattr__(self, "known", tuple(self.known))
        object.__setattr__(self, "corpus", tuple(self.corpus))


ZSRE_NAMES = {"rewrite": "efficacy", "paraphrases": "paraphrase", "neighbours": "specificity"}
SCORES_ONLY = JudgeSettings(new_tokens=0, text_tokens=0, written_tokens=0, choose=False)


def judge_case(
    lm: LanguageModel, case: Case, changes: Sequence[Change], settings: JudgeSettings = JudgeSettings()
) -> list[dict[str, float | list[str]]]:
    """What becomes of one case under each of the changes; see `judge_all`."""
    return judge_all(lm, [(case, change, settings) for change in changes])


def judge_all(
    lm: LanguageModel, sheets: Sequence[tuple[Case, Change, JudgeSettings]]
) -> list[dict[str, float | list[str]]]:
    """What becomes of each case under its change, all of them judged side by side; `lm` is left as it is.

    The more are judged at once, the faster each is: a step of generation reads all weights, for few texts as for many. A
    change's preamble stands before every prompt of the case, before the known facts and before the text of nll.

    Args: sheets: cases, changes and settings; these may differ in the known facts and passages, and in nothing else.

    Returns: a dictionary for each: the metrics of `METRICS` that the case's form has ("counterfact": ES, EM, PS, PM, NS,
        NM, GE, RS; "zsre": efficacy, paraphrase, specificity), those of the other scorings, nll and known, as numbers in
        the units given there; "generations", the list of generated texts, prompts included; "written", by part of the case
        the greedy texts after its prompts; and "verdicts", see `case_verdicts`. A metric that the case gives no prompts for
        is left out.

    Raises: ValueError: a text is too long for the model, a delta does not fit, or the model gives what is not a number.
    """
    if not sheets:
        return []
    cases, changes, several = zip(*sheets, strict=True)
    common = several[0]
    if len({replace(settings, known=(), passages=(0,)) for settings in several}) > 1:
        raise ValueError("judge_all: the settings differ in more than known facts and passages; judge those apart.")
    questions = [questions_of(lm, case, i, change.preamble, own) for i, (case, change, own) in enumerate(sheets)]
    scores = scores_of_each(lm, changes, questions)
    texts = write_greedily(lm, changes, cases, common.written_tokens)
    marks = [marks_of(*parts) for parts in zip(cases, scores, texts, strict=True)]
    writes = [case.form == "counterfact" and common.new_tokens > 0 for case in cases]
    prompts = [case.generation_prompts if writing else () for case, writing in zip(cases, writes, strict=True)]
    written = generate(lm, changes, prompts, common.new_tokens, common.top_k, common.seed)
    return [x | generation_marks(texts, case, common) for case, x, texts in zip(cases, marks, written, strict=True)]


def write_greedily(
    lm: LanguageModel, changes: Sequence[Change], cases: Sequence[Case], new_tokens: int
) -> list[dict[str, list[str]]]:
    """By part of each case, what the model writes after its prompts until a sentence ends; nothing for no tokens."""
    if not new_tokens:
        return [{} for _ in cases]
    several = [prompts_of(case) for case in cases]
    pairs = [sum(parts.values(), []) for parts in several]  # of a prompt and what is wanted there

    def is_whole(owner: int, place: int, text: str) -> bool:
        return ends_within(text, pairs[owner][place][1])

    prompts = [[prompt for prompt, _ in own] for own in pairs]
    written = map(iter, generate(lm, changes, prompts, new_tokens, top_k=1, is_whole=is_whole))
    return [
        {part: [next(texts)[len(prompt) :] for prompt, _ in own] for part, own in parts.items()}
        for parts, texts in zip(several, written, strict=True)
    ]


def scores_of_each(
    lm: LanguageModel, changes: Sequence[Change], sheets: Sequence[dict[str, list[Question]]]
) -> list[dict[str, list[Score]]]:
    """The scores of all questions, in the form of the sheets; all are asked together."""
    scores = iter(score(lm, changes, [question for sheet in sheets for part in sheet.values() for question in part]))
    return [{name: [next(scores) for _ in part] for name, part in sheet.items()} for sheet in sheets]


def damage(lm: LanguageModel, change: Change, settings: JudgeSettings) -> dict[str, float]:
    """The metrics of one change that no case has a part in: nll and known, as in `judge_all`; `lm` is left as it is.

    Raises: ValueError: a text is too long for the model, or the model gives what is not a number.
    """
    sheet = questions_of_damage(lm, 0, change.preamble, settings)
    return marks_of_damage(*scores_of_each(lm, [change], [sheet]))


def questions_of(
    lm: LanguageModel, case: Case, owner: int, preamble: str, settings: JudgeSettings
) -> dict[str, list[Question]]:
    """All that is asked about one change, by what it is asked for."""

    def ask(prompt: str, continuation: str) -> Question:
        return question(lm, owner, preamble + prompt, continuation)

    choices = case.choice_pairs if settings.choose else {}
    return {
        **{
            name: [ask(*pair) for pair in pairs]
            for name, pairs in (case.pairs | case.dependent_pairs | choices).items()
        },
        **questions_of_damage(lm, owner, preamble, settings),
    }


def questions_of_damage(
    lm: LanguageModel, owner: int, preamble: str, settings: JudgeSettings
) -> dict[str, list[Question]]:
    """What is asked about a change whatever the case."""
    beginnings = [PASSAGES[number].partition(" ") for number in settings.passages if settings.text_tokens]
    texts = [question(lm, owner, preamble + first, rest) for first, _, rest in beginnings]
    return {
        "known": [question(lm, owner, preamble + fact.prompt, fact.object) for fact in settings.known],
        "text": [replace(text, continuation=text.continuation[: settings.text_tokens]) for text in texts],
    }


def marks_of(case: Case, marks: dict[str, list[Score]], written: dict[str, list[str]]) -> dict[str, float | dict]:
    """The metrics of one change that need no text drawn at random, what was written, and the verdicts at each prompt."""
    verdicts = case_verdicts(case, marks, written)
    metrics: dict[str, float | dict] = shares_of(verdicts)
    for letter, part in CASE_PARTS.items():
        if part not in ZSRE_NAMES or not marks[part]:
            continue
        if case.form == "zsre":
            metrics[ZSRE_NAMES[part]] = token_accuracy([x.greedy for x in marks[part]])
        else:
            metrics[f"{letter}M"] = magnitude(*([x.total for x in marks[name]] for name in (part, OTHERS_OF[part])))
    return metrics | marks_of_damage(marks) | {"written": written, "verdicts": verdicts}


def marks_of_damage(marks: dict[str, list[Score]]) -> dict[str, float]:
    """nll and known."""
    metrics: dict[str, float] = {}
    if marks["text"]:
        metrics["nll"] = -float(np.concatenate([text.log_p for text in marks["text"]]).mean())
    if marks["known"]:
        metrics["known"] = 100.0 * float(np.mean([x.greedy.all() for x in marks["known"]]))
    return metrics


def generation_marks(texts: list[str], case: Case, settings: JudgeSettings) -> dict[str, float | list[str]]:
    """GE and RS of one change's texts, and the texts."""
    metrics: dict[str, float | list[str]] = {"generations": texts}
    if texts:
        metrics["GE"] = generation_entropy(texts)
    if texts and case.references:
        metrics["RS"] = reference_score(texts, case.references, settings.corpus)
    return metrics
