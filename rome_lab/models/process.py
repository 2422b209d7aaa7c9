"""What the C library does with memory that is freed, under glibc; elsewhere nothing here does anything.

keep_freed_memory()             for the next tensors, from now on in this process
give_back_freed_memory()        to the system, once
with freed_memory_given_back()  at once, as long as the context lasts
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

logger = logging.getLogger(__name__)

KEPT_BYTES = 256 * 2**20  # bytes: more than the vectors of a trace of the embedded model take
LEAST_BYTES = 128 * 2**10  # bytes: glibc's own thresholds, before it raises them
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in glibc's malloc.h


def keep_freed_memory(kept: int = KEPT_BYTES) -> None:
    """Keep up to so many bytes for the next tensors.

    By default glibc hands large pieces back to the system, which clears every page of the next one: some 400,000 pages in a
    state trace of 9 tokens, a tenth of its time, and a sixth with fast products.
    """
    if library := glibc():
        library.mallopt(TRIM_THRESHOLD, kept)
        library.mallopt(MMAP_THRESHOLD, kept)


def give_back_freed_memory() -> None:
    """Give all that is kept back, for others to take."""
    if library := glibc():
        library.malloc_trim(0)


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """Within the context the process holds no more memory than its tensors need; after it, freed memory is kept."""
    give_back_freed_memory()
    keep_freed_memory(LEAST_BYTES)
    try:
        yield
    finally:
        keep_freed_memory()


def glibc() -> ctypes.CDLL | None:
    """The C library of this process, where it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None


PRODUCTS = {"default": ("none", "none"), "fast": ("bf16", "tf32")}
"""Name -> the least precision that oneDNN on CPUs and cuBLAS on CUDA may use; "none" leaves it to PyTorch."""


def choose_products(choice: str, device: torch.device | str | None = None) -> None:
    """Choose how float32 matrix products are computed from now on, in this process; it enters the key of stored results.

    Args:
        device: on which the error is measured, which is logged; CUDA by default where there is one, else the CPU.

    Raises:
        ValueError: it is no key of `CHOICES`.
    """
    check_choice(choice)
    set_precisions(PRODUCTS[choice])
    if choice != "default":
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        error = product_error(device)
        logger.info("Float32 matrix products on %s now have a relative error of %.1e.", device, error)


def check_choice(choice: str) -> None:
    """Raise a ValueError where it is no key of `CHOICES`."""
    if choice not in PRODUCTS:
        raise ValueError(f"choose_products: there is no choice {choice!r}; give one of {', '.join(PRODUCTS)}.")


@contextmanager
def products(choice: str) -> Iterator[None]:
    """Within the context, float32 matrix products are computed so; after it, as they were before. Nothing is measured."""
    check_choice(choice)
    before = precisions()
    set_precisions(PRODUCTS[choice])
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
