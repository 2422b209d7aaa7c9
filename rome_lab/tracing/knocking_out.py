"""Attention knockout: what the answer loses where the last token may not attend to some tokens in a run of layers.

    knockout(lm, fact)                  a Knockout, by layer
    knocked_out(clean, tokens, window)  the same of a run that is recorded

Source: Geva et al. 2023, "Dissecting Recall of Factual Associations in Auto-Regressive Language Models".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any

import numpy as np
import pandas as pd
import torch

from rome_lab.base import OneLine, check_whole
from rome_lab.facts import Fact, read_prompt
from rome_lab.models import (
    Batching,
    LanguageModel,
    Recording,
    at_least_float32,
    causal_mask,
    check_verified,
    enough_room,
    freed_memory_kept,
    is_mask,
    run_block,
    suited_attention,
    suited_products,
    text_bytes,
)
from rome_lab.tracing.metrics import probability
from rome_lab.tracing.runs import CleanRun, run_clean
from rome_lab.tracing.sweep import Column, columns_of, few_together


@dataclass(frozen=True, eq=False, repr=False)
class Knockout(OneLine):
    """The answer's probability where the last token may not attend to some tokens in a run of layers.

    Attributes:
        prompt, answer: as text.
        tokens: which tokens of the prompt it may not attend to, by number.
        window: length of the run of layers.
        p_clean: P[o].
        p: (L,) P[o] with the run of layers around each layer.
    """

    prompt: str
    answer: str
    tokens: tuple[int, ...]
    window: int
    p_clean: float
    p: np.ndarray

    @property
    def relative_change(self) -> np.ndarray:
        """(L,) (p - p_clean) / p_clean."""
        return (self.p - self.p_clean) / self.p_clean

    def table(self) -> pd.DataFrame:
        """A row a layer: layer, p, relative_change."""
        return pd.DataFrame({"layer": range(len(self.p)), "p": self.p, "relative_change": self.relative_change})


@torch.no_grad()
@enough_room("knockout")
def knockout(
    lm: LanguageModel,
    prompt: str | Fact,
    subject: str | None = None,
    window: int = 9,
    *,
    tokens: Sequence[int] | None = None,
    answer: str | None = None,
    max_rows: int | None = None,
) -> Knockout:
    """Mask the attention from the last token to the subject's, in the clean run, in a run of layers around each layer.

    The weights of the other tokens grow to a sum of one, as a softmax makes them. Only the last token's own states change,
    so that one sweep over that token gives all layers exactly.

    Args:
        prompt, subject, answer: as in `causal_trace`.
        window: layers in a run, [l - 4, l + 4] for 9, clipped at the model's ends.
        tokens: which tokens instead of the subject's, by number.

    Raises:
        ValueError: no such tokens, or all that the last one sees in some block; the model does not know the Fact; see also
            `causal_trace`.
    """
    check_verified(lm, "knockout")
    clean = run_clean(lm, prompt, read_prompt(lm, prompt, subject), answer, "knockout")
    return knocked_out(clean, range(*clean.prompt.subject_range) if tokens is None else tokens, window, max_rows)


@torch.no_grad()
@enough_room("knockout")
def knocked_out(clean: CleanRun, tokens: Iterable[int], window: int = 9, max_rows: int | None = None) -> Knockout:
    """`knockout` of a run that is recorded."""
    check_whole("knockout", window=(window, 1))
    lm, recording, length = clean.lm, clean.recording, len(clean.prompt.ids)
    chosen = sorted(set(tokens))
    whole = all(isinstance(x, Integral) and not isinstance(x, bool) for x in chosen)
    if not chosen or not whole or not 0 <= chosen[0] <= chosen[-1] < length or len(chosen) == length:
        raise ValueError(
            f"knockout: the tokens {chosen} are not some of the prompt's {length}, counted from 0, with one left at "
            "least to attend to; name others, or a longer prompt."
        )
    chosen = list(map(int, chosen))
    columns = columns_of("attn", lm.n_layers, window)
    order = sorted(range(lm.n_layers), key=lambda place: columns[place].first)
    texts = recording.states[0][:1, -1:].repeat(lm.n_layers, 1, 1)  # (L, 1, D)
    together = Batching(lm, "knockout", text_bytes(lm, length), max_rows)
    joined = 0

    def go_through(layer: int, rows: range) -> None:
        part = slice(rows.start, rows.stop)
        barred = [covers(columns[order[row]], layer) for row in rows]
        changed = without(lm, recording, layer, barred, chosen)
        texts[part] = run_block(lm, layer, texts[part], changed, torch.zeros(len(rows), dtype=torch.long))

    with suited_attention(lm), suited_products(lm.device), freed_memory_kept():
        for layer in range(lm.n_layers):
            texts = texts.to(recording.states[layer].device)
            while joined < len(order) and columns[order[joined]].first == layer:
                texts[joined] = recording.states[layer][0, -1:]
                joined += 1
            together.each(range(joined), partial(go_through, layer))
        logits = few_together(together).over(texts[:, 0], lambda last: at_least_float32(lm.logits(last)))
        p = np.empty(lm.n_layers)
        p[order] = np.concatenate([probability(part, clean.answer_id) for part in logits])
    p_clean = float(probability(recording.logits[0], clean.answer_id))
    return Knockout(clean.prompt.text, lm.tokenizer.decode([clean.answer_id]), tuple(chosen), window, p_clean, p)


def covers(column: Column, layer: int) -> bool:
    """Whether the layer is one of the column's run."""
    return column.first <= layer <= column.last


def without(
    lm: LanguageModel, recording: Recording, layer: int, barred: Sequence[bool], tokens: Sequence[int]
) -> Recording:
    """The recording with a mask a row for block `layer`, by which the last token does not see `tokens` where it is barred.

    What a mask says of a token that is not seen is read off the mask itself: that the first token does not see the last.
    """
    length = recording.states[0].shape[1]

    def changed(name: str, value: Any) -> Any:
        if is_mask(name, value, length):
            mask = causal_mask(lm, length) if value is None else value
            mask = mask[:1].repeat(len(barred), *[1] * (mask.ndim - 1))  # (R, 1, T, T)
            unseen = mask[0, 0, 0, -1].clone()
            for row in (row for row, is_barred in enumerate(barred) if is_barred):
                mask[row, :, -1, list(tokens)] = unseen
                if (mask[row, :, -1] == unseen).all():
                    raise ValueError(
                        f"knockout: in block {layer} of {lm.name} the last token sees none but {list(tokens)}, so that "
                        "it would have nothing left to attend to; name other tokens."
                    )
            return mask
        if isinstance(value, tuple | list):
            return type(value)(changed("", x) for x in value)
        return {key: changed("", x) for key, x in value.items()} if isinstance(value, Mapping) else value

    arguments = {name: changed(name, value) for name, value in recording.arguments[layer].items()}
    return replace(recording, arguments=[arguments if x == layer else y for x, y in enumerate(recording.arguments)])
