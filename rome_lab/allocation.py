"""What the C library does with memory that is freed, under glibc; elsewhere nothing here does anything.

keep_freed_memory()             for the next tensors, from now on in this process
give_back_freed_memory()        to the system, once
with freed_memory_given_back()  at once, as long as the context lasts
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

KEPT = 256 * 2**20  # bytes: more than the vectors of a trace of the embedded model take
LEAST = 128 * 2**10  # bytes: glibc's own thresholds, before it raises them
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD in glibc's malloc.h


def keep_freed_memory(kept: int = KEPT) -> None:
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
    keep_freed_memory(LEAST)
    try:
        yield
    finally:
        keep_freed_memory()


def glibc() -> ctypes.CDLL | None:
    """The C library of this process, where it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
