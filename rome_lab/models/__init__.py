"""TODO front door models."""

from rome_lab.models.batching import Batching, enough_room, text_bytes
from rome_lab.models.blocks import (
    Recording,
    at_least_float32,
    causal_mask,
    joined,
    last_logits_only,
    last_token_only,
    output_changed,
    record_run,
    run_block,
    run_blocks,
    suited_attention,
)
from rome_lab.models.changes import Change, side_by_side
from rome_lab.models.identity import difference
from rome_lab.models.language_model import LanguageModel
from rome_lab.models.layouts import find_layout
from rome_lab.models.loading import check_hub, load_model
from rome_lab.models.process import choose_products, freed_memory_given_back, freed_memory_kept, product_error
from rome_lab.models.sampling import continue_randomly, generate_each
from rome_lab.models.scoring import Question, Score, score
from rome_lab.models.weights import device_of


def __getattr__(name: str) -> object:
    """Workers needs dask.distributed, which is an optional extra, so it is imported when it is first asked for."""
    if name == "Workers":
        from rome_lab.models.workers import Workers

        return Workers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
