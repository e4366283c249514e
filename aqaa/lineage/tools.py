"""What AudioGPT and HuggingGPT share: backbones with a role of their own, a describer of voices,
changers of sound, and vectors of words by which a tool is found.

Sound is (N,) float32 with its rate in Hz. Which voices are to be told apart, and in what words,
stands in the curriculum (Voice Understanding): of each aspect two."""

import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from scipy.signal import find_peaks
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from aqaa.audio import resample
from aqaa.config import SAMPLE_RATE
from aqaa.corpus.curriculum import FACTS, VOICE
from aqaa.corpus.intents import INTENTS
from aqaa.corpus.wider import UNHEARD
from aqaa.fast import prepare
from aqaa.pipeline import AQAA
from aqaa.pitch import f0

ASPECTS = {name: {fact.want: fact.answer for fact in FACTS[name]}
           for name, intent in INTENTS.items() if intent.category == VOICE}  # fmt: skip
WANTS = [want for said in ASPECTS.values() for want in said]
HOP = 160  # samples of a measuring frame, 10 ms
FLOOR = 25.0  # dB under the loudest frame: what is fainter is no speech
PACES = range(1, 11)  # Hz: how often a second the energy swings, syllables among them
MEASURES = 8 + len(PACES)
WINDOW = 512  # samples of a frame of the phase vocoder; four of them overlap


def role(model, backbone):
    """An AQAA that shares all parts of `model` but its backbone, which learnt one role alone."""
    own = {"backbone": prepare(backbone).to(model.device)}
    return AQAA(model.config, lambda name: own.get(name) or getattr(model, name),
                device=model.device)  # fmt: skip


def replied(writer, words, said=()):
    """What the model of a Writer writes to a question in words. said: the turns before it."""
    model = writer.model
    prompt = model.prompt(model.text.encode(words), said)
    return writer.told(prompt) if words.split() else UNHEARD


# ---- what a voice is like ------------------------------------------------------------------------


def measures(wav):
    """wav (N,) at 16 kHz → (MEASURES,) float32: pitch in octaves above 100 Hz (its 10th, 50th and
    90th percentile), its spread in semitones, the share of voiced frames, energy in bels, peaks of
    the energy a second, seconds of speech, and how much the energy swings at each of PACES, in
    nepers. All 0 where there is no speech."""
    wav = np.asarray(wav, np.float32)
    frames = wav[: len(wav) // HOP * HOP].reshape(-1, HOP)  # (T, HOP)
    power = gaussian_filter1d(np.square(frames, dtype=np.float64).mean(1), 2) if len(frames) else 0
    level = 10 * np.log10(np.maximum(power, 1e-10))  # (T,) dBFS
    speech = np.flatnonzero(level > max(level.max(initial=-90) - FLOOR, -80)) if len(frames) else []
    if len(speech) < 10:
        return np.zeros(MEASURES, np.float32)
    first, last = speech[0], speech[-1] + 1
    pitch = f0(wav[first * HOP : last * HOP], HOP)
    octaves = np.log2(pitch[pitch > 0] / 100) if (pitch > 0).sum() > 4 else np.zeros(1)
    low, middle, high = np.percentile(octaves, (10, 50, 90))
    off = octaves - middle
    spread = off[np.abs(off) < 0.75]  # farther ones are errors of the tracker
    spread = 12 * spread.std() if len(spread) else 0.0
    level = np.maximum(level[first:last], level.max() - FLOOR)
    seconds = len(level) / 100
    swings = np.abs(np.fft.rfft((level - level.mean()) * np.hanning(len(level)), 2048))  # 0.05 Hz
    swings = [np.log(swings[20 * pace - 10 : 20 * pace + 10].mean() + 1) for pace in PACES]
    peaks = len(find_peaks(level, prominence=2)[0]) / seconds
    energy = float(level[level > level.max() - FLOOR].mean())
    return np.array([low, middle, high, spread, (pitch > 0).mean(), energy / 10, peaks,
                     seconds, *swings], np.float32)  # fmt: skip


class Describer(nn.Module):
    """Tells of a voice, by its `measures`, which of the two of an aspect it is like."""

    def __init__(self, width=32):
        super().__init__()
        self.register_buffer("mean", torch.zeros(MEASURES))
        self.register_buffer("scale", torch.ones(MEASURES))
        layers = nn.Linear(MEASURES, width), nn.SiLU(), nn.Linear(width, len(WANTS))
        self.net = nn.Sequential(*layers)

    def forward(self, measured):
        """(B, MEASURES) → logits (B, len(WANTS)): only those of one aspect are to be compared."""
        return self.net((measured - self.mean) / self.scale)

    @torch.no_grad()
    def says(self, aspect, wav, rate=SAMPLE_RATE):
        """The sentence that a sound (N,) deserves in an aspect."""
        measured = torch.from_numpy(measures(resample(torch.as_tensor(wav), rate, SAMPLE_RATE)))
        logits = self(measured[None].to(self.mean.device))[0]
        want = max(ASPECTS[aspect], key=lambda want: float(logits[WANTS.index(want)]))
        return ASPECTS[aspect][want]


# ---- changers of sound ---------------------------------------------------------------------------


def stretched(wav, factor):
    """(N,) said in `factor` times its time, at the same pitch, by a phase vocoder."""
    from torchaudio.functional import phase_vocoder  # 0.1 s that other questions save

    hop, window = WINDOW // 4, torch.hann_window(WINDOW)
    wave = torch.as_tensor(np.asarray(wav, np.float32))
    if len(wave) <= WINDOW:
        return wave.numpy()  # a few milliseconds: nothing to be heard
    options = {"n_fft": WINDOW, "hop_length": hop, "window": window}
    spectrum = torch.stft(wave, **options, return_complex=True)  # (F, T)
    advance = torch.linspace(0, torch.pi * hop, WINDOW // 2 + 1)[:, None]
    slowed = phase_vocoder(spectrum, 1 / factor, advance)
    return torch.istft(slowed, **options, length=round(len(wave) * factor)).numpy()


def shifted(wav, semitones):
    """(N,) of the same length whose pitch, formants too, is so much higher: stretched, then played
    faster."""
    factor = 2 ** (semitones / 12)
    played = resample(torch.from_numpy(stretched(wav, factor)), round(1000 * factor), 1000)
    return np.resize(played.numpy(), len(wav)) if len(played) else np.asarray(wav, np.float32)


def louder(wav, decibels):
    """(N,) so many dB louder; what would exceed full scale bends towards it."""
    wav = np.asarray(wav, np.float32) * np.float32(10 ** (decibels / 20))
    bent = np.sign(wav) * (0.7 + 0.3 * np.tanh((np.abs(wav) - 0.7) / 0.3))
    return np.where(np.abs(wav) > 0.7, bent, wav).astype(np.float32)


# ---- tools by their descriptions ----------------------------------------------------------------

SOUND, TEXT = "sound", "text"


@dataclass(frozen=True)
class Tool:
    """What a planner may have called. takes, gives: "sound", a pair ((N,), Hz), or "text"."""

    name: str
    description: str
    takes: str
    gives: str


TOOLS = (
    Tool("recogniser", "writes down the words that are spoken in a recording", SOUND, TEXT),
    Tool("answerer", "answers a written question", TEXT, TEXT),
    Tool("synthesizer", "reads a text aloud", TEXT, SOUND),
    Tool("voice_pitch", "tells whether a voice is high or low", SOUND, TEXT),
    Tool("voice_rate", "tells whether someone speaks fast or slowly", SOUND, TEXT),
    Tool("voice_mood", "tells whether a speaker is happy or sad", SOUND, TEXT),
    Tool("voice_person", "tells whether a man or a woman is speaking", SOUND, TEXT),
    Tool("slower", "plays a recording more slowly", SOUND, SOUND),
    Tool("faster", "plays a recording faster", SOUND, SOUND),
    Tool("higher", "raises the pitch of a recording", SOUND, SOUND),
    Tool("lower", "lowers the pitch of a recording", SOUND, SOUND),
    Tool("louder", "turns up the volume of a recording", SOUND, SOUND),
    Tool("softer", "turns down the volume of a recording", SOUND, SOUND),
)
CHANGERS = {  # of (N,) samples, whatever their rate
    "slower": lambda wav: stretched(wav, 1.35), "faster": lambda wav: stretched(wav, 0.74),
    "higher": lambda wav: shifted(wav, 4), "lower": lambda wav: shifted(wav, -4),
    "louder": lambda wav: louder(wav, 8), "softer": lambda wav: louder(wav, -8),
}  # fmt: skip


# ---- words as vectors ----------------------------------------------------------------------------


@cache
def pieces(word, size):
    """Rows of a table of `size`: of a word and of its trigrams, by their hashes."""
    marked = f"<{word}>"
    parts = [marked, *(marked[i : i + 3] for i in range(len(marked) - 2))]
    return [zlib.crc32(part.encode()) % size for part in parts]


class Words(nn.Module):
    """Vectors of words, also of those that were never seen: the mean of some rows of a table."""

    def __init__(self, size=3072, width=48):
        super().__init__()
        self.size = size
        self.embed = nn.EmbeddingBag(size, width, mode="mean")

    def forward(self, lines):
        """lines: B lists of words → vectors (B, T, D) and which of them are words, (B, T) bool."""
        longest = max(1, *map(len, lines))
        padded = [[*line, *[""] * (longest - len(line))] for line in lines]
        rows = [pieces(word, self.size) for line in padded for word in line]
        device = self.embed.weight.device
        starts = torch.tensor([0, *map(len, rows)])[:-1].cumsum(0).to(device)
        flat = torch.tensor([row for word in rows for row in word], device=device)
        vectors = self.embed(flat, starts).view(len(lines), longest, -1)
        counts = torch.tensor([len(line) for line in lines], device=device)
        return vectors, torch.arange(longest, device=device) < counts[:, None]


class Reader(nn.Module):
    """Words, and what they mean among their neighbours, by a recurrent network of both ways."""

    def __init__(self, width=48):
        super().__init__()
        self.words = Words(width=width)
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)

    def forward(self, lines):
        """B lists of words → their vectors (B, T, D), hidden states (B, T, 2 D), 0 behind the last
        word, and which are words (B, T) bool."""
        vectors, there = self.words(lines)
        lengths = there.sum(1).clamp(min=1).cpu()
        packed = pack_padded_sequence(vectors, lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.gru(packed)[0], True, total_length=there.shape[1])
        return vectors, hidden, there
