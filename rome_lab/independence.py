"""Keys that cannot have a value each, because they are linearly dependent.

distinct(lm, layer, factor, K)                 the keys of one fact, each once
check_independent(lm, layer, factor, ...)      refuses several facts whose keys are dependent
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from rome_lab.edits import weight
from rome_lab.facts import Fact
from rome_lab.models import LanguageModel
from rome_lab.update import DependentKeys, Factor, solve_update

logger = logging.getLogger(__name__)


def dependent(lm: LanguageModel, layer: int, factor: Factor, K: Tensor) -> list[int]:
    """Columns of K (H, n) that are linearly dependent; none where each can have a value of its own."""
    W = weight(lm, layer)
    try:
        solve_update(W, factor, K, torch.zeros(len(W), K.shape[1]))
    except DependentKeys as error:
        return error.columns
    return []


def distinct(lm: LanguageModel, layer: int, factor: Factor, K: Tensor) -> Tensor:
    """The keys of one fact (H, n), each once: where the layer sees no prefix they are the same, and the last one stays."""
    if not dependent(lm, layer, factor, K):
        return K
    kept = K[:, -1:]
    for column in reversed(range(K.shape[1] - 1)):
        wider = torch.cat([K[:, column : column + 1], kept], dim=1)
        kept = kept if dependent(lm, layer, factor, wider) else wider
    logger.info(
        "rome: at layer %d some keys of the fact are the same; %d of %d are left", layer, kept.shape[1], K.shape[1]
    )
    return kept


def check_independent(
    lm: LanguageModel, layer: int, factor: Factor, requests: Sequence[tuple[Fact, str]], keys: Sequence[Tensor]
) -> None:
    """Raise where the facts' keys are dependent, naming the facts."""
    owners = [fact.prompt for (fact, _), K in zip(requests, keys, strict=True) for _ in range(K.shape[1])]
    prompts = dict.fromkeys(owners[column] for column in dependent(lm, layer, factor, torch.cat(keys, dim=1)))
    if prompts:
        raise ValueError(
            f"rome: the keys of {' and '.join(map(repr, prompts))} are linearly dependent, as those of one subject are, "
            "so no W gives each of them a value of its own; edit one of them only, or one after the other."
        )
