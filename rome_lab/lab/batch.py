"""Run notebooks headlessly with checked parameters: `python -m rome_lab.batch NOTEBOOK ... -p NAME VALUE`.

From Python: `run_notebook`. In a notebook: `record_values(model=lm.name, n_facts=120)` hands values over to the
executed copy. The executed copy is runs/<name>.ipynb, written only when every cell has succeeded; `metadata.rome_lab`
in it says what produced it. Of a run that failed or was interrupted, runs/<name>.failed.ipynb is kept for reading.
`one_kernel` runs several notebooks in one process. Where no folder of figures is given, those made with other parameters
are not overwritten: see `rome_lab.lab.folders`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import nbformat
import papermill
import yaml
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from nbclient.util import run_sync
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError, strip_color
from papermill.execute import ERROR_MARKER_TAG

from rome_lab.base import Json, check_writable, package_versions, write_atomically
from rome_lab.lab.folders import IN_BATCH, folder_of_figures, note_parameters
from rome_lab.lab.parameters import fit_parameters, read_parameters
from rome_lab.lab.recording import MIME

RUN_PACKAGES = ("rome_lab", "torch", "transformers", "numpy")
INJECTED = "injected-parameters"  # papermill's own tag
# Bars that are widgets would be seen neither in the terminal nor, without a kernel, in the executed copy.
PLAIN_BARS = "import tqdm.auto, tqdm.std; tqdm.auto.tqdm, tqdm.auto.trange = tqdm.std.tqdm, tqdm.std.trange; del tqdm"


# What a notebook leaves behind in its kernel, beside what it holds in memory. Without its `__spec__` the main module could
# start no processes.
FRESH = """
import matplotlib.pyplot as plt, pandas as pd

def begin_anew(shell, main):
    spec = main.__spec__
    shell.reset(new_session=True)
    main.__spec__ = spec

plt.close("all")
pd.reset_option("^display")
begin_anew(get_ipython(), __import__("__main__"))
__import__("gc").collect()
"""


class NotebookError(RuntimeError):
    """A notebook did not run to its end; the message has the failing cell, its source and its error."""


class ThisInterpreter(AsyncKernelManager):
    """Starts kernels with the running interpreter, whatever kernels are installed and by whatever name."""

    @property
    def kernel_spec(self) -> KernelSpec:
        options = ["--log-level=CRITICAL", f"--IPKernelApp.exec_lines={PLAIN_BARS}"]  # the log is about the connection
        command = [sys.executable, "-m", "ipykernel_launcher", *options, "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python", env={IN_BATCH: "yes"})

    in_use: AsyncKernelClient | None = None

    def client(self, **options: object) -> AsyncKernelClient:
        """One for each notebook; the last one's channels are closed, which is left to who owns the kernel."""
        self.close_client()
        self.in_use = super().client(**options)
        return self.in_use

    def close_client(self) -> None:
        if self.in_use:
            self.in_use.stop_channels()
            self.in_use = None


@contextmanager
def one_kernel() -> Iterator[ThisInterpreter]:
    """Within the context `run_notebook(..., kernel=...)` runs each notebook in the same process, which imports once.

    Before each but the first the variables, figures and pandas' options that the last one left are cleared.
    """
    kernel = ThisInterpreter()
    try:
        yield kernel
    finally:
        kernel.close_client()
        if kernel.has_kernel:
            run_sync(kernel.shutdown_kernel)(now=True)


def run_notebook(
    path: str | Path,
    parameters: Mapping[str, object] | None = None,
    runs: str | Path = "runs",
    progress: bool = True,
    kernel: ThisInterpreter | None = None,
) -> Path:
    """Execute a notebook in the current directory with the running interpreter; returns the executed copy's path.

    Args:
        parameters: values that replace the notebook's own; text is converted to the declared type. Without `figures` among
            them, what other parameters made is not overwritten.
        progress: show a bar over the cells, and what the notebook itself writes to stderr, such as its own bars.
        kernel: of `one_kernel`; one of its own by default.

    Raises:
        FileNotFoundError, ValueError: no such notebook, an unknown parameter, or a value that does not fit.
        OSError: `runs` cannot be written.
        NotebookError: a cell failed, or the kernel died.
    """
    path, runs = Path(path), Path(runs)
    parameters = dict(parameters or {})
    notebook, about = prepare(path, parameters)
    if "figures" in about["parameters"] and "figures" not in parameters:
        defaults = prepare(path, {})[1]["parameters"]
        folder = folder_of_figures(path.stem, about["parameters"], defaults)
        if folder != about["parameters"]["figures"]:
            if progress:
                print(f"{defaults['figures']} holds what {path.stem} drew before or elsewhere; this goes to {folder}.")
            parameters["figures"] = folder
            notebook, about = prepare(path, parameters)
    target, failed = runs / f"{path.stem}.ipynb", runs / f"{path.stem}.failed.ipynb"
    if target.resolve() == path.resolve():
        raise ValueError(f"run_notebook: the executed copy would replace {path} itself; choose another runs folder.")
    check_writable(runs)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        executed = Path(scratch) / "executed.ipynb"
        nbformat.write(notebook, executed)
        try:
            execute(executed, path.stem if progress else None, kernel)
        except (PapermillExecutionError, RuntimeError) as error:
            keep(executed, failed, about, start)
            note_parameters(path.stem, about["parameters"])  # it may have drawn some
            raise NotebookError(f"{failure(executed, path, error)}\n\nAll cells so far are in {failed}.") from error
        except KeyboardInterrupt:
            keep(executed, failed, about, start)
            note_parameters(path.stem, about["parameters"])
            raise KeyboardInterrupt(f"{path}: interrupted; all cells so far are in {failed}.") from None
        keep(executed, target, about, start)
    failed.unlink(missing_ok=True)
    note_parameters(path.stem, about["parameters"])
    return target


def prepare(path: Path, parameters: Mapping[str, object]) -> tuple[NotebookNode, dict[str, Json]]:
    """The notebook with the values injected after its parameters cell, and what its metadata are to say of the run."""
    notebook = read_notebook(path)
    known = read_parameters(notebook, path.name)
    values = fit_parameters(known, parameters, path.name)
    cells = [cell for cell in notebook.cells if INJECTED not in cell.metadata.get("tags", [])]
    if values:
        lines = [f"{name}: {known[name].type} = {value!r}" for name, value in values.items()]
        cell = nbformat.v4.new_code_cell("\n".join(["# Parameters", *lines]), metadata={"tags": [INJECTED]})
        place = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
        cells.insert(place + 1, cell)
    notebook.cells = cells
    used = {name: parameter.default for name, parameter in known.items()} | values
    started = datetime.now(UTC).isoformat(timespec="seconds")
    about = {"notebook": str(path), "parameters": used, "seed": used.get("seed"), "started": started}
    return notebook, about | {"versions": package_versions(RUN_PACKAGES)}


def read_notebook(path: Path) -> NotebookNode:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no notebook {path}; give the path of an .ipynb file.")
    try:
        nbformat.validate(json.loads(path.read_text(encoding="utf-8")))  # reading alone would only log what is wrong
        return nbformat.read(path, as_version=4)
    except OSError as error:
        raise OSError(f"{path} cannot be read ({error.strerror}); check its permissions.") from error
    except Exception as error:  # nbformat raises whatever it stumbles over
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise ValueError(f"{path} is not a notebook ({reason}); give the path of an .ipynb file.") from None


def execute(executed: Path, bar: str | None, shared: ThisInterpreter | None) -> None:
    """Run the notebook in place; papermill saves it after every cell. Under a bar, its own bars and warnings are shown.

    Raises:
        PapermillExecutionError, RuntimeError: not every cell has run and succeeded.
    """
    kernel = {"kernel_name": "python3", "language": "python", "kernel_manager_class": ThisInterpreter, "km": shared}
    if shared and shared.has_kernel:
        NotebookClient(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(FRESH)]), km=shared).execute()
    shown = {"progress_bar": {"desc": bar}, "stderr_file": sys.stderr} if bar else {"progress_bar": False}
    try:
        notebook = papermill.execute_notebook(executed, executed, coalesce_streams=True, **shown, **kernel)
    except DeadKernelError:
        raise RuntimeError("the kernel died, perhaps for want of memory") from None
    if not all(cell.metadata.papermill.start_time for cell in notebook.cells):
        raise RuntimeError("it ended the notebook with cells left to run")  # papermill takes sys.exit() for success


def keep(executed: Path, place: Path, about: Mapping[str, Json], start: float) -> None:
    """Put the executed copy in its place, with its provenance and what its cells gave to `record_values`."""
    notebook = nbformat.read(executed, as_version=4)
    seconds = round(time.monotonic() - start, 2)
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    values = {name: value for output in outputs for name, value in output.get("data", {}).get(MIME, {}).items()}
    notebook.metadata.rome_lab = {**about, "wall_seconds": seconds, "recorded": values}
    notebook.metadata.setdefault("papermill", {}).update(
        input_path=about["notebook"], output_path=str(place), parameters=about["parameters"]
    )
    write_atomically(place, lambda temporary: nbformat.write(notebook, temporary))


def failure(executed: Path, path: Path, error: Exception) -> str:
    """Which cell failed, its source and its error, to be read in a terminal."""
    cells = nbformat.read(executed, as_version=4).cells
    started = [index for index, cell in enumerate(cells) if cell.metadata.get("papermill", {}).get("start_time")]
    if not started:
        return f"{path}: the kernel did not start: {error}"
    last = started[-1]
    added = {INJECTED, ERROR_MARKER_TAG}
    number = 1 + sum(not added & set(cell.metadata.get("tags", [])) for cell in cells[:last])
    summary, details = str(error), ""
    if isinstance(error, PapermillExecutionError):
        summary, details = f"{error.ename}: {error.evalue}", strip_color("\n".join(error.traceback))
    return f"{path}: cell {number} failed: {summary}\n\n{cells[last].source}\n\n{details}".rstrip()


def main(arguments: Sequence[str]) -> int:
    """The command line; returns the exit status: 0, 1 for a notebook that failed, 2 for bad input, 130 for Ctrl-C."""
    given, rest = take_parameters(arguments)
    options = parser().parse_args(rest)
    try:
        if options.list:
            list_parameters(options.notebooks)
        else:
            from_file = read_parameters_file(options.params) if options.params else {}
            run_all([(path, from_file | given) for path in options.notebooks], options.runs, not options.quiet)
    except NotebookError as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"rome_lab.batch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\n{error}" if error.args else "\nInterrupted.", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m rome_lab.batch", description="Run notebooks with parameters.")
    options.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    options.add_argument("-p", nargs=2, metavar=("NAME", "VALUE"), help="a parameter; the last one of a name counts")
    options.add_argument("--params", type=Path, metavar="FILE", help="parameters from a YAML file; -p overrides it")
    options.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the executed copies (%(default)s)")
    options.add_argument("--list", action="store_true", help="show the parameters and run nothing")
    options.add_argument("--quiet", action="store_true", help="show no progress")
    return options


def list_parameters(paths: Sequence[Path]) -> None:
    """Print the parameters of notebooks, with what they are by default."""
    for path in paths:
        print(path, *read_parameters(read_notebook(path), path.name).values(), sep="\n    ")


def run_all(plans: Sequence[tuple[Path, Mapping[str, object]]], runs: Path, progress: bool) -> None:
    """Run notebooks one after the other, each with its parameters."""
    if len({path.stem for path, _ in plans}) < len(plans):
        raise ValueError("two of the notebooks have one name, and so would their executed copies; run them apart.")
    for path, values in plans:
        prepare(path, values)  # what the last notebook refuses is to be known before the first one has run
    for path, values in plans:
        print(run_notebook(path, values, runs, progress))


def shared_out(paths: Sequence[Path], given: Mapping[str, object]) -> list[tuple[Path, dict[str, object]]]:
    """Each notebook with those of the given parameters that it has.

    Raises: ValueError: none of them has one of that name.
    """
    known = {path: read_parameters(read_notebook(path), path.name) for path in paths}
    all_names = {name: parameter for parameters in known.values() for name, parameter in parameters.items()}
    fit_parameters(all_names, given, ", ".join(path.name for path in paths))
    return [(path, {name: value for name, value in given.items() if name in known[path]}) for path in paths]


def take_parameters(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Parameters given by -p, and the other arguments; argparse would take a value like -1e-3 for an option."""
    given, rest = {}, list(arguments)
    while "-p" in rest[:-2]:
        place = rest.index("-p")
        _, name, value = rest[place : place + 3]
        given[name] = value
        del rest[place : place + 3]
    return given, rest


def read_parameters_file(path: Path) -> dict[str, object]:
    """A YAML file of `name: value`; every scalar is left as text, to be read by the declared type."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no file {path}; give a YAML file of `name: value` lines.")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} is not a YAML mapping; give lines of `name: value`.")
    return values
