"""TODO front door tracing."""

from rome_lab.tracing.averaging import BUCKETS, Traces, buckets, gap, summary
from rome_lab.tracing.corruption import FixedNoise, GaussianNoise
from rome_lab.tracing.many_facts import trace_facts
from rome_lab.tracing.one_fact import causal_trace
from rome_lab.tracing.paper_claims import claims
from rome_lab.tracing.readings import beside_paper, strongest, strongest_places, trace_random_weights
from rome_lab.tracing.sweep import READ_TOGETHER, columns_of
from rome_lab.tracing.trace import KINDS, Trace
