"""v* by the plain loop, written independently of `rome_lab.values`: the yardstick of its speed and the oracle of its tests.

Whole texts through the whole model at each step, forwards and backwards, with logits at every token. Texts of equal
length go together, so that no padding and no mask is needed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rome_lab.facts import Fact
from rome_lab.keys import prefixed_prompt
from rome_lab.models import LanguageModel
from rome_lab.prompts import continuation_ids
from rome_lab.values import EditSettings


def plain_loop(
    lm: LanguageModel, layer: int, request: tuple[Fact, str], original: Tensor, settings: EditSettings
) -> tuple[Tensor, list[float]]:
    """The best change of W k* (D,), and the loss at every step; arguments as for `rome_lab.values.Objective`.

    It also makes the gradients of the weights, which nobody needs, unless these are frozen.
    """
    fact, target = request
    target_ids = continuation_ids(lm, fact.prompt, target)
    v_length = original.norm().to(lm.dtype)
    batches: dict[tuple[int, int], list[list[int]]] = {}
    for prompt in (prefixed_prompt(lm, fact, prefix) for prefix in ("", *settings.prefixes)):
        place = prompt.subject_range[1] - 1
        batches.setdefault((len(prompt.ids), place), []).append(prompt.ids.tolist() + target_ids[:-1])
    essence = prefixed_prompt(lm, replace(fact, template="{} is a", templates=()))
    delta = torch.zeros(len(original), dtype=lm.dtype, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)
    losses, found, before = [], [], None
    for step in range(settings.steps + 1):
        log_targets = []
        for (length, place), rows in batches.items():
            for row in full_log_p(lm, layer, torch.tensor(rows), place, delta):
                log_targets.append(sum(row[length - 1 + i, token] for i, token in enumerate(target_ids)))
        now = full_log_p(lm, layer, essence.ids[None], essence.subject_range[1] - 1, delta)[0, -1]
        before = now.detach() if before is None else before
        nll = -torch.stack(log_targets).mean()
        kl = settings.kl * torch.nn.functional.kl_div(before, now, log_target=True, reduction="sum")
        decay = settings.weight_decay * (delta.norm() / v_length) ** 2 if step else torch.zeros(())
        loss = nll + kl + decay
        losses.append(float(loss.detach()))
        found.append(delta.detach().clone())
        if step == settings.steps:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        lm.model.zero_grad(set_to_none=True)
        with torch.no_grad():
            delta *= min(1, float(settings.clamp * v_length / delta.norm()))
    return found[losses.index(min(losses))], losses


def full_log_p(lm: LanguageModel, layer: int, ids: Tensor, place: int, delta: Tensor) -> Tensor:
    """(B, T, V) log probabilities after every token, with `delta` added to what W says at `place`."""

    def add(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        moved = output.reshape(*ids.shape, -1) + 0
        moved[:, place] = moved[:, place] + delta
        return moved.reshape(output.shape)

    handle = lm.memory(layer).register_forward_hook(add)
    try:
        return lm.model(ids, use_cache=False).logits.log_softmax(-1)
    finally:
        handle.remove()
