"""Families of decoders that are verified, a tiny random model of each; `make models` runs `rl.verify` on all of them.

python tests/families.py FOLDER     writes verified_models.csv and verified_models.md
"""

from __future__ import annotations

import datetime
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
import transformers as tf
from tiny import CONFIGS, GPT, LLAMA, SIZE, scaled_up, tokenizer

from rome_lab import LanguageModel, verify

PROMPT, SUBJECT = "Paris is in the", "Paris"
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
ROPE3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FALCON = SIZE | {"max_position_embeddings": 64, "ffn_hidden_size": 64}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        example: a model of it, by its id on the hub.
        config: of a tiny model of it.
        model: its class, where that is not the one that AutoModelForCausalLM takes.
        edited: False for mixtures of experts in all layers, whose edits are refused.
    """

    example: str
    config: Callable[[], tf.PreTrainedConfig]
    model: type[tf.PreTrainedModel] | None = None
    edited: bool = True


def gemma3_of_several_media() -> tf.Gemma3Config:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return tf.Gemma3Config(
        text_config=LLAMA | {"head_dim": 8, "sliding_window": 6},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )


VERIFIED = {
    "GPT-2": Family("gpt2-xl", CONFIGS["gpt2"]),
    "GPT-J": Family("EleutherAI/gpt-j-6b", CONFIGS["gptj"]),
    "GPT-NeoX, Pythia": Family("EleutherAI/pythia-1b", CONFIGS["gpt_neox"]),
    "Llama 1, 2, SmolLM2": Family("HuggingFaceTB/SmolLM2-135M", CONFIGS["llama"]),
    "Llama 3 (scaled rope)": Family("meta-llama/Llama-3.2-1B", lambda: tf.LlamaConfig(**LLAMA, rope_parameters=ROPE3)),
    "Qwen2, Qwen2.5": Family("Qwen/Qwen2.5-0.5B", CONFIGS["qwen2"]),
    "Qwen3": Family("Qwen/Qwen3-0.6B", CONFIGS["qwen3"]),
    "Mistral (windows)": Family("mistralai/Mistral-7B-v0.1", CONFIGS["mistral"]),
    "Gemma": Family("google/gemma-2b", lambda: tf.GemmaConfig(**LLAMA, head_dim=8)),
    "Gemma 2 (soft caps)": Family("google/gemma-2-2b", CONFIGS["gemma2"]),
    "Gemma 3 (rope by layer)": Family(
        "google/gemma-3-270m",
        lambda: tf.Gemma3TextConfig(
            **LLAMA, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2
        ),
    ),
    "Gemma 3 with images": Family("google/gemma-3-4b-it", gemma3_of_several_media, tf.Gemma3ForConditionalGeneration),
    "OPT": Family("facebook/opt-1.3b", CONFIGS["opt"]),
    "OPT (norms of sums)": Family("facebook/opt-350m", CONFIGS["opt-post-norm"]),
    "Phi-1, Phi-2 (parallel)": Family("microsoft/phi-2", lambda: tf.PhiConfig(**LLAMA)),
    "Phi-3, Phi-4 (fused)": Family("microsoft/Phi-4-mini-instruct", lambda: tf.Phi3Config(**LLAMA)),
    "OLMo": Family("allenai/OLMo-1B-hf", lambda: tf.OlmoConfig(**LLAMA)),
    "OLMo 2 (norms after)": Family("allenai/OLMo-2-0425-1B", lambda: tf.Olmo2Config(**LLAMA)),
    "OLMo 3": Family("allenai/Olmo-3-7B-Base", lambda: tf.Olmo3Config(**LLAMA, sliding_window=6)),
    "StableLM": Family("stabilityai/stablelm-2-1_6b", lambda: tf.StableLmConfig(**LLAMA)),
    "StableLM (parallel)": Family(
        "stabilityai/stablelm-2-12b", lambda: tf.StableLmConfig(**LLAMA, use_parallel_residual=True, qk_layernorm=True)
    ),
    "Falcon": Family("tiiuae/falcon-7b", lambda: tf.FalconConfig(**FALCON, alibi=False)),
    "Falcon (new blocks)": Family(
        "tiiuae/falcon-11B",
        lambda: tf.FalconConfig(**FALCON, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    ),
    "Falcon (alibi)": Family(
        "tiiuae/falcon-rw-1b",
        lambda: tf.FalconConfig(**FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True),
    ),
    "BLOOM (alibi)": Family("bigscience/bloom-560m", lambda: tf.BloomConfig(**SIZE, n_layer=4, n_head=4)),
    "MPT (alibi)": Family(
        "mosaicml/mpt-7b", lambda: tf.MptConfig(d_model=32, n_heads=4, n_layers=4, vocab_size=300, max_seq_len=64)
    ),
    "GPT-BigCode": Family("bigcode/gpt_bigcode-santacoder", lambda: tf.GPTBigCodeConfig(**GPT)),
    "StarCoder2": Family("bigcode/starcoder2-3b", lambda: tf.Starcoder2Config(**LLAMA, sliding_window=6)),
    "GPT-Neo": Family(
        "EleutherAI/gpt-neo-1.3B",
        lambda: tf.GPTNeoConfig(
            vocab_size=300,
            hidden_size=32,
            num_layers=4,
            num_heads=4,
            max_position_embeddings=64,
            window_size=6,
            attention_types=[[["global", "local"], 2]],
            bos_token_id=0,
            eos_token_id=1,
        ),
    ),  # fmt: skip
    "CodeGen": Family("Salesforce/codegen-350M-mono", lambda: tf.CodeGenConfig(**GPT, rotary_dim=4)),
    "Granite (multipliers)": Family(
        "ibm-granite/granite-3.3-2b-base",
        lambda: tf.GraniteConfig(
            **LLAMA, embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.3, logits_scaling=2.0
        ),
    ),
    "SmolLM3": Family("HuggingFaceTB/SmolLM3-3B", lambda: tf.SmolLM3Config(**LLAMA)),
    "Cohere (parallel)": Family("CohereLabs/c4ai-command-r-v01", lambda: tf.CohereConfig(**LLAMA)),
    "Cohere 2": Family("CohereLabs/c4ai-command-r7b-12-2024", lambda: tf.Cohere2Config(**LLAMA, sliding_window=6)),
    "Nemotron": Family("nvidia/Minitron-4B-Base", lambda: tf.NemotronConfig(**LLAMA)),
    "GLM-4 (norms after)": Family("zai-org/GLM-4-9B-0414", lambda: tf.Glm4Config(**LLAMA, head_dim=8)),
    "EXAONE 4": Family("LGAI-EXAONE/EXAONE-4.0-1.2B", lambda: tf.Exaone4Config(**LLAMA, sliding_window=6)),
    "Persimmon": Family("adept/persimmon-8b-base", lambda: tf.PersimmonConfig(**LLAMA)),
    "Mixtral": Family(
        "mistralai/Mixtral-8x7B-v0.1", lambda: tf.MixtralConfig(**LLAMA, num_local_experts=4), edited=False
    ),
    "Qwen2 MoE": Family(
        "Qwen/Qwen1.5-MoE-A2.7B",
        lambda: tf.Qwen2MoeConfig(**LLAMA, **EXPERTS, num_experts=4, shared_expert_intermediate_size=24),
        edited=False,
    ),
    "Qwen3 MoE": Family(
        "Qwen/Qwen3-30B-A3B", lambda: tf.Qwen3MoeConfig(**LLAMA, **EXPERTS, head_dim=8, num_experts=4), edited=False
    ),
    "OLMoE": Family(
        "allenai/OLMoE-1B-7B-0924", lambda: tf.OlmoeConfig(**LLAMA, num_experts=4, num_experts_per_tok=2), edited=False
    ),
    "DeepSeek V3 (first layer dense)": Family(
        "deepseek-ai/DeepSeek-V3",
        lambda: tf.DeepseekV3Config(
            **LLAMA | {"num_key_value_heads": 4},
            **EXPERTS,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
        ),
    ),  # fmt: skip
    "gpt-oss (attention sinks)": Family(
        "openai/gpt-oss-20b",
        lambda: tf.GptOssConfig(**LLAMA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
        edited=False,
    ),
}


def family_model(name: str, seed: int = 0) -> LanguageModel:
    """A tiny random model of a family, in float64."""
    family = VERIFIED[name]
    config = family.config()
    config.tie_word_embeddings = False
    torch.manual_seed(seed)
    model = family.model(config) if family.model else tf.AutoModelForCausalLM.from_config(config)
    model = scaled_up(model).double()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product of PyTorch takes no float64
    return LanguageModel(model, tokenizer(), name=name)


def verified_row(name: str, date: str) -> dict[str, object]:
    """The row of the table: what `rl.verify` finds of the family's tiny model."""
    lm = family_model(name)
    with tempfile.TemporaryDirectory() as store:
        table = verify(lm, PROMPT, SUBJECT, cells=4, store=store, progress=False)
    traces, edit = table[table.check.str.startswith("trace ")], table[table.check.str.startswith(("edit", "undo"))]
    exact = traces[traces.verdict == "exact to float"]
    kinds = exact.check.str.removeprefix("trace ")
    worst = edit[edit.verdict != "exact to float"]
    edited = f"{worst.verdict.iloc[0]}: {worst.remark.iloc[0]}" if len(worst) else "exact, undone"
    layer = "" if not lm.sparse or len(lm.sparse) == lm.n_layers else " (dense layers only)"
    return {
        "family": name,
        "example": VERIFIED[name].example,
        "kinds": ", ".join(kinds),
        "largest difference": float(traces.difference.max()),
        "readout": float(table.difference[0]),
        "edit": "refused: a mixture of experts" if "mixture of experts" in edited else edited + layer,
        "transformers": tf.__version__,
        "date": date,
    }


TAUGHT = """
## What the families taught

Each of these is a way in which code that fits one family gives wrong numbers on another, without a word:

- **What is added to the stream is not always what a module called MLP says.** Where norms stand behind the modules
  (Gemma from its second version on, OLMo likewise, GLM-4, EXAONE 4), it is what the norm says; where a module adds its
  input itself (BLOOM, MPT), it is what its last matrix says; Granite multiplies it by a constant; OPT has no such
  module. So rome_lab looks for what adds up, not for names.
- **Outputs may be changed in place** after a hook has seen them (Falcon), so what is recorded is copied.
- **Not every argument of a block is about tokens:** alibi (BLOOM, Falcon, MPT) says something of every head, rotations
  may differ by layer (Gemma) or be scaled (Llama 3, gpt-oss), windows hide what is far (Mistral, Gemma, Cohere 2). A
  block that is run on the end of a text gets its part of each.
- **In parallel blocks** (GPT-J, Phi-2, Cohere, Falcon) attention and MLP read one state, and either may come first:
  which of the two is the attention is told by when keys and values are kept.
- **Experts** have no one matrix to edit, and a router whose choice nearly ties goes the other way by rounding; DeepSeek
  V3 has dense layers, too.
- **Sums may be normed** (OPT of 350M parameters): nothing adds up then, and no look finds the parts.
- **In 16 bits, and beside the few huge numbers that states of trained models have,** nearly any two modules seem to add
  up if differences are measured by the largest number; each is measured by its own terms.
"""


def page_of(table: pd.DataFrame) -> str:
    """The table as a page of the documentation."""
    head = """# Verified models

A tiny random model of each family, in float64: traces of every kind beside one run of the whole model a cell, the readout
beside the model's own, an edit read off the model's own run, and its undo bit for bit. Differences are of log p. `make
models` writes this page and a test holds every row; `rl.verify(lm)` does the same for your own model, weights and text in a
minute. In a model of a family that is not listed, rome_lab looks for the parts itself and says what it found.

"""
    rows = ["| " + " | ".join(table.columns) + " |", "| " + " | ".join("---" for _ in table.columns) + " |"]
    for row in table.itertuples(index=False):
        cells = [f"{x:.0e}" if isinstance(x, float) else str(x) for x in row]
        rows.append("| " + " | ".join(cells) + " |")
    return head + "\n".join(rows) + "\n" + TAUGHT


def write_verified(folder: Path) -> None:
    """Verify all families and write the table and the page."""
    date = datetime.date.today().isoformat()
    table = pd.DataFrame([verified_row(name, date) for name in VERIFIED])
    table.to_csv(folder / "verified_models.csv", index=False)
    (folder / "verified_models.md").write_text(page_of(table), encoding="utf-8")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    write_verified(Path(sys.argv[1]))
