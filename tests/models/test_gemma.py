"""Gemma 3 270M, where it is installed: read from its GGUF file as what it is."""

from __future__ import annotations

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from rome_lab import LanguageModel, load_model, verify
from rome_lab.models.packaged import PACKAGED, installed_file, joined_file, sha256_of

NAME = "gemma3-270m"
FAR = "The grass is green. The sky is blue. The sun is yellow. Here we go, there and back again. " * 30
# The five most probable next tokens and their log probabilities, by llama.cpp (build 11549), of the same weights in float32.
# The last text is longer than the window of most layers.
LLAMA_CPP = {
    "The Eiffel Tower is located in the city of": (
        (" Paris", " Lyon", " ", " Les", " France"),
        (-0.2749, -2.8682, -4.8617, -4.9735, -5.3361),
    ),
    "Die Hauptstadt von Frankreich ist": (
        (" nicht", " das", " ein", " die", " bekannt"),
        (-2.5183, -2.5238, -2.6962, -2.8566, -3.0128),
    ),
    f"The secret word is banana. {FAR}The secret word is": (
        (" banana", " green", " a", " bananas", " the"),
        (-0.2474, -3.3241, -4.6063, -4.698, -4.7502),
    ),
}


@pytest.fixture(scope="module")
def gemma() -> LanguageModel:
    """The model, where its packages are installed."""
    try:
        return load_model(NAME, device="cpu")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("text", LLAMA_CPP, ids=("fact", "German", "long"))
def test_it_says_what_llama_cpp_says(gemma, text) -> None:
    tokens, expected = LLAMA_CPP[text]
    ids = gemma.tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == gemma.tokenizer.bos_token_id and gemma.tokenizer.decode(ids[0, 1:]) == text
    with torch.no_grad():
        log_p = gemma.model(ids, logits_to_keep=1).logits[0, -1].double().log_softmax(-1).topk(5)
    assert tuple(gemma.tokenizer.convert_ids_to_tokens(log_p.indices)) == tuple(x.replace(" ", "▁") for x in tokens)
    # llama.cpp takes its GELU from a table in 16 bits.
    torch.testing.assert_close(log_p.values, torch.tensor(expected).double(), atol=6e-3, rtol=0)


@pytest.mark.slow
def test_its_weights_are_those_of_the_file(gemma, tmp_path) -> None:
    try:
        sources = [installed_file(NAME, part) for part in PACKAGED[NAME].parts]
    except FileNotFoundError as error:
        pytest.skip(str(error))
    path = joined_file(sources, tmp_path)
    assert sha256_of(path) == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # as published
    names = {"token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm"}
    names |= {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"} | {
        f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"
    }
    names |= {"attn_output": "self_attn.o_proj", "post_attention_norm": "post_attention_layernorm"}
    names |= {"ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
    names |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    own = dict(gemma.model.model.named_parameters())
    for tensor in GGUFReader(path).tensors:
        *block, name, _ = tensor.name.split(".")
        place = f"layers.{block[1]}.{names[name]}" if block else names[name]
        # llama.cpp keeps the factors of norms, Gemma what is added to 1.
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type)) - float(name.endswith("norm"))
        torch.testing.assert_close(own.pop(f"{place}.weight"), values, atol=0, rtol=0, check_device=False)
    assert not own
    assert gemma.model.lm_head.weight is gemma.model.model.embed_tokens.weight


@pytest.mark.slow
def test_it_is_traced_and_edited_exactly(gemma) -> None:
    table = verify(gemma, cells=1, store=None, progress=False)
    assert set(table["verdict"]) == {"exact to float"}, table.to_string()
