"""Training MEND and KE on facts of their own, and finding them again.

train_editor(lm, name)            a TrainedEditor: from the cache, or trained now; an interrupted training goes on
trained_editor(lm, training)      the same where it was trained, or else a NotTrainedError, which says how to
own_facts(lm)                     facts that no case to report is about
TrainedEditor                     the network, and what its training came to
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from rome_lab.base import (
    USER_CACHE,
    Json,
    OneLine,
    Record,
    Store,
    Tell,
    canonical_json,
    code_version,
    opened,
    seed_from,
)
from rome_lab.editing.hypernetworks import LEAST_TAUGHT, Slopes, Training, network_of, request_ids, slopes_of
from rome_lab.editing.requests import Request
from rome_lab.editing.target_texts import TargetTexts, record_texts
from rome_lab.facts import (
    Case,
    Fact,
    build_cases,
    facts_digest,
    known_facts,
    load_facts,
    question,
    shares_first_token,
)
from rome_lab.models import Change, LanguageModel

LOCAL = 2  # neighbours of each example that should stay as they are, besides one fact of another relation
KEPT_EVERY_S = 60  # what a killed training loses at most
CHECKS = 20  # how often in a training the facts kept aside are tried
HARSHER = 10.0  # how much more divergence KE is let have at first than in the end
NORMALISED = 100  # facts whose gradients say what mean and spread MEND takes for granted
RATES = 10.0  # how much faster MEND's rates are learned, which are few
RISE = 0.1  # how much KE's l grows in a step at twice the margin
SURE = 0.5
RESUMED = ("step", "seconds", "least", "best", "weight", "history", "losses")
HISTORY_COLUMNS = ("step", "seconds", "loss", "efficacy", "paraphrase", "locality", "divergence")


@dataclass(frozen=True, eq=False, repr=False)
class TrainedEditor(OneLine):
    """A network that was trained to edit one model.

    Attributes:
        training: how.
        history: a row each time that it was tried on the facts kept aside: step, seconds (of training until then), loss (of
            the steps before), efficacy, paraphrase (% of prompts at which every token of the target has more than half
            of the probability), locality (% of other prompts whose most probable token stays), divergence (there, in nats).
        best: the step whose network this is, that of the least loss on the facts kept aside.
        subjects: whom it was trained on, or chosen by.
    """

    training: Training
    network: nn.Module
    history: pd.DataFrame
    best: int
    subjects: frozenset[str]

    @property
    def outcome(self) -> pd.Series:
        """The row of the history that the network is of."""
        return self.history.set_index("step").loc[self.best]

    def __str__(self) -> str:
        row, minutes = self.outcome, self.history["seconds"].max() / 60
        return (
            f"{self.training.name}, trained for {minutes:.0f} minutes; of step {self.best} of its training: of facts kept "
            f"aside {row['efficacy']:.0f}% hold, {row['paraphrase']:.0f}% of paraphrases follow, "
            f"{row['locality']:.0f}% of other prompts stay"
        )

    @torch.no_grad()
    def change(self, lm: LanguageModel, request: Request) -> Change:
        """What the network makes of a request; `lm` is unchanged."""
        layers = self.training.layers_of(lm)
        fact, target = request
        texts = record_texts(lm, [question(lm, 0, fact.prompt, target)], layers[0], self.training.name)
        deltas = self.network(slopes_of(lm, texts, layers), embedded(lm, request))
        return Change.of(deltas)


def train_editor(
    lm: LanguageModel,
    training: str | Training = "mend",
    facts: Iterable[Fact] | None = None,
    *,
    store: Store | str | Path | None = USER_CACHE,
    progress: bool = True,
    tell: Tell | None = None,
) -> TrainedEditor:
    """Train MEND or KE to edit one model (a quarter of an hour on two cores for the embedded one), or find it trained.

        MEND:  c_e E + D;   KE:  E + l (D - margin), l >= 0 growing where D is above the margin, which narrows tenfold
        E = -log P[target | prompt, paraphrases], a mean over them;  D = KL(before || after) at other subjects' prompts

    Nothing is trained on that is about a subject of the facts that are kept aside, nor, with the default facts, about a
    subject of a case to report.

    Args:
        training: how; a name takes the defaults, see `Training`.
        facts: to learn from; by default `own_facts(lm)`.
        store: where the editor is kept, with all that determines it, and where a training that was interrupted goes on; None
            keeps nothing.
        progress: show a bar.
        tell: called with what is being done and how far it has come.

    Raises:
        ValueError: too few of the facts give a case; the training diverges; see also `network_of`.
        OSError: the store cannot be written; found before any work is done.
    """
    training = Training(training) if isinstance(training, str) else training
    facts = None if facts is None else tuple(facts)
    store = opened(store)
    if store:
        store.check_writable()
    with lm.overlay.only([]):
        inputs = editor_inputs(lm, training, facts)
        if store and (record := store.load(inputs)):
            return read_editor(lm, training, record)
        facts = own_facts(lm, store, progress) if facts is None else facts
        taught, aside = split_cases(lm, facts, training)
        course = Course(lm, training, taught, aside)
        if store and (record := store.load({**inputs, "what": "editor_training"})):
            course.take_up(record)
        run_course(course, inputs, store, progress, tell or (lambda doing, done: None))
        record = course.finished()
        if store:
            store.save(inputs, record.arrays, record.meta)
        return read_editor(lm, training, record)


class NotTrainedError(RuntimeError):
    """An editor is to be used that has not been trained for this model; the message says how to."""


def trained_editor(lm: LanguageModel, training: Training, store: Store | str | Path = USER_CACHE) -> TrainedEditor:
    """An editor trained on `own_facts`.

    Raises:
        NotTrainedError: there is none.
    """
    with lm.overlay.only([]):
        record = opened(store).load(editor_inputs(lm, training, None))
    if record is None:
        raise NotTrainedError(
            f"{training.name}: it is not trained for {lm.name} with these settings; run rl.train_editor(lm, "
            f'"{training.name}"), or `make editors`, or `python -m rome_lab train --model {lm.name}`.'
        )
    return read_editor(lm, training, record)


def editor_inputs(lm: LanguageModel, training: Training, facts: tuple[Fact, ...] | None) -> dict[str, Json]:
    """All that determines an editor."""
    digest = facts_digest(load_facts("embedded") if facts is None else facts)
    chosen = {"training": asdict(training), "facts": digest, "own": facts is None}
    return {**lm.identity().key(), "what": "editor", "code": code_version(__name__), **chosen}


def read_editor(lm: LanguageModel, training: Training, record: Record) -> TrainedEditor:
    network = network_of(lm, training)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in record.arrays.items()})
    history = pd.DataFrame(record.meta["history"], columns=list(HISTORY_COLUMNS)).astype({"step": int})
    return TrainedEditor(training, network.eval(), history, record.meta["best"], frozenset(record.meta["subjects"]))


def own_facts(lm: LanguageModel, store: Store | str | Path | None = None, progress: bool = True) -> tuple[Fact, ...]:
    """The embedded facts about subjects that the model knows no fact about: cases to report are made of the others."""
    facts = load_facts("embedded")
    known = {fact.subject for fact in known_facts(lm, facts, n=None, progress=progress, store=store)}
    return tuple(fact for fact in facts if fact.subject not in known)


def split_cases(lm: LanguageModel, facts: Sequence[Fact], training: Training) -> tuple[list[Case], list[Case]]:
    """Cases to learn from and cases kept aside, no prompt of the former about a subject of the latter."""
    cases = sorted(
        build_cases(varied(facts, training.seed)), key=lambda case: seed_from(canonical_json([training.seed, case.id]))
    )
    cases = [case for case in cases if not shares_first_token(lm, case) and fits(lm, case)]
    aside = cases[: max(1, min(training.facts, len(cases)) // 20)]
    spared = {case.fact.subject for case in aside}
    taught = [case for case in cases if not spared & {case.fact.subject, *case.neighbour_subjects}]
    taught = taught[: training.facts - len(aside)]
    if len(taught) < LEAST_TAUGHT:
        raise ValueError(
            f"{training.name}: {len(facts)} facts give {len(taught)} cases to learn from; give facts of relations with "
            f"several subjects to an object, enough for {LEAST_TAUGHT} cases."
        )
    return taught, aside


def fits(lm: LanguageModel, case: Case) -> bool:
    """Whether the model can read all of a case's prompts with the target."""
    prompts = (case.fact.prompt, *case.paraphrases, *case.neighbours)
    return all(len(question(lm, 0, prompt, case.target).text) <= lm.context_length for prompt in prompts)


def varied(facts: Sequence[Fact], seed: int) -> list[Fact]:
    """The facts, each with one of its templates."""

    def chosen(fact: Fact) -> str:
        templates = fact.templates or (fact.template,)
        return templates[seed_from(canonical_json([seed, "template", fact.subject])) % len(templates)]

    return [replace(fact, template=chosen(fact)) for fact in facts]


@dataclass(frozen=True, eq=False)
class Example:
    """One request as a network is trained on it: recorded once.

    Attributes:
        slopes, request: what the network is given.
        judged: the request's own text, its paraphrases, then prompts that should stay as they are.
        sizes: tokens of each target.
    """

    slopes: Slopes
    request: Float[Tensor, "S E"]
    judged: TargetTexts
    sizes: tuple[int, ...]

    def outcome(self, lm: LanguageModel, network: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean -log P of the targets; log P of each; the divergence at each other prompt; whether its first token stays."""
        deltas = network(self.slopes, self.request)
        log_p, after = self.judged.read(lm, Change.of(deltas))
        with torch.no_grad():
            before = self.judged.others_unchanged(lm)
        divergence = (before.exp() * (before - after)).sum(-1)
        stays = before.argmax(-1) == after.argmax(-1)
        return -log_p.sum() / len(self.sizes), log_p, divergence, stays


def example_of(lm: LanguageModel, case: Case, other: Case, training: Training) -> Example:
    """Args: other: a case of another relation, whose prompt should stay as it is."""
    layers, doing = training.layers_of(lm), training.name
    own, *paraphrased = (question(lm, 0, prompt, case.target) for prompt in (case.fact.prompt, *case.paraphrases))
    local = [question(lm, 0, prompt, case.target) for prompt in (*case.neighbours[:LOCAL], other.fact.prompt)]
    local = [replace(text, continuation=()) for text in local]
    slopes = slopes_of(lm, record_texts(lm, [own], layers[0], doing), layers)
    judged = record_texts(lm, [own, *paraphrased, *local], layers[0], doing)
    request = embedded(lm, (case.fact, case.target))
    return Example(slopes, request, judged, tuple(len(text.continuation) for text in (own, *paraphrased)))


def embedded(lm: LanguageModel, request: Request) -> Float[Tensor, "S E"]:
    """The embeddings of what KE reads, float32, on the CPU."""
    ids = torch.tensor(request_ids(lm, request), device=lm.device)
    return lm.embedding.weight.detach()[ids].float().cpu()


class Course:
    """A training as it goes on: the network, what it has come to, and the step that it is at."""

    def __init__(self, lm: LanguageModel, training: Training, taught: Sequence[Case], aside: Sequence[Case]) -> None:
        self.lm, self.training, self.taught, self.aside = lm, training, taught, aside
        self.network = network_of(lm, training)
        groups = [
            {"params": [x], "lr": training.learning_rate * (RATES if name == "log_rates" else 1.0)}
            for name, x in self.network.named_parameters()
        ]
        self.adam = torch.optim.Adam(groups)
        self.examples: dict[str, Example] = {}
        self.step, self.seconds, self.least, self.best = 0, 0.0, math.inf, 0
        self.weight = 0.0  # l of KE
        self.kept: dict[str, Tensor] = {}
        self.history: list[list[float | None]] = []
        self.losses: list[float] = []

    def example(self, case: Case) -> Example:
        """Recorded when it is first needed."""
        if case.id not in self.examples:
            others = [other for other in self.taught if other.fact.relation != case.fact.relation] or self.taught
            other = others[seed_from(case.id) % len(others)]
            self.examples[case.id] = example_of(self.lm, case, other, self.training)
        return self.examples[case.id]

    def begin(self) -> None:
        """Normalise by the first facts; a training that is taken up has done so."""
        if not self.step:
            self.network.normalise_by([self.example(case).slopes for case in self.taught[:NORMALISED]])

    def advance(self) -> None:
        """One step of Adam, over `batch` facts, which come in an order of their own in every round."""
        batch, n = self.training.batch, len(self.taught)
        parameters = list(self.network.parameters())
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for number in range(self.step * batch, (self.step + 1) * batch):
            order = np.random.default_rng([self.training.seed, number // n]).permutation(n)
            edits, _, divergence, _ = self.example(self.taught[order[number % n]]).outcome(self.lm, self.network)
            loss = self.loss(edits, divergence.mean())
            if not math.isfinite(loss.item()):
                raise ValueError(
                    f"{self.training.name}: the training diverges at step {self.step}; its loss is {loss.item()}. Lower "
                    f"learning_rate, which is {self.training.learning_rate}, or load the model in float32."
                )
            # Of the network's parameters only: the model's own are left alone.
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss / batch, parameters), strict=True):
                parameter.grad += gradient
            self.losses.append(loss.item())
            self.weight = max(0.0, self.weight + RISE / batch * (divergence.mean().item() / self.margin - 1))
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.adam.step()
        self.step += 1

    @property
    def margin(self) -> float:
        """Of KE's divergence: tenfold at first, and ever narrower."""
        return self.training.margin * HARSHER ** (1 - self.step / self.training.steps)

    def loss(self, edits: Tensor, divergence: Tensor) -> Tensor:
        """Of one fact."""
        if self.training.name == "mend":
            return self.training.edit_weight * edits + divergence
        return edits + self.weight * (divergence / self.margin - 1)

    @torch.no_grad()
    def try_aside(self) -> None:
        """A row of the history; the network of the least loss is kept."""
        rows = []
        for case in self.aside:
            example = self.example(case)
            edits, log_p, divergence, stays = example.outcome(self.lm, self.network)
            sure = [bool((part.exp() > SURE).all()) for part in log_p.split(example.sizes)]
            rows.append(
                [float(edits), float(divergence.mean()), sure[0], np.mean(sure[1:]), float(stays.double().mean())]
            )
        edits, divergence, efficacy, paraphrase, locality = np.mean(rows, axis=0)
        loss = self.training.edit_weight * edits + divergence
        shares = [100 * float(x) for x in (efficacy, paraphrase, locality)]
        trained = float(np.mean(self.losses)) if self.losses else None
        self.history.append([self.step, self.seconds, trained, *shares, float(divergence)])
        self.losses = []
        if loss < self.least:
            self.least, self.best = float(loss), self.step
            self.kept = {name: x.clone() for name, x in self.network.state_dict().items()}

    def record(self) -> Record:
        """All that it takes to go on from here."""
        adam = {
            f"adam.{place}.{name}": value
            for place, state in self.adam.state_dict()["state"].items()
            for name, value in state.items()
        }
        network = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        kept = {f"kept.{name}": value for name, value in self.kept.items()}
        arrays = {name: value.numpy().copy() for name, value in {**adam, **network, **kept}.items()}
        return Record(arrays, {name: getattr(self, name) for name in RESUMED})

    def take_up(self, record: Record) -> None:
        """Go on from a record of `record`."""
        arrays = {name: torch.from_numpy(array) for name, array in record.arrays.items()}
        parts: dict[str, dict[str, Tensor]] = {"adam": {}, "network": {}, "kept": {}}
        for name, array in arrays.items():
            kind, rest = name.split(".", 1)
            parts[kind][rest] = array
        self.network.load_state_dict(parts["network"])
        self.kept = parts["kept"]
        state: dict[int, dict[str, Tensor]] = {}
        for name, array in parts["adam"].items():
            place, kind = name.split(".")
            state.setdefault(int(place), {})[kind] = array
        self.adam.load_state_dict({"state": state, "param_groups": self.adam.state_dict()["param_groups"]})
        for name in RESUMED:
            setattr(self, name, record.meta[name])

    def finished(self) -> Record:
        """The editor."""
        subjects = sorted({case.fact.subject for case in (*self.taught, *self.aside)})
        meta = {"history": self.history, "best": self.best, "subjects": subjects}
        return Record({name: value.numpy() for name, value in self.kept.items()}, meta)


def run_course(course: Course, inputs: dict[str, Json], store: Store | None, progress: bool, tell: Tell) -> None:
    """Train to the last step, and save where it has come to every `KEPT_EVERY_S`."""
    training, unfinished = course.training, {**inputs, "what": "editor_training"}
    every = max(1, training.steps // CHECKS)
    course.begin()
    saved = began = time.monotonic()
    with tqdm(total=training.steps, initial=course.step, desc=f"training {training.name}", disable=not progress) as bar:
        while course.step < training.steps:
            if course.step % every == 0:
                course.try_aside()
            course.advance()
            bar.update()
            tell(f"Training {training.name}", course.step / training.steps)
            course.seconds, began = course.seconds + time.monotonic() - began, time.monotonic()
            if store and time.monotonic() - saved > KEPT_EVERY_S:
                record = course.record()
                store.save(unfinished, record.arrays, record.meta)
                saved = time.monotonic()
    course.try_aside()
