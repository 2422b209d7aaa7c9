"""The room of edit_anatomy.ipynb: the parts of one edit, what it does to other keys, and where edits work.

sizes, directions                            the vectors and matrices of an edit, and how usual their directions are
sizes_in_words, directions_in_words          what is to be noticed in these; change_at_key
other_keys, disturbance, GROUPS              what an edit does to keys that it was not made of
edit_everywhere                              one fact edited at every token and layer
agreement_with_traces, best_by_token         whether edits work where causal tracing says that the fact is
trace_in_words, best_edit_in_words           where each of them is best
vector_figure, disturbance_figure, sweep_figure    the notebook's figures; quantiles, medians: the numbers of the boxes
direction_lines, constraint, disturbance_boxes, sweep_heatmap, COLUMNS    their panels
"""

from rome_lab.studies.anatomy.drawings import (
    COLUMNS,
    constraint,
    direction_lines,
    disturbance_boxes,
    disturbance_figure,
    medians,
    quantiles,
    sweep_figure,
    sweep_heatmap,
    vector_figure,
)
from rome_lab.studies.anatomy.measures import (
    GROUPS,
    agreement_with_traces,
    best_by_token,
    directions,
    disturbance,
    edit_everywhere,
    other_keys,
    sizes,
)
from rome_lab.studies.anatomy.sentences import (
    best_edit_in_words,
    change_at_key,
    directions_in_words,
    sizes_in_words,
    trace_in_words,
)
