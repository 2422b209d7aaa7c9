"""Where facts come from: the embedded set, published sets, files of the user's.

load_facts(name_or_path)        facts
load_relations()                the embedded set by relation, with all templates of each
embedded_records(name)          one of the project's own CSV files
open_set(name)                  records of a set or a file, and which of `FORMS` they have
read_each(records, form)        what the records state, and which are at fault
template_of(prompt, subject)    a prompt with "{}" for its subject
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Generic, TypeVar

from rome_lab.base import other_spelling, place_of
from rome_lab.facts.fact import Fact
from rome_lab.facts.published_sets import PUBLISHED, published_file
from rome_lab.facts.records import Parsed, parse_csv, read_records, text_at

logger = logging.getLogger(__name__)

Stated = TypeVar("T")
USES = ("statement", "generation", "ending")  # of what stands in templates.csv
MOST_PROBLEMS = 10  # problems that one message lists; it counts the others
TOLERATED = 0.01  # share of a published data set's records that may be at fault; no user can repair them


@dataclass(frozen=True)
class Relation:
    """One relation of the embedded set.

    Attributes:
        statements: templates that the object follows at once.
        generations: templates that invite free text about the subject.
        ending: what a whole sentence needs after the object, as "mythology" after "Greek"; most need nothing.
        facts: all its facts; each has `statements` as its templates, the first of them as its template.
    """

    name: str
    statements: tuple[str, ...]
    generations: tuple[str, ...]
    facts: tuple[Fact, ...]
    ending: str = ""


@dataclass(frozen=True)
class RecordForm(Generic[Stated]):
    """How the records of one sort of file state facts, or cases to judge edits by.

    Attributes:
        read: what a record states; a ValueError names the field at fault.
        identity: what no two records may share.
        shares_templates: whether any template of a relation states all its facts.
    """

    read: Callable[[Parsed], Stated]
    identity: Callable[[Parsed, Stated], Hashable]
    shares_templates: bool = False


def load_facts(name_or_path: str | Path) -> tuple[Fact, ...]:
    """Load facts.

    Args:
        name_or_path: "embedded", the project's own set; "known_1000", "counterfact" or "zsre", downloaded when first
            asked for; or a file: CSV with a header, or a JSON list of objects, with the fields subject, object,
            template (or prompt, which holds the subject) and, where known, relation; or a file in the form of one of
            the three published sets.

    Raises:
        FileNotFoundError: neither a data set nor a file.
        ValueError: the file is at fault; the message says which records, which fields, and why. All or nothing is
            loaded, except that up to 1% of a published set, which no user can repair, is left out with a warning.
        ConnectionError: a published set could not be downloaded; the message says what to do.
    """
    name = str(name_or_path)
    if name == "embedded":
        return tuple(fact for relation in load_relations().values() for fact in relation.facts)
    records, form, path = open_set(name)
    return read_facts(records, FORMS[form], str(path), TOLERATED if name in PUBLISHED else 0.0)


def open_set(name: str) -> tuple[list[Parsed], str, Path]:
    """The records of a published set or of a file, which of `FORMS` they have, and the file; errors as `load_facts`."""
    path = published_file(name) if name in PUBLISHED else Path(name).expanduser()
    if not os.path.isfile(path):
        names = ", ".join(repr(known) for known in ("embedded", *PUBLISHED))
        raise FileNotFoundError(f"load_facts: {name!r} is neither a data set ({names}) nor a file; check the spelling.")
    records = read_records(path)
    return records, name if name in PUBLISHED else form_of(records, str(path)), path


@cache
def load_relations() -> Mapping[str, Relation]:
    """The embedded relations by name, in the order of the file; a ValueError where a file is at fault. Read once."""
    templates: dict[str, dict[str, list[str]]] = {}
    for number, record in enumerate(embedded_records("templates.csv"), start=1):
        try:
            use = text_at(record, "use")
            if use not in USES:
                raise ValueError(f"use is {use!r}, not one of {', '.join(USES)}")
            uses = templates.setdefault(text_at(record, "relation"), {use: [] for use in USES})
            uses[use].append(text_at(record, "template"))
        except ValueError as error:
            raise ValueError(f"load_relations: templates.csv, record {number}: {error}.") from None

    def read(record: Parsed) -> Fact:
        relation = text_at(record, "relation")
        statements = templates.get(relation, {}).get("statement")
        if not statements:
            raise ValueError(f"relation {relation!r} has no statement in templates.csv")
        return Fact(text_at(record, "subject"), statements[0], text_at(record, "object"), relation, tuple(statements))

    form = RecordForm(read, identity=lambda record, fact: (fact.relation, fact.subject))
    facts = read_facts(embedded_records("facts.csv"), form, "facts.csv")
    relations = {
        name: Relation(
            name,
            tuple(uses["statement"]),
            tuple(uses["generation"]),
            tuple(x for x in facts if x.relation == name),
            " ".join(uses["ending"]),
        )
        for name, uses in templates.items()
    }
    return MappingProxyType(relations)


def embedded_records(name: str) -> list[Parsed]:
    """The rows of one of the project's own CSV files."""
    return parse_csv(resources.files("rome_lab.facts").joinpath("data", name).read_text(encoding="utf-8-sig"), name)


def read_facts(
    records: Sequence[Parsed], form: RecordForm[Fact], source: str, tolerated: float = 0.0
) -> tuple[Fact, ...]:
    """The facts of `records`, each once; a ValueError where more than the tolerated share of them is at fault."""
    facts, problems = read_each(records, form)
    if problems:
        listed = "; ".join(f"record {number}: {reason}" for number, reason in problems[:MOST_PROBLEMS])
        listed += "; ..." if len(problems) > MOST_PROBLEMS else ""
        summary = f"load_facts: {source}: {len(problems)} of {len(records)} records are at fault: {listed}."
        if len(problems) > tolerated * len(records):
            raise ValueError(summary)
        logger.warning("%s They are left out.", summary)
    unique = tuple(dict.fromkeys(facts))
    if repeats := len(facts) - len(unique):
        logger.info("load_facts: %s: %d records repeat the fact of an earlier one; each is kept once", source, repeats)
    return share_templates(unique) if form.shares_templates else unique


def read_each(records: Sequence[Parsed], form: RecordForm[Stated]) -> tuple[list[Stated], list[tuple[int, str]]]:
    """What the records state, and the records at fault: their numbers from 1 on, and why."""
    things: list[Stated] = []
    seen: dict[Hashable, int] = {}
    problems: list[tuple[int, str]] = []
    for number, record in enumerate(records, start=1):
        try:
            if type(record) is not dict:
                raise ValueError(f"is {type(record).__name__}, not an object with named fields")
            if None in record:  # where csv.DictReader puts what no column has a name for
                raise ValueError("has more cells than the header; put a cell that holds a comma in double quotes")
            thing = form.read(record)
            first = seen.setdefault(form.identity(record, thing), number)
            if first != number:
                raise ValueError(f"is a duplicate of record {first}")
            things.append(thing)
        except ValueError as error:
            problems.append((number, str(error).removeprefix("Fact: ").rstrip(".")))
    return things, problems


def share_templates(facts: Sequence[Fact]) -> tuple[Fact, ...]:
    """The facts, each with all the templates of its relation."""
    templates: dict[str | None, dict[str, None]] = {}
    for fact in facts:
        templates.setdefault(fact.relation, {})[fact.template] = None
    return tuple(
        fact if fact.relation is None else replace(fact, templates=tuple(templates[fact.relation])) for fact in facts
    )


def relation_at(record: Parsed) -> str | None:
    """The relation of a record, by either of its names; None where it has none."""
    key = "relation" if record.get("relation") else "relation_id"
    return text_at(record, key) if record.get(key) else None


def template_of(prompt: str, subject: str, begin: int = -1) -> str:
    """`prompt` with "{}" for the subject: at `begin` where it stands there, or else where it is first a whole word.

    Raises: ValueError: the subject is not in the prompt, or "{}" stands before it.
    """
    if begin < 0 or not prompt.startswith(subject, begin):
        begin = place_of(prompt, subject)
    if begin < 0:
        raise ValueError(f"the subject {subject!r} is not in the prompt {prompt!r}{other_spelling(prompt, subject)}")
    if "{}" in prompt[:begin]:
        raise ValueError(f'the prompt {prompt!r} has "{{}}" before its subject')
    return prompt[:begin] + "{}" + prompt[begin + len(subject) :]


def form_of(records: Sequence[Parsed], source: str) -> str:
    """Which of `FORMS` the records have, by their fields; a ValueError where they have none."""
    fields = {str(key) for record in records if isinstance(record, dict) for key in record}
    if {"subject", "object"} <= fields and fields & {"template", "prompt"}:
        return "own"
    if {"prompt", "subject", "target_new", "ground_truth"} <= fields:
        return "easyedit"
    for form, mark in {"counterfact": "requested_rewrite", "zsre": "src", "known_1000": "attribute"}.items():
        if mark in fields:
            return form
    named = ", ".join(map(repr, sorted(fields))) or "(none)"
    raise ValueError(
        f"load_facts: {source} has the fields {named}; expected subject, object and template (or prompt), or the form of "
        "known_1000, counterfact, zsre or EasyEdit."
    )


def read_own(record: Parsed) -> Fact:
    """A fact of a user's file."""
    subject = text_at(record, "subject")
    if record.get("template") or not record.get("prompt"):
        template = text_at(record, "template")
    else:
        template = template_of(text_at(record, "prompt"), subject)
    return Fact(subject, template, text_at(record, "object"), relation_at(record))


def read_known_1000(record: Parsed) -> Fact:
    """A fact of known_1000. Its prompt goes on where its template ends, up to the attribute."""
    subject = text_at(record, "subject").strip()
    template = template_of(text_at(record, "prompt"), subject, str(record.get("template")).find("{}"))
    return Fact(subject, template, text_at(record, "attribute").strip(), relation_at(record))


def read_counterfact(record: Parsed) -> Fact:
    """The true fact of a CounterFact record."""
    keys = ("subject", "prompt", "target_true.str")
    subject, template, true = (text_at(record, f"requested_rewrite.{key}") for key in keys)
    return Fact(subject.strip(), template, true.strip(), relation_at(record["requested_rewrite"]))


def read_zsre(record: Parsed) -> Fact:
    """A zsRE record: its template is a question, its object the first of the answers."""
    subject = text_at(record, "subject").strip()
    return Fact(subject, template_of(text_at(record, "src"), subject), text_at(record, "answers.0").strip())


def read_easyedit(record: Parsed) -> Fact:
    """The true fact of an EasyEdit record; of several answers that are true, the first."""
    subject, several = text_at(record, "subject").strip(), isinstance(record.get("ground_truth"), list)
    true = text_at(record, "ground_truth.0" if several else "ground_truth")
    return Fact(subject, template_of(text_at(record, "prompt"), subject), true.strip(), relation_at(record))


def identity_by(key: str) -> Callable[[Parsed, Stated], Hashable]:
    """Records are the same where they have the same `key`, or, without it, state the same."""
    return lambda record, thing: json.dumps(record[key]) if key in record else thing


FORMS: dict[str, RecordForm[Fact]] = {
    "own": RecordForm(read_own, identity=lambda record, fact: (fact.prompt, fact.object)),
    "known_1000": RecordForm(read_known_1000, identity_by("known_id")),
    # CounterFact gives some facts two counterfactual targets, under two case_ids.
    "counterfact": RecordForm(read_counterfact, identity_by("case_id"), shares_templates=True),
    "easyedit": RecordForm(read_easyedit, identity_by("case_id")),
    "zsre": RecordForm(read_zsre, identity=lambda record, fact: json.dumps(record, sort_keys=True)),
}
