"""Disks that refuse: full, read-only, or another user's. What was saved stays, the rest is said in a sentence.

Small file systems are mounted in a name space of their own, which ends with the process: no other process sees them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rome_lab.base.store import Json
from tests.faults.outcome import Outcome, Setting
from tests.faults.work import ROOT, WORK, load, one_thread, said

NOBODY = 65534
ROOMS = 5  # sizes of what is left of a disk, between nothing and what the work needs
LATE_S = 600  # how long the last round may take after time is up
MOUNT = 'mount -t tmpfs -o size=64m tmpfs "$0" && chmod 755 "$0"'
INSIDE = ("unshare", "--map-root-user", "--mount", "sh", "-c")
ADVICE = ("the disk is full", "the file system is read-only", "permission is denied")


def refuse_all(setting: Setting) -> Iterator[Outcome]:
    """Do each sort of work where another user may not write, on a full disk, and on a read-only one."""
    for kind in setting.in_process:
        yield other_user(setting, kind)
    yield from in_a_name_space(setting)


def in_a_name_space(setting: Setting) -> list[Outcome]:
    """What this module, run as a command where a small disk is mounted, finds."""
    skipped = Outcome("full and read-only disks")
    if setting.no_time_for(skipped):
        return [skipped]
    disk = setting.fresh("disk")
    if not shutil.which("unshare") or subprocess.run([*INSIDE, MOUNT, disk], capture_output=True).returncode:
        return [Outcome("full and read-only disks", skipped="no small file system can be mounted here")]
    expected = {}
    for kind in setting.kinds:
        folder, found, _ = setting.undisturbed(kind)
        expected[kind] = {"found": found, "bytes": sum(x.stat().st_size for x in folder.rglob("*") if x.is_file())}
    given = setting.scratch / "expected.json"
    given.write_text(json.dumps(expected))
    shell = f'{MOUNT} && exec "$@"'
    left = max(0.0, setting.until - time.monotonic())
    command = [*INSIDE, shell, disk, sys.executable, "-m", "tests.faults.disks", disk, setting.model, given, str(left)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=left + LATE_S)
    except subprocess.TimeoutExpired:
        return [Outcome("full and read-only disks", wrong=[f"a round went on for {LATE_S} s after time was up"])]
    if done.returncode:
        return [Outcome("full and read-only disks", wrong=[f"the checks ended early: {done.stderr[-2000:]}"])]
    return [Outcome(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def main(disk: str, model: str, given: str, left: str) -> None:
    """Called in the name space, with the seconds that are left."""
    until, expected = time.monotonic() + float(left), json.loads(Path(given).read_text())
    setting = Setting(Path(disk), model, tuple(expected), kills=0, rounds=ROOMS, until=until, chance=random.Random(0))
    lm = load(model)
    outcomes = [fill(lm, setting, kind, **expected[kind]) for kind in expected]
    outcomes.append(export(lm, setting.scratch))
    outcomes += [read_only(lm, setting, kind, expected[kind]["found"]) for kind in expected]
    print(json.dumps([asdict(outcome) for outcome in outcomes]))


def attempt(lm, model: str, folder: Path, kind: str) -> tuple[Json, str]:
    """What the work gives, and the error that ends it, of which one is empty."""
    try:
        with one_thread():
            return json.loads(json.dumps(WORK[kind](lm, model, folder))), ""
    except Exception as error:
        return None, said(error)


def fill(lm, setting: Setting, kind: str, found: Json, bytes: int) -> Outcome:
    """Let the disk get full in the middle of the work; then make room, and go on."""
    outcome = Outcome(f"disk full while {kind} runs")
    refused, disk = 0, setting.scratch
    for number in setting.rounds_of(outcome, ROOMS):
        folder, filler = disk / kind, disk / "filler"
        folder.mkdir()
        room = (bytes * number // ROOMS) // 4096 * 4096
        filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - room))
        result, error = attempt(lm, setting.model, folder, kind)
        refused += bool(error)
        outcome.tried += 1
        outcome.expect(
            not error or ADVICE[0] in error and "NO SENTENCE" not in error, f"with {room} bytes left: {error}"
        )
        outcome.expect(error or result == found, f"with {room} bytes left: wrong results")
        filler.unlink()
        result, error = attempt(lm, setting.model, folder, kind)
        outcome.expect(not error, f"with room again: {error}")
        outcome.expect(error or result == found, "with room again: the results differ from those of an undisturbed run")
        shutil.rmtree(folder)
    outcome.expect(refused > 0 or outcome.tried < ROOMS, "no run was refused, so this showed nothing")
    outcome.note = f"{refused} refused; all went on once there was room"
    return outcome


def export(lm, disk: Path) -> Outcome:
    """A model that does not fit on the disk leaves nothing there."""
    outcome = Outcome("disk full while a model is exported", tried=1)
    filler = disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - (128 << 10)))
    try:
        lm.save_pretrained(disk / "model")
        outcome.expect(False, "a model was written where there is no room")
    except OSError as error:
        outcome.expect(ADVICE[0] in str(error), said(error))
    except Exception as error:
        outcome.expect(False, said(error))
    outcome.expect([x.name for x in disk.iterdir()] == ["filler"], "half a model was left behind")
    filler.unlink()
    return outcome


def read_only(lm, setting: Setting, kind: str, found: Json) -> Outcome:
    """Make the disk read-only before the work, and after it."""
    outcome = Outcome(f"{kind} on a read-only disk")
    disk = setting.scratch
    folder = disk / kind
    folder.mkdir()
    for _ in setting.rounds_of(outcome, 2):
        remount(disk, "ro")
        result, error = attempt(lm, setting.model, folder, kind)
        outcome.tried += 1
        outcome.expect(error or result == found, "wrong results")
        outcome.expect(not error or ADVICE[1] in error and "NO SENTENCE" not in error, f"it failed: {error}")
        remount(disk, "rw")
        result, error = attempt(lm, setting.model, folder, kind)
        outcome.expect(result == found, f"once it could be written: {error or 'wrong results'}")
    shutil.rmtree(folder)
    return outcome


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", disk], check=True)


def other_user(setting: Setting, kind: str) -> Outcome:
    """Work in a folder that belongs to another user, or that its owner may not write."""
    outcome = Outcome(f"{kind} where permission is denied")
    if setting.no_time_for(outcome):
        return outcome
    folder = setting.fresh(kind)
    root = os.geteuid() == 0
    folder.chmod(0o755 if root else 0o555)
    task = setting.task(kind, folder, user=NOBODY if root else None)
    task.result.parent.chmod(0o777)
    _, error = task.run()
    outcome.tried += 1
    outcome.expect(ADVICE[2] in error and "NO SENTENCE" not in error, f"it said: {error or 'nothing'}")
    outcome.expect(not list(folder.iterdir()), "something was written all the same")
    folder.chmod(0o755)
    return outcome


if __name__ == "__main__":
    with contextlib.redirect_stderr(io.StringIO()):
        main(*sys.argv[1:])
