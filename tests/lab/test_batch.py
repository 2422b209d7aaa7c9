"""Notebooks in batch: parameters are read exactly or refused, and an executed copy is whole, or is not there."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from rome_lab.lab import batch, command
from rome_lab.lab.batch import (
    NotebookError,
    main,
    prepare,
    read_parameters_file,
    run_notebook,
    take_parameters,
)
from rome_lab.lab.parameters import Parameter, fit_parameters, read_parameters
from rome_lab.lab.recording import record_values

ROOT = Path(__file__).parents[2]
PARAMETERS = """
# What to trace
model: str = "smollm2-135m"  # name, or folder, of a model
n_facts: int = 120  # facts to trace
rate: float = 0.5
layers: list[int] = [1, 2]  # counted from 0
kinds: tuple[str, ...] = (
    "state",
    "mlp",  # and so on
)
device: str | None = None  # None chooses
fast: bool = False
seed: int = 0  # of the noise
"""


def write_notebook(path: Path, *sources: str, parameters: str | None = PARAMETERS) -> Path:
    cells = [new_markdown_cell("# A question"), *map(new_code_cell, sources)]
    if parameters is not None:
        cells.insert(1, new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    nbformat.write(new_notebook(cells=cells), path)
    return path


def parameters_of(source: str) -> dict[str, Parameter]:
    cell = new_code_cell(source, metadata={"tags": ["parameters"]})
    return read_parameters(new_notebook(cells=[cell]), "x.ipynb")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory from which kernels, too, can import rome_lab."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "runs").iterdir()} if (folder / "runs").exists() else set()


# Parameters


def test_the_parameters_cell_gives_names_types_defaults_and_meanings():
    found = parameters_of(PARAMETERS)
    assert list(found) == ["model", "n_facts", "rate", "layers", "kinds", "device", "fast", "seed"]
    assert found["n_facts"] == Parameter("n_facts", "int", 120, "facts to trace")
    assert found["kinds"] == Parameter("kinds", "tuple[str, ...]", ("state", "mlp"), "and so on")
    assert found["device"] == Parameter("device", "str | None", None, "None chooses")
    assert str(found["rate"]) == "rate: float = 0.5"
    assert parameters_of("\n".join(map(str, found.values()))) == found


@pytest.mark.parametrize(
    "line",
    [
        "n = 3",
        "n: int",
        "n: int = 1 + 2",
        "n: int = len('abc')",
        "n: int = m",
        "import os",
        "print(3)",
        "n: int = '3'",
        "n: int = 3.0",
        "n: int = True",
        "n: bool = 1",
        "n: list[int] = (1, 2)",
        "n: str = None",
        "n: str | None = 'None'",
        "n: dict = {}",
        "n: list = [1]",
        "n: numpy.ndarray = 3",
        "n: float = 1e999",
        "n.m: int = 3",
    ],
)
def test_a_line_that_is_not_a_typed_literal_is_refused_by_its_number(line):
    with pytest.raises(
        ValueError, match=r"^x\.ipynb: line 2 of the parameters cell, `.*`, is not `name: type = literal"
    ):
        parameters_of(f"m: int = 3  # fine\n{line}")


@pytest.mark.parametrize("source", ["n: int = (", "%time x", "!ls", "n: int = 'x", "n:\n  int = 3", "\0"])
def test_a_cell_that_is_not_python_is_refused(source):
    with pytest.raises(ValueError, match=r"^x\.ipynb: .*parameters cell"):
        parameters_of(source)


def test_an_unknown_parameter_is_refused_with_the_closest_and_all_known_names():
    known = parameters_of(PARAMETERS)
    with pytest.raises(ValueError) as caught:
        fit_parameters(known, {"n_fact": "3"}, "x.ipynb")
    assert "x.ipynb has no parameter 'n_fact' (did you mean 'n_facts'?)" in str(caught.value)
    assert all(name in str(caught.value) for name in known)
    assert "facts to trace" in str(caught.value)
    with pytest.raises(ValueError, match="its parameters are: none"):
        fit_parameters({}, {"n": 3}, "x.ipynb")


FINITE = st.floats(allow_nan=False, allow_infinity=False)
VALUES = {
    "int": st.integers(),
    "float": FINITE,
    "str": st.text(),
    "bool": st.booleans(),
    "int | None": st.none() | st.integers(),
    "int | float": st.integers() | FINITE,
    "str | float | None": st.none() | FINITE,
    "list[int]": st.lists(st.integers(), max_size=3),
    "list[float | None]": st.lists(FINITE | st.none(), max_size=3),
    "list[list[bool]]": st.lists(st.lists(st.booleans(), max_size=2), max_size=2),
    "tuple[str, ...]": st.lists(st.text(), max_size=3).map(tuple),
    "tuple[int, str]": st.tuples(st.integers(), st.text()),
}
TYPED = st.one_of(st.tuples(st.just(kind), values) for kind, values in VALUES.items())
DEFAULT = {"bool": True, "str": "a", "list[list[bool]]": [], "tuple[str, ...]": (), "tuple[int, str]": (1, "a")}


def parameter(kind: str) -> Parameter:
    return Parameter("x", kind, [] if kind.startswith("list") else DEFAULT.get(kind, 1), "what it is")


def exactly(value: object) -> str:
    """Tells 1, 1.0 and True apart, and lists from tuples."""
    return repr(value)


@settings(max_examples=200, deadline=None)
@given(TYPED)
def test_a_value_given_as_itself_or_as_text_arrives_exactly(typed):
    kind, value = typed
    assert exactly(parameter(kind).read(value)) == exactly(value)
    text = value if isinstance(value, str) else json.dumps(value).replace("\x7f", r"\u007f")  # YAML wants it escaped
    assert exactly(parameter(kind).read(text)) == exactly(value)


def is_a(value: object, kind: str) -> bool:
    if kind.startswith("list["):
        return type(value) is list and all(is_a(item, kind[5:-1]) for item in value)
    if kind == "tuple[str, ...]":
        return type(value) is tuple and all(is_a(item, "str") for item in value)
    if kind == "tuple[int, str]":
        return type(value) is tuple and len(value) == 2 and is_a(value[0], "int") and is_a(value[1], "str")
    return type(value).__name__ in kind.replace("None", "NoneType").split(" | ")


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.characters()) | st.text("[]{}(),:'\"-+.0123456789eE&*!| Nontruefalsidb_\\\n"),
    st.sampled_from(list(VALUES)),
)
def test_any_text_gives_a_value_of_the_type_or_one_sentence(text, kind):
    try:
        value = parameter(kind).read(text)
    except ValueError as error:
        assert str(error).startswith(f"The parameter x takes {kind}, and ")
        assert str(error).endswith(".") and "\n" not in str(error) and len(str(error)) < 250
        assert kind != "str" or not text.isprintable()
    else:
        assert is_a(value, kind)
        assert exactly(ast.literal_eval(repr(value))) == exactly(value)
        assert kind != "str" or value.encode("utf-16") == text.encode("utf-16", "surrogatepass")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *[("int", value) for value in ("", "3.0", "1e3", "x", "0x10", 3.0, True, None, [3], "9" * 5000)],
        *[("float", value) for value in ("nan", "inf", "-Infinity", "1e999", float("nan"), True, 10**400, "1,5")],
        *[("bool", value) for value in ("yes", "1", "", 1, 0, None)],
        *[("str", value) for value in (3, None, True, ["a"], b"a", "\ud800")],
        *[
            ("list[int]", value)
            for value in ("", "1, 2", "[1", "[1, x]", "[[1]]", "{1: 2}", "&a [*a]", "[" * 9999, [1.0], {1})
        ],
        *[("tuple[int, str]", value) for value in ("[1]", "[1, a, b]", "[a, 1]", (1,), (1, 2))],
        *[("str | None", 3), ("int | None", "none"), ("list[int] | None", "[x]")],
    ],
)
def test_what_does_not_fit_is_refused(kind, value):
    with pytest.raises(ValueError, match=r"^The parameter x takes .* does not fit; give a value such as .*\.$"):
        parameter(kind).read(value)


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        ("str", "3", "3"),
        ("str", "None", "None"),
        ("str | None", "null", None),
        ("str | None", "nullable", "nullable"),
        ("str | int | None", "3", 3),
        ("float", "3", 3.0),
        ("list[str]", "[yes, 012, 1e-3, 2020-01-01, null]", ["yes", "012", "1e-3", "2020-01-01", "null"]),
        ("list[float]", "[1e-3, 2]", [1e-3, 2.0]),
        ("list[int] | str", "[1, 2]", [1, 2]),
        ("list[int] | str", "[1", "[1"),
    ],
)
def test_the_declared_type_decides_how_text_is_read(kind, text, value):
    assert exactly(parameter(kind).read(text)) == exactly(value)


@pytest.mark.parametrize(
    "attack",
    [
        "__import__('pathlib').Path('pwned').touch()",
        "!!python/object/apply:pathlib.Path.touch [pwned]",
        "{}\nopen('pwned', 'w')",
    ],
)
def test_no_value_is_ever_evaluated(folder, attack):
    for kind in VALUES:
        with contextlib.suppress(ValueError):
            parameter(kind).read(attack)
    path = write_notebook(folder / "x.ipynb", parameters="s: str = ''  # any text")
    [injected] = ast.parse(prepare(path, {"s": attack})[0].cells[2].source).body
    assert ast.literal_eval(injected.value) == attack
    assert not Path("pwned").exists()


def test_a_yaml_file_and_the_command_line_are_read_alike(folder):
    path = write_notebook(folder / "x.ipynb")
    text = {"model": "yes", "n_facts": "7", "rate": "1e-3", "layers": "[3]", "kinds": "[attn]", "device": "null"}
    Path("p.yml").write_text("".join(f"{name}: {value}\n" for name, value in text.items()))
    arguments = [word for name, value in text.items() for word in ("-p", name, value)]
    _, from_file = prepare(path, read_parameters_file(Path("p.yml")))
    _, from_line = prepare(path, take_parameters(arguments)[0])
    given = {"model": "yes", "n_facts": 7, "rate": 1e-3, "layers": [3], "kinds": ("attn",), "device": None}
    assert from_file["parameters"] == from_line["parameters"] == given | {"fast": False, "seed": 0}
    assert from_file["seed"] == 0


def test_values_that_begin_with_a_dash_are_values():
    arguments = ["-p", "rate", "-1e-3", "x.ipynb", "-p", "model", "-p", "--quiet", "-p", "rate", "--", "-p", "n"]
    assert take_parameters(arguments) == ({"rate": "--", "model": "-p"}, ["x.ipynb", "--quiet", "-p", "n"])


@pytest.mark.parametrize("content", ["- a\n- b\n", "just text", "a: [", "1: {", "\x00"])
def test_a_parameters_file_that_is_no_yaml_mapping_is_refused(folder, content):
    Path("p.yml").write_text(content)
    with pytest.raises(ValueError, match=r"^p\.yml is not .*\.$"):
        read_parameters_file(Path("p.yml"))


# Bad input on the command line: status 2, one line, nothing run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("x.ipynb -p n_fact 3", "did you mean 'n_facts'"),
        ("x.ipynb -p n_facts many", "takes int"),
        ("x.ipynb --params missing.yml", "There is no file missing.yml"),
        ("missing.ipynb", "There is no notebook missing.ipynb"),
        ("p.yml", "p.yml is not a notebook"),
        ("x.ipynb other/x.ipynb", "one name"),
        ("x.ipynb bare.ipynb -p n_facts 3", "bare.ipynb has no parameter 'n_facts'"),
        ("x.ipynb --runs .", "would replace x.ipynb itself"),
        ("x.ipynb --runs p.yml", "Cannot write to the folder p.yml"),
    ],
)
def test_bad_input_ends_with_status_2_and_one_line_before_anything_runs(folder, capsys, arguments, message):
    Path("other").mkdir()
    for name in ("x.ipynb", "other/x.ipynb"):
        write_notebook(folder / name, "open('ran', 'w')")
    write_notebook(folder / "bare.ipynb", parameters=None)
    Path("p.yml").write_text("n_facts: 3")
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("rome_lab.batch: ") and error.count("\n") == 1
    assert not Path("ran").exists()
    assert not files(folder)


def test_list_shows_the_parameters_and_runs_nothing(folder, capsys):
    write_notebook(folder / "x.ipynb", "open('ran', 'w')")
    assert main(["x.ipynb", "--list"]) == 0
    assert "n_facts: int = 120  # facts to trace\n" in capsys.readouterr().out
    assert not Path("ran").exists()


# Running


FOREIGN = {"argv": ["false", "{connection_file}"], "display_name": "of another environment", "language": "python"}


def test_a_run_uses_this_interpreter_here_with_the_values_given_and_records_what_produced_it(
    folder, monkeypatch, capfd
):
    spec = folder / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps(FOREIGN))
    monkeypatch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
    name = "{é} \"'\\n\N{SNOWMAN}\u2028"
    Path("notebooks").mkdir()
    Path("runs").mkdir()
    Path("runs/x.failed.ipynb").write_text("of an earlier run")
    write_notebook(
        folder / "notebooks" / "x.ipynb",
        "import json, os, sys\nseen = [sys.executable, os.getcwd(), model, n_facts, rate, layers, device]",
        "open('seen.json', 'w').write(json.dumps(seen))",
        "from rome_lab.batch import record_values\nrecord_values(model=model, fingerprint='00')",
        "from tqdm.auto import tqdm\nfor _ in tqdm(range(2), desc='inner'): pass",
        "record_values(fingerprint='beef')",
    )
    given = [
        "-p",
        "model",
        name,
        "-p",
        "n_facts",
        "7",
        "-p",
        "rate",
        "-1e-3",
        "-p",
        "layers",
        "[5, 6]",
        "-p",
        "device",
        "cpu",
    ]
    assert main(["notebooks/x.ipynb", *given]) == 0
    output = capfd.readouterr()
    assert output.out == "runs/x.ipynb\n"
    assert "inner: 100%" in output.err
    assert json.loads(Path("seen.json").read_text()) == [sys.executable, str(folder), name, 7, -1e-3, [5, 6], "cpu"]
    assert files(folder) == {"x.ipynb"}
    notebook = nbformat.read(Path("runs/x.ipynb"), as_version=4)
    nbformat.validate(notebook)
    about = notebook.metadata.rome_lab
    assert about.recorded == {"model": name, "fingerprint": "beef"}
    values = {"model": name, "n_facts": 7, "rate": -1e-3, "layers": [5, 6], "device": "cpu"}
    assert about.parameters == values | {"kinds": ["state", "mlp"], "fast": False, "seed": 0}
    assert about.seed == 0 and 0 < about.wall_seconds < 600
    assert about.notebook == "notebooks/x.ipynb"
    assert about.versions.python == sys.version.split()[0]
    assert about.versions.torch and about.versions.transformers


def test_record_refuses_what_the_executed_copy_could_not_hold(capsys):
    with pytest.raises(TypeError, match=r"record_values: the values\['lm'\]"):
        record_values(lm=object())
    record_values(seed=3)
    assert "recorded: seed=3" in capsys.readouterr().out


def test_a_failing_cell_is_shown_and_only_the_failed_copy_kept(folder, capsys):
    path = write_notebook(
        folder / "x.ipynb", "x = 1", "def f():\n    raise OSError('no luck')\nf()", "open('after', 'w')"
    )
    Path("runs").mkdir()
    Path("runs/x.ipynb").write_text("of an earlier run")
    assert main([str(path), "-p", "n_facts", "3", "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "cell 4 failed: OSError: no luck" in error  # the title is 1, the parameters 2
    assert "\n    raise OSError('no luck')\nf()\n" in error
    assert "----> 3 f()" in error
    assert "\x1b" not in error
    assert not Path("after").exists()
    assert files(folder) == {"x.ipynb", "x.failed.ipynb"}
    assert Path("runs/x.ipynb").read_text() == "of an earlier run"
    failed = nbformat.read(Path("runs/x.failed.ipynb"), as_version=4)
    assert failed.metadata.rome_lab.parameters.n_facts == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import os; os._exit(3)", "cell 3 failed: the kernel died"),
        ("import sys; sys.exit(0)", "cell 3 failed: it ended the notebook with cells left to run"),
    ],
)
def test_a_notebook_that_ends_early_has_failed(folder, source, message):
    path = write_notebook(folder / "x.ipynb", source, "open('after', 'w')")
    with pytest.raises(NotebookError, match=message):
        run_notebook(path, progress=False)
    assert files(folder) == {"x.failed.ipynb"}


def test_a_kernel_that_does_not_start_is_said_to(folder, monkeypatch):
    Path("ipykernel_launcher.py").write_text("raise SystemExit('broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    with pytest.raises(NotebookError, match="the kernel did not start"):
        run_notebook(write_notebook(folder / "x.ipynb", "1"), progress=False)
    assert files(folder) == {"x.failed.ipynb"}


def test_an_executed_copy_can_be_run_again_with_other_values(folder):
    path = write_notebook(folder / "x.ipynb", "open('seen', 'a').write(f'{n_facts} {seed};')")
    first = run_notebook(path, {"n_facts": 7}, runs="one", progress=False)
    run_notebook(first, {"seed": 8}, runs="two", progress=False)
    assert Path("seen").read_text() == "7 0;120 8;"


# `python -m rome_lab.batch x.ipynb`, except that a shell may start background jobs with Ctrl-C ignored.
LAUNCH = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["batch", "x.ipynb", "--quiet"]
runpy.run_module("rome_lab.batch", run_name="__main__")
"""


@pytest.mark.skipif(os.name != "posix", reason="signals are sent")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stopped_run_leaves_the_earlier_copy_and_no_kernel(folder, number, status):
    write_notebook(folder / "x.ipynb", "import os, time\nopen('pid', 'w').write(str(os.getpid()))", "time.sleep(300)")
    Path("runs").mkdir()
    Path("runs/x.ipynb").write_text("of an earlier run")
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCH], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: Path("pid").exists() and Path("pid").read_text(), launcher)
    launcher.send_signal(number)
    _, error = launcher.communicate(timeout=60)
    assert launcher.returncode == status
    assert Path("runs/x.ipynb").read_text() == "of an earlier run"
    if number == signal.SIGINT:
        assert error.strip() == "x.ipynb: interrupted; all cells so far are in runs/x.failed.ipynb."
        assert files(folder) == {"x.ipynb", "x.failed.ipynb"}
    else:
        assert files(folder) == {"x.ipynb"}
    wait_until(lambda: not is_running(int(Path("pid").read_text())))


def wait_until(condition, launcher: subprocess.Popen | None = None) -> None:
    for _ in range(1200):
        if condition():
            return
        assert launcher is None or launcher.poll() is None, launcher.communicate()[1]
        time.sleep(0.05)
    raise AssertionError("nothing happened for a minute")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_evaluate_refuses_what_its_second_notebook_does_not_know_before_the_first_runs(monkeypatch, capsys) -> None:
    ran = []
    monkeypatch.setattr(batch, "run_notebook", lambda path, values, *rest: ran.append((path.stem, values)))
    for edits in ("1,x", "0,3", "", " "):
        assert command.run_command(["evaluate", "--edits", edits]) == 2
        assert "--edits is" in capsys.readouterr().err
    assert command.run_command(["evaluate", "-p", "n_casse", "3"]) == 2
    assert command.run_command(["evaluate", "-p", "sizes", "1,x"]) == 2
    assert not ran and "many_edits" in capsys.readouterr().err
    assert command.run_command(["evaluate", "--n-cases", "3"]) == 0
    assert ran == [("evaluation", {"n_cases": 3}), ("many_edits", {"sizes": [1, 3, 10], "least": 10})]
    assert command.run_command(["evaluate", "--edits", "none", "-p", "methods", "[rome]"]) == 0 and len(ran) == 3


def test_what_a_command_is_given_counts_more_than_a_file_and_that_more_than_its_defaults(folder, monkeypatch, capsys):
    ran = {}
    monkeypatch.setattr(batch, "run_notebook", lambda path, values, *rest: ran.update({path.stem: values}))
    monkeypatch.setattr(command, "draw_figures", lambda notebooks, values, *rest: ran.update(figures=values) or folder)
    Path("mine.yml").write_text("n_facts: 77\nmodel: gpt2-xl\nwindow: 3\nexamples: [Louvre]")
    line = "figures --params mine.yml --model tiny -p window 5"
    assert command.run_command(line.split()) == 0
    assert ran["figures"] == {"n_facts": "77", "model": "tiny", "window": "5", "examples": ["Louvre"]}
    Path("mine.yml").write_text("n_cases: 7\nsizes: [1, 2]\nseed: 3")
    assert command.run_command(["evaluate", "--params", "mine.yml", "--seed", "4"]) == 0
    assert ran["evaluation"] == {"n_cases": "7", "seed": 4}
    assert ran["many_edits"] == {"sizes": ["1", "2"], "seed": 4, "least": 10}
    assert command.run_command(["figures"]) == 0 and ran["figures"] == {"n_facts": 12}
    assert command.run_command(["figures", "--list"]) == 0 and "examples: list[str]" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["trace", "edit", "report", "train"])
def test_where_a_command_cannot_write_is_said_before_the_work(folder, monkeypatch, capsys, name) -> None:
    monkeypatch.setattr(command, "load_model", lambda *rest, **options: pytest.fail("work was begun"))
    words = {"train": [], "edit": ["x {}", "y", "Rome"]}.get(name, ["x {}", "y"])
    (folder / ("taken.csv" if name == "trace" else "taken")).mkdir()
    taken = "taken.pdf" if name == "trace" else "taken"  # it writes three files, each with an end of its own
    for out, message in {"": "name of a file", taken: "is a folder", "/proc/x/y.z": "Cannot write"}.items():
        assert command.run_command([name, *words, "--out", out]) == 2
        assert message in capsys.readouterr().err
    assert len(list(folder.iterdir())) == 1
