"""`aqaa bench scale`: what the full-scale model does on this GPU, with random weights of its true
size.

Speed depends on sizes and not on values, so nothing has to be downloaded: weights are drawn on the
GPU itself. Every number is written to the record as soon as it is measured; what could not be
measured is named there with the reason. On a CPU with the mini's sizes the same is rehearsed.
"""

import gc
import itertools
import json
import platform
import resource
import time
from dataclasses import asdict, replace
from statistics import median

import torch

from aqaa import files, loading
from aqaa.backbone import memory
from aqaa.backbone.generation import Vocabulary, generate
from aqaa.backbone.memory import check_room, free_bytes
from aqaa.config import GROUP_SIZE, SAMPLE_RATE, TOKENS_PER_SECOND, preset
from aqaa.evaluation import kernel_bench
from aqaa.fast import triton_kernels
from aqaa.fast.graph_decoder import Engine
from aqaa.files import ModelError
from aqaa.pipeline import AQAA
from aqaa.records import Record
from aqaa.scale import plan
from aqaa.scale.random_model import Words, random_backbone
from aqaa.tokenizers import dialogue
from aqaa.weights import model_folder

CONTEXTS = (512, 2048, 8192)  # ids
QUESTION = 520  # ids of a prompt with a question of 10 s
TOKENS, SETTLING = 100, 5  # ids generated for a rate, and how many of the first do not count
ASKED, ANSWER = 3.0, 250  # s of the question that is asked; ids of its answer: 10 blocks, 3.6 s of sound
SPOKEN = 5.0  # s of sound that the vocoder is timed with
REPEATS = 5
TUNED = 8  # layers whose weights a kernel is tuned on: more than any cache holds
COPIED = 4 << 30  # bytes
PARTS = ("linguistic", "semantic", "flow", "hift")


def main(args):
    """Measure and record. args: preset (mini or full), device, seed, layers (fewer than there are),
    out.

    Returns 1 if something could not be measured. Raises ModelError beforehand if the model does not
    fit.
    """
    config, device = preset(args.preset), loading.device_of(args.device)
    whole = config.backbone.num_hidden_layers
    if args.layers and args.layers < whole:
        config = replace(config, backbone=replace(config.backbone, num_hidden_layers=args.layers))
    bench = Bench(config, device, args.seed, whole=whole)
    record = bench.record(args.out)
    bench.run(record)
    if args.json:
        print(json.dumps(record.data))
    return int(bool(record.data["faults"]))


class Bench:
    """The measurements, in order; `engine` is the one being measured."""

    def __init__(self, config, device, seed=0, contexts=CONTEXTS, whole=None, fast=None):
        self.config, self.device, self.seed, self.fast = config, device, seed, fast
        self.gpu, self.group = device.type == "cuda", plan.largest_group(config.backbone, 1)
        self.contexts = [n for n in contexts if n + TOKENS < config.backbone.max_seq_len]
        asked = int(ASKED * TOKENS_PER_SECOND) + plan.PROMPT + ANSWER
        self.size = max(asked, QUESTION, max(self.contexts) + TOKENS) + 1  # slots of the cache
        self.whole, self.bandwidth, self.engine = whole or config.backbone.num_hidden_layers, None, None

    def record(self, out=None):
        """A Record with its head: what is measured, on what, by which versions and command."""
        from aqaa.records import about

        layers, card = self.config.backbone.num_hidden_layers, self.card() if self.gpu else None
        complete = self.gpu and card and layers == self.whole and self.config.name == "full"
        model = "130b" if self.config.name == "full" else self.config.name
        name = f"{(card or 'gpu').split('-')[0].lower() if self.gpu else 'cpu'}-{model}-int4"
        name += "" if layers == self.whole else f"-{layers}-layers"
        if out is None and self.gpu:
            out = files.data_folder() / "runs" / f"{name}.json"
        return Record(out, {
            **about("scale" if complete else "scale-rehearsal", str(self.device)),
            "versions": versions(),
            "setup": {"model": model, "layers": layers, "gpus": f"1x{card}" if card else str(self.device),
                      "weights": "int4", "group": self.group, "sizes": asdict(self.config.backbone)},
        })  # fmt: skip

    def card(self):
        """The name that `plan` knows this GPU by, or None."""
        properties = torch.cuda.get_device_properties(self.device)
        near = [gpu.name for gpu in plan.GPUS.values() if gpu.name.split("-")[0] in properties.name.split()
                and abs(gpu.memory * memory.GIB - properties.total_memory) < 4 * memory.GIB]  # fmt: skip
        return near[0] if near else None

    def run(self, record):
        """All of it. Raises ModelError if not even the int4 model fits."""
        self.build("int4", self.group, record)
        steps = ("copy", "check_kernels", "check_layer", "tune", "prefill", "decode", "vocoder", "ask", "fp8")
        for name in steps:
            with record.measuring(name), torch.inference_mode():
                getattr(self, name)(record)
            if self.gpu:
                record.add(peak_memory_gib=round(torch.cuda.max_memory_allocated(self.device) / memory.GIB, 2))

    # ---- the model --------------------------------------------------------------------------------------------------

    def build(self, weights, group, record):
        if self.gpu:
            self.check_fits(weights, group)
        began = time.perf_counter()
        dtype = torch.bfloat16 if self.gpu else torch.float32
        self.model = random_backbone(self.config.backbone, weights, group, self.device, dtype, self.seed)
        self.clock()
        resident = sum(x.numel() * x.element_size() for x in (*self.model.parameters(), *self.model.buffers()))
        self.engine = Engine(self.model, self.size, self.fast)
        if weights == "int4":
            record.add(
                build_s=round(time.perf_counter() - began, 2), resident_bytes=resident,
                host_peak_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
            )  # fmt: skip

    def check_fits(self, weights, group):
        """Raise ModelError, with the number of layers that would fit, before anything is
        allocated."""
        free, backbone = free_bytes(self.device), self.config.backbone
        free -= plan.SPEECH_PARTS["full"] + plan.RESERVED * memory.GIB
        try:
            check_room(backbone, self.size, free, weights, group)
        except ModelError as fault:
            layer = (memory.linear_bytes(backbone, weights, group) + self.size * memory.cache_bytes(backbone))
            layer /= backbone.num_hidden_layers
            room = free - 2 * memory.table_bytes(backbone) - memory.buffer_bytes(backbone, weights, 0, 1)
            raise ModelError(f"{fault} Or take part of it: --layers {max(0, int(room / layer))}.") from None

    def clock(self):
        """Seconds, once the device has done all it was given."""
        if self.gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def time(self, work, repeats=REPEATS):
        """Median seconds of work(), after one run that does not count."""
        work()
        times = []
        for _ in range(repeats):
            began = self.clock()
            work()
            times.append(self.clock() - began)
        return median(times)

    # ---- measurements -----------------------------------------------------------------------------------------------

    def copy(self, record):
        """Bytes read and written a second by a plain copy: what memory really gives."""
        size = min(COPIED, free_bytes(self.device) // 4) if self.gpu else 1 << 26
        source = torch.empty(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.bandwidth = 2 * size / self.time(lambda: target.copy_(source))
        record.add(copy_gb_per_s=round(self.bandwidth / 1e9, 1))

    def check_kernels(self, record):
        """Each kernel by itself against fp64."""
        if not triton_kernels.usable(self.device):
            return
        dtype = self.model.model.norm.weight.dtype
        found, failed = kernel_bench.errors(self.config.backbone, self.group, self.device, dtype)
        record.add(kernel_errors=found)
        if failed:
            raise ValueError(f"these kernels differ from fp64 by more than rounding does: {', '.join(failed)}")

    def check_layer(self, record):
        """A layer, read as a prompt, by a few ids, and id by id, by kernels and by unpacked weights
        and plain torch."""
        small, usable, found = replace(self.config.backbone, num_hidden_layers=1), triton_kernels.usable(self.device), []
        small, x = replace(small, vocab_size=64), self.embeddings(41)
        model = random_backbone(small, "int4", self.group, self.device, x.dtype, self.seed)
        for fast in (False, usable):
            engine = Engine(model, 64, fast)
            found.append(torch.cat([engine.feed(part).float() for part in x.split([33, 5, 1, 1, 1], 1)]))
        plain, quick = found
        error = ((quick - plain).abs().max() / plain.abs().max()).item()
        record.add(layer_error=error, kernels=usable)
        if not error < 0.05:
            raise ValueError(f"the kernels differ from plain torch by {error:.3g} of the largest value")

    def tune(self, record):
        """The best tile of each int4 kernel, and the bandwidth that it reaches alone, over several
        layers' weights."""
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
        words = torch.arange(count, device=self.device) % (ids.n_text - ids.first_text) + ids.first_text
        return self.model.model.embed_tokens(words[None])

    def prefill(self, record):
        """Reading the prompt of a question of 10 s."""
        count = min(QUESTION, self.size - 1)
        found = []
        for x in map(self.embeddings, (count, triton_kernels.FEW)):

            def work(x=x):
                self.engine.cache.length = 0
                self.engine.feed(x)

            found.append({"ids": x.shape[1], "seconds": round(self.time(work, 3), 4)})
            record.add(prefill=found)

    def decode(self, record):
        """Ids a second with so much context, the whole loop, and the step alone."""
        found = []
        for context in self.contexts:
            found.append(self.rate(context))
            record.add(decode=found)

    def rate(self, context):
        """Generate after a context whose keys and values are there already: only their number
        matters."""
        engine, ids = self.engine, self.config.ids
        prompt = list(itertools.islice(itertools.cycle(range(ids.first_text, ids.n_text)), context))
        reader, times, rows, layout = engine.reader(), [], [], dialogue.layout()
        reader.ids, machine, vocabulary = list(prompt), layout.machine(ids), Vocabulary(self.model)
        options = {"prefill": reader, "max_tokens": TOKENS, "min_audio": TOKENS, "seed": self.seed}
        for step in generate(self.model, prompt, ids, layout, **options):
            times.append(self.clock())
            rows.append(len(vocabulary.legal(machine.allowed())))
            machine.advance(step.id)
        counted = len(times) - 1 - min(SETTLING, len(times) // 2)
        rate = counted / (times[-1] - times[-1 - counted])
        x = self.embeddings(1)

        def step():
            engine.cache.length = context
            engine.feed(x)

        alone = self.time(step, 20)
        row = self.model.lm_head.weight[0]
        read, head = self.step_bytes(context), sum(rows) / len(rows) * row.numel() * row.element_size()
        found = {"context": context, "tokens_per_s": round(rate, 2), "step_ms": round(1000 * alone, 3)}
        found |= {"step_gb": round(read / 1e9, 3), "head_gb": round(head / 1e9, 3)}
        if self.bandwidth:
            found["share_of_copy"] = round((read + head) * rate / self.bandwidth, 4)
            found["step_share_of_copy"] = round(read / alone / self.bandwidth, 4)
        return found

    def step_bytes(self, context):
        """Bytes that one step reads: the layers with their norms, the last norm, keys and
        values."""
        model, cache = self.model.model, self.engine.cache
        parts = (*model.layers.parameters(), *model.layers.buffers(), model.norm.weight)
        slots = (cache.keys[..., 0, :].numel() + cache.values[..., 0, :].numel()) * cache.keys.element_size()
        return sum(x.numel() * x.element_size() for x in parts) + context * slots

    def vocoder(self, record):
        """The real-time factor of flow and HiFT, in one go."""
        system, ids = self.system(), self.config.ids
        group = [0, 1, *(ids.n_linguistic + i for i in range(3))]
        spoken = group * int(SPOKEN * TOKENS_PER_SECOND / GROUP_SIZE)
        seconds = len(spoken) / TOKENS_PER_SECOND
        work = self.time(lambda: system.vocoder.synthesize(spoken), 3)
        record.add(vocoder={"seconds": round(seconds, 2), "work_s": round(work, 4), "rtf": round(work / seconds, 4)})

    def ask(self, record):
        """A spoken question of 3 s, answered by all parts, sound as soon as there is any; the
        second answer counts."""
        system = self.system()
        question = torch.randn(int(ASKED * SAMPLE_RATE), generator=torch.Generator().manual_seed(self.seed)) / 10
        for _ in range(2):
            options = {"prefill": self.engine.reader(), "max_tokens": ANSWER, "min_audio": ANSWER}
            answer = system.stream((question, SAMPLE_RATE), seed=self.seed, **options).answer
        times = {name: round(value, 4) for name, value in answer.timings.items()}
        record.add(ask={
            "question_s": ASKED, "answer_s": round(answer.seconds, 2), "ids": len(answer.tokens["answer"]),
            "prompt_ids": len(answer.tokens["prompt"]), "first_audio_s": times["first_audio"],
            "delay_s": round(answer.playout.delay, 4), "real_time_factor": round(answer.real_time_factor, 4),
            "timings": times,
        })  # fmt: skip

    def system(self):
        """All parts at the size of the preset with random weights, but for words, of which there
        are none."""
        if not hasattr(self, "parts"):
            torch.manual_seed(self.seed)
            self.parts = {name: model_folder.build(name, self.config).eval().to(self.device) for name in PARTS}
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
        self.contexts = self.contexts[:1] if not self.gpu else self.contexts[:2]
        self.size = max(self.contexts) + TOKENS + 1
        try:
            self.build("fp8", None, record)
        except ModelError as fault:
            record.add(fp8={"left_out": str(fault)})
            return
        record.add(fp8={"decode": [self.rate(context) for context in self.contexts]})


def versions():
    """Of what the numbers depend on."""
    import transformers

    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    found["triton"] = triton_kernels.triton.__version__ if triton_kernels.triton else None
    return {**found, "cuda": torch.version.cuda}
