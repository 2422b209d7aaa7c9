"""From keys and v* to changes: one least squares at one layer, or at several going up, each with those below in force.

write_values(lm, layers, solution, ...)    a LayerChange of each layer, and what it does to W
kept_at(lm, solution, factors)             of what the change of each layer keeps
earlier_keys(lm, layer)                    keys of the edits in force
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from rome_lab.editing.edit import LayerChange
from rome_lab.editing.keys import subject_keys, subject_states, texts_of
from rome_lab.editing.optima import Optimum
from rome_lab.editing.requests import Request
from rome_lab.editing.settings import PARTS, EditSettings, LeastSquares
from rome_lab.editing.update import (
    Factor,
    Update,
    apply_update,
    check_finite,
    constraint_error,
    dependent,
    distinct,
    null_space,
    precise,
    solve_change,
)
from rome_lab.facts import Prompt
from rome_lab.models import Change, LanguageModel, output_changed

logger = logging.getLogger(__name__)

Restraint = Callable[[Tensor, Tensor], Tensor]  # of dW and W, to what is written of dW


@dataclass(frozen=True, eq=False)
class Written:
    """What was solved for.

    Attributes:
        parts: a change of each layer, the lowest first.
        deltas: W_hat - W by layer, (D, H) float64, after the restraint.
        error: largest |W_hat k* - v*| / |v*| in any layer, of the weights as stored.
    """

    parts: tuple[LayerChange, ...]
    deltas: dict[int, Float[Tensor, "D H"]]
    error: float


def write_values(
    lm: LanguageModel,
    layers: Sequence[int],
    solution: LeastSquares,
    factors: Mapping[int, Factor],
    keys: Sequence[Float[Tensor, "H n"]],
    optima: Sequence[Optimum],
    settings: EditSettings,
    *,
    restraint: Restraint | None = None,
    doing: str = "rome",
) -> Written:
    """Change W at each of `layers` so that the keys of each request get its v* at the last one.

        one layer:  R = v* - W k
        several:    z = h + v* - W k at the last of them, in the model as it is; going up, each layer adds to its values
                    R = (z - h) / (layers left), with h and k in the model with the lower layers changed

    h is the hidden state behind the last of the layers. Each of a request's keys has texts of its own, over which its h is
    a mean, too. It is MEMIT (Meng et al. 2023, arXiv 2210.07229, Algorithm 1) where constraints are soft, EMMET where they
    are exact, so that the last layer brings every h to its z to float precision, AlphaEdit in a null space.

    Args:
        factors: of what the change of each layer keeps, see `kept_at`.
        keys: of each request at the lowest layer, as `Optima.k_star` finds them.
        optima: v* of each request, found at the last layer.
        settings: which keys are meant, and the prefixes of their texts.
        restraint: what is kept of a change; the layers above are solved with that in force.
        doing: how errors begin.

    Raises:
        ValueError: keys of different requests are dependent, or more than the layer can hold; an empty null space; several
            layers in a model in which an MLP's output is not added to the residual stream as it is.
    """
    requests, last = [optimum.request for optimum in optima], layers[-1]
    V = [optimum.v_star[:, None].expand(-1, K.shape[1]) for optimum, K in zip(optima, keys, strict=True)]
    if len(layers) > 1:
        texts = texts_of_requests(lm, requests, settings)
        check_stream(lm, last, texts[0][0][0], doing)
        W = precise(lm.weight(last)).cpu()
        top_keys, states = context_means(lm, subject_keys, last, texts), context_means(lm, subject_states, last, texts)
        Z = [h + v - W @ precise(k) for h, v, k in zip(states, V, top_keys, strict=True)]
    parts: list[LayerChange] = []
    deltas, errors = {}, []
    with contextlib.ExitStack() as below:
        for place, layer in enumerate(layers):
            left = len(layers) - place
            if place > 0:
                keys = [K.float() for K in context_means(lm, subject_keys, layer, texts)]
                states = context_means(lm, subject_states, last, texts)
            if len(layers) > 1:
                W = precise(lm.weight(layer)).cpu()
                V = [W @ precise(K).cpu() + (z - h) / left for K, z, h in zip(keys, Z, states, strict=True)]
            columns = kept_columns(layer, factors[layer], requests, keys, solution.is_exact, doing)
            K = torch.cat([K[:, chosen] for K, chosen in zip(keys, columns, strict=True)], dim=1)
            values = torch.cat([v[:, chosen] for v, chosen in zip(V, columns, strict=True)], dim=1)
            part, deltas[layer], error = layer_change(lm, layer, solution, factors[layer], K, values, restraint)
            parts.append(part)
            errors.append(error)
            if left > 1:
                below.enter_context(Change(layer, deltas[layer].float()).applied(lm))
    return Written(tuple(parts), deltas, max(errors))


def layer_change(
    lm: LanguageModel,
    layer: int,
    solution: LeastSquares,
    factor: Factor,
    K: Float[Tensor, "H n"],
    V: Float[Tensor, "D n"],
    restraint: Restraint | None,
) -> tuple[LayerChange, Float[Tensor, "D H"], float]:
    """The change of one W; W_hat - W after the restraint; the largest |W_hat k* - v*| / |v*| of the weights as stored."""
    W, device = lm.weight(layer), factor.lower.device
    R = precise(V).to(device) - precise(W).to(device) @ precise(K).to(device)
    exact = solve_change(factor, K, R, 0.0 if solution.is_exact else solution.weight)
    rounded = Update(exact.Lambda.float(), exact.u.float())
    delta = rounded.delta.cpu()
    if solution.is_exact and restraint is None:
        W_hat = apply_update(W, rounded, K, V)
    else:
        delta = delta if restraint is None else restraint(delta, precise(W).cpu())
        W_hat = (precise(W) + delta.to(precise(W).device)).to(W)
        check_finite(f"the edit of layer {layer} (in {W.dtype})", W_hat=W_hat)
    vectors = {"k_star": K, "v_star": V.float(), "Lambda": rounded.Lambda, "u": rounded.u}
    vectors = {name: x.cpu().contiguous() for name, x in vectors.items()}
    part = LayerChange(layer=layer, module=lm.memory_name(layer), **vectors)
    return part, delta, float(constraint_error(W_hat, K, V).max())


def kept_at(
    lm: LanguageModel,
    solution: LeastSquares,
    factors: Mapping[int, Factor],
    earlier: Mapping[int, Float[Tensor, "H p"]] = MappingProxyType({}),
) -> dict[int, Factor]:
    """Of what the change of each layer keeps: C, or, in a null space, what is outside it and the keys of earlier edits.

    Args:
        factors: of C, by layer.
        earlier: keys of earlier edits by layer, beside those of the edits in force.
    """
    if solution.threshold is None:
        return dict(factors)
    kept = {}
    for layer, factor in factors.items():
        keys = torch.cat([earlier_keys(lm, layer), *([earlier[layer].float()] if layer in earlier else [])], dim=1)
        kept[layer] = null_space(factor, solution.threshold, keys, solution.ridge)
    return kept


def earlier_keys(lm: LanguageModel, layer: int) -> Float[Tensor, "H p"]:
    """(H, p) float32: the keys that the edits in force map to values at one layer."""
    parts = [part for edit in lm.edits for part in getattr(edit, "parts", ()) if part.layer == layer]
    return torch.cat(
        [torch.zeros(lm.weight(layer).shape[1], 0), *(x.k_star.view(len(x.k_star), -1) for x in parts)], dim=1
    )


def texts_of_requests(
    lm: LanguageModel, requests: Sequence[Request], settings: EditSettings
) -> list[list[list[Prompt]]]:
    """For each request and each of its keys the texts that it is the mean over."""
    several = [
        [texts_of(lm, fact, part, settings.prefixes or ()) for part in PARTS[settings.key]] for fact, _ in requests
    ]
    return [[texts for texts in of_request if texts] for of_request in several]


def context_means(
    lm: LanguageModel,
    read: Callable[[LanguageModel, int, Sequence[Prompt]], Tensor],
    layer: int,
    texts: Sequence[Sequence[Sequence[Prompt]]],
) -> list[Float[Tensor, "X n"]]:
    """Of each request (X, n) float64: what is read at a layer, averaged over the texts of each of its n keys."""
    return [torch.stack([read(lm, layer, of_key).mean(0) for of_key in of_request], dim=1) for of_request in texts]


def kept_columns(
    layer: int,
    factor: Factor,
    requests: Sequence[Request],
    keys: Sequence[Float[Tensor, "H n"]],
    exact: bool,
    doing: str = "rome",
) -> list[list[int]]:
    """The columns of each request's keys, each key once.

    Raises:
        ValueError: those of several requests are dependent, naming the facts; with soft constraints only where they are
            about one subject. Or, of exact ones, there are more than the layer can hold.
    """
    columns = [distinct(factor, K) for K in keys]
    for K, chosen in zip(keys, columns, strict=True):
        if len(chosen) < K.shape[1]:
            n, m = K.shape[1], len(chosen)
            logger.info("%s: at layer %d some keys of the fact are the same; %d of %d are left", doing, layer, m, n)
    if exact:
        check_room(layer, factor, len(requests), sum(map(len, columns)), doing)
    by_subject: dict[str, list[int]] = {}
    for place, (fact, _) in enumerate(requests):
        by_subject.setdefault(fact.subject if not exact else "", []).append(place)
    for places in by_subject.values():
        if len(places) == 1 and not exact:
            continue
        owners = [requests[place][0].prompt for place in places for _ in columns[place]]
        together = torch.cat([keys[place][:, columns[place]] for place in places], dim=1)
        if prompts := dict.fromkeys(owners[column] for column in dependent(factor, together)):
            raise ValueError(
                f"{doing}: the keys of {' and '.join(map(repr, prompts))} are linearly dependent, as those of one subject "
                "are, so no W gives each of them a value of its own; edit one of them only, or one after the other."
            )
    return columns


def check_room(layer: int, factor: Factor, n_facts: int, n_keys: int, doing: str) -> None:
    """Raise a ValueError where exact constraints are more than the layer can hold."""
    if n_keys > factor.rank:
        raise ValueError(
            f"{doing}: {n_facts} facts have {n_keys} keys at layer {layer}, but it can hold {factor.rank}, the rank of "
            f"{'its keys' if factor.basis is None else 'the null space'}, each with a value of its own; edit fewer at once, "
            "map fewer keys of each (key='bare'), or take soft constraints."
        )


def check_stream(lm: LanguageModel, layer: int, prompt: Prompt, doing: str) -> None:
    """Raise a ValueError where what W says is not added to the residual stream as it is, so that layers cannot share."""
    before = subject_states(lm, layer, [prompt])[0]
    step = before.norm() / len(before) ** 0.5 * torch.linspace(-1, 1, len(before), dtype=torch.float64)
    with output_changed(lm.memory(layer), lambda values: values + step.to(values)):
        moved = subject_states(lm, layer, [prompt])[0] - before
    if float((moved - step).norm() / step.norm()) > (5e-2 if lm.is_rounded else 1e-2):
        raise ValueError(
            f"{doing}: in {lm.name} what an MLP says is changed on its way into the residual stream, by a norm or a factor: "
            f"what is lacking behind layer {layer} is not what a layer can add; edit one layer, such as layers=({layer},)."
        )
