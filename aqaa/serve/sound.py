"""Bytes to samples and back, at the rates of the interface: 24 kHz, 16 bits, one channel."""

import base64
import binascii
import io
import struct

import numpy as np
import torch

from aqaa import audio
from aqaa.sound_files import decoded
from aqaa.sound_headers import completed

RATE = 24_000  # Hz of the interface's raw sound
FORMATS = {"mp3": "audio/mpeg", "opus": "audio/ogg", "flac": "audio/flac", "wav": "audio/wav",
           "pcm": "audio/pcm", "pcm16": "audio/pcm"}  # fmt: skip


def samples(pcm):
    """Bytes of 16-bit little-endian sound -> (n,) float32. Raises AudioError."""
    if len(pcm) % 2:
        raise audio.AudioError("the sound has half a sample: send 16 bits each, little-endian.")
    return torch.from_numpy(np.frombuffer(pcm, "<i2").astype(np.float32) / 32768)


def pcm(wav):
    """(n,) float32 -> bytes of 16-bit little-endian sound."""
    return (wav.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().astype("<i2").tobytes()


def unpacked(text, what="sound"):
    """Bytes of base64. Raises AudioError."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError):
        raise audio.AudioError(f"the {what} is no base64: encode its bytes so.") from None


def packed(data):
    return base64.b64encode(data).decode("ascii")


def question(data, form):
    """Bytes of a sound file, or of raw sound (pcm16) -> (N,) at 16 kHz. Raises AudioError."""
    if form == "pcm16":
        return audio.load_question((samples(data), RATE))
    name, longest = "input_audio", audio.MAX_SECONDS
    return audio.load_question(decoded(completed(data, name, longest), name, longest))


def wav_header(n_bytes=0xFFFFFFFF - 44):
    """Of a wav of so many bytes of sound; by default of one whose end is not known yet."""
    return struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", n_bytes + 36, b"WAVEfmt ", 16, 1, 1, RATE,
                       2 * RATE, 2, 16, b"data", n_bytes)  # fmt: skip


def encoded(wav, form):
    """(N,) at RATE -> bytes in one of FORMATS."""
    if form in ("pcm", "pcm16"):
        return pcm(wav)
    if form == "wav":
        return wav_header(2 * len(wav)) + pcm(wav)
    if form == "mp3":
        return audio.mp3(wav.numpy(), RATE, level=False)
    import soundfile

    file = io.BytesIO()
    container = {"flac": ("FLAC", "PCM_16"), "opus": ("OGG", "OPUS")}[form]
    soundfile.write(file, wav.clamp(-1, 1).numpy(), RATE, format=container[0], subtype=container[1])
    return file.getvalue()
