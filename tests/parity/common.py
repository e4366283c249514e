"""What every kind of fixture needs: reading it, and comparing with the tolerance that it states."""

import json
import lzma

import torch
from safetensors.torch import load as load_bytes

from aqaa.fast import amx

AMX = False  # parts on the matrix units of a Xeon: `python -m tests.parity --amx FOLDER`
MARGIN = 1e-4  # a code may differ where the second nearest entry is this close


def ready(module):
    """A part as it is checked."""
    return amx.use(module.eval()) if AMX else module.eval()


def load(path):
    """(meta, state_dict, inputs, outputs) of `<path>.json` and `<path>.safetensors`.

    Tensors are keyed without their `sd.`, `in.`, `out.` prefix.
    """
    meta = json.loads(path.with_name(path.name + ".json").read_text(encoding="utf-8"))
    tensors = load_tensors(path.with_name(path.name + ".safetensors"))
    parts = [{k[len(p):]: v for k, v in tensors.items() if k.startswith(p)} for p in ("sd.", "in.", "out.")]
    return meta, *parts


def load_tensors(path):
    """The tensors of `path`, or of `path`.xz: the fixtures that this repository carries are compressed."""
    packed = path.with_name(path.name + ".xz")
    return load_bytes(path.read_bytes() if path.exists() else lzma.decompress(packed.read_bytes()))


def max_error(got, want):
    """Largest absolute difference; infinite when the shapes differ, NaN stays NaN."""
    got, want = torch.as_tensor(got), torch.as_tensor(want)
    if got.numel() == want.numel() == 0:
        return 0.0  # an empty result has no shape worth comparing
    if tuple(got.shape) != tuple(want.shape):
        return float("inf")
    return (got.detach().cpu().double() - want.double()).abs().max().item()


def compare(name, got, want, meta):
    """(name, max_error, allowed) with `allowed` from meta["tolerance"][name] (0 for exact outputs)."""
    tolerance = meta["tolerance"][name]
    return name, max_error(got, want), 0.0 if tolerance.get("exact") else tolerance["suggested_atol"]


def compare_codes(name, got, want, margin=None):
    """(name, number of wrong codes, 0): a difference counts unless its margin is below MARGIN."""
    if got.numel() != want.numel():
        return name, float("inf"), 0.0
    wrong = got.reshape(want.shape).cpu() != want
    if margin is not None:
        wrong &= margin.reshape(wrong.shape) >= MARGIN
    return name, wrong.sum().item(), 0.0
