"""Which of transformers' implementations of attention a trace runs with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rome_lab.models import LanguageModel


@contextmanager
def suited_attention(lm: LanguageModel) -> Iterator[None]:
    """Within the context, attention on a CPU is made of plain products, which are faster for the short texts of a trace.

    PyTorch's fused attention makes a product for each head of each text there. In float32 that takes as long; in bfloat16,
    and with fast products, every one costs a call of oneDNN, a quarter of the time of a trace. In float64 it stays, since
    transformers' plain attention takes its softmax in float32.
    """
    before = lm.model.config._attn_implementation
    if lm.device.type != "cpu" or lm.dtype == torch.float64:
        yield
        return
    lm.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.model.set_attn_implementation(before)
