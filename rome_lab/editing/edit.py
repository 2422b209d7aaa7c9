"""Edits as things: applied to a model and undone again, bit for bit; saved to a file, and loaded.

Edit                    what changes one matrix; `edit.applied(lm)`, `apply`, `undo`, `save`
load_edit(path)         the edit that was saved
describe_edit(path)     what it says, without a model

`lm.edits` lists the edits in force. The weight in force is always the original one plus the sum of the updates, rounded
once, see `rome_lab.models.overlay`. So edits can be undone in any order, and what is left after the last one is the original
itself. Files are safetensors with a checksum, read in full before anything of them is believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rome_lab.base import Json, canonical_json, package_versions, write_atomically
from rome_lab.editing.settings import EditSettings
from rome_lab.editing.update import TOLERANCE, Update, constraint_error, precise
from rome_lab.facts import Fact
from rome_lab.models import LanguageModel, difference

logger = logging.getLogger(__name__)

EDIT_FORMAT = "rome_lab edit 2"  # raised when the layout of the files changes
FORMER_FORMAT = "rome_lab edit 1"  # the same without `function`, and with a fingerprint that was made in another way
VECTORS = ("k_star", "v_star", "Lambda", "u")
ABOUT = {
    "facts": list,
    "targets": list,
    "layer": int,
    "module": str,
    "settings": dict,
    "history": dict,
    "converged": bool,
    "constraint_error": float,
    "model": str,
    "fingerprint": str,
    "function": dict | None,
    "versions": dict,
}
EDIT_PACKAGES = ("rome_lab", "torch", "transformers")
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
        lines, n = in_words(self.about(), self.u), len(self.facts)
        if n > MOST_ROWS:
            lines[MOST_ROWS:n] = [f"... and {n - MOST_ROWS} more"]
        return pd.DataFrame(lines).to_html(header=False, index=False)

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

    def measured_error(self, W_hat: Float[Tensor, "D H"]) -> float:
        """The largest |W_hat k* - v*| / |v*| of these weights."""
        K, V = (x.view(len(x), -1) for x in (self.k_star, self.v_star))
        return float(constraint_error(W_hat, K, V).max())

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
        path = Path(path).expanduser()
        text = canonical_json(self.about() | {"versions": package_versions(EDIT_PACKAGES)}, "the edit")
        tensors = {name: getattr(self, name).contiguous() for name in VECTORS}
        data = save(tensors, metadata={"format": EDIT_FORMAT, "about": text, "sha256": checksum(tensors, text)})
        write_atomically(path, lambda temporary: temporary.write_bytes(data))
        return path

    def about(self) -> dict[str, Json]:
        """What `ABOUT` lists, but for the versions."""
        nested = {
            "facts": [asdict(fact) for fact in self.facts],
            "settings": asdict(self.settings),
            "history": self.history.to_dict("split", index=False),
        }
        return {name: getattr(self, name) for name in ABOUT if name not in (*nested, "versions")} | nested

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
        """Raise a ValueError where W_hat k* = v* would hold neither beside the edits in force nor without them.

        Where the edit was made it did hold, with the edits that were in force then.
        """
        original = lm.overlay.original(self.layer)
        W = original.T if lm.memory_is_transposed(self.layer) else original
        error = min(self.measured_error(precise(x) + self.delta.to(precise(x))) for x in (W, lm.weight(self.layer)))
        if error > max(2 * self.constraint_error, TOLERANCE, 4 * torch.finfo(W.dtype).eps):
            raise ValueError(
                f"{doing}: the {self} is for another model than {loaded}: there W_hat k* misses v* by {error:.1e} of its "
                f"length, not {self.constraint_error:.1e}; load the model that it was made on, with the edits that were in "
                "force then, or make the edit anew."
            )
        logger.warning(
            "%s: the file of the %s does not say enough of its model to compare it with %s; its matrix is the same "
            "(W_hat k* = v* holds to %.0e), the others were not compared. Make the edit anew to be sure.",
            doing, self, loaded, error,
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
    readers = {
        "facts": lambda facts: tuple(Fact(**fact) for fact in facts),
        "targets": tuple,
        "settings": lambda settings: EditSettings(**settings),
        "history": lambda history: pd.DataFrame(**history),
    }
    about.pop("versions")
    try:
        return Edit(**vectors, **{name: readers.get(name, lambda x: x)(value) for name, value in about.items()})
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"load_edit: {path} does not hold a possible edit: {reason}; save the edit anew.") from error


def describe_edit(path: str | Path) -> str:
    """What the edit in a file says, for people; needs no model.

    Raises: as `load_edit`.
    """
    tensors, about = read_edit(path)
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return "\n".join([*in_words(about, tensors["u"]), f"made with: {versions}"])


def in_words(about: Mapping[str, Any], u: Tensor) -> list[str]:
    """What `ABOUT` lists, in lines for people."""
    changes = [
        f"{fact['template'].replace('{}', fact['subject'], 1)!r} -> {target!r} (was {fact['object']!r})"
        for fact, target in zip(about["facts"], about["targets"], strict=True)
    ]
    where = f"of {about['module']} (layer {about['layer']}), key {about['settings'].get('key')!r}"
    return [
        *changes,
        f"model: {about['model']}, fingerprint {about['fingerprint'][:12]}",
        f"change: rank {u[0].numel()}, {where}",
        f"v*: {'converged' if about['converged'] else 'not converged'}, met to {about['constraint_error']:.1e}",
    ]


def read_edit(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The vectors, and what `ABOUT` lists.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no edit, it was truncated or altered, or what it holds does not fit together.
    """
    path = Path(path).expanduser()
    if not os.path.isfile(path):
        raise FileNotFoundError(f"load_edit: there is no file {path}; give the path that an edit was saved to.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"load_edit: {path} is no edit, or was truncated: {error}; save the edit anew.") from error
    file_format = metadata.get("format")
    if file_format not in (EDIT_FORMAT, FORMER_FORMAT):
        raise ValueError(f"load_edit: {path} is not in the format {EDIT_FORMAT!r}; give a file that Edit.save wrote.")
    text = metadata.get("about", "")
    if set(tensors) != set(VECTORS) or metadata.get("sha256") != checksum(tensors, text, file_format):
        raise ValueError(f"load_edit: {path} was altered: it does not match its own checksum; save the edit anew.")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_edit: {path} does not hold a possible edit: {error}; save the edit anew.") from None
    if file_format == FORMER_FORMAT and isinstance(about, dict):
        about.setdefault("function", None)
    if problem := misfit(tensors, about):
        raise ValueError(f"load_edit: {path} does not hold a possible edit: {problem}; save the edit anew.")
    return tensors, about


def misfit(tensors: Mapping[str, Tensor], about: Any) -> str | None:
    """What in a file of the right format does not fit together; None where all does."""
    if not isinstance(about, dict) or about.keys() != ABOUT.keys():
        return f"expected the entries {', '.join(sorted(ABOUT))}"
    for name, kind in ABOUT.items():
        if not isinstance(about[name], kind):
            return f"{name} is {about[name]!r}"
    if not 0 < len(about["facts"]) == len(about["targets"]):
        return f"it has {len(about['facts'])} facts and {len(about['targets'])} targets"
    for fact, target in zip(about["facts"], about["targets"], strict=True):
        texts = [fact.get(name) if isinstance(fact, dict) else None for name in ("subject", "template", "object")]
        if not all(isinstance(text, str) for text in (*texts, target)):
            return f"a fact is {fact!r}, its target {target!r}"
    if isinstance(about["layer"], bool) or about["layer"] < 0 or not 0 <= about["constraint_error"] < float("inf"):
        return f"layer is {about['layer']!r}, constraint_error {about['constraint_error']!r}"
    if about["history"].keys() != {"columns", "data"}:
        return f"the history has the parts {', '.join(map(repr, about['history']))}"
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.ndim not in (1, 2) or not torch.isfinite(tensor).all():
            return f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, or holds NaN or infinity"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    columns = {shape[1:] for shape in shapes.values()}
    if shapes["k_star"] != shapes["u"] or shapes["v_star"] != shapes["Lambda"] or len(columns) != 1:
        return f"the shapes are {shapes}"
    return None


def checksum(tensors: Mapping[str, Tensor], about: str, file_format: str = EDIT_FORMAT) -> str:
    """SHA-256 of all that a file holds."""
    names = sorted(tensors)
    head = [file_format, about, [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]]
    digest = hashlib.sha256(canonical_json(head).encode())
    for name in names:
        digest.update(tensors[name].flatten().view(torch.uint8).numpy())  # whatever its dtype
    return digest.hexdigest()
