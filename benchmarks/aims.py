"""What the project has set itself, beside the rows of the table that tell whether it was met."""

from __future__ import annotations

import pandas as pd
import torch

from benchmarks.plain_tracing import KINDS
from rome_lab.models.process import PRODUCTS

SWEEP = "largest difference of sweep"
ON_CPU = {  # on two cores, the embedded model and 9 tokens
    "state: one forward a cell, default products / sweep, default products": "at least 6",
    "state: one forward a cell, fast products / sweep, fast products": "at least 6",
    "state: one forward a cell, default products / sweep, fast products": "at least 10",
    "state: batched cells, default products / sweep, default products": "at least 6",
    "state: batched cells, fast products / sweep, fast products": "at least 6",
    f"state: {SWEEP}, default products": "at most 1e-5",
    "all three kinds: attribution patching / one plain forward": "at most 6",
    "float32, fast products / bfloat16": "at least 1.5",
    **{
        f"{kind}, {choice} products: sweep / (arithmetic / rate of one large product)": "at most 1.3"
        for kind in KINDS
        for choice in PRODUCTS
    },
}
ON_CUDA = {  # on an H100, random weights of GPT-2 XL's shape; "fast" is TF32 there
    "all three kinds: sweep, fast products": "at most 1.5",
    "all three kinds of 1000 such facts, extrapolated, fast products": "at most 30",
    **{f"{kind}: {SWEEP}, fast products": "at most 1e-3" for kind in KINDS},
}
AIMS = {"cpu": ON_CPU, "cuda": ON_CUDA}


def with_aims(table: pd.DataFrame, device: torch.device) -> pd.DataFrame:
    """The table with a column `aim`, where any of its rows has one on this sort of device."""
    aims = table["measure"].map(AIMS.get(device.type, {}))
    return table.assign(aim=aims) if aims.notna().any() else table
