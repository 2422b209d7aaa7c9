"""The room of corruptions.ipynb: do the paper's sites and claims depend on how they are looked for?

Choice, choices_of          what is put in the subject's place, from which run into which, and how many layers at once
trace_choices               the traces of all choices, of the same pairs of facts
choice_verdicts, verdict_table  the claims under each choice and metric, as numbers and to read
site_effects                the effects at the two sites by choice, metric, kind and layer: what is drawn
compare_lines               those, drawn: a row a choice, a column a kind
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from rome_lab.base import Store
from rome_lab.lab import COLOURS, FONT_SIZE, finish, layer_ticks, line_with_band, panel_figure, plots, shared_legend
from rome_lab.models import LanguageModel
from rome_lab.tracing import (
    KINDS,
    TRACE_METRICS,
    GaussianNoise,
    SwapPair,
    Traces,
    claims,
    trace_facts,
    trace_random_weights,
)

SITES = {"subject_last": "last subject token", "last": "last token"}
SINGLE = ("state", "mlp", "attn")  # kinds that are drawn


@dataclass(frozen=True)
class Choice:
    """One way to look for a site.

    Attributes:
        sigmas: of the noise, in standard deviations of embeddings; 0 for another subject instead.
        direction: "denoise" or "noise".
        window: layers in a run.
        kinds: that are traced: all, or those that the window matters for.
    """

    sigmas: float = 0.0
    direction: str = "denoise"
    window: int = 10
    kinds: tuple[str, ...] = tuple(KINDS)

    def __str__(self) -> str:
        corruption = f"noise, {self.sigmas:g} sigma" if self.sigmas else "another subject"
        return f"{corruption}; {self.direction}; runs of {self.window}"


def choices_of(sigmas: Iterable[float], windows: Sequence[int]) -> list[Choice]:
    """Another subject in both directions and all windows, and noise of each size in the paper's direction.

    All kinds are traced with the first of the windows, such as the paper's 10, and with others those that it matters for.
    """
    main, *others = windows
    corruptions = [(0.0, "denoise"), (0.0, "noise"), *((size, "denoise") for size in sigmas)]
    runs = [Choice(0, direction, window, ("mlp", "attn")) for window in others for _, direction in corruptions[:2]]
    return [*(Choice(size, direction, main) for size, direction in corruptions), *runs]


def trace_choices(
    lm: LanguageModel,
    pairs: Sequence[SwapPair],
    choices: Iterable[Choice],
    samples: int = 2,
    seed: int = 0,
    store: Store | str | Path | None = None,
    random_weights: bool = False,
) -> dict[Choice, Traces]:
    """The traces of all choices, in probability; other metrics are read off them, see `Traces.by`.

    Args:
        samples: of noise. seed: of it.
        random_weights: of a model that has learnt nothing instead, see `trace_random_weights`.
    """
    traces = {}
    for choice in choices:
        noise = GaussianNoise(choice.sigmas) if choice.sigmas else None
        settings = {"samples": samples, "window": choice.window, "seed": seed, "direction": choice.direction}
        settings |= {"corruption": noise}
        if random_weights:
            traces[choice] = trace_random_weights(lm, pairs, progress=False, **settings)
        else:
            traces[choice] = trace_facts(lm, pairs, choice.kinds, store, **settings)
    return traces


def choice_verdicts(traces: Mapping[Choice, Traces], clustered: bool = False) -> pd.DataFrame:
    """Each claim under each choice and metric, in shares of what there is to restore: what `claims` returns, and how.

    The choices with runs of MLP and attention only are left out.
    """
    parts = []
    for choice, chosen in traces.items():
        for metric in TRACE_METRICS if choice.kinds == tuple(KINDS) else ():
            if metric in ("probability", *chosen[0].further):
                table = claims(chosen.by(metric), quantity="normalised_effect", clustered=clustered)
                parts.append(table.assign(choice=str(choice), metric=metric))
    table = pd.concat(parts, ignore_index=True)
    return table[["choice", "metric", *table.columns.drop(["choice", "metric"])]]


def verdict_table(table: pd.DataFrame) -> pd.DataFrame:
    """`choice_verdicts` to read: a row a choice and metric, a column a claim, by its first words."""
    short = table["claim"].str.split("[:,(]", regex=True).str[0].str.slice(0, 40)
    order = list(dict.fromkeys(short))
    cells = table["verdict"] + table["effect"].map(" ({:+.2f})".format)
    return table.assign(claim=short, cell=cells).pivot(index=["choice", "metric"], columns="claim", values="cell")[
        order
    ]


def site_effects(traces: Mapping[Choice, Traces]) -> pd.DataFrame:
    """Effects at the two sites as shares: choice, metric, kind, bucket, layer, mean, ci_low, ci_high, n_facts, left_out."""
    parts = []
    for choice, chosen in traces.items():
        for metric in TRACE_METRICS:
            if metric in ("probability", *chosen[0].further):
                average = chosen.by(metric).average("normalised_effect")
                kept = average["kind"].isin(SINGLE) & average["bucket"].isin(list(SITES))
                named = {
                    "sigmas": choice.sigmas,
                    "direction": choice.direction,
                    "window": choice.window,
                    "metric": metric,
                }
                parts.append(average[kept].assign(**named, left_out=average.attrs["left_out"]))
    return pd.concat(parts, ignore_index=True)


def compare_lines(effects: pd.DataFrame, by: str, kinds: Sequence[str], note: str) -> Figure:
    """The effects by layer, a row a site and a column a kind, a line for each value of the column `by`."""
    figure, axes = panel_figure(len(SITES), len(kinds), (7, 3.8), note, sharex=True, sharey="row", squeeze=False)
    values = list(dict.fromkeys(effects[by]))
    for row, (site, title) in zip(axes, SITES.items(), strict=True):
        for ax, kind in zip(row, kinds, strict=True):
            rows = effects[(effects["bucket"] == site) & (effects["kind"] == kind)]
            for value, (dashes, colour) in zip(
                values, cycle(product(("-", "--", ":"), COLOURS.values())), strict=False
            ):
                part = rows[rows[by] == value].sort_values("layer")
                style = {"color": colour, "linestyle": dashes, "linewidth": 1.1, "label": name_of(by, value)}
                line_with_band(ax, part["layer"], part, **style)
            ax.axhline(0, color="0.6", linewidth=0.5, zorder=0)
            ax.set_title(f"{plots.TITLES[kind].split()[0]}, {title}")
            finish(ax, layer_ticks())
    for ax, kind in zip(axes[-1], kinds, strict=True):
        ax.set_xlabel("layer" if kind == "state" else "middle of the layers", fontsize=FONT_SIZE)
    for ax in axes[:, 0]:
        ax.set_ylabel("effect, as a share", fontsize=FONT_SIZE)
    shared_legend(figure, columns=len(values))
    return figure


def name_of(by: str, value: object) -> str:
    """What a value of a column of `site_effects` is called in a legend."""
    if by == "sigmas":
        return f"noise, {value:g} sigma" if value else "another subject"
    if by == "window":
        return f"run of {value}" if value != 1 else "single layers"
    return {"denoise": "clean into corrupted", "noise": "corrupted into clean"}.get(value, str(value).replace("_", " "))
