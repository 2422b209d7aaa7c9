"""What SECURITY.md claims."""

from __future__ import annotations

import ast
import html.parser
import json
import os
import pickle
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib import error, request

import nbformat
import pandas as pd
import psutil
import pytest
import torch
import yaml
from distributed.protocol import serialize
from huggingface_hub import constants
from test_datasets import opener_to, records, site  # noqa: F401 (a fixture)
from test_edit_files import rewrite
from test_editing import make
from test_models import (  # noqa: F401 (run here too, as the tests of two sentences)
    test_pickled_weights_are_refused_unless_opted_in,
    test_remote_code_never_runs_unless_opted_in,
)
from tiny import tiny_model

from rome_lab import Fact, causal_trace, describe_edit, load_edit, load_facts, load_model
from rome_lab.base.store import Record, Store
from rome_lab.editing.texts import WikipediaText
from rome_lab.facts.published_sets import PUBLISHED, published_file
from rome_lab.lab.batch import prepare, read_parameters_file
from rome_lab.lab.looks import Look, Probe
from rome_lab.lab.page import compared_page
from rome_lab.lab.panel import Panel
from rome_lab.lab.trials import EditRequest
from rome_lab.models.workers import Work
from rome_lab.studies.cost.growth import cluster_here

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "rome_lab").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NEVER_IMPORTED = {
    "pickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "multiprocessing",
    "subprocess",
    "code",
    "runpy",
}
NEVER_CALLED = {"eval", "exec", "compile", "__import__", "system", "popen", "read_pickle", "to_pickle", "unsafe_load"}
SAFE_LOADERS = {"yaml.BaseLoader", "yaml.SafeLoader"}


@pytest.fixture(scope="module")
def lm():
    return tiny_model("llama")


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Path]:
    """A file that any evaluated attack would make; asserts at the end that none did."""
    yield tmp_path / "sprung"
    assert not (tmp_path / "sprung").exists(), "what should have stayed data was evaluated"


def attacks(trap: Path) -> list[str]:
    """Texts that make the file where they are evaluated as Python, YAML, a format string, a shell command or a template."""
    touch = f"__import__('pathlib').Path({str(trap)!r}).touch()"
    return [
        touch,
        f"{{{touch}}}",
        f"${{{touch}}} {{{{{touch}}}}} $(touch {trap}) `touch {trap}`",
        f"!!python/object/apply:os.system ['touch {trap}']",
        "{subject.__class__} {0.__init__.__globals__} %(subject)s",
    ]


# No pickle


def faults_in(source: str) -> list[str]:
    """What in a Python source reads pickles, evaluates text, or trusts what it should not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [f"imports {name}" for name in names if name.split(".")[0] in NEVER_IMPORTED]
        if isinstance(node, ast.Call):
            found += faults_of_call(node)
    return found


def faults_of_call(call: ast.Call) -> list[str]:
    called, name = ast.unparse(call.func), ast.unparse(call.func).rsplit(".", 1)[-1]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name in NEVER_CALLED and called != "re.compile" and not (name == "eval" and not call.args):  # model.eval()
        return [f"calls {called}"]
    if called == "torch.load" and given.get("weights_only") != "True":
        return ["calls torch.load without weights_only=True"]
    if (
        called.startswith("yaml.")
        and "load" in name
        and name != "safe_load"
        and given.get("Loader") not in SAFE_LOADERS
    ):
        return [f"calls {called} without a safe loader"]
    bad = {"allow_pickle": "True", "trust_remote_code": "True", "shell": "True", "verify": "False"}
    return [f"calls {called} with {key}={value}" for key, value in bad.items() if given.get(key) == value]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_module_reads_or_writes_pickles_or_evaluates_text(path: Path) -> None:
    assert faults_in(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "table.eval(text)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.load(text)",
        "pd.read_pickle(path)",
        "f(trust_remote_code=True)",
    ],
)
def test_the_search_for_them_finds_what_it_looks_for(line: str) -> None:
    assert faults_in(f"def f():\n    {line}\n")


class Bomb:
    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self):
        return os.mkdir, (str(self.trap),)


def test_a_file_that_is_a_pickle_or_fails_its_checksum_is_never_believed(tmp_path, trap, lm) -> None:
    store, inputs = Store(tmp_path), {"what": "x"}
    path = store.save(inputs, {}, {"answer": 1})
    edit = make(lm).save(tmp_path / "edit.safetensors")
    for bomb in (pickle.dumps(Bomb(trap)), path.read_bytes().replace(b"answer", b"anzwer")):
        path.write_bytes(bomb)
        assert store.load(inputs) is None
    for bomb in (pickle.dumps(Bomb(trap)), edit.read_bytes().replace(b"Paris", b"Pariz")):
        edit.write_bytes(bomb)
        with pytest.raises(ValueError, match="load_edit: "):
            load_edit(edit)
    torch.save({"x": Bomb(trap)}, tmp_path / "facts.json")
    with pytest.raises(ValueError, match="load_facts: "):
        load_facts(tmp_path / "facts.json")


# Dask does use pickles


def test_dask_sends_the_work_and_its_results_as_pickles() -> None:
    work = Work(causal_trace, {"name": "smollm2-135m"}, {})
    for travelling in (work, ("a result", [({"what": "trace"}, Record({}, {}))])):
        assert serialize(travelling)[0]["serializer"] == "pickle"


def test_the_cluster_that_cost_starts_listens_on_this_machine_only() -> None:
    with cluster_here(1, torch.device("cpu")):
        process = psutil.Process()
        found = [c for x in (process, *process.children(recursive=True)) for c in x.net_connections("inet")]
    listening = {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_without_a_client_dask_is_not_imported() -> None:
    program = (
        "import sys; sys.path.insert(0, 'tests'); import rome_lab as rl; from tiny import known, talkative_model; "
        "lm = talkative_model(); assert len(rl.trace_facts(lm, known(lm), ('mlp',), samples=1, progress=False)); "
        "assert not {'dask', 'distributed', 'cloudpickle'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


# Weights and code of others: two tests of test_models, imported above


def test_weights_with_a_pickle_inside_are_not_read_unless_opted_in(tmp_path, trap, lm) -> None:
    lm.tokenizer.save_pretrained(tmp_path)
    lm.model.config.save_pretrained(tmp_path)
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(trap)))
        with pytest.raises(ValueError, match="cannot load"):
            load_model(str(tmp_path), device="cpu")


# Downloads


def test_data_sets_come_over_https_within_a_stated_size_and_are_checked(site, tmp_path) -> None:  # noqa: F811
    assert all(x.url.startswith("https://") and 0 < x.most_bytes <= 200_000_000 for x in PUBLISHED.values())
    redirected = {"Location": f"http://127.0.0.1:{site.server_port}/elsewhere"}
    answers = [
        (302, redirected, [b""], "unknown url type"),
        (200, {}, [b" " * 1_000_000] * 11, "more than 10000000 bytes"),
        (200, {}, [b"<html>"], "no list of JSON records"),
    ]
    for site.status, site.headers, site.body, said in answers:
        with pytest.raises(ConnectionError, match=said):
            published_file("known_1000", opener_to(site))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_data_set_that_was_altered_since_the_download_is_downloaded_again(site, caplog) -> None:  # noqa: F811
    site.body = [json.dumps(records()).encode()]
    path = published_file("known_1000", opener_to(site))
    path.write_bytes(site.body[0].replace(b"Peru", b"Oman", 1))
    assert published_file("known_1000", opener_to(site)).read_bytes() == site.body[0]
    assert "was altered since it was downloaded" in caplog.text
    path.with_suffix(".sha256").unlink()
    path.write_bytes(b"the user's own")
    assert published_file("known_1000", opener_to(site)).read_bytes() == b"the user's own"


def test_models_and_wikipedia_are_not_fetched_from_an_address_without_https(monkeypatch) -> None:
    if "HF_ENDPOINT" not in os.environ:
        assert constants.ENDPOINT.startswith("https://")
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example")
    refused = r"http://hub.example \(HF_ENDPOINT\), is not HTTPS"
    with pytest.raises(ValueError, match=refused):
        load_model("gpt2")
    with pytest.raises(ValueError, match=refused):
        next(WikipediaText().articles(0))


# Data stay data


def test_nothing_in_a_file_of_facts_is_evaluated(tmp_path, trap, lm) -> None:
    for attack in attacks(trap):
        fact = {"subject": attack, "template": f"{attack.replace('{}', '')} {{}} is", "object": attack}
        template = fact["template"]
        (tmp_path / "facts.json").write_text(json.dumps([fact]))
        pd.DataFrame([fact]).to_csv(tmp_path / "facts.csv", index=False)
        for name in ("facts.json", "facts.csv"):
            (loaded,) = load_facts(tmp_path / name)
            assert loaded == Fact(attack, template, attack)
            assert loaded.prompt == template.replace("{}", attack, 1)
    t = causal_trace(lm, "The {subject.__class__} is", "{subject.__class__}", samples=1)
    assert "".join(t.tokens) == "The {subject.__class__} is"


def test_nothing_in_a_file_of_edits_is_evaluated(tmp_path, trap, lm) -> None:
    path = make(lm).save(tmp_path / "edit.safetensors")
    for attack in attacks(trap):
        fact = {"subject": attack, "template": "{} is", "object": attack, "relation": attack, "templates": []}
        rewrite(path, facts=[fact], targets=[attack], model=attack, module=attack)
        loaded = load_edit(path)
        assert (loaded.fact.subject, loaded.target) == (attack, attack)
        assert attack in describe_edit(path)
        with loaded.applied(lm):
            assert lm.edits == [loaded]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_in_the_parameters_of_a_notebook_is_evaluated_and_batch_adds_nothing_but_literals(path, tmp_path, trap):
    plain = [cell.source for cell in nbformat.read(path, 4).cells]
    for attack in attacks(trap):
        (tmp_path / "p.yml").write_text(f"model: {attack}\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            try:
                given = read_parameters_file(tmp_path / "p.yml")
                notebook, _ = prepare(path, given)
            except ValueError:  # not YAML, or no text: the model's name has to be one
                continue
        (added,) = [cell for cell in notebook.cells if cell.source not in plain]
        assert [cell.source for cell in notebook.cells if cell is not added] == plain
        (line,) = ast.parse(added.source).body
        assert ast.literal_eval(line.value) == given["model"]


def test_yaml_tags_make_no_objects(tmp_path, trap) -> None:
    text = f"!!python/object/apply:os.mkdir [{trap}]"
    for tagged in (text, f"- {text}", f"x: {text}", f"x: [{text}]"):
        (tmp_path / "p.yml").write_text(tagged)
        try:
            values = read_parameters_file(tmp_path / "p.yml")
        except ValueError:
            continue
        assert yaml.safe_load(yaml.safe_dump(values)) == values, "plain lists, mappings and texts"


class Tags(html.parser.HTMLParser):
    """The names of all elements and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names |= {tag, *(name for name, _ in attributes)}


def test_html_in_facts_and_edits_is_shown_as_text(lm) -> None:
    evil = "<script>alert(1)</script><img src=x onerror='alert(2)'>\"><b onclick=x>"
    fact = Fact(evil, "{} is", evil)
    table = pd.DataFrame({"kind": ["prompt", "paraphrase", "neighbour"], "text": evil, "object": evil})
    look = Look(((evil, 0.5),), (evil,), table.assign(p_object=0.1, p_target=0.2), torch.zeros(3, 2))
    shown = compared_page(Probe(fact, evil, (fact,), (fact,)), {evil: look})
    edit = replace(make(lm), facts=(fact,), targets=(evil,))
    with edit.applied(lm):
        panel = Panel(lm, EditRequest(fact, evil, 1))
        panel.status.say(evil, "error", [evil])
    texts = [shown, panel.status.html, *(row.children[0].value for row in panel.edits.children[1:])]
    assert len(texts) == 3
    for text in texts:
        assert not Tags(text).names & {"script", "img", "src", "onerror", "onclick"}
        assert "&lt;script&gt;" in text


# JupyterLab


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[tuple[dict, psutil.Process]]:
    """JupyterLab as `make lab` starts it, but for the browser and the port."""
    said = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (command,) = [line for line in said.splitlines() if re.search(r"\bjupyter lab\b", line)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {name: str(tmp_path / name) for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    environment = {name: value for name, value in os.environ.items() if name != "JUPYTER_TOKEN"} | own
    as_root = ["--allow-root"] if os.geteuid() == 0 else []
    command = [*shlex.split(command), "--no-browser", f"--port={port}", *as_root]
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 600
        while not (found := list(tmp_path.glob("JUPYTER_RUNTIME_DIR/jpserver-*.json"))):
            assert server.poll() is None and time.monotonic() < until, "JupyterLab did not start"
            time.sleep(0.1)
        yield json.loads(found[0].read_text()), psutil.Process(server.pid)
    finally:
        server.kill()
        server.wait()


def test_make_lab_listens_on_this_machine_only_and_asks_for_the_token(lab) -> None:
    told, process = lab
    until = time.monotonic() + 60  # it tells its port before it listens
    while not (listening := {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}):
        assert process.is_running() and time.monotonic() < until, "JupyterLab does not listen"
        time.sleep(0.1)
    assert listening == {"127.0.0.1"}
    assert len(told["token"]) >= 40
    address = f"http://127.0.0.1:{told['port']}/api/contents"
    with pytest.raises(error.HTTPError, match="403"):
        request.urlopen(address, timeout=60)
    asked = request.Request(address, headers={"Authorization": f"token {told['token']}"})
    assert request.urlopen(asked, timeout=60).status == 200
