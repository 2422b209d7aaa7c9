"""What the figures show, and the files behind them."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh

from rome_lab.lab import plots
from rome_lab.tracing.averaging import BUCKETS, Traces
from rome_lab.tracing.metrics import Readings
from rome_lab.tracing.trace import KINDS, Trace

TOKENS = ("The", " E", "iffel", " Tower", " is", " in", " the")


def make_trace(kind: str = "state", fact: int = 0, n_layers: int = 12) -> Trace:
    """A trace with an early and a late site, and negative effects at token 5."""
    what, severed = KINDS[kind]
    rng = np.random.default_rng([fact, len(kind)])
    layers = np.arange(n_layers)
    effect = rng.normal(0, 0.01, (len(TOKENS), n_layers))
    effect[0] = 0
    effect[3] += 0.2 * np.exp(-(((layers - 3) / 3) ** 2))
    effect[5] -= 0.05 * np.exp(-(((layers - 5) / 2) ** 2))
    effect[6] += 0.5 / (1 + np.exp(8 - layers))
    names = (f"The Eiffel Tower is in the {fact}", "Eiffel Tower", " Paris", TOKENS, (1, 4))
    return Trace(what, severed, *names, 0.7, 0.1, 0.1 + effect, 0.3, 10, 10, seed=0)


@pytest.fixture
def traces() -> Traces:
    return Traces(make_trace(kind, fact) for fact in range(6) for kind in KINDS)


@pytest.fixture
def average(traces) -> pd.DataFrame:
    return traces.average()


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def mesh_of(ax: Axes) -> QuadMesh:
    (mesh,) = (item for item in ax.collections if isinstance(item, QuadMesh))
    return mesh


def colour_at(mesh: QuadMesh, value: float) -> np.ndarray:
    return np.array(mesh.cmap(mesh.norm(value))[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_heatmap_draws_p_restored_with_the_first_token_on_top(kind):
    trace = make_trace(kind)
    ax = plots.heatmap(trace)
    assert isinstance(ax, Axes)
    np.testing.assert_array_equal(mesh_of(ax).get_array(), trace.p_restored)
    assert ax.get_ylim() == (len(TOKENS) - 0.5, -0.5) and ax.get_xlim() == (-0.5, 11.5)


def test_heatmap_marks_the_subjects_tokens_and_names_the_answer():
    ax = plots.heatmap(make_trace())
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        "The",
        "␣E*",
        "iffel*",
        "␣Tower*",
        "␣is",
        "␣in",
        "␣the",
    ]
    bar = next(other for other in ax.figure.axes if other is not ax)
    assert bar.get_ylabel() == 'p("Paris")'


def test_rows_of_tokens_that_were_not_restored_are_left_empty():
    p_restored = np.full((7, 12), np.nan)
    p_restored[3] = make_trace("severed-mlp").p_restored[3]
    trace = replace(make_trace("severed-mlp"), p_restored=p_restored)
    drawn = mesh_of(plots.heatmap(trace, **plots.shared_limits(trace))).get_array()
    np.testing.assert_array_equal(drawn[3], p_restored[3])
    assert np.ma.getmaskarray(drawn).any(axis=1).tolist() == [i != 3 for i in range(7)]


def test_plots_draw_into_the_axes_given_and_return_them(average):
    draw = [
        lambda ax: plots.heatmap(make_trace(), ax=ax),
        lambda ax: plots.average_heatmap(average, "mlp", ax=ax),
        lambda ax: plots.lines(average, "attn", ax=ax),
        lambda ax: plots.severed_lines(average, ax=ax),
    ]
    for function in draw:
        ax = plt.subplots()[1]
        assert function(ax) is ax
        assert len(plt.get_fignums()) == 1
        plt.close("all")


def test_average_heatmap_draws_the_means_by_bucket_and_layer(average):
    drawn = mesh_of(plots.average_heatmap(average, "mlp")).get_array()
    for i, bucket in enumerate(BUCKETS):
        rows = average[(average["kind"] == "mlp") & (average["bucket"] == bucket)].sort_values("layer")
        np.testing.assert_array_equal(drawn[i], rows["mean"])


def test_effects_on_both_sides_are_inside_the_scale_and_coloured_apart(average):
    for ax, white in ((plots.heatmap(make_trace()), 0.1), (plots.average_heatmap(average, "attn"), 0.0)):
        mesh = mesh_of(ax)
        low, high = mesh.get_clim()
        assert low <= mesh.get_array().min() < white < mesh.get_array().max() <= high
        assert colour_at(mesh, white).min() > 0.97
        step = white - mesh.get_array().min()
        below, above = colour_at(mesh, white - step), colour_at(mesh, white + step)
        assert np.abs(below - above).max() > 0.1
        assert below.min() < 0.95 and above.min() < 0.97


def test_the_scale_begins_at_p_corrupted_where_nothing_is_below_it():
    trace = make_trace()
    trace = replace(trace, p_restored=np.maximum(trace.p_restored, trace.p_corrupted))
    mesh = mesh_of(plots.heatmap(trace))
    assert mesh.get_clim() == (trace.p_corrupted, trace.p_restored.max())
    assert colour_at(mesh, trace.p_corrupted).min() > 0.97


def test_shared_limits_give_every_panel_one_scale_that_holds_all_data(traces, average):
    panels = [make_trace(kind) for kind in ("state", "mlp", "attn")]
    scales = {mesh_of(plots.heatmap(t, **plots.shared_limits(*panels))).get_clim() for t in panels}
    everything = np.stack([t.p_restored for t in panels])
    assert scales == {(everything.min(), everything.max())}
    limits = plots.shared_limits(average)
    scales = {mesh_of(plots.average_heatmap(average, kind, **limits)).get_clim() for kind in KINDS}
    assert scales == {(average["mean"].min(), average["mean"].max())}


def test_limits_that_would_hide_data_are_widened_and_reported(caplog):
    trace = make_trace()
    with caplog.at_level(logging.WARNING):
        mesh = mesh_of(plots.heatmap(trace, vmin=0.1, vmax=0.2))
    assert mesh.get_clim() == (trace.p_restored.min(), trace.p_restored.max())
    assert "widened" in caplog.text


def test_no_effect_at_all_is_white():
    trace = replace(make_trace(), p_restored=np.full((7, 12), 0.1))
    mesh = mesh_of(plots.heatmap(trace))
    assert colour_at(mesh, 0.1).min() > 0.97


def test_panels_with_shared_rows_keep_the_first_token_on_top():
    axes = plt.subplots(1, 2, sharey=True)[1]
    for ax in axes:
        plots.heatmap(make_trace(), ax=ax)
    assert axes[0].get_ylim() == (len(TOKENS) - 0.5, -0.5)


def test_a_bucket_that_only_some_facts_have_carries_its_own_n(traces):
    one_token = [
        replace(trace, prompt="another", subject_range=(3, 4)) for trace in traces if trace.prompt.endswith("0")
    ]
    ax = plots.average_heatmap(Traces([*traces, *one_token]).average(), "state")
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels[0] == "first subject token (6)" and labels[2] == "last subject token"
    assert "n = 7" in ax.get_title()


def test_lines_draw_the_means_and_their_intervals(average):
    ax = plots.lines(average, "state")
    drawn = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    bands = {tuple(band.get_facecolor()[0][:3]): band.get_paths()[0].get_extents() for band in ax.collections}
    for bucket, name in BUCKETS.items():
        rows = average[(average["kind"] == "state") & (average["bucket"] == bucket)]
        np.testing.assert_array_equal(drawn[name], rows["mean"])
        band = bands[matplotlib.colors.to_rgb(plots.BUCKET_STYLES[bucket]["color"])]
        assert (band.y0, band.y1) == pytest.approx((rows["ci_low"].min(), rows["ci_high"].max()))
    assert "n = 6" in ax.get_title()
    low, high = ax.get_ylim()
    shown = average[average["kind"] == "state"]
    assert low <= shown["ci_low"].min() < 0 and high >= shown["ci_high"].max()


def test_lines_of_one_fact_have_no_band_and_are_drawn():
    ax = plots.lines(Traces([make_trace()]).average(), "state")
    ax.figure.canvas.draw()
    assert len(ax.get_lines()) == len(BUCKETS) + 1  # and the line at zero


@pytest.mark.parametrize("quantity, most", [("indirect_effect", 1), ("p_restored", 1), ("normalised_effect", 40)])
def test_a_band_of_few_facts_shows_no_effect_that_cannot_be(traces, quantity, most):
    average = traces.average(quantity)
    wide = average.assign(ci_low=average["mean"] - 40, ci_high=average["mean"] + 40)
    wide.attrs = average.attrs
    ends = [band.get_paths()[0].get_extents().y1 for band in plots.lines(wide, "state").collections]
    assert max(ends) == pytest.approx(most, abs=0 if most == 1 else 2)


def test_buckets_have_the_same_colours_in_all_panels(average):
    axes = plt.subplots(1, 2)[1]
    for ax, kind in zip(axes, ("state", "mlp"), strict=True):
        plots.lines(average, kind, ax=ax)
    colours = [{line.get_label(): line.get_color() for line in ax.get_lines()[:6]} for ax in axes]
    assert colours[0] == colours[1] and len(set(colours[0].values())) == 6


def test_severed_lines_draw_the_last_subject_token_ordinary_and_severed(traces, average):
    ax = plots.severed_lines(average)
    drawn = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    for kind, name in (("state", "ordinary"), ("severed-mlp", "MLP severed"), ("severed-attn", "attention severed")):
        rows = average[(average["kind"] == kind) & (average["bucket"] == "subject_last")]
        np.testing.assert_array_equal(drawn[name], rows["mean"])
    lost = Traces(traces).gap("state", "severed-mlp")
    drawn = {line.get_label(): line.get_ydata() for line in plots.severed_lines(lost).get_lines()}
    np.testing.assert_array_equal(drawn["ordinary minus MLP severed"], lost[lost["bucket"] == "subject_last"]["mean"])


def test_a_kind_that_was_not_traced_is_refused_by_name(traces):
    average = traces.of("mlp").average()
    for draw in (plots.average_heatmap, plots.lines):
        with pytest.raises(ValueError, match="no rows of kind 'state', only of mlp"):
            draw(average, "state")
    with pytest.raises(ValueError, match="severed_lines: no row"):
        plots.severed_lines(average)


@pytest.mark.filterwarnings("ignore:Glyph")
def test_awkward_tokens_are_visible_and_do_not_break_the_drawing():
    awkward = ("\n", " ", "$x$$", "東京", "\t", "\u200b\\", "a" * 90)
    ax = plots.heatmap(replace(make_trace(), tokens=awkward, answer="$5^$"))
    ax.figure.canvas.draw()
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels[0] == "↵" and labels[1] == "␣*" and labels[4] == "⇥"
    assert len(labels[6]) <= 20
    assert all(text.get_window_extent().width > 0 for text in ax.get_yticklabels())


def test_plotting_leaves_the_global_style_alone(average, tmp_path):
    before = dict(matplotlib.rcParams)
    ax = plots.lines(average, "state")
    plots.save_figure(ax.figure, average, tmp_path / "figure")
    assert dict(matplotlib.rcParams) == before


def test_cell_table_has_the_numbers_of_the_heatmap():
    trace = make_trace()
    table = plots.cell_table(trace)
    np.testing.assert_array_equal(table["p_restored"].to_numpy().reshape(7, 12), trace.p_restored)
    row = table[(table["position"] == 3) & (table["layer"] == 5)].iloc[0]
    assert (row["token"], row["bucket"], row["p_restored"]) == (" Tower", "subject_last", trace.p_restored[3, 5])
    assert table.iloc[0]["bucket"] == "before_subject"


def test_saved_csv_round_trips_and_states_quantity_unit_and_interval(average, tmp_path):
    plots.save_figure(plots.lines(average, "state").figure, average, tmp_path / "qwen2.5")
    assert {path.name for path in tmp_path.iterdir()} == {"qwen2.5.csv", "qwen2.5.png", "qwen2.5.pdf"}
    read = pd.read_csv(tmp_path / "qwen2.5.csv")
    pd.testing.assert_frame_equal(read[list(average.columns)], average, check_dtype=False, rtol=1e-14, atol=0)
    assert set(read["quantity"]) == {"indirect_effect"} and set(read["unit"]) == {"probability"}
    assert set(read["interval"]) == {"95% t over facts"}


def test_the_same_figure_is_saved_as_the_same_bytes(average, tmp_path):
    for name in ("first", "second"):
        plots.save_figure(plots.average_heatmap(average, "mlp").figure, average, tmp_path / name)
    for suffix in (".csv", ".png", ".pdf"):
        assert (tmp_path / f"first{suffix}").read_bytes() == (tmp_path / f"second{suffix}").read_bytes()


def test_the_pdf_keeps_its_text_as_text_and_carries_no_date(average, tmp_path):
    plots.save_figure(plots.lines(average, "state").figure, average, tmp_path / "figure")
    pdf = (tmp_path / "figure.pdf").read_bytes()
    assert b"/FontFile2" in pdf and b"CreationDate" not in pdf


def test_the_png_has_200_dots_an_inch(average, tmp_path):
    plots.save_figure(plots.lines(average, "state").figure, average, tmp_path / "figure")
    height, width, _ = plt.imread(tmp_path / "figure.png").shape
    assert width == pytest.approx(200 * plots.COLUMN_WIDTH, rel=0.1) and height > 200


def test_single_facts_and_the_average_are_drawn_a_row_each_with_one_scale_a_row(traces, average):
    kinds = ("state", "mlp", "attn")
    singles = [[make_trace(kind, fact) for kind in kinds] for fact in range(2)]
    figure = plots.facts_and_average(singles, average[average["kind"].isin(kinds)], "what it is of")
    panels = [ax for ax in figure.axes if any(isinstance(item, QuadMesh) for item in ax.collections)]
    panels = [ax for ax in panels if ax.get_label() != "<colorbar>"]
    assert len(panels) == 9 and figure.get_suptitle() == "what it is of"
    for row in (panels[:3], panels[3:6], panels[6:]):
        assert len({mesh_of(ax).get_clim() for ax in row}) == 1
    assert [bool(ax.get_title()) for ax in panels] == [True] * 3 + [False] * 3 + [True] * 3
    for ax, trace in zip(panels, [trace for traces in singles for trace in traces], strict=False):
        np.testing.assert_array_equal(mesh_of(ax).get_array(), trace.p_restored)


def test_panels_have_a_note_above_and_one_legend_below_them(average):
    figure, axes = plots.panel_figure(1, 2, (7, 2.4), "a note", sharey=True)
    for ax in axes:
        plots.lines(average, "state", ax, legend=False)
    plots.shared_legend(figure, columns=6)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(BUCKETS.values())
    assert figure.get_suptitle() == "a note" and axes[0].get_shared_y_axes().joined(*axes)


def test_a_table_is_saved_whole_and_without_its_index(tmp_path):
    table = pd.DataFrame({"a": [1, 2], "b": ["x", None]}, index=[7, 8])
    plots.save_table(table, f"{tmp_path}/new/table.csv")
    assert (tmp_path / "new" / "table.csv").read_text() == "a,b\n1,x\n2,\n"


@pytest.mark.slow
def test_importing_what_lies_below_the_lab_loads_no_plotting_library():
    rooms = ("base", "models", "facts", "tracing", "editing", "evaluation")
    code = (
        "import importlib, sys, types\n"
        "house = types.ModuleType('rome_lab'); house.__path__ = [sys.argv[1]]; sys.modules['rome_lab'] = house\n"
        "for name in sys.argv[2:]: importlib.import_module(f'rome_lab.{name}')\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'matplotlib', 'ipywidgets', 'papermill'}))\n"
    )
    command = [sys.executable, "-c", code, str(Path(plots.__file__).parents[1]), *rooms]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_another_metric_is_drawn_from_the_run_that_is_restored_into():
    trace = make_trace("state", 0)
    readings = Readings(clean=-2.0, corrupted=3.0, restored=trace.p_restored - 1, variance=trace.p_restored)
    trace = replace(trace, metric="logit_difference", foil=" Rome", further={"logit_difference": readings})
    trace = replace(trace, direction="noise")
    ax = plots.heatmap(trace)
    mesh = mesh_of(ax)
    np.testing.assert_allclose(mesh.get_array().ravel(), readings.restored.ravel())
    assert colour_at(mesh, -2.0).min() > 0.97 and ax.get_title() == "State corrupted"
    assert plots.metric_name(trace) == 'logit of "Paris" minus "Rome"'
    table = plots.cell_table(trace)
    assert table["logit_difference_clean"].eq(-2.0).all() and len(table) == trace.p_restored.size


def test_averages_of_another_metric_and_direction_are_named_and_their_clusters_stated(tmp_path):
    readings = Readings(clean=2.0, corrupted=-1.0, restored=make_trace("mlp", 0).p_restored, variance=np.zeros(1))
    chosen = {"metric": "logit_difference", "direction": "noise", "further": {"logit_difference": readings}}
    traces = Traces(replace(make_trace("mlp", fact), **chosen, relation="r") for fact in range(2))
    average = traces.average("effect", clustered=True)
    for ax in (plots.average_heatmap(average, "mlp"), plots.lines(average, "mlp")):
        assert ax.get_title() == "MLP corrupted (n = 2)" and ax.get_xlabel() == "middle of the corrupted layers"
    assert ax.get_ylabel() == "average effect, logit difference"
    average = Traces(replace(x, relation=x.prompt) for x in traces).average("effect", clustered=True)
    plots.save_figure(ax.figure, average, tmp_path / "a")
    assert (pd.read_csv(tmp_path / "a.csv")["interval"] == "95% t over facts, clustered by relation").all()


def test_heads_are_drawn_by_layer_and_head():
    trace = replace(make_trace("attn", 0), kind="head", token=4, p_restored=np.random.default_rng(0).random((6, 3)))
    ax = plots.heatmap(trace)
    assert mesh_of(ax).get_array().shape == (6, 3) and ax.get_xlabel() == "head" and ax.get_ylabel() == "layer"
    table = plots.cell_table(trace)
    row = table[(table["layer"] == 4) & (table["head"] == 2)].iloc[0]
    assert row["p_restored"] == trace.p_restored[4, 2]
    heads = plots.heads_heatmap(Traces([trace]).average_heads())
    np.testing.assert_allclose(mesh_of(heads).get_array(), trace.effect)
