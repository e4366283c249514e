"""Questions as systems with continuous features hear them in training.

Some thousand questions of the spoken corpus go through the finished encoders once, as they were
spoken and as a bent copy (augment.py); a run that is resumed finds what was computed. The encoders
stay as they are."""

from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from aqaa import audio
from aqaa.corpus import speak
from aqaa.corpus.codes import codes_file, store_codes, stored_codes
from aqaa.corpus.plan import spread, texts
from aqaa.corpus.voices import NATURAL
from aqaa.evaluation import stepeval
from aqaa.evaluation.accuracy import recording
from aqaa.evaluation.sets import Question
from aqaa.files import data_folder, read_object, reading, replacing, write_json
from aqaa.tokenizers.text import TextTokenizer, normalise
from aqaa.training import features
from aqaa.training.examples import NATURAL_WEIGHT, Book, Examples, swapped
from aqaa.training.speech_tokenizers import LinguisticTask, SemanticTask

MOST = 8000  # questions
BATCH = 64  # of them at once
AGAIN = "remove its folder and train again"
NO_CODES = np.zeros(0, np.int64), np.zeros(0, np.int64)


class Sounds:
    """A book of questions, their answers, and the features of every question in it.

    With `codes` the book has the questions' audio ids too; without them they are empty. Raises
    FileNotFoundError without a corpus, ValueError for one that asks nothing."""

    def __init__(self, run, codes=False):
        opened, there = speak.Corpus(run.corpus_folder), data_folder() / "codes"
        if run.init and (run.init.parent / "codes").is_dir():
            there = run.init.parent / "codes"
        answers, said = opened.answers(), stored_codes(there)
        asked = [item for item in opened.items(split="train") if item.role in ("question", "follow")
                 and item.answer_id in answers and item.answer_id in said]  # fmt: skip
        if not asked:
            raise ValueError(f"{run.corpus_folder} asks nothing that the answer voice answers: "
                             "make the corpus again.")  # fmt: skip
        asked = chosen(asked, MOST, run.seed)
        self.folder = prepare(run, opened, asked, codes)
        with reading(self.folder / "rows.npy", AGAIN):
            self.rows = np.lib.format.open_memmap(self.folder / "rows.npy", mode="r")
            self.starts = np.concatenate([[0], np.cumsum([row_count(item) for item in asked])])
            if len(self.rows) != 2 * self.starts[-1]:
                raise ValueError(f"{len(self.rows)} rows in place of {2 * self.starts[-1]}")
        self.none = torch.zeros(0, self.rows.shape[1])
        own = stored_codes(self.folder) if codes else {}
        names = [name for item in asked for name in (item.id, f"{item.id}~1")]
        own = {name: own.get(name, NO_CODES) for name in names}
        answered = [answers[name] for name in dict.fromkeys(item.answer_id for item in asked)]
        pairs = own | {item.id: said[item.answer_id] for item in answered}
        text = TextTokenizer.from_file(run.tokenizer_file())
        self.book = Book(run.config, text, [*asked, *answered], pairs, texts(opened.items()))
        self.book.spoken_words = [i for i in self.book.spoken_words if i < len(asked)]

    def features(self, index, variant):
        """(T, D) of a question of the book, as spoken (variant 0) or bent (1)."""
        start, end = self.starts[index : index + 2] + variant * self.starts[-1]
        return torch.from_numpy(self.rows[start:end].astype(np.float32))


class Heard(Examples):
    """Examples whose questions are heard as features: `features` (P, D) are those of the question
    drawn last, of none where it was written."""

    def __init__(self, sounds, mixture, **options):
        super().__init__(sounds.book, mixture, heard=0.0, **options)
        self.sounds = sounds

    def noisy(self, rng, index):
        """Audio ids of a variant of a question, whose features are kept."""
        variant = int(rng.integers(2))
        self.features = self.sounds.features(index, variant)
        return swapped(self.book.heard[index][variant], self.ids, self.noise, rng)

    def filled(self, rng, size):
        """[(ids, weights, features), …] of as many examples as have `size` inputs or more."""
        examples, inputs = [], 0
        while inputs < size:
            self.features = self.sounds.none
            examples.append((*self.draw(rng), self.features))
            inputs += np.shape(examples[-1][0])[-1] - 1
        return examples


def chosen(items, most, seed):
    """At most so many of the items: of rare intents and natural voices more than there are."""
    counts = Counter(item.intent for item in items)
    weights = np.array([counts[item.intent] ** -0.4 for item in items])
    weights *= [NATURAL_WEIGHT if item.voice in NATURAL else 1.0 for item in items]
    rng = np.random.default_rng(seed)
    picks = rng.choice(len(items), min(most, len(items)), replace=False, p=weights / weights.sum())
    return [items[i] for i in sorted(picks)]


def row_count(item):
    """Rows at 25 Hz of an Item."""
    return item.length // features.FRAME // 4


def prepare(run, opened, items, codes):
    """Compute and store the features of `items`, and their codes if wanted, unless they are there.
    Returns their folder: rows.npy (2 · T, D) fp16, as spoken, then bent; codes.npz."""
    folder = (run.base or run.out) / "sounds"
    done = folder / "sounds.json"
    facts = {"ids": [item.id for item in items], "codes": codes, "tokenizers": run.tokenizers()}
    if done.exists() and read_object(done, AGAIN) == facts:
        return folder
    makers, readers = run.makers(), ["semantic", *(["linguistic"] if codes else [])]
    models = {name: run.part(makers[name]) for name in readers}
    lengths = [row_count(item) for item in items]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    shape = int(2 * starts[-1]), run.config.semantic.n_audio_state
    said, order = {}, np.argsort([item.length for item in items], kind="stable")
    with replacing(folder / "rows.npy") as part:
        rows = np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape)
        for first in tqdm(range(0, len(items), BATCH), "sounds", unit="batch", disable=run.quiet):
            batch = order[first : first + BATCH]
            waves = [features.as_heard(items[i], opened.wav(items[i])) for i in batch]
            for bent in range(2):
                seed = (run.seed, first) if bent else None
                hidden, found = heard(models, run.config, waves, seed)
                for i, row in zip(batch, hidden, strict=True):
                    place = starts[i] + bent * starts[-1]
                    rows[place : place + lengths[i]] = row[: lengths[i]]
                for i, pair in zip(batch, found, strict=True):
                    said[items[i].id + "~1" * bent] = pair
        rows.flush()
    if codes:
        store_codes(codes_file(folder), list(said), *zip(*said.values(), strict=True))
    write_json(done, facts)
    return folder


@torch.no_grad()
def heard(models, config, waves, seed=None):
    """([(T, D) fp16, …], [(linguistic, semantic) codes, …]) of waves (N,), bent if there is a seed.
    Codes are empty without a linguistic tokenizer among the `models`."""
    hidden, codes = {}, {}
    for name, model in models.items():
        task = {"linguistic": LinguisticTask, "semantic": SemanticTask}[name]
        raw = [raw_rows(name, wave) for wave in waves]
        x, lengths = pad_sequence(raw, batch_first=True), torch.tensor([len(row) for row in raw])
        if seed:  # the same draws bend both tokenizers' features alike
            bend = task.bender(getattr(config, name))
            x = bend(x, lengths, np.random.default_rng(seed))[0]
        states = features.hidden(model, x, lengths)
        hidden[name] = [state[:n].half().numpy() for state, n in zip(states, lengths, strict=True)]
        codes[name] = [model.quantize(state[:n]).numpy()
                       for state, n in zip(states, lengths, strict=True)]  # fmt: skip
    if "linguistic" not in models:
        return hidden["semantic"], [NO_CODES] * len(waves)
    return hidden["semantic"], list(zip(codes["linguistic"], codes["semantic"], strict=True))


def raw_rows(name, wave):
    """What a tokenizer's encoder reads of a wave (N,): LFR rows (T, 560), or log-mels (T, 512)."""
    if name == "linguistic":
        return features.front_end().features(wave)
    log_mel = audio.log_mel(wave).T  # (frames, 128)
    return log_mel[: len(log_mel) // 4 * 4].reshape(-1, 4 * log_mel.shape[1])


# ---- comparisons ---------------------------------------------------------------------------------


def compare(run, system, stage, variants, count=120):
    """Train variants {name: settings} of a stage, with the same data and seed, and ask each so many
    spoken questions of the development split: {name: shares, see `stepeval.summarise`}, which is
    also in compare.json of the run. system: its class."""
    model, found = run.model(run.part(run.makers()["backbone"])), {}
    for number, (name, settings) in enumerate(variants.items()):
        child = run.beside(run.out / "compare" / str(number), run.training_seed)
        torch.manual_seed(run.training_seed)
        child.train(replace(stage, settings={**stage.settings, **settings}))
        out = child.out / "answers.jsonl"
        asked = development(speak.Corpus(run.corpus_folder), count)
        rows = stepeval.evaluate(system(model, folder=child.out), asked, out, resume=run.resume,
                                 quiet=run.quiet)  # fmt: skip
        found[name] = {"settings": settings, **stepeval.summarise(rows)["all"]}
        write_json(run.out / "compare.json", found)
    return found


def development(opened, count=None):
    """Questions of the development split of a corpus, `count` at most, for `stepeval.evaluate`."""
    questions = []
    for item in spread(opened.items(split="dev", role="question"), count):
        one = Question(item.id, item.category, [item.text], normalise(item.answer))
        one.turns = [recording(opened, item)]
        questions.append(one)
    return questions
