"""Remedies against the wear of many edits, on matrices: RECT and PRUNE. `EditSettings` has those that act on v*."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def rect(delta: Float[Tensor, "D H"], W: Float[Tensor, "D H"], share: float) -> Float[Tensor, "D H"]:
    """The change with only those of its entries that are largest relative to W; the others are 0.

    RECT (Gu et al. 2024, arXiv 2401.04700), which keeps the `share` of entries with the largest |dW / W|, published 0.4.
    """
    ratio = (delta / W.to(delta)).abs().nan_to_num(nan=0.0).flatten()  # 0 / 0: nothing changes there
    kept = ratio.topk(round(share * ratio.numel())).indices
    entries = delta.flatten()
    return torch.zeros_like(entries).index_copy(0, kept, entries[kept]).view_as(delta)


def prune(total: Float[Tensor, "D H"], W: Float[Tensor, "D H"], base: float) -> Float[Tensor, "D H"]:
    """The sum of edits, with its singular values above the largest one of W compressed by a logarithm.

        s -> log_base(s) - log_base(s_W) + s_W where s > s_W, else s

    PRUNE (Ma et al. 2024, arXiv 2405.16821), in float64. A sum with no such singular value comes back as it is.

    Args: W: as it was before any of the edits.
    """
    U, values, Vh = torch.linalg.svd(total.double(), full_matrices=False)
    largest = torch.linalg.matrix_norm(W.to(total.device).double(), 2)
    above = values > largest
    if not above.any():
        return total
    compressed = largest + (values[above] / largest).log() / torch.log(torch.tensor(base, dtype=torch.float64))
    # What is small is left bit for bit: only the difference of the compressed ones is taken off.
    return (total.double() - (U[:, above] * (values[above] - compressed)) @ Vh[above]).to(total)
