"""Questions and answers made of the embedded facts, in the form of zsRE: `build_questions`.

An edit teaches the answer to a question about a fact, known or not; asked in other words it has to be the answer, too, and
questions about other facts keep theirs (Mitchell et al. 2022, Meng et al. 2022, table 1).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from rome_lab.base import mentions
from rome_lab.facts.built_cases import fill, in_random_order
from rome_lab.facts.case import Case, Cases
from rome_lab.facts.fact import Fact
from rome_lab.facts.records import text_at
from rome_lab.facts.sources import embedded_records

UNRELATED_QUESTIONS = 3  # of zsRE's cases each has one


def build_questions(facts: Sequence[Fact], seed: int = 0) -> Cases:
    """A case of the form "zsre" for each fact whose relation has questions, and whose subject one object alone.

    Args:
        facts: the embedded ones, or others of their relations.
        seed: decides which question teaches the answer, and which others are asked.

    Returns: Cases in the order of the facts: the fact at one of its questions, its object as the target; the relation's
        other question; and questions about other subjects, of other relations, with their own answers.
    """
    questions: dict[str, list[str]] = defaultdict(list)
    for record in embedded_records("questions.csv"):
        questions[text_at(record, "relation")].append(text_at(record, "question"))
    objects = Counter((fact.relation, fact.subject) for fact in facts)
    usable = [x for x in facts if x.relation in questions and objects[x.relation, x.subject] == 1]
    by_place = in_random_order(usable, seed, "questions", Fact("-", "{}", "-"))
    place_of = {(x.relation, x.subject): place for place, x in enumerate(by_place)}
    cases = []
    for fact in usable:
        first, *others = in_random_order(questions[fact.relation], seed, "question", fact)
        at_question = replace(fact, template=first, templates=())
        unrelated = unrelated_questions(at_question, by_place, place_of[fact.relation, fact.subject], questions)
        cases.append(
            Case(
                id=f"question/{fact.relation}/{fact.subject}",
                fact=at_question,
                target=fact.object,
                paraphrases=tuple(fill(template, fact) for template in others),
                neighbours=tuple(x.prompt for x in unrelated),
                neighbour_answers=tuple(x.object for x in unrelated),
                form="zsre",
                neighbour_subjects=tuple(x.subject for x in unrelated),
            )
        )
    return Cases(
        tuple(cases), {"the relation has no questions, or the subject several objects": len(facts) - len(cases)}
    )


def unrelated_questions(fact: Fact, others: Sequence[Fact], place: int, questions: dict[str, list[str]]) -> list[Fact]:
    """The next facts of other relations, each about another subject and object, at their first questions."""
    unrelated: list[Fact] = []
    for x in (*others[place + 1 :], *others[:place]):
        prompt = fill(questions[x.relation][0], x)
        if x.relation == fact.relation or {x.subject, x.object} & {fact.subject, fact.object}:
            continue
        if mentions(prompt, fact.subject) or x.relation in {y.relation for y in unrelated}:
            continue
        unrelated.append(replace(x, template=questions[x.relation][0], templates=()))
        if len(unrelated) == UNRELATED_QUESTIONS:
            break
    return unrelated
