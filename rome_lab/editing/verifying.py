"""`verify`: is a model traced and edited exactly? Each sort of trace beside plain runs of the whole model, and an edit.

The plain runs know nothing of blocks run in parts: the whole model, once for every cell, with hooks that hold outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rome_lab.base import USER_CACHE, Store, Tell, opened
from rome_lab.editing.edit import Edit
from rome_lab.editing.exact import rome
from rome_lab.editing.keys import key_size
from rome_lab.editing.requests import NothingToEdit
from rome_lab.editing.settings import EditSettings, default_settings
from rome_lab.facts import Fact, Prompt, read_prompt
from rome_lab.models import (
    EXACT,
    IMPOSSIBLE,
    ROUNDED,
    WRONG,
    Change,
    LanguageModel,
    Question,
    Verdict,
    keep_verdicts,
    last_logits_only,
    output_changed,
    read_weight,
    score,
)
from rome_lab.tracing import (
    KINDS,
    FixedNoise,
    GaussianNoise,
    Runs,
    TraceSettings,
    columns_of,
    restore,
    run_clean_and_corrupted,
)

TRIAL_PROMPT = "The Eiffel Tower is located in the city of"
TRIAL_SUBJECT = "Eiffel Tower"
SAMPLES, WINDOW = 2, 3
# How far the rounding of all numbers may take a result, in that of rounding the embeddings alone; a few are usual. Sixteen
# bits leave less room between rounding and a wrong result.
ROUNDINGS = {False: 30, True: 8}


def verify(
    lm: LanguageModel,
    prompt: str = TRIAL_PROMPT,
    subject: str = TRIAL_SUBJECT,
    cells: int = 6,
    seed: int = 0,
    store: Store | str | Path | None = USER_CACHE,
    progress: bool = True,
    tell: Tell | None = None,
) -> pd.DataFrame:
    """Whether this model is traced and edited exactly: a row for each check, with its largest difference and a verdict.

    Each sort of trace is compared with one run of the whole model a cell, in log probability of the answer; so are the
    readout and whole-text scores. One edit is put in force: does the edited matrix, in the model's own run, give v* for
    k*, and are the weights bit for bit what they were after it is undone? "Exact to float": no more than rounding explains,
    which is measured by rounding the embeddings once; "exact to the dtype" is the same in 16 bits or with fast products.
    "Not possible": the check cannot tell, and the remark says why.

    Args:
        prompt, subject: the text to try it on, and the part of it that is corrupted.
        cells: of each sort of trace, how many are compared; drawn by `seed`.
        store: where the verdicts are kept. Those in the user's cache, the default, are what `causal_trace` asks, which
            refuses a model with a wrong one.
        tell: called with each check before it is made, and how far it has come.

    Returns: columns check, difference, limit, verdict, remark.

    Raises:
        ValueError: the subject is not in the prompt, or the model gives what is not a number.
        OSError: the store cannot be written; found before any work is done.
    """
    if kept := opened(store):
        kept.check_writable()
    plain = PlainRuns(lm, read_prompt(lm, prompt, subject), seed)
    lm.check_finite(plain.clean, "verify")  # of these weights alone, while verdicts are kept for all models of the kind
    checks: dict[str, Callable[[], list[Verdict]]] = {
        "readout": partial(check_readouts, plain),
        "score of a text": partial(check_scores, plain),
        **{f"trace {label}": partial(check_kind, plain, label, cells, seed) for label in KINDS},
        "edit": partial(check_edit, plain),
    }
    verdicts: list[Verdict] = []
    for name, check in tqdm(checks.items(), "verifying", unit="check", disable=not progress):
        if tell:
            tell(f"Verifying: {name}", list(checks).index(name) / len(checks))
        try:
            verdicts += check()
        except (ValueError, NotImplementedError) as error:
            verdicts.append(Verdict(name, None, None, IMPOSSIBLE, str(error).splitlines()[0]))
    keep_verdicts(lm, verdicts, store)
    return pd.DataFrame([asdict(x) for x in verdicts])


def judged(lm: LanguageModel, check: str, difference: float, limit: float, unit: str) -> Verdict:
    """The verdict on a difference; what is no number is wrong."""
    right = ROUNDED if lm.is_rounded else EXACT
    return Verdict(
        check, difference if np.isfinite(difference) else None, limit, right if difference <= limit else WRONG, unit
    )


class PlainRuns:
    """Runs of the whole model on one prompt, with noise on its subject and outputs of modules held.

    Attributes:
        noise: (S, subject tokens, D) on the embeddings.
        clean, corrupted: log p (rows, V) of the last token's next, float64.
        outputs: by run and module, (rows, T, D).
        answer: the token that the model says next.
    """

    def __init__(self, lm: LanguageModel, prompt: Prompt, seed: int) -> None:
        self.lm, self.prompt = lm, prompt
        begin, end = prompt.subject_range
        shape = (SAMPLES, end - begin, lm.embedding.weight.shape[1])
        with torch.no_grad():
            std = 3 * float(lm.embedding(prompt.ids).double().std())  # of this text alone, which is read at once
        self.noise = GaussianNoise(std=std).noise(lm, shape, f"verify {seed}")
        self.outputs: dict[str, dict[nn.Module, Tensor]] = {"clean": {}, "corrupted": {}}
        self.clean = self.run(keep=self.outputs["clean"])
        self.corrupted = self.run(self.noise, keep=self.outputs["corrupted"])
        self.answer = int(self.clean[0].argmax())

    def parts(self, kind: str) -> list[nn.Module]:
        """The modules of that kind, one a layer."""
        lm = self.lm
        return lm.blocks if kind == "state" else [(lm.mlp if kind == "mlp" else lm.attn)(x) for x in range(lm.n_layers)]

    @torch.no_grad()
    def run(
        self,
        noise: Tensor | None = None,
        held: Mapping[nn.Module, tuple[int, Tensor]] = MappingProxyType({}),
        keep: dict[nn.Module, Tensor] | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        """Log p (rows, V), with `held` outputs (token, value) and embeddings times `factor`; outputs go to `keep`."""
        rows = 1 if noise is None else len(noise)
        begin, end = self.prompt.subject_range

        def embed(x: Tensor) -> Tensor:
            x = x.clone()
            if noise is not None:
                x[:, begin:end] += noise.to(x)
            return x if factor is None else (x * factor.to(x.device)).to(x)

        def watch(module: nn.Module) -> Callable[[Tensor], Tensor]:
            def change(output: Tensor) -> Tensor:
                output = output.clone()
                by_token = output.view(rows, -1, output.shape[-1])
                if module in held:
                    by_token[:, held[module][0]] = held[module][1].to(by_token)
                if keep is not None:
                    keep[module] = by_token.clone()  # some models add to outputs in place
                return output

            return change

        watched = list(held) if keep is None else [x for kind in ("state", "mlp", "attn") for x in self.parts(kind)]
        with ExitStack() as hooks:
            hooks.enter_context(output_changed(self.lm.embedding, embed))
            for module in watched:
                hooks.enter_context(output_changed(module, watch(module)))
            ids = self.prompt.ids.expand(rows, -1)
            logits = self.lm.model(input_ids=ids, use_cache=False, **last_logits_only(self.lm.model)).logits
        return logits[:, -1].double().cpu().log_softmax(-1)

    def restored(self, kind: str, severed: str | None, token: int, layer: int) -> float:
        """Log of the mean probability of the answer in one cell, as B.1, B.2 and Figure 3 define it."""
        clean, corrupted = self.outputs["clean"], self.outputs["corrupted"]
        column = columns_of(kind, self.lm.n_layers, WINDOW)[layer]
        held = {x: (token, clean[x][0, token]) for x in self.parts(kind)[column.first : column.last + 1]}
        if severed:
            held |= {x: (token, corrupted[x][:, token]) for x in self.parts(severed)[layer + 1 :]}
        return log_mean(self.run(self.noise, held)[:, self.answer])

    @cached_property
    def recorded(self) -> Runs:
        """The same runs as a trace records them, from which it makes the restored ones."""
        return run_clean_and_corrupted(self.lm, self.prompt, None, TraceSettings(FixedNoise(self.noise), window=WINDOW))

    @cached_property
    def limit(self) -> float:
        """How far log p may be off: `ROUNDINGS` times as far as rounding every number of the embeddings takes it."""
        generator = torch.Generator().manual_seed(0)
        eps = precision_of(self.lm)
        moved = []
        for _ in range(4):
            signs = 2.0 * torch.randint(0, 2, self.noise.shape[-1:], generator=generator) - 1
            again = self.run(self.noise, factor=(1 + eps * signs.double()))
            moved.append(abs(log_mean(again[:, self.answer]) - log_mean(self.corrupted[:, self.answer])))
        return ROUNDINGS[self.lm.is_rounded] * max(*moved, 4 * eps)


def precision_of(lm: LanguageModel) -> float:
    """The relative spacing of the numbers that it computes with: float32's at least, in which some compute a part anyway."""
    dtype = torch.bfloat16 if lm.is_rounded and lm.dtype.itemsize > 2 else lm.dtype
    return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def log_mean(log_p: Tensor) -> float:
    """log of the mean of exp."""
    return float(log_p.logsumexp(0) - np.log(len(log_p)))


def check_readouts(plain: PlainRuns) -> list[Verdict]:
    """`lm.logits` of the last block's outputs, beside the model's own."""
    lm = plain.lm
    states = plain.outputs["corrupted"][lm.blocks[-1]][:, -1]
    with torch.no_grad():
        ours = lm.logits(states).double().cpu().log_softmax(-1)
    limit = plain.limit
    return [judged(lm, "readout", float((ours - plain.corrupted).abs().max()), limit, "log p of any token")]


def check_scores(plain: PlainRuns) -> list[Verdict]:
    """Whole-text scores, beside the model's own run."""
    lm, ids = plain.lm, tuple(plain.prompt.ids.tolist())
    (scored,) = score(lm, [Change()], [Question(0, ids, (plain.answer,))])
    difference = abs(scored.total - float(plain.clean[0, plain.answer]))
    return [judged(lm, "score of a text", difference, plain.limit, "log p of the answer")]


def check_kind(plain: PlainRuns, label: str, cells: int, seed: int) -> list[Verdict]:
    """One sort of trace, beside one run of the whole model for each of some cells."""
    lm, prompt, (kind, severed) = plain.lm, plain.prompt, KINDS[label]
    last, n = prompt.subject_range[1] - 1, len(prompt.ids)
    rng = np.random.default_rng(seed)
    tokens = [last, n - 1, int(rng.integers(prompt.subject_range[0], n))]  # three are swept, not all
    places = [(x, int(rng.integers(lm.n_layers))) for x in itertools.islice(itertools.cycle(tokens), max(0, cells - 2))]
    chosen = dict.fromkeys([(last, lm.n_layers // 3), (n - 1, 2 * lm.n_layers // 3), *places])
    trace = restore(plain.recorded, kind, severed, sorted(set(tokens)))
    own = np.array([plain.restored(kind, severed, *cell) for cell in chosen])
    ours = np.log([trace.p_restored[cell] for cell in chosen])
    limit, spread = plain.limit, float(np.ptp([*own, log_mean(plain.corrupted[:, plain.answer])]))
    verdict = judged(
        lm, f"trace {label}", float(np.abs(ours - own).max()), limit, f"log p of the answer in {len(own)} cells"
    )
    if verdict.verdict != WRONG and spread < 3 * limit:
        why = f"the cells differ by {spread:.1e} only, so that an error would not show; try another prompt"
        verdict = replace(verdict, verdict=IMPOSSIBLE, remark=why)
    return [verdict]


def check_edit(plain: PlainRuns) -> list[Verdict]:
    """One edit in force: what the edited matrix gives in the model's own run, and the weights after it is undone."""
    lm, prompt = plain.lm, plain.prompt
    dense = sorted(set(range(lm.n_layers)) - lm.sparse) or [0]
    layer = default_settings(lm).layer or dense[len(dense) // 3]
    module = lm.memory(layer)
    before = read_weight(module).clone()
    edit = an_edit(lm, prompt, layer)
    values: list[Tensor] = []
    with edit.applied(lm), output_changed(module, lambda output: values.append(output.clone())), torch.no_grad():
        lm.model(input_ids=prompt.ids[None], use_cache=False, **last_logits_only(lm.model))
        changed = not torch.equal(read_weight(module), before)
    if not changed:
        raise ValueError(f"the search for v* at layer {layer} changes nothing; try another prompt")
    value = values[0].view(len(prompt.ids), -1)[prompt.subject_range[1] - 1].double().cpu()
    bias = getattr(module, "bias", None)
    value = value if bias is None else value - bias.detach().double().cpu()
    error = float((value - edit.v_star.double()).norm() / edit.v_star.double().norm())
    same = torch.equal(read_weight(module), before)
    limit = ROUNDINGS[lm.is_rounded] * precision_of(lm)
    return [
        judged(lm, f"edit of layer {layer}", error, limit, "|W_hat k* - v*| / |v*|, in a run"),
        Verdict(
            "undo", float(not same), 0.0, EXACT if same else WRONG, "weights that are not bit for bit what they were"
        ),
    ]


def an_edit(lm: LanguageModel, prompt: Prompt, layer: int) -> Edit:
    """An edit of the prompt to something that the model does not say; without C, which takes minutes."""
    begin = prompt.text.index(prompt.subject)
    before, after = prompt.text[:begin], prompt.text[begin + len(prompt.subject) :]
    fact = Fact(prompt.subject, before.replace("{", "{{").replace("}", "}}") + "{}" + after, "something")
    settings = EditSettings(key="bare", steps=8, prefixes=("In short,",), enough=0.0)
    for target in ("Rome", "London"):
        with suppress(NothingToEdit):
            return rome(lm, fact, target, layer, C=torch.eye(key_size(lm, layer)), hparams=settings, progress=False)
    raise ValueError(f"{lm.name} says both Rome and London after {prompt.text!r}; try another prompt")
