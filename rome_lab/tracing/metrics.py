"""The metrics of a run: what is read off the logits at the last token, all of them at once.

TRACE_METRICS                   metric -> the least difference of clean and corrupted run by which an effect may be divided
Readings                        one metric in the clean, the corrupted and all restored runs
metric_tensors, read_metrics    the metrics of logits, as tensors and as numbers; `probability` alone
check_metric                    whether a metric is one, and defined here
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

TRACE_METRICS: dict[str, float] = {"probability": 0.02, "log_probability": 0.2, "logit_difference": 0.2}
"""Metric -> where clean and corrupted run differ by less, effects divided by that difference say nothing."""


@dataclass(frozen=True, eq=False)
class Readings:
    """One metric in the runs of a trace; means over the samples.

    Attributes:
        clean, corrupted: in those runs.
        restored: (T, L), or (L, heads) where heads are restored.
        variance: of the effect over the samples, of the same shape, unbiased; NaN where there is one sample only.
    """

    clean: float
    corrupted: float
    restored: np.ndarray
    variance: np.ndarray


def metric_tensors(logits: torch.Tensor, answer_id: int, foil_id: int | None) -> dict[str, torch.Tensor]:
    """Metric -> (...) of logits (..., V): P[o], log P[o], and logit[o] - logit[foil] where there is a foil."""
    answer = logits[..., answer_id]
    log_p = answer - logits.logsumexp(-1)
    metrics = {"probability": log_p.exp(), "log_probability": log_p}
    return metrics if foil_id is None else metrics | {"logit_difference": answer - logits[..., foil_id]}


def read_metrics(logits: torch.Tensor, answer_id: int, foil_id: int | None) -> dict[str, np.ndarray]:
    """The same as numbers, float64."""
    metrics = metric_tensors(logits.detach(), answer_id, foil_id)
    return {name: x.cpu().double().numpy() for name, x in metrics.items()}


def probability(logits: torch.Tensor, token_id: int) -> np.ndarray:
    """(...) float64: softmax over the last axis of `logits`, at one token."""
    return read_metrics(logits, token_id, None)["probability"]


def check_metric(doing: str, metric: str, foil: object) -> None:
    """Raise a ValueError where there is no such metric, or it needs a foil and has none."""
    if metric not in TRACE_METRICS:
        raise ValueError(f"{doing}: metric is {metric!r}; expected one of {', '.join(map(repr, TRACE_METRICS))}.")
    if metric == "logit_difference" and foil is None:
        raise ValueError(
            f"{doing}: a logit difference is against a foil, another object that could stand there; give foil=..., or "
            "corruption=SubjectSwap(subject, object), whose object it then is."
        )
