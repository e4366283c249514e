"""Sound files as people have them: lengths that writers never filled in, files cut off, pipes, converters, bombs."""

import contextlib
import io
import os
import struct
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aqaa import audio, sound_files
from aqaa.audio import load_question
from aqaa.sound_headers import AudioError
from tests.conftest import RATE, tone

WAVE = tone(1.5)
N = len(WAVE)


def made(format, subtype=None, wave=WAVE, rate=RATE):
    """The bytes of a sound file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=format, subtype=subtype)
    return buffer.getvalue()


@pytest.fixture
def load(tmp_path):
    """load(bytes, name) -> samples at 16 kHz."""

    def function(data, name="sound"):
        (tmp_path / name).write_bytes(data)
        return load_question(tmp_path / name)

    return function


def refused(load, data, words, name="sound"):
    """What is said of the bytes: one sentence with the file's name."""
    with pytest.raises(AudioError, match=words) as error:
        load(data, name)
    message = str(error.value)
    assert name in message and "\n" not in message and len(message) < 500
    return message


# ---- sizes in headers ----

SIZES = {  # format: code of the size, where it stands from the name of the chunk on, the name, bytes it counts besides
    "WAV": ("<I", 4, b"data", 0), "WAVEX": ("<I", 4, b"data", 0), "AIFF": (">I", 4, b"SSND", 8),
    "AU": (">I", 8, b".snd", 0), "W64": ("<Q", 16, b"data\xf3", 24), "CAF": (">q", 4, b"data", 4),
    "RF64": ("<Q", 16, b"ds64", 0), "SVX": (">I", 4, b"BODY", 0),
}  # fmt: skip


def restated(format, size, subtype="PCM_16"):
    """A file whose size of samples is another one: size(the true one)."""
    code, at, name, _ = SIZES[format]
    data = bytearray(made(format, subtype))
    if format == "RF64":  # as it is written once a file is long: the 32-bit size says to look into ds64
        struct.pack_into("<I", data, data.index(b"data") + 4, 0xFFFFFFFF)
    place = data.index(name) + at
    struct.pack_into(code, data, place, size(struct.unpack_from(code, data, place)[0]))
    return bytes(data)


LEFT_OPEN = [
    *[(format, 0) for format in SIZES if format not in ("CAF", "SVX")],
    *[(format, 0xFFFFFFFF) for format in ("WAV", "WAVEX", "AIFF", "AU")],
    *[("WAV", size) for size in (0x7FFFFFFF, 0x7FFFFFDB, 0x80000000, 0x7FFFF000)],
    ("W64", 24), ("W64", 2**64 - 1), ("RF64", 2**64 - 1), ("CAF", -1),
]  # fmt: skip


@pytest.mark.parametrize(("format", "size"), LEFT_OPEN)
def test_a_size_that_was_never_filled_in_means_until_the_end(load, format, size):
    wav = load(restated(format, lambda _: size))
    assert len(wav) == N and np.abs(wav.numpy() - WAVE).max() < 1e-4


@pytest.mark.parametrize("extra", [1, 8, 44, 128])
@pytest.mark.parametrize("format", SIZES)
def test_a_size_a_few_bytes_too_large_is_a_slip(load, format, extra):
    assert N <= len(load(restated(format, lambda size: size + extra))) <= N + 1


@pytest.mark.parametrize("format", SIZES)
def test_a_size_much_too_large_says_that_the_file_is_cut_off(load, format):
    for data in (restated(format, lambda size: size + 200), restated(format, lambda size: size + 20_000)):
        refused(load, data, "cut off, .* bytes are missing")


WHOLE = [
    ("WAV", "PCM_16"), ("WAV", "GSM610"), ("WAV", "FLOAT"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("W64", "PCM_16"),
    ("W64", "IMA_ADPCM"), ("AIFF", "PCM_16"), ("AIFF", "ULAW"), ("AU", "PCM_16"), ("AU", "G721_32"), ("CAF", "ALAC_16"),
    ("CAF", "PCM_16"), ("SVX", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "subtype"), WHOLE)
def test_a_file_that_is_cut_anywhere_is_refused_or_has_only_lost_what_is_no_sound(load, format, subtype):
    data = made(format, subtype)
    whole = load(data)
    assert N <= len(whole) < N + 3000
    for share in (0.3, 0.5, 0.8, 0.95):
        message = refused(load, data[: int(share * len(data))], "cut off|not a sound file")
        assert "cut off" in message or share == 0.3


def test_a_size_of_none_may_be_meant_and_many_empty_chunks_take_no_time(load):
    refused(load, made("WAV", wave=WAVE[:0]) + b"LIST" + struct.pack("<I", 400) + bytes(400), "no samples")
    began = time.process_time()
    refused(load, made("WAV")[:12] + (b"junk" + bytes(4)) * 1_000_000, "not a sound file")
    assert time.process_time() - began < 3


def endless(flac):
    """As it comes from a pipe: the lowest 36 bits of these five bytes count the samples."""
    return flac[:21] + bytes([flac[21] & 0xF0, 0, 0, 0, 0]) + flac[26:]


def test_flac_from_a_pipe_has_no_length(load):
    data = endless(made("FLAC"))
    assert len(load(data)) == N
    refused(load, data[: len(data) // 2], "cut off")


def codecs():
    """(format, subtype, bytes) of all that this libsndfile writes."""
    for format in set(soundfile.available_formats()) - {"RAW", "SD2"}:
        for subtype in set(soundfile.available_subtypes(format)) - {"MPEG_LAYER_I", "MPEG_LAYER_II", "DWVW_12"}:
            with contextlib.suppress(soundfile.LibsndfileError):  # it reads some without writing them
                yield format, subtype, made(format, subtype)


def test_every_codec_is_read_to_its_end(tmp_path):
    """Also those in which libsndfile cannot seek."""
    lengths = {}
    for format, subtype, data in codecs():
        (tmp_path / "sound").write_bytes(data)
        lengths[format, subtype] = len(audio.read(tmp_path / "sound")[0])
    assert len(lengths) > 60 and {name: n for name, n in lengths.items() if not N <= n < N + 1000} == {}


# ---- mp3 ----


def tag_of(data):
    """Where the count of frames stands."""
    return next(place for name in (b"Info", b"Xing") if (place := data.find(name)) > 0) + 8


def recounted(data, count):
    """The same mp3 with another count in its tag."""
    data = bytearray(data)
    struct.pack_into(">I", data, tag_of(data), count(struct.unpack_from(">I", data, tag_of(data))[0]))
    return bytes(data)


def untagged(data):
    """Without the frame that counts the others."""
    return data[data.index(data[:2], 4) :]


@pytest.fixture(scope="module", params=[16_000, 44_100])
def mp3(request):
    rate = request.param
    return made("MP3", wave=tone(4, rate), rate=rate)


def test_an_mp3_without_a_count_of_frames_is_read_to_its_end(load, mp3):
    whole = len(load(mp3))
    assert whole == 64_000  # the tag also says what the encoder has added
    quiet_first = made("MP3", wave=np.concatenate([np.zeros(RATE, "f4"), tone(3)]))  # a guess goes by the first frames
    for data in (untagged(mp3), untagged(quiet_first), recounted(mp3, lambda n: n // 2), recounted(mp3, lambda n: 0)):
        assert whole <= len(load(data)) < whole + 3000


ID3 = b"ID3\x04\x00\x00\x00\x00\x02\x00" + b"TIT2\x00\x00\x00\x02\x00\x00\x00a" + bytes(244)
ID3V1, APE = b"TAG" + bytes(125), b"APETAGEX" + struct.pack("<IIII", 2000, 64, 1, 0) + bytes(8) + bytes(64)


def test_tags_around_an_mp3_do_not_count_and_two_in_one_file_are_both_read(load, mp3):
    whole = len(load(mp3))
    assert len(load(ID3 + mp3 + ID3V1)) == whole
    assert whole <= len(load(ID3 + untagged(mp3) + APE)) < whole + 3000
    for joined in (mp3 + mp3, untagged(mp3) * 2, mp3 + ID3 + mp3, mp3 + ID3V1 + mp3):
        assert 2 * whole <= len(load(joined)) < 2 * whole + 6000
    refused(load, mp3 + mp3[: len(mp3) // 2], "cut off")


def test_a_count_of_more_frames_than_there_are_says_cut_off(load, mp3):
    assert len(load(recounted(mp3, lambda n: n + 1))) > 0  # some encoders count the tag's frame
    refused(load, recounted(mp3, lambda n: n + 2), "cut off after")
    refused(load, mp3[:-100], "cut off after")


def test_an_mp3_longer_than_a_minute_is_refused_before_it_is_decoded(load):
    refused(load, untagged(made("MP3", wave=tone(10))) * 7, "more than 61 s, the limit is 60 s")


def test_a_flac_behind_a_tag_is_no_mp3(load):
    assert len(load(ID3 + made("FLAC"))) == N


# ---- channels ----


def test_channels_that_cancel_are_not_mixed(tmp_path):
    other = tone(1.5, pitch=233.0)
    for channels, expected in (
        ([WAVE, -WAVE], WAVE), ([0.9 * WAVE, -WAVE], WAVE), ([WAVE, -0.5 * WAVE, -0.5 * WAVE], WAVE),
        ([WAVE, other], (WAVE + other) / 2), ([WAVE, 0 * WAVE], WAVE / 2), ([WAVE, 0.5 * WAVE], 0.75 * WAVE),
    ):  # fmt: skip
        soundfile.write(tmp_path / "a.wav", np.stack(channels, 1), RATE, subtype="FLOAT")
        for question in (tmp_path / "a.wav", (np.stack(channels), RATE)):
            wav = load_question(question).numpy()
            assert min(np.abs(wav - sign * expected).max() for sign in (1, -1)) < 1e-6


# ---- pipes ----


def fed(descriptor, data, chunk=10_000, pause=0.0):
    """Write into a pipe from another thread."""

    def write():
        with open(descriptor, "wb") as pipe:
            for start in range(0, len(data), chunk):
                pipe.write(data[start : start + chunk])
                pipe.flush()
                time.sleep(pause)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


@pytest.mark.parametrize("data", [made("WAV"), made("FLAC"), made("OGG")], ids=["wav", "flac", "ogg"])
def test_sounds_come_through_pipes(tmp_path, monkeypatch, load, data):
    expected = load(data)
    reading, writing = os.pipe()
    thread = fed(writing, data, pause=0.001)
    assert torch.equal(load_question(f"/dev/fd/{reading}"), expected)
    thread.join()
    os.close(reading)

    os.mkfifo(tmp_path / "fifo")
    thread = fed(tmp_path / "fifo", data)
    assert torch.equal(load_question(tmp_path / "fifo"), expected)
    thread.join()

    reading, writing = os.pipe()
    thread = fed(writing, data)
    with open(reading, encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert torch.equal(load_question("-"), expected)
    thread.join()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert torch.equal(load_question("-"), expected)


def test_a_pipe_that_gives_nothing_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sound_files, "PAUSE", 0.05)
    monkeypatch.setattr(sound_files, "PATIENCE", 0.2)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(AudioError, match="nothing came through .*fifo: start"):  # nobody writes
        load_question(tmp_path / "fifo")
    reading, writing = os.pipe()
    with pytest.raises(AudioError, match="nothing came through .* for 0.2 s"):  # somebody could, and does not
        load_question(f"/dev/fd/{reading}")
    os.write(writing, made("WAV")[:100])
    with open(reading, encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        with pytest.raises(AudioError, match="nothing came through standard input for"):  # it stops in the middle
            load_question("-")
    os.close(writing)
    nothing = SimpleNamespace(buffer=io.BytesIO())
    for stdin, name, words in ((None, "-", "no pipe"), (nothing, "-", "nothing c"), (None, "/dev/null", "nothing c")):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(AudioError, match=words):
            load_question(name)


def test_names_that_cannot_be_opened_are_told_in_one_sentence(tmp_path, load):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, words in (("a" * 300, "too long"), ("loop", "symbolic links"), ("nul\0l", "null"), ("none", "not exist"),
                        (".", "is a folder")):
        with pytest.raises(AudioError, match=words):
            load_question(tmp_path / name if name != "nul\0l" else name)
    odd = os.fsdecode(b"caf\xe9.wav")  # no UTF-8
    assert len(load(made("WAV"), odd)) == N
    for name in ("sound.raw", "SOUND.PCM", "sound.ulaw"):
        assert "ffmpeg -f" in refused(load, bytes(range(256)) * 100, "without a header", name)


# ---- bounds ----


def test_what_would_fill_memory_or_time_is_refused_before_it_is_decoded(load, monkeypatch):
    for rate in (192_001, 384_000, 655_350):
        refused(load, made("WAV", wave=WAVE, rate=rate), "samples a second")
    assert len(load(made("WAV", wave=WAVE, rate=192_000))) == 2000
    silence = np.zeros((100_000, 8), "f4")
    silence[::100] = 0.1
    bomb = made("FLAC", wave=silence)
    assert len(load(bomb)) == 100_000
    monkeypatch.setattr(sound_files, "VALUES", 799_999)
    refused(load, bomb, "8 channels at 16000 Hz, too much")
    refused(load, endless(bomb), "too much")
    monkeypatch.setattr(sound_files, "BOUND", 1 << 20)
    refused(load, bytes((1 << 20) + 1), "more than 1 MiB")
    with pytest.raises(AudioError, match="more than 1 MiB"):
        load_question("/dev/zero")


def test_a_length_that_is_not_known_is_bounded_too(load):
    refused(load, endless(made("FLAC", wave=np.full(61 * RATE, 0.1, "f4"))), "more than 6. s, the limit is 60 s")


MUTANTS = [made(*kind) for kind in WHOLE]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_bytes_come_they_are_read_or_refused(tmp_path_factory, data):
    sound = bytearray(data.draw(st.sampled_from(MUTANTS)))
    for _ in range(data.draw(st.integers(1, 4))):
        sound[data.draw(st.integers(0, min(len(sound) - 1, 200)))] = data.draw(st.integers(0, 255))
    del sound[data.draw(st.integers(1, len(sound))) :]
    path = tmp_path_factory.getbasetemp() / "mutant"
    path.write_bytes(sound)
    try:
        wav = load_question(path)
    except AudioError as fault:
        assert str(path) in str(fault) and "\n" not in str(fault)
    else:
        assert torch.isfinite(wav).all() and len(wav) <= 60 * RATE + 1


# ---- converters ----

BROWSER = {
    "webm": b"\x1aE\xdf\xa3\x9fB\x86\x81\x01" + bytes(200),
    "m4a": struct.pack(">I4s4sI", 16, b"ftyp", b"M4A ", 0) + struct.pack(">I4s", 108, b"mdat") + bytes(100),
    "amr": b"#!AMR\n" + bytes(100),
    "aac": b"\xff\xf1\x50\x80" + bytes(100),
}


@pytest.fixture
def path(monkeypatch, tmp_path):
    """path(script): an ffmpeg that is this shell script, or none."""

    def function(script=None):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        if script is not None:
            (folder / "ffmpeg").write_text("#!/bin/sh\n" + script, encoding="utf-8")
            (folder / "ffmpeg").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin" if script else str(folder))

    return function


@pytest.mark.parametrize("kind", BROWSER)
def test_what_browsers_record_is_read_by_ffmpeg(load, path, tmp_path, kind):
    (tmp_path / "converted.wav").write_bytes(restated("WAV", lambda _: 0xFFFFFFFF))  # as ffmpeg writes to a pipe
    path(f'echo "$@" > {tmp_path}/said; cat {tmp_path}/converted.wav')
    assert np.abs(load(BROWSER[kind]).numpy() - WAVE).max() < 1e-4
    said = (tmp_path / "said").read_text(encoding="utf-8")
    demuxer = {"webm": "matroska", "m4a": "mov"}.get(kind, kind)
    assert f"-f {demuxer} " in said and "-protocol_whitelist file,pipe" in said and "-t 61" in said


@pytest.mark.parametrize(("script", "words"), [
    ("echo 'Invalid data found' >&2; exit 1", "Invalid data found"), ("exit 0", "gave no sound"),
    ("echo 'File ended prematurely' >&2; printf RIFF", "cut off"), ("printf RIFF", "not a sound file"),
    ("sleep 5", "could not be converted"),
])  # fmt: skip
def test_a_converter_that_fails_is_told_in_one_sentence(load, path, monkeypatch, script, words):
    monkeypatch.setattr(sound_files, "CONVERTER_SECONDS", 0.5)
    path(script)
    refused(load, BROWSER["webm"], words)
    refused(load, BROWSER["m4a"][:-30], "cut off, 30 bytes are missing")  # a box reaches beyond the end


def test_torchcodec_stands_in_for_ffmpeg_and_without_both_one_is_named(load, path, monkeypatch):
    path()
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    for data in BROWSER.values():
        refused(load, data, "install ffmpeg")
    asked = []

    class AudioDecoder:
        def __init__(self, source):
            if source[-1:] == b"!":
                raise RuntimeError("no audio stream\nfound")

        def get_samples_played_in_range(self, start, stop):
            asked.append((start, stop))
            return SimpleNamespace(data=torch.from_numpy(np.stack([WAVE, WAVE])), sample_rate=RATE)

    decoders = ModuleType("torchcodec.decoders")
    decoders.AudioDecoder = AudioDecoder
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    assert np.abs(load(BROWSER["webm"]).numpy() - WAVE).max() < 1e-6 and asked == [(0, 61)]
    refused(load, BROWSER["webm"] + b"!", "no audio stream found")


def test_reading_leaves_the_rate_as_it_is(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1, 44_101), 44_101)
    began = time.process_time()
    samples, rate = audio.read(tmp_path / "a.wav")
    assert rate == 44_101 and len(samples) == 44_101
    assert len(load_question(tmp_path / "a.wav")) == RATE
    assert time.process_time() - began < 1
