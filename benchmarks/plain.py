"""v* by the plain loop, and a whole edit around it, written independently of `rome_lab`: yardsticks and oracles.

Whole texts through the whole model at each step, forwards and backwards, with logits at every token. Texts of equal
length go together, so that no padding and no mask is needed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rome_lab.editing.keys import OPENINGS, as_sentence
from rome_lab.editing.settings import EditSettings
from rome_lab.facts.fact import Fact
from rome_lab.facts.prompts import continuation_ids, read_prompt
from rome_lab.models.language_model import LanguageModel


def plain_loop(
    lm: LanguageModel, layer: int, request: tuple[Fact, str], original: Tensor, settings: EditSettings
) -> tuple[Tensor, list[float]]:
    """The best change of W k* (D,), and the loss at every step; arguments as for `rome_lab.editing.values.Objective`.

    It also makes the gradients of the weights, which nobody needs, unless these are frozen.
    """
    fact, target = request
    published = settings.objective == "published"
    target_ids = continuation_ids(lm, fact.prompt, target)
    v_length = original.norm().to(lm.dtype)
    batches: dict[tuple[int, int], list[list[int]]] = {}
    for prompt in (read_prompt(lm, fact, prefix=prefix) for prefix in ("", *settings.prefixes)):
        place = prompt.subject_range[1] - 1
        batches.setdefault((len(prompt.ids), place), []).append(prompt.ids.tolist() + target_ids[:-1])
    essence = read_prompt(lm, replace(fact, template="{} is a", templates=()))
    delta = torch.zeros(len(original), dtype=lm.dtype, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)
    losses, found, before = [], [], None
    for step in range(settings.steps + 1):
        log_targets = []
        for (length, place), rows in batches.items():
            for row in full_log_p(lm, layer, torch.tensor(rows), place, delta):
                log_targets.append(sum(row[length - 1 + i, token] for i, token in enumerate(target_ids)))
        last = essence.subject_range[1] - 1
        now = full_log_p(lm, layer, essence.ids[None], last, delta)[0, last if published else -1]
        before = now.detach() if before is None else before
        nll = -torch.stack(log_targets).mean() / (len(target_ids) if published else 1)
        kl = settings.kl * torch.nn.functional.kl_div(before, now, log_target=True, reduction="sum")
        size = delta.norm() / v_length**2 if published else (delta.norm() / v_length) ** 2
        decay = settings.weight_decay * size if step else torch.zeros(())
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


def plain_edit(
    lm: LanguageModel, layer: int, request: tuple[Fact, str], C: Tensor, settings: EditSettings
) -> tuple[Tensor, Tensor]:
    """Lambda (D,) and u (H,) of the paper's edit, with its averaged key: W_hat = W + Lambda uT, with u = C^-1 k*.

    Prefixes, where none are given, by transformers' own generation and keys by whole forwards, one text after the other.
    """
    fact = request[0]
    settings = replace(settings, prefixes=settings.prefixes or plain_prefixes(lm, settings))
    keys = [plain_key(lm, layer, fact, prefix) for prefix in settings.prefixes]
    k_star = torch.stack(keys).mean(0)
    original = lm.weight(layer).double() @ k_star
    delta, _ = plain_loop(lm, layer, request, original, settings)
    u = torch.linalg.solve(C.to(k_star), k_star)
    return delta.double() / (u @ k_star), u


def plain_prefixes(lm: LanguageModel, settings: EditSettings) -> tuple[str, ...]:
    """Sentences sampled one after the other, each among the five most probable tokens at every place."""
    sampled = {"do_sample": True, "top_k": 5, "pad_token_id": 1}
    texts = []
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        for place, length in enumerate(settings.prefix_lengths):
            ids = lm.tokenizer(OPENINGS[place % len(OPENINGS)], return_tensors="pt")["input_ids"].to(lm.device)
            whole = lm.model.generate(ids, attention_mask=ids == ids, max_new_tokens=length, **sampled)
            texts.append(as_sentence(lm.tokenizer.decode(whole[0], skip_special_tokens=True)))
    return tuple(texts)


def plain_texts(lm: LanguageModel, prompts: list[list[int]], length: int) -> list[list[int]]:
    """Texts of at most `length` tokens that go on from token ids, by transformers' own generation, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=lm.device)
    real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=lm.device)
    sampled = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": sorted(lm.stops)}
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(0)
        whole = lm.model.generate(ids, attention_mask=real, max_new_tokens=length - min(map(len, prompts)), **sampled)
    return [row[longest - len(prompt) :][:length] for row, prompt in zip(whole.tolist(), prompts, strict=True)]


@torch.no_grad()
def plain_key(lm: LanguageModel, layer: int, fact: Fact, prefix: str) -> Tensor:
    """(H,) float64: the input of W at the subject's last token behind a prefix."""
    prompt, seen = read_prompt(lm, fact, prefix=prefix), []
    handle = lm.memory(layer).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        lm.model(prompt.ids[None], use_cache=False)
    finally:
        handle.remove()
    return seen[0].reshape(len(prompt.ids), -1)[prompt.subject_range[1] - 1].double()
