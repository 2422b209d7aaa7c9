"""All figures of tracing at once: a first picture soon, pictures that grow with the facts, one bar over all of it.

The facts are traced here, each once, into the store; the notebooks then find their traces there and draw the figures. Until
then pictures of what there is so far are in runs/growing, each replaced whole.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import psutil
from matplotlib.figure import Figure
from tqdm import tqdm

from rome_lab.base import write_atomically
from rome_lab.facts import Fact, known_facts, load_facts, read_prompt
from rome_lab.lab.batch import one_kernel, prepare, run_notebook, shared_out
from rome_lab.lab.drawing import FONT_SIZE
from rome_lab.lab.plots import (
    average_heatmaps,
    average_lines,
    facts_and_average,
    heatmaps,
    severed_and_gaps,
    shared_limits,
)
from rome_lab.lab.typed_facts import facts_to_show
from rome_lab.models import LanguageModel, load_model
from rome_lab.tracing import KINDS, Trace, Traces, columns_of, trace_facts

TRACED = ("claims", "figure_1", "figure_2", "figure_3", "figure_7")
"""The notebooks whose numbers are traces, by name."""
SHOWN = ("state", "mlp", "attn")  # kinds that figures 1, 2 and 7 show
BAR = "{desc}{percentage:3.0f}% |{bar}| {elapsed} < {remaining}"
DRAWING = 0.05  # share of the time that goes to pictures which are drawn again later


def draw_figures(
    notebooks: str | Path, parameters: Mapping[str, object], runs: str | Path = "runs", progress: bool = True
) -> Path:
    """Trace what the notebooks of `TRACED` show, and run them; returns the executed copy of the last.

    Args:
        notebooks: the folder that holds them.
        parameters: as `run_notebook` takes them; each notebook takes those that it has.
        runs: folder of the executed copies, and of the growing pictures.

    Raises: what `run_notebook` raises, `load_model` and `trace_facts`.
    """
    plans = shared_out([Path(notebooks) / f"{name}.ipynb" for name in TRACED], parameters)
    used = [prepare(path, values)[1]["parameters"] for path, values in plans][TRACED.index("figure_1")]
    results, seed = used["results"], used["seed"]
    lm = load_model(used["model"], used["device"], used["dtype"])
    start_up = time.time() - psutil.Process().create_time()
    facts = load_facts(used["dataset"])
    settings = {"samples": used["samples"], "window": used["window"], "seed": seed, "store": results, "progress": False}
    # A terminal that does not tell its width says 0, and tqdm would draw nothing.
    style = {"bar_format": BAR, "smoothing": 0.1, "ncols": shutil.get_terminal_size().columns}
    with tqdm(desc="figures", unit="", disable=not progress, **style) as bar:
        pictures = Growing(Path(runs) / "growing", lm, bar, used["window"])
        # The first picture does not wait until the known facts are found.
        first = facts_to_show(lm, facts, used["examples"], [], results, seed)[:1]
        pictures.expect(first, SHOWN)
        guess = pictures.expect(first * used["n_facts"], tuple(KINDS))  # as if all were like it, until they are known
        if first:
            pictures.trace_shown(first, settings)
        bar.set_description("finding known facts")
        known = known_facts(lm, facts, n=used["n_facts"], seed=seed, store=results, progress=False)
        shown = facts_to_show(lm, facts, used["examples"], known, results, seed)
        pictures.expect(shown, SHOWN)
        pictures.expect(known, tuple(KINDS))
        bar.total -= guess
        pictures.expect_seconds(len(TRACED) * start_up / 2)
        pictures.trace_shown(shown, settings)
        bar.set_description("tracing")
        trace_facts(lm, known, tuple(KINDS), each=pictures.add, **settings)
        with one_kernel() as kernel:
            for place, (path, values) in enumerate(plans):
                bar.set_description(path.stem)
                executed = run_notebook(path, values, runs, progress=False, kernel=kernel)
                bar.update((bar.total - bar.n) / (len(plans) - place))
        bar.set_description("figures")
    if progress:
        print(f"The figures are in {nbformat.read(executed, as_version=4).metadata.rome_lab.parameters.figures}.")
    return executed


@dataclass(eq=False)
class Growing:
    """Pictures of the traces so far, drawn again where they have grown enough, and the bar over all work.

    Attributes:
        folder: where the pictures are.
        shown: the traces of the facts that Figure 1 shows one by one; averaged: those of the facts behind the averages.
        most_shown: how many of the former have been in a picture at once.
    """

    folder: Path
    lm: LanguageModel
    bar: tqdm
    window: int
    shown: list[Trace] = field(default_factory=list)
    averaged: list[Trace] = field(default_factory=list)
    most_shown: int = 0
    begun: float = field(default_factory=time.monotonic)
    drawing: float = 0.0  # seconds that pictures have taken

    def __post_init__(self) -> None:
        """Take away what an earlier run left: it may be of another model."""
        for path in self.folder.glob("figure_*.png"):
            path.unlink()

    def expect(self, facts: Iterable[Fact], kinds: Sequence[str]) -> int:
        """Count the traces of these facts to the work that lies ahead; returns how much that is."""
        prompts = [read_prompt(self.lm, fact) for fact in facts]
        steps = sum(self.steps(kind, len(x.ids), x.subject_range) for x in prompts for kind in kinds)
        self.bar.total = (self.bar.total or 0) + steps
        return steps

    def expect_seconds(self, seconds: float) -> None:
        """Count so much time to the work that lies ahead, at the speed so far."""
        speed = self.bar.n / (time.monotonic() - self.begun)
        self.bar.total += seconds * speed
        self.bar.refresh()

    def steps(self, label: str, n_tokens: int, subject_range: tuple[int, int]) -> int:
        """How many tokens go through a block for one sample of the noise: what a trace's time is proportional to."""
        kind, severed = KINDS[label]
        begin, end = subject_range
        tokens = [end - 1] if severed else range(begin, n_tokens)
        layers = sum(self.lm.n_layers - column.joins for column in columns_of(kind, self.lm.n_layers, self.window))
        return layers * sum(n_tokens - token for token in tokens)

    def trace_shown(self, facts: Sequence[Fact], settings: Mapping[str, object]) -> None:
        """Trace what Figure 1 shows one by one, and draw it fact by fact, the very first kind by kind."""
        self.shown = []
        trace_facts(self.lm, facts, SHOWN, each=self.add_shown, **settings)

    def count(self, trace: Trace) -> None:
        """Move the bar on by the work of a trace."""
        self.bar.update(self.steps(trace.label, len(trace.tokens), trace.subject_range))

    def add_shown(self, trace: Trace) -> None:
        """Take one more trace of what Figure 1 shows."""
        self.bar.set_description(f"tracing {trace.subject}")
        self.count(trace)
        self.shown.append(trace)
        if len(self.shown) % len(SHOWN) == 0 or self.most_shown < len(self.shown) < len(SHOWN):
            self.draw()

    def add(self, trace: Trace) -> None:
        """Take one more trace of the facts behind the averages; `KINDS` come in their order, fact by fact."""
        self.count(trace)
        self.averaged.append(trace)
        if len(self.averaged) % len(KINDS) == 0:
            spent = time.monotonic() - self.begun
            if self.drawing < DRAWING * spent:
                self.draw()

    def draw(self) -> None:
        """Draw what there is."""
        begin = time.monotonic()
        is_first = not self.drawing
        n_facts = len(self.averaged) // len(KINDS)
        traces = Traces(self.averaged) if n_facts > 1 else None
        average = traces and traces.average()
        note = f"{self.lm.name}, {f'{n_facts} known facts' if traces else 'single facts'} so far; *: subject"
        of_kinds = None if average is None else average[average["kind"].isin(SHOWN)]
        if len(self.shown) < len(SHOWN):
            figure = heatmaps(self.shown, shared_limits(*self.shown))
            figure.suptitle(note, fontsize=FONT_SIZE)
        else:
            singles = [self.shown[i : i + len(SHOWN)] for i in range(0, len(self.shown), len(SHOWN))]
            figure = facts_and_average(singles, of_kinds, note)
        self.save("figure_1", figure)
        self.most_shown = max(self.most_shown, len(self.shown))
        if traces:
            gaps = pd.concat([traces.gap("state", "severed-attn"), traces.gap("state", "severed-mlp")])
            self.save("figure_2", average_heatmaps(of_kinds, note))
            self.save("figure_3", severed_and_gaps(average, gaps, note))
            self.save("figure_7", average_lines(of_kinds, note))
        if is_first:
            self.bar.write(f"The first picture is {self.folder / 'figure_1.png'}; it and others grow with the facts.")
        self.drawing += time.monotonic() - begin

    def save(self, name: str, figure: Figure) -> None:
        """Put one picture in its place, whole."""
        write_atomically(self.folder / f"{name}.png", lambda path: figure.savefig(path, format="png", dpi=150))
        plt.close(figure)
