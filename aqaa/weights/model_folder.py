"""Weights on disk: one safetensors file a part, beside config.json, tokenizer.json and record.json.

On disk large matrices are fp16, everything small stays fp32; in memory all is fp32. Whatever is wrong with a folder is
said in one sentence (ModelError), and nothing is ever half-written: files are renamed into place.
"""

import importlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from aqaa.backbone.layers import PlainStep1
from aqaa.backbone.quantized_linear import empty_linears, format_in, format_within, numbers
from aqaa.config import PRESETS
from aqaa.fast import prepared
from aqaa.files import AGAIN, ModelError, brief, check_file, data_folder, fingerprint, named, replacing, write_json
from aqaa.tokenizers.text import TextTokenizer
from aqaa.weights import verify
from aqaa.weights.verify import all_finite, as_recorded, recorded, skip_init

ROLES = ("tokenizer", "backbone", "vocoder")  # what a released folder can stand in for

PARTS = {  # name of the part: its class, and how its configuration becomes the arguments
    "linguistic": ("aqaa.tokenizers.linguistic", "LinguisticTokenizer"),
    "semantic": ("aqaa.tokenizers.semantic", "SemanticTokenizer"),
    "backbone": ("aqaa.backbone.step1", "Step1ForCausalLM"),
    "flow": ("aqaa.vocoder.flow", "Flow"),
    "hift": ("aqaa.vocoder.hift", "HiFT"),
}
SMALL = 4096  # tensors below this many values stay fp32: they cost nothing


# ---- places ---------------------------------------------------------------------------------------------------------


def find(source):
    """The folder of `source`, which is "mini" or a path. Raises ModelError when there is none."""
    if source == "mini":
        folder = data_folder() / "mini"
        if not folder.is_dir():
            raise ModelError(f"no weights at {folder}: set AQAA_DATA to the `data` folder of a clone of aqaa.")
        return folder
    if source in PRESETS:
        raise ModelError(f"no weights are shipped for preset {source!r}: use mini, or name the released folders.")
    if not Path(source).is_dir():
        raise ModelError(f"unknown preset {str(source)!r}: use mini, or name a folder with config.json and weights.")
    return Path(source)


# ---- reading --------------------------------------------------------------------------------------------------------


def read_config(folder):
    """AQAAConfig of a folder's config.json. Raises ModelError."""
    path = Path(folder) / "config.json"
    check_file(path)
    try:
        data = verify.read_json(path)
        if not isinstance(data, dict) or "model_type" not in data:
            return verify.settings(data)
    except ValueError as fault:
        raise ModelError(f"{path} is not a configuration of aqaa ({fault}): get the file again.") from None
    raise ModelError(f"{folder} is a language model alone: name it with --backbone, not --preset.")


def read_text(folder, n_text):
    """TextTokenizer of a folder's tokenizer.json, which may use up to n_text ids. Raises ModelError."""
    path = Path(folder) / "tokenizer.json"
    check_file(path)
    try:
        tokenizer = TextTokenizer.from_file(path)
    except ValueError as fault:
        raise ModelError(f"{path} is damaged ({brief(fault)}): get the file again.") from None
    if tokenizer.n_text > n_text:
        raise ModelError(f"{path} has {tokenizer.n_text} ids, config.json allows {n_text}: use matching files.")
    return tokenizer


def load_part(folder, name, module):
    """Fill `module` with the weights of folder/name.safetensors; returns it in eval mode. Raises ModelError."""
    path = Path(folder) / f"{name}.safetensors"
    _check_weights(path)
    with safe_open(path, "pt") as file:
        how = (file.metadata() or {}).get("quantization")
    if how:  # by `aqaa convert`
        try:
            empty_linears(module, **format_in(verify.parse(how)), device="cpu")
        except ValueError as fault:
            raise ModelError(f"{path} is quantised in no way that is known ({brief(fault)}): {AGAIN}.") from None
    fit(module, load_file(path), path)
    as_recorded(path)
    return module.eval()


def _fitting(folder, name, config):
    """An untrained module for load_part, no larger than the file has weights for. Raises ModelError."""
    path = folder / f"{name}.safetensors"
    _check_weights(path)
    with safe_open(path, "pt") as file:
        room = len(file.keys()), path.stat().st_size
    try:
        with skip_init(*room):
            return PlainStep1(config.backbone) if name == "backbone" else build(name, config)
    except verify.BROKEN as fault:
        raise ModelError(f"{path} does not fit config.json ({brief(fault)}): use matching files.") from None


def cast(module, device, dtype, path):
    """module.to(device, dtype). Raises ModelError if that makes an infinity of a weight."""
    module = module.to(device, dtype)
    if dtype is torch.float16 and (fault := verify.not_finite(module.state_dict())):
        raise ModelError(f"{path} has weights too large for float16 ({fault}): choose bfloat16 or float32.")
    return module


def fit(module, state, path, config="its configuration"):
    """load_state_dict, strictly: ModelError tells what is missing, left over, of another shape, or no finite number."""
    try:
        missing, extra = module.load_state_dict(state, strict=False)
    except RuntimeError as fault:
        detail = (str(fault).splitlines()[1:2] or [str(fault)])[0].strip(" \t.")
        raise ModelError(f"{path} does not fit {config} ({detail}): use matching files.") from None
    for names, has in ((missing, "it lacks"), (extra, "there is no place for")):
        if names:
            raise ModelError(f"{path} does not fit {config} ({has} {named(names)}): use matching files.")
    all_finite({name: numbers(module, name, tensor) for name, tensor in state.items()}, path)


def build(name, config):
    """An untrained module for the part `name` of an AQAAConfig."""
    home, cls = PARTS[name]
    home = importlib.import_module(home)
    if name == "backbone":
        return home.build(config.backbone)
    if name == "flow":
        return home.Flow(config.flow, config.mel)
    return getattr(home, cls)(getattr(config, name))


def _check_weights(path):
    """Is there a safetensors file at path, whole by its own header? Raises ModelError; reads no weights."""
    check_file(path)
    try:
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as fault:
        raise ModelError(f"{path} is cut short or damaged ({brief(fault)}): get the file again.") from None


def check_parts(folder):
    """Are all parts of a folder there, with finite numbers, and as recorded? Raises ModelError; reads every weight."""
    for name in PARTS:
        path = Path(folder) / f"{name}.safetensors"
        _check_weights(path)
        all_finite(load_file(path), path)
        as_recorded(path)


# ---- writing --------------------------------------------------------------------------------------------------------


def save(model, folder):
    """Write every part of an AQAA into `folder`, so that `load(folder)` gives it back (matrices rounded to fp16)."""
    folder = Path(folder)
    for name in PARTS:
        save_part(folder, name, getattr(model, name))
    with replacing(folder / "tokenizer.json") as part:
        model.text.save(part)
    _describe(folder, model.config, {})


def save_part(folder, name, module, meta=None):
    """Write the weights of `module` to folder/name.safetensors; meta (dict of strings) goes into its header."""
    path = Path(folder) / f"{name}.safetensors"
    state = {key: _compact(value.detach().cpu()) for key, value in prepared.unprepared(module).items()}
    how = format_within(module)  # said alone: several entries are written in any order, and bytes should repeat
    meta = {"quantization": json.dumps(how)} if how else {"part": name, **(meta or {})}
    with replacing(path) as part:
        save_file(state, part, {key: str(value) for key, value in meta.items()})
    return path


def gather(folder, config, tokenizer, parts, record):
    """Make a model folder of files: `tokenizer`, and parts[name] for each of PARTS.

    Raises ModelError before anything is written if one is missing, or holds a NaN or an infinity.
    """
    folder, sources = Path(folder), {"tokenizer.json": Path(tokenizer)}
    sources |= {f"{name}.safetensors": Path(parts[name]) for name in PARTS}
    for path in sources.values():
        check_file(path)
    for name in PARTS:
        all_finite(load_file(parts[name]), parts[name])
    for name, path in sources.items():
        with replacing(folder / name) as part:
            shutil.copyfile(path, part)
    _describe(folder, config, record)


def _describe(folder, config, record):
    """config.json, and record.json with the size and hash of every file."""
    files = {path.name: fingerprint(path) for path in sorted(folder.glob("*.safetensors"))}
    for name, content in (("config", config.to_dict()), ("record", {**record, "files": files})):
        write_json(folder / f"{name}.json", content)


def inspect(folder):
    """{"bytes", "sha256", "as_recorded": bool} for every weight file of a folder. Raises ModelError."""
    listed = recorded(folder)
    found = {}
    for name in PARTS:
        path = Path(folder) / f"{name}.safetensors"
        _check_weights(path)
        found[name] = fingerprint(path)
        found[name]["as_recorded"] = listed.get(path.name) == {k: found[name][k] for k in ("bytes", "sha256")}
    return found


def _compact(tensor):
    """A copy as it goes to disk; bfloat16, which fp16 could not hold, stays."""
    if tensor.dtype == torch.bfloat16:
        return tensor.clone(memory_format=torch.contiguous_format)
    half = tensor.is_floating_point() and tensor.numel() >= SMALL and tensor.ndim > 1 and tensor.abs().max() < 6e4
    wanted = torch.float16 if half else torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.to(wanted, copy=True).contiguous()
