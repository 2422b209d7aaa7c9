"""Gradient estimates: against autograd through the model's own full forward, and the exact effects to which they tend."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import accelerate
import numpy as np
import pytest
import torch
from families import VERIFIED, family_model
from test_readiness import PackedLinear
from tiny import FAMILIES, tiny_model, tokenizer

import rome_lab as rl
from rome_lab import FixedNoise, LanguageModel, SubjectSwap, attribution_patching, causal_trace, integrated_gradients
from rome_lab.facts import read_prompt
from rome_lab.models import input_changed, output_changed
from rome_lab.tracing import TraceSettings, restore, run_clean_and_corrupted
from rome_lab.tracing.gradients import integrals, slopes

PROMPT = ("Paris is in the", "Paris")
KINDS = ("state", "mlp", "attn", "head")
# A part of these models computes in float32, whatever the dtype.
ROUNDED = 3e-6


def noise_for(lm, size=0.05, samples=2):
    """Faint noise: the tiny models are so steep that other noise takes hundreds of steps."""
    begin, end = read_prompt(lm, *PROMPT).subject_range
    noise = torch.randn(samples, end - begin, lm.embedding.weight.shape[1], generator=torch.Generator().manual_seed(1))
    return FixedNoise(size * noise)


def in_float64(family, seed=0):
    lm = tiny_model(family, seed)
    lm.model.double()
    return lm


class Whole:
    """One forward of the whole model on one prompt, with hooks; knows nothing of blocks run in parts."""

    def __init__(self, lm, noise):
        self.lm, self.read, self.noise = lm, read_prompt(lm, *PROMPT), noise.tensor.to(lm.embedding.weight)
        self.answer = int(self.run(0 * self.noise[:1])[0].argmax())

    def node(self, kind, layer):
        """The way to change a node's values (rows * T, ...): which hook, on which module."""
        lm = self.lm
        module = {"state": lm.blocks, "head": lm.heads_out}.get(kind)
        module = module[layer] if module else (lm.mlp if kind == "mlp" else lm.attn)(layer)
        return (input_changed if kind == "head" else output_changed), module

    def run(self, noise, changes=()):
        """Logits (rows, V) at the last token; `changes` are (kind, layer, what becomes of its values (rows, T, D))."""
        begin, end = self.read.subject_range
        rows = len(noise)

        def embed(x):
            x = x.clone()
            x[:, begin:end] += noise
            return x

        def changed(function, x):
            return function(x.reshape(rows, len(self.read.ids), -1)).reshape(x.shape)

        with ExitStack() as hooks:
            hooks.enter_context(output_changed(self.lm.embedding, embed))
            for kind, layer, function in changes:
                way, module = self.node(kind, layer)
                hooks.enter_context(way(module, lambda x, function=function: changed(function, x)))
            return self.lm.model(self.read.ids.expand(rows, -1), use_cache=False).logits[:, -1]

    def values(self, kind, layer):
        """(1 + S, T, D) in the clean and the corrupted runs."""
        kept = []
        with torch.no_grad():
            both = torch.cat([0 * self.noise[:1], self.noise])
            self.run(both, [(kind, layer, lambda x: kept.append(x.clone()) or x.clone())])
        return kept[0]

    def gradient(self, kind, layer, noise):
        """(rows, T, D) of log P[answer], by a leaf that is added to the node."""
        leaves = []

        def add(x):
            leaves.append(torch.zeros_like(x, requires_grad=True))
            return x + leaves[0]

        logits = self.run(noise, [(kind, layer, add)])
        return torch.autograd.grad(logits.log_softmax(-1)[:, self.answer].sum(), leaves)[0]

    def slope(self, kind, layers, token, along):
        """(S,) d log P[answer] / da where all the nodes of a cell stand between corrupted, 0, and clean, 1."""
        a = torch.full((len(self.noise),), along, dtype=self.noise.dtype, requires_grad=True)
        values = [self.values(kind, layer) for layer in layers]

        def place(x, both):
            x = x.clone()
            x[:, token] = both[1:, token] + a[:, None] * (both[:1, token] - both[1:, token])
            return x

        changes = [(kind, n, lambda x, both=both: place(x, both)) for n, both in zip(layers, values, strict=True)]
        log_p = self.run(self.noise, changes).log_softmax(-1)[:, self.answer]
        return torch.autograd.grad(log_p.sum(), a)[0].numpy()


def estimate_by_whole_forwards(whole, kind, window=1, direction="denoise"):
    """(T, L) of "state", "mlp" and "attn"; (L, heads) at the last token."""
    lm, single = whole.lm, []
    for layer in range(lm.n_layers):
        both = whole.values(kind, layer)
        shift = both[:1] - both[1:]
        gradient = whole.gradient(kind, layer, whole.noise if direction == "denoise" else 0 * whole.noise[:1])
        single.append((shift * gradient if direction == "denoise" else -shift * gradient).mean(0))  # (T, D)
    if kind == "head":
        return torch.stack(single)[:, -1].unflatten(-1, (lm.config.num_attention_heads, -1)).sum(-1).numpy()
    by_layer = torch.stack(single, -1).sum(1).numpy()  # (T, L)
    first, last = (0, 0) if kind == "state" else ((window - 1) // 2, window // 2)
    return np.stack([by_layer[:, max(0, x - first) : x + last + 1].sum(1) for x in range(lm.n_layers)], 1)


def check_against_whole_forwards(lm, kinds, tolerance):
    noise = noise_for(lm)
    whole = Whole(lm, noise)
    for direction in ("denoise", "noise"):
        options = {"metric": "log_probability", "direction": direction, "window": 3}
        estimates = attribution_patching(lm, *PROMPT, kinds, noise, **options)
        for kind in kinds:
            expected = estimate_by_whole_forwards(whole, kind, 3, direction)
            assert np.abs(expected).max() > 1e-5
            np.testing.assert_allclose(estimates[kind], expected, rtol=0, atol=tolerance * np.abs(expected).max())
    assert all(weight.grad is None for weight in lm.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_attribution_patching_is_autograd_through_the_whole_model(family):
    check_against_whole_forwards(in_float64(family), KINDS, ROUNDED)


WITHOUT_FORWARD = ("BLOOM (alibi)",)  # its activation is a function of its own, with a way back only
ODD = ("Falcon (new blocks)", "BLOOM (alibi)", "Mixtral", "OLMo 2 (norms after)", "Granite (multipliers)")


@pytest.mark.parametrize("name", [x if x in ODD else pytest.param(x, marks=pytest.mark.slow) for x in VERIFIED])
def test_both_are_autograd_through_the_whole_model_in_families_that_are_found(name):
    lm = family_model(name)
    kinds = KINDS if lm.heads_out else KINDS[:3]
    check_against_whole_forwards(lm, kinds, ROUNDED)
    if name in WITHOUT_FORWARD:
        with pytest.raises(ValueError, match="has no forward derivative .*attribution_patching"):
            integrated_gradients(lm, *PROMPT, samples=1)
    else:
        check_slopes(lm, kinds)


def check_slopes(lm, kinds):
    """Forward derivatives of some cells, half way along, beside backward ones of the whole model."""
    whole, settings = Whole(lm, noise := noise_for(lm)), TraceSettings(noise, window=3)
    runs = run_clean_and_corrupted(lm, *PROMPT, settings, with_heads=True)
    begin, last = runs.prompt.subject_range[0], len(runs.prompt.ids) - 1
    for kind, token, layer in (("state", begin, 1), ("mlp", begin, 2), ("attn", last, 2), ("mlp", last, 0)):
        if kind in kinds:
            layers = [layer] if kind == "state" else range(max(0, layer - 1), min(layer + 2, lm.n_layers))
            ours = slopes(runs, kind, "log_probability", token, torch.tensor([0.5]).double())[layer, 0]
            expected = whole.slope(kind, layers, token, 0.5)
            np.testing.assert_allclose(ours, expected, rtol=0, atol=max(1e-7, ROUNDED * np.abs(expected).max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_slopes_along_a_restoration_are_autograd_through_the_whole_model(family):
    check_slopes(in_float64(family), KINDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_step_at_the_beginning_is_attribution_patching(family):
    """Forward derivatives against backward ones; of runs of layers they are other things, see the docstring."""
    lm = in_float64(family)
    runs = run_clean_and_corrupted(lm, *PROMPT, TraceSettings(noise := noise_for(lm), window=1), with_heads=True)
    estimates = attribution_patching(lm, *PROMPT, KINDS, noise, window=1, metric="probability")
    begin, zero = runs.prompt.subject_range[0], torch.zeros(1, dtype=torch.float64)
    for kind in KINDS[:3]:
        rows = [slopes(runs, kind, "probability", x, zero).mean((1, 2)) for x in range(begin, len(runs.prompt.ids))]
        scale = np.abs(rows).max()
        np.testing.assert_allclose(estimates[kind][begin:], rows, rtol=0, atol=ROUNDED * scale, err_msg=kind)
    heads = slopes(runs, "head", "probability", len(runs.prompt.ids) - 1, zero).mean((1, 2)).reshape(lm.n_layers, -1)
    np.testing.assert_allclose(estimates["head"], heads, rtol=0, atol=ROUNDED * np.abs(heads).max())


@pytest.mark.parametrize(("family", "direction"), [*((x, "denoise") for x in FAMILIES), ("gpt2", "noise")])
def test_integrated_gradients_tend_to_the_exact_effect(family, direction):
    lm = in_float64(family)
    settings = TraceSettings(noise_for(lm, samples=1), window=3, direction=direction)
    runs = run_clean_and_corrupted(lm, *PROMPT, settings, with_heads=True)
    tokens = [runs.prompt.subject_range[0] + 2]
    for kind in KINDS:
        exact = restore(runs, kind).effect
        errors = []
        for steps in (2, 20, 200):
            effects = integrals(runs, [kind], "probability", steps, tokens)[kind]
            errors.append(np.nanmax(np.abs(effects - exact)))
        assert np.abs(exact).max() > 1e-4, kind
        assert errors[2] < errors[0] and errors[2] < (2e-5 if family == "opt" else 2e-6), (kind, errors)
        if family.startswith(("gpt2", "gpt_neox")):  # float64 throughout, and smooth: opt's ReLU is not
            ratios = np.divide(errors[:2], errors[1:])
            assert errors[2] < 1e-7 and (ratios > 80).all(), (kind, errors)


def test_integrated_gradients_of_some_tokens_leave_the_others_empty():
    lm = tiny_model("llama")
    effects = integrated_gradients(lm, "The capital of France is", "France", ["mlp"], samples=2, steps=2, tokens=[0, 6])
    begin = read_prompt(lm, "The capital of France is", "France").subject_range[0]
    assert begin > 0 and (effects["mlp"][0] == 0).all() and np.isfinite(effects["mlp"][6]).all()
    assert np.isnan(np.delete(effects["mlp"], [0, 6], axis=0)).all()


def test_tokens_left_of_the_subject_have_no_effect():
    lm = tiny_model("gpt2")
    prompt = ("The Eiffel Tower is located in the city of", "Eiffel Tower")
    begin = read_prompt(lm, *prompt).subject_range[0]
    for values in attribution_patching(lm, *prompt, samples=2).values():
        assert values.shape == causal_trace(lm, *prompt, samples=1).effect.shape
        assert begin > 0 and not values[:begin].any() and values[begin:].any()


def test_the_samples_are_averaged_and_the_batch_does_not_matter():
    lm = in_float64("gpt2")
    noise = noise_for(lm, samples=3)
    whole = attribution_patching(lm, *PROMPT, KINDS, noise)
    apart = [attribution_patching(lm, *PROMPT, KINDS, FixedNoise(noise.tensor[i : i + 1])) for i in range(3)]
    split = attribution_patching(lm, *PROMPT, KINDS, noise, max_rows=2)
    for kind in KINDS:
        np.testing.assert_allclose(whole[kind], np.mean([x[kind] for x in apart], axis=0), rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(whole[kind], split[kind], rtol=1e-9, atol=1e-15)
    few = integrated_gradients(lm, *PROMPT, KINDS, noise, 3, max_rows=5)
    for kind, values in integrated_gradients(lm, *PROMPT, KINDS, noise, 3).items():
        np.testing.assert_allclose(few[kind], values, rtol=1e-9, atol=1e-15)


def test_the_logit_difference_of_another_subject_is_integrated_too():
    lm = in_float64("gpt2")
    prompt, swap = ("Rome is in the", "Rome"), SubjectSwap("Tokyo", "Tokyo")
    options = {"metric": "logit_difference"}
    effect = causal_trace(lm, *prompt, "state", swap, **options).effect
    assert np.abs(effect).max() > 0.1
    integral = integrated_gradients(lm, *prompt, ["state"], swap, 400, tokens=[0], **options)["state"]
    np.testing.assert_allclose(integral[0], effect[0], rtol=0, atol=1e-3 * np.abs(effect).max())


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_offloaded_weights_give_the_plain_models_estimates(place, tmp_path):
    plain, model = tiny_model("llama"), tiny_model("llama").model
    if place == "memory":
        model = accelerate.cpu_offload(model, torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, torch.device("cpu"))
    off = LanguageModel(model, tokenizer(), name="offloaded")
    assert off.memory(1).weight.is_meta
    for make in (attribution_patching, lambda *x, **more: integrated_gradients(*x, **more, steps=2)):
        one, other = (make(lm, *PROMPT, KINDS, samples=2) for lm in (plain, off))
        for kind in KINDS:
            np.testing.assert_array_equal(one[kind], other[kind])
    assert off.memory(1).weight.is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("metric", ["probability", "log_probability"])
def test_sixteen_bits_estimate_what_float32_does_but_for_rounding(dtype, metric):
    rough = tiny_model("llama")
    rough.model.to(dtype)
    plain = LanguageModel(copy.deepcopy(rough.model).float(), tokenizer())  # the same weights, already rounded
    noise = noise_for(plain)
    for make in (attribution_patching, integrated_gradients):
        one, other = (make(lm, *PROMPT, KINDS, noise, metric=metric) for lm in (plain, rough))
        for kind in KINDS:
            scale = np.abs(one[kind]).max()
            assert np.abs(one[kind] - other[kind]).max() <= {torch.bfloat16: 0.25, torch.float16: 0.05}[dtype] * scale


def test_an_improbable_answer_has_a_gradient_in_float16():
    """P[o] near the least number that 16 bits hold: its own gradient would vanish there."""
    rough = tiny_model("llama")
    rough.model.half()
    logits = rough.model(read_prompt(rough, *PROMPT).ids[None]).logits[0, -1]
    answer = rough.tokenizer.decode([int(logits[40:120].argmin()) + 40])
    plain = LanguageModel(copy.deepcopy(rough.model).float(), tokenizer())
    noise = noise_for(plain)
    one, other = (attribution_patching(lm, *PROMPT, ["state"], noise, answer=answer)["state"] for lm in (plain, rough))
    assert 0 < np.abs(one).max() < 1e-5
    np.testing.assert_allclose(other, one, rtol=0, atol=0.05 * np.abs(one).max())


def packed(lm, module=PackedLinear):
    model = copy.deepcopy(lm.model)
    for block in model.model.layers:
        block.mlp.gate_proj = module(block.mlp.gate_proj)
    return LanguageModel(model, tokenizer(), name="packed")


class WithoutGradient(PackedLinear):
    """As a kernel for packed weights that knows no gradient."""

    def forward(self, x):
        return super().forward(x.detach())


def test_packed_weights_pass_gradients_on_or_are_refused():
    lm = tiny_model("llama")
    noise = noise_for(lm)
    passing = packed(lm)
    plain = LanguageModel(copy.deepcopy(lm.model), tokenizer())
    with torch.no_grad():
        for layer in range(4):
            module = passing.blocks[layer].mlp.gate_proj
            plain.blocks[layer].mlp.gate_proj.weight.copy_(module.weight.float() * module.scale)
    one, other = (attribution_patching(x, *PROMPT, KINDS, noise) for x in (plain, passing))
    for kind in KINDS:
        np.testing.assert_allclose(one[kind], other[kind], rtol=0, atol=1e-5 * np.abs(one[kind]).max())
    for make in (attribution_patching, integrated_gradients):
        with pytest.raises(ValueError, match=r"mlp.gate_proj of block \d of packed \(WithoutGradient\) passes none on"):
            make(packed(lm, WithoutGradient), *PROMPT, KINDS, noise)


@pytest.mark.parametrize("training", [False, True], ids=["plain", "gradients checkpointed"])
def test_the_model_is_left_as_it_was(training):
    lm = tiny_model("qwen2")
    if training:
        lm.model.gradient_checkpointing_enable()
    lm.model.lm_head.weight.requires_grad_(False)
    hooks = [len(x._forward_hooks) + len(x._forward_pre_hooks) for x in lm.model.modules()]
    before, wanted = lm.fingerprint(), [weight.requires_grad for weight in lm.model.parameters()]
    with torch.inference_mode():
        attribution_patching(lm, *PROMPT, KINDS, samples=2)
    integrated_gradients(lm, *PROMPT, ["attn"], samples=2, steps=2)
    assert lm.fingerprint() == before and [x.requires_grad for x in lm.model.parameters()] == wanted
    assert all(weight.grad is None for weight in lm.model.parameters())
    assert hooks == [len(x._forward_hooks) + len(x._forward_pre_hooks) for x in lm.model.modules()]


def test_bad_input_is_refused_in_one_sentence():
    lm, headless = tiny_model("llama"), family_model("gpt-oss (attention sinks)")
    cases = [
        (lambda f: f(lm, *PROMPT, "state"), "kinds is 'state'; expected a list"),
        (lambda f: f(lm, *PROMPT, []), "kinds is "),
        (lambda f: f(lm, *PROMPT, ["severed-mlp"]), "severed-mlp"),
        (lambda f: f(lm, *PROMPT, metric="logit_difference"), "a logit difference is against a foil"),
        (lambda f: f(lm, *PROMPT, metric="logits"), "metric is 'logits'"),
        (lambda f: f(lm, *PROMPT, ["head"], token=99), "no token 99"),
        (lambda f: f(headless, *PROMPT, ["head"]), "heads of .* cannot be told apart"),
        (lambda f: integrated_gradients(lm, *PROMPT, steps=0), "steps is 0"),
        (lambda f: integrated_gradients(lm, *PROMPT, tokens=[99]), "no token 99"),
    ]
    for call, message in cases:
        for make in (attribution_patching, integrated_gradients):
            with pytest.raises(ValueError, match=message) as caught:
                call(make)
            assert "\n" not in str(caught.value)


def test_a_model_that_came_out_wrong_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path))
    lm = tiny_model("gpt2")
    rl.models.keep_verdicts(
        lm, [rl.models.Verdict("trace mlp", 1.0, 1e-6, rl.models.WRONG, "log p")], rl.base.USER_CACHE
    )
    with pytest.raises(ValueError, match="rl.verify found that"):
        attribution_patching(lm, *PROMPT, samples=1)
    assert attribution_patching(lm, *PROMPT, samples=1, despite_verdict=True)["mlp"].any()


def test_estimates_of_the_embedded_model_rank_its_cells_as_exact_effects_do(lm):
    prompt = ("The Eiffel Tower is located in the city of", "Eiffel Tower")
    estimate = attribution_patching(lm, *prompt, ["state"], samples=2)["state"]
    exact = causal_trace(lm, *prompt, "state", samples=2).effect
    assert np.corrcoef(estimate.ravel(), exact.ravel())[0, 1] > 0.8
    assert estimate.shape == exact.shape
