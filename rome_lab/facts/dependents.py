"""What follows from an edit, and what does not: prompts about its subject whose answers depend on the fact, or don't.

with_dependents(lm, cases)    cases with those prompts that the model, as it is, answers right
candidates(case, knowledge)   all of them, whatever a model knows
read_knowledge()              the embedded facts by relation and subject, and what leads from one to another

A landmark that is moved to another city stands in that city's country (follows), and the religion it belongs to is the same
(stays). As in RippleEdits (Cohen et al. 2024, arXiv 2307.12976) a prompt is asked only where the unedited model meets its
conditions: it gives the old answer, and knows what leads from the target to the new one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from rome_lab.base import mentions
from rome_lab.facts.case import Case, Cases
from rome_lab.facts.completion import completions
from rome_lab.facts.records import text_at
from rome_lab.facts.sources import Relation, embedded_records, load_relations
from rome_lab.models import LanguageModel

# Of these two relations a change of the one makes the other doubtful.
ENTANGLED = frozenset(
    frozenset(pair)
    for pair in (
        ("field_of_scientist", "profession_of_person"),
        ("country_of_person", "language_of_writer"),
        ("country_of_person", "birthplace_of_person"),
        ("birthplace_of_person", "language_of_writer"),
        ("country_of_company", "headquarters_of_company"),
    )
)


@dataclass(frozen=True)
class Dependent:
    """A prompt about a case's subject, its answer before the edit, and, where the edit changes it, after.

    Attributes:
        new: None where the answer stays.
        conditions: prompts with their answers, one of which the model has to know; none where nothing leads on.
    """

    prompt: str
    old: str
    new: str | None = None
    conditions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Knowledge:
    """The embedded facts, as far as one leads to another.

    Attributes:
        relations: by name.
        objects: by relation and subject, of those that have one alone.
        through: by relation, pairs of the relation that leads on and a template about the subject.
    """

    relations: Mapping[str, Relation]
    objects: Mapping[str, Mapping[str, str]]
    through: Mapping[str, Sequence[tuple[str, str]]]


@lru_cache(maxsize=1)
def read_knowledge() -> Knowledge:
    """The embedded facts and `dependents.csv`, with the countries of capitals, and those of `bridges.csv`."""
    relations = load_relations()
    several: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, relation in relations.items():
        for fact in relation.facts:
            several[name][fact.subject].add(fact.object)
            if name == "capital_of_country":
                several["country_of_city"][fact.object].add(fact.subject)
    for record in embedded_records("bridges.csv"):
        relation, subject, answer = (text_at(record, name) for name in ("relation", "subject", "object"))
        several[relation][subject].add(answer)
    objects = {name: {x: next(iter(y)) for x, y in of.items() if len(y) == 1} for name, of in several.items()}
    through: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for record in embedded_records("dependents.csv"):
        through[text_at(record, "relation")].append((text_at(record, "through"), text_at(record, "template")))
    return Knowledge(relations, objects, dict(through))


def candidates(case: Case, knowledge: Knowledge) -> list[Dependent]:
    """The prompts about a case's subject whose answers are known before and after its edit; none in zsRE."""
    fact, relation = case.fact, case.fact.relation
    if case.form == "zsre" or relation not in knowledge.relations:
        return []
    dependents = []
    for through, template in knowledge.through.get(relation, ()):
        answers = knowledge.objects[through]
        old, new = answers.get(fact.object), answers.get(case.target)
        if old is None or new is None:
            continue
        statements = knowledge.relations[through].statements
        conditions = tuple((replace(fact, subject=case.target, template=x).prompt, new) for x in statements)
        changed = {"new": new, "conditions": conditions} if new != old else {}
        dependents.append(Dependent(replace(fact, template=template).prompt, old, **changed))
    for name, answers in knowledge.objects.items():
        related = name in {through for through, _ in knowledge.through.get(relation, ())}
        if name == relation or related or frozenset((name, relation)) in ENTANGLED or fact.subject not in answers:
            continue
        templates = knowledge.relations[name].statements
        dependents += [Dependent(replace(fact, template=x).prompt, answers[fact.subject]) for x in templates[:2]]
    return [x for x in dependents if not any(mentions(x.prompt, y) for y in (x.old, x.new) if y)]


def with_dependents(lm: LanguageModel, cases: Cases) -> Cases:
    """The cases with `entailed` and `kept` prompts, as far as the unedited model meets their conditions."""
    knowledge = read_knowledge()
    several = [candidates(case, knowledge) for case in cases]
    pairs = [pair for own in several for x in own for pair in ((x.prompt, x.old), *x.conditions)]
    known = dict(zip(pairs, completions(lm, pairs, "known_cases"), strict=True)) if pairs else {}

    def holds_true(pair: tuple[str, str]) -> bool:
        return bool(known[pair].greedy.all())

    def met(x: Dependent) -> bool:
        return holds_true((x.prompt, x.old)) and (x.new is None or any(map(holds_true, x.conditions)))

    return replace(
        cases,
        cases=tuple(
            replace(
                case,
                entailed=tuple((x.prompt, x.new, x.old) for x in own if x.new is not None and met(x)),
                kept=tuple((x.prompt, x.old) for x in own if x.new is None and met(x)),
            )
            for case, own in zip(cases, several, strict=True)
        ),
    )
