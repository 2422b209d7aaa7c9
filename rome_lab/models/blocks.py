"""Running a model whole, and its blocks on the last tokens of a text (exactly what the model itself does with them).

record_run(lm, ids, change_embedding)       a Recording of all that one run left behind
run_block(lm, layer, hidden, recording)     one block on a suffix, the recording's keys and values before it
run_blocks, joined                          several blocks; several recordings as one
with output_changed(module, change)         what a module says passes through `change`
with last_token_only(feed_forward)          an MLP is given the last token of each text only
with suited_attention(lm)                   attention as it is fastest for the short texts of a trace
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from rome_lab.models.language_model import LanguageModel
from rome_lab.models.weights import is_offloaded


@contextmanager
def suited_attention(lm: LanguageModel) -> Iterator[None]:
    """Within the context, attention on a CPU is made of plain products, which are faster for the short texts of a trace.

    PyTorch's fused attention makes a product for each head of each text there. In float32 that takes as long; in bfloat16,
    and with fast products, every one costs a call of oneDNN, a quarter of the time of a trace. In float64 it stays, since
    transformers' plain attention takes its softmax in float32.
    """
    before = lm.model.config._attn_implementation
    if lm.device.type != "cpu" or lm.dtype == torch.float64:
        yield
        return
    lm.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.model.set_attn_implementation(before)


CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")


@dataclass(frozen=True, eq=False)
class Recording:
    """What one run over B rows of T tokens left behind.

    Attributes:
        states: L + 1 tensors (B, T, D); number l is what block l was given, number L what the last block returned.
        attn, mlp: L tensors (B, T, D), the attention's and the MLP's contribution at each layer.
        attention_keys, attention_values: L tensors (B, heads, T, D_head), as the attention uses them.
        arguments: L dictionaries, the keyword arguments that the model gave each block, with a batch of one.
        logits: (B, V) at the last token, float32 at least.
    """

    states: list[torch.Tensor]
    attn: list[torch.Tensor]
    mlp: list[torch.Tensor]
    attention_keys: list[torch.Tensor]
    attention_values: list[torch.Tensor]
    arguments: list[dict[str, Any]]
    logits: torch.Tensor


@torch.no_grad()
def record_run(
    lm: LanguageModel, ids: torch.Tensor, change_embedding: Callable[[torch.Tensor], torch.Tensor]
) -> Recording:
    """Run the whole model on ids (B, T), its embedding module's output (B, T, D) passed through `change_embedding`."""
    states, attn, mlp, arguments = [], [], [], []

    def keep_input(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = named_arguments(module, args, kwargs)
        states.append(given.pop("hidden_states"))
        arguments.append({name: first_row(value) for name, value in given.items()})

    shape = (*ids.shape, -1)
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(output_changed(lm.embedding, change_embedding))
        for layer, block in enumerate(lm.blocks):
            hooks.callback(block.register_forward_pre_hook(keep_input, with_kwargs=True).remove)
            hooks.enter_context(output_changed(lm.attn(layer), lambda x: attn.append(x.view(shape))))
            hooks.enter_context(output_changed(lm.mlp(layer), lambda x: mlp.append(x.view(shape))))
        hooks.enter_context(output_changed(lm.blocks[-1], lambda x: states.append(x)))
        cache = DynamicCache()
        logits = lm.model(input_ids=ids, past_key_values=cache, use_cache=True, **last_logits_only(lm.model)).logits
    return Recording(
        states=states,
        attn=attn,
        mlp=mlp,
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
        name: suffix_argument(lm, name, value, begin, length, cache)
        for name, value in recording.arguments[layer].items()
    }
    return tensor_of(lm.blocks[layer](hidden, **arguments))


def run_blocks(lm: LanguageModel, layers: range, hidden: torch.Tensor, recording: Recording) -> torch.Tensor:
    """Run several blocks, one after the other, as `run_block` does each.

    For a gradient, a block whose weights are offloaded is run once more when the gradient comes back to it: otherwise
    all their weights would stay in memory until then. No hook of the caller's may be on such a block.
    """
    for layer in layers:
        if hidden.requires_grad and is_offloaded(lm.blocks[layer]):
            again = {"use_reentrant": False, "preserve_rng_state": False}
            hidden = checkpoint(run_block, lm, layer, hidden, recording, **again)
        else:
            hidden = run_block(lm, layer, hidden, recording)
    return hidden


def joined(parts: Sequence[Recording]) -> Recording:
    """The recordings of parts of a batch as that of the whole batch."""
    if len(parts) == 1:
        return parts[0]
    lists = ("states", "attn", "mlp", "attention_keys", "attention_values")
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

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is None:
            return keys, values
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)


def suffix_argument(lm: LanguageModel, name: str, value: Any, begin: int, length: int, cache: PrefixCache) -> Any:
    """What to give a block for its argument `name` when it sees only the tokens from `begin` on."""
    if name in CACHE_ARGUMENTS:
        return cache
    if name == "attention_mask":
        # With no mask and more keys than queries, sdpa would let every query see the first keys only.
        mask = causal_mask(lm, begin + length) if value is None else value
        return mask[..., begin:, :]
    if isinstance(value, torch.Tensor):
        return value[:, begin:] if value.ndim > 1 else value[begin:]
    if isinstance(value, tuple) and all(isinstance(x, torch.Tensor) for x in value):
        return tuple(x[:, begin:] for x in value)
    return value


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


def first_row(value: Any) -> Any:
    """The first of a batch of equal rows, in a tensor or a tuple of tensors; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value[:1] if value.ndim > 1 else value
    if isinstance(value, tuple):
        return tuple(first_row(x) for x in value)
    return value


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
def last_token_only(feed_forward: nn.Module | None) -> Iterator[None]:
    """Within the context, an MLP is given the last token of each text only; what it says is added to all of its tokens.

    Args:
        feed_forward: called with (B, N, D); where there is none, nothing is spared.
    """

    def narrow(module: nn.Module, args: tuple) -> tuple:
        return (args[0][:, -1:], *args[1:])

    handle = feed_forward.register_forward_pre_hook(narrow) if feed_forward is not None else None
    try:
        yield
    finally:
        if handle:
            handle.remove()


def last_logits_only(model: nn.Module) -> dict[str, int]:
    """Arguments that spare `model` the logits of all tokens but the last, where its forward knows how."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
