"""Arguments refused in a sentence: `check_text`, `check_whole`."""

from __future__ import annotations


def check_text(name: str, text: object) -> None:
    """Raise where `text` is no text, or holds half a character, which no tokenizer and no file can take.

    Python and JSON write characters beyond U+FFFF as two halves, and let one stand alone.

    Raises:
        TypeError, ValueError: it is so; the message calls it `name`.
    """
    if not isinstance(text, str):
        raise TypeError(f"{name} is {text!r}; expected text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(
            f"{name} holds half a character, {half}; write the whole character, or leave it out."
        ) from None


def check_whole(doing: str, **least: tuple[object, int]) -> None:
    """Raise a ValueError for a value that is not a whole number of at least its second."""
    for name, (value, bound) in least.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < bound:
            raise ValueError(f"{doing}: {name} is {value!r}; expected a whole number of at least {bound}.")
