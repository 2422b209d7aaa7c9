"""What is read off the figures, beside the paper.

strongest(average, kind, among)          where the mean effect is highest: a Peak
strongest_places(average, numbers)       whether each kind has its peak where the paper found it
beside_paper(numbers, n_layers)          `Traces.summary` in shares, so that models of other depths and probabilities compare
samples_worth(traces)                    how much of each peak's error samples of noise make, and what fewer would do
trace_random_weights(lm, facts, ...)     the same tracing of a model that has learnt nothing
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from rome_lab.facts import Fact
from rome_lab.models import LanguageModel
from rome_lab.tracing.averaging import BUCKETS, Traces
from rome_lab.tracing.corruption import Corruption, GaussianNoise, SubjectSwap
from rome_lab.tracing.one_fact import trace_of_kind
from rome_lab.tracing.pairs import SwapPair
from rome_lab.tracing.runs import TraceSettings, run_clean_and_corrupted
from rome_lab.tracing.trace import KINDS

PAPER_LAYERS = 48  # of GPT-2 XL


@dataclass(frozen=True)
class Peak:
    """The highest mean effect of a kind.

    Attributes:
        bucket, layer: where it is.
        mean, ci_low, ci_high: the effect there, with its 95% interval over `n_facts` facts.
        layers_below: layers of that bucket whose whole interval lies below this one's.
    """

    bucket: str
    layer: int
    mean: float
    ci_low: float
    ci_high: float
    n_facts: int
    layers_below: int

    def __str__(self) -> str:
        interval = f"95% interval {self.ci_low:.3f} to {self.ci_high:.3f}"
        return f"{self.mean:.3f} ({interval}) at layer {self.layer}, n = {self.n_facts}"


def strongest(average: pd.DataFrame, kind: str, among: Collection[str] = tuple(BUCKETS)) -> Peak:
    """Where the mean effect of one kind is highest, among these buckets; `average` is what `Traces.average` returns.

    Raises: ValueError: effects of direction "noise", which are below zero where a site matters, other than as shares.
    """
    if average.attrs.get("direction") == "noise" and average.attrs["quantity"] != "normalised_effect":
        raise ValueError(
            "strongest: effects of direction 'noise' are below zero where a site matters, so that the highest is the least; "
            "take average('normalised_effect')."
        )
    rows = average[(average["kind"] == kind) & average["bucket"].isin(among)]
    top = rows.loc[rows["mean"].idxmax()]
    below = (rows.loc[rows["bucket"] == top["bucket"], "ci_high"] < top["ci_low"]).sum()
    return Peak(**top.drop("kind"), layers_below=int(below))


def strongest_places(average: pd.DataFrame, numbers: pd.DataFrame) -> pd.DataFrame:
    """A row a kind: where its effect is strongest, and where the paper found its peak.

    The state of the last token is left out: in the last layer it gives back the whole answer in any model.

    Args: numbers: what `Traces.summary` returns of the same traces.
    """
    rows = []
    for paper in numbers[numbers["measure"].str.endswith(" peak")].itertuples():
        kind = paper.measure.removesuffix(" peak")
        peak = strongest(average, kind, [bucket for bucket in BUCKETS if (kind, bucket) != ("state", "last")])
        ours, theirs = BUCKETS[peak.bucket], BUCKETS[paper.bucket]
        rows.append((kind, ours, peak.layer, theirs, paper.paper_layer, ours == theirs))
    columns = ["kind", "strongest at", "layer", "the paper's peak at", f"layer of {PAPER_LAYERS}", "the same place"]
    return pd.DataFrame(rows, columns=columns).set_index("kind")


def beside_paper(numbers: pd.DataFrame, n_layers: int) -> pd.DataFrame:
    """What `Traces.summary` returns, with columns that compare across models, ours and the paper's (`paper_...`).

    `recovered` is the share of what corruption took away that restoring brought back, `depth` the layer counted from 0
    (first) to 1 (last), `paper_lies` where the paper's probability is beside our interval.
    """
    numbers = numbers.copy()
    by = numbers.set_index("measure")
    loss = by.loc["p_clean", ["mean", "paper"]] - by.loc["p_corrupted", ["mean", "paper"]]
    for ours, prefix, layers in (("mean", "", n_layers), ("paper", "paper_", PAPER_LAYERS)):
        recovered = (numbers[ours] - by.loc["p_corrupted", ours]) / loss[ours]
        numbers[f"{prefix}recovered"] = recovered.where(~numbers["measure"].str.startswith("p_"))
        numbers[f"{prefix}depth"] = numbers[f"{prefix}layer"] / (layers - 1)
    sides = [numbers["paper"] < numbers["ci_low"], numbers["paper"] > numbers["ci_high"], numbers["ci_low"].isna()]
    places = ["below our interval", "above our interval", "beside no interval, for n = 1"]
    return numbers.assign(paper_lies=np.select(sides, places, "in our interval"))


def samples_worth(traces: Traces, numbers: Sequence[int] = (1, 2, 3, 5, 10)) -> pd.DataFrame:
    """How far the mean effects at the two sites would be off with other numbers of samples; see `Traces.spread`.

    At each site, where its mean effect is highest: of states and MLP outputs at the last subject token, of attention at the
    last token.

    Returns: DataFrame: kind, bucket, layer, between, within, samples; error, the standard error of the mean with so many
             samples of as many facts; error_same_cost, with as many samples in all, of more or fewer facts. A row a site and
             number.
    Raises:  ValueError: the traces have one sample only; see `Traces.spread`.
    """
    average, rows = traces.average("effect"), []  # which `Traces.spread` takes apart
    for kind, bucket in (("state", "subject_last"), ("mlp", "subject_last"), ("attn", "last")):
        layer = strongest(average, kind, [bucket]).layer
        spread = traces.spread(kind, bucket, layer)
        of_site = {"kind": kind, "bucket": bucket, "layer": layer, "between": spread.between, "within": spread.within}
        rows += [
            of_site
            | {"samples": samples, "error": spread.error(samples)}
            | {"error_same_cost": spread.error(samples) * float(np.sqrt(samples / spread.samples))}
            for samples in numbers
        ]
    return pd.DataFrame(rows)


def trace_random_weights(
    lm: LanguageModel,
    facts: Sequence[Fact | SwapPair],
    samples: int = 10,
    window: int = 10,
    seed: int = 0,
    progress: bool = True,
    *,
    corruption: Corruption | None = None,
    direction: str = "denoise",
) -> Traces:
    """Traces, of all kinds, of a small model of random weights with the tokenizer of `lm`.

    Its weights are drawn wide enough that the probability of its answer is worth speaking of.

    Args:
        facts: or pairs, whose partners' subjects stand in the corrupted runs where no other corruption is given.
        samples, window, seed, corruption, direction: see `causal_trace`; the weights are drawn with the same seed.
    """
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=lm.embedding.weight.shape[0], initializer_range=0.5, **size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random_lm = LanguageModel(LlamaForCausalLM(config), lm.tokenizer, name="random weights")
    noise = (corruption or GaussianNoise()).measured(random_lm)
    traces = []
    for fact in tqdm(facts, "tracing random weights", unit="fact", disable=not progress):
        swaps = isinstance(fact, SwapPair) and corruption is None
        chosen = SubjectSwap(fact.partner.subject) if swaps else noise
        settings = TraceSettings(chosen, samples, window, seed, direction=direction)
        fact = fact.fact if isinstance(fact, SwapPair) else fact
        runs = run_clean_and_corrupted(random_lm, fact.prompt, fact.subject, settings)
        traces += [replace(trace_of_kind(runs, label), relation=fact.relation) for label in KINDS]
    return Traces(traces)
