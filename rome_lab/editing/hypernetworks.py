"""Networks that turn the gradient of a request into a change of weights: MEND and KE. `train_editor` trains them.

Training                               which of the two, the layers that it changes, and how it is trained
Slopes, slopes_of(lm, texts, layers)   the gradient of what a request asks for, by layer, in its factors
Mend                                   Mitchell et al. 2022, arXiv 2110.11309
KnowledgeEditor                        De Cao et al. 2021, arXiv 2104.08164
network_of(lm, training)               either of them, untrained
request_ids(lm, request)               what KE reads of a request
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rome_lab.base import check_whole
from rome_lab.editing.requests import Request, check_layers
from rome_lab.editing.target_texts import TargetTexts
from rome_lab.facts import continuation_ids, read_prompt
from rome_lab.models import Change, LanguageModel, at_least_float32, input_changed, output_changed

LEAST_TAUGHT = 20  # facts that a network learns from; one more, at least, is kept aside


@dataclass(frozen=True)
class Training:
    """Which network, and how it is trained.

    Attributes:
        name: "mend" or "ke".
        layers: whose W the network changes, the lowest first; none stands for the last three, as published for MEND.
        rank: of MEND's matrices; the size of KE's recurrent state.
        facts: how many it learns from, at most; a twentieth of them are kept aside to choose the best step by.
        steps: of Adam.
        batch: facts in one step.
        learning_rate: of Adam.
        edit_weight: c_e of MEND: what the loss of the edits counts beside the divergence elsewhere.
        margin: most divergence that KE is let have, in nats, in the end.
        seed: of the untrained network, and of the order of the facts.

    Raises:
        ValueError: one of them is out of its range.
    """

    name: str = "mend"
    layers: tuple[int, ...] = ()
    rank: int = 256
    facts: int = 1000
    steps: int = 1000
    batch: int = 8
    learning_rate: float = 3e-4
    edit_weight: float = 0.1
    margin: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in TRAINED:
            raise ValueError(f"Training: name is {self.name!r}; expected one of {', '.join(map(repr, TRAINED))}.")
        whole = {name: (getattr(self, name), 1) for name in ("rank", "steps", "batch")}
        check_whole("Training", facts=(self.facts, LEAST_TAUGHT + 1), seed=(self.seed, 0), **whole)
        for name in ("learning_rate", "edit_weight", "margin"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"Training: {name} is {value!r}; expected a finite number above 0.")
        object.__setattr__(self, "layers", tuple(self.layers))

    def layers_of(self, lm: LanguageModel) -> tuple[int, ...]:
        """The layers that are meant; a ValueError where the model has no such layers."""
        return check_layers(lm, self.layers or tuple(range(lm.n_layers))[-3:], self.name)


Slopes: TypeAlias = dict[int, tuple[Float[Tensor, "T H"], Float[Tensor, "T D"]]]
"""By layer, the key k_t and the gradient d_t of -log P[target] by what W says, of every token; dL/dW is sum_t d_t k_tT."""


def slopes_of(lm: LanguageModel, texts: TargetTexts, layers: Sequence[int]) -> Slopes:
    """The gradient of -log P of the targets of `texts`, float32 on the CPU, without tokens that do not matter to it."""
    keys: dict[int, Tensor] = {}
    probes: dict[int, Tensor] = {}

    def probed(layer: int, value: Tensor) -> Tensor:
        probes[layer] = torch.zeros_like(value, requires_grad=True)
        return value + probes[layer]

    with torch.enable_grad(), contextlib.ExitStack() as hooks:
        for layer in layers:
            module = lm.memory(layer)
            hooks.enter_context(input_changed(module, lambda k, layer=layer: keys.update({layer: k.detach()})))
            hooks.enter_context(output_changed(module, partial(probed, layer)))
        log_p, _ = texts.read(lm, Change())
        gradients = torch.autograd.grad(-log_p.sum(), [probes[layer] for layer in layers])
    slopes = {}
    for layer, gradient in zip(layers, gradients, strict=True):
        k, d = (at_least_float32(x).flatten(0, -2).float().cpu() for x in (keys[layer], gradient))
        matters = d.ne(0).any(1)
        slopes[layer] = k[matters], d[matters]
    return slopes


class Mend(nn.Module):
    """Each token's key and gradient pass through a small network, and the sum of their products is the change.

        dW = -a sum_t d'_t k'_tT,   (k', d') = g(normalised (k, d)),   g(z) = h + relu(s_2 (A_2 B_2 h + b_2) + o_2)
        h = z + relu(s_1 (A_1 B_1 z + b_1) + o_1)

    A are 0 at first, so that g is the identity. s and o are of each layer, all else is shared. Differs: of each MLP the
    authors change the first matrix, too.
    """

    def __init__(self, layers: Sequence[int], n_inner: int, n_outer: int, rank: int, n_embedding: int) -> None:
        super().__init__()
        self.layers, self.n_inner, size = tuple(layers), n_inner, n_inner + n_outer
        self.lower = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2, rank, size)))  # B
        self.upper = nn.Parameter(torch.zeros(2, size, rank))  # A
        self.bias = nn.Parameter(torch.zeros(2, size))
        self.scales = nn.Parameter(torch.ones(len(layers), 2, size))
        self.offsets = nn.Parameter(torch.zeros(len(layers), 2, size))
        self.log_rates = nn.Parameter(torch.full((len(layers),), -8.0))  # of a
        self.register_buffer("mean", torch.zeros(len(layers), size))
        self.register_buffer("deviation", torch.ones(len(layers), size))

    def normalise_by(self, examples: Sequence[Slopes]) -> None:
        """Take mean and spread of keys and gradients from these."""
        for place, layer in enumerate(self.layers):
            z = torch.cat([torch.cat(slopes[layer], dim=1) for slopes in examples])
            self.mean[place], self.deviation[place] = z.mean(0), z.std(0).clamp_min(1e-7)

    def forward(self, slopes: Slopes, request: Float[Tensor, "S E"]) -> dict[int, Float[Tensor, "D H"]]:
        """dW by layer; `request` is not read."""
        deltas = {}
        for place, layer in enumerate(self.layers):
            z = (torch.cat(slopes[layer], dim=1) - self.mean[place]) / self.deviation[place]
            for step in (0, 1):
                inner = z @ self.lower[step].T @ self.upper[step].T + self.bias[step]
                z = z + torch.relu(self.scales[place, step] * inner + self.offsets[place, step])
            k, d = z[:, : self.n_inner], z[:, self.n_inner :]
            deltas[layer] = -self.log_rates[place].exp() * d.T @ k
        return deltas


class KnowledgeEditor(nn.Module):
    """A recurrent network reads the request, and says which parts of the gradient to take, and what to add to it (KE).

        dW = s(e) (softmax(a) cT * G + softmax(b) fT),   G = dL/dW in units of its own root mean square

    s is the logistic function; a, b (D,), c, f (H,) and e come from the last states of an LSTM that reads in both directions
    prompt, object and target, as the model's own embeddings. Differs: the authors change all matrices, and G has no unit.
    """

    def __init__(self, layers: Sequence[int], n_inner: int, n_outer: int, rank: int, n_embedding: int) -> None:
        super().__init__()
        self.layers, self.sizes = tuple(layers), (n_outer, n_inner, n_outer, n_inner, 1)
        self.reader = nn.LSTM(n_embedding, rank, bidirectional=True, batch_first=True)
        self.hidden = nn.Linear(2 * rank, rank)
        self.heads = nn.ModuleList(nn.Linear(rank, sum(self.sizes)) for _ in layers)

    def normalise_by(self, examples: Sequence[Slopes]) -> None:
        """Nothing is normalised over examples."""

    def forward(self, slopes: Slopes, request: Float[Tensor, "S E"]) -> dict[int, Float[Tensor, "D H"]]:
        """dW by layer."""
        request = request / request.square().mean().sqrt().clamp_min(1e-12)
        _, (last, _) = self.reader(request[None])
        summary = torch.tanh(self.hidden(last.flatten()))
        deltas = {}
        for layer, head in zip(self.layers, self.heads, strict=True):
            k, d = slopes[layer]
            gradient = d.T @ k
            gradient = gradient / gradient.square().mean().sqrt().clamp_min(1e-12)
            a, c, b, f, e = head(summary).split(self.sizes)
            mask, shift = (torch.outer(x.softmax(0), y) for x, y in ((a, c), (b, f)))
            deltas[layer] = torch.sigmoid(e) * (mask * gradient + shift)
        return deltas


NETWORKS = {"mend": Mend, "ke": KnowledgeEditor}
TRAINED = tuple(NETWORKS)


def network_of(lm: LanguageModel, training: Training) -> nn.Module:
    """The untrained network, float32 on the CPU; the seed is that of the training.

    Raises:
        ValueError: the layers are out of range, cannot be edited, or are of different shapes.
    """
    layers = training.layers_of(lm)
    shapes = {tuple(lm.weight(layer).shape) for layer in layers}
    if len(shapes) > 1:
        raise ValueError(
            f"{training.name}: the matrices of the layers {layers} of {lm.name} differ in shape; choose others."
        )
    ((n_outer, n_inner),) = shapes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        return NETWORKS[training.name](layers, n_inner, n_outer, training.rank, lm.embedding.weight.shape[1])


def request_ids(lm: LanguageModel, request: Request) -> list[int]:
    """What KE reads of a request: the tokens of the prompt, of the object and of the target, one after the other."""
    fact, target = request
    prompt = read_prompt(lm, fact).ids.tolist()
    return prompt + [x for text in (fact.object, target) for x in continuation_ids(lm, fact.prompt, text)]
