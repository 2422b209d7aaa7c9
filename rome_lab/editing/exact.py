"""Keys that cannot have a value each, because they are linearly dependent.

distinct(lm, layer, factor, K)                 the keys of one fact, each once
check_independent(lm, layer, factor, ...)      refuses several facts whose keys are dependent
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rome_lab.editing.edit import Edit
from rome_lab.editing.keys import k_star, sample_prefixes
from rome_lab.editing.second_moment import covariances
from rome_lab.editing.settings import EditSettings, default_settings
from rome_lab.editing.update import (
    DependentKeys,
    Factor,
    Update,
    apply_update,
    constraint_error,
    factorise,
    solve_update,
)
from rome_lab.editing.values import Callback, Objective, Value, optimise_value
from rome_lab.facts import Fact, continuation_ids, read_prompt
from rome_lab.models import LanguageModel
from rome_lab.tracing import causal_trace

logger = logging.getLogger(__name__)


def dependent(lm: LanguageModel, layer: int, factor: Factor, K: Tensor) -> list[int]:
    """Columns of K (H, n) that are linearly dependent; none where each can have a value of its own."""
    W = lm.weight(layer)
    try:
        solve_update(W, factor, K, torch.zeros(len(W), K.shape[1]))
    except DependentKeys as error:
        return error.columns
    return []


def distinct(lm: LanguageModel, layer: int, factor: Factor, K: Tensor) -> Tensor:
    """The keys of one fact (H, n), each once: where the layer sees no prefix they are the same, and the last one stays."""
    if not dependent(lm, layer, factor, K):
        return K
    kept = K[:, -1:]
    for column in reversed(range(K.shape[1] - 1)):
        wider = torch.cat([K[:, column : column + 1], kept], dim=1)
        kept = kept if dependent(lm, layer, factor, wider) else wider
    logger.info(
        "rome: at layer %d some keys of the fact are the same; %d of %d are left", layer, kept.shape[1], K.shape[1]
    )
    return kept


def check_independent(
    lm: LanguageModel, layer: int, factor: Factor, requests: Sequence[tuple[Fact, str]], keys: Sequence[Tensor]
) -> None:
    """Raise where the facts' keys are dependent, naming the facts."""
    owners = [fact.prompt for (fact, _), K in zip(requests, keys, strict=True) for _ in range(K.shape[1])]
    prompts = dict.fromkeys(owners[column] for column in dependent(lm, layer, factor, torch.cat(keys, dim=1)))
    if prompts:
        raise ValueError(
            f"rome: the keys of {' and '.join(map(repr, prompts))} are linearly dependent, as those of one subject are, "
            "so no W gives each of them a value of its own; edit one of them only, or one after the other."
        )


class NothingToEdit(ValueError):
    """The model says the target already."""


def rome(
    lm: LanguageModel,
    fact: Fact,
    target: str,
    layer: int | None = None,
    *,
    C: Float[Tensor, "H H"] | None = None,
    hparams: EditSettings | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> Edit:
    """The smallest change of one matrix that makes `lm` say `target` of the fact (Appendix A, Eqn 17).

        W_hat = W + Lambda (C^-1 k*)T,  Lambda = (v* - W k*) / ((C^-1 k*)T k*)

    Args:
        fact: what to edit; its object may be unknown to the model.
        target: what the model is to say instead of the object; blanks around it do not count.
        layer: whose W to change; by default that of `DEFAULTS`, or, for other models, where a causal trace of the fact
            has its peak (logged).
        C: (H, H) uncentred second moment of the keys; by default `covariance(lm, layer)` of the model without edits.
        hparams: how to edit; by default those of `DEFAULTS`.
        callback: called with each step of the optimisation as a mapping of numbers (the columns of `Edit.history`);
            where it returns True, the optimisation stops there and the best so far is used.

    Returns: an Edit. `lm` is unchanged, whatever happens. Edits in force on `lm` are taken as part of it.

    Raises:
        ValueError: the model says the target already; the target is empty; the layer is out of range; C cannot be
            inverted, and the message says how many tokens it was built from; NaN or infinity anywhere.
    """
    return rome_many(lm, [(fact, target)], layer, C=C, hparams=hparams, progress=progress, callback=callback)


def rome_many(
    lm: LanguageModel,
    requests: Sequence[tuple[Fact, str]],
    layer: int | None = None,
    *,
    C: Float[Tensor, "H H"] | None = None,
    hparams: EditSettings | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> Edit:
    """One Edit for several facts: the same least squares with several constraints, in closed form.

        W_hat = W + Lambda (C^-1 K*)T,  Lambda = (V* - W K*) (K*T C^-1 K*)^-1

    Args: as for `rome`; `requests` are pairs of a fact and its target.

    Raises:
        ValueError: as for `rome`; also where two facts have the same key, as those of one subject may, naming them.
    """
    check_requests(lm, requests, layer)
    requests = [(fact, target.strip()) for fact, target in requests]
    default = default_settings(lm)
    settings = hparams or default.settings
    layer = default.layer if layer is None else int(layer)
    layer = traced_layer(lm, [fact for fact, _ in requests]) if layer is None else layer
    factor = factor_of(lm, layer, C, progress)
    if settings.prefixes is None:
        settings = replace(settings, prefixes=sample_prefixes(lm, settings.prefix_lengths, settings.seed))
    for fact, _ in requests:
        warn_of_first_token(lm, fact, settings.key)
    keys = [k_star(lm, fact, layer, settings.key, settings.prefixes) for fact, _ in requests]
    keys = [distinct(lm, layer, factor, K) for K in keys]
    check_independent(lm, layer, factor, requests, keys)
    stars, values = [], []
    for (fact, target), K in zip(requests, keys, strict=True):
        original = lm.weight(layer).cpu().double() @ K[:, -1].double()  # W k*, of the averaged key where there is one
        value = optimise_value(Objective(lm, layer, (fact, target), original, settings), progress, callback)
        warn_unless_converged(value, target, settings)
        values.append(value)
        stars.append((original + value.delta.cpu().double())[:, None].expand(-1, K.shape[1]))
    vectors, error = solve(lm, layer, factor, torch.cat(keys, dim=1), torch.cat(stars, dim=1))
    return Edit(
        facts=tuple(fact for fact, _ in requests),
        targets=tuple(target for _, target in requests),
        layer=layer,
        module=lm.memory_name(layer),
        **vectors,
        settings=settings,
        history=pd.concat([x.history.assign(fact=i) for i, x in enumerate(values)], ignore_index=True),
        converged=all(value.converged for value in values),
        constraint_error=error,
        model=lm.name,
        fingerprint=lm.identity(edited=False).fingerprint,
    )


def check_requests(lm: LanguageModel, requests: Sequence[tuple[Fact, str]], layer: int | None) -> None:
    """Raise where there is nothing to edit, or no such layer."""
    if not requests:
        raise ValueError("rome: there is nothing to edit; give at least one fact with its target.")
    if layer is not None and layer not in range(lm.n_layers):
        raise ValueError(f"rome: layer is {layer!r}; {lm.name} has the layers 0 to {lm.n_layers - 1}.")
    for fact, target in requests:
        if not isinstance(fact, Fact):
            raise TypeError(
                f"rome: the fact is {fact!r}; expected a Fact, such as "
                'Fact(subject="Eiffel Tower", template="The {} is located in the city of", object="Paris").'
            )
        if not isinstance(target, str) or not target.strip():
            raise ValueError(f"rome: the target is {target!r}; write what {lm.name} is to say after {fact.prompt!r}.")
        check_news(lm, fact, target.strip())


@torch.no_grad()
def check_news(lm: LanguageModel, fact: Fact, target: str) -> None:
    """Raise NothingToEdit where every token of the target is what the model would say anyway."""
    ids, target_ids = read_prompt(lm, fact).ids, torch.tensor(continuation_ids(lm, fact.prompt, target))
    text = torch.cat([ids, target_ids[:-1].to(ids)])
    if len(text) > lm.context_length:
        most = f"{lm.name} reads at most {lm.context_length}"
        raise ValueError(f"rome: {fact.prompt!r} with its target has {len(text)} tokens, but {most}; shorten them.")
    logits = lm.model(text[None], use_cache=False).logits[0, len(ids) - 1 :]
    lm.check_finite(logits, "rome")
    if torch.equal(logits.argmax(-1).cpu(), target_ids):
        p = logits.double().softmax(-1).cpu()[range(len(target_ids)), target_ids].prod()
        raise NothingToEdit(
            f"rome: {lm.name} already goes on from {fact.prompt!r} with {target!r} (p {p:.2f}), so there is nothing to "
            "edit; choose another target, or see with audit(lm, edit) what the edits in force do."
        )


def traced_layer(lm: LanguageModel, facts: Sequence[Fact]) -> int:
    """The layer at which restoring MLP outputs at the last subject token has most effect, on average over the facts."""
    traces = [causal_trace(lm, fact.prompt, fact.subject, kind="mlp") for fact in facts]
    effects = np.mean([trace.indirect_effect[trace.subject_range[1] - 1] for trace in traces], axis=0)
    layer = int(effects.argmax())
    logger.warning(
        "rome: no layer is known for %s; a causal trace of MLP outputs at the last subject token has its peak at layer "
        "%d (indirect effect %.3f), which is used. Choose another with layer=.", lm.name, layer, effects[layer],
    )  # fmt: skip
    return layer


def factor_of(lm: LanguageModel, layer: int, C: Tensor | None, progress: bool) -> Factor:
    """The Cholesky factor of C, measured where it is not given: without edits, so that it need not be measured anew."""
    if C is None:
        with lm.overlay.only([]):
            measured = covariances(lm, [layer], progress=progress)[layer]
        return factorise(measured.C, measured.tokens)
    C, width = torch.as_tensor(C), lm.weight(layer).shape[1]
    if tuple(C.shape) != (width, width):
        raise ValueError(
            f"rome: C has shape {tuple(C.shape)}, but the keys of layer {layer} of {lm.name} have {width} components; "
            f"give covariance(lm, {layer})."
        )
    return factorise(C)


def solve(lm: LanguageModel, layer: int, factor: Factor, K: Tensor, V: Tensor) -> tuple[dict[str, Tensor], float]:
    """The vectors of an Edit, float32, and the largest relative error of its constraints in the weights as stored."""
    W = lm.weight(layer)
    exact = solve_update(W, factor, K, V)
    kept = Update(exact.Lambda.float(), exact.u.float())
    W_hat = apply_update(W, Update(kept.Lambda.double(), kept.u.double()), K, V)
    vectors = {"k_star": K, "v_star": V.float(), "Lambda": kept.Lambda, "u": kept.u}
    alone, error = K.shape[1] == 1, float(constraint_error(W_hat, K, V).max())
    return {name: x.squeeze(1) if alone else x.contiguous() for name, x in vectors.items()}, error


def warn_of_first_token(lm: LanguageModel, fact: Fact, key: str) -> None:
    """Say what to expect where the subject is the text's first token, whose key is nearly the same in every text.

    Where the tokenizer begins every text with a token of its own, no subject is the first.
    """
    if key != "averaged" and read_prompt(lm, fact).subject_range == (0, 1):
        logger.warning(
            "rome: the subject %r is the first token of the text, and a first token has nearly the same key in every text, "
            "so with the key %r other texts change too; choose the key 'averaged', or a prompt in which something stands "
            "before the subject.", fact.subject, key,
        )  # fmt: skip


def warn_unless_converged(value: Value, target: str, settings: EditSettings) -> None:
    if not value.converged:
        best = value.history.loc[value.history["loss"].idxmin()]
        logger.warning(
            "rome: v* did not converge: after %d steps the target %r has a mean probability of %.2f, and %.2f is "
            "enough. The edit uses the best so far and is marked; more steps or another layer may do better.",
            value.history["step"].iloc[-1], target, best["p_target"], settings.enough,
        )  # fmt: skip
