"""Loading the whole system: mini from its folder, full from released folders."""
import os

import torch

from aqaa.config import AQAAConfig
from aqaa.fast import amx as matrix_units
from aqaa.fast import prepared
from aqaa.files import ModelError
from aqaa.pipeline import AQAA
from aqaa.weights.model_folder import (
    PARTS,
    ROLES,
    _check_weights,
    _fitting,
    cast,
    find,
    load_part,
    read_config,
    read_text,
)

PREPARED = ("linguistic", "semantic", "backbone", "flow", "hift")  # laid out for a CPU
CAST = ("backbone", "flow")  # parts that `dtype` concerns; codes and phases need fp32


def dtype_of(name):
    """torch.dtype called `name` ("bfloat16"); None stays None. Raises ModelError."""
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if dtype is not None and dtype not in (torch.float32, torch.bfloat16, torch.float16) or name and dtype is None:
        raise ModelError(f"weights cannot be {str(name)!r}: choose float32, bfloat16 or float16.")
    return dtype


def device_of(name):
    """torch.device `name`. Raises ModelError for a device that is not here."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ModelError(f"device {str(name)!r} is not usable here: try --device cpu.") from None
    return device


def load(source="mini", *, tokenizer=None, backbone=None, vocoder=None, speaker=None, device="cpu", dtype=None,
         amx=False):  # fmt: skip
    """The whole system, ready to answer. Parts are read when first used.

    source: "mini", a folder like it, or "full", which takes nothing but released folders (or those
    of $AQAA_TOKENIZER, $AQAA_BACKBONE, $AQAA_VOCODER). tokenizer, backbone, vocoder: released folders
    (Step-Audio-Tokenizer; a Step-1 language model; Step-Audio-TTS-3B's CosyVoice-300M-25Hz), which replace those parts
    of source. speaker: a recording whose voice the released vocoder takes. dtype: of backbone and flow, as "bfloat16";
    by default the backbone keeps that of its files and the flow is fp32. amx: linear layers of tokenizers and flow on
    the matrix units of a recent Xeon (see `aqaa.fast.amx`).

    Raises ModelError at once if a file is missing or cut short, or if the parts do not fit one another; and when a part
    is first used, if it holds a NaN or an infinity, or has not the hash that record.json says.
    """
    device, dtype = device_of(device), dtype_of(dtype)
    if amx and device.type != "cpu":
        raise ModelError(f"amx is a part of processors, and the device is {device}: leave one of them out.")
    if amx:
        try:
            matrix_units.compiled()
        except ValueError as fault:
            raise ModelError(str(fault)) from None
    given = _folders(source, dict(zip(ROLES, (tokenizer, backbone, vocoder))))
    if speaker is not None and "vocoder" not in given:
        raise ModelError("a speaker's voice needs a released vocoder: name its folder with --vocoder.")
    folder, config, sources, voice = None, AQAAConfig(), {}, None
    if len(given) < len(ROLES):
        folder = find(source)
        config = read_config(folder)
    if given:
        from aqaa.weights import released

        sources = released.open_folders(given)
        config = released.combine(config, sources, folder)
        voice = released.voice(given["vocoder"], speaker) if speaker is not None else None
    for name in PARTS:
        if name not in sources:
            _check_weights(folder / f"{name}.safetensors")

    def part(name):
        wanted = dtype if name in CAST else None
        if name in sources:
            found = sources[name].load(device, wanted)
        elif name == "text":
            found = read_text(folder, config.ids.n_text)
        else:
            found = load_part(folder, name, _fitting(folder, name, config))
            found = cast(found, device, wanted, folder / f"{name}.safetensors")
        return prepared.prepare(found, amx) if device.type == "cpu" and name in PREPARED else found

    notes = tuple(found.note for found in sources.values() if found.note)
    return AQAA(config, part, device=device, voice=voice, notes=notes)


def _folders(source, given):
    """The released folders that were named, by role; for "full" the environment may name them. Raises ModelError."""
    if source == "full":
        given = {role: folder or os.environ.get(f"AQAA_{role.upper()}") for role, folder in given.items()}
        if lost := [role for role, folder in given.items() if not folder]:
            options = " and ".join(f"--{role}" for role in lost)
            variables = " and ".join(f"$AQAA_{role.upper()}" for role in lost)
            raise ModelError(
                f"preset 'full' is made of released folders, and {options} names none: add it, or set {variables}."
            )
    return {role: folder for role, folder in given.items() if folder is not None}
