"""What a backbone needs on given GPUs, and how fast it talks at most, from first principles.

A decoding step has three least times: its bytes (every weight once, keys and values so far) by the
bandwidth, the instructions of our kernels by those that a card can issue, the multiplications by
the peak of the tensor cores. The longest is the least time of a token, its inverse the ceiling. How
much of it is reached is measured (plan_table.measured reads recorded runs) or not known. Left out,
so a ceiling stays one: what GPUs tell one another, launches, sampling. No torch here."""

import json
import tomllib
from bisect import bisect_left
from dataclasses import dataclass, fields, replace
from math import ceil
from pathlib import Path

from aqaa import config
from aqaa.backbone import memory
from aqaa.config import GROUP_SECONDS, GROUP_SIZE, TOKENS_PER_SECOND, check_group

TEXT_BLOCK, AUDIO_BLOCK = 10, 15  # ids: the layout of an answer (AQAA Table 1, best row)
BLOCK = TEXT_BLOCK + AUDIO_BLOCK
BLOCK_SECONDS = AUDIO_BLOCK / GROUP_SIZE * GROUP_SECONDS  # 0.36
INTERLEAVE_RATE = TOKENS_PER_SECOND * BLOCK / AUDIO_BLOCK  # 69.4 ids a second while text lasts
TEXT_RATE = 5.0  # text ids in a second of speech
SPOKEN_RATE = TOKENS_PER_SECOND + TEXT_RATE  # 46.7 ids a second, over a whole answer

RANKS = (1, 2, 4, 8)  # GPUs of a node that share each layer
# (all, on integer units) for a weight and one row of activations, in the loops of
# aqaa/fast/triton_kernels.py as Triton 3.6 compiles them for sm_90; tests/test_kernels.py counts.
INSTRUCTIONS = {"int4": (1.51, 0.96), "int8": (4.08, 1.42), "fp8": (8.80, 4.50)}
LANES = 128  # instructions that a multiprocessor issues at a clock, at most
PROMPT = 100  # ids of a prompt beside the question
RESERVED = 1.5  # GiB a GPU, an allowance: the driver's context, graphs, workspaces
MANY = 1 << 30  # listeners, more than any card holds
SPEECH_PARTS = {"full": 400e6 * 4, "mini": 13e6 * 4}  # bytes of tokenizers, flow, HiFT, about


@dataclass(frozen=True)
class Gpu:
    """One card; cards.toml has those that are known, and units."""

    name: str
    memory: float
    bandwidth: float
    bf16: float
    fp8: float
    cores: int
    clock: float
    integer: float


_CARDS = tomllib.loads(Path(__file__).with_name("cards.toml").read_text(encoding="utf-8"))
GPUS = {name: Gpu(name, *numbers) for name, numbers in _CARDS.items()}
SHOWN = ("model", "gpus", "nodes", "listeners", "weights", "group", "context")  # in JSON
USUAL = ("1xH100-80", "1xH200", "2xH200", "4xH100-80", "8xH100-80", "8xH200", "4xA800-80")
SMALL = ("1xRTX-4090", "1xL40S", "1xA100-80", "1xH100-80", "1xH200")  # where one card holds it


@dataclass(frozen=True)
class Setup:
    """A model on GPUs of one kind, in a weight format, with a context. count GPUs share each layer;
    nodes of so many follow one another, each with a part of the layers (pipeline parallelism)."""

    model: str
    backbone: config.BackboneConfig
    gpu: Gpu
    count: int
    weights: str = "bf16"
    group: int | None = None  # of int4
    context: int = 2048  # ids of each listener
    listeners: int = 1  # at once
    nodes: int = 1
    price: float | None = None  # of a GPU for an hour, in any currency

    @property
    def format(self):
        return f"{self.weights} g{self.group}" if self.group else self.weights

    @property
    def gpus(self):
        return f"{self.count}x{self.gpu.name}"

    @property
    def rows(self):
        """Listeners in one pass: as many passes as nodes are under way, so that each is busy."""
        return ceil(self.listeners / self.nodes)


@dataclass(frozen=True)
class Measured:
    """What a recorded run reached: shares of the ceiling and of the least time to read a prompt."""

    file: str
    rate: float
    prefill: float | None = None
    vocoder: float | None = None  # s of work for 1 s of sound
    note: str = ""  # on what was measured


@dataclass(frozen=True)
class Plan:
    """Memory in GiB of the fullest GPU, GB of a pass, times in s, rates of a listener in ids/s."""

    setup: Setup
    parameters: int  # of the backbone
    memory: dict  # weights, embedding, cache, buffers, speech, reserved
    total: float  # their sum
    spare: float  # below 0: it does not fit
    streamed: float  # GB that one pass reads, caches included, over all GPUs
    least: dict  # s a token by bytes, instructions, operations
    floor: float  # the longest of them
    ceiling: float
    rate: float | None  # None: not measured
    first_sound: dict  # {seconds of question: s}; at least, where not measured
    delay: dict  # {seconds of answer: s of late start}; at least, where not measured
    most_listeners: int  # that memory and ceiling allow, in real time
    cost: float | None  # of an hour of speech at `price`; at least, where not measured
    measured: Measured | None

    @property
    def fits(self):
        return self.spare >= 0

    def enough(self, needed):
        """Whether `needed` ids a second are reached; None: at most, but not measured."""
        if self.rate is None and self.ceiling >= needed:
            return None
        return self.rate is not None and self.rate >= needed

    @property
    def steady(self):  # audio alone keeps up with speech: 41.67 a second
        return self.enough(TOKENS_PER_SECOND)

    @property
    def interleave(self):  # blocks of text and audio do: 69.4 a second, one block of buffer
        return self.enough(INTERLEAVE_RATE)

    def to_dict(self):
        """As JSON wants it: numbers rounded to 5 digits, keys as text."""
        facts = {name: getattr(self.setup, name) for name in SHOWN}
        facts |= {name: getattr(self, name) for name in ("fits", "steady", "interleave")}
        facts |= {item.name: getattr(self, item.name) for item in fields(self)[1:-1]}
        text = json.dumps(facts | {"measured": self.measured and self.measured.file})
        return json.loads(text, parse_float=lambda number: round(float(number), 5))


def streamed_bytes(backbone, weights, group=None, context=0):
    """Bytes that one decoding step reads: linear layers, lm_head, norms, cache of `context` ids."""
    linear = memory.linear_bytes(backbone, weights, group)
    others = memory.table_bytes(backbone) + memory.norm_bytes(backbone)
    return linear + others + context * memory.cache_bytes(backbone)


def peak(setup):
    """Operations a second of the tensor cores of a node: fp8 weights multiply natively."""
    gpu = setup.gpu
    return (setup.weights == "fp8" and gpu.fp8 or gpu.bf16) * 1e12 * setup.count


def prefill_seconds(setup, n_ids):
    """Least time to read a prompt: operations at the peak, and unpacking of packed weights."""
    backbone, gpu = setup.backbone, setup.gpu
    operations = 2 * memory.n_linear(backbone)[0] * n_ids
    # attention: every id looks at those before it, so half of the products are masked
    operations += 2 * backbone.num_hidden_layers * backbone.hidden_size * n_ids**2
    moved = memory.linear_bytes(backbone, setup.weights, setup.group)
    native = setup.weights == "fp8" and gpu.fp8  # as vLLM does; our own layers unpack fp8
    if setup.weights == "bf16" or native:  # read while they multiply
        return max(operations / peak(setup), moved / (gpu.bandwidth * 1e12 * setup.count))
    moved += 2 * memory.linear_bytes(backbone, "bf16")  # unpacked, written and read again
    return operations / peak(setup) + moved / (gpu.bandwidth * 1e12 * setup.count)


def least_seconds(setup):
    """{"bytes", "instructions", "operations"}: least s of a pass, an id for each of its listeners.
    instructions: of our kernels, which multiply for one listener; 0 where others do."""
    backbone, gpu, ids = setup.backbone, setup.gpu, setup.rows * setup.context
    streamed = streamed_bytes(backbone, setup.weights, setup.group, ids)
    weights, width = memory.n_linear(backbone)[0], backbone.hidden_size
    products = weights + backbone.vocab_size * width
    products += 2 * backbone.num_hidden_layers * width * setup.context  # attention
    all_kinds, integer = INSTRUCTIONS.get(setup.weights, (0, 0)) if setup.rows == 1 else (0, 0)
    slots = gpu.cores * LANES * gpu.clock * 1e9 * setup.count
    issued = weights * max(all_kinds, integer / gpu.integer)
    return {
        "bytes": streamed / (gpu.bandwidth * 1e12 * setup.count),
        "instructions": issued / slots if slots else 0.0,
        "operations": 2 * setup.rows * products / peak(setup),
    }


def start_delay(rate, seconds):
    """How late (s) an answer of `seconds` must start, with ids at `rate` a second, never to stall.
    Blocks of text and audio until the text is used up, then audio alone, each played once whole."""
    text, delay = TEXT_RATE * seconds, 0.0
    for k in range(ceil(seconds / BLOCK_SECONDS - 1e-9)):
        n_ids = min((k + 1) * TEXT_BLOCK, text) + (k + 1) * AUDIO_BLOCK  # made with block k
        delay = max(delay, n_ids / rate - k * BLOCK_SECONDS)
    return delay


def memory_parts(setup):
    """{part: bytes} of the fullest GPU."""
    backbone, ranks, layers = setup.backbone, setup.count, setup.backbone.num_hidden_layers
    held = ceil(layers / setup.nodes) / layers  # of the layers, by the fullest node
    head = memory.table_bytes(backbone) if setup.nodes == 1 else 0  # else on the last node
    linear = memory.linear_bytes(backbone, setup.weights, setup.group)
    ids = setup.listeners * setup.context
    return {
        "weights": (held * linear + head) / ranks + held * memory.norm_bytes(backbone),
        "embedding": memory.table_bytes(backbone),  # whole on every GPU
        "cache": held * ids * memory.cache_bytes(backbone) / ranks,
        "buffers": memory.buffer_bytes(backbone, setup.weights, setup.context, ranks),
        "speech": SPEECH_PARTS["mini" if backbone.hidden_size < 1024 else "full"],
        "reserved": RESERVED * memory.GIB,
    }


def most_listeners(setup):
    """How many listeners memory and ceilings allow at once, each in real time; 0: not one."""

    def possible(count):
        more = replace(setup, listeners=count)
        least = least_seconds(more)  # whoever multiplies: our kernels are for one row
        fits = sum(memory_parts(more).values()) <= setup.gpu.memory * memory.GIB
        return fits and max(least["bytes"], least["operations"]) <= 1 / SPOKEN_RATE

    return bisect_left(range(1, MANY), True, key=lambda count: not possible(count))


def plan(setup, measured=None):
    """The Plan of a Setup; measured: what a run of just this reached. Raises as check_ranks."""
    check_ranks(setup)
    backbone = setup.backbone
    parts = {name: size / memory.GIB for name, size in memory_parts(setup).items()}
    total, least = sum(parts.values()), least_seconds(setup)
    floor = max(least.values())
    rate = measured and measured.rate / floor
    pace = rate or 1 / floor
    ids = setup.rows * setup.context
    streamed = streamed_bytes(backbone, setup.weights, setup.group, ids) / 1e9

    def first_sound(seconds):
        """Of a question of so many seconds: prefill, a block, vocoding if that was measured."""
        prefill = prefill_seconds(setup, ceil(seconds * TOKENS_PER_SECOND) + PROMPT)
        prefill /= measured and measured.prefill or 1
        vocoder = measured and measured.vocoder or 0
        return prefill + BLOCK / pace + vocoder * BLOCK_SECONDS

    cost = setup.price and setup.price * setup.count * setup.nodes * SPOKEN_RATE / pace
    return Plan(setup, int(memory.resident_bytes(backbone, "bf16")) // 2, parts, total,
                setup.gpu.memory - total, streamed, least, floor, 1 / floor, rate,
                {seconds: first_sound(seconds) for seconds in (3, 10)},
                {seconds: start_delay(pace, seconds) for seconds in (5, 10, 20)},
                most_listeners(setup), cost and cost / setup.listeners, measured)  # fmt: skip


def check_ranks(setup):
    """Raise ValueError if setup.count GPUs cannot share heads, groups, widths or int4 groups, or
    setup.nodes the layers."""
    backbone, ranks = setup.backbone, setup.count
    heads, groups = backbone.num_attention_heads, backbone.num_attention_groups
    width, inner = backbone.hidden_size, backbone.intermediate_size
    possible = [n for n in RANKS if not (heads % n or groups % n or inner % n)]
    if ranks not in possible:
        fault = f"{ranks} GPUs cannot share {heads} attention heads, {groups} key-value groups"
        nodes = ", or give nodes of so many each with --nodes" if ranks > max(RANKS) else ""
        raise ValueError(f"{fault}, {inner} inner values: use {', '.join(map(str, possible))}"
                         f"{nodes}.")  # fmt: skip
    if setup.nodes > (layers := backbone.num_hidden_layers):
        raise ValueError(f"{setup.nodes} nodes cannot share {layers} layers: use {layers} or "
                         "fewer.")
    if setup.group:
        check_group(width, setup.group, ranks, "o_proj", (width, inner))
        check_group(inner, setup.group, ranks, "down_proj", (width, inner))


def aligned(lines):
    """Rows of texts as lines whose columns end below one another."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def largest_group(backbone, ranks):
    """The largest usual int4 group that divides. Raises ValueError if none does."""
    widths = (backbone.hidden_size, backbone.intermediate_size)
    for width in widths:  # names the first that the smallest group does not divide
        check_group(width, config.INT4_GROUPS[-1], ranks)
    return config.largest_group(widths, ranks)
