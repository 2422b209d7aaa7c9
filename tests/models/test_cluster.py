"""Many machines: what workers make is what one process makes, and neither their deaths nor the client's lose anything."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from bench import QUICK, UNRELATED, case, small
from distributed import Client, LocalCluster
from safetensors import safe_open
from test_collection import same
from tiny import SUBJECTS, TEMPLATE, known, talkative_model, tiny_model
from tqdm import tqdm

from rome_lab import Fact, GaussianNoise, LanguageModel, evaluate, load_model, trace_facts
from rome_lab.base.store import Store
from rome_lab.base.versions import code_version
from rome_lab.editing.edit import Edit
from rome_lab.evaluation import bench as evaluation
from rome_lab.models import workers
from rome_lab.models.process import choose_products, products
from rome_lab.models.workers import Workers
from rome_lab.tracing import many_facts as collection

CASES = [case(i, subject) for i, subject in enumerate(SUBJECTS[:4])]
TRACING = {"progress": False, "samples": 2}
METHODS = ("none", "rome", "rome-averaged", "rome-identity", "ft", "in-context", "joint")
THREADS = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": ":0"}
EVALUATING = {"progress": False, "settings": QUICK, "unrelated": UNRELATED}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many threads as a worker of Dask has, since sums may be rounded otherwise with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    """A tiny model that knows some facts, loaded from a folder."""
    return saved(talkative_model(), tmp_path_factory.mktemp("models") / "talker")


@pytest.fixture(scope="module")
def cluster():
    """Two processes, which cannot keep anything in a cache of their own."""
    env = {"ROME_LAB_CACHE": os.devnull}
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0", env=env) as cluster:
        yield cluster


@pytest.fixture
def client(cluster):
    with Client(cluster) as client:
        yield client


@pytest.fixture
def quiet():
    return tqdm(disable=True)


def saved(lm: LanguageModel, folder: Path) -> LanguageModel:
    lm.save_pretrained(folder)
    return load_model(str(folder), device="cpu")


def files(folder: Path) -> list[Path]:
    """Results, without the temporary file that a process leaves behind which is killed while it writes."""
    return [path for path in folder.rglob("*.safetensors") if not path.name.startswith(".")]


def records(folder: Path) -> dict[str, dict[str, str]]:
    """Of each file its header, whose digest is that of all it holds."""
    found = {}
    for path in files(folder):
        with safe_open(path, framework="numpy") as file:
            found[str(path.relative_to(folder))] = file.metadata()
    return found


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in files(folder)}


def judged(lm, methods=METHODS, **options) -> pd.DataFrame:
    chosen = [replace(small(name), together=3) if name == "joint" else small(name) for name in methods]
    return evaluate(lm, CASES, chosen, **EVALUATING | options)


# The same as in one process


def test_traces_of_workers_are_those_of_one_process_and_both_share_a_store(lm, client, tmp_path, monkeypatch):
    facts = known(lm)
    serial = trace_facts(lm, facts, store=tmp_path / "serial", **TRACING)
    assert same(trace_facts(lm, facts, store=tmp_path / "workers", client=client, **TRACING), serial)
    assert records(tmp_path / "workers") == records(tmp_path / "serial")
    assert same(trace_facts(lm, facts, client=client, **TRACING), serial)
    monkeypatch.setattr(collection, "run_clean_and_corrupted", lambda *args: pytest.fail("traced again"))
    assert same(trace_facts(lm, facts, store=tmp_path / "workers", **TRACING), serial)


def test_workers_compute_products_as_the_client_does_now(lm, client):
    with products("default"):  # after it, they are computed as before
        fast = load_model(lm.origin["name"], device="cpu", products="fast")
        choose_products("default")
        facts = known(fast)
        assert same(trace_facts(fast, facts, client=client, **TRACING), trace_facts(fast, facts, **TRACING))


def test_workers_trace_only_what_the_store_does_not_hold(lm, client, tmp_path):
    facts = known(lm)
    trace_facts(lm, facts, ("state",), store=tmp_path, **TRACING)
    trace_facts(lm, facts[:2], ("mlp",), store=tmp_path, client=client, **TRACING)
    before = times(tmp_path)
    traces = trace_facts(lm, facts, ("state", "mlp"), store=tmp_path, client=client, **TRACING)
    assert before.items() <= times(tmp_path).items()
    assert same(traces, trace_facts(lm, facts, ("state", "mlp"), **TRACING))


def test_facts_that_the_model_does_not_know_are_left_out_and_reported(lm, client, caplog):
    facts = [Fact("Paris", TEMPLATE, "Zanzibar"), *known(lm)]
    traces = trace_facts(lm, facts, ("state",), client=client, **TRACING)
    assert len(traces) == len(facts) - 1
    assert "1 of" in caplog.text and "does not know this fact" in caplog.text


@pytest.mark.usefixtures("shared_cache")
def test_rows_of_workers_are_those_of_one_process_and_both_share_a_store(lm, client, tmp_path, monkeypatch):
    serial = judged(lm, store=tmp_path / "serial")
    theirs = judged(lm, store=tmp_path / "workers", client=client)
    pd.testing.assert_frame_equal(theirs, serial, rtol=1e-4)  # one process judges several cases side by side
    assert records(tmp_path / "workers").keys() == records(tmp_path / "serial").keys()
    pd.testing.assert_frame_equal(judged(lm, client=client), theirs, check_exact=True)
    monkeypatch.setattr(evaluation, "judge_all", lambda lm, asked: pytest.fail("judged again") if asked else [])
    pd.testing.assert_frame_equal(judged(lm, store=tmp_path / "workers"), theirs, check_exact=True)


@pytest.mark.usefixtures("shared_cache")
def test_another_method_is_judged_alone_with_the_v_star_that_the_store_holds(lm, client, tmp_path):
    judged(lm, ["rome"], store=tmp_path)
    before = times(tmp_path)
    table = judged(lm, ["rome", "rome-averaged"], store=tmp_path, client=client)
    assert before.items() <= times(tmp_path).items()
    assert len(records(tmp_path)) == len(before) + len(CASES)  # a row each, and no other v*
    pd.testing.assert_frame_equal(table, judged(lm, ["rome", "rome-averaged"]), rtol=1e-4)


def test_threads_of_one_worker_take_turns_with_the_model(lm):
    facts = known(lm)
    with LocalCluster(**THREADS | {"threads_per_worker": 4}) as threads, Client(threads) as client:
        assert same(trace_facts(lm, facts, client=client, **TRACING), trace_facts(lm, facts, **TRACING))


def who(lm, item, store):
    time.sleep(0.1)
    return item, os.getpid(), id(lm)


def test_a_worker_loads_the_model_once_and_keeps_it(lm, client, quiet):
    found = [one for _ in range(2) for one in Workers(client, lm).map(who, range(8), quiet)]
    assert [item for item, *_ in found] == 2 * list(range(8))
    assert os.getpid() not in {pid for _, pid, _ in found}
    assert len({pid for _, pid, _ in found}) == len({(pid, model) for _, pid, model in found}) == 2


# Workers that die, or have no model


class Deadly(GaussianNoise):
    """Noise that kills the process that first makes it for one subject, or, without a flag, all that do."""

    def __init__(self, subject: str, flag: Path | None) -> None:
        super().__init__(std=1.0)
        object.__setattr__(self, "victim", (subject, flag))

    def measured(self, lm):
        return self

    def noise(self, lm, shape, key):
        subject, flag = self.victim
        if subject in key and not (flag and flag.exists()):
            if flag:
                flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().noise(lm, shape, key)


def test_the_work_of_a_worker_that_is_killed_is_done_by_another(lm, client, tmp_path):
    facts = known(lm)
    noise = Deadly(facts[2].subject, tmp_path / "killed")
    traces = trace_facts(lm, facts, store=tmp_path, corruption=noise, client=client, **TRACING)
    assert (tmp_path / "killed").exists()
    assert same(traces, trace_facts(lm, facts, corruption=GaussianNoise(std=1.0), **TRACING))


def test_an_item_that_kills_every_worker_is_reported(lm, cluster, client, tmp_path):
    facts = known(lm)
    cluster.scheduler.allowed_failures = 0  # 3 by default, which takes longer
    try:
        with pytest.raises(RuntimeError, match="1 workers have died of the same item.*too little memory for talker"):
            trace_facts(lm, facts, store=tmp_path, corruption=Deadly(facts[-1].subject, None), client=client, **TRACING)
    finally:
        cluster.scheduler.allowed_failures = 3


def test_a_worker_without_the_model_is_reported(client, tmp_path):
    lm = saved(tiny_model("llama"), tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ValueError, match=r"On the worker at tcp://.*: load_model: cannot load '.*model'.*To do"):
        trace_facts(lm, [Fact("Paris", TEMPLATE, "Rome")], client=client, **TRACING)


def test_a_worker_with_another_model_of_that_name_is_refused(client, tmp_path):
    lm = saved(tiny_model("llama"), tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"is not the client's model, .* other model \(\w+, not \w+\); give all"):
        trace_facts(lm, [Fact("Paris", TEMPLATE, "Rome")], client=client, **TRACING)


def give_code(version):
    """On a worker: another version of its code, or, with None, its own."""
    workers.code_version = code_version if version is None else lambda module: version


def test_a_worker_with_another_rome_lab_is_refused(client, tmp_path):
    lm = saved(talkative_model(), tmp_path / "model")
    client.run(give_code, "older")
    try:
        with pytest.raises(ValueError, match=rf"other code \(older, not {code_version('rome_lab')}\); give all"):
            trace_facts(lm, known(lm), client=client, **TRACING)
    finally:
        client.run(give_code, None)
    assert len(trace_facts(lm, known(lm)[:1], ("state",), client=client, **TRACING)) == 1


class Forgetful(Store):
    """A store from which another program removes whatever is written."""

    def save(self, *args):
        path = super().save(*args)
        path.unlink()
        return path


def test_what_workers_made_and_the_store_lost_is_not_silently_made_again(lm, client, tmp_path):
    with pytest.raises(RuntimeError, match="have traced 'The city of .* is not there; see that nothing alters"):
        trace_facts(lm, known(lm), ("state",), store=Forgetful(tmp_path), client=client, **TRACING)


def test_a_model_that_exists_in_memory_only_is_refused(lm, tiny, client, monkeypatch):
    with pytest.raises(ValueError, match="tiny-llama, which was not loaded by load_model.*save_pretrained"):
        trace_facts(tiny, [Fact("Paris", TEMPLATE, "Rome")], client=client, **TRACING)
    monkeypatch.setattr(lm.overlay, "changes", [object.__new__(Edit)])
    with pytest.raises(ValueError, match="talker, which has edits in force.*save_pretrained"):
        judged(lm, ["none"], client=client)


def test_what_is_no_client_is_refused(lm, cluster):
    with pytest.raises(TypeError, match=r"client is LocalCluster.*cluster.get_client\(\)"):
        trace_facts(lm, [Fact("Paris", TEMPLATE, "Rome")], client=cluster, **TRACING)


# Clients that stop, or go away


class Eventful(Store):
    """A store at whose first result something happens."""

    def __init__(self, folder: Path, event: Callable[[], object]) -> None:
        super().__init__(folder)
        self.events = [event]

    def save(self, *args):
        path = super().save(*args)
        if self.events:
            self.events.pop()()
        return path


def interrupt_at_the_end(client: Client) -> None:
    """Press Ctrl-C when the workers have finished everything."""
    while any(future.status == "pending" for future in client.futures.values()):
        time.sleep(0.01)
    signal.raise_signal(signal.SIGINT)


def test_what_was_finished_when_the_user_interrupts_is_kept(lm, client, tmp_path):
    facts = known(lm)
    store = Eventful(tmp_path, partial(interrupt_at_the_end, client))
    with pytest.raises(KeyboardInterrupt):
        trace_facts(lm, facts, ("state",), store=store, client=client, **TRACING)
    assert len(records(tmp_path)) == len(facts)


def start_and_wait(folder: Path, lm, item, store):
    """Whoever comes first is done at once; the others wait for the gate."""
    (folder / f"started {item}").touch()
    try:
        (folder / "first").touch(exist_ok=False)
    except FileExistsError:
        while not (folder / "gate").exists():
            time.sleep(0.01)


class Impatient:
    """A bar whose user presses Ctrl-C as soon as it moves."""

    def update(self):
        signal.raise_signal(signal.SIGINT)


def test_what_is_outstanding_when_the_user_interrupts_is_cancelled(lm, cluster, client, tmp_path, quiet):
    with pytest.raises(KeyboardInterrupt):
        Workers(client, lm).map(partial(start_and_wait, tmp_path), range(20), Impatient())
    (tmp_path / "gate").touch()
    Workers(client, lm).map(who, range(4), quiet)  # comes after whatever was still running
    assert 1 <= len(list(tmp_path.glob("started *"))) < 10


def trace_forever(address, folder, model, facts):
    torch.set_num_threads(1)
    lm = load_model(model, device="cpu")
    with Client(address) as client:
        for samples in range(1, 200):
            trace_facts(lm, facts, store=folder, samples=samples, progress=False, client=client)


def test_a_client_that_is_killed_and_comes_back_finds_all_that_was_stored(lm, cluster, client, tmp_path):
    facts = known(lm)
    arguments = (cluster.scheduler_address, tmp_path, lm.origin["name"], facts)
    process = multiprocessing.get_context("spawn").Process(target=trace_forever, args=arguments)
    process.start()
    while not files(tmp_path) and process.is_alive():
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    before = times(tmp_path)
    assert before
    traces = trace_facts(lm, facts, store=tmp_path, samples=1, progress=False, client=client)
    assert same(traces, trace_facts(lm, facts, samples=1, progress=False))
    assert before.items() <= times(tmp_path).items()


def test_a_lost_connection_is_reported_and_another_cluster_goes_on(lm, client, tmp_path, quiet):
    facts = known(lm)
    options = THREADS | {"protocol": "tcp"}
    lost_connection = pytest.raises(RuntimeError, match="connection to the Dask scheduler was lost")
    with LocalCluster(**options) as lost, Client(lost) as other, lost_connection:
        trace_facts(lm, facts, ("state",), store=Eventful(tmp_path, lost.close), client=other, **TRACING)
    before = times(tmp_path)
    assert 1 <= len(before) < len(facts)
    traces = trace_facts(lm, facts, ("state",), store=tmp_path, client=client, **TRACING)
    assert same(traces, trace_facts(lm, facts, ("state",), **TRACING))
    assert before.items() <= times(tmp_path).items()


def test_a_cluster_without_workers_is_waited_for_and_said_so(lm, caplog, quiet):
    with LocalCluster(**THREADS | {"n_workers": 0}) as cluster, Client(cluster) as client:

        class Late(logging.Handler):
            def emit(self, record):
                cluster.scale(1)

        logger, late = logging.getLogger("rome_lab.models.workers"), Late()
        logger.addHandler(late)
        try:
            found = Workers(client, lm).map(who, range(2), quiet)
        finally:
            logger.removeHandler(late)
    assert [item for item, *_ in found] == [0, 1]
    assert "has no workers yet" in caplog.text
