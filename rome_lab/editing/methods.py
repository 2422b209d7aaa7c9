"""Methods that make a model say something else, behind one interface: requests in, a Change out, the model unchanged.

Method, Proposal                       the interface, and the Change that comes of it
Rome, LayeredRome                      the ROME family, at one layer and at several
IdentityRome, MismatchedRome           ROME without what makes it exact
FineTuning, KnowledgeNeurons, Learned  the methods that it is compared with; Learned is MEND or KE
InContext, NoEdit                      no weight is changed
measured_on(method, text)              the same method with C measured on other text
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from rome_lab.base import Json, OneLine, blank_behind, code_version
from rome_lab.editing.editors import default_layers
from rome_lab.editing.exact import remarks_on
from rome_lab.editing.fine_tuning import Tuning, default_tuning, fine_tune
from rome_lab.editing.hypernetworks import Training
from rome_lab.editing.keys import key_size
from rome_lab.editing.knowledge_neurons import DEFAULT_NEURONS, Neurons, rewrite_neurons
from rome_lab.editing.many_layers import kept_at, write_values
from rome_lab.editing.optima import Optima, Optimum, Sought
from rome_lab.editing.remedies import prune, rect
from rome_lab.editing.requests import NothingToEdit, Request, check_agreement, check_layers
from rome_lab.editing.settings import EditSettings, LeastSquares, default_settings, known_as, solution_of
from rome_lab.editing.texts import SampledText, Source, source_of
from rome_lab.editing.update import Factor
from rome_lab.facts import facts_digest, load_facts
from rome_lab.models import Change, LanguageModel


@dataclass(frozen=True, eq=False, repr=False)
class Proposal(OneLine, Change):
    """The Change that a method makes of requests.

    Attributes:
        remark: what whoever reads the result should know, such as that v* did not converge; "" where there is nothing.
        failed: in a `rome_lab.studies.many_edits`: whether the last request could not be met; the remark says why.
        keys: by layer, (H, n) float32, what it gives values; AlphaEdit keeps them in later changes.
    """

    remark: str = ""
    failed: bool = False
    keys: Mapping[int, Float[Tensor, "H n"]] = field(default_factory=dict)

    def followed_by(self, other: Proposal) -> Proposal:
        """The sum of both; remark and failure are those of the other."""
        keys = {
            x: torch.cat([p.keys[x] for p in (self, other) if x in p.keys], dim=1) for x in {**self.keys, **other.keys}
        }
        return Proposal.of(
            added(self.deltas, other.deltas),
            preamble=self.preamble + other.preamble,
            remark=other.remark,
            failed=other.failed,
            keys=keys,
        )


def added(some: Mapping[int, Tensor], others: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Deltas of both by layer, those of one layer added up."""
    return {**some, **{x: some[x] + delta if x in some else delta for x, delta in others.items()}}


class Method(Protocol):
    """A way to make a model say something else.

    A method may leave choices to the model's defaults; `settled` makes them.

    Attributes:
        together: how many requests `evaluate` gives it at once. Where that is more than one, `many_edits` gives it all.
    """

    name: str
    together: int

    def settled(self, lm: LanguageModel) -> Method:
        """The same method with nothing left to choose for this model."""

    def describe(self) -> dict[str, Json]:
        """All that determines a settled method's Change, but for the model and the requests; name and together do not."""

    def change(self, lm: LanguageModel, requests: Sequence[Request], optima: Optima) -> Proposal:
        """The one Change that meets all requests; `lm` is unchanged."""


@dataclass(frozen=True)
class Rome:
    """ROME: the smallest change of W that maps the keys to v* (Appendix A, Eqn 17), of all requests at once.

        dW = Lambda (C^-1 K*)T,  Lambda = (V* - W K*) (K*T C^-1 K*)^-1

    It is what `rome` and `rome_many` make, without their Edit. v* is found once for all methods that start from the same
    value: W k* of the averaged k*, or of the bare one where that is the only key. Those differ in nothing but what they map
    to v* and how they measure the smallness of a change. What `rome` warns of is remarked on. Requests whose target the
    model says already are left out and remarked on; where none is left, there is no change (`Proposal.delta` is None).

    Attributes:
        key: one of `rome_lab.editing.settings.KEYS`, of which "averaged" is the paper's; by default that of the settings.
        layer, settings: by default those of `default_settings`.
        source: text that C is measured on.
        together: see `Method`.
        tokens: how many C is measured on; by default as many as `covariance` takes.
    """

    solution: ClassVar[str] = "exact"
    name: str = "rome"
    key: str | None = None
    layer: int | None = None
    settings: EditSettings | None = None
    source: Source = field(default_factory=SampledText)
    together: int = 1
    tokens: int | None = None

    def settled(self, lm: LanguageModel) -> Rome:
        """Raises a ValueError where no layer is known for the model, or it has no such layer."""
        default = default_settings(lm)
        layer = default.layer if self.layer is None else self.layer
        if layer not in range(lm.n_layers):
            raise ValueError(
                f"{self.name}: layer is {layer!r}; {lm.name} has the layers 0 to {lm.n_layers - 1}. Choose one, say where a "
                f'causal trace of MLP outputs has its peak: dataclasses.replace(METHODS["{self.name}"], layer=...).'
            )
        settings = self.settings or default.settings
        return replace(self, layer=layer, settings=settings, key=self.key or settings.key)

    def describe(self) -> dict[str, Json]:
        check_settled(self.name, self.layer, self.settings, self.key)
        settings = {name: value for name, value in asdict(self.settings).items() if name != "key"}
        C = {"source": self.source.describe(), "tokens": self.tokens}
        chosen = {"key": self.key, "layer": self.layer, "settings": settings, "C": C}
        return {"method": "rome", "code": code_version(__name__), "solution": self.solution, **chosen}

    def sought(self, request: Request) -> Sought:
        """What a settled method asks `Optima.find` for; the same in all methods that share v*."""
        return request, self.layer, replace(self.settings, key=replace(self.settings, key=self.key).start)

    def change(self, lm: LanguageModel, requests: Sequence[Request], optima: Optima) -> Proposal:
        method = self.settled(lm)
        settings = replace(optima.with_prefixes(method.settings), key=method.key)
        reached, remarks = [], []
        optima.prepare(map(method.sought, requests))
        for request in requests:
            try:
                reached.append(optima.find(*method.sought(request)))
            except NothingToEdit as reason:
                remarks.append(str(reason))
            else:
                remarks += remarks_on(lm, reached[-1], settings)
        proposal = method.proposal(lm, optima, reached, settings) if reached else Proposal()
        return replace(proposal, remark="; ".join(remarks))

    def proposal(
        self, lm: LanguageModel, optima: Optima, reached: Sequence[Optimum], settings: EditSettings
    ) -> Proposal:
        """What comes of a settled method and the v* of each request."""
        keys = [optima.k_star(optimum.request[0], self.layer, settings) for optimum in reached]
        delta = self.solve(lm, self.factor(lm, optima), keys, reached, settings)
        return Proposal(self.layer, delta.float())

    def factor(self, lm: LanguageModel, optima: Optima) -> Factor:
        """Of the matrix that measures the smallness of a change."""
        return optima.factor(self.layer, self.source, self.tokens)

    def solve(
        self,
        lm: LanguageModel,
        factor: Factor,
        keys: Sequence[Float[Tensor, "H n"]],
        reached: Sequence[Optimum],
        settings: EditSettings,
    ) -> Float[Tensor, "D H"]:
        """dW, float64, of the keys and v* of each request."""
        written = write_values(lm, (self.layer,), LeastSquares(), {self.layer: factor}, keys, reached, settings)
        return written.deltas[self.layer]


@dataclass(frozen=True)
class LayeredRome(Rome):
    """The one least squares at several layers: MEMIT, EMMET and AlphaEdit, with remedies as options; see `write_values`.

    Attributes:
        name: "memit", "emmet" or "alphaedit"; says which default of `squares` to take.
        key: as of ROME: "both" and "all" give v* to several keys of each fact at every layer, each with the states of its
            own texts.
        layers: whose W to change, the lowest first, of which `layer` is the last; by default that one alone, where it is
            given, or else those of `default_settings`, or those that end at its layer.
        squares: how each change is solved for; by default that of `solution_of`.
        rect: share of the entries of each change that RECT keeps; None for all.
        prune: base of the logarithm by which PRUNE compresses the sum of changes; None leaves it as it is.
    """

    solution: ClassVar[str] = "layers"
    together: int = 10
    layers: tuple[int, ...] | None = None
    squares: LeastSquares | None = None
    rect: float | None = None
    prune: float | None = None

    def __post_init__(self) -> None:
        if self.layers:
            object.__setattr__(self, "layer", self.layers[-1])
        if self.rect is not None and not 0 < self.rect <= 1:
            raise ValueError(f"{self.name}: rect is {self.rect!r}; expected a share above 0, up to 1, or None.")
        if self.prune is not None and not self.prune > 1:
            raise ValueError(f"{self.name}: prune is {self.prune!r}; expected a base above 1, or None.")

    def settled(self, lm: LanguageModel) -> LayeredRome:
        """Raises a ValueError where no layers are known for the model, or it has no such layers."""
        layers = self.layers or (default_layers(lm) if self.layer is None else (self.layer,))
        if not layers:
            raise ValueError(
                f"{self.name}: no layers are known for {lm.name}, which has 0 to {lm.n_layers - 1}. Choose some, say up "
                f'to the peak of a causal trace of MLP outputs: dataclasses.replace(METHODS["{self.name}"], layers=(...)).'
            )
        layers = check_layers(lm, layers, self.name)
        squares = self.squares or solution_of(self.name, lm, key_size(lm, layers[-1]))
        settled = super(LayeredRome, replace(self, layers=layers)).settled(lm)
        return replace(settled, squares=squares)

    def describe(self) -> dict[str, Json]:
        check_settled(self.name, self.layers, self.squares)
        options = {"layers": list(self.layers), **asdict(self.squares), "rect": self.rect, "prune": self.prune}
        return super().describe() | options

    def change(self, lm: LanguageModel, requests: Sequence[Request], optima: Optima) -> Proposal:
        check_agreement(requests, self.name)
        return self.finished(lm, super().change(lm, requests, optima))

    def factor(self, lm: LanguageModel, optima: Optima) -> Factor:
        """Of the last layer; all are measured."""
        return optima.factors_at(self.layers, self.source, self.tokens)[self.layer]

    def proposal(
        self, lm: LanguageModel, optima: Optima, reached: Sequence[Optimum], settings: EditSettings
    ) -> Proposal:
        factors = optima.factors_at(self.layers, self.source, self.tokens)
        kept = kept_at(lm, self.squares, factors, optima.earlier)
        keys = [optima.k_star(optimum.request[0], self.layers[0], settings) for optimum in reached]
        restraint = None if self.rect is None else partial(rect, share=self.rect)
        options = {"restraint": restraint, "doing": self.name}
        written = write_values(lm, self.layers, self.squares, kept, keys, reached, settings, **options)
        keys_of = {part.layer: part.k_star for part in written.parts}
        return Proposal.of({x: dW.float() for x, dW in written.deltas.items()}, keys=keys_of)

    def unfinished(self) -> LayeredRome:
        """The same without what is done to the sum of changes."""
        return replace(self, prune=None)

    def finished(self, lm: LanguageModel, total: Proposal) -> Proposal:
        """The sum of changes of `lm`, as it is without them, after PRUNE."""
        if self.prune is None or not total.deltas:
            return total
        deltas = {x: prune(delta, lm.weight(x), self.prune).float() for x, delta in total.deltas.items()}
        pruned = Change.of(deltas)
        return replace(total, layer=pruned.layer, delta=pruned.delta)


@dataclass(frozen=True)
class IdentityRome(Rome):
    """ROME with C replaced by the identity: the change of least Frobenius norm. What it loses is what C buys."""

    solution: ClassVar[str] = "identity"

    def factor(self, lm: LanguageModel, optima: Optima) -> Factor:
        return Factor(torch.eye(lm.weight(self.layer).shape[1], dtype=torch.float64))


@dataclass(frozen=True)
class MismatchedRome(Rome):
    """The update of the authors' published code, in which k* is averaged in one place and bare in two others.

        dW = Lambda uT,  u = C^-1 k_averaged / |C^-1 k_averaged|,  Lambda = delta / (uT k_bare)

    W_hat maps k_bare to W k_bare + delta, but in a direction that is not that of k_bare: the change is larger than it need
    be, and k_averaged, which the direction belongs to, misses its value. What it loses is what exactness buys.

    Differs: delta is that of the other methods, whose search starts from W k_averaged; the authors' starts from W k_bare.
    """

    solution: ClassVar[str] = "mismatched"

    def settled(self, lm: LanguageModel) -> MismatchedRome:
        """With both keys, whatever was chosen: the update has a place for each of them."""
        return replace(super().settled(lm), key="both")

    def change(self, lm: LanguageModel, requests: Sequence[Request], optima: Optima) -> Proposal:
        if len(requests) != 1:
            raise ValueError(
                f"{self.name}: the published update is of one fact, but {len(requests)} requests are given; give one, "
                "or make one change after the other with sequence()."
            )
        return super().change(lm, requests, optima)

    def solve(
        self,
        lm: LanguageModel,
        factor: Factor,
        keys: Sequence[Float[Tensor, "H n"]],
        reached: Sequence[Optimum],
        settings: EditSettings,
    ) -> Float[Tensor, "D H"]:
        bare, averaged = keys[0].double().cpu().T
        u = factor.solve(averaged[:, None].to(factor.lower.device))[:, 0].cpu()
        u = u / u.norm()
        delta = reached[0].v_star - lm.weight(self.layer).cpu().double() @ averaged
        Lambda = delta / (u @ bare)
        return torch.outer(Lambda, u)


@dataclass(frozen=True)
class FineTuning:
    """Fine-tuning of one W, on all requests at once: FT, or FT+L where the tuning has a bound; see `fine_tune`.

    Attributes:
        name: "ft" or "ft-linf"; says which default to take.
        tuning: by default that of `default_tuning`.
    """

    together: ClassVar[int] = 1
    name: str = "ft"
    tuning: Tuning | None = None

    def settled(self, lm: LanguageModel) -> FineTuning:
        return replace(self, tuning=self.tuning or default_tuning(lm, self.name))

    def describe(self) -> dict[str, Json]:
        check_settled(self.name, self.tuning)
        return {"method": "fine-tuning", "code": code_version(__name__), **asdict(self.tuning)}

    def change(self, lm: LanguageModel, requests: Sequence[Request], optima: Optima) -> Proposal:
        tuning = self.settled(lm).tuning
        return Proposal(tuning.layer, fine_tune(lm, requests, tuning).delta.float().cpu())


@dataclass(frozen=True)
class KnowledgeNeurons:
    """Knowledge neurons: value vectors of single neurons, in any layer, rewritten; see `rewrite_neurons`.

    Attributes:
        settings: of finding and rewriting them; by default `DEFAULT_NEURONS` for the model.
    """

    together: ClassVar[int] = 1
    name: str = "kn"
    settings: Neurons | None = None

    def settled(self, lm: LanguageModel) -> KnowledgeNeurons:
        return replace(self, settings=self.settings or DEFAULT_NEURONS.get(known_as(lm), Neurons()))

    def describe(self) -> dict[str, Json]:
        check_settled(self.name, self.settings)
        return {"method": "kn", "code": code_version(__name__), **asdict(self.settings)}

    def change(self, lm: LanguageModel, requests: Sequence[Request], optima: Optima) -> Proposal:
        settings = self.settled(lm).settings
        prefixes = optima.with_prefixes(EditSettings()).prefixes
        return Proposal.of(rewrite_neurons(lm, requests, prefixes, settings))


@dataclass(frozen=True)
class Learned:
    """A network that was trained to edit this model: MEND or KE; see `train_editor`. What it makes of requests adds up.

    Attributes:
        training: by default that of the name, of the user's cache.
    """

    together: ClassVar[int] = 1
    name: str = "mend"
    training: Training | None = None

    def settled(self, lm: LanguageModel) -> Learned:
        return replace(self, training=self.training or Training(self.name))

    def describe(self) -> dict[str, Json]:
        check_settled(self.name, self.training)
        about = {"facts": facts_digest(load_facts("embedded"))}  # of which it learns, see `own_facts`
        return {"method": "learned", "code": code_version(__name__), **asdict(self.training), **about}

    def change(self, lm: LanguageModel, requests: Sequence[Request], optima: Optima) -> Proposal:
        editor = optima.editor(self.settled(lm).training)
        deltas: dict[int, Tensor] = {}
        for request in requests:
            deltas = added(deltas, editor.change(lm, request).deltas)
        seen = sorted({fact.subject for fact, _ in requests} & editor.subjects)
        remark = f"{self.name} was trained on facts about {', '.join(map(repr, seen))}" if seen else ""
        return Proposal.of(deltas, remark=remark)


@dataclass(frozen=True)
class InContext:
    """The facts stated before every prompt, each as a sentence of its own: prompt, target, full stop.

    Attributes:
        introduction: words before each of these sentences, with the blank that parts them.
    """

    together: ClassVar[int] = 1
    name: str = "in-context"
    introduction: str = ""

    def settled(self, lm: LanguageModel) -> InContext:
        return self

    def describe(self) -> dict[str, Json]:
        return {"method": "in-context", "introduction": self.introduction}

    def change(self, lm: LanguageModel, requests: Sequence[Request], optima: Optima) -> Proposal:
        pairs = [(self.introduction + fact.prompt.rstrip(), target.strip()) for fact, target in requests]
        stated = [f"{prompt}{blank_behind(prompt)}{target}." for prompt, target in pairs]
        return Proposal(preamble="".join(f"{sentence} " for sentence in stated))


@dataclass(frozen=True)
class NoEdit:
    """Nothing is changed."""

    together: ClassVar[int] = 1
    name: str = "none"

    def settled(self, lm: LanguageModel) -> NoEdit:
        return self

    def describe(self) -> dict[str, Json]:
        return {"method": "none"}

    def change(self, lm: LanguageModel, requests: Sequence[Request], optima: Optima) -> Proposal:
        return Proposal()


def measured_on(method: Method, text: str | Path | Source) -> Method:
    """The same method with C, where it has one, measured on a Source, or what `source_of` makes of a name."""
    source = source_of(text) if isinstance(text, str | Path) else text
    return replace(method, source=source) if isinstance(method, Rome) else method


def check_settled(name: str, *choices: object) -> None:
    if None in choices:
        raise ValueError(f"{name}: a choice is left to the model's defaults; describe what settled(lm) returns.")
