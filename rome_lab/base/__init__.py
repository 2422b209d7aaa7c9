"""TODO front door base."""

from rome_lab.base.checks import check_text, check_whole
from rome_lab.base.files import check_writable, explained, user_cache, write_atomically
from rome_lab.base.intervals import MeanCI, mean_ci
from rome_lab.base.one_line import OneLine
from rome_lab.base.seeds import seed_from, uniform
from rome_lab.base.store import USER_CACHE, Basket, Json, Record, Store, canonical_json, opened
from rome_lab.base.versions import code_version, package_versions
from rome_lab.base.words import holds, mentions, place_of, visible
