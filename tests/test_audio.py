"""Files in and out with every fault a user may meet, and front ends against torchaudio."""

import os
import struct
import time

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from aqaa import audio, files
from aqaa.audio import load_question
from aqaa.config import preset
from aqaa.sound_headers import AudioError

SECOND = 0.3 * torch.sin(torch.arange(16_000) * 0.05)
MINI_MEL = preset("mini").mel


def noise(n, seed=0):
    return 0.2 * torch.randn(n, generator=torch.Generator().manual_seed(seed))


# ---- files ----


def test_written_wav_reads_back_to_16_bits(tmp_path):
    audio.write(tmp_path / "a.wav", SECOND, 16_000)
    samples, rate = audio.read(tmp_path / "a.wav")
    assert rate == 16_000 and samples.dtype == torch.float32
    assert (samples - SECOND).abs().max() < 1 / 32_000
    assert os.listdir(tmp_path) == ["a.wav"]
    audio.write(tmp_path / "a.wav", torch.tensor([2.0, -2.0]), 16_000)  # clipped, not wrapped
    samples, _ = audio.read(tmp_path / "a.wav")
    assert samples[0] > 0.99 and samples[1] < -0.99


@pytest.mark.parametrize(("name", "rate", "subtype"), [
    ("a.wav", 8_000, "PCM_16"), ("a.wav", 96_000, "PCM_24"), ("a.wav", 44_100, "FLOAT"), ("a.wav", 22_050, "DOUBLE"),
    ("a.wav", 11_025, "PCM_U8"), ("a.flac", 48_000, "PCM_24"), ("a.ogg", 24_000, "VORBIS"), ("a.mp3", 44_100, None),
    ("a.wav", 16_001, "PCM_16"),
])
def test_every_usual_format_and_rate_becomes_16_khz_mono(tmp_path, name, rate, subtype):
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(tmp_path / name, np.stack([wave, 0.5 * wave], 1), rate, subtype=subtype)
    wav = load_question(tmp_path / name)
    assert wav.dtype == torch.float32 and wav.ndim == 1
    assert abs(len(wav) - 16_000) < (1500 if name.endswith("mp3") else 2)  # mp3 pads its ends
    middle = wav[4000:12_000]
    assert torch.fft.rfft(middle).abs().argmax() == 220  # 440 Hz in half a second
    assert middle.abs().max() == pytest.approx(0.375, abs=0.02)


def header(size, data=b""):
    fmt = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16)
    return b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVE" + fmt + b"data" + struct.pack("<I", size) + data


BAD = {
    "missing": (None, "does not exist"),
    "empty": (b"", "is empty"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "not a sound file"),
    "header only": (header(0), "no samples"),
    "cut off": (header(32_000, bytes(3200)), "28800 bytes are missing"),
    "cut in header": (header(32_000)[:30], "not a sound file"),
    "silent": (header(32_000, bytes(32_000)), "is silent"),
    "short": (header(1000, bytes(range(250)) * 4), "at least 60 ms"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_in_one_sentence_that_names_them(tmp_path, case):
    path, (content, fault) = tmp_path / "question.wav", BAD[case]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AudioError) as error:
        load_question(path)
    message = str(error.value)
    assert str(path) in message and fault in message and "\n" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(tmp_path, value):
    wave = SECOND.numpy().copy()
    wave[100] = value
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    for question in (tmp_path / "a.wav", (wave, 16_000)):
        with pytest.raises(AudioError, match="not finite"):
            load_question(question)
    with pytest.raises(AudioError, match="finite"):
        audio.write(tmp_path / "b.wav", wave, 16_000)


def test_ten_minutes_are_refused_with_the_limit(tmp_path):
    soundfile.write(tmp_path / "long.wav", np.full(600 * 8000, 0.1, np.float32), 8000)
    for question in (tmp_path / "long.wav", (torch.ones(600 * 8000), 8000)):
        with pytest.raises(AudioError, match="600 s, the limit is 60 s"):
            load_question(question)
    assert len(load_question((torch.ones(480_000), 8000))) == 960_000


def test_samples_in_memory_have_any_shape_type_and_order():
    wave = SECOND.numpy()
    ints, stereo, frozen = (wave * 32768).astype(np.int16), np.stack([wave, wave], 1), wave.copy()
    frozen.flags.writeable = False
    exact = (
        wave, wave.astype(np.float64), SECOND, list(wave), ints, ints.astype(np.int32) * 65536, stereo.T, stereo,
        SECOND[None], wave.astype(">f4"), wave.astype(">f8"), wave.astype(np.longdouble), SECOND.double(), frozen,
        np.repeat(wave, 2)[::2], wave[::-1][::-1], memoryview(wave), wave.tolist(), stereo[:, :1],
        np.asfortranarray(stereo), SECOND.clone().requires_grad_(), np.ma.masked_invalid(wave), stereo.tolist(),
        (wave * 32767).astype(">i2"), (wave * 2147483647).astype(">i4"), memoryview((wave * 32767).astype(np.int16)),
    )  # fmt: skip
    for samples in exact:
        assert (load_question((samples, 16_000)) - SECOND).abs().max() < 1e-4
    for samples in (wave.astype(np.float16), SECOND.bfloat16(), SECOND.half()):
        assert (load_question((samples, 16_000)) - SECOND).abs().max() < 2e-3
    assert len(audio.packet(wave)) == 16_000


@pytest.mark.parametrize("samples", [
    [[1.0, 2.0], [3.0]], SECOND.to(torch.complex64), SECOND.to_sparse(), b"abc", object(), {"a": 1}, None,
    [None] * 2000, np.full(16_000, 1e300), np.full(16_000, np.nan, np.longdouble), SECOND.to(torch.int64),
])  # fmt: skip
def test_no_samples_in_memory_raise_anything_but_an_audio_error(samples):
    for use in (lambda: load_question((samples, 16_000)), lambda: audio.packet(samples)):
        with pytest.raises(AudioError):
            use()


@pytest.mark.parametrize("question", [
    (SECOND, 0), (SECOND, 2**31), (SECOND, "16000"), (SECOND, None), (SECOND.bool(), 16_000), (SECOND[:0], 16_000),
    (SECOND.reshape(2, 2, -1), 16_000), 7, SECOND, (torch.zeros(16_000), 16_000), (["a"], 16_000),
])
def test_other_things_in_memory_are_refused(question):
    with pytest.raises(AudioError):
        load_question(question)


def test_writing_says_why_it_cannot_and_leaves_the_old_file(tmp_path):
    (tmp_path / "folder.wav").mkdir()
    for path, words in ((tmp_path / "none" / "a.wav", "cannot be written"), ("/dev/full", "No space left"),
                        (tmp_path / "a.mp3", r"ends in \.wav"), (tmp_path / "folder.wav", "cannot be written")):
        with pytest.raises(AudioError, match=words):
            audio.write(path, SECOND, 16_000)
    assert os.listdir(tmp_path) == ["folder.wav"]


# ---- rate, loudness, silence ----


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 24_000, 44_100, 48_000, 96_000])
def test_resample_is_torchaudio_bit_for_bit(rate):
    wav = noise(5000, rate)[None].repeat(2, 1)
    expected = torchaudio.transforms.Resample(rate, 16_000)(wav)
    assert torch.equal(audio.resample(wav, rate), expected) and torch.equal(audio.resample(wav.numpy(), rate), expected)
    assert (audio.resample(wav.double(), rate) - expected).abs().max() < 1e-6  # the kernel follows the wave's dtype


@pytest.mark.parametrize("rate", [24_000, 44_100, 8000])
def test_rates_without_a_common_divisor_take_the_same_sum(rate):
    wav = noise(3000)
    divisor = np.gcd(rate, 16_000)
    expected = audio.resample(wav, rate)
    got = audio._resample_directly(wav, rate // divisor, 16_000 // divisor, len(expected), piece=1000)
    assert (got - expected).abs().max() < 2e-5  # torchaudio's phases are float32


@pytest.mark.parametrize("rate", [44_101, 16_001, 7919, 44_056, 191_999])
def test_awkward_rates_are_resampled_as_well_and_fast(rate):
    wav = noise(2 * rate, rate)
    began = time.process_time()
    resampled = audio.resample(wav, rate)
    assert time.process_time() - began < 1  # 0.01 to 0.14 s on two cores of a Xeon
    assert len(resampled) == 32_000
    part = wav[: rate // 40]  # the whole kernel of a prime rate has a quarter of a billion weights
    place = torch.arange(0, 300, dtype=torch.float64) * rate / 16_000
    base = min(rate, 16_000) * 0.99
    taps = torch.arange(len(part))
    expected = (audio._sinc((taps - place[:, None]) / rate, base, rate) * part.double()).sum(-1)
    assert (resampled[:300] - expected).abs().max() < 2e-6


@given(gain=st.floats(1e-6, 1e6), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_energy_norm_peaks_at_999_unless_nearly_silent(gain, seed):
    wav = noise(100, seed) * gain
    peak = wav.abs().max().item()
    assert audio.energy_norm(wav).abs().max().item() == pytest.approx(0.999 * min(1, peak / 0.01), rel=1e-5)


def test_trim_keeps_fifty_milliseconds_before_the_sound():
    wav = torch.cat([torch.zeros(8000), 0.5 * torch.sin(torch.arange(8000) * 0.3), torch.zeros(8000)])
    trimmed = audio.trim_silence(wav)
    start = (trimmed.abs() > 0.1).nonzero()[0].item()
    assert 800 <= start <= 800 + 512 and len(trimmed) % 240 == int(0.27 * 16_000) % 240
    assert len(audio.trim_silence(torch.zeros(5000))) == 5040 + 4320
    head = audio.trim_silence(torch.ones(4000))  # begins loud: the lead-in is made of zeros
    assert not head[:800].any() and head[800:4800].all()


def spoken(level=0.5, seconds=1.0):
    return level * torch.sin(torch.arange(int(16_000 * seconds)) * 0.3)


@pytest.mark.parametrize("noise_level", [0, 1e-4, 5e-3])
@pytest.mark.parametrize(("lead", "tail"), [(0, 0), (0.7, 0.7), (5, 0), (0, 5), (20, 20), (1.03, 7.31)])
def test_silence_and_faint_noise_are_left_out_but_for_a_margin(lead, tail, noise_level):
    lead, tail, margin = int(16_000 * lead), int(16_000 * tail), int(16_000 * 0.75)
    wav = torch.cat([torch.zeros(lead), spoken(), torch.zeros(tail)])
    start, end = audio.endpoints(wav + noise_level * noise(len(wav)) + 0.1)  # and an offset
    n = len(wav)
    assert 0 <= lead - start <= margin + 160 and (lead - start >= margin or start == 0)
    assert 0 <= end - (n - tail) <= margin + 160 and (end - (n - tail) >= margin or end == n)


def test_endpoints_keep_what_is_spoken():
    silence, click = torch.zeros(32_000), torch.zeros(32_000)
    click[10_000:10_200] = 0.9  # a key that is pressed
    pause = torch.cat([silence, spoken(), silence, spoken(0.1), silence])
    assert audio.endpoints(pause) == (20_000, 96_000 + 12_000)  # pauses inside stay
    fading = torch.cat([silence, spoken(), spoken(0.07), silence])  # 17 dB below
    assert audio.endpoints(fading) == (20_000, 64_000 + 12_000)
    assert audio.endpoints(torch.cat([click, spoken(0.3), click])) == (20_000, 60_000)
    for wav in (silence, click, silence[:0], spoken(0.1)[:700], torch.ones(20_000), noise(50_000)):
        assert audio.endpoints(wav) == (0, len(wav))


def test_ordinary_questions_stay_whole():
    paths = sorted((files.data_folder() / "questions").glob("*.wav"))
    assert len(paths) == 53
    for path in paths:
        wav = load_question(path)
        assert torch.equal(wav, torch.from_numpy(soundfile.read(path, dtype="float32")[0]))
        assert audio.endpoints(wav) == (0, len(wav))


# ---- front ends ----


@pytest.mark.parametrize("window", ["hamming", "povey"])
@pytest.mark.parametrize("n", [400, 559, 560, 7777])
def test_fbank_is_kaldi_of_torchaudio(window, n):
    wav = noise(n) * 32768
    expected = torchaudio.compliance.kaldi.fbank(wav[None], num_mel_bins=80, window_type=window, dither=0.0)
    got = audio.fbank(wav, window=window)
    assert got.shape == ((n - 400) // 160 + 1, 80)
    assert torch.equal(got, expected)
    assert audio.fbank(wav[:399]).shape == (0, 80)


def test_fbank_dither_follows_the_seed_and_needs_a_known_window():
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(audio.fbank(noise(1000), dither=1.0))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    with pytest.raises(ValueError, match="hamming or povey"):
        audio.fbank(noise(1000), window="hann")


@pytest.mark.parametrize(("rate", "n_fft", "n_mels"), [(16_000, 400, 128), (22_050, 1024, 80), (16_000, 640, 80)])
def test_slaney_bank_is_that_of_torchaudio(rate, n_fft, n_mels):
    expected = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0, 8000, n_mels, rate, "slaney", "slaney").T
    assert (audio._slaney_bank(rate, n_fft, n_mels, 0, 8000) - expected).abs().max() < 1e-6


@given(n=st.integers(480, 4000), batch=st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_batched_front_ends_equal_single_ones(n, batch):
    wavs = torch.stack([noise(n, seed) * 10.0**-seed for seed in range(batch)])
    n_frames = {audio.fbank: ((n - 400) // 160 + 1, 80), audio.log_mel: (128, n // 160)}
    for function, shape in {**n_frames, lambda wav: audio.mel(wav, MINI_MEL): (80, n // 160)}.items():
        together = function(wavs)
        assert together.shape == (batch, *shape)
        assert all((one - function(wav)).abs().max() < 2e-5 for one, wav in zip(together, wavs, strict=True))


def test_mel_is_differentiable_and_keeps_float32_under_autocast():
    wav = noise(4000).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = audio.mel(wav, MINI_MEL)
        assert torch.equal(out, audio.mel(wav.detach(), MINI_MEL)) and out.dtype == torch.float32
        assert audio.log_mel(wav).dtype == audio.fbank(wav).dtype == torch.float32
    out.sum().backward()
    assert torch.isfinite(wav.grad).all() and wav.grad.abs().sum() > 0
