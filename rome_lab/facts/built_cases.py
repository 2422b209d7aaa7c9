"""The benchmark made of facts alone: `build_cases` finds each fact's target, paraphrases, neighbours and references.

Whatever is chosen at random depends on the seed and on the fact, never on the order of the facts, and the target does not
depend on the prompt either, so that two models that know a fact are asked to change it in the same way.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from rome_lab.base import holds, mentions, seed_from
from rome_lab.facts.case import Case, Cases, Unusable
from rome_lab.facts.fact import Fact
from rome_lab.facts.records import text_at
from rome_lab.facts.sources import embedded_records, load_relations

PLAIN_PARAPHRASES = 2  # paraphrases by another template alone; one more comes after an unrelated sentence
NEIGHBOURS = 6  # at most, each about another subject
LEAST_NEIGHBOURS = 5  # with fewer subjects, some are asked about by more than one template
LEAST_SUBJECTS = 2
REFERENCES = 8  # at most
CHOICES = 6  # at most
LEAST_REFERENCES = 3
Shuffled = TypeVar("T", str, Fact)


@dataclass(frozen=True)
class Group:
    """What is known of one relation.

    Attributes:
        facts: each subject and object once.
        true: (subject, object) of these, and what is true besides.
        preferred: (subject, object) of those that are preferred as neighbours, by their own prompt.
        templates: all that state the relation.
        generations: templates that invite free text about the subject.
        ending: what a whole sentence needs after the object.
    """

    facts: tuple[Fact, ...]
    true: frozenset[tuple[str, str]]
    preferred: frozenset[tuple[str, str]]
    templates: tuple[str, ...]
    generations: tuple[str, ...]
    ending: str = ""


@dataclass(frozen=True)
class Background:
    """What all cases share: the relations by name, and unrelated sentences."""

    groups: dict[str, Group]
    lead_ins: tuple[str, ...]


def build_cases(facts: Iterable[Fact], pool: Iterable[Fact] | None = None, seed: int = 0) -> Cases:
    """A case for every fact whose relation gives one.

    Args:
        facts: what is to be rewritten, at each fact's own prompt; facts that a model knows carry the prompt that the model
            completes.
        pool: where targets, neighbours and references may come from besides. Where it is given, `facts` are preferred
            as neighbours, by their own prompts; without it, facts are all there is, and none is preferred.
        seed: decides what is chosen, with nothing else but each fact and its relation.

    Returns: Cases in the order of the facts. Each has a target of the same relation that is not true of the subject, begins
        with other letters than the object and is about as frequent an object as it; three paraphrases, one of them after
        an unrelated sentence; five or six neighbours about at least two other subjects with the same object; prompts for
        generation; at least three sentences about other subjects of which the target is true; and up to six further objects
        to choose among.
    """
    facts = tuple(facts)
    background = read_background(facts, pool)
    cases: dict[str, Case] = {}
    dropped: Counter[str] = Counter()
    for fact in facts:
        try:
            case = build_case(fact, background, seed)
            if case.id in cases:
                raise Unusable("another fact has the same relation, subject and object")
            cases[case.id] = case
        except Unusable as reason:
            dropped[str(reason)] += 1
    return Cases(tuple(cases.values()), dict(dropped))


def read_background(facts: Sequence[Fact], pool: Iterable[Fact] | None) -> Background:
    """The facts and the pool by relation, and the project's own sentences and exceptions."""
    together: dict[str, list[Fact]] = {}
    for fact in dict.fromkeys([*facts, *(pool or ())]):
        if fact.relation:
            together.setdefault(fact.relation, []).append(fact)
    preferred = frozenset((fact.relation, fact.subject, fact.object) for fact in facts) if pool is not None else ()
    embedded = load_relations()
    also_true: dict[str, list[tuple[str, str]]] = {}
    for record in embedded_records("also_true.csv"):
        relation, subject, answer = (text_at(record, name) for name in ("relation", "subject", "object"))
        also_true.setdefault(relation, []).append((subject, answer))
    groups = {}
    for name, members in together.items():
        once = {(fact.subject, fact.object): fact for fact in reversed(members)}  # the first of several stays
        templates = dict.fromkeys(x for fact in members for x in fact.templates or (fact.template,))
        groups[name] = Group(
            facts=tuple(once.values()),
            true=frozenset([*once, *also_true.get(name, ())]),
            preferred=frozenset((subject, answer) for relation, subject, answer in preferred if relation == name),
            templates=tuple(templates),
            # A relation of the user's own has no such templates: the model may go on from the bare subject.
            generations=embedded[name].generations if name in embedded else ("{}",),
            ending=embedded[name].ending if name in embedded else "",
        )
    lead_ins = tuple(text_at(record, "sentence") for record in embedded_records("lead_ins.csv"))
    return Background(groups, lead_ins)


def build_case(fact: Fact, background: Background, seed: int) -> Case:
    """The case of one fact; Unusable where its relation does not give one."""
    if not fact.relation:
        raise Unusable("the fact has no relation")
    group = background.groups[fact.relation]
    target = choose_target(fact, group, seed)
    if mentions(fact.prompt, target):
        raise Unusable("the target stands in the rewrite prompt")
    spared = replace(group, facts=tuple(x for x in group.facts if (x.subject, target) not in group.true))
    neighbours = choose_neighbours(fact, spared, seed)
    return Case(
        id=f"{fact.relation}/{fact.subject}/{fact.object}",
        fact=fact,
        target=target,
        paraphrases=choose_paraphrases(fact, target, group, background.lead_ins, seed),
        neighbours=tuple(neighbour.prompt for neighbour in neighbours),
        neighbour_answers=(fact.object,) * len(neighbours),
        generation_prompts=tuple(fill(template, fact) for template in group.generations),
        references=choose_references(fact, target, group, seed),
        neighbour_subjects=tuple(neighbour.subject for neighbour in neighbours),
        choices=choose_choices(fact, target, [x.subject for x in neighbours], group, seed),
    )


def choose_target(fact: Fact, group: Group, seed: int) -> str:
    """Another object of the relation, drawn from those whose frequency is nearest to that of the true one."""
    frequency = Counter(other.object for other in group.facts)
    usable = [
        other
        for other, count in frequency.items()
        if count >= LEAST_REFERENCES
        and (fact.subject, other) not in group.true
        and not begin_alike(other, fact.object)
        and not mentions(fact.subject, other)
    ]
    if not usable:
        raise Unusable("no other object of the relation can be the target")
    drawn = in_random_order(usable, seed, "target", fact)
    nearest = sorted(drawn, key=lambda other: abs(math.log(frequency[other] / frequency[fact.object])))
    return in_random_order(nearest[: max(3, len(nearest) // 2)], seed, "target", fact)[0]


def choose_paraphrases(fact: Fact, target: str, group: Group, lead_ins: Sequence[str], seed: int) -> tuple[str, ...]:
    """The fact's prompt by other templates, the last of them after an unrelated sentence, which holds neither object."""
    others = [template for template in group.templates if not same_beginning(template, fact.template)]
    if not others:
        raise Unusable("no other template states the relation")
    others = in_random_order(others, seed, "paraphrase", fact)
    unrelated = [sentence for sentence in lead_ins if not (holds(sentence, fact.object) or holds(sentence, target))]
    if not unrelated:
        raise Unusable("the object or the target stands in every unrelated sentence")
    lead_in = in_random_order(unrelated, seed, "lead-in", fact)[0]
    prefixed = others[PLAIN_PARAPHRASES % len(others)]
    return (*(fill(template, fact) for template in others[:PLAIN_PARAPHRASES]), f"{lead_in} {fill(prefixed, fact)}")


def choose_neighbours(fact: Fact, group: Group, seed: int) -> list[Fact]:
    """Facts about other subjects with the same object, those preferred first, each with the prompt to ask by."""
    others = [x for x in group.facts if x.object == fact.object and x.subject != fact.subject]
    others = in_random_order(others, seed, "neighbour", fact)
    others.sort(key=lambda x: (x.subject, x.object) not in group.preferred)
    prompts: list[list[Fact]] = []
    for other in others:
        templates = in_random_order(group.templates, seed, "neighbour", other)
        if (other.subject, other.object) in group.preferred:
            templates = [other.template, *(x for x in templates if not same_beginning(x, other.template))]
        wordings = [replace(other, template=template) for template in templates]
        prompts.append([x for x in wordings if not mentions(x.prompt, fact.subject)])
    prompts = [wordings for wordings in prompts if wordings][:NEIGHBOURS]
    if len(prompts) < LEAST_SUBJECTS:
        raise Unusable(f"fewer than {LEAST_SUBJECTS} other subjects share the relation and the object")
    turns = max(map(len, prompts))
    in_turn = [wordings[turn] for turn in range(turns) for wordings in prompts if turn < len(wordings)]
    if len(in_turn) < LEAST_NEIGHBOURS:
        raise Unusable(f"fewer than {LEAST_NEIGHBOURS} prompts about subjects that share the relation and the object")
    return in_turn[: max(len(prompts), LEAST_NEIGHBOURS)]


def choose_references(fact: Fact, target: str, group: Group, seed: int) -> tuple[str, ...]:
    """Sentences that state the target of other subjects, of which it is true."""
    others = in_random_order([x for x in group.facts if x.object == target], seed, "reference", fact)
    end = f"{target} {group.ending}".rstrip()
    sentences = [f"{fill(in_random_order(group.templates, seed, 'reference', x)[0], x)} {end}." for x in others]
    sentences = [sentence for sentence in sentences if not mentions(sentence, fact.subject)]
    if len(sentences) < LEAST_REFERENCES:
        raise Unusable(f"fewer than {LEAST_REFERENCES} other subjects have the target as their object")
    return tuple(sentences[:REFERENCES])


def choose_choices(
    fact: Fact,
    target: str,
    neighbours: Sequence[str],
    group: Group,
    seed: int,
) -> tuple[str, ...]:
    """Further objects of the relation, which are true of none whom the case is about."""
    about = {fact.subject, *neighbours}
    true = {answer for subject, answer in group.true if subject in about}
    others = sorted({x.object for x in group.facts} - true - {fact.object, target})
    return tuple(in_random_order(others, seed, "choice", fact)[:CHOICES])


def in_random_order(items: Iterable[Shuffled], seed: int, purpose: str, fact: Fact) -> list[Shuffled]:
    """`items` in a random order that depends on what they are, the seed, the purpose and the fact, and on nothing else."""

    def place(item: Shuffled) -> int:
        named = [item.subject, item.object] if isinstance(item, Fact) else item
        return seed_from(json.dumps([seed, purpose, fact.relation, fact.subject, fact.object, named]))

    return sorted(items, key=place)


def fill(template: str, fact: Fact) -> str:
    """The template with the fact's subject in its place."""
    return replace(fact, template=template).prompt


def begin_alike(a: str, b: str) -> bool:
    """Whether the first tokens of two objects may be the same, whatever the tokenizer: nearly all hold two letters."""
    return a[:2].casefold() == b[:2].casefold()


def same_beginning(a: str, b: str) -> bool:
    """Whether one template begins with the other: what a model completes may hold words that the model itself added."""
    return a.startswith(b) or b.startswith(a)
