"""Weights on disk: one safetensors file a part, beside config.json, tokenizer.json, record.json.

On disk large matrices are fp16 and everything small is fp32; in memory all is fp32. A faulty folder
gets one sentence (ModelError), and nothing is ever half-written: files are renamed into place."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from aqaa import files
from aqaa.backbone.layers import PlainStep1
from aqaa.backbone.lora import Turns
from aqaa.backbone.quantized_linear import empty_linears, format_in, format_within, numbers
from aqaa.backbone.vision import Vision
from aqaa.fast import prepared
from aqaa.files import AGAIN, ModelError, check_file, fingerprint, named, refusing, replacing
from aqaa.tokenizers.linguistic import LinguisticTokenizer
from aqaa.tokenizers.phones import PhoneHeads
from aqaa.tokenizers.semantic import SemanticTokenizer
from aqaa.tokenizers.text import TextTokenizer
from aqaa.vocoder.flow import Flow
from aqaa.vocoder.hift import HiFT
from aqaa.weights import verify
from aqaa.weights.verify import all_finite, as_recorded, recorded, skip_init

PARTS = {  # name of the part, and of its file: its class
    "linguistic": LinguisticTokenizer, "semantic": SemanticTokenizer, "backbone": PlainStep1,
    "flow": Flow, "hift": HiFT,
}  # fmt: skip
EXTRA = {"heads": PhoneHeads, "vision": Vision, "turns": Turns}  # a folder may lack these
# What each was trained on and fits alone.
EXTRA_BESIDE = {"heads": {"linguistic", "semantic"}, "vision": {"backbone"}, "turns": {"backbone"}}
SMALL = 4096  # tensors below this many values stay fp32: they cost nothing
ANEW, MATCHING = "get the file again", "use matching files"


def read_config(folder):
    """AQAAConfig of a folder's config.json. Raises ModelError."""
    path = Path(folder) / "config.json"
    check_file(path)
    with refusing(f"{path} is not a configuration of aqaa", ANEW, ValueError):
        data = files.read_json(path)
        if not isinstance(data, dict) or "model_type" not in data:
            return verify.settings(data)
    raise ModelError(f"{folder} is a language model alone: name it with --backbone, not --preset.")


def read_text(folder, n_text):
    """TextTokenizer of a folder's tokenizer.json, of up to n_text ids. Raises ModelError."""
    path = Path(folder) / "tokenizer.json"
    check_file(path)
    with refusing(f"{path} is damaged", ANEW, ValueError):
        tokenizer = TextTokenizer.from_file(path)
    if tokenizer.n_text > n_text:
        counts = f"{tokenizer.n_text} ids, config.json allows {n_text}"
        raise ModelError(f"{path} has {counts}: {MATCHING}.")
    return tokenizer


def read_header(path):
    """(metadata, number of tensors) by the header of a safetensors file. Raises ModelError."""
    check_file(path)
    with refusing(f"{path} is cut short or damaged", ANEW, SafetensorError, OSError):
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, len(file.keys())


def parts_in(folder):
    """Names of the parts that a folder has to have, and of those of EXTRA that it has."""
    return [*PARTS, *(name for name in EXTRA if Path(folder, f"{name}.safetensors").exists())]


def read_part(folder, name, config, device, dtype):
    """The part `name` of an AQAAConfig with its weights, in eval mode. Raises ModelError. The
    module never takes more memory than its file has weights for."""
    path = Path(folder) / f"{name}.safetensors"
    _, count = read_header(path)
    with refusing(f"{path} does not fit config.json", MATCHING, *verify.BROKEN):
        with skip_init(count, path.stat().st_size):
            module = build(name, config, plain=True)
    return cast(load_part(folder, name, module), device, dtype, path)


def load_part(folder, name, module):
    """Fill `module` from folder/name.safetensors; returns it in eval mode. Raises ModelError."""
    path = Path(folder) / f"{name}.safetensors"
    metadata, _ = read_header(path)
    if how := metadata.get("quantization"):  # by `aqaa convert`
        with refusing(f"{path} is quantised in no way that is known", AGAIN, ValueError):
            empty_linears(module, **format_in(files.parse_json(how)), device="cpu")
    fit(module, load_file(path), path)
    as_recorded(path)
    return module.eval()


def build(name, config, plain=False):
    """An untrained part `name` of an AQAAConfig; with `plain` a backbone is its layers alone."""
    if name == "backbone" and not plain:
        from aqaa.backbone import step1  # transformers takes seconds to import

        return step1.build(config.backbone)
    if name == "flow":
        return Flow(config.flow, config.mel)
    return EXTRA[name](config) if name in EXTRA else PARTS[name](getattr(config, name))


def cast(module, device, dtype, path):
    """module.to(device, dtype). Raises ModelError if that makes an infinity of a weight."""
    module = module.to(device, dtype)
    if dtype is torch.float16 and (fault := verify.not_finite(module.state_dict())):
        fault = f"{path} has weights too large for float16 ({fault})"
        raise ModelError(f"{fault}: choose bfloat16 or float32.")
    return module


def fit(module, state, path, config="its configuration"):
    """load_state_dict; ModelError for what is missing, left over, of another shape, or infinite."""
    try:
        missing, extra = module.load_state_dict(state, strict=False)
        detail = f"it lacks {named(missing)}" if missing else ""
        detail = detail or (f"there is no place for {named(extra)}" if extra else "")
    except RuntimeError as fault:
        detail = (str(fault).splitlines()[1:2] or [str(fault)])[0].strip(" \t.")
    if detail:
        raise ModelError(f"{path} does not fit {config} ({detail}): {MATCHING}.")
    all_finite({name: numbers(module, name, tensor) for name, tensor in state.items()}, path)


def check_parts(folder):
    """Read every weight of a folder; ModelError unless all are there, finite, and as recorded."""
    for name in parts_in(folder):
        path = Path(folder) / f"{name}.safetensors"
        read_header(path)
        all_finite(load_file(path), path)
        as_recorded(path)


def inspect(folder):
    """{part: {"bytes", "sha256", "as_recorded": bool}} of a folder. Raises ModelError."""
    expected = recorded(folder)
    rows = {}
    for name in parts_in(folder):
        path = Path(folder) / f"{name}.safetensors"
        read_header(path)
        facts = fingerprint(path)
        rows[name] = {**facts, "as_recorded": expected.get(path.name) == facts}
    return rows


def save(model, folder):
    """Write every part of an AQAA into `folder`, for `load(folder)`; matrices become fp16."""
    folder = Path(folder)
    for name in (*PARTS, *EXTRA):
        if (part := getattr(model, name)) is not None:
            save_part(folder, name, part)
    with replacing(folder / "tokenizer.json") as part:
        model.text.save(part)
    _describe(folder, model.config, {})


def save_part(folder, name, module, meta=None):
    """Write the weights of `module` to folder/name.safetensors; returns its path. meta: a dict."""
    path = Path(folder) / f"{name}.safetensors"
    state = prepared.unprepared(module).items()
    state = {key: _compact(value.detach().cpu()) for key, value in state}
    meta = {"part": name, **(meta or {})}
    # Alone: several entries are written in any order, and equal modules should give equal bytes.
    if quantization := format_within(module):
        meta = {"quantization": json.dumps(quantization)}
    with replacing(path) as part:
        save_file(state, part, {key: str(value) for key, value in meta.items()})
    return path


def gather(folder, config, tokenizer, parts, record):
    """Make a model folder of files: `tokenizer`, and parts[name] for each of PARTS, or also of
    EXTRA. Raises ModelError before anything is written if one is missing, or is not finite."""
    folder, given = Path(folder), {"tokenizer.json": Path(tokenizer)}
    names = [*PARTS, *(name for name in EXTRA if name in parts)]
    given |= {f"{name}.safetensors": Path(parts[name]) for name in names}
    for path in given.values():
        check_file(path)
    for name in names:
        all_finite(load_file(parts[name]), parts[name])
    for name in EXTRA.keys() - parts.keys():  # of other weights
        (folder / f"{name}.safetensors").unlink(missing_ok=True)
    for name, path in given.items():
        with replacing(folder / name) as part:
            shutil.copyfile(path, part)
    _describe(folder, config, record)


def _describe(folder, config, record):
    """config.json, and record.json with the size and hash of every file."""
    facts = {path.name: fingerprint(path) for path in sorted(folder.glob("*.safetensors"))}
    files.write_json(folder / "config.json", config.to_dict())
    files.write_json(folder / "record.json", {**record, "files": facts})


def _compact(tensor):
    """A copy as it goes to disk; bfloat16, which fp16 could not hold, stays."""
    dtype = tensor.dtype
    if tensor.is_floating_point() and dtype != torch.bfloat16:
        large = tensor.numel() >= SMALL and tensor.ndim > 1
        dtype = torch.float16 if large and tensor.abs().max() < 6e4 else torch.float32
    return tensor.to(dtype, copy=True).contiguous()
