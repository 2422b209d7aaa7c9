"""Audit: what an edit does to the model, where it should and where it should not; a small table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from rome_lab.base import OneLine, seed_from
from rome_lab.editing.edit import Edit
from rome_lab.editing.update import TOLERANCE, constraint_error
from rome_lab.facts import Fact, completions, load_facts
from rome_lab.models import Change, LanguageModel, Question, score

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True, eq=False, repr=False)
class Measured(OneLine):
    """What was measured on a model, with or without the edit.

    Attributes:
        p_target, p_original: mean over the edited facts of the probability of all tokens of the target or the object.
        p_behind: the same of the target, behind the prefixes that v* was found with.
        p_neighbours: mean over the neighbours of the probability of all tokens of their own objects.
        log_p: (neighbours, V), their next-token distributions.
        perplexity: of `TEXT`.
    """

    p_target: float
    p_original: float
    p_behind: float
    p_neighbours: float
    log_p: Tensor
    perplexity: float


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
        size = float(edit.delta.norm() / lm.weight(edit.layer).double().norm())
        before = measure_edit(lm, edit, neighbours)
    with lm.overlay.only([*others, edit]):
        after = measure_edit(lm, edit, neighbours)
        # Measured here, not as the edit says: beside other edits of the layer than when it was made, it differs.
        error = met_to(lm, edit)
    table = tabulate(edit, before, after, (size, error), len(neighbours))
    for name, remark in table.loc[table["remark"] != "", "remark"].items():
        logger.warning("audit: the %s: %s: %s", edit, name, remark)
    return table


def tabulate(edit: Edit, before: Measured, after: Measured, matrix: tuple[float, float], n: int) -> pd.DataFrame:
    """The table of `audit`; `matrix` is |dW| / |W| and the constraint error."""
    size, error = matrix
    drift = float((before.log_p.exp() * (before.log_p - after.log_p)).sum(-1).mean())
    lost = after.p_target < edit.settings.enough
    inexact = "W_hat k* = v* is not met to float32 precision"
    costly = after.perplexity > MOST_PERPLEXITY * before.perplexity
    rows = [
        ("P[target]", before.p_target, after.p_target, "the edit does not make the target probable" if lost else ""),
        ("P[target] behind prefixes", before.p_behind, after.p_behind, ""),
        ("P[original]", before.p_original, after.p_original, ""),
        (f"P[own object] of {n} neighbours", before.p_neighbours, after.p_neighbours, ""),
        (f"KL of {n} neighbours (nats)", 0.0, drift, "it changes the neighbours" if drift > MOST_DRIFT else ""),
        ("perplexity of a text", before.perplexity, after.perplexity, "it harms the model" if costly else ""),
        ("|dW| / |W|", 0.0, size, "an unusually large update" if size > MOST_CHANGE else ""),
        ("constraint error", np.nan, error, inexact if error > TOLERANCE else ""),
    ]
    return pd.DataFrame(rows, columns=["measure", "before", "after", "remark"]).set_index("measure")


def met_to(lm: LanguageModel, edit: Edit) -> float:
    """The largest |W_hat k* - v*| / |v*| of the edit, of the weights as they are now."""
    K, V = (x.view(len(x), -1) for x in (edit.k_star, edit.v_star))
    return float(constraint_error(lm.weight(edit.layer), K, V).max())


@torch.no_grad()
def measure_edit(lm: LanguageModel, edit: Edit, neighbours: Sequence[Fact]) -> Measured:
    """Measure the model as it is now."""
    edited = list(zip(edit.facts, edit.targets, strict=True))
    prefixes = edit.settings.prefixes or ("",)
    own = [asked_p(lm, fact, fact.object) for fact in neighbours]
    ids = tuple(lm.tokenizer(TEXT)["input_ids"][: lm.context_length])
    (text,) = score(lm, [Change()], [Question(0, ids[:1], ids[1:])], "audit")
    return Measured(
        p_target=np.mean([asked_p(lm, fact, target)[0] for fact, target in edited]),
        p_original=np.mean([asked_p(lm, fact, fact.object)[0] for fact, _ in edited]),
        p_behind=np.mean([asked_p(lm, fact, target, x)[0] for fact, target in edited for x in prefixes]),
        p_neighbours=np.mean([p for p, _ in own]),
        log_p=torch.stack([log_p for _, log_p in own]),
        perplexity=float(np.exp(-text.log_p.mean())),
    )


def asked_p(lm: LanguageModel, fact: Fact, continuation: str, prefix: str = "") -> tuple[float, Tensor]:
    """The probability of all tokens of `continuation` after the fact's prompt, and the (V,) next-token log p there."""
    (answer,) = completions(lm, [(prefix + fact.prompt, continuation)], "audit", following=True)
    return answer.p, answer.following


def neighbours_of(edit: Edit) -> tuple[Fact, ...]:
    """Embedded facts about other subjects, in the edited fact's own words where they share its relation."""
    subjects = {fact.subject for fact in edit.facts}
    embedded = [fact for fact in load_facts("embedded") if fact.subject not in subjects]
    found: dict[Fact, None] = {}
    for edited in edit.facts:
        related = [replace(x, template=edited.template) for x in embedded if x.relation == edited.relation]
        # In an order that depends on nothing but the subjects.
        candidates = sorted(related or embedded, key=lambda x: (x.object != edited.object, seed_from(x.subject)))
        found.update(dict.fromkeys(candidates[:AUDITED_NEIGHBOURS]))
    return tuple(found)
