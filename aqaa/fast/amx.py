"""Linear layers on the matrix units (AMX) of recent Intel Xeons: fp32, more than twice as fast.

`aqaa.load(..., amx=True)`; `amx.c` is compiled at first use and kept in the user's cache folder.
That takes Linux, such a processor, a C compiler, and twice the memory."""

import atexit
import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from aqaa.files import WriteError, brief, replacing
from aqaa.processor import cpuinfo

SOURCE = Path(__file__).with_name("amx.c")
NEEDED = {"amx_tile", "amx_bf16", "avx512_bf16", "avx512bw", "avx512vl"}  # as Linux writes them
SIDE = 32  # both sizes of a layer are multiples of it
CACHE = 2**19  # bytes of input that meet one stripe of weights after another


class AmxLinear(nn.Linear):
    """x Wᵀ + b, each fp32 factor a sum of two bf16 (`amx.c`); with gradients on nn.Linear's own."""

    def forward(self, x):
        """(..., K) → (..., N). A row's result depends on no other row, nor on how many threads."""
        weight, (n, k) = self.weight, self.weight.shape
        suits = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel()
        if torch.is_grad_enabled() or not suits:
            return super().forward(x)
        mark = weight.data_ptr(), 0 if weight.is_inference() else weight._version
        if getattr(self, "packed_from", None) != mark:  # first use, or other weights since
            self.packed, self.packed_from = tiles(weight.detach()), mark
        flat = x.reshape(-1, k)
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        m, rows = len(flat), max(SIDE, CACHE // (4 * k) // SIDE * SIDE)
        y = x.new_empty(-(-m // SIDE) * SIDE, n)
        room = torch.empty(min(rows, len(y)) * 2 * k, dtype=torch.bfloat16)
        bias = x.new_zeros(n) if self.bias is None else self.bias
        compiled().linear(
            flat.data_ptr(), m, k, flat.stride(0), self.packed.data_ptr(), n, bias.data_ptr(),
            y.data_ptr(), room.data_ptr(), rows, torch.get_num_threads(),
        )  # fmt: skip
        return y[:m].view(*x.shape[:-1], n)


def use(module):
    """Let the linear layers of a part compute by `amx.c`, in place; returns the part. Layers of
    other sizes stay as they are; convolutions too: in the flow they are a tenth of the work, and
    more of their rounding reaches the result. Raises ValueError where there is no AMX."""
    compiled()
    for layer in module.modules():
        if type(layer) is nn.Linear and not any(size % SIDE for size in layer.weight.shape):
            layer.__class__ = AmxLinear
    return module


def halves(x):
    """fp32 -> (hi, lo), two bf16 whose sum is x to 16 of its 24 bits."""
    hi = x.bfloat16()
    return hi, (x - hi).bfloat16()


def tiles(weight):
    """(N, K) fp32 → (N / 32, K / 32, hi or lo, 2, 16, 16, 2) bf16: the order `amx.c` reads."""
    n, k = weight.shape
    pairs = torch.stack(halves(weight)).view(2, n // SIDE, 2, 16, k // SIDE, 16, 2)
    return pairs.permute(1, 4, 0, 2, 5, 3, 6).contiguous()


@functools.cache
def compiled():
    """`amx.c`, compiled and loaded. Raises ValueError, which says what this machine lacks."""
    if lacking := NEEDED - set(cpuinfo("flags").split()):
        names = ", ".join(sorted(lacking))
        raise ValueError(f"this processor has no AMX for bf16 (it lacks {names}): leave amx out.")
    path = _shared_object()
    try:
        code = ctypes.CDLL(str(path))
    except OSError as fault:  # a disk that forbids programs
        raise ValueError(f"{path} cannot be loaded ({brief(fault)}): leave amx out.") from None
    if not code.allowed():
        raise ValueError("the system does not let this process use AMX: leave amx out.")
    kinds = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int}
    code.linear.argtypes = [kinds[letter] for letter in "plllplpppli"]
    code.linear.restype = None
    return code


def _shared_object():
    """The path of the compiled code, made now if it is not there. Raises ValueError.

    It runs with the user's rights, so it is taken from the cache only if nobody but the user and
    root can have written it, and if it is whole (its name ends in its hash). Else it is compiled,
    and used from a folder of this process if the cache can keep nothing safely."""
    threads = sorted(map(str, Path(torch.__file__).parent.glob("lib/libgomp*")))[:1]  # torch's pool
    compiler = shlex.split(os.environ.get("CC", "cc"))
    command = [*compiler, "-O3", "-fopenmp", "-fPIC", "-shared", str(SOURCE), *threads]
    name = f"amx-{_hash(SOURCE.read_bytes() + repr(command).encode())}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aqaa"
    with suppress(OSError):  # nothing can be kept there
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid():
            folder.chmod(0o700)
    for path in folder.glob(f"{name}-*.so") if _only_ours(folder) else ():
        if _only_ours(path) and path.stem.endswith(_hash(path.read_bytes())):
            return path
    made = _compile(command)
    kept = folder / f"{name}-{_hash(made.read_bytes())}.so"
    with suppress(WriteError):
        if _only_ours(folder):
            with replacing(kept, mode=0o700) as part:
                part.write_bytes(made.read_bytes())
            return kept
    return made


def _only_ours(path):
    """Could nobody but this user and root have written it?"""
    try:
        facts = path.stat(), path.lstat()
    except OSError:
        return False
    return facts[0].st_mode & 0o022 == 0 and all(fact.st_uid in (os.getuid(), 0) for fact in facts)


def _compile(command):
    """Run the compiler; returns the path of what it made, in `_private`. Raises ValueError."""
    path, compiler = _private() / "amx.so", command[0]
    try:
        subprocess.run([*command, "-o", str(path)], check=True, capture_output=True)
    except FileNotFoundError:
        raise ValueError(f"amx needs a C compiler, and {compiler} is none: install gcc, or leave "
                         "amx out.") from None
    except subprocess.CalledProcessError as fault:
        lines = fault.stderr.decode(errors="replace").splitlines()
        why = next((line for line in lines if "error" in line), "it gave no reason").strip()
        raise ValueError(f"{compiler} could not compile amx.c ({why}): leave amx out.") from None
    return path


@functools.cache
def _private():
    """A folder that nobody else can enter, for as long as this process lives."""
    folder = Path(tempfile.mkdtemp(prefix="aqaa-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _hash(data):
    return hashlib.sha256(data).hexdigest()[:16]
