"""The files that edits are kept in: safetensors with a checksum, read in full before anything of it is believed.

write_edit(path, vectors, about)    whole or not at all
read_edit(path)                     the same again, or the reason why it cannot be trusted
describe_edit(path)                 what an edit says, without a model
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rome_lab.base import Json, canonical_json, package_versions, write_atomically

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


def write_edit(path: str | Path, vectors: Mapping[str, Tensor], about: Mapping[str, Json]) -> Path:
    """Write the vectors named in `VECTORS` and what `ABOUT` lists, but for the versions, which are added here.

    Raises:
        OSError: the folder cannot be written; the message says why and what to do.
    """
    path = Path(path).expanduser()
    text = canonical_json({**about, "versions": package_versions(EDIT_PACKAGES)}, "the edit")
    tensors = {name: vectors[name].contiguous() for name in VECTORS}
    data = save(tensors, metadata={"format": EDIT_FORMAT, "about": text, "sha256": checksum(tensors, text)})
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
    return path


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


def describe_edit(path: str | Path) -> str:
    """What the edit in a file says, for people; needs no model.

    Raises: as `read_edit`.
    """
    tensors, about = read_edit(path)
    changes = [
        f"{fact['template'].replace('{}', fact['subject'], 1)!r} -> {target!r} (was {fact['object']!r})"
        for fact, target in zip(about["facts"], about["targets"], strict=True)
    ]
    rank = tensors["u"].view(len(tensors["u"]), -1).shape[1]
    return "\n".join(
        [
            *changes,
            f"model: {about['model']}, fingerprint {about['fingerprint'][:12]}",
            f"change: rank {rank}, of {about['module']} (layer {about['layer']}), key {about['settings'].get('key')!r}",
            f"v*: {'converged' if about['converged'] else 'not converged'}, met to {about['constraint_error']:.1e}",
            f"made with: {', '.join(f'{name} {version}' for name, version in about['versions'].items())}",
        ]
    )


def checksum(tensors: Mapping[str, Tensor], about: str, file_format: str = EDIT_FORMAT) -> str:
    """SHA-256 of all that a file holds."""
    names = sorted(tensors)
    head = [file_format, about, [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]]
    digest = hashlib.sha256(canonical_json(head).encode())
    for name in names:
        digest.update(tensors[name].flatten().view(torch.uint8).numpy())  # whatever its dtype
    return digest.hexdigest()
