"""The examples of the page "Beyond the paper" run, one after the other, and say what the page says of them."""

from __future__ import annotations

import re
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from tiny import known, talkative_model

import rome_lab as rl
from rome_lab.facts import read_prompt

PAGE = (Path(__file__).parents[2] / "docs" / "beyond.md").read_text(encoding="utf-8")
WITH_A_REAL_MODEL = (
    "rl.load_model(",
    "rl.suggest_layer(",
    "rl.evaluate(",
    "rl.train_editor(",
)  # each has tests of its own


def swapped(lm, facts) -> tuple[rl.Fact, rl.SubjectSwap]:
    """A fact, and a subject that fits in its place: two of its letters put in each other's place."""
    for fact in sorted(facts, key=lambda fact: -len(fact.subject)):
        for i, j in combinations(range(len(fact.subject)), 2):
            letters = list(fact.subject)
            letters[i], letters[j] = letters[j], letters[i]
            swap = rl.SubjectSwap("".join(letters), "Q")
            with suppress(ValueError):
                swap.swapped_ids(lm, read_prompt(lm, fact))
                return fact, swap
    raise AssertionError("nothing fits in the place of any subject")


def test_the_examples_of_the_page_run():
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1 + len(re.findall("^## ", PAGE, re.MULTILINE)), (
        "one for each heading, and what they start from"
    )
    lm = talkative_model()
    facts = known(lm)
    names = {"rl": rl, "lm": lm, "facts": facts} | dict(zip(("fact", "swap"), swapped(lm, facts), strict=True))
    for block in blocks:
        if not any(call in block for call in WITH_A_REAL_MODEL):
            exec(block, names)
    plt.close("all")
    assert names["by_logits"].metric == "logit_difference" and names["needed"].direction == "noise"
    assert names["average"].attrs["clustered"] and names["heads"].p_restored.ndim == 2
    error = [np.abs(names[x]["mlp"] - names["exact"]).max() for x in ("estimate", "nearer")]
    assert error[1] <= error[0], "integrated gradients come nearer"


def test_every_name_of_the_page_is_offered():
    used = set(re.findall(r"\brl\.(\w+)", PAGE))
    assert len(used) > 10 and not [name for name in used if not hasattr(rl, name)]
