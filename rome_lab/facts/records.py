"""CSV and JSON files as records: `read_records`, `parse_json`, `parse_csv`, and `text_at`, a field of one."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from pathlib import Path
from typing import Any, TypeAlias

from rome_lab.base import check_text

Parsed: TypeAlias = Any  # what json.loads returns


def read_records(path: Path) -> list[Parsed]:
    """The records of a CSV or JSON file, in order.

    Raises:
        ValueError: the file is not UTF-8, is neither, or holds no records; the message says where and what to do.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise OSError(f"load_facts: {path} cannot be read ({error.strerror}); check its permissions.") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"load_facts: {path} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); "
            "save it as UTF-8 (in a spreadsheet: CSV UTF-8)."
        ) from None
    looks_like_json = path.suffix.lower() != ".csv" and text.lstrip().startswith(("[", "{"))
    parse = parse_json if path.suffix.lower() == ".json" or looks_like_json else parse_csv
    records = parse(text, str(path))
    if not records:
        raise ValueError(f"load_facts: {path} holds no records; give a file with at least one fact.")
    return records


def parse_json(text: str, source: str) -> list[Parsed]:
    """The items of a JSON list, or of JSON lines, an object in each; `source` names the text in errors."""
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        with contextlib.suppress(ValueError, RecursionError):
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            if all(type(record) is dict for record in lines):
                return lines
        raise ValueError(f"load_facts: {source} is not valid JSON: {error}; expected a list of objects.") from None
    if type(records) is dict and source.lower().endswith((".jsonl", ".ndjson")):
        records = [records]  # one line
    if type(records) is not list:
        raise ValueError(f"load_facts: {source} holds a JSON {type(records).__name__}; expected a list of objects.")
    if re.search(r"\\u[dD][89a-fA-F]", text):  # an escape of half a character: both halves stand there, or one alone
        for number, record in enumerate(records, start=1):
            check_text(f"load_facts: {source}: record {number}", json.dumps(record, ensure_ascii=False))
    return records


def parse_csv(text: str, source: str) -> list[Parsed]:
    """The rows of a CSV text as dictionaries by column, in small letters; `source` names the text in errors.

    Cells are parted by commas, or by the semicolons or tabs that the header has more of. Rows without anything are left out.
    """
    header = text.lstrip().partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        columns = [name.strip().lower() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        records = [row for row in reader if any("".join(cell or "").strip() for cell in row.values())]
    except csv.Error as error:
        raise ValueError(f"load_facts: {source}, line {reader.line_num}: not valid CSV: {error}.") from None
    if len(set(columns)) < len(columns):
        raise ValueError(
            f"load_facts: {source} has a column twice ({', '.join(map(repr, columns))}); rename one of them."
        )
    return records


def text_at(record: Parsed, path: str) -> str:
    """The text at a path of keys, such as "target_true.str" or "answers.0"; a ValueError names it where there is none."""
    value = record
    for key in path.split("."):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            value = None
    if value is None:
        raise ValueError(f"the field {path} is missing")
    if type(value) is not str:
        raise ValueError(f"the field {path} is {value!r}, not text")
    if not value.strip():
        raise ValueError(f"the field {path} is empty")
    return value
