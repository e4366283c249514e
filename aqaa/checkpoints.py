"""Weights on disk: one safetensors file a part, beside config.json, tokenizer.json and record.json.

On disk large matrices are fp16, everything small stays fp32; in memory all is fp32. Whatever is wrong with a folder is
said in one sentence (ModelError), and nothing is ever half-written: files are renamed into place.
"""

import hashlib
import importlib
import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from aqaa.config import PRESETS, AQAAConfig
from aqaa.pipeline import AQAA
from aqaa.tokenizers.text import TextTokenizer

PARTS = {  # name of the part: its class, and how its configuration becomes the arguments
    "linguistic": ("aqaa.tokenizers.linguistic", "LinguisticTokenizer"),
    "semantic": ("aqaa.tokenizers.semantic", "SemanticTokenizer"),
    "backbone": ("aqaa.backbone.step1", "Step1ForCausalLM"),
    "flow": ("aqaa.vocoder.flow", "Flow"),
    "hift": ("aqaa.vocoder.hift", "HiFT"),
}
SMALL = 4096  # tensors below this many values stay fp32: they cost nothing
LFS_POINTER = b"version https://git-lfs"


class ModelError(ValueError):
    """Weights that cannot be used; its one sentence names the file, the fault and the remedy."""


# ---- places ---------------------------------------------------------------------------------------------------------


def data_folder():
    """The folder that holds `mini/` and `questions/`: $AQAA_DATA, the clone's `data`, or where pip put it."""
    if named := os.environ.get("AQAA_DATA"):
        return Path(named)
    clone = Path(__file__).resolve().parent.parent / "data"
    return clone if clone.is_dir() else Path(sys.prefix) / "share" / "aqaa"


def find(source):
    """The folder of `source`, which is "mini" or a path. Raises ModelError when there is none."""
    if source == "mini":
        folder = data_folder() / "mini"
        if not folder.is_dir():
            raise ModelError(f"no weights at {folder}: set AQAA_DATA to the `data` folder of a clone of aqaa.")
        return folder
    if source in PRESETS:
        raise ModelError(f"no weights are shipped for preset {source!r}: use mini, or name a folder that holds them.")
    if not Path(source).is_dir():
        raise ModelError(f"unknown preset {str(source)!r}: use mini, or name a folder with config.json and weights.")
    return Path(source)


def device_of(name):
    """torch.device `name`. Raises ModelError for a device that is not here."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ModelError(f"device {str(name)!r} is not usable here: try --device cpu.") from None
    return device


# ---- reading --------------------------------------------------------------------------------------------------------


def load(source="mini", *, device="cpu"):
    """The whole system, ready to answer: source is "mini" or a folder. Parts are read when first used.

    Raises ModelError at once if a file is missing, cut short or damaged.
    """
    folder, device = find(source), device_of(device)
    config = read_config(folder)
    for name in PARTS:
        _check_weights(folder / f"{name}.safetensors")

    def part(name):
        if name == "text":
            return read_text(folder, config.ids.n_text)
        with skip_init():
            module = build(name, config)
        return load_part(folder, name, module).to(device)

    return AQAA(config, part, device=device)


def read_config(folder):
    """AQAAConfig of a folder's config.json. Raises ModelError."""
    path = Path(folder) / "config.json"
    _check_file(path)
    try:
        return AQAAConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as fault:
        raise ModelError(f"{path} is not a configuration of aqaa ({fault}): get the file again.") from None


def read_text(folder, n_text):
    """TextTokenizer of a folder's tokenizer.json, which may use up to n_text ids. Raises ModelError."""
    path = Path(folder) / "tokenizer.json"
    _check_file(path)
    try:
        tokenizer = TextTokenizer.from_file(path)
    except ValueError as fault:
        raise ModelError(f"{path} is damaged ({_brief(fault)}): get the file again.") from None
    if tokenizer.n_text > n_text:
        raise ModelError(f"{path} has {tokenizer.n_text} ids, config.json allows {n_text}: use matching files.")
    return tokenizer


def load_part(folder, name, module):
    """Fill `module` with the weights of folder/name.safetensors; returns it in eval mode. Raises ModelError."""
    path = Path(folder) / f"{name}.safetensors"
    _check_weights(path)
    try:
        module.load_state_dict(load_file(path))
    except RuntimeError as fault:
        detail = str(fault).splitlines()[1:2] or [str(fault)]
        raise ModelError(f"{path} does not fit its configuration ({detail[0].strip()}): use matching files.") from None
    return module.eval()


def build(name, config):
    """An untrained module for the part `name` of an AQAAConfig."""
    home, cls = PARTS[name]
    home = importlib.import_module(home)
    if name == "backbone":
        return home.build(config.backbone)
    if name == "flow":
        return home.Flow(config.flow, config.mel)
    return getattr(home, cls)(getattr(config, name))


class skip_init(TorchFunctionMode):
    """Within it modules are built without drawing random weights, which are about to be overwritten."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return function(*args, **(kwargs or {}))


def _check_file(path):
    if not path.is_file():
        raise ModelError(f"{path} is missing: get the whole folder again, or train it with `aqaa train`.")
    with open(path, "rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ModelError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`.")


def _check_weights(path):
    """Is there a safetensors file at path, whole by its own header? Raises ModelError; reads no weights."""
    _check_file(path)
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as fault:
        raise ModelError(f"{path} is cut short or damaged ({_brief(fault)}): get the file again.") from None


def _brief(fault):
    """The first line of an exception's message, without a closing full stop."""
    return (str(fault).splitlines() or [type(fault).__name__])[0].strip(" .")


# ---- writing --------------------------------------------------------------------------------------------------------


def save(model, folder):
    """Write every part of an AQAA into `folder`, so that `load(folder)` gives it back (matrices rounded to fp16)."""
    folder = Path(folder)
    for name in PARTS:
        save_part(folder, name, getattr(model, name))
    with _replacing(folder / "tokenizer.json") as part:
        model.text.save(part)
    _describe(folder, model.config, {})


def save_part(folder, name, module, meta=None):
    """Write the weights of `module` to folder/name.safetensors; meta (dict of strings) goes into its header."""
    path = Path(folder) / f"{name}.safetensors"
    state = {key: _compact(value.detach().cpu()) for key, value in module.state_dict().items()}
    with _replacing(path) as part:
        save_file(state, part, {"part": name, **{key: str(value) for key, value in (meta or {}).items()}})
    return path


def gather(folder, config, tokenizer, parts, record):
    """Make a model folder of files: `tokenizer`, and parts[name] for each of PARTS. ModelError if one is missing."""
    folder, sources = Path(folder), {"tokenizer.json": Path(tokenizer)}
    sources |= {f"{name}.safetensors": Path(parts[name]) for name in PARTS}
    for path in sources.values():
        _check_file(path)
    for name, path in sources.items():
        with _replacing(folder / name) as part:
            shutil.copyfile(path, part)
    _describe(folder, config, record)


def _describe(folder, config, record):
    """config.json, and record.json with the size and hash of every file."""
    files = {path.name: fingerprint(path) for path in sorted(folder.glob("*.safetensors"))}
    for name, content in (("config", config.to_dict()), ("record", {**record, "files": files})):
        with _replacing(folder / f"{name}.json") as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def fingerprint(path):
    """{"bytes", "sha256"} of a file."""
    with open(path, "rb") as file:
        return {"bytes": os.path.getsize(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def inspect(folder):
    """{"bytes", "sha256", "as_recorded": bool} for every weight file of a folder. Raises ModelError."""
    record_path = Path(folder) / "record.json"
    recorded = json.loads(record_path.read_text()).get("files", {}) if record_path.is_file() else {}
    found = {}
    for name in PARTS:
        path = Path(folder) / f"{name}.safetensors"
        _check_weights(path)
        found[name] = fingerprint(path)
        found[name]["as_recorded"] = recorded.get(path.name) == {k: found[name][k] for k in ("bytes", "sha256")}
    return found


def _compact(tensor):
    """A copy as it goes to disk."""
    half = tensor.is_floating_point() and tensor.numel() >= SMALL and tensor.ndim > 1 and tensor.abs().max() < 6e4
    wanted = torch.float16 if half else torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.to(wanted, copy=True).contiguous()


@contextmanager
def _replacing(path):
    """A temporary path in the same folder that takes the name `path` if all goes well, and goes away if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
