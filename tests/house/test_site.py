"""The site: it is built without a warning, needs nothing from elsewhere, and its links lead somewhere."""

from __future__ import annotations

import inspect
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

import rome_lab as rl

pytest.importorskip("myst_nb", reason="the site needs the extra `site`: make .venv/site")
from bs4 import BeautifulSoup  # noqa: E402

from docs import build_site  # noqa: E402

SHOWN = "An output of the last run."
ABOUT = {"started": "2026-01-02T03:04:05+00:00", "parameters": {"n_facts": 7}, "versions": {"torch": "2.0"}}


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    """The site with one notebook that was run, one that has changed since, and all others never run."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "runs").mkdir()
    for name in ("figure_2", "figure_3"):
        notebook = nbformat.read(build_site.ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        cell = next(cell for cell in notebook.cells if cell.cell_type == "code")
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"{SHOWN}\n")]
        widget = {build_site.WIDGET: {"model_id": "1", "version_major": 2, "version_minor": 0}, "text/plain": "VBox()"}
        cell.outputs.append(nbformat.v4.new_output("execute_result", widget, execution_count=1))
        cell.source += "\n# another line" if name == "figure_3" else ""
        notebook.metadata["rome_lab"] = ABOUT
        nbformat.write(notebook, folder / "runs" / f"{name}.ipynb")
    return build_site.build(folder, folder / "runs")


@cache
def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@cache
def places(path: Path) -> set[str]:
    """What a link to a page may lead to on it."""
    return {element["id"] for element in soup(path).find_all(id=True)}


def pages(html: Path) -> list[Path]:
    return sorted(html.rglob("*.html"))


def test_links_within_the_site_lead_to_a_page_and_a_place_on_it(html):
    broken = []
    for page in pages(html):
        for link in soup(page).find_all(href=True):
            address = urlsplit(link["href"])
            if address.scheme or address.netloc:
                continue
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            if not target.is_file():
                broken.append(f"{page.relative_to(html)}: {link['href']}")
            elif address.fragment and target.suffix == ".html" and unquote(address.fragment) not in places(target):
                broken.append(f"{page.relative_to(html)}: no place {link['href']}")
    assert not broken, "\n".join(broken)


def test_links_to_elsewhere_are_whole_and_encrypted(html):
    addresses = {link["href"] for page in pages(html) for link in soup(page).find_all("a", href=True)}
    outside = {address for address in addresses if urlsplit(address).netloc}
    assert len(outside) > 10
    for address in outside:
        assert urlsplit(address).scheme == "https" and "." in urlsplit(address).netloc and " " not in address, address


def test_no_page_loads_anything_from_elsewhere(html):
    for page in pages(html):
        loaded = [x.get("src") or x.get("href") for x in soup(page).select("script, img, iframe, link[rel=stylesheet]")]
        assert not [address for address in loaded if address and urlsplit(address).netloc], page
        for image in soup(page).select("img[src]"):
            assert image["src"].startswith("data:") or (page.parent / unquote(image["src"])).is_file(), (
                page,
                image["src"],
            )
    for style in html.rglob("*.css"):
        assert "url(http" not in style.read_text(encoding="utf-8") and "@import" not in style.read_text(
            encoding="utf-8"
        )


def test_outputs_are_those_of_the_last_run_of_the_same_notebook(html):
    texts = {name: soup(html / "notebooks" / f"{name}.html").get_text() for name in build_site.notebook_names()}
    assert (
        SHOWN in texts["figure_2"] and "Run on 2026-01-02" in texts["figure_2"] and "n_facts = 7" in texts["figure_2"]
    )
    assert "VBox()" not in texts["figure_2"] and "This works where a kernel runs" in texts["figure_2"]
    assert SHOWN not in texts["figure_3"] and "has changed since it was run" in texts["figure_3"]
    assert "was not run where this site was built" in texts["evaluation"]
    pictures = [image["src"] for image in soup(html / "notebooks/evaluation.html").select("article img")]
    assert any("evaluation" in picture for picture in pictures), "the committed figure stands in"


def test_the_reference_has_every_public_function_and_class(html):
    names = {name for name in rl.__all__ if inspect.isfunction(getattr(rl, name)) or inspect.isclass(getattr(rl, name))}
    assert (
        names - {link.get_text().removeprefix("rl.") for link in soup(html / "docs/reference.html").find_all("a")}
        == set()
    )
    places = {x.get("id") for page in (html / "docs").glob("reference_*.html") for x in soup(page).find_all("dt")}
    assert {"rome_lab.editing.rome", "rome_lab.lab.plots.heatmap", "rome_lab.tracing.Traces.average"} <= places


def test_links_and_pictures_that_only_jupyter_has_become_those_of_the_site(tmp_path):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("![a](attachment:a.png) [b](#To-the-End)")]
    )
    notebook.cells[0].attachments = {"a.png": {"image/png": "AAEC"}}
    build_site.as_myst(notebook, "edit", tmp_path)
    assert notebook.cells[0].source == "![a](edit_a.png) [b](#to-the-end)"
    assert (tmp_path / "notebooks" / "edit_a.png").read_bytes() == bytes([0, 1, 2])


def test_the_page_of_models_has_every_family_of_the_tests(html):
    from tiny import FAMILIES

    cells = {cell.get_text() for cell in soup(html / "docs/models.html").select("td")}
    assert (
        set(FAMILIES) <= cells
        and "covariance is the mean over every token" in soup(html / "docs/models.html").get_text()
    )


def test_the_site_is_small_enough_for_a_branch_of_pages(html):
    assert sum(path.stat().st_size for path in html.rglob("*") if path.is_file()) < build_site.MOST_MB * 1e6 / 5
