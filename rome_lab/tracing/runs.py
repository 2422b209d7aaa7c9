"""The clean and the corrupted runs of one prompt (B.1), recorded together.

TraceSettings                      how to trace; the paper's values by default
run_clean_and_corrupted            records both as `Runs`, from which `rome_lab.tracing.sweep` makes the restored runs
UnknownFactError                   the model does not complete the fact's prompt with its object
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from rome_lab.base import OneLine, check_whole
from rome_lab.facts import Fact, Prompt, object_token, read_prompt
from rome_lab.models import (
    Batching,
    LanguageModel,
    Recording,
    check_recording,
    enough_room,
    freed_memory_kept,
    joined,
    record_run,
    suited_attention,
    suited_products,
    text_bytes,
)
from rome_lab.tracing.corruption import Corruption, FixedNoise, GaussianNoise, noise_key


def probability(logits: torch.Tensor, token_id: int) -> np.ndarray:
    """(...) float64: softmax over the last axis of `logits`, at one token."""
    return (logits[..., token_id] - logits.logsumexp(-1)).exp().cpu().double().numpy()


@dataclass(frozen=True)
class TraceSettings:
    """How to trace; the paper's values by default.

    Attributes:
        corruption: what disturbs the subject's embeddings; Gaussian noise of 3 sigma_t by default.
        samples: S, samples of the noise (a `FixedNoise` brings its own number).
        window: length of the runs of layers that "mlp" and "attn" restore: 10 is [l - 4, l + 5].
        seed: of the noise, together with the prompt.
        max_rows: most texts in one call of a block; as many as fit in the free memory by default.
    """

    corruption: Corruption | None = None
    samples: int = 10
    window: int = 10
    seed: int = 0
    max_rows: int | None = None

    def __post_init__(self) -> None:
        limits = {} if self.max_rows is None else {"max_rows": (self.max_rows, 1)}
        check_whole("causal_trace", samples=(self.samples, 1), window=(self.window, 1), **limits)
        if self.corruption is None:
            object.__setattr__(self, "corruption", GaussianNoise())
        if isinstance(self.corruption, FixedNoise):
            object.__setattr__(self, "samples", self.corruption.samples)


@dataclass(frozen=True, eq=False, repr=False)
class Runs(OneLine):
    """The clean run and the S corrupted runs of one prompt, recorded together.

    Attributes:
        recording: of 1 + S rows; row 0 is the clean run, the others are the corrupted runs.
        answer_id: the token whose probability is followed.
        p: (1 + S,) its probability in each row.
        noise_std: nu.
    """

    lm: LanguageModel
    prompt: Prompt
    settings: TraceSettings
    recording: Recording
    answer_id: int
    p: np.ndarray
    noise_std: float


class UnknownFactError(ValueError):
    """The model does not complete the fact's prompt with its object."""


@enough_room("causal_trace")
def run_clean_and_corrupted(
    lm: LanguageModel, prompt: str | Fact | Prompt, subject: str | None, settings: TraceSettings
) -> Runs:
    """Record the clean run and the S corrupted runs, together where they fit."""
    read = prompt if isinstance(prompt, Prompt) else read_prompt(lm, prompt, subject)
    begin, end = read.subject_range
    settings = replace(settings, corruption=settings.corruption.measured(lm))
    shape = (settings.samples, end - begin, lm.embedding.weight.shape[1])
    noise = settings.corruption.noise(lm, shape, noise_key(settings.seed, read.text, read.subject_range))
    noise = torch.cat([torch.zeros_like(noise[:1]), noise])  # (1 + S, subject tokens, D)

    def record_part(rows: range) -> Recording:
        def corrupt(embedded: torch.Tensor) -> torch.Tensor:
            embedded = embedded.clone()
            embedded[:, begin:end] += noise[rows.start : rows.stop].to(embedded)
            return embedded

        return record_run(lm, read.ids.expand(len(rows), -1), corrupt)

    together = Batching(lm, "causal_trace", text_bytes(lm, len(read.ids)), settings.max_rows)
    with suited_attention(lm), suited_products(lm.device), freed_memory_kept():
        recording = joined(list(together.over(range(len(noise)), record_part)))
    lm.check_finite(recording.logits, "causal_trace")
    with suited_attention(lm):
        check_recording(lm, recording, "causal_trace")
    answer_id = known_answer(lm, prompt, recording.logits[0]) if isinstance(prompt, Fact) else None
    answer_id = int(recording.logits[0].argmax()) if answer_id is None else answer_id
    p = probability(recording.logits, answer_id)
    return Runs(lm, read, settings, recording, answer_id, p, settings.corruption.std(lm))


def known_answer(lm: LanguageModel, fact: Fact, logits: torch.Tensor) -> int:
    """First token of the fact's object; an UnknownFactError where the model would say something else."""
    object_id, answer_id = object_token(lm, fact), int(logits.argmax())
    if object_id != answer_id:
        p = logits.softmax(-1)
        raise UnknownFactError(
            f"causal_trace: {lm.name} does not know this fact: it continues {fact.prompt!r} with "
            f"{lm.tokenizer.decode([answer_id])!r} (p {p[answer_id]:.3f}), not {lm.tokenizer.decode([object_id])!r} "
            f"(p {p[object_id]:.3f}). Choose one of known_facts(lm, facts), or trace what it does say: "
            "causal_trace(lm, fact.prompt, fact.subject)."
        )
    return object_id
