"""Anatomy of an edit: what its vectors are, what it does to other keys, and at which tokens and layers edits work.

sizes(lm, edit, C)                         lengths of k*, v*, u, Lambda and of the matrices, beside what is usual
directions(edit, C)                        how much of k* and of u is along the usual directions of keys
other_keys(lm, edit, facts, passages)      keys that the edit should or should not touch, by group
disturbance(lm, edit, keys)                |dW k| / |W k| of each of them, with C and with the identity in its place
edit_everywhere(lm, fact, target, C, ...)  success, paraphrase and neighbours of edits at every token and layer
agreement_with_traces(table, traces)       whether edits work where causal tracing says that the fact is
best_by_token(table, traces)               the same token by token

`rome_lab.studies.anatomy.drawings` draws them. One fact and one key: an edit here is the paper's, of rank one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from rome_lab.editing import (
    Edit,
    EditSettings,
    rome,
    run_to_keys,
    sample_prefixes,
    solve_update,
    subject_keys,
)
from rome_lab.facts import Fact, completions, read_prompt
from rome_lab.models import LanguageModel
from rome_lab.tracing import Trace, buckets

logger = logging.getLogger(__name__)

LARGEST = 10  # components whose share of a vector's squared length is told
JUDGED = ("p_target", "p_paraphrase", "p_neighbours")  # what `outcome_of_edit` returns
GROUPS = (
    "same subject, other wording",
    "other tokens of the prompt",
    "other subjects",
    "running text",
    "first token of a text",
)


def sizes(lm: LanguageModel, edit: Edit, C: Float[Tensor, "H H"]) -> pd.DataFrame:
    """The vectors and matrices of a rank-one edit, a row each, of the model as it is.

    Returns: `size` (its shape), `length` (Euclidean or Frobenius), `usual` (root mean square of such a length over the
        text behind C, where that is defined), `top` (share of the squared length in the `LARGEST` largest components).
    """
    W, k, v = lm.weight(edit.layer).double().cpu(), key_of(edit), edit.v_star.double()
    C = C.double()
    usual = {"k*": C.trace().sqrt(), "W k*": (W @ C @ W.T).trace().sqrt()}
    rows = {"k*": k, "u = C^-1 k*": edit.u, "W k*": W @ k, "v*": v, "v* - W k*": v - W @ k, "Lambda": edit.Lambda}
    rows |= {"W": W, "dW = Lambda uT": edit.delta}
    table = pd.DataFrame.from_dict({name: measures_of(x.double()) for name, x in rows.items()}, orient="index")
    table.insert(2, "usual", pd.Series({name: float(x) for name, x in usual.items()}))
    return table.rename_axis("what")


def measures_of(x: Tensor) -> dict[str, object]:
    """Size, length and `top` of a vector or matrix; see `sizes`."""
    squares = x.flatten().square()
    return {
        "size": " x ".join(map(str, x.shape)),
        "length": float(squares.sum().sqrt()),
        "top": float(squares.topk(min(LARGEST, len(squares))).values.sum() / squares.sum()),
    }


def directions(edit: Edit, C: Float[Tensor, "H H"]) -> pd.DataFrame:
    """Shares of the squared lengths of the keys in text, of k* and of u along the n directions most usual in text.

    The directions are the eigenvectors of C. Where C is large along one, u = C^-1 k* has little of it, so that dW, which
    sees a key only by its product with u, hardly sees what is usual.

    Returns: a row for each n from 1 to H: n, text, k*, u.
    """
    values, vectors = torch.linalg.eigh(C.double())
    energies = {"text": values, "k*": (vectors.T @ key_of(edit)).square(), "u": (vectors.T @ edit.u.double()).square()}
    shares = {name: (x.flip(0).cumsum(0) / x.sum()).numpy() for name, x in energies.items()}
    return pd.DataFrame({"n": np.arange(1, len(C) + 1)} | shares)


def key_of(edit: Edit) -> Float[Tensor, " H"]:
    """k* of a rank-one edit, float64."""
    if edit.k_star.ndim != 1:
        raise ValueError(
            f"anatomy: the {edit} has {edit.k_star.shape[1]} keys, but is to have one; make it of one fact, with "
            "hparams=EditSettings(key='averaged')."
        )
    return edit.k_star.double()


def other_keys(
    lm: LanguageModel, edit: Edit, facts: Sequence[Fact], passages: Sequence[Sequence[int]]
) -> dict[str, Float[Tensor, "N H"]]:
    """Keys that the edit was not made of, by group; float64.

    Args:
        facts: about other subjects; their last tokens count.
        passages: token ids of texts that C has not seen.
    """
    fact, prefixes = edit.fact, edit.settings.prefixes or ()
    wordings = [read_prompt(lm, replace(fact, template=x)) for x in fact.templates if x != fact.template]
    wordings = wordings or [read_prompt(lm, replace(fact, template="{} is a"))]
    prompts = [read_prompt(lm, fact, prefix=prefix) for prefix in ("", *prefixes)]
    beside = [places_beside(lm, fact, prefix) for prefix in ("", *prefixes)]
    running = [keys_of(lm, edit.layer, torch.tensor(passage, device=lm.device)) for passage in passages]
    firsts = {passage[0]: keys[0] for passage, keys in zip(passages, running, strict=True)}  # one for each token
    groups = (
        subject_keys(lm, edit.layer, wordings),
        torch.cat([keys_of(lm, edit.layer, p.ids)[places] for p, places in zip(prompts, beside, strict=True)]),
        subject_keys(lm, edit.layer, [read_prompt(lm, other) for other in facts]),
        torch.cat([keys[1:] for keys in running]),
        torch.stack(list(firsts.values())),
    )
    return dict(zip(GROUPS, groups, strict=True))


def places_beside(lm: LanguageModel, fact: Fact, prefix: str) -> list[int]:
    """Places of the tokens of the fact's own prompt behind `prefix`, but for the subject's last and a text's first."""
    offsets = lm.tokenizer(prefix + fact.prompt, return_offsets_mapping=True)["offset_mapping"]
    last = read_prompt(lm, fact, prefix=prefix).subject_range[1] - 1
    return [i for i, (_, end) in enumerate(offsets) if end > len(prefix) and i not in (0, last)]


def keys_of(lm: LanguageModel, layer: int, ids: Tensor) -> Float[Tensor, "T H"]:
    """The keys at all tokens of one text (T,), float64 on the CPU."""
    keys: list[Tensor] = []
    run_to_keys(lm, ids[None], [layer], lambda _, rows: keys.append(rows.reshape(len(ids), -1).cpu().double()))
    return keys[0]


def disturbance(lm: LanguageModel, edit: Edit, keys: Mapping[str, Float[Tensor, "N H"]]) -> pd.DataFrame:
    """What the edit changes at other keys, and what it would change with the identity in place of C.

    Both updates meet the same constraint, W_hat k* = v*; only how they spread over other keys differs.

    Returns: a row a key and update: group, update ("C" or "identity"), ratio = |dW k| / |W k|.
    """
    W, k, v = lm.weight(edit.layer).double().cpu(), key_of(edit)[:, None], edit.v_star.double()[:, None]
    plain = solve_update(W, torch.eye(len(k), dtype=torch.float64), k, v).delta
    tables = [
        pd.DataFrame(
            {"group": group, "update": update, "ratio": ((K @ dW.T).norm(dim=1) / (K @ W.T).norm(dim=1)).numpy()}
        )
        for group, K in keys.items()
        for update, dW in (("C", edit.delta), ("identity", plain))
    ]
    return pd.concat(tables, ignore_index=True)


def edit_everywhere(
    lm: LanguageModel,
    fact: Fact,
    target: str,
    C: Mapping[int, Float[Tensor, "H H"]],
    neighbours: Sequence[Fact],
    settings: EditSettings,
    positions: Sequence[int] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Edit one fact at each token and layer, and see what each of the edits does; `lm` is left as it is.

    An edit at a token reads its key there and adds its value there, in the bare prompt and behind the prefixes. The KL
    term, which speaks of the subject, is left out for all. Blanks, and tokens that end within a character, are passed over.

    Args:
        C: of every layer to edit, by layer.
        neighbours: facts that should stay.
        positions: tokens of the prompt; all by default.

    Returns: a row an edit: position, token, bucket, layer; p_target and p_paraphrase, the probability of the target
        after the prompt and, mean, after the fact's other templates; kept, the neighbours' mean probability of their
        own objects in parts of what it was; together, the harmonic mean of the three, `kept` counting at most 1;
        size, |dW| / |W|; converged. `attrs` holds p_target, p_paraphrase and p_neighbours without an edit.
    """
    prefixes = settings.prefixes or sample_prefixes(lm, settings.prefix_lengths, settings.seed)
    settings = replace(settings, kl=0.0, prefixes=prefixes)
    prompt = read_prompt(lm, fact)
    names, places = prompt.tokens(lm), buckets(len(prompt.ids), prompt.subject_range)
    moved = {i: key_at(lm, fact, i) for i in (range(len(prompt.ids)) if positions is None else positions)}
    cells = [(i, layer, there) for i, there in moved.items() if there for layer in sorted(C)]
    before, rows = outcome_of_edit(lm, fact, target, neighbours), []
    for i, layer, there in tqdm(cells, desc="edits", disable=not progress):
        edit = rome(lm, there, target, layer, C=C[layer], hparams=settings, progress=False)
        size = float(edit.delta.norm() / lm.weight(layer).double().norm())
        with edit.applied(lm):
            after = dict(zip(JUDGED, outcome_of_edit(lm, fact, target, neighbours), strict=True))
        where = {"position": i, "token": names[i], "bucket": places[i] or "before_subject", "layer": layer}
        kept = after.pop("p_neighbours") / before[2]
        together = float(stats.hmean([*after.values(), min(1.0, kept)]))
        rows.append(where | after | {"kept": kept, "together": together, "size": size, "converged": edit.converged})
    table = pd.DataFrame(rows)
    table.attrs |= dict(zip(JUDGED, before, strict=True)) | {"subject_range": prompt.subject_range}
    return table


def key_at(lm: LanguageModel, fact: Fact, position: int) -> Fact | None:
    """The same prompt, its subject taken to end with the token at `position`, where an edit then reads its key.

    The subject begins where it did, or with that token where that comes first. None where no subject can end there: at
    special tokens, blanks, and within a character.
    """
    first, end = lm.tokenizer(fact.prompt, return_offsets_mapping=True)["offset_mapping"][position]
    before = fact.prompt[:end]
    subject = before[fact.subject_span[0] :].strip() or before[first:].strip()
    begin = len(before.rstrip()) - len(subject)
    if not subject or "{}" in before[:begin]:
        return None
    moved = Fact(subject, before[:begin] + "{}" + fact.prompt[begin + len(subject) :], fact.object)
    if read_prompt(lm, moved).subject_range[1] - 1 != position:
        logger.warning("sweep: no subject can end with the token at place %d; it is passed over", position)
        return None
    return moved


def outcome_of_edit(
    lm: LanguageModel, fact: Fact, target: str, neighbours: Sequence[Fact]
) -> tuple[float, float, float]:
    """P[target] after the prompt, its mean after the fact's other templates, and the neighbours' mean P[own object]."""
    others = [replace(fact, template=x).prompt for x in fact.templates if x != fact.template]
    if not others or not neighbours:
        raise ValueError(
            f"sweep: {fact} has {len(others)} other templates and {len(neighbours)} neighbours; give at least one of each."
        )
    texts = [(fact.prompt, target), *((x, target) for x in others), *((x.prompt, x.object) for x in neighbours)]
    p = [answer.p for answer in completions(lm, texts, "sweep")]
    return p[0], float(np.mean(p[1 : 1 + len(others)])), float(np.mean(p[1 + len(others) :]))


def agreement_with_traces(table: pd.DataFrame, traces: Sequence[Trace]) -> pd.DataFrame:
    """Rank correlation of where edits work (`together`) with the indirect effect of restoring the same token and layer.

    Returns: a row a trace and set of cells: kind, cells ("all" or "last subject token"), n, spearman (NaN for fewer
        than three cells).
    """
    rows = []
    for trace in traces:
        last = table["position"] == trace.subject_range[1] - 1
        for name, part in (("all", table), ("last subject token", table[last])):
            effect = trace.indirect_effect[part["position"], part["layer"]]
            rho = stats.spearmanr(effect, part["together"]).statistic if len(part) > 2 else float("nan")
            rows.append({"kind": trace.label, "cells": name, "n": len(part), "spearman": rho})
    return pd.DataFrame(rows)


def best_by_token(table: pd.DataFrame, traces: Sequence[Trace]) -> pd.DataFrame:
    """A row a token: mean and maximum of `together` over the layers, and the largest indirect effect of each trace there."""
    by_token = table.groupby(["position", "token"])["together"].agg(["mean", "max"]).add_prefix("edits, all three: ")
    places = by_token.index.get_level_values("position")
    effects = {f"largest {trace.kind} effect": trace.indirect_effect.max(axis=1)[places] for trace in traces}
    return by_token.assign(**effects)
