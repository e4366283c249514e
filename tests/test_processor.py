"""What the processor has, asked in one place; a forked child that still computes; threads that suit a network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import aqaa
from aqaa import processor
from aqaa.pipeline import AQAA
from aqaa.training import loop
from tests.conftest import RATE, tone

ROOT = Path(aqaa.__file__).parent
UNITS = {"avx512_bf16": True}


@pytest.mark.parametrize("capability, units, isa, has", [
    ("AVX512", UNITS, None, True), ("AVX512", UNITS, "AVX512_CORE_BF16", True), ("AVX512", UNITS, "all", True),
    ("AVX512", {"avx512_bf16": False}, None, False), ("AVX512", {}, None, False), ("AVX2", UNITS, None, False),
    ("DEFAULT", UNITS, None, False), ("AVX512", UNITS, "AVX2", False), ("AVX512", UNITS, "avx512_core", False),
])  # fmt: skip
def test_bf16_is_what_processor_and_switches_allow(monkeypatch, capability, units, isa, has):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if isa:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert processor.has_bf16() == has
    assert processor.precision("cpu") == (torch.bfloat16 if has else torch.float32)
    assert processor.precision("cuda") == torch.bfloat16
    with loop.autocast("cpu"):
        assert torch.is_autocast_enabled("cpu") == has


def test_nobody_else_asks():
    private = re.compile(r"torch\.cpu\._|mkldnn\.is_bf16|get_capabilities|torch\.optim\.Muon\(\w")
    found = [path.name for path in ROOT.rglob("*.py") if private.search(path.read_text(encoding="utf-8"))]
    assert found == ["processor.py"]


FORKS = """
import multiprocessing, os, signal, sys, warnings
warnings.simplefilter("ignore")
import torch
from aqaa import processor
torch.set_num_threads(2)
layer, sound = torch.nn.Linear(512, 512), torch.randn(8, 80_000)
works = {
    "product": lambda: layer(torch.ones(2048, 512)),
    "training": lambda: layer(torch.ones(2048, 512)).sum().backward(),
    "spectrum": lambda: torch.stft(sound, 512, window=torch.hann_window(512), return_complex=True),
    "convolution": lambda: torch.nn.functional.conv1d(sound[:, None], torch.ones(64, 1, 5)),
}
for work in works.values():
    work()  # the threads are there now
for name, work in works.items():
    if (child := os.fork()) == 0:
        signal.alarm(60)
        work()
        os._exit(torch.get_num_threads())
    print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
def task(i):
    return layer(torch.full((2048, 512), float(i))).shape[0]
with multiprocessing.get_context("fork").Pool(2) as pool:
    print("pool", *pool.map_async(task, range(3)).get(60))
works["product"]()
print("parent", torch.get_num_threads())
"""


def test_a_child_of_two_threads_computes_on_one():
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        "product 1", "training 1", "spectrum 1", "convolution 1", "pool 2048 2048 2048", "parent 2",
    ], done.stderr  # fmt: skip


def test_workers_of_our_own_are_not_forked():
    pools = re.compile(r"ProcessPoolExecutor\((\w+)(?:, (\w+))?")
    found = [match for path in ROOT.rglob("*.py") for match in pools.findall(path.read_text(encoding="utf-8"))]
    assert len(found) >= 3 and {context for _, context in found} == {"context"}
    assert not [path for path in ROOT.rglob("*.py") if 'get_context("fork' in path.read_text(encoding="utf-8")]


# ---- threads ----


@pytest.fixture
def three(monkeypatch):
    """A program that has chosen three threads; the thread counts that torch is given from then on."""
    before, real, given = torch.get_num_threads(), torch.set_num_threads, []
    real(3)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: (given.append(n), real(n)))
    yield given
    real(before)


def test_a_small_network_takes_one_thread_and_a_large_one_all(three, monkeypatch):
    small, large = nn.Linear(8, 8), nn.Linear(8, 8)
    monkeypatch.setattr(processor, "LARGE", 100)
    processor._counted[large] = 100
    for modules, threads, given in (((small,), 1, [1, 3]), ((small, large), 3, []), ((), 3, [])):
        three.clear()
        with processor.suited_to(*modules):
            assert torch.get_num_threads() == threads
        assert three == given


def calls(model):
    """Each way of asking."""
    question = (tone(), RATE)
    chat = model.chat(max_tokens=20)
    listener = model.listener()
    yield "listen", lambda: model.listen(question)
    yield "ask", lambda: model.ask(question, max_tokens=20)
    yield "stream", lambda: [torch.get_num_threads() for _ in model.stream(question, max_tokens=20)]
    yield "generate", lambda: [torch.get_num_threads() for _ in model.generate(model.prompt("hot"), max_tokens=9)]
    yield "transcribe", lambda: model.transcribe(question)
    first = model.ids.n_text, model.ids.n_text + model.ids.n_linguistic
    yield "synthesize", lambda: model.synthesize([first[0]] * 2 + [first[1]] * 3)
    yield "chat", lambda: chat.ask(question)
    yield "listener", lambda: (listener.push(tone()), listener.finish())


def test_the_callers_setting_survives_every_call_and_every_piece(tiny, three):
    for name, call in calls(tiny):
        three.clear()
        result = call()
        assert torch.get_num_threads() == 3, name
        assert 1 in three, f"{name} computed with the caller's three threads"
        if name in ("stream", "generate"):
            assert set(result) == {3}, f"between two pieces of {name} the caller's setting holds"


def test_it_survives_a_fault(tiny, three):
    class Broken(nn.Module):
        def encode(self, wav):
            raise RuntimeError("no")

    model = AQAA(tiny.config, {"linguistic": Broken()}.__getitem__)
    with pytest.raises(RuntimeError, match="no"):
        model.listen((tone(), RATE))
    assert torch.get_num_threads() == 3
