"""How much fits: batches as large as the free memory allows, and halved where it runs out all the same.

text_bytes(lm, length)               what one text takes in a pass, by estimate
rows_at_once(vocabulary, most)       how many rows of logits are made together
Batching(lm, doing, bytes_each)      how many go together; `over` and `each` work through all of them
enough_room(doing)                   says so in a sentence where memory runs out in what cannot be halved
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar
from weakref import WeakKeyDictionary

import psutil
import torch

from rome_lab.models.language_model import LanguageModel
from rome_lab.models.process import give_back_freed_memory

logger = logging.getLogger(__name__)

LOGITS = 2**24  # numbers of logits that are made at once where many are read: 64 MB of float32
SHARE = 0.3  # of the free memory that one batch may take; the rest is for what the batch is made from
# What allocators say besides raising torch.OutOfMemoryError: MPS and the CUDA driver, the CPU's on Linux and on Windows,
# C++'s own, cuBLAS.
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
Item = TypeVar("Item")
Result = TypeVar("Result")


def free_bytes(device: torch.device) -> int:
    """Memory that is free on `device` now, what PyTorch keeps for later among it."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return int(min(psutil.virtual_memory().available, free_in_groups()))


def free_in_groups(own: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> float:
    """What the control groups that this process is in leave it (containers, batch systems); infinite without any.

    What a group has read from files counts as free, since the system gives it up where memory is needed.

    Args:
        own: names the groups, of version 1 or 2, a line each.
        mounted: where they are; in a container a named group may be missing there, but not the ones above it.
    """
    free = [float("inf")]
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, name = line.split(":", 2)
        if not controllers:
            top, limit, used, files = mounted, "memory.max", "memory.current", ("inactive_file", "active_file")
        elif controllers == "memory":
            top, limit, used = mounted / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            files = ("total_inactive_file", "total_active_file")
        else:
            continue
        group = top / name.strip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(top.parts)]):
            if (folder / limit).exists() and (most := (folder / limit).read_text().strip()) != "max":
                stat = dict(entry.split() for entry in (folder / "memory.stat").read_text().splitlines())
                taken = int((folder / used).read_text()) - sum(int(stat.get(file, 0)) for file in files)
                free.append(int(most) - taken)
    return min(free)


def text_bytes(lm: LanguageModel, length: int, cached: bool = False) -> int:
    """Memory, in bytes, that one text of `length` tokens takes in a pass, by estimate.

    A token costs some eight vectors of the block's widths inside the attention and the MLP, and, of every head, a row of
    attention scores before and after the softmax; a text costs one row of logits.

    Args:
        cached: count the keys and values of all layers too, and what drawing a token from the logits takes.
    """
    config = lm.config
    inside = 8 * length * lm.inner_width * lm.dtype.itemsize
    scores = 2 * 4 * config.num_attention_heads * length**2
    if not cached:
        return inside + scores + 2 * 4 * config.vocab_size
    kept = 2 * lm.n_layers * length * config.hidden_size * lm.dtype.itemsize
    return inside + scores + kept + 24 * config.vocab_size


def rows_at_once(vocabulary: int, most: int) -> int:
    """How many rows of logits are made together: `most`, fewer where a large vocabulary would make them many numbers."""
    return max(1, min(most, LOGITS // vocabulary))


class SingleTooLarge(MemoryError):
    """Not even one item fits, so that halving does not help; the message says what does."""


@dataclass
class Batching:
    """How many texts go through the model together.

    Attributes:
        doing: what they are read for, to begin a message with.
        bytes_each: what one of them takes, see `text_bytes`.
        most: how many at most; as many as fit by default.
        fitting: how many fit in a share of the memory that is free now, on the fullest of the model's devices.
        learned: for each model with which memory ran out, the bytes that its batches may take since then.
    """

    learned: ClassVar[WeakKeyDictionary[LanguageModel, int]] = WeakKeyDictionary()

    lm: LanguageModel
    doing: str
    bytes_each: int
    most: int | None = None
    fitting: int = field(init=False)

    def __post_init__(self) -> None:
        devices = {self.lm.device_at(layer) for layer in range(self.lm.n_layers)}
        self.fitting = int(SHARE * min(map(free_bytes, devices)) / self.bytes_each)

    @property
    def size(self) -> int:
        """How many go together now."""
        learned = self.learned.get(self.lm, float("inf")) / self.bytes_each
        return int(max(1, min(self.fitting, learned, self.most or self.fitting)))

    def over(self, items: Sequence[Item], work: Callable[[Sequence[Item]], Result]) -> Iterator[Result]:
        """work(part) of all the items, in order, so many at a time as go together.

        Where memory runs out the part is halved, down to a single item, and `work` is called again: until it returns it
        must change nothing that a second call does not set right. The model remembers what was too much.

        Raises:
            SingleTooLarge: a single item is too much.
        """
        begin = 0
        while begin < len(items):
            part = items[begin : begin + self.size]
            try:
                result, reason = work(part), ""
            except (MemoryError, RuntimeError) as error:
                if not ran_out(error):
                    raise
                reason = reason_of(error)
            # Not before the error is gone, whose traceback holds on to all tensors of the part.
            if reason:
                self.shrink(len(part), reason)
                continue
            yield result
            begin += len(part)

    def each(self, items: Sequence[Item], work: Callable[[Sequence[Item]], object]) -> None:
        """Do work(part) of all the items for what it does, not for what it returns; as `over`."""
        for _ in self.over(items, work):
            pass

    def shrink(self, size: int, reason: str) -> None:
        """Halve what goes together, after `size` items were too much; said once for each model."""
        release()
        if size == 1:
            raise SingleTooLarge(
                f"{self.doing}: the memory does not suffice for a single text with {self.lm.name} ({reason}); "
                'shorten the text, load the model with dtype="bfloat16", or spread it with device_map="auto".'
            )
        first = self.lm not in self.learned
        self.learned[self.lm] = size // 2 * self.bytes_each
        logger.log(
            logging.WARNING if first else logging.DEBUG,
            "%s: memory ran out with %d texts together; going on with %d, and with fewer where that is too much, from "
            "here on with %s", self.doing, size, size // 2, self.lm.name,
        )  # fmt: skip


def ran_out(error: Exception) -> bool:
    """Whether it says that memory ran out, on any device."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY
    )


def reason_of(error: Exception) -> str:
    """The first line of what it says, or else its kind."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def enough_room(doing: str) -> Iterator[None]:
    """Within it, memory that runs out outside of a `Batching`, in what is kept whole, becomes a sentence.

    Raises:
        MemoryError: it did; the message says what to do.
    """
    try:
        yield
    except SingleTooLarge:
        raise
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        raise MemoryError(
            f"{doing}: the memory does not suffice for what is kept of all texts together ({reason_of(error)}); take "
            'fewer samples, shorten the text, load the model with dtype="bfloat16", or spread it with device_map="auto".'
        ) from error


def release() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    give_back_freed_memory()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
