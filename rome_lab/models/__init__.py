"""Language models: where their parts are, running them in parts and together, and what they say.

LanguageModel                   a model with its tokenizer and the places of its parts; edits lie over its weights
load_model, check_hub           one by name: embedded, on a hub, or in a folder
Layout, find_layout             where a family has its parts; an UnfitModelError where a model has none; LAYOUTS are known
                                without a look
record_run, Recording           one run of a whole model, and all that it left behind
run_block, run_blocks           blocks on the last tokens of a recorded text; joined puts recordings together, and
                                check_recording says whether parts give what the whole gave
output_changed, input_changed   what a module says or is given, changed within a context; last_token_only spares it tokens
alone_with                      keeps other threads from tracing or changing the model within a context
suited_attention, causal_mask   which attention a trace runs with, and its mask; is_mask and BY_HEAD tell arguments of blocks
at_least_float32                of what is to be summed; last_logits_only spares the logits of other tokens
Batching, text_bytes            as many texts together as fit, halved where memory runs out; enough_room for the rest;
                                rows_at_once of logits
Change, side_by_side            what a method does to a model, a row of a batch each
Question, score, Score          log probabilities of given continuations under changes; log_p_of where gradients pass
generate, continue_randomly     texts that the model writes, under changes or as it is
choose_products                 how float32 matrix products are computed: precisions, and what they cost by product_error;
                                suited_products for the quickest of those that are accurate
difference                      which fields of two models' configurations differ, in words
freed_memory_kept               where freed memory goes, and freed_memory_given_back
device_of, read_weight          where a module computes, and its weight
Verdict, keep_verdicts          of `rl.verify`, kept (EXACT, ROUNDED, WRONG, IMPOSSIBLE): verdicts_of finds them again,
                                check_verified refuses a model that comes out wrong
Workers                         machines of a Dask cluster
"""

from rome_lab.models.batching import Batching, enough_room, rows_at_once, text_bytes
from rome_lab.models.blocks import (
    BY_HEAD,
    Recording,
    at_least_float32,
    causal_mask,
    check_recording,
    input_changed,
    is_mask,
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
from rome_lab.models.layouts import LAYOUTS, Layout
from rome_lab.models.loading import check_hub, load_model
from rome_lab.models.overlay import alone_with
from rome_lab.models.process import (
    choose_products,
    freed_memory_given_back,
    freed_memory_kept,
    precisions,
    product_error,
    suited_products,
)
from rome_lab.models.sampling import continue_randomly, generate
from rome_lab.models.scoring import Question, Score, log_p_of, score
from rome_lab.models.structure import UnfitModelError, find_layout
from rome_lab.models.verdicts import (
    EXACT,
    IMPOSSIBLE,
    ROUNDED,
    WRONG,
    Verdict,
    check_verified,
    keep_verdicts,
    verdicts_of,
)
from rome_lab.models.weights import device_of, read_weight


def __getattr__(name: str) -> object:
    """Workers needs dask.distributed, which is an optional extra, so it is imported when it is first asked for."""
    if name == "Workers":
        from rome_lab.models.workers import Workers

        return Workers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
