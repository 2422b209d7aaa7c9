"""TODO front door evaluation."""

from rome_lab.evaluation.bench import Bench, judged_or_why
from rome_lab.evaluation.bystanders import names_touched, spared
from rome_lab.evaluation.case import Case
from rome_lab.evaluation.evaluating import evaluate, known_pool, methods_of
from rome_lab.evaluation.judging import SCORES_ONLY, JudgeSettings, damage, questions_of
from rome_lab.evaluation.metrics import METRICS, S_OF, summarise
