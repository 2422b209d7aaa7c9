"""The trace of one fact: `causal_trace`, and `restore`, which makes it from the clean and corrupted runs.

The runs are those of `rome_lab.tracing.runs`; each token is swept by `rome_lab.tracing.sweep`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
import torch

from rome_lab.base import check_whole
from rome_lab.facts import Fact
from rome_lab.models import (
    LanguageModel,
    check_verified,
    enough_room,
    freed_memory_kept,
    suited_attention,
    suited_products,
)
from rome_lab.tracing.corruption import Corruption, SubjectSwap
from rome_lab.tracing.metrics import Readings, check_metric
from rome_lab.tracing.runs import Runs, TraceSettings, check_tokens, run_clean_and_corrupted
from rome_lab.tracing.sweep import Sweep, column_of_heads, columns_of
from rome_lab.tracing.trace import HEAD, KINDS, Trace


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
    metric: str = "probability",
    direction: str = "denoise",
    severed: str | None = None,
    token: int | None = None,
    max_rows: int | None = None,
    answer: str | None = None,
    foil: str | None = None,
    callback: Callable[[Trace], None] | None = None,
    despite_verdict: bool = False,
) -> Trace:
    """Trace which hidden states carry a fact (B.1, B.2).

        indirect effect at (i, l) = P*,clean h(i, l)[o] - P*[o]

    Args:
        prompt: the beginning of a sentence, whose most probable next token is the answer o; or a Fact that `lm` knows,
            whose answer is the first token of its object.
        subject: the part of the prompt to corrupt; a Fact brings its own.
        kind: what to restore: "state" (one block output), "mlp" or "attn" (`window` layers of module outputs), or "head"
            (one head's part of one attention's output, at one token: its slice of what the attention's last matrix is
            given).
        corruption: `GaussianNoise()`, 3 sigma_t, by default; or `SubjectSwap(subject, object)`.
        samples, window, seed, direction, foil: see `TraceSettings`; a swap has one sample.
        metric: of `TRACE_METRICS`, what `effect` is in; all that are defined are read and kept.
        severed: "mlp" or "attn" holds that module's outputs at the restored token, above the restored layer, at
            their values in the same corrupted run (Figure 3), or clean run where the direction is "noise". In models whose
            MLP stands beside the attention both read the restored state directly, so that severing one leaves the other's
            reading intact.
        token: where heads are restored, the last one by default.
        max_rows: most texts in one call of a block; by default as many as fit in the free memory. Where memory runs
            out all the same, the batch is halved. What blocks hand on, up to L * S texts, is kept whole.
        answer: what the answer is, instead of what the model says.
        despite_verdict: trace a model that `rl.verify` found to come out wrong.

    Returns: a Trace; `p_restored` and `effect` are (T, L), or (L, heads).

    In bfloat16 and float16 the probabilities are off by as much as `load_model` says.

    Raises:
        ValueError: bad arguments; the subject is not in the prompt; the prompt is too long; the model does not know
            the Fact; the model's weights hold NaN; another subject of other length; a foil that begins as the answer does,
            or a logit difference without one; a model whose heads cannot be told apart.
        MemoryError: the memory of the device does not suffice for a single text, or for what is kept whole.
    """
    if (kind, severed) not in (*KINDS.values(), (HEAD, None)):
        raise ValueError(
            f"causal_trace: kind={kind!r} with severed={severed!r} is not defined; expected kind 'state', 'mlp', "
            "'attn' or 'head', and severed 'mlp' or 'attn' only with kind 'state'."
        )
    if token is not None and kind != HEAD:
        raise ValueError(f"causal_trace: a token is chosen for heads only; kind {kind!r} restores every token.")
    if token is not None:
        check_whole("causal_trace", token=(token, 0))
    if not despite_verdict:
        check_verified(lm, "causal_trace")
    settings = TraceSettings(corruption, samples, window, seed, max_rows, direction, foil)
    check_metric("causal_trace", metric, settings.foil)
    runs = run_clean_and_corrupted(lm, prompt, subject, settings, answer, kind == HEAD)
    return restore(runs, kind, severed, None if token is None else [token], callback).by(metric)


def trace_of_kind(runs: Runs, label: str) -> Trace:
    """The trace of a label that `trace_facts` keeps: severed ones at the last subject token only (Figure 3)."""
    kind, severed = KINDS.get(label, (label, None))
    return restore(runs, kind, severed, [runs.prompt.subject_range[1] - 1] if severed else None)


@torch.no_grad()
@enough_room("causal_trace")
def restore(
    runs: Runs,
    kind: str,
    severed: str | None = None,
    tokens: Sequence[int] | None = None,
    callback: Callable[[Trace], None] | None = None,
) -> Trace:
    """The restored runs of all layers at `tokens`, all tokens by default; the rows of other tokens are NaN.

    Heads are restored at one token, by default the last.
    """
    lm, prompt, settings = runs.lm, runs.prompt, runs.settings
    begin, end = prompt.subject_range
    heads = heads_of(runs) if kind == HEAD else 0
    columns = columns_of(kind, lm.n_layers, settings.window, heads)
    if tokens is None:
        tokens = [len(prompt.ids) - 1] if heads else range(len(prompt.ids))
    check_tokens("causal_trace", prompt, tokens)
    shape = (lm.n_layers, heads) if heads else (len(prompt.ids), lm.n_layers)
    readings = {
        metric: Readings(float(p[0]), float(p[1:].mean()), np.full(shape, np.nan), np.full(shape, np.nan))
        for metric, p in runs.metrics.items()
    }
    of_p = readings.pop("probability")
    trace = Trace(
        kind=kind,
        severed=severed,
        prompt=prompt.text,
        subject=prompt.subject,
        answer=lm.tokenizer.decode([runs.answer_id]),
        tokens=prompt.tokens(lm),
        subject_range=(begin, end),
        p_clean=of_p.clean,
        p_corrupted=of_p.corrupted,
        p_restored=of_p.restored,
        noise_std=runs.noise_std,
        samples=settings.samples,
        window=settings.window,
        seed=settings.seed,
        direction=settings.direction,
        foil=None if runs.foil_id is None else lm.tokenizer.decode([runs.foil_id]),
        swapped=settings.corruption.subject if isinstance(settings.corruption, SubjectSwap) else None,
        token=tokens[0] if heads else None,
        relation=runs.relation,
        p_variance=of_p.variance,
        further=readings,
    )
    with suited_attention(lm), suited_products(lm.device), freed_memory_kept():
        for token in tokens:
            # Restoring a token left of the subject restores what never changed.
            swept = Sweep(runs, token, kind, severed, columns).metrics() if token >= begin else None
            for metric in runs.metrics:
                part = trace.read(metric)
                at_base = runs.metrics[metric][runs.base.numpy()]  # (S,)
                place = ... if heads else token
                values = np.full((len(columns), settings.samples), at_base) if swept is None else swept[metric]
                mean = (
                    np.full(len(columns), replace(trace, metric=metric).base) if swept is None else values.mean(axis=1)
                )
                part.restored[place] = mean.reshape(part.restored[place].shape)
                if settings.samples > 1:
                    spread = (values - at_base).var(axis=1, ddof=1)
                    part.variance[place] = spread.reshape(part.variance[place].shape)
            if callback:
                callback(copy_of(trace))
    return trace


@torch.no_grad()
@enough_room("restore_heads")
def restore_heads(
    runs: Runs, sets: Sequence[Collection[tuple[int, int]]], token: int | None = None
) -> dict[str, np.ndarray]:
    """Restore several heads at once: metric -> (sets,), means over the samples.

    Args:
        sets: of heads, each (layer, head); none of them empty.
        token: where, the last one by default.

    Raises: ValueError: there is no such head or token, or heads cannot be told apart.
    """
    heads = heads_of(runs)
    for layer, head in {place for places in sets for place in places}:
        if not (0 <= layer < runs.lm.n_layers and 0 <= head < heads):
            raise ValueError(
                f"restore_heads: no head {head} in layer {layer}; there are {heads} in each of {runs.lm.n_layers} layers."
            )
    if not all(len(places) for places in sets):
        raise ValueError("restore_heads: one of the sets is empty; what it would restore is the base run itself.")
    token = len(runs.prompt.ids) - 1 if token is None else token
    check_tokens("restore_heads", runs.prompt, [token])
    with suited_attention(runs.lm), suited_products(runs.lm.device), freed_memory_kept():
        swept = Sweep(runs, token, HEAD, None, [column_of_heads(places) for places in sets]).metrics()
    return {metric: values.mean(axis=1) for metric, values in swept.items()}


def copy_of(trace: Trace) -> Trace:
    """The trace as it is now, while more is being restored."""
    further = {x: replace(y, restored=y.restored.copy(), variance=y.variance.copy()) for x, y in trace.further.items()}
    arrays = {name: getattr(trace, name).copy() for name in ("p_restored", "p_variance")}
    return replace(trace, **arrays, further=further)


def heads_of(runs: Runs) -> int:
    """Number of heads of each layer.

    Raises: ValueError: they were not recorded, cannot be told apart, or are not as many in every layer.
    """
    if not runs.recording.heads and runs.lm.heads_out:
        raise ValueError(
            "causal_trace: heads were not recorded; run_clean_and_corrupted(..., with_heads=True) does it."
        )
    numbers = {x.shape[2] for x in runs.recording.heads}
    if len(numbers) != 1:
        raise ValueError(
            f"causal_trace: the heads of {runs.lm.name} cannot be told apart: what its attention's last matrix is given "
            "is not one head's values after the other's, in as many heads in every layer; restore kind 'attn' instead."
        )
    return numbers.pop()
