"""Effects from gradients: attribution patching, a first-order estimate, and integrated gradients, which tend to the effect.

    estimate(n) = sum_d (n_source - n_base)_d (dM / dn)_d        the gradient taken in the run that is restored into

attribution_patching, integrated_gradients       one fact; what they estimate is `causal_trace(...).effect`
attributions(runs, kinds, metric, token)         the former of runs that are recorded
integrals(runs, kinds, metric, steps, ...)       the latter
slopes(runs, kind, metric, token, along)         the derivative of M along each restoration, where it has come to `along`

Attribution patching goes back block by block, each run once more from what it was given in the recorded run: so one block's
graph is in memory at a time, offloaded weights among it, and no parameter gathers a gradient. Integrated gradients need the
derivative along one direction for each run, which a sweep with dual numbers carries forward: no graph at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from rome_lab.base import check_whole
from rome_lab.facts import Fact
from rome_lab.models import (
    Batching,
    LanguageModel,
    at_least_float32,
    check_verified,
    enough_room,
    freed_memory_kept,
    input_changed,
    output_changed,
    run_block,
    suited_attention,
    suited_products,
    text_bytes,
)
from rome_lab.tracing.corruption import Corruption
from rome_lab.tracing.metrics import check_metric, metric_tensors
from rome_lab.tracing.one_fact import heads_of
from rome_lab.tracing.runs import Runs, TraceSettings, check_tokens, run_clean_and_corrupted
from rome_lab.tracing.sweep import Sweep, columns_of, few_together
from rome_lab.tracing.trace import HEAD

ESTIMATED = ("state", "mlp", "attn", HEAD)
GRAPH = 3  # times as much as a pass without: what a block keeps for the way back


def attribution_patching(
    lm: LanguageModel,
    prompt: str | Fact,
    subject: str | None = None,
    kinds: Sequence[str] = ("state", "mlp", "attn"),
    corruption: Corruption | None = None,
    samples: int = 10,
    window: int = 10,
    seed: int = 0,
    *,
    metric: str = "probability",
    direction: str = "denoise",
    token: int | None = None,
    max_rows: int | None = None,
    answer: str | None = None,
    foil: str | None = None,
    despite_verdict: bool = False,
) -> dict[str, np.ndarray]:
    """Estimates of the effects of all cells of a trace, from one gradient (Syed et al. 2023, arXiv 2310.10348).

        estimate(n) = sum_d (n_source - n_base)_d (dM / dn)_d, the mean over the samples

    The gradient is taken in the run that is restored into: corrupted, or clean where the direction is "noise". Of a run of
    layers it is the sum of the layers' own. That takes one clean run, one corrupted run, and one way back, for all cells.

    Args:
        kinds: of "state", "mlp", "attn" and "head".
        others: as of `causal_trace`.

    Returns: kind -> (T, L) float64, estimates of `causal_trace(..., kind).effect`; of "head" (L, heads).

    In 16 bits each is off by up to 5% (float16) or 25% (bfloat16) of the largest on tiny models; quantised
    weights do where their modules pass gradients on.

    Raises: see `causal_trace`; and ValueError: a module of the model passes no gradient on.
    """
    settings = TraceSettings(corruption, samples, window, seed, max_rows, direction, foil)
    check_estimate("attribution_patching", lm, kinds, metric, settings, despite_verdict)
    with torch.inference_mode(False):
        runs = run_clean_and_corrupted(lm, prompt, subject, settings, answer, HEAD in kinds)
        return attributions(runs, kinds, metric, token)


def integrated_gradients(
    lm: LanguageModel,
    prompt: str | Fact,
    subject: str | None = None,
    kinds: Sequence[str] = ("state", "mlp", "attn"),
    corruption: Corruption | None = None,
    steps: int = 10,
    samples: int = 10,
    window: int = 10,
    seed: int = 0,
    *,
    tokens: Sequence[int] | None = None,
    metric: str = "probability",
    direction: str = "denoise",
    token: int | None = None,
    max_rows: int | None = None,
    answer: str | None = None,
    foil: str | None = None,
    despite_verdict: bool = False,
) -> dict[str, np.ndarray]:
    """Effects of the cells of a trace, integrated along each restoration (Sundararajan et al. 2017, arXiv 1703.01365).

        (n_source - n_base) . (1/m) sum_k dM/dn at n_base + a_k (n_source - n_base), a_k = (k + 1/2) / m, k = 0 .. m - 1

    Only the cell's node moves, in the run that is restored into; of a run of layers the node is all its outputs together.
    As m grows this is M(restored) - M(base), which a sweep gives exactly and at less cost: an error that falls with m^2.

    Args:
        kinds: of "state", "mlp", "attn" and "head".
        steps: m; each costs some two or three exact sweeps.
        tokens: those to restore; all by default. The rows of others are NaN.
        others: as of `causal_trace`.

    Returns: kind -> (T, L) float64, near `causal_trace(..., kind).effect`; of "head" (L, heads).

    Raises: see `causal_trace`; and ValueError: an operation of the model has no forward derivative.
    """
    settings = TraceSettings(corruption, samples, window, seed, max_rows, direction, foil)
    check_estimate("integrated_gradients", lm, kinds, metric, settings, despite_verdict)
    check_whole("integrated_gradients", steps=(steps, 1))
    runs = run_clean_and_corrupted(lm, prompt, subject, settings, answer, HEAD in kinds)
    return integrals(runs, kinds, metric, steps, tokens, token)


def check_estimate(
    doing: str, lm: LanguageModel, kinds: Sequence[str], metric: str, settings: TraceSettings, despite_verdict: bool
) -> None:
    """Raise a ValueError where there is nothing to estimate, or not of this model."""
    if isinstance(kinds, str) or not kinds or set(kinds) - set(ESTIMATED):
        raise ValueError(f"{doing}: kinds is {kinds!r}; expected a list of {', '.join(map(repr, ESTIMATED))}.")
    check_metric(doing, metric, settings.foil)
    if not despite_verdict:
        check_verified(lm, doing)


@enough_room("attribution_patching")
def attributions(runs: Runs, kinds: Sequence[str], metric: str, token: int | None = None) -> dict[str, np.ndarray]:
    """`attribution_patching` of runs that are recorded.

    Args: token: of the heads, by default the last.
    """
    lm, n_layers = runs.lm, runs.lm.n_layers
    begin = runs.prompt.subject_range[0]  # what is left of the subject is the same in all runs
    at = head_token(runs, token) - begin
    shapes = {kind: (runs.settings.samples, len(runs.prompt.ids) - begin, n_layers) for kind in kinds}
    if HEAD in kinds:
        shapes[HEAD] = (runs.settings.samples, heads_of(runs), n_layers)
    single = {kind: np.zeros(shape) for kind, shape in shapes.items()}  # of each layer on its own
    with suited_attention(lm), suited_products(lm.device), freed_memory_kept(), torch.enable_grad():
        gradient = gradient_at_the_end(runs, metric)  # (R, N, D)
        for layer in reversed(range(n_layers)):
            nodes = {"state": runs.recording.states[layer + 1]}
            nodes |= {"mlp": runs.recording.mlp[layer], "attn": runs.recording.attn[layer]}
            gradients, above = gradients_of_block(runs, layer, gradient, set(kinds)), gradient
            gradient = gradients.pop("given")
            for kind, values in {"state": above, **gradients}.items():
                if kind == HEAD and at >= 0:
                    shift = shift_of(runs, runs.recording.heads[layer])[:, at]  # (S, heads, D_head)
                    single[kind][..., layer] = product(shift, values.unflatten(-1, shift.shape[1:])[:, at])
                elif kind in kinds and kind != HEAD:
                    single[kind][..., layer] = product(shift_of(runs, nodes[kind]), values)
    return {kind: whole_cells(runs, kind, single[kind].mean(0)) for kind in kinds}


def whole_cells(runs: Runs, kind: str, single: np.ndarray) -> np.ndarray:
    """(T, L): the sum over each cell's layers of (N, L), with zeros left of the subject; heads (heads, L) are turned."""
    if kind == HEAD:
        return single.T.copy()
    cells = np.zeros((len(runs.prompt.ids), single.shape[1]))
    for place, column in enumerate(columns_of(kind, single.shape[1], runs.settings.window)):
        cells[-len(single) :, place] = single[:, column.first : column.last + 1].sum(1)
    return cells


def head_token(runs: Runs, token: int | None) -> int:
    """The token where heads are restored; a ValueError where there is no such token."""
    if token is None:
        return len(runs.prompt.ids) - 1
    check_whole("heads", token=(token, 0))
    check_tokens("heads", runs.prompt, [token])
    return token


def shift_of(runs: Runs, recorded: Tensor) -> Tensor:
    """n_source - n_base, (S, N, ...), from the subject's first token on."""
    x = at_least_float32(recorded[:, runs.prompt.subject_range[0] :])
    return x[runs.source] - x[runs.base]


def product(shift: Tensor, gradient: Tensor) -> np.ndarray:
    """Their product, summed over the last axis, float64."""
    return (shift.cpu().double() * gradient.cpu().double()).sum(-1).numpy()


def gradient_at_the_end(runs: Runs, metric: str) -> Tensor:
    """(R, N, D): dM / dh of what the last block returns, in each different run that is restored into.

    Of P[o] it is P[o] times that of log P[o], which has the size of numbers that 16 bits hold.
    """
    rows, last = runs.base.unique(), runs.recording.states[-1]

    def of(part: Tensor) -> Tensor:
        hidden = last[part, -1].requires_grad_()
        logits = at_least_float32(runs.lm.logits(hidden))
        read = metric_tensors(logits, runs.answer_id, runs.foil_id)
        (gradient,) = torch.autograd.grad(read["log_probability" if metric == "probability" else metric].sum(), hidden)
        gradient = at_least_float32(gradient)
        factor = read["probability"].detach()[:, None].to(gradient) if metric == "probability" else 1.0
        return gradient * factor

    few = few_together(Batching(runs.lm, "attribution_patching", text_bytes(runs.lm, 1)))
    gradient = at_least_float32(last[rows, runs.prompt.subject_range[0] :]).zero_()
    gradient[:, -1] = torch.cat(list(few.over(rows, of)))
    return gradient


def gradients_of_block(runs: Runs, layer: int, gradient: Tensor, kinds: set[str]) -> dict[str, Tensor]:
    """Gradients (R, N, ...) of M: of what block `layer` is "given", and of its "mlp", "attn" and "head" where asked for.

    Args: gradient: of what it returns, float32 at least.
    """
    lm, recording, rows = runs.lm, runs.recording, runs.base.unique()
    begin = runs.prompt.subject_range[0]
    modules = {"mlp": lm.mlp(layer), "attn": lm.attn(layer)}
    size = gradient.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    size = size.log2().ceil().exp2()  # a power of two, so that nothing but what is too small for 16 bits is rounded

    def of(part: range) -> dict[str, Tensor]:
        texts, nodes = rows[part.start : part.stop], {}
        places = slice(part.start, part.stop)

        def keep(kind: str, x: Tensor) -> Tensor:
            nodes[kind] = x
            return x.clone()  # some families add to it in place

        with ExitStack() as hooks:
            for kind in kinds & set(modules):
                hooks.enter_context(output_changed(modules[kind], partial(keep, kind)))
            if HEAD in kinds:
                hooks.enter_context(input_changed(lm.heads_out[layer], partial(keep, HEAD)))
            hooks.enter_context(parts_checked(lm, [layer], lambda x: x.requires_grad))
            nodes["given"] = recording.states[layer][texts, begin:].requires_grad_()
            returned = run_block(lm, layer, nodes["given"], recording, texts)
        upstream = (gradient / size)[places].to(returned)
        values = torch.autograd.grad(returned, list(nodes.values()), upstream)
        scale = size[places].to(returned.device)
        shaped = (at_least_float32(x.view(len(texts), gradient.shape[1], -1)) for x in values)
        return {kind: x * scale.to(x) for kind, x in zip(nodes, shaped, strict=True)}

    fitting = GRAPH * text_bytes(lm, len(runs.prompt.ids))
    parts = list(Batching(lm, "attribution_patching", fitting, runs.settings.max_rows).over(range(len(rows)), of))
    return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}


@contextmanager
def parts_checked(lm: LanguageModel, layers: Sequence[int], carries: Callable[[Tensor], bool]) -> Iterator[None]:
    """Within the context, a part of a block that is given what carries a derivative has to return what does."""

    def check(place: str, module: nn.Module, args: tuple, output: object) -> None:
        tensors = all(isinstance(x, Tensor) and x.is_floating_point() for x in (*args[:1], output))
        if args and tensors and carries(args[0]) and not carries(output):
            raise ValueError(
                f"gradients: {place} of {lm.name} ({type(module).__name__}) passes none on, as quantised weights may not; "
                "load the model unquantised, say in bfloat16, or take exact effects, which need none: causal_trace."
            )

    with ExitStack() as hooks:
        for layer in layers:
            for name, module in lm.blocks[layer].named_modules():
                if not any(module.children()):
                    hook = module.register_forward_hook(partial(check, f"{name} of block {layer}"))
                    hooks.callback(hook.remove)
        yield


@torch.no_grad()
@enough_room("integrated_gradients")
def integrals(
    runs: Runs,
    kinds: Sequence[str],
    metric: str,
    steps: int,
    tokens: Sequence[int] | None = None,
    token: int | None = None,
) -> dict[str, np.ndarray]:
    """`integrated_gradients` of runs that are recorded."""
    length, begin = len(runs.prompt.ids), runs.prompt.subject_range[0]
    tokens = range(length) if tokens is None else tokens
    check_tokens("integrated_gradients", runs.prompt, tokens)
    midpoints = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    effects = {}
    for kind in kinds:
        if kind == HEAD:
            flat = slopes(runs, kind, metric, head_token(runs, token), midpoints).mean((1, 2))
            effects[kind] = flat.reshape(runs.lm.n_layers, -1)
            continue
        effects[kind] = np.full((length, runs.lm.n_layers), np.nan)
        for place in tokens:
            # Left of the subject nothing differs.
            effects[kind][place] = slopes(runs, kind, metric, place, midpoints).mean((1, 2)) if place >= begin else 0.0
    return effects


@torch.no_grad()
def slopes(runs: Runs, kind: str, metric: str, token: int, along: Tensor) -> np.ndarray:
    """(columns, A, S): dM / da where the nodes of each column stand at n_base + a (n_source - n_base).

    Args: along: (A,) the values of a; 1 is the restored run, and at 0 the mean over S is attribution patching.

    Raises: ValueError: an operation of the model has no forward derivative.
    """
    lm, settings = runs.lm, runs.settings
    columns = columns_of(kind, lm.n_layers, settings.window, heads_of(runs) if kind == HEAD else 0)

    def of(part: Tensor) -> np.ndarray:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(part, torch.ones_like(part))
            sweep = Sweep(runs, token, kind, None, columns, dual)
            return sweep.read(partial(read_slope, runs, metric))[metric].reshape(len(columns), len(part), -1)

    kept = 2 * len(columns) * settings.samples * runs.recording.states[0][0, token:].nbytes
    with suited_attention(lm), suited_products(lm.device), freed_memory_kept(), carried_forward(lm):
        parts = list(Batching(lm, "integrated_gradients", kept).over(along, of))
    return np.concatenate(parts, axis=1)


@contextmanager
def carried_forward(lm: LanguageModel) -> Iterator[None]:
    """Within the context, derivatives are carried forward: by plain attention, and saying where an operation has none."""
    with sdpa_kernel(SDPBackend.MATH), parts_checked(lm, range(lm.n_layers), lambda x: tangent_of(x) is not None):
        try:
            yield
        except NotImplementedError as error:
            raise ValueError(
                f"integrated_gradients: an operation of {lm.name} has no forward derivative ({str(error).splitlines()[0]}); "
                "take attribution_patching, or exact effects: causal_trace."
            ) from error


def tangent_of(x: Tensor) -> Tensor | None:
    """The derivative that it carries, where it does."""
    return forward_ad.unpack_dual(x).tangent


def read_slope(runs: Runs, metric: str, logits: Tensor) -> dict[str, np.ndarray]:
    """Metric -> (...) dM / da, float64, of logits that carry derivatives."""
    slope = tangent_of(metric_tensors(logits, runs.answer_id, runs.foil_id)[metric])
    return {metric: np.zeros(logits.shape[:-1]) if slope is None else slope.cpu().double().numpy()}
