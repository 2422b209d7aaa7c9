"""Results kept, and found again by all that determines them.

Store(folder)        results on disk
Basket()             a store in memory: nothing in it is a file
USER_CACHE           the store in the user's cache
Record               one result: arrays, and JSON values beside them
opened(store)        what a caller means by `store`, as a Store
canonical_json       the one text of a JSON value

One contract for every function with an argument `store: Store | str | Path | None`: results are kept in a folder (its name
as text or Path) or in a Store, and found again there; with None they are kept nowhere. Where the default is `USER_CACHE`,
they are costly and serve many callers: they are kept in the user's cache unless the caller says otherwise.

A result is one safetensors file, `folder/<what>/<sha256 of the inputs>.safetensors`. Its header carries the inputs
themselves and a digest of the whole record; a file that fails either check is reported and treated as absent.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rome_lab.base.files import check_writable, user_cache, write_atomically

logger = logging.getLogger(__name__)

Json: TypeAlias = "None | bool | int | float | str | Sequence[Json] | Mapping[str, Json]"
STORE_FORMAT = "rome_lab 1"  # raised when the layout of the files changes, so that older files are computed again
HEADER = {"format", "inputs", "meta", "sha256"}
# What safetensors raises on files that are not what they seem; a dtype unknown to numpy is an AttributeError there.
UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, AttributeError)


@dataclass(frozen=True, eq=False)
class Record:
    """One stored result: named arrays, and JSON values beside them."""

    arrays: dict[str, np.ndarray]
    meta: dict[str, Json]


class Store:
    """Results in a folder, each found again by the inputs that determine it, and by nothing less.

    `inputs` is a mapping of JSON values; `inputs["what"]` (say "trace") names the subfolder. Two mappings are the same
    inputs exactly when their JSON is: 1, 1.0 and True differ, the order of keys does not matter.
    Several processes may use one store at a time. A process that is killed while saving leaves the old file or none.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()

    def path(self, inputs: Mapping[str, Json]) -> Path:
        """Where the result of `inputs` is, or would be.

        Raises:
            TypeError, ValueError: `inputs` is not finite JSON, or has no "what" that can name a folder.
        """
        text = canonical_json(inputs, "Store: inputs")
        what = inputs.get("what")
        if not isinstance(what, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", what):
            raise ValueError(
                f'Store: inputs["what"] is {what!r}, but it names a subfolder; give letters, digits, "-" and "_" only.'
            )
        return self.folder / what / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def load(self, inputs: Mapping[str, Json]) -> Record | None:
        """The result of exactly these inputs; None where there is none, or none to be trusted (logged, with the reason).

        Raises:
            TypeError, ValueError: as in `path`.
        """
        path = self.path(inputs)
        try:
            arrays, metadata = _read(path)
            _verify(arrays, metadata, canonical_json(inputs))
        except FileNotFoundError:
            return None
        except (_Untrusted, *UNREADABLE) as error:
            logger.warning("%s is not used, and will be computed again: %s", path, error)
            return None
        return Record(arrays, json.loads(metadata["meta"]))

    def save(
        self, inputs: Mapping[str, Json], arrays: Mapping[str, np.ndarray], meta: Mapping[str, Json] | None = None
    ) -> Path:
        """Write a result, replacing what was there for these inputs; returns the file's path.

        Raises:
            TypeError, ValueError: `inputs` or `meta` is not finite JSON, or an array has an unsupported dtype or name.
            OSError: the folder cannot be written; the message says why and what to do.
        """
        path = self.path(inputs)
        texts = {
            "format": STORE_FORMAT,
            "inputs": canonical_json(inputs),
            "meta": canonical_json(meta or {}, "Store: meta"),
        }
        plain = {name: _plain_array(name, array) for name, array in arrays.items()}
        data = save(plain, metadata={**texts, "sha256": _digest(plain, texts["inputs"], texts["meta"])})
        write_atomically(path, lambda temporary: temporary.write_bytes(data))
        return path

    def check_writable(self) -> None:
        """Find out now, not after hours of work, that results cannot be saved.

        Raises:
            OSError: as in `save`.
        """
        check_writable(self.folder)


class UserCache(Store):
    """The store in the user's cache folder, wherever that is when it is used."""

    def __init__(self) -> None:
        """It has no folder of its own."""

    @property
    def folder(self) -> Path:
        return user_cache()


USER_CACHE = UserCache()


class Basket(Store):
    """A store in memory: nothing in it is a file, and its paths are names only.

    Attributes:
        records: by path, the inputs of a record, and the record.
    """

    def __init__(self) -> None:
        super().__init__("basket")
        self.records: dict[Path, tuple[Mapping[str, Json], Record]] = {}

    def load(self, inputs: Mapping[str, Json]) -> Record | None:
        record = self.records.get(self.path(inputs), (inputs, None))[1]
        return copy.deepcopy(record)  # each reader has its own to change

    def save(
        self, inputs: Mapping[str, Json], arrays: Mapping[str, np.ndarray], meta: Mapping[str, Json] | None = None
    ) -> Path:
        path = self.path(inputs)
        copies = {name: np.array(array) for name, array in arrays.items()}  # what was received cannot be written to
        self.records[path] = (inputs, Record(copies, json.loads(canonical_json(meta or {}, "Store: meta"))))
        return path

    def check_writable(self) -> None:
        """It always is."""


def opened(store: Store | str | Path | None) -> Store | None:
    """What a caller means by `store`: the store in the folder of that name; a Store, or None, is itself.

    Raises:
        TypeError: it is none of these.
    """
    if not isinstance(store, Store | str | Path | None):
        raise TypeError(f"store is {store!r}; expected a folder (text or Path), a Store, or None to keep nothing.")
    return Store(store) if isinstance(store, str | Path) else store


def canonical_json(value: Json, name: str = "the value") -> str:
    """The one JSON text of `value`: keys sorted, ASCII, floats in the shortest form that reads back exactly.

    Raises:
        TypeError, ValueError: something in it is not JSON, or not finite; the message says where, in terms of `name`.
    """
    return json.dumps(_plain(value, name), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(value: Json, where: str) -> Json:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        raise ValueError(f"{where} is {value}, which JSON cannot hold; use None or a string for it.")
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(
        f"{where} is of type {type(value).__name__}, which is not JSON; convert it to None, bool, int, float, str, "
        "or a list or string-keyed mapping of these."
    )


class _Untrusted(Exception):
    """A file in the store is not the record that was asked for."""


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != STORE_FORMAT or HEADER - metadata.keys():
            raise _Untrusted(f"it is not a result in the format {STORE_FORMAT!r}")
        return file.get_tensors(), metadata


def _verify(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], inputs: str) -> None:
    if metadata["sha256"] != _digest(arrays, metadata["inputs"], metadata["meta"]):
        raise _Untrusted("its content does not match its own checksum")
    if metadata["inputs"] != inputs:
        raise _Untrusted("it holds the result of other inputs")


def _digest(arrays: Mapping[str, np.ndarray], inputs: str, meta: str) -> str:
    names = sorted(arrays)
    head = [STORE_FORMAT, inputs, meta, [[name, arrays[name].dtype.str, arrays[name].shape] for name in names]]
    digest = hashlib.sha256(canonical_json(head).encode())
    for name in names:
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _plain_array(name: str, array: np.ndarray) -> np.ndarray:
    """`array` in native byte order and C order, which is what safetensors takes."""
    array = np.asarray(array)
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(
            f"Store: array {name!r} has dtype {array.dtype}; convert it to bool, or to ints or floats of 64 bits."
        )
    if name == "__metadata__":
        raise ValueError("Store: an array cannot be named '__metadata__', the name of safetensors' own header.")
    return np.asarray(array, dtype=array.dtype.newbyteorder("="), order="C")
