"""`aqaa bench scale`: what the full-scale model does on this GPU, with random weights.

Speed depends on sizes and not on values, so nothing has to be downloaded: weights are drawn on the
GPU itself. Every number is written to the record as soon as it is measured; what could not be
measured is named there with the reason. On a CPU with the mini's sizes the same is rehearsed.

The folder aqaa/ alone is enough, and of packages torch, triton, transformers, safetensors and numpy
with what they bring. On a machine with a GPU, the second of these if the first has no faults:

    python -m aqaa bench scale --preset full --layers 4 --device cuda --out layers4.json
    python -m aqaa bench scale --preset full --device cuda --out full.json"""

import gc
import os
import platform
import resource
import time
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle, islice
from statistics import fmean, median

import torch
import transformers

from aqaa import config as presets
from aqaa import files, loading
from aqaa.backbone import memory
from aqaa.backbone.generation import Vocabulary, generate
from aqaa.config import GROUP_SIZE, SAMPLE_RATE, TOKENS_PER_SECOND
from aqaa.evaluation import kernel_bench
from aqaa.evaluation.speed import turns
from aqaa.fast import triton_kernels
from aqaa.fast.graph_decoder import Engine
from aqaa.files import ModelError
from aqaa.pipeline import AQAA
from aqaa.records import Record, about
from aqaa.scale import plan
from aqaa.scale.random_model import Words, random_backbone
from aqaa.tokenizers import dialogue
from aqaa.weights import model_folder

CONTEXTS = (512, 2048, 8192)  # ids
QUESTION = 520  # ids of a prompt with a question of 10 s
TOKENS = 100  # ids generated for a rate
SETTLING = 5  # of the first of them do not count
ASKED = 3.0  # s of the question that is asked
ANSWER = 250  # ids of its answer: 10 blocks, 3.6 s of sound
SPOKEN = 5.0  # s of sound that the vocoder is timed with
REPEATS = 5
TUNED = 8  # layers whose weights a kernel is tuned on: more than any cache holds
COPIED = 4 << 30  # bytes
SEGMENTS = ("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # large tensors come and go
PARTS = ("linguistic", "semantic", "flow", "hift")
# Methods of a Bench, in order: what later ones build upon comes first.
STEPS = "copy check_kernels check_layer tune prefill decode vocoder ask fp8".split()


def measure(preset="full", device="cuda", seed=0, layers=None, out=None):
    """The record as a dict, which also grows in the file `out`; on a GPU it has a place of its own.
    layers: fewer than there are. Raises ModelError beforehand if the model does not fit."""
    os.environ.setdefault(*SEGMENTS)  # read when the first tensor is made on a GPU
    config = presets.preset(preset)
    whole = config.backbone.num_hidden_layers
    if layers and layers < whole:
        config = replace(config, backbone=replace(config.backbone, num_hidden_layers=layers))
    bench = Bench(config, loading.device_of(device), seed, whole=whole)
    record = bench.record(out)
    bench.run(record)
    return record.data


class Bench:
    """The measurements, in order; `engine` is the one being measured."""

    def __init__(self, config, device, seed=0, contexts=CONTEXTS, whole=None, fast=None):
        self.config, self.device, self.seed, self.fast = config, device, seed, fast
        self.gpu, self.group = device.type == "cuda", plan.largest_group(config.backbone, 1)
        self.whole = whole or config.backbone.num_hidden_layers
        self.bandwidth, self.engine, self.parts = None, None, {}
        self.contexts = [n for n in contexts if n + TOKENS < config.backbone.max_seq_len]
        asked = int(ASKED * TOKENS_PER_SECOND) + plan.PROMPT + ANSWER
        self.size = max(asked, QUESTION, max(self.contexts) + TOKENS) + 1  # slots of the cache

    def record(self, out=None):
        """A Record with its head: what is measured, on what, by which versions and command."""
        layers, card = self.config.backbone.num_hidden_layers, self.card() if self.gpu else None
        model = "130b" if self.config.name == "full" else self.config.name
        complete = card and layers == self.whole and self.config.name == "full"
        if out is None and self.gpu:
            name = f"{(card or 'gpu').split('-')[0].lower()}-{model}-int4"
            name += "" if layers == self.whole else f"-{layers}-layers"
            out = files.data_folder() / "runs" / f"{name}.json"
        gpus, sizes = f"1x{card}" if card else str(self.device), asdict(self.config.backbone)
        setup = {"model": model, "layers": layers, "gpus": gpus, "weights": "int4",
                 "group": self.group, "sizes": sizes}  # fmt: skip
        triton = getattr(triton_kernels.triton, "__version__", None)
        versions = {"python": platform.python_version(), "torch": torch.__version__,
                    "transformers": transformers.__version__, "triton": triton,
                    "cuda": torch.version.cuda}  # fmt: skip
        head = about("scale" if complete else "scale-rehearsal", str(self.device))
        return Record(out, {**head, "versions": versions, "setup": setup})

    def card(self):
        """The name that `plan` knows this GPU by, or None."""
        properties = torch.cuda.get_device_properties(self.device)
        size, words = properties.total_memory / memory.GIB, properties.name.split()
        near = (gpu.name for gpu in plan.GPUS.values() if abs(gpu.memory - size) < 4)
        return next((name for name in near if name.split("-")[0] in words), None)

    def run(self, record):
        """All of it. Raises ModelError if not even the int4 model fits."""
        self.build("int4", self.group, record)
        for name in STEPS:
            with record.measuring(name), torch.inference_mode():
                getattr(self, name)(record)
            if self.gpu:
                peak = torch.cuda.max_memory_allocated(self.device) / memory.GIB
                record.add(peak_memory_gib=round(peak, 2))

    def build(self, weights, group, record):
        """Draw the model, and an engine with a cache of `size` slots. Raises ModelError."""
        if self.gpu:
            self.check_fits(weights, group)
        began = time.perf_counter()
        dtype = torch.bfloat16 if self.gpu else torch.float32
        sizes = self.config.backbone
        self.model = random_backbone(sizes, weights, group, self.device, dtype, self.seed)
        self.clock()
        resident = sum(x.nbytes for x in (*self.model.parameters(), *self.model.buffers()))
        self.engine = Engine(self.model, self.size, self.fast)
        if weights == "int4":
            seconds = round(time.perf_counter() - began, 2)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB of KiB
            record.add(build_s=seconds, resident_bytes=resident, host_peak_gib=round(peak, 2))

    def check_fits(self, weights, group):
        """Raise ModelError, before anything is allocated, with how many layers would fit."""
        sizes, free = self.config.backbone, memory.free_bytes(self.device)
        free -= plan.SPEECH_PARTS["full"] + plan.RESERVED * memory.GIB
        try:
            memory.check_room(sizes, self.size, free, weights, group)
        except ModelError as fault:
            layers = memory.linear_bytes(sizes, weights, group)
            layers += self.size * memory.cache_bytes(sizes)
            fixed = 2 * memory.table_bytes(sizes) + memory.buffer_bytes(sizes, weights, 0, 1)
            fitting = max(0, int((free - fixed) / layers * sizes.num_hidden_layers))
            raise ModelError(f"{fault} Or take part of it: --layers {fitting}.") from None

    def clock(self):
        """Seconds, once the device has done all it was given."""
        if self.gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def time(self, work, repeats=None):
        """Median seconds of work(), after one run that does not count."""
        return median(turns({"": work}, repeats or REPEATS, self.clock)[""])

    def copy(self, record):
        """Bytes read and written a second by a plain copy: what memory really gives."""
        size = min(COPIED, memory.free_bytes(self.device) // 4) if self.gpu else 1 << 26
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * size / self.time(lambda: target.copy_(source))
        record.add(copy_gb_per_s=round(self.bandwidth / 1e9, 1))

    def check_kernels(self, record):
        """Each kernel by itself against fp64. Raises ValueError for those that differ."""
        if not triton_kernels.usable(self.device):
            return
        dtype = self.model.model.norm.weight.dtype
        errors, wrong = kernel_bench.errors(self.config.backbone, self.group, self.device, dtype)
        record.add(kernel_errors=errors)
        if wrong:
            raise ValueError("these kernels differ from fp64 by more than rounding does: "
                             f"{', '.join(wrong)}")  # fmt: skip

    def check_layer(self, record):
        """A layer by kernels beside unpacked weights and plain torch: a prompt, few ids, single
        ids. Raises ValueError if the two differ by more than 5 % of the largest value."""
        usable, x = triton_kernels.usable(self.device), self.embeddings(41)  # (1, 41, D)
        small = replace(self.config.backbone, num_hidden_layers=1, vocab_size=64)
        model = random_backbone(small, "int4", self.group, self.device, x.dtype, self.seed)
        engines, parts = (Engine(model, 64, fast) for fast in (False, usable)), [33, 5, 1, 1, 1]
        plain, quick = (torch.cat([engine.feed(part).float() for part in x.split(parts, 1)])
                        for engine in engines)  # fmt: skip
        error = ((quick - plain).abs().max() / plain.abs().max()).item()
        record.add(layer_error=error, kernels=usable)
        if not error < 0.05:
            raise ValueError("the kernels differ from plain torch by "
                             f"{error:.3g} of the largest value")  # fmt: skip

    def tune(self, record):
        """The best tile of each int4 kernel, and the bandwidth that it reaches alone."""
        if self.gpu and self.engine.fused:
            record.add(kernel_rates=kernel_bench.tune(self.engine, TUNED, self.time_graph))
            record.add(kernel_us=kernel_bench.others(self.engine, self.time_graph))

    def time_graph(self, launch, layers):
        """Seconds of launch(layer) within a CUDA graph of all of them."""
        launch(layers[0])
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in layers:
                launch(layer)
        return self.time(graph.replay) / len(layers)

    def embeddings(self, count):
        """Of `count` text ids: (1, count, D)."""
        ids = self.config.ids
        tokens = torch.arange(count, device=self.device) % (ids.n_text - ids.first_text)
        return self.model.model.embed_tokens(tokens[None] + ids.first_text)

    def prefill(self, record):
        """Reading the prompt of a question of 10 s, and of as many ids as kernels take at once."""
        rows = []
        for count in (min(QUESTION, self.size - 1), triton_kernels.FEW):
            seconds = self.time(partial(self.feed_at, 0, self.embeddings(count)), 3)
            rows.append({"ids": count, "seconds": round(seconds, 4)})
            record.add(prefill=rows)

    def feed_at(self, length, x):
        """Feed x (1, Q, D) to the engine as if `length` ids stood in its cache."""
        self.engine.cache.length = length
        self.engine.feed(x)

    def decode(self, record):
        """Ids a second with so much context, the whole loop, and the step alone."""
        rows = []
        for context in self.contexts:
            rows.append(self.rate(context))
            record.add(decode=rows)

    def rate(self, context):
        """Generate after a context that is in the cache already: only its length matters."""
        ids, layout = self.config.ids, dialogue.layout()
        prompt = list(islice(cycle(range(ids.first_text, ids.n_text)), context))
        reader = self.engine.reader()
        reader.ids = list(prompt)  # as if they had been read
        machine, vocabulary = layout.machine(ids), Vocabulary(self.model)
        options = {"max_tokens": TOKENS, "min_audio": TOKENS, "seed": self.seed}
        times, legal = [], []  # of each id: when it came, rows of the output layer that were read
        for step in generate(self.model, prompt, ids, layout, prefill=reader, **options):
            times.append(self.clock())
            legal.append(len(vocabulary.legal(machine.allowed())))
            machine.advance(step.id)
        counted = len(times) - 1 - min(SETTLING, len(times) // 2)
        rate = counted / (times[-1] - times[-1 - counted])
        alone = self.time(partial(self.feed_at, context, self.embeddings(1)), 20)
        read = self.step_bytes(context)
        head = self.model.lm_head.weight[0].nbytes * fmean(legal)
        row = {"context": context, "tokens_per_s": round(rate, 2),
               "step_ms": round(1000 * alone, 3), "step_gb": round(read / 1e9, 3),
               "head_gb": round(head / 1e9, 3)}  # fmt: skip
        if self.bandwidth:
            row["share_of_copy"] = round((read + head) * rate / self.bandwidth, 4)
            row["step_share_of_copy"] = round(read / alone / self.bandwidth, 4)
        return row

    def step_bytes(self, context):
        """Bytes that one step reads: layers and norms, the last norm, keys and values."""
        model, cache = self.model.model, self.engine.cache
        weights = (*model.layers.parameters(), *model.layers.buffers(), model.norm.weight)
        slot = cache.keys[..., 0, :].nbytes + cache.values[..., 0, :].nbytes
        return sum(x.nbytes for x in weights) + context * slot

    def vocoder(self, record):
        """The real-time factor of flow and HiFT, in one go."""
        system, ids = self.system(), self.config.ids
        group = [0, 1, *(ids.n_linguistic + i for i in range(3))]
        spoken = group * int(SPOKEN * TOKENS_PER_SECOND / GROUP_SIZE)
        seconds = len(spoken) / TOKENS_PER_SECOND
        work = self.time(partial(system.vocoder.synthesize, spoken), 3)
        rounded = round(seconds, 2), round(work, 4), round(work / seconds, 4)
        record.add(vocoder=dict(zip(("seconds", "work_s", "rtf"), rounded)))

    def ask(self, record):
        """A spoken question, answered by all parts as a stream; the second answer counts."""
        system, generator = self.system(), torch.Generator().manual_seed(self.seed)
        question = torch.randn(int(ASKED * SAMPLE_RATE), generator=generator) / 10
        options = {"max_tokens": ANSWER, "min_audio": ANSWER, "seed": self.seed}
        for _ in range(2):
            reader = self.engine.reader()
            answer = system.stream((question, SAMPLE_RATE), prefill=reader, **options).answer
        times = {name: round(value, 4) for name, value in answer.timings.items()}
        record.add(ask={
            "question_s": ASKED, "answer_s": round(answer.seconds, 2),
            "ids": len(answer.tokens["answer"]), "prompt_ids": len(answer.tokens["prompt"]),
            "first_audio_s": times["first_audio"], "delay_s": round(answer.playout.delay, 4),
            "real_time_factor": round(answer.real_time_factor, 4), "timings": times,
        })  # fmt: skip

    def system(self):
        """All parts at the preset's size with random weights; words are left out."""
        if not self.parts:
            torch.manual_seed(self.seed)
            for name in PARTS:
                self.parts[name] = model_folder.build(name, self.config).eval().to(self.device)
            self.parts["linguistic"].centroids.normal_()
            self.parts["semantic"].quantizer._codebook.embed.normal_()
        parts = {**self.parts, "backbone": self.model, "text": Words(self.config.ids)}
        return AQAA(self.config, parts.__getitem__, device=self.device)

    def fp8(self, record):
        """The same model with weights of a byte, for comparison, if it fits."""
        self.engine = self.model = None
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
        self.contexts = self.contexts[: 2 if self.gpu else 1]
        self.size = max(self.contexts) + TOKENS + 1
        try:
            self.build("fp8", None, record)
        except ModelError as fault:
            record.add(fp8={"left_out": str(fault)})
        else:
            record.add(fp8={"decode": [self.rate(context) for context in self.contexts]})
