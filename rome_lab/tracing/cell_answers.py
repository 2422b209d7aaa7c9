"""What the model would say in the three runs behind one cell of a trace: the most probable next tokens.

    answers_at(lm, trace, token, layer)     the clean, the corrupted and the restored run of a cell, made again exactly

A Trace keeps one probability a cell. The runs are made again from its settings, with the same noise, and have to give the
probabilities that the trace holds: another model, or one that has been edited since, is refused.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace

import torch

from rome_lab.base import check_whole
from rome_lab.facts import Prompt, continuation_ids
from rome_lab.models import (
    Batching,
    LanguageModel,
    at_least_float32,
    enough_room,
    output_changed,
    precisions,
    run_block,
    suited_attention,
    text_bytes,
)
from rome_lab.tracing.corruption import GaussianNoise, SubjectSwap
from rome_lab.tracing.runs import Runs, TraceSettings, run_clean_and_corrupted
from rome_lab.tracing.sweep import Column, columns_of
from rome_lab.tracing.trace import Trace

RETRACE = "the trace is of another model, or of this one with other edits in force: trace again with this model"


@dataclass(frozen=True)
class RunAnswers:
    """What one run says next: the mean of the probabilities over its noise samples.

    Attributes:
        p_answer: probability of the trace's answer.
        rank: place of the answer among all tokens, 1 for the most probable one.
        top: (token, probability) of the most probable next tokens, the most probable one first.
    """

    p_answer: float
    rank: int
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class CellAnswers:
    """The three runs of one cell of a trace.

    Attributes:
        token, layer: the cell.
        answer: the token whose probability the trace follows.
        clean, corrupted, restored: what each run says.
    """

    token: int
    layer: int
    answer: str
    clean: RunAnswers
    corrupted: RunAnswers
    restored: RunAnswers


@torch.no_grad()
@enough_room("answers_at")
def answers_at(lm: LanguageModel, trace: Trace, token: int, layer: int, n: int = 5) -> CellAnswers:
    """The n most probable next tokens in the clean, the corrupted and the restored run of one cell (B.1, B.2).

    Args:
        trace: of this model as it is now, with Gaussian noise.
        token, layer: the cell, as in `trace.p_restored[token, layer]`.

    Raises:
        ValueError: there is no such cell; the trace is of another model, or of this one with other edits; its noise cannot
            be made again, since the trace was made with a `FixedNoise` or another corruption of one's own.
        MemoryError: the memory of the device does not suffice.
    """
    if trace.token is not None:
        raise ValueError("answers_at: it is for traces by token and layer; a trace of heads has no such cells.")
    n_tokens, n_layers = trace.p_restored.shape
    check_whole("answers_at", n=(n, 1), token=(token, 0), layer=(layer, 0))
    if token >= n_tokens or layer >= n_layers:
        raise ValueError(
            f"answers_at: there is no cell at token {token}, layer {layer}; the trace has {n_tokens} tokens and "
            f"{n_layers} layers, counted from 0."
        )
    corruption = SubjectSwap(trace.swapped) if trace.swapped else GaussianNoise(std=trace.noise_std)
    settings = TraceSettings(corruption, trace.samples, trace.window, trace.seed, direction=trace.direction)
    runs = same_answer(run_clean_and_corrupted(lm, same_prompt(lm, trace), None, settings), trace)
    column = columns_of(trace.kind, n_layers, trace.window)[layer]
    logits = [runs.recording.logits[:1], runs.recording.logits[1:], restored_logits(runs, trace, token, column)]
    clean, corrupted, restored = (run_answers(lm, rows, runs.answer_id, n) for rows in logits)
    check_same_clean_run(lm, trace, runs, clean.p_answer)
    check_same_noise(lm, trace, corrupted.p_answer)
    check_same_cell(lm, trace, token, layer, restored.p_answer)
    return CellAnswers(token, layer, trace.answer, clean, corrupted, restored)


def restored_layers(trace: Trace) -> list[tuple[int, int]]:
    """(first, last) of the layers that are restored in each column: a run of layers is clipped at the model's ends."""
    columns = columns_of(trace.kind, trace.p_restored.shape[1], trace.window)
    return [(column.first, column.last) for column in columns]


def same_prompt(lm: LanguageModel, trace: Trace) -> Prompt:
    """The trace's prompt as `lm` reads it, its subject where the trace has it, which a Fact may have placed.

    Raises:
        ValueError: the model cuts the text into other tokens, or has another number of layers.
    """
    ids = torch.tensor(lm.tokenizer(trace.prompt)["input_ids"], device=lm.device)
    prompt = Prompt(trace.prompt, trace.subject, ids, trace.subject_range)
    if prompt.tokens(lm) != tuple(trace.tokens):
        raise ValueError(f"answers_at: {lm.name} cuts the prompt into other tokens than the trace; {RETRACE}.")
    if trace.p_restored.shape[1] != lm.n_layers:
        raise ValueError(
            f"answers_at: {lm.name} has {lm.n_layers} layers and the trace {trace.p_restored.shape[1]}; {RETRACE}."
        )
    return prompt


def same_answer(runs: Runs, trace: Trace) -> Runs:
    """The runs, following the trace's answer where that is another token than the model's own; as they are where none is."""
    lm, text = runs.lm, trace.answer
    ids = [runs.answer_id, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]]
    ids += continuation_ids(lm, runs.prompt.text, text)[:1] if text.strip() else []
    token = next((i for i in ids if lm.tokenizer.decode([i]) == text), runs.answer_id)
    return replace(runs, answer_id=token)


def restored_logits(runs: Runs, trace: Trace, token: int, column: Column) -> torch.Tensor:
    """(S, V): the runs restored into, from the restored layer on, with the other run's values put in at one token."""
    lm, recording = runs.lm, runs.recording

    def finish(rows: range) -> torch.Tensor:
        samples = slice(rows.start, rows.stop)
        hidden = recording.states[column.depth][runs.base[samples]]  # (R, T, D)
        if trace.kind == "state":
            hidden[:, token] = recording.states[column.depth][runs.source[samples], token]
        for layer in range(column.depth, lm.n_layers):
            with ExitStack() as hooks:
                if trace.severed or trace.kind != "state" and layer <= column.last:
                    hooks.enter_context(module_held(runs, trace, token, layer, samples))
                hidden = run_block(lm, layer, hidden.to(recording.states[layer].device), recording, runs.base[samples])
        return at_least_float32(lm.logits(hidden[:, -1]))

    together = Batching(lm, "answers_at", text_bytes(lm, len(runs.prompt.ids)))
    with suited_attention(lm):
        return torch.cat(list(together.over(range(runs.settings.samples), finish)))


def module_held(runs: Runs, trace: Trace, token: int, layer: int, samples: slice) -> AbstractContextManager[None]:
    """Within the context, a module's output at the token is held: clean where restored, each run's own where severed."""
    lm, recording = runs.lm, runs.recording
    is_mlp = (trace.severed or trace.kind) == "mlp"
    outputs = (recording.mlp if is_mlp else recording.attn)[layer]
    value = outputs[(runs.base if trace.severed else runs.source)[samples], token]  # (R, D)

    def hold(output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output.view(len(value), -1, output.shape[-1])[:, token] = value
        return output

    return output_changed(lm.mlp(layer) if is_mlp else lm.attn(layer), hold)


def run_answers(lm: LanguageModel, logits: torch.Tensor, answer_id: int, n: int) -> RunAnswers:
    """What the rows (S, V) of one run say, in the mean."""
    p = logits.softmax(-1).cpu().double().mean(0)  # (V,)
    best, ids = p.topk(min(n, len(p)))
    tokens = (lm.tokenizer.decode([i]) for i in ids.tolist())
    rank = 1 + int((p > p[answer_id]).sum())
    return RunAnswers(float(p[answer_id]), rank, tuple(zip(tokens, best.tolist(), strict=True)))


def rounding(lm: LanguageModel) -> float:
    """How far two ways of computing one probability may lie apart."""
    exact = lm.dtype in (torch.float32, torch.float64) and not {"bf16", "tf32"} & {*precisions()}
    return 1e-4 if exact else 5e-2


def check_same_clean_run(lm: LanguageModel, trace: Trace, runs: Runs, p_clean: float) -> None:
    """Raise a ValueError where the model's own answer is not that of the trace."""
    answer = lm.tokenizer.decode([runs.answer_id])
    if answer != trace.answer or abs(p_clean - trace.p_clean) > rounding(lm):
        raise ValueError(
            f"answers_at: {lm.name} answers {answer!r} with p {p_clean:.4f}, and in the trace it is {trace.answer!r} with "
            f"p {trace.p_clean:.4f}; {RETRACE}."
        )


def check_same_noise(lm: LanguageModel, trace: Trace, p_corrupted: float) -> None:
    """Raise a ValueError where the corrupted runs are others than those of the trace."""
    if abs(p_corrupted - trace.p_corrupted) > rounding(lm):
        raise ValueError(
            f"answers_at: Gaussian noise of seed {trace.seed} gives p_corrupted {p_corrupted:.4f}, and the trace has "
            f"{trace.p_corrupted:.4f}; it was made with a FixedNoise or a corruption of your own, which a trace does not "
            "keep, so that its runs cannot be made again: trace with GaussianNoise to see what they say."
        )


def check_same_cell(lm: LanguageModel, trace: Trace, token: int, layer: int, p_restored: float) -> None:
    """Raise a ValueError where the restored run is another one than that of the trace."""
    traced = trace.p_restored[token, layer]
    if abs(p_restored - traced) > rounding(lm):  # NaN, where the trace left the token out, is no contradiction
        raise ValueError(
            f"answers_at: restoring token {token} at layer {layer} gives p {p_restored:.4f}, and the trace has "
            f"{traced:.4f}; {RETRACE}."
        )
