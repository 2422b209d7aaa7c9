"""Which versions produced a result: of the packages, and of the code of rome_lab that determines it.

package_versions(names)    of installed packages, and of Python
code_version(module)       a digest of a module and of all of rome_lab that it rests on

A stored result is found again only as long as the code that made it is the same. Nobody has to remember that: the digest
is of the syntax trees, so that comments, docstrings, messages of errors and the layout of the text may change freely.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGE, HOUSE = "rome_lab", Path(__file__).parents[1]
# Read when rome_lab is imported, not when a version is first asked for: files may have changed by then under a kernel that
# goes on with the code that it has, and its results must not be kept as those of the new code.
AS_IMPORTED = {
    ".".join((PACKAGE, *path.relative_to(HOUSE).with_suffix("").parts)).removesuffix(".__init__"): path.read_text(
        "utf-8"
    )
    for path in HOUSE.rglob("*.py")
}
# Modules that say where results are kept, how a model is brought here, and how much goes together: none of it is in a
# result but what the identity of the model says anyway.
INDIFFERENT = frozenset(
    f"{PACKAGE}.{name}"
    for name in ("base.files", "base.store", "base.versions", "models.packaged", "models.loading", "models.workers")
)


def package_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Versions of Python and of the packages; None for one that is not installed, as one that runs from a checkout."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


@cache
def code_version(module: str) -> str:
    """SHA-256 of what the code of a module of rome_lab, and of all modules of rome_lab that it imports, does.

    Args: module: its whole name, `__name__` where it is asked for.
    """
    digest = hashlib.sha256()
    for name in modules_behind(module):
        digest.update(f"{name}\n{read_code(name).bare}\n".encode())
    return digest.hexdigest()


def modules_behind(module: str) -> list[str]:
    """The module and those of rome_lab that it imports, directly or through others, sorted; without `INDIFFERENT` ones."""
    waiting, behind = [module], set()
    while waiting:
        name = waiting.pop()
        if name not in behind and name not in INDIFFERENT:
            behind.add(name)
            waiting += imported_by(name)
    return sorted(behind)


def imported_by(module: str) -> Iterator[str]:
    """Modules in which the names are defined that a module imports from rome_lab, through front doors too."""
    return (defined_in(source, name) for _, source, name in read_code(module).imports)


@cache
def defined_in(module: str, name: str) -> str:
    """The module of rome_lab where a name is defined that is imported from `module`."""
    if is_module(f"{module}.{name}"):
        return f"{module}.{name}"
    for known_as, source, original in read_code(module).imports:
        if name == known_as:
            return defined_in(source, original)
    return module


@cache
def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@cache
def source_of_module(module: str) -> str:
    """The text of a module; of a package, that of its front door."""
    text = AS_IMPORTED.get(module)
    return Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8") if text is None else text


class Code(NamedTuple):
    """What of a module counts.

    Attributes:
        imports: from rome_lab, late ones too: as what each name is known in the module, from where, and its name there.
        bare: the code without docstrings, what is raised, and what is logged: words for people, not results.
    """

    imports: list[tuple[str, str, str]]
    bare: str


@cache
def read_code(module: str) -> Code:
    """A module, read once."""
    tree = ast.parse(source_of_module(module))
    imports = [
        (alias.asname or alias.name, node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE
        for alias in node.names
    ]
    return Code(imports, ast.unparse(Bare().visit(tree)))


class Bare(ast.NodeTransformer):
    """Takes words for people out of a syntax tree."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        called = node.value.func if isinstance(node.value, ast.Call) else None
        is_log = isinstance(called, ast.Attribute) and getattr(called.value, "id", None) == "logger"
        return None if is_log or isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.Raise:
        return ast.copy_location(ast.Raise(None, None), node)
