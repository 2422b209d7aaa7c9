"""The tests themselves: what `make check` leaves out, and what stays on one worker."""

from __future__ import annotations

import os

import torch


def test_what_takes_the_embedded_model_is_slow_and_goes_to_one_worker(lm, request) -> None:
    assert request.node.get_closest_marker("slow")
    assert request.node.get_closest_marker("xdist_group").args == ("embedded model",)


def test_what_takes_none_is_fast_and_stays_with_its_file(request) -> None:
    assert not request.node.get_closest_marker("slow")
    assert request.node.get_closest_marker("xdist_group").args == ("test_suite.py",)


def test_the_groups_are_heard_where_workers_share_the_tests(request, worker_id) -> None:
    """pytest 9.1 and later have other ids of tests, by which pytest-xdist 3.8 hears of no group, without a word."""
    assert worker_id == "master" or request.node.nodeid.endswith("@test_suite.py")


def test_a_process_has_as_many_threads_as_it_was_told() -> None:
    assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])
