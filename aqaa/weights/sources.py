"""Which weights are meant: presets, folders, and what their names alone tell. Needs no torch."""

import os
from pathlib import Path

from aqaa.config import PRESETS
from aqaa.files import ModelError, data_folder

RELEASED = {  # role of a released folder: what it holds
    "tokenizer": "Step-Audio-Tokenizer",
    "backbone": "Step-Audio-AQAA or another Step-1 model",
    "vocoder": "CosyVoice-300M-25Hz of Step-Audio-TTS-3B",
}
ROLES = tuple(RELEASED)
SIGNS = {  # role: files that tell it
    "tokenizer": ("linguistic_tokenizer.npy", "dengcunqin"),
    "backbone": ("*.safetensors", "*.safetensors.index.json", "tokenizer.model"),
    "vocoder": ("flow.pt", "hift.pt", "cosyvoice.yaml"),
}
DTYPES = ("float32", "bfloat16", "float16")


def find(source):
    """The folder of `source`, which is "mini" or a path. Raises ModelError when there is none."""
    folder = data_folder() / "mini" if source == "mini" else Path(source)
    if source in PRESETS and source != "mini":
        fault = f"no weights are shipped for preset {source!r}"
        raise ModelError(f"{fault}: use mini, or name the released folders.")
    if not folder.is_dir() and source == "mini":
        fault = f"no weights at {folder}"
        raise ModelError(f"{fault}: set AQAA_DATA to the `data` folder of a clone of aqaa.")
    if not folder.is_dir():
        fault = f"unknown preset {str(source)!r}"
        raise ModelError(f"{fault}: use mini, or name a folder with config.json and weights.")
    return folder


def roles(folder):
    """What a folder can stand in for, by the names of its files."""
    return [role for role, signs in SIGNS.items() if any(any(folder.glob(sign)) for sign in signs)]


def released_folders(source, given):
    """The folders named in {role: folder or None}; for preset "full" $AQAA_ROLE names the others.
    Raises ModelError if "full" lacks one."""
    if source == "full":
        variables = {role: f"AQAA_{role.upper()}" for role in given}
        given = {role: folder or os.environ.get(variables[role]) for role, folder in given.items()}
        if lost := [role for role, folder in given.items() if not folder]:
            fault = f"{' and '.join(f'--{role}' for role in lost)} names none"
            remedy = f"add it, or set {' and '.join(f'${variables[role]}' for role in lost)}"
            raise ModelError(f"preset 'full' is made of released folders, and {fault}: {remedy}.")
    return {role: folder for role, folder in given.items() if folder is not None}


def check_choices(named, device, dtype=None, amx=False, speaker=None):
    """Raise ModelError for a dtype that weights cannot have, or choices that exclude each other.
    named: released folders by role; device, dtype: names."""
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"weights cannot be {dtype!r}: choose float32, bfloat16 or float16.")
    if amx and not device.startswith("cpu"):
        fault = f"amx is a part of processors, and the device is {device}"
        raise ModelError(f"{fault}: leave one of them out.")
    if speaker is not None and "vocoder" not in named:
        fault = "a speaker's voice needs a released vocoder"
        raise ModelError(f"{fault}: name its folder with --vocoder.")
