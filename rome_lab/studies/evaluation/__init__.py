"""The room of evaluation.ipynb: the summary of an evaluation drawn, beside the paper, and taken apart.

    dots, dot_table, curves, curve_panels    a summary in, Axes or a Figure out; UNITS of metrics, PAGE_WIDTH
    paper_numbers, agreement_with_paper      the paper's means, and whether ours say the same
    case_scores                              by which single cases are told good from bad
    paraphrase_scores, by_opening            paraphrases one by one: where does an edit not generalise?
"""

from rome_lab.studies.evaluation.drawings import PAGE_WIDTH, UNITS, curve_panels, curves, dot_table, dots
from rome_lab.studies.evaluation.paper import agreement_with_paper, case_scores, paper_numbers
from rome_lab.studies.evaluation.paraphrases import by_opening, paraphrase_scores
