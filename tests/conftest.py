"""What all tests share: the embedded model, loaded once, a quiet, reproducible process, and how workers divide the tests."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# `make test` has a worker for each core. So each worker, and each kernel and process that a test starts, has one thread:
# those of several processes wait for one another on the same cores, much longer than they work. And how numbers are rounded
# does not depend on the number of workers. Torch reads these when it is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# Two processes may find different ways to multiply the quickest, where two ways are as accurate, and round differently.
os.environ.setdefault("ROME_LAB_PRODUCTS", "default")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import transformers
from hypothesis import settings
from tiny import tiny_model

from rome_lab import load_model

transformers.utils.logging.disable_progress_bar()
settings.register_profile("rome_lab", deadline=None, derandomize=True)
settings.load_profile("rome_lab")
# What a shell starts in the background ignores interrupts, and so would tests that interrupt themselves, and never end.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files of which most tests start browsers, kernels, clusters, installers or other processes, or take seconds each.
SLOW = (
    "batch",
    "browser",
    "cluster",
    "faults",
    "fuzz",
    "interactive_browser",
    "memory",
    "offload",
    "report",
    "site",
    "wheel",
)
SLOW_FILES = {f"test_{name}.py" for name in SLOW}


@pytest.fixture(scope="session")
def lm():
    """The embedded model."""
    return load_model()


@pytest.fixture(scope="module")
def tiny():
    """A random model, made anew for each module."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, worker_id) -> Path:
    """A folder that all workers of this run share."""
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture
def shared_cache(tmp_path_factory, monkeypatch):
    """A cache of the tests' own, which those of a worker share, so that C of a tiny model is measured once."""
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say what is slow, and which tests stay on one worker: those of a file, and all that take the embedded model.

    So a worker makes the models of a file once, and one alone loads the embedded model and edits it. A test with an
    `xdist_group` of its own, as each long notebook has, may go to another worker than its file. What is slow begins first,
    so that no worker has it left when the others are done; and of it first what takes longest.
    """
    for item in items:
        embedded = takes_embedded_model(item)
        if embedded or item.path.name in SLOW_FILES:
            item.add_marker("slow")
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group("embedded model" if embedded else item.path.name))
    slow = {group_of(item) for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (group_of(item) not in slow, group_of(item) != "judged edits"))  # stable


def takes_embedded_model(item: pytest.Item) -> bool:
    """Whether its fixture `lm` is the one of this file."""
    definitions = item._fixtureinfo.name2fixturedefs.get("lm") if isinstance(item, pytest.Function) else None
    return bool(definitions) and definitions[-1].func.__module__ == __name__


def group_of(item: pytest.Item) -> str:
    return item.get_closest_marker("xdist_group").args[0]
