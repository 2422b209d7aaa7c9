"""The parameters of a notebook: the literals of its cell tagged "parameters", read by parsing and never evaluated.

Each line of that cell is `name: type = literal  # what it is`. `read_parameters` finds them, `fit_parameters` checks
new values against them.
"""

from __future__ import annotations

import ast
import difflib
import io
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml
from nbformat import NotebookNode

from rome_lab.base import Json

UNFIT = (ValueError, OverflowError, RecursionError, yaml.YAMLError)
MOST_CHARACTERS = 60  # characters of a refused value that an error repeats


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell; `str()` gives it back.

    Attributes:
        type: the annotation: int, float, str, bool, None, list[...], tuple[...], or a union of these.
        default: the literal.
        meaning: the comment, empty where there is none.
    """

    name: str
    type: str
    default: Json
    meaning: str

    def __str__(self) -> str:
        line = f"{self.name}: {self.type} = {self.default!r}"
        return f"{line}  # {self.meaning}" if self.meaning else line

    def read(self, given: object) -> Json:
        """`given` as a value of the declared type: text is converted, anything else is only checked.

        Text for a list or tuple is YAML (so JSON will do), and each item is then read by its own declared type.
        "true" and "false" are bools, "None" and "null" are None where the type allows it, floats are finite.

        Raises:
            ValueError: it does not fit.
        """
        try:
            return fit(given, ast.parse(self.type, mode="eval").body)
        except UNFIT:
            shown = ascii(given)
            shown = shown if len(shown) <= MOST_CHARACTERS else f"{shown[:MOST_CHARACTERS]}..."
            raise ValueError(
                f"The parameter {self.name} takes {self.type}, and {shown} does not fit; "
                f"give a value such as {self.default!r}."
            ) from None


def read_parameters(notebook: NotebookNode, name: str) -> dict[str, Parameter]:
    """The parameters of a notebook, by name; none where it has no parameters cell. Errors call the notebook `name`.

    Raises:
        ValueError: the cell holds something else than `name: type = literal`, or a literal of another type.
    """
    source = next((cell.source for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])), "")
    try:
        statements = ast.parse(source).body
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{name}: the parameters cell is not Python: {error}; correct it.") from None
    parameters: dict[str, Parameter] = {}
    for line in statements:
        parameter = _parameter(line, comments)
        if parameter is None:
            raise ValueError(
                f"{name}: line {line.lineno} of the parameters cell, `{ast.unparse(line)[:MOST_CHARACTERS]}`, is not "
                "`name: type = literal  # what it is` with a literal of that type; the types are int, float, str, "
                "bool, None, list[...], tuple[...] and unions of these."
            )
        parameters[parameter.name] = parameter
    return parameters


def fit_parameters(known: Mapping[str, Parameter], given: Mapping[str, object], name: str) -> dict[str, Json]:
    """The given values, each as its declared type has it; see `Parameter.read`.

    Raises:
        ValueError: a value does not fit, or its name is not among the known ones.
    """
    for unknown in given.keys() - known.keys():
        close = difflib.get_close_matches(unknown, known, n=1)
        advice = f" (did you mean {close[0]!r}?)" if close else ""
        listed = "; ".join(f"{x.name}, {x.type}, {x.meaning or 'undescribed'}" for x in known.values())
        raise ValueError(f"{name} has no parameter {unknown!r}{advice}; its parameters are: {listed or 'none'}.")
    return {parameter: known[parameter].read(value) for parameter, value in given.items()}


def fit(value: object, kind: ast.expr) -> Json:
    """`value`, or what `value` is the text of, where it is of the annotated type.

    Raises:
        UNFIT: it is not.
    """
    match kind:
        case ast.Name("str") if isinstance(value, str):
            # Joins the two halves in which JSON may escape a character; half a character alone is an error.
            return value.encode("utf-16", "surrogatepass").decode("utf-16")
        case ast.Name("bool") if isinstance(value, bool):
            return value
        case ast.Name("bool") if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        case ast.Name("int") if isinstance(value, int | str) and not isinstance(value, bool):
            return int(value)
        case ast.Name("float") if isinstance(value, int | float | str) and not isinstance(value, bool):
            if abs(number := float(value)) < float("inf"):  # not so for NaN
                return number
        case ast.Constant(value=None) if value is None or value in ("None", "null"):
            return None
        case ast.BinOp(op=ast.BitOr()):
            return _fit_any(value, kind)
        case ast.Subscript(ast.Name("list"), item):
            return [fit(each, item) for each in _items(value)]
        case ast.Subscript(ast.Name("tuple"), ast.Tuple([item, ast.Constant(value=dots)])) if dots is ...:
            return tuple(fit(each, item) for each in _items(value))
        case ast.Subscript(ast.Name("tuple"), ast.Tuple(kinds)):
            return tuple(fit(each, item) for each, item in zip(_items(value), kinds, strict=True))
    raise ValueError


def _fit_any(value: object, union: ast.expr) -> Json:
    # None before and str after all others, because every text fits str.
    for kind in sorted(_members(union), key=lambda kind: {"None": 0, "str": 2}.get(ast.unparse(kind), 1)):
        try:
            return fit(value, kind)
        except UNFIT:
            continue
    raise ValueError


def _members(kind: ast.expr) -> list[ast.expr]:
    return [*_members(kind.left), *_members(kind.right)] if isinstance(kind, ast.BinOp) else [kind]


def _items(value: object) -> Sequence[object]:
    if isinstance(value, str):
        value = yaml.load(value, Loader=yaml.BaseLoader)  # leaves every scalar as text; no tag makes an object
    if isinstance(value, list | tuple):
        return value
    raise ValueError


def _parameter(line: ast.stmt, comments: Mapping[int, str]) -> Parameter | None:
    if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value):
        return None
    try:
        default = ast.literal_eval(line.value)
        if fit(default, line.annotation) != default:  # the text of a value is no default for it
            return None
    except (TypeError, *UNFIT):
        return None
    meaning = next((comments[row] for row in range(line.lineno, line.end_lineno + 1) if row in comments), "")
    return Parameter(line.target.id, ast.unparse(line.annotation), default, meaning.lstrip("# "))
