"""`aqaa train STAGE`: the stages of the mini, in order, each resumable.

A stage reads what earlier ones left in the run folder and leaves a checkpoint, a CSV, a plot and an entry in
record.json. `export` gathers the finished parts into a model folder that `aqaa.load` reads.
"""

import shutil
import time
from pathlib import Path

import numpy as np
import torch

from aqaa import files
from aqaa.config import preset
from aqaa.corpus.codes import load_codes, store_codes, usage
from aqaa.corpus.plan import held_out
from aqaa.corpus.speak import Corpus
from aqaa.files import probe, read_object, replacing, sweep, write_json
from aqaa.records import provenance
from aqaa.tokenizers.linguistic import LinguisticTokenizer
from aqaa.tokenizers.semantic import SemanticTokenizer
from aqaa.tokenizers.text import TextTokenizer
from aqaa.training import features
from aqaa.training.loop import Trainer, read_log
from aqaa.training.speech_tokenizers import LinguisticTask, SemanticTask, kmeans
from aqaa.weights import model_folder

STEPS = {  # of each stage, about four hours in all on two cores
    "linguistic": 4400, "semantic": 2700, "hift": 2400, "flow": 6300, "pretrain": 1500, "sft1": 5000,
}
ORDER = ("corpus", "features", "linguistic", "semantic", "codes", "hift", "flow", "pretrain", "sft1", "export")
BACKBONE = {"pretrain": "backbone", "sft1": "backbone"}  # the part of a model folder that a stage makes


class Run:
    """One training run: its folders, seed and device, and a method for each stage."""

    def __init__(self, out, corpus, *, device="cpu", seed=0, resume=False, steps=None, minutes=None,
                 scale=1.0, workers=2, export="data/mini", init=None, config=None, quiet=False):
        """init: a model folder whose parts training starts from, and that stand in for stages that have not run."""
        self.out, self.corpus_folder, self.export_folder = Path(out), Path(corpus), Path(export)
        self.device, self.seed, self.resume, self.steps, self.minutes = device, seed, resume, steps, minutes
        self.scale, self.workers, self.init, self.quiet = scale, workers, Path(init) if init else None, quiet
        self.config = config or preset("mini")
        probe(self.out)  # said now, not after an hour of training
        sweep(self.out, self.out / "parts", self.out / "features")
        self._recorded()

    # --- data -------------------------------------------------------------------------------------------------

    def corpus(self):
        from aqaa.corpus import speak

        speak.main(self.corpus_folder, scale=self.scale, seed=self.seed, workers=self.workers, resume=self.resume)

    def items(self):
        """(opened corpus, every item whose sound the tokenizers read: training, development and evaluation)."""
        opened = Corpus(self.corpus_folder)
        return opened, list(opened.items())

    def features(self):
        opened, items = self.items()
        features.prepare(opened, items, self.out / "features", self.workers)

    def _heard(self, kind):
        """(features of `kind`, where only training rows have weight; the rows each reported error is measured on)."""
        _, items = self.items()
        data = features.utterances(self.out / "features", items, kind)
        train = np.array([item.split == "train" and not held_out(item) for item in items])
        data.weights = np.where(train, data.weights, 0.0)
        cells = {"seen_voices": "seen_seen", "new_voices": "seen_new", "both_new": "new_new"}
        tests = {"answer_voice": [i for i, item in enumerate(items) if held_out(item)]}
        for name, cell in cells.items():
            tests[name] = [i for i, item in enumerate(items) if item.split == "eval" and item.cell == cell]
        rng = np.random.default_rng(0)
        return data, {key: rng.permutation(rows)[:200] for key, rows in tests.items() if rows}

    # --- audio tokenizers -------------------------------------------------------------------------------------

    def linguistic(self):
        data, tests = self._heard("lfr")
        task = LinguisticTask(self.config.linguistic, data)
        self._warm("linguistic", task.model)
        features.normalise(data, task.model)
        result = self._train(task, "linguistic")
        task.model.eval()
        task.head.eval()
        result["phone_error"] = {key: round(task.evaluate(data, rows), 2) for key, rows in tests.items()}
        print("linguistic phone error, %:", result["phone_error"])
        hidden = []
        with torch.no_grad():
            rng = np.random.default_rng(self.seed)
            while sum(map(len, hidden)) < 250 * self.config.linguistic.codebook_size:
                x, lengths = data.gather(task.buckets.draw(rng))
                out = task.model(x, lengths).float()  # on the CPU again
                hidden += [row[:length] for row, length in zip(out, lengths.tolist(), strict=True)]
        task.model.centroids.copy_(kmeans(torch.cat(hidden), self.config.linguistic.codebook_size))
        self._finish("linguistic", task.model, result)

    def semantic(self):
        data, tests = self._heard("log_mel")
        task = SemanticTask(self.config.semantic, data)
        self._warm("semantic", task.model)
        result = self._train(task, "semantic")
        task.event(1.0)  # a very short run may have ended before the quantiser came
        task.model.eval()
        task.decoder.eval()
        scores = {key: task.evaluate(data, rows) for key, rows in tests.items()}
        result["phone_error"] = {key: round(error, 2) for key, (error, _) in scores.items()}
        result["f0_semitones"] = {key: round(melody, 3) for key, (_, melody) in scores.items()}
        print("semantic phone error, %:", result["phone_error"], "f0, semitones:", result["f0_semitones"])
        self._finish("semantic", task.model, result)

    def codes(self):
        """Both code sequences of every utterance."""
        _, items = self.items()
        linguistic = self.part("linguistic", LinguisticTokenizer(self.config.linguistic))
        semantic = self.part("semantic", SemanticTokenizer(self.config.semantic))
        lfr = features.utterances(self.out / "features", items, "lfr")
        mels = features.utterances(self.out / "features", items, "log_mel")
        found = {"linguistic": [None] * len(items), "semantic": [None] * len(items)}
        shift, rescale = linguistic.add_shift, linguistic.rescale
        with torch.no_grad():
            for rows in batches_by_length(lfr.lengths, 64):
                x, lengths = lfr.gather(rows)
                hidden = linguistic((x + shift) * rescale, lengths)
                keep(found["linguistic"], rows, linguistic.quantize(hidden), lengths)
                x, lengths = mels.gather(rows)
                log_mel = x.reshape(len(rows), -1, self.config.semantic.n_mels).transpose(1, 2)
                hidden, _ = semantic.hidden(log_mel, lengths * 4)
                keep(found["semantic"], rows, semantic.quantize(hidden), lengths)
        store_codes(self.out, items, found["linguistic"], found["semantic"])
        use = {key: usage(values, size) for (key, values), size in zip(
            found.items(), (self.config.ids.n_linguistic, self.config.ids.n_semantic), strict=True)}
        print("codebooks:", use)
        self._record("codes", use)

    # --- vocoder ----------------------------------------------------------------------------------------------

    def _spoken(self):
        """The answer voice: (items, waves int16, flat 0-based audio ids), held-out answers left out."""
        opened, items = self.items()
        rows = [i for i, item in enumerate(items) if item.role == "answer" and not held_out(item)]
        return opened, items, rows

    def hift(self):
        from aqaa.training.flow_and_hift import HiftTask

        opened, items, rows = self._spoken()
        task = HiftTask(self.config, [opened.wav(items[i]) for i in rows])
        self._warm("hift", task.modules()["hift"])
        self._finish("hift", task.modules()["hift"], self._train(task, "hift"))

    def flow(self):
        from aqaa.tokenizers import interleave
        from aqaa.training.flow_and_hift import FlowTask

        opened, items, rows = self._spoken()
        codes = load_codes(self.out, items)
        ids = self.config.ids
        merged = [np.array(interleave.merge(*codes[i], ids), dtype=np.int32) - ids.n_text for i in rows]
        task = FlowTask(self.config, [(opened.wav(items[i]), audio) for i, audio in zip(rows, merged, strict=True)])
        self._warm("flow", task.modules()["flow"])
        self._finish("flow", task.modules()["flow"], self._train(task, "flow"))

    # --- backbone ---------------------------------------------------------------------------------------------

    def book(self):
        """Utterances of the training split as ids, with the mini's text tokenizer (trained here when missing)."""
        from aqaa.corpus.plan import plan, texts
        from aqaa.training.examples import Book

        planned = plan(scale=self.scale, seed=self.seed)  # what was said is known without the sound
        items = [item for item in planned if item.split == "train"]
        codes = load_codes(self.out, items, files.data_folder() / "codes")
        lines = texts(planned)
        path = self._text_path()
        if not path.exists():
            said = [item.text for item in items] + [line[key] for line in lines for key in ("question", "answer")]
            with replacing(path) as part:
                TextTokenizer.train(sorted(set(said)), n_text=self.config.ids.n_text).save(part)
        return Book(self.config, TextTokenizer.from_file(path), items, codes, lines)

    def pretrain(self):
        self._language("pretrain", None)

    def sft1(self):
        self._language("sft1", "pretrain")

    def _language(self, stage, parent):
        from aqaa.training.objectives import LanguageTask

        task = LanguageTask(self.book(), stage, lr=6e-4 if self.init else 2e-3)  # weights that have learnt go on gently
        if parent or self.init:
            self.part(parent or "pretrain", task.model).train()
        else:
            linguistic = self.part("linguistic", LinguisticTokenizer(self.config.linguistic))
            semantic = self.part("semantic", SemanticTokenizer(self.config.semantic))
            task.hear_alike(linguistic.centroids, semantic.quantizer._codebook.embed)
        self._finish(stage, task.model, self._train(task, stage))

    # --- bookkeeping ------------------------------------------------------------------------------------------

    def _train(self, task, name):
        steps = self.steps or max(2, int(STEPS[name] * min(1.0, self.scale * 4)))
        trainer = Trainer(task, self.out, name, steps, minutes=self.minutes, seed=self.seed, device=self.device,
                          resume=self.resume, quiet=self.quiet)
        result = trainer.run()
        last = read_log(trainer.csv_path)[-1]
        result["last"] = {key: float(value) for key, value in last.items() if value and key not in ("step", "seconds")}
        for module in task.modules().values():
            module.cpu()
        return result

    def _warm(self, name, module):
        """`module`, starting from the part of `init` if there is one."""
        if self.init:
            model_folder.load_part(self.init, name, module).train()
        return module

    def _finish(self, name, module, result):
        model_folder.save_part(self.out / "parts", name, module)
        self._record(name, result)

    def part(self, name, module):
        """`module` with the weights that stage `name` left, in eval mode. Raises ModelError before that stage ran."""
        if self.init and not (self.out / "parts" / f"{name}.safetensors").exists():
            return model_folder.load_part(self.init, BACKBONE.get(name, name), module)
        return model_folder.load_part(self.out / "parts", name, module)

    def _record(self, name, result):
        record = self._recorded()
        record[name] = {**result, **provenance(self.device)}
        if self.init and (earlier := self._recorded(self.init).get(name)):
            record[name]["continues"] = earlier
        write_json(self.out / "record.json", record)

    def _recorded(self, folder=None):
        """record.json of a folder (default: this run's), {} if there is none. Raises ModelError."""
        path = (folder or self.out) / "record.json"
        return read_object(path, "remove it; it only says how the parts were trained") if path.exists() else {}

    def export(self):
        """Gather the finished parts, tokenizer, configuration and record into a model folder, the codes beside it."""
        made_by = {"backbone": "sft1"}  # the others are named like their stage
        parts = {name: self.out / "parts" / f"{made_by.get(name, name)}.safetensors" for name in model_folder.PARTS}
        record = self._recorded()
        if self.init:  # what was not trained here comes along unchanged
            parts = {name: path if path.exists() else self.init / f"{name}.safetensors" for name, path in parts.items()}
            record = {**self._recorded(self.init), **record}
        model_folder.gather(self.export_folder, self.config, self._text_path(), parts, record)
        if (self.out / "codes.npz").exists():
            with replacing(self.export_folder.parent / "codes" / "codes.npz") as part:
                shutil.copyfile(self.out / "codes.npz", part)
        print(f"wrote {self.export_folder}")

    def _text_path(self):
        """The text tokenizer: this run's, or that of `init`, because ids must mean what they meant."""
        own = self.out / "tokenizer.json"
        return self.init / "tokenizer.json" if self.init and not own.exists() else own


def batches_by_length(lengths, size):
    order = np.argsort(lengths, kind="stable")
    return [order[start:start + size] for start in range(0, len(order), size)]


def keep(out, rows, codes, lengths):
    for row, code, length in zip(rows, codes, lengths.tolist(), strict=True):
        out[row] = code[:length].numpy()


def main(stage, **options):
    """Run one stage, or `all` of them in order. Raises ValueError for an unknown stage."""
    if stage != "all" and stage not in ORDER:
        raise ValueError(f"unknown stage {stage!r}: choose one of {', '.join(ORDER)}, all")
    run = Run(**options)
    for name in ORDER if stage == "all" else (stage,):
        started = time.monotonic()
        torch.manual_seed(run.seed)  # a stage begins the same whether it follows others or stands alone
        getattr(run, name)()
        print(f"{name}: {(time.monotonic() - started) / 60:.1f} min")
