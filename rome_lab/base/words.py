"""TODO base/words."""

from __future__ import annotations

import re


def mentions(text: str, name: str) -> bool:
    """Whether `name` stands in `text` as whole words, in whatever case."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None


def holds(text: str, name: str) -> bool:
    """Whether `name` stands in `text`, inside a word too, as "red" in "watered"; short ones, such as "H", as words only."""
    return mentions(text, name) or (len(name) > 2 and name.casefold() in text.casefold())


_GLYPHS = {" ": "␣", "\n": "↵", "\r": "␍", "\t": "⇥", "$": r"\$"}  # an unescaped $ would begin mathematics


def visible(text: str) -> str:
    """Text with its spaces, line ends and unprintable characters shown, safe to draw.

    >>> visible(" New\\n")
    '␣New↵'
    """
    return "".join(_GLYPHS.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)
