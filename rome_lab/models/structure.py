"""Where the parts of a model are, found by what its modules do in one run: for families that no `Layout` is known of."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from math import gcd, inf
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from rome_lab.models.layouts import LAYOUTS, Layout
from rome_lab.models.weights import device_of

logger = logging.getLogger(__name__)

N_TOKENS = 7  # of the text that is run to look at a model
IN_A_SUM = 4  # of a sum, at most; each of its two additions and two factors makes half of one


class UnfitModelError(ValueError):
    """A model that cannot be traced: why, and what was looked for."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module.

    Attributes:
        given, returned: the hidden states that it was given and returned, as they were then; None where there are none.
        kept: how many layers had kept their keys and values when it returned.
    """

    given: Tensor | None
    returned: Tensor | None
    kept: int


class CountingCache(DynamicCache):
    """A cache of keys and values that knows how many layers have kept theirs."""

    kept = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.kept += 1
        return super().update(key_states, value_states, *args, **kwargs)


def find_layout(model: nn.Module) -> Layout:
    """The layout of `LAYOUTS` that bears the name of the model's family and fits it, or else the one found in the model.

    Raises:
        UnfitModelError: the model has no such parts; the message says which it lacks.
    """
    name = getattr(model.config, "model_type", "")
    known = next((x for x in LAYOUTS if name in x.model_types and not x.lacking(model)), None)
    if known:
        return known
    layout = find_structure(model)
    logger.warning(
        "%s is of no family that rome_lab knows. By a look at what its modules do: blocks %s, attention %s, MLP %s, edited "
        "matrix %s%s. rl.verify(lm) tries whether traces and edits are then exact.",
        type(model).__name__,
        layout.blocks,
        layout.attn,
        layout.mlp,
        layout.memory or "none",
        f" but in layers {', '.join(map(str, layout.sparse))}" if layout.sparse else "",
    )
    return layout


def find_structure(model: nn.Module) -> Layout:
    """The layout of a decoder-only transformer, found by running it on a few tokens.

    Its blocks are the longest list of modules each of which is given what the one before returned. In every block two
    modules' outputs, times constants, add up to what the block adds to its input: the one that ends after the block has
    kept its keys and values is the attention, the other the MLP. The matrix that ends the MLP is the one whose output is
    the MLP's, or what the norm behind the MLP is given; a block with none, a mixture of experts say, cannot be edited.

    Raises:
        UnfitModelError: the model has no such parts; the message says which it lacks.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise unfit(model, "it is an encoder-decoder, and here a text is read by a decoder alone", by_hand=False)
    calls = watched(model, probe(model))
    blocks = chain_of_blocks(model, calls)
    names = [f"{blocks}.{layer}" for layer in range(len(model.get_submodule(blocks)))]
    changed = probe(model)
    changed[0, -1] += 1
    first, again = (run[names[-1]].returned.flatten(0, -2)[0].double() for run in (calls, watched(model, changed)))
    eps = max(torch.finfo(calls[names[-1]].returned.dtype).eps, torch.finfo(torch.float32).eps)
    # By the median, since a few numbers of a state may be huge; the experts' are not the same twice.
    if (again - first).abs().max() > eps**0.5 * first.abs().median():
        raise unfit(model, "its tokens see those behind them, so it is no decoder", by_hand=False)
    kept = [0, *(calls[name].kept for name in names)]
    if bare := [layer for layer in range(len(names)) if kept[layer + 1] != kept[layer] + 1]:
        raise unfit(
            model,
            f"{names[bare[0]]} keeps no keys and values of its own: a state-space layer, or one that shares another's",
            by_hand=False,
        )
    parts = [calls_within(name, calls) for name in names]
    attn, mlp = contributions(model, names, [calls[name] for name in names], parts)
    matrices = [matrix_that_ends(model, name, mlp, part) for name, part in zip(names, parts, strict=True)]
    memory = next((path for path in matrices if path), None)
    sparse = tuple(layer for layer, path in enumerate(matrices) if path != memory) if memory else ()
    family = getattr(model.config, "model_type", "") or type(model).__name__
    return Layout(family, blocks, attn, mlp, memory, sparse=sparse)


def check_by_hand(model: nn.Module, layout: Layout) -> None:
    """Raise an UnfitModelError where one run shows that a layout of the user's own takes one part for another.

    That its attention and MLP do not add up to what a block adds is a warning: the block may norm their sum.
    """
    calls, sums = watched(model, probe(model)), True
    for layer in range(len(attrgetter(layout.blocks)(model))):
        name = f"{layout.blocks}.{layer}"
        part = calls_within(name, calls)
        pair = [path for path in part if path in (layout.attn, layout.mlp)]
        if len(pair) < 2:
            continue  # called more than once, which tells nothing
        if layer == 0 and attention_first(part, *pair) != (layout.attn, layout.mlp):
            raise unfit(
                model,
                f"the layout says that {layout.attn} is the attention and {layout.mlp} the MLP, but it is not {layout.attn} "
                "that keeps keys and values",
            )
        if layout.memory in part and layer not in layout.sparse and not ends(part[layout.memory], part[layout.mlp]):
            raise unfit(
                model,
                f"the layout says that {layout.memory} ends the MLP, but in {name} what it returns is neither what "
                f"{layout.mlp} returns nor what that is given",
            )
        if sums and name in calls and unexplained(calls[name], [part[x] for x in pair]) > IN_A_SUM:
            sums = False  # which is said once
            logger.warning(
                "%s: what %s and %s return does not add up to what %s adds to its input. rl.verify(lm) tries whether traces "
                "are exact all the same.", type(model).__name__, *pair, name,
            )  # fmt: skip


def calls_within(name: str, calls: Mapping[str, Call]) -> dict[str, Call]:
    """Those of the modules in the block of that name, by their paths from it."""
    return {path[len(name) + 1 :]: call for path, call in calls.items() if path.startswith(name + ".")}


def probe(model: nn.Module) -> Tensor:
    """(1, N_TOKENS) ids of tokens that differ, where the vocabulary has more than so many."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    device = device_of(model.get_input_embeddings())
    step = next(x for x in range(7, 8 + vocabulary) if gcd(x, vocabulary - 1) == 1)  # so that none comes twice
    return (torch.arange(N_TOKENS, device=device)[None] * step + 5) % (vocabulary - 1)


@torch.no_grad()
def watched(model: nn.Module, ids: Tensor) -> dict[str, Call]:
    """What each module that is called once in a run was given and returned, by its path, in the order of returning."""
    cache = CountingCache()
    calls: dict[str, list[Call]] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
            given = next((x for x in (*args, *kwargs.values()) if is_hidden(x)), None)
            returned = output[0] if isinstance(output, tuple) and output else output
            copies = [x.detach().to("cpu", copy=True) if is_hidden(x) else None for x in (given, returned)]
            calls.setdefault(path, []).append(Call(*copies, cache.kept))

        return hook

    with ExitStack() as hooks:
        for path, module in model.named_modules():
            hooks.callback(module.register_forward_hook(keep(path), with_kwargs=True).remove)
        try:
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        except Exception as error:  # whatever a model of an unknown family raises is a reason not to trace it
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise unfit(model, f"it does not run on a text with a cache of keys and values ({reason})") from error
    return {path: several[0] for path, several in calls.items() if len(several) == 1}


def is_hidden(x: Any) -> bool:
    """Whether it can be hidden states of the probe's tokens: (1, T, D), or (T, D)."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim in (2, 3) and x.shape[-2] == N_TOKENS


def chain_of_blocks(model: nn.Module, calls: Mapping[str, Call]) -> str:
    """Path of the longest list of modules each of which is given what the one before returned."""
    fitting = []
    for path, module in model.named_modules():
        chain = (
            [calls.get(f"{path}.{number}") for number in range(len(module))]
            if isinstance(module, nn.ModuleList)
            else []
        )
        whole = chain and all(call and call.given is not None and call.returned is not None for call in chain)
        if whole and all(torch.equal(x.returned, y.given) for x, y in zip(chain, chain[1:], strict=False)):
            fitting.append((len(chain), path))
    if not fitting:
        raise unfit(model, "no list of modules in it is a chain, each given what the one before returned")
    return max(fitting)[1]


def contributions(
    model: nn.Module, names: Sequence[str], blocks: Sequence[Call], parts: Sequence[Mapping[str, Call]]
) -> tuple[str, str]:
    """Paths of the two modules whose outputs, times constants, add up to what every block adds to its input."""
    shape = blocks[0].given.shape
    common = [path for path in parts[0] if all(path in part for part in parts)]
    common = [path for path in common if all(is_sized(part[path].returned, shape) for part in parts)]
    errors: dict[tuple[str, str], float] = {}
    for path, other in combinations(common, 2):
        if not other.startswith(path + ".") and not path.startswith(other + "."):
            addends = [[part[path], part[other]] for part in parts]
            errors[path, other] = max(map(unexplained, blocks, addends))
    least = min(errors.values(), default=inf)
    if least > IN_A_SUM:
        raise unfit(
            model,
            f"no two modules' outputs add up to what {names[0]} adds to its input, for every block alike; "
            f"among those of the right size are {', '.join(common[:8]) or 'none'}",
        )
    # Of those that fit about as well, the outermost modules; of two that are as far out, the earlier.
    fitting = [pair for pair, error in errors.items() if error <= max(2 * least, IN_A_SUM / 2)]
    first, second = min(fitting, key=lambda pair: sum(path.count(".") for path in pair))
    others = [pair for pair in fitting if not say_the_same(parts, (first, second), pair)]
    if others and blocks[0].returned.dtype.itemsize <= 2:
        raise unfit(
            model,
            f"in 16 bits what {first} and {second} return explains what a block adds to its input, and what "
            f'{" and ".join(others[0])} return does as well; load it with dtype="float32" to tell them apart',
        )
    return attention_first(parts[0], first, second)


def say_the_same(parts: Sequence[Mapping[str, Call]], pair: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two pairs of modules return the same, as a module and the matrix that ends it do."""
    return all(
        torch.equal(part[path].returned.flatten(), part[twin].returned.flatten())
        for part in parts
        for path, twin in zip(pair, other, strict=True)
    )


def attention_first(part: Mapping[str, Call], earlier: str, later: str) -> tuple[str, str]:
    """The paths of two modules of a first block, given in the order in which they return: the attention's, the MLP's."""
    return (earlier, later) if part[earlier].kept else (later, earlier)


def is_sized(x: Tensor | None, shape: torch.Size) -> bool:
    return x is not None and x.shape[-1] == shape[-1]


def unexplained(block: Call, addends: Sequence[Call]) -> float:
    """By how many roundings what a block returned is not what it was given and a sum of the outputs, each times a constant.

    Each number is measured by the size of its own terms, since a few of a state may be huge, and in 16 bits round away more
    than most others are.
    """
    given, returned = block.given.double().flatten(), block.returned.double().flatten()
    columns = torch.stack([x.returned.double().flatten() for x in addends], dim=1)  # (T * D, 2)
    sizes = given.abs() + returned.abs() + columns.abs().sum(1)
    sizes[sizes == 0] = 1.0
    relative, gain = columns / sizes[:, None], (returned - given) / sizes
    factors = torch.linalg.lstsq(relative, gain[:, None], driver="gelsd").solution[:, 0]
    if not factors.all():
        return inf
    terms = columns * factors
    sizes = given.abs() + terms.abs().sum(1)
    error = (given + terms.sum(1) - returned).abs()
    eps = max(torch.finfo(block.returned.dtype).eps, 1e-12)  # in float64 the factors are no more exact than that
    return float((error / sizes.where(sizes > 0, 1.0)).max()) / eps


def matrix_that_ends(model: nn.Module, name: str, mlp: str, part: Mapping[str, Call]) -> str | None:
    """Path from the block `name` to the matrix whose output is the MLP's, or what the norm behind the MLP is given."""
    for path, call in reversed(part.items()):
        module = model.get_submodule(f"{name}.{path}")
        is_matrix = isinstance(module, nn.Linear | Conv1D) or "linear" in type(module).__name__.lower()
        if is_matrix and ends(call, part[mlp]):
            return path
    return None


def ends(matrix: Call, mlp: Call) -> bool:
    """Whether what a matrix returned is what the MLP, or the norm that stands for it, returned or was given."""
    if matrix.returned is None:
        return False
    product = matrix.returned.flatten(0, -2)
    outputs = [x.flatten(0, -2) for x in (mlp.returned, mlp.given) if x is not None]
    return any(x.shape == product.shape and torch.equal(x, product) for x in outputs)


def unfit(model: nn.Module, reason: str, by_hand: bool = True) -> UnfitModelError:
    """The error that says why a model cannot be traced, what was looked for, and whether a layout by hand may help."""
    return UnfitModelError(
        f"LanguageModel: {type(model).__name__} is not a decoder-only model whose parts rome_lab finds: {reason}. Looked "
        "for a list of blocks, in each an attention and an MLP whose outputs are added to its input."
        + by_hand
        * (
            " Or say where they are: "
            'LanguageModel(model, tokenizer, layout=rl.models.Layout("mine", "model.layers", "self_attn", "mlp", '
            '"mlp.down_proj")).'
        )
    )
