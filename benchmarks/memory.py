"""Peak memory of each way, each in a process of its own: `python -m benchmarks.memory TASK WAY` measures one of them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict

from benchmarks.measure import Row, row
from benchmarks.model import Chosen, load
from benchmarks.tasks import TASKS, Options
from rome_lab.studies.cost.measuring import peak_bytes


def peaks(chosen: Chosen, options: Options, tasks: Iterable[str] = TASKS) -> list[Row]:
    """A row a way: megabytes at the peak, beyond what the process held before: the model, and one forward's leftovers.

    Raises:
        subprocess.CalledProcessError: a process failed; what it said is on the standard error.
    """
    rows = []
    for task in tasks:
        for way in TASKS[task]:
            asked = json.dumps({"chosen": asdict(chosen), "options": asdict(options)})
            command = [sys.executable, "-m", "benchmarks.memory", task, way, asked]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(row("memory", f"{task}: {way}", [json.loads(said.splitlines()[-1])], "MB"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("way")
    parser.add_argument("asked", help="JSON of the model and the options")
    given = parser.parse_args()
    asked = json.loads(given.asked)
    lm, options = load(Chosen(**asked["chosen"])), Options(**asked["options"])
    TASKS["state trace"]["one plain forward"](lm, options)()  # what the first forward of a process leaves behind
    print(json.dumps(peak_bytes(TASKS[given.task][given.way](lm, options), lm.device) / 1e6))


if __name__ == "__main__":
    main()
