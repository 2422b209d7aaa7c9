"""The fault suite: `python -m tests.faults` breaks everything that can break, and says what came of it; see README.md."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from rome_lab.base.files import write_atomically
from tests.faults import clocks, damage, disks, kills, long_use, together
from tests.faults.outcome import Outcome, Setting
from tests.faults.work import WORK, prepare, quieten, said

SHARE = {"kills": 6, "together": 1, "clocks": 2, "damage": 3, "disks": 3, "long": 3}
"""Part -> its share of the time that is left when it begins, beside the shares of those that follow."""

PARTS: Mapping[str, Callable[[Setting], Iterable[Outcome]]] = {
    "kills": kills.kill_all,
    "together": together.run_together,
    "clocks": clocks.jump,
    "damage": damage.damage_all,
    "disks": disks.refuse_all,
    "long": long_use.use_for_long,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns 0 where nothing was wrong, else 1."""
    options = parser().parse_args(arguments)
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="rome_lab-faults-") as folder:
        scratch = Path(folder)
        scratch.chmod(0o755)
        model = prepare(scratch, options.model)
        until, chance = time.monotonic() + options.minutes * 60, random.Random(options.seed)
        setting = Setting(scratch, model, tuple(options.work), options.kills, options.rounds, until, chance)
        try:
            for place, part in enumerate(options.parts):
                left = (until - time.monotonic()) * SHARE[part] / sum(SHARE[x] for x in options.parts[place:])
                setting.until = time.monotonic() + left
                for outcome in outcomes(part, setting):
                    print(outcome, flush=True)
                    found.append(outcome)
        finally:
            table = pd.DataFrame([vars(outcome) | {"wrong": len(outcome.wrong)} for outcome in found])
            write_atomically(options.out, lambda temporary: table.to_csv(temporary, index=False))
    wrong = sum(bool(outcome.wrong) for outcome in found)
    print(f"{wrong} of {len(found)} checks found something wrong; the table is in {options.out}")
    return int(wrong > 0)


def outcomes(part: str, setting: Setting) -> Iterator[Outcome]:
    """What a part finds; one that ends early has found something wrong."""
    try:
        yield from PARTS[part](setting)
    except Exception as error:
        yield Outcome(f"the rest of part {part}", wrong=[f"it ended early: {said(error)}"])


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m tests.faults", description="Break what can break.")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which parts (all)")
    options.add_argument(
        "--kills", type=int, default=50, help="processes to kill, all kinds of work together (%(default)s)"
    )
    options.add_argument(
        "--rounds", type=int, default=300, help="damaged files, and edits and undos (%(default)s each)"
    )
    options.add_argument("--minutes", type=float, default=30, help="after these no further round begins (%(default)s)")
    options.add_argument("--work", nargs="+", choices=WORK, default=list(WORK), help="which sorts of work (all)")
    options.add_argument("--model", default="tiny", help="what load_model takes, or a tiny random model (%(default)s)")
    options.add_argument("--seed", type=int, default=0, help="of all that is random (%(default)s)")
    options.add_argument(
        "--out", type=Path, default=Path("results/faults.csv"), help="where the table goes (%(default)s)"
    )
    return options


if __name__ == "__main__":
    quieten()
    sys.exit(main())
