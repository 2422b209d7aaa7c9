"""Prompts with what is to follow them, recorded once below the edited layers, so that gradients pass through few blocks.

TargetTexts                       the recorded texts; `read` says how probable what follows is under a change
record_texts(lm, texts, layer)    of prompts with their targets, as Questions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rome_lab.base import OneLine
from rome_lab.models import (
    Change,
    LanguageModel,
    Question,
    Recording,
    check_recording,
    log_p_of,
    record_run,
    run_blocks,
    side_by_side,
)


@dataclass(frozen=True, eq=False, repr=False)
class TargetTexts(OneLine):
    """Prompts with their targets behind them, recorded once below a layer.

    Attributes:
        layer: the lowest that may change.
        recording: with the states that go into it, then those that leave the last block; B rows, padded on the right, where
            no token of a causal model sees it.
        rows, places: (R,) where the next token is read: first at every token of a target, then at the end of each prompt
            that has none.
        target_ids: (N,) the tokens at the first N of them.
    """

    layer: int
    recording: Recording
    rows: Int[Tensor, " R"]
    places: Int[Tensor, " R"]
    target_ids: Int[Tensor, " N"]

    def read(self, lm: LanguageModel, change: Change) -> tuple[Float[Tensor, " N"], Float[Tensor, "R-N V"]]:
        """Log probabilities of the targets' tokens under a change, and of all tokens after the other prompts."""
        hidden = self.recording.states[0]
        with side_by_side(lm, [change], [0] * len(hidden)):
            hidden = run_blocks(lm, range(self.layer, lm.n_layers), hidden, self.recording)  # (B, T, D)
        return log_p_of(lm, hidden.to(lm.device)[self.rows, self.places], self.target_ids)

    def others_unchanged(self, lm: LanguageModel) -> Float[Tensor, "R-N V"]:
        """The second of these without a change, from the recording."""
        rows, places = (x[len(self.target_ids) :] for x in (self.rows, self.places))
        return log_p_of(lm, self.recording.states[-1].to(lm.device)[rows, places], self.target_ids[:0])[1]


def record_texts(lm: LanguageModel, texts: Sequence[Question], layer: int, doing: str) -> TargetTexts:
    """Record what each question's model is to read; those with no continuation stand last, and owners say nothing.

    Raises:
        ValueError: a text is too long, what the model says is no finite number, or its blocks are not all that it does;
            `doing` is how the message begins.
    """
    ids = torch.zeros(len(texts), max(len(text.text) for text in texts)).long()
    places = []  # (row, place)
    for row, text in enumerate(texts):
        lm.check_length(len(text.text), f"{doing}: the prompt {lm.tokenizer.decode(text.context)!r} with its target")
        ids[row, : len(text.text)] = torch.tensor(text.text)
        places += [(row, place) for place in range(len(text.context) - 1, len(text.text))]
    whole = record_run(lm, ids.to(lm.device), lambda embedded: None)
    lm.check_finite(whole.logits, doing)
    check_recording(lm, whole, doing)
    unread = dict.fromkeys(("attn", "mlp", "attention_keys", "attention_values"), [])
    logits, states = whole.logits[:0].clone(), [whole.states[layer], whole.states[-1]]
    needed = replace(whole, logits=logits, states=states, **unread)
    target_ids = torch.tensor([token for text in texts for token in text.continuation], device=lm.device)
    return TargetTexts(layer, needed, *torch.tensor(places, device=lm.device).T, target_ids)
