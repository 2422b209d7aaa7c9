"""Other libraries are given the cells and the noise that ours is, and those that are missing are said to be."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_model

from benchmarks import peers
from benchmarks.plain_tracing import one_forward_a_cell


@pytest.fixture(scope="module")
def lm():
    return tiny_model("llama")


@pytest.mark.parametrize("kind", peers.KINDS)
def test_a_way_of_full_forwards_has_our_cells(kind: str, lm) -> None:
    asked, layers = peers.question(lm, samples=2, window=2), range(1, 3)
    ways = {"rome_lab": peers.by_rome_lab, "plain": lambda a, k, x: one_forward_a_cell(a, (k,))[k][:, x]}
    table = pd.DataFrame(peers.compared(asked, ways, (kind,), layers, 1)).set_index("measure")
    assert table.loc[f"{kind}: largest difference of plain", "median"] < 1e-5
    assert table.loc[f"{kind}: plain / rome_lab", "median"] > 0
    assert np.nanstd(peers.by_rome_lab(asked, kind, layers)) > 0


@pytest.mark.parametrize("kind", peers.KINDS)
def test_cells_made_one_by_one_restore_what_ours_restore(kind: str, lm) -> None:
    """The hooks that every library is given, on plain transformers."""
    asked = peers.question(lm, samples=3, window=3)
    begin, end = asked.prompt.subject_range
    module = lm.blocks.__getitem__ if kind == "state" else lm.mlp
    clean: dict[int, object] = {}
    handles = [
        module(x).register_forward_hook(lambda m, a, out, x=x: clean.__setitem__(x, out)) for x in range(lm.n_layers)
    ]
    answer = int(lm.model(asked.prompt.ids[None]).logits[0, -1].argmax())
    for handle in handles:
        handle.remove()

    def tensor(out):
        return out[0] if isinstance(out, tuple) else out

    def corrupt(module, args, out):
        out = out.clone()
        out[:, begin:end] += asked.noise
        return out

    def one_cell(token: int, layer: int):
        def restore(module, args, out, x):
            tensor(out)[:, token] = tensor(clean[x])[0, token]

        handles = [lm.embedding.register_forward_hook(corrupt)]
        for x in peers.restored_layers(kind, layer, asked):
            handles.append(module(x).register_forward_hook(partial(restore, x=x)))
        logits = lm.model(asked.prompt.ids.expand(3, -1)).logits[:, -1]
        for handle in handles:
            handle.remove()
        return logits

    layers = range(lm.n_layers)
    cells = peers.by_cells(asked, layers, one_cell, answer)
    np.testing.assert_allclose(cells, peers.by_rome_lab(asked, kind, layers), atol=1e-5)


def test_libraries_that_are_not_here_are_named_with_the_reason(lm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "nobody", ("no-such-package-of-ours", peers.nnsight))
    ways, missing = peers.available(lm, "no folder", ["nobody"])
    assert list(ways) == ["rome_lab"] and missing == {"nobody": "not installed"}
