"""C = E[k kT], the uncentred second moment of the keys of an associative memory: `covariance`, `covariances`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from rome_lab.base import USER_CACHE, Basket, Json, OneLine, Store, check_whole, code_version, opened
from rome_lab.editing.keys import key_size, run_to_keys
from rome_lab.editing.texts import SampledText, Source
from rome_lab.editing.update import ENOUGH, precise, warn_of_few
from rome_lab.models import Batching, LanguageModel, device_of, text_bytes

logger = logging.getLogger(__name__)

BATCH_TOKENS = 2048  # places in one forward; with 4096, what passes between layers no longer fits a CPU's caches
SAVE_EVERY_S = 60  # what a killed process loses at most, or ten times what saving takes where that is longer
TokensSeen: TypeAlias = Callable[[int, int], object]
"""Called with how many tokens were seen so far, and how many were asked for."""


@dataclass(frozen=True, eq=False, repr=False)
class Covariance(OneLine):
    """C of one layer, and what it was measured on.

    Attributes:
        C: (H, H) float32, on the CPU.
        tokens: how many tokens were seen.
        source: description of the text.
        layer: whose keys these are.
    """

    C: Float[Tensor, "H H"]
    tokens: int
    source: dict[str, Json]
    layer: int


@dataclass(eq=False, repr=False)
class KeySum(OneLine):
    """Sum of k kT over the first passages of a stream.

    Attributes:
        total: (H, H) float64.
        passages, tokens: how many were seen.
    """

    total: Float[Tensor, "H H"]
    passages: int = 0
    tokens: int = 0

    def add(self, keys: Tensor, real: Tensor, first: int) -> None:
        """Add the keys (B, T, H) of the passages from number `first` on, where `real` (B, T); each passage only once."""
        new = real[max(0, self.passages - first) :].to(keys.device)
        chosen = precise(keys[len(real) - len(new) :][new])  # (N, H)
        self.total += second_moment_sum(chosen)
        self.passages += len(new)
        self.tokens += len(chosen)


def second_moment_sum(keys: Float[Tensor, "N H"]) -> Float[Tensor, "H H"]:
    """Sum of k kT over keys on any device, in their own precision; on the CPU in half the time of a general product."""
    if keys.device.type != "cpu":
        return keys.T @ keys
    K = keys.numpy()
    return torch.from_numpy(K.T @ K)  # which numpy knows to be symmetric, as PyTorch does not


def covariance(
    lm: LanguageModel,
    layer: int,
    source: Source | None = None,
    tokens: int | None = None,
    store: Store | str | Path | None = USER_CACHE,
    progress: bool = True,
    callback: TokensSeen | None = None,
) -> Float[Tensor, "H H"]:
    """The uncentred second moment of the keys at one layer, C = E[k kT] (Appendix A); see `covariances`.

    Returns: (H, H) float32, on the CPU.
    """
    return covariances(lm, [layer], source, tokens, store, progress, callback)[layer].C


def covariances(
    lm: LanguageModel,
    layers: Sequence[int],
    source: Source | None = None,
    tokens: int | None = None,
    store: Store | str | Path | None = USER_CACHE,
    progress: bool = True,
    callback: TokensSeen | None = None,
) -> dict[int, Covariance]:
    """C = E[k kT] of several layers in one pass over the text, which stops at the highest of them (Appendix A).

    k is the input of W at every token, a text's first one included. First tokens can have keys ten times longer than
    others (in the embedded model at layer 9), on which much relies; an update made with a C that has seen them changes
    their values ten times less, at no cost elsewhere.

    Passages are taken whole, until there are `tokens` tokens. Results are cached by model, layer, source and `tokens`.
    So are the sums that have come furthest: asking for more tokens, or again after an interruption, goes on from there.
    Fewer tokens than those are summed afresh, so that a result never depends on what was asked for before.

    Args:
        layers: which; their order says nothing.
        source: the text; `SampledText()` by default. `FolderText(folder)` and `WikipediaText()` are others.
        tokens: how many to see, `ENOUGH` times H by default: 9,216 for the embedded model. The last passage may bring
            some more; a source that ends earlier brings fewer, with a warning.
        store: folder or Store where results are kept, the user's cache by default; None: nowhere.
        callback: called with how many tokens were seen so far and how many were asked for, after every batch and at the
            end, which may be the only time.

    Raises:
        ValueError: a layer out of range, bad numbers; the source holds no text; the keys hold NaN or infinity.
        OSError: the store cannot be written.
    """
    if not layers:
        raise ValueError("covariance: there are no layers; name at least one.")
    for layer in layers:
        if layer not in range(lm.n_layers):
            raise ValueError(f"covariance: layer is {layer!r}; {lm.name} has the layers 0 to {lm.n_layers - 1}.")
    tokens = max(ENOUGH * key_size(lm, layer) for layer in layers) if tokens is None else tokens
    check_whole("covariance", tokens=(tokens, 1))
    source, store = source or SampledText(), opened(store) or Basket()
    common = lm.identity().key() | {"what": "covariance", "code": code_version(__name__), "source": source.describe()}
    keys = {layer: {**common, "layer": layer} for layer in sorted(set(map(int, layers)))}
    records = {layer: store.load({**key, "tokens": tokens}) for layer, key in keys.items()}
    missing = {layer: key for layer, key in keys.items() if records[layer] is None}
    if missing:
        store.check_writable()
        extend_sums(lm, missing, source, tokens, store, progress, callback)
        records |= {layer: store.load({**key, "tokens": tokens}) for layer, key in missing.items()}
    if callback:
        callback(min(record.meta["tokens"] for record in records.values()), tokens)
    fewest = min(records.values(), key=lambda record: record.meta["tokens"] / len(record.arrays["C"]))
    warn_of_few(fewest.meta["tokens"], len(fewest.arrays["C"]), "covariance")
    return {
        layer: Covariance(torch.from_numpy(record.arrays["C"]), record.meta["tokens"], dict(source.describe()), layer)
        for layer, record in records.items()
    }


def extend_sums(
    lm: LanguageModel,
    keys: dict[int, dict[str, Json]],
    source: Source,
    tokens: int,
    store: Store,
    progress: bool,
    callback: TokensSeen | None,
) -> None:
    """Sum over the passages until there are `tokens` tokens, from where the store has come to, and save the results."""
    sums = {layer: furthest_sum(lm, layer, store, key, tokens) for layer, key in keys.items()}
    start = min(sums.values(), key=lambda total: total.passages)
    first, seen, save_at = start.passages, start.tokens, time.monotonic() + SAVE_EVERY_S
    with tqdm(total=tokens, initial=seen, desc="tokens seen for C", unit_scale=True, disable=not progress) as bar:
        for batch in passage_batches(source.passages(lm, store, first), tokens - seen):
            add_passages(lm, sums, batch, first)
            first += len(batch)
            seen += (count := sum(map(len, batch)))
            bar.update(count)
            if callback:
                callback(seen, tokens)
            if (began := time.monotonic()) >= save_at:
                save_furthest(store, keys, sums)
                save_at = time.monotonic() + max(SAVE_EVERY_S, 10 * (time.monotonic() - began))
    seen = next(iter(sums.values())).tokens
    if seen == 0:
        raise ValueError(f"covariance: the source {source} holds no text; give one that does.")
    log = logger.info if seen >= tokens else logger.warning
    log("covariance: saw %d tokens of the %d asked for, of %s, at layers %s", seen, tokens, source, sorted(sums))
    for layer, total in sums.items():
        C = (total.total / seen).float().cpu().numpy()
        store.save({**keys[layer], "tokens": tokens}, {"C": C}, {"tokens": seen})
    save_furthest(store, keys, sums)


def furthest_sum(lm: LanguageModel, layer: int, store: Store, key: dict[str, Json], tokens: int) -> KeySum:
    """The sum that has come furthest on the way to `tokens` tokens; an empty one where there is none."""
    size = key_size(lm, layer)
    empty = precise(torch.zeros(size, size, device=device_of(lm.memory(layer))))
    record = store.load({**key, "tokens": None})
    if record is None or record.meta["tokens"] >= tokens:
        return KeySum(empty)
    return KeySum(torch.from_numpy(record.arrays["total"]).to(empty), record.meta["passages"], record.meta["tokens"])


def save_furthest(store: Store, keys: dict[int, dict[str, Json]], sums: dict[int, KeySum]) -> None:
    """Save each layer's sum under no number of tokens, where it has come further than what is there."""
    for layer, total in sums.items():
        inputs = {**keys[layer], "tokens": None}
        record = store.load(inputs)
        if record is None or record.meta["tokens"] < total.tokens:
            meta = {"passages": total.passages, "tokens": total.tokens}
            store.save(inputs, {"total": total.total.cpu().numpy()}, meta)


def passage_batches(passages: Iterator[list[int]], tokens: int) -> Iterator[list[list[int]]]:
    """Passages until they hold `tokens` tokens, those together that take some `BATCH_TOKENS` places when padded."""
    batch: list[list[int]] = []
    for passage in passages:
        batch.append(passage)
        tokens -= len(passage)
        if tokens <= 0:
            break
        if len(batch) * max(map(len, batch)) >= BATCH_TOKENS:
            yield batch
            batch = []
    if batch:
        yield batch


def add_passages(lm: LanguageModel, sums: dict[int, KeySum], batch: list[list[int]], first: int) -> None:
    """Add the keys of the passages from number `first` on, in smaller batches where they do not fit together."""
    together = Batching(lm, "covariance", text_bytes(lm, max(map(len, batch))))
    together.each(range(len(batch)), lambda part: add_batch(lm, sums, [batch[i] for i in part], first + part[0]))


def add_batch(lm: LanguageModel, sums: dict[int, KeySum], batch: list[list[int]], first: int) -> None:
    """Add the keys of the passages from number `first` on to the sum of every layer."""
    lengths = torch.tensor([len(passage) for passage in batch])
    real = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]  # (B, T)
    # Padding right of a text cannot reach it in a causal model, so it needs no mask; its own keys are left out.
    ids = torch.zeros(real.shape, dtype=torch.long)
    ids[real] = torch.tensor([token for passage in batch for token in passage])
    ids, real = ids.to(lm.device), real.to(lm.device)

    def receive(layer: int, keys: Tensor) -> None:
        keys = keys.reshape(*real.shape, -1)
        sums[layer].add(keys, real, first)
        lm.check_finite(sums[layer].total.diagonal(), "covariance")  # a sum of squares: finite where every key is

    run_to_keys(lm, ids, list(sums), receive)
