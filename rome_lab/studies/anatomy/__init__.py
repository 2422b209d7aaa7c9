"""The room of edit_anatomy.ipynb: the parts of one edit, what it does to other keys, and where edits work.

    sizes, directions                  the vectors and matrices of an edit, and how usual their directions are
    other_keys, disturbance, GROUPS    what an edit does to keys that it was not made of
    edit_everywhere                    one fact edited at every token and layer
    agreement_with_traces              whether edits work where causal tracing says that the fact is
    direction_lines, constraint, disturbance_boxes, quantiles, sweep_heatmap, COLUMNS    these tables, drawn
"""

from rome_lab.studies.anatomy.drawings import (
    COLUMNS,
    constraint,
    direction_lines,
    disturbance_boxes,
    quantiles,
    sweep_heatmap,
)
from rome_lab.studies.anatomy.measures import (
    GROUPS,
    agreement_with_traces,
    directions,
    disturbance,
    edit_everywhere,
    other_keys,
    sizes,
)
