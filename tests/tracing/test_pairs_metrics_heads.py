"""Swapped subjects, both directions, all metrics, heads and knockout: against one full forward a cell, and by identities."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import VERIFIED, family_model
from test_tracing import EIFFEL, noise_for, telling_model
from tiny import FAMILIES, tiny_model

from rome_lab import Fact, FixedNoise, GaussianNoise, SubjectSwap, causal_trace, knockout, swap_pairs, trace_facts
from rome_lab.facts.prompts import read_prompt
from rome_lab.models.language_model import LanguageModel
from rome_lab.tracing.one_fact import restore, restore_heads
from rome_lab.tracing.runs import TraceSettings, run_clean_and_corrupted
from rome_lab.tracing.sweep import Sweep, column_of_heads, columns_of

PROMPT, SUBJECT = EIFFEL
OTHER = "Effiel Toxer"  # as many tokens in the tiny tokenizer
HEADS_END = {
    "gpt2": "attn.c_proj",
    "gptj": "attn.out_proj",
    "gpt_neox": "attention.dense",
    "gpt_neox-serial": "attention.dense",
    "opt": "self_attn.out_proj",
    "opt-post-norm": "self_attn.out_proj",
}


class OwnRuns:
    """The model's own forward over rows of tokens, with noise, holding what modules give or are given at a token."""

    def __init__(self, lm: LanguageModel, family: str = "") -> None:
        self.lm = lm
        ends = HEADS_END.get(family, "self_attn.o_proj")
        self.modules = {
            "state": lm.blocks,
            "attn": [lm.attn(x) for x in range(lm.n_layers)],
            "mlp": [lm.mlp(x) for x in range(lm.n_layers)],
        }
        if family in FAMILIES:
            self.modules["head"] = [block.get_submodule(ends) for block in lm.blocks]

    @torch.no_grad()
    def run(self, ids, noise=None, begin=0, hold=None):
        """Logits (V,) of one row in float64, and what each module gave, or was given, by kind and layer: (T, D).

        `hold` maps (kind, layer) to (token, dimensions, value).
        """
        seen, handles = {}, []

        def exchange(key, tensor):
            rows = tensor.reshape(len(ids), -1).clone()
            if hold and key in hold:
                token, dimensions, value = hold[key]
                rows[token, dimensions] = value
            seen[key] = rows.clone()
            return rows.reshape(tensor.shape)

        def after(key):
            def hook(module, args, output):
                if isinstance(output, tuple):
                    return (exchange(key, output[0]), *output[1:])
                return exchange(key, output)

            return hook

        def add(module, args, output):
            output = output.clone()
            output[0, begin : begin + len(noise)] += noise.to(output)
            return output

        if noise is not None:
            handles.append(self.lm.embedding.register_forward_hook(add))
        for kind, modules in self.modules.items():
            for layer, module in enumerate(modules):
                key = (kind, layer)
                if kind == "head":
                    before = lambda module, args, key=key: (exchange(key, args[0]), *args[1:])  # noqa: E731
                    handles.append(module.register_forward_pre_hook(before))
                else:
                    handles.append(module.register_forward_hook(after(key)))
        try:
            return self.lm.model(ids[None], use_cache=False).logits[0, -1].double(), seen
        finally:
            for handle in handles:
                handle.remove()

    def metrics(self, logits, answer, foil):
        log_p = logits.log_softmax(-1)
        return {
            "probability": float(log_p[answer].exp()),
            "log_probability": float(log_p[answer]),
            "logit_difference": float(logits[answer] - logits[foil]),
        }


def ids_of(lm, text):
    return torch.tensor(lm.tokenizer(text)["input_ids"])


def first_id(lm, text):
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"][0]


def check_swapped(lm, family, kind, direction, window=2):
    """A trace with another subject, in all metrics, beside one full forward a cell."""
    own, foil = OwnRuns(lm, family), " Rome"
    trace = causal_trace(
        lm,
        PROMPT,
        SUBJECT,
        kind,
        SubjectSwap(OTHER, "Rome"),
        window=window,
        direction=direction,
        metric="logit_difference",
    )
    texts = [ids_of(lm, PROMPT), ids_of(lm, PROMPT.replace(SUBJECT, OTHER))]
    base, source = (texts[0], texts[1]) if direction == "noise" else (texts[1], texts[0])
    kept = own.run(source)[1]
    answer, foil = int(own.run(texts[0])[0].argmax()), first_id(lm, foil)
    tokens = range(len(base)) if kind != "head" else [len(base) - 1]
    heads = trace.p_restored.shape[1] if kind == "head" else 1
    expected = {name: np.full(trace.p_restored.shape, np.nan) for name in ("probability", *trace.further)}
    for token in tokens:
        for layer in range(lm.n_layers):
            for head in range(heads):
                layers = [layer]
                if kind in ("mlp", "attn"):
                    layers = range(max(0, layer - (window - 1) // 2), min(lm.n_layers, layer + window // 2 + 1))
                width = kept[kind, layer].shape[-1] // heads
                part = slice(head * width, (head + 1) * width) if kind == "head" else slice(None)
                hold = {(kind, x): (token, part, kept[kind, x][token, part]) for x in layers}
                cell = own.metrics(own.run(base, hold=hold)[0], answer, foil)
                for name, table in expected.items():
                    table[(layer, head) if kind == "head" else (token, layer)] = cell[name]
    ends = [own.metrics(own.run(ids)[0], answer, foil) for ids in texts]
    for name, table in expected.items():
        readings = trace.read(name)
        assert [readings.clean, readings.corrupted] == pytest.approx([end[name] for end in ends], abs=1e-6)
        assert table.std() > 0, "the oracle's table is flat: it could not show an error"
        assert np.abs(readings.restored - table).max() <= 1e-6 * max(1, table.std()), name
    whole = ends[1]["logit_difference"] - ends[0]["logit_difference"]
    whole = whole if direction == "noise" else -whole
    if trace.has_normalised:
        np.testing.assert_allclose(trace.normalised_effect * whole, trace.effect, atol=1e-5)
    else:
        assert abs(whole) < 0.2


def doubled(family):
    lm = tiny_model(family)
    lm.model.double()
    return lm


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("kind", ["state", "mlp", "attn", "head"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "gemma2"])
def test_another_subject_equals_one_full_forward_a_cell(family, kind, direction):
    check_swapped(doubled(family), family, kind, direction)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["state", "mlp", "attn", "head"])
@pytest.mark.parametrize("family", [x for x in FAMILIES if x not in ("llama", "gpt2", "gptj", "gemma2")])
def test_another_subject_equals_one_full_forward_a_cell_in_every_family(family, kind):
    for direction in ("denoise", "noise"):
        check_swapped(doubled(family), family, kind, direction)


@pytest.mark.parametrize(("kind", "severed"), [("state", None), ("mlp", None), ("state", "attn")])
def test_corrupted_noise_put_into_the_clean_run_equals_one_full_forward_a_cell(kind, severed):
    lm = doubled("llama")
    own, noise = OwnRuns(lm), noise_for(lm, *EIFFEL, samples=2).double()
    read = read_prompt(lm, *EIFFEL)
    trace = causal_trace(lm, *EIFFEL, kind, FixedNoise(noise), window=2, direction="noise", severed=severed)
    logits, clean = own.run(read.ids)
    answer = int(logits.argmax())
    token = read.subject_range[1] - 1
    for layer in range(lm.n_layers):
        p = []
        for sample in noise:
            kept = own.run(read.ids, sample, read.subject_range[0])[1]
            layers = [layer] if kind == "state" else range(layer, min(lm.n_layers, layer + 2))
            hold = {(kind, x): (token, slice(None), kept[kind, x][token]) for x in layers}
            if severed:
                above = range(layer + 1, lm.n_layers)
                hold |= {(severed, x): (token, slice(None), clean[severed, x][token]) for x in above}
            p.append(float(own.run(read.ids, hold=hold)[0].softmax(-1)[answer]))
        assert trace.p_restored[token, layer] == pytest.approx(np.mean(p), abs=1e-6)  # noise is kept in float32
        assert trace.p_variance[token, layer] == pytest.approx(np.var(p, ddof=1), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("kind", ["state", "mlp", "attn", "head"])
def test_the_noise_direction_is_the_mirror_of_denoising(kind):
    lm = doubled("qwen3")
    there = causal_trace(lm, PROMPT, SUBJECT, kind, SubjectSwap(OTHER), direction="noise")
    swapped = PROMPT.replace(SUBJECT, OTHER)
    runs = run_clean_and_corrupted(lm, swapped, OTHER, TraceSettings(SubjectSwap(SUBJECT)), with_heads=True)
    answer = int(OwnRuns(lm).run(ids_of(lm, PROMPT))[0].argmax())  # as text it might be cut into other tokens
    back = restore(replace(runs, answer_id=answer), kind)
    np.testing.assert_allclose(there.p_restored, back.p_restored, atol=1e-12)
    np.testing.assert_allclose(there.effect, back.effect, atol=1e-12)
    assert there.whole == pytest.approx(back.whole)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_restoring_the_last_state_does_all_there_is(direction):
    lm = doubled("llama")
    trace = causal_trace(
        lm, PROMPT, SUBJECT, corruption=SubjectSwap(OTHER, "Rome"), direction=direction, metric="log_probability"
    )
    assert trace.effect[-1, -1] == pytest.approx(trace.whole, abs=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_heads_of_a_layer_together_are_its_attention_output(family):
    lm = doubled(family)
    runs = run_clean_and_corrupted(lm, *EIFFEL, TraceSettings(GaussianNoise(std=0.5), samples=2), with_heads=True)
    heads, last = runs.recording.heads[0].shape[2], len(runs.prompt.ids) - 1
    assert heads == 4
    together = [column_of_heads((x, head) for head in range(heads)) for x in range(lm.n_layers)]
    by_heads = Sweep(runs, last, "head", None, together).metrics()
    whole = Sweep(runs, last, "attn", None, columns_of("attn", lm.n_layers, 1)).metrics()
    for name, values in whole.items():
        np.testing.assert_allclose(by_heads[name], values, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("family", VERIFIED)
def test_heads_of_every_verified_family_together_are_its_attention_output_or_are_refused(family):
    lm = family_model(family)
    if lm.heads_out is None:
        # Sinks scale the values; the cache of the other keeps what values are made of.
        assert family in ("gpt-oss (attention sinks)", "DeepSeek V3 (first layer dense)")
        with pytest.raises(ValueError, match="cannot be told apart"):
            causal_trace(lm, *EIFFEL, "head", samples=1)
        return
    runs = run_clean_and_corrupted(lm, *EIFFEL, TraceSettings(GaussianNoise(std=0.5), samples=1), with_heads=True)
    heads, last = runs.recording.heads[0].shape[2], len(runs.prompt.ids) - 1
    together = [column_of_heads((x, head) for head in range(heads)) for x in range(lm.n_layers)]
    by_heads = Sweep(runs, last, "head", None, together).metrics()["probability"]
    whole = Sweep(runs, last, "attn", None, columns_of("attn", lm.n_layers, 1)).metrics()["probability"]
    np.testing.assert_allclose(by_heads, whole, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_heads_of_several_layers_together_equal_one_full_forward_a_set(family):
    lm = doubled(family)
    settings = TraceSettings(SubjectSwap(OTHER, "Rome"))
    sets = [[(0, 1)], [(0, 1), (2, 3)], [(2, 0), (1, 1), (1, 2), (3, 3)], [(x, y) for x in range(4) for y in range(4)]]
    together = restore_heads(run_clean_and_corrupted(lm, *EIFFEL, settings, with_heads=True), sets)
    own = OwnRuns(lm, family)
    logits, kept = own.run(ids_of(lm, PROMPT))
    answer, swapped = int(logits.argmax()), ids_of(lm, PROMPT.replace(SUBJECT, OTHER))
    for place, heads in enumerate(sets):
        hold = {}
        for layer in {x for x, _ in heads}:
            dimensions = [8 * head + d for x, head in heads if x == layer for d in range(8)]
            hold["head", layer] = (-1, dimensions, kept["head", layer][-1, dimensions])
        cell = own.metrics(own.run(swapped, hold=hold)[0], answer, first_id(lm, " Rome"))
        for name, value in cell.items():
            assert together[name][place] == pytest.approx(value, abs=1e-9)


def test_heads_can_be_restored_at_any_token():
    lm = doubled("llama")
    assert causal_trace(lm, *EIFFEL, "head", samples=2, token=0).effect == pytest.approx(0, abs=1e-12)
    at_last = causal_trace(lm, *EIFFEL, "head", samples=2, token=len(ids_of(lm, PROMPT)) - 1)
    np.testing.assert_array_equal(at_last.effect, causal_trace(lm, *EIFFEL, "head", samples=2).effect)


def plain_knockout(lm, read, tokens, layers):
    """P[o] where attention arguments of some blocks are changed in a full forward."""
    length = len(read.ids)

    def bar(module, args, kwargs):
        for name, value in kwargs.items():
            if "mask" in name:
                mask = (
                    torch.ones(length, length, dtype=torch.bool).tril()[None, None] if value is None else value.clone()
                )
                mask[..., -1, tokens] = mask[0, 0, 0, -1]
                kwargs[name] = mask
        return args, kwargs

    handles = [lm.blocks[x].register_forward_pre_hook(bar, with_kwargs=True) for x in layers]
    try:
        with torch.no_grad():
            return lm.model(read.ids[None], use_cache=False).logits[0, -1].double().softmax(-1)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family", [x for x in FAMILIES if x != "gpt2"])
def test_knockout_equals_one_full_forward_a_layer(family):
    lm = telling_model(family)
    read = read_prompt(lm, *EIFFEL)
    tokens = [*range(*read.subject_range), len(read.ids) - 3]  # the windows of some families leave out the subject
    knocked = knockout(lm, *EIFFEL, window=3, tokens=tokens)
    clean = plain_knockout(lm, read, tokens, [])
    answer = int(clean.argmax())
    expected = np.array(
        [
            float(plain_knockout(lm, read, tokens, range(max(0, x - 1), min(lm.n_layers, x + 2)))[answer])
            for x in range(lm.n_layers)
        ]
    )
    assert np.abs(expected - float(clean[answer])).max() > 1e-4
    np.testing.assert_allclose(knocked.p, expected, atol=2e-5)
    np.testing.assert_allclose(
        knocked.relative_change, (expected - clean[answer].item()) / clean[answer].item(), atol=1e-3
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_knockout_in_all_layers_is_the_models_own_run_with_such_a_mask(family):
    lm = doubled(family)
    if family == "mistral":
        lm.model.config.sliding_window = None
    read = read_prompt(lm, *EIFFEL)
    length = len(read.ids)
    mask = torch.zeros(1, 1, length, length, dtype=torch.float64)
    lowest = torch.finfo(torch.float64).min
    mask.masked_fill_(~torch.ones(length, length, dtype=torch.bool).tril(), lowest)
    mask[..., -1, list(range(*read.subject_range))] = lowest
    with torch.no_grad():
        p = lm.model(read.ids[None], attention_mask=mask, use_cache=False).logits[0, -1].softmax(-1)
    knocked = knockout(lm, *EIFFEL, window=2 * lm.n_layers)
    answer = int(lm.model(read.ids[None]).logits[0, -1].argmax())
    np.testing.assert_allclose(knocked.p, float(p[answer]), atol=1e-9)


def test_bad_input_is_refused_in_one_sentence():
    lm = tiny_model("llama")
    for change, message in (
        ({"corruption": SubjectSwap("Eiffel Tow")}, "choose one of as many"),
        ({"corruption": SubjectSwap(SUBJECT)}, "is the subject itself"),
        ({"metric": "logit_difference"}, "against a foil"),
        ({"metric": "rank"}, "expected one of 'probability'"),
        ({"direction": "sideways"}, "'denoise' or 'noise'"),
        ({"kind": "head", "severed": "mlp"}, "is not defined"),
        ({"token": 3}, "for heads only"),
        ({"kind": "head", "token": 99}, "there is no token 99"),
        ({"kind": "head", "token": 1.5}, "token is 1.5; expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_trace(lm, *EIFFEL, **{"samples": 1} | change)
    trace = causal_trace(lm, *EIFFEL, samples=1)
    with pytest.raises(ValueError, match="begins with the same token as the answer"):
        causal_trace(lm, *EIFFEL, samples=1, answer=" Rome", foil="Rome")
    with pytest.raises(ValueError, match="no metric 'logit_difference' was read"):
        trace.by("logit_difference")
    with pytest.raises(ValueError, match="no share of it says anything"):
        _ = causal_trace(lm, *EIFFEL, corruption=GaussianNoise(std=0.0), samples=1).normalised_effect
    for tokens in ([], [400], [1.5], ["1"], [True], range(len(trace.tokens))):
        with pytest.raises(ValueError, match="at least to attend to|least to attend"):
            knockout(lm, *EIFFEL, tokens=list(tokens))


def test_knockout_of_all_that_a_sliding_window_leaves_is_refused():
    lm = tiny_model("mistral")  # each token sees six
    length = len(ids_of(lm, PROMPT))
    with pytest.raises(ValueError, match="in block 0 of tiny-mistral the last token sees none but"):
        knockout(lm, *EIFFEL, tokens=range(length - 8, length))
    knockout(lm, *EIFFEL, tokens=range(length - 8, length - 1))


def test_facts_among_pairs_are_not_traced_by_another_corruption():
    from rome_lab.tracing.pairs import SwapPair

    template = "The {} is located in the city of"
    one, other = Fact(SUBJECT, template, "Paris"), Fact(OTHER, template, "Rome")
    with pytest.raises(ValueError, match="1 of 2 facts are pairs"):
        trace_facts(tiny_model("llama"), [SwapPair(one, other), other], progress=False)


def test_shares_of_what_all_heads_bring_back_are_none_where_that_is_near_zero(monkeypatch, caplog):
    from rome_lab.studies import heads as study
    from rome_lab.tracing.pairs import SwapPair

    lm, template = tiny_model("llama"), "The {} is located in the city of"
    monkeypatch.setattr("rome_lab.tracing.runs.known_answer", lambda lm, fact, logits: int(logits.argmax()))
    swapped = (Fact(SUBJECT, x, "Paris") for x in (template, "A {} is in", "{} is in", "Oh {} is in", "The {}, is in"))
    pairs = [SwapPair(fact, Fact(OTHER, fact.template, "Rome")) for fact in swapped]
    traces = study.trace_heads(lm, pairs)
    shares = study.share_of_heads(lm, pairs, traces)
    assert shares["share"].iloc[-1] == pytest.approx(1) and shares["heads"].iloc[-1] == 16 and shares["n_facts"][0] == 3
    assert "of 16 heads make 80% of" in study.enough_in_words(shares)
    signs = iter((1, -1, 1))
    whole = study.restore_heads

    def to_and_fro(runs, sets):
        sign, base = next(signs), runs.metrics[study.METRIC][1]
        return {study.METRIC: base + sign * np.abs(whole(runs, sets)[study.METRIC] - base)}

    monkeypatch.setattr(study, "restore_heads", to_and_fro)
    shares = study.share_of_heads(lm, pairs, traces)
    assert shares[["share", "ci_low", "ci_high"]].isna().all(axis=None) and "not clearly above zero" in caplog.text
    assert study.enough_in_words(shares).endswith("so there are no shares of it.")
    with pytest.raises(ValueError, match="5 pairs and 4 traces"):
        study.share_of_heads(lm, pairs, traces[1:])


def test_corruptions_are_compared_at_the_first_of_the_windows_whatever_it_is(monkeypatch):
    from rome_lab.studies import corruptions as study
    from rome_lab.tracing.pairs import SwapPair

    lm, template = tiny_model("llama"), "The {} is located in the city of"
    monkeypatch.setattr("rome_lab.tracing.runs.known_answer", lambda lm, fact, logits: int(logits.argmax()))
    pairs = [SwapPair(Fact(SUBJECT, x, "Paris"), Fact(OTHER, x, "Rome")) for x in (template, "A {} is in")]
    sizes = [0.5, 1, 1.5, 2, 2.5, 3, 4, 5]  # more than there are colours
    choices = study.choices_of(sizes, [3, 1])
    assert [x.window for x in choices] == [3] * 10 + [1, 1] and len(choices[0].kinds) > len(choices[-1].kinds)
    traces = study.trace_choices(lm, pairs, choices, samples=1)
    effects = study.site_effects(traces)
    drawn = effects[(effects["window"] == 3) & (effects["metric"] == "probability")]
    figure = study.compare_lines(drawn, "sigmas", study.SINGLE, "")
    assert all(len(ax.lines) == 10 for ax in figure.axes), "nine choices and the zero"
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines[:9]}
    assert len(styles) == 9
    assert set(study.choice_verdicts(traces)["choice"]) == {str(x) for x in choices[:10]}


def test_pairs_have_partners_that_fit_and_are_drawn_by_the_seed(lm):
    facts = [x for x in relation_of_landmarks()]
    pairs = swap_pairs(lm, facts, n=3, progress=False)
    again = swap_pairs(lm, facts, n=2, progress=False)
    assert tuple(again) == tuple(pairs[:2]) and len(pairs) == 3
    assert pairs.known == 3 + len(pairs.alone)
    for fact, partner in pairs:
        assert fact.relation == partner.relation and fact.object != partner.object
        ids, others = ids_of(lm, fact.prompt), ids_of(lm, partner.prompt)
        assert len(ids) == len(others) and partner.template == fact.template
        with torch.no_grad():
            says = lm.model(others[None]).logits[0, -1].argmax()
        assert (
            lm.tokenizer.decode([int(says)]).strip() == partner.object[: len(lm.tokenizer.decode([int(says)]).strip())]
        )


def relation_of_landmarks():
    from rome_lab import load_facts

    return [fact for fact in load_facts("embedded") if fact.relation == "landmark_city"]


def test_pairs_are_stored_with_all_metrics(tmp_path, monkeypatch):
    from rome_lab.tracing import many_facts
    from rome_lab.tracing.pairs import SwapPair

    lm = tiny_model("llama")
    template = "The {} is located in the city of"
    with torch.no_grad():
        answer = lm.tokenizer.decode([int(lm.model(ids_of(lm, PROMPT)[None]).logits[0, -1].argmax())])
    if not answer.strip():
        pytest.skip("the random model says a blank")
    fact, partner = Fact(SUBJECT, template, answer.strip()), Fact(OTHER, template, "Rome")
    monkeypatch.setattr("rome_lab.tracing.runs.known_answer", lambda lm, fact, logits: int(logits.argmax()))
    pair = SwapPair(fact, partner)
    first = trace_facts(lm, [pair], ("state", "head"), tmp_path, False)

    def trace_of_kind(runs, label):
        raise TypeError("traced again")

    trace_of_kind.__module__ = many_facts.trace_of_kind.__module__  # a part of what a trace is stored under
    monkeypatch.setattr(many_facts, "trace_of_kind", trace_of_kind)
    again = trace_facts(lm, [pair], ("state", "head"), tmp_path, False, metric="logit_difference")
    for one, other in zip(first, again, strict=True):
        assert other.metric == "logit_difference" and replace(other, metric=one.metric).in_short() == one.in_short()
        for name in ("probability", "log_probability", "logit_difference"):
            np.testing.assert_array_equal(one.read(name).restored, other.read(name).restored)
            np.testing.assert_array_equal(one.read(name).variance, other.read(name).variance)
            assert one.read(name).clean == other.read(name).clean
    with pytest.raises(TypeError):
        trace_facts(lm, [pair], ("state",), tmp_path, False, direction="noise")  # this one would have to be traced


def test_noise_of_a_pair_has_the_partners_object_as_its_foil(monkeypatch):
    from rome_lab.tracing.pairs import SwapPair

    lm = tiny_model("llama")
    monkeypatch.setattr("rome_lab.tracing.runs.known_answer", lambda lm, fact, logits: int(logits.argmax()))
    template = "The {} is located in the city of"
    pair = SwapPair(Fact(SUBJECT, template, "x"), Fact(OTHER, template, "Rome"))
    (trace,) = trace_facts(lm, [pair], ["state"], progress=False, corruption=GaussianNoise(std=0.3), samples=2)
    assert (
        trace.swapped is None and trace.foil == lm.tokenizer.decode([first_id(lm, " Rome")]) and trace.noise_std == 0.3
    )


def test_a_pair_is_traced_on_a_worker_as_it_is_here(tmp_path, monkeypatch):
    from rome_lab.base import Store
    from rome_lab.tracing.many_facts import TracePlan, trace_fact, trace_there
    from rome_lab.tracing.pairs import SwapPair

    lm = tiny_model("llama")
    monkeypatch.setattr("rome_lab.tracing.runs.known_answer", lambda lm, fact, logits: int(logits.argmax()))
    template = "The {} is located in the city of"
    pair = SwapPair(Fact(SUBJECT, template, "x", "place"), Fact(OTHER, template, "Rome", "place"))
    plan = TracePlan(("state",), TraceSettings(direction="noise"), True, "logit_difference", lm.identity().key())
    task, sent = pickle.loads(pickle.dumps(((pair, ("state",)), plan)))
    assert trace_there(lm, task, Store(tmp_path), sent) is None
    stored = Store(tmp_path).load(plan.inputs(lm, pair)["state"])
    (here,) = trace_fact(lm, pair, None, plan)
    np.testing.assert_array_equal(stored.arrays["restored_probability"], here.p_restored)
    assert here.direction == "noise" and here.swapped == OTHER and here.relation == "place"
