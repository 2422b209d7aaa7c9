"""Changes, one at a time in place and many side by side."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, TEXT, tiny_model

from rome_lab.models.changes import Change, side_by_side
from rome_lab.models.weights import read_weight


def random_change(lm, layer, seed, size=0.5):
    shape = (
        read_weight(lm.memory(layer)).shape[::-1]
        if lm.memory_is_transposed(layer)
        else read_weight(lm.memory(layer)).shape
    )
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return Change(layer, size * delta * read_weight(lm.memory(layer)).norm() / delta.norm())


def changes_of(lm):
    """Two at one layer, one at another, and one that changes nothing."""
    return [random_change(lm, 1, 0), Change(), random_change(lm, 2, 1), random_change(lm, 1, 2)]


def token_rows(lm, rows, length=12):
    ids = lm.tokenizer(" ".join(TEXT))["input_ids"]
    return torch.tensor([ids[5 * row : 5 * row + length] for row in range(rows)])


@torch.no_grad()
def in_place(lm, changes, owners, ids):
    """The slow way: the weights really changed, one row at a time."""
    logits = []
    for owner, row in zip(owners, ids, strict=True):
        with changes[owner].applied(lm):
            logits.append(lm.model(row[None], use_cache=False).logits[0])
    return torch.stack(logits)


OWNERS = [2, 0, 0, 1, 3, 0, 2]  # rows of change 0 and 2 are apart


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_side_by_side_are_as_if_each_were_run_with_its_own_weights(family):
    lm = tiny_model(family)
    changes, ids = changes_of(lm), token_rows(lm, len(OWNERS))
    with side_by_side(lm, changes, OWNERS):
        together = lm.model(ids, use_cache=False).logits
    apart = in_place(lm, changes, OWNERS, ids)
    unchanged = in_place(lm, [Change()], [0] * len(OWNERS), ids)
    assert (apart - unchanged).abs().amax(dim=(1, 2))[[owner != 1 for owner in OWNERS]].min() > 0.1
    torch.testing.assert_close(together, apart, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_a_change_of_several_layers_is_all_of_its_parts_in_place_and_side_by_side(family):
    lm = tiny_model(family)
    parts, ids, before = [random_change(lm, layer, layer) for layer in (0, 2)], token_rows(lm, 2), lm.fingerprint()
    both = Change((0, 2), tuple(part.delta for part in parts))
    with parts[0].applied(lm), parts[1].applied(lm):
        expected = lm.model(ids[:1], use_cache=False).logits[0]
    assert torch.equal(in_place(lm, [both], [0], ids[:1])[0], expected) and lm.fingerprint() == before
    with side_by_side(lm, [both, Change()], [0, 1]):
        together = lm.model(ids, use_cache=False).logits
    torch.testing.assert_close(together[0], expected, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(together[1], lm.model(ids[1:], use_cache=False).logits[0], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decoding_with_a_cache_side_by_side_gives_the_same_as_whole_texts(family):
    lm = tiny_model(family)
    changes, ids = changes_of(lm), token_rows(lm, len(OWNERS))
    with side_by_side(lm, changes, OWNERS):
        output = lm.model(ids[:, :7], use_cache=True)
        steps = [output.logits]
        for place in range(7, ids.shape[1]):
            output = lm.model(ids[:, place : place + 1], past_key_values=output.past_key_values, use_cache=True)
            steps.append(output.logits)
    apart = in_place(lm, changes, OWNERS, ids)
    torch.testing.assert_close(torch.cat(steps, dim=1), apart, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_change_moves_the_values_by_delta_k_and_leaves_the_weight_bit_for_bit(family):
    lm = tiny_model(family)
    change, before = random_change(lm, 1, 0), read_weight(lm.memory(1)).clone()
    k = torch.randn(3, change.delta.shape[1])
    with torch.no_grad():
        plain = lm.memory(1)(k)
        with change.applied(lm):
            moved = lm.memory(1)(k)
    torch.testing.assert_close(moved - plain, k @ change.delta.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(read_weight(lm.memory(1)), before)


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_after_an_exception_the_weights_and_the_modules_are_as_they_were(stop):
    lm = tiny_model("gpt2")
    changes, before = changes_of(lm), lm.fingerprint()
    with pytest.raises(stop), changes[0].applied(lm):
        assert lm.fingerprint() != before
        raise stop
    with pytest.raises(stop), side_by_side(lm, changes, [0, 2]):
        assert lm.fingerprint() == before
        raise stop
    assert lm.fingerprint() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_changes_at_one_layer_can_stand_inside_each_other():
    lm = tiny_model("llama")
    first, second = random_change(lm, 1, 0), random_change(lm, 1, 1)
    before = read_weight(lm.memory(1)).clone()
    with first.applied(lm):
        with second.applied(lm):
            torch.testing.assert_close(read_weight(lm.memory(1)), before + first.delta + second.delta)
        torch.testing.assert_close(read_weight(lm.memory(1)), before + first.delta)
    assert torch.equal(read_weight(lm.memory(1)), before)


def test_rows_without_a_delta_go_through_no_hook_of_a_matrix():
    lm = tiny_model("llama")
    with side_by_side(lm, [Change(), Change(preamble="Paris is in Italy. ")], [0, 1, 1]):
        assert not any(lm.memory(layer)._forward_hooks for layer in range(lm.n_layers))


def test_what_does_not_fit_is_refused_in_one_sentence():
    lm = tiny_model("gpt2")
    shape = random_change(lm, 1, 0).delta.shape
    with pytest.raises(ValueError, match="give both"):
        Change(layer=3)
    for layers, deltas in (((1, 1), 2), ((1, 2), 1), ((), 0)):
        with pytest.raises(ValueError, match="give each of them once, with a delta for each"):
            Change(layers, (torch.zeros(shape),) * deltas)
    with pytest.raises(ValueError, match="finite"):
        Change(1, torch.full(shape, torch.nan))
    with pytest.raises(ValueError, match=r"takes \(32, 128\)"), Change(1, torch.zeros(shape[::-1])).applied(lm):
        pass
    with pytest.raises(ValueError, match="layers 0 to 3"), side_by_side(lm, [Change(4, torch.zeros(shape))], [0]):
        pass
    with pytest.raises(ValueError, match="places in 1 changes"), side_by_side(lm, [Change()], [0, 1]):
        pass


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_a_batch_with_another_number_of_rows_is_refused(family):
    lm = tiny_model(family)
    with pytest.raises(ValueError, match="4 rows; expected 2"), side_by_side(lm, changes_of(lm), [0, 1]):
        lm.model(token_rows(lm, 4))


def test_in_half_precision_a_change_that_overflows_is_refused_and_leaves_the_model_as_it_was():
    lm = tiny_model("llama")
    lm.model.half()
    change, before = Change(1, torch.full((32, 48), 1e6)), lm.fingerprint()
    with pytest.raises(ValueError, match="overflows"), change.applied(lm):
        pass
    assert lm.fingerprint() == before
