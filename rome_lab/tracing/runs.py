"""The clean and the corrupted runs of one prompt (B.1), recorded together.

TraceSettings                      how to trace; the paper's values by default
run_clean                          records the clean run alone
run_clean_and_corrupted            records both as `Runs`, from which `rome_lab.tracing.sweep` makes the restored runs
UnknownFactError                   the model does not complete the fact's prompt with its object
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from rome_lab.base import OneLine, check_whole
from rome_lab.facts import Fact, Prompt, continuation_ids, object_token, read_prompt
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
from rome_lab.tracing.corruption import Corruption, FixedNoise, GaussianNoise, SubjectSwap, noise_key
from rome_lab.tracing.metrics import read_metrics
from rome_lab.tracing.trace import DIRECTIONS


@dataclass(frozen=True)
class TraceSettings:
    """How to trace; the paper's values by default.

    Attributes:
        corruption: what disturbs the subject's embeddings; Gaussian noise of 3 sigma_t by default.
        samples: S, samples of the noise (a `FixedNoise` brings its own number).
        window: length of the runs of layers that "mlp" and "attn" restore: 10 is [l - 4, l + 5].
        seed: of the noise, together with the prompt.
        max_rows: most texts in one call of a block; as many as fit in the free memory by default.
        direction: "denoise" restores clean values into the corrupted runs, "noise" corrupted ones into the clean run.
        foil: what the logit difference is against; the other subject's object where the corruption is a `SubjectSwap`.
    """

    corruption: Corruption | None = None
    samples: int = 10
    window: int = 10
    seed: int = 0
    max_rows: int | None = None
    direction: str = "denoise"
    foil: str | None = None

    def __post_init__(self) -> None:
        limits = {} if self.max_rows is None else {"max_rows": (self.max_rows, 1)}
        check_whole("causal_trace", samples=(self.samples, 1), window=(self.window, 1), **limits)
        if self.corruption is None:
            object.__setattr__(self, "corruption", GaussianNoise())
        if self.direction not in DIRECTIONS:
            raise ValueError(f"causal_trace: direction is {self.direction!r}; expected 'denoise' or 'noise'.")
        if isinstance(self.corruption, FixedNoise | SubjectSwap):
            object.__setattr__(self, "samples", self.corruption.samples)
        if isinstance(self.corruption, SubjectSwap) and self.foil is None:
            object.__setattr__(self, "foil", self.corruption.object)


@dataclass(frozen=True, eq=False, repr=False)
class Runs(OneLine):
    """The clean run and the S corrupted runs of one prompt, recorded together.

    Attributes:
        recording: of 1 + S rows; row 0 is the clean run, the others are the corrupted runs.
        answer_id: the token that is followed.
        foil_id: the token that the logit difference is against, where there is one.
        noise_std: nu.
        relation: of the Fact, where it is one and has one.
    """

    lm: LanguageModel
    prompt: Prompt
    settings: TraceSettings
    recording: Recording
    answer_id: int
    foil_id: int | None
    noise_std: float
    relation: str | None = None

    @cached_property
    def together(self) -> Batching:
        """How many restored runs go through a block together; what is free is measured at the first of them."""
        return batching_of(self.lm, self.prompt, self.settings)

    @cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """Metric -> (1 + S,), read in each row."""
        return read_metrics(self.recording.logits, self.answer_id, self.foil_id)

    @property
    def base(self) -> torch.Tensor:
        """(S,) the row that each sample restores into."""
        rows = torch.arange(1, 1 + self.settings.samples)
        return torch.zeros_like(rows) if self.settings.direction == "noise" else rows

    @property
    def source(self) -> torch.Tensor:
        """(S,) the row that what is restored comes from."""
        rows = torch.arange(1, 1 + self.settings.samples)
        return rows if self.settings.direction == "noise" else torch.zeros_like(rows)


def batching_of(lm: LanguageModel, prompt: Prompt, settings: TraceSettings) -> Batching:
    """How many copies of the prompt go through the model together."""
    return Batching(lm, "causal_trace", text_bytes(lm, len(prompt.ids)), settings.max_rows)


class UnknownFactError(ValueError):
    """The model does not complete the fact's prompt with its object."""


@enough_room("causal_trace")
def run_clean_and_corrupted(
    lm: LanguageModel,
    prompt: str | Fact | Prompt,
    subject: str | None,
    settings: TraceSettings,
    answer: str | None = None,
    with_heads: bool = False,
) -> Runs:
    """Record the clean run and the S corrupted runs, together where they fit.

    Args:
        answer: what to follow, whatever the model says; by default what it says, which has to be a Fact's object.
        with_heads: record what restoring heads needs, too.

    Raises: see `rome_lab.causal_trace`.
    """
    read = prompt if isinstance(prompt, Prompt) else read_prompt(lm, prompt, subject)
    begin, end = read.subject_range
    settings = replace(settings, corruption=settings.corruption.measured(lm))
    ids = read.ids.expand(1 + settings.samples, -1)
    if isinstance(settings.corruption, SubjectSwap):
        ids, noise = torch.stack([read.ids, settings.corruption.swapped_ids(lm, read)]), None
    else:
        shape = (settings.samples, end - begin, lm.embedding.weight.shape[1])
        noise = settings.corruption.noise(lm, shape, noise_key(settings.seed, read.text, read.subject_range))
        noise = torch.cat([torch.zeros_like(noise[:1]), noise])  # (1 + S, subject tokens, D)

    def record_part(rows: range) -> Recording:
        def corrupt(embedded: torch.Tensor) -> torch.Tensor | None:
            if noise is None:
                return None
            embedded = embedded.clone()
            embedded[:, begin:end] += noise[rows.start : rows.stop].to(embedded)
            return embedded

        return record_run(lm, ids[rows.start : rows.stop], corrupt, with_heads)

    together = batching_of(lm, read, settings)
    with suited_attention(lm), suited_products(lm.device), freed_memory_kept():
        recording = joined(list(together.over(range(len(ids)), record_part)))
    lm.check_finite(recording.logits, "causal_trace")
    with suited_attention(lm):
        check_recording(lm, recording, "causal_trace")
    answer_id = followed(lm, prompt, read, recording.logits[0], answer)
    foil_id = None if settings.foil is None else foil_token(lm, read.text, settings.foil, answer_id)
    relation = prompt.relation if isinstance(prompt, Fact) else None
    return Runs(lm, read, settings, recording, answer_id, foil_id, settings.corruption.std(lm), relation)


@dataclass(frozen=True, eq=False, repr=False)
class CleanRun(OneLine):
    """The clean run of one prompt by itself.

    Attributes:
        recording: of one row.
        answer_id: the token that is followed.
    """

    lm: LanguageModel
    prompt: Prompt
    recording: Recording
    answer_id: int


def run_clean(
    lm: LanguageModel, prompt: str | Fact, read: Prompt, answer: str | None = None, doing: str = "run_clean"
) -> CleanRun:
    """Record the clean run alone.

    Args: read: the prompt as it was read. answer: as of `run_clean_and_corrupted`.

    Raises: see `rome_lab.causal_trace`.
    """
    with suited_attention(lm), suited_products(lm.device):
        recording = record_run(lm, read.ids[None], lambda embedded: None)
        lm.check_finite(recording.logits, doing)
        check_recording(lm, recording, doing)
    return CleanRun(lm, read, recording, followed(lm, prompt, read, recording.logits[0], answer))


def followed(
    lm: LanguageModel, prompt: str | Fact | Prompt, read: Prompt, logits: torch.Tensor, answer: str | None
) -> int:
    """The token to follow: the answer's first one; or what the model says by its logits, which has to be a Fact's object."""
    if answer is not None:
        return continuation_ids(lm, read.text, answer)[0]
    return known_answer(lm, prompt, logits) if isinstance(prompt, Fact) else int(logits.argmax())


def check_tokens(doing: str, prompt: Prompt, tokens: Iterable[int]) -> None:
    """Raise a ValueError where the prompt has no such tokens."""
    length = len(prompt.ids)
    if outside := [token for token in tokens if not 0 <= token < length]:
        raise ValueError(f"{doing}: there is no token {outside[0]}; the prompt has {length}, counted from 0.")


def foil_token(lm: LanguageModel, prompt: str, foil: str, answer_id: int) -> int:
    """The first token of a foil; a ValueError where it is the answer's own."""
    foil_id = continuation_ids(lm, prompt, foil)[0]
    if foil_id == answer_id:
        raise ValueError(
            f"causal_trace: the foil {foil!r} begins with the same token as the answer, "
            f"{lm.tokenizer.decode([answer_id])!r}, so that their logits cannot differ; give another foil."
        )
    return foil_id


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
