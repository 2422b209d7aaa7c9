"""Long use of one process: hundreds of edits, undos and traces; memory stays flat and the weights come back bit for bit."""

from __future__ import annotations

import gc
import os

import numpy as np
import psutil
import torch

from rome_lab import Fact, causal_trace, rome
from rome_lab.editing.settings import EditSettings
from rome_lab.models.language_model import LanguageModel
from tests.faults.outcome import Outcome, Setting
from tests.faults.work import load
from tests.tiny import known

WARM_UP = 0.2  # of the rounds
GROWTH = 4 << 20  # bytes by which the process may have grown since the warm-up, whatever the number of rounds
SETTINGS = EditSettings(prefixes=("It is. ", "In all of it. "), steps=3)


def use_for_long(setting: Setting) -> list[Outcome]:
    """Edit, trace, undo and trace again, `rounds` times."""
    outcome = Outcome("edits and undos, and as many traces")
    lm = load(setting.model)
    C = torch.eye(lm.memory(1).weight.shape[1])
    facts = known(lm)
    original = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    sizes: list[tuple[int, int]] = []
    for number in setting.rounds_of(outcome, setting.rounds):
        use(lm, facts[number % len(facts)], C, number)
        outcome.tried += 1
        sizes.append(in_use())
    changed = [name for name, weight in lm.model.state_dict().items() if not torch.equal(weight, original[name])]
    outcome.expect(not changed, f"weights that are not what they were: {', '.join(changed[:3])}")
    if sizes:
        judge(outcome, np.array(sizes[int(WARM_UP * len(sizes)) :]))
    return [outcome]


def use(lm: LanguageModel, fact: Fact, C: torch.Tensor, number: int) -> None:
    """One edit, one trace while it is in force, and its undoing."""
    edit = rome(lm, fact, f"number {number}", 1 + number % 2, C=C, hparams=SETTINGS, progress=False)
    edit.apply(lm)
    causal_trace(lm, fact.prompt, fact.subject, kind=("state", "mlp", "attn")[number % 3], samples=3)
    edit.undo(lm)


def in_use() -> tuple[int, int]:
    """Bytes of the process in memory, and objects that live."""
    gc.collect()
    return psutil.Process(os.getpid()).memory_info().rss, len(gc.get_objects())


def judge(outcome: Outcome, sizes: np.ndarray) -> None:
    """Compare the medians of the first and the last quarter after the warm-up; `sizes` is (rounds, 2)."""
    quarter = max(1, len(sizes) // 4)
    grown, objects = (np.median(sizes[-quarter:], axis=0) - np.median(sizes[:quarter], axis=0)).astype(int)
    outcome.note = (
        f"grown by {grown / 1024:.0f} KB and {objects} objects between the first and last quarter after warm-up"
    )
    outcome.expect(grown <= GROWTH, f"the process grew by {grown} bytes, more than {GROWTH}")
    outcome.expect(objects <= len(sizes) // 2, f"{objects} objects more are alive than after the warm-up")
