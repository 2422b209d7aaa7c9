"""Freed memory: kept for the next tensors, and given back where that is asked for."""

from __future__ import annotations

import resource

import psutil
import pytest
import torch

from rome_lab.allocation import give_back_freed_memory, glibc, keep_freed_memory

ENTRIES = 15 * 2**20  # of a float32 tensor of 60 MB: more than glibc keeps by default
PAGES = 4 * ENTRIES // resource.getpagesize()

pytestmark = pytest.mark.skipif(glibc() is None, reason="the C library is not glibc")


def new_pages() -> int:
    """How many pages the system has to make for one tensor, which is gone by the end."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(ENTRIES)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_the_next_tensor_takes_the_memory_of_the_last_one() -> None:
    keep_freed_memory()
    new_pages()
    assert new_pages() < PAGES / 10


def test_what_is_given_back_is_no_longer_the_process_s() -> None:
    keep_freed_memory()
    new_pages()
    before = psutil.Process().memory_info().rss
    give_back_freed_memory()
    assert before - psutil.Process().memory_info().rss > 2 * ENTRIES
    assert new_pages() > PAGES / 2
