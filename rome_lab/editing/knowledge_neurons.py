"""Knowledge neurons (KN, Dai et al. 2022, arXiv 2104.08696): inner activations of MLPs that make an answer likely.

knowledge_attributions(lm, ids, token)     how much each adds to the answer's probability, by integrated gradients
neurons_that_matter(lm, fact, prefixes)    those that matter at enough of the prompts
rewrite_neurons(lm, requests, ...)         the changes of all layers that make them say the targets
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rome_lab.base import check_whole
from rome_lab.editing.keys import run_to_keys
from rome_lab.editing.requests import Request
from rome_lab.facts import Fact, continuation_ids, object_token, read_prompt
from rome_lab.models import (
    Batching,
    LanguageModel,
    at_least_float32,
    check_recording,
    input_changed,
    log_p_of,
    record_run,
    run_block,
    run_blocks,
    text_bytes,
)


@dataclass(frozen=True)
class Neurons:
    """How knowledge neurons are found and rewritten; but for `prompts` and `steps` the published numbers by default.

    Attributes:
        threshold: share of the greatest attribution above which a neuron counts.
        share: of the prompts at which it has to count.
        prompts: how many there are: the fact's own, and the same behind sampled prefixes. The authors have several wordings.
        steps: m, of the integral; 20 in the paper, whose steps come less near to it.
        erase, write: multiples of the old and of the new answer's embedding taken from and added to a neuron's value vector.

    Raises:
        ValueError: one of them is out of its range.
    """

    threshold: float = 0.2
    share: float = 0.5
    prompts: int = 4
    steps: int = 10
    erase: float = 1.0
    write: float = 8.0

    def __post_init__(self) -> None:
        check_whole("Neurons", prompts=(self.prompts, 1), steps=(self.steps, 1))
        for name in ("threshold", "share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"Neurons: {name} is {getattr(self, name)!r}; expected a share above 0, up to 1.")
        for name in ("erase", "write"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"Neurons: {name} is {getattr(self, name)!r}; expected a finite number of at least 0.")


DEFAULT_NEURONS: dict[str, Neurons] = {}  # by model; others take the published numbers


def knowledge_attributions(
    lm: LanguageModel, prompt_ids: Sequence[int], token: int, steps: int = 10
) -> tuple[Float[Tensor, "L H"], Float[Tensor, "L H"]]:
    """What each inner activation at the prompt's last token adds to P[token], one layer's at a time (Eqn 4 of the paper).

        k_h (1/m) sum_j dP(a_j k)/dk_h,   a_j = (j + 1/2) / m, j = 0 .. m - 1

    k are the layer's activations, what its W is given; later layers follow. Over a layer it adds up to P(k) - P(0) as m
    grows.
    Differs: the authors' a_j are j / m; midpoints come nearer to the integral with as many.

    Args: steps: m.

    Returns: these, and the activations themselves, (L, H) float32 at least, on the CPU.
    """
    ids = torch.tensor([list(prompt_ids)], device=lm.device)
    lm.check_length(ids.shape[1], "kn")
    keys: dict[int, Tensor] = {}
    with torch.no_grad():
        run_to_keys(lm, ids, range(lm.n_layers), lambda layer, k: keys.update({layer: k.view(ids.shape[1], -1)[-1]}))
    recording = record_run(lm, ids, lambda embedded: None)
    lm.check_finite(recording.logits, "kn")
    check_recording(lm, recording, "kn")
    along = (torch.arange(steps) + 0.5)[:, None] / steps
    text = torch.zeros(lm.n_layers * steps, dtype=torch.long)  # all of the texts continue the one that was recorded

    def gradients_of(layers: Sequence[int]) -> list[Tensor]:
        """Of each of these layers (m, H): its m texts join those of the layers below it."""
        paths: list[Tensor] = []
        hidden = recording.states[layers[0]][:0, -1:]  # (texts, 1, D)
        with torch.enable_grad():
            for layer in range(layers[0], lm.n_layers):
                parts = []
                if len(hidden):
                    parts.append(run_blocks(lm, range(layer, layer + 1), hidden, recording, text[: len(hidden)]))
                if layer in layers:
                    paths.append(path := (along.to(keys[layer]) * keys[layer]).requires_grad_())
                    begin = recording.states[layer][:, -1:].expand(steps, -1, -1)
                    with input_changed(lm.memory(layer), lambda given, path=path: path.view(given.shape)):
                        parts.append(run_block(lm, layer, begin, recording, text[:steps]))
                hidden = torch.cat(parts)
            answers = torch.full((len(hidden),), token, device=lm.device)
            log_p, _ = log_p_of(lm, hidden[:, -1].to(lm.device), answers)
            return list(torch.autograd.grad(log_p.exp().sum(), paths))

    together = Batching(lm, "kn", steps * text_bytes(lm, ids.shape[1], cached=True))
    gradients = [gradient for part in together.over(range(lm.n_layers), gradients_of) for gradient in part]
    pairs = zip(keys.values(), gradients, strict=True)
    rows = [(at_least_float32(k) * at_least_float32(gradient).mean(0)).cpu() for k, gradient in pairs]
    return torch.stack(rows), torch.stack([at_least_float32(k).cpu() for k in keys.values()])


def neurons_that_matter(
    lm: LanguageModel, fact: Fact, prefixes: Sequence[str], settings: Neurons = Neurons()
) -> list[tuple[int, int, int]]:
    """Layer, neuron and sign (of its mean activation) of those that matter at enough of the prompts, the greatest first.

    At each prompt those matter that add more than `threshold` of what the greatest adds to the probability of the object's
    first token.

    Args: prefixes: texts to put before the prompt, besides none; as many are taken as `Neurons.prompts` has room for.

    Raises: ValueError: none does.
    """
    token = object_token(lm, fact)
    texts = [read_prompt(lm, fact, prefix=prefix).ids.tolist() for prefix in ("", *prefixes[: settings.prompts - 1])]
    pairs = [knowledge_attributions(lm, ids, token, settings.steps) for ids in texts]
    several, activations = (torch.stack(x) for x in zip(*pairs, strict=True))  # (prompts, L, H)
    greatest = several.amax((1, 2), keepdim=True)
    counts = ((several > settings.threshold * greatest) & (greatest > 0)).double().mean(0)
    places = (counts >= settings.share).nonzero().tolist()
    if not places:
        raise ValueError(
            f"kn: no neuron matters to {fact.object!r} at {settings.share:.0%} of {len(texts)} prompts about "
            f"{fact.subject!r}; lower threshold, {settings.threshold}, or share."
        )
    mean, signs = several.mean(0), activations.mean(0).sign()
    places.sort(key=lambda place: -float(mean[*place]))
    return [(layer, neuron, int(signs[layer, neuron])) for layer, neuron in places]


def rewrite_neurons(
    lm: LanguageModel, requests: Sequence[Request], prefixes: Sequence[str], settings: Neurons = Neurons()
) -> dict[int, Float[Tensor, "D H"]]:
    """W_hat - W by layer, float32: the value vectors of each request's neurons say the target instead of the object.

        W_hat[:, h] = W[:, h] + sign(k_h) (write e(target) - erase e(object))

    e is the input embedding of the first token. Neurons of several requests add up. Differs: the authors' activations, of a
    GELU, are hardly ever below 0; those of gated MLPs are half the time, and would write the opposite.

    Args: prefixes: see `neurons_that_matter`.

    Raises: ValueError: a request has no neurons, or embeddings have another size than value vectors.
    """
    size, width = lm.embedding.weight.shape[1], lm.weight(0).shape[0]
    if size != width:
        raise ValueError(
            f"kn: word embeddings of {lm.name} have {size} components and its value vectors {width}, so that one cannot "
            "be added to the other; choose another method."
        )
    deltas: dict[int, Tensor] = {}
    for fact, target in requests:
        tokens = [continuation_ids(lm, fact.prompt, text)[0] for text in (fact.object, target)]
        old, new = lm.embedding.weight.detach()[tokens].float().cpu()
        step = settings.write * new - settings.erase * old
        for layer, neuron, sign in neurons_that_matter(lm, fact, prefixes, settings):
            if layer not in deltas:
                deltas[layer] = torch.zeros(lm.weight(layer).shape)
            deltas[layer][:, neuron] += sign * step
    return dict(sorted(deltas.items()))
