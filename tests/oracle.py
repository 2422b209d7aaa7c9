"""The slow way, written independently of rome_lab.blocks: one full forward of the model for every cell."""

from __future__ import annotations

import numpy as np
import torch


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
    def run(self, corrupt, hold=()):
        """Probabilities (rows, V) and all outputs; `hold` lists (kind, layer, token, value)."""
        rows = len(self.noise) if corrupt else 1
        ids = self.ids.expand(rows, -1)
        outputs, handles = {}, []

        def noisy(module, args, output):
            output = output.clone()
            output[:, self.range[0] : self.range[1]] += self.noise.to(output)
            return output

        def watch(kind, layer):
            def hook(module, args, output):
                tensor = first(output).reshape(rows, ids.shape[1], -1).clone()
                for k, at, token, value in hold:
                    if (k, at) == (kind, layer):
                        tensor[:, token] = value
                outputs[kind, layer] = tensor
                return changed(output, tensor.reshape(first(output).shape))

            return hook

        if corrupt:
            handles.append(self.lm.embedding.register_forward_hook(noisy))
        for kind, modules in self.modules.items():
            for layer, module in enumerate(modules):
                handles.append(module.register_forward_hook(watch(kind, layer)))
        try:
            logits = self.lm.model(ids, use_cache=False).logits[:, -1]
        finally:
            for handle in handles:
                handle.remove()
        return logits.double().softmax(-1), outputs

    def trace(self, kind, severed=None, window=10, answer=None):
        """(p_clean, p_corrupted, p_restored (T, L)) by one forward a cell."""
        p_clean, clean = self.run(corrupt=False)
        p_corrupted, corrupted = self.run(corrupt=True)
        answer = int(p_clean[0].argmax()) if answer is None else answer
        n_layers, n_tokens = self.lm.n_layers, self.ids.shape[-1]
        table = np.empty((n_tokens, n_layers))
        for token in range(n_tokens):
            for layer in range(n_layers):
                if kind == "state":
                    hold = [("state", layer, token, clean["state", layer][0, token])]
                    if severed:
                        hold += [
                            (severed, x, token, corrupted[severed, x][:, token]) for x in range(layer + 1, n_layers)
                        ]
                else:
                    lo, hi = layer - (window - 1) // 2, layer + window // 2
                    hold = [
                        (kind, x, token, clean[kind, x][0, token]) for x in range(max(0, lo), min(n_layers, hi + 1))
                    ]
                table[token, layer] = float(self.run(corrupt=True, hold=hold)[0][:, answer].mean())
        return float(p_clean[0, answer]), float(p_corrupted[:, answer].mean()), table
