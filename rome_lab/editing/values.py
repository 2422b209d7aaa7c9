"""Values: v*, what W has to say at the subject's last token for the model to go on with the target (Appendix A).

Only the tokens from the subject's last on, and only the layers from the edited one up, depend on the variable that is
optimised. So every text is run once and recorded; each step then drives those blocks on those tokens alone, with the
recorded keys and values standing for the rest, and makes logits only where they are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from rome_lab.base import OneLine
from rome_lab.editing.requests import Request
from rome_lab.editing.settings import EditSettings
from rome_lab.facts import continuation_ids, read_prompt
from rome_lab.models import (
    BY_HEAD,
    LanguageModel,
    Recording,
    causal_mask,
    check_recording,
    is_mask,
    log_p_of,
    output_changed,
    record_run,
    run_block,
    run_blocks,
)

TOGETHER = 16  # tokens whose most probable next ones are found at once, so that logits of large vocabularies fit
Callback = Callable[[Mapping[str, float]], bool | None]


@dataclass(frozen=True, eq=False, repr=False)
class Value(OneLine):
    """What the optimisation found.

    Attributes:
        delta: (D,), the change of what W says at the subject's last token: v* = W k* + delta.
        history: a row a step, step 0 before any change: step, loss, nll, kl, weight_decay, p_target (a mean over the
            prefixes), norm (|delta| in lengths of the original value). The terms add up to the loss.
        converged: whether `delta` makes the target probable enough.
    """

    delta: Float[Tensor, " D"]
    history: pd.DataFrame
    converged: bool


@dataclass(frozen=True, eq=False, repr=False)
class Suffixes(OneLine):
    """Texts recorded once, of which the tokens from the subject's last one on are run again, all in one batch.

    Attributes:
        recording: their run as the model is, each text shifted so that its subject ends in the same place. What is then
            left of a text is seen by none of its tokens.
        begin: that place.
    """

    recording: Recording
    begin: int

    def run(self, lm: LanguageModel, layer: int, delta: Tensor) -> Tensor:
        """(B, N, D): what the last block says at the suffixes, with `delta` (B, D) added to W k at their first tokens."""
        hidden = self.recording.states[layer][:, self.begin :]
        with output_changed(lm.memory(layer), lambda values: self.change(values, delta)):
            hidden = run_block(lm, layer, hidden, self.recording)
        return run_blocks(lm, range(layer + 1, lm.n_layers), hidden, self.recording)

    def change(self, values: Tensor, delta: Tensor) -> Tensor:
        """What W says, with `delta` added at the first token of every suffix."""
        changed = values.clone()
        changed.view(len(delta), -1, delta.shape[1])[:, 0] += delta.to(values)  # OPT hands over (B * T, D)
        return changed


def record_suffixes(lm: LanguageModel, texts: Sequence[Sequence[int]], begins: Sequence[int]) -> Suffixes:
    """Record texts of any lengths, each with the place of its subject's last token, in one run of the model."""
    begin = max(begins)
    length = begin + max(len(text) - place for text, place in zip(texts, begins, strict=True))
    lm.check_length(length, "rome: a prompt with its prefix and its target")
    # Padding right of a text cannot reach it in a causal model.
    ids = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts], device=lm.device)
    recording = record_run(lm, ids, lambda embedded: None)
    lm.check_finite(recording.states[-1], "rome")
    check_recording(lm, recording, "rome")
    return Suffixes(shifted(lm, recording, begin - torch.tensor(begins)), begin)


def shifted(lm: LanguageModel, recording: Recording, shifts: Tensor) -> Recording:
    """What `run_block` reads of a recording, every text moved right by its own number of places (B,).

    Masks hide what moves in from the left.
    """
    n, length = recording.states[0].shape[:2]
    # On the CPU, whose indices pick from tensors on any device.
    source = (torch.arange(length) - shifts[:, None]) % length  # (B, T): place before the shift
    rows, real = torch.arange(n)[:, None], source <= source[:, -1:]

    def moved(name: str, value: object) -> object:
        if is_mask(name, value, length):
            mask = (causal_mask(lm, length) if value is None else value)[0]  # (heads or 1, T, T)
            hidden = mask[:, :1, -1:]  # what says that a token is not seen, which differs among models
            seen = real[:, None, None].to(mask.device)
            return mask[:, source[:, :, None], source[:, None]].transpose(0, 1).where(seen, hidden)  # (B, ..., T, T)
        if name in BY_HEAD:  # they say how far keys are apart, which a shift leaves as it is
            return value
        if isinstance(value, torch.Tensor) and value.ndim > 1:
            return value[0][source]
        return tuple(moved("", x) for x in value) if isinstance(value, tuple) else value

    return replace(
        recording,
        states=[x[rows, source] for x in recording.states],
        attn=[],
        mlp=[],
        attention_keys=[x[rows, :, source].transpose(1, 2) for x in recording.attention_keys],
        attention_values=[x[rows, :, source].transpose(1, 2) for x in recording.attention_values],
        arguments=[{name: moved(name, x) for name, x in given.items()} for given in recording.arguments],
    )


class Objective:
    """The loss as a function of delta, for each of several requests; the texts of all of them are run together.

        loss = -1/N sum_j log P[target | prefix_j + prompt] + kl KL(P' || P) + weight_decay |delta|^2 / |v|^2

    All tokens of the target count. P' and P are the next-token distributions after "{subject} is a" with and without
    delta; v is the original value, W k*. The bare prompt is one of the N texts.

    That is the objective "scale-free": its decay has no unit, so that 0.5 means the same in every model. "published" is that
    of the authors' code, which divides log P by the number of the target's tokens, reads the KL at the subject's last token,
    and decays by |delta| / |v|^2, which depends on the scale of v and is next to nothing where v is long.

    Args:
        originals: (M, D) v of each request.
        settings: with the prefixes that were sampled.
    """

    def __init__(
        self,
        lm: LanguageModel,
        layer: int,
        requests: Sequence[Request],
        originals: Float[Tensor, "M D"],
        settings: EditSettings,
    ) -> None:
        self.lm, self.layer, self.settings = lm, layer, settings
        self.start = torch.zeros(originals.shape, dtype=torch.promote_types(torch.float32, lm.dtype), device=lm.device)
        self.lengths = originals.norm(dim=1).to(self.start)
        targets = [continuation_ids(lm, fact.prompt, target) for fact, target in requests]
        self.sizes = torch.tensor([len(ids) for ids in targets], device=lm.device)
        # First the texts with a target of all requests, then of each the text of the KL.
        prompts = [
            (owner, read_prompt(lm, fact, prefix=prefix), targets[owner])
            for owner, (fact, _) in enumerate(requests)
            for prefix in ("", *(settings.prefixes or ()))
        ]
        self.n_targets = len(prompts)
        for owner, (fact, _) in enumerate(requests):
            prompts.append((owner, read_prompt(lm, replace(fact, template="{} is a", templates=())), []))
        begins = [prompt.subject_range[1] - 1 for _, prompt, _ in prompts]
        texts = [[*prompt.ids.tolist(), *ids[:-1]] for _, prompt, ids in prompts]
        # The row of the batch and the place in the suffix of every token whose next one is asked for.
        first = [len(prompt.ids) - 1 for _, prompt, _ in prompts]
        if settings.objective == "published":
            for row in range(self.n_targets, len(prompts)):
                first[row], texts[row] = begins[row], texts[row][: begins[row] + 1]
        self.rows = [row for row, text in enumerate(texts) for _ in range(first[row], len(text))]
        self.places = [place - begins[row] for row, text in enumerate(texts) for place in range(first[row], len(text))]
        self.owners = torch.tensor([owner for owner, _, _ in prompts], device=lm.device)
        self.target_ids = torch.tensor([token for *_, ids in prompts for token in ids], device=lm.device)
        self.text_of = torch.tensor(self.rows[: len(self.target_ids)], device=lm.device)
        self.texts = record_suffixes(lm, texts, begins)
        with torch.no_grad():
            self.before = self.read_log_p(self.texts.recording.states[-1][:, self.texts.begin :])[1]

    def by_text(self, of_tokens: Float[Tensor, " N"]) -> Float[Tensor, "M T"]:
        """Sums over the tokens of each text's target, by request."""
        return of_tokens.new_zeros(self.n_targets).index_add(0, self.text_of, of_tokens).view(len(self.start), -1)

    def read_log_p(self, hidden: Tensor) -> tuple[Float[Tensor, "M T"], Float[Tensor, "M V"]]:
        """Log probabilities of the whole target behind each text, and of any token after the KL's texts."""
        log_p, essence = log_p_of(self.lm, hidden[self.rows, self.places], self.target_ids)
        return self.by_text(log_p), essence

    def __call__(self, delta: Float[Tensor, "M D"]) -> dict[str, Float[Tensor, " M"]]:
        """The loss of each request, its terms, and what the history says of each step."""
        hidden = self.texts.run(self.lm, self.layer, delta[self.owners])
        log_target, essence = self.read_log_p(hidden)
        published = self.settings.objective == "published"
        terms = {
            "nll": -log_target.mean(1) / (self.sizes if published else 1),
            "kl": self.settings.kl * (essence.exp() * (essence - self.before)).sum(1),
            "weight_decay": self.settings.weight_decay
            * (delta.norm(dim=1) if published else delta.square().sum(1))
            / self.lengths**2,
        }
        measured = {"p_target": log_target.exp().mean(1), "norm": delta.norm(dim=1) / self.lengths}
        if self.settings.early_stop:
            measured["done"] = self.says_target(hidden)
        return {"loss": sum(terms.values()), **terms, **measured}

    @torch.no_grad()
    def says_target(self, hidden: Tensor) -> Float[Tensor, " M"]:
        """1 where every token of the target is the most probable one behind every text, else 0."""
        states = hidden[self.rows, self.places][: len(self.target_ids)]
        best = torch.cat([self.lm.logits(part).argmax(-1) for part in states.split(TOGETHER)])
        return (self.by_text((best != self.target_ids).float()).sum(1) == 0).float()


def optimise_values(objective: Objective, progress: bool = True, callback: Callback | None = None) -> list[Value]:
    """Minimise the objective of each request by Adam, from no change, never further from it than the clamp allows.

    Args:
        callback: called with the row of a request's history at each step, of one request after the other; where it returns
            True, the search for its v* stops there.

    Returns: of each request the step with the least loss, marked as not converged where it leaves the target improbable.
        With `early_stop` it is the first one of the least loss so far at which every text's most probable continuation is
        the target.

    Raises:
        ValueError: a loss is NaN or infinite.
    """
    settings = objective.settings
    delta = objective.start.clone().requires_grad_()
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)
    histories: list[list[dict[str, float]]] = [[] for _ in delta]
    best, least, going = objective.start.clone(), [math.inf] * len(delta), list(range(len(delta)))
    for step in tqdm(range(settings.steps + 1), desc="v*", disable=not progress):
        with torch.enable_grad():
            terms = objective(delta)
            loss = terms["loss"].sum()
        numbers = {name: term.tolist() for name, term in terms.items()}
        for number in tuple(going):
            row = {"step": step} | {name: values[number] for name, values in numbers.items()}
            histories[number].append(row)
            if not math.isfinite(row["loss"]):
                raise ValueError(
                    f"rome: the loss is {row['loss']} at step {step} of v*, because {objective.lm.name} overflows or "
                    'its settings are too large; load it with dtype="float32", or lower the learning rate.'
                )
            if is_best := row["loss"] < least[number]:
                best[number], least[number] = delta[number].detach(), row["loss"]
            if (callback is not None and callback(row)) or (is_best and row.get("done")):
                going.remove(number)
        if step == settings.steps or not going:
            break
        (delta.grad,) = torch.autograd.grad(loss, [delta])
        adam.step()
        with torch.no_grad():
            delta.copy_(within(delta, settings.clamp * objective.lengths))
    return [value_of(x, pd.DataFrame(rows), settings.enough) for x, rows in zip(best, histories, strict=True)]


def value_of(delta: Float[Tensor, " D"], history: pd.DataFrame, enough: float) -> Value:
    """What a history came to."""
    reached = history.loc[history["loss"].idxmin(), "p_target"]
    return Value(delta, history, bool(reached >= enough))


def within(vectors: Float[Tensor, "M D"], lengths: Float[Tensor, " M"]) -> Float[Tensor, "M D"]:
    """`vectors`, each shortened to its length where it is longer."""
    return vectors * (lengths / vectors.norm(dim=1).clamp_min(1e-30)).clamp_max(1)[:, None]
