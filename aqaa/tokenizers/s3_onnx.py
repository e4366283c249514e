"""Reads the released S3 tokenizer (`speech_tokenizer_v1.onnx`) without the onnx package.

The exporter renamed most tensors (`onnx::MatMul_1123`), so a tensor is told by the node that consumes it. Of the
protobuf format only what this needs is understood: a message is a list of (field number, value). The file is mapped,
and its tensors are views of it: to look at them costs no memory.
"""

import mmap
import re
from pathlib import Path

import numpy as np
import torch

from aqaa.config import SemanticConfig

DTYPES = {1: np.float32, 10: np.float16, 11: np.float64}  # TensorProto.data_type
GRAPH, NODE, INITIALIZER = 7, 1, 5  # field numbers: ModelProto.graph, GraphProto.node, GraphProto.initializer
LONGEST_NAME = 10_000  # bytes
HEAD_SIZE = 64  # of the published network

NODES = {  # consuming node -> our name of the tensor
    r"/blocks\.(\d+)/attn/(query|key|value|out)/MatMul": "encoder.blocks.{0}.attn.{1}.weight",
    r"/blocks\.(\d+)/attn/(query|value|out)/Add": "encoder.blocks.{0}.attn.{1}.bias",
    r"/blocks\.(\d+)/mlp/mlp\.([02])/MatMul": "encoder.blocks.{0}.mlp.{1}.weight",
    r"/blocks\.(\d+)/mlp/mlp\.([02])/Add": "encoder.blocks.{0}.mlp.{1}.bias",
    r"/blocks\.(\d+)/(attn_ln|mlp_ln)/Mul": "encoder.blocks.{0}.{1}.weight",
    r"/blocks\.(\d+)/(attn_ln|mlp_ln)/Add_1": "encoder.blocks.{0}.{1}.bias",
    r"/quantizer/rq/model/layers\.0/_codebook/Pow_1": "quantizer._codebook.embed",
}


def read(path, n_audio_head=None):
    """(SemanticConfig, state dict) of an S3 v1 25 Hz network. Heads are not in the file: 64 wide unless told.

    Raises FileNotFoundError, and ValueError when the file is not such a network; the 50 Hz variant of version 1 and
    version 2, which would give other codes, are told by their convolutions.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name the released speech_tokenizer_v1.onnx.")
    try:
        with open(path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        graph = next(v for number, v in fields(data) if number == GRAPH)
        tensors, nodes, strides = _parts(graph)
    except (StopIteration, LookupError, TypeError, ValueError, OverflowError, MemoryError, RuntimeError) as fault:
        raise ValueError(f"{path} is no ONNX file ({fault or 'no graph'}): download it again.") from None
    if any("fsmn" in node for node, _ in nodes):
        raise ValueError(f"{path} is version 2 of the S3 tokenizer: version 1 at 25 Hz is needed, from Step-Audio.")
    if 1 in strides:
        raise ValueError(f"{path} is the 50 Hz S3 tokenizer: the one at 25 Hz is needed, from Step-Audio-Tokenizer.")
    state = _state(tensors, nodes)
    needed = ("encoder.conv1.weight", "encoder.positional_embedding", "quantizer._codebook.embed")
    missing = [name for name in needed if name not in state]
    if missing:
        raise ValueError(f"{path} is no 25 Hz S3 tokenizer: it has no {missing[0]}.")
    size, n_mels, _ = state["encoder.conv1.weight"].shape
    config = SemanticConfig(
        n_codebook_size=len(state["quantizer._codebook.embed"]),
        n_mels=n_mels,
        n_audio_ctx=len(state["encoder.positional_embedding"]),
        n_audio_state=size,
        n_audio_head=n_audio_head or max(1, size // HEAD_SIZE),
        n_audio_layer=len([name for name in state if name.endswith(".attn.key.weight")]),
    )
    return config, state


def fields(data):
    """The (field number, value) pairs of a protobuf message: int for a varint, memoryview for anything else."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == 0:
            value, place = _varint(data, place)
        else:
            if kind not in (1, 2, 5):
                raise ValueError(f"it has a field of kind {kind}")
            size, place = _varint(data, place) if kind == 2 else ({1: 8, 5: 4}[kind], place)
            value, place = data[place : place + size], place + size
            if len(value) < size:
                raise ValueError("it is cut off")
        yield key >> 3, value


def _varint(data, place):
    value = shift = 0
    while True:
        if shift >= 70:  # ten bytes hold 64 bits; longer ones would be summed in quadratic time
            raise ValueError("a number is too long")
        byte = data[place]
        value |= (byte & 127) << shift
        shift, place = shift + 7, place + 1
        if byte < 128:
            return value, place


def _parts(graph):
    """({tensor name: tensor}, [(node name, input names)], [stride of each convolution])."""
    tensors, nodes, strides = {}, [], []
    for number, value in fields(graph):
        if number == INITIALIZER:
            name, tensor = _tensor(value)
            if tensor is not None:
                tensors[name] = tensor
        elif number == NODE:
            parts = list(fields(value))
            name = next((_text(v) for n, v in parts if n == 3), "")
            nodes.append((name, [_text(v) for n, v in parts if n == 1]))
            if (4, b"Conv") in parts:
                strides.append(_stride([list(fields(v)) for n, v in parts if n == 5]))
    return tensors, nodes, strides


def _text(value):
    """A string field; bytes() of a number would be that many zeros."""
    if isinstance(value, int) or len(value) > LONGEST_NAME:
        raise ValueError("a name is no name")
    return bytes(value).decode()


def _stride(attributes):
    """The first number of the attribute `strides`, 1 where there is none."""
    ints = [v for parts in attributes if (1, b"strides") in parts for n, v in parts if n == 8]
    return next((v if isinstance(v, int) else _packed(v)[0] for v in ints), 1)


def _tensor(data):
    """TensorProto -> (name, float32 tensor), None for a tensor of integers."""
    shape, name, kind, raw, floats = [], "", 0, None, []
    for number, value in fields(data):
        if number == 1:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif number == 2:
            kind = value
        elif number == 4:
            floats.append(np.frombuffer(value, np.float32))
        elif number == 8:
            name = _text(value)
        elif number == 9:
            raw = value
    if kind not in DTYPES:
        return name, None
    array = np.frombuffer(raw, DTYPES[kind]) if raw is not None else np.concatenate(floats or [np.zeros(0)])
    return name, torch.from_numpy(array.astype(np.float32, copy=False).reshape(shape))


def _packed(data):
    values, place = [], 0
    while place < len(data):
        value, place = _varint(data, place)
        values.append(value)
    return values


def _state(tensors, nodes):
    """Our names. Linear weights and the codebook are stored transposed (views here); the positional table is not."""
    state = {}
    for name, tensor in tensors.items():
        if name == "encoders.positional_embedding" or re.fullmatch(r"encoders\.conv[12]\.(weight|bias)", name):
            state[name.replace("encoders.", "encoder.")] = tensor
    for node, inputs in nodes:
        for pattern, name in NODES.items():
            found = re.fullmatch(pattern, node)
            stored = next((tensors[i] for i in inputs if i in tensors and tensors[i].ndim), None)
            if found and stored is not None:
                state[name.format(*found.groups())] = stored.T if stored.ndim == 2 else stored
    return state
