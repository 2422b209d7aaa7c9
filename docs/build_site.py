"""Build the site: `python docs/build_site.py [FOLDER]` makes FOLDER/html of the pages, the notebooks and the docstrings.

pages                 README.md and its neighbours as they stand, docs/*.md, the pages of benchmarks
notebooks             runs/NAME.ipynb, the copy that was executed last, where the notebook is still the same; otherwise the
                      notebook without outputs, saying so, with the committed figures that it made
reference             a page for each room: what its front door offers, from the docstrings
models                the families that the tests go over
"""

from __future__ import annotations

import base64
import importlib
import inspect
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from sphinx.cmd.build import build_main

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

READ = ("figures", "beyond", "cost", "elsewhere", "lessons", "machines")  # pages of docs/ in their order
ORDER = ("figure_1", "figure_2", "figure_3", "figure_7", "claims", "edit", "edit_anatomy", "evaluation", "many_edits")
ORDER += ("compare_models", "corruptions", "heads", "gradients", "where_to_edit")
ROOMS = ("models", "facts", "tracing", "editing", "evaluation", "lab", "base")
PROJECT = ("CONTRIBUTING", "SECURITY", "benchmarks/README", "benchmarks/tracing", "benchmarks/growth")
PROJECT += ("benchmarks/edit", "benchmarks/values", "benchmarks/tokens", "tests/faults/README")
VERIFIED = "docs/verified_models.md"
WIDGET = "application/vnd.jupyter.widget-view+json"
MOST_MB = 50  # what a branch of pages should bear


def build(folder: Path, runs: Path) -> Path:
    """The site in folder/html; warnings are errors.

    Raises: RuntimeError: Sphinx has found something wrong, and has written what.
    """
    source, html = folder / "source", folder / "html"
    shutil.rmtree(source, ignore_errors=True)
    shutil.rmtree(html, ignore_errors=True)
    for path in ["docs/_static/site.css", *(f"docs/{name}.md" for name in READ), *(f"{name}.md" for name in PROJECT)]:
        place(source, path, (ROOT / path).read_text(encoding="utf-8"))
    shutil.copytree(ROOT / "figures", source / "figures")
    names = notebook_names()
    for name in names:
        place(source, f"notebooks/{name}.ipynb", nbformat.writes(as_myst(shown_notebook(name, runs), name, source)))
    place(source, VERIFIED, models_page())
    place(source, "docs/reference.md", reference_page())
    for room in ROOMS:
        place(source, f"docs/reference_{room}.md", room_page(room))
    place(source, "index.md", (ROOT / "README.md").read_text(encoding="utf-8") + contents(names))
    for path in source.rglob("*.md"):
        path.write_text(linked(path.read_text(encoding="utf-8"), path, source), encoding="utf-8")
    options = ["-W", "--keep-going", "-q", "-E", "-b", "html", "-c", str(ROOT / "docs"), "-d", str(folder / "cache")]
    if build_main([*options, str(source), str(html)]):
        raise RuntimeError(
            f"the site was not built as it should be; see what Sphinx wrote above. Its source is {source}."
        )
    return html


def place(source: Path, path: str, text: str) -> None:
    (source / path).parent.mkdir(parents=True, exist_ok=True)
    (source / path).write_text(text, encoding="utf-8")


def linked(text: str, path: Path, source: Path) -> str:
    """A page whose links to the README lead to the first page, and those to files that have no page to their names only."""

    def target(match: re.Match[str]) -> str:
        words, address = match.groups()
        if re.match(r"[a-z]+:|#", address):
            return match[0]
        file, _, anchor = address.partition("#")
        file = (
            re.sub(r"(^|/)README\.md$", r"\1index.md", file)
            if (path.parent / file).resolve() == source / "README.md"
            else file
        )
        if not (path.parent / file).exists():
            return f"`{file}`" if words == file else words
        return f"[{words}]({file}{'#' * bool(anchor)}{anchor})"

    return re.sub(r"(?<!!)\[([^]]+)\]\(([^)\s]+)\)", target, text)


def contents(notebooks: list[str]) -> str:
    """The table of contents, which themes show beside every page."""
    groups = {
        "Read": [f"docs/{name}" for name in (*READ, "verified_models")],
        "Notebooks": [f"notebooks/{name}" for name in notebooks],
        "Reference": ["docs/reference", *(f"docs/reference_{room}" for room in ROOMS)],
        "Project": list(PROJECT),
    }
    tree = "\n\n```{{toctree}}\n:hidden:\n:caption: {}\n\n{}\n```\n"
    return "".join(tree.format(caption, "\n".join(pages)) for caption, pages in groups.items())


def notebook_names() -> list[str]:
    """All notebooks, those of `ORDER` first."""
    names = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    return [name for name in ORDER if name in names] + sorted(names - set(ORDER))


def last_run(name: str, runs: Path) -> NotebookNode | str:
    """The copy of a notebook that was run last; or why it is not to be shown."""
    copy = runs / f"{name}.ipynb"
    executed = nbformat.read(copy, as_version=4) if copy.is_file() else None
    if executed is None or "rome_lab" not in executed.metadata:
        return "This notebook was not run where this site was built, so its outputs are not here."
    if program(executed) != program(nbformat.read(ROOT / "notebooks" / copy.name, as_version=4)):
        return "This notebook has changed since it was run where this site was built, so its outputs are not here."
    return executed


def shown_notebook(name: str, runs: Path) -> NotebookNode:
    """The copy of a notebook that was run last, with a note on its run; or, without outputs, the notebook itself."""
    executed = last_run(name, runs)
    if not isinstance(executed, str):
        return with_note(without_widgets(executed, name), run_note(executed.metadata["rome_lab"]))
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    attached = {file for cell in notebook.cells for file in cell.get("attachments", {})}
    pictures = [path.name for path in sorted((ROOT / "figures").glob(f"{name}*.png")) if owner(path.stem) == name]
    images = "\n\n".join(f"![{picture}](../figures/{picture})" for picture in pictures if picture not in attached)
    return with_note(notebook, f"{executed} What it made for this project:\n\n{images}" if images else executed)


def owner(figure: str) -> str:
    """The notebook that a figure is named after: of those with whose name its own begins, the one named most fully."""
    return max((name for name in notebook_names() if figure.startswith(name)), key=len, default="")


def program(notebook: NotebookNode) -> list[str]:
    """The code of a notebook, without the parameters of a run."""
    injected = "injected-parameters"
    return [x.source for x in notebook.cells if x.cell_type == "code" and injected not in x.metadata.get("tags", [])]


def run_note(about: dict[str, object]) -> str:
    """What is to be said of a run: when, with what, how long."""
    parameters = ", ".join(f"{name} = {json.dumps(value)}" for name, value in about["parameters"].items())
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    return f"Run on {about['started'][:10]} with {versions}. Parameters: `{parameters}`."


def as_myst(notebook: NotebookNode, name: str, source: Path) -> NotebookNode:
    """A notebook whose attached pictures are files, and whose links to its own headings are in small letters."""
    (source / "notebooks").mkdir(parents=True, exist_ok=True)
    for cell in notebook.cells:
        for file, data in cell.pop("attachments", {}).items():
            (source / "notebooks" / f"{name}_{file}").write_bytes(base64.b64decode(next(iter(data.values()))))
            cell.source = cell.source.replace(f"attachment:{file}", f"{name}_{file}")
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\(#[^)]+\)", lambda match: match[0].lower(), cell.source)
    return notebook


def with_note(notebook: NotebookNode, note: str) -> NotebookNode:
    """A notebook with a note below its title."""
    cell = nbformat.v4.new_markdown_cell(f":::{{note}}\n{note}\n:::")
    title, _, rest = notebook.cells[0].source.partition("\n")
    notebook.cells[0].source = title
    attachments = notebook.cells[0].pop("attachments", {})
    after = [nbformat.v4.new_markdown_cell(rest.strip(), attachments=attachments)] if rest.strip() else []
    notebook.cells[1:1] = [cell, *after]
    return notebook


def without_widgets(notebook: NotebookNode, name: str) -> NotebookNode:
    """A notebook whose widgets are pictures, of themselves or of the project's: they would need a kernel."""
    notebook.metadata.pop("widgets", None)
    picture = f"figures/{name}_notebook.png"
    words = "*This works where a kernel runs: `make lab`.*"
    words += f" It looks like this:\n\n![The notebook in use](../{picture})" if (ROOT / picture).is_file() else ""
    for place, cell in reversed(list(enumerate(notebook.cells))):
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if data.pop(WIDGET, None) and not {"text/html", "image/png"} & data.keys():
                cell.outputs = [other for other in cell.outputs if other is not output]
                notebook.cells.insert(place + 1, nbformat.v4.new_markdown_cell(words))
    return notebook


def models_page() -> str:
    """The table of verified models, then what tests hold for each of the families that they go over."""
    lines = [
        (ROOT / VERIFIED).read_text(encoding="utf-8").rstrip(),
        "",
        "## What holds for every family of the tests",
        "",
    ]
    pattern = r'parametrize\("family", FAMILIES\)\n(?:@.*\n)*def test_(\w+)\('
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        held = re.findall(pattern, path.read_text(encoding="utf-8"))
        lines += [f"- {test.replace('_', ' ')} (`{path.relative_to(ROOT)}`)" for test in held]
    return "\n".join(lines) + "\n"


def offered(room: str) -> Iterator[tuple[str, object]]:
    """The functions and classes that a room's front door offers, in the order of its index."""
    door = importlib.import_module(f"rome_lab.{room}")
    here = {
        name: thing
        for name, thing in vars(door).items()
        if (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__.startswith(f"rome_lab.{room}")
    }
    index = door.__doc__ or ""
    yield from sorted(((name, here[name]) for name in here if not name.startswith("_")), key=lambda x: index.find(x[0]))


def room_page(room: str) -> str:
    """The reference of one room: its index, then each function and class."""
    door = importlib.import_module(f"rome_lab.{room}")
    title, _, index = (door.__doc__ or "").partition("\n")
    parts = [f"# {room}: `rome_lab.{room}`", title, f"```text\n{index.strip(chr(10))}\n```"]
    for name, thing in offered(room):
        kind = "autoclass" if inspect.isclass(thing) else "autofunction"
        members = "\n   :members:" if inspect.isclass(thing) else ""
        parts.append(f"```{{eval-rst}}\n.. {kind}:: rome_lab.{room}.{name}{members}\n```")
    if room == "lab":
        plots = importlib.import_module("rome_lab.lab.plots")
        own = [
            x for x, thing in vars(plots).items() if inspect.isfunction(thing) and thing.__module__ == plots.__name__
        ]
        shown = {name for name, _ in offered(room)}
        parts += ["## Figures: `rl.plots`"]
        parts += [
            f"```{{eval-rst}}\n.. autofunction:: rome_lab.lab.plots.{name}\n```"
            for name in own
            if not name.startswith("_") and name not in shown
        ]
    return "\n\n".join(parts) + "\n"


def reference_page() -> str:
    """The names of `import rome_lab as rl`, each with the first sentence of its docstring."""
    import rome_lab as rl

    rows = []
    for room in ROOMS:
        for name, thing in offered(room):
            if getattr(rl, name, None) is thing:
                kind = "class" if inspect.isclass(thing) else "func"
                sentence = (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")
                sentence = re.sub(r"(`[^`]*`)|([*_|])", lambda match: match[1] or "\\" + match[2], sentence)
                rows.append(f"| {{py:{kind}}}`rl.{name} <rome_lab.{room}.{name}>` | {sentence} |")
    head = "What `import rome_lab as rl` offers; the rooms behind it have a page each, `rl.plots` with `lab`."
    return f"# Reference\n\n{head}\n\n| | |\n| --- | --- |\n" + "\n".join(rows) + "\n"


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "site").resolve()
    html = build(folder, ROOT / "runs")
    size = sum(path.stat().st_size for path in html.rglob("*") if path.is_file()) / 1e6
    without = [name for name in notebook_names() if isinstance(last_run(name, ROOT / "runs"), str)]
    print(f"{html}/index.html: {size:.1f} MB.")
    if without:
        print(
            f"Without outputs, as they were not run here: {', '.join(without)}. `make figures` and its like run them."
        )
    if size > MOST_MB:
        sys.exit(
            f"{size:.1f} MB is more than {MOST_MB} MB, which is much for a branch of pages; look for large outputs."
        )


if __name__ == "__main__":
    main()
