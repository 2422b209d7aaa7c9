"""`kill -9` at random moments; then the same work again, until it is done: nothing lost but the item in hand."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from rome_lab.base.store import Json
from tests.faults.outcome import Outcome, Setting
from tests.faults.work import results

# Of the kills; a batch run is slow to begin.
SHARE = {"trace": 0.25, "covariance": 0.25, "evaluation": 0.2, "chain": 0.2, "batch": 0.1}
IN_A_ROW = 4  # kills of one run, at most
KERNEL_ENDS_S = 60


def kill_all(setting: Setting) -> Iterator[Outcome]:
    """Kill each sort of work."""
    for kind in setting.kinds:
        yield kill(setting, kind, math.ceil(SHARE[kind] * setting.kills))


def kill(setting: Setting, kind: str, kills: int) -> Outcome:
    """Kill runs of one sort of work, again and again, and compare what comes out in the end with an undisturbed run."""
    outcome = Outcome(f"kill -9 while {kind} runs")
    if setting.no_time_for(outcome):
        return outcome
    _, expected, seconds = setting.undisturbed(kind)
    runs, kept = 0, 0
    while outcome.tried < kills and not setting.time_is_up():
        folder = setting.fresh(kind)
        done: dict[Path, tuple[int, int]] = {}
        come: dict[Path, int] = {}
        for number in range(min(IN_A_ROW, kills - outcome.tried)):
            begin, process = time.monotonic(), setting.task(kind, folder).start()
            process.join(setting.chance.uniform(0, seconds))
            if process.exitcode is not None:
                if number == 0:  # it did all that there is to do
                    seconds = min(seconds, time.monotonic() - begin)
                break
            process.kill()
            process.join()
            outcome.tried += 1
            outcome.expect(kernel_has_ended(folder), f"{folder.name}: the kernel of a killed batch run lives on")
            done |= finished(folder)
            before, come = come, summed(folder)
            lost = [path.name for path, tokens in before.items() if come.get(path, 0) < tokens]
            outcome.expect(not lost, f"{folder.name}: {len(lost)} sums of a covariance were set back")
        runs, kept = runs + 1, kept + len(done)
        finish(setting, outcome, kind, folder, expected)
        again = [path.name for path, stamp in done.items() if finished(folder).get(path) != stamp]
        outcome.expect(not again, f"{folder.name}: {len(again)} finished results were lost or made again")
    if outcome.tried < kills:
        outcome.skipped = f"{kills - outcome.tried} kills, for want of time"
    outcome.note = f"{runs} runs; {kept} results were finished before the last kill, and kept"
    return outcome


def finish(setting: Setting, outcome: Outcome, kind: str, folder: Path, expected: Json) -> None:
    """Do the work to its end and compare."""
    found, error = setting.task(kind, folder).run()
    outcome.expect(not error, f"{folder.name}: going on after a kill failed: {error}")
    outcome.expect(error or found == expected, f"{folder.name}: the results differ from those of an undisturbed run")


def finished(folder: Path) -> dict[Path, tuple[int, int]]:
    """What tells each finished result from one that was made again; sums of a covariance are meant to be replaced."""
    stats = {path: path.stat() for path in set(results(folder)) - set(summed(folder))}
    return {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


def summed(folder: Path) -> dict[Path, int]:
    """How many tokens each sum of a covariance has come to; its key has no number of tokens, that of a finished C has."""
    tokens = {}
    for path in results(folder):
        if path.parent.name == "covariance":
            with safe_open(path, "numpy") as file:
                kept = {name: json.loads(file.metadata()[name]) for name in ("inputs", "meta")}
            if kept["inputs"]["tokens"] is None:
                tokens[path] = kept["meta"]["tokens"]
    return tokens


def kernel_has_ended(folder: Path) -> bool:
    """Whether the kernel that a batch run had started is gone, or goes within a while."""
    try:
        pid = int((folder / "kernel").read_text())
    except (FileNotFoundError, ValueError):  # it had not begun
        return True
    ends = time.monotonic() + KERNEL_ENDS_S
    while time.monotonic() < ends:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if (
            Path(f"/proc/{pid}/stat").exists()
            and Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        ):
            return True
        time.sleep(0.1)
    return False
