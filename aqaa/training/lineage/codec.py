"""The codec of VALL-E (2301.02111) learns: residual k-means, then HiFT on what it gives back.

Both hear clean utterances of the training voices as the corpus spoke them, `Speech`, and so do AR
and NAR (valle.py), which learn from the finished codec's codes of them."""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from aqaa import audio
from aqaa.corpus import speak
from aqaa.corpus.plan import held_out
from aqaa.corpus.voices import NATURAL
from aqaa.files import ModelError
from aqaa.lineage.codec import ResidualCodec
from aqaa.training.examples import NATURAL_WEIGHT, UNHEARD
from aqaa.training.flow_and_hift import HiftTask
from aqaa.training.loop import autocast
from aqaa.weights import model_folder

PER_VOICE = 300  # utterances; of natural voices NATURAL_WEIGHT times as many
QUIET = -6.3  # of the quietest twentieth of a clean utterance's vectors: about 30 dB of noise
MIXED = "kokoro:mix", "people:"  # names that stand for many voices
NEAR = 6  # places in the order of pitch within which a like voice is looked for
ANSWERED = "question", "first", "follow"  # roles whose manner is that of the answer


class Speech:
    """Clean utterances of the training voices, read when first drawn; neighbours in `items` have
    one voice and nearly one pitch. Raises ModelError without a corpus, or without such in it."""

    def __init__(self, folder, mel, codec=None):
        try:
            self.corpus = speak.Corpus(folder)
        except FileNotFoundError as fault:
            raise ModelError(str(fault)) from None
        items = [item for item in self.corpus.items(split="train") if _wanted(item)]
        chosen, count = [], {}
        for i in np.random.default_rng(0).permutation(len(items)):
            voice = items[i].voice
            count[voice] = count.get(voice, 0) + 1
            if count[voice] <= PER_VOICE * (NATURAL_WEIGHT if voice in NATURAL else 1):
                chosen.append(items[i])
        self.items = sorted(chosen, key=lambda item: (item.voice, item.f0))
        self.codec, self.known = codec or ResidualCodec(mel), {}

    def wave(self, index):
        """(n,) float32 of an utterance at 16 kHz."""
        return self.corpus.wav(self.items[index]) / np.float32(32768)

    def vectors(self, index):
        """(N, D) of an utterance as the codec reads it, None for a noisy one."""
        vectors = self.codec.read(self.wave(index))
        return vectors if len(vectors) and vectors.mean(1).quantile(0.05) < QUIET else None

    def codes(self, index):
        """(N, L) int16 of an utterance, None for a noisy one; made once."""
        if index not in self.known:
            vectors = self.vectors(index)
            codes = None if vectors is None else self.codec.encode(vectors)
            self.known[index] = None if codes is None else codes.numpy().astype(np.int16)
        return self.known[index]

    def draw(self, rng, read=None):
        """(index, what `read` gives for it, the codes by default) of a clean utterance."""
        read = read or self.codes
        for _ in range(1000 if self.items else 0):
            index = int(rng.integers(len(self.items)))
            if (result := read(index)) is not None:
                return index, result
        raise ModelError(f"{self.corpus.folder} has no clean speech for training: make it again "
                         "with `aqaa train corpus`.")  # fmt: skip

    def alike(self, index, rng):
        """Index of another clean utterance of this voice at nearly this pitch, or None."""
        item, last = self.items[index], len(self.items) - 1
        if item.voice.startswith(MIXED):
            return None
        near = range(max(0, index - NEAR), min(last, index + NEAR) + 1)
        for i in map(int, rng.permutation([i for i in near if i != index])):
            other = self.items[i]
            same = other.voice == item.voice and abs(other.f0 - item.f0) <= 0.06 * item.f0
            if same and self.codes(i) is not None:
                return i
        return None


def _wanted(item):
    """Whether an Item is speech, said plainly, that the vocoder may learn from."""
    plain = item.role in ANSWERED or item.manner in ("", "normal")
    return plain and item.intent != UNHEARD and item.f0 > 0 and not held_out(item)


@cache
def speech(run, codec=None):
    """The Speech of a run; with the `codec` stage's weights its codes too, for all later stages."""
    if codec:
        codec = model_folder.load_part(run.out / "parts", codec, ResidualCodec(run.config.mel))
    return Speech(run.corpus_folder, run.config.mel, codec)


class CodecTask:
    """Residual k-means on mel frames; no gradients."""

    optimizers = {}

    def __init__(self, speech, size=4096):
        self.speech, self.size = speech, size
        self.model = speech.codec
        self.modules = {"codec": self.model}

    @classmethod
    def from_run(cls, run, stage):
        return cls(speech(run), **stage.settings)

    def batch(self, rng):
        """`vectors` (N, D) of some utterances."""
        rows, count = [], 0
        while count < self.size:
            rows.append(self.speech.draw(rng, self.speech.vectors)[1])
            count += len(rows[-1])
        return {"vectors": torch.cat(rows)}

    def train_step(self, batch, step, progress):
        errors = self.model.learn(batch["vectors"], decay=0.9 if progress < 0.6 else 0.98)
        return {f"level{number}": error for number, error in enumerate(errors, 1)}

    def finish(self, seed):
        """Mean distance of the log-mel from what the first 1 … L levels give, on the development
        split (without one, on other training batches)."""
        rng = np.random.default_rng((seed, 1))
        items = self.speech.corpus.items(split="dev") or self.speech.items
        chosen = rng.permutation(len(items))[:100]
        waves = [self.speech.corpus.wav(items[i]) / np.float32(32768) for i in chosen]
        vectors = torch.cat([self.model.read(wav) for wav in waves])
        codes = self.model.encode(vectors)
        parts = (self.model.decode(codes[:, :n]) for n in range(1, codes.shape[1] + 1))
        return {"mel_distance": [round(float((part - vectors).abs().mean()), 3) for part in parts]}


class VoicesTask(HiftTask):
    """HiFT goes on with many voices, on mels as the codec gives them back.

    The source follows the tracked pitch: where it is a little off, as a predicted one, harmonics
    lie beside those of the recording, and HiFT learns to be hoarse instead, low voices first. The
    predictor learns beside it, from more rows of a batch than are spoken, as it costs little."""

    ROWS, SPOKEN = 40, 8  # of a batch

    def __init__(self, config, wavs, codec, **options):
        super().__init__(config, wavs, batch_size=self.ROWS, **options)
        self.codec = codec

    @classmethod
    def from_run(cls, run, stage, most=1200):
        said, rng = speech(run, "codec"), np.random.default_rng(run.training_seed)
        clean = [i for i in rng.permutation(len(said.items))[: 2 * most]
                 if said.codes(i) is not None][:most]  # fmt: skip
        waves = [audio.energy_norm(torch.from_numpy(said.wave(i))) for i in clean]
        wavs = [(wave * 32767).short().numpy() for wave in waves]
        task = cls(run.config, wavs, said.codec, **stage.settings)
        run.start(stage, task.model)
        return task

    def batch(self, rng):
        batch = super().batch(rng)
        codes = self.codec.encode(self.codec.stacked(batch["mel"]))
        return batch | {"mel": self.codec.mel(self.codec.decode(codes))}

    def _rebuild(self, batch, own_f0):
        few = {key: value[: self.SPOKEN] for key, value in batch.items()}
        made, logs, loss = super()._rebuild(few, own_f0=False)
        with autocast(made.device):
            pitch = self.model.f0_predictor(batch["mel"][self.SPOKEN :]).float()
        error = F.l1_loss(pitch, batch["f0"][self.SPOKEN :])
        return made, {**logs, "f0_hz": error.item()}, loss + error / self.F0_SCALE
