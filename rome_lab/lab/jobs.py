"""Jobs: work on a model beside the thread that called for it, which stays free to stop them; one job a model at a time."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import threading
from collections.abc import Callable
from typing import ClassVar
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from rome_lab.models import LanguageModel, alone_with

logger = logging.getLogger(__name__)


FUNCTION = re.compile(r"^([a-z]+(_[a-z]+)*|SubjectSwap): ")


def sentence(error: Exception) -> str:
    """What went wrong, in one line, without the name of the function of rome_lab that says so."""
    text = " ".join(str(error).split())
    if not (isinstance(error, ValueError | OSError | MemoryError | RuntimeError) and text):
        return f"{type(error).__name__}: {text}"
    plain = FUNCTION.sub("", text)
    return plain[:1].upper() + plain[1:] if plain.split()[0].isalpha() else plain  # a model's name stays as it is


class Stopped(Exception):
    """The job was asked to stop."""


class Job(threading.Thread):
    """A thread that works on a model. After `stop`, the next block of the model that it would run ends it instead.

    Meanwhile no cell runs the model's blocks, traces it, or changes its weights: each of that is a RuntimeError there.

    Args:
        work: what to do; returns what to say of it.
        ended: called in the thread with what `work` returned or the error that ended it, and the warnings logged
            meanwhile.

    Raises:
        RuntimeError: another job runs on the model.
    """

    # Begun on each model; by reference only, since a job holds its model, which would then never be freed.
    latest: ClassVar[WeakKeyDictionary[LanguageModel, ref[Job]]] = WeakKeyDictionary()

    def __init__(
        self, lm: LanguageModel, work: Callable[[], str], ended: Callable[[str | Exception, list[str]], None]
    ) -> None:
        super().__init__(daemon=True)
        check_idle(lm)
        self.lm, self.work, self.ended = lm, work, ended
        self.stopping, self.done = threading.Event(), threading.Event()
        self.latest[lm] = ref(self)
        self.start()

    @classmethod
    def of(cls, lm: LanguageModel) -> Job | None:
        """The job that was last begun on the model, as long as anything holds it; one that runs is held."""
        job = cls.latest.get(lm)
        return job and job()

    def run(self) -> None:
        notes, library = WarningNotes(), logging.getLogger("rome_lab")
        hooks = [block.register_forward_pre_hook(self.check) for block in self.lm.blocks]
        library.addHandler(notes)
        try:
            with alone_with(self.lm):
                result = self.work()
        except Exception as error:
            logger.debug("a job failed", exc_info=True)
            result = error
        finally:
            library.removeHandler(notes)
            for hook in hooks:
                hook.remove()
        self.done.set()
        self.ended(result, notes.messages)

    def check(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        here = threading.current_thread()
        if here is threading.main_thread():  # a cell; threads of PyTorch's own may run blocks for the job
            raise RuntimeError(
                f"{self.lm.name} is at work in the panel, whose edits and hooks would act on this run, too; wait until "
                "that is done, or press Stop."
            )
        if self.stopping.is_set() and here is self:
            raise Stopped

    check.only_watches = True  # so that it is no hook that an identity of the model would have to name

    def stop(self) -> None:
        self.stopping.set()


class WarningNotes(logging.Handler):
    """Keeps the warnings that the thread which makes it logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.thread_ident, self.messages = threading.get_ident(), []

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.thread_ident:
            self.messages.append(record.getMessage())


def stop_when_interrupted(attempts: int = 50) -> None:
    """Let the kernel's interrupt stop jobs: between cells Jupyter ignores it, and a job runs between cells.

    A handler that is set within a cell is gone at its end, so this waits for that; outside a kernel it does nothing.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return

    def install(left: int) -> None:
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            signal.signal(signal.SIGINT, lambda number, frame: stop_all())
        elif left:
            loop.call_later(0.1, install, left - 1)

    if threading.current_thread() is threading.main_thread():
        loop.call_soon(install, attempts)


def stop_all() -> None:
    """Stop the jobs of all models."""
    for job in [job() for job in Job.latest.values()]:
        if job and not job.done.is_set():
            job.stop()


def check_idle(lm: LanguageModel) -> None:
    """Raise a RuntimeError where a job runs on the model."""
    if (job := Job.of(lm)) and not job.done.is_set():
        raise RuntimeError(f"{lm.name} is busy; wait until that is done, or press Stop.")


def wait_for_job(lm: LanguageModel) -> None:
    """Return once no job runs on the model."""
    if job := Job.of(lm):
        job.join()
