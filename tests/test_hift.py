"""HiFT: published names, weight norm in its three spellings, source, and lengths."""

import math
from dataclasses import replace

import pytest
import torch

from aqaa.config import HiftConfig, preset
from aqaa.vocoder.hift import HiFT, SourceState

TINY = HiftConfig(in_channels=8, base_channels=16, f0_channels=8)


def build(config=TINY):
    torch.manual_seed(0)
    return HiFT(config).eval()


def sound(model, mel):
    return model.inference(mel, model.m_source.start(seed=3))


def test_published_sizes_and_names():
    state = HiFT(preset("full").hift).state_dict()
    assert len(state) == 227
    assert sum(v.numel() for v in state.values()) == 20_460_591
    assert state["ups.0.weight_g"].shape == (512, 1, 1)
    assert state["source_downs.0.weight"].shape == (256, 18, 16)
    assert state["f0_predictor.condnet.8.weight_v"].shape == (512, 512, 3)


def test_folding_changes_nothing_but_the_names():
    model, mel = build(), torch.randn(1, 8, 9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight_g"):
                parameter.mul_(1.5)
    before = sound(model, mel)
    after = sound(model.fold_weight_norm(), mel)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    assert not [k for k in model.state_dict() if k.endswith(("weight_g", "weight_v"))]


@pytest.mark.parametrize("spelling", ["parametrizations", "folded", "prefix"])
def test_loads_every_spelling(spelling):
    model, mel = build(), torch.randn(1, 8, 9)
    expected, state = sound(model, mel), model.state_dict()
    if spelling == "parametrizations":
        state = {k.replace("weight_g", "parametrizations.weight.original0")
                  .replace("weight_v", "parametrizations.weight.original1"): v for k, v in state.items()}
    elif spelling == "folded":
        state = build().fold_weight_norm().state_dict()
    else:
        state = {"generator." + k: v for k, v in state.items()}
    for target in (HiFT(TINY).eval(), HiFT(TINY).eval().fold_weight_norm()):
        target.load_state_dict(dict(state))
        torch.testing.assert_close(sound(target, mel), expected, atol=1e-5, rtol=1e-4)


def test_wrong_weights_are_refused():
    state = build().state_dict()
    state.pop("conv_pre.weight_v")
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
