"""Updates of a linear associative memory: keep what it has, write what it lacks (Appendix A, and its successors).

`factorise` prepares C, `solve_update` and `solve_change` find Lambda and u, `apply_update` makes W_hat; `constraint_error`
and `penalty` measure what came out. Matrices in, matrices out: nothing here knows a model. All arithmetic is float64.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rome_lab.base import OneLine

logger = logging.getLogger(__name__)

# A key is taken to depend on others where it is this near to their span, all of them of length 1 and whitened by C. On the
# embedded model, one key computed in two batches differs by 3e-6; one subject in two contexts, or two subjects, by 0.8.
DEPENDENT = 1e-3
TOLERANCE = 1e-5  # largest relative error of a constraint that goes without a warning in float32
# Tokens of text that C needs for each component of the key. On the embedded model (H = 1536, layer 3) edits with the C of
# 8,192 tokens do as well as with that of 49,152, by every score over 112 fresh cases: benchmarks/tokens.md.
ENOUGH = 6
# With fewer than this C is nearly singular, and updates are large along what it has hardly seen: of 1,600 tokens (one for
# each component) that of an edit was 0.99 of W, of 49,152 it was 0.08.
FEW_TOKENS = 3


class DependentKeys(ValueError):
    """The keys of an update are linearly dependent; `columns` lists those that are, by their place in K."""

    def __init__(self, columns: list[int]) -> None:
        self.columns = columns
        listed = ", ".join(map(str, columns))
        super().__init__(
            f"solve_update: the keys {listed} (columns of K) are linearly dependent, so no W can give each of them a value "
            "of its own; leave one of them out, such as the second of two edits of one subject."
            if len(columns) > 1
            else f"solve_update: the key {listed} (column of K) is zero, so no W can give it a value; leave it out."
        )


@dataclass(frozen=True, eq=False, repr=False)
class Factor(OneLine):
    """The Cholesky factor of C, made once and used for many updates; or of a matrix within a subspace, see `null_space`.

    Attributes:
        lower: (m, m) lower triangular, float64; lower @ lower.T = C, or UT C U.
        tokens: how many tokens C was built from, where that is known.
        unseen: components of the key that were zero at every one of them. They are left out: W's columns there stay as they
            are, and a key that is not zero there is refused.
        basis: U, (H, m) float64 with orthonormal columns: an update changes nothing outside their span. None where that is
            the whole space, so that m = H.
    """

    lower: Float[Tensor, "m m"]
    tokens: int | None = None
    unseen: tuple[int, ...] = ()
    basis: Float[Tensor, "H m"] | None = None

    @property
    def size(self) -> int:
        """H."""
        return len(self.lower if self.basis is None else self.basis)

    @property
    def rank(self) -> int:
        """How many keys can have a value of their own."""
        return len(self.lower) - (len(self.unseen) if self.basis is None else 0)

    @cached_property
    def spectrum(self) -> tuple[Float[Tensor, " H"], Float[Tensor, "H H"]]:
        """Eigenvalues of C, the smallest first, and its eigenvectors, one a column; 1 of each component that was unseen."""
        return torch.linalg.eigh(self.lower @ self.lower.T)

    def whiten(self, K: Float[Tensor, "H n"]) -> Float[Tensor, "m n"]:
        """lower^-1 K, (m, n): keys in coordinates in which C is the identity; in a subspace lower^-1 UT K.

        Raises: ValueError: a key is not zero where every key behind C is.
        """
        if active := [component for component in self.unseen if K[component].any()]:
            shown = ", ".join(map(str, active[:5])) + (", ..." if len(active) > 5 else "")
            raise ValueError(
                f"factorise: C cannot be inverted for this key: {len(active)} of its {len(K)} components ({shown}) are not "
                f"zero, and were zero at every token of {tokens_in_words(self.tokens)}; {advice(len(K))}, in text that "
                "activates them."
            )
        inside = K if self.basis is None else self.basis.T @ K
        return torch.linalg.solve_triangular(self.lower, inside, upper=False)

    def solve(self, K: Float[Tensor, "H n"]) -> Float[Tensor, "H n"]:
        """C^-1 K, (H, n); in a subspace U (UT C U)^-1 UT K."""
        inside = torch.linalg.solve_triangular(self.lower.T, self.whiten(K), upper=True)
        return inside if self.basis is None else self.basis @ inside


@dataclass(frozen=True, eq=False, repr=False)
class Update(OneLine):
    """A change of W; of rank n.

    Attributes:
        Lambda: (D, n).
        u: (H, n) = C^-1 K, as `Factor.solve` has it.
    """

    Lambda: Float[Tensor, "D n"]
    u: Float[Tensor, "H n"]

    @property
    def delta(self) -> Float[Tensor, "D H"]:
        """W_hat - W, float64: a sum of outer products, added up one by one so that every machine gets the same bits."""
        return sum(map(torch.outer, self.Lambda.double().T, self.u.double().T))


def factorise(C: Float[Tensor, "H H"], tokens: int | None = None) -> Factor:
    """Cholesky factor of C, or the reason why C cannot be inverted.

    Args:
        C: (H, H) uncentred second moment of the keys.
        tokens: how many tokens C was built from, where that is known.

    Raises:
        ValueError: C is not square, symmetric, finite and positive definite to the precision of its dtype; the message
            says how many tokens it was built from and how many would do.
    """
    if C.ndim != 2 or C.shape[0] != C.shape[1] or not C.is_floating_point():
        raise ValueError(
            f"factorise: C is {C.dtype} of shape {tuple(C.shape)}; expected floating point of shape (H, H)."
        )
    check_finite("factorise", C=C)
    eps = torch.finfo(C.dtype).eps
    C = precise(C)
    scale = C.diagonal().abs().sqrt()
    if float((C - C.T).abs().max()) > 100 * eps * float(C.abs().max()):
        raise ValueError("factorise: C is not symmetric; expected a second moment, the mean of k kT over tokens.")
    unseen = scale == 0  # neurons that never fire, say: as long as the key has none of them either, they take no part
    scale = scale.where(~unseen, 1.0)
    C = C + unseen.to(C).diag()
    # With every component scaled to length 1, the pivots say how far each is from the span of those before it.
    lower, failed = torch.linalg.cholesky_ex(C / torch.outer(scale, scale))
    if (
        (tokens is not None and tokens < int((~unseen).sum()))
        or failed
        or float(lower.diagonal().min()) ** 2 < 10 * eps
    ):
        raise ValueError(
            f"factorise: C of {tokens_in_words(tokens)} cannot be inverted, because it is not positive definite: "
            f"with keys of {len(C)} components, {advice(len(C))}."
        )
    return Factor(lower * scale[:, None], tokens, tuple(unseen.nonzero().flatten().tolist()))


def warn_of_few(tokens: int | None, size: int, doing: str) -> None:
    """Log a warning where C was built from so few tokens that it is nearly singular."""
    if tokens is not None and tokens < FEW_TOKENS * size:
        logger.warning(
            "%s: C was built from %d tokens, few for the %d components of the key, so that edits change W more than they "
            "need to; %d tokens would do.", doing, tokens, size, ENOUGH * size,
        )  # fmt: skip


def tokens_in_words(tokens: int | None) -> str:
    return "an unknown number of tokens" if tokens is None else f"{tokens} tokens"


def advice(size: int) -> str:
    return f"at least {size} independent keys are needed; {ENOUGH * size} tokens of varied text would do"


def solve_update(
    W: Float[Tensor, "D H"], C: Float[Tensor, "H H"] | Factor, K: Float[Tensor, "H n"], V: Float[Tensor, "D n"]
) -> Update:
    """The update of W that makes W_hat K = V and changes everything else as little as possible (Appendix A, Eqn 17).

        W_hat = W + Lambda (C^-1 K)T,  Lambda = (V - W K) (KT C^-1 K)^-1

    It minimises tr(dW C dWT) among all dW with (W + dW) K = V. With one key it is the paper's rank-one update.

    Args:
        W: (D, H) weights, (out, in).
        C: (H, H) uncentred second moment of the keys, or its Factor.
        K: (H, n) keys, one a column.
        V: (D, n) the value wanted for each key.

    Raises:
        ValueError: shapes that do not fit, NaN or infinity, C singular.
        DependentKeys: the keys are linearly dependent; the message and `columns` say which.
    """
    factor = C if isinstance(C, Factor) else factorise(C)
    check_shapes("solve_update", W, K, V)
    check_finite("solve_update", W=W, K=K, V=V)
    W, K, V = (precise(x).to(factor.lower.device) for x in (W, K, V))
    if factor.size != W.shape[1]:
        raise ValueError(
            f"solve_update: C is of keys with {factor.size} components, but W takes {W.shape[1]}; "
            "use the covariance of the same model and layer."
        )
    return solve_change(factor, K, V - W @ K)


def solve_change(factor: Factor, K: Float[Tensor, "H n"], R: Float[Tensor, "D n"], weight: float = 0.0) -> Update:
    """The change dW that gives each key what it lacks, R, and leaves other keys alone (EMMET, MEMIT).

        dW = R (weight I + KT C^-1 K)^-1 KT C^-1

    With a weight of 0 the constraints are hard: it minimises tr(dW C dWT) among all dW with dW K = R (Gupta et al. 2024,
    arXiv 2403.14236). Else it minimises weight tr(dW C dWT) + |dW K - R|^2, which is the same as
    dW = R KT (weight C + K KT)^-1 (Meng et al. 2023, arXiv 2210.07229, Eqn 14).

    Args:
        factor: of C; where it has a basis, among all dW that are zero outside its span.
        K: (H, n) keys, one a column.
        R: (D, n) what is to be added to the value of each.
        weight: how much the keys of C count beside those of K.

    Raises:
        DependentKeys: the weight is 0 and the keys are linearly dependent; the message and `columns` say which.
    """
    K, R = (precise(x).to(factor.lower.device) for x in (K, R))
    whitened = factor.whiten(K)  # (m, n)
    if weight > 0:
        gram = whitened.T @ whitened + weight * torch.eye(K.shape[1]).to(whitened)
        return Update(torch.cholesky_solve(R.T, torch.linalg.cholesky(gram)).T, factor.solve(K))
    length = whitened.norm(dim=0)
    directions, triangle = torch.linalg.qr(whitened / length.where(length > 0, 1))
    if columns := dependent_columns(triangle):
        raise DependentKeys(columns)
    # KT C^-1 K = RT R with R = triangle * length: two triangular systems in place of an inverse.
    right = torch.linalg.solve_triangular(triangle, R / length, upper=True, left=False)
    Lambda = torch.linalg.solve_triangular(triangle.T, right, upper=False, left=False) / length
    return Update(Lambda, factor.solve(K))


def null_space(
    factor: Factor, threshold: float, earlier: Float[Tensor, "H p"] | None = None, ridge: float = 1.0
) -> Factor:
    """What AlphaEdit keeps instead of C: all keys outside the null space, and within it those of earlier edits.

        P = U UT of the eigenvectors U of C with eigenvalues below the threshold
        dW = R KT P (K_p K_pT P + K KT P + ridge I)^-1 = R (I + KT B K)^-1 KT B,  B = U (UT K_p K_pT U + ridge I)^-1 UT

    (Fang et al. 2025, arXiv 2410.02355). The second form is `solve_change` with the Factor that is returned and weight 1.

    Args:
        factor: of C.
        threshold: in the units of C, a mean of k kT.
        earlier: K_p, (H, p) keys of earlier edits, which keep their values as far as the ridge is small.

    Raises:
        ValueError: no eigenvalue is below the threshold; the message says which threshold leaves how much.
    """
    eigenvalues, vectors = factor.spectrum
    basis = vectors[:, eigenvalues < threshold]
    if not basis.shape[1]:
        shares = ", ".join(
            f"{float(torch.quantile(eigenvalues, share)):.1e} would leave {share:.0%}" for share in (0.1, 0.5, 0.9)
        )
        raise ValueError(
            f"null_space: none of the {len(eigenvalues)} eigenvalues of C is below the threshold {threshold:g}, so there is "
            f"no direction to write in; the smallest is {float(eigenvalues[0]):.1e}. A threshold of {shares} of the "
            "directions."
        )
    inside = basis.T @ (precise(earlier).to(basis) if earlier is not None else basis[:, :0])  # (m, p)
    kept = inside @ inside.T + ridge * torch.eye(basis.shape[1]).to(basis)
    return Factor(torch.linalg.cholesky(kept), factor.tokens, factor.unseen, basis)


def dependent_columns(triangle: Tensor) -> list[int]:
    """The first column in the span of those before it, with the ones that it is made of; empty where there is none.

    Args:
        triangle: (min(H, n), n), the R of a QR factorisation of columns of length 1.
    """
    distance = torch.zeros(triangle.shape[1], dtype=triangle.dtype)
    distance[: len(triangle)] = triangle.diagonal().abs().cpu()
    below = (distance < DEPENDENT).nonzero().flatten().tolist()
    if not below:
        return []
    last = below[0]
    shares = torch.linalg.solve_triangular(triangle[:last, :last], triangle[:last, last:][:, :1], upper=True)
    return [*(shares.abs().flatten() > DEPENDENT).nonzero().flatten().tolist(), last]


def dependent(factor: Factor, K: Float[Tensor, "H n"]) -> list[int]:
    """Columns of K that are linearly dependent; none where each can have a value of its own."""
    whitened = factor.whiten(precise(K).to(factor.lower.device))
    length = whitened.norm(dim=0)
    return dependent_columns(torch.linalg.qr(whitened / length.where(length > 0, 1)).R)


def distinct(factor: Factor, K: Float[Tensor, "H n"]) -> list[int]:
    """The columns of one fact's keys, each once: where the layer sees no prefix they are alike, and the last one stays."""
    if not dependent(factor, K):
        return list(range(K.shape[1]))
    chosen = [K.shape[1] - 1]
    for column in reversed(range(K.shape[1] - 1)):
        chosen = chosen if dependent(factor, K[:, [column, *chosen]]) else [column, *chosen]
    return chosen


def apply_update(
    W: Float[Tensor, "D H"], update: Update, K: Float[Tensor, "H n"], V: Float[Tensor, "D n"]
) -> Float[Tensor, "D H"]:
    """W_hat = W + Lambda uT in the dtype and on the device of W, computed in float64 and rounded once.

    Rounding once leaves a relative error of some 1e-7 in W_hat K = V in float32, and of some 1e-3 in bfloat16. It is
    measured, and a warning logged where it is more than that precision can explain: V is then far smaller than the
    terms of the sum W_hat K that cancel in it.

    Raises:
        ValueError: shapes that do not fit; W_hat overflows the dtype of W.
    """
    check_shapes("apply_update", W, K, V)
    W_hat = (precise(W) + update.delta.to(precise(W).device)).to(W)
    check_finite(f"apply_update (in {W.dtype})", W_hat=W_hat)
    error = float(constraint_error(W_hat, K, V).max())
    if error > max(TOLERANCE, 4 * torch.finfo(W.dtype).eps):
        logger.warning("apply_update: W_hat K = V holds only to a relative error of %.1e in %s", error, W.dtype)
    return W_hat


def constraint_error(W: Float[Tensor, "D H"], K: Float[Tensor, "H n"], V: Float[Tensor, "D n"]) -> Float[Tensor, " n"]:
    """(n,) float64, for each key: |W k - v| / |v|, of the weights as stored."""
    W = precise(W)
    K, V = precise(K).to(W.device), precise(V).to(W.device)
    return (W @ K - V).norm(dim=0) / V.norm(dim=0)


def penalty(delta: Float[Tensor, "D H"], C: Float[Tensor, "H H"]) -> float:
    """tr(delta C deltaT): the mean over the keys behind C of the squared change of their values."""
    delta = precise(delta)
    return float(((delta @ precise(C).to(delta.device)) * delta).sum())


def precise(x: Tensor) -> Tensor:
    """`x` in float64, on the CPU where its device has none."""
    return (x.detach().cpu() if x.device.type == "mps" else x.detach()).double()


def check_shapes(doing: str, W: Tensor, K: Tensor, V: Tensor) -> None:
    fits = W.ndim == K.ndim == V.ndim == 2 and K.shape[1] == V.shape[1] > 0
    if not fits or W.shape != (V.shape[0], K.shape[0]):
        raise ValueError(
            f"{doing}: W, K and V have shapes {tuple(W.shape)}, {tuple(K.shape)} and {tuple(V.shape)}; expected (D, H), "
            "(H, n) and (D, n), with one key and its value in each of n columns."
        )


def check_finite(doing: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{doing}: {name} holds NaN or infinity; expected finite numbers.")
