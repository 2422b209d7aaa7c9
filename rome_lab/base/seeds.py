"""Random numbers that depend on what they are for and on nothing else: `seed_from`, `uniform`."""

from __future__ import annotations

import hashlib
import json

import torch
from jaxtyping import Float
from torch import Tensor

from rome_lab.base.store import Json


def seed_from(key: str) -> int:
    """A 63-bit seed that depends on every character of `key` and on nothing else."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def uniform(length: int, *about: Json) -> Float[Tensor, " T"]:
    """(T,) uniform numbers in [0, 1), float64, that depend on `about` alone."""
    generator = torch.Generator().manual_seed(seed_from(json.dumps(about)))
    return torch.rand(length, dtype=torch.float64, generator=generator)
