"""Making a model say something else (Appendix A): what an edit is, how it is made, and what it does.

rome, rome_many                         the smallest change of one matrix that maps keys to their values, as an Edit
memit, emmet, alphaedit                 its successors, at several layers, by one solver
EDITORS, edit_by, layers_that_end_at    any of these by name, and the layers that one of several changes
Edit, load_edit, describe_edit          edits as things: applied, undone, saved, loaded; layers_in_words
EditSettings, KEYS, default_settings    how to edit, and where, by default; LeastSquares for how a change is solved for
Request, check_requests, layer_to_edit  what is asked of an edit, checked without running the model; the layer that is meant
audit, TEXT                             what an edit does where it should and where it should not; the text it reads
neighbours_of, nearest_facts            facts that an edit should not touch
covariance, covariances                 C = E[k kT], measured on a Source of text
SampledText, FolderText, WikipediaText  those sources
sample_prefixes, subject_keys           prefixes of a prompt, and keys at its subject's last token
run_to_keys, key_size                   all keys of texts at some layers; H
solve_update, factorise, Factor         the least squares behind an edit, on matrices; ENOUGH tokens for C
Method, METHODS, SEARCH, measured_on    ways to edit, behind one interface: a Proposal of each for the same requests
methods_for(lm)                         the names of those that are ready for a model
KnowledgeNeurons, Neurons               knowledge neurons among them, and how they are found
Learned, Training, train_editor         MEND and KE (TRAINED), networks trained to edit, on own_facts: a TrainedEditor
suggest_layer, LayerSuggestion          which layer to edit in a model that nobody has edited; settle takes it for methods
Rome, LayeredRome                       the ROME family among them, at one layer and at several
verify                                  whether a model is traced and edited exactly, beside plain runs of it
Optima, Sought, mean_length             v*, keys, prefixes and C, each found once for all of them; how long v* is
"""

from rome_lab.editing.auditing import TEXT, audit, nearest_facts, neighbours_of
from rome_lab.editing.edit import Edit, describe_edit, layers_in_words, load_edit
from rome_lab.editing.editors import EDITORS, alphaedit, edit_by, emmet, layers_that_end_at, memit
from rome_lab.editing.exact import rome, rome_many
from rome_lab.editing.hypernetworks import TRAINED, Training
from rome_lab.editing.keys import key_size, run_to_keys, sample_prefixes, subject_keys
from rome_lab.editing.knowledge_neurons import Neurons
from rome_lab.editing.layer_search import settle, suggest_layer
from rome_lab.editing.layer_suggestion import LayerSuggestion
from rome_lab.editing.method_table import METHODS, SEARCH, methods_for
from rome_lab.editing.methods import KnowledgeNeurons, LayeredRome, Learned, Method, Proposal, Rome, measured_on
from rome_lab.editing.optima import Optima, Sought, mean_length
from rome_lab.editing.requests import Request, check_requests, layer_to_edit
from rome_lab.editing.second_moment import covariance, covariances
from rome_lab.editing.settings import KEYS, EditSettings, LeastSquares, default_settings
from rome_lab.editing.texts import FolderText, SampledText, Source, WikipediaText
from rome_lab.editing.trained_editors import TrainedEditor, own_facts, train_editor
from rome_lab.editing.update import ENOUGH, Factor, factorise, solve_update
from rome_lab.editing.verifying import verify
