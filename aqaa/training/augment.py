"""Other mouths, microphones and rooms, made on features while they are drawn for training.

A log spectrum can be bent without its wave: its frequency axis stretched (another vocal tract and
pitch), a smooth curve added (another microphone), noise or another voice joined as power. Unlike
renders these cost nothing to make anew, so no utterance is ever seen twice alike."""

import numpy as np
import torch


class Augment:
    """Bends batches (B, T, K * n_mels) of log-mel rows, K frames a row.

    mel_of, hz_of: between Hz and the place on the mel axis (0 to n_mels - 1, any real number).
    unit: natural logarithms of power in 1 of a feature. strength: scales every chance."""

    warp = 0.13  # the frequency axis is stretched by up to this factor, either way
    curve = 4.0  # dB: deviation of a smooth curve along frequency
    noisy, babble = 0.55, 0.12  # share of utterances with noise, with another voice behind them
    snr = 3.0, 40.0  # dB, of noise below the speech
    banded = 0.2  # share of utterances over a line that leaves a band: a telephone, a small codec
    edges = (100.0, 400.0), (3000.0, 5000.0)  # Hz, between which the band begins and ends
    slopes, deepest = (12.0, 72.0), (20.0, 80.0)  # dB an octave beyond an edge, and dB at most

    def __init__(self, n_mels, hz_of, mel_of, unit=1.0, top=7600.0, strength=1.0):
        self.n_mels, self.unit, self.top, self.strength = n_mels, unit, top, strength
        self.hz = hz_of(np.arange(n_mels))  # (n_mels,) centres
        self.mel_of = mel_of

    def stretched(self, factor):
        """(n_mels, n_mels) matrix that moves what lies at f to factor * f (up to 0.8 of `top`; from
        there the axis runs straight to `top`)."""
        knee = 0.8 * self.top * min(1.0, 1 / factor)
        moved = factor * knee
        slope = (self.top - moved) / (self.top - knee)
        beyond = knee + (self.hz - moved) / max(slope, 1e-3)
        source = np.where(self.hz < moved, self.hz / factor, beyond)
        place = np.clip(self.mel_of(source), 0, self.n_mels - 1.001)
        low = place.astype(int)
        share = place - low
        matrix = np.zeros((self.n_mels, self.n_mels), dtype=np.float32)
        rows = np.arange(self.n_mels)
        matrix[rows, low] = 1 - share
        matrix[rows, low + 1] += share
        return torch.from_numpy(matrix)

    def __call__(self, x, lengths, rng):
        """Returns (degraded, clean, factors): both (B, T, K * n_mels); `clean` is only stretched,
        factors (B,) of each utterance's frequency axis tell by how much its f0 moved."""
        batch, rows, width = x.shape
        frames = x.reshape(batch, -1, self.n_mels)  # (B, T K, n_mels)
        factors = np.exp(rng.uniform(-self.warp, self.warp, batch) * self.strength)
        matrices = torch.stack([self.stretched(factor) for factor in factors])
        clean = frames @ matrices.transpose(1, 2)
        valid = torch.arange(rows)[None] < lengths[:, None]  # (B, T)
        valid = valid.repeat_interleave(width // self.n_mels, 1)[..., None]  # (B, T K, 1)
        y = clean + self._curves(batch, rng, self.curve * self.strength)
        power = (y * self.unit).masked_fill(~valid, -30.0)
        # The speech's level: what the loud tenth of its frames has on average.
        loud = power.logsumexp(-1).quantile(0.9, dim=1) - np.log(self.n_mels)  # (B,)
        add = torch.full_like(power, -30.0)
        shares = np.array([self.noisy, self.babble]) * self.strength
        kind = rng.random(batch)
        below = torch.from_numpy(rng.uniform(*self.snr, batch) * np.log(10) / 10).float()
        for row in np.flatnonzero(kind < shares[0]):
            add[row] = self._noise(frames.shape[1], rng) + (loud - below)[row]
        for row in np.flatnonzero((kind >= shares[0]) & (kind < shares.sum())):
            other = power[(row + 1) % batch].roll(int(rng.integers(rows)), 0)
            gap = max(float(below[row]), 1.6)  # the one asked stays 7 dB louder
            add[row] = other - loud[(row + 1) % batch] + loud[row] - gap
        over = torch.from_numpy(rng.random(batch) < self.banded * self.strength)
        lines = torch.stack([self._line(rng) for _ in range(batch)]) * over[:, None]
        heard = torch.logaddexp(power, add)
        narrow = heard - lines[:, None]
        # As in the front ends, what lies eight decades below the loudest is one floor.
        floor = narrow.amax((1, 2), keepdim=True) - 8 * np.log(10)
        degraded = torch.where(over[:, None, None], narrow.clamp(min=floor), heard) / self.unit
        degraded = torch.where(valid, degraded, x.reshape(degraded.shape))
        return degraded.reshape(x.shape), clean.reshape(x.shape), torch.from_numpy(factors).float()

    def _curves(self, batch, rng, decibels):
        """(B, 1, n_mels): three slow cosines along frequency and a tilt."""
        place = np.linspace(0, 1, self.n_mels)
        cycles, phases = rng.uniform(0.5, 4, (3, 1)), rng.uniform(0, 2, (3, 1))
        waves = np.cos(np.pi * (cycles * place + phases))  # (3, n_mels)
        curve = rng.normal(0, decibels / 2, (batch, 3)) @ waves
        curve += rng.normal(0, decibels / 2, (batch, 1)) * (place - 0.5) * 2
        return torch.from_numpy(curve * np.log(10) / 10 / self.unit).float()[:, None]

    def _line(self, rng):
        """(n_mels,) what a line takes away, in natural logarithms of power."""
        low, high = (rng.uniform(*edge) for edge in self.edges)
        beyond = np.maximum(np.log2(low / self.hz), np.log2(self.hz / high)).clip(0)  # octaves
        loss = np.minimum(beyond * rng.uniform(*self.slopes), rng.uniform(*self.deepest))
        return torch.from_numpy(loss * np.log(10) / 10).float()

    def _noise(self, count, rng):
        """(count, n_mels) log power about 0: a random colour, restless as noise is."""
        place = np.linspace(-1, 1, self.n_mels)
        colour = rng.normal(-0.8, 1.2) * place + rng.normal(0, 0.7) * np.cos(
            np.pi * (rng.uniform(0.5, 3) * place + rng.uniform(0, 2))
        )
        restless = rng.normal(0, 0.45, (count, self.n_mels))
        slow = np.repeat(rng.normal(0, rng.uniform(0, 0.8), count // 40 + 1), 40)[:count, None]
        return torch.from_numpy(colour + restless + slow).float()


def kaldi_bank(n_mels=80, low=20.0, high=8000.0):
    """(hz_of, mel_of) of the linguistic front end: natural logarithms, mels of Kaldi."""

    def mel(hz):
        return 1127 * np.log1p(np.asarray(hz) / 700)

    step = (mel(high) - mel(low)) / (n_mels + 1)
    return (
        lambda place: 700 * np.expm1((mel(low) + (np.asarray(place) + 1) * step) / 1127),
        lambda hz: (mel(hz) - mel(low)) / step - 1,
    )


def slaney_bank(n_mels=128, high=8000.0):
    """(hz_of, mel_of) of the semantic front end: linear to 1 kHz, then logarithmic."""

    def mel(hz):
        hz = np.asarray(hz, dtype=float)
        above = 15 + 27 * np.log(np.maximum(hz, 1) / 1000) / np.log(6.4)
        return np.where(hz < 1000, hz * 3 / 200, above)

    def hz(mels):
        mels = np.asarray(mels, dtype=float)
        return np.where(mels < 15, mels * 200 / 3, 1000 * np.exp((mels - 15) * np.log(6.4) / 27))

    step = mel(high) / (n_mels + 1)
    return lambda place: hz((np.asarray(place) + 1) * step), lambda f: mel(f) / step - 1
