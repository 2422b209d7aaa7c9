"""The methods as they are compared, and the configurations that their settings are searched among.

METHODS            name -> Method: a row each of one table
methods_for(lm)    the names of those that are ready for a model: editors may not be trained for it
SEARCH             name -> as many configurations of each method that has something to choose, for the embedded model
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from rome_lab.editing.fine_tuning import Tuning
from rome_lab.editing.hypernetworks import TRAINED
from rome_lab.editing.knowledge_neurons import Neurons
from rome_lab.editing.methods import (
    FineTuning,
    IdentityRome,
    InContext,
    KnowledgeNeurons,
    LayeredRome,
    Learned,
    Method,
    MismatchedRome,
    NoEdit,
    Rome,
)
from rome_lab.editing.settings import EditSettings, LeastSquares
from rome_lab.editing.trained_editors import NotTrainedError, trained_editor
from rome_lab.models import LanguageModel

logger = logging.getLogger(__name__)

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        NoEdit(),
        Rome(),
        Rome("rome-averaged", key="averaged"),
        Rome("rome-bare", key="bare"),
        Rome("rome-both", key="both"),
        IdentityRome("rome-identity"),
        MismatchedRome("rome-mismatched"),
        Rome("joint", together=10),
        LayeredRome("memit"),
        LayeredRome("emmet"),
        LayeredRome("alphaedit"),
        KnowledgeNeurons(),
        *map(Learned, TRAINED),
        FineTuning("ft"),
        FineTuning("ft-linf"),
        InContext(introduction="Breaking news: "),
    )
}


def methods_for(lm: LanguageModel) -> list[str]:
    """The names of `METHODS` in their order, without editors that are not trained for the model, which is logged."""
    names = []
    for name, method in METHODS.items():
        try:
            if isinstance(method, Learned):
                trained_editor(lm, method.settled(lm).training)
        except NotTrainedError as reason:
            logger.warning("%s", reason)
        else:
            names.append(name)
    return names


INTRODUCTIONS = ("", "New fact: ", "Fact: ", "Note: ", "Remember: ", "Breaking news: ", "It is known: ", "Suppose: ")
SEARCH: Mapping[str, tuple[Method, ...]] = {
    "rome": tuple(
        Rome(layer=layer, settings=EditSettings(key="all", weight_decay=decay))
        for layer in (2, 3, 4, 6)
        for decay in (0.5, 0.1)
    ),
    "memit": tuple(
        LayeredRome("memit", layers=layers, squares=LeastSquares("soft", weight))
        for layers in ((1, 2, 3), (2, 3, 4, 5, 6))
        for weight in (10.0, 30.0, 100.0, 300.0)
    ),
    "emmet": tuple(
        LayeredRome("emmet", layers=layers, settings=EditSettings(key="all", weight_decay=decay))
        for layers in ((2, 3), (1, 2, 3), (2, 3, 4), (2, 3, 4, 5, 6))
        for decay in (0.5, 0.1)
    ),
    "alphaedit": tuple(
        LayeredRome("alphaedit", layers=(1, 2, 3), squares=LeastSquares("soft", threshold=threshold, ridge=ridge))
        for threshold in (2e-3, 2e-2)
        for ridge in (0.1, 1.0, 10.0, 100.0)
    ),
    "kn": tuple(
        KnowledgeNeurons(settings=Neurons(threshold, write=write))
        for threshold in (0.2, 0.4)
        for write in (0.5, 1.0, 2.0, 8.0)
    ),
    "ft": tuple(
        FineTuning("ft", Tuning(layer, learning_rate=rate)) for layer in (0, 3) for rate in (5e-4, 1e-3, 2e-3, 4e-3)
    ),
    "ft-linf": tuple(
        FineTuning("ft-linf", Tuning(layer, bound=bound)) for layer in (0, 3) for bound in (1e-3, 3e-3, 5e-3, 1e-2)
    ),
    "in-context": tuple(InContext(introduction=words) for words in INTRODUCTIONS),
}
