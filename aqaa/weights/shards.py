"""A released language model on disk: safetensors shards of any naming, known by their headers, read tensor by tensor.

The few kilobytes at the head of each shard tell names, shapes and sizes, so a folder of 265 GB is judged in a moment.
Weights then go from the mapped file straight to their place in a model built on the meta device: the memory of the
machine holds the model and, at most, a tensor or two.
"""

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
from aqaa.files import AGAIN, ModelError, check_file, named, parse_json, read_json
from aqaa.weights import verify
from aqaa.weights.model_folder import fit
from aqaa.weights.verify import all_finite, as_recorded

MAX_HEADER = 100_000_000  # bytes: the limit of the format
LARGE = 2**30  # bytes from which a progress bar is shown
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
CODES = {torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8"}  # of quantised layers
WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}  # bytes
NUMBER = re.compile(r"(\d+)(?:-of-(\d+))?\.safetensors$")
LAYER = "layers.0.self_attn.q_proj.weight"
QUANTIZED = "layers.0.self_attn.q_proj.qweight"  # by `aqaa convert`


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
    """{name: Entry} of one shard, from its header alone. Raises ModelError for a pointer, a cut or a foreign file."""
    path = Path(path)
    check_file(path, AGAIN)
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            listed = parse_json(file.read(length)) if length < MAX_HEADER else None
        listed.pop("__metadata__", None)
        ends = [row["data_offsets"] for row in listed.values()]
        rows = {name: (row["dtype"], tuple(row["shape"]), b - a) for (name, row), (a, b) in zip(listed.items(), ends)}
        end = 8 + length + max((b for _, b in ends), default=0)
        wrong = [name for name, row in rows.items() if not _fills(*row)]
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        raise ModelError(f"{path} has no safetensors header that can be read: {AGAIN}.") from None
    if wrong:
        raise ModelError(f"{path} lists {wrong[0]!r:.80} with a shape that its bytes do not fill: {AGAIN}.")
    if size < end:
        raise ModelError(f"{path} is cut short, {end - size:,} of its {end:,} bytes are missing: {AGAIN}.")
    return {name: Entry(path, *row) for name, row in rows.items()}


def _fills(dtype, shape, size):
    """Are `size` bytes what a tensor of this shape takes?"""
    counts = all(type(number) is int and number >= 0 for number in (size, *shape))
    return counts and (dtype not in WIDTHS or size == prod(shape) * WIDTHS[dtype])


def scan(folder):
    """{name: Entry} of all shards of a folder, as its index lists them, or all *.safetensors where there is none.

    Raises ModelError for a shard that is missing, broken, or without a tensor that the index puts there.
    """
    folder = Path(folder)
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    placed = _index(index) if index else {}
    files = sorted(set(placed.values())) or sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no *.safetensors, the weights of a language model: {AGAIN}.")
    if lost := [name for name in files if not (folder / name).exists()]:
        raise ModelError(f"{folder} lacks {named(lost)} of the {len(files)} shards that {index.name} lists: {AGAIN}.")
    if not index and (lost := _gaps(files)):
        raise ModelError(f"{folder} lacks shard number {named(lost)}, going by the names of the others: {AGAIN}.")
    tensors = {}
    for name in files:
        tensors |= header(folder / name)
    for name, file in placed.items():
        if name not in tensors or tensors[name].path.name != file:
            raise ModelError(f"{folder / file} does not hold {name}, which {index.name} puts there: {AGAIN}.")
    return tensors


def _index(path):
    """{tensor name: file name}."""
    check_file(path, AGAIN)
    try:
        return {str(name): Path(file).name for name, file in read_json(path)["weight_map"].items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ModelError(f"{path} is no index of shards (it has no weight_map): {AGAIN}.") from None


def _gaps(files):
    """Numbers that the names of some shards promise and no shard has."""
    found = [NUMBER.search(name) for name in files]
    numbers = {int(match[1]) for match in found if match}
    last = max((int(match[2] or match[1]) for match in found if match), default=0)
    first = min(1, *numbers) if numbers else 1
    return sorted(str(n) for n in set(range(first, last + first)) - numbers) if numbers else []


def language_model(tensors, folder):
    """Which tensors are the language model's: ({our name: name in the shards}, [names that belong to other parts]).

    The model is where layer 0 has a q_proj with a gate_proj beside it: vision towers have q_proj layers of their own.
    Raises ModelError when there is none, or more than one.
    """
    found = [name.removesuffix(layer) for layer in (LAYER, QUANTIZED) for name in tensors if name.endswith(layer)]
    beside = ("layers.0.mlp.gate_proj.weight", "layers.0.mlp.gate_proj.qweight")
    found = [prefix for prefix in found if any(prefix + gate in tensors for gate in beside)]
    if len(found) != 1:
        raise ModelError(f"{folder} holds {len(found) or 'no'} language models of Step-1's kind (*.{LAYER} beside "
                         "*.layers.0.mlp.gate_proj.weight): name the folder of Step-Audio-AQAA, -Chat or -TTS-3B.")
    (prefix,) = found
    body = re.compile(re.escape(prefix) + r"((?:layers\.\d+\.|embed_tokens\.|norm\.).+)")
    names, others = {}, []
    for name in tensors:
        if inside := body.fullmatch(name):
            names["model." + inside[1]] = name
        elif name.endswith("lm_head.weight") and prefix.startswith(name.removesuffix("lm_head.weight")):
            names["lm_head.weight"] = name
        else:
            others.append(name)
    return names, others


def check(model, tensors, names, folder):
    """Does a meta-built model have exactly these tensors? Raises ModelError."""
    codes = {name: (CODES[code.dtype],) for name, code in model.named_buffers()}  # of quantised layers
    foreign = [theirs for ours, theirs in names.items() if tensors[theirs].dtype not in codes.get(ours, DTYPES)]
    if foreign:
        entry = tensors[foreign[0]]
        raise ModelError(f"{entry.path} holds {foreign[0]} as {entry.dtype}: this loader takes the published weights, "
                         "in bf16, fp16 or fp32.")
    if "lm_head.weight" not in names:
        raise ModelError(f"{folder} lacks lm_head.weight, and Step-1's output layer is not its embedding: {AGAIN}.")
    fit(model, {ours: torch.empty(tensors[theirs].shape, device="meta") for ours, theirs in names.items()},
        folder, "its config.json")  # fmt: skip


def stream(tensors, names):
    """(our name, tensor on the CPU) for each of `names`, shard by shard; a tensor is a view of the mapped file.

    Raises ModelError at the first tensor of a shard whose hash is not that of record.json, if there is one; it is
    computed while the shard before is read.
    """
    pairs = sorted(names.items(), key=lambda pair: str(tensors[pair[1]].path))
    total = sum(tensors[theirs].bytes for theirs in names.values())
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=None if total > LARGE else True)
    paths = list(dict.fromkeys(tensors[theirs].path for _, theirs in pairs))
    with bar, ThreadPoolExecutor(1) as pool:
        following = dict(zip(paths, paths[1:]))
        checks = {path: pool.submit(as_recorded, path) for path in paths[:1]}
        for ours, theirs in pairs:
            path = tensors[theirs].path
            if path in checks:
                checks.pop(path).result()
                checks |= {path: pool.submit(as_recorded, path) for path in [following.get(path)] if path}
            with safe_open(path, "pt") as file:  # for each anew: what was copied is unmapped again
                tensor = file.get_tensor(theirs)
            yield ours, tensor
            bar.update(tensors[theirs].bytes)


def fill(model, tensors, names, device="cpu", dtype=None):
    """Give a meta-built model its weights, one tensor at a time, all in one dtype (as the embedding's, by default);
    what it holds as buffers, codes and scales of quantised layers, stays as it is."""
    dtype = dtype or DTYPES[tensors[names["model.embed_tokens.weight"]].dtype]
    for name, tensor in stream(tensors, names):
        owner, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner)
        kept = leaf in owner._buffers
        weight = tensor.to(device) if kept else tensor.to(device, dtype)
        if verify.not_finite({name: numbers(model, name, weight)}):  # where it is fast, and with what the dtype cut off
            path = tensors[names[name]].path
            all_finite({names[name]: numbers(model, name, tensor)}, path)
            raise ModelError(f"{path} has weights in {names[name]} too large for {dtype}: choose bfloat16 or float32.")
        setattr(owner, leaf, weight if kept else torch.nn.Parameter(weight, requires_grad=False))
    return model.eval()
