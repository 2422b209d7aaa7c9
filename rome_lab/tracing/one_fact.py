"""The trace of one fact: `causal_trace`, and `restore`, which makes it from the clean and corrupted runs.

The runs are those of `rome_lab.tracing.runs`; each token is swept by `rome_lab.tracing.sweep`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np
import torch

from rome_lab.facts import Fact, continuation_ids
from rome_lab.models import (
    LanguageModel,
    check_verified,
    enough_room,
    freed_memory_kept,
    suited_attention,
    suited_products,
)
from rome_lab.tracing.corruption import Corruption
from rome_lab.tracing.runs import Runs, TraceSettings, probability, run_clean_and_corrupted
from rome_lab.tracing.sweep import Sweep, columns_of
from rome_lab.tracing.trace import KINDS, Trace


def causal_trace(
    lm: LanguageModel,
    prompt: str | Fact,
    subject: str | None = None,
    kind: str = "state",
    corruption: Corruption | None = None,
    samples: int = 10,
    window: int = 10,
    seed: int = 0,
    *,
    severed: str | None = None,
    max_rows: int | None = None,
    answer: str | None = None,
    callback: Callable[[Trace], None] | None = None,
    despite_verdict: bool = False,
) -> Trace:
    """Trace which hidden states carry a fact (B.1, B.2).

        indirect effect at (i, l) = P*,clean h(i, l)[o] - P*[o]

    Args:
        prompt: the beginning of a sentence, whose most probable next token is the answer o; or a Fact that `lm` knows,
            whose answer is the first token of its object.
        subject: the part of the prompt to corrupt; a Fact brings its own.
        kind: what to restore: "state" (one block output), "mlp" or "attn" (`window` layers of module outputs).
        corruption: `GaussianNoise()`, 3 sigma_t, by default.
        samples, window, seed: see `TraceSettings`.
        severed: "mlp" or "attn" holds that module's outputs at the restored token, above the restored layer, at
            their values in the same corrupted run (Figure 3). In models whose MLP stands beside the attention both
            read the restored state directly, so that severing one leaves the other's reading intact.
        max_rows: most texts in one call of a block; by default as many as fit in the free memory. Where memory runs
            out all the same, the batch is halved. What blocks hand on, up to L * S texts, is kept whole.
        despite_verdict: trace a model that `rl.verify` found to come out wrong.

    Returns: a Trace; `p_restored` is (T, L).

    In bfloat16 and float16 the probabilities are off by as much as `load_model` says.

    Raises:
        ValueError: bad arguments; the subject is not in the prompt; the prompt is too long; the model does not know
            the Fact; the model's weights hold NaN.
        MemoryError: the memory of the device does not suffice for a single text, or for what is kept whole.
    """
    if (kind, severed) not in KINDS.values():
        raise ValueError(
            f"causal_trace: kind={kind!r} with severed={severed!r} is not defined; expected kind 'state', 'mlp' or "
            "'attn', and severed 'mlp' or 'attn' only with kind 'state'."
        )
    if not despite_verdict:
        check_verified(lm, "causal_trace")
    runs = run_clean_and_corrupted(lm, prompt, subject, TraceSettings(corruption, samples, window, seed, max_rows))
    if answer is not None:
        runs = following(runs, continuation_ids(lm, runs.prompt.text, answer)[0])
    return restore(runs, kind, severed, callback=callback)


def following(runs: Runs, token: int) -> Runs:
    """The same runs, but the probability that is followed is that of another token."""
    return replace(runs, answer_id=token, p=probability(runs.recording.logits, token))


def trace_of_kind(runs: Runs, label: str) -> Trace:
    """The trace of one of `KINDS` that `trace_facts` keeps: severed ones at the last subject token only (Figure 3)."""
    kind, severed = KINDS[label]
    return restore(runs, kind, severed, [runs.prompt.subject_range[1] - 1] if severed else None)


@torch.no_grad()
@enough_room("causal_trace")
def restore(
    runs: Runs,
    kind: str,
    severed: str | None = None,
    tokens: Collection[int] | None = None,
    callback: Callable[[Trace], None] | None = None,
) -> Trace:
    """The restored runs of all layers at `tokens`, all tokens by default; the rows of other tokens are NaN."""
    lm, prompt, settings = runs.lm, runs.prompt, runs.settings
    begin, end = prompt.subject_range
    columns = columns_of(kind, lm.n_layers, settings.window)
    trace = Trace(
        kind=kind,
        severed=severed,
        prompt=prompt.text,
        subject=prompt.subject,
        answer=lm.tokenizer.decode([runs.answer_id]),
        tokens=prompt.tokens(lm),
        subject_range=(begin, end),
        p_clean=float(runs.p[0]),
        p_corrupted=float(runs.p[1:].mean()),
        p_restored=np.full((len(prompt.ids), lm.n_layers), np.nan),
        noise_std=runs.noise_std,
        samples=settings.samples,
        window=settings.window,
        seed=settings.seed,
    )
    with suited_attention(lm), suited_products(lm.device), freed_memory_kept():
        for token in range(len(prompt.ids)) if tokens is None else tokens:
            # Restoring a token left of the subject restores what never changed.
            swept = Sweep(runs, token, kind, severed, columns)
            trace.p_restored[token] = trace.p_corrupted if token < begin else swept.p_restored()
            if callback:
                callback(replace(trace, p_restored=trace.p_restored.copy()))
    return trace
