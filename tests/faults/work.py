"""The work that faults are done to: `WORK`, five sorts of it on a small model, each with results to compare bit for bit.

prepare(scratch, name)           the model that all work is done on, as something that `load_model` takes
WORK[kind](lm, model, folder)    does the work, all its caches in `folder`; returns its results as JSON
with one_thread():               as the processes of tasks have it, for work that is done in this process
Task(kind, model, ...)           the same in a process of its own, which can be killed
at_once(tasks)                   several tasks, whose work begins at one moment
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path
from unittest import mock

import nbformat
import numpy as np
import torch
import transformers
from nbformat.v4 import new_code_cell, new_notebook

from rome_lab import LanguageModel, SampledText, covariances, evaluate, known_facts, load_model, trace_facts
from rome_lab.base.files import write_atomically
from rome_lab.base.store import Json, Store
from rome_lab.lab.batch import run_notebook
from rome_lab.studies.many_edits import judge_chains
from rome_lab.tracing.trace import KINDS
from tests.bench import QUICK, UNRELATED, case, small
from tests.tiny import known, talkative_model

ROOT = Path(__file__).parents[2]
LOADING_S = 600  # how long processes may take until all have loaded the model
WORKING_S = 900  # how long one may work; it is then ended, without a word
LAYERS, TOKENS = (1, 2), 6_000  # of the covariance
METHODS = ("none", "rome", "ft")
IN_CHAINS = ("rome", "joint", "ft")
CELLS = (
    'model: str = ""  # folder of the model\nfolder: str = ""  # where results are kept',
    "import contextlib, os, pathlib",
    'with contextlib.suppress(OSError):\n    pathlib.Path(folder, "kernel").write_text(str(os.getpid()))',
    "import torch\ntorch.set_num_threads(1)\nfrom faults import work\nlm = work.load(model)",
    "from rome_lab.batch import record_values\nrecord_values(result=work.trace(lm, model, pathlib.Path(folder)))",
)


def prepare(scratch: Path, name: str = "tiny") -> str:
    """A folder with a tiny model that says something, or the name as it is."""
    if name != "tiny":
        return name
    talkative_model().save_pretrained(scratch / "model")
    return str(scratch / "model")


def quieten() -> None:
    """Neither bars nor warnings; errors are told in any case."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("rome_lab").setLevel(logging.ERROR)


def load(model: str) -> LanguageModel:
    return load_model(model, device="cpu")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the context PyTorch has one thread: with another number of them a product may be summed in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(array: np.ndarray) -> str:
    """What two arrays have in common exactly when they are the same to the last bit."""
    return hashlib.sha256(f"{array.dtype.str} {array.shape}".encode() + array.tobytes()).hexdigest()


def trace(lm: LanguageModel, model: str, folder: Path) -> Json:
    """The search for known facts, and all kinds of traces of some."""
    found = known_facts(lm, known(lm), n=None, progress=False, store=folder)
    traces = trace_facts(lm, known(lm), tuple(KINDS), store=folder, samples=4, progress=False)
    return [str(found.report), [[x.prompt, x.label, x.p_clean, x.p_corrupted, bits(x.p_restored)] for x in traces]]


def covariance(lm: LanguageModel, model: str, folder: Path) -> Json:
    """C of two layers, on text sampled from the model; sums are saved after every few passages."""
    module = import_module("rome_lab.editing.second_moment")  # the package's name of it is the function
    with mock.patch.multiple(module, SAVE_EVERY_S=0, BATCH_TOKENS=512):
        found = covariances(lm, LAYERS, SampledText(length=32), TOKENS, Store(folder), progress=False)
    return [[layer, x.tokens, bits(x.C.numpy())] for layer, x in found.items()]


def evaluation(lm: LanguageModel, model: str, folder: Path) -> Json:
    """Three methods judged on a few cases."""
    cases = [case(i, fact.subject) for i, fact in enumerate(known(lm))]
    methods = [small(name) for name in METHODS]
    with mock.patch.dict(os.environ, ROME_LAB_CACHE=str(folder / "cache")):
        table = evaluate(lm, cases, methods, store=folder, progress=False, settings=QUICK, unrelated=UNRELATED)
    return table.map(repr).to_dict("split")["data"]


def chain(lm: LanguageModel, model: str, folder: Path) -> Json:
    """Edits of one model after another, by three methods, judged after one, two and three."""
    cases = [case(i, fact.subject) for i, fact in enumerate(known(lm))]
    methods, quick = [small(name) for name in IN_CHAINS], {"settings": QUICK, "unrelated": UNRELATED, "progress": False}
    with mock.patch.dict(os.environ, ROME_LAB_CACHE=str(folder / "cache")):
        table = judge_chains(lm, cases, methods, (1, 2, 3), least=3, store=folder, **quick)
    return table.map(repr).to_dict("split")["data"]


def batch(lm: LanguageModel, model: str, folder: Path) -> Json:
    """A notebook that traces, run headlessly; its executed copy says what came out."""
    notebook = folder / "notebook.ipynb"
    if not notebook.exists():
        cells = [new_code_cell(source) for source in CELLS]
        cells[0].metadata["tags"] = ["parameters"]
        made = new_notebook(cells=cells)
        write_atomically(notebook, lambda temporary: nbformat.write(made, temporary))
    executed = run_notebook(notebook, {"model": model, "folder": str(folder)}, folder / "runs", progress=False)
    return nbformat.read(executed, as_version=4).metadata.rome_lab.recorded


WORK: Mapping[str, Callable[[LanguageModel, str, Path], Json]] = {
    "trace": trace,
    "covariance": covariance,
    "evaluation": evaluation,
    "chain": chain,
    "batch": batch,
}


@dataclass(frozen=True)
class Task:
    """One run of a sort of work in a process of its own.

    Attributes:
        result: file that its results, or the error that ended it, are written to.
        ahead: seconds by which its clock is ahead of the machine's,
        turn_s: until the work has taken so many; then the clock is as far behind.
        user: id of the user that it is done as; the one who asks by default.
    """

    kind: str
    model: str
    folder: Path
    result: Path
    ahead: float = 0.0
    turn_s: float = float("inf")
    user: int | None = None

    def start(self) -> BaseProcess:
        """The process, once it has begun to work."""
        return begin([self])[0]

    def run(self) -> tuple[Json, str]:
        """What the work gave, and the error that ended it, of which one is empty."""
        return at_once([self])[0]

    def outcome(self) -> tuple[Json, str]:
        if not self.result.exists():
            return None, "the process ended without a word"
        return tuple(json.loads(self.result.read_text()))


def begin(tasks: Sequence[Task]) -> list[BaseProcess]:
    """The processes of the tasks, once all of them begin to work, at one moment."""
    context = multiprocessing.get_context("forkserver")  # imports once; each process begins in milliseconds
    context.set_forkserver_preload(["tests.faults.work"])
    ready = context.Barrier(len(tasks) + 1)
    processes = [context.Process(target=do, args=(task, ready)) for task in tasks]
    for process in processes:
        process.start()
    with contextlib.suppress(threading.BrokenBarrierError):  # one could not load the model: none has an outcome
        ready.wait(LOADING_S)
    return processes


def at_once(tasks: Sequence[Task]) -> list[tuple[Json, str]]:
    """The outcomes of tasks that are begun at one moment."""
    for process in begin(tasks):
        wait_for(process)
    return [task.outcome() for task in tasks]


def wait_for(process: BaseProcess) -> None:
    """Wait until a process has ended, which it is made to where it hangs."""
    process.join(WORKING_S)
    process.kill()
    process.join()


def do(task: Task, ready: Barrier) -> None:
    """Called in the process."""
    quieten()
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        lm = load(task.model)
    except BaseException:
        ready.abort()
        raise
    if task.user is not None:
        codecs.lookup("utf-8-sig")  # what this user may perhaps not read of the interpreter
        os.setgid(task.user)
        os.setuid(task.user)
    ready.wait()
    set_clock(task)
    try:
        answer = [WORK[task.kind](lm, task.model, task.folder), ""]
    except Exception as error:
        answer = [None, said(error)]
    task.result.write_text(json.dumps(answer))


def set_clock(task: Task) -> None:
    """Move this process's clock, now and, in the middle of the work, once more."""
    real, turn = time.time, time.monotonic() + task.turn_s
    time.time = lambda: real() + (task.ahead if time.monotonic() < turn else -task.ahead)


def said(error: Exception) -> str:
    """The error as a user reads it, and, where it is not of the kinds that carry a sentence, where it comes from."""
    text = str(error).splitlines()[0] if str(error) else ""
    known = isinstance(error, ValueError | OSError | RuntimeError) and text.endswith((".", "..."))
    return text if known else "NO SENTENCE: " + "".join(traceback.format_exception(error))


def results(folder: Path) -> Iterator[Path]:
    """The files of the caches in a folder."""
    return (path for path in sorted(folder.rglob("*.safetensors")) if not path.name.startswith("."))
