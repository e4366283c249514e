"""Features bent in training: stretched frequencies, other microphones, noise that joins as power."""

import numpy as np
import pytest
import torch

from aqaa import audio
from aqaa.training import augment as A
from aqaa.training.features import front_end

BANKS = {"linguistic": (80, *A.kaldi_bank(), 1.0), "semantic": (128, *A.slaney_bank(), 4 * np.log(10))}


def rows_of(kind, hz):
    """(1, T, D) features of a tone in a little noise."""
    wave = torch.sin(2 * np.pi * hz * torch.arange(16_000) / 16_000) * 0.3
    wave = wave + torch.randn(16_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    if kind == "linguistic":
        return front_end().features(wave)[None]
    log_mel = audio.log_mel(wave).T
    return log_mel[: len(log_mel) // 4 * 4].reshape(1, -1, 512)


def bender(kind, **options):
    n_mels, hz_of, mel_of, unit = BANKS[kind]
    augment = A.Augment(n_mels, hz_of, mel_of, unit)
    vars(augment).update(options)
    return augment


@pytest.mark.parametrize("kind", BANKS)
@pytest.mark.parametrize("factor", [0.88, 1.0, 1.12])
def test_a_stretched_axis_moves_a_tone_by_its_factor(kind, factor):
    augment, n_mels = bender(kind), BANKS[kind][0]
    frames = rows_of(kind, 1000).reshape(-1, n_mels)[8:-8]
    peak = (frames @ augment.stretched(factor).T).mean(0).argmax()
    assert abs(augment.hz[peak] / (1000 * factor) - 1) < 0.04
    assert torch.allclose(augment.stretched(factor).sum(1), torch.ones(n_mels), atol=1e-5)
    if factor == 1.0:
        assert (augment.stretched(1.0) - torch.eye(n_mels)).abs().max() < 2e-3


@pytest.mark.parametrize("kind", BANKS)
def test_banks_know_where_they_are(kind):
    n_mels, hz_of, mel_of, _ = BANKS[kind]
    place = np.arange(n_mels)
    assert np.allclose(mel_of(hz_of(place)), place, atol=1e-6) and (np.diff(hz_of(place)) > 0).all()
    frames = rows_of(kind, 2000).reshape(-1, n_mels)[8:-8].mean(0)
    assert abs(hz_of(int(frames.argmax())) / 2000 - 1) < 0.05


@pytest.mark.parametrize("kind", BANKS)
def test_noise_joins_as_power_and_padding_stays(kind):
    augment = bender(kind, noisy=1.0, babble=0.0, curve=0.0, banded=0.0)
    x = rows_of(kind, 500).repeat(3, 1, 1)
    lengths = torch.tensor([x.shape[1], x.shape[1] - 3, 4])
    degraded, clean, factors = augment(x.clone(), lengths, np.random.default_rng(0))
    for row, length in enumerate(lengths.tolist()):
        assert (degraded[row, :length] >= clean[row, :length] - 1e-4).all()
        assert torch.equal(degraded[row, length:], x[row, length:])
    assert degraded.isfinite().all() and (degraded - clean).abs().max() > 0.01
    assert (factors.log().abs() <= A.Augment.warp + 1e-6).all()


@pytest.mark.parametrize("kind", BANKS)
def test_the_same_generator_bends_alike_and_no_strength_bends_nothing(kind):
    x = rows_of(kind, 700).repeat(4, 1, 1)
    lengths = torch.full((4,), x.shape[1])
    one, two = (bender(kind)(x.clone(), lengths, np.random.default_rng(5))[0] for _ in range(2))
    assert torch.equal(one, two) and not torch.allclose(one, x, atol=1e-2)
    still, clean, factors = bender(kind, strength=0.0)(x.clone(), lengths, np.random.default_rng(5))
    assert torch.allclose(still, clean, atol=1e-4) and (clean - x).abs().mean() < 1e-2 and (factors == 1).all()


def test_another_voice_stays_behind_the_one_that_is_asked():
    augment = bender("linguistic", noisy=0.0, babble=1.0, curve=0.0, warp=0.0, banded=0.0)
    x = torch.cat([rows_of("linguistic", 400), rows_of("linguistic", 3000)])
    degraded, clean, _ = augment(x.clone(), torch.full((2,), x.shape[1]), np.random.default_rng(1))
    own, other = (clean[i].reshape(-1, 80).mean(0).argmax() for i in (0, 1))
    heard = degraded[0].reshape(-1, 80).mean(0)
    assert heard[own] > heard[other] > clean[0].reshape(-1, 80).mean(0)[other] + 1


@pytest.mark.parametrize("kind", BANKS)
def test_a_line_leaves_its_band_and_takes_what_lies_beyond(kind):
    augment = bender(kind, noisy=0.0, babble=0.0, curve=0.0, warp=0.0, banded=1.0, deepest=(40.0, 40.0))
    x = rows_of(kind, 1000).repeat(3, 1, 1)
    degraded, clean, _ = augment(x.clone(), torch.full((3,), x.shape[1]), np.random.default_rng(2))
    lost = ((clean - degraded) * augment.unit).reshape(3, -1, augment.n_mels).mean(1)
    kept = (augment.hz > 400) & (augment.hz < 3000)
    assert lost[:, kept].abs().max() < 0.05
    assert (lost[:, -1] > 1).all() and (lost[:, 0] > 0.5).all()
