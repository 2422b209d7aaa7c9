"""Means over facts: token buckets, average effects and their 95% confidence intervals (Figures 1, 2 and 7).

    BUCKETS, buckets            where in the prompt a token stands
    Traces                      an immutable sequence of traces; trace_facts returns one
    fact_means, fact_table      the average within each fact: as arrays, as a tidy table
    average, gap                the average over facts, and the paired gap between two kinds, with intervals
    mean_ci                     mean and 95% t-interval over the first axis
    summary                     the numbers of appendices B.1 and B.2 beside the paper's

The fact, not the token, is the unit of sampling. Sizes: F facts, B buckets, L layers, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
import pandas as pd

from rome_lab.base import MeanCI, mean_ci
from rome_lab.tracing.trace import KINDS, Trace

BUCKETS: dict[str, str] = {
    "subject_first": "first subject token",
    "subject_middle": "middle subject tokens",
    "subject_last": "last subject token",
    "first_subsequent": "first subsequent token",
    "further": "further tokens",
    "last": "last token",
}
"""Bucket -> name on figures, in the order of the prompt."""
_BUCKET_INDEX = {bucket: i for i, bucket in enumerate(BUCKETS)}
_QUANTITIES = ("indirect_effect", "p_restored")


def buckets(n_tokens: int, subject_range: tuple[int, int]) -> list[str | None]:
    """Bucket of each token of a prompt; None before the subject.

    A token is in one bucket only: a one-token subject is "subject_last", and the token that predicts is "last".
    That also holds when the prompt ends with its subject; such a fact has no "subject_last". Restoring the state of
    the predicting token gives p_clean in the last layer whatever the model knows, and as "subject_last" it would
    lend the early site an effect in late layers that says nothing about the subject.

    >>> buckets(6, (1, 3))
    [None, 'subject_first', 'subject_last', 'first_subsequent', 'further', 'last']

    Raises: ValueError: `subject_range` is not a non-empty range inside the prompt.
    """
    begin, end = subject_range
    if not 0 <= begin < end <= n_tokens:
        raise ValueError(
            f"buckets: subject_range {subject_range} is not a non-empty range within the {n_tokens} tokens of the "
            "prompt; give (begin, end) with 0 <= begin < end <= n_tokens"
        )
    names: list[str | None] = [None] * n_tokens
    names[begin:end] = ["subject_first"] + ["subject_middle"] * (end - begin - 1)
    names[end - 1] = "subject_last"
    names[end:] = (["first_subsequent"] + ["further"] * (n_tokens - end))[: n_tokens - end]
    names[-1] = "last"
    return names


class Traces(Sequence[Trace]):
    """An immutable sequence of traces of one model, of any number of facts and kinds."""

    def __init__(self, traces: Iterable[Trace] = ()) -> None:
        self._traces = tuple(traces)

    def __len__(self) -> int:
        return len(self._traces)

    def __iter__(self) -> Iterator[Trace]:
        return iter(self._traces)

    @overload
    def __getitem__(self, index: int) -> Trace: ...
    @overload
    def __getitem__(self, index: slice) -> Traces: ...
    def __getitem__(self, index: int | slice) -> Trace | Traces:
        return Traces(self._traces[index]) if isinstance(index, slice) else self._traces[index]

    def __repr__(self) -> str:
        return f"Traces({len(self)} traces of {self.n_facts} facts: {', '.join(self.kinds) or 'none'})"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Labels of the traces, each once, in the order of `KINDS`."""
        labels = {trace.label for trace in self}
        return tuple(label for label in KINDS if label in labels)

    @property
    def n_facts(self) -> int:
        """Number of distinct facts."""
        return len({_fact_of(trace) for trace in self})

    def of(self, kind: str) -> Traces:
        """The traces of one kind, a label of `KINDS`."""
        if kind not in KINDS:
            raise ValueError(f"Traces.of: unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
        return Traces(trace for trace in self if trace.label == kind)

    def average(self, quantity: str = "indirect_effect") -> pd.DataFrame:
        """See `average`."""
        return average(self, quantity)


def fact_means(traces: Iterable[Trace], quantity: str = "indirect_effect") -> dict[str, np.ndarray]:
    """The average of a quantity over the tokens of each bucket, within each fact.

    Args:    quantity: "indirect_effect" (restored minus corrupted, paired within the fact) or "p_restored".
    Returns: kind -> (F, B, L). Facts stand in the order of their first trace, the same for all kinds. NaN where a fact
             has no trace of the kind, no token in the bucket, or one in it that was not restored.
    Raises:  ValueError: no traces, different numbers of layers, two traces of one fact and kind, values not finite.
    """
    if quantity not in _QUANTITIES:
        raise ValueError(f"averaging: unknown quantity {quantity!r}; choose one of {', '.join(_QUANTITIES)}")
    traces = Traces(traces)
    facts = {fact: i for i, fact in enumerate(dict.fromkeys(map(_fact_of, traces)))}
    n_layers = _checked_layers(traces)
    means = {kind: np.full((len(facts), len(BUCKETS), n_layers), np.nan) for kind in traces.kinds}
    for trace in traces:
        means[trace.label][facts[_fact_of(trace)]] = _bucket_means(trace, getattr(trace, quantity))
    return means


def fact_table(traces: Iterable[Trace], quantity: str = "indirect_effect") -> pd.DataFrame:
    """`fact_means` as a tidy table: kind, fact, bucket, layer, and a column named after the quantity.

    `fact` counts the facts in the order of their first trace; a fact has no rows for the buckets it lacks.
    """
    parts = []
    for kind, means in fact_means(traces, quantity).items():  # (F, B, L)
        fact, bucket = np.nonzero(~np.isnan(means).any(axis=2))
        n_layers = means.shape[2]
        columns = {
            "kind": pd.Categorical([kind], list(KINDS)).repeat(len(fact) * n_layers),
            "fact": fact.repeat(n_layers),
            "bucket": pd.Categorical.from_codes(bucket, list(BUCKETS)).repeat(n_layers),
            "layer": np.tile(np.arange(n_layers), len(fact)),
            quantity: means[fact, bucket].ravel(),
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def average(traces: Iterable[Trace], quantity: str = "indirect_effect") -> pd.DataFrame:
    """Average over facts by kind, bucket and layer, with 95% t-intervals over facts (Figures 1, 2 and 7).

    For "indirect_effect" this is the AIE, E[P*,clean h[o] - P*[o]]. Unit: probability.

    Returns: DataFrame: kind, bucket, layer, mean, ci_low, ci_high, n_facts; a bucket that no fact has is left out.
             `.attrs["quantity"]` names the quantity.
    Raises:  see `fact_means`.
    """
    return _tidy(fact_means(traces, quantity), quantity)


def gap(traces: Iterable[Trace], kind: str, minus: str) -> pd.DataFrame:
    """Average indirect effect of one kind minus that of another, paired within the fact (Figure 3).

    Only facts that have both are counted. Returns a table like `average`, with the kind "<kind> minus <minus>".

    Raises: ValueError: there are no traces of one of the kinds.
    """
    means = fact_means(traces)
    for label in (kind, minus):
        if label not in means:
            raise ValueError(f"gap: no traces of kind {label!r} among {', '.join(means)}; trace that kind too")
    return _tidy({f"{kind} minus {minus}": means[kind] - means[minus]}, "indirect_effect")


_PAPER_PEAKS = {  # kind -> bucket and layer of the highest mean p_restored, that mean, and the mean of the facts' best
    "state": ("subject_last", 15, 0.150, 0.195),
    "mlp": ("subject_last", 17, 0.150, 0.236),
    "attn": ("last", 32, 0.165, 0.194),
}


def summary(traces: Iterable[Trace]) -> pd.DataFrame:
    """The probabilities quoted in appendices B.1 and B.2, beside the paper's for GPT-2 XL.

    `best`: each fact's largest p_restored, averaged: at the last subject token for "state" (at the last token it is
    p_clean, trivially), at any token for "mlp" and "attn". `peak`: the largest mean p_restored over the layers of
    the bucket where the paper found it. The layer is chosen on the same facts, so the peak's interval is optimistic.

    Returns: DataFrame: measure, bucket, layer, mean, ci_low, ci_high, n_facts, paper, paper_layer.
    """
    traces = Traces(traces)
    means = fact_means(traces, "p_restored")
    one_each = {_fact_of(trace): trace for trace in traces}.values()
    rows = [
        {"measure": "p_clean", "paper": 0.270} | _interval(np.array([trace.p_clean for trace in one_each])),
        {"measure": "p_corrupted", "paper": 0.0847} | _interval(np.array([trace.p_corrupted for trace in one_each])),
    ]
    for kind, (bucket, paper_layer, paper_peak, paper_best) in _PAPER_PEAKS.items():
        if kind not in means:
            continue
        there = means[kind][:, _BUCKET_INDEX[bucket]]  # (F, L)
        anywhere = np.array([trace.p_restored.max() for trace in traces.of(kind)])
        best_bucket, best = (bucket, there.max(axis=1)) if kind == "state" else ("any", anywhere)
        rows.append({"measure": f"{kind} best", "bucket": best_bucket, "paper": paper_best} | _interval(best))
        layer = int(np.nan_to_num(mean_ci(there).mean).argmax())
        peak = {"bucket": bucket, "layer": layer} | _interval(there[:, layer])
        rows.append({"measure": f"{kind} peak", "paper": paper_peak, "paper_layer": paper_layer} | peak)
    columns = ["measure", "bucket", "layer", *MeanCI._fields, "paper", "paper_layer"]
    return pd.DataFrame(rows, columns=columns).astype({"layer": "Int64", "paper_layer": "Int64"})


def _interval(values: np.ndarray) -> dict[str, float]:
    return {name: value.item() for name, value in mean_ci(values)._asdict().items()}


def _tidy(means: dict[str, np.ndarray], quantity: str) -> pd.DataFrame:
    """kind -> (F, B, L) to rows of `average`."""
    parts = []
    for kind, values in means.items():
        layers = np.arange(values.shape[2])
        keys = {"kind": kind, "bucket": np.repeat(list(BUCKETS), len(layers)), "layer": np.tile(layers, len(BUCKETS))}
        over_facts = {name: array.ravel() for name, array in mean_ci(values)._asdict().items()}  # (B, L) each
        parts.append(pd.DataFrame(keys | over_facts))
    table = pd.concat(parts)
    table = table[table["n_facts"] > 0].reset_index(drop=True)
    table.attrs["quantity"] = quantity
    return table


def _fact_of(trace: Trace) -> tuple[str, str, str]:
    return trace.prompt, trace.subject, trace.answer


def _bucket_means(trace: Trace, values: np.ndarray) -> np.ndarray:
    """(T, L) to (B, L); NaN for the buckets that the prompt lacks and those with a token that was not restored."""
    codes = np.array([_BUCKET_INDEX.get(bucket, -1) for bucket in buckets(len(trace.tokens), trace.subject_range)])
    member = codes == np.arange(len(BUCKETS))[:, None]  # (B, T)
    restored = ~np.isnan(values).any(axis=1)  # (T,)
    n_tokens = np.where(member[:, ~restored].any(axis=1), 0, member.sum(axis=1))[:, None]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(n_tokens > 0, member[:, restored] @ values[restored] / n_tokens, np.nan)


def _checked_layers(traces: Traces) -> int:
    """The number of layers of all traces, having refused what cannot be averaged."""
    if not traces:
        raise ValueError("averaging: there are no traces; trace at least one fact first")
    seen: set[tuple[object, ...]] = set()
    shapes: dict[int, str] = {}
    for trace in traces:
        key = (trace.label, _fact_of(trace))
        if key in seen:
            raise ValueError(f"averaging: two {trace.label!r} traces of {trace.prompt!r}; drop one of them")
        seen.add(key)
        shape = np.shape(trace.p_restored)
        if len(shape) != 2 or shape[0] != len(trace.tokens):
            raise ValueError(
                f"averaging: p_restored of {trace.prompt!r} has shape {shape}, not ({len(trace.tokens)} tokens, layers)"
            )
        restored = trace.p_restored[~np.isnan(trace.p_restored).all(axis=1)]  # rows of other tokens are NaN
        if not (np.isfinite(restored).all() and np.isfinite([trace.p_clean, trace.p_corrupted]).all()):
            raise ValueError(f"averaging: the {trace.label!r} trace of {trace.prompt!r} has NaN or inf; trace it again")
        shapes[shape[1]] = trace.prompt
    if len(shapes) > 1:
        found = ", ".join(f"{n} ({prompt!r})" for n, prompt in sorted(shapes.items()))
        raise ValueError(f"averaging: traces have different numbers of layers: {found}; average one model at a time")
    return shapes.popitem()[0]
