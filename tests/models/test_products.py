"""The choice of how float32 matrix products are computed: what it sets, what it costs, and what it leaves alone."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import torch
from tiny import tiny_model

from rome_lab import choose_products, load_model
from rome_lab.models import process as module
from rome_lab.models.process import PRODUCTS, precisions, product_error, products, set_precisions


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv("ROME_LAB_PRODUCTS", raising=False)
    before = precisions()
    yield
    set_precisions(before)


def test_pytorchs_own_choice_is_in_force_until_another_is_made() -> None:
    assert precisions() == PRODUCTS["default"]
    choose_products("fast")
    assert precisions() == ("bf16", "tf32")
    choose_products("default")
    assert precisions() == PRODUCTS["default"]


def test_a_context_puts_back_what_was_there_also_when_its_body_raises() -> None:
    set_precisions(["ieee", "tf32"])  # as it comes from a file
    with pytest.raises(RuntimeError, match="body"), products("fast"):
        assert precisions() == ("bf16", "tf32")
        raise RuntimeError("body")
    assert precisions() == ("ieee", "tf32")


def test_the_error_is_that_of_the_products_made_now() -> None:
    assert 0 < product_error("cpu") < 1e-6
    with products("fast"):
        fast = product_error("cpu")
        A, B = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
        exact = A.double() @ B.double()
        assert fast == float(((A @ B).double() - exact).norm() / exact.norm())
    assert fast < 1e-2, "bfloat16 keeps 8 bits of the factors, and no processor does worse"


def test_the_error_is_measured_on_the_device_when_a_choice_is_made_and_not_within_a_context(
    monkeypatch, caplog
) -> None:
    asked = []
    monkeypatch.setattr(module, "product_error", lambda device: asked.append(device) or 0.002)
    with products("fast"):
        pass
    assert asked == []
    with caplog.at_level(logging.INFO):
        choose_products("fast", "meta")
    assert asked == [torch.device("meta")] and "products on meta now have a relative error of 2.0e-03" in caplog.text


def test_the_choice_enters_the_key_of_stored_results() -> None:
    lm = tiny_model("gpt2")
    before = lm.identity().key()
    with products("fast"):
        assert lm.identity().key() != before
    assert lm.identity().key() == before


def test_load_model_takes_the_choice_and_otherwise_leaves_it_alone(tmp_path) -> None:
    lm = tiny_model("llama")
    lm.save_pretrained(tmp_path / "model")
    with products("fast"):
        load_model(str(tmp_path / "model"), device="cpu")
        assert precisions() == PRODUCTS["fast"]
        load_model(str(tmp_path / "model"), device="cpu", products="default")
        assert precisions() == PRODUCTS["default"]


def test_a_model_that_cannot_be_loaded_changes_no_choice(tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot load"):
        load_model(str(tmp_path), products="fast")
    assert precisions() == PRODUCTS["default"]


@pytest.mark.parametrize("call", [choose_products, lambda name: load_model(products=name)])
def test_an_unknown_choice_is_refused_in_one_sentence_and_changes_nothing(call) -> None:
    with pytest.raises(ValueError, match=r"no choice 'quick'; give one of default, fast\.$"):
        call("quick")
    assert precisions() == PRODUCTS["default"]


def test_suited_products_are_the_quickest_of_the_accurate_and_leave_what_is_chosen(monkeypatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(module, "quickest_products", lambda: "fast")
    with module.suited_products(cpu):
        assert module.precisions_now() == PRODUCTS["fast"]
        assert precisions() == PRODUCTS["default"], "the key of stored results names what was chosen"
        with module.suited_products(cpu):
            pass
        assert module.precisions_now() == PRODUCTS["fast"], "it is in force until the last context ends"
        with pytest.raises(RuntimeError, match="a trace is being made"):
            choose_products("fast")
    assert module.precisions_now() == PRODUCTS["default"]
    set_precisions(("ieee", "tf32"))
    with module.suited_products(cpu):
        assert module.precisions_now() == ("ieee", "tf32"), "what somebody has chosen stays"
    with pytest.raises(KeyError), module.suited_products(cpu):
        raise KeyError


def test_with_the_environment_all_processes_compute_products_by_default(monkeypatch) -> None:
    monkeypatch.setattr(module, "quickest_products", lambda: pytest.fail("measured"))
    monkeypatch.setenv("ROME_LAB_PRODUCTS", "default")
    with module.suited_products(torch.device("cpu")):
        assert module.precisions_now() == PRODUCTS["default"]


def test_a_way_that_is_not_accurate_is_not_the_quickest(monkeypatch) -> None:
    monkeypatch.setattr(module, "product_error", lambda device, size: 2e-6)
    assert module.quickest_products.__wrapped__() == "default"


def test_what_is_quickest_here_is_accurate() -> None:
    with products(module.quickest_products()):
        assert product_error("cpu", 500) <= module.ACCURATE


def test_threads_that_trace_first_measure_once_and_never_see_what_is_measured(monkeypatch) -> None:
    measured, seen = [], []

    def repeat(product, number, repeat):
        measured.append(module.precisions_now())
        time.sleep(0.05)  # for the others to come meanwhile
        return [1 / len(measured)]  # the last is the quickest

    def work() -> None:
        with module.suited_products(torch.device("cpu")):
            seen.append((precisions(), module.precisions_now()))

    monkeypatch.setattr(module, "TIMED_SIZE", 8)
    monkeypatch.setattr(module, "product_error", lambda device, size: 0.0)
    monkeypatch.setattr(module.timeit, "repeat", repeat)
    module.quickest_products.cache_clear()
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
    finally:
        module.quickest_products.cache_clear()
    assert measured == [*PRODUCTS.values()] and seen == [(PRODUCTS["default"], PRODUCTS["fast"])] * 4
    assert module.precisions_now() == PRODUCTS["default"]
