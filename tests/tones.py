"""A speaker made of tones: it takes the place of the synthesizers where the logic around them is tested.

It obeys what is measured later on (rate, f0 and its spread) and gives every phone a colour of its own, so that the
corpus, the features and a training run in miniature need no engine.
"""

from zlib import crc32

import numpy as np

from aqaa.corpus import engines, speak, voices

NEEDED = [voices.ANSWER_VOICE, "espeak:en", "flite:slt", "festival:ked_diphone"]
ENGINES = not engines.absent(NEEDED)  # whether tests with the real ones are collected
RATE = 16_000
SYLLABLES = 4.4  # a second, at rate 1
LETTERS = "ae b k d eh f g hh ih jh k l m n aa p k r s t ah v w k iy z".split()  # of a to z
SILENCE = np.zeros(RATE // 10, dtype=np.float32)
HARMONICS = np.arange(1, 9)


def spell(text):
    """Phones of a text, one a letter; of neighbouring vowels only the first is said."""
    phones = []
    for word in text.split():
        spelt = [LETTERS[ord(letter) - ord("a")] for letter in word if letter.isalpha()]
        vowels = [phone in speak.VOWELS for phone in spelt]
        phones += [phone for i, phone in enumerate(spelt) if not (i and vowels[i] and vowels[i - 1])]
    return phones


def phones_of(lines):
    """Stands in for speak.phones_of."""
    return {line: spell(line) for line in lines}


def synthesize(jobs):
    """Stands in for engines.synthesize: [(voice, text, Draw), …] -> list of (samples (N,), rate)."""
    return [(say(*job), RATE) for job in jobs]


def say(voice, text, how):
    """One utterance (N,) float32, 0.1 s of silence at both ends."""
    phones = spell(text)
    vowels = np.array([phone in speak.VOWELS for phone in phones])
    woman = voices.gender(voice) == "woman" or "mix" in voice and round(1e6 * how.lead) % 2  # a mix is anybody
    base = (195 if woman else 112) * (0.95 + crc32(voice.encode()) % 100 / 1000)
    rate, pitch, spread = how.rate, base * how.pitch, 1.3 * how.spread
    seconds = max(1, vowels.sum()) / (SYLLABLES * rate)  # lone letters may have no vowel
    edges = np.cumsum(1 + vowels) / np.sum(1 + vowels) * seconds * RATE  # a vowel takes twice the time
    time = np.arange(int(seconds * RATE)) / RATE
    swing = np.sin(2 * np.pi * max(2, round(2 * seconds)) * time / seconds)
    phase = 2 * np.pi * np.cumsum(pitch * 2 ** (2**0.5 * spread * swing / 12)) / RATE
    colour = [(1 if phone in speak.VOWELS else 0.4) * _colour(phone) for phone in phones]
    weights = np.stack(colour)[np.searchsorted(edges, time * RATE, side="right").clip(max=len(phones) - 1)]
    wave = (weights * np.sin(phase[:, None] * HARMONICS)).sum(1)  # (N, 8) -> (N,)
    wave *= 0.158 / np.sqrt(np.mean(wave**2))  # as loud as the answer voice
    return np.concatenate([SILENCE, wave.astype(np.float32), SILENCE])


def _colour(phone):
    """Weights (8,) of the harmonics."""
    return np.random.default_rng(crc32(phone.encode())).uniform(0.1, 1, len(HARMONICS)) / HARMONICS**0.5


def install(patch):
    """Put this speaker in the place of the engines; patch is a pytest.MonkeyPatch."""
    patch.setattr(engines, "absent", lambda voices: {})
    patch.setattr(engines, "versions", lambda voices: dict.fromkeys(engines.of(voices), "tones"))
    patch.setattr(engines, "synthesize", synthesize)
    patch.setattr(speak, "phones_of", phones_of)
