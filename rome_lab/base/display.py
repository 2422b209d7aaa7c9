"""What people see of results and of long work: `OneLine`, results that hold arrays in one line, and `Tell`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import fields

MOST_SHOWN = 60  # of one value
Tell = Callable[[str, float], None]
"""Called with what is being done, in words, and how far it has come, from 0 to 1."""


class OneLine:
    """A dataclass, made with `repr=False`, whose repr is one line: of arrays and tables it says the shape only."""

    def __repr__(self) -> str:
        values = (f"{field.name}={in_short(getattr(self, field.name))}" for field in fields(self))
        return f"{type(self).__name__}({', '.join(values)})"


def in_short(value: object) -> str:
    """A value in a few words: the shape of an array, the number of many items, the beginning of a long text."""
    if hasattr(value, "shape"):
        return f"<{' x '.join(map(str, value.shape)) or 'one number'}>"
    items = value.values() if isinstance(value, dict) else value
    if isinstance(value, list | tuple | dict) and (len(value) > 3 or any(hasattr(x, "shape") for x in items)):
        return f"<{len(value)} items>"
    return textwrap.shorten(repr(value), MOST_SHOWN, placeholder=" ...")
