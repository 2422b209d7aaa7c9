"""The room of evaluation.ipynb: the summary of an evaluation drawn, beside the paper, and taken apart.

definitions, table_of_means               what each metric is; a summary as a table to read, means with intervals
scores_of                                 which scores a summary has
table_of_scorings, scorings_figure        four ways to say whether an edit holds, side by side
dots, dot_table, curves, curve_panels     a summary in, Axes or a Figure out; UNITS of metrics, PAGE_WIDTH
methods_figure, plotted_numbers           the notebook's figure, and the numbers that are written beside it
paper_numbers, agreement_with_paper       the paper's means, and whether ours say the same; verdicts_in_words
differences_to, table_of_differences      every method less ROME, paired within the case
aims_in_words                             whether ROME reaches the marks that this project has set itself
case_scores, worst_first                  by which single cases are told good from bad, and the cases in that order
paraphrase_scores, by_opening             paraphrases one by one: where does an edit not generalise? failures_in_words
"""

from rome_lab.studies.evaluation.drawings import (
    PAGE_WIDTH,
    UNITS,
    curve_panels,
    curves,
    dot_table,
    dots,
    methods_figure,
    plotted_numbers,
    scorings_figure,
)
from rome_lab.studies.evaluation.paired_differences import differences_to, table_of_differences
from rome_lab.studies.evaluation.paper import (
    agreement_with_paper,
    aims_in_words,
    case_scores,
    paper_numbers,
    verdicts_in_words,
    worst_first,
)
from rome_lab.studies.evaluation.paraphrases import by_opening, failures_in_words, paraphrase_scores
from rome_lab.studies.evaluation.tables import definitions, scores_of, table_of_means, table_of_scorings
