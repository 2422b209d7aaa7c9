"""How to edit, and where: `EditSettings`, `LeastSquares`, and the defaults of models that are known by name.

PARTS, KEYS             the choices of the key
EditSettings            how v* is found
LeastSquares            how a change is solved for that writes it
default_settings(lm)    layer and settings of the model
known_as(lm)            the name by which tables of defaults list it
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from rome_lab.base import check_whole
from rome_lab.models import LanguageModel

PARTS = {  # what each choice of the key is made of, the averaged key last
    "all": ("bare", "opening", "averaged"),
    "both": ("bare", "averaged"),
    "averaged": ("averaged",),
    "bare": ("bare",),
}
KEYS = tuple(PARTS)
OBJECTIVES = ("scale-free", "published")


@dataclass(frozen=True)
class EditSettings:
    """How to edit; the published values by default, but for the key, the objective and its steps.

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
        objective: "scale-free" or "published", see `rome_lab.editing.values.Objective`.
        clamp: greatest length of the change, in lengths of the original value.
        enough: mean probability of the target from which on v* counts as converged.
        early_stop: end the search as soon as every text's most probable continuation is the target (Gupta et al. 2025,
            ENCORE, arXiv 2502.01636), at a step whose loss is the least so far.
        anchor: length that v* is scaled to, see `rome_lab.editing.optima.mean_length`; a v* of more than twice this length
            is left out (Liu et al. 2026, NAS, arXiv 2602.02543). None leaves v* as it is.

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
    objective: str = "scale-free"
    clamp: float = 4.0
    enough: float = 0.5
    early_stop: bool = False
    anchor: float | None = None

    def __post_init__(self) -> None:
        if self.key not in KEYS:
            raise ValueError(f"EditSettings: key is {self.key!r}; expected one of {', '.join(map(repr, KEYS))}.")
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"EditSettings: objective is {self.objective!r}; expected one of {', '.join(map(repr, OBJECTIVES))}."
            )
        check_whole("EditSettings", seed=(self.seed, 0), steps=(self.steps, 1))
        check_whole("EditSettings", **{f"prefix_lengths[{i}]": (x, 1) for i, x in enumerate(self.prefix_lengths)})
        if isinstance(self.prefixes, str) or not all(isinstance(prefix, str) for prefix in self.prefixes or ()):
            raise ValueError(f"EditSettings: prefixes is {self.prefixes!r}; expected a list of texts.")
        for name in ("learning_rate", "kl", "weight_decay", "clamp", "enough"):
            value, positive = getattr(self, name), name in ("learning_rate", "clamp")
            if not (isinstance(value, int | float) and 0 <= value < float("inf")) or (positive and value == 0):
                expected = "above 0" if positive else "of at least 0"
                raise ValueError(f"EditSettings: {name} is {value!r}; expected a finite number {expected}.")
        if self.anchor is not None and not (isinstance(self.anchor, int | float) and 0 < self.anchor < float("inf")):
            raise ValueError(f"EditSettings: anchor is {self.anchor!r}; expected a finite length above 0, or None.")
        object.__setattr__(self, "prefix_lengths", tuple(self.prefix_lengths))
        object.__setattr__(self, "prefixes", None if self.prefixes is None else tuple(self.prefixes))

    @property
    def start(self) -> str:
        """The key whose value v* starts from: "averaged", or "bare" where that is the only one."""
        return PARTS[self.key][-1]


CONSTRAINTS = ("exact", "soft")


@dataclass(frozen=True)
class LeastSquares:
    """How a change dW is solved for that gives keys K what they lack, R, and leaves others alone; by default as in ROME.

        exact:  the least tr(dW C dWT) with dW K = R;  soft:  the least weight tr(dW C dWT) + |dW K - R|^2
        in a null space of C, with keys K_p of earlier edits, both with |dW K_p|^2 + ridge |dW|^2 instead of tr(dW C dWT)

    Attributes:
        constraints: "exact" or "soft".
        weight: lambda, of soft constraints, in the units of C, a mean of k kT over tokens.
        threshold: of the eigenvalues of C that make up the null space (AlphaEdit); None for the whole space, in which keys
            of earlier edits count no more than others.
        ridge: L2, in the null space.

    Raises:
        ValueError: one of them is out of its range.
    """

    constraints: str = "exact"
    weight: float = 1.0
    threshold: float | None = None
    ridge: float = 1.0

    def __post_init__(self) -> None:
        if self.constraints not in CONSTRAINTS:
            raise ValueError(f'LeastSquares: constraints is {self.constraints!r}; expected "exact" or "soft".')
        for name in ("weight", "threshold", "ridge"):
            value = getattr(self, name)
            if not (
                isinstance(value, int | float) and 0 < value < float("inf") or (name, value) == ("threshold", None)
            ):
                raise ValueError(f"LeastSquares: {name} is {value!r}; expected a finite number above 0.")

    @property
    def is_exact(self) -> bool:
        return self.constraints == "exact"


TWENTY = (5,) * 10 + (10,) * 10  # lengths of the authors' prefixes


@dataclass(frozen=True)
class Default:
    """Where and how to edit a model, unless the user says otherwise.

    Attributes:
        layer: None where a causal trace of the fact is to find it.
        settings: of the edit.
        layers: of edits that change several; none where they are to end at `layer`.
        weight: lambda of MEMIT; None for as much as a key has components.
        ridge: L2 of AlphaEdit, by default the published one.
    """

    layer: int | None = None
    settings: EditSettings = field(default_factory=EditSettings)
    layers: tuple[int, ...] = ()
    weight: float | None = None
    ridge: float = 10.0


PAPERS_OWN = EditSettings(key="averaged", prefix_lengths=TWENTY, steps=20, objective="published")
# Layers and numbers of the papers' authors; the layer of smollm2-135m is the best of notebooks/search.ipynb, at which its
# layers end; those and its weight were not searched; its ridge is the best of eight configurations of `SEARCH` over the 20
# cases that are set apart.
DEFAULTS = {
    "gpt2-medium": Default(8, replace(PAPERS_OWN, clamp=3.0)),
    "gpt2-large": Default(12, PAPERS_OWN),
    "gpt2-xl": Default(17, PAPERS_OWN, (13, 14, 15, 16, 17), 20_000.0),
    "gpt-j-6b": Default(5, PAPERS_OWN, (3, 4, 5, 6, 7, 8), 15_000.0),
    "smollm2-135m": Default(3, EditSettings(key="all", weight_decay=0.1), (1, 2, 3), 100.0, 1.0),
}
MOST_LAYERS = 5  # that an edit of several changes where none are known, as in GPT-2 XL


def solution_of(name: str, lm: LanguageModel, size: int) -> LeastSquares:
    """How "memit", "emmet" or "alphaedit" solves for a change, by default; `size` is H.

    The threshold of AlphaEdit is the published one, and so is its ridge where `DEFAULTS` has no other.
    """
    if name == "memit":
        return LeastSquares("soft", weight=default_settings(lm).weight or float(size))
    if name == "alphaedit":
        return LeastSquares("soft", threshold=2e-2, ridge=default_settings(lm).ridge)
    return LeastSquares()


def default_settings(lm: LanguageModel) -> Default:
    """The entry of `DEFAULTS` for the model; other models get no layer."""
    return DEFAULTS.get(known_as(lm), Default())


def known_as(lm: LanguageModel) -> str:
    """The name by which tables of defaults list a model: the last part of its own, in small letters."""
    return lm.name.rsplit("/", 1)[-1].lower()
