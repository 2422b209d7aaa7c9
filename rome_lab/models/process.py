"""What a model's work changes in the whole process: where freed memory goes, and how matrices are multiplied.

with freed_memory_kept()        what is freed is kept for the next tensors; under glibc, elsewhere nothing happens
with freed_memory_given_back()  or goes back to the system at once
give_back_freed_memory()        what is kept now goes back
choose_products(choice)         how float32 matrix products are computed from now on
with products(choice)           or within a context
with suited_products(device)    as they are quickest, of those that are as accurate; nobody has to choose
precisions, set_precisions      what is in force, and putting it back
product_error(device)           the error of a product
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch

logger = logging.getLogger(__name__)

KEPT_BYTES = 256 * 2**20  # bytes: more than the vectors of a trace of the embedded model take
LEAST_BYTES = 128 * 2**10  # bytes: glibc's own thresholds at first
RAISED_BYTES = 32 * 2**20  # bytes: the most that glibc raises them to by itself, as pieces of that size are freed
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in glibc's malloc.h
contexts = 0  # of `threshold`, in all threads
suited = 0  # contexts of `suited_products`, in all threads
changing = threading.Lock()  # held by who changes these numbers
ACCURATE = 1e-6  # the most that a product may differ from that of float64: float32 differs by 2e-7
TIMED_SIZE = 768  # rows and columns of the matrices whose products are timed, as large as those of a trace


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the context, up to `KEPT_BYTES` of freed memory are kept for the next tensors.

    By default glibc hands large pieces back to the system, which clears every page of the next one: some 400,000 pages in a
    state trace of 9 tokens, a tenth of its time, and a sixth with fast products.
    """
    with threshold(KEPT_BYTES):
        yield


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """Within the context the process holds no more memory than its tensors need, also where it would be kept."""
    give_back_freed_memory()
    with threshold(LEAST_BYTES):
        yield


@contextmanager
def threshold(size: int) -> Iterator[None]:
    """Within the context, glibc keeps up to so many bytes of freed memory; of several contexts the first one decides.

    There is one allocator for all threads, so that their contexts count together. After the last of them what was kept
    goes back, and the thresholds are where glibc itself takes them once large pieces have been freed: it tells nobody what
    they were before. Where the user has set them in the environment, they are left alone.
    """
    is_set = "MMAP_THRESHOLD" in " ".join((*os.environ, os.environ.get("GLIBC_TUNABLES", ""))).upper()
    if is_set or not (library := glibc()):
        yield
        return
    global contexts
    with changing:
        contexts += 1
        if contexts == 1:
            library.mallopt(TRIM_THRESHOLD, size)
            library.mallopt(MMAP_THRESHOLD, size)
    try:
        yield
    finally:
        with changing:
            contexts -= 1
            if not contexts:
                library.mallopt(TRIM_THRESHOLD, 2 * RAISED_BYTES)
                library.mallopt(MMAP_THRESHOLD, RAISED_BYTES)
                library.malloc_trim(0)


def give_back_freed_memory() -> None:
    """Give all that is kept back, for others to take."""
    if library := glibc():
        library.malloc_trim(0)


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
        ValueError: it is no key of `PRODUCTS`.
    """
    check_choice(choice)
    set_precisions(PRODUCTS[choice])
    if choice != "default":
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        error = product_error(device)
        logger.info("Float32 matrix products on %s now have a relative error of %.1e.", device, error)


def check_choice(choice: str) -> None:
    """Raise a ValueError where it is no key of `PRODUCTS`."""
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


@contextmanager
def suited_products(device: torch.device) -> Iterator[None]:
    """Within the context, float32 products on a CPU are computed in the quickest way that is accurate to `ACCURATE`.

    Where another choice is in force, or on another device, nothing happens. Since what comes out is the same but for
    rounding, `precisions`, and with it the key of stored results, still names the default. Processes may find different
    ways the quickest, though, and then round differently; with `ROME_LAB_PRODUCTS=default` in the environment nothing is
    measured, and all of a machine get the same bits.
    """
    global suited
    with changing:  # who comes while the ways are measured waits for what comes of it
        is_pinned = os.environ.get("ROME_LAB_PRODUCTS") == "default"
        is_free = device.type == "cpu" and precisions() == PRODUCTS["default"] and not is_pinned
        choice = quickest_products() if is_free else "default"
        if choice != "default":
            suited += 1
            put_in_force(PRODUCTS[choice])
    try:
        yield
    finally:
        if choice != "default":
            with changing:
                suited -= 1
                if not suited:
                    put_in_force(PRODUCTS["default"])


@cache
def quickest_products() -> str:
    """The choice whose products take least time on this CPU, with the threads there are now, of those that are accurate.

    On processors without matrix units for bfloat16 "fast" is as accurate as the default, and quicker where oneDNN is
    quicker than MKL (AMD); on those with them it is quicker still, and off by 3e-3. Measured once, in half a second at
    most, by who holds `changing` and has found the default in force.
    """
    global suited
    seconds = {}
    product = partial(torch.nn.functional.linear, *two_matrices(TIMED_SIZE))
    suited += 1  # meanwhile other threads are told of the default
    try:
        for choice in PRODUCTS:
            put_in_force(PRODUCTS[choice])
            if choice == "default" or product_error("cpu", TIMED_SIZE) <= ACCURATE:
                seconds[choice] = min(timeit.repeat(product, number=3, repeat=7))
    finally:
        suited -= 1
        put_in_force(PRODUCTS["default"])
    return min(seconds, key=seconds.__getitem__)


def precisions() -> tuple[str, str]:
    """What is chosen for oneDNN and for CUDA, in PyTorch's words."""
    return PRODUCTS["default"] if suited else precisions_now()


def precisions_now() -> tuple[str, str]:
    """What is in force for oneDNN and for CUDA, in PyTorch's words."""
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision


def set_precisions(precisions: tuple[str, str]) -> None:
    """Put back what `precisions` returned.

    Raises:
        RuntimeError: another thread traces, whose products would change under it.
    """
    precisions = tuple(precisions)  # a list where it comes from a file or another process
    with changing:
        if suited and precisions != PRODUCTS["default"]:
            raise RuntimeError("choose_products: a trace is being made in another thread; wait until it is done.")
        if not suited:
            put_in_force(precisions)


def put_in_force(precisions: tuple[str, str]) -> None:
    torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision = precisions


def product_error(device: torch.device | str, size: int = 256) -> float:
    """|AB - (AB in float64)| / |AB| of two random float32 matrices (size, size), Frobenius norms, as products are now."""
    A, B = two_matrices(size)
    exact = A.double() @ B.double()
    product = (A.to(device) @ B.to(device)).cpu().double()
    return float((product - exact).norm() / exact.norm())


def two_matrices(size: int) -> torch.Tensor:
    """(2, size, size) float32, random and always the same, whatever the default dtype."""
    return torch.randn(2, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
