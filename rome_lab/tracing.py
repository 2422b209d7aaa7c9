"""Causal tracing (B.1, B.2): clean, corrupted and corrupted-with-restoration runs of one prompt.

The naive way runs the whole model once for every (token, layer). But nothing before the restored layer and no token
left of the restored one depends on the restoration. So the layers are swept once for each token: at every layer the
texts that restore there join the batch, holding only the tokens from the restored one on, and all texts that have
joined go through the next block together. This is exact: the arithmetic that is left out would give what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import torch

from rome_lab.blocks import Recording, at_least_float32, output_changed, record, run_block
from rome_lab.corruption import Corruption, FixedNoise, GaussianNoise, noise_key
from rome_lab.facts import Fact
from rome_lab.memory import rows_that_fit
from rome_lab.models import LanguageModel
from rome_lab.prompts import Prompt, continuation_ids, read_prompt
from rome_lab.trace import KINDS, Trace

NUMERICS = 1  # raised when a change here moves any number, so that stored traces are made again


@dataclass(frozen=True)
class Settings:
    """How to trace; the paper's values by default.

    Attributes:
        corruption: what disturbs the subject's embeddings; Gaussian noise of 3 sigma_t by default.
        samples: S, samples of the noise (a `FixedNoise` brings its own number).
        window: length of the runs of layers that "mlp" and "attn" restore: 10 is [l - 4, l + 5].
        seed: of the noise, together with the prompt.
        max_rows: most texts in one call of a block; derived from the free memory by default.
    """

    corruption: Corruption | None = None
    samples: int = 10
    window: int = 10
    seed: int = 0
    max_rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "window", "max_rows"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"causal_trace: {name} is {value!r}; expected a whole number of at least 1.")
        if self.corruption is None:
            object.__setattr__(self, "corruption", GaussianNoise())
        if isinstance(self.corruption, FixedNoise):
            object.__setattr__(self, "samples", self.corruption.samples)


@dataclass(frozen=True, eq=False)
class Runs:
    """The clean run and the S corrupted runs of one prompt, recorded together.

    Attributes:
        recording: of 1 + S rows; row 0 is the clean run, the others are the corrupted runs.
        answer_id: the token whose probability is followed.
        p: (1 + S,) its probability in each row.
        noise_std: nu.
    """

    lm: LanguageModel
    prompt: Prompt
    settings: Settings
    recording: Recording
    answer_id: int
    p: np.ndarray
    noise_std: float


class UnknownFactError(ValueError):
    """The model does not complete the fact's prompt with its object."""


@dataclass(frozen=True)
class Column:
    """One column of the result: the layers `first`..`last` are restored, and `depth` blocks are as in the corrupted run."""

    depth: int
    first: int
    last: int


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
) -> Trace:
    """Trace which hidden states carry a fact (B.1, B.2).

        indirect effect at (i, l) = P*,clean h(i, l)[o] - P*[o]

    Args:
        prompt: the beginning of a sentence, whose most probable next token is the answer o; or a Fact that `lm` knows,
            whose answer is the first token of its object.
        subject: the part of the prompt to corrupt; a Fact brings its own.
        kind: what to restore: "state" (one block output), "mlp" or "attn" (`window` layers of module outputs).
        corruption: `GaussianNoise()`, 3 sigma_t, by default.
        samples, window, seed: see `Settings`.
        severed: "mlp" or "attn" holds that module's outputs at the restored token, above the restored layer, at
            their values in the same corrupted run (Figure 3). In models whose MLP stands beside the attention both
            read the restored state directly, so that severing one leaves the other's reading intact.
        max_rows: most texts in one call of a block, though never fewer than the S of one cell; by default as many as
            fit in the free memory.

    Returns: a Trace; `p_restored` is (T, L).

    Raises:
        ValueError: bad arguments; the subject is not in the prompt; the prompt is too long; the model does not know
            the Fact; the model's weights hold NaN.
    """
    if (kind, severed) not in KINDS.values():
        raise ValueError(
            f"causal_trace: kind={kind!r} with severed={severed!r} is not defined; expected kind 'state', 'mlp' or "
            "'attn', and severed 'mlp' or 'attn' only with kind 'state'."
        )
    runs = run_clean_and_corrupted(lm, prompt, subject, Settings(corruption, samples, window, seed, max_rows))
    return restore(runs, kind, severed)


def run_clean_and_corrupted(lm: LanguageModel, prompt: str | Fact, subject: str | None, settings: Settings) -> Runs:
    """Record the clean run and the S corrupted runs, all in one batch."""
    read = read_prompt(lm, prompt, subject)
    begin, end = read.subject_range
    settings = replace(settings, corruption=settings.corruption.measured(lm))
    shape = (settings.samples, end - begin, lm.embedding.weight.shape[1])
    noise = settings.corruption.noise(lm, shape, noise_key(settings.seed, read.text, read.subject_range))

    def corrupt(embedded: torch.Tensor) -> torch.Tensor:
        embedded = embedded.clone()
        embedded[1:, begin:end] += noise.to(embedded)
        return embedded

    recording = record(lm, read.ids.expand(1 + settings.samples, -1), corrupt)
    lm.check_finite(recording.logits, "causal_trace")
    check_readout(lm, recording)
    answer_id = known_answer(lm, prompt, recording.logits[0]) if isinstance(prompt, Fact) else None
    answer_id = int(recording.logits[0].argmax()) if answer_id is None else answer_id
    p = probability(recording.logits, answer_id)
    return Runs(lm, read, settings, recording, answer_id, p, settings.corruption.std(lm))


@torch.no_grad()
def restore(runs: Runs, kind: str, severed: str | None = None, tokens: Collection[int] | None = None) -> Trace:
    """The restored runs of all layers at `tokens`, all tokens by default; the rows of other tokens are NaN."""
    lm, prompt, settings = runs.lm, runs.prompt, runs.settings
    begin, end = prompt.subject_range
    p_corrupted = float(runs.p[1:].mean())
    p_restored = np.full((len(prompt.ids), lm.n_layers), np.nan)
    for token in range(len(prompt.ids)) if tokens is None else tokens:
        # Restoring a token left of the subject restores what never changed.
        p_restored[token] = p_corrupted if token < begin else sweep_layers(runs, token, kind, severed)
    return Trace(
        kind=kind,
        severed=severed,
        prompt=prompt.text,
        subject=prompt.subject,
        answer=lm.tokenizer.decode([runs.answer_id]),
        tokens=prompt.tokens(lm),
        subject_range=(begin, end),
        p_clean=float(runs.p[0]),
        p_corrupted=p_corrupted,
        p_restored=p_restored,
        noise_std=runs.noise_std,
        samples=settings.samples,
        window=settings.window,
        seed=settings.seed,
    )


def sweep_layers(runs: Runs, token: int, kind: str, severed: str | None) -> np.ndarray:
    """(L,) probabilities of the answer with `token` restored at each layer: one sweep through the blocks."""
    lm, recording, samples = runs.lm, runs.recording, runs.settings.samples
    columns = columns_of(kind, lm.n_layers, runs.settings.window)
    length, width = recording.states[0].shape[1] - token, recording.states[0].shape[2]
    most = runs.settings.max_rows or rows_that_fit(lm, recording.states[0].shape[1])
    step = max(1, most // samples)
    active = recording.states[0].new_empty(0, samples, length, width)  # (C, S, N, D), a column at a time
    for depth in range(lm.n_layers + 1):
        joining = sum(column.depth == depth for column in columns)
        entering = recording.states[depth][1:, token:].repeat(joining, 1, 1, 1)
        if kind == "state":
            entering[:, :, 0] = recording.states[depth][0, token]
        active = torch.cat([active, entering])
        if depth == lm.n_layers:
            break
        for begin in range(0, len(active), step):
            part = slice(begin, min(begin + step, len(active)))
            with ExitStack() as held:
                for module, change in held_outputs(runs, token, depth, kind, severed, columns[part]):
                    held.enter_context(output_changed(module, change))
                active[part] = run_block(lm, depth, active[part], recording, slice(1, None))
    return read_out(runs, active[:, :, -1], step)


def columns_of(kind: str, n_layers: int, window: int) -> list[Column]:
    """The L columns of one kind, in the order in which they depart from the corrupted run."""
    if kind == "state":
        return [Column(layer + 1, layer, layer) for layer in range(n_layers)]
    # Differs: the authors' published code restores [l - 5, l + 4]; this is the paper's [l - 4, l + 5] (B.2).
    runs = [(max(0, x - (window - 1) // 2), min(n_layers - 1, x + window // 2)) for x in range(n_layers)]
    return [Column(first, first, last) for first, last in runs]


def held_outputs(
    runs: Runs, token: int, layer: int, kind: str, severed: str | None, columns: list[Column]
) -> list[tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]]:
    """Modules of `layer` whose output at `token` is held, each with the change that holds it."""
    name = severed if kind == "state" else kind
    if name is None:
        return []
    outputs = (runs.recording.mlp if name == "mlp" else runs.recording.attn)[layer]
    # Severed: each sample's own corrupted value (S, D). Restored: the clean value (D,).
    value = outputs[1:, token] if severed else outputs[0, token]
    covered = torch.tensor([bool(severed) or c.first <= layer <= c.last for c in columns], device=value.device)

    def hold(output: torch.Tensor) -> torch.Tensor:
        output.view(len(columns), runs.settings.samples, -1, output.shape[-1])[covered, :, 0] = value
        return output

    module = runs.lm.mlp(layer) if name == "mlp" else runs.lm.attn(layer)
    return [(module, hold)] if covered.any() else []


def read_out(runs: Runs, last: torch.Tensor, step: int) -> np.ndarray:
    """(C,) mean over the samples of the answer's probability, from the last token's states (C, S, D)."""
    parts = [
        probability(at_least_float32(runs.lm.logits(last[begin : begin + step])), runs.answer_id).mean(axis=1)
        for begin in range(0, len(last), step)
    ]
    return np.concatenate(parts)


def probability(logits: torch.Tensor, token_id: int) -> np.ndarray:
    """(...) float64: softmax over the last axis of `logits`, at one token."""
    return (logits[..., token_id] - logits.logsumexp(-1)).exp().cpu().double().numpy()


@torch.no_grad()
def check_readout(lm: LanguageModel, recording: Recording) -> None:
    """Raise where `lm.logits` of the last states is not what the model's own forward gave."""
    ours = at_least_float32(lm.logits(recording.states[-1][:, -1])).softmax(-1)
    error = float((ours - recording.logits.softmax(-1)).abs().max())
    if error > (1e-4 if lm.dtype in (torch.float32, torch.float64) else 5e-2):
        raise ValueError(
            f"causal_trace: {lm.name} does something between its last block and its logits that rome_lab does not know "
            f"(probabilities differ by {error:.1e}); complete LanguageModel.logits for this family."
        )


def known_answer(lm: LanguageModel, fact: Fact, logits: torch.Tensor) -> int:
    """First token of the fact's object; an UnknownFactError where the model would say something else."""
    wanted, said = continuation_ids(lm, fact.prompt, fact.object)[0], int(logits.argmax())
    if wanted != said:
        p = logits.softmax(-1)
        raise UnknownFactError(
            f"causal_trace: {lm.name} does not know this fact: it continues {fact.prompt!r} with "
            f"{lm.tokenizer.decode([said])!r} (p {p[said]:.3f}), not {lm.tokenizer.decode([wanted])!r} "
            f"(p {p[wanted]:.3f}). Choose one of known_facts(lm, facts), or trace what it does say: "
            "causal_trace(lm, fact.prompt, fact.subject)."
        )
    return wanted
