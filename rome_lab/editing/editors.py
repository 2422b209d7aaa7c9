"""Successors of ROME, which change several layers for many facts, by one solver.

memit, emmet, alphaedit          each as an Edit
edit_by(method, lm, requests)    the Edit of one of `EDITORS`, ROME among them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict, Unpack

from jaxtyping import Float
from torch import Tensor

from rome_lab.editing.edit import Edit
from rome_lab.editing.exact import news, rome_many, solved_edit
from rome_lab.editing.keys import key_size
from rome_lab.editing.requests import Request, check_layers, check_requests, layer_to_edit
from rome_lab.editing.second_moment import Covariance, TokensSeen
from rome_lab.editing.settings import (
    MOST_LAYERS,
    EditSettings,
    LeastSquares,
    default_settings,
    solution_of,
)
from rome_lab.editing.update import Factor
from rome_lab.editing.values import Callback
from rome_lab.models import LanguageModel


class EditOptions(TypedDict, total=False):
    """What all of them take, as `rome_many` does; C by layer."""

    C: Mapping[int, Float[Tensor, "H H"] | Covariance | Factor] | None
    tokens: int | None
    hparams: EditSettings | None
    progress: bool
    callback: Callback | None
    C_callback: TokensSeen | None


def memit(
    lm: LanguageModel,
    requests: Sequence[Request],
    layers: Sequence[int] | None = None,
    *,
    weight: float | None = None,
    **options: Unpack[EditOptions],
) -> Edit:
    """One Edit of several layers for many facts, with soft constraints (Meng et al. 2023, arXiv 2210.07229, Eqn 14).

        dW = R KT (weight C + K KT)^-1 at each layer, going up; see `rome_lab.editing.many_layers.write_values`

    Args:
        requests: pairs of a fact and its target.
        layers: whose W to change, the lowest first; by default those of `DEFAULTS`, or, for other models, the five that end
            where a causal trace of the facts has its peak.
        weight: lambda, how much other keys count; by default that of `DEFAULTS`, or the number of a key's components.
        options: as for `rome_many`; C is given by layer.

    Returns: an Edit. `lm` is unchanged, whatever happens. Edits in force on `lm` are taken as part of it.

    Raises:
        ValueError: as for `rome_many`; layers that are not ascending or not there; requests that contradict each other.
    """
    return edited("memit", lm, requests, layers, None if weight is None else LeastSquares("soft", weight), options)


def emmet(
    lm: LanguageModel,
    requests: Sequence[Request],
    layers: Sequence[int] | None = None,
    **options: Unpack[EditOptions],
) -> Edit:
    """The same with exact constraints (Gupta et al. 2024, arXiv 2403.14236): each key gets its value to float precision.

        dW = R (KT C^-1 K)^-1 KT C^-1 at each layer, going up

    At one layer it is `rome_many`.

    Raises:
        ValueError: as for `memit`; also where there are more keys than a layer can hold, naming its rank.
    """
    return edited("emmet", lm, requests, layers, None, options)


def alphaedit(
    lm: LanguageModel,
    requests: Sequence[Request],
    layers: Sequence[int] | None = None,
    *,
    threshold: float | None = None,
    ridge: float | None = None,
    **options: Unpack[EditOptions],
) -> Edit:
    """The same within the null space of C, which leaves other keys alone (Fang et al. 2025, arXiv 2410.02355).

        dW = R KT P (K_p K_pT P + K KT P + ridge I)^-1 at each layer, going up

    P projects on the eigenvectors of C whose eigenvalues are below the threshold; K_p are the keys of the edits in force.

    Args:
        threshold: by default the published one, 2e-2, or that of `DEFAULTS`.
        ridge: L2; by default the published one, 10, or that of `DEFAULTS`.

    Raises:
        ValueError: as for `memit`; also where no eigenvalue is below the threshold, saying which one leaves how much.
    """
    default = solution_of("alphaedit", lm, 1)
    threshold, ridge = default.threshold if threshold is None else threshold, default.ridge if ridge is None else ridge
    solution = LeastSquares("soft", threshold=threshold, ridge=ridge)
    return edited("alphaedit", lm, requests, layers, solution, options)


def edited(
    name: str,
    lm: LanguageModel,
    requests: Sequence[Request],
    layers: Sequence[int] | None,
    solution: LeastSquares | None,
    options: EditOptions,
) -> Edit:
    """What the three share: the checks, the layers, and the solver."""
    layers = None if layers is None else check_layers(lm, layers, name)
    check_requests(lm, requests, None, name)
    news(lm, requests)
    layers = layers or default_layers(lm) or layers_up_to(layer_to_edit(lm, [fact for fact, _ in requests], None))
    solution = solution or solution_of(name, lm, key_size(lm, layers[-1]))
    return solved_edit(lm, requests, layers, solution, **options, doing=name)


LAYERED_EDITORS = {editor.__name__: editor for editor in (memit, emmet, alphaedit)}
EDITORS = ("rome", *LAYERED_EDITORS)
"""Ways to make an Edit, by name."""


def edit_by(
    method: str, lm: LanguageModel, requests: Sequence[Request], layer: int | None, **options: Unpack[EditOptions]
) -> Edit:
    """The Edit of one of `EDITORS`; those that change several layers change the ones that end at `layer`.

    Raises: ValueError: there is no such method; else as for `memit`.
    """
    if method not in EDITORS:
        raise ValueError(f"edit: there is no method {method!r}; choose one of {', '.join(EDITORS)}.")
    if method == "rome":
        return rome_many(lm, requests, layer, **options)
    layers = None if layer is None else layers_that_end_at(lm, layer)
    return LAYERED_EDITORS[method](lm, requests, layers, **options)


def layers_that_end_at(lm: LanguageModel, layer: int) -> tuple[int, ...]:
    """The model's default layers where they end there, else as many up to it as `layers_up_to` gives."""
    default = default_layers(lm)
    return default if default and default[-1] == layer else layers_up_to(layer)


def default_layers(lm: LanguageModel) -> tuple[int, ...]:
    """The layers of `DEFAULTS`, or those that end at its layer; none where it has neither."""
    default = default_settings(lm)
    return default.layers or (() if default.layer is None else layers_up_to(default.layer))


def layers_up_to(last: int) -> tuple[int, ...]:
    """`MOST_LAYERS` layers that end there, or all from the first on.

    >>> layers_up_to(2)
    (0, 1, 2)
    """
    return tuple(range(max(0, last - MOST_LAYERS + 1), last + 1))
