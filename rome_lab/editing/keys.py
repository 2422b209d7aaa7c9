"""Keys: prefixes sampled from the model, a fact's prompt behind them, and k* at the subject's last token (Appendix A).

sample_prefixes(lm, lengths, seed)    sentences to put before a prompt
k_star(lm, fact, layer, ...)          the key or keys that an edit of the fact maps to v*
texts_of(lm, fact, part, prefixes)    the texts that a key is the mean over
subject_keys, subject_states          keys, and hidden states behind a block, at the subject's last token of texts
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from rome_lab.base import uniform
from rome_lab.editing.settings import KEYS, PARTS
from rome_lab.facts import Fact, Prompt, read_prompt
from rome_lab.models import LanguageModel, continue_randomly, output_changed


def key_size(lm: LanguageModel, layer: int) -> int:
    """H."""
    return lm.memory(layer).weight.shape[0 if lm.memory_is_transposed(layer) else 1]


class _HighestReached(Exception):
    """Ends a forward at the highest layer that is asked about."""


@torch.no_grad()
def run_to_keys(lm: LanguageModel, ids: Tensor, layers: Sequence[int], receive: Callable[[int, Tensor], None]) -> None:
    """Run `lm` on ids (B, T) up to the highest of `layers`, giving `receive` each layer's keys; no further."""
    lm.check_mode()
    highest = max(layers)

    def watch(layer: int) -> Callable[[torch.nn.Module, tuple], None]:
        def hook(module: torch.nn.Module, args: tuple) -> None:
            receive(layer, args[0])
            if layer == highest:
                raise _HighestReached

        return hook

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            hooks.callback(lm.memory(layer).register_forward_pre_hook(watch(layer)).remove)
        with contextlib.suppress(_HighestReached):
            lm.model(input_ids=ids, use_cache=False)


# Differs: the authors' code begins its prefixes with an end-of-text token, which not every model begins its texts with.
# After a blank line each of these words begins a sentence in any model of English; with no blank line before them they
# would be the first token of the text, after which the embedded model goes on incoherently.
LEAD = "\n\n"
OPENINGS = ("The", "In", "Some", "When", "It", "People", "After", "We", "There", "For")
PREFIX_CHOICES = 5  # tokens among which each next one is drawn, as in the authors' code


def sample_prefixes(lm: LanguageModel, lengths: Sequence[int], seed: int = 0) -> tuple[str, ...]:
    """A sentence for each of `lengths` (in tokens), sampled from the model; each ends with a full stop and a blank.

    The sentence is as the model would go on after a common word, broken off at its length. It depends on the seed and
    on its own place in the list, not on the other sentences.
    """
    if not lengths:
        return ()
    lead = len(lm.tokenizer(LEAD)["input_ids"])
    starts = [lm.tokenizer(LEAD + OPENINGS[place % len(OPENINGS)])["input_ids"] for place in range(len(lengths))]
    draws = torch.stack([uniform(lead + max(lengths), "prefix", seed, place) for place in range(len(lengths))])
    texts = continue_randomly(lm, starts, draws, PREFIX_CHOICES)
    return tuple(
        as_sentence(lm.tokenizer.decode(text[: lead + length], skip_special_tokens=True))
        for text, length in zip(texts, lengths, strict=True)
    )


def as_sentence(text: str) -> str:
    """`text` in one line, ended by a full stop and a blank; a character cut in half at its end is dropped."""
    return " ".join(text.replace("\ufffd", "").split()).rstrip(" .,;:!?-") + ". "


def k_star(
    lm: LanguageModel, fact: Fact, layer: int, key: str = "both", prefixes: Sequence[str] = ()
) -> Float[Tensor, "H n"]:
    """The keys of `fact` that an edit at `layer` maps to v*: inputs of W at the subject's last token (Appendix A).

        averaged: k* = 1/N sum_j k(prefix_j + prompt), the paper's
        bare:     k* = k(prompt)
        opening:  k* = k(prompt from its subject on), see `texts_of`
        both:     bare and averaged
        all:      bare, opening and averaged

    Args:
        prefixes: the N prefixes, such as `sample_prefixes` makes; only the bare key does without any.

    Returns: (H, n) float32, a key in each column, in the order given here.

    Raises:
        ValueError: `key` is none of these, there are no prefixes to average over, or a text is too long.
    """
    if key not in KEYS:
        raise ValueError(f"k_star: key is {key!r}; expected one of {', '.join(map(repr, KEYS))}.")
    return torch.cat([one_key(lm, fact, layer, part, prefixes) for part in PARTS[key]], dim=1)


def one_key(lm: LanguageModel, fact: Fact, layer: int, part: str, prefixes: Sequence[str] = ()) -> Float[Tensor, "H n"]:
    """(H, 1) float32: the "bare", "opening" or "averaged" key of `k_star`; (H, 0) where there is no opening one."""
    if texts := texts_of(lm, fact, part, prefixes):
        return subject_keys(lm, layer, texts).mean(0)[:, None].float()
    return torch.zeros(key_size(lm, layer), 0)


def texts_of(lm: LanguageModel, fact: Fact, part: str, prefixes: Sequence[str] = ()) -> list[Prompt]:
    """The texts that the "bare", "opening" or "averaged" key of `k_star` is the mean over.

    The opening key is of a text that begins with the subject; there is none where the subject would be its first token. A
    model whose texts have no first token of their own sees such a subject without anything before it, and its keys are
    others than in the midst of a text. The first token itself is left alone: it has nearly the same key in every text.
    """
    if part == "opening":
        opened = read_prompt(lm, replace(fact, template=fact.template[fact.template.index("{}") :]))
        return [] if opened.subject_range == (0, 1) else [opened]
    if part == "averaged" and not prefixes:
        raise ValueError(
            f"k_star: the key {part!r} averages over prefixes, but none are given; give some or use 'bare'."
        )
    return [read_prompt(lm, fact, prefix=prefix) for prefix in (prefixes if part == "averaged" else [""])]


def subject_keys(lm: LanguageModel, layer: int, prompts: Sequence[Prompt]) -> Float[Tensor, "N H"]:
    """(N, H) float64 on the CPU: each prompt's key at its subject's last token; no layer above `layer` is run."""
    ids, lasts = padded(prompts)
    k: list[Tensor] = []  # (N, H), once the run has come to `layer`

    def keep(layer: int, inputs: Tensor) -> None:
        inputs = inputs.view(*ids.shape, -1)  # OPT hands over (B * T, H)
        k.append(inputs[range(len(prompts)), lasts].cpu().double())

    run_to_keys(lm, ids, [layer], keep)
    lm.check_finite(k[0], "k_star")
    return k[0]


@torch.no_grad()
def subject_states(lm: LanguageModel, layer: int, prompts: Sequence[Prompt]) -> Float[Tensor, "N D"]:
    """(N, D) float64 on the CPU: what block `layer` makes of each prompt's last subject token; no block above is run."""
    lm.check_mode()
    ids, lasts = padded(prompts)
    h: list[Tensor] = []  # (N, D)

    def keep(states: Tensor) -> None:
        h.append(states[range(len(prompts)), lasts].cpu().double())
        raise _HighestReached

    with output_changed(lm.blocks[layer], keep), contextlib.suppress(_HighestReached):
        lm.model(input_ids=ids.to(lm.device), use_cache=False)
    lm.check_finite(h[0], "subject_states")
    return h[0]


def padded(prompts: Sequence[Prompt]) -> tuple[Tensor, list[int]]:
    """(N, T) token ids, and each prompt's last subject token. Padding right of a text cannot reach it in a causal model."""
    ids = torch.nn.utils.rnn.pad_sequence([prompt.ids for prompt in prompts], batch_first=True)
    return ids, [prompt.subject_range[1] - 1 for prompt in prompts]
