"""How an answer is said, measured: length, rate, pitch level, pitch range, loudness.

A manner is judged against the same sentence said normally. The four moods are the rules over these
measures by which the curriculum's moods were made; they do not measure emotion."""

import re
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.signal import butter, find_peaks, sosfilt

from aqaa.config import GROUP_SECONDS, SAMPLE_RATE
from aqaa.corpus.voices import NOTE_GROUPS, NOTES
from aqaa.pitch import f0

HOP = 160  # samples between measuring frames: 10 ms
FLOOR = 25  # dB under the loudest frame: quieter frames (stops, breath, noise) are no speech
TUNE = 1.0  # semitones that a note may be off
OUTLIER = 9  # semitones from the median: farther ones are errors of the tracker
# Smallest changes that count: relative, semitones, semitones, dB.
MARGIN = {"seconds": 0.05, "f0": 0.5, "f0_range": 0.0, "energy": 1.0}
RULES = {  # what goes up (+1) or down (-1) against the normal manner; all of a row's must hold
    "slow": {"seconds": 1}, "fast": {"seconds": -1},
    "high": {"f0": 1}, "low": {"f0": -1},
    "loud": {"energy": 1}, "soft": {"energy": -1},
    "happy": {"seconds": -1, "f0": 1, "f0_range": 1},
    "sad": {"seconds": 1, "f0": -1, "f0_range": -1, "energy": -1},
    "angry": {"seconds": -1, "energy": 1},
    "calm": {"seconds": 1, "f0": -1, "energy": -1},
}  # fmt: skip


@dataclass(frozen=True)
class Measures:
    """Of one recording; all zero when it holds no speech.

    seconds: from the first to the last frame of speech. rate: syllables per second of that. f0:
    median in Hz, 0 when nothing is voiced. f0_range: 10th to 90th percentile in semitones. energy:
    rms of the speech frames in dBFS."""

    seconds: float = 0.0
    rate: float = 0.0
    f0: float = 0.0
    f0_range: float = 0.0
    energy: float = -120.0


def measure(wav, text=None):
    """Measures of wav (N,) float at 16 kHz. The rate counts the syllables of `text`, else the
    energy's peaks (good to about a syllable in six). Raises ValueError for another shape of wav."""
    wav = np.asarray(wav, dtype=np.float32)
    if wav.ndim != 1:
        raise ValueError(f"measure takes one mono wav (N,), got shape {wav.shape}")
    frames = wav[: len(wav) // HOP * HOP].reshape(-1, HOP)  # (T, HOP)
    power = np.square(frames, dtype=np.float64).mean(1)  # (T,)
    speech = np.flatnonzero(power > max(power.max(initial=0) * 10 ** (-FLOOR / 10), 1e-10))
    if not len(speech):
        return Measures()
    first, last = speech[0], speech[-1] + 1
    seconds = float(last - first) * HOP / SAMPLE_RATE
    part = wav[first * HOP : last * HOP]
    pitch = f0(part)
    voiced = pitch[pitch > 0]
    median = float(np.median(voiced)) if len(voiced) else 0.0
    semitones = 12 * np.log2(voiced / median) if median else np.zeros(1)
    low, high = np.percentile(semitones[np.abs(semitones) < OUTLIER], (10, 90))
    rate = (syllables(text) if text else envelope_peaks(part)) / seconds
    energy = float(10 * np.log10(power[speech].mean()))
    return Measures(seconds, rate, median, float(high - low), energy)


def syllables(text):
    """Syllables of an English text, by its groups of vowel letters; each word has one at least."""
    count = 0
    for word in re.findall(r"[a-z]+", text.lower()):
        groups = len(re.findall(r"[aeiouy]+", word))
        silent = re.search(r"([^aeiouyl]|[aeiouy]l)es?$|[^aeioutd]ed$", word)
        silent = silent and not re.search(r"[cgsxzh]es$", word)
        count += max(1, groups - bool(silent))
    return count


def envelope_peaks(wav):
    """Syllables of wav (N,) counted without words: peaks of the energy from 300 to 3000 Hz."""
    band = sosfilt(butter(2, (300, 3000), "bandpass", fs=SAMPLE_RATE, output="sos"), wav)
    frames = band[: len(band) // HOP * HOP].reshape(-1, HOP)
    level = 10 * np.log10(gaussian_filter1d(np.square(frames).mean(1), 3) + 1e-10)  # dB, 70 ms wide
    return len(find_peaks(np.maximum(level, level.max() - 25), prominence=2)[0])


def compare(answer_wav, normal_wav):
    """{measure: change}: seconds as a ratio minus 1, f0 and f0_range in semitones, energy in dB."""
    return changes(measure(answer_wav), measure(normal_wav))


def changes(answer, normal):
    """As `compare`, of two Measures; one that either of the two lacks does not change."""
    longer = answer.seconds / normal.seconds if answer.seconds and normal.seconds else 1.0
    higher = answer.f0 / normal.f0 if answer.f0 and normal.f0 else 1.0
    wider, louder = answer.f0_range - normal.f0_range, answer.energy - normal.energy
    f0_change = 12 * float(np.log2(higher))
    return {"seconds": longer - 1, "f0": f0_change, "f0_range": wider, "energy": louder}


def direction(manner, answer_wav, normal_wav):
    """Whether answer_wav differs from the same sentence said normally as RULES[manner] asks. Raises
    ValueError for a manner without a rule, as "normal" is: there is nothing to compare."""
    if manner not in RULES:
        raise ValueError(f"no rule for the manner {manner!r}: choose one of {', '.join(RULES)}")
    return follows(manner, compare(answer_wav, normal_wav))


def follows(manner, change):
    """Whether a change, as of `changes`, goes where RULES[manner] asks, by more than MARGIN."""
    return all(sign * change[name] > MARGIN[name] for name, sign in RULES[manner].items())


def directions(parts, answer_wav, normal_wav, judge):
    """The same of a sentence whose manner may change: each of its parts, (words, manner), is held
    against the same words said normally. False where the judge, a Judge, finds no place to cut."""
    cuts = [cut(wav, parts, judge) for wav in (answer_wav, normal_wav)]
    return all(cuts) and all(
        direction(manner, one, other) for (_, manner), one, other in zip(parts, *cuts, strict=True)
    )


def in_tune(notes, wav):
    """Whether wav (N,) sings the notes, each in its slot of NOTE_GROUPS groups from the beginning:
    the median f0 of every slot is within TUNE of its note. Which words are sung does not count."""
    slot = round(NOTE_GROUPS * GROUP_SECONDS * SAMPLE_RATE)
    if len(wav) >= (len(notes) + 1) * slot:
        return False  # it sings one note too many
    for i, note in enumerate(notes):
        pitch = f0(np.asarray(wav)[i * slot : (i + 1) * slot], hop=HOP)
        voiced = pitch[pitch > 0]
        if not len(voiced) or abs(12 * np.log2(np.median(voiced) / NOTES[note].note)) >= TUNE:
            return False
    return True


def cut(wav, parts, judge):
    """Waves of the parts, (words, manner), of a sentence that wav (N,) says, cut halfway between
    the words on both sides; [] where the judge does not find them."""
    if len(parts) == 1:
        return [wav]
    found = judge.when(wav, " ".join(words for words, _ in parts))
    if not found:
        return []
    before = np.cumsum([len(words.split()) for words, _ in parts[:-1]])  # words before each cut
    seconds = [(found[i - 1][2] + found[i][1]) / 2 for i in before]
    return np.split(np.asarray(wav), [round(at * SAMPLE_RATE) for at in seconds])
