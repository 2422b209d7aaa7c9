"""A layer that is suggested for edits, and the trials behind it: `LayerSuggestion`, a table and a few sentences.

scores_by_layer(rows, n)    the table of what was tried
best_layer(table)           the layer of which the edits do best
summed_up(lm, ...)          the suggestion that trials and traces come to
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rome_lab.base import Json, harmonic_mean_ci, share_ci
from rome_lab.editing.edit import layers_in_words
from rome_lab.editing.settings import EditSettings
from rome_lab.facts import Cases, Fact
from rome_lab.models import LanguageModel

LAYER_SCORES = ("rewrite", "paraphrase", "neighbour")
ENDS = ("", "_low", "_high")  # of the names of columns: a score, and the ends of its interval


@dataclass(frozen=True, eq=False, repr=False)
class LayerSuggestion:
    """Which layer to edit, and the trials behind that.

    Attributes:
        layer: the one with the highest score; of several that have it, the one whose edits change W least.
        table: a row a layer that was tried: layer; rewrite, paraphrase, neighbour and score in %, each with the ends of its
            95% interval over the facts (_low, _high); n, the number of facts; change, the mean |dW| / |W| of the edits;
            effect, the mean indirect effect of MLP outputs restored around that layer at the last subject token; remark.
        traced: the layer at which that effect has its peak, of all layers of the model: what tracing would have said.
        traced_effect: that peak.
        facts, targets: what was edited.
        settings, tokens: of the trial's edits, and of their C.
        model: its name.
    """

    layer: int
    table: pd.DataFrame
    traced: int
    traced_effect: float
    facts: tuple[Fact, ...]
    targets: tuple[str, ...]
    settings: EditSettings
    tokens: int
    model: str

    def __str__(self) -> str:
        best = self.table.set_index("layer").loc[self.layer]
        return (
            f"Layer {self.layer} of {self.model}: of {len(self.table)} layers that were tried, edits there have the highest "
            f"score, {best['score']:.0f} ({best['score_low']:.0f} to {best['score_high']:.0f}), over {int(best['n'])} facts "
            f"that the model knows.{self.doubt} {self.tracing}"
        )

    @property
    def doubt(self) -> str:
        """Which other layers may be as good, in a sentence."""
        scores = self.table.set_index("layer")[["score", "score_low"]]
        near = [
            str(x) for x in scores.index if x != self.layer and scores["score"][x] >= scores["score_low"][self.layer]
        ]
        return f" Its interval takes in the scores of {layers_in_words(near)}." if near else ""

    @property
    def tracing(self) -> str:
        """What tracing would have said, and how, in a sentence."""
        return (
            f"Tracing would have said layer {self.traced}: around it, MLP outputs of the clean run bring most of the answer "
            f"back at the subject's last token (indirect effect {self.traced_effect:.3f}, averaged over the same facts)."
        )

    def __repr__(self) -> str:
        return f"<{self}>"

    def _repr_html_(self) -> str:
        return self.for_people().to_html(index=False) + f"<p>{self}</p>"

    def for_people(self) -> pd.DataFrame:
        """The table in fewer and shorter columns."""
        rows = self.table.to_dict("records")
        columns = {name: [with_interval(row, name) for row in rows] for name in (*LAYER_SCORES, "score")}
        marks = [
            ", ".join(
                word for word, layer in (("suggested", self.layer), ("traced", self.traced)) if layer == row["layer"]
            )
            for row in rows
        ]
        return pd.DataFrame(
            {"layer": self.table["layer"]}
            | columns
            | {
                "n": self.table["n"],
                "|dW| / |W|": self.table["change"].map("{:.2f}".format),
                "effect of MLPs around it": self.table["effect"].map("{:.3f}".format),
                "": marks,
            }
        )


def with_interval(row: Mapping[str, float], name: str) -> str:
    """A score of a row of the table with its interval."""
    return f"{row[name]:.0f} ({row[f'{name}_low']:.0f} to {row[f'{name}_high']:.0f})"


def scores_by_layer(rows: Sequence[Mapping[str, Json]], n: int) -> pd.DataFrame:
    """A row a layer: `LayerSuggestion.table`, but for the effect."""
    parts = []
    for layer, part in pd.DataFrame(rows).groupby("layer"):
        values = part[list(LAYER_SCORES)].to_numpy(float)
        cis = {name: share_ci(column)[:3] for name, column in zip(LAYER_SCORES, values.T, strict=True)}
        cis["score"] = harmonic_mean_ci(values)[:3]
        numbers = {f"{name}{end}": float(x) for name, ci in cis.items() for end, x in zip(ENDS, ci, strict=True)}
        remarks = [x for x in part["remark"] if x]
        remark = f"{len(remarks)} of {len(part)} edits bear a remark; the first: {remarks[0]}" if remarks else ""
        parts.append({"layer": int(layer), **numbers, "n": n, "change": part["change"].mean(), "remark": remark})
    return pd.DataFrame(parts)


def best_layer(table: pd.DataFrame) -> int:
    """The layer with the highest score; of several that have it, the one whose edits change W least, but do change it."""
    best = table[table["score"] >= table["score"].max() - 1e-9]
    best = best[best["change"] > 0] if (best["change"] > 0).any() else best
    return int(best.loc[best["change"].idxmin(), "layer"])


def summed_up(
    lm: LanguageModel,
    cases: Cases,
    rows: Sequence[Mapping[str, Json]],
    effects: np.ndarray,
    settings: EditSettings,
    tokens: int,
) -> LayerSuggestion:
    """The suggestion that the trials come to."""
    table = scores_by_layer(rows, len(cases))
    table.insert(len(table.columns) - 1, "effect", effects[table["layer"]])
    traced, layer = int(effects.argmax()), best_layer(table)
    facts, targets = tuple(case.fact for case in cases), tuple(case.target for case in cases)
    return LayerSuggestion(layer, table, traced, float(effects[traced]), facts, targets, settings, tokens, lm.name)
