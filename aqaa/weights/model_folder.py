"""Weights on disk: one safetensors file a part, beside config.json, tokenizer.json, record.json.

On disk large matrices are fp16 and everything small is fp32; in memory all is fp32. A faulty folder
gets one sentence (ModelError), and nothing is ever half-written: files are renamed into place.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from aqaa.backbone.layers import PlainStep1
from aqaa.backbone.quantized_linear import empty_linears, format_in, format_within, numbers
from aqaa.fast import prepared
from aqaa.files import (
    AGAIN,
    ModelError,
    brief,
    check_file,
    fingerprint,
    named,
    parse_json,
    read_json,
    replacing,
    write_json,
)
from aqaa.tokenizers.linguistic import LinguisticTokenizer
from aqaa.tokenizers.semantic import SemanticTokenizer
from aqaa.tokenizers.text import TextTokenizer
from aqaa.vocoder.flow import Flow
from aqaa.vocoder.hift import HiFT
from aqaa.weights import sources, verify
from aqaa.weights.verify import all_finite, as_recorded, recorded, skip_init

ROLES, find = sources.ROLES, sources.find

PARTS = {  # name of the part, and of its file: its class
    "linguistic": LinguisticTokenizer,
    "semantic": SemanticTokenizer,
    "backbone": PlainStep1,
    "flow": Flow,
    "hift": HiFT,
}
SMALL = 4096  # tensors below this many values stay fp32: they cost nothing


# ---- reading ------------------------------------------------------------------------------------


def read_config(folder):
    """AQAAConfig of a folder's config.json. Raises ModelError."""
    path = Path(folder) / "config.json"
    check_file(path)
    try:
        data = read_json(path)
        if not isinstance(data, dict) or "model_type" not in data:
            return verify.settings(data)
    except ValueError as fault:
        sentence = f"{path} is not a configuration of aqaa ({fault}): get the file again."
        raise ModelError(sentence) from None
    raise ModelError(f"{folder} is a language model alone: name it with --backbone, not --preset.")


def read_text(folder, n_text):
    """TextTokenizer of a folder's tokenizer.json, of up to n_text ids. Raises ModelError."""
    path = Path(folder) / "tokenizer.json"
    check_file(path)
    try:
        tokenizer = TextTokenizer.from_file(path)
    except ValueError as fault:
        raise ModelError(f"{path} is damaged ({brief(fault)}): get the file again.") from None
    if tokenizer.n_text > n_text:
        counts = f"{tokenizer.n_text} ids, config.json allows {n_text}"
        raise ModelError(f"{path} has {counts}: use matching files.")
    return tokenizer


def read_header(path):
    """(metadata, number of tensors) of a safetensors file that is whole by its header.

    Raises ModelError; reads no weights.
    """
    check_file(path)
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, len(file.keys())
    except (SafetensorError, OSError) as fault:
        fault = f"is cut short or damaged ({brief(fault)})"
        raise ModelError(f"{path} {fault}: get the file again.") from None


def read_part(folder, name, config, device, dtype):
    """The part `name` of an AQAAConfig with its weights, in eval mode. Raises ModelError.

    The module never takes more memory than its file has weights for.
    """
    path = Path(folder) / f"{name}.safetensors"
    _, count = read_header(path)
    try:
        with skip_init(count, path.stat().st_size):
            module = build(name, config, plain=True)
    except verify.BROKEN as fault:
        fault = f"does not fit config.json ({brief(fault)})"
        raise ModelError(f"{path} {fault}: use matching files.") from None
    return cast(load_part(folder, name, module), device, dtype, path)


def load_part(folder, name, module):
    """Fill `module` from folder/name.safetensors; returns it in eval mode. Raises ModelError."""
    path = Path(folder) / f"{name}.safetensors"
    metadata, _ = read_header(path)
    if how := metadata.get("quantization"):  # by `aqaa convert`
        try:
            empty_linears(module, **format_in(parse_json(how)), device="cpu")
        except ValueError as fault:
            fault = f"is quantised in no way that is known ({brief(fault)})"
            raise ModelError(f"{path} {fault}: {AGAIN}.") from None
    fit(module, load_file(path), path)
    as_recorded(path)
    return module.eval()


def build(name, config, plain=False):
    """An untrained module for the part `name` of an AQAAConfig.

    The backbone is a transformers model, or with `plain` its layers alone.
    """
    if name == "backbone" and not plain:
        from aqaa.backbone import step1  # transformers takes seconds to import

        return step1.build(config.backbone)
    if name == "flow":
        return Flow(config.flow, config.mel)
    return PARTS[name](getattr(config, name))


def cast(module, device, dtype, path):
    """module.to(device, dtype). Raises ModelError if that makes an infinity of a weight."""
    module = module.to(device, dtype)
    if dtype is torch.float16 and (fault := verify.not_finite(module.state_dict())):
        fault = f"has weights too large for float16 ({fault})"
        raise ModelError(f"{path} {fault}: choose bfloat16 or float32.")
    return module


def fit(module, state, path, config="its configuration"):
    """load_state_dict, strictly, with finite numbers only. Raises ModelError.

    Its sentence names what is missing, left over, of another shape, or no finite number.
    """
    try:
        missing, extra = module.load_state_dict(state, strict=False)
        detail = f"it lacks {named(missing)}" if missing else ""
        detail = detail or (f"there is no place for {named(extra)}" if extra else "")
    except RuntimeError as fault:
        detail = (str(fault).splitlines()[1:2] or [str(fault)])[0].strip(" \t.")
    if detail:
        raise ModelError(f"{path} does not fit {config} ({detail}): use matching files.")
    all_finite({name: numbers(module, name, tensor) for name, tensor in state.items()}, path)


def check_parts(folder):
    """Raise ModelError unless all parts of a folder are there, finite, and as recorded.

    Reads every weight.
    """
    for name in PARTS:
        path = Path(folder) / f"{name}.safetensors"
        read_header(path)
        all_finite(load_file(path), path)
        as_recorded(path)


def inspect(folder):
    """{part: {"bytes", "sha256", "as_recorded": bool}} of a folder. Raises ModelError."""
    expected = recorded(folder)
    rows = {}
    for name in PARTS:
        path = Path(folder) / f"{name}.safetensors"
        read_header(path)
        facts = fingerprint(path)
        rows[name] = {**facts, "as_recorded": expected.get(path.name) == facts}
    return rows


# ---- writing ------------------------------------------------------------------------------------


def save(model, folder):
    """Write every part of an AQAA into `folder`, for `load(folder)`; matrices become fp16."""
    folder = Path(folder)
    for name in PARTS:
        save_part(folder, name, getattr(model, name))
    with replacing(folder / "tokenizer.json") as part:
        model.text.save(part)
    _describe(folder, model.config, {})


def save_part(folder, name, module, meta=None):
    """Write the weights of `module` to folder/name.safetensors; returns its path.

    meta: dict of what its header says.
    """
    path = Path(folder) / f"{name}.safetensors"
    state = prepared.unprepared(module)
    state = {key: _compact(value.detach().cpu()) for key, value in state.items()}
    # Alone: several entries are written in any order, and equal modules should give equal bytes.
    quantization = format_within(module)
    meta = {"part": name, **(meta or {})}
    meta = {"quantization": json.dumps(quantization)} if quantization else meta
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


def _compact(tensor):
    """A copy as it goes to disk; bfloat16, which fp16 could not hold, stays."""
    if tensor.dtype == torch.bfloat16:
        return tensor.clone(memory_format=torch.contiguous_format)
    dtype = tensor.dtype
    if tensor.is_floating_point():
        large = tensor.numel() >= SMALL and tensor.ndim > 1
        dtype = torch.float16 if large and tensor.abs().max() < 6e4 else torch.float32
    return tensor.to(dtype, copy=True).contiguous()
