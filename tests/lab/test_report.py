"""The page about a fact: its numbers are the library's, the model is unchanged, nothing is fetched, text stays text."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright
from test_browser import ARTEFACTS, CHROMIUM, FLAGS
from test_comparison import REQUEST, model_of_long_texts
from test_editing import FACT, FEW
from test_plots import make_trace

from rome_lab import Fact, audit, causal_trace, report
from rome_lab.facts import completions
from rome_lab.lab.jobs import Job, wait_for_job
from rome_lab.lab.report_page import digits, heads_of_page, strongest_of
from rome_lab.lab.trials import make_edit
from rome_lab.tracing import Traces

QUICK = {"samples": 2, "progress": False}
HOW = {"layer": 1, "hparams": FEW, "tokens": 256}
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROME_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield model_of_long_texts()


@pytest.fixture(scope="module")
def edit(tiny):
    return make_edit(tiny, REQUEST)


@pytest.fixture(scope="module")
def pages(tiny, edit, tmp_path_factory) -> dict[str, Path]:
    """A page with an edit, one without, and one of a fact whose words are HTML."""
    folder = tmp_path_factory.mktemp("pages é 中 x")
    fact = Fact(f"Eiffel {HOSTILE}", "The {} is in </script><script>alert(2)</script>", "Paris")
    return {
        "edited": report(tiny, FACT, edit, folder / "edited.html", **QUICK),
        "plain": report(tiny, FACT, path=folder / "new folder" / "plain.html", **QUICK),
        "hostile": report(tiny, fact, path=folder / "hostile.html", **QUICK),
    }


class Text(HTMLParser):
    """The words of a page that a reader sees, and all that it points to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words, self.links, self.hidden = [], [], 0
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs) -> None:
        self.hidden += tag in ("script", "style")
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "data")]

    def handle_endtag(self, tag) -> None:
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data) -> None:
        if not self.hidden:
            self.words.append(data)


def read(path: Path) -> Text:
    return Text(path.read_text(encoding="utf-8"))


def test_its_numbers_are_those_of_the_trace(tiny, pages) -> None:
    text = read(pages["plain"]).text
    trace = causal_trace(tiny, FACT.prompt, FACT.subject, samples=2)
    token, layer = strongest_of(trace)
    assert FACT.prompt in text and "does not know this fact" in text
    assert f"with probability {digits(trace.p_clean)}" in text
    assert f"that becomes {digits(trace.p_corrupted)}" in text
    effect = f"{trace.indirect_effect[token, layer]:+.3f}".replace("-", "\u2212")
    assert f"returns at most {effect} of it" in text and f"in layer {layer}" in text
    assert "Of the subject's tokens the last matters more" in text and "can't tell" not in text
    assert "What the edit does" not in text


def test_the_edit_is_shown_before_and_after_with_its_audit_and_the_model_is_unchanged(tiny, edit, pages) -> None:
    text = read(pages["edited"]).text
    p = [completions(tiny, [(FACT.prompt, "Rome")], "test")[0].p]
    with edit.applied(tiny):
        p += [completions(tiny, [(FACT.prompt, "Rome")], "test")[0].p]
    assert f"of Rome from {digits(p[0])} to {digits(p[1])}." in text
    for name, row in audit(tiny, edit).iterrows():
        assert f"{name} {'–' if row['before'] != row['before'] else format(row['before'], '.3g')}" in text
    assert "Before the edit" in text and "After the edit" in text and "The model was put back" in text


def test_the_weights_and_the_edits_in_force_are_what_they_were(tiny, edit, tmp_path) -> None:
    other = make_edit(tiny, replace(REQUEST, target="London"))
    with other.applied(tiny), edit.applied(tiny):
        before = tiny.fingerprint()
        path = report(tiny, FACT, edit, tmp_path / "report.html", **QUICK)
        assert tiny.fingerprint() == before and tiny.edits == [other, edit]
        text = read(path).text
        assert "Other edits were in force" in text and "London" in text
        with pytest.raises(KeyboardInterrupt):
            report(tiny, FACT, edit, tmp_path / "again.html", samples=2, tell=interrupt)
        assert tiny.fingerprint() == before and not (tmp_path / "again.html").exists()
    assert not tiny.edits


def interrupt(doing: str, done: float) -> None:
    if doing == "Asking the edited model":
        raise KeyboardInterrupt


def test_a_target_is_edited_by_the_settings_that_are_given_and_progress_is_told(tiny, edit, tmp_path) -> None:
    steps = []
    path = report(tiny, FACT, " Rome ", tmp_path / "a.html", **HOW, samples=1, tell=lambda *step: steps.append(step))
    assert f"edit {edit.digest[:12]}" in read(path).text  # the same edit as that of `make_edit`
    assert [name for name, _ in steps][-1] == f"Writing {path}"
    assert all(0 <= done <= 1 for _, done in steps) and steps[-1][1] > 0.9
    assert any(name.startswith("v*: step") for name, _ in steps)


def test_the_code_on_the_page_makes_the_same_edit_again(tiny, edit, pages, tmp_path, monkeypatch) -> None:
    page = report(tiny, FACT, "Rome", tmp_path / "a.html", **HOW, **QUICK)
    code = unescape(re.search(r"<pre>(import rome_lab.*?)</pre>", page.read_text("utf-8"), re.DOTALL)[1])
    monkeypatch.setattr("rome_lab.load_model", lambda name: tiny)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert f"edit {edit.digest[:12]}" in read(tmp_path / "report.html").text
    assert f"the file of edit {edit.digest[:12]}" in read(pages["edited"]).text  # which is not made anew


def test_an_edit_of_several_layers_is_reported_and_made_again_by_its_code(tiny, tmp_path, monkeypatch) -> None:
    page = report(tiny, FACT, "Rome", tmp_path / "a.html", method="emmet", **HOW, **QUICK)
    assert "emmet, layers 0 and 1" in read(page).text and "a matrix in each of layers 0 and 1" in read(page).text
    code = unescape(re.search(r"<pre>(import rome_lab.*?)</pre>", page.read_text("utf-8"), re.DOTALL)[1])
    monkeypatch.setattr("rome_lab.load_model", lambda name: tiny)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    (digest,) = {re.search(r"; edit ([0-9a-f]{12})", read(x).text)[1] for x in (page, tmp_path / "report.html")}
    with pytest.raises(ValueError, match="there is no method 'mend'; choose one of rome, memit, emmet, alphaedit"):
        report(tiny, FACT, "Rome", tmp_path / "b.html", method="mend", **HOW, **QUICK)
    assert not (tmp_path / "b.html").exists()


def test_nothing_is_fetched(pages) -> None:
    for path in pages.values():
        links = read(path).links
        assert len(links) == 4 and all(link.startswith("data:image/png;base64,") for link in links)
        assert not re.search(r"@import|url\(|https?://", path.read_text(encoding="utf-8"))


def test_bad_input_is_refused_before_any_work(tiny, edit, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    cases = [
        (("smollm2-135m", FACT), TypeError, "the model is a str"),
        ((tiny, "Paris"), TypeError, "expected a Fact"),
        ((tiny, FACT, "Rome", tmp_path), IsADirectoryError, "is a folder; give the name of a file"),
        ((tiny, FACT, "Rome", tmp_path / "file" / "a.html"), OSError, "there is a file of that name; move it"),
        ((tiny, FACT, " ", tmp_path / "a.html"), ValueError, "the target is ' '"),
        (
            (tiny, replace(FACT, subject="Louvre"), edit, tmp_path / "a.html"),
            ValueError,
            "is not about 'The Louvre is in'",
        ),
    ]
    steps = []
    for given, error, message in cases:
        with pytest.raises(error, match=re.escape(message)):
            report(*given, tell=lambda *step: steps.append(step))
    assert steps == []


def test_the_panels_own_job_may_report_and_nobody_else_meanwhile_and_gets_the_same_bytes(tiny, pages, tmp_path) -> None:
    results = []
    job = Job(
        tiny, lambda: str(report(tiny, FACT, path=tmp_path / "a.html", **QUICK)), lambda *ended: results.append(ended)
    )
    with pytest.raises(RuntimeError, match="busy"):
        report(tiny, FACT, path=tmp_path / "b.html", **QUICK)
    wait_for_job(tiny)
    assert job.done.is_set() and results[0][0] == str(tmp_path / "a.html")
    assert (tmp_path / "a.html").read_bytes() == pages["plain"].read_bytes()


@pytest.mark.skipif(CHROMIUM is None, reason="the browser test is left out: there is no Chromium here.")
def test_it_opens_from_a_file_can_be_pointed_at_and_prints(pages) -> None:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        for name, path in pages.items():
            page = browser.new_page(viewport={"width": 1024, "height": 900})
            errors, requests = [], []
            page.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
            page.on("dialog", lambda dialog, errors=errors: errors.append(dialog.message) or dialog.dismiss())
            page.on("request", lambda request, requests=requests: requests.append(request.url))
            page.goto(path.as_uri())
            cell = page.locator(".rl-panel").nth(1).locator("[data-token='1'][data-layer='2']")
            cell.hover()
            expect(page.get_by_role("tooltip")).to_contain_text("MLP outputs of layers")
            expect(page.locator(".stills")).to_be_hidden()
            page.mouse.move(1, 1)
            for width in (1024, 390):
                page.set_viewport_size({"width": width, "height": 900})
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                for scheme in ("light", "dark"):
                    page.emulate_media(color_scheme=scheme)
                    light = page.evaluate("getComputedStyle(document.body).color").removeprefix("rgb(").split(", ")[0]
                    assert (int(light) > 160) == (scheme == "dark")
                    page.screenshot(path=ARTEFACTS / f"report_{name}_{scheme}_{width}.png", full_page=True)
            page.emulate_media(media="print", color_scheme="dark")
            expect(page.locator(".stills")).to_be_visible()
            expect(page.locator("#touch")).to_be_hidden()
            assert int(page.evaluate("getComputedStyle(document.body).color")[4:].split(",")[0]) < 60
            page.pdf(path=ARTEFACTS / f"report_{name}.pdf", format="A4")
            assert errors == [] and all(url.startswith(("file:", "data:")) for url in requests)
            page.close()
        browser.close()


def test_the_heads_of_most_effect_are_named():
    trace = make_trace("attn", 0)
    effect = np.zeros((6, 3))
    effect[4, 2], effect[1, 0] = 0.5, 0.2
    heads = replace(trace, kind="head", token=len(trace.tokens) - 1, p_restored=trace.p_corrupted + effect)
    shown = heads_of_page(Traces([trace, heads]), n=2)
    assert [(row["layer"], row["head"]) for row in shown["rows"]] == [(4, 2), (1, 0)]
    assert shown["rows"][0]["effect"] == pytest.approx(0.5)
    assert heads_of_page(Traces([trace])) is None
