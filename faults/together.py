"""Several runs in one store at once: each gives what it would have given alone."""

from __future__ import annotations

from faults.outcome import Outcome, Setting

AT_ONCE = 2


def run_together(setting: Setting) -> list[Outcome]:
    """Two runs of each sort of work, begun together in one empty folder."""
    return [run(setting, kind) for kind in setting.kinds]


def run(setting: Setting, kind: str) -> Outcome:
    outcome = Outcome(f"two runs of {kind} in one store")
    if setting.time_is_up():
        outcome.skipped = "for want of time"
        return outcome
    _, expected, _ = setting.undisturbed(kind)
    folder = setting.fresh(kind)
    tasks = [setting.task(kind, folder) for _ in range(AT_ONCE)]
    for process in [task.start() for task in tasks]:
        process.join()
    for task in tasks:
        found, error = task.outcome()
        outcome.tried += 1
        outcome.expect(not error, f"it failed: {error}")
        outcome.expect(error or found == expected, "the results differ from those of a run alone")
    return outcome
