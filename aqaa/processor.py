"""What this processor can do, and how many threads suit a network: one for small ones.

Threads of one operation meet at a barrier and spin there until the last one comes. The mini's
products last some ten microseconds, so a second thread gains nothing even on an idle machine; and
when another program wants a core, one thread waits for its turn while the other spins: an answer
then takes ten times as long (data/runs/speed.json).
"""

import os
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

# oneDNN's names of processors without bf16
NO_BF16 = "SSE41 AVX AVX2 AVX2_VNNI AVX2_VNNI_2 AVX512_CORE AVX512_CORE_VNNI".split()
LARGE = 15_000_000  # weights from which on more threads pay; the mini's largest part has 6 million
_counted = WeakKeyDictionary()

# oneDNN keeps what it made for each shape of a sound, by default 1,024 times. A conversation brings
# some 25 new ones with each turn, and those that come again are fewer than 256.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

# A forked child has no threads but its own, and would wait for ever for those that its parent had
# started. Without parallel regions it waits for none, so a child computes on one thread, and must
# not ask for more.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def cpuinfo(name):
    """The first entry `name` ("flags", "model name") of Linux's /proc/cpuinfo; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def has_bf16():
    """Does this processor multiply in bf16 (AVX512-BF16 or AMX)? Imitated, it is ten times slower.

    $ATEN_CPU_CAPABILITY and $ONEDNN_MAX_CPU_ISA, which switch such units off, count.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in NO_BF16:
        return False
    wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return wide and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def precision(device):
    """torch.bfloat16 where `device` multiplies it (a GPU, or `has_bf16`), else torch.float32."""
    fast = torch.device(device).type != "cpu" or has_bf16()
    return torch.bfloat16 if fast else torch.float32


def count(module):
    """Weights of a module; counted once, since every step of an answer asks."""
    if module not in _counted:
        _counted[module] = sum(x.numel() for x in (*module.parameters(), *module.buffers()))
    return _counted[module]


@contextmanager
def suited_to(*modules):
    """Within it torch has the threads that suit `modules`: one if none has LARGE weights.

    A program that uses aqaa keeps its own setting: nothing of this outlives the block, an exception
    included. Whatever is no nn.Module does not count.
    """
    before = torch.get_num_threads()
    sizes = [count(module) for module in modules if isinstance(module, torch.nn.Module)]
    if not sizes or max(sizes) >= LARGE or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def suited(iterator, *modules):
    """The items of `iterator`, each made within `suited_to`; between two the caller's threads."""
    end = object()
    while True:
        with suited_to(*modules):
            item = next(iterator, end)
        if item is end:
            return
        yield item
