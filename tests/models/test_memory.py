"""Where memory runs out the batch is halved, the results stay, and it is said once."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from test_changes import changes_of
from test_judging import SETTINGS, TINY, generate, numbers
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from rome_lab import causal_trace, covariance, known_facts, load_facts
from rome_lab.base.store import Store
from rome_lab.editing.second_moment import KeySum, add_passages
from rome_lab.editing.texts import SampledText
from rome_lab.evaluation.judging import judge_case
from rome_lab.models.batching import Batching, free_in_groups, ran_out, text_bytes
from rome_lab.tracing.trace import KINDS

PROMPT = ("The Eiffel Tower is located in the city of", "Eiffel Tower")


@contextlib.contextmanager
def device_of(lm, most=None):
    """A device on which no block can take more than `most` texts; gives the numbers of texts that it was given."""
    seen = []

    def take(module, args, kwargs):
        seen.append(len(args[0] if args else kwargs["hidden_states"]))
        if most is not None and seen[-1] > most:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {seen[-1]} GiB.\nGPU 0 has some.")

    hooks = [block.register_forward_pre_hook(take, with_kwargs=True) for block in lm.blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def warnings(caplog):
    return [x.getMessage() for x in caplog.records if x.levelno >= logging.WARNING and "memory" in x.getMessage()]


def trace(lm, label):
    kind, severed = KINDS[label]
    return causal_trace(lm, *PROMPT, kind, samples=4, window=2, severed=severed)


@pytest.mark.parametrize("most", [1, 7])
@pytest.mark.parametrize("label", KINDS)
def test_traces_stay_the_same(label, most, caplog):
    lm = tiny_model("gpt2")
    whole = trace(lm, label)
    with device_of(lm, most) as seen:
        first, again = trace(lm, label), trace(lm, label)
    for found in (first, again):
        np.testing.assert_allclose(found.p_restored, whole.p_restored, atol=3e-6)
        assert (found.p_clean, found.p_corrupted) == pytest.approx((whole.p_clean, whole.p_corrupted), abs=3e-6)
    assert sum(rows > most for rows in seen) <= 3, "it is not tried again and again"
    (said,) = warnings(caplog)
    assert re.match(r"causal_trace: memory ran out with (5 texts together; going on with 2|8 .* 4),", said)


def test_known_facts_stay_the_same(caplog):
    lm, facts = tiny_model("mistral"), load_facts("embedded")[:12]
    options = {"n": None, "max_new_tokens": 6, "progress": False}
    whole = known_facts(lm, facts, **options)
    with device_of(lm, 2) as seen:
        assert known_facts(lm, facts, **options) == whole
    assert max(seen) > 2 and len(warnings(caplog)) == 1


def test_the_covariance_stays_the_same(tmp_path, caplog):
    lm, source = tiny_model("llama"), SampledText(length=24)
    whole = covariance(lm, 2, source, 2000, Store(tmp_path / "whole"), progress=False)
    with device_of(lm, 5) as seen:
        halved = covariance(lm, 2, source, 2000, Store(tmp_path / "halved"), progress=False)
    torch.testing.assert_close(halved, whole, rtol=1e-5, atol=1e-6 * float(whole.abs().max()))
    assert max(seen) > 5 and len(warnings(caplog)) == 1


def test_a_failure_between_two_layers_counts_no_passage_twice():
    lm, batch = tiny_model("llama"), [[7, 8, 9], [20, 30], [40, 50, 60, 70], [5]]
    failing = iter([True])

    def fail_once(module, args):
        if next(failing, False):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def sums():
        found = {layer: KeySum(torch.zeros(48, 48, dtype=torch.float64)) for layer in (0, 3)}
        add_passages(lm, found, batch, 0)
        return found

    whole = sums()
    hook = lm.blocks[2].register_forward_pre_hook(fail_once)
    again = sums()
    hook.remove()
    for layer in (0, 3):
        assert (again[layer].passages, again[layer].tokens) == (whole[layer].passages, whole[layer].tokens) == (4, 10)
        torch.testing.assert_close(again[layer].total, whole[layer].total, rtol=1e-5, atol=1e-6)


def test_judgements_and_generated_texts_stay_the_same(caplog):
    lm = tiny_model("llama")
    changes, prompts = changes_of(lm), TINY.generation_prompts
    whole, texts = judge_case(lm, TINY, changes, SETTINGS), generate(lm, changes, prompts, 6)
    with device_of(lm, 3) as seen:
        for some, all_ in zip(judge_case(lm, TINY, changes, SETTINGS), whole, strict=True):
            assert numbers(some) == pytest.approx(numbers(all_), rel=1e-5, abs=1e-5)
            assert some["generations"] == all_["generations"]
        del Batching.learned[lm]
        assert generate(lm, changes, prompts, 6) == texts
    assert max(seen) > 3
    assert [said.partition(":")[0] for said in warnings(caplog)] == ["judge", "generate"], "once, and once it forgot"


@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_more_texts_go_together_than_asked_for_even_those_of_one_cell(most):
    lm = tiny_model("llama")
    whole = causal_trace(lm, *PROMPT, "mlp", samples=4, window=2)
    with device_of(lm) as seen:
        split = causal_trace(lm, *PROMPT, "mlp", samples=4, window=2, max_rows=most)
    assert max(seen) == most
    np.testing.assert_allclose(split.p_restored, whole.p_restored, atol=3e-6)


def test_a_single_text_that_does_not_fit_is_said_in_a_sentence():
    lm = tiny_model("gpt2")
    with device_of(lm, 0), pytest.raises(MemoryError) as caught:
        causal_trace(lm, *PROMPT)
    assert str(caught.value) == (
        "causal_trace: the memory does not suffice for a single text with tiny-gpt2 (CUDA out of memory. Tried to "
        'allocate 1 GiB.); shorten the text, load the model with dtype="bfloat16", or spread it with device_map="auto".'
    )


class Small(TorchDispatchMode):
    """A device on which no tensor of more than `most` bytes can be made in advance, or put together of others."""

    def __init__(self, most):
        super().__init__()
        self.most = most

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        making = (torch.ops.aten.cat.default, torch.ops.aten.new_empty.default)
        if function in making and made.nbytes > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.\nGPU 0 has some.")
        return made


@pytest.mark.parametrize("samples, fitting", [(10, 6), (4, 6), (10**13, 10**20)], ids=["recorded", "swept", "noise"])
def test_texts_that_do_not_fit_side_by_side_are_said_in_a_sentence(samples, fitting):
    lm = tiny_model("gpt2")
    each = len(lm.tokenizer(PROMPT[0])["input_ids"]) * 32 * 4  # 5 of them are recorded of 4 samples, 16 are swept
    sentence = (
        r"^causal_trace: .* for what is kept of all texts together \(.*(out of|allocate) .*\); take fewer samples"
    )
    with Small(fitting * each), pytest.raises(MemoryError, match=sentence):
        causal_trace(lm, *PROMPT, samples=samples, max_rows=1)
    assert lm not in Batching.learned


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
        "[enforce fail at alloc_cpu.cpp:80] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.",
        "std::bad_alloc",
        "MPS backend out of memory (MPS allocated: 9.00 GB)",
    ],
)
def test_what_allocators_say_is_understood(said):
    assert ran_out(RuntimeError(said)) and not ran_out(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


GROUPS = {  # version: the line that names the group, where it is, and what its files are called
    1: ("4:memory:/batch/job", "memory/batch", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("0::/batch/job", "batch", "memory.max", "memory.current", ""),
}


@pytest.mark.parametrize("version", GROUPS)
def test_a_control_group_leaves_what_it_or_one_above_it_has_not_given_out_and_what_was_read_from_files(
    version, tmp_path
):
    line, place, limit, usage, total = GROUPS[version]
    (own := tmp_path / "own").write_text(f"9:name=systemd:/\n{line}\n")
    assert free_in_groups(tmp_path / "nowhere", tmp_path) == free_in_groups(own, tmp_path) == float("inf")
    for folder, most, taken in ((tmp_path / place, 10**6, 10**5), (tmp_path / place / "job", "max", 99)):
        folder.mkdir(parents=True)
        (folder / limit).write_text(f"{most}\n" if version == 2 or most != "max" else f"{2**63}\n")
        (folder / usage).write_text(f"{taken}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{total}inactive_file 20\n{total}active_file 3\n")
    assert free_in_groups(own, tmp_path) == 10**6 - 10**5 + 23


def test_what_is_no_lack_of_memory_is_raised_as_it_is():
    def fail(part):
        raise RuntimeError("The size of tensor a must match the size of tensor b")

    lm = tiny_model("gpt2")
    with pytest.raises(RuntimeError, match="The size of tensor a"):
        list(Batching(lm, "test", 1).over(range(4), fail))
    assert lm not in Batching.learned


def test_every_item_is_worked_on_once_in_order_and_a_failed_part_leaves_nothing_behind():
    lm, left = tiny_model("gpt2"), []

    def work(part):
        assert all(reference() is None for reference in left), "the tensors of the failed part are gone"
        made = torch.ones(len(part))
        left.append(weakref.ref(made))
        if len(part) > 3:
            raise torch.OutOfMemoryError("MPS backend out of memory")
        return list(part)

    assert list(Batching(lm, "test", 1000, most=20).over(range(21), work)) == [
        [*range(i, min(i + 2, 21))] for i in range(0, 21, 2)
    ]


def test_each_does_all_the_work_for_what_it_does():
    done = []

    def work(part):
        if len(part) > 3:
            raise torch.OutOfMemoryError("MPS backend out of memory")
        done.extend(part)

    assert Batching(tiny_model("gpt2"), "test", 1000, most=20).each(range(21), work) is None
    assert done == list(range(21))


def test_as_many_go_together_as_the_free_memory_allows_attention_scores_included(monkeypatch):
    lm = tiny_model("llama")
    monkeypatch.setattr("rome_lab.models.batching.free_bytes", lambda device: 10**6)
    assert [Batching(lm, "test", bytes_each).size for bytes_each in (10**3, 10**5, 10**7)] == [300, 3, 1]
    assert Batching(lm, "test", 10**3, most=7).size == 7
    heads, short, long = 4, text_bytes(lm, 1), text_bytes(lm, 10**4)
    assert long - 10**4 * short <= 2 * 4 * heads * 10**8 <= long
    assert text_bytes(lm, 20, cached=True) - text_bytes(lm, 20) >= 2 * lm.n_layers * 20 * 32 * 4


REAL = """
import logging, resource, torch, transformers
from tiny import LLAMA, tokenizer
from rome_lab import LanguageModel, causal_trace
from rome_lab.models import Batching
logging.basicConfig(level=logging.WARNING)
torch.manual_seed(0)
config = transformers.LlamaConfig(**LLAMA | {"intermediate_size": 1 << 14, "num_hidden_layers": 2})
lm = LanguageModel(transformers.AutoModelForCausalLM.from_config(config), tokenizer(), name="wide")
run = lambda samples: causal_trace(lm, "The Tower", "Tower", samples=samples).p_restored
run(1)
used, unlimited = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize(), resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_AS, (used + (120 << 20), unlimited))
halved = run(256)
resource.setrlimit(resource.RLIMIT_AS, (unlimited, unlimited))
short = Batching.learned.pop(lm, None) is not None
print(short, abs(halved - run(256)).max() < 1e-6)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.slow
def test_memory_that_really_runs_out_is_survived():
    # With this what is freed goes back to the system at once, and does not count against the limit any more.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", REAL], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr
    assert done.stderr.count("ran out") == 1
