"""Every row of the table of verified models, and what is particular to some families."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from families import PROMPT, SUBJECT, VERIFIED, family_model, page_of, verified_row
from oracle import FullForward

from rome_lab import Fact, FixedNoise, causal_trace, rome
from rome_lab.facts import read_prompt
from rome_lab.tracing import KINDS

DOCS = Path(__file__).parents[2] / "docs"
TABLE = pd.read_csv(DOCS / "verified_models.csv")


FEW = ("GPT-2", "Llama 3 (scaled rope)", "Gemma 3 with images", "Phi-1, Phi-2 (parallel)", "BLOOM (alibi)", "Mixtral")


@pytest.mark.parametrize("name", [x if x in FEW else pytest.param(x, marks=pytest.mark.slow) for x in VERIFIED])
def test_a_row_of_the_verified_models_is_what_verify_finds(name):
    row = TABLE.set_index("family").loc[name]
    now = verified_row(name, row["date"])
    assert (now["kinds"], now["edit"], now["example"]) == (row["kinds"], row["edit"], row["example"])
    assert now["kinds"] == ", ".join(KINDS) and now["edit"].startswith(
        "exact, undone" if VERIFIED[name].edited else "refused"
    )
    in_float32 = name in ("GPT-J", "GPT-Neo", "CodeGen") or name.startswith("DeepSeek")  # a part of it, in any dtype
    limit = 1e-6 if in_float32 else 1e-11
    assert max(*(x[column] for x in (now, row) for column in ("largest difference", "readout"))) < limit


def test_the_page_of_verified_models_is_its_table():
    assert list(TABLE["family"]) == list(VERIFIED)
    assert (DOCS / "verified_models.md").read_text(encoding="utf-8") == page_of(TABLE)


@pytest.mark.parametrize("name", ["Falcon (new blocks)", "BLOOM (alibi)", "Mixtral", "OLMo 2 (norms after)"])
def test_odd_families_equal_one_full_forward_a_cell(name):
    """Beside the tests' own oracle, not that of `rl.verify`: sums in place, biases by head, experts, norms after."""
    lm = family_model(name)
    read = read_prompt(lm, PROMPT, SUBJECT)
    begin, end = read.subject_range
    noise = torch.randn(2, end - begin, 32, generator=torch.Generator().manual_seed(1))
    for kind in ("mlp", "attn"):
        *_, table = FullForward(lm, read.ids, read.subject_range, noise).trace(kind, window=2)
        trace = causal_trace(lm, PROMPT, SUBJECT, kind, FixedNoise(noise), window=2)
        assert np.abs(trace.p_restored - table).max() <= 1e-9 * table.std(), kind


def test_an_edit_of_a_mixture_of_experts_is_refused_and_one_of_a_dense_layer_is_not():
    lm = family_model("DeepSeek V3 (first layer dense)")
    assert lm.sparse == {1, 2, 3} and lm.memory(0) is lm.blocks[0].mlp.down_proj
    fact = Fact(SUBJECT, "{} is in the", "north")
    with pytest.raises(
        ValueError, match=r"layer 2 of .* cannot be edited: .*mixture of experts.*edit one of the layers 0\."
    ):
        rome(lm, fact, "south", layer=2, C=torch.eye(24), progress=False)
