"""Freed memory: kept for the next tensors while a trace is made, given back where that is asked for, else left to glibc."""

from __future__ import annotations

import multiprocessing
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor

import psutil
import pytest
import torch
from tiny import tiny_model

from rome_lab import causal_trace, load_model
from rome_lab.models import process as module
from rome_lab.models.process import freed_memory_given_back, freed_memory_kept, give_back_freed_memory, glibc

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


@pytest.fixture(scope="module")
def fresh() -> Iterator[Executor]:
    """A process for each test: one that kept memory has holes in its heap, where a tensor finds pages that exist."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "psutil", "pytest", "rome_lab"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as process:
        yield process


def resident() -> int:
    """Bytes of memory that this process has."""
    return psutil.Process().memory_info().rss


def pages_while_kept() -> int:
    with freed_memory_kept():
        return new_pages()


def pages_after_an_error() -> int:
    with pytest.raises(RuntimeError, match="body"), freed_memory_kept():
        raise RuntimeError("body")
    return new_pages()


def bytes_given_back() -> int:
    with freed_memory_kept():
        new_pages()
        before = resident()
        give_back_freed_memory()
        return before - resident()


def pages_while_given_back() -> tuple[int, int, int]:
    """Also within a trace, which would keep them, and of the next trace."""
    with freed_memory_given_back():
        alone = new_pages()
        with freed_memory_kept():
            within = new_pages()
    with freed_memory_kept(), freed_memory_kept():
        pass
    return alone, within, pages_while_kept()


def pages_and_bytes_with_two_threads() -> tuple[int, int]:
    """New pages when the first of two has ended, and what is given back when both have."""
    first_is_in, first_may_end = threading.Event(), threading.Event()

    def first() -> None:
        with freed_memory_kept():
            first_is_in.set()
            first_may_end.wait(timeout=60)

    thread = threading.Thread(target=first)
    thread.start()
    first_is_in.wait(timeout=60)
    with freed_memory_kept():
        first_may_end.set()
        thread.join()
        pages, before = new_pages(), resident()
    return pages, before - resident()


def test_the_next_tensor_takes_the_memory_of_the_last_one(fresh) -> None:
    assert fresh.submit(pages_while_kept).result() < PAGES / 10


def test_afterwards_freed_memory_goes_where_it_went_before_also_when_the_body_raises(fresh) -> None:
    assert fresh.submit(pages_after_an_error).result() > PAGES / 2


def test_what_is_given_back_is_no_longer_the_process_s(fresh) -> None:
    assert fresh.submit(bytes_given_back).result() > 2 * ENTRIES


def test_memory_can_be_given_back_at_once_also_by_a_trace(fresh) -> None:
    alone, within, afterwards = fresh.submit(pages_while_given_back).result()
    assert alone > PAGES / 2
    assert within > PAGES / 2, "the first one decides"
    assert afterwards < PAGES / 10


def test_where_two_threads_keep_memory_it_is_kept_until_the_second_ends(fresh) -> None:
    pages, given_back = fresh.submit(pages_and_bytes_with_two_threads).result()
    assert pages < PAGES / 10
    assert given_back > 2 * ENTRIES


def test_loading_a_model_asks_nothing_of_the_allocator_and_a_trace_only_while_it_lasts(tmp_path, monkeypatch) -> None:
    asked: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, which: int, size: int) -> None:
            asked.append((which, size))

        def malloc_trim(self, pad: int) -> None:
            assert pad == 0

    monkeypatch.setattr(module, "glibc", Library)
    lm = tiny_model("llama")
    lm.save_pretrained(tmp_path / "model")
    load_model(str(tmp_path / "model"), device="cpu")
    assert asked == []
    causal_trace(lm, "The Eiffel Tower is in", "Eiffel Tower", samples=1)
    assert asked[0][1] == module.KEPT_BYTES
    assert dict(asked) == {
        module.TRIM_THRESHOLD: 2 * module.RAISED_BYTES,
        module.MMAP_THRESHOLD: module.RAISED_BYTES,
    }


@pytest.mark.parametrize(
    "setting", [("MALLOC_MMAP_THRESHOLD_", "1000000"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1000000")]
)
def test_thresholds_that_the_user_has_set_are_left_alone(setting, monkeypatch) -> None:
    monkeypatch.setenv(*setting)
    monkeypatch.setattr(module, "glibc", lambda: pytest.fail("the thresholds are to be left alone"))
    with freed_memory_kept():
        pass
