"""Audit: what an edit does to the model, where it should and where it should not; a small table.

audit(lm, edit)                the table, with remarks on what is out of the ordinary
neighbours_of(edit)            embedded facts that the edit should not touch
nearest_facts(fact, others)    of any facts, those nearest to one, in order
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rome_lab.base import seed_from
from rome_lab.editing.edit import Edit
from rome_lab.editing.update import TOLERANCE
from rome_lab.facts import Fact, completions, load_facts
from rome_lab.models import Change, LanguageModel, Question, score

logger = logging.getLogger(__name__)

Measured: TypeAlias = tuple[dict[str, float], Tensor, float]  # see `measure_edit`
AUDITED_NEIGHBOURS = 10  # how many are looked at for each fact
# What is out of the ordinary. Edits of the embedded model's own facts change W by 0.03 to 0.15 of its norm.
MOST_CHANGE = 0.25  # |dW| / |W|
MOST_DRIFT = 0.1  # nats, mean KL on the neighbours
MOST_PERPLEXITY = 1.05  # after / before
TEXT = (
    "Every morning the baker opened her shop before the sun was up. She mixed flour, water and salt in a large bowl, "
    "let the dough rest under a cloth, and swept the floor while she waited. By seven o'clock the first loaves were on "
    "the shelf, and the street smelled of bread. Children on their way to school stopped at the window; an old man "
    "bought the same two rolls that he had bought for thirty years. In winter she sold soup as well. When a bridge "
    "further down the river was repaired, the road past her door became quiet, and for some weeks she earned little. "
    "She used the time to paint the walls, to learn two new recipes, and to write down the ones that her mother had "
    "taught her."
)


def audit(lm: LanguageModel, edit: Edit, neighbours: Sequence[Fact] | None = None) -> pd.DataFrame:
    """Compare the model without and with the edit, other edits in force or not as they are; `lm` is left as it was.

    Args:
        neighbours: facts that the edit should not touch; by default embedded facts about other subjects: of the same
            relation where the edited fact names one, those with the same object first.

    Returns: a row a measure; `before`, `after`, and `remark`, which says what is out of the ordinary (also logged).

    Raises:
        ValueError: the edit is for another model, or there are no neighbours.
    """
    if not (isinstance(lm, LanguageModel) and isinstance(edit, Edit)):
        raise TypeError(f"audit: given are a {type(lm).__name__} and a {type(edit).__name__}; write audit(lm, edit).")
    if not edit.is_applied(lm):
        edit.check_model(lm, "audit")
    neighbours = neighbours_of(edit) if neighbours is None else tuple(neighbours)
    if not neighbours:
        raise ValueError("audit: there are no neighbours; give facts about other subjects, or None for embedded ones.")
    others = [x for x in lm.edits if x.digest != edit.digest]
    with lm.overlay.only(others):
        size = max(float(part.delta.norm() / lm.weight(part.layer).double().norm()) for part in edit.parts)
        before = measure_edit(lm, edit, neighbours)
    with lm.overlay.only([*others, edit]):
        after = measure_edit(lm, edit, neighbours)
        # Measured here, not as the edit says: beside other edits of the layer than when it was made, it differs.
        error = max(part.measured_error(lm.weight(part.layer)) for part in edit.parts)
    table = tabulate(edit, before, after, (size, error), len(neighbours))
    for name, remark in table.loc[table["remark"] != "", "remark"].items():
        logger.warning("audit: the %s: %s: %s", edit, name, remark)
    return table


def tabulate(edit: Edit, before: Measured, after: Measured, matrix: tuple[float, float], n: int) -> pd.DataFrame:
    """The table of `audit`; `matrix` is |dW| / |W| and the constraint error, the largest of all layers."""
    (p_before, log_p, perplexity), (p_after, log_p_after, perplexity_after), (size, error) = before, after, matrix
    drift = float((log_p.exp() * (log_p - log_p_after)).sum(-1).mean())
    lost = p_after["P[target]"] < edit.settings.enough
    inexact = "W_hat k* = v* is not met to float32 precision"
    costly = perplexity_after > MOST_PERPLEXITY * perplexity
    rows = [(name, p, p_after[name], "") for name, p in p_before.items()]
    rows[0] = (*rows[0][:3], "the edit does not make the target probable" if lost else "")
    rows += [
        (f"KL of {n} neighbours (nats)", 0.0, drift, "it changes the neighbours" if drift > MOST_DRIFT else ""),
        ("perplexity of a text", perplexity, perplexity_after, "it harms the model" if costly else ""),
        ("|dW| / |W|", 0.0, size, "an unusually large update" if size > MOST_CHANGE else ""),
        ("constraint error", np.nan, error, inexact if error > TOLERANCE and edit.solution.is_exact else ""),
    ]
    return pd.DataFrame(rows, columns=["measure", "before", "after", "remark"]).set_index("measure")


def measure_edit(lm: LanguageModel, edit: Edit, neighbours: Sequence[Fact]) -> Measured:
    """Measure the model as it is now.

    Returns: mean probabilities of all tokens of the target or the object, by their names in the table; (neighbours, V),
        the next-token log probabilities at the neighbours; and the perplexity of `TEXT`.
    """
    edited = list(zip(edit.facts, edit.targets, strict=True))
    prefixes = edit.settings.prefixes or ("",)  # those that v* was found with
    pairs = {
        "P[target]": [(fact.prompt, target) for fact, target in edited],
        "P[target] behind prefixes": [(x + fact.prompt, target) for fact, target in edited for x in prefixes],
        "P[original]": [(fact.prompt, fact.object) for fact in edit.facts],
        f"P[own object] of {len(neighbours)} neighbours": [(fact.prompt, fact.object) for fact in neighbours],
    }
    answers = {name: completions(lm, group, "audit", following=True) for name, group in pairs.items()}
    ids = tuple(lm.tokenizer(TEXT)["input_ids"][: lm.context_length])
    (text,) = score(lm, [Change()], [Question(0, ids[:1], ids[1:])], "audit")
    p = {name: float(np.mean([answer.p for answer in group])) for name, group in answers.items()}
    log_p = torch.stack([answer.following for answer in list(answers.values())[-1]])
    return p, log_p, float(np.exp(-text.log_p.mean()))


def neighbours_of(edit: Edit) -> tuple[Fact, ...]:
    """The embedded facts nearest to the edited ones, about other subjects than any of them."""
    subjects = {fact.subject for fact in edit.facts}
    embedded = [fact for fact in load_facts("embedded") if fact.subject not in subjects]
    near = [fact for edited in edit.facts for fact in nearest_facts(edited, embedded)[:AUDITED_NEIGHBOURS]]
    return tuple(dict.fromkeys(near))


def nearest_facts(fact: Fact, others: Iterable[Fact]) -> list[Fact]:
    """Facts that an edit of `fact` should not touch, the nearest first.

    They are about other subjects: those of its relation, in its own words, or, where there are none, any; those with its
    object first; in an order that depends on nothing but their subjects.
    """
    others = [x for x in others if x.subject != fact.subject]
    related = [replace(x, template=fact.template) for x in others if fact.relation and x.relation == fact.relation]
    return sorted(related or others, key=lambda x: (x.object != fact.object, seed_from(x.subject)))
