"""Language models and where their parts are.

`load_model` finds weights (embedded, on a hub, in a folder); `LanguageModel` holds a decoder-only transformer with its
tokenizer and names the parts that causal tracing and editing act on, the same way for every family.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import torch
import transformers
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from rome_lab import embedded
from rome_lab.allocation import keep_freed_memory
from rome_lab.layouts import find_layout
from rome_lab.products import check_choice, choose_products, precisions
from rome_lab.store import check_writable, explained
from rome_lab.weights import device_of, every_weight, is_offloaded

if TYPE_CHECKING:
    from rome_lab.edits import Edit


class LanguageModel:
    """A decoder-only language model in memory, with its tokenizer and the places of its parts.

    Args:
        model: any causal language model of a family in `rome_lab.layouts.LAYOUTS`; it is put in evaluation mode.
        tokenizer: its tokenizer, a fast one, since subjects are found by character offsets.
        name: what to call it in reports; the configuration's own name by default.

    Raises:
        ValueError: the parts are not where any known family has them, or the attention kernel takes no explicit mask.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"LanguageModel: {type(tokenizer).__name__} gives no character offsets, which finding the subject's "
                "tokens needs; load the fast tokenizer, AutoTokenizer.from_pretrained(..., use_fast=True)."
            )
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.layout = find_layout(model)
        self.blocks: list[nn.Module] = list(attrgetter(self.layout.blocks)(model))
        self.job: Thread | None = None  # what a panel does with the model beside the kernel's own thread
        self.edits: list[Edit] = []
        self.unedited: dict[int, torch.Tensor] = {}  # by layer: W as it was before the edits in force
        # What `load_model` got, but for where the weights go and how products are computed: others load it by that.
        self.origin: dict[str, object] | None = None
        self.room = float("inf")  # bytes that a batch may take, as rome_lab.memory has learnt since memory ran out
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        attention = getattr(model.config, "_attn_implementation", "eager")
        if attention not in ("sdpa", "eager"):
            raise ValueError(
                f"LanguageModel: attention {attention!r} takes no explicit mask, which exact tracing needs; "
                'call model.set_attn_implementation("sdpa") (or "eager") first.'
            )

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
    def context_length(self) -> int:
        """Most tokens that the model can read."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2**31)

    def attn(self, layer: int) -> nn.Module:
        """Module whose output is a, the attention's contribution to the residual stream at `layer`."""
        return attrgetter(self.layout.attn)(self.blocks[layer])

    def mlp(self, layer: int) -> nn.Module:
        """Module whose output is m, the MLP's contribution to the residual stream at `layer`."""
        return attrgetter(self.layout.mlp)(self.blocks[layer])

    def feed_forward(self, layer: int) -> nn.Module | None:
        """The MLP at `layer`, which is given (B, T, D); None where it is no module, see `Layout`."""
        path = self.layout.feed_forward
        return attrgetter(path)(self.blocks[layer]) if path else None

    def memory(self, layer: int) -> nn.Module:
        """Module of the matrix W of Appendix A at `layer`; its input is the key k."""
        return attrgetter(self.layout.memory)(self.blocks[layer])

    def memory_name(self, layer: int) -> str:
        """Path from the model to that module."""
        return f"{self.layout.blocks}.{layer}.{self.layout.memory}"

    def memory_is_transposed(self, layer: int) -> bool:
        """Whether the stored weight is (in, out), as in GPT-2's Conv1D, instead of (out, in)."""
        return isinstance(self.memory(layer), Conv1D)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits (..., V) of last-block outputs (..., D), as and where the model's own forward makes them."""
        for path in self.layout.tail:
            module = attrgetter(path)(self.model)
            if module is not None:
                hidden = module(hidden)
        logits = self.model.get_output_embeddings()(hidden).to(self.device)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration and every weight, computed afresh: an edited model has another fingerprint."""
        digest = hashlib.sha256(json.dumps(architecture(self.model), sort_keys=True, default=str).encode())
        for name, tensor in every_weight(self.model):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def key(self) -> dict[str, object]:
        """What this model and this process's arithmetic contribute to the key of a stored result."""
        return {
            "weights": self.fingerprint,
            "tokenizer": hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "dtype": str(self.dtype),
            "matmul": list(precisions()),
            "versions": [torch.__version__, transformers.__version__],
        }

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
            self.tokenizer.save_pretrained(whole)
            whole.rename(folder)

    def check_length(self, length: int, doing: str) -> None:
        """Raise a ValueError where a text of so many tokens is more than the model can read."""
        most = self.context_length
        if length > most:
            raise ValueError(f"{doing}: {length} tokens are more than the {most} of {self.name}; shorten it.")

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


def architecture(model: PreTrainedModel) -> dict[str, object]:
    """The configuration without what says nothing about the function computed: names, versions and dtype."""
    incidental = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
    return {key: value for key, value in model.config.to_dict().items() if key not in incidental}


def best_device() -> torch.device:
    """CUDA where there is one, then MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_hub() -> None:
    """Raise a ValueError where anything from the Hugging Face hub would come by another way than HTTPS."""
    if not constants.ENDPOINT.startswith("https://"):
        raise ValueError(f"the hub's address, {constants.ENDPOINT} (HF_ENDPOINT), is not HTTPS; correct it.")


def load_model(
    name: str = embedded.NAME,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    *,
    products: str | None = None,
    device_map: str | Mapping[str, str | int | torch.device] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    unsafe_weights: bool = False,
    remote_code: bool = False,
) -> LanguageModel:
    """Load a decoder-only language model.

    Args:
        name: "smollm2-135m" (embedded), a hub id such as "gpt2-xl", or a local folder.
        device: "auto" (CUDA, then MPS, then CPU) or a torch device.
        dtype: "float32", "bfloat16", "float16" or a torch dtype. The two of 16 bits take half the memory. On random models
            of every family the probabilities of a trace are then within 0.05 and 0.006 of those of float32, and an edit
            meets W_hat k* = v* to a relative 3e-3 and 4e-4 (tests/test_precision.py); undoing it is exact all the same.
        products: "default" or "fast", how float32 matrix products are computed from now on, in the whole process; see
            `choose_products`. Left as it is by default.
        device_map: for a model that no one device holds, where its modules go: "auto" fills the GPUs, then the CPU's
            memory, then leaves the rest on disk; or a mapping from module names to devices, "cpu" and "disk" among them.
            What is not on a GPU is brought there to compute, or, where there is no GPU, to the CPU. `device` is not used.
        max_memory: for a device_map of "auto", how much each device may take, such as {0: "60GiB", "cpu": "200GiB"};
            less than there is leaves room for the texts.
        unsafe_weights: allow weights that are not safetensors; these are pickles, which can run code when read.
        remote_code: allow the repository's own Python code to run.

    Raises:
        ValueError: the name, device, dtype or choice of products is unknown, or the family is not supported.
        FileNotFoundError: the embedded model's package is not installed.
    """
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError("load_model: dtype must name a floating-point torch dtype, such as 'float32' or 'bfloat16'.")
    if device_map is not None and device != "auto":
        raise ValueError(f"load_model: device is {device!r} and device_map {device_map!r}; give only one of them.")
    if products is not None:
        check_choice(products)
    folder = str(embedded.folder()) if name == embedded.NAME else str(name)
    try:
        if not os.path.isdir(folder):
            check_hub()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
        options = {"dtype": dtype, "use_safetensors": None if unsafe_weights else True}
        places = {"device_map": device_map, "max_memory": max_memory and dict(max_memory)}
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote_code, **places, **options)
        if device_map is None:
            model = model.to(best_device() if device == "auto" else torch.device(device))
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(explain_failure(name, error, unsafe_weights)) from error
    is_folder = os.path.isdir(name)
    lm = LanguageModel(model, tokenizer, name=Path(name).name if is_folder else name)
    where = str(Path(name).resolve()) if is_folder else name
    trusted = {"unsafe_weights": unsafe_weights, "remote_code": remote_code}
    lm.origin = {"name": where, "dtype": dtype} | trusted
    if products is not None:
        choose_products(products, lm.device)
    if lm.device.type == "cpu":
        keep_freed_memory()
    return lm


def explain_failure(name: str, error: Exception, unsafe_weights: bool) -> str:
    """One sentence on why `name` could not be loaded and what to do."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if os.path.isdir(name):
        advice = "check that the folder holds config.json, a tokenizer and *.safetensors weights"
    else:
        advice = (
            f'give "{embedded.NAME}" (embedded, needs no network), a folder on this machine, '
            "or, when online, the exact id of a decoder-only model on the hub"
        )
    if not unsafe_weights:
        advice += " (older *.bin weights are pickles: unsafe_weights=True allows them)"
    return f"load_model: cannot load {name!r}: {reason} To do: {advice}."
