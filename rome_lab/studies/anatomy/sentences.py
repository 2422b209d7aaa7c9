"""What the tables of an edit's anatomy say, in sentences for the notebook to print."""

from __future__ import annotations

import pandas as pd

from rome_lab.editing import Edit
from rome_lab.tracing import Trace


def sizes_in_words(table: pd.DataFrame, edit: Edit) -> str:
    """What is to be noticed in `sizes`: how long v* - W k*, k* and dW are, and that the rank of dW is one."""
    length, times = table["length"], table["length"] / table["usual"]
    return (
        f"|v* - W k*| / |W k*| = {change_at_key(table):.2f}; the clamp allows {edit.settings.clamp:g}\n"
        f"|k*| is {times['k*']:.1f} times and |W k*| {times['W k*']:.1f} times what is usual\n"
        f"|dW| / |W| = {length['dW = Lambda uT'] / length['W']:.1%}\n"
        f"|Lambda| |u| = {length['Lambda'] * length['u = C^-1 k*']:.4g}, as |dW| has to be: its rank is one"
    )


def change_at_key(table: pd.DataFrame) -> float:
    """|dW k*| / |W k*|, from `sizes`: how much of what W says at k* itself is changed."""
    return table.loc["v* - W k*", "length"] / table.loc["W k*", "length"]


def directions_in_words(shares: pd.DataFrame, table: pd.DataFrame, edit: Edit) -> str:
    """How much of k* and of u lies along the directions that hold half of all keys, and how well the constraint is met.

    Args: shares: what `directions` returns. table: what `sizes` returns.
    """
    half = shares.loc[(shares["text"] >= 0.5).idxmax()]
    length = table["length"]
    return (
        f"Half of all keys in text lies along {half['n']:.0f} of {len(shares)} directions; "
        f"of k* {half['k*']:.1%} does, of u {half['u']:.2%}.\n"
        f"|W k* - v*| / |v*| before: {length['v* - W k*'] / length['v*']:.2f}\n"
        f"|W_hat k* - v*| / |v*| after, of the weights as they are stored: {edit.constraint_error:.1e}"
    )


def trace_in_words(trace: Trace) -> str:
    """Where restoring brings the answer back most, anywhere and at the last subject token."""
    token, layer = divmod(int(trace.indirect_effect.argmax()), trace.indirect_effect.shape[1])
    last = trace.indirect_effect[trace.subject_range[1] - 1]
    return (
        f"{trace.kind}: {trace.answer!r} is brought back most at {trace.tokens[token]!r}, layer {layer}; "
        f"of the layers of the last subject token by layer {last.argmax()}, {last.max():+.1%}"
    )


def best_edit_in_words(table: pd.DataFrame) -> str:
    """The best edit of `edit_everywhere`, what it does beside what was before, and how many edits reach the target."""
    best, before = table.loc[table["together"].idxmax()], table.attrs
    changes = (f"{name} {before[name]:.1%} -> {best[name]:.1%}," for name in ("p_target", "p_paraphrase"))
    return "\n".join(
        [
            f"the best edit is at {best['token']!r} ({best['bucket']}), layer {best['layer']}: {best['kept']:.2f} is kept,",
            *changes,
            f"{(table['p_target'] > 0.5).sum()} of {len(table)} edits give the target more than 50% after the prompt",
        ]
    )
