"""The slow ways, written independently: one full forward of the model for every cell, one prompt at a time.

The benchmarks time them, too, so they do no more than they have to.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

import numpy as np
import torch

from rome_lab.facts.completion import Outcome
from rome_lab.facts.fact import Fact
from rome_lab.facts.known import templates_in_order
from rome_lab.models.language_model import LanguageModel


def first(output):
    return output[0] if isinstance(output, tuple) else output


def changed(output, tensor):
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


class FullForward:
    """Runs the whole model with hooks; `modules` are the blocks, attentions and MLPs of each layer."""

    def __init__(self, lm, ids, subject_range, noise):
        self.lm, self.ids, self.range, self.noise = lm, ids, subject_range, noise
        self.modules = {
            "state": list(lm.blocks),
            "attn": [lm.attn(i) for i in range(lm.n_layers)],
            "mlp": [lm.mlp(i) for i in range(lm.n_layers)],
        }

    @torch.no_grad()
    def run(self, noise=None, hold=(), keep=False):
        """Probabilities (rows, V) and, with `keep`, all outputs; a clean row without `noise`.

        `hold` lists (kind, layer, rows, token, value).
        """
        rows = 1 if noise is None else len(noise)
        ids = self.ids.expand(rows, -1)
        outputs, held, handles = {}, defaultdict(list), []
        for kind, layer, *change in hold:
            held[kind, layer].append(change)

        def noisy(module, args, output):
            output = output.clone()
            output[:, self.range[0] : self.range[1]] += noise.to(output)
            return output

        def watch(kind, layer):
            def hook(module, args, output):
                tensor = first(output).reshape(rows, ids.shape[1], -1).clone()
                for which, token, value in held[kind, layer]:
                    tensor[which, token] = value
                outputs[kind, layer] = tensor.clone()  # some families add to it in place
                return changed(output, tensor.reshape(first(output).shape))

            return hook

        if noise is not None:
            handles.append(self.lm.embedding.register_forward_hook(noisy))
        for kind, modules in self.modules.items():
            for layer, module in enumerate(modules):
                if keep or (kind, layer) in held:
                    handles.append(module.register_forward_hook(watch(kind, layer)))
        try:
            logits = self.lm.model(ids, use_cache=False).logits[:, -1]
        finally:
            for handle in handles:
                handle.remove()
        return self.probabilities(logits), outputs

    def probabilities(self, logits):
        """In double precision, which a trace needs; the benchmarks do without, as the authors' code does."""
        return logits.double().softmax(-1)

    def restored(self, kind, layer, window=10):
        """Layers of which the cell at `layer` restores outputs."""
        if kind == "state":
            return [layer]
        return range(max(0, layer - (window - 1) // 2), min(self.lm.n_layers, layer + window // 2 + 1))

    def trace(self, kind, severed=None, window=10, answer=None, tokens=None):
        """(p_clean, p_corrupted, p_restored (T, L)) by one forward a cell; NaN at other tokens than `tokens`."""
        p_clean, clean = self.run(keep=True)
        p_corrupted, corrupted = self.run(self.noise, keep=True)
        answer = int(p_clean[0].argmax()) if answer is None else answer
        n_layers, n_tokens = self.lm.n_layers, self.ids.shape[-1]
        table = np.full((n_tokens, n_layers), np.nan)
        every = slice(None)
        for token in range(n_tokens) if tokens is None else tokens:
            for layer in range(n_layers):
                hold = [(kind, x, every, token, clean[kind, x][0, token]) for x in self.restored(kind, layer, window)]
                if severed:
                    hold += [
                        (severed, x, every, token, corrupted[severed, x][:, token]) for x in range(layer + 1, n_layers)
                    ]
                table[token, layer] = float(self.run(self.noise, hold)[0][:, answer].mean())
        return float(p_clean[0, answer]), float(p_corrupted[:, answer].mean()), table


def judge_by_search(text: str, begin: int, answer: str) -> tuple[Outcome, int | None]:
    """The verdict on a whole text, by regular expressions; Han is written without blanks."""
    before = r"(?<![^\W_\u4e00-\u9fff])"
    named = re.compile(rf"{before}{re.escape(answer)}(?![^\W_])").search(text, begin)
    capitals = [x.start() for x in re.finditer(before + r"[^\W\d_]", text) if x.group().isupper()]
    first = min((place for place in capitals if place >= begin), default=len(text))
    if named and named.start() <= first:
        words = set(re.split(r"[^\w'’]+", text[begin : named.start()].lower()))
        negations = {"not", "cannot", "never", "no", "nor", "neither"}
        negations |= {"nobody", "nothing", "nowhere", "except", "unlike"}
        denied = words & negations or any(word.endswith(("n't", "n’t")) for word in words)
        return Outcome.DENIED if denied else Outcome.KNOWN, named.start()
    return (Outcome.OTHER_WORD, first) if first < len(text) else (Outcome.NOT_NAMED, None)


def plain_known_fact(lm: LanguageModel, fact: Fact, seed: int, limit: int) -> Fact | None:
    """One prompt at a time with transformers' own generation, searched with regular expressions."""
    for template in templates_in_order(fact, seed):
        asked = replace(fact, template=template)
        ids = lm.tokenizer(asked.prompt, return_tensors="pt")["input_ids"].to(lm.device)
        whole = lm.model.generate(ids, attention_mask=ids == ids, max_new_tokens=limit, do_sample=False, pad_token_id=1)
        new = whole[0, ids.shape[1] :].tolist()
        ended = new[-1] in lm.tokenizer.all_special_ids
        said = lm.tokenizer.decode(new[:-1] if ended else new)
        if not ended:  # the last word may go on
            said = re.sub(r"[^\W_]+\Z", "", said.rstrip("\ufffd"))
        outcome, place = judge_by_search(asked.prompt + said, len(asked.prompt), fact.object)
        if outcome is not Outcome.KNOWN:
            continue
        more = (asked.prompt + said)[len(asked.prompt) : place]
        kept = replace(asked, template=(template + more).rstrip(" "))
        ids = lm.tokenizer(kept.prompt, return_tensors="pt")["input_ids"].to(lm.device)
        with torch.no_grad():
            token = int(lm.model(ids).logits[0, -1].argmax())
        written = ("" if kept.prompt.endswith("\n") else " ") + fact.object
        if token == lm.tokenizer(written, add_special_tokens=False)["input_ids"][0]:
            return kept
    return None
