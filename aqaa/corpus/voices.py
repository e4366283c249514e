"""Who speaks, variations that make many voices of few, and the manners of answers.

Training and evaluation voices are disjoint. Every render draws the engine's rate and pitch, then a
playback rate (moves pitch and formants together), a gain, and sometimes noise, a room or a line.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.signal import lfilter, resample_poly

from aqaa.config import GROUP_SECONDS, SAMPLE_RATE
from aqaa.corpus import degrade
from aqaa.pitch import f0

ANSWER_VOICE = "hibari:heart"
NOTE_GROUPS = 4  # of a note, 0.48 s: every note is a slot of its own
PLAYBACK = (0.84, 1.19), (0.9, 1.12)  # bounds of the usual and of the mild variations
FEMALE = ("+f", "slt", "hibari", ":jf_")  # parts of voice names whose natural pitch is a woman's


@dataclass
class Draw:
    """What one render draws, and how an answer is said: rate, pitch and spread are factors on the
    voice's own."""

    rate: float = 1.0
    pitch: float = 1.0
    spread: float = 1.0
    playback: float = 1.0  # > 1: faster and higher, formants too
    gain: float = -20.0  # dBFS rms
    snr: float = 99.0  # dB
    color: float = 0.0  # pole of the noise: 0 white, 0.95 rumble
    room: float = 0.0  # s, reverberation time
    wet: float = 0.0
    lead: float = 0.1  # s of silence
    trail: float = 0.1
    mark: str = ""  # punctuation given to the engine
    formants: float = 1.0  # factor on them alone, where an engine can (hibari)
    breath: float = 0.0  # dB on the noise in the voice (hibari)
    tilt: float = 0.0  # -1..1; positive: brighter (answers)
    note: float = 0.0  # Hz; above 0: sung, on this f0 (hibari)
    line: str = ""  # what the sound comes through: a name of degrade.LINES


TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
TRAINING, EVALUATION, DEVELOPMENT, NATURAL, NATURAL_HELD_OUT = (
    tuple(TABLES[name].split())
    for name in ("training", "evaluation", "development", "natural", "natural_held_out")
)
MANNERS = {name: Draw(**TABLES["answers"] | own) for name, own in TABLES["manners"].items()}
NOTES = {
    name: Draw(**TABLES["answers"] | TABLES["sung"]["how"],
               note=TABLES["sung"]["first"] * 2 ** (steps / 12))
    for name, steps in TABLES["notes"].items()
}  # fmt: skip
HOW = MANNERS | NOTES
CLASSES = {name: entry["is"] for name, entry in TABLES["classes"].items()}
AIMS = {"": {}} | {name: entry["aim"] for name, entry in TABLES["classes"].items()}


def pick(rng, pool, want=""):
    """A voice of a pool that may become `want`: training voices by shares, others evenly."""
    if want in ("man", "woman"):
        pool = [voice for voice in pool if gender(voice) == want]
    if want:  # the HTS voice has no knobs
        pool = [voice for voice in pool if "_hts" not in voice]
    if want or pool is not TRAINING:
        return str(rng.choice(pool))
    shares = TABLES["shares"]
    part = rng.choice(list(shares), p=list(shares.values()))
    return str(rng.choice([voice for voice in pool if voice.startswith(part)]))


def gender(voice):
    """The sex its maker meant ("woman" or "man"): for whom to try only, labels are measured."""
    return "woman" if any(part in voice for part in FEMALE) else "man"


def draw(rng, want="", mild=False):
    """A Draw from a numpy Generator. `want` aims at an acoustic class; `mild`: no strong noise."""
    d = Draw(
        rate=rng.uniform(0.8, 1.28), pitch=2 ** rng.uniform(-0.33, 0.33),
        spread=2 ** rng.uniform(-1, 0.8), playback=rng.uniform(*PLAYBACK[mild]),
        gain=rng.uniform(-32, -14), lead=rng.uniform(0.05, 0.3), trail=rng.uniform(0.05, 0.3),
        mark=str(rng.choice(["", "", "?", "."])),
    )  # fmt: skip
    if rng.random() < 0.5:
        d.snr = rng.uniform(25 if mild else 15, 40)
        d.color = rng.uniform(0, 0.97)
    if rng.random() < (0.15 if mild else 0.25):
        d.room = rng.uniform(0.08, 0.35)
        d.wet = rng.uniform(0.1, 0.45)
    for name, bounds in AIMS[want].items():
        setattr(d, name, rng.uniform(*bounds))
    return d


def to_16k(samples, rate, playback=1.0):
    """Resample to 16 kHz while playing `playback` times as fast."""
    up, down = 160, round(160 * rate * playback / SAMPLE_RATE)  # resample_poly divides by their gcd
    return samples if up == down else resample_poly(samples, up, down).astype(np.float32)


def draw_natural(rng):
    """A Draw for a natural voice: wider in pitch than a synthesizer bears, and through more lines.

    One in three is a low voice: most natural styles are women's."""
    d = draw(rng)
    d.rate, d.spread = rng.uniform(0.75, 1.3), 2 ** rng.uniform(-0.7, 0.6)
    d.pitch = 2 ** (rng.uniform(-1.0, -0.5) if rng.random() < 0.33 else rng.uniform(-0.4, 0.4))
    low = d.pitch < 0.71
    d.formants = rng.uniform(0.8, 0.95) if low else rng.uniform(0.88, 1.15)
    d.playback = rng.uniform(0.85, 1.05) if low else rng.uniform(0.88, 1.15)
    d.breath = rng.uniform(-6, 6)
    if rng.random() < 0.3:
        d.line = str(rng.choice(list(degrade.LINES)))
    return d


def draw_recording(rng):
    """A Draw for a recording of a person: what can be done to a wave, mildly in playback."""
    d = draw(rng)
    d.playback = rng.uniform(*PLAYBACK[True])
    if rng.random() < 0.3:
        d.line = str(rng.choice(list(degrade.LINES)))
    return d


def trim(wav, keep=0.08, floor=0.015):
    """Cut silence (below `floor` of the loudest 10 ms) at both ends, leaving `keep` seconds."""
    hop = SAMPLE_RATE // 100
    frames = np.abs(wav[: len(wav) // hop * hop]).reshape(-1, hop).max(1)
    loud = np.flatnonzero(frames > floor * frames.max()) if len(frames) else ()
    if not len(loud):
        return wav
    pad = int(keep * SAMPLE_RATE)
    return wav[max(0, loud[0] * hop - pad) : (loud[-1] + 1) * hop + pad]


def vary(speech, d, rng):
    """Room, gain, silence, noise and line of a Draw, on trimmed speech (N,) at 16 kHz. int16."""
    if d.room:
        speech = degrade.room(speech, d.room, d.wet, rng)
    speech = speech * (10 ** (d.gain / 20) / degrade.rms(speech))
    wav = np.pad(speech, (int(d.lead * SAMPLE_RATE), int(d.trail * SAMPLE_RATE)))
    if d.snr < 99:
        wav = degrade.noise(wav, d.snr, rng, d.color, level=degrade.rms(speech))
    if d.line:
        wav = degrade.LINES[d.line](wav)
    return to_int16(wav)


def to_int16(wav):
    """Rounds to int16; what exceeds full scale is scaled down, never clipped."""
    peak = max(1.0, float(np.abs(wav).max()))
    return np.round(np.asarray(wav) * (32767 / peak)).astype(np.int16)


def say_answer(samples, rate, manner):
    """An answer's int16 wave: spectral tilt and level of its manner, in whole groups; of a note,
    NOTE_GROUPS of them, whatever the length of the word."""
    how, group = HOW[manner], round(GROUP_SECONDS * SAMPLE_RATE)
    wav = trim(to_16k(samples, rate, how.playback), 0.03 if how.note else 0.08)
    if how.note:
        wav = wav[: NOTE_GROUPS * group]
        fade = np.clip(np.arange(len(wav), 0, -1) / 480, 0, 1)  # 30 ms
        wav = np.pad(wav * fade, (0, NOTE_GROUPS * group - len(wav)))
    if how.tilt:
        zeros, poles = ([1, -how.tilt], [1]) if how.tilt > 0 else ([1 + how.tilt], [1, how.tilt])
        wav = lfilter(zeros, poles, wav)
    wav = wav * (10 ** (how.gain / 20) / degrade.rms(wav))
    loud = np.abs(wav)  # above 0.7 it bends towards full scale
    wav = np.where(loud > 0.7, np.sign(wav) * (0.7 + 0.3 * np.tanh((loud - 0.7) / 0.3)), wav)
    return to_int16(np.pad(wav, (0, -len(wav) % group)))


def measure(speech, syllables):
    """{"f0": median Hz, "spread": semitones, "rate": syllables a second}; all 0 where unvoiced."""
    pitch = f0(speech, hop=320)
    voiced = pitch[pitch > 0]
    if len(voiced) < 5:
        return {"f0": 0.0, "spread": 0.0, "rate": 0.0}
    median = np.median(voiced)
    semitones = 12 * np.log2(voiced / median)
    spread = float(semitones[np.abs(semitones) < 9].std())
    rate = syllables / max(len(speech) / SAMPLE_RATE - 0.16, 0.1)  # trim() leaves 80 ms at each end
    return {"f0": round(float(median), 1), "spread": round(spread, 2), "rate": round(rate, 2)}


def belongs(measured, want):
    """Whether measured acoustics lie clearly in the wanted class."""
    bounds = CLASSES.get(want, {}).items()
    return measured["f0"] > 0 and all(low <= measured[key] <= high for key, (low, high) in bounds)
