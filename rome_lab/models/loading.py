"""`load_model`: language models by name: in packages, on a hub, or in a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from rome_lab.models.language_model import LanguageModel
from rome_lab.models.layouts import LAYOUTS, Layout
from rome_lab.models.packaged import EMBEDDED_NAME, PACKAGED, packaged_folder
from rome_lab.models.process import check_choice, choose_products
from rome_lab.models.verdicts import verdicts_of

logger = logging.getLogger(__name__)


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
    name: str = EMBEDDED_NAME,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "float32",
    *,
    products: str | None = None,
    device_map: str | Mapping[str, str | int | torch.device] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    unsafe_weights: bool = False,
    remote_code: bool = False,
    layout: Layout | None = None,
) -> LanguageModel:
    """Load a decoder-only language model.

    Args:
        name: "smollm2-135m" (embedded), "gemma3-270m" (after `make gemma`), a hub id such as "gpt2-xl", or a local folder.
        device: "auto" (CUDA, then MPS, then CPU) or a torch device.
        dtype: "float32", "bfloat16", "float16" or a torch dtype. The two of 16 bits take half the memory. On random models
            of every family the probabilities of a trace are then within 0.05 and 0.006 of those of float32, and an edit
            meets W_hat k* = v* to a relative 3e-3 and 4e-4 (tests/models/test_precision.py); it is undone exactly even so.
        products: "default" or "fast", how float32 matrix products are computed from now on, in the whole process; see
            `choose_products`. Left as it is by default.
        device_map: for a model that no one device holds, where its modules go: "auto" fills the GPUs, then the CPU's
            memory, then leaves the rest on disk; or a mapping from module names to devices, "cpu" and "disk" among them.
            What is not on a GPU is brought there to compute, or, where there is no GPU, to the CPU. `device` is not used.
        max_memory: for a device_map of "auto", how much each device may take, such as {0: "60GiB", "cpu": "200GiB"};
            less than there is leaves room for the texts.
        unsafe_weights: allow weights that are not safetensors; these are pickles, which can run code when read.
        remote_code: allow the repository's own Python code to run.
        layout: where the model's parts are, for a model in which neither its family's name nor a look at it says so.

    Raises:
        ValueError: the name, device, dtype or choice of products is unknown, weights are missing or damaged, or the model is
            none that can be traced.
        FileNotFoundError: a package with the model's weights is not installed.
    """
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError("load_model: dtype must name a floating-point torch dtype, such as 'float32' or 'bfloat16'.")
    if device_map is not None and device != "auto":
        raise ValueError(f"load_model: device is {device!r} and device_map {device_map!r}; give only one of them.")
    if products is not None:
        check_choice(products)
    name = str(Path(name).expanduser()) if str(name).startswith("~") else str(name)
    folder = str(packaged_folder(name)) if name in PACKAGED else name
    try:
        if not os.path.isdir(folder):
            check_hub()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote_code)
        options = {"dtype": dtype, "use_safetensors": None if unsafe_weights else True}
        places = {"device_map": device_map, "max_memory": max_memory and dict(max_memory)}
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=remote_code, output_loading_info=True, **places, **options
        )
        if missing := sorted(info["missing_keys"]):
            listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise ValueError(f"its files lack the weights {listed}, which would be random.")
        if device_map is None:
            model = model.to(best_device() if device == "auto" else torch.device(device))
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(explain_failure(name, error, unsafe_weights)) from error
    is_folder = os.path.isdir(name)
    where = str(Path(name).resolve()) if is_folder else name
    origin = {"name": where, "dtype": dtype, "unsafe_weights": unsafe_weights, "remote_code": remote_code}
    origin |= {} if layout is None else {"layout": layout}
    lm = LanguageModel(model, tokenizer, Path(name).name if is_folder else name, origin, layout)
    if products is not None:
        choose_products(products, lm.device)
    if verdicts_of(lm) is None:
        # Families that are known by name are verified by the project's own tests.
        log = logger.info if lm.layout in LAYOUTS else logger.warning
        log(
            "load_model: %s was never verified here; rl.verify(lm) says in a minute whether it is traced exactly.",
            lm.name,
        )
    return lm


def explain_failure(name: str, error: Exception, unsafe_weights: bool) -> str:
    """One sentence on why `name` could not be loaded and what to do."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    pickles = "" if unsafe_weights else " (older *.bin weights are pickles: unsafe_weights=True allows them)"
    if isinstance(error, ImportError):
        advice = "install the package that is named, or load a model that does without it"
    elif "which would be random" in reason:
        advice = "get all files of the model"
    elif os.path.isdir(name):
        advice = "check that the folder holds config.json, a tokenizer and *.safetensors weights" + pickles
    else:
        advice = (
            f'give "{EMBEDDED_NAME}" (embedded, needs no network), a folder on this machine, '
            f"or, when online, the exact id of a decoder-only model on the hub{pickles}"
        )
    return f"load_model: cannot load {name!r}: {reason} To do: {advice}."
