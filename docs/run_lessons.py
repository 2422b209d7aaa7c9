"""Run the code of docs/lessons.md as it stands there: `python docs/run_lessons.py` keeps its answers in docs/lessons.csv.

Run it at the top of the checkout, for some ten minutes; `make numbers` then puts the answers into the page. The row `code`
is a checksum of what was run.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import pandas as pd

PAGE = Path(__file__).with_name("lessons.md")
ANSWERS = PAGE.with_suffix(".csv")


def programs() -> dict[str, str]:
    """The Python code of each lesson, by its heading; later lessons go on where earlier ones ended."""
    _, *parts = re.split(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lessons = zip(parts[::2], parts[1::2], strict=True)
    return {heading: "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)) for heading, text in lessons}


def checksum_of_programs() -> int:
    """Changes where the code of a lesson does."""
    return zlib.crc32("\n".join(programs().values()).encode())


def answers_of_lessons(n_lessons: int) -> dict[str, float]:
    """What the code of the first `n_lessons` puts into its `answers`."""
    names: dict[str, object] = {}
    for heading, program in list(programs().items())[:n_lessons]:
        exec(compile(program, f"{PAGE.name}: {heading}", "exec"), names)
    return {name: float(value) for name, value in names["answers"].items()}


if __name__ == "__main__":
    answers = answers_of_lessons(len(programs())) | {"code": checksum_of_programs()}
    pd.DataFrame({"name": list(answers), "value": list(answers.values())}).to_csv(ANSWERS, index=False)
