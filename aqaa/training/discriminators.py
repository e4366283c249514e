"""Small adversaries of the vocoder (HiFi-GAN, UnivNet): they learn to tell real waves from made ones."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from aqaa.training.loop import autocast


def _stack(first, channels, kernel, stride, padding):
    sizes = [first, *channels]
    layers = [
        weight_norm(nn.Conv2d(a, b, kernel, stride if i < len(channels) - 1 else 1, padding))
        for i, (a, b) in enumerate(pairwise(sizes))
    ]
    return nn.ModuleList(layers), weight_norm(nn.Conv2d(channels[-1], 1, 3, padding=1))


class PeriodDiscriminator(nn.Module):
    """Sees the wave folded to rows of `period` samples, so that each column is one phase of that period."""

    def __init__(self, period, channels):
        super().__init__()
        self.period = period
        self.layers, self.last = _stack(1, channels, (5, 1), (3, 1), (2, 0))

    def forward(self, wav):
        x = F.pad(wav, (0, -wav.shape[-1] % self.period), mode="reflect")
        return _run(self, x.view(len(x), 1, -1, self.period))  # (B, 1, N / period, period)


class SpectrumDiscriminator(nn.Module):
    """Sees the compressed magnitude of one STFT resolution."""

    def __init__(self, n_fft, channels):
        super().__init__()
        self.n_fft = n_fft
        self.layers, self.last = _stack(1, channels, (3, 5), (1, 2), (1, 2))
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)

    def forward(self, wav):
        spectrum = torch.stft(wav, self.n_fft, self.n_fft // 4, window=self.window, return_complex=True)
        return _run(self, (spectrum.real**2 + spectrum.imag**2 + 1e-7).pow(0.15).mT[:, None])  # (B, 1, T, F)


def _run(net, x):
    features = []
    with autocast(x.device):
        for layer in net.layers:
            x = F.leaky_relu(layer(x), 0.1)
            features.append(x)
        score = net.last(x)
    return score.float(), features


class Discriminators(nn.Module):
    """wav (B, N) -> a list of (score map, features of each layer), one for each adversary."""

    def __init__(self, periods=(2, 3, 5, 7), resolutions=(512, 1024), channels=(16, 32, 64)):
        super().__init__()
        nets = [PeriodDiscriminator(p, channels) for p in periods]
        nets += [SpectrumDiscriminator(n, channels) for n in resolutions]
        self.nets = nn.ModuleList(nets)

    def forward(self, wav):
        return [net(wav) for net in self.nets]


def discriminator_loss(real, made):
    """Least squares: real maps to 1, made to 0."""
    return sum(((1 - r) ** 2).mean() + (m**2).mean() for (r, _), (m, _) in zip(real, made)) / len(real)


def generator_loss(real, made):
    """(adversarial loss, feature matching loss) of the made waves."""
    adversarial = sum(((1 - m) ** 2).mean() for m, _ in made) / len(made)
    pairs = [(r, m) for (_, rs), (_, ms) in zip(real, made) for r, m in zip(rs, ms)]
    matching = sum(F.l1_loss(m.float(), r.detach().float()) for r, m in pairs) / len(pairs)
    return adversarial, matching
