"""The logit lens: what the model would say next if the state at a token and layer were its last one."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import numpy as np
import torch

from rome_lab.base import visible
from rome_lab.facts import Fact, read_prompt
from rome_lab.models import (
    Batching,
    LanguageModel,
    at_least_float32,
    enough_room,
    suited_attention,
    suited_products,
    text_bytes,
)
from rome_lab.tracing.runs import run_clean
from rome_lab.tracing.sweep import few_together


@dataclass(frozen=True, eq=False)
class LogitLens:
    """The answer in the model's own last norm and output embeddings, applied to the states of one prompt.

    Attributes:
        prompt, answer: the answer is one token, as text.
        tokens: T strings, one a token of the prompt.
        subject_range: (begin, end) in tokens, end excluded; None where no subject was named.
        rank: (T, L) place of the answer among all tokens, 1 for the most probable one.
        p: (T, L) float64, its probability; p[-1, -1] is the model's own.
        top: (T, L) text of the most probable token.
    """

    prompt: str
    answer: str
    tokens: tuple[str, ...]
    subject_range: tuple[int, int] | None
    rank: np.ndarray
    p: np.ndarray
    top: np.ndarray

    @property
    def first_layer(self) -> int | None:
        """From which layer on the answer is the most probable token at the last one; None where it never is."""
        ranks = self.rank[-1].tolist()
        behind = next((layer for layer in reversed(range(len(ranks))) if ranks[layer] != 1), -1) + 1
        return behind if behind < len(ranks) else None

    def __repr__(self) -> str:
        prompt = textwrap.shorten(self.prompt, 80, placeholder=" ...")
        first = "never first" if self.first_layer is None else f"first from layer {self.first_layer} on"
        return f"LogitLens(prompt {prompt!r}, answer {visible(self.answer)!r}, p {self.p[-1, -1]:.3f}, {first})"


@torch.no_grad()
@enough_room("logit_lens")
def logit_lens(
    lm: LanguageModel, prompt: str | Fact, subject: str | None = None, answer: str | None = None
) -> LogitLens:
    """The answer's rank and probability in every state of a prompt, by the model's own tail (nostalgebraist 2020).

        logits(i, l) = W_U norm(h(i, l)), and whatever else the model does between its last block and its logits

    A state in the middle is not made to be read so: what the lens says of early layers depends on the basis they use.

    Args:
        prompt: any text; or a Fact that `lm` knows.
        subject: which part of it figures mark; a Fact brings its own.
        answer: what to follow, by its first token; by default what the model says next.

    Raises:
        ValueError: an empty or too long prompt; the subject is not in it; the model does not know the Fact (then say the
            `answer`); weights that hold NaN.
        MemoryError: the memory of the device does not suffice.
    """
    named = isinstance(prompt, Fact) or subject is not None
    read = read_prompt(lm, prompt, subject if named else prompt)
    clean = run_clean(lm, prompt, read, answer, "logit_lens")
    answer_id = clean.answer_id
    with suited_attention(lm), suited_products(lm.device):
        few = few_together(Batching(lm, "logit_lens", text_bytes(lm, 1)))

        def at_states(states: torch.Tensor) -> np.ndarray:
            logits = at_least_float32(lm.logits(states))  # (rows, V)
            log_p = logits[:, answer_id] - logits.logsumexp(-1)
            rank = 1 + (logits > logits[:, answer_id, None]).sum(-1)
            return np.stack([x.cpu().double().numpy() for x in (log_p.exp(), rank, logits.argmax(-1))])

        layers = [np.concatenate(list(few.over(x[0], at_states)), axis=1) for x in clean.recording.states[1:]]
    p, rank, top = np.stack(layers, axis=-1)  # each (T, L)
    words = {int(i): lm.tokenizer.decode([int(i)]) for i in np.unique(top)}
    return LogitLens(
        prompt=read.text,
        answer=lm.tokenizer.decode([answer_id]),
        tokens=read.tokens(lm),
        subject_range=read.subject_range if named else None,
        rank=rank.astype(int),
        p=p,
        top=np.array([[words[int(i)] for i in row] for row in top]),
    )
