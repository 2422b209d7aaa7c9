"""One trace by each way: our sweep, one forward a cell, and cells batched together. The plain ways are those of the oracle.

The authors' published code runs the whole model once for each cell, over 1 + S rows of which the first is clean, and
makes the logits of every token. The library on PyPI (causal-tracer 1.1.0) puts rows, a sample of a cell each, into batches
of 32 and runs the whole model on those. Both are written here anew, upon `tests/oracle.py`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rome_lab import FixedNoise, GaussianNoise, LanguageModel
from rome_lab.facts.prompts import Prompt, read_prompt
from rome_lab.tracing.corruption import noise_key
from rome_lab.tracing.one_fact import restore
from rome_lab.tracing.runs import TraceSettings, run_clean_and_corrupted
from tests.oracle import FullForward

BATCH = 32  # rows, the default of the library on PyPI
KINDS = ("state", "mlp", "attn")

Tables = dict[str, np.ndarray]
Tokens = Collection[int] | None


@dataclass(frozen=True, eq=False)
class Question:
    """One fact to trace, with the noise that all ways are given, (S, subject tokens, D)."""

    lm: LanguageModel
    prompt: Prompt
    noise: Tensor
    window: int

    @classmethod
    def ask(cls, lm: LanguageModel, prompt: str, subject: str, samples: int, window: int) -> Question:
        """The question that `causal_trace` answers with the same arguments and its defaults."""
        read = read_prompt(lm, prompt, subject)
        begin, end = read.subject_range
        shape = (samples, end - begin, lm.embedding.weight.shape[1])
        noise = GaussianNoise().measured(lm).noise(lm, shape, noise_key(0, read.text, read.subject_range))
        return cls(lm, read, noise, window)


class Plain(FullForward):
    """Full forwards whose probabilities are taken in the model's own precision, as anyone would."""

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


class OneForwardACell(Plain):
    """As the authors' code has it: the rows of a corrupted run stand behind a clean one."""

    def run(self, noise: Tensor | None = None, hold: Collection[tuple] = (), keep: bool = False) -> tuple:
        if noise is None:
            return super().run(None, hold, keep)
        p, outputs = super().run(torch.cat([torch.zeros_like(noise[:1]), noise]), hold, keep)
        return p[1:], outputs


def forward(asked: Question) -> Tensor:
    """One plain forward of the 1 + S texts: the unit in which traces are compared between machines."""
    with torch.no_grad():
        return asked.lm.model(asked.prompt.ids.expand(1 + len(asked.noise), -1), use_cache=False).logits


def sweep(asked: Question, kinds: Collection[str], tokens: Tokens = None) -> Tables:
    """p_restored (T, L) of each kind by rome_lab."""
    settings = TraceSettings(FixedNoise(asked.noise), window=asked.window)
    runs = run_clean_and_corrupted(asked.lm, asked.prompt.text, asked.prompt.subject, settings)
    return {kind: restore(runs, kind, tokens=tokens).p_restored for kind in kinds}


def one_forward_a_cell(asked: Question, kinds: Collection[str], tokens: Tokens = None) -> Tables:
    """The same by one forward of the whole model a cell."""
    plain = OneForwardACell(asked.lm, asked.prompt.ids, asked.prompt.subject_range, asked.noise)
    return {kind: plain.trace(kind, window=asked.window, tokens=tokens)[2] for kind in kinds}


def batched_cells(asked: Question, kinds: Collection[str], tokens: Tokens = None) -> Tables:
    """The same by forwards of the whole model over rows of several cells."""
    plain = Plain(asked.lm, asked.prompt.ids, asked.prompt.subject_range, asked.noise)
    return {kind: batched(plain, kind, asked.window, tokens) for kind in kinds}


def batched(plain: Plain, kind: str, window: int, tokens: Tokens) -> np.ndarray:
    """(T, L) of one kind: every row of a batch is one sample of a cell and holds what its cell restores."""
    p_clean, clean = plain.run(keep=True)
    answer = int(p_clean[0].argmax())
    n_tokens, n_layers, samples = plain.ids.shape[-1], plain.lm.n_layers, len(plain.noise)
    chosen = range(n_tokens) if tokens is None else tokens
    rows = [(token, layer, sample) for token in chosen for layer in range(n_layers) for sample in range(samples)]
    table = np.full((n_tokens, n_layers, samples), np.nan)
    for begin in range(0, len(rows), BATCH):
        part = rows[begin : begin + BATCH]
        hold = [
            (kind, x, row, token, clean[kind, x][0, token])
            for row, (token, layer, _) in enumerate(part)
            for x in plain.restored(kind, layer, window)
        ]
        p, _ = plain.run(plain.noise[[sample for *_, sample in part]], hold)
        for place, value in zip(part, p[:, answer].tolist(), strict=True):
            table[place] = value
    return table.mean(axis=2)


WAYS = {"sweep": sweep, "one forward a cell": one_forward_a_cell, "batched cells": batched_cells}
"""Ways to trace by name; ours is the first."""
