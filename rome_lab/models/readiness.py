"""Models and tokenizers as users have them: unwrapped, made ready, or refused in a sentence.

unwrapped(model)                  the model itself, without what torch.compile made of it
check_model(model)                raises where it cannot be traced as it is
check_ids_fit(model, tokenizer)   raises where the tokenizer has tokens that the model has not
hooked(model)                     paths of modules with hooks that may change what they say
front_only(tokenizer)             one that puts nothing behind a text
"""

from __future__ import annotations

import copy
import json
import logging

from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rome_lab.base import Json

logger = logging.getLogger(__name__)


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model itself: compiled code may not call the hooks that tracing works by."""
    compiled = hasattr(model, "_orig_mod")
    model = getattr(model, "_orig_mod", model)
    for module in list(model.modules()):
        if module._compiled_call_impl is not None:  # what Module.compile leaves
            compiled, module._compiled_call_impl = True, None
        for name, child in list(module.named_children()):
            if hasattr(child, "_orig_mod"):
                compiled = True
                setattr(module, name, child._orig_mod)
    if compiled:
        logger.info("LanguageModel: what torch.compile made of the model is left aside, since it may not call hooks.")
    return model


def check_model(model: nn.Module) -> None:
    """Raise a ValueError that says what to do where a model cannot be traced as it is."""
    name = type(model).__name__
    modules = [(path, module, type(module).__module__) for path, module in model.named_modules()]
    if adapted := [path for path, _, source in modules if source.split(".")[0] == "peft"]:
        raise ValueError(
            f"LanguageModel: {name} has a PEFT adapter ({adapted[0] or 'the model itself'}); merge it into the weights "
            "first: model = model.merge_and_unload()."
        )
    if packed := [path for path, _, source in modules if "quantized.dynamic" in source]:
        raise ValueError(
            f"LanguageModel: {packed[0]} of {name} is quantised dynamically: its weight is no floating-point matrix, and it "
            "rounds the numbers of all texts of a batch by their largest, so that what one text says depends on the others; "
            "give the model as it was before."
        )
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"LanguageModel: {name} is no model of transformers; give an AutoModelForCausalLM.")
    if model.config.return_dict is False:
        raise ValueError(
            f"LanguageModel: {name} is set to return tuples, with which transformers runs few models; set "
            "model.config.return_dict = True."
        )
    config = model.config.get_text_config()
    both_ways = {"use_bidirectional_attention": True, "is_causal": False}
    if fields := [f"{field}={value}" for field, value in both_ways.items() if getattr(config, field, None) is value]:
        raise ValueError(
            f"LanguageModel: {name} reads in both directions ({fields[0]}), so that tokens see those behind "
            "them; a trace and an edit need a decoder."
        )
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"LanguageModel: {name} has no output embeddings, so it gives no logits (texts, tokens, vocabulary) of next "
            "tokens; load it with AutoModelForCausalLM."
        )
    if frozen := [path for path, weight in model.named_parameters() if weight.is_inference()]:
        raise ValueError(
            f"LanguageModel: {frozen[0]} of {name} was made under torch.inference_mode, so that no gradient passes it; make "
            "or load the model outside of it."
        )


def hooked(model: nn.Module) -> list[str]:
    """Paths of the modules that bear forward hooks, but for hooks that say that they `only_watches`."""
    return [
        path
        for path, module in model.named_modules()
        for hooks in [(*module._forward_hooks.values(), *module._forward_pre_hooks.values())]
        if not all(getattr(hook, "only_watches", False) for hook in hooks)
    ]


def check_ids_fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError where the tokenizer's vocabulary goes beyond the embeddings; added tokens may."""
    rows, words = model.get_input_embeddings().weight.shape[0], tokenizer.backend_tokenizer.get_vocab_size(False)
    if words > rows:
        raise ValueError(
            f"LanguageModel: the tokenizer has {words} tokens and {type(model).__name__} embeddings for {rows}; give the "
            "tokenizer that belongs to it, or model.resize_token_embeddings(len(tokenizer))."
        )


def front_only(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy of it that puts nothing behind a text: a prompt is to be gone on with, not ended.

    Raises:
        ValueError: it cannot be told to.
    """
    behind = put_behind(tokenizer)
    if not behind:
        return tokenizer
    ready = copy.deepcopy(tokenizer)
    state = json.loads(ready.backend_tokenizer.to_str())
    cut_behind(state["post_processor"])
    ready._tokenizer = Tokenizer.from_str(json.dumps(state))
    if put_behind(ready):
        raise ValueError(
            f"LanguageModel: the tokenizer puts {tokenizer.decode(behind)!r} behind every text, so that no prompt is gone "
            "on with; load it with add_eos_token=False, or without its post-processor."
        )
    logger.info("LanguageModel: %r, which the tokenizer puts behind every text, is left out.", tokenizer.decode(behind))
    return ready


def put_behind(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Special tokens that the tokenizer puts behind every text."""
    whole, bare = (tokenizer("a b", add_special_tokens=special)["input_ids"] for special in (True, False))
    begins = [x for x in range(len(whole) - len(bare) + 1) if whole[x : x + len(bare)] == bare]
    return whole[begins[0] + len(bare) :] if begins else []


def cut_behind(processor: dict[str, Json]) -> None:
    """Take what stands behind the text out of a post-processor's description, in place."""
    for part in processor.get("processors", ()):
        cut_behind(part)
    if isinstance(single := processor.get("single"), list):
        processor["single"] = single[: 1 + next(i for i, piece in enumerate(single) if "Sequence" in piece)]
