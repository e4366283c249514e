"""Sets of spoken questions: ours, and three published ones as they are downloaded.

Ours is a folder or a zip with set.json, which `stepeval.pack` writes. Of the published ones a
folder is read: StepEval-Audio-360 (a parquet that names files of audios.tar.gz; its columns are
published nowhere in text), VoiceBench (parquet or jsonl that holds the sounds) and URO-Bench (a
jsonl beside its wavs). Whatever names or holds a sound in a row is a turn of the user, in order."""

import base64
import io
import json
import re
import tarfile
import zipfile
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import soundfile

from aqaa import audio
from aqaa.evaluation import whisper
from aqaa.evaluation.robustness import CLEAN, degraded
from aqaa.files import DAMAGE, ModelError, brief, data_folder, reading, refusing
from aqaa.tokenizers.text import normalise

SHIPPED = "stepeval-mini"
CATEGORIES = (
    "Speech Emotion Control", "Creativity", "Language Ability", "Gaming", "Role-playing",
    "Logical Reasoning", "Voice Understanding", "Voice Instruction Following", "Sing",
)  # fmt: skip
STEPEVAL = "stepeval-audio-360"
PUBLISHED = {  # what a row of each is known to have
    STEPEVAL: "a category and names of files in audios.tar.gz",
    "voicebench": "prompt and audio, perhaps reference",
    "uro-bench": "source_wav and source_text, or a dialogue of them, perhaps target_text",
}
SOUND = re.compile(r"\.(wav|mp3|flac|ogg|opus)$", re.IGNORECASE)
TEXT = ("source_text", "prompt", "turns", "transcript", "question", "text", "content", "value")
ANSWER = ("reference", "target_text", "expected_answer", "answer", "output")
CATEGORY, ROLE = ("category", "task", "type", "class", "dimension"), ("role", "from", "speaker")
OTHERS = ("assistant", "gpt", "model", "bot", "system")  # whose turns are not asked
SHORT = 5  # words of an answer that must occur in what is said; a longer one is left to a judge
CHOICE = re.compile(r"\b(?:answer|option|choice)\W+(?:is\W+)?(?:option\W+)?([a-e])\b"
                    r"|^\W*([a-e])(?:[.):,]|\W*$)", re.IGNORECASE)  # fmt: skip


@dataclass
class Question:
    """One item of a set. texts: of its turns; turns: their sounds, (N,) float32 at 16 kHz each,
    which `read` gives by the names in `files` when they are asked. answer: what is right, "" where
    nobody says; others are as right. rule: how a text is compared with it, "whole", "words" (it
    occurs), "letter" (of a choice) or None."""

    id: str
    category: str
    texts: list
    answer: str
    manner: str = "normal"
    normal: dict | None = None
    files: list = field(default_factory=list, repr=False)
    read: object = field(default=None, repr=False)
    rule: str | None = "whole"
    others: tuple = ()
    condition: str = CLEAN

    @cached_property
    def turns(self):
        sounds = [_sound(self.read, name) for name in self.files]
        return [degraded(sound, self.condition, f"{self.id} {n}") for n, sound in enumerate(sounds)]

    def right(self, text):
        """Whether a text gives the answer; None where no rule can tell."""
        if self.rule == "whole":
            return normalise(text) == self.answer
        if self.rule == "letter":
            found = CHOICE.search(text)
            return bool(found) and (found[1] or found[2]).upper() == self.answer.upper()
        said, answers = f" {whisper.words(text)} ", (self.answer, *self.others)
        return self.rule and any(f" {whisper.words(one)} " in said for one in answers)


def load(name):
    """(name of a set, [Question, …]); NAME:FOLDER says which of PUBLISHED it is. Raises ModelError
    where there is none, or it is no set."""
    kind, _, folder = str(name).partition(":")
    path = Path(folder if kind in PUBLISHED else name)
    path = data_folder() / f"{SHIPPED}.zip" if name == SHIPPED else path
    if not path.exists():
        raise ModelError(f"there is no set at {path}: name a folder with a set.json, one of "
                         f"{', '.join(PUBLISHED)}, or {SHIPPED}.")  # fmt: skip
    files = sorted([*path.rglob("*.parquet"), *path.rglob("*.jsonl")])
    if files and not (path / "set.json").exists():
        title, items = _published(path, files, kind if kind in PUBLISHED else None)
    else:
        with reading(path, "get the set again"):
            file = None if path.is_dir() else zipfile.ZipFile(path)
            read = file.read if file else lambda name: (path / name).read_bytes()
            told = json.loads(read("set.json"))
            items = [_question(item, read) for item in told["items"]]
        title = str(told.get("name", path.stem))
    if not items or len({item.id for item in items}) < len(items):
        raise ModelError(f"{path} holds no questions, or two of one id: get the set again.")
    return title, items


def _question(item, read):
    turns = item["turns"]
    texts, files = [turn["text"] for turn in turns], [turn["file"] for turn in turns]
    return Question(str(item["id"]), item["category"], texts, normalise(item["answer"]),
                    item.get("manner") or "normal", item.get("normal"), files, read)  # fmt: skip


def _sound(read, name):
    """(N,) float32 at 16 kHz of a file of a set. Raises ModelError."""
    try:
        samples, rate = soundfile.read(io.BytesIO(read(name)), dtype="float32", always_2d=True)
    except (*DAMAGE, tarfile.TarError) as fault:  # a fault of soundfile is a RuntimeError
        row = "{0.name}, row {2}, sound {3}".format(*name) if isinstance(name, tuple) else name
        said = f"{row} of the set cannot be read ({brief(fault)}): get it again."
        raise ModelError(said) from None
    return np.asarray(audio.resample(samples.mean(1), rate), np.float32)


# ---- published sets ------------------------------------------------------------------------------


def _published(folder, files, kind):
    """(name, [Question, …]) of a folder of parquet or jsonl files."""
    items, archive = [], next(folder.rglob("audios.tar*"), None)
    for path in files:
        home = path.parent if path.parent.name != "data" else path.parent.parent
        split = re.sub(r"-\d+-of-\d+$", "", path.stem)
        subset = home.name if home != folder or split in ("test", "train") else split
        for group, number, row in _all_rows(path):
            found = _turns(row)
            if not kind and {"source_wav", "dialogue"} & set(row):
                kind = "uro-bench"
            kind = kind or (STEPEVAL if archive else "voicebench" if found else None)
            category = _category(row) if kind == STEPEVAL else subset
            if not found or not category:
                wanted = PUBLISHED.get(kind) or ", or ".join(PUBLISHED.values())
                raise ModelError(f"{path} is not {kind or 'a published set'} as it was published, "
                                 f"its columns are {', '.join(map(str, row))}: expected "
                                 f"{wanted}.")  # fmt: skip
            texts, answers = [one[2] for one in found], found[-1][3] or []
            if isinstance(texts[0], list):  # one list of the row, for all of its turns
                texts = (texts[0] + [""] * len(found))[: len(found)]
            answers = answers if isinstance(answers, list) else [answers]
            answers = [str(one) for one in answers[-1:] if len(answers) == len(found)] or [
                str(one) for one in answers]  # fmt: skip
            name = re.sub(r"[^\w.-]+", "_", f"{subset}-{len(items):05d}")
            items.append(Question(
                name, category, [str(text or "") for text in texts], (answers or [""])[0],
                files=[(path, group, number, n) for n in range(len(found))],
                read=_reader(folder, archive), rule=_rule(answers), others=tuple(answers[1:]),
            ))  # fmt: skip
    return kind or folder.name, items


def _category(row):
    """The value of the row that names one of the nine, else the column that is called so."""
    known = {re.sub(r"\W|_", "", name.lower()): name for name in CATEGORIES}
    words = (re.sub(r"\W|_", "", value.lower()) for value in row.values() if isinstance(value, str))
    return next((known[word] for word in words if word in known), None) or _first(row, CATEGORY)


def _rule(answers):
    if not answers or all(re.fullmatch("[A-Ea-e]", one) for one in answers):
        return "letter" if answers else None
    lengths = [len(whisper.words(one).split()) for one in answers]
    return "words" if 0 < min(lengths) and max(lengths) <= SHORT else None


def _first(row, names):
    return next((row[name] for name in names if row.get(name)), None)


def _turns(row):
    return [one for one in _walk(row) if one[1] not in OTHERS]


def _walk(value, role="user", text=None, answer=None):
    """(sound, role, text, answer) of each sound in a row: bytes, base64, or the name of a file."""
    if isinstance(value, dict) and isinstance(value.get("bytes"), (bytes, str)):
        yield value["bytes"], role, text, answer
    elif isinstance(value, dict):
        role = str(_first(value, ROLE) or role).lower()
        text, answer = _first(value, TEXT) or text, _first(value, ANSWER) or answer
        for part in value.values():
            yield from _walk(part, role, text, answer)
    elif isinstance(value, list):
        for part in value:
            yield from _walk(part, role, text, answer)
    elif isinstance(value, bytes) or isinstance(value, str) and SOUND.search(value):
        yield value, role, text, answer
    elif isinstance(value, str) and value[:1] in "[{" and value[-1:] in "]}":
        try:
            yield from _walk(json.loads(value), role, text, answer)
        except ValueError:
            return


def _all_rows(path):
    """(group, number, row) of a file; of a parquet its groups are read one by one."""
    for group in range(_parquet(path).num_row_groups if path.suffix == ".parquet" else 1):
        for number, row in enumerate(_rows(path, group)):
            yield group, number, row


@lru_cache(1)
def _rows(path, group):
    with reading(path, "get the set again"):
        if path.suffix == ".parquet":
            return _parquet(path).read_row_group(group).to_pylist()
        lines = path.read_text(encoding="utf-8").splitlines()
        return [dict(json.loads(line)) for line in lines if line.strip()]


def _parquet(path):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ModelError(f"{path} needs a reader of parquet: pip install pyarrow.") from None
    with reading(path, "get the set again"):
        return ParquetFile(path)


@lru_cache(1)
def _reader(folder, archive):
    """A function that reads a sound of a published set: in its row, beside it, or in the archive,
    which is never unpacked."""
    with refusing(f"{archive} is damaged", "get the set again", *DAMAGE, tarfile.TarError):
        file = tarfile.open(archive) if archive else None
        members = {Path(one.name).name: one for one in file or () if one.isfile()}

    def read(name):
        path, group, number, n = name
        sound = _turns(_rows(path, group)[number])[n][0]
        if isinstance(sound, bytes):
            return sound
        if not SOUND.search(sound):
            return base64.b64decode(sound, validate=True)
        beside = [place / sound for place in (path.parent, folder) if (place / sound).is_file()]
        return beside[0].read_bytes() if beside else file.extractfile(
            members[Path(sound).name]).read()  # fmt: skip

    return read
