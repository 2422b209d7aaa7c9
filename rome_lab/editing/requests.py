"""What an edit is asked to do, and whether there is anything to do.

Request                            a fact, and what is to be said instead of its object
check_requests(lm, requests, ...)  raises where they are none that can be met; asks the model nothing
check_layers(lm, layers, doing)    the layers that are meant, ascending, as whole numbers
check_agreement(requests)          raises where two of them contradict each other
check_news(lm, request)            raises NothingToEdit where the model says the target already
layer_to_edit(lm, facts, layer)    the layer that is meant: given, known for the model, or found by a causal trace
effects_at_subject(lm, facts)      what that trace measures: MLP outputs restored at the subject's last token
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from rome_lab.editing.settings import default_settings
from rome_lab.facts import Fact, completions, continuation_ids, read_prompt
from rome_lab.models import LanguageModel, check_verified
from rome_lab.tracing import GaussianNoise, TraceSettings, restore, run_clean_and_corrupted

logger = logging.getLogger(__name__)

Request: TypeAlias = tuple[Fact, str]  # a fact, and what is to be said instead of its object


class NothingToEdit(ValueError):
    """There is nothing to write: the model says the target already, or norm control leaves v* out."""


def check_requests(lm: LanguageModel, requests: Sequence[Request], layer: int | None, doing: str = "rome") -> None:
    """Raise where there is nothing to edit, or no such layer; the model is not run. `doing` is how errors begin."""
    if not requests:
        raise ValueError(f"{doing}: there is nothing to edit; give at least one fact with its target.")
    if layer is not None and layer not in range(lm.n_layers):
        raise ValueError(f"{doing}: layer is {layer!r}; {lm.name} has the layers 0 to {lm.n_layers - 1}.")
    for fact, target in requests:
        if not isinstance(fact, Fact):
            raise TypeError(
                f"{doing}: the fact is {fact!r}; expected a Fact, such as "
                'Fact(subject="Eiffel Tower", template="The {} is located in the city of", object="Paris").'
            )
        if not isinstance(target, str) or not target.strip():
            raise ValueError(
                f"{doing}: the target is {target!r}; write what {lm.name} is to say after {fact.prompt!r}."
            )
    check_agreement(requests, doing)


def check_agreement(requests: Sequence[Request], doing: str = "rome") -> None:
    """Raise a ValueError where one prompt, or one subject in one relation, is to have two objects."""
    targets: dict[tuple[str, ...], Request] = {}
    for fact, target in requests:
        for about in [(fact.prompt,), *([(fact.subject, fact.relation)] if fact.relation else [])]:
            other, before = targets.setdefault(about, (fact, target))
            if before.strip() != target.strip():
                raise ValueError(
                    f"{doing}: the requests {other.prompt!r} -> {before!r} and {fact.prompt!r} -> {target!r} contradict "
                    "each other, since a subject has one object in a relation; leave one out, or edit one after the other."
                )


def check_layers(lm: LanguageModel, layers: Sequence[int], doing: str) -> tuple[int, ...]:
    """The layers as whole numbers.

    Raises:
        ValueError: there are none, they are not ascending, or the model has no such layers.
    """
    layers = tuple(layers)
    if not layers or not all(isinstance(x, int) and x in range(lm.n_layers) for x in layers):
        raise ValueError(f"{doing}: the layers are {layers}; {lm.name} has the layers 0 to {lm.n_layers - 1}.")
    if list(layers) != sorted(set(layers)):
        ascending = tuple(sorted(set(layers)))
        raise ValueError(f"{doing}: the layers are {layers}; give each once, the lowest first: {ascending}.")
    return layers


def check_news(lm: LanguageModel, request: Request) -> None:
    """Raise NothingToEdit where every token of the target is what the model would say anyway.

    Raises:
        ValueError: also where prompt and target are more than the model can read, or what it says is no finite number.
    """
    fact, target = request
    length = len(read_prompt(lm, fact).ids) + len(continuation_ids(lm, fact.prompt, target)) - 1
    lm.check_length(length, f"rome: {fact.prompt!r} with its target")
    (answer,) = completions(lm, [(fact.prompt, target)], "rome")
    if answer.greedy.all():
        raise NothingToEdit(
            f"rome: {lm.name} already goes on from {fact.prompt!r} with {target!r} (p {answer.p:.2f}), so there is nothing "
            "to edit; choose another target, or undo the edit in force (lm.edits) that makes it say so."
        )


def layer_to_edit(lm: LanguageModel, facts: Sequence[Fact], layer: int | None) -> int:
    """The layer that was given, or that of `DEFAULTS`, or, for other models, where a causal trace has its peak (logged).

    That is the layer at which restoring MLP outputs at the last subject token has most effect, averaged over the facts.
    """
    layer = default_settings(lm).layer if layer is None else int(layer)
    if layer is not None:
        return layer
    effects = effects_at_subject(lm, facts, progress=False).mean(axis=0)
    layer = int(effects.argmax())
    logger.warning(
        "rome: no layer is known for %s; a causal trace of MLP outputs at the last subject token has its peak at layer "
        "%d (indirect effect %.3f), which is used. Choose another with layer=; suggest_layer(lm) "
        "tries several.", lm.name, layer, effects[layer],
    )  # fmt: skip
    return layer


def effects_at_subject(lm: LanguageModel, facts: Sequence[Fact], progress: bool = True) -> Float[np.ndarray, "F L"]:
    """(F, L): the indirect effects of MLP outputs restored around each layer at the last subject token, see `causal_trace`.

    What is followed is what the model says after the fact's prompt, whatever its object is.
    """
    check_verified(lm, "causal_trace")
    settings = TraceSettings(GaussianNoise().measured(lm))
    effects = []
    for fact in tqdm(facts, desc="tracing", unit="fact", disable=not progress):
        prompt = read_prompt(lm, fact)
        last = prompt.subject_range[1] - 1
        trace = restore(run_clean_and_corrupted(lm, prompt, None, settings), "mlp", None, [last])
        effects.append(trace.indirect_effect[last])
    return np.array(effects)
