"""rome_lab: find where a language model keeps a fact, and change it (Meng et al., 2022)."""

from rome_lab import plots
from rome_lab.averaging import Traces
from rome_lab.claims import claims
from rome_lab.collection import trace_facts
from rome_lab.corruption import FixedNoise, GaussianNoise
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
    "known_facts",
    "load_facts",
    "load_model",
    "plots",
    "trace_facts",
]
