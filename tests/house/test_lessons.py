"""The lessons' answers come from the code that their page shows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from docs.run_lessons import ANSWERS, answers_of_lessons, checksum_of_programs, programs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def kept() -> pd.Series:
    return pd.read_csv(ANSWERS).set_index("name")["value"]


def test_the_answers_are_those_of_the_code_on_the_page(kept):
    assert kept["code"] == checksum_of_programs(), (
        "the lessons' code has changed: python docs/run_lessons.py; make numbers"
    )
    assert len(programs()) == 3 and all("answers[" in program for program in programs().values())


def test_what_an_answer_takes_from_a_committed_figure_is_there(kept):
    many = pd.read_csv(ROOT / "figures" / "figure_2.csv").set_index(["kind", "bucket", "layer"])
    row = many.loc[("mlp", "subject_last", int(kept["mlp layer"]))]
    assert kept["width of many"] == pytest.approx(row["ci_high"] - row["ci_low"], rel=1e-9)
    assert kept["narrower"] == pytest.approx(kept["width"] / kept["width of many"], rel=1e-9)


@pytest.mark.slow
@pytest.mark.xdist_group("embedded model")
def test_the_first_lesson_gives_its_answers(kept, monkeypatch):
    """With the embedded model; the others take minutes."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    for name, value in answers_of_lessons(1).items():
        assert value == pytest.approx(kept[name], abs=2e-3), name
