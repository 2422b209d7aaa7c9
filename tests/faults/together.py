"""Several runs in one store at once: each gives what it would have given alone."""

from __future__ import annotations

from collections.abc import Iterator

from tests.faults.outcome import Outcome, Setting
from tests.faults.work import at_once

AT_ONCE = 2


def run_together(setting: Setting) -> Iterator[Outcome]:
    """Two runs of each sort of work, begun together in one empty folder."""
    for kind in setting.kinds:
        yield run(setting, kind)


def run(setting: Setting, kind: str) -> Outcome:
    outcome = Outcome(f"two runs of {kind} in one store")
    if setting.no_time_for(outcome):
        return outcome
    _, expected, _ = setting.undisturbed(kind)
    folder = setting.fresh(kind)
    tasks = [setting.task(kind, folder) for _ in range(AT_ONCE)]
    for found, error in at_once(tasks):
        outcome.tried += 1
        outcome.expect(not error, f"it failed: {error}")
        outcome.expect(error or found == expected, "the results differ from those of a run alone")
    return outcome
