"""Numbers in pages come from committed tables: `python docs/number_sources.py` says which do not, `--write` puts them right.

A page says below its text where each number in it comes from, in comments that readers do not see. Text between two such
comments, or headings, is one piece. A piece of prose lists its numbers in order:

    <!-- numbers
    figures/many_edits.csv edits=100 :: method=rome metric=ES mean | method=joint metric=ES mean
    rome_lab/facts/data/facts.csv :: rows | distinct(relation)
    given :: 20
    -->

An item picks one row of the table by values of its columns, and then a column, which may be multiplied (`mean*100`). As
many decimals are compared as the page prints. `given` is for settings and names, which nothing has measured.
A table of a page says its rows, and its columns as templates (str.format; what stands in square brackets is left out
where a value is missing, or where it is an interval without width; a template holds until the next one):

    <!-- cells
    figures/evaluation.csv
    method=none | method=rome
    metric=S {mean:.1f}[ ({ci_low:.1f} to {ci_high:.1f})] | metric=ES
    -->

Numbers in code, addresses, and names such as "Figure 2" or "Python 3.11" are left alone. A table is a CSV file, or a page
that a benchmark has written.
"""

from __future__ import annotations

import functools
import io
import re
import shlex
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).parents[1]
PIECE = re.compile(r"^#{1,6} [^\n]*$|^<!-- (?P<kind>numbers|cells)\n(?P<body>.*?)-->$", re.MULTILINE | re.DOTALL)
CODE = r"^```.*?^```$|<!--.*?-->|``[^`]+``|`[^`]+`"
ADDRESSES = r"!\[[^]]*\]|\]\([^)]*\)|<[^>\n]+>|https?://\S+"
NAMES = (
    r"\b(?:Figures?|Tables?|Python|arXiv|Eqn|[Ii]ssue) [\d.]+(?:(?:, | and )\d+)*|^ *\d+\.(?= )|\b95%|\b(?:19|20)\d\d\b"
)
NO_TEXT = re.compile(rf"^#{{1,6}} [^\n]*|{CODE}|{ADDRESSES}|{NAMES}|\\\W", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])(?<![A-Za-z_)]-)(?<![A-Za-z]\d-)(?:(?<=[\s(])-)?\d+(?:,\d{3})*(?:\.\d+)?(?!\w)(?!-\w)")
FILTERS = re.compile(r"""\s*((?:\w+=(?:"[^"]*"|'[^']*'|[^\s"'{]+)\s*)*)(.*)""")


def faults(text: str) -> tuple[list[str], str]:
    """What is wrong with the numbers of a page, a line each, and the page with its numbers put right."""
    lines: list[str] = []
    changes: list[tuple[int, int, str]] = []
    begin = 0
    for end, kind, body in pieces(text):
        right = right_cells if kind == "cells" else right_numbers
        try:
            changes += [(begin + i, begin + j, new) for i, j, new in right(text[begin:end], body or "")]
        except (ValueError, KeyError, OSError) as error:
            lines.append(f"line {text.count(chr(10), 0, end) + 1}: {error}")
        begin = end if body is None else end + len(f"<!-- {kind}\n{body}-->")
    changes = [(i, j, new) for i, j, new in changes if text[i:j] != new]
    lines += [f"line {text.count(chr(10), 0, i) + 1}: {text[i:j]!r}, the table has {new!r}" for i, j, new in changes]
    for i, j, new in sorted(changes, reverse=True):
        text = text[:i] + new + text[j:]
    return lines, text


def pieces(text: str) -> Iterator[tuple[int, str, str | None]]:
    """Where each piece of a page ends, and the comment there: its kind and its body, None at a heading or the end."""
    code = [match.span() for match in re.finditer(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)]
    for match in PIECE.finditer(text):
        if not any(i <= match.start() < j for i, j in code):
            yield match.start(), match["kind"] or "heading", match["body"]
    yield len(text), "end", None


def right_numbers(piece: str, body: str) -> Iterator[tuple[int, int, str]]:
    """Each number of a piece of prose: where it stands, and how it is to be printed."""
    masked = NO_TEXT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), piece)
    numbers, values = list(NUMBER.finditer(masked)), list(sources(body))
    if len(numbers) != len(values):
        shown = ", ".join(number[0] for number in numbers)
        raise ValueError(
            f"{len(numbers)} numbers ({shown}), but {len(values)} sources; name a source for each, in order."
        )
    for number, value in zip(numbers, values, strict=True):
        if not isinstance(value, str):
            comma, decimals = "," if abs(value) >= 1000 else "", len(number[0].partition(".")[2])
            value = f"{value:{comma}.{decimals}f}"
        yield *number.span(), value


def sources(body: str) -> Iterator[float | str]:
    """The values that the lines of a comment name, in order; what is given as text."""
    for line in filter(str.strip, body.splitlines()):
        head, separator, items = line.partition(" :: ")
        if not separator:
            raise ValueError(f"{line!r} is no source; write a table, ' :: ' and its items.")
        path, *filters = shlex.split(head)
        for item in items.split(" | "):
            *more, column = shlex.split(item)
            yield column if path == "given" else value_of(path, filters + more, column)


def value_of(path: str, filters: list[str], column: str) -> float:
    """The number that an item names in the table at `path`; `rows` counts rows, `distinct(c)` the values of c."""
    table = chosen(path, filters)
    if column == "rows":
        return float(len(table))
    if match := re.fullmatch(r"distinct\((\w+)\)", column):
        return float(table[match[1]].nunique())
    name, _, factor = column.partition("*")
    return float(only_row(table, path, filters)[name]) * float(factor or 1)


def right_cells(piece: str, body: str) -> Iterator[tuple[int, int, str]]:
    """Each cell of the table in a piece, its first column left out: where it stands, and what is to stand there."""
    source, rows, columns = [line.strip() for line in body.strip().splitlines()]
    path, *filters = shlex.split(source)
    rows = [shlex.split(row) for row in rows.split(" | ")]
    templates: list[tuple[list[str], str]] = []
    for column in columns.split(" | "):
        more, template = FILTERS.fullmatch(column).groups()
        templates.append((shlex.split(more), template or templates[-1][1]))
    lines = [match for match in re.finditer(r"^\|.*\|$", piece, re.MULTILINE)][2:]  # below the heads and the rule
    if len(lines) != len(rows):
        raise ValueError(f"the table has {len(lines)} rows, its comment names {len(rows)}.")
    for line, row in zip(lines, rows, strict=True):
        cells = list(re.finditer(r"\|([^|]*)(?=\|)", line[0]))[1:]
        if len(cells) != len(templates):
            raise ValueError(f"{line[0]!r} has {len(cells)} cells beside its label, the comment {len(templates)}.")
        for cell, (more, template) in zip(cells, templates, strict=True):
            values = only_row(chosen(path, filters + row + more), path, filters + row + more)
            new = filled(template, values)
            yield line.start() + cell.start(1), line.start() + cell.end(1), f" {new} " if new else " "


def filled(template: str, values: pd.Series) -> str:
    """A template with the values of a row; its parts in square brackets only where there is something to say."""

    def part(match: re.Match[str]) -> str:
        names = [name for _, name, _, _ in string.Formatter().parse(match[1]) if name]
        given = [values[name] for name in names]
        worth = not any(pd.isna(value) for value in given) and (len(given) < 2 or len(set(given)) > 1)
        return match[1] if worth else ""

    return re.sub(r"\[(.*?)\]", part, template).format_map(values.to_dict())


@functools.cache
def table_at(path: str) -> pd.DataFrame:
    """A committed table: a CSV file, or all tables of a page that a benchmark has written."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".csv"):
        return pd.read_csv(io.StringIO(text))
    tables = []
    for match in re.finditer(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        heads, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in match[0].splitlines()]
        tables.append(pd.DataFrame(rows, columns=heads))
    return pd.concat(tables)


def chosen(path: str, filters: list[str]) -> pd.DataFrame:
    """The rows of a table that have the given values in the given columns."""
    table = table_at(path)
    for name, _, value in (condition.partition("=") for condition in filters):
        column = table[name]
        table = table[column == float(value) if pd.api.types.is_numeric_dtype(column) else column.astype(str) == value]
    return table


def only_row(table: pd.DataFrame, path: str, filters: list[str]) -> pd.Series:
    """The one row that is left; it is an error where there are none or several."""
    if len(table) != 1:
        raise ValueError(f"{path} has {len(table)} rows with {', '.join(filters) or 'no conditions'}; name one.")
    return table.iloc[0]


def pages() -> list[Path]:
    """The pages whose numbers are held: the README and those of the site, but for what is written whole from its table."""
    written = (
        ROOT / "docs" / "verified_models.md"
    )  # tests/families.py writes it, and tests/models/test_families.py holds it
    return [ROOT / "README.md", *sorted(page for page in (ROOT / "docs").glob("*.md") if page != written)]


def main() -> None:
    """Write what is wrong; with `--write`, put right what can be, and write what is left."""
    wrong = []
    for page in pages():
        lines, text = faults(page.read_text(encoding="utf-8"))
        if "--write" in sys.argv:
            page.write_text(text, encoding="utf-8")
            lines, _ = faults(text)
        wrong += [f"{page.relative_to(ROOT)}, {line}" for line in lines]
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
