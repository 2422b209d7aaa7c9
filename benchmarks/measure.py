"""What the benchmarks share: rows of a table, ways that take turns, and the table as CSV and as a page."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch

from rome_lab import LanguageModel
from rome_lab.base.files import write_atomically
from rome_lab.studies.cost.measuring import seconds

Row = dict[str, object]
Work = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


def row(part: str, measure: str, values: Iterable[float], unit: str, **more: object) -> Row:
    """One row of the table."""
    values = list(values)
    spread = {"median": statistics.median(values), "least": min(values), "greatest": max(values), "n": len(values)}
    return {"part": part, "measure": measure, "unit": unit} | spread | more


def in_turns(
    ways: Mapping[Name, Work], repetitions: int, device: torch.device, warm_up: Iterable[Work] = ()
) -> tuple[dict[Name, list[float]], dict[Name, object]]:
    """Seconds of every way, which take turns so that a change of the machine's speed meets them alike; last results."""
    for work in warm_up:
        work()
    times: dict[Name, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(repetitions):
        for name, work in ways.items():
            spent, results[name] = seconds(work, device)
            times[name].append(spent)
    return times, results


def ratios(upper: Iterable[float], lower: Iterable[float]) -> list[float]:
    """Quotients of what was measured in the same turn."""
    return [x / y for x, y in zip(upper, lower, strict=True)]


def about(lm: LanguageModel) -> dict[str, object]:
    """What every row says about model and machine."""
    gpu = lm.device.type == "cuda"
    machine = torch.cuda.get_device_name(lm.device) if gpu else torch.backends.cpu.get_cpu_capability()
    told = {"model": lm.name, "dtype": str(lm.dtype), "device": f"{lm.device.type}, {machine}"}
    told |= {"processor": processor(), "cores": cores(), "threads": torch.get_num_threads()}
    return told | {"torch": torch.__version__}


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        named = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # no Linux
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def finish(table: pd.DataFrame, path: Path, page: Path | None = None, command: str = "") -> None:
    """Print the table, write it as CSV and, where `page` is given, as Markdown."""
    shown, shared = without_repetition(table)
    print(f"{shared}\n\n{shown.to_string(index=False, float_format='{:.3g}'.format, na_rep='')}")
    write_atomically(path, lambda temporary: table.to_csv(temporary, index=False, float_format="%.4g"))
    if page:
        write_atomically(page, lambda temporary: temporary.write_text(markdown(table, command)))


def without_repetition(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The table without the columns that say the same in every row, and what those say."""
    rest = table.columns.drop(["part", "measure", "unit", "median"])
    same = [name for name in rest if table[name].nunique(dropna=False) == 1]
    told = {name: text(table[name].iloc[0]) for name in same}
    return table.drop(columns=same), ", ".join(f"{name} {value}" for name, value in told.items() if value)


def markdown(table: pd.DataFrame, command: str) -> str:
    """The table as a page, a section a part."""
    shown, shared = without_repetition(table)
    lines = ["# Measured", "", f"By `{command}`, which writes this page: {shared}; {platform.system()}.", ""]
    for part, rows in shown.groupby("part", sort=False):
        rows = rows.drop(columns="part").dropna(axis="columns", how="all")
        lines += [f"## {part}", "", line(rows.columns), line("---" for _ in rows.columns)]
        lines += [line(map(text, values)) for values in rows.itertuples(index=False)] + [""]
    return "\n".join(lines)


def line(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def text(value: object) -> str:
    """A cell: numbers to three digits, nothing where there is none."""
    if pd.isna(value):
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("*", "\\*")
