"""Words in texts: whether and where a name stands in a text, and texts made safe to draw.

place_of(text, name)    where it stands as whole words, or else at all
mentions(text, name)    whether it stands there as whole words, in whatever case
holds(text, name)       whether it stands there, inside a word too
blank_behind(text)     what parts it from the word that follows: a blank, or nothing
is_unspaced(character)  whether its script is written without blanks
without_end(text)       a prompt without the blanks at its end, which belong to the word that follows
other_spelling(a, b)    how a name that looks alike differs from what stands in a text
visible(text)           with blanks and unprintable characters shown
"""

from __future__ import annotations

import difflib
import re
from unicodedata import normalize

# Han, kana, Thai, Lao, Tibetan, Burmese, Khmer, and the punctuation of full width that goes with them.
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)
# At the end of a text: an opening bracket or quotation mark, or a hyphen within a word.
TAKES_NO_BLANK = re.compile(r"""[(\[{«„“‘‹]$|(?:^|[\s(\[{])["']$|\w[-\u2010\u2011]$""")


def is_unspaced(character: str) -> bool:
    """Whether its script is written without blanks between words."""
    return UNSPACED.fullmatch(character) is not None


def blank_behind(text: str) -> str:
    """What parts a text from the word that follows: nothing in scripts without blanks, behind a blank, an opening bracket
    or quotation mark, or a hyphen; else a blank.

    >>> [blank_behind(text) for text in ("city of", "首都是", "the place called “", "the Franco-", "city of\\n")]
    [' ', '', '', '', '']
    """
    last = text[-1:]
    return "" if last.isspace() or (last and is_unspaced(last)) or TAKES_NO_BLANK.search(text) else " "


def without_end(text: str) -> str:
    """A prompt without the blanks at its end; a line break or a tab is meant, and stays.

    A tokenizer that writes a word with the blank before it reads such a blank as a token of its own, after which words go on
    otherwise.
    """
    return text.rstrip(" \u00a0\u202f")


def whole_words(name: str, flags: int = 0) -> re.Pattern[str]:
    """What finds `name` where no letter or digit stands right before or behind it; in scripts without blanks, anywhere."""
    before, behind = ("" if is_unspaced(x) else edge for x, edge in ((name[:1], r"(?<!\w)"), (name[-1:], r"(?!\w)")))
    return re.compile(f"{before}{re.escape(name)}{behind}", flags)


def place_of(text: str, name: str) -> int:
    """Where `name` first stands in `text` as whole words, or else where it first stands at all; -1 where it does not."""
    whole = whole_words(name).search(text)
    return whole.start() if whole else text.find(name)


SAME_LOOKS = str.maketrans("’‘ʼ“”„‐‑–\u00a0\u202f", "'''\"\"\"---  ")


def other_spelling(text: str, name: str) -> str:
    """How a name that is not in a text, but looks like what is, differs from that, as a part of a sentence; else ""."""
    if normalize("NFC", name) in normalize("NFC", text):
        return " (it looks the same there, but its accents are put together in another way: Unicode's NFC and NFD)"
    plain, inside = (normalize("NFC", x).translate(SAME_LOOKS) for x in (name, text))
    if plain in inside:
        return " (there it has other apostrophes, quotation marks, hyphens or blanks, which look alike)"
    if plain.casefold() in inside.casefold():
        return " (there it has other capitals)"
    return ""


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


def differing(before: str, after: str) -> list[tuple[str, bool]]:
    """`after` in runs of words, each with whether it differs from `before`; blanks between words count for nothing.

    >>> differing("it is in Paris, France", "it is in Rome, France")
    [('it is in', False), ('Rome,', True), ('France', False)]
    """
    old, new = before.split(), after.split()
    runs = difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes()
    return [(" ".join(new[i:j]), tag != "equal") for tag, _, _, i, j in runs if i < j]
