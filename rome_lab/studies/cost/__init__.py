"""The room of cost.ipynb: how tracing's time and memory grow, measured here and counted for models too large to load.

growth_of_one_trace, growth_with_facts, growth_with_workers    measured, as tidy tables
powers_in_words, rate_of, rates_in_words                       how fast they grow, and operations a second
growth_panels                                                  these tables, drawn beside what is counted
Shape, Size, size_of, published_sizes                          what of a trace and of a model decides its cost
extrapolate, larger_models                                     what many facts cost, counted from shapes alone
"""

from rome_lab.studies.cost.counting import Shape, Size, extrapolate, larger_models, published_sizes, size_of
from rome_lab.studies.cost.drawings import growth_panels
from rome_lab.studies.cost.growth import (
    growth_of_one_trace,
    growth_with_facts,
    growth_with_workers,
    powers_in_words,
    rate_of,
    rates_in_words,
)
