"""What people see: figures, the panel, what an edit does, notebooks in batch.

plots                                     the paper's figures, and the parts that all drawings share
save_figure, save_table, plot_history     a figure or a table as files; how the optimisation of v* went
samples_lines                             standard errors by number of samples of noise
panel_figure, new_axes, finish, layer_ticks, line_with_band, shared_legend, colour_bar, token_names    parts of drawings
COLOURS, FONT_SIZE, COLUMN_WIDTH          what lines and text look like; the colours of heatmaps are COLOUR_MAPS in plots
show, TracePicture                        traces that one can point at and click
record_values, run_notebook               values for the executed copy of a notebook; running one from Python
drawn_by_hand                             a folder for figures where nothing of a batch is drawn over
draw_figures, facts_to_show               all figures of tracing at once; the facts that Figure 1 shows one by one
EditRequest, ten_facts, fact_of           edits to try, and a fact that was typed in
try_edit, try_facts, for_people           make edits, look at what they do, undo them; the table of several made short
report                                    a page about one fact in one model, as one file of HTML
run_command                               the command line, with a command for each of these
explore, Explorer                         a trace chosen by hand: corruption, metric, direction, kind, heads
Panel, wait_for_job                       all that by hand; returns once the panel's work on a model is done
"""

from rome_lab.lab.drawing import (
    COLOURS,
    COLUMN_WIDTH,
    FONT_SIZE,
    colour_bar,
    finish,
    layer_ticks,
    line_with_band,
    new_axes,
    panel_figure,
    shared_legend,
    token_names,
)
from rome_lab.lab.explorer import Explorer, explore
from rome_lab.lab.folders import drawn_by_hand
from rome_lab.lab.interactive import TracePicture, show
from rome_lab.lab.jobs import wait_for_job
from rome_lab.lab.panel import Panel
from rome_lab.lab.plots import plot_history, save_figure, save_table
from rome_lab.lab.recording import record_values
from rome_lab.lab.reporting import report
from rome_lab.lab.samples import samples_lines
from rome_lab.lab.trials import EditRequest, for_people, ten_facts, try_edit, try_facts
from rome_lab.lab.typed_facts import fact_of, facts_to_show


def __getattr__(name: str) -> object:
    """What runs notebooks is imported when it is first asked for: papermill, and all that it needs, takes seconds."""
    if name in ("draw_figures", "run_command", "run_notebook"):
        from rome_lab.lab.batch import run_notebook
        from rome_lab.lab.command import run_command
        from rome_lab.lab.growing import draw_figures

        return {"draw_figures": draw_figures, "run_command": run_command, "run_notebook": run_notebook}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
