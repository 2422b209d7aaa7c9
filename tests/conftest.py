"""What all tests share: the embedded model, loaded once, and a quiet, reproducible process."""

from __future__ import annotations

import os
import signal

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


@pytest.fixture(scope="session")
def lm():
    """The embedded model."""
    return load_model()


@pytest.fixture(scope="module")
def tiny():
    """A random model, made anew for each module."""
    return tiny_model("llama")


@pytest.fixture
def shared_cache(tmp_path_factory, monkeypatch):
    """A cache of the tests' own, which they share, so that C of a tiny model is measured once."""
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
