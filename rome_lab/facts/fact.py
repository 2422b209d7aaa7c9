"""`Fact`: one fact and the prompt that asks for it; `facts_digest` tells several from others."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache

from rome_lab.base import check_text, without_end


@dataclass(frozen=True)
class Fact:
    """One fact and the prompt that asks for it.

    Attributes:
        subject, object: plain text, braces and quotes included.
        template: the prompt with "{}" for the subject. Only the first "{}" is its place; any other is plain text. Blanks at
            its end are left out, since they belong to the word that follows.
        relation: name of the relation, where it is known.
        templates: all templates that state the relation, where they are known.
    """

    subject: str
    template: str
    object: str
    relation: str | None = None
    templates: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name in ("subject", "object", "template"):
            value = getattr(self, name)
            check_text(f"Fact: the {name}", value)
            if not value.strip():
                raise ValueError(f"Fact: the {name} is empty; write it out.")
            if name != "template" and value != value.strip():
                raise ValueError(f"Fact: the {name} {value!r} begins or ends with a blank; remove it.")
        for template in self.templates:
            check_text("Fact: a template", template)
        object.__setattr__(self, "template", without_end(self.template))
        object.__setattr__(self, "templates", tuple(map(without_end, self.templates)))
        for template in (self.template, *self.templates):
            if "{}" not in template:
                raise ValueError(f'Fact: the template {template!r} has no "{{}}"; write it where the subject stands.')

    @property
    def prompt(self) -> str:
        """The template with the subject in its place."""
        before, _, after = self.template.partition("{}")
        return before + self.subject + after

    @property
    def subject_span(self) -> tuple[int, int]:
        """(begin, end) of the subject in the prompt, in characters, end excluded."""
        begin = self.template.index("{}")
        return begin, begin + len(self.subject)


@lru_cache(maxsize=8)
def facts_digest(facts: tuple[Fact, ...]) -> str:
    """Tells facts from others, by all that they say and their order."""
    return hashlib.sha256(json.dumps([asdict(fact) for fact in facts]).encode()).hexdigest()
