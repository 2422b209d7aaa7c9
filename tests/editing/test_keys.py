"""Prefixes are the model's own, seeded, and plain text; k* is the input of W at the subject's last token, everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import FAMILIES, tiny_model

from rome_lab.editing.keys import k_star, one_key, sample_prefixes, subject_keys
from rome_lab.editing.settings import KEYS
from rome_lab.facts.fact import Fact
from rome_lab.facts.prompts import read_prompt

FACT = Fact("Eiffel Tower", "The {} is in", "Paris")
PREFIXES = ("In Paris. ", "The city. ", "She was born in Rome. ", "The Eiffel Tower. ")
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=5)


def input_of_W(lm, layer, ids, place):
    """(H,) by one full forward of the model."""
    seen = []
    handle = lm.memory(layer).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        lm.model(ids[None], use_cache=False)
    handle.remove()
    return seen[0].reshape(len(ids), -1)[place]


def test_a_prefix_depends_on_the_seed_and_its_own_place_only() -> None:
    lm = tiny_model("llama")
    prefixes = sample_prefixes(lm, (9, 14, 9), seed=1)
    assert sample_prefixes(lm, (9, 14, 9, 11), seed=1)[:3] == prefixes
    assert sample_prefixes(lm, (9, 8, 9), seed=1)[::2] == prefixes[::2]
    assert not set(sample_prefixes(lm, (9, 14, 9), seed=2)) & set(prefixes)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefixes_are_lines_that_end_as_a_sentence(family) -> None:
    for prefix in sample_prefixes(tiny_model(family), (1, 5, 10, 3)):
        assert prefix.endswith(". ") and len(prefix) > 2
        assert not set("\n\r\ufffd") & set(prefix) and "<eos>" not in prefix and "<bos>" not in prefix
        assert prefix[:-2] == prefix[:-2].strip()


def test_prefixes_of_the_embedded_model_have_the_length_asked_for_in_words_that_differ(lm) -> None:
    lengths = (5,) * 5 + (10,) * 5
    prefixes = sample_prefixes(lm, lengths)
    assert len(set(prefixes)) == len(prefixes)
    for prefix, length in zip(prefixes, lengths, strict=True):
        assert abs(len(lm.tokenizer(prefix.strip())["input_ids"]) - 1 - length) <= 1
    assert sample_prefixes(lm, ()) == ()


@given(TEXT, TEXT, TEXT, TEXT)
def test_the_subject_is_found_behind_any_prefix(prefix, before, subject, after) -> None:
    lm = tiny_model("llama")
    assume(subject.strip() == subject and "{}" not in before)
    fact = Fact(subject, before + "{}" + after, "x")
    prompt = read_prompt(lm, fact, prefix=prefix)
    begin, end = prompt.subject_range
    offsets = lm.tokenizer(prompt.text, return_offsets_mapping=True)["offset_mapping"]
    first = len(prefix + before)
    assert prompt.text == prefix + before + subject + after
    assert offsets[begin][0] <= first < offsets[begin][1]
    assert offsets[end - 1][0] < first + len(subject) <= offsets[end - 1][1]


@pytest.mark.parametrize("text", ['He said "{}". ', "{subject} {0} %s. ", "It’s {} and {}. "])
def test_braces_and_quotes_in_prefix_and_subject_are_plain_text(text) -> None:
    lm = tiny_model("llama")
    fact = Fact('the "{}" of {x}', "On {} is", "x")
    prompt = read_prompt(lm, fact, prefix=text)
    assert prompt.text == text + 'On the "{}" of {x} is'
    assert 'the "{}" of {x}' in lm.tokenizer.decode(prompt.ids[slice(*prompt.subject_range)])


def test_without_a_prefix_the_prompt_is_read_as_in_tracing() -> None:
    lm = tiny_model("llama")
    ours, theirs = read_prompt(lm, FACT, prefix=""), read_prompt(lm, FACT.prompt, FACT.subject)
    assert torch.equal(ours.ids, theirs.ids) and ours.subject_range == theirs.subject_range


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_the_inputs_of_W_in_a_full_forward(family) -> None:
    lm = tiny_model(family)
    prompts = [read_prompt(lm, FACT, prefix=prefix) for prefix in ("", *PREFIXES)]
    keys = subject_keys(lm, 2, prompts)
    for key, prompt in zip(keys, prompts, strict=True):
        expected = input_of_W(lm, 2, prompt.ids, prompt.subject_range[1] - 1)
        torch.testing.assert_close(key.float(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_each_key_option_is_what_its_name_says() -> None:
    lm = tiny_model("gpt2")
    bare, averaged, both = (k_star(lm, FACT, 1, key, PREFIXES) for key in ("bare", "averaged", "both"))
    behind = [k_star(lm, replace(FACT, template=prefix + FACT.template), 1, "bare") for prefix in PREFIXES]
    torch.testing.assert_close(averaged, torch.stack(behind).mean(0))
    torch.testing.assert_close(bare[:, 0], subject_keys(lm, 1, [read_prompt(lm, FACT)])[0].float())
    assert torch.equal(both, torch.cat([bare, averaged], dim=1)) and both.dtype == torch.float32
    assert float((bare - averaged).norm() / bare.norm()) > 0.01, "the two keys are to differ here"


def test_the_opening_key_is_that_of_a_text_which_begins_with_the_subject() -> None:
    lm = tiny_model("gpt2")
    opened = replace(FACT, template=FACT.template[FACT.template.index("{}") :])
    assert not FACT.template.startswith("{}")
    opening = one_key(lm, FACT, 1, "opening")
    torch.testing.assert_close(opening, k_star(lm, opened, 1, "bare"))
    bare, averaged = k_star(lm, FACT, 1, "both", PREFIXES).split(1, dim=1)
    assert torch.equal(k_star(lm, FACT, 1, "all", PREFIXES), torch.cat([bare, opening, averaged], dim=1))


def test_a_subject_of_one_token_has_no_opening_key_since_it_would_be_that_of_every_text() -> None:
    lm = tiny_model("gpt2")
    short = Fact("J", "The country of {} is in", "Asia")
    assert read_prompt(lm, replace(short, template="{} is in")).subject_range == (0, 1)
    assert one_key(lm, short, 1, "opening").shape[1] == 0
    assert torch.equal(k_star(lm, short, 1, "all", PREFIXES), k_star(lm, short, 1, "both", PREFIXES))


def test_the_key_does_not_depend_on_what_follows_the_subject_nor_on_the_order_of_the_prefixes() -> None:
    lm = tiny_model("qwen2")
    expected = k_star(lm, FACT, 2, "both", PREFIXES)
    other = k_star(lm, Fact("Eiffel Tower", "The {} was born in 1999", "x"), 2, "both", PREFIXES[::-1])
    torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)


def test_bad_requests_for_keys_are_refused_with_a_sentence() -> None:
    lm = tiny_model("llama")
    with pytest.raises(ValueError, match="key is 'mean'; expected one of 'all', 'both', 'averaged', 'bare'"):
        k_star(lm, FACT, 1, "mean", PREFIXES)
    for key in set(KEYS) - {"bare"}:
        with pytest.raises(ValueError, match="averages over prefixes, but none are given"):
            k_star(lm, FACT, 1, key)
    with pytest.raises(ValueError, match=r"has \d+ tokens behind the prefix .*reads at most 64; shorten it"):
        k_star(lm, FACT, 1, "averaged", ("very " * 60,))
    with torch.no_grad():
        lm.memory(0).weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        k_star(lm, FACT, 1, "bare")
