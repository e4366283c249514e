"""Sound files as people have them: read whole, refused when cut off, whatever wrote them and however they come.

libsndfile decodes, once aqaa.sound_headers has put the stated lengths right. A converter (ffmpeg on the PATH, or
torchcodec) reads what browsers and phones record. Everything is bounded: bytes, rate, values decoded, waiting.
"""

import io
import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from aqaa.sound_headers import AudioError, check_boxes, completed, too_long

RATES = (1_000, 192_000)  # Hz; anything else is a damaged header, or costs more than a question is worth
BOUND = 128 << 20  # bytes of a file or a pipe: a minute of stereo floats at 192 kHz has 92 MB
VALUES = 1 << 25  # frames times channels that are decoded: 134 MB
BLOCK = 1 << 18  # values decoded at a time
PATIENCE, PAUSE = 30, 2  # seconds without a byte before a pipe is given up, and between two looks at it
HEADERLESS = (".raw", ".pcm", ".s16", ".s16le", ".sln", ".ulaw", ".ul", ".alaw", ".al", ".vox")
CONVERTER_SECONDS = 120


def read(path, max_seconds=None):
    """Read a sound file, a pipe, or standard input ("-"): all that libsndfile knows, and webm, m4a … by a converter.

    Channels are averaged; where they cancel, the loudest one alone is taken. Returns (samples (N,) float32 tensor, rate
    in Hz). Raises AudioError for a path that is missing, a folder, empty, not sound, cut off as far as the format can
    tell (sizes in the header, Ogg's last page, the frame count of an mp3), without samples, longer than `max_seconds`,
    larger than BOUND or VALUES, of a rate beyond RATES, or holding values that are not finite.
    """
    name = called(path)
    data = _bytes(path, name)
    if Path(path).suffix.lower() in HEADERLESS:
        raise AudioError(
            f"{name} is named as a sound without a header, which would tell its rate: rename it to .wav if it has one, "
            f"or give it one: ffmpeg -f s16le -ar 16000 -ac 1 -i {name} {Path(path).stem}.wav"
        )
    if (demuxer := _foreign(data)) is not None:
        data = _converted(data, demuxer, name, max_seconds)
    return _decoded(completed(data, name, max_seconds), name, max_seconds)


# ---- bytes ----------------------------------------------------------------------------------------------------------


def called(path):
    """What a sentence calls the sound at a path."""
    return "standard input" if str(path) == "-" else str(path)


def _bytes(path, name):
    """All bytes of a file, a pipe or standard input, BOUND at most."""
    try:
        if str(path) == "-":
            data = _standard_input(name)
        elif os.path.isdir(path):
            raise AudioError(f"{name} is a folder: name a sound file in it.")
        elif os.path.isfile(path) or not os.path.exists(path) or os.name == "nt":
            with open(path, "rb") as file:
                data = file.read(BOUND + 1)
            if not data:
                raise AudioError(f"{name} is empty: record or copy it again.")
        else:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else a pipe that nobody writes to never opens
            try:
                data = _drained(descriptor, name, blocks=False)
            finally:
                os.close(descriptor)
    except AudioError:
        raise
    except FileNotFoundError:
        raise AudioError(f"{name} does not exist: check the name.") from None
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise AudioError(f"{name} cannot be read ({reason}): check its name and permissions.") from None
    if len(data) > BOUND:
        raise AudioError(f"{name} holds more than {BOUND >> 20} MiB: cut it into shorter questions.")
    return data


def _standard_input(name):
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    if stream is None or stream.isatty():
        raise AudioError(f"{name} is no pipe: send a sound into it, as in `cat question.wav | aqaa ask -`.")
    try:
        descriptor = stream.fileno()
    except OSError:  # something in memory stands in for it
        return _something(stream.read(BOUND + 1), name)
    return _something(stream.read(BOUND + 1), name) if os.name == "nt" else _drained(descriptor, name)


def _drained(descriptor, name, blocks=True):
    """What comes through a pipe until its writers close it; blocks: whether reading from it waits for them."""
    pieces, size, waited = [], 0, 0
    while size <= BOUND:
        if not select.select([descriptor], [], [], PAUSE)[0]:
            waited += PAUSE
            if waited >= PATIENCE:
                raise AudioError(f"nothing came through {name} for {PATIENCE} s: check what writes into it.")
            if blocks:
                continue
        try:
            piece = os.read(descriptor, 1 << 20)
        except BlockingIOError:  # somebody has it open for writing
            continue
        if not piece:
            break
        pieces.append(piece)
        size, waited = size + len(piece), 0
    return _something(b"".join(pieces), name)


def _something(data, name):
    if not data:
        raise AudioError(f"nothing came through {name}: start what writes a sound into it, then ask again.")
    return data


# ---- what libsndfile does not know ----------------------------------------------------------------------------------

FOREIGN = (  # place, bytes, and the name by which ffmpeg knows such a file
    (0, b"\x1aE\xdf\xa3", "matroska"),  # webm
    (4, b"ftyp", "mov"), (4, b"moov", "mov"), (4, b"mdat", "mov"), (4, b"wide", "mov"), (4, b"free", "mov"),  # m4a, mp4
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),  # wma
    (0, b"#!AMR", "amr"), (0, b"\xff\xf1", "aac"), (0, b"\xff\xf9", "aac"),
)  # fmt: skip


def _foreign(data):
    return next((name for place, magic, name in FOREIGN if data.startswith(magic, place)), None)


def _converted(data, demuxer, name, max_seconds):
    """A wav of what a converter makes of the file, bounded in time, length and size."""
    if demuxer == "mov":
        check_boxes(data, name)
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        return _by_torchcodec(data, name, max_seconds)
    with tempfile.TemporaryDirectory(prefix="aqaa-") as folder:  # m4a has to be read back and forth: no pipe
        source = Path(folder, "sound")
        source.write_bytes(data)
        length = ["-t", str(max_seconds + 1)] if max_seconds else []
        command = [
            ffmpeg, "-nostdin", "-v", "error", "-protocol_whitelist", "file,pipe", "-f", demuxer,
            "-i", f"file:{source}", "-map", "0:a:0", *length, "-fs", str(BOUND), "-c:a", "pcm_f32le",
            "-f", "wav", "pipe:1",
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=CONVERTER_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as fault:
            reason = type(fault).__name__
            raise AudioError(f"{name} could not be converted by {ffmpeg} ({reason}): convert it to wav.") from None
    said = done.stderr.decode(errors="replace").strip()
    if "prematurely" in said or "partial file" in said:
        raise AudioError(f"{name} is cut off, says ffmpeg: get the whole file.")
    if done.returncode or not done.stdout:
        reason = " ".join(said.replace(str(source), name).split())[:200] or "it gave no sound"
        raise AudioError(f"{name} is not a sound file that can be read (ffmpeg: {reason}): convert it to wav.")
    if len(done.stdout) > BOUND - (1 << 20):
        raise AudioError(f"{name} holds more than {BOUND >> 20} MiB of sound: cut it into shorter questions.")
    return done.stdout


def _by_torchcodec(data, name, max_seconds):
    """As ffmpeg would, for an environment that has its libraries but not its program."""
    try:
        from torchcodec.decoders import AudioDecoder
    except Exception:  # missing, or without the libraries that it needs: it raises all sorts of things
        raise AudioError(
            f"{name} is of a kind that browsers and phones write (webm, m4a, aac …): install ffmpeg, which reads it, "
            "or convert it to wav."
        ) from None
    import soundfile

    try:
        sound = AudioDecoder(data).get_samples_played_in_range(0, max_seconds + 1 if max_seconds else None)
        buffer = io.BytesIO()
        soundfile.write(buffer, sound.data.T.numpy(), int(sound.sample_rate), format="WAV", subtype="FLOAT")
    except Exception as fault:
        raise AudioError(f"{name} is not a sound file that can be read ({_line(fault)}): convert it to wav.") from None
    return buffer.getvalue()


# ---- samples --------------------------------------------------------------------------------------------------------


class _Bytes(io.BytesIO):
    """Bytes for libsndfile, which may seek to odd places in a damaged file: that must not print a traceback."""

    def seek(self, place, whence=os.SEEK_SET):
        try:
            return super().seek(place, whence)
        except (ValueError, OverflowError):
            return -1


def _decoded(data, name, max_seconds):
    """(samples (N,), rate) of the bytes of a sound file, decoded in blocks within bounds."""
    import soundfile

    try:
        file = soundfile.SoundFile(_Bytes(data))
    except Exception as fault:  # libsndfile's own errors, and those of reading what it says
        raise AudioError(f"{name} is not a sound file that can be read ({_line(fault)}): convert it to wav.") from None
    with file:
        file.seekable = lambda: False  # soundfile would seek after each block, which some codecs cannot do
        rate, channels, expected = file.samplerate, file.channels, file.frames
        known = 0 <= expected < 1 << 62
        if not RATES[0] <= rate <= RATES[1]:
            raise bad_rate(name, rate)
        if max_seconds and known and expected > max_seconds * rate:
            raise too_long(name, expected / rate, max_seconds)
        blocks, total = [], 0
        while True:
            if max_seconds and total > max_seconds * rate:
                raise too_long(name, total / rate, max_seconds, at_least=True)
            if max(total, expected if known else 0) * channels > VALUES:
                raise AudioError(f"{name} has {channels} channels at {rate} Hz, too much to read: convert it to mono.")
            try:
                block = file.read(max(1, BLOCK // channels), dtype="float32", always_2d=True)
            except Exception as fault:
                raise AudioError(f"{name} is cut off or damaged ({_line(fault)}): get the whole file.") from None
            if not len(block):
                break
            blocks.append(torch.from_numpy(block))
            total += len(block)
        guessed = "MPEG" in file.subtype  # an mp3 does not know its length
    if known and total < expected and not guessed:
        raise AudioError(f"{name} is cut off after {total} of {expected} samples: get the whole file.")
    return mono(blocks, name), rate


def _line(fault):
    said = getattr(fault, "error_string", None) or str(fault)  # libsndfile's own words, without the name of our bytes
    return " ".join(said.split())[:200] or type(fault).__name__


def mono(blocks, name):
    """Blocks (n, channels) of a sound -> (N,) contiguous float32: the mean of the channels, checked.

    Where they cancel (the mean has less than a tenth of the energy that unrelated channels would leave), the loudest
    one is taken. Raises AudioError for a sound without samples or with values that are no numbers.
    """
    if not sum(block.numel() for block in blocks):
        raise AudioError(f"{name} holds no samples: record it again.")
    channels = blocks[0].shape[1]
    mixed = torch.cat([block.double().mean(-1).float() if channels > 1 else block[:, 0] for block in blocks])
    if not torch.isfinite(mixed).all():
        raise AudioError(f"{name} holds values that are not finite (NaN or infinity): write it again.")
    if channels > 1:
        energy = sum(block.double().square().sum(0) for block in blocks)  # (channels,)
        if mixed.double().square().sum() < 0.1 * energy.sum() / channels**2:
            mixed = torch.cat([block[:, energy.argmax()] for block in blocks])
    return mixed.contiguous()


def bad_rate(name, rate):
    return AudioError(f"{name} claims {rate!r} samples a second: save it again at 8 to 96 kHz.")
