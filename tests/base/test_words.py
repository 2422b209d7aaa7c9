"""Words in texts: whole words before parts of words, in whatever script."""

from __future__ import annotations

import pytest

from rome_lab.base.words import blank_behind, differing, holds, mentions, other_spelling, place_of, without_end


@pytest.mark.parametrize(
    ("text", "name", "place"),
    [
        ("The artist made art and art", "art", 16),
        ("Partisan", "art", 1),
        ("Rome", "Paris", -1),
        ("C++ and C", "C++", 0),
        ("naïve, na", "na", 7),
        ("法国的首都", "法国", 0),
        ("大法国的首都", "法国", 1),
        ("カナダの首都はオタワ", "オタワ", 7),
    ],
)
def test_a_name_is_first_sought_as_whole_words(text: str, name: str, place: int) -> None:
    assert place_of(text, name) == place


def test_mentions_takes_whole_words_in_whatever_case_and_holds_takes_parts_of_words_too() -> None:
    assert mentions("in PARIS.", "Paris") and not mentions("Parisian", "Paris")
    assert holds("Parisian", "Paris") and holds("watered", "red")
    assert not holds("oh", "H") and holds("vitamin H", "H")


def test_in_scripts_without_blanks_a_name_is_mentioned_wherever_it_stands() -> None:
    assert mentions("法国的首都是巴黎市", "巴黎") and mentions("เมืองหลวงของไทยคือกรุงเทพ", "กรุงเทพ")
    assert not mentions("Parisian", "Paris") and mentions("in 巴黎 now", "巴黎")


@pytest.mark.parametrize(
    ("text", "blank"),
    [
        ("is located in the city of", " "),
        ("法国的首都是", ""),
        ("首都は、", ""),
        ("เมืองหลวงคือ", ""),
        ("서울은", " "),  # Korean is written with blanks
        ("is called “", ""),
        ("is called («", ""),
        ('is called "', ""),
        ('he said "yes"', " "),
        ("the singer's", " "),
        ("the dogs'", " "),
        ("the Franco-", ""),
        ("the answer -", " "),
        ("The answer:\n", ""),
        ("The answer:\t", ""),
        ("(see (", ""),
        ("(see)", " "),
    ],
)
def test_a_word_is_parted_from_the_text_before_it_as_it_would_be_written(text: str, blank: str) -> None:
    assert blank_behind(text) == blank


@pytest.mark.parametrize("end", [" ", "  ", "\u00a0", " \u202f"])
def test_blanks_at_the_end_of_a_prompt_go_and_what_is_meant_stays(end: str) -> None:
    assert without_end("city of" + end) == "city of" and without_end("city of\n" + end) == "city of\n"
    assert without_end("city of\t") == "city of\t"


@pytest.mark.parametrize(
    ("text", "name", "why"),
    [
        ("Beyonce\u0301 is", "Beyonc\u00e9", "NFC and NFD"),
        ("Beyonc\u00e9 is", "Beyonce\u0301", "NFC and NFD"),
        ("O’Neill is", "O'Neill", "other apostrophes"),
        ("the “Heroes” of", '"Heroes"', "quotation marks"),
        ("New\u00a0York is", "New York", "blanks, which look alike"),
        ("mount fuji is", "Mount Fuji", "other capitals"),
        ("Rome is", "Paris", ""),
    ],
)
def test_why_a_name_that_looks_alike_is_not_in_a_text_is_said(text: str, name: str, why: str) -> None:
    assert why in other_spelling(text, name) and bool(why) == bool(other_spelling(text, name))


def test_texts_are_parted_where_they_differ() -> None:
    assert differing("one two three", "one three four") == [("one", False), ("three", False), ("four", True)]
    assert differing("same here", "same  here") == [("same here", False)]
    assert differing("", "all new") == [("all new", True)]
    assert differing("all gone", "") == []
