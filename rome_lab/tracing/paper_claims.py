"""The paper's claims about where facts are kept, put to the test.

    claims(traces)             over many facts: a row a claim, with its interval and its verdict
    claims_at_fact(traces)     at one fact, which has no interval

Each claim is that one average effect is larger than another in half of the model's layers. The halves are fixed beforehand
and the effects are paired within the fact, so the verdict does not come from layers picked because they looked good. The
last layer is in neither half of the late site: restoring its state at the last token gives the whole answer in any model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy

from rome_lab.base import mean_ci
from rome_lab.tracing.averaging import Traces
from rome_lab.tracing.trace import Trace

Site = tuple[str, str]
"""Kind and bucket, or, for the bucket, "subject_other": the mean of what the subject's first token shows and of what its
middle tokens show on average."""
MIN_FACTS = 3
SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Claim:
    """That the indirect effect at one site exceeds that at another in half of the layers.

    Attributes:
        sentence: the claim in words.
        larger, smaller: the two sites, as (kind, bucket).
        half: "lower" or "upper", the layers that the claim speaks of.
        against: "same" compares each layer with the same layer of `smaller`; "lower" compares it with the mean of the
            lower half of `smaller`.
        trivial: layers at the end that are left out, since what the claim says of them holds by construction.
    """

    sentence: str
    larger: Site
    smaller: Site
    half: str
    against: str = "same"
    trivial: int = 0

    def layers(self, n_layers: int) -> np.ndarray:
        """The layers that the claim speaks of."""
        layers = np.arange(n_layers)[_half(self.half, n_layers)]
        return layers[layers < n_layers - self.trivial]


CLAIMS = (
    Claim(
        "Early site: the state at the last subject token matters more than at the last token, in the lower layers",
        larger=("state", "subject_last"),
        smaller=("state", "last"),
        half="lower",
    ),
    Claim(
        "Of the subject's tokens the last matters more than the others (their states, in the lower layers)",
        larger=("state", "subject_last"),
        smaller=("state", "subject_other"),
        half="lower",
    ),
    Claim(
        "Late site: the state at the last token matters more in the upper layers than in the lower",
        larger=("state", "last"),
        smaller=("state", "last"),
        half="upper",
        against="lower",
        trivial=1,
    ),
    Claim(
        "MLP matters more than attention at the early site",
        larger=("mlp", "subject_last"),
        smaller=("attn", "subject_last"),
        half="lower",
    ),
    Claim(
        "Attention matters more than MLP at the late site",
        larger=("attn", "last"),
        smaller=("mlp", "last"),
        half="upper",
    ),
    Claim(
        "Severing MLP hurts restorations at the early site more than severing attention",
        larger=("severed-attn", "subject_last"),
        smaller=("severed-mlp", "subject_last"),
        half="lower",
    ),
)


def claims(
    traces: Iterable[Trace], margin: float = 0.01, quantity: str = "indirect_effect", clustered: bool = False
) -> pd.DataFrame:
    """Whether each of the paper's claims holds of these traces, one row a claim.

    The effect is the contrast of `Claim`, averaged over its half of the layers and then over facts; a middle layer of
    an odd number is in neither half. Facts that lack one of the two sites are left out, and counted. The verdict:

        "holds"          ci_low > margin
        "does not hold"  ci_high < margin
        "can't tell"     otherwise, or with fewer than 3 facts, or without the traces that the claim needs

    `margin` is the least effect worth speaking of, by default one percentage point of probability: with enough facts
    any effect differs from zero, and random weights do not produce an exact zero either.

    `p_value` and `layers` say more, and decide nothing: in each layer of the half a paired one-sided t-test that the
    contrast is above zero, Holm-corrected over those layers; `p_value` is the smallest, `layers` those below 0.05.
    Args:
        quantity: "indirect_effect", in probability, or "normalised_effect", as a share; in the latter claims of any metric
            and direction can be tested, and compared.
        clustered: intervals by relation, right for facts of new relations; p-values stay over facts.

    Returns: DataFrame: claim, effect, ci_low, ci_high (95% t-interval over facts), n_facts, left_out, p_value,
             tested_layers, layers, peak_layer (of the largest mean contrast), verdict, note.
    Raises:  ValueError: the margin is not a probability; indirect effects of direction "noise", which are below zero where
             a site matters; see also `Traces.fact_means`.
    """
    if not 0 <= margin < 1:
        raise ValueError(f"claims: margin {margin} is not a probability; give one from 0 up to, not including, 1")
    traces = Traces(traces)
    if quantity not in ("indirect_effect", "normalised_effect") or (
        quantity == "indirect_effect" and any(trace.direction == "noise" for trace in traces)
    ):
        raise ValueError(
            f"claims: the quantity is {quantity!r}; expected 'indirect_effect', of direction 'denoise', or "
            "'normalised_effect'."
        )
    means = traces.fact_means(quantity)
    relations = traces.relations() if clustered else None
    wanting = "a trace, of the token or of a share" if quantity == "normalised_effect" else "a trace or of the token"
    rows = [_row(claim, means, margin, wanting, relations) for claim in CLAIMS]
    return pd.DataFrame(rows).astype({"peak_layer": "Int64"})


def claims_at_fact(traces: Iterable[Trace], margin: float = 0.01) -> pd.DataFrame:
    """The contrast of each claim at a single fact; of one fact there is no interval, and a claim is about many.

    Args:    traces: of one fact, a kind each; the severed kinds serve the last claim. margin: as in `claims`.
    Returns: DataFrame: claim; larger, smaller, mean indirect effects over the claim's layers at its two sites; effect, their
             difference; tested_layers; verdict: "agrees" (effect > margin), "disagrees" (effect < -margin), "neither", or
             "can't tell", for want of a trace, of the token or of layers.
    Raises:  ValueError: the traces are of several facts, or of direction "noise"; see also `Traces.fact_means`.
    """
    traces = Traces(traces)
    if any(trace.direction == "noise" for trace in traces):
        raise ValueError("claims_at_fact: it compares effects of direction 'denoise'; those of 'noise' are below zero.")
    if traces.n_facts > 1:
        raise ValueError(f"claims_at_fact: these are traces of {traces.n_facts} facts; claims(traces) is about many.")
    means = traces.fact_means()
    return pd.DataFrame([_row_of_fact(claim, means, margin) for claim in CLAIMS])


def _row_of_fact(claim: Claim, means: pd.DataFrame, margin: float) -> dict[str, object]:
    layers = claim.layers(len(means.columns))
    larger = effect = np.nan
    if {claim.larger[0], claim.smaller[0]} <= set(means.index.unique("kind")) and len(layers):
        larger = _effects(means, *claim.larger)[layers].iloc[0].mean(skipna=False)
        effect = _contrast(claim, means)[layers].iloc[0].mean(skipna=False)
    verdict = "agrees" if effect > margin else "disagrees" if effect < -margin else "neither"
    return {
        "claim": claim.sentence,
        "larger": float(larger),
        "smaller": float(larger - effect),
        "effect": float(effect),
        "tested_layers": _ranges(layers),
        "verdict": "can't tell" if np.isnan(effect) else verdict,
    }


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of (n,) p-values, for the probability of even one false rejection."""
    order = np.argsort(p_values)
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    corrected = np.empty_like(stepped)
    corrected[order] = np.minimum(stepped, 1.0)
    return corrected


def _row(
    claim: Claim, means: pd.DataFrame, margin: float, wanting: str, relations: Sequence[str | None] | None = None
) -> dict[str, object]:
    kinds, facts, _ = (means.index.unique(level) for level in means.index.names)
    n_layers = len(means.columns)
    layers = claim.layers(n_layers)
    missing = [kind for kind in dict.fromkeys((claim.larger[0], claim.smaller[0])) if kind not in kinds]
    contrast = np.empty((0, len(layers)))
    clusters = None
    if not missing and len(layers):
        both = _contrast(claim, means)[layers].dropna()  # (facts that have both sites, layers)
        contrast = both.to_numpy()
        clusters = None if relations is None else [relations[fact] for fact in both.index]
    n, n_all = len(contrast), len(facts)
    notes = [f"no traces of kind {kind}" for kind in missing]
    if not len(layers):
        notes.append(f"a model of {n_layers} layers has none that the claim speaks of")
    elif not missing:
        notes += [f"{n_all - n} of {n_all} facts left out, for want of {wanting}"] if n < n_all else []
        notes += [f"needs at least {MIN_FACTS} facts"] if n < MIN_FACTS else []
    effect = low = high = p_value = np.nan
    significant, peak, verdict = layers[:0], None, "can't tell"
    if n >= MIN_FACTS:
        effect, low, high, _ = (float(value) for value in mean_ci(contrast.mean(axis=1), clusters))
        p_values = holm(_p_above_zero(contrast))
        p_value, significant = p_values.min(), layers[p_values < SIGNIFICANCE]
        peak = int(layers[contrast.mean(axis=0).argmax()])
        verdict = "holds" if low > margin else "does not hold" if high < margin else "can't tell"
    return {
        "claim": claim.sentence,
        "effect": effect,
        "ci_low": low,
        "ci_high": high,
        "n_facts": n,
        "left_out": n_all - n,
        "p_value": p_value,
        "tested_layers": _ranges(layers),
        "layers": _ranges(significant),
        "peak_layer": peak,
        "verdict": verdict,
        "note": "; ".join(notes),
    }


def _half(name: str, n_layers: int) -> slice:
    return slice(0, n_layers // 2) if name == "lower" else slice(n_layers - n_layers // 2, n_layers)


def _contrast(claim: Claim, means: pd.DataFrame) -> pd.DataFrame:
    """(F, L): the indirect effect at the one site minus that at the other, paired within the fact."""
    larger, smaller = _effects(means, *claim.larger), _effects(means, *claim.smaller)
    if claim.against == "lower":
        half = smaller.iloc[:, _half("lower", smaller.shape[1])]
        return larger.sub(half.mean(axis=1, skipna=False), axis=0)
    return larger - smaller


def _effects(means: pd.DataFrame, kind: str, bucket: str) -> pd.DataFrame:
    """(F, L): the indirect effects at a site; NaN where a fact has no such token."""
    if bucket != "subject_other":
        return means.loc[kind].xs(bucket, level="bucket")
    others = [means.loc[kind].xs(name, level="bucket") for name in ("subject_first", "subject_middle")]
    return pd.concat(others).groupby(level="fact").mean()


def _p_above_zero(contrast: np.ndarray) -> np.ndarray:
    """(F, layers) to (layers,): p-values of one-sided t-tests that the mean over facts is above zero."""
    n = len(contrast)
    mean, error = contrast.mean(axis=0), contrast.std(axis=0, ddof=1) / np.sqrt(n)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(mean == 0, 0.0, mean / error)  # zero noise gives 0 / 0: no effect, no evidence
    return scipy.stats.t.sf(t, n - 1)


def _ranges(layers: np.ndarray) -> str:
    """Layers in ascending order as text: [2, 3, 4, 7] is "2-4, 7"."""
    runs = np.split(layers, np.flatnonzero(np.diff(layers) > 1) + 1) if len(layers) else []
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "none"
