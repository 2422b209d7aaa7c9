"""The editing notebook in JupyterLab, in a real browser, on a tiny model: the panel is there at once, answers where one
looks, and is whole at every width and in both themes.

One JupyterLab and one kernel serve all tests of this file, which go on where the one before them stopped. A screenshot of
each step goes to artefacts/browser.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright
from test_comparison import model_of_long_texts

from rome_lab.lab.batch import prepare

ROOT = Path(__file__).parents[2]
ARTEFACTS = ROOT / "artefacts" / "browser"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
QUICK = {"steps": 3, "tokens": 256, "samples": 2, "prompt": "Visit the {} in"}
LONG = 5  # seconds for which a cell below the panel holds the kernel
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are there, too
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
SOON, LATE = 60_000, 240_000  # ms: what a slow machine may take to show something, and to measure C and edit
WIDTHS = (1024, 1280, 1920)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="the browser test is left out: there is no Chromium here; install Debian's chromium."
)

# Of all elements of the panel that hold text of their own: what is right of its cell, and the contrast with what is behind.
CUT = """panel => {
    const output = panel.closest(".jp-Cell-outputArea").getBoundingClientRect();
    return [...panel.querySelectorAll("*")].filter(x => {
        const {width, right, left} = x.getBoundingClientRect();
        const free = x.closest("pre, .rl-tip, datalist, option, [hidden]"); // what scrolls by itself, or floats
        return width && !free && (right > output.right + 1 || left < output.left - 1);
    }).map(x => x.className + ": " + x.textContent.slice(0, 40));
}"""
PALE = """panel => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const rgba = colour => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const linear = x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    const light = colour => [0.2126, 0.7152, 0.0722].reduce((sum, x, i) => sum + x * linear(colour[i] / 255), 0);
    const behind = x => {
        for (; x; x = x.parentElement) {
            const colour = rgba(getComputedStyle(x).backgroundColor);
            if (colour[3] > 200) return colour;
        }
        return [255, 255, 255, 255];
    };
    const own = x => [...x.childNodes].some(y => y.nodeType === 3 && y.textContent.trim());
    const shown = x => own(x) && x.checkVisibility() && !x.closest("button:disabled, style, option");
    return [...panel.querySelectorAll("*")].filter(shown).map(x => {
        const [a, b] = [light(rgba(getComputedStyle(x).color)), light(behind(x))];
        return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), x.className + ": " + x.textContent.slice(0, 40)];
    }).filter(([contrast]) => contrast < 4);
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the notebook, with a tiny model and quick settings, in a JupyterLab of its own."""
    place = tmp_path_factory.mktemp("lab")
    work, config = place / "work", place / "jupyter"
    model_of_long_texts().save_pretrained(work / "tiny")
    notebook = prepare(ROOT / "notebooks" / "edit.ipynb", QUICK | {"model": str(work / "tiny")})[0]
    notebook.cells.append(nbformat.v4.new_code_cell(f"import time\ntime.sleep({LONG})"))
    nbformat.write(notebook, work / "edit.ipynb")
    for name, values in SETTINGS.items():
        file = config / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    places = {"JUPYTER_CONFIG_DIR": config, "JUPYTER_RUNTIME_DIR": config / "runtime", "PYTHONPATH": ROOT}
    places |= {"JUPYTERLAB_SETTINGS_DIR": config / "settings", "JUPYTERLAB_WORKSPACES_DIR": config / "workspaces"}
    places |= {"ROME_LAB_CACHE": place / "cache"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    options = [f"--port={port}", "--ip=127.0.0.1", f"--ServerApp.root_dir={work}", "--no-browser", "--allow-root"]
    options += [f"--IdentityProvider.token={token}", "--LabApp.expose_app_in_browser=True"]
    with (place / "lab.log").open("w") as log:
        environment = os.environ | {name: str(value) for name, value in places.items()}
        command = [sys.executable, "-m", "jupyterlab", *options]
        lab = subprocess.Popen(command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT)
        yield f"http://127.0.0.1:{port}/lab/tree/edit.ipynb?token={token}"
        lab.terminate()  # ends the kernels, too
        lab.wait(60)


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Page]:
    """The notebook, all of whose cells have been told to run; the last one holds the kernel for a while."""
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000}, device_scale_factor=1, accept_downloads=True)
        page.set_default_timeout(SOON)
        expect.set_options(timeout=SOON)
        open_notebook(page, address)
        # Cells that are run before the kernel is there would ask for one.
        expect(page.get_by_role("button", name="| Idle")).to_be_visible(timeout=LATE)
        command(page, "notebook:run-all-cells")
        yield page
        browser.close()


@pytest.fixture
def panel(page: Page) -> Locator:
    return page.locator(".jp-OutputArea-output .rl-edit")


def open_notebook(page: Page, address: str) -> None:
    """Open it as soon as the server answers."""
    for attempt in range(240):
        try:
            page.goto(address)
            return
        except Exception as error:
            if "ERR_CONNECTION_REFUSED" not in str(error) or attempt == 239:
                raise
            page.wait_for_timeout(500)


def command(page: Page, name: str, **options: object) -> None:
    """One of JupyterLab's own commands."""
    page.evaluate("([name, options]) => void window.jupyterapp.commands.execute(name, options)", [name, options])


def button(panel: Locator, name: str) -> Locator:
    return panel.get_by_role("button", name=name, exact=True)


def field(panel: Locator, name: str) -> Locator:
    return panel.get_by_label(name, exact=True)


def shoot(page: Page, panel: Locator, name: str) -> None:
    panel.scroll_into_view_if_needed()
    panel.screenshot(path=ARTEFACTS / f"{name}.png")
    page.screenshot(path=ARTEFACTS / f"{name}_page.png")


def test_a_click_while_other_cells_run_says_that_it_waits_and_follows_what_was_typed(
    page: Page, panel: Locator
) -> None:
    expect(panel).to_be_visible(timeout=LATE)
    field(panel, "Subject").fill("Louvre")
    field(panel, "Prompt").fill("Visit the Louvre in")
    button(panel, "Trace").click()
    expect(panel.get_by_text("The kernel is busy with other cells. Your click waits for them")).to_be_visible()
    shoot(page, panel, "1_waiting")
    expect(panel.get_by_text("Traced the answer")).to_be_visible(timeout=LATE)
    expect(panel.get_by_text("Your click waits")).to_be_hidden()
    grid = panel.get_by_role("grid", name=re.compile("^MLP restored"))
    expect(grid.get_by_role("rowheader").nth(1)).to_be_visible()
    expect(panel.locator(".rl-prompt").first).to_contain_text("Visit the Louvre in")
    shoot(page, panel, "2_traced")


def test_a_column_of_the_trace_chooses_the_layer_and_a_click_shows_the_answers(page: Page, panel: Locator) -> None:
    panel.locator(".rl-picture .rl-tick").nth(2).click()
    expect(field(panel, "Layer")).to_have_value("2")
    panel.locator(".rl-picture .rl-cell").nth(6).click()  # of layer 2, too
    expect(panel.get_by_role("region", name="Answers")).to_contain_text("Restored run")
    with page.expect_download() as download:
        panel.locator(".rl-save", has_text="CSV").first.click()
    assert download.value.suggested_filename == "trace-louvre.csv"
    assert Path(download.value.path()).read_text().startswith("kind,position,token")


def test_a_bad_field_is_refused_and_what_is_of_another_fact_is_greyed(page: Page, panel: Locator) -> None:
    field(panel, "Target").fill("")
    button(panel, "Edit").click()
    expect(panel.get_by_text("The target is ''")).to_be_visible()
    expect(panel.get_by_text("Traceback")).to_have_count(0)
    field(panel, "Subject").fill("louvre")
    expect(panel.locator(".rl-picture.rl-stale")).to_be_visible()
    field(panel, "Subject").press("Enter")
    expect(panel.get_by_text("did you mean 'Louvre'?")).to_be_visible()
    shoot(page, panel, "3_refused")
    field(panel, "Subject").fill("Louvre")
    expect(panel.locator(".rl-picture.rl-stale")).to_have_count(0)


def test_stop_and_the_kernels_own_stop_button_end_an_edit(page: Page, panel: Locator) -> None:
    panel.get_by_text("Search settings of the edit").click()
    field(panel, "Adam steps").fill("1000")
    field(panel, "Adam steps").blur()
    field(panel, "Target").fill("Rome")
    for stop in (lambda: button(panel, "Stop").click(), lambda: command(page, "notebook:interrupt-kernel")):
        button(panel, "Edit").click()
        expect(panel.get_by_text("v*: step")).to_be_visible(timeout=LATE)
        stop()
        expect(panel.get_by_text("Stopped. Nothing is half done")).to_be_visible()
        expect(panel.get_by_text("No edits in force")).to_be_visible()
    field(panel, "Adam steps").fill("3")
    field(panel, "Adam steps").blur()


def test_two_edits_are_made_compared_with_the_original_saved_and_undone(page: Page, panel: Locator) -> None:
    field(panel, "Target").fill("Rome")
    field(panel, "Target").press("Enter")
    expect(panel.get_by_text("Edited layer 2: P[Rome]")).to_be_visible(timeout=LATE)
    field(panel, "Target").fill("Tokyo")
    button(panel, "Edit").click()
    expect(panel.get_by_text("(before it, with 1 edit in force)")).to_be_visible(timeout=LATE)
    expect(panel.get_by_text("Original model, no edits")).to_be_visible()
    expect(panel.get_by_text("Now, with 2 edits: Rome; Tokyo")).to_be_visible()
    button(panel, "Trace").click()
    expect(panel.get_by_text("Beside it, as it was in step")).to_be_visible(timeout=LATE)
    for title in ("MLP restored, no edits", "MLP restored, 2 edits: Rome; Tokyo"):
        expect(panel.get_by_role("grid", name=re.compile(f"^{title}:"))).to_be_visible()
    button(panel, "Save").first.click()
    expect(panel.get_by_text("Saved: ")).to_be_visible()
    with page.expect_download() as download:
        button(panel, "Download").click()
    assert download.value.suggested_filename.startswith("louvre-rome-layer-2-")
    shoot(page, panel, "4_two_edits")


def test_any_two_steps_stand_side_by_side_and_one_is_shown_as_code(page: Page, panel: Locator) -> None:
    names = field(panel, "Show step").locator("option").all_text_contents()
    traces, edits = ([name for name in names if re.search(rf"\d\s+{kind}", name)] for kind in ("trace", "edit"))
    field(panel, "Show step").select_option(traces[0])
    field(panel, "beside").select_option(traces[-1])
    expect(panel.get_by_role("grid", name=re.compile("^MLP restored, step"))).to_have_count(2)
    expect(panel.locator(".rl-code pre")).to_contain_text("with lm.overlay.only([edit_1, edit_2]):")
    field(panel, "Show step").select_option(edits[0])
    field(panel, "beside").select_option(edits[1])
    expect(panel.locator(".rl-code pre")).to_contain_text("edit = rl.rome(")
    shoot(page, panel, "5_history")


def test_corruption_direction_heads_and_metric_are_picked(page: Page, panel: Locator) -> None:
    panel.get_by_text("Trace: what is restored").click()
    field(panel, "Corruption").select_option("another subject")
    field(panel, "In its place").fill("Luovre")  # as many tokens
    field(panel, "Foil").fill("Oslo")
    field(panel, "Direction").select_option("corrupted into clean")
    panel.get_by_text("heads, too").click()
    expect(button(panel, "logit difference")).to_be_disabled()
    button(panel, "Trace").click()
    expect(panel.locator(".rl-heads img").first).to_be_visible(timeout=LATE)
    expect(panel.get_by_text("Traced the answer")).to_be_visible(timeout=LATE)
    button(panel, "logit difference").click()
    expect(panel.get_by_role("grid", name=re.compile("^MLP corrupted.*: logit of"))).to_be_visible()
    shoot(page, panel, "5_picked")


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_nothing_is_cut_or_pale_at_any_width_in_either_theme(page: Page, panel: Locator, theme: str) -> None:
    command(page, "apputils:change-theme", theme=theme)
    expect(page.locator(f"body[data-jp-theme-name='{theme}']")).to_have_count(1)
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 1000})
        page.wait_for_timeout(600)
        expect(page.locator("#filebrowser")).to_be_visible()  # the sidebar is open
        shoot(page, panel, f"6_{theme.split()[1].lower()}_{width}")
        assert panel.evaluate(CUT) == [], f"cut at {width} px"
        assert panel.evaluate(PALE) == []


def test_a_reload_brings_the_panel_back_and_edits_are_undone_bit_for_bit(page: Page, panel: Locator) -> None:
    command(page, "apputils:change-theme", theme="JupyterLab Light")
    command(page, "docmanager:save")
    page.wait_for_timeout(1000)
    page.reload()
    expect(panel.get_by_text("2 edits in force")).to_be_visible(timeout=LATE)
    for count in (2, 1):
        expect(button(panel, "Undo")).to_have_count(count)
        button(panel, "Undo").first.click()
        expect(panel.get_by_text("Undone.")).to_be_visible(timeout=LATE)
    expect(panel.get_by_text("No edits in force")).to_be_visible()
    expect(panel.get_by_text("The weights are bit for bit those before the edit.")).to_be_visible()
    shoot(page, panel, "7_undone")
