"""What a notebook cell shows without any front end: players, tables, code, recorded results, and every figure.

    from aqaa.notebook import show
    show.setup(seed)
    show.spectrogram(wav, title="A question")

Nothing here needs JavaScript or a network, and the same input gives the same bytes.
"""

import base64
import inspect
import io
import json
import os
import random
import textwrap
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import soundfile
import torch

import aqaa
from aqaa import audio
from aqaa.config import SAMPLE_RATE
from aqaa.files import data_folder
from aqaa.notebook.charts import Table, bars, curves, ledger, radar
from aqaa.notebook.figures import STYLE, Picture, array, attention, maps, mel, spectrogram, trajectory, waveform
from aqaa.notebook.strips import KINDS, alignment, blocks, sequence, streams, token_cells
from aqaa.weights.model_folder import ROLES

__all__ = [
    "KINDS", "Picture", "Player", "Sound", "Source", "Table", "alignment", "attention", "bars", "blocks", "check",
    "compare", "curves", "ledger", "maps", "mel", "question", "questions", "radar", "recorded", "released", "sequence",
    "setup", "shape", "sound", "source", "spectrogram", "streams", "table", "token_cells", "trajectory", "waveform",
]  # fmt: skip
MP3_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)  # Hz
PEAK = 10 ** (-3 / 20)  # of a player's sound: 3 dB below full scale
PUBLISHED = dict(zip(ROLES, ("Step-Audio-Tokenizer", "Step-Audio-AQAA", "Step-Audio-TTS-3B")))  # role: its folder


def setup(seed=0):
    """Begin a notebook: seed every generator, three digits, our figure style; one thread, as small matrices gain
    nothing from a second one and lose much where another program wants its core."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.set_printoptions(precision=3, sci_mode=False)
    np.set_printoptions(precision=3, suppress=True)
    matplotlib.rcParams.update(STYLE)


# ---- sound ----------------------------------------------------------------------------------------------------------


class Sound:
    """A player of one sound. `wav` (N,) float32 as handed in, `rate` Hz, `mp3` the bytes it plays."""

    def __init__(self, wav, rate=SAMPLE_RATE, title="", transcript="", level=True):
        self.wav, self.rate, self.title, self.transcript = array(wav, 1, "the sound"), int(rate), title, transcript
        if not audio.RATES[0] <= self.rate <= audio.RATES[1]:
            raise ValueError(f"a sound of {rate} samples a second cannot be played: pass its rate in Hz.")
        self.mp3 = _mp3(self.wav, self.rate, level)

    @property
    def seconds(self):
        """How long it lasts."""
        return len(self.wav) / self.rate

    def __repr__(self):
        words = f' "{self.transcript}"' if self.transcript else ""
        return f"<sound {self.seconds:.2f} s @ {self.rate} Hz{words}>"

    def _repr_html_(self):
        named = ", ".join(filter(None, [self.title or "sound", self.transcript, f"{self.seconds:.2f} s"]))
        words = f"<div>“{escape(self.transcript)}”</div>" if self.transcript else ""
        title = f"<b>{escape(self.title)}</b> · " if self.title else ""
        return (
            f'<figure style="margin:0"><figcaption>{title}{self.seconds:.2f} s</figcaption>'
            f'<audio controls preload="none" aria-label="{escape(named)}" '
            f'src="data:audio/mpeg;base64,{base64.b64encode(self.mp3).decode()}"></audio>{words}</figure>'
        )


def _mp3(wav, rate, level):
    """(N,) -> bytes of an MP3 at a rate that MP3 knows, about 4 KB a second, peak at -3 dB where level is true."""
    if rate not in MP3_RATES:
        to = next((known for known in MP3_RATES if known >= rate), MP3_RATES[-1])
        wav, rate = audio.resample(torch.from_numpy(wav), rate, to).numpy(), to
    peak = float(np.abs(wav).max())
    if level and peak > audio.SILENCE:
        wav = wav * (PEAK / peak)
    buffer = io.BytesIO()
    soundfile.write(
        buffer, np.clip(wav, -1, 1), rate, format="MP3", subtype="MPEG_LAYER_III", bitrate_mode="VARIABLE",
        compression_level=0.7,
    )  # fmt: skip
    return buffer.getvalue()


class Player:
    """Several Sounds side by side, to compare."""

    def __init__(self, sounds):
        self.sounds = sounds

    def __repr__(self):
        return "\n".join(f"{sound.title}: {sound!r}" for sound in self.sounds)

    def _repr_html_(self):
        inside = "".join(sound._repr_html_() for sound in self.sounds)
        return f'<div style="display:flex;flex-wrap:wrap;gap:1.5em">{inside}</div>'


def sound(wav, rate=SAMPLE_RATE, title="", transcript="", level=True):
    """A player: wav (N,) at `rate` Hz; level=False keeps its loudness, otherwise the peak is put at -3 dB."""
    return Sound(wav, rate, title, transcript, level)


def compare(*pairs, rate=SAMPLE_RATE, transcript="", level=True):
    """Players side by side: (title, wav) or (title, wav, transcript) each, or what `sound` gave (any rate)."""
    if not pairs:
        raise ValueError("compare needs sounds: pairs (title, wav), or what show.sound returned.")
    sounds = []
    for pair in pairs:
        if not isinstance(pair, (Sound, tuple, list)) or (not isinstance(pair, Sound) and len(pair) not in (2, 3)):
            raise ValueError("compare takes (title, wav), (title, wav, transcript), or what show.sound returned.")
        if not isinstance(pair, Sound):
            pair = Sound(pair[1], rate, str(pair[0]), pair[2] if len(pair) == 3 else transcript, level)
        sounds.append(pair)
    return Player(sounds)


# ---- words and numbers ----------------------------------------------------------------------------------------------


def table(rows, head=None, caption=""):
    """A table of rows (lists, or dicts whose keys are the head); plain text where HTML is not shown."""
    return Table(rows, head, caption)


def shape(name, tensor, *axes):
    """Print the shape with the names of its axes: `mel  (batch 1, bins 80, frames 258)  float32`."""
    sizes = tuple(tensor.shape) if hasattr(tensor, "shape") else (len(tensor),)
    if len(axes) != len(sizes):
        raise ValueError(f"{name} has {len(sizes)} axes {sizes}: give as many names, not {len(axes)}.")
    kind = str(getattr(tensor, "dtype", type(tensor).__name__)).removeprefix("torch.")
    print(f"{name}  ({', '.join(f'{axis} {size}' for axis, size in zip(axes, sizes))})  {kind}")


class Source:
    """Code of the package as a highlighted block, in the colours of whoever shows it."""

    def __init__(self, path, name, code):
        self.path, self.name, self.code = path, name, code

    def __repr__(self):
        return f"<source of {self.name} in {self.path}, {len(self.code.splitlines())} lines>"

    def _repr_markdown_(self):
        return f"`{self.path}` · `{self.name}`\n\n```python\n{self.code}\n```"


def source(obj):
    """The package's code of a function, method, property or class, with its path in the repository."""
    name = getattr(obj, "attrname", None)  # a cached property knows its own name, its function may be a lambda
    obj = getattr(obj, "fget", None) or getattr(obj, "func", None) or obj
    obj = inspect.unwrap(obj) if callable(obj) else obj
    try:
        path = Path(inspect.getsourcefile(obj)).resolve()
        code = textwrap.dedent(inspect.getsource(obj)).rstrip()
        path = path.relative_to(Path(aqaa.__file__).resolve().parent.parent)
    except (TypeError, OSError, ValueError):
        raise ValueError(f"{obj!r} has no code in this package: pass a function or class of aqaa.") from None
    return Source(path.as_posix(), name or getattr(obj, "__qualname__", obj.__name__), code)


def recorded(name):
    """A result measured once and kept in data/runs/NAME.json: prints where it comes from, returns the dict."""
    folder = data_folder() / "runs"
    path = folder / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(path.stem for path in folder.glob("*.json")))
        raise ValueError(f"no run {name!r} is recorded in data/runs: there are {there or 'none'}.")
    run = json.loads(path.read_text(encoding="utf-8"))
    print(f"recorded on {run['date']}, commit {run['commit']}, {run['hardware']}: {run['command']}")
    return run


def released(role):
    """Path of the released folder that $AQAA_TOKENIZER, $AQAA_BACKBONE or $AQAA_VOCODER names; None, and a sentence
    that says what to set, where it names none."""
    if role not in PUBLISHED:
        raise ValueError(f"no released folder is a {role!r}: choose {', '.join(PUBLISHED)}.")
    variable = f"AQAA_{role.upper()}"
    if folder := os.environ.get(variable):
        return Path(folder)
    print(f"set ${variable} to the folder {PUBLISHED[role]} and run this cell again: it shows the published network")


def check(condition, message):
    """State something and see whether it holds: prints "ok: message", or raises AssertionError with it."""
    try:
        holds = bool(condition)
    except (RuntimeError, ValueError):
        raise ValueError(f"check ({message}) got many values: reduce them with .all() or torch.equal.") from None
    assert holds, f"this does not hold: {message}"
    print(f"ok: {message}")


# ---- questions ------------------------------------------------------------------------------------------------------


def questions(folder=None):
    """The spoken questions of data/questions: dicts with file, path, transcript, answer, manner, intent, voice, …"""
    folder = Path(folder) if folder else data_folder() / "questions"
    index = folder / "questions.json"
    if not index.is_file():
        raise ValueError(f"there is no questions.json in {folder.name}: name a folder of questions.")
    place = Path(os.path.relpath(folder))  # relative, so that no output depends on where the repository lies
    return [{**entry, "path": place / entry["file"]} for entry in json.loads(index.read_text(encoding="utf-8"))]


def question(name="capital", folder=None):
    """The first question of that intent (or with that file name), as in `questions`."""
    known = questions(folder)
    for entry in known:
        if name in (entry["intent"], entry["file"], Path(entry["file"]).stem):
            return entry
    raise ValueError(f"no question {name!r}: choose one of {', '.join(dict.fromkeys(e['intent'] for e in known))}.")
