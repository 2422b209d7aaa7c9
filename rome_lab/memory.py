"""How much fits: bounds on batch sizes, from the memory that is free."""

from __future__ import annotations

import psutil
import torch

from rome_lab.models import LanguageModel

SHARE = 0.3  # of the free memory that one batch may take; the rest is for what the batch is made from


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def rows_that_fit(lm: LanguageModel, length: int) -> int:
    """Most texts of `length` tokens that one call of a block, or one reading of the logits, may take.

    A token costs some eight vectors of the block's widths inside the attention and the MLP, a text one row of logits.
    """
    memory = lm.memory(0).weight
    widths = sum(memory.shape)
    per_row = 8 * length * widths * memory.element_size() + 2 * 4 * lm.model.config.vocab_size
    return max(1, int(SHARE * free_bytes(lm.device) / per_row))
