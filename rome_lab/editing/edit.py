"""Edits as things: applied to a model and undone again, bit for bit; saved to a file, and loaded.

Edit                    what changes one matrix or several; `edit.applied(lm)`, `apply`, `undo`, `save`
LayerChange             the part of it that changes one matrix
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
from collections.abc import Iterator, Mapping, Sequence
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
from rome_lab.editing.settings import EditSettings, LeastSquares
from rome_lab.editing.update import TOLERANCE, Update, constraint_error, precise
from rome_lab.facts import Fact
from rome_lab.models import LanguageModel, difference

logger = logging.getLogger(__name__)

EDIT_FORMAT = "rome_lab edit 3"  # raised when the layout of the files changes
# The same without `below` and `solution`; the first also without `function`, and with a fingerprint made in another way.
FORMER_FORMATS = ("rome_lab edit 1", "rome_lab edit 2")
VECTORS = ("k_star", "v_star", "Lambda", "u")
ABOUT = {
    "facts": list,
    "targets": list,
    "layer": int,
    "module": str,
    "below": list,
    "solution": dict,
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


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LayerChange:
    """A change of low rank of one matrix, W_hat = W + Lambda uT, which is to give each key k* its value v*.

    With one key the vectors are 1-D; otherwise they have n columns, the keys of each fact side by side.

    Attributes:
        layer, module: where W is.
        k_star: (H,) or (H, n) float32, the keys.
        v_star: (D,) or (D, n) float32, the value that W_hat gives each key, or comes near to where constraints are soft.
        Lambda: (D,) or (D, n) float32.
        u: (H,) or (H, n) float32, C^-1 k*.
    """

    layer: int
    module: str
    k_star: Float[Tensor, "H ..."]
    v_star: Float[Tensor, "D ..."]
    Lambda: Float[Tensor, "D ..."]
    u: Float[Tensor, "H ..."]

    @property
    def delta(self) -> Float[Tensor, "D H"]:
        """W_hat - W, float64; see `Update`."""
        return Update(self.Lambda.view(len(self.Lambda), -1), self.u.view(len(self.u), -1)).delta

    def measured_error(self, W_hat: Float[Tensor, "D H"]) -> float:
        """The largest |W_hat k* - v*| / |v*| of these weights."""
        K, V = (x.view(len(x), -1) for x in (self.k_star, self.v_star))
        return float(constraint_error(W_hat, K, V).max())


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Edit(LayerChange):
    """A change of one matrix or several that makes facts other ones; of ROME the exact one (Appendix A, Eqns 13 and 17).

    Where it changes several layers, what it has as a `LayerChange` is of the last of them, at which the facts' hidden states
    reach their values.

    Attributes:
        facts, targets: what was edited, and what the model is to say instead of each fact's object.
        below: what it changes in lower layers, the lowest first.
        solution: how the changes were solved for.
        settings: how v* was found, with the prefixes that were used.
        history: the optimisation of v*, a row a step: step, loss, nll, kl, weight_decay, p_target, norm, as in
            `rome_lab.editing.values.Value`, and fact, its place in `facts`.
        converged: whether v* makes every target probable enough; where it is False, v* is the best that was found.
        constraint_error: largest |W_hat k* - v*| / |v*| of the weights as stored when the edit was made, in any layer.
        model, fingerprint, function: the model that the edit is for, see `rome_lab.models.identity`; the function is None in
            edits from files of `rome_lab edit 1`, whose fingerprint cannot be compared.
    """

    facts: tuple[Fact, ...]
    targets: tuple[str, ...]
    below: tuple[LayerChange, ...] = ()
    solution: LeastSquares = LeastSquares()
    settings: EditSettings
    history: pd.DataFrame
    converged: bool
    constraint_error: float
    model: str
    fingerprint: str
    function: Mapping[str, Json] | None

    def __str__(self) -> str:
        changes = "; ".join(f"{x.prompt!r} -> {target!r}" for x, target in zip(self.facts, self.targets, strict=True))
        where = layers_in_words(self.layers)
        return f"edit of {where} of {self.model}: {changes}" + ("" if self.converged else " (not converged)")

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
    def parts(self) -> tuple[LayerChange, ...]:
        """What it changes, a matrix each, the lowest layer first."""
        return (*self.below, self)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that it changes, the lowest first."""
        return tuple(part.layer for part in self.parts)

    def delta_at(self, layer: int) -> Float[Tensor, "D H"]:
        """W_hat - W of one of its layers, float64."""
        (part,) = (part for part in self.parts if part.layer == layer)
        return part.delta

    @property
    def digest(self) -> str:
        """SHA-256 of what the edit does, and to which model: two edits with the same digest are the same edit."""
        digest = hashlib.sha256()
        for part in (self, *self.below):
            digest.update(json.dumps([self.fingerprint, part.layer, part.Lambda.shape]).encode())
            for tensor in (part.Lambda, part.u):
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
        tensors |= {f"{name}.{part.layer}": getattr(part, name).contiguous() for part in self.below for name in VECTORS}
        data = save(tensors, metadata={"format": EDIT_FORMAT, "about": text, "sha256": checksum(tensors, text)})
        write_atomically(path, lambda temporary: temporary.write_bytes(data))
        return path

    def about(self) -> dict[str, Json]:
        """What `ABOUT` lists, but for the versions."""
        nested = {
            "facts": [asdict(fact) for fact in self.facts],
            "below": [{"layer": part.layer, "module": part.module} for part in self.below],
            "solution": asdict(self.solution),
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
        if any(x.layer >= lm.n_layers or lm.weight(x.layer).shape != (len(x.Lambda), len(x.u)) for x in self.parts):
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
    tensors, about = read_edit(path)
    readers = {
        "facts": lambda facts: tuple(Fact(**fact) for fact in facts),
        "targets": tuple,
        "below": lambda below: tuple(LayerChange(**part, **vectors_at(tensors, part["layer"])) for part in below),
        "solution": lambda solution: LeastSquares(**solution),
        "settings": lambda settings: EditSettings(**settings),
        "history": lambda history: pd.DataFrame(**history),
    }
    about.pop("versions")
    try:
        return Edit(
            **vectors_at(tensors), **{name: readers.get(name, lambda x: x)(value) for name, value in about.items()}
        )
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
    modules = ", ".join(part["module"] for part in (*about["below"], about))
    layers = layers_in_words([part["layer"] for part in (*about["below"], about)])
    soft = "" if about["solution"].get("constraints", "exact") == "exact" else "soft constraints, "
    return [
        *changes,
        f"model: {about['model']}, fingerprint {about['fingerprint'][:12]}",
        f"change: rank {u[0].numel()}, of {modules} ({layers}), {soft}key {about['settings'].get('key')!r}",
        f"v*: {'converged' if about['converged'] else 'not converged'}, met to {about['constraint_error']:.1e}",
    ]


def layers_in_words(layers: Sequence[int]) -> str:
    """ "layer 3", or "layers 3, 4 and 5"."""
    *others, last = map(str, layers)
    return f"layers {', '.join(others)} and {last}" if others else f"layer {last}"


def vectors_at(tensors: Mapping[str, Tensor], layer: int | None = None) -> dict[str, Tensor]:
    """The vectors of a lower layer by the names of `VECTORS`; for None those of the last layer."""
    return {name: tensors[name if layer is None else f"{name}.{layer}"] for name in VECTORS}


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
    if file_format not in (EDIT_FORMAT, *FORMER_FORMATS):
        raise ValueError(f"load_edit: {path} is not in the format {EDIT_FORMAT!r}; give a file that Edit.save wrote.")
    text = metadata.get("about", "")
    if not set(VECTORS) <= set(tensors) or metadata.get("sha256") != checksum(tensors, text, file_format):
        raise ValueError(f"load_edit: {path} was altered: it does not match its own checksum; save the edit anew.")
    try:
        about = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_edit: {path} does not hold a possible edit: {error}; save the edit anew.") from None
    if file_format in FORMER_FORMATS and isinstance(about, dict):
        about = {"function": None, "below": [], "solution": {}} | about
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
    below = about["below"]
    if not all(isinstance(x, dict) and [*x] == ["layer", "module"] and isinstance(x["module"], str) for x in below):
        return f"the lower layers are {below!r}"
    layers = [*(part["layer"] for part in below), about["layer"]]
    ascending = all(type(x) is int for x in layers) and layers == sorted(set(layers))
    if not ascending or layers[0] < 0 or not 0 <= about["constraint_error"] < float("inf"):
        return f"layer is {', '.join(map(repr, layers))}, constraint_error {about['constraint_error']!r}"
    if about["history"].keys() != {"columns", "data"}:
        return f"the history has the parts {', '.join(map(repr, about['history']))}"
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.ndim not in (1, 2) or not torch.isfinite(tensor).all():
            return f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, or holds NaN or infinity"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    ends = ["", *(f".{layer}" for layer in layers[:-1])]
    if set(shapes) != {name + end for name in VECTORS for end in ends}:
        return f"it has the vectors {', '.join(sorted(shapes))} for {layers_in_words(layers)}"
    for k_star, v_star, Lambda, u in ([shapes[name + end] for name in VECTORS] for end in ends):
        if k_star != u or v_star != Lambda or k_star[1:] != Lambda[1:]:
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
