"""How float32 matrix products are computed: the one place that changes PyTorch's choice, for the whole process.

    choose_products("fast")         until something else is chosen
    with products("fast"): ...      within the context
    product_error(device)           what the choice in force costs on this machine

What "fast" does depends on the processor. Some have oneDNN kernels that are faster and as accurate; others, with matrix
units for bfloat16, round the factors to 8 bits (a relative error of some 2e-3), and GPUs round them to TF32 (11 bits).
So "default" is PyTorch's own choice, and `product_error` measures what the other one costs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CHOICES = {"default": ("none", "none"), "fast": ("bf16", "tf32")}
"""Name -> the least precision that oneDNN on CPUs and cuBLAS on CUDA may use; "none" leaves it to PyTorch."""

logger = logging.getLogger(__name__)


def choose_products(choice: str, device: torch.device | str | None = None) -> None:
    """Choose how float32 matrix products are computed from now on, in this process; it enters the key of stored results.

    Args:
        device: on which the error is measured, which is logged; CUDA by default where there is one, else the CPU.

    Raises:
        ValueError: it is no key of `CHOICES`.
    """
    check_choice(choice)
    set_precisions(CHOICES[choice])
    if choice != "default":
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        error = product_error(device)
        logger.info("Float32 matrix products on %s now have a relative error of %.1e.", device, error)


def check_choice(choice: str) -> None:
    """Raise a ValueError where it is no key of `CHOICES`."""
    if choice not in CHOICES:
        raise ValueError(f"choose_products: there is no choice {choice!r}; give one of {', '.join(CHOICES)}.")


@contextmanager
def products(choice: str) -> Iterator[None]:
    """Within the context, float32 matrix products are computed so; after it, as they were before. Nothing is measured."""
    check_choice(choice)
    before = precisions()
    set_precisions(CHOICES[choice])
    try:
        yield
    finally:
        set_precisions(before)


def precisions() -> tuple[str, str]:
    """What is in force for oneDNN and for CUDA, in PyTorch's words."""
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def set_precisions(precisions: tuple[str, str]) -> None:
    """Put back what `precisions` returned."""
    torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision = precisions


def product_error(device: torch.device | str, size: int = 256) -> float:
    """|AB - (AB in float64)| / |AB| of two random float32 matrices (size, size), Frobenius norms, as products are now."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, size, size, generator=generator)
    exact = A.double() @ B.double()
    found = (A.to(device) @ B.to(device)).cpu().double()
    return float((found - exact).norm() / exact.norm())
