"""bfloat16 and float16: how far their traces and edits are from those of float32, in every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_editing import logits, make
from tiny import FAMILIES, tiny_model

from rome_lab import causal_trace
from rome_lab.tracing.trace import KINDS

PROMPT = ("The Eiffel Tower is in", "Eiffel Tower")
# The largest that were seen, rounded up: a probability of a trace, and |W_hat k* - v*| / |v*| of the weights as stored.
ERRORS = {torch.bfloat16: (0.05, 3e-3), torch.float16: (0.006, 4e-4)}


def half(family, dtype):
    lm = tiny_model(family)
    lm.model.to(dtype)
    return lm


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_traces_are_those_of_float32_up_to_the_stated_error(family, dtype):
    lm, rough = tiny_model(family), half(family, dtype)
    for kind, severed in KINDS.values():
        one, other = (causal_trace(x, *PROMPT, kind, samples=3, window=2, severed=severed) for x in (lm, rough))
        assert other.answer == one.answer
        assert 0 < np.abs(other.p_restored - one.p_restored).max() <= ERRORS[dtype][0]
        assert one.p_restored.std() > 1e-4


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_edits_meet_their_constraint_up_to_the_stated_error_and_are_undone_bit_for_bit(family, dtype):
    lm = half(family, dtype)
    before, said = lm.fingerprint(), logits(lm)
    edit = make(lm)
    assert edit.Lambda.dtype == edit.v_star.dtype == torch.float32
    with edit.applied(lm):
        assert lm.memory(1).weight.dtype == dtype and not torch.equal(logits(lm), said)
        assert 1e-5 < edit.constraint_error <= ERRORS[dtype][1]
    assert lm.fingerprint() == before and torch.equal(logits(lm), said)
