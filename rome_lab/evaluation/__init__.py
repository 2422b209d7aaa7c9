"""Is an edit good? Cases that judge it, metrics, methods side by side.

evaluate, methods_of, known_pool          a table: a row a case and method; the methods meant; facts to keep
remarks, story, reference_corpus          what was remarked on, one case in words, texts for RS
Case, Cases                               one request with the prompts that judge it, and a sequence of them
load_cases, known_cases, set_apart        cases of a source, those a model knows, those to search on and to report
METRICS, S_OF, summarise                  what each metric is, and means over cases with intervals
SCORINGS, CASE_PARTS, metric_of           four ways to say whether an edit holds at a prompt, where they are asked
agreement_of_scorings                     how far they agree
JudgeSettings, SCORES_ONLY, damage        how cases are judged; what a change does elsewhere, say to PASSAGES of prose
Bench, judged_or_why, questions_of        where rows are made, for studies that make their own
names_touched, spared                     what requests touch, and a case without neighbours that are edited
text_about_others                         text to measure C on that is about nobody whom cases are judged by
"""

from rome_lab.evaluation.bench import Bench, judged_or_why
from rome_lab.evaluation.bystanders import known_pool, names_touched, spared, text_about_others
from rome_lab.evaluation.cases import known_cases, load_cases, set_apart
from rome_lab.evaluation.evaluating import evaluate, methods_of, reference_corpus, remarks, story
from rome_lab.evaluation.judging import SCORES_ONLY, JudgeSettings, damage, questions_of
from rome_lab.evaluation.metrics import METRICS, S_OF, summarise
from rome_lab.evaluation.passages import PASSAGES
from rome_lab.evaluation.scorings import CASE_PARTS, SCORINGS, agreement_of_scorings, metric_of
from rome_lab.facts import Case, Cases
