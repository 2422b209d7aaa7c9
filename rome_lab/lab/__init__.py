"""TODO front door lab."""

from rome_lab.lab.batch import record_values, run_notebook
from rome_lab.lab.plots import COLOURS, COLUMN_WIDTH, FONT_SIZE, finish, layer_ticks, new_axes, plot_history
