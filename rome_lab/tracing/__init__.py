"""Appendix B: where a model keeps a fact. Corruption, the runs, the sweep, averages and the paper's claims.

causal_trace, trace_facts           one fact; many, kept in a store
Trace, Traces, KINDS                what comes of them: probabilities by token and layer; means over facts, with intervals
run_clean_and_corrupted, restore    the same in two steps, by Runs with TraceSettings, for some tokens only, or by label:
                                    trace_of_kind; restore_heads: sets of heads together
GaussianNoise, FixedNoise           what makes a corrupted run corrupted; SubjectSwap: another subject instead
attribution_patching                effects estimated by one gradient for all cells: attributions of recorded runs
integrated_gradients                along each restoration, as near to exact as one likes: integrals of recorded runs
logit_lens, LogitLens               what the model would say of each state if it were the last
swap_pairs, SwapPair, partner_of    facts with a partner whose subject can stand in their place
knockout, Knockout                  attention from the last token masked in runs of layers; knocked_out: of what run_clean
                                    has recorded
TRACE_METRICS, Readings             what is read of the runs, beside the probability
answers_at                          what the model says in the three runs of one cell: CellAnswers, a RunAnswers each
BUCKETS, buckets                    where in a prompt a token stands
claims, claims_at_fact              the paper's claims, put to the test over many facts; what one fact says of them
strongest, strongest_places         peaks, read off the averages
beside_paper                        our numbers and the paper's in shares, so that models compare
samples_worth                       which number of samples is worth its cost
trace_random_weights                the same of a model that has learnt nothing
columns_of, restored_layers         which layers a column restores; READ_TOGETHER texts' logits are made at once:
                                    what a sweep does, for those who count its operations
"""

from rome_lab.tracing.averaging import BUCKETS, Traces, buckets
from rome_lab.tracing.cell_answers import CellAnswers, RunAnswers, answers_at, restored_layers
from rome_lab.tracing.corruption import FixedNoise, GaussianNoise, SubjectSwap
from rome_lab.tracing.gradients import attribution_patching, attributions, integrals, integrated_gradients
from rome_lab.tracing.knocking_out import Knockout, knocked_out, knockout
from rome_lab.tracing.lens import LogitLens, logit_lens
from rome_lab.tracing.many_facts import trace_facts
from rome_lab.tracing.metrics import TRACE_METRICS, Readings
from rome_lab.tracing.one_fact import causal_trace, restore, restore_heads, trace_of_kind
from rome_lab.tracing.pairs import SwapPair, partner_of, swap_pairs
from rome_lab.tracing.paper_claims import claims, claims_at_fact
from rome_lab.tracing.readings import beside_paper, samples_worth, strongest, strongest_places, trace_random_weights
from rome_lab.tracing.runs import Runs, TraceSettings, run_clean, run_clean_and_corrupted
from rome_lab.tracing.sweep import READ_TOGETHER, columns_of
from rome_lab.tracing.trace import KINDS, Trace
