"""One trace by other libraries, beside ours: `python -m benchmarks.peers [--samples 10] [--layers 0 30]`, see `make peers`.

rome_lab         the sweep
TransformerLens  a bridge's `run_with_hooks`, all samples in one forward a cell
nnsight          a `trace` a cell, all samples in it
pyvene           an `IntervenableModel` a cell, as in its tutorial on this paper, all samples in one forward
causal-tracer    its own `calculate_hidden_flow`, batches of 32 rows of several cells

Each loads the same weights from one folder and is given the same noise, that of causal-tracer, and the same cells: every
token, some of the layers. They take turns in this process. Libraries that are not installed are left out, and said to be.
causal-tracer restores the layers [l - 5, l + 4] around l, so its cells of MLP runs are compared with ours one layer below.

Prints a table and writes it as CSV: seconds of every way, seconds beside ours, and the largest difference of a cell.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.measure import Row, about, finish, in_turns, ratios, row
from benchmarks.plain_tracing import Question, sweep
from rome_lab import LanguageModel, load_model
from rome_lab.facts.prompts import read_prompt

PROMPT, SUBJECT = "The Eiffel Tower is in the city of", "Eiffel Tower"
KINDS = ("state", "mlp")
SEED = 1  # of causal-tracer's noise, its default
Way = Callable[[Question, str, range], np.ndarray]
"""A question, a kind and layers in; p_restored (T, layers) out."""


def question(lm: LanguageModel, samples: int, window: int) -> Question:
    """The fact with the noise of causal-tracer: normal numbers of numpy's generator, times 3 sigma."""
    read = read_prompt(lm, PROMPT, SUBJECT)
    begin, end = read.subject_range
    shape = (samples, end - begin, lm.embedding.weight.shape[1])
    numbers = np.random.RandomState(SEED).randn(*shape)
    return Question(lm, read, noise_std(lm) * torch.from_numpy(numbers).float(), window)


def noise_std(lm: LanguageModel) -> float:
    """3 sigma of all token embeddings: one number for all libraries."""
    return 3 * float(lm.embedding.weight.detach().float().std())


def restored_layers(kind: str, layer: int, asked: Question) -> list[int]:
    """The layers whose outputs one cell restores."""
    if kind == "state":
        return [layer]
    begin = layer - (asked.window - 1) // 2
    return list(range(max(0, begin), min(asked.lm.n_layers, begin + asked.window)))


def by_rome_lab(asked: Question, kind: str, layers: range) -> np.ndarray:
    """All layers, since they share the sweep's work; those that were asked for are returned."""
    return sweep(asked, (kind,))[kind][:, layers]


def by_cells(asked: Question, layers: range, one_cell: Callable[[int, int], Tensor], answer: int) -> np.ndarray:
    """p_restored of every token and layer, by `one_cell`, which gives logits (S, V) at the last token."""
    tokens = range(len(asked.prompt.ids))
    with torch.no_grad():
        return np.array([[float(one_cell(t, x).softmax(-1)[:, answer].mean()) for x in layers] for t in tokens])


def transformer_lens(folder: str, lm: LanguageModel) -> Way:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(folder, tokenizer=lm.tokenizer, device="cpu")

    def run(asked: Question, kind: str, layers: range) -> np.ndarray:
        ids, (begin, end) = asked.prompt.ids[None], asked.prompt.subject_range
        name = {"state": "blocks.{}.hook_out", "mlp": "blocks.{}.mlp.hook_out"}[kind]
        names = {layer: name.format(layer) for layer in range(asked.lm.n_layers)}
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(ids, names_filter=list(names.values()))
        several = ids.expand(len(asked.noise), -1)

        def corrupt(value: Tensor, hook: object) -> Tensor:
            value = value.clone()
            value[:, begin:end] += asked.noise
            return value

        def one_cell(token: int, layer: int) -> Tensor:
            def restore(value: Tensor, hook: object, name: str) -> Tensor:
                value = value.clone()
                value[:, token] = cache[name][0, token]
                return value

            chosen = [names[x] for x in restored_layers(kind, layer, asked)]
            hooks = [("embed.hook_out", corrupt), *((name, partial(restore, name=name)) for name in chosen)]
            return bridge.run_with_hooks(several, fwd_hooks=hooks)[:, -1]

        return by_cells(asked, layers, one_cell, int(logits[0, -1].argmax()))

    return run


def nnsight(folder: str, lm: LanguageModel) -> Way:
    from nnsight import LanguageModel as Traced
    from nnsight import save

    model = Traced(loaded(folder), tokenizer=lm.tokenizer)

    def run(asked: Question, kind: str, layers: range) -> np.ndarray:
        ids, (begin, end) = asked.prompt.ids[None], asked.prompt.subject_range
        several, noise = ids.expand(len(asked.noise), -1), asked.noise
        part = (
            (lambda layer: model.model.layers[layer])
            if kind == "state"
            else (lambda layer: model.model.layers[layer].mlp)
        )

        def clean_run() -> tuple[list[Tensor], Tensor]:  # inner functions do not see what a trace saves
            with torch.no_grad(), model.trace(ids):
                states = save([part(layer).output for layer in range(asked.lm.n_layers)])
                logits = model.lm_head.output.save()
            return states, logits

        clean, logits = clean_run()

        def one_cell(token: int, layer: int) -> Tensor:
            chosen = restored_layers(kind, layer, asked)
            with model.trace(several):
                model.model.embed_tokens.output[:, begin:end] += noise
                for x in chosen:
                    part(x).output[:, token] = clean[x][0, token]
                last = model.lm_head.output[:, -1].save()
            return last

        return by_cells(asked, layers, one_cell, int(logits[0, -1].argmax()))

    return run


def pyvene(folder: str, lm: LanguageModel) -> Way:
    import pyvene as pv

    model = loaded(folder)

    class AddNoise(pv.ConstantSourceIntervention, pv.LocalistRepresentationIntervention):
        """As pyvene's own NoiseIntervention, with noise that is given."""

        noise: Tensor

        def forward(
            self, base: Tensor, source: Tensor | None = None, subspaces: object = None, **more: object
        ) -> Tensor:
            base[..., : self.interchange_dim] += self.noise
            return base

    def run(asked: Question, kind: str, layers: range) -> np.ndarray:
        ids, (begin, end) = asked.prompt.ids[None], asked.prompt.subject_range
        several = {"input_ids": ids.expand(len(asked.noise), -1)}
        AddNoise.noise = asked.noise
        component = {"state": "block_output", "mlp": "mlp_output"}[kind]
        subject = list(range(begin, end))
        with torch.no_grad():
            answer = int(model(ids).logits[0, -1].argmax())

        def one_cell(token: int, layer: int) -> Tensor:
            chosen = restored_layers(kind, layer, asked)
            corrupt = pv.RepresentationConfig(0, "block_input", "pos", len(subject))
            restore = [pv.RepresentationConfig(x, component, "pos", 1) for x in chosen]
            config = pv.IntervenableConfig(
                representations=[corrupt, *restore],
                intervention_types=[AddNoise] + [pv.VanillaIntervention] * len(restore),
            )
            intervenable = pv.IntervenableModel(config, model)
            rows = len(asked.noise)
            places = [[subject] * rows] + [[[token]] * rows] * len(restore)
            _, output = intervenable(
                several,
                [None] + [several] * len(restore),
                {"sources->base": ([None] + places[1:], places)},
            )
            return output.logits[:, -1]

        return by_cells(asked, layers, one_cell, answer)

    return run


def causal_tracer(folder: str, lm: LanguageModel) -> Way:
    from causal_tracer import CausalTracer

    tracer = CausalTracer(loaded(folder), lm.tokenizer, noise=noise_std(lm), device=torch.device("cpu"))

    def run(asked: Question, kind: str, layers: range) -> np.ndarray:
        later = kind == "mlp" and asked.window % 2 == 0  # its run around l is ours around l - 1
        flow = tracer.calculate_hidden_flow(
            asked.prompt.text,
            subject=asked.prompt.subject,
            kind={"state": "hidden", "mlp": "mlp"}[kind],
            samples=len(asked.noise),
            window=asked.window if kind == "mlp" else 1,
            patch_seed=SEED,
            start_layer=layers.start + later,
            end_layer=layers.stop + later,
        )
        filled = flow.scores.float().cpu().numpy()  # (T, L): layers that were not run hold the corrupted probability
        return filled[:, layers.start + later : layers.stop + later]

    return run


PEERS = {
    "TransformerLens": ("transformer-lens", transformer_lens),
    "nnsight": ("nnsight", nnsight),
    "pyvene": ("pyvene", pyvene),
    "causal-tracer": ("causal-tracer", causal_tracer),
}


def loaded(folder: str) -> torch.nn.Module:
    """Plain transformers with these weights."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def available(lm: LanguageModel, folder: str, chosen: Sequence[str]) -> tuple[dict[str, Way], dict[str, str]]:
    """The ways that can be gone here, ours first, and why the others cannot."""
    ways, missing = {"rome_lab": by_rome_lab}, {}
    for name in chosen:
        package, set_up = PEERS[name]
        try:
            title = f"{name} {version(package)}"
            ways[title] = set_up(folder, lm)
        except PackageNotFoundError:
            missing[name] = "not installed"
        except Exception as error:  # whatever another library says of this model or these versions is worth a line
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return ways, missing


def compared(asked: Question, ways: dict[str, Way], kinds: Sequence[str], layers: range, repetitions: int) -> list[Row]:
    """Seconds of each way, extrapolated from the layers that it ran to all of them, and how far its cells are from ours."""
    rows: list[Row] = []
    share = asked.lm.n_layers / len(layers)
    for kind in kinds:
        work = {name: partial(way, asked, kind, layers) for name, way in ways.items()}
        times, tables = in_turns(work, repetitions, asked.lm.device)
        ours = next(iter(ways))
        for name, taken in times.items():
            whole = taken if name == ours else [share * x for x in taken]
            rows.append(row(kind, f"{kind}: {name}, all {asked.lm.n_layers} layers", whole, "s"))
            if name != ours:
                rows.append(row(kind, f"{kind}: {name} / {ours}", ratios(whole, times[ours]), "times"))
                apart = float(np.abs(tables[name] - tables[ours]).max())
                rows.append(row(kind, f"{kind}: largest difference of {name}", [apart], "probability"))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description="Other libraries, beside ours.")
    parser.add_argument("--model", default="smollm2-135m", help="a model of the Llama family (%(default)s)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="which (all)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--samples", type=int, default=10, help="of the noise (%(default)s)")
    parser.add_argument("--window", type=int, default=10, help="of MLP runs (%(default)s)")
    parser.add_argument(
        "--layers", nargs=2, type=int, metavar=("BEGIN", "END"), help="for the others to run; all by default"
    )
    parser.add_argument("--repetitions", type=int, default=1, help="(%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/peers.csv"), help="the table (%(default)s)"
    )
    parser.add_argument("--page", type=Path, help="write the table as Markdown, too")
    given = parser.parse_args(arguments)
    lm = load_model(given.model, "cpu")
    layers = range(*(given.layers or (0, lm.n_layers)))
    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent, "model"))
        lm.save_pretrained(folder)
        ways, missing = available(lm, folder, given.peers)
        print("left out: " + ("; ".join(f"{name}: {why}" for name, why in missing.items()) or "none"), file=sys.stderr)
        asked = question(lm, given.samples, given.window)
        rows = compared(asked, ways, given.kinds, layers, given.repetitions)
    cells = f"{len(asked.prompt.ids)} tokens x {len(layers)} layers run by the others"
    table = pd.DataFrame(rows).assign(samples=given.samples, cells=cells, **about(lm))
    command = shlex.join(["python", "-m", "benchmarks.peers", *(sys.argv[1:] if arguments is None else arguments)])
    finish(table, given.out, given.page, command)


if __name__ == "__main__":
    main()
