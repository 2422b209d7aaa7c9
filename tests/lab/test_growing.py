"""All figures in one go: pictures grow, one kernel serves several notebooks, nothing of other settings is overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from tiny import known, talkative_model

from rome_lab.lab.batch import one_kernel, run_notebook
from rome_lab.lab.folders import drawn_by_hand, folder_of_figures, note_parameters
from rome_lab.lab.growing import Growing
from rome_lab.tracing import KINDS, trace_facts

ROOT = Path(__file__).parents[2]


def notebook(path, *sources, parameters='figures: str = "figures"\nn_facts: int = 3\nseed: int = 0'):
    cells = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(new_code_cell, sources)]
    nbformat.write(new_notebook(cells=cells), path)
    return path


def outputs(path):
    cells = nbformat.read(path, as_version=4).cells
    return ["".join(output.get("text", "") for output in cell.get("outputs", [])) for cell in cells]


def test_notebooks_of_one_kernel_share_a_process_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    starts = (
        "import multiprocessing, os, pandas\nchild = multiprocessing.get_context('spawn').Process(target=os.getpid)"
    )
    seen = f"{starts}\nchild.start(); child.join()\n"
    seen += "print(os.getpid(), 'left' in globals(), pandas.options.display.max_rows, child.exitcode)"
    one = notebook(tmp_path / "one.ipynb", seen, "left = 1; pandas.options.display.max_rows = 7")
    two = notebook(tmp_path / "two.ipynb", seen)
    with one_kernel() as kernel:
        first, second = (outputs(run_notebook(path, progress=False, kernel=kernel)) for path in (one, two))
    alone = outputs(run_notebook(two, progress=False))
    # What the first cell after the parameters saw: the same process, and nothing that the first notebook left.
    assert first[1].split() == second[1].split()
    assert second[1].split()[1:] == alone[1].split()[1:] == ["False", "60", "0"]
    assert alone[1].split()[0] != second[1].split()[0]
    counts = [cell.execution_count for cell in nbformat.read("runs/two.ipynb", as_version=4).cells]
    assert counts == [1, 2]


def test_a_failure_in_a_shared_kernel_does_not_reach_the_next_notebook(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad, good = notebook(tmp_path / "bad.ipynb", "1 / 0"), notebook(tmp_path / "good.ipynb", "print('well')")
    with one_kernel() as kernel:
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            run_notebook(bad, progress=False, kernel=kernel)
        assert outputs(run_notebook(good, progress=False, kernel=kernel))[-1] == "well\n"


WRITES = "import os; os.makedirs(figures, exist_ok=True); open(f'{figures}/drawn.txt', 'w').write(str(n_facts))"


def test_figures_of_other_settings_go_to_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = notebook(tmp_path / "draws.ipynb", WRITES)
    run_notebook(path, progress=False)
    run_notebook(path, {"n_facts": 1}, progress=False)
    run_notebook(path, {"n_facts": 3}, progress=False)  # the same again
    run_notebook(
        path, {"n_facts": 2, "figures": "figures/n_facts=1"}, progress=False
    )  # a folder that is named is taken
    drawn = {str(file.parent): file.read_text() for file in sorted((tmp_path / "figures").rglob("drawn.txt"))}
    assert drawn == {str(tmp_path / "figures"): "3", str(tmp_path / "figures/n_facts=1"): "2"}
    assert json.loads((tmp_path / "figures/parameters.json").read_text()) == {"draws": {"n_facts": 3, "seed": 0}}


def test_a_parameter_that_came_later_counts_as_its_default_in_what_was_drawn_before(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_notebook(notebook(tmp_path / "draws.ipynb", WRITES), progress=False)
    later = 'figures: str = "figures"\nn_facts: int = 3\nseed: int = 0\nways: list[str] = ["rome"]'
    path = notebook(tmp_path / "draws.ipynb", WRITES, parameters=later)
    run_notebook(path, progress=False)
    assert not list((tmp_path / "figures").glob("*/")), "with its default it makes what is there"
    run_notebook(path, {"ways": ["ft"]})
    assert (tmp_path / "figures/ways=-ft-/drawn.txt").exists()
    assert "this goes to figures/ways=-ft-." in capsys.readouterr().out


def test_times_that_were_measured_elsewhere_are_not_drawn_over(tmp_path):
    made = {"figures": str(tmp_path), "model": "small"}
    assert folder_of_figures("cost", made) == str(tmp_path)
    note_parameters("cost", made)
    assert folder_of_figures("cost", made) == str(tmp_path / "here")


def test_what_is_drawn_by_hand_goes_beside_what_was_drawn_in_batch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert drawn_by_hand("figures") == "figures", "nothing is there that could be drawn over"
    path = notebook(
        tmp_path / "draws.ipynb", f"from rome_lab.lab import drawn_by_hand; figures = drawn_by_hand(figures)\n{WRITES}"
    )
    for _ in range(2):
        run_notebook(path, progress=False)
    assert [str(x.relative_to(tmp_path)) for x in tmp_path.rglob("drawn.txt")] == ["figures/drawn.txt"]
    assert drawn_by_hand("figures") == "figures/by_hand" == drawn_by_hand("figures/by_hand")
    (tmp_path / "figures/by_hand/x.png").parent.mkdir()
    (tmp_path / "figures/by_hand/x.png").touch()
    assert drawn_by_hand("figures/by_hand") == "figures/by_hand" and drawn_by_hand(str(tmp_path)) == str(tmp_path)
    (tmp_path / "y.pdf").touch()
    assert drawn_by_hand(str(tmp_path)) == str(tmp_path / "by_hand"), "nobody knows what has made that picture"
    assert capsys.readouterr().out.count("goes to figures/by_hand") == 1


def test_a_folder_is_named_after_what_differs(tmp_path):
    made = {"figures": str(tmp_path), "model": "small", "n_facts": 100, "results": "here", "device": "cpu"}
    note_parameters("claims", made)
    assert folder_of_figures("claims", made | {"results": "there", "device": "cuda"}) == str(tmp_path)
    assert folder_of_figures("figure_1", made | {"n_facts": 3}) == str(tmp_path)  # nothing of it is there
    other = folder_of_figures("claims", made | {"n_facts": 3, "model": "org/it's large"})
    assert other == str(tmp_path / "model=org-it-s-large,n_facts=3")


def test_settings_whose_names_are_cut_or_alike_do_not_share_a_folder(tmp_path):
    made = {"figures": str(tmp_path), "model": "small"}
    note_parameters("claims", made)
    folders = []
    for model in ("org/a", "org-a", "x" * 200, "x" * 201):
        folder = folder_of_figures("claims", made | {"model": model})
        Path(folder).mkdir()
        note_parameters("claims", made | {"model": model, "figures": folder})
        assert folder_of_figures("claims", made | {"model": model}) == folder
        folders.append(Path(folder).name)
    assert folders == ["model=org-a", "model=org-a-2", f"model={'x' * 74}", f"model={'x' * 74}-2"]


def test_pictures_that_no_note_tells_of_are_left_alone_and_that_is_said(tmp_path, caplog):
    (tmp_path / "figure_1.png").write_bytes(b"somebody's")
    made = {"figures": str(tmp_path), "model": "small"}
    folder = Path(folder_of_figures("figure_1", made))
    assert folder == tmp_path / "new" and "has pictures, but no parameters.json says what made them" in caplog.text
    folder.mkdir()
    note_parameters("figure_1", made | {"figures": str(folder)})
    assert folder_of_figures("figure_1", made) == folder_of_figures("claims", made) == str(folder)
    assert folder_of_figures("figure_1", made | {"model": "large"}) == str(tmp_path / "new-2")


def test_what_a_failed_run_has_drawn_is_noted_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails = notebook(tmp_path / "fails.ipynb", WRITES, "1 / 0")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_notebook(fails, progress=False)
    assert json.loads((tmp_path / "figures/parameters.json").read_text()) == {"fails": {"n_facts": 3, "seed": 0}}
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        run_notebook(fails, {"n_facts": 1}, progress=False)
    assert (tmp_path / "figures/drawn.txt").read_text() == "3" and (tmp_path / "figures/n_facts=1/drawn.txt").exists()


def test_a_note_that_cannot_be_read_is_not_overwritten(tmp_path):
    (tmp_path / "parameters.json").write_text("{")
    with pytest.raises(ValueError, match=r"parameters\.json cannot be read .*remove it"):
        folder_of_figures("claims", {"figures": str(tmp_path)})


def test_committed_figures_say_what_made_them_and_a_first_try_leaves_them_alone():
    made = json.loads((ROOT / "figures/parameters.json").read_text())
    claims = pd.read_csv(ROOT / "figures/claims.csv")
    assert made["claims"]["n_facts"] == claims["n_facts"].max()
    for name in ("figure_1", "figure_2", "figure_3", "figure_7"):
        first_try = made[name] | {"n_facts": 12, "figures": str(ROOT / "figures")}
        assert folder_of_figures(name, first_try) == str(ROOT / "figures/n_facts=12")


class Bar:
    """Counts as tqdm does, and shows nothing."""

    total, n = None, 0

    def __init__(self):
        self.lines = []

    def update(self, steps):
        self.n += steps

    def set_description(self, text):
        pass

    def refresh(self):
        pass

    def write(self, text):
        self.lines.append(text)


def test_pictures_grow_and_the_bar_ends_where_the_work_does(tmp_path):
    lm = talkative_model()
    facts = known(lm)
    bar = Bar()
    for name in ("figure_1", "figure_7"):
        (tmp_path / f"{name}.png").write_text("of another model")
    growing = Growing(tmp_path, lm, bar, window=3)
    settings = {"samples": 1, "window": 3, "progress": False}
    growing.expect(facts[:1], ("state", "mlp", "attn"))
    growing.expect(facts, tuple(KINDS))
    growing.trace_shown(facts[:1], settings)
    assert [path.name for path in tmp_path.iterdir()] == ["figure_1.png"]
    first = (tmp_path / "figure_1.png").read_bytes()
    assert len(bar.lines) == 1
    assert str(tmp_path / "figure_1.png") in bar.lines[0]
    growing.drawing = -1e9  # never too dear
    trace_facts(lm, facts, tuple(KINDS), each=growing.add, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {f"figure_{n}.png" for n in (1, 2, 3, 7)}
    assert (tmp_path / "figure_1.png").read_bytes() != first
    assert bar.n == bar.total
    assert len(bar.lines) == 1


def test_the_first_picture_does_not_wait_for_the_other_kinds_and_none_is_taken_back(tmp_path, monkeypatch):
    lm, drawn = talkative_model(), []
    growing = Growing(tmp_path, lm, Bar(), window=3)
    monkeypatch.setattr(growing, "save", lambda name, figure: drawn.append(sum(x.has_data() for x in figure.axes)))
    for _ in range(2):  # as for the first fact, and again among those that are shown
        growing.trace_shown(known(lm)[:1], {"samples": 1, "window": 3, "progress": False})
    each = drawn[0]  # of one heatmap, with its scale
    assert each and drawn == [each, 2 * each, 3 * each, 3 * each]
