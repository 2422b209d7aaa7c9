"""How to edit, and where: `EditSettings`, and the defaults of models that are known by name.

PARTS, KEYS             the choices of the key
default_settings(lm)    layer and settings of the model
known_as(lm)            the name by which tables of defaults list it
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rome_lab.base import check_whole
from rome_lab.models import LanguageModel

PARTS = {  # what each choice of the key is made of, the averaged key last
    "all": ("bare", "opening", "averaged"),
    "both": ("bare", "averaged"),
    "averaged": ("averaged",),
    "bare": ("bare",),
}
KEYS = tuple(PARTS)


@dataclass(frozen=True)
class EditSettings:
    """How to edit; the published values by default, but for the key.

    Attributes:
        key: which keys are mapped to v*: "all", "both", "averaged" (the paper's) or "bare"; see
            `rome_lab.editing.keys.k_star`.
        prefix_lengths: tokens of each of the prefixes that are sampled from the model.
        prefixes: the prefixes themselves, where they are not to be sampled.
        seed: of the prefixes.
        steps: of Adam.
        learning_rate: of Adam.
        kl: factor of the divergence on "{subject} is a".
        weight_decay: factor of the squared length of the change, in lengths of the original value.
        clamp: greatest length of the change, in lengths of the original value.
        enough: mean probability of the target from which on v* counts as converged.

    Raises:
        ValueError: one of them is out of its range.
    """

    key: str = "both"
    prefix_lengths: tuple[int, ...] = (5,) * 5 + (10,) * 5
    prefixes: tuple[str, ...] | None = None
    seed: int = 0
    steps: int = 25
    learning_rate: float = 0.5
    kl: float = 0.0625
    weight_decay: float = 0.5
    clamp: float = 4.0
    enough: float = 0.5

    def __post_init__(self) -> None:
        if self.key not in KEYS:
            raise ValueError(f"EditSettings: key is {self.key!r}; expected one of {', '.join(map(repr, KEYS))}.")
        check_whole("EditSettings", seed=(self.seed, 0), steps=(self.steps, 1))
        check_whole("EditSettings", **{f"prefix_lengths[{i}]": (x, 1) for i, x in enumerate(self.prefix_lengths)})
        if isinstance(self.prefixes, str) or not all(isinstance(prefix, str) for prefix in self.prefixes or ()):
            raise ValueError(f"EditSettings: prefixes is {self.prefixes!r}; expected a list of texts.")
        for name in ("learning_rate", "kl", "weight_decay", "clamp", "enough"):
            value, positive = getattr(self, name), name in ("learning_rate", "clamp")
            if not (isinstance(value, int | float) and 0 <= value < float("inf")) or (positive and value == 0):
                expected = "above 0" if positive else "of at least 0"
                raise ValueError(f"EditSettings: {name} is {value!r}; expected a finite number {expected}.")
        object.__setattr__(self, "prefix_lengths", tuple(self.prefix_lengths))
        object.__setattr__(self, "prefixes", None if self.prefixes is None else tuple(self.prefixes))

    @property
    def start(self) -> str:
        """The key whose value v* starts from: "averaged", or "bare" where that is the only one."""
        return PARTS[self.key][-1]


TWENTY = (5,) * 10 + (10,) * 10  # lengths of the authors' prefixes


@dataclass(frozen=True)
class Default:
    """Where and how to edit a model, unless the user says otherwise.

    Attributes:
        layer: None where a causal trace of the fact is to find it.
        settings: of the edit.
    """

    layer: int | None = None
    settings: EditSettings = field(default_factory=EditSettings)


# Layers and numbers of the paper's authors; that of smollm2-135m is the best of notebooks/search.ipynb.
DEFAULTS = {
    "gpt2-medium": Default(8, EditSettings(prefix_lengths=TWENTY, clamp=3.0)),
    "gpt2-large": Default(12, EditSettings(prefix_lengths=TWENTY)),
    "gpt2-xl": Default(17, EditSettings(prefix_lengths=TWENTY)),
    "gpt-j-6b": Default(5, EditSettings(prefix_lengths=TWENTY)),
    "smollm2-135m": Default(3, EditSettings(key="all", weight_decay=0.1)),
}


def default_settings(lm: LanguageModel) -> Default:
    """The entry of `DEFAULTS` for the model; other models get no layer."""
    return DEFAULTS.get(known_as(lm), Default())


def known_as(lm: LanguageModel) -> str:
    """The name by which tables of defaults list a model: the last part of its own, in small letters."""
    return lm.name.rsplit("/", 1)[-1].lower()
