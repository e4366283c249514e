"""Reads the released S3 tokenizer (`speech_tokenizer_v1.onnx`) without the onnx package.

The exporter renamed most tensors (`onnx::MatMul_1123`), so a tensor is told by the node that
consumes it. The file is mapped and its tensors are views of it: to look at them costs no memory.
"""

import mmap
import re
from pathlib import Path

import numpy as np
import torch

from aqaa.config import SemanticConfig
from aqaa.tokenizers.protobuf import fields, integers

DTYPES = {1: np.float32, 10: np.float16, 11: np.float64}  # TensorProto.data_type
LONGEST_NAME = 10_000  # bytes
HEAD_SIZE = 64  # of the published network
WANTED = "version 1 at 25 Hz, from Step-Audio-Tokenizer,"

NODES = {  # consuming node -> our name of the tensor
    r"/blocks\.(\d+)/attn/(query|key|value|out)/MatMul": "encoder.blocks.{0}.attn.{1}.weight",
    r"/blocks\.(\d+)/attn/(query|value|out)/Add": "encoder.blocks.{0}.attn.{1}.bias",
    r"/blocks\.(\d+)/mlp/mlp\.([02])/MatMul": "encoder.blocks.{0}.mlp.{1}.weight",
    r"/blocks\.(\d+)/mlp/mlp\.([02])/Add": "encoder.blocks.{0}.mlp.{1}.bias",
    r"/blocks\.(\d+)/(attn_ln|mlp_ln)/Mul": "encoder.blocks.{0}.{1}.weight",
    r"/blocks\.(\d+)/(attn_ln|mlp_ln)/Add_1": "encoder.blocks.{0}.{1}.bias",
    r"/quantizer/rq/model/layers\.0/_codebook/Pow_1": "quantizer._codebook.embed",
}
FAULTS = (LookupError, TypeError, ValueError, OverflowError, MemoryError, RuntimeError)


def read(path, n_audio_head=None):
    """(SemanticConfig, state dict) of an S3 v1 25 Hz network; heads, unless told, are 64 wide.

    Raises FileNotFoundError, and ValueError when the file is not such a network, as version 2 and
    the 50 Hz variant of version 1 are not.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name speech_tokenizer_v1.onnx.")
    try:
        with open(path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        graph = next((value for number, value in fields(data) if number == 7), b"")
        tensors, nodes, strides = _parts(graph)
    except FAULTS as fault:
        raise ValueError(f"{path} is no ONNX file ({fault}): download it again.") from None
    version_2 = any("fsmn" in node for node, _ in nodes)
    if version_2 or 1 in strides:
        fact = "version 2 of the S3 tokenizer" if version_2 else "the 50 Hz S3 tokenizer"
        raise ValueError(f"{path} is {fact}: {WANTED} is needed.")
    state = _state(tensors, nodes)
    needed = ("encoder.conv1.weight", "encoder.positional_embedding", "quantizer._codebook.embed")
    for name in needed:
        if name not in state:
            raise ValueError(f"{path} is no 25 Hz S3 tokenizer: it has no {name}.")
    conv, positions, codebook = (state[name] for name in needed)
    size, n_mels, _ = conv.shape
    heads = n_audio_head or max(1, size // HEAD_SIZE)
    layers = sum(name.endswith(".attn.key.weight") for name in state)
    config = SemanticConfig(len(codebook), n_mels, len(positions), size, heads, layers)
    return config, state


def _parts(graph):
    """({tensor name: tensor}, [(node name, input names)], [stride of each convolution])."""
    tensors, nodes, strides = {}, [], []
    for number, value in fields(graph):
        if number == 5:  # GraphProto.initializer
            name, tensor = _tensor(value)
            if tensor is not None:
                tensors[name] = tensor
        elif number == 1:  # GraphProto.node: 1 input, 3 name, 4 op_type, 5 attribute
            parts = list(fields(value))
            name = next((_text(part) for n, part in parts if n == 3), "")
            nodes.append((name, [_text(part) for n, part in parts if n == 1]))
            if (4, b"Conv") in parts:
                strides.append(_stride([list(fields(part)) for n, part in parts if n == 5]))
    return tensors, nodes, strides


def _text(value):
    """A string field; bytes() of a number would be that many zeros."""
    if isinstance(value, int) or len(value) > LONGEST_NAME:
        raise ValueError("a name is no name")
    return bytes(value).decode()


def _integers(value):
    """A repeated whole number is written one by one, or packed."""
    return [value] if isinstance(value, int) else list(integers(value))


def _stride(attributes):
    """The first number of the attribute `strides`, 1 where there is none."""
    for parts in attributes:  # AttributeProto: 1 name, 8 ints
        if (1, b"strides") in parts:
            return next((_integers(value)[0] for number, value in parts if number == 8), 1)
    return 1


def _tensor(data):
    """TensorProto -> (name, float32 tensor), None for a tensor of integers."""
    parts = list(fields(data))  # 1 dims, 2 data_type, 4 float_data, 8 name, 9 raw_data
    last = dict(parts)
    name, kind, raw = _text(last.get(8, b"")), last.get(2, 0), last.get(9)
    if kind not in DTYPES:
        return name, None
    shape = [size for number, value in parts if number == 1 for size in _integers(value)]
    floats = [np.frombuffer(value, np.float32) for number, value in parts if number == 4]
    floats.append(np.zeros(0, np.float32))
    array = np.concatenate(floats) if raw is None else np.frombuffer(raw, DTYPES[kind])
    return name, torch.from_numpy(array.astype(np.float32, copy=False).reshape(shape))


def _state(tensors, nodes):
    """The tensors by our names; linear weights and the codebook are stored transposed."""
    state = {}
    for name, tensor in tensors.items():
        if re.fullmatch(r"encoders\.(positional_embedding|conv[12]\.(weight|bias))", name):
            state[name.replace("encoders.", "encoder.")] = tensor
    for node, inputs in nodes:
        stored = next((tensors[i] for i in inputs if i in tensors and tensors[i].ndim), None)
        for pattern, name in NODES.items():
            match = re.fullmatch(pattern, node)
            if match and stored is not None:
                state[name.format(*match.groups())] = stored.T if stored.ndim == 2 else stored
    return state
