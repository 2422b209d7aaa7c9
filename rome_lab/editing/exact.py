"""ROME and its extension to several facts: the smallest change of one matrix that maps keys to their values (Appendix A).

rome(lm, fact, target)       an Edit of one fact
rome_many(lm, requests)      an Edit of several
exact_vectors(lm, ...)       what both, and the methods that are compared, solve: from keys and v* to Lambda and u
remarks_on(lm, optimum, ...) what whoever uses an edit should know of it
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rome_lab.editing.edit import Edit
from rome_lab.editing.optima import Optima, Optimum
from rome_lab.editing.requests import Request, check_news, check_requests, layer_to_edit
from rome_lab.editing.second_moment import Covariance, TokensSeen
from rome_lab.editing.settings import EditSettings, default_settings
from rome_lab.editing.update import (
    Factor,
    Update,
    apply_update,
    constraint_error,
    dependent,
    distinct,
    factorise,
    solve_update,
    warn_of_few,
)
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
    requests = [(fact, target.strip()) for fact, target in requests]
    for request in requests:
        check_news(lm, request)
    layer = layer_to_edit(lm, [fact for fact, _ in requests], layer)
    optima = Optima(lm, progress=progress)
    factor = optima.factor(layer, None, tokens, C_callback) if C is None else given_factor(lm, layer, C)
    settings = optima.with_prefixes(hparams or default_settings(lm).settings)
    for fact, _ in requests:
        if remark := first_token_remark(lm, fact, settings.key):
            logger.warning("rome: %s", remark)
    # Before v* is sought, which takes longest.
    K = independent_keys(layer, factor, requests, [optima.k_star(fact, layer, settings) for fact, _ in requests])
    values = [optima.optimise(request, layer, settings, progress, callback) for request in requests]
    for optimum in values:
        if remark := convergence_remark(optimum, settings):
            logger.warning("rome: %s", remark)
    vectors, error = exact_vectors(lm, layer, factor, K, values)
    identity = lm.identity(edited=False)
    return Edit(
        facts=tuple(fact for fact, _ in requests),
        targets=tuple(target for _, target in requests),
        layer=layer,
        module=lm.memory_name(layer),
        **{name: x.squeeze(1) if x.shape[1] == 1 else x for name, x in vectors.items()},
        settings=settings,
        history=pd.concat([x.history.assign(fact=i) for i, x in enumerate(values)], ignore_index=True),
        converged=all(optimum.converged for optimum in values),
        constraint_error=error,
        model=lm.name,
        fingerprint=identity.fingerprint,
        function=identity.function,
    )


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


def independent_keys(
    layer: int, factor: Factor, requests: Sequence[Request], keys: Sequence[Float[Tensor, "H n"]]
) -> list[Float[Tensor, "H m"]]:
    """The keys of each request, each once.

    Raises:
        ValueError: those of several requests are dependent, naming the facts.
    """
    each_once = [distinct(factor, K) for K in keys]
    for K, K_once in zip(keys, each_once, strict=True):
        if K_once.shape != K.shape:
            n, m = K.shape[1], K_once.shape[1]
            logger.info("rome: at layer %d some keys of the fact are the same; %d of %d are left", layer, m, n)
    owners = [fact.prompt for (fact, _), K in zip(requests, each_once, strict=True) for _ in range(K.shape[1])]
    prompts = dict.fromkeys(owners[column] for column in dependent(factor, torch.cat(each_once, dim=1)))
    if prompts:
        raise ValueError(
            f"rome: the keys of {' and '.join(map(repr, prompts))} are linearly dependent, as those of one subject are, "
            "so no W gives each of them a value of its own; edit one of them only, or one after the other."
        )
    return each_once


def exact_vectors(
    lm: LanguageModel, layer: int, factor: Factor, keys: Sequence[Tensor], optima: Sequence[Optimum]
) -> tuple[dict[str, Tensor], float]:
    """The vectors of an Edit that maps the keys of each request to its v*, and the largest error of that in W as stored.

    Returns: k_star (H, n), v_star (D, n), Lambda (D, n) and u (H, n), float32; and max |W_hat k* - v*| / |v*|.
    """
    W, K = lm.weight(layer), torch.cat(list(keys), dim=1)
    V = torch.cat([x.v_star[:, None].expand(-1, k.shape[1]) for x, k in zip(optima, keys, strict=True)], dim=1)
    exact = solve_update(W, factor, K, V)
    rounded = Update(exact.Lambda.float(), exact.u.float())
    error = float(constraint_error(apply_update(W, rounded, K, V), K, V).max())
    vectors = {"k_star": K, "v_star": V.float(), "Lambda": rounded.Lambda, "u": rounded.u}
    return {name: x.cpu().contiguous() for name, x in vectors.items()}, error


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
