"""Clocks that jump: files from the past and from the future, and processes that disagree about the time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from tests.faults.kills import finished
from tests.faults.outcome import Outcome, Setting
from tests.faults.work import at_once

YEAR = 365 * 24 * 3600


def jump(setting: Setting) -> Iterator[Outcome]:
    """Move the times of files, and the clocks of processes, of each sort of work."""
    for kind in setting.in_process:
        yield move_files(setting, kind)
        yield move_clocks(setting, kind)


def move_files(setting: Setting, kind: str) -> Outcome:
    """All finished results are from 1970, or from the year 2100, or older than one another: none is made again."""
    outcome = Outcome(f"files of {kind} from past and future")
    if setting.no_time_for(outcome):
        return outcome
    folder, expected, _ = setting.undisturbed(kind)
    moments = (0.0, 130.0 * YEAR, time.time() - 2 * YEAR)
    for number in setting.rounds_of(outcome, len(moments)):
        for place, path in enumerate(sorted(folder.rglob("*"))):
            os.utime(path, (moments[number] + place,) * 2)
        before = finished(folder)
        found, error = setting.task(kind, folder).run()
        outcome.tried += 1
        outcome.expect(not error, f"it failed: {error}")
        outcome.expect(error or found == expected, "the results differ from those of an undisturbed run")
        outcome.expect(finished(folder) == before, "finished results were made again")
    return outcome


def move_clocks(setting: Setting, kind: str) -> Outcome:
    """Two runs at once, the clock of one ten years ahead, and then behind, or the other way round.

    Each is right, or says what is wrong.
    """
    outcome = Outcome(f"clocks of {kind} ten years apart")
    if setting.no_time_for(outcome):
        return outcome
    _, expected, seconds = setting.undisturbed(kind)
    jumps = (10.0 * YEAR, -10.0 * YEAR)
    for number in setting.rounds_of(outcome, len(jumps)):
        folder = setting.fresh(kind)
        jumping = setting.task(kind, folder, ahead=jumps[number], turn_s=seconds / 2)
        disturbed = at_once([setting.task(kind, folder), jumping])
        # What one writes is old to the other, which may clear it away: that run then says so, and goes on another time.
        for place, (found, error) in enumerate((*disturbed, setting.task(kind, folder).run())):
            outcome.tried += 1
            outcome.expect(error == "" or told(error, place < len(disturbed)), f"it failed: {error}")
            outcome.expect(error != "" or found == expected, "the results differ from those of an undisturbed run")
    return outcome


def told(error: str, disturbed: bool) -> bool:
    """Whether an error says, where that is possible, that a file was cleared away."""
    return disturbed and "was removed meanwhile" in error
