"""Where the parts of decoder-only transformers are: `Layout`, and those of families that are known by name."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from torch import nn


@dataclass(frozen=True)
class Layout:
    """Module paths of one family of decoder-only transformers.

    Attributes:
        family: name for messages.
        blocks: path from the model to the list of its blocks.
        attn, mlp: paths from a block to the modules whose outputs are added to the residual stream.
        memory: path from a block to the matrix that ends its MLP: W of Appendix A, whose input is the key k. None where no
            block has one, as in mixtures of experts.
        tail: paths from the model to what stands between the last block and the output embeddings; a later one may be None.
            Where it is not given, the model's own forward makes the logits.
        model_types: what the configurations of the family call themselves.
        sparse: layers whose MLP no matrix ends although there is one at `memory`.
    """

    family: str
    blocks: str
    attn: str
    mlp: str
    memory: str | None = None
    tail: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    sparse: tuple[int, ...] = ()

    @property
    def feed_forward(self) -> str:
        """Path from a block to its MLP as a module; empty in OPT, whose two matrices stand in the block itself."""
        return self.mlp if self.memory is None else self.memory.rpartition(".")[0]

    def lacking(self, model: nn.Module) -> str:
        """The first path of it that the model, or one of its blocks, has not; "" where it has all."""
        if not has(model, self.blocks):
            return self.blocks
        blocks = list(attrgetter(self.blocks)(model))
        for number, block in enumerate(blocks):
            for path in (self.attn, self.mlp):
                if not has(block, path):
                    return f"{self.blocks}[{number}].{path}"
        if self.tail and not has(model, self.tail[0]):
            return self.tail[0]
        if self.memory is not None and not any(has(block, self.memory) for block in blocks):
            return f"{self.blocks}[0].{self.memory}"
        return ""


def has(module: nn.Module, path: str) -> bool:
    """Whether there is something at `path` in the module."""
    try:
        attrgetter(path)(module)
    except AttributeError:
        return False
    return True


LAYOUTS = (
    Layout("GPT-2", "transformer.h", "attn", "mlp", "mlp.c_proj", ("transformer.ln_f",), ("gpt2",)),
    Layout("GPT-J", "transformer.h", "attn", "mlp", "mlp.fc_out", ("transformer.ln_f",), ("gptj",)),
    Layout(
        "GPT-NeoX",
        "gpt_neox.layers",
        "attention",
        "mlp",
        "mlp.dense_4h_to_h",
        ("gpt_neox.final_layer_norm",),
        ("gpt_neox",),
    ),
    Layout(
        # It normalises what its attention and its MLP say before adding it to the residual stream.
        "Gemma2 or Gemma3",
        "model.layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "mlp.down_proj",
        ("model.norm",),
        ("gemma2", "gemma3_text"),
    ),
    Layout(
        "Llama, Qwen or Mistral",
        "model.layers",
        "self_attn",
        "mlp",
        "mlp.down_proj",
        ("model.norm",),
        ("llama", "qwen2", "qwen3", "mistral"),
    ),
    Layout(
        # It has no MLP module: its two matrices stand in the block itself. Where it normalises sums, no look finds them.
        "OPT",
        "model.decoder.layers",
        "self_attn",
        "fc2",
        "fc2",
        ("model.decoder.final_layer_norm", "model.decoder.project_out"),
        ("opt",),
    ),
)
"""Families that are known without a look; all others, see `rome_lab.models.structure`, are found by one run."""
