"""Freed memory: kept for the next tensors, and given back where that is asked for."""

from __future__ import annotations

import resource

import psutil
import pytest
import torch

from rome_lab.models.process import freed_memory_given_back, give_back_freed_memory, glibc, keep_freed_memory

ENTRIES = 15 * 2**20  # of a float32 tensor of 60 MB: more than glibc keeps by default
PAGES = 4 * ENTRIES // resource.getpagesize()

pytestmark = pytest.mark.skipif(glibc() is None, reason="the C library is not glibc")


def new_pages() -> int:
    """How many pages the system has to make for one tensor after another; the fewest, since one may find another place."""
    found = []
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(ENTRIES)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found)


def test_the_next_tensor_takes_the_memory_of_the_last_one() -> None:
    keep_freed_memory()
    assert new_pages() < PAGES / 10


def test_what_is_given_back_is_no_longer_the_process_s() -> None:
    keep_freed_memory()
    new_pages()
    before = psutil.Process().memory_info().rss
    give_back_freed_memory()
    assert before - psutil.Process().memory_info().rss > 2 * ENTRIES


def test_memory_can_be_given_back_at_once() -> None:
    with freed_memory_given_back():
        assert new_pages() > PAGES / 2
    assert new_pages() < PAGES / 10
