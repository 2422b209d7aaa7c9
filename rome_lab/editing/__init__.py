"""TODO front door editing."""

from rome_lab.editing.auditing import TEXT, audit, nearest_facts, neighbours_of
from rome_lab.editing.edit import Edit, describe_edit, load_edit
from rome_lab.editing.exact import rome, rome_many
from rome_lab.editing.keys import key_size, run_to_keys, sample_prefixes, subject_keys
from rome_lab.editing.methods import METHODS, SEARCH, Method, Proposal, Rome, measured_on
from rome_lab.editing.optima import Optima
from rome_lab.editing.requests import Request, check_requests, layer_to_edit
from rome_lab.editing.second_moment import covariance, covariances
from rome_lab.editing.settings import KEYS, EditSettings, default_settings
from rome_lab.editing.texts import FolderText, SampledText, Source, WikipediaText
from rome_lab.editing.update import ENOUGH, Factor, factorise, solve_update
