"""`aqaa train STAGE`: the stages of the mini (stages.py), each resumable.

A stage reads what earlier ones left in the run folder and leaves a checkpoint, a CSV, a plot and an
entry in record.json. `export` gathers the finished parts into a model folder for `aqaa.load`."""

import hashlib
import itertools
import shutil
import time
from copy import copy
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import torch

from aqaa.config import preset
from aqaa.corpus import parts, play, speak, wider
from aqaa.corpus.codes import ANSWERS, codes_file, replaceable, store_codes, stored_codes, usage
from aqaa.corpus.plan import held_out, plan, texts
from aqaa.files import data_folder, fingerprint, probe, read_object, replacing, sweep, write_json
from aqaa.pipeline import AQAA, SPOKEN
from aqaa.records import provenance
from aqaa.tokenizers.text import TextTokenizer
from aqaa.training import features, merging, pairs, stages
from aqaa.training.examples import Book
from aqaa.training.loop import Trainer
from aqaa.weights import model_folder

JOINTS = "joints.json"  # where the manner of an answer changes, beside the codes
TESTS = {"seen_voices": "seen_seen", "new_voices": "seen_new", "both_new": "new_new"}  # name: cell


class Run:
    """One training run: its folders, seed and device, and the data that tasks ask for."""

    def __init__(self, out, corpus, *, device="cpu", seed=0, resume=False, steps=None, minutes=None,
                 scale=1.0, workers=2, export="data/mini", init=None, config=None,
                 quiet=False, only=None, people=()):  # fmt: skip
        """init: a model folder whose parts training starts from, and that stand in for stages that
        have not run. steps, minutes: of each stage, in place of its own. only, people: a part of
        the corpus, and folders of recordings (see parts.main). Raises WriteError and
        ModelError: a folder that cannot be written is told now, not after an hour of training."""
        self.out, self.corpus_folder, self.export_folder = Path(out), Path(corpus), Path(export)
        self.init = Path(init) if init else None
        self.base, self.training_seed = None, seed  # see `beside`
        self.device, self.seed, self.resume, self.quiet = device, seed, resume, quiet
        self.steps, self.minutes, self.scale, self.workers = steps, minutes, scale, workers
        self.only, self.people = only, people
        self.config = config or preset("mini")
        probe(self.out)
        sweep(self.out, self.out / "parts", self.out / "features")
        self.recorded()

    def beside(self, out, seed):
        """This run in another folder, where its own parts stand in for those that are not made
        there, and trained with another seed; the corpus stays."""
        other = copy(self)
        other.out, other.base, other.training_seed = Path(out), self.out, seed
        probe(other.out)
        return other

    def stage(self, name):
        """Run one stage of the table."""
        stage = stages.STAGES[name]
        # It begins the same whether it follows others or stands alone.
        torch.manual_seed(self.training_seed)
        if stage.task:
            self.train(stage)
        else:
            getattr(self, name)()

    def train(self, stage):
        """Train the task of a stage to its end; keep its weights and what was measured."""
        task = resolve_name(stage.task).from_run(self, stage)
        steps = self.steps or max(2, int(stage.steps * min(1.0, self.scale * 4)))
        trainer = Trainer(task, self.out, stage.name, steps, minutes=self.minutes,
                          seed=self.training_seed, device=self.device, resume=self.resume,
                          quiet=self.quiet)  # fmt: skip
        result = trainer.run()
        last = trainer.rows[-1].items()
        result["last"] = {key: value for key, value in last if key not in ("step", "seconds")}
        for module in task.modules.values():
            module.cpu()
        if hasattr(task, "finish"):
            measured = task.finish(self.training_seed)
            print(f"{stage.name}:", measured)
            result |= measured
        model_folder.save_part(self.out / "parts", stage.name, task.model)
        self._record(stage.name, result)

    def corpus(self):
        parts.main(self.corpus_folder, self.scale, self.seed, self.workers, self.resume,
                   self.only, self.people)  # fmt: skip

    def features(self):
        opened, items = self.items()
        features.prepare(opened, items, self.out / "features", self.workers)

    def codes(self):
        """Both code sequences of every utterance, and of bent copies (`wider.is_copied`)."""
        _, items = self.items()
        order = sorted(range(len(items)), key=lambda i: items[i].length)  # so that little is padded
        copied = [i for i in order if wider.is_copied(items[i])]
        said, makers = self._said(items), self.makers()
        unknown = [i for i in order if i not in said]
        heard = {}  # (number of the copy, tokenizer): {row: codes}
        for name, kind in (("linguistic", "lfr"), ("semantic", "log_mel")):
            model, task = self.part(makers[name]), resolve_name(stages.STAGES[name].task)
            data = features.utterances(self.out / "features", items, kind)
            known = {i: codes[name] for i, codes in said.items()}
            heard[0, name] = known | features.codes(model, data, unknown)
            bend = task.bender(model.config)
            for number in range(1, wider.COPIES + 1):
                seed = self.seed, number
                heard[number, name] = features.codes(model, data, copied, bend, seed)
        files = {}  # {part: {name of a row of codes: (row of the item, number of the copy)}}
        for i, item in enumerate(items):
            # Answers about pictures lie with their questions: the file of all others can stay.
            part = ANSWERS if item.is_voiced and item.part != "pictures" else item.part
            files.setdefault(part, {})[item.id] = i, 0
        for number, i in itertools.product(range(1, wider.COPIES + 1), copied):
            # Copies of a part that came later lie apart: the large file before need not change.
            part = "bent_later" if items[i].part == "later" else "bent"
            files.setdefault(part, {})[f"{items[i].id}~{number}"] = i, number
        for part, rows in files.items():
            pairs = [[heard[number, name][i] for i, number in rows.values()] for name in SPOKEN]
            store_codes(codes_file(self.out, part), list(rows), *pairs)
        sizes = {"linguistic": self.config.ids.n_linguistic, "semantic": self.config.ids.n_semantic}
        use = {name: usage(list(heard[0, name].values()), size) for name, size in sizes.items()}
        print("codebooks:", use)
        if not said:  # what was spoken anew may change its manner elsewhere
            write_json(self.out / JOINTS, speak.joints([i for i in items if i.is_voiced]))
        self._record("codes", use)

    def _said(self, items):
        """{row: {tokenizer: codes}} of what a vocoder that was not trained here learnt to say."""
        there = self.init and self.init.parent / "codes"
        if not there or not any(there.glob("codes*.npz")) or self._trained("flow"):
            return {}
        stored = stored_codes(there)
        return {i: dict(zip(SPOKEN, stored[item.id], strict=True)) for i, item in enumerate(items)
                if item.is_voiced and item.id in stored}  # fmt: skip

    def _trained(self, stage):
        """Whether a stage has left its part in this run, or in the one it is beside."""
        return self.part_file(stage).parent.name == "parts"

    def makers(self):
        """{part: the stage whose weights count}: of several the last one that was trained here."""
        trained = [name for name in stages.STAGES
                   if self._trained(name) and self.part_file(name).exists()]  # fmt: skip
        return stages.makers(trained)

    def pairs(self):
        """Pairs for preference training, made by SFT-1."""
        stage = stages.STAGES["pairs"]
        self._record("pairs", pairs.from_run(self, stage, **stage.settings))

    def merge(self):
        """The weighted mean of the three post-trained backbones."""
        self._record("merge", merging.from_run(self, stages.STAGES["merge"]))

    def export(self):
        """Gather the finished parts, tokenizer, configuration and record into a model folder, the
        codes beside it. Parts that were not trained here come from `init`, unchanged. Raises
        ValueError, before anything is written, where fewer codes would take the place of more."""
        record, makers = self.recorded(), self.makers()
        codes = replaceable(self.out, self.export_folder.parent / "codes")
        if (self.out / JOINTS).exists():
            codes[self.out / JOINTS] = self.export_folder.parent / "codes" / JOINTS
        parts = {name: self.part_file(makers[name]) for name in model_folder.PARTS}
        for name, beside in model_folder.EXTRA_BESIDE.items():
            path, kept = self.part_file(makers[name]), {parts[one].parent for one in beside}
            if path.exists() and (kept == {self.init} or path.parent != self.init):
                parts[name] = path
        if self.init:
            record = {**self.recorded(self.init), **record}
        config = self.config
        if parts["backbone"].parent == self.init:  # as sure of itself as it was
            sure = model_folder.read_config(self.init).confidence
            config = replace(config, confidence=sure)
        model_folder.gather(self.export_folder, config, self.tokenizer_file(), parts, record)
        for path, there in codes.items():
            with replacing(there) as part:
                shutil.copyfile(path, part)
        print(f"wrote {self.export_folder}")

    def items(self):
        """(the corpus, every item whose sound the tokenizers read: train, dev and eval)."""
        opened = speak.Corpus(self.corpus_folder)
        return opened, list(opened.items())

    def utterances(self, kind):
        """Features of `kind`, where only training rows have weight, and {name: up to 200 rows} on
        which errors are reported."""
        _, items = self.items()
        data = features.utterances(self.out / "features", items, kind)
        train = np.array([item.split == "train" and not held_out(item) for item in items])
        data.weights = np.where(train, data.weights, 0.0)
        tests = {"answer_voice": [i for i, item in enumerate(items) if held_out(item)]}
        for name, cell in TESTS.items():  # only evaluation has cells
            tests[name] = [i for i, item in enumerate(items) if item.cell == cell]
        rng = np.random.default_rng(0)
        return data, {name: rng.permutation(rows)[:200] for name, rows in tests.items() if rows}

    def spoken(self):
        """What the answer voice says in training, held-out answers aside: (items, waves)."""
        opened, items = self.items()
        mine = [item for item in items
                if item.is_voiced and item.split == "train" and not held_out(item)]  # fmt: skip
        return mine, [opened.wav(item) for item in mine]

    def codebooks(self):
        """The centroids (K, D) of both audio tokenizers."""
        linguistic = self.part("linguistic").centroids
        return linguistic, self.part("semantic").quantizer._codebook.embed

    def book(self, dev=False):
        """The training split as ids, with the text tokenizer (trained here when missing); with
        `dev` the questions are those of the development split, which no weights learn from. The
        plan has the words, and shipped codes stand in for this run's: no sound is needed."""
        planned = plan(scale=self.scale, seed=self.seed)
        lines = texts(planned)
        planned += play.joined(self.scale, self.seed)
        planned += wider.unknown(planned, self.scale, self.seed)
        places, stored = self.code_places(), self.stored()
        spoken = [item for item in planned if item.id in stored]
        # A small corpus speaks few answers, and one without natural voices not all questions.
        known = {item.answer_id for item in spoken if item.role == "answer"}
        asked = [item for item in spoken if not item.answer_id or item.answer_id in known]
        items = [item for item in asked if item.split == "train"]
        if dev:
            items = [item for item in items if item.role == "answer"]
            items += [item for item in asked if item.split == "dev" and item.role != "first"]
        path = self.tokenizer_file()  # ids must mean what they meant
        if not path.exists():
            words = {item.text for item in items}
            words |= {line[key] for line in lines for key in ("question", "answer")}
            with replacing(path) as part:
                TextTokenizer.train(sorted(words), n_text=self.config.ids.n_text).save(part)
        joints = next((read_object(one / JOINTS, "speak it anew") for one in reversed(places)
                       if (one / JOINTS).exists()), {})  # fmt: skip
        return Book(self.config, TextTokenizer.from_file(path), items, stored, lines, joints)

    def code_places(self):
        """Folders of codes, of which a later one counts: shipped ones stand in for this run's."""
        places = [self.base or self.out, self.out]
        if not self._trained("linguistic"):  # no tokenizers of its own
            places.insert(0, data_folder() / "codes")
        return places

    def stored(self):
        """{id: (linguistic, semantic)} of all that was ever spoken for this run."""
        return stored_codes(*self.code_places())

    def model(self, backbone, layout="ratio_10_15"):
        """An AQAA of a backbone and this run's other parts, each read when it is first used."""
        text, makers = TextTokenizer.from_file(self.tokenizer_file()), self.makers()
        own = {"text": text, "backbone": backbone}
        return AQAA(self.config, lambda name: own.get(name) or self.part(makers[name]),
                    layout=layout)  # fmt: skip

    def tokenizers(self):
        """One hash of the three tokenizers: ids of others mean something else."""
        makers = self.makers()
        files = [self.part_file(makers[name]) for name in ("linguistic", "semantic")]
        digests = [fingerprint(path)["sha256"] for path in (self.tokenizer_file(), *files)]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def pairs_file(self):
        """pairs.npz of this run, or else the shipped one."""
        own = self._own("pairs.npz")
        return own if own.exists() else data_folder() / "pairs" / "pairs.npz"

    def tokenizer_file(self):
        return self._own("tokenizer.json")

    def start(self, stage, module):
        """Give `module` the weights that a stage starts from: those of its parent, or of `init`.
        Returns whether there are any."""
        # Of a model folder's parts only those of EXTRA may be missing.
        there = bool(self.init) and stage.part in model_folder.parts_in(self.init)
        if stage.parent:
            self.part(stage.parent, module)
        elif there:
            model_folder.load_part(self.init, stage.part, module)
        module.train()
        return bool(stage.parent) or there

    def part(self, name, module=None):
        """`module` with the weights that stage `name` left, or else those of `init`, in eval mode.
        Raises ModelError before that stage ran."""
        path = self.part_file(name)
        module = module or model_folder.build(stages.named(name).part, self.config)
        return model_folder.load_part(path.parent, path.stem, module)

    def _record(self, name, result):
        record = self.recorded()
        record[name] = {**result, **provenance(self.device)}
        if self.init and (earlier := self.recorded(self.init).get(name)):
            record[name]["continues"] = earlier
        write_json(self.out / "record.json", record)

    def recorded(self, folder=None):
        """record.json of a folder (this run's by default), {} without one. Raises ModelError."""
        path = (folder or self.out) / "record.json"
        remedy = "remove it; it only says how the parts were trained"
        return read_object(path, remedy) if path.exists() else {}

    def part_file(self, stage):
        part = stages.named(stage).part
        return self._own(f"parts/{stage}.safetensors", f"{part}.safetensors")

    def _own(self, name, there=None):
        """A file of this run, or else of `base`, or else of `init`, where it is called `there`."""
        places = [self.out / name]
        if self.base:
            places.append(self.base / name)
        if self.init:
            places.append(self.init / (there or name))
        return next((path for path in places if path.exists()), places[-1 if self.init else 0])


def main(stage, **options):
    """Run one stage, or `all` of them in order. Raises ValueError for an unknown stage."""
    if stage not in stages.names():
        known = ", ".join(stages.names())
        raise ValueError(f"unknown stage {stage!r}: choose one of {known}")
    run = Run(**options)
    for name in stages.STAGES if stage == "all" else (stage,):
        started = time.monotonic()
        run.stage(name)
        print(f"{name}: {(time.monotonic() - started) / 60:.1f} min")
