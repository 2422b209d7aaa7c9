"""What an edit is judged by: the paper's metrics on plain numbers and texts, and their means over cases.

    METRICS                                      every metric: its definition and its unit
    magnitude                                    EM, PM and NM of one case (ES, PS and NS: `rome_lab.facts.success`)
    token_accuracy                               zsRE's efficacy, paraphrase and specificity of one case
    generation_entropy, reference_score          GE and RS of one case
    summarise                                    means over cases with 95% intervals, and S

The case is the unit of sampling: prompts are averaged within the case first, and n counts cases.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy

from rome_lab.base import MeanCI, harmonic_mean_ci, mean_ci, share_ci
from rome_lab.evaluation.passages import passage_of
from rome_lab.evaluation.scorings import SCORINGS, metric_of


@dataclass(frozen=True)
class Metric:
    """One metric of a case.

    Attributes:
        definition: what it is, by case.
        unit: "%" is for shares, probabilities and similarities; differences of them are percentage points.
        whole: "whole target": a probability is the product over all tokens of the target; "per token": a mean over them;
            "text": of one that the model writes; "matrix": of the weights.
        forced: whether the model reads the target itself (teacher forcing) instead of what it would have said;
            False exactly where `whole` is "text" or "matrix".
        better: which values are the better ones.
    """

    definition: str
    unit: str = "%"
    whole: str = "whole target"
    forced: bool = True
    better: str = "higher"


METRICS: dict[str, Metric] = {
    "ES": Metric("efficacy score: 100 [P(target) > P(true object)] at the rewrite prompt"),
    "EM": Metric("efficacy magnitude: P(target) - P(true object) at the rewrite prompt"),
    "PS": Metric("paraphrase score: share of the paraphrases with P(target) > P(true object)"),
    "PM": Metric("paraphrase magnitude: mean over the paraphrases of P(target) - P(true object)"),
    "NS": Metric("neighbourhood score: share of the neighbours with P(own object) > P(target)"),
    "NM": Metric("neighbourhood magnitude: mean over the neighbours of P(own object) - P(target)"),
    "GE": Metric(
        "generation entropy: (H_2 + 2 H_3) / 3, the entropies of a generated text's bigrams and trigrams, mean over texts",
        unit="bits",
        whole="text",
        forced=False,
    ),
    "RS": Metric(
        "reference score: cosine of the TF-IDF vectors of the generated and of the reference texts",
        whole="text",
        forced=False,
    ),
    "efficacy": Metric(
        "share of the target's tokens that are the most probable at the rewrite prompt", "%", "per token"
    ),
    "paraphrase": Metric("the same at the paraphrases, mean over them", "%", "per token"),
    "specificity": Metric("the same of the neighbours' own answers, mean over neighbours", "%", "per token"),
    "nll": Metric(
        "mean -log P of the tokens of plain prose; its exponential is the perplexity",
        "nats",
        "per token",
        better="lower",
    ),
    "known": Metric("share of unrelated known facts all of whose object's tokens are still the most probable ones"),
    "norm": Metric(
        "Frobenius norm of the edited matrix by that of the unedited one, after many edits; of several the greatest",
        "times",
        "matrix",
        forced=False,
        better="lower",
    ),
}
METRICS |= {
    metric_of(letter, scoring): Metric(
        f"share of the {prompts} at which {meaning}",
        whole="text" if scoring == "written" else "whole target",
        forced=scoring != "written",
    )
    for letter, prompts in (
        ("F", "prompts whose answer follows from the target"),
        ("K", "prompts about the subject whose answer stays"),
        ("E", "rewrite prompt, 0 or 100,"),
        ("P", "paraphrases"),
        ("N", "neighbours"),
    )
    for scoring, meaning in SCORINGS.items()
    if (letter, scoring) not in {("K", "score"), ("K", "choice"), ("F", "choice")}
    and metric_of(letter, scoring) not in METRICS
}
"""Metric -> what it is, for one case. Summaries add S and perplexity."""
S_OF = ("ES", "PS", "NS")
DRAWN_ANEW = {None: "cases", "chain": "models", "model": "models", "relation": "relations"}
"""What is drawn anew, where a column tells the clusters."""
WORDS = re.compile(r"\w+|[^\w\s]")


def magnitude(own: Sequence[float], other: Sequence[float]) -> float:
    """EM, PM or NM of a case: the mean over its prompts of P(own) - P(other), in percentage points.

    Args: own, other: for each prompt, log P of the whole text: the sum over all its tokens, teacher forced.
    """
    return 100.0 * float(np.mean(np.exp(own) - np.exp(other)))


def token_accuracy(greedy: Sequence[Sequence[bool]]) -> float:
    """zsRE's efficacy, paraphrase or specificity of a case, in %: per token, with teacher forcing.

    For each prompt the share of the answer's tokens, all of them, that are the most probable ones after the prompt and the
    answer's tokens before; then the mean over the prompts.

    Args: greedy: for each prompt, for each token of the answer, whether it is the most probable one.

    >>> token_accuracy([[True, False], [True]])
    75.0
    """
    return 100.0 * float(np.mean([np.mean(tokens) for tokens in greedy]))


def generation_entropy(texts: Sequence[str]) -> float:
    """GE of a case, in bits: low where a text repeats itself (Zhang et al., 2018). The paper prints hundredths of it.

        GE = mean over texts of (H_2 + 2 H_3) / 3,   H_n = -sum_k f(k) log2 f(k)

    f(k) is the frequency of the n-gram k in the text, and 1/3 and 2/3 are the weights of the authors' code. As there, a
    text is what the model read and wrote, the prompt included. Entropy grows with length, so it can only be compared
    where the settings of `rome_lab.models.sampling.generate` are the same (the authors' texts have 100 tokens).
    """
    # Differs: the authors cut text into words with NLTK; here words are runs of letters and digits, or punctuation marks.
    return float(np.mean([(ngram_entropy(text, 2) + 2 * ngram_entropy(text, 3)) / 3 for text in texts]))


def ngram_entropy(text: str, n: int) -> float:
    """H_n of a text, in bits; 0 where it has at most one n-gram.

    >>> ngram_entropy("a b a b a", 2)
    1.0
    """
    words = WORDS.findall(text)
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    return float(scipy.stats.entropy(list(counts.values()), base=2))


def reference_score(texts: Sequence[str], references: Sequence[str], corpus: Sequence[str] = ()) -> float:
    """RS of a case, in %: the cosine of the TF-IDF vectors of all its generated and all its reference texts.

    As in the authors' code the texts of either side are joined, and a word's document frequency is measured on other
    text, whose words are the only ones that count.

    Args: corpus: texts on which idf is fitted, such as the references of all cases; by default `references`, whose
            few texts say little about which words are rare.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

    weights = TfidfVectorizer().fit(corpus or references)
    written, reference = weights.transform([" ".join(texts), " ".join(references)])
    return 100.0 * float(written.multiply(reference).sum())


def summarise(rows: pd.DataFrame, by: str | Sequence[str] = "method", clusters: str | None = None) -> pd.DataFrame:
    """Means over cases with 95% intervals, a row a group and metric.

    S is the harmonic mean of the means of ES, PS and NS over the cases that have all three. What is in percent has intervals
    that stay where it can be: exact ones of metrics that are all or nothing in each case, such as ES, and by bootstrap over
    cases of the others, S among them (`share_ci`, `harmonic_mean_ci`). Entropies and nll have t-intervals, nll over the
    passages of prose that the cases read. Perplexity is exp of the mean nll, its interval exp of the nll's.

    Args:
        rows: a row a case, as `rome_lab.evaluation.judging.judge_case` makes them, with the columns `by`.
        by: what to group by.
        clusters: a column, such as "relation": the intervals are then those of a draw of new relations, whose cases are
            alike, instead of new cases from the same set. By default, where several cases are judged in one edited model,
            what tells the models: "chain" or "model".

    Returns: DataFrame: the columns `by`, metric, mean, ci_low, ci_high, n (cases with a value), over (what the interval is
             a draw of, such as "cases", "models", "passages" or "relations"). Groups stand in the order of their first row,
             metrics in that of `METRICS`, S first.
    Raises:  ValueError: no rows, a column that is missing, or a value that is infinite.
    """
    by = [by] if isinstance(by, str) else list(by)
    metrics = [name for name in METRICS if name in rows]
    needed = by if clusters is None else [*by, clusters]
    if rows.empty or not metrics or not set(needed) <= set(rows):
        raise ValueError(
            f"summarise: got {len(rows)} rows with columns {', '.join(map(str, rows)) or '(none)'}; expected rows of "
            f"judged cases with {', '.join(needed)} and metrics such as ES."
        )
    if np.isinf(rows[metrics].to_numpy(float)).any():
        raise ValueError("summarise: a metric is infinite; judge those cases again.")
    parts = []
    for group, part in rows.groupby(by, sort=False, dropna=False, observed=True):
        where = dict(zip(by, group, strict=True))
        shared = (x for x in ("chain", "model") if x in part and part[x].dropna().duplicated().any())
        column = clusters or next(shared, None)
        labels = None if column is None else part[column].where(part[column].notna(), None).tolist()
        over = DRAWN_ANEW.get(column, f"the column {column}")
        parts += [where | {"metric": name} | values for name, values in summaries(part, metrics, labels, over).items()]
    return pd.DataFrame(parts, columns=[*by, "metric", "mean", "ci_low", "ci_high", "n", "over"])


def summaries(
    part: pd.DataFrame, metrics: Sequence[str], labels: Sequence[Hashable] | None, over: str
) -> dict[str, dict[str, float | str]]:
    """Metric -> mean, ci_low, ci_high, n, over of the cases of one group; metrics that no case has are left out."""
    means: dict[str, MeanCI] = {}
    by_passage = labels is None and "case" in part and "chain" not in part  # a chain reads all of them
    if set(S_OF) <= set(metrics):
        means["S"] = harmonic_mean_ci(part[list(S_OF)].to_numpy(float), labels)
    for name in metrics:
        clusters = [passage_of(case) for case in part["case"]] if name == "nll" and by_passage else labels
        means[name] = ci_of(METRICS[name], part[name].to_numpy(float), clusters)
        if name == "nll":
            *nll, n = means[name]
            means["perplexity"] = MeanCI(*np.exp(nll), n)
    return {
        metric: {"mean": float(mean), "ci_low": float(low), "ci_high": float(high), "n": int(n)}
        | {"over": "passages" if by_passage and metric in ("nll", "perplexity") else over}
        for metric, (mean, low, high, n) in means.items()
        if n > 0
    }


def ci_of(metric: Metric, values: np.ndarray, labels: Sequence[Hashable] | None) -> MeanCI:
    """The mean of a metric over cases (F,), with an interval that stays in its range where it is in percent."""
    return share_ci(values, labels) if metric.unit == "%" else mean_ci(values, labels)
