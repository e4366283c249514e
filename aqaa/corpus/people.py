"""Recordings of people: folders with a manifest, heard in training in several renders each.

manifest.json is a list of {"file", "text"} and, where some are kept for tests, "split": "train" or
none is heard in training, anything else never is. Texts are words in a-z, as they were said."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aqaa.corpus.facts import stable_hash
from aqaa.corpus.plan import Item
from aqaa.files import ModelError, read_json, reading

HELD_OUT = Path(__file__).with_name("held_out.txt")
COPIES, MAX_SECONDS = 3, 30
TRAIN = "train", None


class Overlap(ValueError):
    """What is for training is held out as well."""


@dataclass(frozen=True)
class Clip:
    path: Path
    text: str
    folder: str  # its name
    digest: str  # of the sound


def clips(folders, copies_of=HELD_OUT):
    """([Clip, …] to train on, [a sentence on each that is left out, …]) of folders of recordings.

    Raises ModelError for a manifest that is missing or none, Overlap where a recording is both for
    training and held out: in `copies_of` (see `held_out_of`), or by the split of another entry.
    ValueError if none is left."""
    held_out, known, found, faults = held_out_of(copies_of), {}, [], []
    for folder in map(Path, folders):
        for entry in manifest(folder):
            train = isinstance(entry, dict) and entry.get("split") in TRAIN
            try:
                path, code = _sound(folder, entry)
                mine = path, train
                twin = known.setdefault(code, mine)
                if train and code in held_out:
                    raise Overlap(f"{path} is one of the recordings that this model is tested on: "
                                  "take it out of the manifest, or give it another split.")
                if twin[1] != train:
                    raise Overlap(f"{path} is the same sound as {twin[0]}, of another split: "
                                  "leave one of them out.")
                if train and twin is not mine:
                    raise ValueError(f"{path} is the same sound as {twin[0]}: it is heard once.")
                if train:
                    found.append(Clip(path, _text(path, entry), folder.resolve().name, code))
            except Overlap:
                raise
            except ValueError as fault:
                faults.append(str(fault))
    if not found:
        raise ValueError(f"no recording in {', '.join(map(str, folders))} can be trained on: see "
                         + (f"the first fault, {faults[0]}" if faults else "its splits."))
    return found, faults


def plan(clips, seed=0, copies=COPIES):
    """Items of role "people": each Clip in so many renders, varied as its seed draws."""
    pairs = [(clip, copy) for clip in clips for copy in range(copies)]
    return [
        Item(f"p{number:06d}", "train", "", "people", clip.text, f"people:{clip.folder}",
             stable_hash(str(seed), "people", clip.digest, str(copy)),
             slots={"file": clip.path.name}, source=str(clip.path))
        for number, (clip, copy) in enumerate(pairs)
    ]  # fmt: skip


def manifest(folder):
    """The list in manifest.json of a folder. Raises ModelError."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ModelError(f"{path} is missing: it lists the recordings, as "
                         '[{"file": "a.wav", "text": "what is said"}].')
    with reading(path, 'write it as [{"file": "a.wav", "text": "what is said"}]'):
        entries = read_json(path)
        if not isinstance(entries, list):
            raise ValueError(f"it holds a {type(entries).__name__}, not a list")
    return entries


def _sound(folder, entry):
    """(path, digest) of the sound of an entry. Raises ValueError for none that can be heard."""
    name = entry.get("file") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"{folder}/manifest.json has an entry without a file: name its sound.")
    path = (folder / name).resolve()
    return path, digest(read(path)[0])


def _text(path, entry):
    """The words of an entry, one blank between them. Raises ValueError for other characters."""
    text = entry.get("text")
    if not isinstance(text, str) or not re.search("[a-z0-9]", text.lower()):
        raise ValueError(f"{path} has no text: write what is said in it.")
    if odd := re.search("[^a-z' ]", text):
        remedy = "spell numbers out" if odd[0].isdigit() else "write words in a-z and '"
        raise ValueError(f"{path} has a text with {odd[0]!r} in it: {remedy}.")
    return " ".join(text.split())


def read(path):
    """(samples (N,) float32, rate) of a recording. Raises ValueError: missing, no sound, too long,
    or nothing in it."""
    from aqaa import sound_files

    samples, rate = sound_files.read(path, MAX_SECONDS)
    samples = samples.numpy()
    if not len(samples) or not np.abs(samples).max() > 0:
        raise ValueError(f"{path} is silent: record it again.")
    return samples, rate


def digest(samples):
    """16 hex digits of the SHA-256 of (N,) float samples as int16 (little endian), at their own
    rate: the same for a wav and a flac of it, another for a cut or resampled copy."""
    whole = np.clip(np.round(samples * 32768.0), -32768, 32767).astype("<i2")
    return hashlib.sha256(whole.tobytes()).hexdigest()[:16]


def held_out_of(path):
    """The set of digests in a file of one a line; lines that begin with # are comments."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}


def hold_out(folders, whose, path=HELD_OUT):
    """Write `path`: digests of what is not for training in folders of recordings, sorted, below
    `whose` they are. All of a folder is held out where its manifest names no split.

    The shipped file: `python -c "from aqaa.corpus.people import hold_out as h; h(['commands',
    'digits', 'questions'], 'whose …')"`. Another libsndfile than 1.2 may decode MP3 otherwise."""
    made = set()
    for folder in map(Path, folders):
        entries = manifest(folder)
        for_tests = all(entry.get("split") is None for entry in entries)
        made |= {digest(read(folder / entry["file"])[0]) for entry in entries
                 if for_tests or entry.get("split") not in TRAIN}  # fmt: skip
    lines = [f"# Never in training: {whose}.", *sorted(made)]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made


def play(jobs):
    """The engine of recordings: [(folder's name, path, Draw), …] -> [(samples, rate), …]."""
    return [read(path) for _, path, _ in jobs]
