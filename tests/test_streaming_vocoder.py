"""Chunked synthesis: exact lengths, no drift, no seams, and no dependence on how the ids arrive."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aqaa.config import HiftConfig, MelConfig, preset
from aqaa.vocoder.flow import Flow
from aqaa.vocoder.hift import HiFT
from aqaa.vocoder.streaming import StreamingVocoder, Vocoder, WaveStream
from tests.test_flow import MEL, TINY

MINI = replace(preset("mini").hift, in_channels=8, base_channels=16, f0_channels=8)
FULL = HiftConfig(in_channels=8, base_channels=16, f0_channels=8)


def build(hift=MINI, mel=MEL):
    """Random weights, set so that HiFT hums at about 150 Hz, low tones louder: a break in its phase can be seen."""
    torch.manual_seed(0)
    flow, hift = Flow(TINY, mel).eval(), HiFT(hift).eval()
    n = hift.config.istft_n_fft // 2 + 1
    with torch.no_grad():
        hift.conv_post.bias[:n] += 1 - 0.4 * torch.arange(n)
        hift.conv_post.weight_g *= 0.5
        hift.f0_predictor.classifier.bias.fill_(150)
        hift.f0_predictor.classifier.weight *= 50
        for down in hift.source_downs:
            down.weight *= 3
    return flow, hift


FLOW, HIFT = build()
IDS = np.random.default_rng(0).integers(0, 40, 200).tolist()


def smooth_mel(frames):
    torch.manual_seed(1)
    return torch.nn.functional.interpolate(torch.randn(1, 8, frames // 10), size=frames, mode="linear")


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=6))
def test_pushes_of_any_size_give_the_same_sound(cuts):
    stream, pieces, start = StreamingVocoder(FLOW, HIFT, seed=2), [], 0
    for end in [*sorted(cuts), 60]:
        pieces.append(stream.push(IDS[start:end]))
        start = end
    made = torch.cat([*pieces, stream.finish()])
    once = StreamingVocoder(FLOW, HIFT, seed=2)
    torch.testing.assert_close(made, torch.cat([once.push(IDS[:60]), once.finish()]))
    assert len(made) == 12 * 12 * 160


@pytest.mark.parametrize("groups", [0, 1, 2, 3, 7, 40])
def test_length_streamed_and_whole(groups):
    vocoder = Vocoder(FLOW, HIFT)
    stream = vocoder.stream()
    streamed = torch.cat([stream.push(IDS[: 5 * groups]), stream.finish()])
    assert len(streamed) == len(vocoder.synthesize(IDS[: 5 * groups])) == groups * 12 * 160


def test_published_rate_does_not_drift():
    flow, hift = build(FULL, MelConfig(num_mels=8))
    stream = StreamingVocoder(flow, hift, chunks=(1, 2, 3))
    made = sum(len(stream.push(IDS[i : i + 5])) for i in range(0, 200, 5)) + len(stream.finish())
    assert made == flow.frames(200) * 256 == int(40 * 0.12 * 22050 / 256) * 256


def test_first_sound_after_three_groups():
    stream = StreamingVocoder(FLOW, HIFT)
    assert [len(stream.push(IDS[i : i + 5])) for i in (0, 5, 10)] == [0, 0, 2 * 12 * 160]


def test_incomplete_group_is_dropped():
    vocoder = Vocoder(FLOW, HIFT)
    torch.testing.assert_close(vocoder.synthesize(IDS[:13]), vocoder.synthesize(IDS[:10]))


def test_seed_decides():
    vocoder = Vocoder(FLOW, HIFT)
    one, same, other = (vocoder.synthesize(IDS[:20], seed=s) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_voice_prompt_reaches_every_chunk():
    voice = {"prompt_token": torch.tensor([IDS[:10]]), "prompt_feat": torch.randn(1, 24, 8)}
    seen = []
    hook = FLOW.encoder.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    stream = StreamingVocoder(FLOW, HIFT, look_back=2, **voice)
    made = torch.cat([stream.push(IDS[:100]), stream.finish()])
    hook.remove()
    assert len(made) == 20 * 12 * 160
    assert seen == [10 + 15, 10 + 10 + 25, 10 + 10 + 45, 10 + 10 + 30]  # prompt, past, chunk with what lies ahead


def test_waves_are_exact_when_enough_lies_ahead():
    mel = smooth_mel(200)
    whole = WaveStream(HIFT, seed=1).push(mel, final=True)
    stream = WaveStream(HIFT, seed=1)
    pieces = [stream.push(mel[..., a : a + 20], mel[..., a + 20 : a + 44], final=a == 180) for a in range(0, 200, 20)]
    torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-5, rtol=0)


def test_nothing_to_say():
    stream = WaveStream(HIFT)
    assert len(stream.push(torch.zeros(1, 8, 0))) == len(stream.push(torch.zeros(1, 8, 0), final=True)) == 0


def roughness(wave, joins, window=80):
    """(largest at joins, largest elsewhere) of the second difference and of the spectral flux in `window` samples."""
    wave = wave.double().numpy()
    bend = np.abs(np.diff(wave, 2))
    blocks = wave[: len(wave) // window * window].reshape(-1, window)
    power = np.log(np.abs(np.fft.rfft(blocks * np.hanning(window), axis=1)) + 1e-4)
    flux = np.maximum(np.diff(power, axis=0), 0).sum(1)  # between block i and i + 1
    near = np.zeros(len(bend), bool)
    for j in joins:
        near[j - window : j + window] = True
    border = np.zeros(len(flux), bool)
    for j in joins:
        border[j // window - 2 : j // window + 1] = True
    return (bend[near].max(), bend[~near].max()), (flux[border].max(), flux[~border].max())


@pytest.mark.parametrize("ahead", [0, 12])
def test_joins_of_waves_are_not_heard(ahead):
    mel, step = smooth_mel(480), 48
    stream, pieces = WaveStream(HIFT, seed=1), []
    for a in range(0, 480, step):
        guess = mel[..., a + step : a + step + ahead] if ahead else None
        pieces.append(stream.push(mel[..., a : a + step], guess, final=a + step == 480))
    joins = np.cumsum([len(p) for p in pieces])[:-1]
    for at_joins, elsewhere in roughness(torch.cat(pieces), joins.tolist()):
        assert at_joins <= elsewhere


def test_joins_of_chunks_are_not_heard():
    stream, pieces = StreamingVocoder(FLOW, HIFT, seed=1, temperature=0.4), []
    for i in range(0, 200, 15):
        pieces.append(stream.push(IDS[i : i + 15]))
    pieces.append(stream.finish())
    joins = np.cumsum([len(p) for p in pieces if len(p)])[:-1]
    for at_joins, elsewhere in roughness(torch.cat(pieces), joins.tolist()):
        assert at_joins <= elsewhere


def test_the_measure_hears_a_break():
    """Chunks made without knowledge of each other are found out by the same measure."""
    mel = smooth_mel(480)
    cut = [WaveStream(HIFT, seed=s).push(mel[..., a : a + 48], final=True) for s, a in enumerate(range(0, 480, 48))]
    joins = np.cumsum([len(p) for p in cut])[:-1]
    (bend, elsewhere), _ = roughness(torch.cat(cut), joins.tolist())
    assert bend > elsewhere
