"""rome_lab: find where a language model keeps a fact, and change it (Meng et al., 2022)."""

from rome_lab import plots
from rome_lab.audit import audit
from rome_lab.averaging import Traces
from rome_lab.claims import claims
from rome_lab.collection import trace_facts
from rome_lab.corruption import FixedNoise, GaussianNoise
from rome_lab.covariance import covariance, covariances
from rome_lab.edit_files import describe_edit
from rome_lab.editing import plot_history, rome, rome_many
from rome_lab.edits import Edit, load_edit
from rome_lab.evaluation import evaluate
from rome_lab.facts import Fact, load_facts
from rome_lab.known import known_facts
from rome_lab.models import LanguageModel, load_model
from rome_lab.products import choose_products
from rome_lab.texts import FolderText, SampledText, WikipediaText
from rome_lab.trace import Trace
from rome_lab.tracing import causal_trace
from rome_lab.values import EditSettings

__all__ = [
    "Edit",
    "EditSettings",
    "Fact",
    "FixedNoise",
    "FolderText",
    "GaussianNoise",
    "LanguageModel",
    "SampledText",
    "Trace",
    "Traces",
    "WikipediaText",
    "audit",
    "causal_trace",
    "choose_products",
    "claims",
    "covariance",
    "covariances",
    "describe_edit",
    "evaluate",
    "known_facts",
    "load_edit",
    "load_facts",
    "load_model",
    "plot_history",
    "plots",
    "rome",
    "rome_many",
    "trace_facts",
]
