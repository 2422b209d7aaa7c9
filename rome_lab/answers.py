"""What a model says after given texts: log probabilities of each next token, and of given continuations.

next_log_p(lm, texts, doing)       after every token of each text
continuation_p(lm, asked, doing)   of continuations, all their tokens read and judged
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rome_lab.blocks import at_least_float32
from rome_lab.models import LanguageModel

BATCH = 8  # texts that are run together


@torch.no_grad()
def next_log_p(lm: LanguageModel, texts: Sequence[Sequence[int]], doing: str) -> Iterator[Float[Tensor, "T V"]]:
    """For each text (token ids) the log probabilities of the next token after each of its tokens.

    Raises:
        ValueError: a text is too long for the model, or it says what is not a number; `doing` names what it was asked for.
    """
    lm.check_length(max(map(len, texts), default=0), doing)
    for begin in range(0, len(texts), BATCH):
        batch = texts[begin : begin + BATCH]
        # Padding right of a text cannot reach it in a causal model.
        ids = pad_sequence([torch.tensor(text, device=lm.device) for text in batch], batch_first=True)
        for text, logits in zip(batch, lm.model(ids, use_cache=False).logits, strict=True):
            lm.check_finite(logits[: len(text)], doing)
            yield at_least_float32(logits[: len(text)]).log_softmax(-1)


def continuation_p(
    lm: LanguageModel, asked: Sequence[tuple[list[int], list[int]]], doing: str
) -> tuple[list[float], Float[Tensor, "Q V"]]:
    """For each text and continuation (token ids) the probability of all tokens of the continuation (teacher forcing); and
    the log probabilities of the token after each text."""
    p, following = [], []
    texts = [text + said[:-1] for text, said in asked]
    for (_, said), log_p in zip(asked, next_log_p(lm, texts, doing), strict=True):
        behind = log_p[len(log_p) - len(said) :]
        p.append(float(behind[range(len(said)), said].sum().exp()))
        following.append(behind[0])
    return p, torch.stack(following)
