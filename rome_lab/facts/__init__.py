"""TODO front door facts."""

from rome_lab.facts.completion import completions, known_among, object_token
from rome_lab.facts.fact import Fact
from rome_lab.facts.known import known_facts
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
