"""HiFT: published names, weight norm in its three spellings, source, and lengths."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from aqaa.config import HiftConfig, preset
from aqaa.fast import prepared, spectral
from aqaa.vocoder.hift import HiFT, Snake, SourceState, WeightNormConv
from tests.parity import vocoder_kinds
from tests.parity.__main__ import check
from tests.release import normed

TINY = HiftConfig(in_channels=8, base_channels=16, f0_channels=8)


def build(config=TINY):
    torch.manual_seed(0)
    return HiFT(config).eval()


def sound(model, mel):
    return model.inference(mel, model.m_source.start(seed=3))


def test_folding_changes_nothing_but_the_names():
    model, mel = build(), torch.randn(1, 8, 9)
    for name, parameter in model.named_parameters():
        if name.endswith("weight_g"):
            parameter.data *= 1.5
    before = sound(model, mel)
    after = sound(model.fold_weight_norm(), mel)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    assert not [k for k in model.state_dict() if k.endswith(("weight_g", "weight_v"))]


@pytest.mark.parametrize("spelling, folded", [(normed, False), (str, True), ("generator.{}".format, False)])
def test_loads_every_spelling(spelling, folded):
    model, mel = build(), torch.randn(1, 8, 9)
    expected = sound(model, mel)
    state = (model.fold_weight_norm() if folded else model).state_dict()
    state = {spelling(name): value for name, value in state.items()}
    for target in (HiFT(TINY).eval(), HiFT(TINY).eval().fold_weight_norm()):
        target.load_state_dict(dict(state))
        torch.testing.assert_close(sound(target, mel), expected, atol=1e-5, rtol=1e-4)


def test_wrong_weights_are_refused():
    state = build().state_dict()
    del state["conv_pre.weight_v"]
    with pytest.raises((RuntimeError, KeyError)):
        HiFT(TINY).load_state_dict(state)


@pytest.mark.parametrize("frames", [1, 2, 7])
@pytest.mark.parametrize("name", ["mini", "full"])
def test_length(name, frames):
    config = preset(name)
    model = build(replace(config.hift, base_channels=8, f0_channels=8))
    assert model.hop == config.mel.hop_size
    assert sound(model, torch.randn(1, 80, frames)).shape == (1, frames * model.hop)


def test_mini_kernels_overlap_evenly():
    config = preset("mini").hift  # uneven overlap of a transposed convolution is heard as a tone at the frame rate
    assert [k % r for k, r in zip(config.upsample_kernel_sizes, config.upsample_rates)] == [0, 0]


def test_wave_stays_within_its_limit():
    model = build()
    wave = model.wave(torch.full((1, 9, 33), 1e4), torch.rand(1, 9, 33))
    assert wave.abs().max() <= TINY.audio_limit


def test_pitch_is_never_negative():
    model = build()
    model.f0_predictor.classifier.bias.data.fill_(-50)
    assert (model.f0_predictor(torch.randn(2, 8, 30)) > 0).all()


def test_unvoiced_frames_hold_only_noise():
    source = build().m_source
    silent = torch.zeros(1, 9, 400)
    flat = source(torch.full((1, 400), 10.0), source.start(0), silent)  # at the threshold: not voiced
    assert (flat == flat[..., :1]).all()
    tone = source(torch.full((1, 400), 200.0), source.start(0), silent)
    assert tone.std() > 0


def test_source_in_two_halves_is_the_source_in_one():
    source = build().m_source
    f0 = torch.linspace(100, 300, 4 * 256)[None]
    whole, parts = source.start(seed=5), source.start(seed=5)
    expected = source(f0, whole)
    copy = parts.copy()
    first = source(f0[:, :512], parts)
    halves = torch.cat([first, source(f0[:, 512:], parts)], 2)
    torch.testing.assert_close(halves, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(source(f0[:, :512], copy), first)  # the copy was not moved


def test_harmonics_stay_in_tune():
    source, rate, seconds = build().m_source, TINY.sampling_rate, 60
    f0 = torch.full((1, rate * seconds), 200.3)
    state = SourceState(torch.zeros(9, dtype=torch.float64), torch.zeros(9))
    last = source._sines(f0, state)[0, 8, -1].item()
    cycles = 9 * 200.3 / rate * (rate * seconds)
    assert last == pytest.approx(math.sin(2 * math.pi * cycles), abs=0.05)


# ---- long kernels through short spectra ----


@given(length=st.integers(1, 400), taps=st.sampled_from([3, 7, 11]), dilation=st.sampled_from([1, 3, 5]),
       padding=st.integers(0, 30), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_product_of_spectra_is_the_convolution(length, taps, dilation, padding, seed):
    padding += max(0, (taps - 1) * dilation + 1 - length)  # at least one sample comes out
    generator = torch.Generator().manual_seed(seed)
    shapes = (length, 6), (4, 6, taps), (4,), (6,)
    x, weight, bias, alpha = (torch.randn(shape, generator=generator) for shape in shapes)
    alpha = 0.5 + alpha.abs()
    conv, snake = WeightNormConv(6, 4, taps, dilation), Snake(6).requires_grad_(False)
    conv.bias, conv.options["padding"] = nn.Parameter(bias, requires_grad=False), padding
    snake.alpha.copy_(alpha)
    got = spectral.convolve(x, spectral.of_kernel(weight), conv, snake)
    active = snake.double()(x.T.double())
    exact = F.conv1d(active, weight.double(), bias.double(), padding=padding, dilation=dilation).T
    assert got.shape == exact.shape and (got - exact).abs().max() < 5e-5  # values up to 40


WIDE = HiftConfig(in_channels=8, base_channels=64, f0_channels=8)  # 32 and 16 channels: the first stage is wide enough


def spectra(model):
    """Whether each ResBlock has spectra."""
    blocks = (*model.source_resblocks, *model.resblocks)
    return [getattr(block, "spectra", None) is not None for block in blocks]


def test_spectra_are_for_long_kernels_folded_and_without_gradient():
    model, mel, other = build(WIDE), torch.randn(2, 8, 21), build(replace(WIDE, lrelu_slope=0.1))
    for parameter in model.parameters():
        parameter.data *= 1 + 0.3 * torch.rand_like(parameter)  # alphas that are not 1, norms that fold to something
    source = 0.1 * torch.randn(2, 1, 21 * model.hop)
    with torch.no_grad():
        expected = model.decode(mel, source)
        spectral.use(model)  # nothing is folded yet
        assert torch.equal(model.decode(mel, source), expected) and not any(spectra(model))
        got = prepared.prepare(model).decode(mel, source)
        assert spectra(model) == [True, False, False, True, True, False, False, False]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
        model.load_state_dict(other.state_dict())  # other weights: the old spectra must not stay
        torch.testing.assert_close(model.decode(mel, source), other.decode(mel, source), atol=1e-5, rtol=1e-4)
    model.decode(mel, source).sum().backward()
    assert model.resblocks[1].convs1[0].weight.grad.abs().sum() > 0


def test_the_golden_tensors_by_spectra(monkeypatch):
    class Folded(HiFT):
        def load_state_dict(self, state):
            super().load_state_dict(state)
            made.append(prepared.prepare(self))

    made = []
    monkeypatch.setattr(vocoder_kinds, "HiFT", Folded)
    monkeypatch.setattr(spectral, "CHANNELS", 1)  # the golden network is narrow
    lines = list(check("hift", Path(__file__).parent / "parity/golden/speech/hift_edge"))
    assert len(lines) >= 9 and all(passed for *_, passed in lines), lines
    assert any(spectra(made[0]))
