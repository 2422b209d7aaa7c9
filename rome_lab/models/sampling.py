"""Free text that a model writes.

generate(lm, changes, prompts)              under many changes at once, with the same luck for each of them
continue_randomly(lm, prompts, draws)       texts that go on from tokens as the model would, as it is
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from rome_lab.base import uniform
from rome_lab.models.batching import Batching, rows_at_once, text_bytes
from rome_lab.models.blocks import at_least_float32, last_logits_only
from rome_lab.models.changes import Change, side_by_side
from rome_lab.models.language_model import LanguageModel

IsWhole: TypeAlias = Callable[[int, int, str], bool]
"""Given the places of a change and of a prompt of its, and what is written behind that: whether it is enough."""
RUN = 256  # tokens of the vocabulary whose probabilities are summed before one of them is drawn


def generate(
    lm: LanguageModel,
    changes: Sequence[Change],
    prompts: Sequence[Sequence[str]],
    new_tokens: int = 50,
    top_k: int = 5,
    seed: int = 0,
    is_whole: IsWhole | None = None,
) -> list[list[str]]:
    """What the model writes after the prompts of each change under this change, side by side.

    Each next token is drawn from the `top_k` most probable ones at temperature 1, until `new_tokens` are written or the
    model ends the text. The draws depend on the seed, the prompt and its place alone, so every change meets the same ones.
    Prompts of all lengths share a batch without padding: while its prompt lasts, a row's next token is the prompt's.

    Args:
        prompts: for each change, those to write after.
        top_k: 1 is greedy generation; 5 is the authors'.
        is_whole: called with the change's place, the prompt's, and what is written behind it so far; where it returns True,
            no more is written. A text that is whole costs nothing more.

    Returns: for each change, for each of its prompts, the prompt and what follows it; the change's preamble is left out.

    Raises:
        ValueError: a prompt is too long for the model, or there is not a list of prompts for each change.
    """
    if len(prompts) != len(changes) or any(isinstance(own, str) for own in prompts):
        raise ValueError(
            f"generate: {len(changes)} changes need as many lists of prompts, but prompts is {prompts!r}; give [[...], ...]."
        )
    rows = [(owner, place, prompt) for owner, own in enumerate(prompts) for place, prompt in enumerate(own)]
    starts = [lm.tokenizer(changes[owner].preamble + prompt)["input_ids"] for owner, _, prompt in rows]
    longest = max(map(len, starts), default=0) + new_tokens
    if longest > lm.context_length:
        raise ValueError(
            f"generate: {new_tokens} tokens after a prompt of {longest - new_tokens} are more than {lm.name} reads, "
            f"{lm.context_length}; ask for fewer tokens."
        )
    luck = [uniform(new_tokens, "generation", seed, place, prompt) for _, place, prompt in rows]

    def write(part: range) -> list[list[int]]:
        prompt_ids = [starts[row] for row in part]
        if not new_tokens:
            return prompt_ids
        draws = torch.zeros(len(part), max(map(len, prompt_ids)) + new_tokens, dtype=torch.float64)
        for row, ids in zip(part, prompt_ids, strict=True):
            draws[row - part.start, len(ids) : len(ids) + new_tokens] = luck[row]

        def is_enough(row: int, text: list[int]) -> bool:
            owner, place, _ = rows[part[row]]
            if len(text) == len(prompt_ids[row]) + new_tokens:
                return True
            return is_whole is not None and is_whole(owner, place, text_after(lm, prompt_ids[row], text))

        with side_by_side(lm, changes, [rows[row][0] for row in part]) as owned:
            return continue_randomly(lm, prompt_ids, draws, top_k, is_enough, owned.keep)

    most = rows_at_once(lm.config.vocab_size, len(rows) or 1)  # each has logits of its own
    together = Batching(lm, "generate", text_bytes(lm, longest, cached=True), most)
    texts = [text for part in together.over(range(len(rows)), write) for text in part]
    written = [text_after(lm, *pair) for pair in zip(starts, texts, strict=True)]
    whole = iter(prompt + text for (*_, prompt), text in zip(rows, written, strict=True))
    return [[next(whole) for _ in own] for own in prompts]


def text_after(lm: LanguageModel, prompt: list[int], text: list[int]) -> str:
    """What `text` says after the tokens of `prompt`, with which it begins."""

    def decode(ids: list[int]) -> str:
        return lm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return decode(text)[len(decode(prompt)) :]


@torch.no_grad()
def continue_randomly(
    lm: LanguageModel,
    prompts: list[list[int]],
    draws: Tensor,
    top_k: int | None = None,
    is_whole: Callable[[int, list[int]], bool] | None = None,
    keep: Callable[[list[int]], object] | None = None,
) -> list[list[int]]:
    """Texts (B) that go on from `prompts` as the model would, at temperature 1, until it ends them.

    All texts grow together, a token at a time; while its prompt lasts, a text's next token is the prompt's. So prompts
    of any lengths share a batch without padding. A text that has ended leaves the batch.

    Args:
        draws: (B, T) uniform numbers in [0, 1); number t decides token t of a text of at most T tokens.
        is_whole: called with a text's place and tokens after each that is written; True ends the text.
        keep: called with the rows of the batch that stay in it, where others leave.
    """
    lm.check_mode()
    lm.check_length(draws.shape[1], "continue_randomly")
    texts = [prompt[:] for prompt in prompts]
    going, stops = list(range(len(texts))), lm.stops  # the text of each row
    place = min(map(len, prompts))
    ids, cache = torch.tensor([prompt[:place] for prompt in prompts], device=lm.device), None
    while going and place < draws.shape[1]:
        output = lm.model(ids, past_key_values=cache, use_cache=True, **last_logits_only(lm.model))
        cache, logits = output.past_key_values, at_least_float32(output.logits[:, -1])
        lm.check_finite(logits.sum(-1), "SampledText")  # no finite number where one of them is none
        drawn = draw(logits, draws[going, place], top_k).tolist()
        stay = []
        for row, number in enumerate(going):
            text = texts[number]
            if place < len(prompts[number]):
                drawn[row] = prompts[number][place]
            elif drawn[row] in stops:
                continue
            else:
                text.append(drawn[row])
                if is_whole is not None and is_whole(number, text):
                    continue
            stay.append(row)
        if 0 < len(stay) < len(going):
            # On the CPU, whose indices pick from the keys of layers on any device.
            cache.batch_select_indices(torch.tensor(stay, dtype=torch.long))
            if keep is not None:
                keep(stay)
        going = [going[row] for row in stay]
        ids = torch.tensor([drawn[row] for row in stay], device=lm.device)[:, None]
        place += 1
    return texts


def draw(logits: Tensor, uniform: Tensor, top_k: int | None) -> Tensor:
    """(B,) tokens: the first at which the cumulative probability of `logits` (B, V) exceeds `uniform` (B,).

    On the CPU from the softmax on, so that every device draws the same. Runs of tokens are looked through first, then the
    tokens of one run: a cumulative sum over the whole vocabulary would take a sixth of the time of sampling.
    """
    if top_k == 1:  # where two are alike, the one that is taken wherever the most probable token is asked for
        return logits.argmax(-1).cpu()
    p = at_least_float32(logits).softmax(-1).cpu()
    if top_k is not None and top_k < p.shape[-1]:
        p = p * (p >= p.topk(top_k).values[:, -1:])
    runs = torch.nn.functional.pad(p, (0, -p.shape[-1] % RUN)).unflatten(-1, (-1, RUN))  # (B, V / RUN, RUN)
    run, into = first_above(runs.sum(-1), uniform)
    token, _ = first_above(runs[torch.arange(len(runs)), run], into)
    return run * RUN + token


def first_above(weights: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) places at which the cumulative sum of `weights` (B, N) first exceeds `share` (B,) of the whole, in float64.

    Returns: the places, whose weights are above 0, and (B,) how far into them the share reaches, in [0, 1).
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    sought = (share * cumulative[:, -1]).clamp_max(cumulative[:, -1] * (1 - 1e-15))[
        :, None
    ]  # rounding may reach the end
    place = torch.searchsorted(cumulative, sought, right=True)
    end, weight = cumulative.gather(1, place), weights.gather(1, place).double()
    into = (1 - (end - sought) / weight).clamp(0, 1 - 1e-15)
    return place[:, 0], into[:, 0]
