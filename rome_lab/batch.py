"""Notebooks in batch: `python -m rome_lab.batch`; see `rome_lab.lab.batch`."""

import sys

from rome_lab.lab import record_values, run_notebook
from rome_lab.lab.batch import main

__all__ = ["record_values", "run_notebook"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
