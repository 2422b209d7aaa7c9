"""Versions of results: they change with whatever the code computes, and with nothing else."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import rome_lab
from rome_lab.base import versions
from rome_lab.base.versions import INDIFFERENT, code_version, modules_behind, package_versions, read_code

SOURCES = {
    "__init__": "",
    "sums/__init__": "from a_house.sums.adding import add\n\n\ndef __getattr__(name):\n"
    "    from a_house.sums.doubling import double\n\n    return double\n",
    "sums/adding": "def add(x, y):\n    return x + y\n",
    "sums/doubling": "def double(x):\n    return x * 2\n",
    "sums/alone": "def nobody_calls_it():\n    return 1\n",
    "result": '"""What is stored."""\n\nimport logging\n\nfrom a_house.sums import add\n\n'
    "logger = logging.getLogger(__name__)\n\n\n"
    'def result(x):\n    """Twice x, and three."""\n    logger.info("now")\n    if x < 0:\n'
    '        raise ValueError("too small")\n    return add(2 * x, 3)\n',
    "late": "def late(x):\n    from a_house.sums import double\n\n    return double(x)\n",
}


@pytest.fixture
def version_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """The version of a module of a small package, some of whose text is replaced."""
    monkeypatch.setattr(versions, "PACKAGE", "a_house")
    monkeypatch.syspath_prepend(tmp_path)

    def forget() -> None:
        for function in (code_version, versions.is_module, versions.defined_in, read_code, versions.source_of_module):
            function.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] == "a_house"]:
            del sys.modules[name]
        importlib.invalidate_caches()

    def version(module: str = "result", place: str = "result", old: str = "", new: str = "") -> str:
        for name, text in SOURCES.items():
            path = tmp_path / "a_house" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            assert name != place or old in text
            path.write_text(text.replace(old, new) if name == place and old else text)
        forget()
        return code_version(f"a_house.{module}")

    yield version
    forget()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Twice x, and three", "Three more than two x"),
        ("What is stored", "Other words"),
        ('"now"', '"just now, %s", x'),
        ("too small", "smaller than 0"),
        ("    return add(2 * x, 3)", "    # a remark\n\n    return add(\n        2 * x,\n        3,\n    )"),
    ],
    ids=["docstring", "module's docstring", "log", "message of an error", "comment and layout"],
)
def test_words_for_people_leave_the_version_as_it_is(version_with, old: str, new: str) -> None:
    assert version_with(old=old, new=new) == version_with()


@pytest.mark.parametrize(
    ("place", "old", "new"),
    [
        ("result", "3)", "4)"),
        ("result", "2 * x", "2 + x"),
        ("result", "x < 0", "x < 1"),
        ("sums/adding", "x + y", "x - y"),
        ("sums/__init__", "a_house.sums.adding import add", "a_house.sums.alone import nobody_calls_it as add"),
    ],
    ids=["number", "operator", "condition", "module behind a front door", "another function behind the door"],
)
def test_whatever_is_computed_changes_the_version(version_with, place: str, old: str, new: str) -> None:
    assert version_with(place=place, old=old, new=new) != version_with()


def test_a_module_that_nothing_rests_on_leaves_the_version_as_it_is(version_with) -> None:
    assert version_with(place="sums/alone", old="1", new="2") == version_with()
    assert version_with(place="sums/doubling", old="2", new="3") == version_with()


def test_what_a_function_or_a_front_door_imports_late_counts(version_with) -> None:
    assert version_with("late", "sums/doubling", "2", "3") != version_with("late")
    assert version_with("late", "sums/adding", "+", "-") == version_with("late")


def test_every_import_of_the_house_is_one_that_the_version_follows() -> None:
    """`import rome_lab.x` and relative imports are not followed, so nothing may use them."""
    folder = Path(rome_lab.__file__).parent
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(x.name.split(".")[0] == "rome_lab" for x in node.names), path
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0 and not any(x.name == "*" for x in node.names), path


def code_of(what: str) -> str:
    """The module whose version stands in the keys of results of one kind."""
    folder = Path(rome_lab.__file__).parent
    places = [path for path in folder.rglob("*.py") if what in path.read_text(encoding="utf-8")]
    (path,) = [path for path in places if "code_version(" in path.read_text(encoding="utf-8")]
    return ".".join(["rome_lab", *path.relative_to(folder).with_suffix("").parts])


MODEL = ("models.blocks", "models.language_model", "models.layouts", "models.weights")
FACTS = ("facts.fact", "facts.prompts", "base.words")
SEEDS = ("base.seeds",)
ARITHMETIC = {
    '"what": "known"': (*MODEL[1:], "facts.completion", *FACTS),
    '"what": "said"': (*MODEL, "models.scoring", *FACTS),
    '"what": "trace"': (*MODEL, *FACTS, *SEEDS, "tracing.sweep", "tracing.runs", "tracing.corruption"),
    '"what": "sampled-text"': (*MODEL, *SEEDS, "models.sampling", "facts.sources"),
    '"what": "covariance"': (*MODEL, "editing.keys", "editing.update", "editing.texts", "models.sampling"),
    '"what": "optimum"': (*MODEL, *FACTS, *SEEDS, "editing.keys", "editing.values", "models.sampling"),
    '"method": "rome"': (*MODEL, *FACTS, "editing.keys", "editing.values", "editing.update"),
    '"method": "fine-tuning"': (*MODEL, *FACTS, "editing.fine_tuning"),
    '"what": "evaluation"': (*MODEL, *FACTS, *SEEDS, "models.scoring", "models.sampling", "models.changes"),
    '"what": "many_edits"': (*MODEL, *FACTS, *SEEDS, "models.scoring", "models.changes", "editing.update"),
}


@pytest.mark.parametrize("what", ARITHMETIC)
def test_every_module_that_a_stored_result_rests_on_is_behind_its_version(what: str) -> None:
    behind = modules_behind(code_of(what))
    assert not {f"rome_lab.{name}" for name in ARITHMETIC[what]} - set(behind)
    assert not INDIFFERENT & set(behind)


def test_every_kind_of_stored_result_carries_a_version() -> None:
    folder = Path(rome_lab.__file__).parent
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert '"what": "' not in text or "code_version(" in text, path


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert package_versions(["torch", "no-such-package"])["no-such-package"] is None


def test_the_code_is_that_which_was_imported_whatever_the_files_say_later(monkeypatch: pytest.MonkeyPatch) -> None:
    before = code_version("rome_lab.tracing.one_fact")
    for function in (code_version, versions.source_of_module, read_code):
        function.cache_clear()
    monkeypatch.setattr(Path, "read_text", lambda *args, **kwargs: pytest.fail("read again"))
    assert code_version("rome_lab.tracing.one_fact") == before
