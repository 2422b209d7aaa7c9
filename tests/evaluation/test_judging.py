"""Judging: many changes of one case at once against one forward a question, and editors whose values are known."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_changes import changes_of, random_change
from tiny import FAMILIES, tiny_model

from rome_lab.editing.auditing import TEXT
from rome_lab.evaluation import metrics
from rome_lab.evaluation.judging import JudgeSettings, judge_all, judge_case
from rome_lab.facts.case import Case
from rome_lab.facts.fact import Fact
from rome_lab.facts.prompts import continuation_ids
from rome_lab.models import sampling, scoring
from rome_lab.models.batching import Batching
from rome_lab.models.changes import Change
from rome_lab.models.scoring import Question, score, shared_rows

TINY = Case(
    id="1",
    fact=Fact("Marie", "{} was born in", "Paris"),
    target="the city",
    paraphrases=("It is in Japan that Marie was born in", "Marie is in"),
    neighbours=("Windows is in", "Curie was in", "Tokyo is"),
    neighbour_answers=("Paris", "Rome", "Japan"),
    generation_prompts=("Marie is", "In the city of"),
    references=("The city of Paris is the city.", "She worked in the city."),
    choices=("Rome", "the city of Rome"),
)
KNOWN = (Fact("Japan", "{} is in", "Tokyo"), Fact("France", "The capital of {} is", "Paris"))
SETTINGS = JudgeSettings(new_tokens=8, text_tokens=20, written_tokens=6, known=KNOWN, corpus=TINY.references)
TOLERANCE = {"rel": 1e-3, "abs": 1e-3}


@torch.no_grad()
def log_p(lm, prompt, continuation):
    """The slow way: one forward of one text; (tokens,) log p and whether each token is the greedy one."""
    context = lm.tokenizer(prompt)["input_ids"]
    said = continuation_ids(lm, prompt, continuation)
    logits = lm.model(torch.tensor([context + said]), use_cache=False).logits[0, len(context) - 1 : -1].double()
    return logits.log_softmax(-1)[range(len(said)), said].numpy(), (logits.argmax(-1) == torch.tensor(said)).numpy()


def generate(lm, changes, prompts, *options, **others):
    """What the model writes after the same prompts under each change."""
    return sampling.generate(lm, changes, [prompts] * len(changes), *options, **others)


def numbers(marks):
    return {name: value for name, value in marks.items() if name not in ("generations", "written", "verdicts")}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_a_padded_batch_equal_one_forward_a_question_in_the_changed_model(family):
    lm = tiny_model(family)
    changes = [*changes_of(lm), Change(preamble="Rome. ")]
    asked = [
        (owner, changes[owner].preamble + prompt, said)
        for prompt in (TINY.fact.prompt, *TINY.paraphrases, *TINY.neighbours)
        for owner in (3, 0, 4, 2, 1)
        for said in ("Paris", "the city", "the city of Rome")
    ]
    questions = [
        Question(owner, tuple(lm.tokenizer(prompt)["input_ids"]), tuple(continuation_ids(lm, prompt, said)))
        for owner, prompt, said in asked
    ]
    for (owner, prompt, said), found in zip(asked, score(lm, changes, questions), strict=True):
        with changes[owner].applied(lm):
            wanted, greedy = log_p(lm, prompt, said)
        np.testing.assert_allclose(found.log_p, wanted, rtol=2e-4, atol=2e-4)
        assert (found.greedy == greedy).all()


def test_rows_are_shared_by_questions_whose_texts_begin_alike_and_only_within_a_change():
    questions = [
        Question(0, (1, 2), (3,)),
        Question(0, (1, 2), (4,)),  # the same text
        Question(0, (1, 2), (5, 6, 7)),  # goes on from it
        Question(0, (1,), (2,)),  # begins it
        Question(0, (1, 2), (9, 6)),  # parts from it
        Question(1, (1, 2), (3,)),
    ]
    rows, row_of = shared_rows(questions)
    assert sorted(rows) == [(0, (1, 2, 5, 6)), (0, (1, 2, 9)), (1, (1, 2))]
    for question, row in zip(questions, row_of, strict=True):
        assert rows[row][0] == question.owner
        assert rows[row][1][: len(question.text)] == question.text


def test_the_batch_is_split_where_memory_is_short_and_the_scores_stay(monkeypatch):
    lm = tiny_model("llama")
    whole = judge_case(lm, TINY, changes_of(lm), SETTINGS)
    calls = []
    run = scoring.last_states
    monkeypatch.setattr(scoring, "text_bytes", lambda lm, length, cached: 1)
    Batching.learned[lm] = 3
    monkeypatch.setattr(
        scoring,
        "last_states",
        lambda lm, changes, rows, *rest: calls.append(len(rows)) or run(lm, changes, rows, *rest),
    )
    monkeypatch.setattr(scoring, "READ", 2)
    for split, together in zip(judge_case(lm, TINY, changes_of(lm), SETTINGS), whole, strict=True):
        assert numbers(split) == pytest.approx(numbers(together), **TOLERANCE)
    assert len(calls) > 5 and max(calls) == 3


def greedy_text(lm, prompt, n):
    """What transformers writes after a prompt."""
    ids = lm.tokenizer(prompt, return_tensors="pt")["input_ids"]
    text = lm.model.generate(ids, do_sample=False, max_new_tokens=n, pad_token_id=1)[0]
    return lm.tokenizer.decode(text, skip_special_tokens=True)[len(prompt) :]


def by_hand(lm, case):
    """The metrics of the model as it is, from one forward a question."""
    p = {said: math.exp(log_p(lm, case.fact.prompt, said)[0].sum()) for said in (case.target, case.fact.object)}
    found = {"ES": 100.0 * (p[case.target] > p[case.fact.object]), "EM": 100 * (p[case.target] - p[case.fact.object])}
    pairs = {
        "P": [(prompt, case.target, case.fact.object) for prompt in case.paraphrases],
        "N": [(x, own, case.target) for x, own in zip(case.neighbours, case.neighbour_answers, strict=True)],
    }
    for letter, asked in pairs.items():
        gaps = [math.exp(log_p(lm, x, a)[0].sum()) - math.exp(log_p(lm, x, b)[0].sum()) for x, a, b in asked]
        found |= {
            f"{letter}S": 100 * sum(gap > 0 for gap in gaps) / len(gaps),
            f"{letter}M": 100 * sum(gaps) / len(gaps),
        }
    wanted = {"E": [(case.fact.prompt, case.target, case.fact.object)], **pairs}
    for letter, asked in wanted.items():
        found[f"{letter}_argmax"] = 100 * np.mean([log_p(lm, x, a)[1].all() for x, a, _ in asked])
        best = [max((a, b, *case.choices), key=lambda text, x=x: log_p(lm, x, text)[0].sum()) for x, a, b in asked]
        found[f"{letter}_choice"] = 100 * np.mean([text == a for text, (_, a, _) in zip(best, asked, strict=True)])
        found[f"{letter}_written"] = 100 * np.mean([a in greedy_text(lm, x, 6)[: len(a) + 1] for x, a, _ in asked])
    first, rest = TEXT.split(" ", 1)
    found["nll"] = -log_p_head(lm, first, rest, SETTINGS.text_tokens)
    found["known"] = 50.0 * sum(log_p(lm, fact.prompt, fact.object)[1].all() for fact in KNOWN)
    return found


@torch.no_grad()
def log_p_head(lm, first, rest, tokens):
    context = lm.tokenizer(first)["input_ids"]
    said = continuation_ids(lm, first, rest)[:tokens]
    logits = lm.model(torch.tensor([context + said])).logits[0, len(context) - 1 : -1].double()
    return float(logits.log_softmax(-1)[range(tokens), said].mean())


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_each_change_gets_the_metrics_of_the_changed_model_computed_one_forward_a_question(family):
    lm = tiny_model(family)
    changes = changes_of(lm)
    for change, marks in zip(changes, judge_case(lm, TINY, changes, SETTINGS), strict=True):
        with change.applied(lm):
            wanted = by_hand(lm, TINY)
        assert {name: marks[name] for name in wanted} == pytest.approx(wanted, **TOLERANCE)
        assert marks["GE"] == metrics.generation_entropy(marks["generations"])
        assert marks["RS"] == metrics.reference_score(marks["generations"], TINY.references, SETTINGS.corpus)
        assert set(marks) == {*wanted, "GE", "RS", "generations", "written", "verdicts"}
        with change.applied(lm):
            assert marks["written"]["neighbours"] == [greedy_text(lm, x, 6) for x in TINY.neighbours]


def test_the_company_and_the_order_of_the_changes_do_not_matter():
    lm = tiny_model("mistral")
    changes = changes_of(lm)
    together = judge_case(lm, TINY, changes, SETTINGS)
    for change, marks in zip(changes, together, strict=True):
        (alone,) = judge_case(lm, TINY, [change], SETTINGS)
        assert all(alone[name] == marks[name] for name in ("generations", "written", "verdicts"))
        assert numbers(alone) == pytest.approx(numbers(marks), **TOLERANCE)
    turned = judge_case(lm, TINY, changes[::-1], SETTINGS)[::-1]
    assert [x["generations"] for x in turned] == [x["generations"] for x in together]


def test_a_preamble_stands_before_every_prompt_and_is_left_out_of_the_texts():
    lm = tiny_model("gpt2")
    words = "Rome is in Japan. "
    settings = replace(SETTINGS, text_tokens=0, known=(), top_k=1)
    behind = replace(
        TINY,
        fact=replace(TINY.fact, template=words + TINY.fact.template),
        paraphrases=tuple(words + x for x in TINY.paraphrases),
        neighbours=tuple(words + x for x in TINY.neighbours),
        generation_prompts=tuple(words + x for x in TINY.generation_prompts),
    )
    with_preamble, plain = judge_case(lm, TINY, [Change(preamble=words), Change()], settings)
    (written_out,) = judge_case(lm, behind, [Change()], settings)
    assert with_preamble["generations"] == [x.removeprefix(words) for x in written_out["generations"]]
    assert with_preamble["generations"] != plain["generations"]
    for name in ("ES", "EM", "PS", "PM", "NS", "NM"):
        assert with_preamble[name] == pytest.approx(written_out[name], **TOLERANCE)
    assert with_preamble["EM"] != pytest.approx(plain["EM"], **TOLERANCE)


def test_zsre_gives_the_share_of_the_tokens_that_are_the_most_probable_ones(lm):
    prompt, target = "The capital of Italy is", "Rome, which lies in France"
    elsewhere, neighbour = "The capital of Japan is", "Tokyo"
    fact = Fact("Italy", "The capital of {} is", target)
    case = Case("1", fact, target, (prompt, elsewhere), (elsewhere, prompt), (neighbour,) * 2, form="zsre")
    (marks,) = judge_case(lm, case, [Change()], JudgeSettings(text_tokens=0))
    here, there = (log_p(lm, x, target)[1].mean() for x in (prompt, elsewhere))
    assert 0 < here < 1 and here != there
    assert log_p(lm, elsewhere, neighbour)[1].all() and not log_p(lm, prompt, neighbour)[1].any()
    assert marks["generations"] == [] and set(marks["verdicts"]["rewrite"]) == {"argmax", "written"}
    assert {name: marks[name] for name in ("E_argmax", "N_argmax", "N_written")} == {
        "E_argmax": 0.0,
        "N_argmax": 50.0,
        "N_written": 50.0,
    }
    assert not {"ES", "EM", "E_choice"} & set(marks)
    assert {name: marks[name] for name in ("efficacy", "paraphrase", "specificity")} == pytest.approx(
        {"efficacy": 100 * here, "paraphrase": 50 * (here + there), "specificity": 50.0}
    )


# Editors whose values are known. OPT's keys are never negative (ReLU), so delta = size d 1T adds much of d everywhere.


def always(lm, d, size=1e4):
    """A change that makes the last block say d, whatever it reads."""
    return Change(lm.n_layers - 1, size * torch.outer(d, torch.ones(lm.memory(0).weight.shape[1])))


def one_token_words(lm):
    """Words that are one token after a blank."""
    return [word for word in ("the", "city", "is", "in", "of", "Paris") if len(continuation_ids(lm, "a", word)) == 1]


@torch.no_grad()
def always_says(lm):
    """(change, word): after it the model says the word everywhere, with a probability of nearly 1."""
    lm.model.lm_head.weight.mul_(3)  # a surer model
    best = {}
    for word in one_token_words(lm):
        (token,) = continuation_ids(lm, "a", word)
        d = lm.model.model.decoder.project_out.weight.T @ lm.model.lm_head.weight[token]
        best[word] = (float(lm.logits(1e4 * d).softmax(-1)[token]), d)
    word = max(best, key=lambda x: best[x][0])
    assert best[word][0] > 0.99
    return always(lm, best[word][1]), word


def test_an_editor_that_always_says_the_target_has_full_efficacy_and_no_neighbourhood():
    lm = tiny_model("opt")
    change, word = always_says(lm)
    case = replace(TINY, target=word)
    marks, before = judge_case(lm, case, [change, Change()], replace(SETTINGS, top_k=1))
    assert (marks["ES"], marks["PS"], marks["NS"]) == (100.0, 100.0, 0.0)
    assert marks["EM"] > 99 and marks["PM"] > 99 and marks["NM"] < -99
    assert marks["known"] == 0.0 and marks["nll"] > before["nll"]
    assert marks["generations"] == [prompt + f" {word}" * 8 for prompt in case.generation_prompts]
    said = [marks[f"{letter}_{scoring}"] for letter in "EPN" for scoring in ("argmax", "choice", "written")]
    assert said == [100.0] * 6 + [0.0] * 3
    assert marks["GE"] < before["GE"]
    row = metrics.summarise(pd.DataFrame([marks | {"method": "always"}])).set_index("metric")["mean"]
    assert row["S"] == 0.0 and row["perplexity"] == pytest.approx(math.exp(marks["nll"]))


@torch.no_grad()
def test_an_editor_that_breaks_the_model_into_saying_anything_has_the_values_of_chance():
    lm = tiny_model("opt")
    decoder = lm.model.model.decoder
    decoder.final_layer_norm.bias.zero_()
    ignored = torch.cat([decoder.project_out.weight, torch.ones(1, 32)])  # directions that d must be free of
    d = torch.linalg.svd(ignored, full_matrices=True).Vh[-1]
    one, other = one_token_words(lm)[:2]
    case = replace(TINY, target=f"{one} {other}", neighbour_answers=(one, one, f"{one} {other}"))
    case = replace(case, fact=replace(case.fact, object=other))
    (marks,) = judge_case(lm, case, [always(lm, d, size=1e6)], replace(SETTINGS, new_tokens=0))
    p = 1 / 300
    assert marks["nll"] == pytest.approx(math.log(300), rel=1e-3)
    assert marks["EM"] == pytest.approx(100 * (p**2 - p), rel=2e-3) == marks["PM"]
    assert marks["NM"] == pytest.approx(100 * 2 / 3 * (p - p**2), rel=2e-3)
    assert (marks["ES"], marks["PS"]) == (0.0, 0.0)


def test_no_edit_of_facts_that_the_model_knows_has_no_efficacy_and_full_neighbourhood(lm):
    case = Case(
        id="1",
        fact=Fact("France", "The capital of {} is", "Paris"),
        target="Rome",
        paraphrases=("The capital city of France is", "The capital of France is the city of"),
        neighbours=("The capital of Japan is", "The capital of Germany is", "The capital of Spain is"),
        neighbour_answers=("Tokyo", "Berlin", "Madrid"),
    )
    known = (Fact("Italy", "The capital of {} is", "Rome"),)
    (marks,) = judge_case(lm, case, [Change()], JudgeSettings(new_tokens=0, known=known))
    assert (marks["ES"], marks["PS"], marks["NS"], marks["known"]) == (0.0, 0.0, 100.0, 100.0)
    assert marks["EM"] < 0 < marks["NM"]
    assert 1.0 < marks["nll"] < 5.0


# Generation


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_side_by_side_is_what_transformers_generates_from_one_prompt(family):
    lm = tiny_model(family)
    lm.model.generation_config.eos_token_id = [0, 1]
    changes = changes_of(lm)
    prompts = ("Marie Curie was", "The capital of France is Paris. The", "In")
    for change, texts in zip(changes, generate(lm, changes, prompts, new_tokens=10, top_k=1), strict=True):
        for prompt, text in zip(prompts, texts, strict=True):
            ids = lm.tokenizer(prompt, return_tensors="pt")["input_ids"]
            with change.applied(lm):
                wanted = lm.model.generate(ids, do_sample=False, max_new_tokens=10, pad_token_id=1)
            assert text == lm.tokenizer.decode(wanted[0], skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_that_is_whole_ends_there_and_leaves_the_others_as_they_are(family):
    lm = tiny_model(family)
    changes, prompts, n = changes_of(lm), ("Marie Curie was", "The capital of France is Paris. The", "In", "In Rome"), 9
    whole = generate(lm, changes, prompts, n, top_k=20)
    limits = [[3, 0, 7, 1], [1, 2, 50, 6], [50, 50, 50, 50], [2, 2, 2, 2]]  # characters of each text, at least

    def is_whole(owner, place, text):
        return len(text) >= limits[owner][place]

    ended = generate(lm, changes, prompts, n, top_k=20, is_whole=is_whole)
    several = [zip(prompts, *x, strict=True) for x in zip(whole, ended, limits, strict=True)]
    for prompt, text, short, limit in (row for rows in several for row in rows):
        behind = len(short) - len(prompt)
        # A character may be cut in two.
        assert text.startswith(short.rstrip("\ufffd")) and (short == text or limit <= behind)
    assert sum(map(len, sum(ended, []))) < sum(map(len, sum(whole, [])))
    assert ended[2] == whole[2]


def test_no_new_tokens_leave_prompts_of_any_length_as_they_are():
    prompts = ("Marie Curie was", "The capital of France is Paris. The", "In")
    assert generate(tiny_model("gpt2"), [Change()], prompts, new_tokens=0) == [list(prompts)]


def test_changes_that_do_the_same_meet_the_same_draws_and_other_seeds_other_ones():
    lm = tiny_model("llama")
    one = random_change(lm, 1, 0, size=0.0)
    prompts = ("Marie Curie was", "Marie Curie was", "In the city")
    first, second = generate(lm, [Change(), one], prompts, new_tokens=12, top_k=20)
    assert first == second
    assert first[0] != first[1]  # the same prompt twice is drawn twice
    assert generate(lm, [one], prompts, new_tokens=12, top_k=20) == [first]
    assert generate(lm, [one], prompts, new_tokens=12, top_k=20, seed=1) != [first]
    shorter = generate(lm, [one], prompts, new_tokens=5, top_k=20)
    assert all(text.startswith(begin) for text, begin in zip(first, shorter[0], strict=True))


def test_generation_without_prompts_gives_no_texts():
    lm = tiny_model("llama")
    assert generate(lm, [Change(), Change()], ()) == [[], []]


def test_texts_too_long_for_the_model_are_refused():
    lm = tiny_model("gpt2")
    with pytest.raises(ValueError, match="ask for fewer tokens"):
        generate(lm, [Change()], ["Marie"], new_tokens=64)
    with pytest.raises(ValueError, match="set text_tokens lower"):
        judge_case(lm, TINY, [Change()], replace(SETTINGS, text_tokens=128))


def test_nll_is_over_the_tokens_of_all_passages_that_are_read(tiny):
    def of(passages):
        return judge_case(tiny, TINY, [Change()], replace(SETTINGS, text_tokens=12, passages=passages))[0]["nll"]

    assert of((0, 3)) == pytest.approx((of((0,)) + of((3,))) / 2, rel=1e-6)  # of as many tokens each
    assert of((0,)) != of((3,))


@pytest.mark.parametrize(
    "setting",
    [
        {"passages": ()},
        {"passages": (99,)},
        {"new_tokens": -1},
        {"top_k": 0},
        {"seed": 0.5},
        {"text_tokens": -3},
        {"written_tokens": -1},
    ],
)
def test_settings_that_cannot_be_are_refused(setting):
    with pytest.raises(ValueError, match="JudgeSettings"):
        JudgeSettings(**setting)


def test_a_model_that_gives_what_is_not_a_number_is_refused():
    lm = tiny_model("llama")
    with torch.no_grad():
        lm.blocks[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="tiny-llama gives what is not a number"):
        judge_case(lm, TINY, [Change()], SETTINGS)


def test_several_cases_judged_at_once_are_judged_as_each_alone() -> None:
    lm = tiny_model("llama")
    other = replace(
        TINY, target="Oslo", generation_prompts=TINY.generation_prompts[:1], paraphrases=TINY.paraphrases[:1]
    )
    known = replace(SETTINGS, known=(Fact("Paris", "{} is in", "France"),))
    asked = [(TINY, change, SETTINGS) for change in changes_of(lm)] + [(other, changes_of(lm)[0], known)]
    for one, found in zip(asked, judge_all(lm, asked), strict=True):
        (alone,) = judge_case(lm, one[0], [one[1]], one[2])
        assert all(found[name] == alone[name] for name in ("generations", "written", "verdicts"))
        assert numbers(found) == pytest.approx(numbers(alone), rel=1e-4, abs=1e-4)
    assert judge_all(lm, []) == []
    with pytest.raises(ValueError, match="judge those apart"):
        judge_all(lm, [(TINY, Change(), SETTINGS), (TINY, Change(), replace(SETTINGS, seed=1))])
