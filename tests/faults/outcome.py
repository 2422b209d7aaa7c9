"""What came of a check: `Outcome`, and `Setting`, what all checks are given."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rome_lab.base.store import Json
from tests.faults.work import Task, wait_for


@dataclass
class Outcome:
    """A row of the table.

    Attributes:
        check: what was done.
        tried: how many times.
        wrong: what should not have happened, a sentence each.
        skipped: why nothing or not all was tried; "" where all was.
        note: what else to know.
    """

    check: str
    tried: int = 0
    wrong: list[str] = field(default_factory=list)
    skipped: str = ""
    note: str = ""

    def __str__(self) -> str:
        verdict = "WRONG" if self.wrong else "passed" if self.tried else "skipped"
        notes = "; ".join(x for x in (self.note, self.skipped and f"skipped: {self.skipped}") if x)
        return "\n    ".join([f"{verdict:8}{self.check:44}{self.tried:4}  {notes}", *self.wrong])

    def expect(self, ok: bool, otherwise: str) -> None:
        if not ok:
            self.wrong.append(otherwise)


@dataclass
class Setting:
    """Where checks are made, on which model, and for how long.

    Attributes:
        scratch: a folder for everything, gone afterwards.
        model: what `load_model` takes.
        kinds: sorts of work.
        kills: how many processes to kill.
        rounds: how many times to damage a file, and to edit and undo.
        until: `time.monotonic()` at which no further round begins.
        chance: decides what is done at random.
    """

    scratch: Path
    model: str
    kinds: tuple[str, ...]
    kills: int
    rounds: int
    until: float
    chance: random.Random

    def fresh(self, name: str) -> Path:
        """A new empty folder, which other users may enter."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.scratch))
        folder.chmod(0o755)
        return folder

    def task(self, kind: str, folder: Path, **options: object) -> Task:
        """Work in a folder, with a result file of its own outside it."""
        return Task(kind, self.model, folder, self.fresh("result") / "result.json", **options)

    def undisturbed(self, kind: str) -> tuple[Path, Json, float]:
        """The folder and the results of a run that nothing has happened to, and the seconds it took."""
        folder = self.fresh(kind)
        task = self.task(kind, folder)
        process, began = task.start(), time.monotonic()
        wait_for(process)
        seconds = time.monotonic() - began
        found, error = task.outcome()
        if error:
            raise RuntimeError(f"the undisturbed run of {kind} failed: {error}")
        return folder, found, seconds

    def no_time_for(self, outcome: Outcome) -> bool:
        """Whether time is up before a check has begun, which the outcome then says."""
        up = self.time_is_up()
        outcome.skipped = "for want of time" if up else ""
        return up

    def rounds_of(self, outcome: Outcome, wanted: int, name: str = "rounds") -> Iterator[int]:
        """The numbers of the rounds of a check, until time is up, which the outcome then says."""
        for number in range(wanted):
            if self.time_is_up():
                outcome.skipped = f"{wanted - number} {name}, for want of time"
                return
            yield number

    @property
    def in_process(self) -> list[str]:
        """The sorts of work whose caches are their own; a batch run has those of what it runs."""
        return [kind for kind in self.kinds if kind != "batch"]

    def time_is_up(self) -> bool:
        return time.monotonic() > self.until
