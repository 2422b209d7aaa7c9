"""Facts, where they come from, their prompts, and which of them a model knows.

Fact                            what is asked of a model; facts_digest tells several from others
load_facts, load_relations      the embedded set, published sets and files
known_facts                     a random sample of the facts that a model completes (B.1)
facts_said_at_once              the same of those whose object comes first to it, which are quicker to find
read_prompt, Prompt             a prompt as tokens, and which of them are the subject's
continuation_ids, question      with which tokens a text goes on
completions, answers_to         how probable a model finds texts behind prompts, and whether it would say them
names_first                     where a text names an answer, as a model has to that knows a fact
known_among, object_token       which facts it would begin to complete, and by which token
build_cases, CHOICES            what a model is asked of a fact that it is made to change: target, paraphrases, neighbours
build_questions                 questions and answers in the form of zsRE
Case, Cases                     that as things; Unusable says why a fact gives none
success, shares_first_token     the share of a case's prompts that follow; whether its target and object begin alike
with_dependents                 cases with prompts whose answers follow from their edit, and others that stay
template_of                     a prompt with "{}" for its subject
open_set, read_each             records of a set or file, as RecordForm says what they state; identity_by tells them apart
read_counterfact, read_zsre     the fact that a record of these sets states
embedded_records, text_at       rows of the project's own files; the text at a place in a record, which is Parsed JSON
"""

from rome_lab.facts.built_cases import CHOICES, build_cases
from rome_lab.facts.built_questions import build_questions
from rome_lab.facts.case import Case, Cases, Unusable, shares_first_token, success
from rome_lab.facts.completion import answers_to, completions, known_among, names_first, object_token
from rome_lab.facts.dependents import with_dependents
from rome_lab.facts.fact import Fact, facts_digest
from rome_lab.facts.known import facts_said_at_once, known_facts
from rome_lab.facts.prompts import Prompt, continuation_ids, question, read_prompt
from rome_lab.facts.records import Parsed, text_at
from rome_lab.facts.sources import (
    RecordForm,
    embedded_records,
    identity_by,
    load_facts,
    load_relations,
    open_set,
    read_counterfact,
    read_each,
    read_zsre,
    template_of,
)
