"""Run notebooks headlessly with checked parameters: `python -m rome_lab.batch NOTEBOOK ... -p NAME VALUE`.

From Python: `run_notebook`. In a notebook: `record(model=lm.name, fingerprint=lm.fingerprint)` hands values over to the
executed copy. A notebook's parameters are the literals in its cell tagged "parameters", each with type and meaning:

    n_facts: int = 120  # facts to trace

The executed copy is runs/<name>.ipynb, written only when every cell has succeeded; its metadata "rome_lab" says what
produced it. Of a run that failed or was interrupted, runs/<name>.failed.ipynb is kept for reading.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.metadata
import io
import json
import platform
import sys
import tempfile
import time
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import papermill
import yaml
from IPython.display import display
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from rome_lab.store import Json, canonical_json, check_writable, write_atomically

MIME = "application/vnd.rome_lab+json"
VERSIONS_OF = ("rome_lab", "torch", "transformers", "numpy")


class NotebookError(RuntimeError):
    """A notebook did not run to its end; the message has the failing cell, its source and its error."""


# Parameters


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell, `name: type = default  # meaning`."""

    name: str
    type: str
    default: Json
    meaning: str

    def read(self, given: object) -> Json:
        """`given` as a value of the declared type: text is converted, anything else only checked.

        Text for a list or tuple is YAML or JSON; its items, and all other text, are read by their declared type:
        1e-3 is a float, true a bool, and None or null is None where the type has `| None`. Nothing is evaluated.

        Raises:
            ValueError: it does not fit.
        """
        try:
            return fit(given, ast.parse(self.type, mode="eval").body)
        except (ValueError, OverflowError, RecursionError, yaml.YAMLError):
            shown = ascii(given)
            shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
            raise ValueError(
                f"Parameter {self.name} ({self.meaning}) takes {self.type}, and {shown} does not fit; "
                f"give a value such as {self.default!r}."
            ) from None

    def __str__(self) -> str:
        return f"{self.name}: {self.type} = {self.default!r}  # {self.meaning}"


def fit(value: object, kind: ast.expr) -> Json:
    """`value`, or the value that it is the text of, where it is of the annotated type; else ValueError."""
    match kind:
        case ast.Name("str") if isinstance(value, str):
            return value.encode().decode()  # UnicodeEncodeError, a ValueError, where a file could not hold it
        case ast.Name("bool") if isinstance(value, bool):
            return value
        case ast.Name("bool") if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        case ast.Name("int") if isinstance(value, int | str) and not isinstance(value, bool):
            return int(value)
        case ast.Name("float") if isinstance(value, int | float | str) and not isinstance(value, bool):
            if abs(float(value)) < float("inf"):  # not so for NaN
                return float(value)
        case ast.Constant(None) if value is None or value in ("None", "null"):
            return None
        case ast.BinOp(left, ast.BitOr(), right):
            # str last, because any text would fit it
            first, second = (right, left) if ast.unparse(left) == "str" else (left, right)
            try:
                return fit(value, first)
            except ValueError:
                return fit(value, second)
        case ast.Subscript(ast.Name("list"), item):
            return [fit(each, item) for each in items(value)]
        case ast.Subscript(ast.Name("tuple"), ast.Tuple([item, ast.Constant(value=dots)])) if dots is ...:
            return tuple(fit(each, item) for each in items(value))
        case ast.Subscript(ast.Name("tuple"), ast.Tuple(kinds)):
            return tuple(fit(each, item) for each, item in zip(items(value), kinds, strict=True))
    raise ValueError


def items(value: object) -> Sequence[object]:
    if isinstance(value, str):
        value = yaml.load(value, Loader=yaml.BaseLoader)  # every scalar stays text, and no tag makes an object
    if isinstance(value, list | tuple):
        return value
    raise ValueError


def read_parameters(notebook: NotebookNode, name: str) -> dict[str, Parameter]:
    """The parameters of a notebook called `name`, by parsing its parameters cell; none where there is no such cell.

    Raises:
        ValueError: a line is not `name: type = literal`, or the literal is not of the type.
    """
    source = next((cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])), "")
    found = {}
    try:
        statements = ast.parse(source).body
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    except (SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"{name}: the parameters cell is not Python ({error}); correct it.") from None
    for line in statements:
        parameter = None
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value:
            meaning = " ".join(comments.get(row, "").lstrip("# ") for row in range(line.lineno, line.end_lineno + 1))
        ...
    return found
