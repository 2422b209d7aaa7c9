"""The plan of the house: rooms with front doors, imports that go down, one word one meaning, notebooks that are thin."""

from __future__ import annotations

import ast
import importlib
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

import rome_lab as rl

ROOT = Path(__file__).parents[2]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "rome_lab").rglob("*.py"))}
NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in TREES}
MODULES = {name: TREES[path] for path, name in NAMES.items()}
DOORS = [name for path, name in NAMES.items() if path.name == "__init__.py" and name != "rome_lab"]
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
MOST_LINES = 500
MEDIAN_CELL_LINES = 5
PUBLIC_MODULES = {("rome_lab.lab", "plots")}  # rl.plots
# Words that say what has happened to a thing, not what it is.
VAGUE = frozenset(
    ["said", "asked", "found", "told", "looked", "wanted", "made", "got", "heard", "says", "tells", "one"]
)


def room_of(module: str) -> str:
    """The package whose front door a module stands behind: of a study, its own room."""
    parts = module.split(".")
    return ".".join(parts[: 3 if parts[1:2] == ["studies"] else 2])


def imports_of(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Module and name of all that is imported from rome_lab, in functions and for type checking too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rome_lab":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "rome_lab")
        assert not (isinstance(node, ast.ImportFrom) and node.level), "imports are written out in full"


def offered(door: str) -> set[str]:
    """Names that a front door imports, or defines."""
    defined = {name for node in MODULES[door].body for name in top_level_names(node)}
    return (defined | {name for _, name in imports_of(MODULES[door]) if name}) - {"__getattr__"}


def top_level_names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]


def code_cells(notebook: nbformat.NotebookNode) -> list[str]:
    return [cell.source for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def program(notebook: nbformat.NotebookNode) -> ast.Module:
    """The notebook's code without the lines that only IPython understands."""
    lines = (line for cell in code_cells(notebook) for line in cell.splitlines())
    return ast.parse("\n".join("" if re.match(r"\s*[%!]", line) else line for line in lines))


def test_the_checker_of_imports_is_content():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("module", MODULES)
def test_other_rooms_are_entered_by_their_front_doors_and_ones_own_is_not(module):
    for source, name in imports_of(MODULES[module]):
        if module == "rome_lab.batch" and source == "rome_lab.lab.batch":
            continue  # the same command, by its public name
        if room_of(source) == room_of(module):
            assert source not in DOORS or source == "rome_lab.studies", f"{module} goes round by its own door, {source}"
        else:
            assert source in DOORS, f"{module} reaches behind the door of {room_of(source)}: {source}"
            assert name in offered(source) or (source, name) in PUBLIC_MODULES, f"{source} does not offer {name}"


@pytest.mark.parametrize("door", DOORS)
def test_a_front_door_is_an_index_of_what_it_offers(door):
    index = ast.get_docstring(MODULES[door]) or ""
    missing = sorted(name for name in offered(door) if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", index))
    assert not missing, f"the docstring of {door} says nothing of {', '.join(missing)}"


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_imports_the_house_and_at_most_one_study(notebook):
    imports = list(imports_of(program(NOTEBOOKS[notebook])))
    studies = {name if source == "rome_lab.studies" else source for source, name in imports if source != "rome_lab"}
    assert len(studies) <= 1, f"more than one room: {', '.join(sorted(studies))}"
    for source, name in imports:
        if source == "rome_lab":
            assert name is None, f"import rome_lab as rl, not {name} from it"
        elif source != "rome_lab.studies":
            assert room_of(source) == source and source.startswith("rome_lab.studies."), (
                f"reaches behind a door: {source}"
            )
            assert name is None or name in offered(source), f"{source} does not offer {name}"


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_what_a_notebook_takes_from_the_house_is_there(notebook):
    tree = program(NOTEBOOKS[notebook])
    rooms = {"rl": rl}
    for source, name in imports_of(tree):
        if source == "rome_lab.studies":
            rooms[name] = importlib.import_module(f"{source}.{name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            chain = ast.unparse(node).split(".")
            if chain[0] in rooms and all(part.isidentifier() for part in chain):
                thing = rooms[chain[0]]
                for part in chain[1:]:
                    assert hasattr(thing, part), f"{ast.unparse(node)}: there is no {part}"
                    thing = getattr(thing, part)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_the_cells_of_a_notebook_are_short(notebook):
    lines = [len([line for line in cell.splitlines() if line.strip()]) for cell in code_cells(NOTEBOOKS[notebook])]
    assert statistics.median(lines) <= MEDIAN_CELL_LINES, lines


def test_no_two_things_have_one_name():
    places = defaultdict(list)
    for module, tree in MODULES.items():
        for node in tree.body:
            for name in top_level_names(node):
                places[name].append(module)
    places = {name: modules for name, modules in places.items() if name not in {"logger", "__getattr__", "__all__"}}
    assert not {name: modules for name, modules in places.items() if len(modules) > 1}
    stems = defaultdict(list)
    for module in MODULES:
        stems[module.rpartition(".")[2]].append(module)
    assert not {name: modules + stems[name] for name, modules in places.items() if name in stems}


@pytest.mark.parametrize("room", DOORS)
def test_names_say_what_a_thing_is_not_what_happened_to_it(room):
    field = {ast.FunctionDef: "name", ast.arg: "arg", ast.Name: "id", ast.Attribute: "attr"}
    left = [
        f"{module}:{node.lineno} {name}"
        for module, tree in MODULES.items()
        if room_of(module) == room
        for node in ast.walk(tree)
        if (name := getattr(node, field.get(type(node), ""), None)) in VAGUE
        and not isinstance(getattr(node, "ctx", None), ast.Load)
    ]
    assert not left, f"{len(left)} names to be replaced: {'; '.join(left)}"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_gathered_only_to_be_thrown_away(module):
    """A list that nobody keeps is a generator run for its effects, which a change may leave unrun: `Batching.each`."""
    thrown = [
        node.lineno
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.Expr)
        and (
            isinstance(node.value, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp)
            or isinstance(node.value, ast.Call)
            and getattr(node.value.func, "id", "") in {"list", "tuple", "set", "dict", "sum", "any", "all", "deque"}
        )
    ]
    assert not thrown, f"{module}, lines {thrown}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_a_docstring_and_is_short_enough_to_be_read(module):
    docstring = ast.get_docstring(MODULES[module])
    assert docstring and not docstring.startswith("TODO"), f"{module} has no docstring"
    (path,) = (path for path, name in NAMES.items() if name == module)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/README.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES)
def test_what_the_pages_name_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(r"`([\w./]+\.(?:py|ipynb|csv))`", text):
        places = [ROOT / folder / path for folder in ("", "rome_lab", "notebooks", "figures", "tests", "benchmarks")]
        assert any(place.is_file() for place in places) or path == "__init__.py" or path == "my_facts.csv", path
    for chain in re.findall(r"\brl((?:\.[A-Za-z_]+)+)", text):
        thing = rl
        for part in chain.split(".")[1:]:
            assert hasattr(thing, part), f"rl{chain}: there is no {part}"
            thing = getattr(thing, part)
    for door, name in re.findall(r"from rome_lab\.(\w+) import (\w+)", text):
        assert name in offered(f"rome_lab.{door}"), f"rome_lab.{door} does not offer {name}"
