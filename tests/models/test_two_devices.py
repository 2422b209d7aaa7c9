"""Weights on two devices: nothing of one is computed with something of the other.

PyTorch's meta device stands for the second one. It holds no values, so this is about places alone.
"""

from __future__ import annotations

import accelerate
import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rome_lab.editing.values import record_suffixes
from rome_lab.facts.prompts import Prompt
from rome_lab.models.blocks import record_run
from rome_lab.models.changes import Change
from rome_lab.models.scoring import last_states
from rome_lab.tracing import runs as tracing
from rome_lab.tracing import sweep
from rome_lab.tracing.trace import KINDS

aten = torch.ops.aten
CPU, META = torch.device("cpu"), torch.device("meta")


class TwoDevices(TorchDispatchMode):
    """Refuses to compute with tensors of both devices, as real ones do; copies from the meta device are zeros."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is aten.copy_.default:
            return args[0].zero_() if args[1].is_meta and not args[0].is_meta else function(*args, **kwargs)
        if function is aten._to_copy.default and args[0].is_meta and kwargs.get("device", META) == CPU:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        # Scalars go everywhere, and so do indices that are on the CPU.
        met = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim]
        if function in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
            met = [x for x in met if x is args[0] or x.is_meta]
        if len({x.device for x in met}) > 1:
            raise RuntimeError(f"{function} is given tensors of two devices")
        return function(*args, **kwargs)


@pytest.fixture(params=["gpt2", "llama"])
def lm(request, monkeypatch):
    """Blocks 0 and 1 on the one device, 2 and 3 and the output embeddings on the other."""
    lm = tiny_model(request.param)
    base = lm.model.base_model_prefix
    places = {f"{base}.{name}": "cpu" for name, _ in lm.model.base_model.named_children()} | {"lm_head": "meta"}
    del places[lm.layout.blocks]
    places |= {f"{lm.layout.blocks}.{layer}": ("cpu", "meta")[layer // 2] for layer in range(lm.n_layers)}
    with TwoDevices():
        accelerate.dispatch_model(lm.model, places, main_device="cpu")
        monkeypatch.setattr(lm, "check_finite", lambda *args: None)
        yield lm


@pytest.mark.parametrize("label", KINDS)
def test_a_sweep_stays_where_the_blocks_are(lm, label, monkeypatch):
    monkeypatch.setattr(sweep, "read_metrics", lambda logits, *ids: {"p": np.zeros(tuple(logits.shape[:-1]))})
    ids = torch.arange(2, 11)
    recording = record_run(lm, ids.expand(4, -1), lambda embedded: embedded)
    assert [state.device for state in recording.states] == [CPU, CPU, CPU, META, META]
    runs = tracing.Runs(lm, Prompt("", "", ids, (1, 3)), tracing.TraceSettings(samples=3), recording, 5, None, 1.0)
    kind, severed = KINDS[label]
    with torch.no_grad():
        swept = sweep.Sweep(runs, 2, kind, severed, sweep.columns_of(kind, lm.n_layers, 2))
        assert swept.metrics()["p"].mean(axis=1).shape == (4,)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_gradient_of_v_star_comes_back_to_where_it_began(lm, layer):
    texts = record_suffixes(lm, [[3, 4, 5, 6, 7], [8, 9, 10, 11]], [2, 1])
    delta = torch.zeros(2, 32, requires_grad=True)
    logits = lm.logits(texts.run(lm, layer, delta))
    (gradient,) = torch.autograd.grad(logits.sum(), [delta])
    assert logits.device == gradient.device == lm.device == CPU


@torch.no_grad()
def test_changes_side_by_side_are_where_their_layers_are(lm):
    shape = lm.memory(0).weight.shape
    deltas = [torch.zeros(shape[::-1] if lm.memory_is_transposed(0) else shape) for _ in range(2)]
    changes = [Change(), Change(0, deltas[0]), Change(3, deltas[1])]
    states = last_states(lm, changes, [(0, (3, 4, 5)), (1, (3, 4, 5, 6)), (2, (7, 8))])
    assert states.device == lm.logits(states).device == CPU


@pytest.mark.parametrize("wrong", [torch.mm, torch.add, lambda x, y: torch.cat([x, y]), lambda x, y: x[y[0].long()]])
def test_what_is_on_two_devices_is_refused(wrong):
    """Otherwise nothing above would say anything."""
    with TwoDevices(), pytest.raises(RuntimeError, match="tensors of two devices"):
        wrong(torch.ones(2, 2), torch.ones(2, 2, device=META))
