"""The interactive picture of a trace in a real browser: the module on a page of its own, with a stand-in for the notebook.

A screenshot of each step goes to artefacts/browser.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright
from test_browser import ARTEFACTS, CHROMIUM, FLAGS
from test_cell_answers import trace_of
from test_interactive import browser_of, made_traces
from test_plots import TOKENS, make_trace
from test_tracing import telling_model

from rome_lab.lab.interactive import TracePicture, show

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="the browser test is left out: there is no Chromium here; install Debian's chromium."
)

# The model that a notebook gives to the module, as far as the module uses it; messages go to Python and back.
STAND_IN = """async ([source, style, state]) => {
    const listeners = {};
    window.model = {
        get: (name) => state[name] ?? null,
        set: (name, value) => { state[name] = value; (listeners[`change:${name}`] ?? []).forEach((x) => x()); },
        save_changes: () => window.saved(JSON.stringify({selected: state.selected, layer: state.layer})),
        on: (name, listener) => (listeners[name] ??= []).push(listener),
        off: (name, listener) => (listeners[name] = listeners[name].filter((x) => x !== listener)),
        send: async (message) => {
            const replies = JSON.parse(await window.sent(JSON.stringify(message)));
            replies.forEach((reply) => (listeners["msg:custom"] ?? []).forEach((x) => x(reply)));
        },
        listeners,
    };
    document.head.appendChild(document.createElement("style")).textContent = style;
    const module = await import(URL.createObjectURL(new Blob([source], {type: "text/javascript"})));
    const el = document.body.appendChild(document.createElement("div"));
    window.cleanup = module.default.render({model: window.model, el});
}"""
PAGE = "<!doctype html><meta charset=utf-8><title>trace</title><body style='margin: 16px; background: Canvas'>"
DARK = ":root {color-scheme: light dark}"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1024, "height": 800})
    page.set_default_timeout(10_000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    assert page.errors == []
    page.close()


def open_picture(page: Page, picture: TracePicture, style: str = "") -> Locator:
    """The picture on an empty page; what it saves and sends reaches the widget in Python, and the answers come back."""
    replies = browser_of(picture)

    def sent(message: str) -> str:
        replies.clear()
        picture.answer_click(picture, json.loads(message), [])
        return json.dumps(replies)

    def saved(values: str) -> None:
        chosen = json.loads(values)
        picture.selected, picture.layer = chosen.get("selected"), chosen.get("layer")

    page.expose_function("sent", sent)
    page.expose_function("saved", saved)
    page.set_content(PAGE)
    state = {"picture": picture.picture, "selected": picture.selected, "layer": picture.layer}
    page.evaluate(STAND_IN, [picture._esm, DARK + picture._css + style, state])
    return page.locator(".rl-show")


def cell(picture: Locator, panel: int, token: int, layer: int) -> Locator:
    return picture.locator(f".rl-panel:nth-child({panel + 1}) [data-token='{token}'][data-layer='{layer}']")


def marked(picture: Locator, panel: int, mark: str) -> tuple[int, int, int, int] | None:
    """(token, layer, end token, end layer) of what is outlined, or None."""
    place = picture.locator(f".rl-panel:nth-child({panel + 1}) .rl-mark.rl-{mark}")
    if place.is_hidden():
        return None
    top, left, bottom, right = (int(x) for x in place.evaluate("x => x.style.gridArea").split(" / "))
    return top - 1, left - 2, bottom - 1, right - 2


def shoot(page: Page, name: str) -> None:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=ARTEFACTS / f"show_{name}.png")


def test_pointing_at_a_cell_gives_its_numbers_and_what_it_reaches(page: Page) -> None:
    traces = made_traces()
    picture = open_picture(page, show(traces))
    tip = picture.get_by_role("tooltip")
    expect(tip).to_be_hidden()
    cell(picture, 1, 3, 2).hover()
    p, base = traces[1].p_restored[3, 2], traces[1].p_corrupted
    for text in (
        "␣Tower token 3 (subject), layer 2", "MLP outputs of layers 0–7", f"p_restored{p:.4f}",
        f"indirect effect+{p - base:.4f}", "p_clean0.7000", "p_corrupted0.1000",
    ):  # fmt: skip
        expect(tip).to_contain_text(text)
    assert marked(picture, 1, "run") == (3, 0, 4, 8)
    assert marked(picture, 1, "reach") == (3, 1, len(TOKENS), 12)
    assert marked(picture, 0, "echo") == marked(picture, 2, "echo") == (3, 2, 4, 3)
    shoot(page, "1_pointed")

    cell(picture, 0, 3, 2).hover()
    expect(tip).to_contain_text("state of layer 2")
    assert marked(picture, 0, "run") == (3, 2, 4, 3) and marked(picture, 0, "reach") == (3, 3, len(TOKENS), 12)
    assert marked(picture, 1, "run") is None
    cell(picture, 0, 3, 11).hover()
    assert marked(picture, 0, "reach") is None  # nothing is above the last layer
    cell(picture, 0, 0, 5).hover()
    expect(tip).to_contain_text("Left of the subject both runs are the same")
    assert marked(picture, 0, "reach") is None
    cell(picture, 0, 5, 5).hover()
    expect(tip).to_contain_text("indirect effect−0.0")
    page.mouse.move(1, 1)
    expect(tip).to_be_hidden()


def test_the_subject_and_the_scale_are_marked(page: Page) -> None:
    picture = open_picture(page, show(made_traces()))
    first = picture.locator(".rl-panel").first
    assert first.locator(".rl-subject").all_inner_texts() == ["␣E", "iffel", "␣Tower"]
    expect(first.locator(".rl-key")).to_have_text("corrupted 0.1000clean 0.7000, beyond the scale")
    strip = first.locator(".rl-strip").bounding_box()
    low, high = show(made_traces()).picture["traces"][0]["limits"]
    pin = first.locator(".rl-strip .rl-corrupted").bounding_box()
    assert pin["x"] - strip["x"] == pytest.approx((0.1 - low) / (high - low) * strip["width"], abs=2)
    background = cell(picture, 0, 0, 5).evaluate("x => getComputedStyle(x).backgroundColor")
    assert min(int(x) for x in background[4:-1].split(", ")) > 250  # white, where nothing changes


def test_a_click_shows_what_the_three_runs_say(page: Page) -> None:
    lm = telling_model("llama")
    widget = show([trace_of(lm, kind) for kind in ("state", "mlp")], lm)
    picture = open_picture(page, widget)
    answers = picture.get_by_role("region", name="Answers")
    expect(answers).to_be_hidden()
    cell(picture, 1, 3, 2).click()
    for text in ("Clean run", "Corrupted run, mean of 3 samples", "Restored run, mean of 3 samples"):
        expect(answers).to_contain_text(text)
    expected = widget.answers(3, 2, trace=1)
    for number, run in enumerate((expected.clean, expected.corrupted, expected.restored)):
        rows = answers.locator(".rl-run").nth(number).locator(".rl-answer")
        expect(rows).to_have_count(5 + (run.rank > 5))
        followed = answers.locator(".rl-run").nth(number).locator(".rl-followed")
        expect(followed.locator(".rl-place")).to_have_text(str(run.rank))
        width = float(followed.locator("i").evaluate("x => x.style.width").removesuffix("%"))
        assert width == pytest.approx(100 * run.p_answer, abs=0.01)
    assert (widget.selected, widget.layer) == ((3, 2), 2)
    expect(cell(picture, 0, 3, 2)).to_have_attribute("aria-selected", "true")
    assert marked(picture, 0, "column") == (0, 2, len(widget.traces[0].tokens), 3)
    shoot(page, "2_answers")
    answers.get_by_role("button", name="Close the answers").click()
    expect(answers).to_be_hidden()


def test_the_axis_of_layers_chooses_a_layer_and_python_too(page: Page) -> None:
    widget = show(made_traces())
    picture = open_picture(page, widget)
    picture.locator(".rl-tick").nth(7).click()
    expect(picture.locator(".rl-hint")).to_contain_text("Dashed: layer 7.")
    assert (widget.selected, widget.layer) == (None, 7)
    page.evaluate("model.set('layer', 4)")
    expect(picture.locator(".rl-hint")).to_contain_text("Dashed: layer 4.")
    assert marked(picture, 2, "column") == (0, 4, len(TOKENS), 5)
    page.evaluate("model.set('layer', null)")
    expect(picture.locator(".rl-hint")).not_to_contain_text("Dashed")
    assert marked(picture, 2, "column") is None


def test_errors_and_a_missing_model_are_sentences(page: Page) -> None:
    lm = telling_model("llama")
    trace = trace_of(lm)
    picture = open_picture(page, show(replace(trace, p_clean=0.5 * trace.p_clean), lm))
    cell(picture, 0, 3, 2).click()
    expect(picture.get_by_role("alert")).to_contain_text("trace again with this model")
    page.evaluate("cleanup()")
    assert all(not each for each in page.evaluate("Object.values(model.listeners)"))


def test_without_a_model_a_click_says_what_to_write(page: Page) -> None:
    picture = open_picture(page, show(made_traces()))
    cell(picture, 0, 3, 2).click()
    expect(picture.get_by_role("region", name="Answers")).to_contain_text("give the model: rl.show(trace, lm).")


def test_everything_can_be_done_by_keyboard(page: Page) -> None:
    widget = show(made_traces())
    picture = open_picture(page, widget)
    page.keyboard.press("Tab")
    expect(cell(picture, 0, 0, 0)).to_be_focused()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "ArrowUp", "ArrowLeft", "ArrowLeft", "ArrowRight"):
        page.keyboard.press(key)
    expect(cell(picture, 0, 1, 1)).to_be_focused()
    assert cell(picture, 0, 1, 1).evaluate("x => getComputedStyle(x).outlineStyle") == "solid"
    expect(picture.get_by_role("tooltip")).to_contain_text("␣E token 1 (subject), layer 1")
    shoot(page, "3_focused")
    page.keyboard.press("End")
    expect(cell(picture, 0, 1, 11)).to_be_focused()
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    answers = picture.get_by_role("region", name="Answers")
    expect(answers).to_be_visible()
    assert widget.selected == (1, 0)
    page.keyboard.press("Escape")
    expect(answers).to_be_hidden()
    expect(picture.get_by_role("tooltip")).to_be_hidden()
    expect(cell(picture, 0, 1, 0)).to_be_focused()
    page.keyboard.press("Tab")
    expect(cell(picture, 1, 0, 0)).to_be_focused()  # one stop for each grid
    page.keyboard.press("Shift+Tab")
    expect(cell(picture, 0, 1, 0)).to_be_focused()


def test_a_screen_reader_finds_a_grid_with_names(page: Page) -> None:
    picture = open_picture(page, show(made_traces()))
    grid = picture.get_by_role("grid", name='MLP restored: p("Paris") by restored token and layer')
    expect(grid.get_by_role("row")).to_have_count(len(TOKENS))
    expect(grid.get_by_role("rowheader", name="␣Tower, subject")).to_be_visible()
    expect(
        grid.get_by_role("gridcell", name="␣Tower, token 3 (subject), layer 2: restored MLP outputs")
    ).to_be_visible()


@pytest.mark.parametrize("how", ["preference", "theme"])
def test_dark_mode_has_light_text_and_the_same_colours_in_the_cells(page: Page, how: str) -> None:
    theme = ":root {--jp-ui-font-color1: #fff; --jp-ui-font-color2: #bbb; --jp-layout-color1: #222}"
    if how == "preference":
        page.emulate_media(color_scheme="dark")
    picture = open_picture(page, show(made_traces()), theme if how == "theme" else "")
    if how == "theme":
        page.evaluate("document.body.dataset.jpThemeLight = 'false'; document.body.style.background = '#111'")
    cell(picture, 0, 3, 2).click()
    cell(picture, 0, 3, 4).hover()
    texts = (".rl-panel h4", ".rl-token", ".rl-hint", ".rl-key", ".rl-value", ".rl-answers p", ".rl-prompt span")
    for place in texts:
        colour = picture.locator(place).first.evaluate("x => getComputedStyle(x).color")
        assert max(int(x) for x in colour[4:-1].split(", ")) > 160, place
    raised = picture.locator(".rl-tip").evaluate("x => getComputedStyle(x).backgroundColor")
    assert max(int(x) for x in raised[4:-1].split(", ")) < 80
    one = show(made_traces()).picture["traces"][0]
    low, high = one["limits"]
    expected = one["colours"][int((one["p"][3][2] - low) / (high - low) * len(one["colours"]))]
    shown = cell(picture, 0, 3, 2).evaluate("x => getComputedStyle(x).backgroundColor")
    assert "#" + "".join(f"{int(x):02x}" for x in shown[4:-1].split(", ")) == expected
    shoot(page, f"4_dark_{how}")


@pytest.mark.parametrize("width", [1024, 640, 360])
@pytest.mark.parametrize("n_layers", [12, 48])
def test_nothing_is_clipped(page: Page, width: int, n_layers: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    traces = [make_trace(kind, n_layers=n_layers) for kind in ("state", "mlp", "attn")]
    picture = open_picture(page, show(traces))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for each in picture.locator(".rl-panel").all():
        box = each.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        if width >= 640:  # below it a grid may scroll within its panel
            assert each.locator(".rl-scroll").evaluate("x => x.scrollWidth <= x.clientWidth")
    for token, layer in ((0, 0), (6, n_layers - 1), (0, n_layers - 1)):
        cell(picture, 2, token, layer).hover()
        tip = picture.get_by_role("tooltip").bounding_box()
        assert tip["x"] >= 0 and tip["x"] + tip["width"] <= width and tip["y"] >= 0 and tip["y"] + tip["height"] <= 800
    shoot(page, f"5_{width}_{n_layers}")


def test_another_picture_takes_the_place_of_the_first(page: Page) -> None:
    widget = show(made_traces())
    picture = open_picture(page, widget)
    cell(picture, 0, 3, 2).click()
    other = show(make_trace("attn"), titles=("as it is now",))
    page.evaluate("picture => model.set('picture', picture)", other.picture)
    expect(picture).to_have_count(1)
    assert picture.locator(".rl-panel h4").all_inner_texts() == ["as it is now"]
    expect(cell(picture, 0, 3, 2)).to_have_attribute("aria-selected", "true")


def test_tokens_are_text_whatever_they_hold(page: Page) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    traces = made_traces(tokens=(hostile, *TOKENS[1:]), prompt=hostile, answer=hostile)
    picture = open_picture(page, show(traces))
    cell(picture, 0, 0, 2).hover()
    expect(picture.get_by_role("tooltip")).to_contain_text("<img␣src=x")
    expect(picture.locator("img")).to_have_count(0)
