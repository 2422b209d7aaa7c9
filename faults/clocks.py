"""Clocks that jump: files from the past and from the future, and processes that disagree about the time."""

from __future__ import annotations

import os
import time

from faults.kills import finished
from faults.outcome import Outcome, Setting

YEAR = 365 * 24 * 3600


def jump(setting: Setting) -> list[Outcome]:
    """Move the times of files, and the clocks of processes, of each sort of work."""
    return [move(setting, kind) for move in (move_files, move_clocks) for kind in setting.in_process]


def move_files(setting: Setting, kind: str) -> Outcome:
    """All finished results are from 1970, or from the year 2100, or older than one another: none is made again."""
    outcome = Outcome(f"files of {kind} from past and future")
    folder, expected, _ = setting.undisturbed(kind)
    for moment in (0.0, 130.0 * YEAR, time.time() - 2 * YEAR):
        for place, path in enumerate(sorted(folder.rglob("*"))):
            os.utime(path, (moment + place, moment + place))
        before = finished(folder)
        found, error = setting.task(kind, folder).run()
        outcome.tried += 1
        outcome.expect(not error, f"it failed: {error}")
        outcome.expect(error or found == expected, "the results differ from those of an undisturbed run")
        outcome.expect(finished(folder) == before, "finished results were made again")
    return outcome


def move_clocks(setting: Setting, kind: str) -> Outcome:
    """Two runs at once, the clock of one of them ten years ahead or behind: each is right, or says what is wrong."""
    outcome = Outcome(f"clocks of {kind} ten years apart")
    _, expected, _ = setting.undisturbed(kind)
    for ahead in (10.0 * YEAR, -10.0 * YEAR):
        folder = setting.fresh(kind)
        tasks = [setting.task(kind, folder), setting.task(kind, folder, ahead=ahead)]
        for process in [task.start() for task in tasks]:
            process.join()
        # What one writes is old to the other, which may clear it away: that run then says so, and goes on another time.
        for task in (*tasks, setting.task(kind, folder)):
            found, error = task.outcome() if task in tasks else task.run()
            outcome.tried += 1
            outcome.expect(error == "" or told(error, task in tasks), f"it failed: {error}")
            outcome.expect(error != "" or found == expected, "the results differ from those of an undisturbed run")
    return outcome


def told(error: str, disturbed: bool) -> bool:
    """Whether an error says, where that is possible, that a file was cleared away."""
    return disturbed and "was removed meanwhile" in error
