"""rome_lab: find where a language model keeps a fact, and change it (Meng et al., 2022)."""

from rome_lab import plots
from rome_lab.averaging import Traces
from rome_lab.claims import claims
from rome_lab.collection import trace_facts
from rome_lab.corruption import FixedNoise, GaussianNoise
from rome_lab.covariance import covariance
from rome_lab.editing import rome
from rome_lab.edits import load_edit
from rome_lab.facts import Fact, load_facts
from rome_lab.known import known_facts
from rome_lab.models import LanguageModel, load_model
from rome_lab.trace import Trace
from rome_lab.tracing import causal_trace

__all__ = [
    "Fact",
    "FixedNoise",
    "GaussianNoise",
    "LanguageModel",
    "Trace",
    "Traces",
    "causal_trace",
    "claims",
    "covariance",
    "known_facts",
    "load_edit",
    "load_facts",
    "load_model",
    "plots",
    "rome",
    "trace_facts",
]
