"""Where the parts of each family of decoder-only transformers are."""

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
        memory: path from a block to the matrix that ends its MLP: W of Appendix A, whose input is the key k.
        tail: paths from the model to what stands between the last block and the output embeddings; a later one may be None.
    """

    family: str
    blocks: str
    attn: str
    mlp: str
    memory: str
    tail: tuple[str, ...]

    @property
    def feed_forward(self) -> str:
        """Path from a block to its MLP as a module; empty in OPT, whose two matrices stand in the block itself."""
        return self.memory.rpartition(".")[0]


# The first that fits is taken, so the more specific one comes first: a Gemma2 model also fits the entry of Llama.
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
    places = "; ".join(f"{x.family}: {x.blocks}[0] with {x.attn}, {x.mlp}, {x.memory}" for x in LAYOUTS)
    raise ValueError(
        f"LanguageModel: {type(model).__name__} is not a decoder-only model of a family that rome_lab knows. "
        f"Looked for {places}. For another family, add a Layout to rome_lab.models.layouts.LAYOUTS."
    )
