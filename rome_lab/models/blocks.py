"""Running a model whole, and its blocks on the last tokens of a text (exactly what the model itself does with them).

record_run(lm, ids, change_embedding)       a Recording of all that one run left behind
run_block(lm, layer, hidden, recording)     one block on a suffix, the recording's keys and values before it
run_blocks, joined                          several blocks; several recordings as one
is_mask, BY_HEAD                            which arguments of a block are masks, and which say something of every head
check_recording(lm, recording, doing)       whether parts of a text give what the whole gave
with output_changed(module, change)         what a module says passes through `change`
with input_changed(module, change)          what a module is given first passes through `change`
with last_token_only(feed_forward)          an MLP is given the last token of each text only
with suited_attention(lm)                   attention as it is fastest for the short texts of a trace
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache

from rome_lab.models.language_model import LanguageModel
from rome_lab.models.layouts import LAYOUTS
from rome_lab.models.overlay import alone_with
from rome_lab.models.readiness import hooked
from rome_lab.models.tails import excess
from rome_lab.models.weights import is_offloaded

logger = logging.getLogger(__name__)


@contextmanager
def suited_attention(lm: LanguageModel) -> Iterator[None]:
    """Within the context, attention on a CPU is made of plain products, which are faster for the short texts of a trace.

    PyTorch's fused attention makes a product for each head of each text there. In float32 that takes as long; in bfloat16,
    and with fast products, every one costs a call of oneDNN, a quarter of the time of a trace. In float64 it stays, since
    transformers' plain attention takes its softmax in float32.
    """
    with alone_with(lm):
        lm.check_attention()
        before = lm.model.config._attn_implementation
        if lm.device.type != "cpu" or lm.dtype == torch.float64:
            yield
            return
        lm.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            lm.model.set_attn_implementation(before)


BY_HEAD = ("alibi", "position_bias")
"""Arguments that say something of every head and key, alike for all texts and queries."""


@dataclass(frozen=True, eq=False)
class Recording:
    """What one run over B rows of T tokens left behind.

    Attributes:
        states: L + 1 tensors (B, T, D); number l is what block l was given, number L what the last block returned.
        attn, mlp: L tensors (B, T, D), the attention's and the MLP's contribution at each layer.
        attention_keys, attention_values: L tensors (B, heads, T, D_head), as the attention uses them.
        heads: L tensors (B, T, heads, D_head), each head's part of what the attention's last matrix is given; none where
            they were not asked for, or cannot be told apart.
        arguments: L dictionaries, the keyword arguments that the model gave each block, with a batch of one.
        logits: (B, V) at the last token, float32 at least.
    """

    states: list[torch.Tensor]
    attn: list[torch.Tensor]
    mlp: list[torch.Tensor]
    heads: list[torch.Tensor]
    attention_keys: list[torch.Tensor]
    attention_values: list[torch.Tensor]
    arguments: list[dict[str, Any]]
    logits: torch.Tensor


@torch.no_grad()
def record_run(
    lm: LanguageModel,
    ids: torch.Tensor,
    change_embedding: Callable[[torch.Tensor], torch.Tensor | None],
    with_heads: bool = False,
) -> Recording:
    """Run the whole model on ids (B, T), its embedding module's output (B, T, D) passed through `change_embedding`."""
    lm.check_mode()
    states, attn, mlp, heads, arguments = [], [], [], [], []
    heads_out = with_heads and lm.heads_out or []

    def keep_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = named_arguments(module, args, kwargs)
        states.append(given.pop(next(iter(given))))
        arguments.append({name: of_one_row(name, value, len(ids)) for name, value in given.items()})

    shape = (*ids.shape, -1)
    # Some families, Falcon is one, add to the output of a module in place.
    copied = (lambda x: x) if lm.layout in LAYOUTS else torch.clone
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(output_changed(lm.embedding, change_embedding))
        for layer, block in enumerate(lm.blocks):
            hooks.callback(block.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
            hooks.enter_context(output_changed(lm.attn(layer), lambda x: attn.append(copied(x.view(shape)))))
            hooks.enter_context(output_changed(lm.mlp(layer), lambda x: mlp.append(copied(x.view(shape)))))
        for module in heads_out:
            hooks.enter_context(input_changed(module, lambda x: heads.append(copied(x.view(shape)))))
        hooks.enter_context(output_changed(lm.blocks[-1], lambda x: states.append(x)))
        cache = DynamicCache()
        logits = lm.model(input_ids=ids, past_key_values=cache, use_cache=True, **last_logits_only(lm.model)).logits
    return Recording(
        states=states,
        attn=attn,
        mlp=mlp,
        heads=[x.unflatten(-1, (-1, layer.values.shape[-1])) for x, layer in zip(heads, cache.layers, strict=False)],
        attention_keys=[layer.keys for layer in cache.layers],
        attention_values=[layer.values for layer in cache.layers],
        arguments=arguments,
        logits=at_least_float32(logits[:, -1]),
    )


def run_block(
    lm: LanguageModel, layer: int, hidden: torch.Tensor, recording: Recording, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Run block `layer` on the last tokens of a text whose first tokens are those of `recording`.

    Args:
        hidden: (R, N, D): what the block is given at the last N of T tokens, for R texts.
        recording: the run whose keys and values stand for the first T - N tokens.
        rows: (R,) the row of the recording that each text continues; by default each its own.

    Returns: (R, N, D), what the block makes of them, where it makes it.
    """
    length = hidden.shape[1]
    begin = recording.states[0].shape[1] - length

    def prefix(recorded: list[torch.Tensor]) -> torch.Tensor | None:
        if not begin:
            return None
        before = recorded[layer][:, :, :begin]  # (R, heads, T - N, D_head)
        return before if rows is None else before[rows.to(before.device)]

    cache = PrefixCache(prefix(recording.attention_keys), prefix(recording.attention_values))
    arguments = {
        name: suffix_argument(lm, name, value, begin, hidden, cache)
        for name, value in recording.arguments[layer].items()
    }
    return tensor_of(lm.blocks[layer](hidden, **arguments))


@torch.no_grad()
def check_recording(lm: LanguageModel, recording: Recording, doing: str) -> None:
    """Raise a ValueError where `lm.logits`, or blocks run on the last tokens alone, do not give what the whole run gave.

    The blocks that transformers itself has for the families known by name are not run for it, unless there are hooks of
    the user's own, which may do on a part of a text what they do not on the whole.
    """
    ours = at_least_float32(lm.logits(recording.states[-1][:, -1]))
    if (error := excess(ours, recording.logits, lm.is_rounded)) > 1:
        raise ValueError(
            f"{doing}: {lm.name} does something between its last block and its logits that rome_lab does not know (log "
            f"probabilities differ by {error:.0f} times what rounding explains)."
        )
    length = recording.states[0].shape[1]
    if any(hooked(block) for block in lm.blocks):
        for begin in range(length):
            check_blocks(
                lm, recording, begin, doing, ", or its hooks do on a part of a text what they do not on the whole"
            )
    elif lm.layout not in LAYOUTS or not type(lm.blocks[0]).__module__.startswith("transformers."):
        check_blocks(lm, recording, length // 2, doing)


def check_blocks(lm: LanguageModel, recording: Recording, begin: int, doing: str, why: str = "") -> None:
    """Raise a ValueError where a block makes something else of row 0's tokens from `begin` on than it did in the whole text.

    In a mixture of experts a router's near tie may go the other way where texts are put together otherwise; that is logged.
    """
    first = torch.zeros(1, dtype=torch.long)
    wrong = []
    for layer, (given, returned) in enumerate(itertools.pairwise(recording.states)):
        given, returned = given[:1, begin:], returned[:1, begin:]
        try:
            again = run_block(lm, layer, given, recording, first)
        except (RuntimeError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{doing}: block {layer} of {lm.name} does not run on a part of a text: {error}."
            ) from error
        gained = (returned - given.to(returned)).abs().max() + 1e-2 * returned.abs().max()
        if not (again.to(returned) - returned).abs().max() <= (5e-2 if lm.is_rounded else 1e-3) * gained:
            wrong.append(layer)
    if dense := [layer for layer in wrong if layer not in lm.sparse]:
        raise ValueError(
            f"{doing}: block {dense[0]} of {lm.name} ({lm.layout.family}) makes something else of the last tokens of a text "
            f"alone than in the whole text, so no trace of it is exact; it is of a kind that rome_lab does not know{why}."
        )
    if wrong:
        logger.warning("%s: routers of %s nearly tie in layers %s, where rounding decides.", doing, lm.name, wrong)


def run_blocks(
    lm: LanguageModel, layers: range, hidden: torch.Tensor, recording: Recording, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Run several blocks, one after the other, as `run_block` does each.

    For a gradient, a block whose weights are offloaded is run once more when the gradient comes back to it: otherwise
    all their weights would stay in memory until then. No hook of the caller's may be on such a block.
    """
    for layer in layers:
        if hidden.requires_grad and is_offloaded(lm.blocks[layer]):
            again = {"use_reentrant": False, "preserve_rng_state": False}
            hidden = checkpoint(run_block, lm, layer, hidden, recording, rows, **again)
        else:
            hidden = run_block(lm, layer, hidden, recording, rows)
    return hidden


def joined(parts: Sequence[Recording]) -> Recording:
    """The recordings of parts of a batch as that of the whole batch."""
    if len(parts) == 1:
        return parts[0]
    lists = ("states", "attn", "mlp", "heads", "attention_keys", "attention_values")
    columns = {name: zip(*(getattr(part, name) for part in parts), strict=True) for name in lists}
    return Recording(
        **{name: [torch.cat(tensors) for tensors in column] for name, column in columns.items()},
        arguments=parts[0].arguments,
        logits=torch.cat([part.logits for part in parts]),
    )


class PrefixCache:
    """Stands for a key-value cache inside one block: hands back the stored prefix with the new tokens behind it."""

    def __init__(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        self.keys, self.values = keys, values
        self.length = 0 if keys is None else keys.shape[2]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.length += keys.shape[2]
        if self.keys is None:
            return keys, values
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


def suffix_argument(
    lm: LanguageModel, name: str, value: Any, begin: int, hidden: torch.Tensor, cache: PrefixCache
) -> Any:
    """What to give a block for its argument `name` when it is given `hidden`, (R, N, D), the tokens from `begin` on."""
    length = begin + hidden.shape[1]
    if isinstance(value, Cache):
        return cache
    if is_mask(name, value, length):
        # With no mask and more keys than queries, sdpa would let every query see the first keys only.
        mask = causal_mask(lm, length) if value is None else value
        return mask[..., begin:, :]
    if name in BY_HEAD:
        return value.repeat(len(hidden), *[1] * (value.ndim - 1)) if name == "alibi" and value is not None else value
    if isinstance(value, torch.Tensor):
        axis = next((axis for axis in (1, 0) if axis < value.ndim and value.shape[axis] == length), None)
        return value if axis is None else value.narrow(axis, begin, length - begin)
    if isinstance(value, tuple | list):
        return type(value)(suffix_argument(lm, "", x, begin, hidden, cache) for x in value)
    if isinstance(value, dict):
        return {key: suffix_argument(lm, "", x, begin, hidden, cache) for key, x in value.items()}
    return value


def is_mask(name: str, value: Any, length: int) -> bool:
    """Whether an argument of a block says which of `length` tokens see which, also where it is None and means all before."""
    return (
        "mask" in name or isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[-2:] == (length, length)
    )


def causal_mask(lm: LanguageModel, length: int) -> torch.Tensor:
    """(1, 1, T, T): True where the query (third axis) may see the key (last axis)."""
    return torch.ones(length, length, dtype=torch.bool, device=lm.device).tril()[None, None]


def named_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call of `module`, all by name: some families pass some of them by position."""
    signature = inspect.signature(module.forward)
    given = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(parameter.name, {}))
    return given


def of_one_row(name: str, value: Any, rows: int) -> Any:
    """The part of an argument that is about the first of `rows` equal texts."""
    if name == "position_bias":
        return value
    if isinstance(value, torch.Tensor):
        return value[: max(1, len(value) // rows) if name == "alibi" else 1] if value.ndim > 1 else value
    if isinstance(value, tuple | list):
        return type(value)(of_one_row("", x, rows) for x in value)
    return {key: of_one_row("", x, rows) for key, x in value.items()} if isinstance(value, dict) else value


def tensor_of(output: torch.Tensor | tuple) -> torch.Tensor:
    """The hidden states in what a module returned: a tensor, or a tuple that begins with it."""
    return output[0] if isinstance(output, tuple) else output


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@contextlib.contextmanager
def output_changed(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Within the context, `module`'s hidden states pass through `change`, which may return None to leave them alone."""

    def hook(module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple | None:
        changed = change(tensor_of(output))
        return (changed, *output[1:]) if changed is not None and isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def input_changed(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Within the context, what `module` is given first passes through `change`, which may return None to leave it alone."""

    def hook(module: nn.Module, args: tuple) -> tuple | None:
        changed = change(args[0])
        return None if changed is None else (changed, *args[1:])

    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def last_token_only(feed_forward: nn.Module | None) -> Iterator[None]:
    """Within the context, an MLP is given the last token of each text only; what it says is added to all of its tokens.

    Args:
        feed_forward: called with (B, N, D); where there is none, nothing is spared.
    """

    if feed_forward is None:
        yield
    else:
        with input_changed(feed_forward, lambda given: given[:, -1:]):
            yield


def last_logits_only(model: nn.Module) -> dict[str, int]:
    """Arguments that spare `model` the logits of all tokens but the last, where its forward knows how."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
