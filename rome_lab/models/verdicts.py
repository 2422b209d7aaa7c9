"""Verdicts of `rl.verify` on how exactly a kind of model is traced and edited, kept in the user's cache.

Verdict(check, difference, limit, verdict, remark)   of one check
keep_verdicts(lm, verdicts), verdicts_of(lm)         kept, and found again: None where the model was never verified
check_verified(lm, doing)                            raises where one of them is that something comes out wrong
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import nn

from rome_lab.base import USER_CACHE, Basket, Json, Store, canonical_json, code_version, opened
from rome_lab.models.identity import function_of
from rome_lab.models.language_model import LanguageModel
from rome_lab.models.process import precisions
from rome_lab.models.readiness import hooked

VERIFYING = (
    "rome_lab.editing.verifying"  # the module that reaches verdicts, by all that it tries: they end with its code
)
EXACT, ROUNDED, WRONG, IMPOSSIBLE = "exact to float", "exact to the dtype", "wrong", "not possible"


@dataclass(frozen=True)
class Verdict:
    """What one check of a model came to.

    Attributes:
        check: what was compared with the model's own forward.
        difference: the largest one, in the check's own unit; None where nothing could be compared.
        limit: what rounding explains of it.
        verdict: "exact to float", "exact to the dtype", "wrong" or "not possible".
        remark: the unit, or why it is not possible.
    """

    check: str
    difference: float | None
    limit: float | None
    verdict: str
    remark: str


def inputs_of(lm: LanguageModel) -> dict[str, Json]:
    """What a verdict depends on: the function, where its parts are, and the arithmetic; not the weights' values."""
    layout = lm.layout
    return {
        "what": "verification",
        "function": function_of(lm.model.config),
        "modules": modules_digest(lm.model),
        "hooks": hooked(lm.model),
        "layout": [layout.blocks, layout.attn, layout.mlp, layout.memory, list(layout.tail), list(layout.sparse)],
        "dtype": str(lm.dtype),
        "matmul": list(precisions()),
        "attention": str(lm.model.config._attn_implementation),
        "device": lm.device.type,
        "versions": [torch.__version__, transformers.__version__],
    }


def modules_digest(model: nn.Module) -> str:
    """SHA-256 of the classes of all modules by their paths: another class may do something else with the same weights."""
    classes = [(path, type(x).__module__, type(x).__qualname__) for path, x in model.named_modules()]
    return hashlib.sha256(canonical_json(classes).encode()).hexdigest()


def keep_verdicts(
    lm: LanguageModel, verdicts: Sequence[Verdict], store: Store | str | Path | None = USER_CACHE
) -> None:
    """Keep the verdicts on models of this kind, instead of any that were kept before."""
    kept = {"code": code_version(VERIFYING), "verdicts": [asdict(x) for x in verdicts]}
    (opened(store) or Basket()).save(inputs_of(lm), {}, kept)


def verdicts_of(lm: LanguageModel, store: Store | str | Path | None = USER_CACHE) -> list[Verdict] | None:
    """The verdicts that are kept on models of this kind; None where there are none, or where the code is another now."""
    record = (opened(store) or Basket()).load(inputs_of(lm))
    if record is None or record.meta.get("code") != code_version(VERIFYING):
        return None
    return [Verdict(**row) for row in record.meta["verdicts"]]


def check_verified(lm: LanguageModel, doing: str) -> None:
    """Raise a ValueError where `rl.verify` has found that something comes out wrong on models of this kind."""
    if wrong := [x for x in verdicts_of(lm) or () if x.verdict == WRONG]:
        numbers = ", ".join(
            f"{x.check} is off by {x.difference or 'what is no number'}, where rounding explains {x.limit:.1e}"
            for x in wrong[:1]
        )
        raise ValueError(
            f"{doing}: rl.verify found that {lm.name} comes out wrong ({', '.join(x.check for x in wrong)}; {numbers}), so "
            "that its traces are not what they say; causal_trace(..., despite_verdict=True) makes them all the same, and "
            "rl.verify(lm) tries again."
        )
