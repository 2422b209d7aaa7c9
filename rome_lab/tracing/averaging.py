"""Means over facts: token buckets, average effects and their 95% confidence intervals (Figures 1, 2 and 7).

    BUCKETS, buckets                                 where in the prompt a token stands
    Traces                                           an immutable sequence of traces; trace_facts returns one
    Traces.fact_means, fact_table                    the average within each fact: a row a bucket, or tidy
    Traces.average, gap                              the average over facts, and the gap between two kinds, with intervals
    Traces.average_heads                             the average over facts by layer and head
    Traces.spread                                    how much of an average's variance lies between facts, and within them
    Traces.summary                                   the numbers of appendices B.1 and B.2 beside the paper's

The fact, not the token, is the unit of sampling; facts of one relation are alike, so that intervals may be clustered by it.
Sizes: F facts, B buckets, L layers, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from rome_lab.base import MeanCI, mean_ci
from rome_lab.tracing.trace import DIRECTIONS, HEAD, KINDS, Trace

logger = logging.getLogger(__name__)

BUCKETS: dict[str, str] = {
    "subject_first": "first subject token",
    "subject_middle": "middle subject tokens",
    "subject_last": "last subject token",
    "first_subsequent": "first subsequent token",
    "further": "further tokens",
    "last": "last token",
}
"""Bucket -> name on figures, in the order of the prompt."""
_QUANTITIES = ("indirect_effect", "p_restored", "effect", "normalised_effect")
_PAPER_PEAKS = {  # kind -> bucket and layer of the highest mean p_restored, that mean, and the mean of the facts' best
    "state": ("subject_last", 15, 0.150, 0.195),
    "mlp": ("subject_last", 17, 0.150, 0.236),
    "attn": ("last", 32, 0.165, 0.194),
}


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


@dataclass(frozen=True)
class Spread:
    """Where the variance of an average effect comes from.

    Attributes:
        between: variance of the facts' true effects; estimated, so that it may come out below zero.
        within: variance of one sample's effect around its fact's.
        samples, facts: S and F of the traces.
    """

    between: float
    within: float
    samples: int
    facts: int

    def error(self, samples: int, facts: int | None = None) -> float:
        """Standard error of the mean with so many samples a fact, and so many facts."""
        return float(np.sqrt(max(self.between, 0.0) + self.within / samples) / np.sqrt(facts or self.facts))

    def best_samples(self, fact_cost: float, sample_cost: float) -> int:
        """The S of the least error for a given cost of all: sqrt(within / between * fact_cost / sample_cost), at least 1.

        Where nothing is seen to lie between facts there is none, and it is that of the traces.

        Args: fact_cost, sample_cost: of a fact whatever its samples, such as its clean run, and of each sample, in one unit.
        """
        if self.between <= 0:
            return self.samples
        return max(1, round(float(np.sqrt(self.within / self.between * fact_cost / sample_cost))))


class Traces(tuple[Trace, ...]):
    """An immutable sequence of traces of one model, of any number of facts and kinds."""

    def __getitem__(self, index: int | slice) -> Trace | Traces:
        part = super().__getitem__(index)
        return Traces(part) if isinstance(index, slice) else part

    def __repr__(self) -> str:
        return f"Traces({len(self)} traces of {self.n_facts} facts: {', '.join(self.kinds) or 'none'})"

    def _repr_html_(self) -> str:
        rows = []
        for kind, direction in product(self.kinds, DIRECTIONS):
            if traces := Traces(x for x in self.of(kind).by("probability") if x.direction == direction):
                largest = np.mean([trace.effect[trace.peak] for trace in traces])
                rows.append(
                    {
                        "kind": kind if direction == "denoise" else f"{kind}, direction {direction}",
                        "facts": traces.n_facts,
                        "mean p_clean": np.mean([trace.p_clean for trace in traces]),
                        "mean p_corrupted": np.mean([trace.p_corrupted for trace in traces]),
                        "mean of the facts' largest effect": largest,
                    }
                )
        return pd.DataFrame(rows).to_html(index=False, float_format="{:.3f}".format)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Labels of the traces, each once, in the order of `KINDS`, heads last."""
        labels = {trace.label for trace in self}
        return tuple(label for label in (*KINDS, HEAD) if label in labels)

    @property
    def n_facts(self) -> int:
        """Number of distinct facts."""
        return len({_fact_of(trace) for trace in self})

    def of(self, kind: str) -> Traces:
        """The traces of one kind, a label of `KINDS` or "head"."""
        if kind not in (*KINDS, HEAD):
            raise ValueError(f"Traces.of: unknown kind {kind!r}; choose one of {', '.join((*KINDS, HEAD))}")
        return Traces(trace for trace in self if trace.label == kind)

    def by(self, metric: str) -> Traces:
        """The same traces, their effects in another metric, see `Trace.by`."""
        return Traces(trace.by(metric) for trace in self)

    def fact_means(self, quantity: str = "indirect_effect") -> pd.DataFrame:
        """The average of a quantity over the tokens of each bucket, within each fact.

        Args:    quantity: "indirect_effect" (restored minus corrupted, paired within the fact) or "p_restored", both in
                 probability; "effect", in each trace's metric; or "normalised_effect".
        Returns: a row for each kind but heads, fact and bucket, a column a layer. Facts are counted in the order of their
                 first trace, the same for all kinds. NaN where a fact has no trace of the kind, no token in the bucket, one
                 in it that was not restored, or no normalised effect, see `Trace.has_normalised`.
        Raises:  ValueError: no traces but of heads, different numbers of layers, metrics, directions or corruptions, two
                 traces of one fact and kind, values not finite.
        """
        if quantity not in _QUANTITIES:
            raise ValueError(f"averaging: unknown quantity {quantity!r}; choose one of {', '.join(_QUANTITIES)}")
        traces = [trace for trace in self if trace.label != HEAD]
        layers = range(_checked_layers(traces))
        facts = {fact: i for i, fact in enumerate(dict.fromkeys(map(_fact_of, traces)))}
        kinds = [kind for kind in self.kinds if kind != HEAD]
        every = pd.MultiIndex.from_product([kinds, facts.values(), BUCKETS], names=["kind", "fact", "bucket"])
        means = {
            (trace.label, facts[_fact_of(trace)], bucket): mean
            for trace in traces
            if quantity != "normalised_effect" or trace.has_normalised
            for bucket, mean in _bucket_means(trace, getattr(trace, quantity)).items()
        }
        return pd.DataFrame([means.get(place, np.full(len(layers), np.nan)) for place in every], every, layers)

    def fact_table(self, quantity: str = "indirect_effect") -> pd.DataFrame:
        """`fact_means` as a tidy table: kind, fact, bucket, layer, and a column named after the quantity.

        A fact has no rows for the buckets it lacks.
        """
        table = self.fact_means(quantity).rename_axis(columns="layer").dropna().stack().rename(quantity).reset_index()
        categories = {"kind": pd.CategoricalDtype(list(KINDS)), "bucket": pd.CategoricalDtype(list(BUCKETS))}
        return table.astype(categories)

    def relations(self) -> list[str | None]:
        """The relation of each fact, in the order in which `fact_means` counts them: what intervals are clustered by."""
        return list({_fact_of(trace): trace.relation for trace in self if trace.label != HEAD}.values())

    def average(self, quantity: str = "indirect_effect", clustered: bool = False) -> pd.DataFrame:
        """Average over facts by kind, bucket and layer, with 95% t-intervals over facts (Figures 1, 2 and 7).

        For "indirect_effect" this is the AIE, E[P*,clean h[o] - P*[o]]. Unit: probability.

        Args:    quantity: see `fact_means`. clustered: by relation, see `mean_ci`.
        Returns: DataFrame: kind, bucket, layer, mean, ci_low, ci_high, n_facts; a bucket that no fact has is left out.
                 `.attrs` has the quantity, metric and direction, whether it is clustered, and how many facts were left out
                 for want of a normalised effect.
        Raises:  see `fact_means`.
        """
        table = _over_facts(self.fact_means(quantity), self.relations() if clustered else None)
        lacking = {_fact_of(trace) for trace in self if trace.label != HEAD and not trace.has_normalised}
        left_out = len(lacking) if quantity == "normalised_effect" else 0
        if left_out:
            logger.warning(
                "average: %d of %d facts have no normalised effect, since clean and corrupted run hardly differ",
                left_out,
                self.n_facts,
            )
        table.attrs = self._attrs(quantity, clustered) | {"left_out": left_out}
        return table

    def _attrs(self, quantity: str, clustered: bool = False) -> dict[str, object]:
        """What an average of these traces, which are of one metric and direction, says of itself."""
        return {
            "quantity": quantity,
            "metric": self[0].metric if quantity in ("effect", "normalised_effect") else "probability",
            "direction": self[0].direction,
            "clustered": clustered,
        }

    def average_heads(self, clustered: bool = False) -> pd.DataFrame:
        """Average effect of each head over facts, in the traces' metric, with 95% intervals.

        Returns: DataFrame: layer, head, mean, ci_low, ci_high, n_facts; `.attrs` as of `average`.
        Raises:  ValueError: there are no traces of heads, or of different shapes, metrics or directions, or two of one fact.
        """
        traces = self.of(HEAD)
        _check_alike(traces)
        if len({trace.p_restored.shape for trace in traces}) != 1:
            raise ValueError("average_heads: these are not traces of heads of one model; trace with kind='head'.")
        mean = mean_ci(
            np.stack([trace.effect for trace in traces]), [t.relation for t in traces] if clustered else None
        )
        layer, head = np.indices(mean.mean.shape).reshape(2, -1)
        table = pd.DataFrame({"layer": layer, "head": head} | {k: v.ravel() for k, v in mean._asdict().items()})
        table.attrs = traces._attrs("effect", clustered)
        del table.attrs["quantity"]  # there is no other
        return table

    def spread(self, kind: str, bucket: str, layer: int) -> Spread:
        """The variance of an average effect, taken apart into what lies between facts and within them.

            Var(mean over F facts) = (between + within / S) / F

        Args:    kind, bucket, layer: of which average. The traces have more than one sample; the effect is in their metric.
        Returns: Spread.
        Raises:  ValueError: fewer than two facts have it, or their traces have one sample only; there is no such layer;
                 traces of heads, or that cannot be averaged.
        """
        traces = self.of(kind)
        if kind == HEAD or not 0 <= layer < _checked_layers(traces):
            raise ValueError(f"spread: no layer {layer} of kind {kind!r}; layers count from 0; heads have no buckets.")
        values, within = [], []
        for trace in traces:
            places = np.flatnonzero(np.array(buckets(len(trace.tokens), trace.subject_range)) == bucket)
            if len(places):
                values.append(trace.effect[places, layer].mean())
                # The samples are shared by a bucket's tokens, whose errors may go together: at most the mean of them.
                within.append(trace.read().variance[places, layer].mean())
        samples = {trace.samples for trace in traces}
        if len(values) < 2 or len(samples) != 1 or np.isnan(within).any():
            raise ValueError(
                "spread: it takes two facts that have the bucket, traced with one number of samples, of two or more."
            )
        (count,) = samples
        within_facts = float(np.mean(within))
        between = float(np.var(values, ddof=1)) - within_facts / count
        return Spread(between, within_facts, count, len(values))

    def gap(self, kind: str, minus: str) -> pd.DataFrame:
        """Average indirect effect of one kind minus that of another, paired within the fact (Figure 3).

        Only facts that have both are counted. Returns a table like `average`, with the kind "<kind> minus <minus>".

        Raises: ValueError: there are no traces of one of the kinds; see also `fact_means`.
        """
        means = self.fact_means()
        for label in (kind, minus):
            if label not in self.kinds:
                raise ValueError(f"gap: no traces of kind {label!r} among {', '.join(self.kinds)}; trace that kind too")
        pairs = means.loc[kind] - means.loc[minus]
        table = _over_facts(pd.concat({f"{kind} minus {minus}": pairs}, names=["kind"]))
        table.attrs = self._attrs("indirect_effect")
        return table

    def summary(self) -> pd.DataFrame:
        """The probabilities quoted in appendices B.1 and B.2, beside the paper's for GPT-2 XL.

        `best`: each fact's largest p_restored, averaged: at the last subject token for "state" (at the last token it is
        p_clean, trivially), at any token for "mlp" and "attn". `peak`: the largest mean p_restored over the layers of
        the bucket where the paper found it. The layer is chosen on the same facts, so the peak's interval is optimistic.

        Returns: DataFrame: measure, bucket, layer, mean, ci_low, ci_high, n_facts, paper, paper_layer.
        Raises:  ValueError: traces of direction "noise", which restores what is corrupted; see also `fact_means`.
        """
        means = self.fact_means("p_restored")
        if self[0].direction == "noise":
            raise ValueError(
                "summary: the paper's numbers are of clean values put into corrupted runs; trace with direction='denoise'."
            )
        of_facts = {_fact_of(trace): trace for trace in self}.values()
        rows = [
            {"measure": "p_clean", "paper": 0.270} | _interval([trace.p_clean for trace in of_facts]),
            {"measure": "p_corrupted", "paper": 0.0847} | _interval([trace.p_corrupted for trace in of_facts]),
        ]
        for kind, (bucket, paper_layer, paper_peak, paper_best) in _PAPER_PEAKS.items():
            if kind not in self.kinds:
                continue
            there = means.loc[kind].xs(bucket, level="bucket").to_numpy()  # (F, L)
            anywhere = [trace.p_restored.max() for trace in self.of(kind)]
            best_bucket, best = (bucket, there.max(axis=1)) if kind == "state" else ("any", anywhere)
            rows.append({"measure": f"{kind} best", "bucket": best_bucket, "paper": paper_best} | _interval(best))
            layer = int(np.nan_to_num(mean_ci(there).mean).argmax())
            peak = {"bucket": bucket, "layer": layer} | _interval(there[:, layer])
            rows.append({"measure": f"{kind} peak", "paper": paper_peak, "paper_layer": paper_layer} | peak)
        columns = ["measure", "bucket", "layer", *MeanCI._fields, "paper", "paper_layer"]
        return pd.DataFrame(rows, columns=columns).astype({"layer": "Int64", "paper_layer": "Int64"})


def _interval(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    return {name: value.item() for name, value in mean_ci(np.asarray(values))._asdict().items()}


def _over_facts(means: pd.DataFrame, relations: Sequence[str | None] | None = None) -> pd.DataFrame:
    """A row for each kind, fact and bucket to rows of `Traces.average`."""
    parts = [
        pd.DataFrame(
            {"kind": kind, "bucket": bucket, "layer": means.columns} | mean_ci(rows.to_numpy(), relations)._asdict()
        )
        for (kind, bucket), rows in means.groupby(level=["kind", "bucket"], sort=False)
    ]
    table = pd.concat(parts)
    return table[table["n_facts"] > 0].reset_index(drop=True)


def _fact_of(trace: Trace) -> tuple[str, str, str]:
    return trace.prompt, trace.subject, trace.answer


def _bucket_means(trace: Trace, values: np.ndarray) -> dict[str, np.ndarray]:
    """(T, L) to the mean (L,) of each bucket, but for those that the prompt lacks or that were not restored whole."""
    members = np.array(buckets(len(trace.tokens), trace.subject_range))
    rows = {bucket: values[members == bucket] for bucket in BUCKETS}
    return {bucket: rows.mean(axis=0) for bucket, rows in rows.items() if len(rows) and not np.isnan(rows).any()}


def _check_alike(traces: Sequence[Trace]) -> None:
    """Raise a ValueError where these measure different things, or one thing twice."""
    ways = {(x.metric, x.direction, *(["another subject"] if x.swapped else [])) for x in traces}
    if len(ways) > 1:
        listed = ", ".join(" and ".join(way) for way in sorted(ways))
        raise ValueError(
            f"averaging: traces have different metrics, directions or corruptions: {listed}; average those of one."
        )
    windows = {x.window for x in traces if x.kind in ("mlp", "attn")}
    if len(windows) > 1:
        raise ValueError(f"averaging: traces restore runs of {sorted(windows)} layers; average those of one length.")
    if len({x.token == len(x.tokens) - 1 for x in traces if x.token is not None}) > 1:
        raise ValueError("averaging: heads were restored at the last token in some traces and at another in others.")
    seen: set[tuple[object, ...]] = set()
    for trace in traces:
        key = (trace.label, _fact_of(trace))
        if key in seen:
            raise ValueError(f"averaging: two {trace.label!r} traces of {trace.prompt!r}; drop one of them")
        seen.add(key)


def _checked_layers(traces: Sequence[Trace]) -> int:
    """The number of layers of all traces, having refused what cannot be averaged."""
    if not traces:
        raise ValueError("averaging: there are no traces; trace at least one fact first")
    _check_alike(traces)
    shapes: dict[int, str] = {}
    for trace in traces:
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
        counts = ", ".join(f"{n} ({prompt!r})" for n, prompt in sorted(shapes.items()))
        raise ValueError(f"averaging: traces have different numbers of layers: {counts}; average one model at a time")
    return shapes.popitem()[0]
