"""The store: what is loaded is what was saved for these inputs, or nothing; whatever happens to files and processes."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import SafetensorError
from safetensors.numpy import save_file

from rome_lab.base.files import check_writable, explained, user_cache, write_atomically
from rome_lab.base.store import USER_CACHE, Basket, Store, canonical_json, opened

ROOT = Path(__file__).parents[2]
INPUTS = {"what": "trace", "prompt": "Zürich 東京 🗼 is in", "noise": 0.1 + 0.2, "window": 10, "std": None}
ARRAYS = {
    "p_restored": np.linspace(0, 1, 12).reshape(3, 4),
    "seen": np.array([True, False]),
    "p_clean": np.float32(0.3),
}
META = {"answer": "é\u0000\u2028", "p_clean": 5e-324, "tokens": ["a", "b"]}
TEXT = st.text(st.characters(), max_size=8)  # lone surrogates too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
DTYPES = ["?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"]
ARRAY = hnp.arrays(
    st.sampled_from([*DTYPES, ">f8", ">i4"]), hnp.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=4)
)
NAMES = st.text(max_size=6)
fork = multiprocessing.get_context("fork")


def bits(arrays: dict) -> dict:
    """Everything that two equal results have in common, NaN payloads and negative zeros included."""
    native = {
        name: np.asarray(array).astype(np.asarray(array).dtype.newbyteorder("=")) for name, array in arrays.items()
    }
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in native.items()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "results")


# What goes in comes out


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(TEXT, JSON, max_size=4),
    st.dictionaries(NAMES, ARRAY, max_size=3),
    st.dictionaries(TEXT, JSON, max_size=3),
)
def test_a_loaded_result_is_bit_for_bit_the_saved_one(inputs, arrays, meta):
    inputs = inputs | {"what": "trace"}
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        assert store.load(inputs) is None
        path = store.save(inputs, arrays, meta)
        record = Store(folder).load(json.loads(canonical_json(inputs)))
        assert bits(record.arrays) == bits(arrays)
        assert canonical_json(record.meta) == canonical_json(meta)
        assert [item for item in Path(folder).rglob("*") if item.is_file()] == [path]


@settings(max_examples=100)
@given(JSON, JSON)
def test_inputs_share_a_file_exactly_when_they_are_the_same(one, other):
    def typed(value):
        if isinstance(value, dict):
            return {key: typed(item) for key, item in value.items()}
        if isinstance(value, list):
            return [typed(item) for item in value]
        return type(value).__name__, repr(value)

    store = Store("unused")
    same = store.path({"what": "x", "value": one}) == store.path({"what": "x", "value": other})
    assert same == (typed(one) == typed(other))


@pytest.mark.parametrize(
    ("one", "other"), [(1, 1.0), (1, True), (0.0, -0.0), (0.1, np.nextafter(0.1, 1)), ("é", "e\u0301"), (None, "null")]
)
def test_values_that_python_or_the_eye_takes_for_equal_are_different_inputs(store, one, other):
    store.save({"what": "trace", "value": one}, {})
    assert store.load({"what": "trace", "value": other}) is None
    assert store.load({"what": "trace", "value": one}) is not None


def test_the_order_of_keys_and_tuples_instead_of_lists_make_no_difference(store):
    store.save({"what": "trace", "a": (1, 2), "b": {"c": 1, "d": 2}}, ARRAYS)
    assert store.load({"b": {"d": 2, "c": 1}, "a": [1, 2], "what": "trace"}) is not None


def test_saving_again_replaces_the_result(store):
    first = store.save(INPUTS, ARRAYS, META)
    assert store.save(INPUTS, {"new": np.arange(3)}, {"new": 1}) == first
    record = store.load(INPUTS)
    assert (list(record.arrays), record.meta) == (["new"], {"new": 1})


def test_arrays_in_any_memory_layout_are_saved_by_value(store):
    grid = np.arange(24.0).reshape(2, 3, 4)
    views = {"transposed": grid.T, "strided": grid[:, ::2], "reversed": grid[::-1], "fortran": np.asfortranarray(grid)}
    store.save(INPUTS, views)
    for name, array in store.load(INPUTS).arrays.items():
        np.testing.assert_array_equal(array, views[name])


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), np.int64(3), b"bytes", {1: "int key"}, {1, 2}, Path("x"), object()]
)
def test_values_that_json_cannot_hold_exactly_are_refused_and_located(store, value):
    for call in (
        lambda: store.load({"what": "trace", "deep": [{"value": value}]}),
        lambda: store.save(INPUTS, {}, {"deep": [{"value": value}]}),
    ):
        with pytest.raises((TypeError, ValueError), match=r"^Store: .*\['deep'\]\[0\]\['value'\].*\.$"):
            call()
    assert not store.folder.exists()


@pytest.mark.parametrize("what", [None, 3, "", "..", "a/b", "a\\b", "a\n", "/etc"])
def test_a_name_that_could_leave_the_folder_is_refused(store, what):
    with pytest.raises(ValueError, match="names a subfolder"):
        store.path({"what": what})


@pytest.mark.parametrize(
    "array", [np.array([object()]), np.array(["text"]), np.zeros(2, "M8[s]"), np.zeros(2, complex), np.zeros(2, "g")]
)
def test_arrays_that_are_not_plain_numbers_are_refused(store, array):
    with pytest.raises(TypeError, match="array 'x' has dtype"):
        store.save(INPUTS, {"x": array})


def test_the_name_of_safetensors_own_header_is_refused_for_an_array(store):
    with pytest.raises(ValueError, match="__metadata__"):
        store.save(INPUTS, {"__metadata__": np.zeros(2)})


# Damaged and foreign files


def assert_refused(store: Store, caplog: pytest.LogCaptureFixture, reason: str = "") -> None:
    caplog.clear()
    assert store.load(INPUTS) is None
    [warning] = caplog.records
    assert warning.levelno == logging.WARNING
    assert str(store.path(INPUTS)) in warning.getMessage()
    assert reason in warning.getMessage()


def test_a_file_cut_anywhere_is_refused(store, caplog):
    path = store.save(INPUTS, ARRAYS, META)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert_refused(store, caplog)
    path.write_bytes(whole + b"\0")
    assert_refused(store, caplog)
    path.write_bytes(whole)
    assert bits(store.load(INPUTS).arrays) == bits(ARRAYS)


def test_a_file_with_any_bit_flipped_is_refused(store, caplog):
    path = store.save(INPUTS, ARRAYS, META)
    whole = path.read_bytes()
    chance = random.Random(0)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        assert_refused(store, caplog)


@pytest.mark.parametrize(("own", "other"), [(b'"F64"', b'"I64"'), (b"[3,4]", b"[4,3]"), (b'"seen"', b'"teen"')])
def test_a_header_that_is_valid_but_describes_the_arrays_otherwise_is_refused(store, caplog, own, other):
    path = store.save(INPUTS, ARRAYS, META)
    assert path.read_bytes().count(own) == 1
    path.write_bytes(path.read_bytes().replace(own, other))
    assert_refused(store, caplog, "checksum")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2**16), st.integers(0, 2**16))
def test_garbage_in_place_of_any_part_never_yields_anything_but_the_saved_result(garbage, begin, length):
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        path = store.save(INPUTS, ARRAYS, META)
        whole = path.read_bytes()
        begin = begin % len(whole)
        damaged = whole[:begin] + garbage + whole[begin + length :]
        path.write_bytes(damaged)
        record = store.load(INPUTS)
        assert (record is not None) == (damaged == whole)


def test_the_result_of_other_inputs_under_this_name_is_refused_and_then_overwritten(store, caplog):
    other = store.save(INPUTS | {"window": 9}, {"p_restored": np.zeros((3, 4))})
    shutil.copy(other, store.path(INPUTS))
    assert_refused(store, caplog, "other inputs")
    store.save(INPUTS, ARRAYS, META)
    assert bits(store.load(INPUTS).arrays) == bits(ARRAYS)


@pytest.mark.parametrize("metadata", [None, {"format": "rome_lab 0"}, {"format": "rome_lab 1"}])
def test_a_safetensors_file_of_another_program_is_refused(store, caplog, metadata):
    path = store.save(INPUTS, ARRAYS, META)
    save_file({"p_restored": ARRAYS["p_restored"]}, path, metadata=metadata)
    assert_refused(store, caplog, "not a result in the format")


@pytest.mark.parametrize(
    "tensor", [("BF16", [2], 4), ("F8_E4M3", [2], 2), ("F64", [0, 2**62], 0), ("C64", [1], 8), ("F4", [3], 2)]
)
def test_tensors_that_numpy_cannot_hold_are_refused(store, caplog, tensor):
    dtype, shape, size = tensor
    header = {
        "__metadata__": {"format": "rome_lab 1", "inputs": canonical_json(INPUTS), "meta": "{}", "sha256": "0" * 64},
        "x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]},
    }
    text = json.dumps(header).encode()
    path = store.save(INPUTS, ARRAYS)
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    assert_refused(store, caplog)


def test_a_folder_in_place_of_the_file_is_reported_and_not_removed(store, caplog):
    path = store.path(INPUTS)
    path.mkdir(parents=True)
    assert_refused(store, caplog)
    with pytest.raises(OSError, match="a folder is in the place of the file"):
        store.save(INPUTS, ARRAYS)
    assert list(path.parent.iterdir()) == [path]


# Processes that write together, and processes that die


def save_version(folder: Path, version: int) -> None:
    Store(folder).save(INPUTS, {"x": np.full(50_000, version)}, {"version": version})


def save_versions_for_ever(folder: Path, ready) -> None:
    version = 0
    while True:
        version += 1
        save_version(folder, version)
        ready.set()


def assert_whole(store: Store) -> int:
    record = store.load(INPUTS)
    assert record is not None
    assert (record.arrays["x"] == record.meta["version"]).all()
    return record.meta["version"]


def test_writers_of_one_result_never_show_a_reader_a_mixture(tmp_path, caplog):
    ready = [fork.Event() for _ in range(3)]
    writers = [fork.Process(target=save_versions_for_ever, args=(tmp_path, event), daemon=True) for event in ready]
    for writer in writers:
        writer.start()
    try:
        assert all(event.wait(30) for event in ready)
        seen = {assert_whole(Store(tmp_path)) for _ in range(60)}
        end = time.monotonic() + 30  # where the processors are taken, no writer may have come to its next result
        while len(seen) < 2 and time.monotonic() < end:
            seen.add(assert_whole(Store(tmp_path)))
    finally:
        for writer in writers:
            writer.kill()
            writer.join()
    assert len(seen) > 1
    assert not caplog.records


def test_a_killed_writer_leaves_the_old_result_or_the_new_one_and_its_rubbish_is_removed(tmp_path, caplog):
    chance = random.Random(0)
    interrupted = 0
    for _ in range(20):
        ready = fork.Event()
        writer = fork.Process(target=save_versions_for_ever, args=(tmp_path, ready), daemon=True)
        writer.start()
        assert ready.wait(30)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        assert assert_whole(Store(tmp_path)) >= 1
        interrupted += any((tmp_path / "trace").glob(".rome_lab-*"))
    assert interrupted, "no writer was killed in the middle of a write, so this test showed nothing"
    assert not caplog.records
    save_version(tmp_path, 0)
    assert list((tmp_path / "trace").iterdir()) == [Store(tmp_path).path(INPUTS)]


def test_temporary_files_stay_while_their_process_lives_and_on_other_machines_until_they_are_a_day_old(tmp_path):
    other = f".rome_lab-00000000-{os.getpid()}-aa"
    for name in (other, ".rome_lab-odd-name", "a-file-of-the-user.tmp"):
        (tmp_path / name).write_text("x")

    def living(path: Path) -> None:
        path.write_text("second")
        os.utime(path, (0, 0))  # the clock may have jumped since
        write_atomically(tmp_path / "inner", lambda inner: inner.write_text("first"))
        assert path.exists()

    write_atomically(tmp_path / "outer", living)
    assert {path.name for path in tmp_path.iterdir()} == {
        other,
        ".rome_lab-odd-name",
        "a-file-of-the-user.tmp",
        "inner",
        "outer",
    }
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    write_atomically(tmp_path / "outer", lambda path: path.write_text("third"))
    assert {path.name for path in tmp_path.iterdir()} == {"a-file-of-the-user.tmp", "inner", "outer"}


# Atomic files of others


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError, SystemExit])
def test_an_interrupted_writer_leaves_the_old_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "figure_1.pdf"
    write_atomically(target, lambda path: path.write_text("old"))

    def interrupted(path: Path) -> None:
        path.write_text("half")
        raise error

    with pytest.raises(error):
        write_atomically(target, interrupted)
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_text() == "old"


def test_the_temporary_file_keeps_the_suffix_and_the_new_file_the_usual_permissions(tmp_path):
    target = tmp_path / "new" / "folder" / "table.csv"
    suffixes = []
    write_atomically(target, lambda path: (suffixes.append(path.suffix), path.write_text("a,b")))
    (tmp_path / "plain").write_text("")
    assert suffixes == [".csv"]
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_temporary_file_that_is_cleared_away_meanwhile_is_an_error_that_says_so(tmp_path):
    with pytest.raises(OSError, match=f"Cannot write to the folder {tmp_path}: .* was removed meanwhile"):
        write_atomically(tmp_path / "x", lambda path: (path.write_text("half"), path.unlink()))
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_disk_that_safetensors_tells_in_words_become_sentences_too(tmp_path):
    for text, said in (("No space left on device (os error 28)", "the disk is full"), ("odd", "odd")):
        with pytest.raises((OSError, SafetensorError), match=said), explained(tmp_path):
            raise SafetensorError(f"Error while serializing: I/O error: {text}")


def test_errors_of_the_writer_that_are_not_about_the_disk_pass_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-file"):
        write_atomically(tmp_path / "x", lambda path: path.write_bytes((tmp_path / "no-such-file").read_bytes()))


# Disks that refuse


def refusals(folder: Path) -> list[str]:
    """The messages that checking and saving give for a folder that cannot be written."""
    messages = []
    for call in (Store(folder).check_writable, lambda: Store(folder).save(INPUTS, {"x": np.zeros(1 << 18)})):
        with pytest.raises(OSError) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_a_writable_folder_is_made_by_the_check_and_left_empty(store):
    store.check_writable()
    assert list(store.folder.iterdir()) == []


def test_a_name_that_is_too_long_and_a_path_that_is_gone_are_named_with_advice(tmp_path, monkeypatch):
    assert all("the name is too long" in message for message in refusals(tmp_path / ("a" * 300)))
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert all("is not there" in message for message in refusals(Path("results")))


@pytest.mark.parametrize("below", ["", "results", "deep/results"])
def test_a_folder_that_a_file_is_in_the_way_of_is_named_with_advice(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / below
    assert Store(folder).load(INPUTS) is None
    for message in refusals(folder):
        assert message.startswith(f"Cannot write to the folder {folder}")
        assert "choose another folder." in message
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_size_limit_while_saving_leaves_nothing_and_says_so(tmp_path):
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        messages = refusals(tmp_path)
        assert all("would exceed the allowed size" in message for message in messages)

    child = fork.Process(target=limited)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


MOUNT = 'cd "$0" && mkdir full ro && mount -t tmpfs -o size=48k tmpfs full && mount -t tmpfs -o ro tmpfs ro'
MOUNTED = """
from tests.base.test_store import ARRAYS, INPUTS, Path, Store, bits, refusals, sys
full, read_only = Path(sys.argv[1]) / "full", Path(sys.argv[1]) / "ro"
Store(full).save(INPUTS, ARRAYS)
for folder, reason in ((full, "the disk is full"), (read_only, "the file system is read-only")):
    for message in refusals(folder):
        assert message.startswith(f"Cannot write to the folder {folder}"), message
        assert reason in message and message.endswith("choose another folder."), message
assert bits(Store(full).load(INPUTS).arrays) == bits(ARRAYS), "the result from before is lost"
assert [path for path in full.rglob("*") if path.is_file()] == [Store(full).path(INPUTS)]
"""


@pytest.mark.slow
def test_a_full_disk_and_a_read_only_one_are_named_with_advice_and_lose_nothing(tmp_path):
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]  # the mounts are gone when the command ends
    possible = shutil.which("unshare") and subprocess.run([*inside, MOUNT, tmp_path], capture_output=True, check=False)
    if not possible or possible.returncode:
        pytest.skip("no small file system can be mounted here")
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    command = [
        *inside,
        f'{MOUNT} && cd "$1" && shift && exec "$@"',
        tmp_path,
        ROOT,
        sys.executable,
        "-c",
        MOUNTED,
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_missing_permission_is_named_with_advice(tmp_path):
    tmp_path.chmod(0o500)
    assert all("permission is denied" in message for message in refusals(tmp_path / "results"))


def test_the_cache_folder_is_the_users_unless_the_environment_names_one(monkeypatch, tmp_path):
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path / "cache"))
    assert user_cache() == tmp_path / "cache"
    assert not user_cache().exists()
    monkeypatch.setenv("ROME_LAB_CACHE", "")
    assert user_cache().name == "rome_lab"
    assert user_cache().is_absolute()


def test_a_store_is_named_by_a_folder_as_text_or_path_or_is_one_or_none(tmp_path):
    for named in (str(tmp_path), tmp_path):
        assert isinstance(opened(named), Store) and opened(named).folder == tmp_path
    store = Basket()
    assert opened(store) is store and opened(USER_CACHE) is USER_CACHE and opened(None) is None
    with pytest.raises(TypeError, match=r"store is 3; expected a folder \(text or Path\), a Store, or None"):
        opened(3)


def test_the_store_in_the_users_cache_follows_the_environment(monkeypatch, tmp_path):
    for name in ("one", "other"):
        monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path / name))
        USER_CACHE.save(INPUTS, ARRAYS, {"name": name})
        assert USER_CACHE.path(INPUTS).is_relative_to(tmp_path / name)
        assert USER_CACHE.load(INPUTS).meta == Store(tmp_path / name).load(INPUTS).meta == {"name": name}


def test_a_store_in_memory_gives_what_a_folder_gives_and_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    basket, store = Basket(), Store(tmp_path / "results")
    basket.save({"what": "own"}, {"x": np.zeros(2)})
    basket.load({"what": "own"}).arrays["x"][0] = 1.0
    assert basket.load({"what": "own"}).arrays["x"][0] == 0.0  # each reader has its own
    assert basket.load(INPUTS) is None
    for kept in (basket, store):
        kept.check_writable()
        kept.save(INPUTS, ARRAYS, META)
    assert bits(basket.load(INPUTS).arrays) == bits(store.load(INPUTS).arrays)
    assert basket.load(INPUTS).meta == store.load(INPUTS).meta
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_where_the_users_cache_cannot_be_written_the_error_names_the_variable_that_moves_it(tmp_path, monkeypatch):
    for name in ("file", "other"):
        (tmp_path / name).write_text("")
    monkeypatch.setenv("ROME_LAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="choose another folder, with the environment variable ROME_LAB_CACHE[.]$"):
        check_writable(user_cache() / "models")
    with pytest.raises(OSError, match="choose another folder[.]$"):
        check_writable(tmp_path / "other")
