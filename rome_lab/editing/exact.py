"""ROME and its extension to several facts: the smallest change of one matrix that maps keys to their values (Appendix A).

rome(lm, fact, target)       an Edit of one fact
rome_many(lm, requests)      an Edit of several
solved_edit(lm, ...)         what both are made by, and their successors in `rome_lab.editing.editors`
remarks_on(lm, optimum, ...) what whoever uses an edit should know of it
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rome_lab.editing.edit import VECTORS, Edit, LayerChange
from rome_lab.editing.many_layers import check_room, kept_at, kept_columns, write_values
from rome_lab.editing.optima import Optima, Optimum
from rome_lab.editing.requests import Request, check_news, check_requests, layer_to_edit
from rome_lab.editing.second_moment import Covariance, TokensSeen
from rome_lab.editing.settings import EditSettings, LeastSquares, default_settings
from rome_lab.editing.update import Factor, factorise, warn_of_few
from rome_lab.editing.values import Callback
from rome_lab.facts import Fact, read_prompt
from rome_lab.models import LanguageModel

logger = logging.getLogger(__name__)


def rome(
    lm: LanguageModel,
    fact: Fact,
    target: str,
    layer: int | None = None,
    *,
    C: Float[Tensor, "H H"] | Covariance | Factor | None = None,
    tokens: int | None = None,
    hparams: EditSettings | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    C_callback: TokensSeen | None = None,
) -> Edit:
    """The smallest change of one matrix that makes `lm` say `target` of the fact (Appendix A, Eqn 17).

        W_hat = W + Lambda (C^-1 k*)T,  Lambda = (v* - W k*) / ((C^-1 k*)T k*)

    Args:
        fact: what to edit; its object may be unknown to the model.
        target: what the model is to say instead of the object; blanks around it do not count.
        layer: whose W to change; by default that of `DEFAULTS`, or, for other models, where a causal trace of the fact
            has its peak (logged).
        C: (H, H) uncentred second moment of the keys, bare or as a Covariance or a Factor, which know how many tokens
            they were built from; by default it is measured, on the model without edits.
        tokens: how many to measure C on; by default as many as `covariance` takes.
        hparams: how to edit; by default those of `DEFAULTS`.
        callback: called with each step of the optimisation as a mapping of numbers (the columns of `Edit.history`);
            where it returns True, the optimisation stops there and the best so far is used.
        C_callback: called while C is measured, with how many tokens were seen and how many are to be.

    Returns: an Edit. `lm` is unchanged, whatever happens. Edits in force on `lm` are taken as part of it.

    Raises:
        ValueError: the model says the target already; the target is empty; the layer is out of range; C cannot be
            inverted, and the message says how many tokens it was built from; NaN or infinity anywhere.
    """
    given = {"C": C, "tokens": tokens, "hparams": hparams, "callback": callback, "C_callback": C_callback}
    return rome_many(lm, [(fact, target)], layer, progress=progress, **given)


def rome_many(
    lm: LanguageModel,
    requests: Sequence[Request],
    layer: int | None = None,
    *,
    C: Float[Tensor, "H H"] | Covariance | Factor | None = None,
    tokens: int | None = None,
    hparams: EditSettings | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    C_callback: TokensSeen | None = None,
) -> Edit:
    """One Edit for several facts: the same least squares with several constraints, in closed form.

        W_hat = W + Lambda (C^-1 K*)T,  Lambda = (V* - W K*) (K*T C^-1 K*)^-1

    Args: as for `rome`; `requests` are pairs of a fact and its target.

    Raises:
        ValueError: as for `rome`; also where two facts have the same key, as those of one subject may, naming them.
    """
    check_requests(lm, requests, layer)
    news(lm, requests)
    layer = layer_to_edit(lm, [fact for fact, _ in requests], layer)
    given = {"tokens": tokens, "hparams": hparams, "callback": callback, "C_callback": C_callback}
    return solved_edit(
        lm, requests, (layer,), LeastSquares(), None if C is None else {layer: C}, progress=progress, **given
    )


def news(lm: LanguageModel, requests: Sequence[Request]) -> None:
    """Raise NothingToEdit where the model says one of the targets already."""
    for fact, target in requests:
        check_news(lm, (fact, target.strip()))


def solved_edit(
    lm: LanguageModel,
    requests: Sequence[Request],
    layers: tuple[int, ...],
    solution: LeastSquares,
    C: Mapping[int, Float[Tensor, "H H"] | Covariance | Factor] | None = None,
    *,
    tokens: int | None = None,
    hparams: EditSettings | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    C_callback: TokensSeen | None = None,
    doing: str = "rome",
) -> Edit:
    """The Edit of requests that are known to be news, at these layers; see `write_values`. `lm` is unchanged."""
    requests = [(fact, target.strip()) for fact, target in requests]
    optima, last = Optima(lm, progress=progress), layers[-1]
    factors = optima.factors_at(layers, None, tokens, C_callback) if C is None else given_factors(lm, layers, C, doing)
    settings = optima.with_prefixes(hparams or default_settings(lm).settings)
    for fact, _ in requests:
        if remark := first_token_remark(lm, fact, settings.key):
            logger.warning("%s: %s", doing, remark)
    # Before v* is sought, which takes longest.
    keys = [optima.k_star(fact, layers[0], settings) for fact, _ in requests]
    kept = kept_at(lm, solution, factors)
    columns = kept_columns(layers[0], kept[layers[0]], requests, keys, solution.is_exact, doing)
    for layer in layers[1:] if solution.is_exact else ():
        check_room(layer, kept[layer], len(requests), sum(map(len, columns)), doing)
    values = optima.optimise(requests, last, settings, progress, callback)
    for optimum in values:
        if remark := convergence_remark(optimum, settings):
            logger.warning("%s: %s", doing, remark)
    written = write_values(lm, layers, solution, kept, keys, values, settings, doing=doing)
    identity = lm.identity(edited=False)
    *below, top = (squeezed(part) for part in written.parts)
    return Edit(
        **vars(top),
        below=tuple(below),
        solution=solution,
        facts=tuple(fact for fact, _ in requests),
        targets=tuple(target for _, target in requests),
        settings=settings,
        history=pd.concat([x.history.assign(fact=i) for i, x in enumerate(values)], ignore_index=True),
        converged=all(optimum.converged for optimum in values),
        constraint_error=written.error,
        model=lm.name,
        fingerprint=identity.fingerprint,
        function=identity.function,
    )


def squeezed(part: LayerChange) -> LayerChange:
    """The same with 1-D vectors where it has one key."""
    return replace(part, **{name: x.squeeze(1) for name in VECTORS if (x := getattr(part, name)).shape[1] == 1})


def given_factors(
    lm: LanguageModel, layers: Sequence[int], C: Mapping[int, Tensor | Covariance | Factor], doing: str
) -> dict[int, Factor]:
    """The factors of the C that the caller has, by layer."""
    if missing := [layer for layer in layers if layer not in C]:
        raise ValueError(f"{doing}: C lacks the layers {missing}; give covariances(lm, {list(layers)}), or no C.")
    return {layer: given_factor(lm, layer, C[layer]) for layer in layers}


def given_factor(lm: LanguageModel, layer: int, C: Tensor | Covariance | Factor) -> Factor:
    """The factor of a C that the caller has."""
    C, tokens = (C.C, C.tokens) if isinstance(C, Covariance) else (C, None)
    known = isinstance(C, Factor)
    matrix, width = torch.as_tensor(C.lower if known else C), lm.weight(layer).shape[1]
    if tuple(matrix.shape) != (width, width):
        raise ValueError(
            f"rome: C has shape {tuple(matrix.shape)}, but the keys of layer {layer} of {lm.name} have {width} components; "
            f"give covariance(lm, {layer})."
        )
    warn_of_few(C.tokens if known else tokens, width, "rome")
    return C if known else factorise(matrix, tokens)


def remarks_on(lm: LanguageModel, optimum: Optimum, settings: EditSettings) -> list[str]:
    """What whoever uses an edit of this request should know; most often nothing."""
    remarks = [convergence_remark(optimum, settings), first_token_remark(lm, optimum.request[0], settings.key)]
    return [remark for remark in remarks if remark]


def first_token_remark(lm: LanguageModel, fact: Fact, key: str) -> str:
    """What to expect where the subject is the text's first token, whose key is nearly the same in every text; else "".

    Where the tokenizer begins every text with a token of its own, no subject is the first.
    """
    if key == "averaged" or read_prompt(lm, fact).subject_range != (0, 1):
        return ""
    return (
        f"the subject {fact.subject!r} is the first token of the text, and a first token has nearly the same key in every "
        f"text, so with the key {key!r} other texts change too; choose the key 'averaged', or a prompt in which something "
        "stands before the subject."
    )


def convergence_remark(optimum: Optimum, settings: EditSettings) -> str:
    """What came of a v* that did not converge; "" for one that did."""
    if optimum.converged:
        return ""
    (fact, target), steps = optimum.request, int(optimum.history["step"].iloc[-1])
    return (
        f"v* did not converge: after {steps} steps the target {target!r} has a mean probability of "
        f"{optimum.best['p_target']:.2f} behind {fact.prompt!r}, and {settings.enough:.2f} is enough. The edit uses the "
        "best so far and is marked; more steps or another layer may do better."
    )
