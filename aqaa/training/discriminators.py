"""Small adversaries of the vocoder (HiFi-GAN, UnivNet): they learn to tell real waves from made."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from aqaa.training.loop import autocast


class Discriminator(nn.Module):
    """Convolutions over a picture of the wave: a subclass has picture(wav (B, N)), (B, 1, H, W)."""

    def __init__(self, channels, kernel, stride, padding):
        super().__init__()
        pairs = list(pairwise([1, *channels]))
        strides = [stride] * (len(pairs) - 1) + [1]
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(*pair, kernel, step, padding))
            for pair, step in zip(pairs, strides, strict=True)
        )
        self.last = weight_norm(nn.Conv2d(channels[-1], 1, 3, padding=1))

    def forward(self, wav):
        """(score map, features of each layer)"""
        x = self.picture(wav)
        features = []
        with autocast(x.device):
            for layer in self.layers:
                x = F.leaky_relu(layer(x), 0.1)
                features.append(x)
            return self.last(x).float(), features


class PeriodDiscriminator(Discriminator):
    """Sees the wave folded to rows of `period` samples: each column is one phase of that period."""

    def __init__(self, period, channels):
        super().__init__(channels, (5, 1), (3, 1), (2, 0))
        self.period = period

    def picture(self, wav):
        x = F.pad(wav, (0, -wav.shape[-1] % self.period), mode="reflect")
        return x.view(len(x), 1, -1, self.period)  # (B, 1, N / period, period)


class SpectrumDiscriminator(Discriminator):
    """Sees the compressed magnitude of one STFT resolution."""

    def __init__(self, n_fft, channels):
        super().__init__(channels, (3, 5), (1, 2), (1, 2))
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def picture(self, wav):
        x = torch.stft(wav, self.n_fft, self.n_fft // 4, window=self.window, return_complex=True)
        return (x.real**2 + x.imag**2 + 1e-7).pow(0.15).mT[:, None]  # (B, 1, T, F)


class Discriminators(nn.Module):
    """wav (B, N) -> a list of (score map, features of each layer), one for each adversary."""

    def __init__(self, periods=(2, 3, 5, 7), resolutions=(512, 1024), channels=(16, 32, 64)):
        super().__init__()
        nets = [PeriodDiscriminator(period, channels) for period in periods]
        nets += [SpectrumDiscriminator(n_fft, channels) for n_fft in resolutions]
        self.nets = nn.ModuleList(nets)

    def forward(self, wav):
        return [net(wav) for net in self.nets]


def discriminator_loss(real, made):
    """Least squares: real maps to 1, made to 0."""
    pairs = zip(real, made, strict=True)
    return sum(((1 - r) ** 2).mean() + (m**2).mean() for (r, _), (m, _) in pairs) / len(real)


def generator_loss(real, made):
    """(adversarial loss, feature matching loss) of the made waves."""
    adversarial = sum(((1 - m) ** 2).mean() for m, _ in made) / len(made)
    pairs = [(r, m) for (_, rs), (_, ms) in zip(real, made, strict=True) for r, m in zip(rs, ms)]
    matching = sum(F.l1_loss(m.float(), r.detach().float()) for r, m in pairs) / len(pairs)
    return adversarial, matching
