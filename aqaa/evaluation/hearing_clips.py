"""The clips of `aqaa bench hearing`: voices that speak, and people, by families (hearing.toml).

Spoken clips are made once, and kept as one FLAC each under a name that is the hash of all that
decides its sound: a later run hears the same ones."""

import json
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import soundfile

from aqaa import audio, files
from aqaa.config import SAMPLE_RATE
from aqaa.corpus import engines, natural
from aqaa.corpus import voices as V
from aqaa.corpus.facts import number, stable_hash
from aqaa.corpus.plan import open_plan, plan
from aqaa.corpus.sentences import open_sentences, ordinal
from aqaa.corpus.speak import phones_of
from aqaa.tokenizers.phones import phone_ids

TABLES = tomllib.loads(Path(__file__).with_name("hearing.toml").read_text(encoding="utf-8"))
SPOKEN, PEOPLE = TABLES["spoken"], TABLES["people"]
KINDS = ("questions", "open")  # of texts that voices speak
COUNT = 48  # clips of a family and kind
SHARE = "/usr/share"
AT_ONCE = 24  # clips that an engine is given together: what is made is kept


@dataclass
class Clip:
    """One recording. wav: (N,) float32 at 16 kHz; phones: ids of what was said."""

    text: str
    wav: np.ndarray
    phones: tuple = ()


def texts(seed=0, count=COUNT):
    """{kind: [(place, text), …]}: questions in wordings that training never has, and sentences of
    the open vocabulary that are no training sentence. A sentence that leaves moves no other one."""
    asked = [item for item in plan() if item.cell.startswith("new_") and not item.want]
    asked = sorted({item.text for item in asked})
    questions = Random(f"hearing {seed}").sample(asked, count)
    known = {item.text for item in open_plan()}
    drawn = open_sentences(2 * count, Random(f"hearing, open {seed}"))
    unknown = [pair for pair in enumerate(drawn) if pair[1] not in known]
    return {"questions": list(enumerate(questions)), "open": unknown[:count]}


def voices_of(family):
    return getattr(V, SPOKEN[family], None) or tuple(SPOKEN[family].split())


def absent(family):
    """One sentence on what a family lacks, and how to get it; "" where nothing is missing."""
    if family in PEOPLE:
        package, folder = PEOPLE[family]["package"], Path(SHARE, PEOPLE[family]["folder"])
        return "" if folder.is_dir() else f"no {folder}: run `apt-get install {package}`."
    if family == "styles" and not os.environ.get(natural.STYLES_ENV):
        return f"Kokoro's English styles are not at hand: {natural.STYLES_HELP}."
    try:
        engines.check_engines({*voices_of(family), "flite:slt"})  # flite knows the phones
    except FileNotFoundError as fault:
        return str(fault)
    return ""


def spoken(family, lines, folder, seed=0):
    """Clips of [(place, text), …] by the voices of a family in turn, clean, at slightly different
    rates. Those in `folder` are read, the others are made."""
    voices, jobs, paths = voices_of(family), [], []
    for place, text in lines:
        voice = voices[place % len(voices)]
        key = stable_hash(str(seed), voice, text)
        rng = np.random.default_rng(key & 0xFFFFFFFF)
        how = V.Draw(rate=rng.uniform(0.92, 1.08), lead=rng.uniform(0.1, 0.3), trail=0.2)
        jobs.append((voice, text, how))
        paths.append(Path(folder, family, f"{key:016x}.flac"))
    todo = [i for i, path in enumerate(paths) if not path.exists()]
    if todo:
        files.probe(Path(folder, family))
    for start in range(0, len(todo), AT_ONCE):
        some = todo[start : start + AT_ONCE]
        for i, sound in zip(some, engines.synthesize([jobs[i] for i in some]), strict=True):
            wav = V.vary(V.trim(V.to_16k(*sound)), jobs[i][2], None)
            with files.replacing(paths[i]) as part:
                soundfile.write(part, wav, SAMPLE_RATE, "PCM_16", format="FLAC")
    return [Clip(text, _read(path)) for (_, text), path in zip(lines, paths, strict=True)]


def _read(path):
    return audio.load_question(str(path)).numpy()


def people(family):
    """Clips of people in a package of Debian."""
    folder = Path(SHARE, PEOPLE[family]["folder"])
    return [Clip(text, _read(folder / name)) for name, text in TRANSCRIPTS[family](folder)]


def _transcribed(name):
    """(file, text) of lines "<s> words </s> (name)"."""

    def read(folder):
        for line in (folder / name).read_text(encoding="utf-8").splitlines():
            text, _, file = line.rpartition("(")
            text = text.replace("<s>", "").replace("</s>", "")
            yield f"{file.strip(' )')}.wav", " ".join(text.split())

    return read


def _prompts(folder):
    """(file, text) of Asterisk's prompts."""
    lists = {name: words.split() for name, words in TABLES["asterisk"].items()}
    for digit in lists["numbers"]:
        yield f"digits/{digit}.wav", number(int(digit))
    for digit in lists["ordinals"]:
        yield f"digits/h-{digit}.wav", ordinal(int(digit))
    for kind, names in (("day", lists["days"]), ("mon", lists["months"])):
        yield from ((f"digits/{kind}-{i}.wav", name) for i, name in enumerate(names))
    yield from ((f"digits/{word}.wav", word) for word in lists["digits"])
    yield from ((f"letters/{letter}.wav", letter) for letter in "abcdefghijklmnopqrstuvwxyz")
    for name in lists["words"]:
        yield f"{name}.wav", name.replace("im-", "i'm ").replace("-", " ")


TRANSCRIPTS = {
    "librivox": _transcribed("transcription"), "cards": _transcribed("cards.transcription"),
    "asterisk": _prompts,
    "klettres": lambda folder: [(path.name, path.stem.lower())
                                for path in sorted(folder.glob("?.ogg"))],
}  # fmt: skip


def recorded(folder):
    """Clips of people in a folder with manifest.json, a list of {"file", "text" (or "digit"),
    "split"}; of splits only "evaluation", and what has none. Raises ValueError."""
    path, remedy = Path(folder) / "manifest.json", "mend the manifest, or get the folder again"
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        rows = [(row["file"], row["text"] if "text" in row else number(int(row["digit"])))
                for row in rows if row.get("split", "evaluation") == "evaluation"]  # fmt: skip
    except OSError as fault:
        raise ValueError(f"{path} cannot be read ({fault.strerror}): --people names a folder of "
                         "clips with their manifest.json.") from None  # fmt: skip
    except (ValueError, LookupError, TypeError, AttributeError) as fault:
        raise ValueError(f"{path} is no list of clips ({files.brief(fault)}): {remedy}.") from None
    if not rows:
        raise ValueError(f"{path} has no clip for evaluation: {remedy}.")
    if lost := [name for name, _ in rows if not Path(folder, name).is_file()]:
        raise ValueError(f"{path} names {lost[0]}, which is not there: {remedy}.")
    return [Clip(text, _read(Path(folder, name))) for name, text in rows]


def with_phones(clips):
    """The same Clips, their phones filled in by flite's front end."""
    known = phones_of(sorted({clip.text for clip in clips}))
    for clip in clips:
        clip.phones = phone_ids(known[clip.text])
    return clips
