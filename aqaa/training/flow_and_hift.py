"""Training of the vocoder: the flow (ids to mel) and HiFT (mel to wave). The trainer that drives both is loop.py."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from aqaa.audio import mel as log_mel
from aqaa.config import GROUP_SIZE
from aqaa.pitch import f0 as track_f0
from aqaa.training.discriminators import Discriminators, discriminator_loss, generator_loss
from aqaa.training.loop import autocast
from aqaa.vocoder.flow import Flow
from aqaa.vocoder.hift import HiFT

FLOOR = math.log(1e-5)  # of the log-mel: digital silence


class FlowTask:
    """Teaches the flow from pairs of wave and audio ids.

    config: AQAAConfig. pairs: list of (wav (N,) int16 at the mel's sampling rate, ids (n,) 0-based interleaved audio
    ids); mels are made once and kept. A batch holds cuts of one length, whole groups, so that nothing is padded.
    """

    def __init__(self, config, pairs, *, batch_size=16, max_groups=20, mu_weight=1.0, token_noise=0.03, device="cpu"):
        self.batch_size, self.max_groups, self.device = batch_size, max_groups, torch.device(device)
        self.options = {"mu_weight": mu_weight, "token_noise": token_noise}
        self.model = Flow(config.flow, config.mel).to(self.device)
        self.items, margin = [], config.mel.hop_size
        for wav, ids in pairs:
            ids = torch.as_tensor(np.asarray(ids, np.int64))[: len(ids) // GROUP_SIZE * GROUP_SIZE]
            frames = self.model.frames(len(ids))
            wav = torch.from_numpy(np.asarray(wav)).float() / 32768
            mel = log_mel(F.pad(wav, (0, max(0, (frames + 1) * margin - len(wav)))), config.mel)[:, :frames]
            if len(ids):
                self.items.append((ids, mel))
        self.groups = np.array([len(ids) // GROUP_SIZE for ids, _ in self.items])

    def modules(self):
        """What a checkpoint holds."""
        return {"flow": self.model}

    def batch(self, rng):
        """token (B, n), mel (B, n_mels, T) and their lengths, all rows equally long."""
        longest = rng.choice(self.groups, p=self.groups / self.groups.sum())
        n = int(min(longest, self.max_groups))
        able = np.flatnonzero(self.groups >= n)
        tokens, mels = [], []
        for i in rng.choice(able, self.batch_size, p=self.groups[able] / self.groups[able].sum()):
            ids, mel = self.items[i]
            spare = self.groups[i] - n
            first = int(np.clip(rng.integers(-spare // 4, spare + spare // 4 + 1), 0, spare))  # favours both ends
            a, b = first * GROUP_SIZE, (first + n) * GROUP_SIZE
            tokens.append(ids[a:b])
            start = self.model.frames(a)
            mels.append(mel[:, start : start + self.model.frames(b - a)])
        token, mel = torch.stack(tokens).to(self.device), torch.stack(mels).to(self.device)
        full = torch.full((len(token),), 1, device=self.device)
        return {"token": token, "token_len": full * token.shape[1], "mel": mel, "mel_len": full * mel.shape[2]}

    def loss(self, batch, step=0):
        """(scalar, numbers to log); bfloat16 autocast inside."""
        with autocast(self.device):
            return self.model.compute_loss(**batch, **self.options)


class HiftTask:
    """Teaches HiFT from waves alone: STFT, mel and pitch losses, and late in training a set of small adversaries.

    config: AQAAConfig. wavs: list of (N,) int16 arrays at the mel's sampling rate. adversarial_from: the share of
    training after which the adversaries play. The networks run in bfloat16 autocast, STFTs and losses in float32.
    """

    RESOLUTIONS = ((256, 64), (512, 128), (1024, 256))  # n_fft, hop of the STFT loss
    LEARNING_RATE, FINAL_RATE = 8e-4, 5e-5
    F0_SCALE = 100.0  # Hz that weigh as much as 1 in the loss

    def __init__(self, config, wavs, *, batch_size=8, frames=48, adversarial_from=0.6, device="cpu"):
        self.mel_config, self.device = config.mel, torch.device(device)
        self.hop, self.batch_size, self.frames = config.mel.hop_size, batch_size, frames
        self.adversarial_from = adversarial_from
        margin = np.zeros(2 * self.hop, np.int16)  # two frames on either side, cut off again after the mel
        self.wavs = [np.concatenate([margin, w, np.zeros(-len(w) % self.hop, np.int16), margin]) for w in wavs]
        self.weights = np.array([len(w) for w in self.wavs], float)
        self.weights /= self.weights.sum()
        self.pitch = {}
        self.model = HiFT(config.hift).to(self.device)
        self.adversaries = Discriminators().to(self.device)
        _centre(self.model)
        classifier = list(self.model.f0_predictor.classifier.parameters())
        rest = [p for p in self.model.parameters() if all(p is not q for q in classifier)]
        groups = [{"params": rest, "scale": 1.0}, {"params": classifier, "scale": 30.0}]  # it speaks in Hz
        options = {"lr": self.LEARNING_RATE, "betas": (0.8, 0.99), "weight_decay": 0.0, "fused": True}
        self.generator_optimizer = torch.optim.AdamW(groups, **options)
        adversaries = [{"params": list(self.adversaries.parameters()), "scale": 0.5}]
        self.adversary_optimizer = torch.optim.AdamW(adversaries, **options)

    def modules(self):
        """What a checkpoint holds."""
        return {"hift": self.model, "adversaries": self.adversaries}

    def optimizers(self):
        """Both optimizers, for checkpointing."""
        return {"generator": self.generator_optimizer, "adversary": self.adversary_optimizer}

    def batch(self, rng):
        """Random cuts: wav (B, frames * hop) at a random gain, its mel (B, n_mels, frames) and f0 (B, frames)."""
        wavs, pitches = [], []
        for i in rng.choice(len(self.wavs), self.batch_size, p=self.weights):
            wav = self.wavs[i]
            if i not in self.pitch:
                self.pitch[i] = track_f0(wav[2 * self.hop : -2 * self.hop], self.hop, self.mel_config.sampling_rate)
            spare = len(self.pitch[i]) - self.frames
            first = int(rng.integers(0, spare + 1)) if spare > 0 else 0
            cut = wav[first * self.hop : (first + self.frames + 4) * self.hop]
            wavs.append(np.pad(cut, (0, (self.frames + 4) * self.hop - len(cut))))
            pitch = self.pitch[i][first : first + self.frames]
            pitches.append(np.pad(pitch, (0, self.frames - len(pitch))))
        gain = 10 ** (rng.uniform(-8, 2, (len(wavs), 1)) / 20)
        wav = np.clip(np.stack(wavs).astype(np.float32) / 32768 * gain, -0.99, 0.99)
        wav = torch.from_numpy(wav.astype(np.float32))
        noise = torch.from_numpy(rng.standard_normal((len(wavs), self.mel_config.num_mels, self.frames)))
        noise = noise * torch.from_numpy(rng.uniform(0, 0.15, (len(wavs), 1, 1)))
        mel = log_mel(wav, self.mel_config)[..., 2:-2]
        return {
            "wav": wav[:, 2 * self.hop : -2 * self.hop].to(self.device),
            "mel": (mel + noise).float().clamp(min=FLOOR).to(self.device),  # the flow's mels are not perfect either
            "f0": torch.from_numpy(np.stack(pitches)).to(self.device),
        }

    def train_step(self, batch, step, progress):
        """One step of both sides; progress in 0..1 sets the learning rate (cosine). Returns numbers to log."""
        self._set_rate(step, progress)
        play = progress >= self.adversarial_from
        made, logs, loss = self._rebuild(batch, own_f0=step >= 200)
        real = batch["wav"]
        if play:
            truth = self.adversaries(real)
            verdict = discriminator_loss(truth, self.adversaries(made.detach()))
            _update(self.adversary_optimizer, verdict, self.adversaries)
            adversarial, matching = generator_loss(truth, self.adversaries(made))
            loss = loss + 0.3 * adversarial + 1.0 * matching
            logs |= {"adversary": verdict.item(), "adversarial": adversarial.item(), "matching": matching.item()}
        _update(self.generator_optimizer, loss, self.model)
        return {"loss": loss.item()} | logs

    def loss(self, batch, step=0):
        """Reconstruction loss alone, and its parts (for evaluation)."""
        _, logs, loss = self._rebuild(batch, own_f0=True)
        return loss, logs

    def _rebuild(self, batch, own_f0):
        """own_f0: the source follows the predicted pitch, as it must in use, else the tracked one."""
        with autocast(self.device):
            pitch = self.model.f0_predictor(batch["mel"]).float()
        guide = pitch.detach() if own_f0 else batch["f0"]
        source = self.model.source(guide)
        with autocast(self.device):
            magnitude, phase = self.model.spectrum(batch["mel"], source)
        made = self.model.wave(magnitude.float(), phase.float())
        stft = sum(_stft_loss(made, batch["wav"], *r) for r in self.RESOLUTIONS) / len(self.RESOLUTIONS)
        mel = F.l1_loss(log_mel(made, self.mel_config), log_mel(batch["wav"], self.mel_config))
        f0 = F.l1_loss(pitch, batch["f0"])
        logs = {"stft": stft.item(), "mel": mel.item(), "f0_hz": f0.item()}
        return made, logs, stft + mel + f0 / self.F0_SCALE

    def _set_rate(self, step, progress):
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
        rate = self.FINAL_RATE + (self.LEARNING_RATE - self.FINAL_RATE) * cosine
        for optimizer in self.optimizers().values():
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"] * min(1, (step + 1) / 100)


def _centre(hift, mean=-5.5):
    """Start both mel readers as if log-mels had zero mean: minutes of training saved."""
    with torch.no_grad():
        for conv in (hift.conv_pre, hift.f0_predictor.condnet[0]):
            conv.bias -= conv.kernel().sum((1, 2)) * mean
        hift.f0_predictor.classifier.weight *= 30
        hift.f0_predictor.classifier.bias.fill_(80.0)
        n = hift.config.istft_n_fft // 2 + 1
        hift.conv_post.bias[:n] = -3.0


def _stft_loss(made, real, n_fft, hop):
    """Spectral convergence plus L1 of log magnitudes (Parallel WaveGAN)."""
    window = torch.hann_window(n_fft, device=made.device)

    def magnitude(x):
        s = torch.stft(x, n_fft, hop, window=window, return_complex=True)
        return (s.real**2 + s.imag**2 + 1e-7).sqrt()

    a, b = magnitude(made), magnitude(real)
    return (a - b).norm() / b.norm().clamp(min=1e-3) + F.l1_loss(a.log(), b.log())


def _update(optimizer, loss, module, clip=5.0):
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
    if torch.isfinite(norm):  # a batch that overflows is dropped, not learned from
        optimizer.step()
