"""Updates of a memory: exact, the least among all that meet the constraints, and refused where there is none."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rome_lab.editing.update import (
    ENOUGH,
    DependentKeys,
    Factor,
    apply_update,
    constraint_error,
    factorise,
    penalty,
    solve_update,
)

D, H = 12, 20
SEEDS = st.integers(0, 2**32 - 1)
COUNTS = st.integers(1, 4)


def problem(seed: int, n: int, outputs: int = D, inputs: int = H) -> tuple[torch.Tensor, ...]:
    """W, C, K, V with a C whose components differ in size and hang together, float32 but for C."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    samples = normal(inputs, 4 * inputs) * torch.logspace(-1, 1, inputs, dtype=torch.float64)[:, None]
    samples[1] += samples[0]
    C = samples @ samples.T / samples.shape[1]
    return normal(outputs, inputs).float(), C, normal(inputs, n).float(), normal(outputs, n).float()


def conditioned(condition: float, seed: int = 0, size: int = H) -> torch.Tensor:
    """A dense positive definite matrix with this condition number."""
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).double())
    C = basis * torch.logspace(0, -np.log10(condition), size, dtype=torch.float64) @ basis.T
    return (C + C.T) / 2


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_one_key_gives_lambda_and_u_of_equations_13_and_17(seed: int) -> None:
    W, C, K, V = (x.double().numpy() for x in problem(seed, 1))
    update = solve_update(*problem(seed, 1))
    u = np.linalg.solve(C, K)
    np.testing.assert_allclose(update.u.numpy(), u, rtol=1e-8, atol=1e-10 * np.abs(u).max())
    Lambda = (V - W @ K) / (u.T @ K)
    np.testing.assert_allclose(update.Lambda.numpy(), Lambda, rtol=1e-8, atol=1e-10 * np.abs(Lambda).max())
    np.testing.assert_allclose(update.delta.numpy(), update.Lambda.numpy() @ update.u.numpy().T)


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_the_block_system_of_equation_15_has_the_same_solution(seed: int) -> None:
    W, C, K, V = (x.double().numpy() for x in problem(seed, 1))
    u = np.linalg.inv(C) @ K
    block = np.block([[np.eye(H), K], [-u.T, np.zeros((1, 1))]])
    solution = np.linalg.solve(block.T, np.hstack([W, V]).T).T  # [W_hat Lambda] block = [W v]
    update = solve_update(*problem(seed, 1))
    W_hat = apply_update(problem(seed, 1)[0], update, *problem(seed, 1)[2:])
    assert relative(W_hat.double().numpy(), solution[:, :H]) < 1e-6
    assert relative(update.Lambda.numpy(), solution[:, H:]) < 1e-8


@settings(deadline=None, max_examples=30)
@given(SEEDS, COUNTS)
def test_constrained_least_squares_on_the_memorised_pairs_gives_the_same_weights(seed: int, n: int) -> None:
    """Eqns 5 to 7: the least ||W_hat K0 - V0|| with W_hat K = V, found in the null space of the constraint."""
    _, _, K, V = (x.double().numpy() for x in problem(seed, n))
    random = np.random.default_rng(seed)
    K0, V0 = random.normal(size=(H, 90)) * np.logspace(-1, 1, H)[:, None], random.normal(size=(D, 90))
    W = np.linalg.lstsq(K0.T, V0.T, rcond=None)[0].T
    some = V @ np.linalg.pinv(K)
    free = scipy.linalg.null_space(K.T)  # W_hat = some + X freeT meets the constraint for every X
    X = scipy.linalg.lstsq((free.T @ K0).T, (V0 - some @ K0).T)[0].T
    expected = some + X @ free.T
    arguments = [torch.from_numpy(x).float() for x in (W, K, V)]
    update = solve_update(arguments[0], torch.from_numpy(K0 @ K0.T), *arguments[1:])
    assert relative(apply_update(arguments[0], update, *arguments[1:]).numpy(), expected) < 1e-4


@settings(deadline=None, max_examples=50)
@given(SEEDS, COUNTS, st.floats(1e-3, 1e3))
def test_no_other_update_that_meets_the_constraints_has_a_smaller_penalty(seed: int, n: int, size: float) -> None:
    W, C, K, V = problem(seed, n)
    delta = solve_update(W, C, K, V).delta
    generator = torch.Generator().manual_seed(seed + 1)
    basis, _ = torch.linalg.qr(K.double())
    other = size * torch.randn(D, H, generator=generator, dtype=torch.float64)
    other -= other @ basis @ basis.T  # annihilates K
    assert float(((W.double() + delta + other) @ K.double() - V.double()).abs().max()) < 1e-6 * max(1, size)
    least, competing = penalty(delta, C), penalty(delta + other, C)
    assert competing > least
    # The optimum is where the penalty is stationary, so the competitor costs exactly its own penalty more.
    assert competing == pytest.approx(least + penalty(other, C), rel=1e-6)


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.integers(1, 8), st.sampled_from([1e-3, 1.0, 1e4]))
def test_every_constraint_is_met_by_the_stored_weights(seed: int, n: int, scale: float) -> None:
    W, C, K, V = problem(seed, n)
    C, V = C * scale, V * 5
    W_hat = apply_update(W, solve_update(W, C, K, V), K, V)
    assert W_hat.dtype == torch.float32 and W_hat.shape == W.shape
    errors = constraint_error(W_hat, K, V)
    expected = np.linalg.norm(W_hat.double().numpy() @ K.double().numpy() - V.double().numpy(), axis=0)
    np.testing.assert_allclose(errors.numpy(), expected / np.linalg.norm(V.double().numpy(), axis=0))
    assert errors.shape == (n,) and float(errors.max()) < 1e-5


def test_the_identity_as_covariance_adds_the_error_along_the_key() -> None:
    W, _, K, V = problem(3, 1)
    update = solve_update(W, torch.eye(H), K, V)
    k, v = K.double(), V.double()
    torch.testing.assert_close(update.u, k)
    torch.testing.assert_close(update.delta, (v - W.double() @ k) @ k.T / (k.T @ k))


def test_a_key_that_has_its_value_already_changes_nothing() -> None:
    W, C, K, _ = problem(4, 2)
    update = solve_update(W, C, K, W.double() @ K.double())
    assert float(update.delta.abs().max()) < 1e-12


@settings(deadline=None, max_examples=20)
@given(SEEDS, COUNTS)
def test_the_scale_and_the_order_of_keys_do_not_change_the_weights(seed: int, n: int) -> None:
    W, C, K, V = problem(seed, n)
    K, V = K.double(), V.double()
    expected = solve_update(W, C, K, V).delta
    factors = torch.logspace(-9, 9, n, dtype=torch.float64)
    scaled = solve_update(W, C, K * factors, V * factors).delta
    turned = solve_update(W, C, K.flip(1), V.flip(1)).delta
    for other in (scaled, turned, solve_update(W, 1e-20 * C, K, V).delta):
        torch.testing.assert_close(other, expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("n", [1, 3])
def test_an_ill_conditioned_covariance_still_meets_the_constraints(n: int) -> None:
    W, _, K, V = problem(5, n)
    dense = conditioned(1e8)
    assert float(torch.linalg.cond(dense)) == pytest.approx(1e8, rel=1e-3)
    spread = torch.logspace(0, -4, H)
    graded = (conditioned(10) * torch.outer(spread, spread)).float()  # as where some components are hardly ever active
    assert float(torch.linalg.cond(graded.double())) > 1e8
    for C in (dense, graded):
        W_hat = apply_update(W, solve_update(W, C, K, V), K, V)
        # The update is large here, and rounding the weights to float32 is all that is lost.
        rounding = (
            torch.finfo(torch.float32).eps * (W_hat.double().abs() @ K.double().abs()).norm(dim=0) / V.norm(dim=0)
        )
        assert bool((constraint_error(W_hat, K, V) < rounding).all())
        assert float(constraint_error(W_hat, K, V).max()) < 1e-5


def test_a_factor_can_be_kept_and_gives_the_same_update() -> None:
    W, C, K, V = problem(6, 2)
    factor = factorise(C, tokens=500)
    assert isinstance(factor, Factor) and factor.tokens == 500
    torch.testing.assert_close(factor.lower @ factor.lower.T, C)
    torch.testing.assert_close(C @ factor.solve(K.double()), K.double())
    again = solve_update(W, factor, K, V)
    assert torch.equal(again.delta, solve_update(W, C, K, V).delta)


def test_penalty_is_the_mean_squared_change_of_the_values_of_the_keys_behind_C() -> None:
    random = torch.Generator().manual_seed(7)
    keys = torch.randn(H, 100, generator=random, dtype=torch.float64)
    delta = torch.randn(D, H, generator=random, dtype=torch.float64)
    mean = float((delta @ keys).square().sum(0).mean())
    assert penalty(delta, keys @ keys.T / 100) == pytest.approx(mean, rel=1e-12)


def test_bfloat16_weights_keep_their_type_and_are_the_nearest_to_the_exact_ones() -> None:
    W, C, K, V = problem(8, 1)
    W = W.bfloat16()
    update = solve_update(W, C, K, V)
    W_hat = apply_update(W, update, K, V)
    assert torch.equal(W_hat, (W.double() + update.delta).bfloat16())


def test_a_value_that_rounding_drowns_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    W, C, K, V = problem(9, 1)
    with caplog.at_level(logging.WARNING):
        apply_update(W, solve_update(W, C, K, V), K, V)
        assert not caplog.records
        tiny = V * 1e-4
        W_hat = apply_update(W, solve_update(W, C, K, tiny), K, tiny)
    assert float(constraint_error(W_hat, K, tiny)) > 1e-5 and "relative error" in caplog.text


@pytest.mark.parametrize(
    ("columns", "make"),
    [
        ([0, 2], lambda K: torch.stack([K[:, 0], K[:, 1], K[:, 0]], 1)),
        ([1, 3], lambda K: torch.stack([K[:, 0], K[:, 1], K[:, 2], -7 * K[:, 1] * (1 + 1e-7)], 1)),
        ([0, 1, 3], lambda K: torch.stack([K[:, 0], K[:, 1], K[:, 2], K[:, 0] + 2 * K[:, 1]], 1)),
        ([1], lambda K: torch.stack([K[:, 0], 0 * K[:, 0]], 1)),
    ],
)
def test_dependent_keys_are_refused_and_named(columns: list[int], make) -> None:
    W, C, K, _ = problem(10, 4)
    keys = make(K)
    with pytest.raises(DependentKeys, match=", ".join(map(str, columns))) as caught:
        solve_update(W, C, keys, torch.ones(D, keys.shape[1]))
    assert caught.value.columns == columns


def test_more_keys_than_components_are_refused() -> None:
    W, C, K, V = problem(11, H + 2)
    with pytest.raises(DependentKeys) as caught:
        solve_update(W, C, K, V)
    assert max(caught.value.columns) == H


def test_keys_that_are_near_but_apart_are_each_given_their_value() -> None:
    W, C, K, V = problem(12, 2)
    K[:, 1] = K[:, 0] + 0.02 * K[:, 1]
    W_hat = W.double() + solve_update(W, C, K, V).delta
    assert float(constraint_error(W_hat, K, V).max()) < 1e-10


@pytest.mark.parametrize("tokens", [None, H - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_too_few_tokens_are_refused_saying_how_many_would_do(tokens: int | None, dtype: torch.dtype) -> None:
    keys = torch.randn(H, H - 1, generator=torch.Generator().manual_seed(13), dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"{tokens or 'unknown'}.*at least {H} .*{ENOUGH * H} tokens"):
        factorise((keys @ keys.T / (H - 1)).to(dtype), tokens)


@pytest.mark.parametrize("silent", [[3], [0, 7, 19], list(range(15))])
def test_components_that_are_zero_in_C_and_in_the_keys_take_no_part(silent: list[int]) -> None:
    W, C, K, V = problem(14, 2)
    C[silent], C[:, silent], K[silent] = 0, 0, 0
    rest = [x for x in range(H) if x not in silent]
    factor = factorise(C, tokens=len(rest))
    update = solve_update(W, factor, K, V)
    assert factor.unseen == tuple(silent) and update.delta[:, silent].abs().max() == 0
    assert float(constraint_error(W.double() + update.delta, K, V).max()) < 1e-12
    without = solve_update(W[:, rest], C[rest][:, rest], K[rest], V).delta
    torch.testing.assert_close(update.delta[:, rest], without, rtol=1e-8, atol=1e-10)


def test_a_key_that_is_not_zero_where_C_has_seen_nothing_is_refused_by_name() -> None:
    W, C, K, V = problem(14, 2)
    C[3] = C[:, 3] = 0
    message = r"1 of its 20 components \(3\) are not zero, and were zero at every token of 99 tokens"
    with pytest.raises(ValueError, match=message):
        solve_update(W, factorise(C, tokens=99), K, V)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda C: C[:3], "shape"),
        (lambda C: C[0], "shape"),
        (lambda C: C.long(), "int64"),
        (lambda C: C.index_fill(0, torch.tensor(2), float("nan")), "NaN"),
        (lambda C: C + torch.eye(H).roll(1, 0), "symmetric"),
        (lambda C: -C, "cannot be inverted"),
        (lambda C: C - 0.3 * torch.eye(H), "not positive definite"),
    ],
)
def test_what_is_no_second_moment_is_refused(change, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        factorise(change(conditioned(10)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda W, C, K, V: (W, C, K[:, 0], V), "shapes"),
        (lambda W, C, K, V: (W.T, C, K, V), "shapes"),
        (lambda W, C, K, V: (W, C, K[:, :0], V[:, :0]), "shapes"),
        (lambda W, C, K, V: (W, C, K, V[:, :1]), "shapes"),
        (lambda W, C, K, V: (W, C[1:, 1:], K, V), "19 components, but W takes 20"),
        (lambda W, C, K, V: (W, C, K, V / 0), "V holds NaN or infinity"),
        (lambda W, C, K, V: (W * float("nan"), C, K, V), "W holds NaN or infinity"),
    ],
)
def test_bad_problems_are_refused(change, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        solve_update(*change(*problem(14, 2)))


def test_weights_that_overflow_their_type_are_refused() -> None:
    W, C, K, V = problem(15, 1)
    with pytest.raises(ValueError, match="float16.*W_hat holds NaN or infinity"):
        apply_update(W.half(), solve_update(W.half(), C, K, 1e9 * V), K, 1e9 * V)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
