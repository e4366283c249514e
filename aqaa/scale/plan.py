"""What a backbone needs on given GPUs, and how fast it will talk, from first principles.

A decoding step reads every weight once and the keys and values so far, so bytes / bandwidth is the
least time of a token: the roofline. What is reached of it, and what is not arithmetic, are the
named assumptions below (plan_table.check holds them against recorded runs). No torch here.
"""

from dataclasses import dataclass, field, fields
from math import ceil

from aqaa import config
from aqaa.backbone import memory
from aqaa.config import GROUP_SECONDS, GROUP_SIZE, TOKENS_PER_SECOND, check_group

TEXT_BLOCK, AUDIO_BLOCK = 10, 15  # ids: the layout of an answer (AQAA Table 1, best row)
BLOCK = TEXT_BLOCK + AUDIO_BLOCK
BLOCK_SECONDS = AUDIO_BLOCK / GROUP_SIZE * GROUP_SECONDS  # 0.36
INTERLEAVE_RATE = TOKENS_PER_SECOND * BLOCK / AUDIO_BLOCK  # 69.4 ids a second while text lasts
TEXT_RATE = 5.0  # text ids in a second of speech

# Assumptions. Efficiencies are shares of bytes / bandwidth over 1, 2, 4, 8 GPUs. Those of int4 and
# fp8 on one GPU were measured on an H200 (data/runs/h200-130b-int4.json; the int4 kernels have
# changed since). The others are solved for, from estimates made by hand for H100 and H200, so
# agreeing with those proves nothing. For comparison, gpt-fast's README on 70 B and A100: bf16 87,
# 79, 67 % on 2, 4, 8; int8 78 % on one, 44 % on eight; int4 65 % and 32 %. A guess says so.
EFFICIENCY = {
    "bf16": {1: 0.80, 2: 0.80, 4: 0.73, 8: 0.645},
    "fp8": {1: 0.45, 2: 0.78, 4: 0.665, 8: 0.525},
    "int8": {1: 0.775, 2: 0.78, 4: 0.665, 8: 0.525},
    "int4": {1: 0.40, 2: 0.72, 4: 0.56, 8: 0.415},
}
ALL_REDUCE = {1: 0.0, 2: 9e-6, 4: 10.5e-6, 8: 12e-6}  # s over NVLink, two a layer: 9 to 12 µs
PCIE = 4.0  # times as long without NVLink: a guess
KERNEL, KERNELS_PER_LAYER = 2e-6, 8  # s, least time of a kernel in a CUDA graph: a guess
PREFILL_SHARE = 0.5  # of the tensor cores' peak
PROMPT = 100  # ids of a prompt beside the question
VOCODER_SHARE = 0.05  # s of work for 1 s of sound: the goal for the full-size flow and HiFT
RESERVED = 1.5  # GiB a GPU, a guess: the driver's context, graphs, workspaces
SPEECH_PARTS = {"full": 400e6 * 4, "mini": 13e6 * 4}  # bytes of tokenizers, flow, HiFT, about


@dataclass(frozen=True)
class Gpu:
    """One card, by its public data sheet."""

    name: str
    memory: float  # GiB, as the driver reports it
    bandwidth: float  # TB/s
    bf16: float  # dense TFLOPS
    fp8: float | None  # dense TFLOPS; None: no such tensor cores
    nvlink: bool = True


_CARDS = (
    Gpu("H200", 139.8, 4.8, 989, 1979), Gpu("H100-80", 79.1, 3.35, 989, 1979),
    Gpu("H20", 95.6, 4.0, 148, 296), Gpu("A100-80", 79.2, 2.039, 312, None),
    Gpu("A800-80", 79.2, 2.039, 312, None), Gpu("A100-40", 39.4, 1.555, 312, None),
    Gpu("B200", 178.4, 7.7, 2250, 4500), Gpu("MI300X", 191.7, 5.3, 1307, 2615),
    Gpu("L40S", 44.4, 0.864, 362, 733, False), Gpu("RTX-4090", 23.5, 1.008, 165, 330, False),
    Gpu("RTX-5090", 31.4, 1.792, 209, 419, False),
)  # fmt: skip
GPUS = {gpu.name: gpu for gpu in _CARDS}
SHOWN = ("model", "gpus", "weights", "group", "context")  # of a Setup, in a Plan's JSON
USUAL = ("1xH200", "2xH200", "4xH100-80", "8xH100-80", "8xH200", "4xA800-80")
SMALL = ("1xRTX-4090", "1xL40S", "1xA100-80", "1xH100-80", "1xH200")  # where one card holds it


@dataclass(frozen=True)
class Setup:
    """A model on GPUs of one kind, in a weight format, with a context."""

    model: str
    backbone: config.BackboneConfig
    gpu: Gpu
    count: int
    weights: str = "bf16"
    group: int | None = None  # of int4
    context: int = 2048  # ids

    @property
    def format(self):
        return f"{self.weights} g{self.group}" if self.group else self.weights

    @property
    def gpus(self):
        return f"{self.count}x{self.gpu.name}"


@dataclass(frozen=True)
class Plan:
    """Memory in GiB of the fullest GPU, GB a token, times in s, rates in tokens a second."""

    setup: Setup
    memory: dict  # weights, embedding, cache, buffers, speech, reserved
    total: float  # their sum
    spare: float  # below 0: it does not fit
    streamed: float  # GB a token, cache included, over all GPUs
    floor: float  # s a token: bytes / bandwidth
    ceiling: float
    rate: float  # estimated
    first_sound: dict  # {seconds of question: s}
    delay: dict = field(default_factory=dict)  # {seconds of answer: s of late start}

    @property
    def fits(self):
        return self.spare >= 0

    @property
    def steady(self):  # audio alone keeps up with speech: 41.67 a second
        return self.rate >= TOKENS_PER_SECOND

    @property
    def interleave(self):  # blocks of text and audio do: 69.4 a second, one block of buffer
        return self.rate >= INTERLEAVE_RATE

    def to_dict(self):
        """As JSON wants it: numbers rounded to 5 digits, keys as text."""

        def rounded(value):
            if isinstance(value, dict):
                return {str(key): rounded(item) for key, item in value.items()}
            return round(value, 5)

        facts = {name: getattr(self.setup, name) for name in SHOWN}
        facts |= {name: getattr(self, name) for name in ("fits", "steady", "interleave")}
        return facts | {item.name: rounded(getattr(self, item.name)) for item in fields(self)[1:]}


def streamed_bytes(backbone, weights, group=None, context=0):
    """Bytes that one decoding step reads: linear layers, lm_head, norms, cache of `context` ids."""
    linear = memory.linear_bytes(backbone, weights, group)
    others = memory.table_bytes(backbone) + memory.norm_bytes(backbone)
    return linear + others + context * memory.cache_bytes(backbone)


def prefill_seconds(setup, n_ids):
    """Time to read a prompt: operations at half the peak, and unpacking of packed weights."""
    backbone, gpu = setup.backbone, setup.gpu
    operations = 2 * memory.n_linear(backbone)[0] * n_ids
    # attention: every id looks at those before it, so half of the products are masked
    operations += 2 * backbone.num_hidden_layers * backbone.hidden_size * n_ids**2
    native = setup.weights == "fp8" and gpu.fp8  # as vLLM does; our own layers unpack fp8
    seconds = operations / ((gpu.fp8 if native else gpu.bf16) * 1e12 * PREFILL_SHARE)
    if setup.weights != "bf16" and not native:  # read packed, written and read again as bf16
        moved = memory.linear_bytes(backbone, setup.weights, setup.group)
        moved += 2 * memory.linear_bytes(backbone, "bf16")
        seconds += moved / (gpu.bandwidth * 1e12)
    return seconds / setup.count


def token_seconds(setup):
    """(least, estimated) time of a decoding step."""
    layers, ranks = setup.backbone.num_hidden_layers, setup.count
    streamed = streamed_bytes(setup.backbone, setup.weights, setup.group, setup.context)
    floor = streamed / (setup.gpu.bandwidth * 1e12 * ranks)
    # a small model is bound by its number of kernels, not by its bytes
    busy = max(floor / EFFICIENCY[setup.weights][ranks], KERNEL * KERNELS_PER_LAYER * layers)
    reduce = ALL_REDUCE[ranks] * (1 if setup.gpu.nvlink else PCIE)
    return floor, busy + 2 * layers * reduce


def start_delay(rate, seconds):
    """How late (s) an answer of `seconds` must start, with ids at `rate` a second, never to stall.

    Blocks of text and audio until the text is used up, then audio alone, each played once whole.
    """
    text, delay = TEXT_RATE * seconds, 0.0
    for k in range(ceil(seconds / BLOCK_SECONDS - 1e-9)):
        n_ids = min((k + 1) * TEXT_BLOCK, text) + (k + 1) * AUDIO_BLOCK  # made with block k
        delay = max(delay, n_ids / rate - k * BLOCK_SECONDS)
    return delay


def plan(setup):
    """The Plan of a Setup. Raises ValueError if the model cannot be divided so."""
    check_ranks(setup)
    backbone, ranks, weights = setup.backbone, setup.count, setup.weights
    shared = memory.linear_bytes(backbone, weights, setup.group) + memory.table_bytes(backbone)
    parts = {
        "weights": shared / ranks + memory.norm_bytes(backbone),
        "embedding": memory.table_bytes(backbone),  # whole on every GPU
        "cache": setup.context * memory.cache_bytes(backbone) / ranks,
        "buffers": memory.buffer_bytes(backbone, weights, setup.context, ranks),
        "speech": SPEECH_PARTS["mini" if backbone.hidden_size < 1024 else "full"],
    }
    gib = {name: size / memory.GIB for name, size in parts.items()} | {"reserved": RESERVED}
    total = sum(gib.values())
    streamed = streamed_bytes(backbone, weights, setup.group, setup.context) / 1e9
    floor, token = token_seconds(setup)

    def first_sound(seconds):
        """Of a question of so many seconds: prefill, a block, vocoding."""
        prefill = prefill_seconds(setup, ceil(seconds * TOKENS_PER_SECOND) + PROMPT)
        return prefill + BLOCK * token + VOCODER_SHARE * BLOCK_SECONDS

    return Plan(
        setup, gib, total, setup.gpu.memory - total, streamed, floor, 1 / floor, 1 / token,
        {seconds: first_sound(seconds) for seconds in (3, 10)},
        {seconds: start_delay(1 / token, seconds) for seconds in (5, 10, 20)},
    )  # fmt: skip


def check_ranks(setup):
    """Raise ValueError if setup.count GPUs cannot share heads, groups, widths or int4 groups."""
    backbone, ranks = setup.backbone, setup.count
    heads, groups = backbone.num_attention_heads, backbone.num_attention_groups
    width, inner = backbone.hidden_size, backbone.intermediate_size
    possible = [n for n in ALL_REDUCE if not (heads % n or groups % n or inner % n)]
    if ranks not in possible:
        raise ValueError(f"{ranks} GPUs cannot share {heads} attention heads, {groups} key-value "
                         f"groups, {inner} inner values: use {', '.join(map(str, possible))}.")
    if setup.group:
        check_group(width, setup.group, ranks, "o_proj", (width, inner))
        check_group(inner, setup.group, ranks, "down_proj", (width, inner))


def largest_group(backbone, ranks):
    """The largest usual int4 group that divides. Raises ValueError if none does."""
    widths = (backbone.hidden_size, backbone.intermediate_size)
    for width in widths:  # names the first that the smallest group does not divide
        check_group(width, config.INT4_GROUPS[-1], ranks)
    return config.largest_group(widths, ranks)
