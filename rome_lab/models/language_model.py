"""`LanguageModel`: a decoder-only transformer with its tokenizer, and the parts that causal tracing and editing act on.

They are named the same way for every family. What changes their weights lies over them as an overlay, see
`rome_lab.models.overlay`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from weakref import WeakSet

import torch
from jaxtyping import Float
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from rome_lab.base import check_writable, explained
from rome_lab.models.heads import find_heads
from rome_lab.models.identity import Identity, identify
from rome_lab.models.layouts import LAYOUTS, Layout, has
from rome_lab.models.overlay import Overlay, WeightChange
from rome_lab.models.process import precisions
from rome_lab.models.readiness import check_ids_fit, check_model, front_only, hooked, unwrapped
from rome_lab.models.structure import check_by_hand, find_layout
from rome_lab.models.tails import Readout, own_readout, readout_error, run_on_probe
from rome_lab.models.weights import device_of, every_weight, is_offloaded, product_error_of, read_weight

logger = logging.getLogger(__name__)

EDITABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class LanguageModel:
    """A decoder-only language model in memory, with its tokenizer and the places of its parts.

    Args:
        model: any decoder-only language model; it is put in evaluation mode, and taken out of what torch.compile made of it.
        tokenizer: its tokenizer, a fast one, since subjects are found by character offsets. What it puts behind every text
            is left out, since a prompt is to be gone on with.
        name: what to call it in reports; the configuration's own name by default.
        origin: what `load_model` got, but for where the weights go and how products are computed: other processes load
            the same model by that. None where it exists in memory only.
        layout: where its parts are; by default that of its family, or else what one run of the model shows.

    Raises:
        ValueError: the model has no such parts, cannot be traced as it is (see `rome_lab.models.readiness`), or its
            attention kernel takes no explicit mask.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str | None = None,
        origin: Mapping[str, object] | None = None,
        layout: Layout | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"LanguageModel: {type(tokenizer).__name__} gives no character offsets, which finding the subject's "
                "tokens needs; load the fast tokenizer, AutoTokenizer.from_pretrained(..., use_fast=True)."
            )
        self.model = model = unwrapped(model).eval()
        check_model(model)
        check_ids_fit(model, tokenizer)
        self.tokenizer_as_given = tokenizer
        self.tokenizer = front_only(tokenizer)
        if layout is not None and (lacking := layout.lacking(model)):
            raise ValueError(
                f"LanguageModel: the layout {layout.family!r} does not fit {type(model).__name__}: no {lacking}."
            )
        if layout is not None and layout not in LAYOUTS:
            check_by_hand(model, layout)
        self.layout = layout or find_layout(model)
        self.blocks: list[nn.Module] = list(attrgetter(self.layout.blocks)(model))
        self.origin = origin
        self.overlay = Overlay(self)
        self.sound: WeakSet[nn.Module] = WeakSet()  # matrices that `check_matrix` has passed
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self.check_attention()

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {self.layout.family} family, {self.n_layers} layers, {self.dtype})"

    @property
    def n_layers(self) -> int:
        """L, the number of blocks."""
        return len(self.blocks)

    @property
    def embedding(self) -> nn.Module:
        """Module whose output the noise of a corrupted run is added to."""
        return self.model.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        """Where token ids go in and logits come out."""
        return device_of(self.embedding)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def is_rounded(self) -> bool:
        """Whether its numbers, or those that matrix products are made of, have 16 bits only."""
        return self.dtype.itemsize <= 2 or bool({"bf16", "tf32"} & {*precisions()})

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of what reads text; in a model of several media it is a part of the whole one."""
        return self.model.config.get_text_config()

    @property
    def context_length(self) -> int:
        """Most tokens that the model can read."""
        names = ("max_position_embeddings", "max_seq_len")
        return int(next((x for x in (getattr(self.config, name, None) for name in names) if x), 2**31))

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end a text, and other special ones."""
        ends = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return frozenset(self.tokenizer.all_special_ids).union(ends if isinstance(ends, list) else [ends]) - {None}

    def attn(self, layer: int) -> nn.Module:
        """Module whose output is a, the attention's contribution to the residual stream at `layer`."""
        return attrgetter(self.layout.attn)(self.blocks[layer])

    def mlp(self, layer: int) -> nn.Module:
        """Module whose output is m, the MLP's contribution to the residual stream at `layer`."""
        return attrgetter(self.layout.mlp)(self.blocks[layer])

    def feed_forward(self, layer: int) -> nn.Module | None:
        """The MLP at `layer`, which can be given (B, 1, D) instead of (B, T, D); None where that is not known of the family.

        In Falcon, for one, what the MLP returns is added to in place, so that it cannot be one token's alone.
        """
        path = self.layout.feed_forward if self.layout in LAYOUTS else ""
        return attrgetter(path)(self.blocks[layer]) if path else None

    @cached_property
    def heads_out(self) -> list[nn.Module] | None:
        """By layer, the matrix that ends the attention; its input is the heads' values, one after the other.

        None in models whose heads cannot be told apart there, see `rome_lab.models.heads`.
        """
        return find_heads(self.model, self.blocks, self.is_rounded)

    @cached_property
    def sparse(self) -> frozenset[int]:
        """Layers whose MLP no one matrix ends: mixtures of experts."""
        path, blocks = self.layout.memory, enumerate(self.blocks)
        return frozenset(x for x, block in blocks if path is None or x in self.layout.sparse or not has(block, path))

    def memory(self, layer: int) -> nn.Module:
        """Module of the matrix W of Appendix A at `layer`; its input is the key k.

        Raises:
            ValueError: the layer has none, or it is packed: neither can be edited.
        """
        if layer in self.sparse:
            dense = sorted(set(range(self.n_layers)) - self.sparse)
            raise ValueError(
                f"layer {layer} of {self.name} cannot be edited: no one matrix ends its MLP, as in a mixture of experts, "
                "where an edit of one expert would hold only as long as the router chooses it; "
                + (f"edit one of the layers {', '.join(map(str, dense))}." if dense else "it can be traced.")
            )
        module = attrgetter(self.layout.memory)(self.blocks[layer])
        if module not in self.sound:
            self.check_matrix(layer, module)
            self.sound.add(module)
        return module

    def check_matrix(self, layer: int, module: nn.Module) -> None:
        """Raise a ValueError where what the module says is not W k, with a W of this layer's own."""
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or weight.dtype not in EDITABLE:
            kind = weight.dtype if isinstance(weight, torch.Tensor) else "no tensor"
            raise ValueError(
                f"layer {layer} of {self.name} cannot be edited: the weight of {self.memory_name(layer)} is packed "
                f"({type(module).__name__}, {kind}); load the model unquantised, say in bfloat16. It can be traced."
            )
        refusal = f"layer {layer} of {self.name} cannot be edited: {self.memory_name(layer)}"
        if module._parameters.get("weight") is not weight:
            raise ValueError(
                f"{refusal} computes its weight anew from other ones (a parametrisation), so that no change of it would "
                "last; make it a plain one first: torch.nn.utils.parametrize.remove_parametrizations. It can be traced."
            )
        others = (
            attrgetter(self.layout.memory)(self.blocks[x]) for x in set(range(self.n_layers)) - self.sparse - {layer}
        )
        if any(other is module or getattr(other, "weight", None) is weight for other in others):
            raise ValueError(
                f"{refusal} has its weight in common with another layer's, which an edit would change too. It can be traced."
            )
        error = product_error_of(module)
        if not error <= (5e-2 if self.is_rounded else 1e-3):
            raise ValueError(
                f"{refusal} ({type(module).__name__}) says something else than its weight times what it is given (by "
                f"{error:.0%}), as a quantised or adapted layer does; merge what is added to it, or load the model "
                "unquantised. It can be traced."
            )

    def memory_name(self, layer: int) -> str:
        """Path from the model to that module."""
        return f"{self.layout.blocks}.{layer}.{self.layout.memory}"

    def weight(self, layer: int) -> Float[torch.Tensor, "D H"]:
        """W of `layer` as it is stored, (out, in), to read."""
        stored = read_weight(self.memory(layer))
        return stored.T if self.memory_is_transposed(layer) else stored

    def memory_is_transposed(self, layer: int) -> bool:
        """Whether the stored weight is (in, out), as in GPT-2's Conv1D, instead of (out, in)."""
        return isinstance(self.memory(layer), Conv1D)

    def device_at(self, layer: int) -> torch.device:
        """Where block `layer` computes."""
        return device_of(next(x for x in self.blocks[layer].modules() if "weight" in x._parameters))

    @property
    def inner_width(self) -> int:
        """D + H: lengths of a state, and of what the MLP's last matrix is given, or of what stands for it."""
        width = self.config.hidden_size
        return width + (
            getattr(self.config, "intermediate_size", None) or getattr(self.config, "ffn_dim", None) or 4 * width
        )

    def check_attention(self) -> None:
        """Raise a ValueError where the attention's kernel takes no mask."""
        attention = getattr(self.model.config, "_attn_implementation", "eager")
        if attention not in ("sdpa", "eager"):
            raise ValueError(
                f"LanguageModel: attention {attention!r} takes no explicit mask, which exact tracing needs; "
                'call model.set_attn_implementation("sdpa") (or "eager") first.'
            )

    def check_mode(self) -> None:
        """Raise a ValueError where a run would not give the model's own numbers: in training mode, or under autocast."""
        self.check_attention()
        if self.model.training:
            raise ValueError(
                f"{self.name} is in training mode, in which no two runs are alike; call lm.model.eval() first."
            )
        if torch.is_autocast_enabled(self.device.type):
            raise ValueError(
                f"torch.autocast is on, so {self.name} would be run in another precision than {self.dtype}; leave it, or "
                'load the model with dtype="bfloat16".'
            )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits (..., V) of last-block outputs (..., D), as and where the model's own forward makes them."""
        return self.readout(hidden)

    @cached_property
    def readout(self) -> Readout:
        """How `logits` are made: by the modules of the layout's tail where that is all, else by the model's own forward.

        Raises:
            ValueError: neither gives what the model gives, in log probability; or what it gives is not a number.
        """
        errors = []
        for make in (lambda: self.plain_readout, lambda: own_readout(self))[not self.layout.tail :]:
            way = make()
            errors.append(readout_error(self, way))
            if errors[-1] <= 1:
                return way
        self.check_finite(run_on_probe(self)[1], "LanguageModel")
        raise ValueError(
            f"LanguageModel: {self.name} does something between its last block and its logits that rome_lab cannot repeat "
            f"(log probabilities differ by {min(errors):.0f} times what rounding explains)."
        )

    def plain_readout(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits by the modules of the layout's tail and the output embeddings."""
        for path in self.layout.tail:
            module = attrgetter(path)(self.model)
            if module is not None:
                hidden = module(hidden)
        logits = self.model.get_output_embeddings()(hidden).to(self.device)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @property
    def edits(self) -> list[WeightChange]:
        """The edits in force, in the order in which they were applied."""
        return list(self.overlay.changes)

    def identity(self, edited: bool = True) -> Identity:
        """What determines the model's answers; every weight is read for it, so ask once for many results.

        Args: edited: False for the model without the edits in force.
        """
        originals = {} if edited else {self.memory(x): W for x, W in self.overlay.originals.items()}
        weights = every_weight(self.model, originals)
        places = (self.layout.blocks, self.layout.attn, self.layout.mlp, self.layout.memory or "")
        for path in hooked(self.model):
            logger.warning(
                "The hook on %s takes no part in the identity of %s, nor in stored results.", path, self.name
            )
        return identify(self.model.config, weights, self.tokenizer, self.dtype, self.stops, places)

    def fingerprint(self) -> str:
        """SHA-256 of the function and every weight, computed afresh: an edited model has another fingerprint."""
        return self.identity().fingerprint

    def save_pretrained(self, folder: str | Path) -> None:
        """Save model and tokenizer, with the edits in force, as a new folder that plain transformers loads.

        Weights on disk are read in parts where `load_model` has put them there by a device_map; where accelerate was called
        otherwise, all of them are in memory at once while they are saved.

        Raises:
            FileExistsError: there is something in `folder` already.
            OSError: it cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"save_pretrained: {folder} is not empty; name a new folder.")
        check_writable(folder.parent)
        with explained(folder.parent), tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as scratch:
            whole = Path(scratch) / "model"
            # Of its own accord transformers reads what is offloaded only in models that it loaded by a device_map.
            unread = is_offloaded(self.model) and not hasattr(self.model, "hf_device_map")
            self.model.save_pretrained(whole, state_dict=dict(every_weight(self.model)) if unread else None)
            self.tokenizer_as_given.save_pretrained(whole)
            whole.rename(folder)

    def check_length(self, length: int, doing: str) -> None:
        """Raise a ValueError where a text of so many tokens is more than the model can read."""
        most = self.context_length
        if length > most:
            raise ValueError(f"{doing}: {length} tokens are more than the {most} of {self.name}; shorten it.")

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise a ValueError where a token that was added to the tokenizer has no embedding in the model."""
        if beyond := sorted({x for x in ids if x >= self.embedding.weight.shape[0]}):
            raise ValueError(
                f"the text holds {self.tokenizer.decode(beyond[:1])!r}, a token for which {self.name} has no embedding; "
                "write it without."
            )

    def check_finite(self, logits: torch.Tensor, doing: str) -> None:
        """Raise a ValueError that names the broken weight where `logits` hold NaN or infinity."""
        if torch.isfinite(logits).all():
            return
        broken = [name for name, weight in every_weight(self.model) if not torch.isfinite(weight).all()]
        where = f"the weights {', '.join(broken[:3])} hold NaN or infinity" if broken else "the activations overflow"
        raise ValueError(
            f"{doing}: {self.name} gives what is not a number, because {where}; "
            + ("load intact weights." if broken else 'load it with dtype="float32".')
        )
