"""Every number of the README and of the site's pages stands in a committed table, and is printed as it stands there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from docs.number_sources import ROOT, faults, pages

PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in pages()}


@pytest.mark.parametrize("page", PAGES)
def test_every_number_of_a_page_is_that_of_a_committed_table(page):
    lines, _ = faults(PAGES[page])
    assert not lines, "\n".join([*lines, "`make numbers` puts right what can be put right."])


def test_the_tables_of_the_numbers_are_committed():
    tables = {
        path for text in PAGES.values() for path in re.findall(r"^([\w./]+\.(?:csv|md))(?: |$)", text, re.MULTILINE)
    }
    command = subprocess.run(["git", "ls-files", *tables], cwd=ROOT, capture_output=True, text=True)
    if command.returncode:
        pytest.skip("no git here")
    assert tables and set(command.stdout.split()) == tables


TABLE = "figures/figure_2_table.csv"
PROSE = f"The answer has 40.4% in 100 facts.\n\n<!-- numbers\n{TABLE} measure=p_clean :: mean*100 | n_facts\n-->\n"
CELLS = f"""| run | ours |
| --- | --- |
| clean | 40.4% |
| peak of states | 23.8%, layer 6 |

<!-- cells
{TABLE}
measure=p_clean | measure="state peak"
{{mean:.1%}}[, layer {{layer:.0f}}]
-->
"""


@pytest.mark.parametrize("page", [PROSE, CELLS])
def test_right_numbers_stay_and_wrong_ones_are_named_and_put_right(page):
    assert faults(page) == ([], page)
    for wrong in (page.replace("40.4", "40.5"), page.replace("40.4%", "4.4%")):
        (line,), mended = faults(wrong)
        assert "40.4" in line and mended == page


@pytest.mark.parametrize(
    "page, complaint",
    [
        ("It takes 12 seconds.\n", "1 numbers \\(12\\), but 0 sources"),
        (PROSE.replace("in 100 facts", "in facts"), "but 2 sources"),
        (PROSE.replace("p_clean", "p_cleaned"), "0 rows with measure=p_cleaned"),
        (PROSE.replace(" measure=p_clean", ""), "8 rows with no conditions"),
        (PROSE.replace(" ::", ""), "is no source"),
        (CELLS.replace("| clean | 40.4% |\n", ""), "the table has 1 rows, its comment names 2"),
        (CELLS.replace("| 40.4% |", "| 40.4% | 1 |"), "2 cells beside its label"),
        ("# Heading\n\nOf 7.\n\n" + PROSE, "3 numbers \\(7, 40.4, 100\\)"),
    ],
)
def test_a_number_without_its_source_is_named(page, complaint):
    lines, same = faults(page)
    assert re.search(complaint, "\n".join(lines)) and same == page


def test_names_and_code_are_no_numbers():
    text = "GPT-2 XL, SmolLM2-135M, Figures 1, 2 and 7, Python 3.11, `n=10`, [a](b/3.html), float32, 95% intervals, 2022.\n"
    assert faults(text) == ([], text)
    assert len(faults("```\nx = 12\n```\n")[0]) == 0 and len(faults("From 2-13, -7 and 3.5%.\n")[0]) == 1


def test_pages_hold_numbers_at_all():
    """A pattern that finds nothing would let everything pass."""
    assert len(re.findall(r"^<!-- (?:numbers|cells)$", PAGES["README.md"], re.MULTILINE)) >= 5
    assert Path(ROOT / "docs/number_sources.py").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_that_a_page_names_are_there(page):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGES[page])
    assert named or page != "docs/elsewhere.md"
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path} has no {test}"
