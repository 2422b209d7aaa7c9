"""TODO front door lab."""

from rome_lab.lab.batch import record_values, run_notebook
from rome_lab.lab.plots import COLUMN_WIDTH, FONT_SIZE, plot_history
