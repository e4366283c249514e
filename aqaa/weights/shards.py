"""A released language model on disk: safetensors shards of any naming, read tensor by tensor.

The few kilobytes at the head of each shard tell names, shapes and sizes, so a folder of 265 GB is
judged in a moment. Weights then go from the mapped file straight to their place in a model built on
the meta device: the memory of the machine holds the model and, at most, a tensor or two."""

import re
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

from aqaa.backbone.quantized_linear import numbers
from aqaa.files import AGAIN, ModelError, check_file, named, parse_json
from aqaa.weights import verify
from aqaa.weights.model_folder import fit
from aqaa.weights.readers import read_json, unusable
from aqaa.weights.verify import all_finite, as_recorded

MAX_HEADER = 100_000_000  # bytes: the limit of the format
LARGE = 2**30  # bytes from which a progress bar is shown
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
CODES = {torch.bfloat16: ("BF16",), torch.uint8: ("U8", "I32"), torch.int8: ("I8",)}  # quantised
WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1,
          "BOOL": 1}  # bytes  # fmt: skip
NUMBER = re.compile(r"(\d+)(?:-of-(\d+))?\.safetensors$")
LAYER = "layers.0.self_attn.q_proj.weight"
KINDS = ("weight", "qweight", "weight_packed")  # plain; ours in 8 bits; compressed-tensors' int4
FIRST = tuple(f"layers.0.self_attn.q_proj.{kind}" for kind in KINDS)
GATES = tuple(f"layers.0.mlp.gate_proj.{kind}" for kind in KINDS)
STANDARD = {".qweight": ".weight_packed", ".scale": ".weight_scale"}  # ours: compressed-tensors'
SHAPE = ".weight_shape"
HEAD = "lm_head.weight"
BODY = re.compile(r"(?:layers\.\d+\.|embed_tokens\.|norm\.).+")


@dataclass(frozen=True)
class Entry:
    """One tensor as a header lists it; dtype as safetensors writes it ("BF16")."""

    path: Path
    dtype: str
    shape: tuple
    bytes: int

    @property
    def numel(self):
        return prod(self.shape)


def in_bytes(size):
    """A size to read: "263.9 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def header(path):
    """{name: Entry} of a shard, from its header alone. ModelError for a pointer, or a cut file."""
    path, entries, end = Path(path), {}, 0
    check_file(path, AGAIN)
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            listed = parse_json(file.read(length)) if length < MAX_HEADER else None
        listed.pop("__metadata__", None)
        for name, row in listed.items():
            start, stop = row["data_offsets"]
            entries[name] = Entry(path, row["dtype"], tuple(row["shape"]), stop - start)
            end = max(end, stop)
        end += 8 + length
        wrong = [name for name, entry in entries.items() if not _fills(entry)]
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        raise unusable(f"{path} has no safetensors header that can be read") from None
    if wrong:
        raise unusable(f"{path} lists {wrong[0]!r:.80} with a shape that its bytes do not fill")
    if size < end:
        raise unusable(f"{path} is cut short, {end - size:,} of its {end:,} bytes are missing")
    return entries


def _fills(entry):
    """Are its bytes what a tensor of its shape takes?"""
    whole = all(type(n) is int and n >= 0 for n in (entry.bytes, *entry.shape))
    if not whole or entry.dtype not in WIDTHS:
        return whole
    return entry.bytes == entry.numel * WIDTHS[entry.dtype]


def scan(folder):
    """{name: Entry} of all shards of a folder: those of its index, or all *.safetensors. Raises
    ModelError for a shard that is missing, broken, or lacks a tensor of the index."""
    folder = Path(folder)
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    placed = _index(index) if index else {}
    files = sorted(set(placed.values()) or (path.name for path in folder.glob("*.safetensors")))
    if not files:
        raise unusable(f"{folder} holds no *.safetensors, the weights of a language model")
    if lost := [name for name in files if not (folder / name).exists()]:
        shards = f"{len(files)} shards that {index.name} lists"
        raise unusable(f"{folder} lacks {named(lost)} of the {shards}")
    if not index and (lost := _gaps(files)):
        raise unusable(f"{folder} lacks shard number {named(lost)}, by the names of the others")
    tensors = {}
    for name in files:
        tensors |= header(folder / name)
    for name, file in placed.items():
        if name not in tensors or tensors[name].path.name != file:
            raise unusable(f"{folder / file} does not hold {name}, which {index.name} puts there")
    return tensors


def _index(path):
    """{tensor name: file name}."""
    rows = read_json(path).get("weight_map")
    try:
        return {str(name): Path(file).name for name, file in rows.items()}
    except (TypeError, AttributeError):
        raise unusable(f"{path} is no index of shards (it has no weight_map)") from None


def _gaps(files):
    """Numbers that the names of some shards promise and no shard has."""
    matches = [match for name in files if (match := NUMBER.search(name))]
    numbers = {int(match[1]) for match in matches}
    if not numbers:
        return []
    first = min(1, *numbers)  # some count from 0
    last = max(int(match[2] or match[1]) for match in matches)
    return sorted(str(n) for n in set(range(first, last + first)) - numbers)


def language_model(tensors, folder):
    """Which tensors are the language model's: ({our name: name in the shards}, [other names]). The
    model is where layer 0 has a q_proj with a gate_proj beside it: vision towers have q_proj layers
    of their own. Raises ModelError when there is none, or more than one."""
    found = prefixes(tensors)
    if len(found) != 1:
        kind = f"{len(found) or 'no'} language models of Step-1's kind"
        sign = f"(*.{LAYER} beside *.{GATES[0]})"
        fix = "name the folder of Step-Audio-AQAA, -Chat or -TTS-3B"
        raise ModelError(f"{folder} holds {kind} {sign}: {fix}.")
    names, others = {}, []
    for name in tensors:
        if (ours := inside(name, found[0])) is None:
            others.append(name)
        elif not name.endswith(SHAPE):  # the codes have it
            names[renamed(ours, back=True)] = name
    return names, others


def prefixes(names):
    """What stands in front of "layers.0." where a layer 0 has a q_proj and a gate_proj."""
    found = [name.removesuffix(end) for end in FIRST for name in names if name.endswith(end)]
    return [prefix for prefix in found if any(prefix + gate in names for gate in GATES)]


def inside(name, prefix):
    """Step-1's name of a tensor of the language model at `prefix`; None for another's."""
    if name.startswith(prefix) and BODY.fullmatch(name[len(prefix) :]):
        return f"model.{name[len(prefix) :]}"
    own = name.endswith(HEAD) and prefix.startswith(name[: -len(HEAD)])
    return HEAD if own else None


def renamed(name, back=False):
    """The name of a quantised layer's tensor in compressed-tensors; back: ours of one of theirs."""
    for pair in STANDARD.items():
        ours, theirs = reversed(pair) if back else pair
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs
    return name


def standard(state):
    """A state of Int4Linear as compressed-tensors has it: the same bytes, eight codes an int32."""
    made = {}
    for name, value in state.items():
        codes = name.endswith(".qweight")
        made[renamed(name)] = value.view(torch.int32) if codes else value
        if codes:  # (N, K)
            shape = torch.tensor([value.shape[0], 2 * value.shape[1]])
            made[name.removesuffix(".qweight") + SHAPE] = shape
    return made


def own(state):
    """The inverse of `standard`."""
    return {renamed(name, back=True): as_codes(value) for name, value in state.items()
            if not name.endswith(SHAPE)}  # fmt: skip


def as_codes(tensor):
    """Bytes of two codes each from words of eight; other tensors as they are."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.int32 else tensor


def check(model, tensors, names, folder):
    """Does a meta-built model have exactly these tensors? Raises ModelError."""
    codes = {name: CODES[code.dtype] for name, code in model.named_buffers()}  # if quantised
    for ours, theirs in names.items():
        entry = tensors[theirs]
        if entry.dtype not in codes.get(ours, DTYPES):
            fix = "take the published weights, in bf16, fp16 or fp32"
            raise ModelError(f"{entry.path} holds {theirs} as {entry.dtype}: {fix}.")
    if "lm_head.weight" not in names:
        raise unusable(f"{folder} lacks lm_head.weight, which is not the embedding in Step-1")
    shapes = {ours: _unpacked(tensors[theirs]) for ours, theirs in names.items()}
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    fit(model, state, folder, "its config.json")


def _unpacked(entry):
    """The shape of an Entry, words of codes as bytes."""
    return (*entry.shape[:-1], 4 * entry.shape[-1]) if entry.dtype == "I32" else entry.shape


def stream(tensors, names):
    """(our name, tensor on the CPU) of `names`, shard by shard; a tensor is a view of the file.
    Raises ModelError at the first tensor of a shard whose hash is not that of record.json, if there
    is one; it is computed while the shard before is read."""
    pairs = sorted(names.items(), key=lambda pair: str(tensors[pair[1]].path))
    total = sum(tensors[theirs].bytes for _, theirs in pairs)
    quiet = None if total > LARGE else True  # None: where nobody looks
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=quiet)
    paths = list(dict.fromkeys(tensors[theirs].path for _, theirs in pairs))
    following = dict(zip(paths, paths[1:]))
    with bar, ThreadPoolExecutor(1) as pool:
        checks = {path: pool.submit(as_recorded, path) for path in paths[:1]}
        for ours, theirs in pairs:
            path = tensors[theirs].path
            if path in checks:
                checks.pop(path).result()
                if path := following.get(path):
                    checks[path] = pool.submit(as_recorded, path)
            with safe_open(tensors[theirs].path, "pt") as file:  # anew: what was copied is unmapped
                tensor = file.get_tensor(theirs)
            yield ours, as_codes(tensor)
            bar.update(tensors[theirs].bytes)


def fill(model, tensors, names, device="cpu", dtype=None):
    """Give a meta-built model its weights, one tensor at a time, all in one dtype (by default that
    of the embedding); buffers, codes and scales of quantised layers, stay as they are."""
    dtype = dtype or DTYPES[tensors[names["model.embed_tokens.weight"]].dtype]
    for name, tensor in stream(tensors, names):
        owner, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner)
        is_code = leaf in owner._buffers
        weight = tensor.to(device) if is_code else tensor.to(device, dtype)
        # looked at where it is fast, and with what the dtype cut off
        if verify.not_finite({name: numbers(model, name, weight)}):
            path, theirs = tensors[names[name]].path, names[name]
            all_finite({theirs: numbers(model, name, tensor)}, path)
            fault = f"{path} has weights in {theirs} too large for {dtype}"
            raise ModelError(f"{fault}: choose bfloat16 or float32.")
        setattr(owner, leaf, weight if is_code else torch.nn.Parameter(weight, requires_grad=False))
    return model.eval()
