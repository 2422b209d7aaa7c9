"""The editing notebook in JupyterLab, in a real browser: a fact is typed in, edited, and the edit undone.

A screenshot of each step goes to artefacts/browser.
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

from rome_lab.lab.batch import prepare

ROOT = Path(__file__).parents[2]
ARTEFACTS = ROOT / "artefacts" / "browser"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
QUICK = {"steps": 15, "tokens": 8192, "samples": 2, "n_facts": 0}
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are there, too
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
SOON, LATE = 60_000, 480_000  # ms: what a slow machine may take to show something, and to measure C and edit

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="the browser test is left out: there is no Chromium here; install Debian's chromium."
)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of the notebook, with quick settings, in a JupyterLab of its own."""
    work, config = tmp_path / "work", tmp_path / "jupyter"
    work.mkdir()
    nbformat.write(prepare(ROOT / "notebooks" / "edit.ipynb", QUICK)[0], work / "edit.ipynb")
    for name, values in SETTINGS.items():
        file = config / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    places = {"JUPYTER_CONFIG_DIR": config, "JUPYTER_RUNTIME_DIR": config / "runtime", "PYTHONPATH": ROOT}
    places |= {"JUPYTERLAB_SETTINGS_DIR": config / "settings", "JUPYTERLAB_WORKSPACES_DIR": config / "workspaces"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    options = [f"--port={port}", "--ip=127.0.0.1", f"--ServerApp.root_dir={work}", "--no-browser", "--allow-root"]
    command = [sys.executable, "-m", "jupyterlab", *options, f"--IdentityProvider.token={token}"]
    with (tmp_path / "lab.log").open("w") as log:
        environment = os.environ | {name: str(place) for name, place in places.items()}
        lab = subprocess.Popen(command, cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT)
        yield f"http://127.0.0.1:{port}/doc/tree/edit.ipynb?token={token}"
        lab.terminate()  # ends the kernels, too
        lab.wait(60)


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1400}, device_scale_factor=1)
        page.set_default_timeout(SOON)
        expect.set_options(timeout=SOON)
        yield page
        browser.close()


def open_notebook(page: Page, address: str) -> None:
    """Open it as soon as the server answers."""
    for attempt in range(120):
        try:
            page.goto(address)
            return
        except Exception as error:
            if "ERR_CONNECTION_REFUSED" not in str(error) or attempt == 119:
                raise
            page.wait_for_timeout(500)


def test_a_typed_fact_is_edited_and_undone(address: str, page: Page) -> None:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    open_notebook(page, address)
    # Cells that are run before the kernel is there would ask for one.
    expect(page.get_by_role("button", name="| Idle")).to_be_visible()
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    panel = page.locator(".jp-OutputArea-output .rl-panel")
    expect(panel).to_be_visible(timeout=LATE)
    expect(page.get_by_text("recorded: ")).to_be_visible(timeout=LATE)  # the last cell has run
    shoot(page, panel, "1_opened")

    panel.get_by_label("Subject", exact=True).fill("Louvre")
    panel.get_by_label("Prompt", exact=True).fill("Guidebooks mention the Louvre among the sights of")
    panel.get_by_label("Target", exact=True).fill("")
    button(panel, "Edit").click()
    expect(panel.get_by_text("rome: the target is ''")).to_be_visible()
    expect(panel.get_by_text("Traceback")).to_have_count(0)
    shoot(page, panel, "2_refused")

    button(panel, "Trace").click()
    expect(panel.get_by_text("Traced the answer")).to_be_visible(timeout=LATE)
    expect(panel.get_by_alt_text("causal trace")).to_be_visible()
    assert first_token(panel) == "Paris"
    shoot(page, panel, "3_traced")

    panel.get_by_label("Target", exact=True).fill("Rome")
    button(panel, "Edit").click()
    expect(panel.get_by_text("v*: step")).to_be_visible(timeout=LATE)
    button(panel, "Stop").click()
    expect(panel.get_by_text("Stopped.")).to_be_visible()
    expect(panel.get_by_text("No edits in force")).to_be_visible()
    shoot(page, panel, "4_stopped")

    button(panel, "Edit").click()
    expect(panel.get_by_text("Edited layer 3")).to_be_visible(timeout=LATE)
    expect(panel.get_by_text("Guidebooks mention the Louvre among the sights of … Rome")).to_be_visible()
    assert first_token(panel) == "Rome"
    shoot(page, panel, "5_edited")

    button(panel, "Undo").click()
    expect(panel.get_by_text("bit for bit")).to_be_visible(timeout=LATE)
    expect(panel.get_by_text("No edits in force")).to_be_visible()
    assert first_token(panel) == "Paris"
    shoot(page, panel, "6_undone")


def button(panel: Locator, name: str) -> Locator:
    return panel.get_by_role("button", name=name, exact=True)


def first_token(panel: Locator) -> str:
    """What the model finds most probable next, as the last column shows it."""
    return panel.locator(".tokens").last.locator("code").first.inner_text()


def shoot(page: Page, panel: Locator, name: str) -> None:
    panel.scroll_into_view_if_needed()
    panel.screenshot(path=ARTEFACTS / f"{name}.png")
    page.screenshot(path=ARTEFACTS / f"{name}_page.png")
