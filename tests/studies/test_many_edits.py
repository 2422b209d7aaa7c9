"""Many edits in one model: who is edited in which order, that each state is what its edits make it, resumed and broken."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pytest
import torch
from bench import QUICK, UNRELATED, case, small

from rome_lab.editing.methods import Proposal
from rome_lab.editing.optima import Optima
from rome_lab.evaluation import PASSAGES
from rome_lab.evaluation.judging import judge_case
from rome_lab.evaluation.metrics import METRICS, summarise
from rome_lab.models.changes import Change
from rome_lab.studies import many_edits as module
from rome_lab.studies.many_edits import caption, cases_needed, chains_of, judge_chains, where_it_breaks

CASES = [case(i, subject) for i, subject in enumerate(("Paris", "Japan", "Warsaw", "France", "Curie", "Eiffel"))]
SIZES = (1, 2, 5)


pytestmark = pytest.mark.usefixtures("shared_cache")


def run(lm, names=("rome", "joint", "ft-linf"), cases=CASES, sizes=SIZES, **options) -> pd.DataFrame:
    methods = [small(name) if isinstance(name, str) else name for name in names]
    default = {"least": 4, "progress": False, "settings": QUICK, "unrelated": UNRELATED}
    return judge_chains(lm, cases, methods, sizes, **(default | options))


def numbers(table: pd.DataFrame) -> np.ndarray:
    return table[[name for name in METRICS if name in table]].to_numpy(float)


# Chains


@pytest.mark.parametrize(("least", "chains"), [(4, 1), (1, 1), (6, 2), (7, 3)])
def test_every_size_has_enough_chains_for_enough_cases_and_none_too_many(least, chains):
    plan = chains_of(CASES, SIZES, least, chains)
    for size in SIZES:
        assert sum(len(chain) >= size for chain in plan) == max(chains, -(-least // size))
    assert all(len(chain) in SIZES for chain in plan)
    assert [len(chain) for chain in plan] == sorted((len(chain) for chain in plan), reverse=True)


def test_chains_differ_depend_on_the_seed_and_edit_no_subject_twice():
    cases = [*CASES, *(replace(one, id=f"{one.id} again") for one in CASES)]
    plan = chains_of(cases, (6,), 1, 4)
    for chain in plan:
        assert len({one.fact.subject for one in chain}) == len(chain) == 6
    assert len({tuple(one.id for one in chain) for chain in plan}) == 4
    assert chains_of(cases[::-1], (6,), 1, 4) == plan
    assert chains_of(cases, (6,), 1, 4, seed=1) != plan


@pytest.mark.parametrize(("least", "chains"), [(4, 1), (6, 2)])
def test_no_case_is_in_two_chains_while_there_are_enough(least, chains, caplog):
    cases = [case(i, f"Town {i}") for i in range(cases_needed(SIZES, least, chains))]
    plan = chains_of(cases, SIZES, least, chains)
    assert sorted(one.id for chain in plan for one in chain) == sorted(one.id for one in cases)
    assert caplog.text == ""


@pytest.mark.parametrize("seed", range(8))
def test_nor_where_several_cases_are_about_one_subject(seed, caplog):
    cases = [case(0, "Paris"), case(1, "Paris"), case(2, "Japan"), case(3, "Warsaw")]
    plan = chains_of(cases, (1,), least=4, seed=seed)
    assert sorted(one.id for chain in plan for one in chain) == sorted(one.id for one in cases)
    assert caplog.text == ""


def test_where_there_are_too_few_cases_those_come_again_that_are_judged_least_often_and_it_is_said(caplog):
    plan = chains_of(CASES, (2, 4), least=8)  # 2 chains of four and 2 of two: 12 places for 6 cases
    assert cases_needed((2, 4), least=8) == 12
    assert len({one.id for chain in plan for one in chain[:2]}) == 6  # after two edits all cases are judged
    assert "take 12 cases, and there are 6: 4 of them are in more than one chain" in caplog.text


def test_sizes_for_which_there_are_too_few_subjects_are_left_out_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        plan = chains_of(CASES, (1, 7), 2)
    assert [len(chain) for chain in plan] == [1, 1]
    assert "cases of 6 subjects" in caplog.text
    with pytest.raises(ValueError, match="6 cases of 6 subjects are too few for 7, 9 edits"):
        chains_of(CASES, (7, 9))
    with pytest.raises(ValueError, match="0 cases of 0 subjects are too few"):
        chains_of([], SIZES)


# States


def test_all_cases_of_a_chain_are_judged_after_its_last_edit(tiny):
    table = run(tiny)
    for place, chain in enumerate(chains_of(CASES, SIZES, 4)):
        rows = table[(table["chain"] == place) & (table["method"] == "rome")]
        expected = [(size, one.id) for size in SIZES if size <= len(chain) for one in chain[:size]]
        assert list(zip(rows["edits"], rows["case"], strict=True)) == expected
    damaged = table[table["nll"].notna()]
    assert len(damaged) == len(table.groupby(["method", "edits", "chain"]))
    assert (damaged["known"].notna()).all()
    n = summarise(table, ["method", "edits"]).set_index(["method", "edits", "metric"])["n"]
    assert (n["rome", 1, "ES"], n["rome", 2, "ES"], n["rome", 5, "ES"]) == (4, 4, 5)
    assert (n["rome", 1, "nll"], n["rome", 2, "nll"], n["rome", 5, "nll"]) == (4, 2, 1)


def test_one_after_the_other_is_each_edit_on_the_model_that_the_others_have_left(tiny):
    chain = chains_of(CASES, SIZES, 4)[0]
    rows = run(tiny, ["ft-linf"], sizes=(1, 2, 5)).query("chain == 0 and edits == 2")
    first = small("ft-linf").change(tiny, [(chain[0].fact, chain[0].target)], None)
    with first.applied(tiny):
        second = small("ft-linf").change(tiny, [(chain[1].fact, chain[1].target)], None)
    total = Change(1, first.delta + second.delta)
    for one, row in zip(chain[:2], rows.to_dict("records"), strict=True):
        (expected,) = judge_case(tiny, one, [total], QUICK)
        assert row["EM"] == pytest.approx(expected["EM"], rel=1e-3)
        assert row["NM"] == pytest.approx(expected["NM"], rel=1e-3)


@pytest.mark.parametrize(
    "method", [small("rome"), replace(small("memit"), layers=(0, 1))], ids=lambda method: method.name
)
def test_the_norm_of_each_edited_matrix_is_that_of_the_weights_with_all_edits_in_force(tiny, method):
    method = method.settled(tiny)
    table = run(tiny, [method, "in-context"], CASES[:2], (2,), least=2)
    (norms,) = table["norms"].dropna()
    requests = module.requests_of(chains_of(CASES[:2], (2,), 2)[0])
    together = method.together > 1
    *_, proposal = (
        [method.change(tiny, requests, Optima(tiny))] if together else module.changes_in_turn(tiny, requests, method)
    )
    W = {layer: tiny.weight(layer).clone() for layer in proposal.deltas}
    with proposal.applied(tiny):
        expected = {str(x): float(tiny.weight(x).norm() / W[x].norm()) for x in W}
    assert norms == pytest.approx(expected, rel=1e-5) and len(norms) == (2 if together else 1)
    assert table["norm"].dropna().tolist() == [max(norms.values())]
    by_layer = module.norms_by_layer(table)
    assert by_layer.set_index("layer")["mean"].to_dict() == {int(x): norm for x, norm in norms.items()}
    assert set(by_layer["method"]) == {method.name} and module.norms_by_layer(table.drop(columns="norms")).empty


def test_together_is_one_closed_form_of_all_requests(tiny):
    chain = chains_of(CASES, SIZES, 4)[0]
    rows = run(tiny, ["joint"]).query("chain == 0 and edits == 5").to_dict("records")
    requests = [(one.fact, one.target) for one in chain]
    change = small("joint").change(tiny, requests, Optima(tiny, progress=False))
    (expected,) = judge_case(tiny, chain[3], [change], QUICK)
    assert rows[3]["EM"] == pytest.approx(expected["EM"], rel=1e-3)
    assert rows[3]["PM"] == pytest.approx(expected["PM"], rel=1e-3)


def test_whether_requests_are_met_together_goes_by_the_method_not_by_its_name(tiny):
    named = replace(small("joint"), name="all at once")
    table = run(tiny, ["joint", named], sizes=(2,)).groupby("method")
    np.testing.assert_array_equal(numbers(table.get_group("joint")), numbers(table.get_group("all at once")))


def test_one_edit_is_the_same_in_sequence_and_together(tiny):
    table = run(tiny, ["rome", "joint"]).query("edits == 1")
    sequence, joint = (numbers(table[table["method"] == name]) for name in ("rome", "joint"))
    np.testing.assert_allclose(sequence, joint, rtol=1e-4)


def test_the_model_is_left_as_it_was(tiny):
    before = tiny.fingerprint()
    run(tiny)
    assert tiny.fingerprint() == before


def test_the_caption_says_of_how_many_models_each_number_is_and_which_have_no_interval(tiny):
    said = caption(run(tiny, ["ft-linf"]))
    assert "4 in 4 after 1, 4 in 2 after 2, 5 in 1 after 5." in said
    assert "One model has no interval: after 5." in said


# Resuming, and models that break


@dataclass(frozen=True)
class Stepping:
    """A method that adds a little, counts its calls, and fails from a call on."""

    calls: list = field(default_factory=list)
    name: str = "stepping"
    fails_at: int = 100
    fails_until: int = 100
    size: float = 1e-3
    together: int = 1
    error: type[BaseException] = ValueError

    def settled(self, lm):
        return self

    def describe(self):
        return {"method": "stepping"}

    def change(self, lm, requests, optima):
        self.calls.append(requests[0][0].subject)
        if self.fails_at <= len(self.calls) <= self.fails_until:
            raise self.error("stepping: the loss is nan at step 1, because tiny-llama overflows.")
        return Proposal(1, torch.full((32, 48), self.size))


def test_interrupted_it_goes_on_where_it_was(tiny, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tiny, [Stepping(fails_at=4, error=KeyboardInterrupt)], store=tmp_path)
    assert len(list(tmp_path.glob("many_edits/*"))) == 2  # after one edit and after two
    table = run(tiny, [Stepping()], store=tmp_path)
    pd.testing.assert_frame_equal(table, run(tiny, [Stepping()]))
    idle = Stepping()
    pd.testing.assert_frame_equal(run(tiny, [idle], store=tmp_path), table)
    assert idle.calls == []


def test_values_found_on_the_edited_model_are_found_again_after_an_interruption(tiny, tmp_path, monkeypatch):
    first = run(tiny, ["rome"], store=tmp_path)
    for file in tmp_path.glob("many_edits/*"):
        file.unlink()
    monkeypatch.setattr(Optima, "optimise", lambda *args: pytest.fail("v* was optimised again"))
    pd.testing.assert_frame_equal(run(tiny, ["rome"], store=tmp_path), first)


@pytest.mark.parametrize("other", [{"settings": replace(QUICK, text_tokens=9)}, {"unrelated": UNRELATED[:2]}])
def test_other_settings_are_judged_anew(tiny, tmp_path, other):
    run(tiny, ["ft-linf"], store=tmp_path)
    before = len(list(tmp_path.glob("many_edits/*")))
    run(tiny, ["ft-linf"], store=tmp_path, **other)
    assert len(list(tmp_path.glob("many_edits/*"))) > before


def test_where_a_method_fails_the_chain_goes_on_without_that_edit_which_is_remarked_on(tiny):
    chain = chains_of(CASES, (1, 5), 1)[0]
    failing = Stepping(fails_at=3, fails_until=3)
    rows = run(tiny, [failing], sizes=(1, 5), least=1).query("edits == 5").to_dict("records")
    assert [bool(row["remark"]) for row in rows] == [False, False, True, False, False]
    assert "the loss is nan" in rows[2]["remark"]
    assert len(failing.calls) == 5
    (expected,) = judge_case(tiny, chain[4], [Change(1, torch.full((32, 48), 4e-3))], QUICK)  # the four other edits
    assert all(row["judged"] for row in rows)
    assert rows[4]["EM"] == pytest.approx(expected["EM"], rel=1e-4)


@pytest.mark.parametrize("together", [1, 10])
def test_where_no_edit_can_be_made_no_case_is_judged_and_all_say_why(tiny, together):
    table = run(tiny, [Stepping(fails_at=1, together=together), "ft-linf"], sizes=(2,), least=2)
    rows = table[table["method"] == "stepping"]
    assert not rows["judged"].any()
    assert rows["remark"].str.contains("the loss is nan").all()
    assert np.isnan(numbers(rows)).all()
    assert "2 cases of stepping could not be judged after 2." in caption(table)
    assert "1 models of stepping have no perplexity after 2." in caption(table)


def test_the_damage_is_told_where_the_first_case_cannot_be_judged(tiny):
    chain = [replace(CASES[0], paraphrases=("far " * 100,)), CASES[1]]  # more than the model reads
    state = module.EditedState(Proposal(1, torch.full((32, 48), 1e-3)), ("", ""))
    bench = module.Bench(tiny, QUICK, UNRELATED, Optima(tiny), None, {})
    first, second = module.judge_state(bench, chain, state)
    settings = replace(QUICK, known=UNRELATED, passages=range(len(PASSAGES)))
    (expected,) = judge_case(tiny, CASES[1], [state.proposal], settings)
    assert (first["judged"], second["judged"]) == (False, True)
    assert first["nll"] == pytest.approx(expected["nll"], rel=1e-5)
    assert first["known"] == expected["known"]
    assert "nll" not in second


def test_the_unedited_model_reads_the_passages_that_models_of_many_edits_read(tiny):
    table = module.judge_unedited(tiny, CASES[:2], QUICK)
    (expected,) = judge_case(tiny, CASES[0], [Change()], replace(QUICK, passages=range(len(PASSAGES))))
    assert table["nll"].tolist() == pytest.approx([expected["nll"]] * 2, rel=1e-5)
    assert set(table["edits"]) == {0} and set(table["method"]) == {"none"} and "ES" in table


def test_a_broken_model_is_counted(tiny):
    broken = Stepping(size=1e38)
    table = run(tiny, [broken, "ft-linf"], sizes=(1, 2), least=2)
    assert not table[table["method"] == "stepping"]["judged"].any()
    assert "2 models of stepping have no perplexity after 1." in caption(table)
    assert "ft-linf" not in caption(table)


def test_known_facts_are_those_that_the_chain_touches_least_and_never_of_an_edited_subject(tiny):
    chain = [replace(one, target=f"Target {i}") for i, one in enumerate(CASES)]
    edited = tuple(replace(UNRELATED[1], subject=one.fact.subject) for one in chain)
    far = tuple(replace(UNRELATED[1], subject=f"Far {i}") for i in range(20))
    same_relation = tuple(replace(one, relation="city") for one in far)
    same_object = tuple(replace(one, object=f"Target {i % 6}") for i, one in enumerate(far))

    def asked(*facts):
        return module.untouched(chain, module.Bench(tiny, QUICK, facts, Optima(tiny), None, {}))

    assert set(asked(*same_object, *edited, *same_relation, *far)[:20]) == set(far)
    assert set(asked(*same_object, *edited, *same_relation, *far)[20:40]) == set(same_relation)
    assert set(asked(*same_object, *edited)) == set(same_object)  # none is lost that can be asked about


def test_known_facts_that_are_lacking_are_told(tiny, caplog):
    run(tiny, ["ft-linf"], sizes=(1,), least=1)
    assert "after 1 edits 4 known facts are asked about, not 50" in caplog.text


def test_neighbours_that_the_chain_edits_are_not_judged(tiny):
    cases = [case(0, "Paris"), case(1, "Oslo"), case(2, "town")]
    rows = run(tiny, ["ft-linf"], cases, sizes=(3,), least=1).set_index("case")
    assert rows["NS"].isna().to_dict() == {"case/0": True, "case/1": False, "case/2": False}


def test_bad_input_is_refused_in_one_sentence(tiny, tmp_path):
    with pytest.raises(ValueError, match="there is no method 'romee'; choose from"):
        judge_chains(tiny, CASES, ["romee"])
    with pytest.raises(ValueError, match="are too few for 1, 3 edits"):
        judge_chains(tiny, [], "none", (1, 3))
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="Cannot write to the folder"):
        run(tiny, store=blocked / "results")


def test_a_method_breaks_where_its_mean_and_surely_where_its_interval_is_below_half():
    points = [("none", 0, 1, 1), ("rome", 1, 80, 90), ("rome", 10, 30, 50), ("rome", 3, 60, 70), ("rome", 30, 10, 20)]
    points += [("joint", 1, 80, 90), ("joint", 30, 70, 90)]
    summary = pd.DataFrame(points, columns=["method", "edits", "mean", "ci_high"]).assign(metric="S")
    assert where_it_breaks(summary).splitlines() == [
        "rome: S 80.0 after 1, 10.0 after 30 edits; mean below half from: 10; whole interval from: 30",
        "joint: S 80.0 after 1, 70.0 after 30 edits; mean below half from: never; whole interval from: never",
    ]
    assert where_it_breaks(summary.assign(metric="efficacy")).startswith("rome: efficacy 80.0")
    assert where_it_breaks(summary.assign(metric="known")) == ""
    untold = where_it_breaks(summary.assign(ci_high=float("nan")))
    assert untold.splitlines()[1].endswith("from: never; whole interval from: one model does not tell")
