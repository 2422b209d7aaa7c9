"""Words in texts: whether and where a name stands in a text, and texts made safe to draw.

place_of(text, name)    where it stands as whole words, or else at all
mentions(text, name)    whether it stands there as whole words, in whatever case
holds(text, name)       whether it stands there, inside a word too
visible(text)           with blanks and unprintable characters shown
"""

from __future__ import annotations

import re


def whole_words(name: str, flags: int = 0) -> re.Pattern[str]:
    """What finds `name` where no letter or digit stands right before or behind it."""
    return re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", flags)


def place_of(text: str, name: str) -> int:
    """Where `name` first stands in `text` as whole words, or else where it first stands at all; -1 where it does not."""
    whole = whole_words(name).search(text)
    return whole.start() if whole else text.find(name)


def mentions(text: str, name: str) -> bool:
    """Whether `name` stands in `text` as whole words, in whatever case."""
    return whole_words(name, re.IGNORECASE).search(text) is not None


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
