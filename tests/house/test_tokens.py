"""The study of how many tokens C needs leaves out what was used before, and pairs its differences within the case."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks import tokens
from rome_lab import load_facts
from rome_lab.facts.known import rank


def test_fresh_facts_are_about_subjects_that_were_not_used() -> None:
    facts = load_facts("embedded")
    fresh = tokens.fresh_facts(facts)
    order = sorted(facts, key=lambda fact: rank(tokens.USED_SEED, fact))
    used = {fact.subject for fact in order[: len(order) // 2]}
    assert not used & {fact.subject for fact in fresh}
    assert 400 < len(fresh) < len(facts) / 2


def judged_rows() -> pd.DataFrame:
    """Twelve cases; with 10 tokens NS is 2 below that with 20 in every case, whatever the case."""
    numbers = np.random.default_rng(0).uniform(50, 90, 12)
    rows = []
    for name, less in (("10", 2.0), ("20", 0.0)):
        for case, number in enumerate(numbers):
            own = dict.fromkeys(("ES", "PS", "EM", "PM", "NM", "known"), number)
            rows.append({"case": str(case), "method": name, "NS": number - less, **own})
    return pd.DataFrame(rows)


def test_differences_are_paired_within_the_case() -> None:
    found = tokens.compared(judged_rows()).set_index(["tokens", "metric"])
    apart = found.loc[(10, "NS")]
    assert np.allclose(apart[["difference", "difference_low", "difference_high"]].to_numpy(float), -2)
    assert apart["ci_high"] - apart["ci_low"] > 5, "the cases themselves are far apart"
    assert found.loc[(10, "ES"), "difference"] == 0 and -2 < found.loc[(10, "S"), "difference"] < 0
    assert (found.loc[20, "difference"] == 0).all()


def test_the_page_has_a_line_for_each_number_of_tokens() -> None:
    page = tokens.page(tokens.compared(judged_rows()), "12 cases.", "python")
    assert "| 10 | " in page and "| 20 | " in page and "-2.00 (-2.00 to -2.00)" in page


def test_no_tokens_mean_no_C() -> None:
    none, some = tokens.methods_by_tokens([0, 50])
    assert none.solution == "identity" and some.tokens == 50 and (none.name, some.name) == ("0", "50")
