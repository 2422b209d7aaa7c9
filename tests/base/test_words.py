"""Words in texts: whole words before parts of words, in whatever script."""

from __future__ import annotations

import pytest

from rome_lab.base.words import holds, mentions, place_of


@pytest.mark.parametrize(
    ("text", "name", "place"),
    [
        ("The artist made art and art", "art", 16),
        ("Partisan", "art", 1),
        ("Rome", "Paris", -1),
        ("C++ and C", "C++", 0),
        ("naïve, na", "na", 7),
        ("法国的首都", "法国", 0),
    ],
)
def test_a_name_is_first_sought_as_whole_words(text: str, name: str, place: int) -> None:
    assert place_of(text, name) == place


def test_mentions_takes_whole_words_in_whatever_case_and_holds_takes_parts_of_words_too() -> None:
    assert mentions("in PARIS.", "Paris") and not mentions("Parisian", "Paris")
    assert holds("Parisian", "Paris") and holds("watered", "red")
    assert not holds("oh", "H") and holds("vitamin H", "H")
