"""What this processor can do, and threads that survive a fork."""

import os
from pathlib import Path

import torch

# what oneDNN calls the processors without bf16
NO_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")

# A forked child has no threads but its own, and would wait for ever for those that its parent had started. Without
# parallel regions it waits for none, so a child computes on one thread, and must not ask for more.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def cpuinfo(name):
    """The entry `name` ("flags", "model name") of the first processor in Linux's /proc/cpuinfo; "" elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def has_bf16():
    """Does this processor multiply in bf16 (AVX512-BF16 or AMX)? Imitated, it is ten times slower than fp32.

    $ATEN_CPU_CAPABILITY and $ONEDNN_MAX_CPU_ISA, which switch such units off, count as if there were none.
    """
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in NO_BF16:
        return False
    return "AVX512" in torch.backends.cpu.get_cpu_capability() and bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def precision(device):
    """torch.bfloat16 where `device` multiplies it (a GPU, or a processor with `has_bf16`), else torch.float32."""
    return torch.bfloat16 if torch.device(device).type != "cpu" or has_bf16() else torch.float32
