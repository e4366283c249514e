"""What a notebook cell shows without a front end: players, tables, code, records, every figure.

Nothing here needs JavaScript or a network, and the same input gives the same bytes."""

import base64
import inspect
import json
import os
import random
import textwrap
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import torch

import aqaa
from aqaa import audio
from aqaa.config import SAMPLE_RATE
from aqaa.files import data_folder
from aqaa.notebook import figures
from aqaa.notebook.charts import Table, bars, curves, ledger, radar
from aqaa.notebook.figures import attention, maps, mel, spectrogram, trajectory, waveform
from aqaa.notebook.strips import KINDS, alignment, blocks, sequence, streams, token_cells
from aqaa.sound_files import RATES
from aqaa.weights.sources import ROLES

__all__ = [
    "KINDS", "Player", "Sound", "Source", "Table", "alignment", "attention", "bars", "blocks",
    "check", "compare", "curves", "ledger", "maps", "mel", "question", "questions", "radar",
    "recorded", "released", "sequence", "setup", "shape", "sound", "source", "spectrogram",
    "streams", "table", "token_cells", "trajectory", "waveform",
]  # fmt: skip
FOLDERS = ("Step-Audio-Tokenizer", "Step-Audio-AQAA", "Step-Audio-TTS-3B")
PUBLISHED = dict(zip(ROLES, FOLDERS))


def setup(seed=0):
    """Begin a notebook: seeds, three digits, our figure style, one thread (see processor.py)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.set_printoptions(precision=3, sci_mode=False)
    np.set_printoptions(precision=3, suppress=True)
    matplotlib.rcParams.update(figures.STYLE)


class Sound:
    """A player: wav (N,) float32 at `rate` Hz; mp3: its bytes. level: put the peak at -3 dB."""

    def __init__(self, wav, rate=SAMPLE_RATE, title="", transcript="", level=True):
        self.wav, self.rate = figures.array(wav, 1, "the sound"), int(rate)
        self.title, self.transcript = title, transcript
        if not RATES[0] <= self.rate <= RATES[1]:
            raise ValueError(f"a sound of {rate} samples a second cannot be played: "
                             "pass its rate in Hz.")
        self.mp3 = audio.mp3(self.wav, self.rate, level)

    @property
    def seconds(self):
        """How long it lasts."""
        return len(self.wav) / self.rate

    def __repr__(self):
        words = f' "{self.transcript}"' if self.transcript else ""
        return f"<sound {self.seconds:.2f} s @ {self.rate} Hz{words}>"

    def _repr_html_(self):
        parts = self.title or "sound", self.transcript, f"{self.seconds:.2f} s"
        named = ", ".join(filter(None, parts))
        data = base64.b64encode(self.mp3).decode()
        words = f"<div>“{escape(self.transcript)}”</div>" if self.transcript else ""
        title = f"<b>{escape(self.title)}</b> · " if self.title else ""
        return (
            f'<figure style="margin:0"><figcaption>{title}{self.seconds:.2f} s</figcaption>'
            f'<audio controls preload="none" aria-label="{escape(named)}" '
            f'src="data:audio/mpeg;base64,{data}"></audio>{words}</figure>'
        )


sound = Sound  # as notebooks call it


class Player:
    """Several Sounds side by side, to compare."""

    def __init__(self, sounds):
        self.sounds = sounds

    def __repr__(self):
        return "\n".join(f"{sound.title}: {sound!r}" for sound in self.sounds)

    def _repr_html_(self):
        inside = "".join(sound._repr_html_() for sound in self.sounds)
        return f'<div style="display:flex;flex-wrap:wrap;gap:1.5em">{inside}</div>'


def compare(*pairs, rate=SAMPLE_RATE, transcript="", level=True):
    """Players side by side: (title, wav), (title, wav, transcript), or Sounds of any rate."""
    if not pairs:
        raise ValueError("compare needs sounds: pairs (title, wav), or what show.sound returned.")
    sounds = []
    for pair in pairs:
        if isinstance(pair, (tuple, list)) and len(pair) in (2, 3):
            title, wav, words = (*pair, transcript)[:3]
            pair = Sound(wav, rate, str(title), words, level)
        if not isinstance(pair, Sound):
            raise ValueError("compare takes (title, wav), (title, wav, transcript), or what "
                             "show.sound returned.")
        sounds.append(pair)
    return Player(sounds)


table = Table  # as notebooks call it


def shape(name, tensor, *axes):
    """Print a shape with the names of its axes: `mel  (batch 1, bins 80, frames 258)  float32`."""
    sizes = tuple(tensor.shape) if hasattr(tensor, "shape") else (len(tensor),)
    if len(axes) != len(sizes):
        raise ValueError(f"{name} has {len(sizes)} axes {sizes}: give as many names, not "
                         f"{len(axes)}.")
    kind = str(getattr(tensor, "dtype", type(tensor).__name__)).removeprefix("torch.")
    named = ", ".join(f"{axis} {size}" for axis, size in zip(axes, sizes))
    print(f"{name}  ({named})  {kind}")


class Source:
    """Code of the package as a highlighted block, in the colours of whoever shows it."""

    def __init__(self, path, name, code):
        self.path, self.name, self.code = path, name, code

    def __repr__(self):
        return f"<source of {self.name} in {self.path}, {len(self.code.splitlines())} lines>"

    def _repr_markdown_(self):
        return f"`{self.path}` · `{self.name}`\n\n```python\n{self.code}\n```"


def source(obj):
    """The package's code of a function, method, property or class, with its path."""
    name = getattr(obj, "attrname", None)  # of a cached property, whose function may be a lambda
    obj = getattr(obj, "fget", None) or getattr(obj, "func", None) or obj
    obj = inspect.unwrap(obj) if callable(obj) else obj
    try:
        path = Path(inspect.getsourcefile(obj)).resolve()
        code = textwrap.dedent(inspect.getsource(obj)).rstrip()
        path = path.relative_to(Path(aqaa.__file__).resolve().parent.parent)
    except (TypeError, OSError, ValueError):
        raise ValueError(f"{obj!r} has no code in this package: "
                         "pass a function or class of aqaa.") from None
    return Source(path.as_posix(), name or getattr(obj, "__qualname__", obj.__name__), code)


def recorded(name):
    """A result kept in data/runs/NAME.json: prints where it comes from, returns the dict."""
    paths = {path.stem: path for path in sorted((data_folder() / "runs").glob("*.json"))}
    if name not in paths:
        there = ", ".join(paths) or "none"
        raise ValueError(f"no run {name!r} is recorded in data/runs: there are {there}.")
    run = json.loads(paths[name].read_text(encoding="utf-8"))
    print(f"recorded on {run['date']}, commit {run['commit']}, {run['hardware']}: {run['command']}")
    return run


def released(role):
    """Path of the folder that $AQAA_TOKENIZER, $AQAA_BACKBONE or $AQAA_VOCODER names; where it
    names none, None and a sentence that says what to set."""
    if role not in PUBLISHED:
        raise ValueError(f"no released folder is a {role!r}: choose {', '.join(PUBLISHED)}.")
    variable = f"AQAA_{role.upper()}"
    if folder := os.environ.get(variable):
        return Path(folder)
    print(f"set ${variable} to the folder {PUBLISHED[role]} and run this cell again: "
          "it shows the published network")  # fmt: skip


def check(condition, message):
    """State something that should hold: prints "ok: message", or raises AssertionError with it."""
    try:
        holds = bool(condition)
    except (RuntimeError, ValueError):
        raise ValueError(f"check ({message}) got many values: "
                         "reduce them with .all() or torch.equal.") from None
    assert holds, f"this does not hold: {message}"
    print(f"ok: {message}")


def questions(folder=None):
    """The spoken questions of data/questions: dicts with file, path, transcript, answer, …"""
    folder = Path(folder) if folder else data_folder() / "questions"
    index = folder / "questions.json"
    if not index.is_file():
        raise ValueError(f"there is no questions.json in {folder.name}: "
                         "name a folder of questions.")
    place = Path(os.path.relpath(folder))  # so that no output depends on where the repository lies
    entries = json.loads(index.read_text(encoding="utf-8"))
    return [{**entry, "path": place / entry["file"]} for entry in entries]


def question(name="capital", folder=None):
    """The first question of that intent (or with that file name), as in `questions`."""
    for entry in questions(folder):
        if name in (entry["intent"], entry["file"], Path(entry["file"]).stem):
            return entry
    intents = ", ".join(dict.fromkeys(entry["intent"] for entry in questions(folder)))
    raise ValueError(f"no question {name!r}: choose one of {intents}.")
