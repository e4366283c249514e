"""Chunked synthesis: exact lengths, no drift, no seams, and no dependence on how the ids arrive."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aqaa import files, loading
from aqaa.config import GROUP_SIZE, HiftConfig, MelConfig, preset
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


def pushed(stream, ids, cuts):
    """What a stream says of ids that arrive in pieces cut at these places; silent pieces left out."""
    ends = [0, *cuts, len(ids)]
    pieces = [stream.push(ids[a:b]) for a, b in pairwise(ends)] + [stream.finish()]
    return [piece for piece in pieces if len(piece)]


def joins(pieces):
    return np.cumsum([len(piece) for piece in pieces])[:-1].tolist()


@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 60), max_size=6))
def test_pushes_of_any_size_give_the_same_sound(cuts):
    made, once = (
        torch.cat(pushed(StreamingVocoder(FLOW, HIFT, seed=2), IDS[:60], at)) for at in (sorted(cuts), ())
    )
    torch.testing.assert_close(made, once)
    assert len(made) == 12 * 12 * 160


@pytest.mark.parametrize("groups", [0, 1, 2, 3, 7, 40])
def test_length_streamed_and_whole(groups):
    vocoder = Vocoder(FLOW, HIFT)
    streamed = pushed(vocoder.stream(), IDS[: 5 * groups], ())
    assert sum(map(len, streamed)) == len(vocoder.synthesize(IDS[: 5 * groups])) == groups * 12 * 160


def test_published_rate_does_not_drift():
    flow, hift = build(FULL, MelConfig(num_mels=8))
    pieces = pushed(StreamingVocoder(flow, hift, chunks=(1, 2, 3)), IDS, range(5, 200, 5))
    made = sum(map(len, pieces))
    assert made == flow.frames(200) * 256 == int(40 * 0.12 * 22050 / 256) * 256


def test_ten_minutes_at_the_published_rate_do_not_drift():
    """25,000 tokens, 86.13 frames a second: after every chunk the sound is as long as the frames of its tokens."""
    torch.manual_seed(0)
    narrow = HiftConfig(
        in_channels=8, base_channels=4, f0_channels=4, nb_harmonics=1, resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),), source_resblock_kernel_sizes=(3, 3),
        source_resblock_dilation_sizes=((1,), (1,)),
    )  # fmt: skip
    flow, hift = Flow(TINY, MelConfig(num_mels=8)).eval(), HiFT(narrow).eval()
    ids = np.random.default_rng(0).integers(0, 40, 25_000).tolist()
    stream, made = StreamingVocoder(flow, hift, chunks=(7, 24), look_back=2, n_timesteps=1), 0
    for i in range(0, 25_000, 25):
        made += len(stream.push(ids[i : i + 25]))
        assert made == flow.frames(stream.spoken) * 256
        assert abs(made / 22_050 - stream.spoken * 0.024) < 256 / 22_050  # less than a frame
    assert made + len(stream.finish()) == flow.frames(25_000) * 256 == 600 * 22_050 // 256 * 256


@given(cuts=st.lists(st.integers(1, 40), min_size=1, max_size=60), hop=st.sampled_from([160, 256, 441]))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_frames_of_chunks_add_up_to_those_of_the_whole(cuts, hop):
    flow = Flow(TINY, replace(MEL, sampling_rate=22_050, hop_size=hop))
    ends = GROUP_SIZE * np.cumsum([0, *cuts])
    assert sum(flow.frames(b) - flow.frames(a) for a, b in zip(ends, ends[1:], strict=False)) == flow.frames(ends[-1])
    assert [flow.frames(n) for n in ends] == [int(n) * 22_050 * 24 // (hop * 1000) for n in ends]


def test_one_chunk_is_the_whole():
    stream, vocoder = StreamingVocoder(FLOW, HIFT, chunks=(12,), seed=4), Vocoder(FLOW, HIFT)
    assert len(stream.push(IDS[:60])) == 0  # nothing is known beyond it
    assert torch.equal(stream.finish(), vocoder.synthesize(IDS[:60], seed=4))


@pytest.mark.parametrize("wrong", [{"chunks": ()}, {"chunks": (2, 0)}, {"look_ahead": -1}, {"look_back": -1}])
def test_chunks_without_a_group_are_refused(wrong):
    with pytest.raises(ValueError, match="one or more groups"):
        StreamingVocoder(FLOW, HIFT, **wrong)


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
    made = pushed(stream, IDS[:100], ())
    hook.remove()
    assert sum(map(len, made)) == 20 * 12 * 160
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
    near, border = np.zeros(len(bend), bool), np.zeros(len(flux), bool)
    for j in joins:
        near[j - window : j + window] = True
        border[j // window - 2 : j // window + 1] = True
    return (bend[near].max(), bend[~near].max()), (flux[border].max(), flux[~border].max())


@pytest.mark.parametrize("ahead", [0, 12])
def test_joins_of_waves_are_not_heard(ahead):
    mel, step = smooth_mel(480), 48
    stream, pieces = WaveStream(HIFT, seed=1), []
    for a in range(0, 480, step):
        guess = mel[..., a + step : a + step + ahead] if ahead else None
        pieces.append(stream.push(mel[..., a : a + step], guess, final=a + step == 480))
    assert all(at_joins <= elsewhere for at_joins, elsewhere in roughness(torch.cat(pieces), joins(pieces)))


def test_joins_of_chunks_are_not_heard():
    pieces = pushed(StreamingVocoder(FLOW, HIFT, seed=1, temperature=0.4), IDS, range(15, 200, 15))
    assert all(at_joins <= elsewhere for at_joins, elsewhere in roughness(torch.cat(pieces), joins(pieces)))


def test_the_measure_hears_a_break():
    """Chunks made without knowledge of each other are found out by the same measure."""
    mel = smooth_mel(480)
    cut = [WaveStream(HIFT, seed=s).push(mel[..., a : a + 48], final=True) for s, a in enumerate(range(0, 480, 48))]
    (bend, elsewhere), _ = roughness(torch.cat(cut), joins(cut))
    assert bend > elsewhere


# ---- the shipped voice ----


@pytest.fixture(scope="module")
def mini():
    return loading.load("mini")


@pytest.fixture(scope="module")
def spoken(mini):
    """Codes of two spoken answers, four seconds in all."""
    folder = files.data_folder() / "questions"
    asked = [mini.ask(folder / name) for name in ("count_q002490.wav", "say_fast_q001837.wav")]
    ids = [token for answer in asked for token in answer.tokens["answer"]]
    return mini.codes([token for token in ids if mini.ids.n_text <= token < mini.ids.end])


def roughest(wave):
    """How rough each place of a sound is, in three ways (3, places): a place begins every ms and lasts 10 ms.

    Logarithms of the largest second difference, against the loudness of 10 ms; of the energy above 4 kHz; and of the
    change of the log spectrum within 5 ms.
    """
    wave, hop, half = wave.double().numpy(), 16, 80
    loudness = np.sqrt(np.convolve(wave**2, np.ones(2 * half) / (2 * half), "same")) + 1e-3
    bend = np.abs(np.diff(wave, 2, prepend=0, append=0)) / loudness
    bend = bend[: len(bend) // hop * hop].reshape(-1, hop).max(1)
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wave, half), 2 * half)[::hop][: len(bend)]
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(2 * half), axis=1))
    high = (spectrum[:, half // 2 :] ** 2).sum(1)
    logs = np.log(spectrum + 1e-2)
    flux = np.pad(np.abs(logs[5:] - logs[:-5]).sum(1), (2, 3))
    measures = np.log(np.stack([bend, high, flux + 1]) + 1e-4)
    return np.lib.stride_tricks.sliding_window_view(measures, 10, axis=1).max(2)


def ranks(values, joins):
    """The share of all places whose value lies below that of the place around each join: (J, 3)."""
    return np.stack([(values < values[:, [join // 16 - 5]]).mean(1) for join in joins])


def test_no_join_of_any_chunking_is_heard(mini, spoken):
    """No join is among the roughest places of its sound, and against the whole rendered at once joins do not stand out:
    what they add to its roughness ranks evenly, from 0 to 1, among what other places add."""
    rng, plain, added = np.random.default_rng(0), [], []
    for seed in range(4):
        chunks, ahead = tuple(rng.integers(1, 7, rng.integers(1, 5)).tolist()), int(rng.integers(1, 4))
        stream = StreamingVocoder(
            mini.flow, mini.hift, seed=seed, chunks=chunks, look_ahead=ahead, look_back=int(rng.integers(1, 11))
        )
        pieces = pushed(stream, spoken, range(GROUP_SIZE, len(spoken), GROUP_SIZE))
        rough = roughest(torch.cat(pieces))
        plain.append(ranks(rough, joins(pieces)))
        added.append(ranks(rough - roughest(mini.vocoder.synthesize(spoken, seed=seed)), joins(pieces)))
    plain, added = np.concatenate(plain), np.concatenate(added)  # (J, 3)
    assert len(plain) > 25
    assert (plain < 0.995).all() and (added < 1).all() and (added.mean(0) < 0.63).all()


def test_the_ranks_hear_two_renderings_spliced(mini, spoken):
    """Same voice, same words, cut without a fade where there is sound: the joins stand out."""
    one, other = (mini.vocoder.synthesize(spoken, seed=seed) for seed in (1, 2))
    loudness = np.sqrt(np.convolve(one.numpy() ** 2, np.ones(800) / 800, "same"))
    cuts = np.array([at for at in range(2000, len(one) - 2000, 2000) if loudness[at] > 0.03])
    parts = [(one, other)[i % 2].tensor_split(cuts.tolist())[i] for i in range(len(cuts) + 1)]
    assert ranks(roughest(torch.cat(parts)) - roughest(one), cuts).mean(0).max() > 0.75
    anywhere = np.arange(4000, len(one) - 4000, 400)  # many places: a mean of few is not sure enough
    assert (ranks(roughest(other) - roughest(one), anywhere).mean(0) < 0.6).all()
