"""Training of the vocoder: the flow (audio ids to mel) and HiFT (mel to wave)."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from aqaa.audio import mel as log_mel
from aqaa.config import GROUP_SIZE
from aqaa.corpus.codes import load_codes
from aqaa.pitch import f0 as track_f0
from aqaa.tokenizers import interleave
from aqaa.training.discriminators import Discriminators, discriminator_loss, generator_loss
from aqaa.training.loop import autocast, update
from aqaa.vocoder.flow import Flow
from aqaa.vocoder.hift import HiFT

SILENCE = math.log(1e-5)  # the floor of the log-mel


class FlowTask:
    """Teaches the flow from pairs of wave and audio ids.

    config: AQAAConfig. pairs: list of (wav (N,) int16 at the mel's sampling rate, ids (n,) 0-based
    interleaved audio ids); mels are made once and kept. A batch holds cuts of one length, whole
    groups, so that nothing is padded."""

    def __init__(self, config, pairs, *, batch_size=16, max_groups=20):
        self.batch_size, self.max_groups = batch_size, max_groups
        self.model = Flow(config.flow, config.mel)
        self.modules = {"flow": self.model}
        self.items = []
        for wav, ids in pairs:
            ids = torch.as_tensor(np.asarray(ids, np.int64))[: len(ids) // GROUP_SIZE * GROUP_SIZE]
            if not len(ids):
                continue
            frames = self.model.frames(len(ids))
            wav = torch.from_numpy(np.asarray(wav)).float() / 32768
            missing = (frames + 1) * config.mel.hop_size - len(wav)
            mel = log_mel(F.pad(wav, (0, max(0, missing))), config.mel)[:, :frames]
            self.items.append((ids, mel))
        self.groups = np.array([len(ids) // GROUP_SIZE for ids, _ in self.items])

    @classmethod
    def from_run(cls, run, stage):
        items, waves = run.spoken()
        ids = run.config.ids
        merged = [interleave.merge(*codes, ids) for codes in load_codes(run.out, items)]
        merged = [np.array(audio) - ids.n_text for audio in merged]
        task = cls(run.config, list(zip(waves, merged, strict=True)))
        run.start(stage, task.model)
        return task

    def batch(self, rng):
        """token (B, n), mel (B, n_mels, T) and their lengths (B,), all rows equally long."""
        # The length of one utterance, drawn by its share of the sound; only those as long serve.
        longest = rng.choice(self.groups, p=self.groups / self.groups.sum())
        n = int(min(longest, self.max_groups))
        able = np.flatnonzero(self.groups >= n)
        tokens, mels = [], []
        probs = self.groups[able] / self.groups[able].sum()
        for i in rng.choice(able, self.batch_size, p=probs):
            ids, mel = self.items[i]
            spare = self.groups[i] - n
            first = rng.integers(-spare // 4, spare + spare // 4 + 1)  # beyond: favours both ends
            first = int(np.clip(first, 0, spare)) * GROUP_SIZE
            tokens.append(ids[first : first + n * GROUP_SIZE])
            start = self.model.frames(first)
            mels.append(mel[:, start : start + self.model.frames(n * GROUP_SIZE)])
        batch = {"token": torch.stack(tokens), "mel": torch.stack(mels)}
        return batch | {f"{k}_len": torch.full((len(v),), v.shape[-1]) for k, v in batch.items()}

    def loss(self, batch, step=0):
        return self.model.compute_loss(**batch, mu_weight=1.0, token_noise=0.03)


class HiftTask:
    """Teaches HiFT from waves alone: STFT, mel and pitch losses, and late in training adversaries.

    config: AQAAConfig. wavs: list of (N,) int16 at the mel's sampling rate. adversarial_from: the
    share of training after which the adversaries play. The networks run in bfloat16 autocast, STFTs
    and losses in float32."""

    RESOLUTIONS = ((256, 64), (512, 128), (1024, 256))  # n_fft, hop of the STFT loss
    LEARNING_RATE, FINAL_RATE = 8e-4, 5e-5
    F0_SCALE = 100.0  # Hz that weigh as much as 1 in the loss
    MARGIN = 2  # frames on either side, cut off again after the mel

    def __init__(self, config, wavs, *, batch_size=8, frames=48, adversarial_from=0.6):
        self.config, self.hop = config.mel, config.mel.hop_size
        self.batch_size, self.frames, self.adversarial_from = batch_size, frames, adversarial_from
        margin = self.MARGIN * self.hop
        self.wavs = [np.pad(wav, (margin, margin + -len(wav) % self.hop)) for wav in wavs]
        lengths = np.array([len(wav) for wav in self.wavs], float)
        self.probs = lengths / lengths.sum()
        self.pitch = {}
        self.model = HiFT(config.hift)
        self.adversaries = Discriminators()
        self.modules = {"hift": self.model, "adversaries": self.adversaries}
        _centre(self.model)
        classifier = list(self.model.f0_predictor.classifier.parameters())  # it speaks in Hz
        rest = [p for p in self.model.parameters() if all(p is not q for q in classifier)]
        scales = {
            "generator": [{"params": rest, "scale": 1.0}, {"params": classifier, "scale": 30.0}],
            "adversary": [{"params": list(self.adversaries.parameters()), "scale": 0.5}],
        }
        options = {"lr": self.LEARNING_RATE, "betas": (0.8, 0.99), "weight_decay": 0, "fused": True}
        adamw = torch.optim.AdamW
        self.optimizers = {name: adamw(groups, **options) for name, groups in scales.items()}

    @classmethod
    def from_run(cls, run, stage):
        task = cls(run.config, run.spoken()[1])
        run.start(stage, task.model)
        return task

    def batch(self, rng):
        """Random cuts: wav (B, frames * hop) at a random gain, its mel (B, n_mels, frames) and f0
        (B, frames)."""
        margin, frames, hop = self.MARGIN * self.hop, self.frames, self.hop
        wavs, pitches = [], []
        for i in rng.choice(len(self.wavs), self.batch_size, p=self.probs):
            wav = self.wavs[i]
            if i not in self.pitch:
                self.pitch[i] = track_f0(wav[margin:-margin], hop, self.config.sampling_rate)
            spare = len(self.pitch[i]) - frames
            first = int(rng.integers(0, spare + 1)) if spare > 0 else 0
            cut = wav[first * hop : (first + frames) * hop + 2 * margin]
            wavs.append(np.pad(cut, (0, frames * hop + 2 * margin - len(cut))))
            pitch = self.pitch[i][first : first + frames]
            pitches.append(np.pad(pitch, (0, frames - len(pitch))))
        gain = 10 ** (rng.uniform(-8, 2, (len(wavs), 1)) / 20)
        wav = np.clip(np.stack(wavs).astype(np.float32) / 32768 * gain, -0.99, 0.99)
        wav = torch.from_numpy(wav.astype(np.float32))
        # In use the mel comes from the flow, whose mels are not perfect either: some noise.
        noise = rng.standard_normal((len(wavs), self.config.num_mels, frames))
        noise = noise * rng.uniform(0, 0.15, (len(wavs), 1, 1))
        mel = log_mel(wav, self.config)[..., self.MARGIN : -self.MARGIN]
        return {
            "wav": wav[:, margin:-margin],
            "mel": (mel + torch.from_numpy(noise)).float().clamp(min=SILENCE),
            "f0": torch.from_numpy(np.stack(pitches)),
        }

    def train_step(self, batch, step, progress):
        """One step of both sides at the rate of progress 0..1 (cosine). Returns numbers to log."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
        rate = self.FINAL_RATE + (self.LEARNING_RATE - self.FINAL_RATE) * cosine
        generator, adversary = self.optimizers.values()
        for optimizer in (generator, adversary):
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"] * min(1, (step + 1) / 100)
        made, logs, loss = self._rebuild(batch, own_f0=step >= 200)
        if progress >= self.adversarial_from:
            truth = self.adversaries(batch["wav"])
            verdict = discriminator_loss(truth, self.adversaries(made.detach()))
            update(verdict, list(self.adversaries.parameters()), [adversary], clip=5.0)
            adversarial, matching = generator_loss(truth, self.adversaries(made))
            loss = loss + 0.3 * adversarial + 1.0 * matching
            play = {"adversary": verdict, "adversarial": adversarial, "matching": matching}
            logs |= {name: value.item() for name, value in play.items()}
        update(loss, list(self.model.parameters()), [generator], clip=5.0)
        return {"loss": loss.item()} | logs

    def loss(self, batch, step=0):
        """Reconstruction loss alone, and its parts (for evaluation)."""
        _, logs, loss = self._rebuild(batch, own_f0=True)
        return loss, logs

    def _rebuild(self, batch, own_f0):
        """(wave, numbers to log, loss) of a batch. own_f0: the source follows the predicted pitch,
        as it must in use; else the tracked one, from which a young predictor learns faster."""
        real, mel = batch["wav"], batch["mel"]
        with autocast(mel.device):
            pitch = self.model.f0_predictor(mel).float()  # (B, frames)
        source = self.model.source(pitch.detach() if own_f0 else batch["f0"])
        with autocast(mel.device):
            magnitude, phase = self.model.spectrum(mel, source)
        made = self.model.wave(magnitude.float(), phase.float())  # (B, N)
        losses = {
            "stft": sum(_stft_loss(made, real, *sizes) for sizes in self.RESOLUTIONS) / 3,
            "mel": F.l1_loss(log_mel(made, self.config), log_mel(real, self.config)),
            "f0_hz": F.l1_loss(pitch, batch["f0"]),
        }
        logs = {name: value.item() for name, value in losses.items()}
        return made, logs, losses["stft"] + losses["mel"] + losses["f0_hz"] / self.F0_SCALE


@torch.no_grad()
def _centre(hift, mean=-5.5):
    """Start both mel readers as if log-mels had zero mean: minutes of training saved."""
    for conv in (hift.conv_pre, hift.f0_predictor.condnet[0]):
        conv.bias -= conv.kernel().sum((1, 2)) * mean
    hift.f0_predictor.classifier.weight *= 30
    hift.f0_predictor.classifier.bias.fill_(80.0)  # Hz
    hift.conv_post.bias[: hift.config.istft_n_fft // 2 + 1] = -3.0  # log magnitudes: nearly silent


def _stft_loss(made, real, n_fft, hop):
    """Spectral convergence plus L1 of log magnitudes (Parallel WaveGAN)."""
    window = torch.hann_window(n_fft, device=made.device)

    def magnitude(wav):
        x = torch.stft(wav, n_fft, hop, window=window, return_complex=True)
        return (x.real**2 + x.imag**2 + 1e-7).sqrt()

    a, b = magnitude(made), magnitude(real)
    return (a - b).norm() / b.norm().clamp(min=1e-3) + F.l1_loss(a.log(), b.log())
