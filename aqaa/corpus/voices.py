"""Speech of three Debian synthesizers: who speaks, how variations make more speakers of few, and the answer manners.

Training and evaluation voices are disjoint. Every render draws the engine's own rate and pitch, then a playback-rate
change that moves pitch and formants together, a gain, and sometimes noise or a room.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from math import gcd

import numpy as np
import soundfile
from scipy.signal import fftconvolve, lfilter, resample_poly

from aqaa.config import SAMPLE_RATE
from aqaa.files import scratch
from aqaa.pitch import f0

INSTALL = "apt-get install espeak-ng flite festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts"
ANSWER_VOICE = "flite:slt"
# espeak-ng 1.51 ignores a variant of "en-gb"; the same accent under its file name "en" takes it.
_VARIANTS = "m1 m2 m3 m5 m8 f1 f2 f5 croak".split()
_NEW_VARIANTS = "m4 m6 f3 f4".split()
TRAINING = (
    tuple(f"espeak:{accent}+{v}" for accent in ("en-us", "en") for v in _VARIANTS)
    + ("espeak:en-us", "espeak:en-gb", "flite:slt", "flite:awb", "flite:kal16", "festival:kal_diphone")
    + ("festival:cmu_us_slt_arctic_hts",)
)
EVALUATION = (
    tuple(f"espeak:{accent}+{v}" for accent in ("en-us", "en-gb-scotland", "en-029") for v in _NEW_VARIANTS)
    + ("espeak:en-gb-scotland", "espeak:en-029", "flite:rms", "festival:ked_diphone")
)
SHARES = {  # of training renders; slow engines get less
    "espeak": 0.57, "flite:slt": 0.09, "flite:awb": 0.09, "flite:kal16": 0.1, "festival:kal": 0.11, "festival:cmu": 0.04
}
FEMALE = ("+f", "slt")  # parts of voice names whose natural pitch is a woman's
_MEAN_F0 = {"slt": 172, "awb": 130, "kal16": 105, "rms": 95, "kal_diphone": 105, "ked_diphone": 100}  # Hz, as built
_SPREAD_F0 = {"slt": 22, "awb": 19, "kal16": 15, "rms": 12, "kal_diphone": 15, "ked_diphone": 15}


@dataclass(frozen=True)
class Manner:
    """How an answer is said: flite's duration stretch and f0 target, then gain in dB and spectral tilt (-1..1)."""

    stretch: float = 1.0
    mean: float = 172.0  # Hz
    spread: float = 22.0  # Hz, standard deviation
    gain: float = 0.0  # dB on top of the calibration that puts "normal" at -20 dBFS
    tilt: float = 0.0  # positive: brighter


MANNERS = {
    "normal": Manner(),
    "slow": Manner(stretch=1.55),
    "fast": Manner(stretch=0.66),
    "high": Manner(mean=255, spread=28),
    "low": Manner(mean=118, spread=14),
    "loud": Manner(gain=6, tilt=0.45),
    "soft": Manner(gain=-10, tilt=-0.6),
    "happy": Manner(stretch=0.86, mean=222, spread=48, gain=2, tilt=0.15),
    "sad": Manner(stretch=1.32, mean=140, spread=6, gain=-3, tilt=-0.4),
    "angry": Manner(stretch=0.8, mean=190, spread=36, gain=6, tilt=0.6),
    "calm": Manner(stretch=1.18, mean=152, spread=10, gain=-3, tilt=-0.25),
}
ANSWER_GAIN = 0.631  # brings flite's slt to -20 dBFS rms in the normal manner


def pick(rng, pool, want=""):
    """A voice of a pool, training voices by SHARES and others evenly; for a man or a woman one who may become it."""
    if want in ("man", "woman"):
        pool = [voice for voice in pool if gender(voice) == want]
    if want:  # the HTS voice has no knobs
        pool = [voice for voice in pool if "_hts" not in voice]
    if want or pool is not TRAINING:
        return str(rng.choice(pool))
    part = rng.choice(list(SHARES), p=list(SHARES.values()))
    return str(rng.choice([voice for voice in pool if voice.startswith(part)]))


def gender(voice):
    """The sex the voice's maker meant, "woman" or "man"; labels never come from it, only the choice of whom to try."""
    return "woman" if any(part in voice for part in FEMALE) else "man"


def check_engines(voices=TRAINING + EVALUATION):
    """Raises FileNotFoundError with the install line if a synthesizer is missing."""
    programs = {"espeak": "espeak-ng", "flite": "flite", "festival": "festival"}
    missing = sorted({programs[v.split(":")[0]] for v in voices if not shutil.which(programs[v.split(":")[0]])})
    if missing:
        raise FileNotFoundError(f"{' and '.join(missing)} not found: speaking the corpus needs it; run `{INSTALL}`.")


@dataclass
class Draw:
    """What one render draws. Rate 1 is the engine's own; pitch is a factor on the voice's f0; spread on its range."""

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


def draw(rng, want="", mild=False):
    """A Draw from a numpy Generator. `want` aims at an acoustic class; `mild`: no strong noise."""
    d = Draw(
        rate=rng.uniform(0.8, 1.28), pitch=2 ** rng.uniform(-0.33, 0.33), spread=2 ** rng.uniform(-1, 0.8),
        playback=rng.uniform(0.9, 1.12) if mild else rng.uniform(0.84, 1.19), gain=rng.uniform(-32, -14),
        lead=rng.uniform(0.05, 0.3), trail=rng.uniform(0.05, 0.3), mark=str(rng.choice(["", "", "?", "."])),
    )
    if rng.random() < 0.5:
        d.snr, d.color = rng.uniform(25, 40) if mild else rng.uniform(15, 40), rng.uniform(0, 0.97)
    if rng.random() < (0.15 if mild else 0.25):
        d.room, d.wet = rng.uniform(0.08, 0.35), rng.uniform(0.1, 0.45)
    aim = {
        "fast": dict(rate=(1.25, 1.6), playback=(0.98, 1.15)), "slow": dict(rate=(0.55, 0.8), playback=(0.86, 1.02)),
        "high": dict(pitch=(1.1, 1.5), playback=(1.0, 1.17)), "low": dict(pitch=(0.65, 0.95), playback=(0.86, 1.02)),
        "happy": dict(rate=(1.1, 1.45), pitch=(1.0, 1.3), spread=(1.8, 3.0)),
        "sad": dict(rate=(0.55, 0.85), pitch=(0.75, 1.0), spread=(0.05, 0.4)),
        "man": dict(pitch=(0.8, 1.05), playback=(0.88, 1.03)), "woman": dict(pitch=(0.95, 1.25), playback=(0.98, 1.14)),
    }.get(want, {})
    for name, (low, high) in aim.items():
        setattr(d, name, rng.uniform(low, high))
    return d


def synthesize(jobs):
    """Speak [(voice, text, Draw or Manner), …] -> list of (float samples (N,), rate), festival in one process."""
    sounds = [None] * len(jobs)
    with scratch() as folder:
        batch = []
        for i, (voice, text, how) in enumerate(jobs):
            engine, name = voice.split(":")
            path = f"{folder}/{i}.wav"
            if engine == "festival":
                batch.append((name, text, how, path))
            elif engine == "flite":
                _run(_flite(name, text, how, path))
            else:
                _run(_espeak(name, path, how), _ssml(text, how))
            if engine != "festival":
                sounds[i] = _load(path)
        if batch:
            script = f"{folder}/batch.scm"
            with open(script, "w", encoding="utf-8") as file:
                loaded = None
                for name, *rest in sorted(batch, key=lambda one: one[0]):  # loading a voice costs more than speaking
                    file.write(("" if name == loaded else f"(voice_{name})\n") + _scheme(name, *rest) + "\n")
                    loaded = name
            _run(["festival", "-b", script])
            for i in range(len(jobs)):
                if sounds[i] is None:
                    sounds[i] = _load(f"{folder}/{i}.wav")
    return sounds


def _run(command, text=None):
    done = subprocess.run(command, input=text, encoding="utf-8", capture_output=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with {done.stderr.strip()[:200]!r}; the command was {command}")


def _load(path):
    samples, rate = soundfile.read(path, dtype="float32")
    os.unlink(path)
    return samples, rate


def _flite(name, text, how, path):
    if isinstance(how, Manner):
        stretch, mean, spread = how.stretch, how.mean, how.spread
    else:
        stretch, mean = 1 / how.rate, _MEAN_F0[name] * how.pitch
        spread, text = _SPREAD_F0[name] * how.spread * how.pitch, text + how.mark
    features = dict(duration_stretch=stretch, int_f0_target_mean=mean, int_f0_target_stddev=spread)
    options = [part for key, value in features.items() for part in ("--setf", f"{key}={value:.4f}")]
    return ["flite", "-voice", name, *options, "-t", " " + text, "-o", path]


def _espeak(name, path, how):
    pitch = int(np.clip(58 + 60 * np.log2(how.pitch), 0, 99))  # near 50 is the variant's own
    return ["espeak-ng", "-v", name, "-s", str(int(165 * how.rate)), "-p", str(pitch), "-m", "-w", path]


def _ssml(text, how):
    return f'<prosody range="{int(100 * how.spread)}%">{text}{how.mark}</prosody>'


def _scheme(name, text, how, path):
    lines = [f"(Parameter.set 'Duration_Stretch {1 / how.rate:.4f})"]
    if name in _MEAN_F0:
        mean, spread = _MEAN_F0[name] * how.pitch, _SPREAD_F0[name] * how.spread * how.pitch
        lines.append(
            f"(set! int_lr_params '((target_f0_mean {mean:.1f}) (target_f0_std {spread:.1f}) "
            f"(model_f0_mean 170) (model_f0_std 34)))"
        )
    lines += [f'(set! u (utt.synth (Utterance Text "{text}{how.mark}")))', f"(utt.save.wave u \"{path}\" 'riff)"]
    return "\n".join(lines)


# ---- variation after the engine ----------------------------------------------------------------------------


def to_16k(samples, rate, playback=1.0):
    """Resample to 16 kHz while playing `playback` times as fast."""
    up, down = 160, round(160 * rate * playback / SAMPLE_RATE)
    common = gcd(up, down)
    return samples if up == down else resample_poly(samples, up // common, down // common).astype(np.float32)


def trim(wav, keep=0.08, floor=0.015):
    """Cut silence (below `floor` of the loudest 10 ms) at both ends, leaving `keep` seconds."""
    hop = SAMPLE_RATE // 100
    frames = np.abs(wav[: len(wav) // hop * hop]).reshape(-1, hop).max(1)
    loud = np.flatnonzero(frames > floor * frames.max()) if len(frames) else ()
    if not len(loud):
        return wav
    pad = int(keep * SAMPLE_RATE)
    return wav[max(0, loud[0] * hop - pad) : (loud[-1] + 1) * hop + pad]


def rms(wav):
    return float(np.sqrt(np.mean(np.square(wav, dtype=np.float64)) + 1e-20))


def vary(speech, d, rng):
    """Room, gain, silence and noise of a Draw, on trimmed speech (N,) at 16 kHz. Returns int16."""
    if d.room:
        n = int(d.room * SAMPLE_RATE)
        tail = rng.standard_normal(n) * np.exp(-6.9 * np.arange(n) / n)
        echo = fftconvolve(speech, tail)
        speech = np.pad(speech, (0, n - 1)) + d.wet * echo * (rms(speech) / rms(echo[: len(speech)]))
    speech = speech * (10 ** (d.gain / 20) / rms(speech))
    wav = np.pad(speech, (int(d.lead * SAMPLE_RATE), int(d.trail * SAMPLE_RATE)))
    if d.snr < 99:
        noise = lfilter([1], [1, -d.color], rng.standard_normal(len(wav)))
        wav = wav + noise * (rms(speech) * 10 ** (-d.snr / 20) / rms(noise))
    return to_int16(wav)


def to_int16(wav):
    """Rounds to int16; what exceeds full scale is scaled down, never clipped."""
    return np.round(np.asarray(wav) * (32767 / max(1.0, float(np.abs(wav).max())))).astype(np.int16)


def say_answer(samples, rate, manner):
    """An answer's int16 wav: its manner's tilt and gain on a fixed calibration, trimmed, whole groups of 120 ms."""
    how, wav = MANNERS[manner], trim(to_16k(samples, rate))
    if how.tilt:
        before = rms(wav)
        wav = lfilter([1, -how.tilt], [1], wav) if how.tilt > 0 else lfilter([1 + how.tilt], [1, how.tilt], wav)
        wav = wav * (before / rms(wav))
    wav = wav * ANSWER_GAIN * 10 ** (how.gain / 20)
    wav = np.where(np.abs(wav) > 0.7, np.sign(wav) * (0.7 + 0.3 * np.tanh((np.abs(wav) - 0.7) / 0.3)), wav)
    group = 1920
    return to_int16(np.pad(wav, (0, -len(wav) % group)))


# ---- measurement -------------------------------------------------------------------------------------------
CLASSES = {  # acoustic classes of a question: (measure, lowest, highest); the gaps between them stay empty
    "fast": (("rate", 5.4, 99),), "slow": (("rate", 0, 3.5),),
    "high": (("f0", 195, 999),), "low": (("f0", 0, 125),),
    "woman": (("f0", 175, 999),), "man": (("f0", 0, 130),),
    "happy": (("rate", 4.9, 99), ("spread", 1.7, 99)), "sad": (("rate", 0, 3.8), ("spread", 0, 0.8)),
}


def measure(speech, syllables):
    """f0 median in Hz, f0 spread (standard deviation in semitones), rate in syllables per second, of trimmed speech."""
    pitch = f0(speech, hop=320)
    voiced = pitch[pitch > 0]
    if len(voiced) < 5:
        return dict(f0=0.0, spread=0.0, rate=0.0)
    semitones = 12 * np.log2(voiced / np.median(voiced))
    inside = semitones[np.abs(semitones) < 9]
    seconds = max(len(speech) / SAMPLE_RATE - 0.16, 0.1)  # trim() leaves 80 ms at both ends
    return dict(
        f0=round(float(np.median(voiced)), 1), spread=round(float(inside.std()), 2), rate=round(syllables / seconds, 2)
    )


def belongs(measured, want):
    """Whether measured acoustics lie clearly in the wanted class."""
    return measured["f0"] > 0 and all(low <= measured[name] <= high for name, low, high in CLASSES.get(want, ()))
