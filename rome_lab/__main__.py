"""`python -m rome_lab`: the command `rome_lab`; see `rome_lab.lab.command`."""

import sys

from rome_lab.lab import run_command

if __name__ == "__main__":
    sys.exit(run_command())
