"""One least squares: soft constraints solve their objective, hard ones are their limit, null spaces keep what is outside."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from test_update import COUNTS, SEEDS, H, conditioned, problem

from rome_lab.editing.remedies import prune, rect
from rome_lab.editing.update import DependentKeys, factorise, null_space, penalty, solve_change, solve_update


def lacking(seed: int, n: int):
    """C, K, R in float64."""
    W, C, K, V = problem(seed, n)
    return C, K.double(), V.double() - W.double() @ K.double()


@settings(deadline=None, max_examples=30)
@given(SEEDS, COUNTS)
def test_soft_constraints_are_the_published_closed_form(seed: int, n: int) -> None:
    C, K, R = lacking(seed, n)
    for weight in (1e-3, 1.0, 1e3):
        delta = solve_change(factorise(C), K, R, weight).delta
        published = R @ K.T @ torch.linalg.inv(weight * C + K @ K.T)  # MEMIT, Eqn 14
        torch.testing.assert_close(delta, published, rtol=1e-7, atol=1e-9 * float(published.abs().max()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weight", [0.1, 10.0])
def test_soft_constraints_minimise_their_objective(seed: int, weight: float) -> None:
    C, K, R = (x.numpy() for x in lacking(seed, 3))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        dW = flat.reshape(len(R), H)
        missing = dW @ K - R
        gradient = 2 * weight * dW @ C + 2 * missing @ K.T
        return weight * np.trace(dW @ C @ dW.T) + (missing**2).sum(), gradient.ravel()

    found = scipy.optimize.minimize(
        objective, np.zeros(len(R) * H), jac=True, method="L-BFGS-B",
        options={"maxiter": 20000, "maxfun": 50000, "ftol": 1e-16, "gtol": 1e-11, "maxcor": 50},
    )  # fmt: skip
    delta = solve_change(factorise(torch.from_numpy(C)), torch.from_numpy(K), torch.from_numpy(R), weight).delta.numpy()
    assert objective(delta.ravel())[0] <= found.fun * (1 + 1e-9)
    assert np.abs(objective(delta.ravel())[1]).max() < 1e-8
    np.testing.assert_allclose(delta, found.x.reshape(delta.shape), rtol=1e-3, atol=1e-4 * np.abs(delta).max())


@settings(deadline=None, max_examples=20)
@given(SEEDS, COUNTS)
def test_soft_constraints_whose_weight_goes_to_zero_become_hard_ones(seed: int, n: int) -> None:
    C, K, R = lacking(seed, n)
    factor = factorise(C)
    hard = solve_change(factor, K, R).delta
    K_white = factor.whiten(K)
    scale = float(torch.linalg.eigvalsh(K_white.T @ K_white)[0])
    errors = [
        float((solve_change(factor, K, R, scale * x).delta - hard).norm() / hard.norm()) for x in (1e-3, 1e-6, 1e-9)
    ]
    assert errors[0] < 1e-2 and errors[1] < 1e-5 and errors[2] < 1e-7
    torch.testing.assert_close(hard @ K, R, rtol=1e-7, atol=1e-8)


def test_hard_constraints_are_what_solve_update_solves() -> None:
    W, C, K, V = problem(5, 3)
    torch.testing.assert_close(
        solve_change(factorise(C), K, V.double() - W.double() @ K.double()).delta, solve_update(W, C, K, V).delta
    )


def test_a_larger_weight_keeps_more_and_writes_less() -> None:
    C, K, R = lacking(6, 3)
    deltas = [solve_change(factorise(C), K, R, weight).delta for weight in (0.0, 0.1, 1.0, 10.0)]
    kept = [penalty(delta, C) for delta in deltas]
    missing = [float((delta @ K - R).norm()) for delta in deltas]
    assert kept == sorted(kept, reverse=True) and missing == sorted(missing)


def test_soft_constraints_bear_one_key_twice_and_more_keys_than_components() -> None:
    C, K, R = lacking(7, 2 * H)
    assert torch.isfinite(solve_change(factorise(C), K, R, 1.0).delta).all()
    with pytest.raises(DependentKeys):
        solve_change(factorise(C), K, R)


THRESHOLD = 1e-2  # of conditioned(1e4): half of its eigenvalues are below it


def test_the_projector_is_symmetric_idempotent_and_commutes_with_C() -> None:
    C = conditioned(1e4)
    basis = null_space(factorise(C), THRESHOLD).basis
    P = basis @ basis.T
    assert basis.shape == (H, H // 2)
    torch.testing.assert_close(P, P.T)
    torch.testing.assert_close(P @ P, P)
    torch.testing.assert_close(P @ C, C @ P, rtol=0, atol=1e-14)
    assert float(torch.linalg.eigvalsh(P @ C @ P)[-1]) < THRESHOLD


@settings(deadline=None, max_examples=30)
@given(SEEDS, COUNTS)
def test_in_a_null_space_the_change_is_the_published_one_and_keeps_all_keys_outside(seed: int, n: int) -> None:
    C = conditioned(1e4)
    _, K, R = lacking(seed, n)
    generator = torch.Generator().manual_seed(seed)
    earlier = torch.randn(H, 3, generator=generator, dtype=torch.float64)
    factor = null_space(factorise(C), THRESHOLD, earlier, ridge=0.5)
    delta = solve_change(factor, K, R, 1.0).delta
    P = factor.basis @ factor.basis.T
    published = R @ K.T @ P @ torch.linalg.inv(earlier @ earlier.T @ P + K @ K.T @ P + 0.5 * torch.eye(H).double())
    torch.testing.assert_close(delta, published, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(delta @ P, delta, rtol=0, atol=1e-12)
    outside = torch.linalg.eigh(C)[1][:, H // 2 :]
    K0 = outside @ torch.randn(H // 2, 5, generator=generator, dtype=torch.float64)
    assert float((delta @ K0).abs().max()) < 1e-13 * float(delta.norm() * K0.norm())


def test_in_a_null_space_hard_constraints_are_met_and_keys_of_earlier_edits_are_kept_as_the_ridge_goes_to_zero() -> (
    None
):
    C = conditioned(1e4)
    _, K, R = lacking(8, 2)
    earlier = torch.randn(H, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = []
    for ridge in (1.0, 1e-4, 1e-8):
        delta = solve_change(null_space(factorise(C), THRESHOLD, earlier, ridge), K, R).delta
        torch.testing.assert_close(delta @ K, R, rtol=1e-8, atol=1e-8)
        moved.append(float((delta @ earlier).norm()))
    assert moved[2] < 1e-6 < moved[1] < moved[0]


def test_an_empty_null_space_is_refused_saying_which_threshold_leaves_how_much() -> None:
    C = conditioned(1e4)
    with pytest.raises(
        ValueError, match=r"none of the 20 eigenvalues .* threshold 1e-06.*smallest is 1\.0e-04.*leave 10%"
    ):
        null_space(factorise(C), 1e-6)


# Remedies, each by its definition


@pytest.mark.parametrize("share", [0.1, 0.4, 1.0])
def test_rect_keeps_the_entries_that_change_most_relative_to_their_weight(share: float) -> None:
    W, _, K, V = problem(9, 2)
    W, delta = W.double(), V.double() @ K.double().T
    kept = rect(delta, W, share)
    chosen = kept != 0
    assert int(chosen.sum()) == round(share * delta.numel()) and torch.equal(kept[chosen], delta[chosen])
    ratio = (delta / W).abs()
    assert share == 1 or float(ratio[chosen].min()) >= float(ratio[~chosen].max())


def test_prune_compresses_only_singular_values_above_the_largest_of_W() -> None:
    W, _, K, V = problem(10, 4)
    W = W.double()
    largest = float(torch.linalg.matrix_norm(W, 2))
    U, _, Vh = torch.linalg.svd(V.double() @ K.double().T, full_matrices=False)
    values = torch.tensor([5.0, 2.0, 0.9, 0.1], dtype=torch.float64) * largest
    delta = U[:, :4] * values @ Vh[:4]
    base = 1.5
    after = prune(delta, W, base)
    expected = [largest + np.log(x / largest) / np.log(base) if x > largest else x for x in values.tolist()]
    np.testing.assert_allclose(torch.linalg.svdvals(after)[:4], sorted(expected, reverse=True), rtol=1e-9)
    small = delta * 0.1
    assert torch.equal(prune(small, W, base), small), "what is small is left as it is, bit for bit"
