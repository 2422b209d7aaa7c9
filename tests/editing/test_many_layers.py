"""Edits of several layers: exact where they promise it, what their papers say elsewhere, and things like any other edit."""

from __future__ import annotations

import itertools
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from bench import QUICK, UNRELATED, case
from test_edit_files import rewrite, same
from test_editing import FACT, FEW, OTHER, THIRD, covariance_of, logits, make
from test_methods import Tokens
from tiny import tiny_model

import rome_lab as rl
from rome_lab.editing.edit import Edit, describe_edit, load_edit
from rome_lab.editing.editors import alphaedit, emmet, layers_up_to, memit
from rome_lab.editing.exact import rome_many, solved_edit
from rome_lab.editing.keys import run_to_keys
from rome_lab.editing.method_table import METHODS
from rome_lab.editing.optima import Optima, mean_length
from rome_lab.editing.remedies import prune, rect
from rome_lab.editing.second_moment import covariances
from rome_lab.editing.settings import KEYS, EditSettings, LeastSquares
from rome_lab.editing.update import constraint_error, factorise
from rome_lab.evaluation.bystanders import unrelated_to
from rome_lab.evaluation.evaluating import evaluate
from rome_lab.evaluation.judging import judge_case
from rome_lab.facts.fact import Fact
from rome_lab.facts.prompts import continuation_ids, read_prompt
from rome_lab.models.language_model import LanguageModel
from rome_lab.models.weights import read_weight, write_weight
from rome_lab.studies.many_edits import changes_in_turn

SEVERAL = [(FACT, "Rome"), (OTHER, "Tokyo"), (THIRD, "Microsoft")]
LAYERS = (0, 1, 2)
RELATED = replace(FACT, relation="landmark")
SUITED = ("llama", "gpt2", "gptj", "gpt_neox", "opt")  # gated, Conv1D, parallel, with biases


def second_moments(lm, layers=LAYERS):
    """C by layer, with a share of its trace added to the diagonal, so that tiny models are well conditioned."""
    moments = {layer: covariance_of(lm, layer) for layer in layers}
    return {x: C + 1e-2 * C.diagonal().mean() * torch.eye(len(C)) for x, C in moments.items()}


def made(editor, lm, requests=SEVERAL, layers=LAYERS, hparams=FEW, **options):
    return editor(lm, requests, layers, C=second_moments(lm, layers), hparams=hparams, progress=False, **options)


@torch.no_grad()
def watched(lm, fact, prefix=""):
    """In one full forward, at the subject's last token: by layer, what W is given, what it says, and the state behind."""
    prompt, seen = read_prompt(lm, fact, prefix=prefix), {}
    place, handles = prompt.subject_range[1] - 1, []

    def keep(name, layer, take):
        def hook(module, args, output):
            x = take(args, output)
            seen[name, layer] = x.reshape(len(prompt.ids), -1)[place].double()

        return hook

    for layer in range(lm.n_layers):
        handles.append(lm.memory(layer).register_forward_hook(keep("k", layer, lambda args, output: args[0])))
        handles.append(lm.memory(layer).register_forward_hook(keep("v", layer, lambda args, output: output)))
        first = lambda args, output: output[0] if isinstance(output, tuple) else output  # noqa: E731
        handles.append(lm.blocks[layer].register_forward_hook(keep("h", layer, first)))
    try:
        lm.model(prompt.ids[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def bias(lm, layer):
    return 0 if getattr(lm.memory(layer), "bias", None) is None else lm.memory(layer).bias.detach().double()


# What EMMET promises


@pytest.mark.parametrize("family", SUITED)
def test_emmet_meets_its_constraints_in_the_weights_and_in_the_models_own_forward(family) -> None:
    lm = tiny_model(family)
    before = lm.fingerprint()
    edit = made(emmet, lm, hparams=replace(FEW, key="bare"))
    assert lm.fingerprint() == before and edit.layers == LAYERS and edit.constraint_error < 1e-5
    with edit.applied(lm):
        for part in edit.parts:
            assert float(constraint_error(lm.weight(part.layer), part.k_star, part.v_star).max()) < 1e-5
            for column, (fact, _) in enumerate(SEVERAL):
                v = part.v_star[:, column].double()
                error = watched(lm, fact)["v", part.layer] - bias(lm, part.layer) - v
                assert float(error.norm() / v.norm()) < 1e-5
    assert lm.fingerprint() == before


@pytest.mark.parametrize("family", SUITED)
def test_the_states_at_the_last_layer_reach_z_with_exact_constraints_and_come_near_with_soft_ones(family) -> None:
    lm = tiny_model(family)
    settings = replace(FEW, key="bare")
    start = [watched(lm, fact) for fact, _ in SEVERAL]
    single = made(emmet, lm, layers=LAYERS[-1:], hparams=settings)  # v* is found at the last layer, whatever the others
    W = lm.weight(LAYERS[-1]).double()
    Z = [seen["h", 2] + v - W @ seen["k", 2] for seen, v in zip(start, single.v_star.T.double(), strict=True)]

    def missing(edit) -> list[float]:
        with edit.applied(lm):
            now = [watched(lm, fact)["h", 2] for fact, _ in SEVERAL]
        return [float((z - h).norm() / (z - x["h", 2]).norm()) for z, h, x in zip(Z, now, start, strict=True)]

    assert (
        max(missing(made(emmet, lm, hparams=settings))) < 1e-3
    )  # of a step that is a hundredth of the state, in float32
    loose, tight = (made(memit, lm, hparams=settings, weight=weight) for weight in (300.0, 1e-3))
    assert max(missing(tight)) < 0.1 < max(missing(loose)) < 1.0


@pytest.mark.parametrize("key", KEYS)
def test_emmet_at_one_layer_is_rome_many(key) -> None:
    lm = tiny_model("llama")
    settings, C = replace(FEW, key=key), second_moments(lm, (1,))
    joint = rome_many(lm, SEVERAL, 1, C=C[1], hparams=settings, progress=False)
    edit = emmet(lm, SEVERAL, (1,), C=C, hparams=settings, progress=False)
    assert same(edit, joint) and edit.digest == joint.digest and edit.below == ()


def test_memit_at_one_layer_meets_emmet_as_its_weight_goes_to_zero() -> None:
    lm = tiny_model("gpt2")
    exact = made(emmet, lm, layers=(1,)).delta
    errors = [
        float((made(memit, lm, layers=(1,), weight=w).delta - exact).norm() / exact.norm()) for w in (1, 1e-3, 1e-7)
    ]
    assert errors == sorted(errors, reverse=True) and errors[2] < 1e-4


# The climb, against the algorithm written out with whole forwards and inverses


def climbed(lm, layers, weight, settings, v_stars):
    """Deltas by layer: MEMIT's Algorithm 1 with the bare key, in the model's own weights, which are put back."""
    last, deltas, C = layers[-1], {}, second_moments(lm, layers)
    W = lm.weight(last).double()
    start = [watched(lm, fact) for fact, _ in SEVERAL]
    Z = [x["h", last] + v.double() - W @ x["k", last] for x, v in zip(start, v_stars, strict=True)]
    originals = {layer: read_weight(lm.memory(layer)).clone() for layer in layers}
    for place, layer in enumerate(layers):
        now = [watched(lm, fact) for fact, _ in SEVERAL]
        K = torch.stack([x["k", layer] for x in now], dim=1)
        R = torch.stack([z - x["h", last] for z, x in zip(Z, now, strict=True)], dim=1) / (len(layers) - place)
        delta = R @ K.T @ torch.linalg.inv(weight * C[layer].double() + K @ K.T)
        deltas[layer] = delta
        stored = originals[layer]
        total = stored.double() + (delta.T if lm.memory_is_transposed(layer) else delta)
        write_weight(lm.memory(layer), total.to(stored))
    for layer, original in originals.items():
        write_weight(lm.memory(layer), original)
    return deltas


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_memit_is_its_algorithm_written_out(family) -> None:
    lm = tiny_model(family)
    settings = replace(FEW, key="bare")
    edit = made(memit, lm, weight=0.5, hparams=settings)
    v_stars = made(emmet, lm, layers=(2,), hparams=settings).v_star.T
    expected = climbed(lm, LAYERS, 0.5, settings, v_stars)
    assert edit.layers == LAYERS and edit.solution == LeastSquares("soft", 0.5)
    for layer, delta in expected.items():
        assert float((edit.delta_at(layer) - delta).norm() / delta.norm()) < 1e-3


@pytest.mark.parametrize("key", KEYS)
def test_each_key_of_a_fact_has_states_of_its_own_texts(key) -> None:
    lm = tiny_model("llama")
    edit = made(emmet, lm, requests=[(FACT, "Rome")], hparams=replace(FEW, key=key))
    columns = {"all": 3, "both": 2}.get(key, 1)
    assert all(part.u.view(len(part.u), -1).shape[1] == columns for part in edit.parts)
    texts = [""] if key == "bare" else list(FEW.prefixes)
    with edit.applied(lm):
        values = [watched(lm, FACT, prefix) for prefix in texts]
        for part in edit.parts:
            v = part.v_star.view(len(part.v_star), -1)[:, -1].double()
            mean = torch.stack([x["v", part.layer] for x in values]).mean(0) - bias(lm, part.layer)
            assert float((mean - v).norm() / v.norm()) < 1e-5


# AlphaEdit


def threshold_of(lm, layers=LAYERS, share=0.5) -> float:
    """One that leaves about half of the directions at each layer."""
    spectra = [factorise(C).spectrum[0] for C in second_moments(lm, layers).values()]
    return max(float(torch.quantile(x, share)) for x in spectra)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj"])
def test_alphaedit_changes_nothing_outside_its_null_space(family) -> None:
    lm = tiny_model(family)
    threshold = threshold_of(lm)
    edit = made(alphaedit, lm, threshold=threshold, ridge=1e-3)
    for part in edit.parts:
        eigenvalues, vectors = factorise(second_moments(lm)[part.layer]).spectrum
        outside = vectors[:, eigenvalues >= threshold]
        assert 0 < outside.shape[1] < len(vectors)
        moved = (part.delta @ outside).norm() / part.delta.norm()
        assert float(moved) < 1e-6, "u is stored in float32"
        P = torch.eye(len(vectors)).double() - outside @ outside.T
        torch.testing.assert_close(part.delta @ P, part.delta, rtol=0, atol=1e-6 * float(part.delta.abs().max()))


def test_alphaedit_keeps_the_values_of_the_edits_in_force() -> None:
    lm = tiny_model("llama")
    options = {"layers": (1,), "threshold": threshold_of(lm, (1,), 0.9), "ridge": 1e-6}
    first = made(alphaedit, lm, SEVERAL[:1], **options)
    K = first.k_star.double()
    alone = made(alphaedit, lm, SEVERAL[1:], **options)
    with first.applied(lm):
        beside = made(alphaedit, lm, SEVERAL[1:], **options)
    moved = [float((edit.delta @ K).norm() / (edit.delta.norm() * K.norm())) for edit in (alone, beside)]
    assert moved[1] < 1e-4 < moved[0]


# Edits of several layers are edits


def test_they_are_undone_bit_for_bit_in_any_order() -> None:
    def three(lm):
        return [make(lm), made(memit, lm, SEVERAL[1:2], weight=0.1), made(emmet, lm, SEVERAL[2:], layers=(1, 3))]

    edits = three(tiny_model("gpt2"))
    for order in itertools.permutations(range(3)):
        lm = tiny_model("gpt2")
        before = lm.fingerprint()
        for edit in edits:
            edit.apply(lm)
        assert lm.edits == edits
        for place in order:
            edits[place].undo(lm)
            with edits[place].applied(lm):
                assert edits[place].is_applied(lm)
        assert lm.fingerprint() == before and not lm.overlay.originals


def test_what_is_loaded_is_what_was_saved_and_does_the_same(tmp_path) -> None:
    lm = tiny_model("llama")
    edit = made(memit, lm, weight=2.0)
    loaded = load_edit(edit.save(tmp_path / "memit.safetensors"))
    assert isinstance(loaded, Edit) and loaded.digest == edit.digest and str(loaded) == str(edit)
    assert loaded.layers == LAYERS and loaded.solution == LeastSquares("soft", 2.0) and loaded.settings == edit.settings
    for ours, theirs in zip(loaded.below, edit.below, strict=True):
        assert same(ours, theirs)
    with edit.applied(lm):
        expected = logits(lm)
    with loaded.applied(lm):
        assert torch.equal(logits(lm), expected)
    words = describe_edit(tmp_path / "memit.safetensors")
    assert "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj" in words
    assert "(layers 0, 1 and 2), soft constraints, key 'both'" in words and "layers 0, 1 and 2" in edit._repr_html_()


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"below": [{"layer": 0, "module": "m"}]}, "it has the vectors .* for layers 0 and 2"),
        ({"below": [{"layer": 3, "module": "m"}, {"layer": 1, "module": "m"}]}, "layer is 3, 1, 2"),
        ({"below": [{"layer": "0", "module": "m"}]}, "layer is '0', 2"),
        ({"below": [0]}, r"the lower layers are \[0\]"),
        ({"solution": {"constraints": "none"}}, "constraints is 'none'"),
    ],
)
def test_a_file_whose_layers_do_not_fit_together_is_refused(tmp_path, changes, sentence) -> None:
    path = made(emmet, tiny_model("llama")).save(tmp_path / "edit.safetensors")
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=f"does not hold a possible edit: .*{sentence}"):
        load_edit(path)


def test_an_audit_of_several_layers_is_about_the_whole_edit() -> None:
    lm = tiny_model("llama")
    before = lm.fingerprint()
    for edit in (made(emmet, lm), made(memit, lm, weight=50.0)):
        table = rl.audit(lm, edit, [Fact("Warsaw", "The city of {} is in", "Poland")])
        sizes = [float(part.delta.norm() / lm.weight(part.layer).double().norm()) for part in edit.parts]
        assert table.loc["|dW| / |W|", "after"] == pytest.approx(max(sizes))
        assert table.loc["constraint error", "remark"] == "", "soft constraints are not meant to be met"
    assert table.loc["constraint error", "after"] > 1e-3
    assert lm.fingerprint() == before


# Bad input: a clear error, and an unchanged model


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"layers": (2, 1)}, r"the layers are \(2, 1\); give each once, the lowest first: \(1, 2\)"),
        ({"layers": (1, 1)}, r"the layers are \(1, 1\); give each once"),
        ({"layers": (2, 4)}, r"the layers are \(2, 4\); tiny-llama has the layers 0 to 3"),
        ({"layers": ()}, r"the layers are \(\); tiny-llama has"),
        ({"layers": (1, 2), "C": {1: torch.eye(48)}}, r"C lacks the layers \[2\]; give covariances"),
        ({"requests": []}, "there is nothing to edit"),
        ({"requests": [(FACT, "Rome"), (FACT, "Tokyo")]}, "contradict each other, since a subject has one object"),
        (
            {"requests": [(RELATED, "Rome"), (replace(RELATED, template="See the {} in"), "Oslo")]},
            "'The Eiffel Tower is in' -> 'Rome' and 'See the Eiffel Tower in' -> 'Oslo' contradict each other",
        ),
        ({"requests": [(FACT, "Rome"), (replace(FACT, template="The {} is by"), "Eiffel")]}, "are linearly dependent"),
    ],
)
@pytest.mark.parametrize("editor", [memit, emmet])
def test_bad_input_is_refused_with_a_sentence_and_changes_nothing(editor, arguments, sentence) -> None:
    lm = tiny_model("llama")
    before = lm.fingerprint()
    given = {"requests": SEVERAL, "layers": (1, 2), "C": second_moments(lm)} | arguments
    with pytest.raises(ValueError, match=f"^{editor.__name__}: .*{sentence}"):
        editor(lm, given["requests"], given["layers"], C=given["C"], hparams=replace(FEW, key="bare"), progress=False)
    assert lm.fingerprint() == before and not lm.edits


def test_more_edits_than_a_layer_can_hold_are_refused_naming_its_rank() -> None:
    lm = tiny_model("llama")
    before, words = lm.fingerprint(), ("Paris", "Rome", "Tokyo", "Warsaw", "France", "Japan", "Windows")
    pairs = itertools.islice(itertools.permutations(words, 2), 25)
    requests = [(Fact(" ".join(pair), "The {} is in", "Paris"), "Rome") for pair in pairs]
    with pytest.raises(ValueError, match="25 facts have 50 keys at layer 1, but it can hold 48, the rank of its keys"):
        made(emmet, lm, requests, layers=(1,))
    threshold = threshold_of(lm, (1,))
    with pytest.raises(
        ValueError, match=r"3 facts have 6 keys at layer 1, but it can hold \d, the rank of the null space"
    ):
        narrow = float(factorise(second_moments(lm, (1,))[1]).spectrum[0][4]) * (1 + 1e-9)
        solved_edit(
            lm,
            SEVERAL,
            (1,),
            LeastSquares("exact", threshold=narrow),
            second_moments(lm, (1,)),
            hparams=FEW,
            progress=False,
        )
    assert threshold > narrow and lm.fingerprint() == before


def test_each_layer_is_asked_for_its_own_keys_only_before_v_is_sought() -> None:
    """A neuron that is dead at a higher layer says nothing of the keys of the lowest."""
    lm, dead = tiny_model("opt"), torch.tensor(3)
    C = second_moments(lm, (1, 2))
    C[2][dead] = C[2][:, dead] = 0
    lm.memory(2).register_forward_pre_hook(lambda module, inputs: (inputs[0].index_fill(-1, dead, 0),))
    assert memit(lm, SEVERAL, (1, 2), C=C, hparams=FEW, progress=False).layers == (1, 2)


def test_an_empty_null_space_is_refused_before_v_is_sought_saying_which_threshold_leaves_how_much() -> None:
    lm = tiny_model("llama")
    before = lm.fingerprint()

    def sought(row):
        raise AssertionError("v* is not to be sought")

    with pytest.raises(ValueError, match=r"none of the 48 eigenvalues .* threshold 1e-12.*would leave 50%"):
        made(alphaedit, lm, threshold=1e-12, callback=sought)
    assert lm.fingerprint() == before


@pytest.mark.parametrize("family", ["gemma2", "opt-post-norm"])
def test_a_family_whose_mlps_pass_a_norm_is_edited_at_one_layer_only(family) -> None:
    lm = tiny_model(family)
    before = lm.fingerprint()
    with pytest.raises(ValueError, match=r"on its way into the residual stream.*edit one layer, such as layers=\(2,\)"):
        made(memit, lm)
    assert lm.fingerprint() == before
    assert made(emmet, lm, layers=(2,)).constraint_error < 1e-5


def test_in_half_precision_several_layers_are_edited_and_undone_bit_for_bit() -> None:
    lm = tiny_model("llama")
    C = second_moments(lm)
    lm.model.bfloat16()
    before = lm.fingerprint()
    edit = memit(lm, SEVERAL, LAYERS, weight=0.1, C=C, hparams=FEW, progress=False)
    with edit.applied(lm):
        assert lm.fingerprint() != before
    assert lm.fingerprint() == before and edit.layers == LAYERS


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_an_interruption_while_climbing_leaves_the_model_as_it_was(stop, monkeypatch) -> None:
    import rome_lab.editing.many_layers as module

    lm = tiny_model("llama")
    before, states = lm.fingerprint(), module.subject_states

    def interrupt(lm, layer, prompts):
        if lm.fingerprint() != before:
            raise stop
        return states(lm, layer, prompts)

    monkeypatch.setattr(module, "subject_states", interrupt)
    with pytest.raises(stop):
        made(memit, lm)
    assert lm.fingerprint() == before and not lm.edits


def test_without_layers_those_up_to_the_known_or_traced_one_are_taken(caplog) -> None:
    lm = tiny_model("gpt2")
    C = second_moments(lm, range(4))
    edit = memit(lm, SEVERAL[:1], C=C, hparams=FEW, progress=False)
    assert edit.layers == layers_up_to(edit.layer) and f"has its peak at layer {edit.layer}" in caplog.text
    assert edit.solution.weight == 128, "as much as a key has components"


# v*: early stop and norm control


def next_best(lm, fact) -> str:
    """A word of one token that the model nearly says."""
    ids = torch.tensor([lm.tokenizer(fact.prompt)["input_ids"]])
    with torch.no_grad():
        ranked = lm.model(ids).logits[0, -1].argsort(descending=True)[1:].tolist()
    words = ((token, lm.tokenizer.decode([token]).strip()) for token in ranked)
    return next(word for token, word in words if word and continuation_ids(lm, fact.prompt, word) == [token])


def test_the_search_for_v_stops_where_every_text_says_the_target() -> None:
    lm = tiny_model("llama")
    request = (THIRD, next_best(lm, THIRD))
    settings = replace(FEW, prefixes=("Paris. ",), steps=40, learning_rate=0.2, clamp=50.0, key="bare")
    full = made(emmet, lm, [request], layers=(1,), hparams=settings)
    early = made(emmet, lm, [request], layers=(1,), hparams=replace(settings, early_stop=True))
    steps = len(early.history)
    assert 1 < steps < len(full.history) == 41
    assert early.history["done"].tolist() == [0.0] * (steps - 1) + [1.0]
    assert early.history["loss"].tolist() == full.history["loss"].tolist()[:steps]
    ids = torch.tensor([lm.tokenizer(THIRD.prompt)["input_ids"]])
    with early.applied(lm), torch.no_grad():
        assert lm.tokenizer.decode([int(lm.model(ids).logits[0, -1].argmax())]).strip() == request[1]


def test_norm_control_scales_v_to_the_anchor_and_leaves_out_what_is_twice_as_long() -> None:
    lm = tiny_model("llama")
    settings = replace(FEW, key="bare")
    free = made(emmet, lm, SEVERAL[:1], layers=(1,), hparams=settings).v_star
    for anchor in (0.6 * float(free.norm()), 3 * float(free.norm())):
        scaled = made(emmet, lm, SEVERAL[:1], layers=(1,), hparams=replace(settings, anchor=anchor)).v_star
        torch.testing.assert_close(scaled, free * (anchor / free.norm()))
    with pytest.raises(ValueError, match="more than twice the anchor.*norm control leaves the edit out"):
        made(emmet, lm, SEVERAL[:1], layers=(1,), hparams=replace(settings, anchor=0.4 * float(free.norm())))
    with pytest.raises(ValueError, match="anchor is -1; expected a finite length above 0, or None"):
        EditSettings(anchor=-1)


def test_keys_are_those_that_the_layer_is_given() -> None:
    """The stored keys of every layer are those of the model with the layers below it changed."""
    lm = tiny_model("gptj")
    edit = made(emmet, lm, hparams=replace(FEW, key="bare"))
    with edit.applied(lm):
        for column, (fact, _) in enumerate(SEVERAL):
            prompt, keys = read_prompt(lm, fact), {}
            run_to_keys(lm, prompt.ids[None], LAYERS, lambda layer, k, keys=keys: keys.update({layer: k[0]}))
            for part in edit.parts:
                k = keys[part.layer][prompt.subject_range[1] - 1]
                torch.testing.assert_close(part.k_star[:, column], k, rtol=1e-4, atol=1e-4 * float(k.abs().max()))


# As methods


def layered(name, layers=LAYERS, **choices):
    """The method as it is compared, at the size of the tiny models."""
    squares = LeastSquares("soft", threshold=0.05, ridge=1e-3) if name == "alphaedit" else None
    given = {"layers": layers, "settings": FEW, "source": Tokens(), "squares": squares}
    return replace(METHODS[name], **given | choices)


@pytest.fixture
def optima(shared_cache):
    return Optima(tiny_model("llama"), progress=False)


@pytest.mark.parametrize("name, editor", [("memit", memit), ("emmet", emmet)])
def test_a_method_makes_what_the_library_makes(optima, name, editor) -> None:
    lm = optima.lm
    change = layered(name).change(lm, SEVERAL, optima)
    C = covariances(lm, LAYERS, Tokens(), progress=False)
    edit = editor(lm, SEVERAL, LAYERS, C=C, hparams=FEW, progress=False)
    assert change.layer == LAYERS == tuple(change.deltas)
    for layer, delta in change.deltas.items():
        assert torch.equal(delta, edit.delta_at(layer).float()), layer
        part = next(part for part in edit.parts if part.layer == layer)
        assert torch.equal(change.keys[layer], part.k_star)
    with edit.applied(lm):
        expected = logits(lm)
    with change.applied(lm):
        torch.testing.assert_close(logits(lm), expected, rtol=1e-4, atol=1e-4)


def test_a_method_measures_C_on_as_many_tokens_as_it_says(optima) -> None:
    method = layered("memit", tokens=400).settled(optima.lm)
    method.change(optima.lm, SEVERAL, optima)
    assert {factor.tokens for factor in optima.factors.values()} == {
        C.tokens for C in covariances(optima.lm, LAYERS, Tokens(), 400, progress=False).values()
    }
    assert method.describe()["C"]["tokens"] == 400


def test_what_a_method_proposes_prints_in_one_line_without_tensors(optima) -> None:
    text = repr(layered("memit").change(optima.lm, SEVERAL, optima))
    assert "tensor" not in text and "\n" not in text and "layer=(0, 1, 2), delta=<3 items>" in text


def test_emmet_at_one_layer_is_the_method_joint(optima) -> None:
    joint = replace(METHODS["joint"], layer=1, settings=FEW, source=Tokens()).change(optima.lm, SEVERAL, optima)
    for choices in ({"layers": (1,)}, {"layers": None, "layer": 1}):
        assert torch.equal(layered("emmet", **choices).change(optima.lm, SEVERAL, optima).delta, joint.delta)


def test_methods_of_several_layers_take_the_models_own_and_say_all_they_chose() -> None:
    lm = tiny_model("gpt2")
    named = LanguageModel(lm.model, lm.tokenizer, "gpt-j-6b")
    named.blocks = [deepcopy(block) for _ in range(4) for block in named.blocks]
    settled = METHODS["memit"].settled(named)
    assert settled.layers == (3, 4, 5, 6, 7, 8) and settled.layer == 8 and settled.squares.weight == 15_000
    described = [METHODS[name].settled(named).describe() for name in ("memit", "emmet", "alphaedit")]
    assert len({str(x) for x in described}) == 3 and described[0]["layers"] == [3, 4, 5, 6, 7, 8]
    assert METHODS["alphaedit"].settled(named).squares.threshold == 2e-2
    with pytest.raises(ValueError, match="memit: no layers are known for tiny-gpt2"):
        METHODS["memit"].settled(lm)
    with pytest.raises(ValueError, match=r"emmet: the layers are \(2, 1\); give each once, the lowest first"):
        replace(METHODS["emmet"], layers=(2, 1)).settled(lm)
    for bad in ({"rect": 0}, {"rect": 1.5}, {"prune": 1.0}):
        with pytest.raises(ValueError, match="expected a (share|base) above"):
            replace(METHODS["memit"], **bad)


def test_requests_that_contradict_each_other_are_no_change(optima) -> None:
    with pytest.raises(ValueError, match="memit: .*contradict each other"):
        layered("memit").change(optima.lm, [(RELATED, "Rome"), (RELATED, "Oslo")], optima)


def test_edits_in_turn_keep_the_keys_of_those_before_them_in_a_null_space(optima) -> None:
    lm, method = optima.lm, layered("alphaedit", layers=(1,), together=1)
    totals = list(changes_in_turn(lm, SEVERAL, method, optima))
    assert [total.keys[1].shape[1] for total in totals] == [2, 4, 6]
    K = totals[0].keys[1].double()
    by_hand = list(changes_in_turn(lm, SEVERAL, replace(method, squares=replace(method.squares, ridge=1e3)), optima))
    first = totals[0].delta.double() @ K
    moved = [
        float((x[-1].delta.double() @ K - x[0].delta.double() @ K).norm() / first.norm()) for x in (totals, by_hand)
    ]
    assert moved[0] < 0.05
    alone = sum(method.change(lm, [request], optima.anew()).delta.double() for request in SEVERAL)
    assert float((alone @ K - first).norm() / first.norm()) > 2 * moved[0], "without K_p they would move more"


def test_rect_is_in_force_when_the_layers_above_are_solved(optima) -> None:
    lm = optima.lm
    plain, kept = (layered("emmet", rect=share).change(lm, SEVERAL, optima) for share in (None, 0.4))
    for delta in kept.deltas.values():
        assert int((delta != 0).sum()) == pytest.approx(0.4 * delta.numel(), rel=1e-3)
    assert torch.equal(kept.deltas[0], rect(plain.deltas[0].double(), lm.weight(0).double(), 0.4).float())
    assert not torch.equal(kept.deltas[1], rect(plain.deltas[1].double(), lm.weight(1).double(), 0.4).float())


def test_prune_acts_on_the_sum_of_edits_once(optima) -> None:
    lm, plain = optima.lm, layered("memit", layers=(0, 1), together=1, squares=LeastSquares("soft", 1e-3))
    with torch.no_grad():
        for layer in (0, 1):
            lm.memory(layer).weight.mul_(1e-2)  # so that edits are large beside it
    pruned = list(changes_in_turn(lm, SEVERAL, replace(plain, prune=1.2), Optima(lm, progress=False)))
    sums = list(changes_in_turn(lm, SEVERAL, plain, Optima(lm, progress=False)))
    for one, total in zip(pruned, sums, strict=True):
        for layer in (0, 1):
            expected = prune(total.deltas[layer], lm.weight(layer), 1.2)
            assert torch.equal(one.deltas[layer], expected)
    assert any(not torch.equal(pruned[-1].deltas[x], sums[-1].deltas[x]) for x in (0, 1))
    at_once = replace(plain, prune=1.2).change(lm, SEVERAL, Optima(lm, progress=False))
    unpruned = plain.change(lm, SEVERAL, Optima(lm, progress=False))
    assert torch.equal(at_once.deltas[1], prune(unpruned.deltas[1], lm.weight(1), 1.2))


def test_norm_control_leaves_out_requests_and_says_so(optima) -> None:
    lm = optima.lm
    requests = SEVERAL[:2]
    mean = mean_length(optima, requests, 1, FEW)
    lengths = [float(optima.find(request, 1, FEW).v_star.norm()) for request in requests]
    assert mean == pytest.approx(sum(lengths) / 2)
    anchor = 0.5 * min(lengths) + 1e-6 if max(lengths) > 1.01 * min(lengths) else None
    assert anchor, "one of them is to be longer than twice the anchor"
    change = layered("emmet", layers=(1,), settings=replace(FEW, anchor=anchor)).change(lm, requests, optima)
    assert change.keys[1].shape[1] == 2 and "norm control leaves the edit out" in change.remark


def test_a_method_of_several_layers_is_judged_like_any_other(optima) -> None:
    cases = [case(i, subject) for i, subject in enumerate(("Paris", "Japan", "Warsaw"))]
    methods = [layered("memit", together=2), layered("emmet", together=1)]
    table = evaluate(optima.lm, cases, ["none", *methods], progress=False, settings=QUICK, unrelated=UNRELATED)
    assert table["judged"].all() and len(table) == 9 and set(table["method"]) == {"none", "memit", "emmet"}
    alone = layered("emmet").change(optima.lm, [(cases[0].fact, cases[0].target)], optima)
    known = unrelated_to(cases[0], [(cases[0].fact, cases[0].target)], UNRELATED, 0)
    (marks,) = judge_case(optima.lm, cases[0], [alone], replace(QUICK, known=known))
    row = table[(table["case"] == cases[0].id) & (table["method"] == "emmet")].iloc[0]
    assert row["ES"] == marks["ES"] and row["EM"] == pytest.approx(marks["EM"], rel=1e-3)
