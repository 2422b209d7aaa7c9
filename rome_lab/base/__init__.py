"""What knows no model: files and the store, versions, seeds, checks, intervals, words.

Store, Basket, USER_CACHE   results by all that determines them: in a folder, in memory, in the user's cache
Record, Json                what is kept, and what it is kept under
opened                      what a caller means by `store=`: a folder, a Store, or None
canonical_json              the one text of a JSON value
code_version                which code a result rests on, and package_versions which packages
write_atomically            a file, whole or not at all; explained, check_writable, check_file, user_cache
seed_from, uniform          random numbers that depend on what they are for, and on nothing else
check_text, check_whole     arguments refused in a sentence
mean_ci, MeanCI             a mean over facts, or cases, with its 95% interval; share_ci, harmonic_mean_ci of shares
mentions, holds, place_of   names in texts, and visible, texts made safe to draw; differing, where two texts differ
blank_behind, without_end  blanks where a text goes on; is_unspaced tells scripts that have none;
                            other_spelling says how names that look alike differ
OneLine                     results that show themselves in one line; Tell, how long work says how far it has come
"""

from rome_lab.base.checks import check_text, check_whole
from rome_lab.base.display import OneLine, Tell
from rome_lab.base.files import check_file, check_writable, explained, user_cache, write_atomically
from rome_lab.base.intervals import MeanCI, harmonic_mean_ci, mean_ci, share_ci
from rome_lab.base.seeds import seed_from, uniform
from rome_lab.base.store import USER_CACHE, Basket, Json, Record, Store, canonical_json, opened
from rome_lab.base.versions import code_version, package_versions
from rome_lab.base.words import (
    blank_behind,
    differing,
    holds,
    is_unspaced,
    mentions,
    other_spelling,
    place_of,
    visible,
    without_end,
)
