"""What a piece of work takes on the machine at hand: `seconds` and `peak_bytes`."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch

from rome_lab.models import freed_memory_given_back

Returned = TypeVar("T")
INTERVAL_S = 1e-3  # between two looks at the process's memory


def seconds(work: Callable[[], Returned], device: torch.device | None = None) -> tuple[float, Returned]:
    """How long `work` takes, all that it started on `device` included, and what it returns."""
    wait_for(device)
    begin = time.perf_counter()
    done = work()
    wait_for(device)
    return time.perf_counter() - begin, done


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most memory that `work` takes at any moment, beyond what was taken before.

    On CUDA it is what PyTorch's allocator hands out, exactly. Elsewhere it is the resident memory of this process, looked
    at every millisecond, so that a shorter peak can be missed.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    return resident_peak(work)


def resident_peak(work: Callable[[], object]) -> int:
    """`peak_bytes` of this process's resident memory."""
    process, done = psutil.Process(), threading.Event()

    def look() -> None:
        nonlocal highest
        while not done.wait(INTERVAL_S):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=look, daemon=True)
    with freed_memory_given_back():
        before = highest = process.memory_info().rss
        watcher.start()
        try:
            work()
        finally:
            done.set()
            watcher.join()
    return highest - before


def wait_for(device: torch.device | None) -> None:
    """Wait until `device` has done all that it was given."""
    if device is not None and device.type in ("cuda", "mps"):
        (torch.cuda if device.type == "cuda" else torch.mps).synchronize()
