"""Many machines: a function of a model and an item, called on the workers of a Dask cluster.

Workers(client, lm, store).map(function, items, bar)   what the function returns for each item

Every worker loads the model once, from where the client's came from, on a device of its own choice, and keeps it for the
next call. What the function saves comes back with what it returns, and the client writes it to its own store, so that
machines need no common file system. This module needs dask.distributed: it is imported where a client is given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import dask
from distributed import CancelledError, Client, Future, KilledWorker, as_completed, get_worker
from tqdm.auto import tqdm

from rome_lab.base import Basket, Json, Record, Store, code_version, opened, package_versions
from rome_lab.models.language_model import LanguageModel
from rome_lab.models.loading import load_model
from rome_lab.models.process import set_precisions

logger = logging.getLogger(__name__)

Function: TypeAlias = Callable[[LanguageModel, Any, Store], Any]
Saved: TypeAlias = tuple[Mapping[str, Json], Record]  # the inputs of a record, and the record


class Workers:
    """The workers of a Dask cluster, at work for one model and one store.

    Args:
        client: of the cluster; workers may come and go.
        lm: the client's model, which `load_model` has loaded.
        store: where what the workers save is written, by the client; in memory by default.

    Raises:
        TypeError: the client is none, or an asynchronous one.
        ValueError: the workers cannot load the model, because it exists in memory only.
    """

    def __init__(self, client: Client, lm: LanguageModel, store: Store | str | Path | None = None) -> None:
        if not isinstance(client, Client) or client.asynchronous:
            raise TypeError(
                f"client is {client!r}; expected a dask.distributed Client that is not asynchronous, such as "
                "cluster.get_client() gives."
            )
        if lm.origin is None or lm.edits:
            why = "has edits in force" if lm.edits else "was not loaded by load_model"
            raise ValueError(
                f"client: the workers cannot load {lm.name}, which {why} and so exists in the memory of this process "
                "only; save it with lm.save_pretrained(folder), in a folder that all workers see, and give "
                "load_model(folder)."
            )
        self.client, self.lm, self.store = client, lm, opened(store) or Basket()
        self.key: dict[str, Json] = lm.identity().key()  # which the model of every worker must have, too

    def map(self, function: Function, items: Sequence[Any], bar: tqdm) -> list[Any]:
        """What `function(model, item, store)` returns for each item, in their order, called on the workers.

        The store that the function gets is empty; what it saves there is in the client's store as soon as it has
        returned. An item whose worker dies is given to another one. When this call ends early, by an error, too, what
        is outstanding is cancelled, and whatever was finished is kept.

        Args:
            function: its results may depend on nothing but the model and the item. What it holds, each worker gets once.
            bar: moves by one an item.

        Raises:
            ValueError: a worker cannot load the model, or its model is not the client's.
            RuntimeError: several workers have died of the same item, or the cluster is gone.
            Whatever the function raises.
        """
        if not items:
            return []
        if not self.client.nthreads():
            logger.warning("the cluster at %s has no workers yet; waiting for the first", self.client.scheduler.address)
        # The work may be large. It is sent once, as a task that can be done again where its result is lost with a worker.
        with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1TB"}):
            sent = self.client.submit(itself, Work(function, self.lm.origin, self.key | code_key()), pure=False)
            futures = self.client.map(do_on_worker, items, work=sent, pure=False)
        places = {future: place for place, future in enumerate(futures)}
        del futures  # so that the cluster forgets each as soon as its records are in the store
        results: dict[int, Any] = {}
        try:
            for future in as_completed(list(places), loop=self.client.loop):
                results[places[future]] = self.keep(future)
                del places[future]
                bar.update()
        finally:
            finished = {future for future in places if future.status == "finished"}
            if self.client.status == "running":  # without a connection the scheduler forgets what is outstanding
                self.client.cancel([future for future in places if future not in finished])
            for future in finished:
                self.keep(future)
        return [results[place] for place in range(len(items))]

    def keep(self, future: Future) -> Any:
        """Write to the store what was saved on the worker; returns what the function returned."""
        try:
            returned, saved = future.result()
        except KilledWorker as error:
            raise RuntimeError(
                f"{error.allowed_failures + 1} workers have died of the same item, the last of them at "
                f"{error.last_worker.address}: most often they have too little memory for {self.lm.name} (Dask's "
                "memory_limit, or the batch system's); give them more, see their logs, and call again: what was "
                "finished is in the store, where one is named."
            ) from error
        except CancelledError as error:
            raise RuntimeError(
                "The work was cancelled, because the connection to the Dask scheduler was lost or another program told "
                "it so; make a new client and call again: what was finished is in the store, where one is named."
            ) from error
        for inputs, record in saved:
            self.store.save(inputs, record.arrays, record.meta)
        return returned


@dataclass(frozen=True, eq=False)
class Work:
    """What is done with every item, and the model that it takes.

    Attributes:
        function: see `Workers.map`.
        origin: what `load_model` gets.
        key: which the model and the code must have.
    """

    function: Function
    origin: Mapping[str, Any]
    key: Mapping[str, Json]


@dataclass(eq=False)
class Held:
    """The model that a worker has loaded last.

    Attributes:
        lock: held while the model works, since its hooks act on all threads of a worker.
        loaded: origin and key of the model.
    """

    lock: Lock = field(default_factory=Lock)
    lm: LanguageModel | None = None
    loaded: tuple[Mapping[str, Any], Mapping[str, Json]] | None = None

    def model(self, work: Work) -> LanguageModel:
        """The model of the work, loaded now where it is not the one that is held."""
        if self.loaded != (work.origin, work.key):
            self.lm = self.loaded = None  # makes room for the new one
            set_precisions(work.key["matmul"])
            self.lm = load_here(work)
            self.loaded = (work.origin, work.key)
        return self.lm


def itself(work: Work) -> Work:
    return work


def code_key() -> dict[str, Json]:
    """Which rome_lab this is, as far as it changes results or what they are stored under."""
    return {"rome_lab": package_versions(["rome_lab"])["rome_lab"], "code": code_version("rome_lab")}


def do_on_worker(item: Any, work: Work) -> tuple[Any, list[Saved]]:
    """On a worker: what the function returns for an item, and what it saves."""
    held: Held = vars(get_worker()).setdefault("rome_lab", Held())
    basket = Basket()
    with held.lock:
        returned = work.function(held.model(work), item, basket)
    return returned, list(basket.records.values())


def load_here(work: Work) -> LanguageModel:
    """On a worker: the model of the work, or a ValueError that says why there is none, or that it is not the client's."""
    where = f"the worker at {get_worker().address}"
    try:
        lm = load_model(**work.origin)
    except (ValueError, OSError) as error:
        raise ValueError(f"On {where}: {error}") from error
    key = lm.identity().key() | code_key()
    other = [f"{name} ({key.get(name)}, not {value})" for name, value in work.key.items() if key.get(name) != value]
    if other:
        raise ValueError(
            f"On {where}, {work.origin['name']!r} is not the client's model, or rome_lab not the client's: other "
            f"{', '.join(other)}; give all machines the same files and the same versions of packages."
        )
    return lm
