"""Causal tracing (B.1, B.2): clean, corrupted and corrupted-with-restoration runs of one prompt.

The naive way runs the whole model once for every (token, layer). But nothing before the restored layer and no token
left of the restored one depends on the restoration. So the layers are swept once for each token: at every layer the
texts that restore there join the batch, holding only the tokens from the restored one on, and all texts that have
joined go through the next block together. In the last block only the last token goes through the MLP. This is exact:
the arithmetic that is left out would give what is kept, or what nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from rome_lab.attention import suited_attention
from rome_lab.blocks import Recording, at_least_float32, joined, last_token_only, output_changed, record, run_block
from rome_lab.corruption import Corruption, FixedNoise, GaussianNoise, noise_key
from rome_lab.facts import Fact
from rome_lab.memory import Batching, enough_memory, text_bytes
from rome_lab.models import LanguageModel
from rome_lab.prompts import Prompt, continuation_ids, read_prompt
from rome_lab.trace import KINDS, Trace

NUMERICS = 2  # raised when a change here moves any number, so that stored traces are made again

READ_TOGETHER = 80  # texts whose logits are made at once: those of more do not stay in a processor's cache


@dataclass(frozen=True)
class Settings:
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
        max_rows: most texts in one call of a block; by default as many as fit in the free memory. Where memory runs
            out all the same, the batch is halved. What blocks hand on, up to L * S texts, is kept whole.

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
    runs = run_clean_and_corrupted(lm, prompt, subject, Settings(corruption, samples, window, seed, max_rows))
    return restore(runs, kind, severed)


@enough_memory("causal_trace")
def run_clean_and_corrupted(lm: LanguageModel, prompt: str | Fact, subject: str | None, settings: Settings) -> Runs:
    """Record the clean run and the S corrupted runs, together where they fit."""
    read = read_prompt(lm, prompt, subject)
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

        return record(lm, read.ids.expand(len(rows), -1), corrupt)

    together = Batching(lm, "causal_trace", text_bytes(lm, len(read.ids)), settings.max_rows)
    with suited_attention(lm):
        recording = joined(list(together.over(range(len(noise)), record_part)))
    lm.check_finite(recording.logits, "causal_trace")
    check_readout(lm, recording)
    answer_id = known_answer(lm, prompt, recording.logits[0]) if isinstance(prompt, Fact) else None
    answer_id = int(recording.logits[0].argmax()) if answer_id is None else answer_id
    p = probability(recording.logits, answer_id)
    return Runs(lm, read, settings, recording, answer_id, p, settings.corruption.std(lm))


@torch.no_grad()
@enough_memory("causal_trace")
def restore(runs: Runs, kind: str, severed: str | None = None, tokens: Collection[int] | None = None) -> Trace:
    """The restored runs of all layers at `tokens`, all tokens by default; the rows of other tokens are NaN."""
    lm, prompt, settings = runs.lm, runs.prompt, runs.settings
    begin, end = prompt.subject_range
    p_corrupted = float(runs.p[1:].mean())
    columns = columns_of(kind, lm.n_layers, settings.window)
    p_restored = np.full((len(prompt.ids), lm.n_layers), np.nan)
    with suited_attention(lm):
        for token in range(len(prompt.ids)) if tokens is None else tokens:
            # Restoring a token left of the subject restores what never changed.
            swept = Sweep(runs, token, kind, severed, columns)
            p_restored[token] = p_corrupted if token < begin else swept.p_restored()
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


def columns_of(kind: str, n_layers: int, window: int) -> list[Column]:
    """The L columns of one kind, in the order in which they depart from the corrupted run."""
    if kind == "state":
        return [Column(layer + 1, layer, layer) for layer in range(n_layers)]
    # Differs: the authors' published code restores [l - 5, l + 4]; this is the paper's [l - 4, l + 5] (B.2).
    runs = [(max(0, x - (window - 1) // 2), min(n_layers - 1, x + window // 2)) for x in range(n_layers)]
    return [Column(first, first, last) for first, last in runs]


@dataclass(frozen=True, eq=False)
class Sweep:
    """The restored runs of one token at all layers: one sweep through the blocks.

    Attributes:
        columns: what is restored, in the order in which it departs from the corrupted run.
    """

    runs: Runs
    token: int
    kind: str
    severed: str | None
    columns: list[Column]

    @property
    def stays_clean(self) -> bool:
        """Whether all that follows at the restored token is as in the clean run: nothing left of it is corrupted."""
        begin, length = self.runs.prompt.subject_range[0], len(self.runs.prompt.ids)
        return self.kind == "state" and not self.severed and self.token == begin and begin + 1 < length

    def p_restored(self) -> np.ndarray:
        """(L,) mean over the samples of the answer's probability."""
        runs, states, samples = self.runs, self.runs.recording.states, self.runs.settings.samples
        together = Batching(runs.lm, "causal_trace", text_bytes(runs.lm, len(runs.prompt.ids)), runs.settings.max_rows)
        first = self.token + self.stays_clean
        # (C, S, N, D): the S texts of each column, in the order in which the columns join.
        active = states[0].new_empty(len(self.columns), samples, *states[0][0, first:].shape)
        joined = 0
        for depth in range(runs.lm.n_layers + 1):
            active = active.to(states[depth].device)
            joining = slice(joined, joined + sum(column.depth == depth for column in self.columns))
            active[joining] = states[depth][1:, first:]
            if self.kind == "state" and not self.stays_clean:
                active[joining, :, 0] = states[depth][0, self.token]
            joined = joining.stop
            if depth < runs.lm.n_layers:
                texts = active[:joined].flatten(0, 1)
                list(together.over(range(len(texts)), partial(self.run_block, depth, texts)))
        together.most = min(READ_TOGETHER, together.most or READ_TOGETHER)
        parts = together.over(active[:, :, -1].flatten(0, 1), lambda last: at_least_float32(runs.lm.logits(last)))
        p = np.concatenate([probability(logits, runs.answer_id) for logits in parts])
        return p.reshape(-1, samples).mean(axis=1)

    def run_block(self, layer: int, texts: torch.Tensor, rows: range) -> None:
        """Put what block `layer` makes of some of the texts, of (C * S, N, D), in their place."""
        lm, part = self.runs.lm, slice(rows.start, rows.stop)
        continued = 1 + torch.arange(rows.start, rows.stop, device=texts.device) % self.runs.settings.samples
        if self.stays_clean:
            continued = torch.zeros_like(continued)  # the row of the clean run
        with ExitStack() as hooks:
            if layer == lm.n_layers - 1 and texts.shape[1] > 1:
                # Nothing reads the other tokens, what is held at the restored one among them.
                hooks.enter_context(last_token_only(lm.feed_forward(layer)))
            else:
                for module, change in self.held_outputs(layer, rows, continued):
                    hooks.enter_context(output_changed(module, change))
            texts[part] = run_block(lm, layer, texts[part], self.runs.recording, continued)

    def held_outputs(
        self, layer: int, rows: range, continued: torch.Tensor
    ) -> list[tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]]:
        """Modules of `layer` whose output at the token is held, each with the change that holds it."""
        name = self.severed or self.kind
        if name == "state":
            return []
        # Runs of layers end in the order in which they begin, so the texts whose run covers the layer stand last.
        covering = 0 if self.severed else next(i for i, column in enumerate(self.columns) if column.last >= layer)
        begin = max(0, covering * self.runs.settings.samples - rows.start)
        if begin >= len(rows):
            return []
        lm, recording = self.runs.lm, self.runs.recording
        outputs = (recording.mlp if name == "mlp" else recording.attn)[layer]
        # Severed: each sample's own corrupted value (R, D). Restored: the clean value (D,).
        value = outputs[continued.to(outputs.device), self.token] if self.severed else outputs[0, self.token]

        def hold(output: torch.Tensor) -> torch.Tensor:
            output.view(len(rows), -1, output.shape[-1])[begin:, 0] = value
            return output

        return [(lm.mlp(layer) if name == "mlp" else lm.attn(layer), hold)]


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
