"""Loading the whole system: mini from its folder, full from released folders."""

import torch

from aqaa.config import AQAAConfig
from aqaa.fast import amx as matrix_units
from aqaa.fast import prepared
from aqaa.files import ModelError, passing_on
from aqaa.pipeline import AQAA
from aqaa.weights import model_folder
from aqaa.weights.model_folder import PARTS
from aqaa.weights.sources import ROLES, check_choices, find, released_folders

CAST = ("backbone", "flow")  # parts that `dtype` concerns; codes and phases need fp32


def dtype_of(name):
    """torch.dtype called `name` ("bfloat16"); None stays None. Raises ModelError."""
    name = str(name).removeprefix("torch.") if name else None
    check_choices({}, "", dtype=name)
    return name and getattr(torch, name)


def device_of(name):
    """torch.device `name`. Raises ModelError for a device that is not here."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ModelError(f"device {str(name)!r} is not usable here: try --device cpu.") from None
    return device


def load(
    source="mini", *, tokenizer=None, backbone=None, vocoder=None, speaker=None, device="cpu",
    dtype=None, amx=False,
):  # fmt: skip
    """The whole system, ready to answer. Parts are read when first used.

    source: "mini", a folder like it, or "full", which takes nothing but released folders (or those
    of $AQAA_TOKENIZER, $AQAA_BACKBONE, $AQAA_VOCODER). tokenizer, backbone, vocoder: released
    folders (Step-Audio-Tokenizer; a Step-1 language model; Step-Audio-TTS-3B's
    CosyVoice-300M-25Hz), which replace those parts of source. speaker: a recording whose voice the
    released vocoder takes. dtype: of backbone and flow, as "bfloat16"; by default the backbone
    keeps that of its files and the flow is fp32. amx: linear layers of tokenizers and flow on the
    matrix units of a recent Xeon (see `aqaa.fast.amx`).

    Raises ModelError at once if a file is missing or cut short, or if the parts do not fit one
    another; and when a part is first used, if it holds a NaN or an infinity, or has not the hash
    that record.json says."""
    device, dtype = device_of(device), dtype_of(dtype)
    given = released_folders(source, dict(zip(ROLES, (tokenizer, backbone, vocoder))))
    check_choices(given, str(device), amx=amx, speaker=speaker)
    if amx:
        with passing_on():
            matrix_units.compiled()
    folder, config, sources, voice = None, AQAAConfig(), {}, None
    if len(given) < len(ROLES):  # some parts come from a folder like the mini
        folder = find(source)
        config = model_folder.read_config(folder)
    if given:
        from aqaa.weights import released  # it imports transformers

        sources = released.open_folders(given)
        config = released.combine(config, sources, folder)
        voice = released.voice(given["vocoder"], speaker) if speaker is not None else None
    own = [name for name in model_folder.parts_in(folder) if name not in sources] if folder else []
    # Phone heads fit the tokenizers beside them alone; eyes and turns the backbone.
    beside = model_folder.EXTRA_BESIDE
    own = [name for name in own if not beside.get(name, set()) & set(sources)]
    for name in own:  # headers only: a broken file is told before the first part is read
        model_folder.read_header(folder / f"{name}.safetensors")

    def part(name):
        if name not in own and name in model_folder.EXTRA:
            raise KeyError(name)
        wanted = dtype if name in CAST else None
        if name in sources:
            module = sources[name].load(device, wanted)
        elif name == "text":
            module = model_folder.read_text(folder, config.ids.n_text)
        else:
            module = model_folder.read_part(folder, name, config, device, wanted)
        laid_out = device.type == "cpu" and name in PARTS
        return prepared.prepare(module, amx) if laid_out else module

    notes = tuple(source.note for source in sources.values() if source.note)
    return AQAA(config, part, device=device, voice=voice, notes=notes)
