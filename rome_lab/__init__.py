"""rome_lab: find where a language model keeps a fact, and change it (Meng et al., 2022)."""

from rome_lab.editing import (
    Edit,
    EditSettings,
    FolderText,
    SampledText,
    WikipediaText,
    audit,
    covariance,
    covariances,
    describe_edit,
    load_edit,
    rome,
    rome_many,
    verify,
)
from rome_lab.evaluation import evaluate
from rome_lab.facts import Fact, known_facts, load_facts
from rome_lab.lab import plot_history, plots, report, show
from rome_lab.models import LanguageModel, choose_products, load_model
from rome_lab.tracing import (
    FixedNoise,
    GaussianNoise,
    SubjectSwap,
    Trace,
    Traces,
    causal_trace,
    claims,
    swap_pairs,
    trace_facts,
)

__all__ = [
    "Edit",
    "EditSettings",
    "Fact",
    "FixedNoise",
    "FolderText",
    "GaussianNoise",
    "LanguageModel",
    "SampledText",
    "SubjectSwap",
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
    "report",
    "rome",
    "rome_many",
    "show",
    "swap_pairs",
    "trace_facts",
    "verify",
]
