"""Language models and where their parts are.

`load_model` finds weights (embedded, on a hub, in a folder); `LanguageModel` holds a decoder-only transformer with its
tokenizer and names the parts that causal tracing and editing act on, the same way for every family.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
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
from rome_lab.store import check_writable, explained

if TYPE_CHECKING:
    from rome_lab.edits import Edit


@dataclass(frozen=True)
class Layout:
    """Module paths of one family of decoder-only transformers.

    Attributes:
        family: name for messages.
        blocks: path from the model to the list of its blocks.
        attn, mlp: paths from a block to the modules whose outputs are added to the residual stream.
        memory: path from a block to the matrix that ends its MLP: W of Appendix A, whose input is the key k.
        tail: paths from the model to what stands between the last block and the output embeddings.
    """

    family: str
    blocks: str
    attn: str
    mlp: str
    memory: str
    tail: tuple[str, ...]


# The first layout all of whose paths exist is taken, so a layout comes before the ones whose paths it also has.
LAYOUTS = (
    Layout("GPT-2", "transformer.h", "attn", "mlp", "mlp.c_proj", ("transformer.ln_f",)),
    Layout("GPT-J", "transformer.h", "attn", "mlp", "mlp.fc_out", ("transformer.ln_f",)),
    Layout("GPT-NeoX", "gpt_neox.layers", "attention", "mlp", "mlp.dense_4h_to_h", ("gpt_neox.final_layer_norm",)),
    Layout(
        # Gemma2 normalises what its attention and its MLP say before adding it to the residual stream.
        "Gemma2",
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "mlp.down_proj",
        ("model.norm",),
    ),
    Layout("Llama, Qwen or Mistral", "model.layers", "self_attn", "mlp", "mlp.down_proj", ("model.norm",)),
    Layout(
        # OPT has no MLP module: its two matrices stand in the block itself.
        "OPT",
        "model.decoder.layers",
        "self_attn",
        "fc2",
        "fc2",
        ("model.decoder.final_layer_norm", "model.decoder.project_out"),
    ),
)


class LanguageModel:
    """A decoder-only language model in memory, with its tokenizer and the places of its parts.

    Args:
        model: any causal language model of a family in `LAYOUTS`; it is put in evaluation mode.
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
        return self.embedding.weight.device

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

    def memory(self, layer: int) -> nn.Module:
        """Module of the matrix W of Appendix A at `layer`; its input is the key k."""
        return attrgetter(self.layout.memory)(self.blocks[layer])

    def memory_is_transposed(self, layer: int) -> bool:
        """Whether the stored weight is (in, out), as in GPT-2's Conv1D, instead of (out, in)."""
        return isinstance(self.memory(layer), Conv1D)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Next-token logits (..., V) of last-block outputs (..., D), as the model's own forward makes them."""
        for path in self.layout.tail:
            module = attrgetter(path)(self.model)
            if module is not None:
                hidden = module(hidden)
        logits = self.model.get_output_embeddings()(hidden)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration and every weight, computed afresh: an edited model has another fingerprint."""
        digest = hashlib.sha256(json.dumps(architecture(self.model), sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
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
            "matmul": [torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision],
            "versions": [torch.__version__, transformers.__version__],
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Save model and tokenizer, with the edits in force, as a new folder that plain transformers loads.

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
            self.model.save_pretrained(whole)
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
        broken = [name for name, weight in self.model.named_parameters() if not torch.isfinite(weight).all()]
        where = f"the weights {', '.join(broken[:3])} hold NaN or infinity" if broken else "the activations overflow"
        raise ValueError(
            f"{doing}: {self.name} gives what is not a number, because {where}; "
            + ("load intact weights." if broken else 'load it with dtype="float32".')
        )


def architecture(model: PreTrainedModel) -> dict[str, object]:
    """The configuration without what says nothing about the function computed: names, versions and dtype."""
    incidental = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"}
    return {key: value for key, value in model.config.to_dict().items() if key not in incidental}


def find_layout(model: nn.Module) -> Layout:
    """The layout of `LAYOUTS` that fits `model`; a ValueError that names all that was looked for where none does."""
    for layout in LAYOUTS:
        try:
            blocks = attrgetter(layout.blocks)(model)
            for path in (layout.attn, layout.mlp, layout.memory):
                attrgetter(path)(blocks[0])
            attrgetter(layout.tail[0])(model)
        except (AttributeError, IndexError, TypeError):
            continue
        return layout
    looked = "; ".join(f"{x.family}: {x.blocks}[0] with {x.attn}, {x.mlp}, {x.memory}" for x in LAYOUTS)
    raise ValueError(
        f"LanguageModel: {type(model).__name__} is not a decoder-only model of a family that rome_lab knows. "
        f"Looked for {looked}. For another family, add a Layout to rome_lab.models.LAYOUTS."
    )


def best_device() -> torch.device:
    """CUDA where there is one, then MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_model(
    name: str = embedded.NAME,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    *,
    unsafe_weights: bool = False,
    remote_code: bool = False,
) -> LanguageModel:
    """Load a decoder-only language model.

    Args:
        name: "smollm2-135m" (embedded), a hub id such as "gpt2-xl", or a local folder.
        device: "auto" (CUDA, then MPS, then CPU) or a torch device.
        dtype: "float32", "bfloat16", "float16" or a torch dtype.
        unsafe_weights: allow weights that are not safetensors; these are pickles, which can run code when read.
        remote_code: allow the repository's own Python code to run.

    Raises:
        ValueError: the name, device or dtype is unknown, or the family is not supported.
        FileNotFoundError: the embedded model's package is not installed.
    """
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError("load_model: dtype must name a floating-point torch dtype, such as 'float32' or 'bfloat16'.")
    folder = str(embedded.folder()) if name == embedded.NAME else str(name)
    try:
        if not os.path.isdir(folder) and not constants.ENDPOINT.startswith("https://"):
            raise ValueError(f"the hub's address, {constants.ENDPOINT} (HF_ENDPOINT), is not HTTPS; correct it.")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
        options = {"dtype": dtype, "use_safetensors": None if unsafe_weights else True}
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote_code, **options)
        model = model.to(best_device() if device == "auto" else torch.device(device))
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(explain_failure(name, error, unsafe_weights)) from error
    return LanguageModel(model, tokenizer, name=Path(name).name if os.path.isdir(name) else name)


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
