"""Edits as things: `Edit`, applied to a model and undone again, bit for bit; saved, and loaded by `load_edit`.

`lm.edits` lists the edits in force. The weight in force is always the original one plus the sum of the updates, rounded
once, see `rome_lab.models.overlay`. So edits can be undone in any order, and what is left after the last one is the original
itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from rome_lab.base import Json
from rome_lab.editing.edit_files import VECTORS, read_edit, write_edit
from rome_lab.editing.settings import EditSettings
from rome_lab.editing.update import TOLERANCE, Update, constraint_error, precise
from rome_lab.facts import Fact
from rome_lab.models import LanguageModel, difference

logger = logging.getLogger(__name__)

# JSON as they are
PLAIN_FIELDS = ("targets", "layer", "module", "converged", "constraint_error", "model", "fingerprint", "function")
MOST_ROWS = 10  # facts in the table of an edit


@dataclass(frozen=True, eq=False, repr=False)
class Edit:
    """An exact change of one matrix, W_hat = W + Lambda uT, such that W_hat k* = v* (Appendix A, Eqns 13 and 17).

    With one fact and one key the vectors are 1-D; otherwise they have n columns, the keys of each fact side by side.

    Attributes:
        facts, targets: what was edited, and what the model is to say instead of each fact's object.
        layer, module: where W is.
        k_star: (H,) or (H, n) float32, the keys.
        v_star: (D,) or (D, n) float32, the value that W_hat gives each key.
        Lambda: (D,) or (D, n) float32.
        u: (H,) or (H, n) float32, C^-1 k*.
        settings: how v* was found, with the prefixes that were used.
        history: the optimisation of v*, a row a step: step, loss, nll, kl, weight_decay, p_target, norm, as in
            `rome_lab.editing.values.Value`, and fact, its place in `facts`.
        converged: whether v* makes every target probable enough; where it is False, v* is the best that was found.
        constraint_error: largest |W_hat k* - v*| / |v*| of the weights as stored when the edit was made.
        model, fingerprint, function: the model that the edit is for, see `rome_lab.models.identity`; the function is None in
            edits from files of `rome_lab edit 1`, whose fingerprint cannot be compared.
    """

    facts: tuple[Fact, ...]
    targets: tuple[str, ...]
    layer: int
    module: str
    k_star: Float[Tensor, "H ..."]
    v_star: Float[Tensor, "D ..."]
    Lambda: Float[Tensor, "D ..."]
    u: Float[Tensor, "H ..."]
    settings: EditSettings
    history: pd.DataFrame
    converged: bool
    constraint_error: float
    model: str
    fingerprint: str
    function: Mapping[str, Json] | None

    def __str__(self) -> str:
        changes = "; ".join(f"{x.prompt!r} -> {target!r}" for x, target in zip(self.facts, self.targets, strict=True))
        return f"edit of layer {self.layer} of {self.model}: {changes}" + ("" if self.converged else " (not converged)")

    def __repr__(self) -> str:
        return textwrap.shorten(f"<{self}", 200, placeholder=" ...") + ">"

    def _repr_html_(self) -> str:
        rows = [(f"{x.prompt} (was {x.object})", target) for x, target in zip(self.facts, self.targets, strict=True)]
        if len(rows) > MOST_ROWS:
            rows[MOST_ROWS:] = [(f"... and {len(rows) - MOST_ROWS} more", "")]
        where = f"layer {self.layer} ({self.module}) of {self.model}"
        rows.append(("changes", f"{where}, rank {self.u[0].numel()}, key {self.settings.key}"))
        rows.append(("v*", f"{'converged' if self.converged else 'not converged'}, met to {self.constraint_error:.0e}"))
        return pd.DataFrame(rows).to_html(header=False, index=False)

    @property
    def fact(self) -> Fact:
        """The fact that was edited; the first of several."""
        return self.facts[0]

    @property
    def target(self) -> str:
        """What the model is to say; of the first of several facts."""
        return self.targets[0]

    @property
    def delta(self) -> Float[Tensor, "D H"]:
        """W_hat - W, float64; see `Update`."""
        return Update(self.Lambda.view(len(self.Lambda), -1), self.u.view(len(self.u), -1)).delta

    @property
    def digest(self) -> str:
        """SHA-256 of what the edit does, and to which model: two edits with the same digest are the same edit."""
        digest = hashlib.sha256(json.dumps([self.fingerprint, self.layer, self.Lambda.shape]).encode())
        for tensor in (self.Lambda, self.u):
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write the edit to one safetensors file, whole or not at all; returns its path.

        Raises:
            OSError: the folder cannot be written; the message says why and what to do.
        """
        about = {name: getattr(self, name) for name in PLAIN_FIELDS}
        about |= {"facts": [asdict(fact) for fact in self.facts], "settings": asdict(self.settings)}
        about["history"] = self.history.to_dict("split", index=False)
        return write_edit(path, {name: getattr(self, name) for name in VECTORS}, about)

    def is_applied(self, lm: LanguageModel) -> bool:
        """Whether this edit, or one loaded from its file, is in force."""
        return self.digest in [edit.digest for edit in lm.edits]

    def apply(self, lm: LanguageModel) -> None:
        """Put the edit in force, beside those that are.

        Raises:
            ValueError: it is in force already, it is for another model or does not fit, or the weights would overflow.
        """
        if self.is_applied(lm):
            raise ValueError(f"apply: the {self} is in force already; undo it first to apply it anew.")
        self.check_model(lm, "apply")
        lm.overlay.put([*lm.edits, self])

    def check_model(self, lm: LanguageModel, doing: str) -> None:
        """Raise a ValueError where the edit is for another model than `lm`, which says what differs.

        An edit that does not know the function of its model, because its file is of before, is checked by its constraint.
        """
        now, loaded = lm.identity(edited=False), f"the {lm.name} that is loaded (in {lm.dtype})"
        function = now.function if self.function is None else self.function
        # The fingerprint is of the function and the weights: with the function of then it tells whether the weights differ.
        weights = "" if replace(now, function=function).fingerprint == self.fingerprint else "the weights differ"
        if self.function is not None and (why := difference(function, now.function) or weights):
            raise ValueError(
                f"{doing}: the {self} is for another model than {loaded}: {why}; "
                "load the model that it was made on, in the same dtype, or make the edit anew."
            )
        if self.layer >= lm.n_layers or lm.weight(self.layer).shape != (len(self.Lambda), len(self.u)):
            raise ValueError(f"{doing}: the {self} does not fit the matrices of {lm.name}; make the edit anew.")
        if self.function is None and not self.is_applied(lm):
            self.check_constraint(lm, doing, loaded)

    def check_constraint(self, lm: LanguageModel, doing: str, loaded: str) -> None:
        """Raise a ValueError where W_hat k* = v* would not hold, as it did where the edit was made."""
        K, V = (x.view(len(x), -1) for x in (self.k_star, self.v_star))
        W = lm.weight(self.layer)
        error = float(constraint_error(precise(W) + self.delta.to(precise(W)), K, V).max())
        if error > max(2 * self.constraint_error, TOLERANCE, 4 * torch.finfo(W.dtype).eps):
            raise ValueError(
                f"{doing}: the {self} is for another model than {loaded}: there W_hat k* misses v* by {error:.1e} of its "
                f"length, not {self.constraint_error:.1e}; load the model that it was made on, with the edits that were in "
                "force then, or make the edit anew."
            )
        logger.warning(
            "%s: the file of the %s does not say enough of its model to compare it with %s; its matrix is the same "
            "(W_hat k* = v* holds to %.0e), the others were not compared. Make the edit anew to be sure.", doing, self, loaded, error,
        )  # fmt: skip

    def undo(self, lm: LanguageModel) -> None:
        """Take the edit back; the others stay in force. Once none is, the weights are bit for bit the original ones.

        Raises:
            ValueError: it is not in force.
        """
        if not self.is_applied(lm):
            raise ValueError(f"undo: the {self} is not in force in this {lm.name}; lm.edits lists those that are.")
        lm.overlay.put([edit for edit in lm.edits if edit.digest != self.digest])

    @contextlib.contextmanager
    def applied(self, lm: LanguageModel) -> Iterator[LanguageModel]:
        """Within the context `lm` is edited; after it, also after an exception, it is bit for bit what it was."""
        before = self.is_applied(lm)
        try:
            self.apply(lm)  # inside, so that Ctrl-C just after it is no exception
            yield lm
        finally:
            if not before and self.is_applied(lm):
                self.undo(lm)


def load_edit(path: str | Path) -> Edit:
    """The edit that `Edit.save` wrote. Whether it fits a model is checked when it is applied.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no edit, it was truncated or altered, or what it holds does not fit together.
    """
    vectors, about = read_edit(path)
    try:
        return Edit(
            facts=tuple(Fact(**fact) for fact in about["facts"]),
            targets=tuple(about["targets"]),
            settings=EditSettings(**about["settings"]),
            history=pd.DataFrame(**about["history"]),
            **{name: about[name] for name in PLAIN_FIELDS if name != "targets"},
            **vectors,
        )
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"load_edit: {path} does not hold a possible edit: {reason}; save the edit anew.") from error
