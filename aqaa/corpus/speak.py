"""The spoken corpus of the mini: plans are spoken into shards, and read back.

A corpus has parts, each a plan in a folder of its own (parts.py). A shard is a .npy of int16
samples at 16 kHz and a .jsonl with one Item a line; both appear whole or not at all, the .jsonl
last, so whatever is interrupted goes on where it stopped."""

import json
import multiprocessing
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from aqaa import files
from aqaa.config import GROUP_SECONDS, SAMPLE_RATE
from aqaa.corpus import engines
from aqaa.corpus import voices as V
from aqaa.corpus.facts import pieces
from aqaa.corpus.intents import said_as
from aqaa.corpus.plan import STORED, Item, plan_hash
from aqaa.files import reading, replacing
from aqaa.tokenizers.text import MANNERS

PARTS = ("questions", "open", "wider", "play", "later", "turns", "pictures", "people")
PER_SHARD = 400
ROUND = 8  # shards that a worker speaks before another takes its place
RESUME = "run `aqaa train corpus --resume`"
AGAIN = f"remove it and the file of the same name beside it, and {RESUME}"
TRIES = 60  # renders until the sound is clearly of the wanted class
LAST = "this is the last line"
VOWELS = set("aa ae ah ao aw ax axr ay eh er ey ih iy ow oy uh uw".split())


def speak(items, folder, workers=2, progress=True):
    """Speak Items into `folder`; shards already there are kept. Returns the Corpus.

    Raises FileNotFoundError without a synthesizer, ValueError for another plan's or for engines
    that are not those that began, WriteError."""
    folder = Path(folder)
    mine, todo = check(items, folder)
    files.probe(folder)
    files.sweep(folder)
    files.sweep_scratch()
    shards = _shards(items)
    if not (folder / "plan.json").exists():
        files.write_json(folder / "plan.json", mine)
    done = len(items) - sum(len(shards[i]) for i in todo)
    bar = tqdm(total=len(items), initial=done, unit="utt", disable=not progress, desc=folder.name)
    with bar:
        if workers < 2:
            for i in todo:
                bar.update(_speak_shard(i, shards[i], folder))
            return Corpus(folder)
        # Engines take ever more memory: workers are renewed, by a new pool each time, since one
        # that renews its own (max_tasks_per_child) can stop for good on Python 3.11.
        for start in range(0, len(todo), workers * ROUND):
            _speak_shards(todo[start : start + workers * ROUND], shards, folder, workers, bar)
    return Corpus(folder)


def _speak_shards(numbers, shards, folder, workers, bar):
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads
    with ProcessPoolExecutor(workers, context, _leave_quietly) as pool:
        futures = [pool.submit(_speak_shard, i, shards[i], folder) for i in numbers]
        try:
            for future in as_completed(futures):
                bar.update(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def check(items, folder):
    """(plan.json of a part, numbers of the shards left to speak), before any of it is spoken.

    Raises as `speak` does. A part that is whole needs no engine."""
    voices, shards = {item.voice for item in items}, _shards(items)
    todo = [i for i in range(len(shards)) if not _names(folder, i)[1].exists()]
    mine = {"hash": plan_hash(items), "items": len(items), "shards": len(shards)}
    began = head(folder)
    if began and began.get("hash") != mine["hash"]:
        raise ValueError(f"{folder} holds a corpus of another plan; give another folder or remove "
                         "this one.")
    if not todo:
        return began, todo
    engines.check_engines(voices)
    mine["engines"] = engines.versions(voices)
    for name, had in began.get("engines", {}).items():
        if had != (has := mine["engines"].get(name)):
            raise ValueError(f"{folder} was begun with {name} {had}, here is {has}: get the first "
                             "one, or remove the folder.")
    return mine, todo


def places(folder):
    """{part: its folder} of the parts that are there, in the order of PARTS; of a folder that holds
    a plan itself, {"": folder}."""
    folder = Path(folder)
    if (folder / "plan.json").exists():
        return {"": folder}
    return {part: folder / part for part in PARTS if (folder / part / "plan.json").exists()}


class Corpus:
    """Reader of a spoken corpus: of the parts in a folder, or of the one part that it holds itself.
    It may still be growing, then `complete` is False."""

    def __init__(self, folder):
        self.folder, self.places = Path(folder), places(folder)
        if not self.places:
            raise FileNotFoundError(f"{folder} holds no corpus; make one with `aqaa train corpus`.")
        self.heads = {part: head(place) for part, place in self.places.items()}
        self._items, self._shards, self._first = [], {}, {}
        for part, place in self.places.items():
            for path in sorted(place.glob("shard_*.jsonl")):
                with reading(path, AGAIN):
                    for line in path.read_text(encoding="utf-8").splitlines():
                        self._items.append(Item(**json.loads(line), part=part))

    @property
    def complete(self):
        """Whether all of the parts that were begun is spoken."""
        return len(self._items) == sum(head["items"] for head in self.heads.values())

    def items(self, **wanted):
        """Items with the given role, split, cell (see plan.Item)."""
        return [item for item in self._items
                if all(getattr(item, name) == value for name, value in wanted.items())]  # fmt: skip

    def wav(self, item):
        """int16 samples (N,) at 16 kHz."""
        shard = item.part, item.shard
        if shard not in self._shards:
            path = _names(self.places[item.part], item.shard)[0]
            with reading(path, AGAIN):
                self._shards[shard] = np.lib.format.open_memmap(path, mode="r")
        return np.array(self._shards[shard][item.offset : item.offset + item.length])

    def before(self, item):
        """The first question of a second one: it was planned just before it."""
        if not self._first:
            follows = zip(self._items, self._items[1:])
            self._first = {two.id: one for one, two in follows if one.role == "first"}
        return self._first[item.id]

    def answers(self):  # by answer_id
        return {item.answer_id: item for item in self.items(role="answer")}


def _names(folder, index):
    return [Path(folder, f"shard_{index:04d}.{kind}") for kind in ("npy", "jsonl")]


def head(folder):
    """plan.json of a part: {"hash", "items", "shards", "engines"}; {} without one. ModelError."""
    path = folder / "plan.json"
    return files.read_object(path, f"remove it, and {RESUME}") if path.exists() else {}


def _shards(items):
    return [items[i : i + PER_SHARD] for i in range(0, len(items), PER_SHARD)]


def _leave_quietly():  # a worker that Ctrl-C reaches cleans up; its parent says so, once
    signal.signal(signal.SIGINT, lambda *_: sys.exit(1))


def _speak_shard(index, items, folder):
    phones = phones_of(sorted({said_as(item.text) for item in items}))
    # A recording is not told what to say but where it lies.
    jobs = [(item.voice, item.source or said_as(words), how)
            for item in items if not item.want for words, how in _parts(item)]  # fmt: skip
    sounds = iter(engines.synthesize(jobs))
    wavs, lines, offset = [], [], 0
    for item in items:
        said = [] if item.voice.startswith("noise:") else phones[said_as(item.text)]
        item = replace(item, phones=said, shard=index, offset=offset)
        wav = _insist(item) if item.want else _finish(item, [next(sounds) for _ in _parts(item)])
        if not wav.any():
            raise RuntimeError(f"{item.voice} said nothing for {item.text!r}; is the synthesizer "
                               "installed whole?")
        item.length = len(wav)
        offset += len(wav)
        wavs.append(wav)
        stored = {name: getattr(item, name) for name in STORED}
        lines.append(json.dumps(stored, separators=(",", ":")))
    npy, jsonl = _names(folder, index)
    with replacing(npy) as part, open(part, "wb") as file:
        np.save(file, np.concatenate(wavs))
    with replacing(jsonl) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(items)


def _generator(item, attempt):
    return np.random.default_rng([item.seed & 0xFFFFFFFF, item.seed >> 32, attempt])


def _has_manner(item):
    """Whether it is said as its manner asks; a question's is that of its answer."""
    return item.manner and item.role not in ("question", "follow")


def _parts(item):
    """[(words, how they are said), …]: one, or several where an answer's manner changes."""
    if not _has_manner(item):
        return [(item.text, _how(item))]
    return [(words, V.HOW[manner]) for words, manner in pieces(item.text, item.manner)]


def _how(item, attempt=0):
    """The variation that the seed of a question draws."""
    if item.role == "people":
        return V.draw_recording(_generator(item, attempt))
    if item.voice in V.NATURAL and item.split == "train" and not item.want:
        return V.draw_natural(_generator(item, attempt))
    return V.draw(_generator(item, attempt), item.want, mild=item.split != "train")


def _finish(item, sounds, attempt=0):
    """Engine sounds -> int16 wav of the item; its f0, spread and rate are set."""
    if _has_manner(item):
        parts = zip(sounds, pieces(item.text, item.manner), strict=True)
        wav = np.concatenate([V.say_answer(*sound, manner) for sound, (_, manner) in parts])
        speech = V.trim(wav / np.float32(32768))
    else:
        ((samples, rate),), how = sounds, _how(item, attempt)
        speech = V.trim(V.to_16k(samples, rate, how.playback))
        wav = V.vary(speech, how, np.random.default_rng([item.seed & 0xFFFFFFFF, attempt, 1]))
    vars(item).update(V.measure(speech, sum(phone in VOWELS for phone in item.phones)))
    return wav


def joints(items):
    """{id: [groups of audio ids before each place where the manner changes]} of spoken answers,
    found by speaking their parts again; songs, and those of one manner, are left out."""
    items = [item for item in items if item.manner in MANNERS and _has_manner(item)]
    items = [item for item in items if len(_parts(item)) > 1]
    jobs = [(item.voice, said_as(words), how) for item in items for words, how in _parts(item)]
    sounds, found = iter(engines.synthesize(jobs)), {}
    for item in items:
        lengths = [len(V.say_answer(*next(sounds), manner))
                   for _, manner in pieces(item.text, item.manner)]  # fmt: skip
        groups = np.cumsum(lengths[:-1]) / (GROUP_SECONDS * SAMPLE_RATE)
        found[item.id] = np.rint(groups).astype(int).tolist()
    return found


def _insist(item):
    """Draw voice and variation again until what is measured lies clearly in the wanted class."""
    pool = V.TRAINING if item.voice in V.TRAINING else V.EVALUATION
    for attempt in range(TRIES):
        if attempt and item.voice in pool:  # a natural one stays itself
            item.voice = V.pick(_generator(item, attempt + TRIES), pool, item.want)
        sounds = engines.synthesize([(item.voice, item.text, _how(item, attempt))])
        wav = _finish(item, sounds, attempt)
        if V.belongs(vars(item), item.want):
            return wav
    raise RuntimeError(f"no render of {item.text!r} became {item.want} in {TRIES} tries; widen the "
                       "classes of voices.toml.")


def phones_of(lines):
    """{text: its CMU phones, without pauses} by flite's front end.

    kal would merge "ah" with "aa"; slt does not, and is quick at next to no duration."""
    command = "flite -voice slt --setf duration_stretch=0.02 -ps -o none -f".split()
    with files.scratch() as folder:
        path = folder / "lines.txt"
        # flite swallows a last text of one word: it gets company, whose phones are dropped.
        path.write_text("\n\n".join(f"{line}." for line in [*lines, LAST]), encoding="utf-8")
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True)
    spoken = [[p for p in line.split() if p != "pau"] for line in done.stdout.splitlines()]
    del spoken[-1:]
    if len(spoken) != len(lines):
        raise RuntimeError(f"flite made {len(spoken)} utterances of {len(lines)} texts; its front "
                           "end has changed.")
    return dict(zip(lines, spoken, strict=True))
