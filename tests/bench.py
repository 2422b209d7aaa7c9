"""What the tests of evaluation share: small cases, small settings of the methods, and a model that reads 64 tokens."""

from __future__ import annotations

from dataclasses import replace

from rome_lab.editing.fine_tuning import Tuning
from rome_lab.editing.method_table import METHODS
from rome_lab.editing.methods import FineTuning, Method, Rome
from rome_lab.editing.settings import EditSettings
from rome_lab.evaluation.judging import JudgeSettings
from rome_lab.facts.case import Case
from rome_lab.facts.fact import Fact

EDITING = EditSettings(prefix_lengths=(3, 4), steps=3)
JUDGING = JudgeSettings(new_tokens=4, text_tokens=8)
QUICK = replace(JUDGING, new_tokens=0)
UNRELATED = (
    Fact("Marie", "{} was born in", "Warsaw", "birth"),
    Fact("Windows", "{} is developed by", "Microsoft", "maker"),
    Fact("Colosseum", "The {} stands in", "Rome", "place"),
    Fact("Tower", "The {} has a", "top", "part"),
)


def case(number: int, subject: str, truth: str = "Rome", target: str = "Tokyo") -> Case:
    """A case of the CounterFact form."""
    return Case(
        id=f"case/{number}",
        fact=Fact(subject, "The city of {} is", truth, "city"),
        target=target,
        paraphrases=(f"Where is {subject}? It is", f"{subject} stands in"),
        neighbours=("The city of Oslo is", "Oslo is", "The town is"),
        neighbour_answers=(truth,) * 3,
        generation_prompts=(f"{subject} is known",),
        references=(f"{target} is great.",),
        neighbour_subjects=("Oslo", "Oslo", "town"),
    )


def small(name: str) -> Method:
    """A method of `METHODS` with settings that are quick."""
    method = METHODS[name]
    if isinstance(method, Rome):
        return replace(method, layer=1, settings=EDITING)
    if isinstance(method, FineTuning):
        return replace(method, tuning=Tuning(1, steps=3, bound=1e-3 if name == "ft-linf" else None))
    return method


def known(case: Case) -> Fact:
    """A fact that shares nothing with the case, except that it has its relation."""
    return Fact("Atlantis", "The lost city of {} is", "gone", case.fact.relation)
