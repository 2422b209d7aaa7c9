"""The one identity of a model: which function it computes, and with which arithmetic.

Results are stored under its `key()`, workers compare that, and an edit knows its model by the `fingerprint`. What says
nothing about the function takes no part: names, notes, ids of special tokens, dropout, caching, how the tokenizer last
padded a text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from rome_lab.base import Json, canonical_json, visible
from rome_lab.models.process import precisions

# Fields of a configuration that the function computed in evaluation mode does not depend on, by the ends of their names:
# what is drawn in training only, what is asked of a forward, and what the weights themselves say (tied embeddings).
TRAINING = ("dropout", "_pdrop", "layerdrop", "initializer_range", "init_std", "initializer_factor", "aux_loss_coef")
ASKED_OF_A_FORWARD = (
    "_token_id",
    "use_cache",
    "output_attentions",
    "output_router_logits",
    "pretraining_tp",
    "auto_map",
)
HARMLESS = (*TRAINING, *ASKED_OF_A_FORWARD, "tie_word_embeddings")


@dataclass(frozen=True)
class Identity:
    """What determines a model's answers.

    Attributes:
        function: fields of the configuration that take part in the function computed.
        weights: SHA-256 of every weight.
        tokenizer: SHA-256 of how it cuts text into tokens.
        dtype: of the weights.
        products: how float32 matrix products are computed, see `choose_products`.
        versions: of torch and transformers.
        stops: tokens that end a text which the model writes.
        places: where its parts are: what counts as its MLP, say.
    """

    function: dict[str, Json]
    weights: str
    tokenizer: str
    dtype: str
    products: tuple[str, ...]
    versions: tuple[str, ...]
    stops: tuple[int, ...]
    places: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the function and the weights: the model, whatever reads its text and multiplies its matrices."""
        return hashlib.sha256(canonical_json([self.function, self.weights]).encode()).hexdigest()

    def key(self) -> dict[str, Json]:
        """What the model contributes to the inputs of a stored result."""
        return {
            "model": self.fingerprint,
            "tokenizer": self.tokenizer,
            "dtype": self.dtype,
            "matmul": list(self.products),
            "versions": list(self.versions),
            "stops": list(self.stops),
            "places": list(self.places),
        }


def identify(
    config: PreTrainedConfig,
    weights: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    stops: Iterable[int],
    places: tuple[str, ...],
) -> Identity:
    """The identity of what has these parts; every weight is read."""
    return Identity(
        function=function_of(config),
        weights=digest_of_weights(weights),
        tokenizer=digest_of_tokenizer(tokenizer),
        dtype=str(dtype),
        products=precisions(),
        versions=(torch.__version__, transformers.__version__),
        stops=tuple(sorted(stops)),
        places=places,
    )


def function_of(config: PreTrainedConfig) -> dict[str, Json]:
    """The fields that take part in the function: those that the family itself declares, but for `HARMLESS` ones.

    A configuration that comes with remote code, or is the caller's own, declares none reliably: all that it sets count.
    """
    values = config.to_dict()
    is_ours = type(config).__module__.startswith("transformers.")  # remote code is in transformers_modules
    declared = {field.name for field in fields(config)} if is_ours else set(values)
    common = {field.name for field in fields(PreTrainedConfig)}
    chosen: dict[str, Json] = {"model_type": config.model_type}
    for name in sorted(declared - common):
        if name in values and not name.startswith(("_", "summary_")) and not name.endswith(HARMLESS):
            part = getattr(config, name, None)
            chosen[name] = function_of(part) if isinstance(part, PreTrainedConfig) else values[name]
    return json.loads(json.dumps(chosen, default=str), parse_constant=str)  # JSON has no infinity


def digest_of_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of names, dtypes, shapes and every byte."""
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the tokenizer; how its last call padded and truncated says nothing about the next."""
    text = tokenizer.backend_tokenizer.to_str()
    for name in ("truncation", "padding"):  # they stand before the vocabulary, which takes long to parse
        begin = text.find(f'"{name}":')
        if begin >= 0:
            _, end = json.JSONDecoder().raw_decode(text, begin + len(f'"{name}":'))
            text = text[:begin] + text[end:]
    return hashlib.sha256(text.encode()).hexdigest()


def difference(made_on: dict[str, Json], now: dict[str, Json]) -> str:
    """Which fields of two functions differ, in words on one line; "" where none does."""
    names = [name for name in sorted(made_on.keys() | now.keys()) if made_on.get(name) != now.get(name)]
    # A name from a file may hold anything; a value is shown by its `repr`.
    return ", ".join(f"{visible(name)} is {now.get(name)!r}, not {made_on.get(name)!r}" for name in names)
