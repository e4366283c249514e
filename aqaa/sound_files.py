"""Sound files as people have them: every usual format is read whole, or refused when cut off.

libsndfile decodes, once aqaa.sound_headers has put the stated lengths right. A converter (ffmpeg,
or torchcodec) reads what browsers and phones record. Bytes, rate and waiting are bounded."""

import io
import numbers
import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from aqaa.sound_headers import AudioError, check_boxes, completed, cut_off, refusal, too_long

RATES = (1_000, 192_000)  # Hz; beyond lie damaged headers, and more than a question is worth
BOUND = 128 << 20  # bytes of a file or a pipe: a minute of stereo floats at 192 kHz has 92 MB
VALUES = 1 << 25  # frames times channels that are decoded: 134 MB
BLOCK = 1 << 18  # values decoded at a time
PATIENCE = 30  # seconds without a byte before a pipe is given up
PAUSE = 2  # seconds between two looks at it
HEADERLESS = ".raw .pcm .s16 .s16le .sln .ulaw .ul .alaw .al .vox".split()
CONVERTER_SECONDS = 120


def read(path, max_seconds=None):
    """Read a sound file, a pipe, or standard input ("-"): (samples (N,) float32, rate in Hz).

    All that libsndfile knows, and webm, m4a … by a converter; channels: see `mono`. Raises
    AudioError for a path that is missing, a folder, empty, not sound, cut off as far as the format
    can tell (see sound_headers), without samples, longer than `max_seconds`, larger than BOUND or
    VALUES, of a rate beyond RATES, or with values that are not finite."""
    name = called(path)
    data = _bytes(path, name)
    if Path(path).suffix.lower() in HEADERLESS:
        raise AudioError(
            f"{name} is named as a sound without a header, which would tell its rate: rename it to "
            f".wav if it has one, or give it one: ffmpeg -f s16le -ar 16000 -ac 1 -i {name} "
            f"{Path(path).stem}.wav"
        )
    demuxer = next((d for place, magic, d in FOREIGN if data.startswith(magic, place)), None)
    if demuxer is not None:
        data = _converted(data, demuxer, name, max_seconds)
    return decoded(completed(data, name, max_seconds), name, max_seconds)


def called(path):
    """The name of the sound at a path in error messages."""
    return "standard input" if str(path) == "-" else str(path)


def _bytes(path, name):
    """All bytes of a file, a pipe or standard input, BOUND at most."""
    try:
        if str(path) == "-":
            data = _standard_input(name)
        elif os.path.isdir(path):
            raise refusal(name, "is a folder", "name a sound file in it")
        elif os.path.isfile(path) or not os.path.exists(path) or os.name == "nt":
            with open(path, "rb") as file:
                data = file.read(BOUND + 1)
            if not data:
                raise refusal(name, "is empty", "record or copy it again")
        else:  # without O_NONBLOCK, a pipe that nobody writes to never opens
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
            try:
                data = _drained(descriptor, name, blocks=False)
            finally:
                os.close(descriptor)
    except AudioError:
        raise
    except FileNotFoundError:
        raise refusal(name, "does not exist", "check the name") from None
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        remedy = "check its name and permissions"
        raise refusal(name, f"cannot be read ({reason})", remedy) from None
    if not data:
        fact = f"nothing came through {name}"
        raise AudioError(f"{fact}: start what writes a sound into it, then ask again.")
    if len(data) > BOUND:
        raise _too_large(name)
    return data


def _standard_input(name):
    stream = getattr(sys.stdin, "buffer", sys.stdin)
    if stream is None or stream.isatty():
        remedy = "send a sound into it, as in `cat question.wav | aqaa ask -`"
        raise refusal(name, "is no pipe", remedy)
    try:
        descriptor = stream.fileno()
    except OSError:  # something in memory stands in for it
        return stream.read(BOUND + 1)
    return stream.read(BOUND + 1) if os.name == "nt" else _drained(descriptor, name)


def _drained(descriptor, name, blocks=True):
    """The bytes of a pipe until its writers close it; blocks: a read waits for them."""
    data, waited = bytearray(), 0
    while len(data) <= BOUND:
        if not select.select([descriptor], [], [], PAUSE)[0]:
            waited += PAUSE
            if waited >= PATIENCE:
                fact = f"nothing came through {name} for {PATIENCE} s"
                raise AudioError(f"{fact}: check what writes into it.")
            if blocks:
                continue
        try:
            piece = os.read(descriptor, 1 << 20)
        except BlockingIOError:  # somebody has it open for writing
            continue
        if not piece:
            break
        data += piece
        waited = 0
    return bytes(data)


def _too_large(name, of=""):
    return refusal(name, f"holds more than {BOUND >> 20} MiB{of}", "cut it into shorter questions")


# ---- formats that libsndfile does not know -------------------------------------------------------

FOREIGN = (  # place, bytes, and the name by which ffmpeg knows such a file
    (0, b"\x1aE\xdf\xa3", "matroska"),  # webm
    *((4, box, "mov") for box in (b"ftyp", b"moov", b"mdat", b"wide", b"free")),  # m4a, mp4
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),  # wma
    (0, b"#!AMR", "amr"), (0, b"\xff\xf1", "aac"), (0, b"\xff\xf9", "aac"),
)  # fmt: skip


def _converted(data, demuxer, name, max_seconds):
    """A wav that a converter makes of the file, bounded in time, length and size."""
    if demuxer == "mov":
        check_boxes(data, name)
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        return _by_torchcodec(data, name, max_seconds)
    with tempfile.TemporaryDirectory(prefix="aqaa-") as folder:  # m4a is read back and forth
        source = Path(folder, "sound")
        source.write_bytes(data)
        length = ["-t", str(max_seconds + 1)] if max_seconds else []
        command = [
            ffmpeg, "-nostdin", "-v", "error", "-protocol_whitelist", "file,pipe", "-f", demuxer,
            "-i", f"file:{source}", "-map", "0:a:0", *length, "-fs", str(BOUND),
            "-c:a", "pcm_f32le", "-f", "wav", "pipe:1",
        ]  # fmt: skip
        limits = {"stdin": subprocess.DEVNULL, "timeout": CONVERTER_SECONDS}
        try:
            done = subprocess.run(command, capture_output=True, **limits)
        except (OSError, subprocess.TimeoutExpired) as fault:
            fact = f"could not be converted by {ffmpeg} ({type(fault).__name__})"
            raise refusal(name, fact, "convert it to wav") from None
    errors = done.stderr.decode(errors="replace").strip()
    if "prematurely" in errors or "partial file" in errors:
        raise cut_off(name, ", says ffmpeg")
    if done.returncode or not done.stdout:
        reason = " ".join(errors.replace(str(source), name).split())[:200] or "it gave no sound"
        raise _unreadable(name, f"ffmpeg: {reason}")
    if len(done.stdout) > BOUND - (1 << 20):
        raise _too_large(name, " of sound")
    return done.stdout


def _by_torchcodec(data, name, max_seconds):
    """As ffmpeg would, for an environment that has its libraries but not its program."""
    try:
        from torchcodec.decoders import AudioDecoder
    except Exception:  # missing, or without the libraries that it needs: it raises all sorts
        raise AudioError(
            f"{name} is of a kind that browsers and phones write (webm, m4a, aac …): "
            "install ffmpeg, which reads it, or convert it to wav."
        ) from None
    import soundfile

    stop = max_seconds + 1 if max_seconds else None
    try:
        sound = AudioDecoder(data).get_samples_played_in_range(0, stop)
        wav, rate = io.BytesIO(), int(sound.sample_rate)
        soundfile.write(wav, sound.data.T.numpy(), rate, format="WAV", subtype="FLOAT")
    except Exception as fault:
        raise _unreadable(name, _line(fault)) from None
    return wav.getvalue()


def _unreadable(name, reason):
    return refusal(name, f"is not a sound file that can be read ({reason})", "convert it to wav")


class _Bytes(io.BytesIO):
    """Bytes for libsndfile, which may seek to odd places in a damaged file without a traceback."""

    def seek(self, place, whence=os.SEEK_SET):
        try:
            return super().seek(place, whence)
        except (ValueError, OverflowError):
            return -1


def decoded(data, name, max_seconds):
    """(samples (N,), rate) of the bytes of a sound file, decoded in blocks within bounds."""
    import soundfile

    try:
        file = soundfile.SoundFile(_Bytes(data))
    except Exception as fault:  # libsndfile's own errors, and those of reading its answers
        raise _unreadable(name, _line(fault)) from None
    with file:
        file.seekable = lambda: False  # soundfile would seek after each block: some codecs cannot
        rate, channels, expected = file.samplerate, file.channels, file.frames
        known = 0 <= expected < 1 << 62
        check_rate(name, rate)
        if max_seconds and known and expected > max_seconds * rate:
            raise too_long(name, expected / rate, max_seconds)
        blocks, total = [], 0
        while True:
            if max_seconds and total > max_seconds * rate:
                raise too_long(name, total / rate, max_seconds, at_least=True)
            if max(total, expected if known else 0) * channels > VALUES:
                fact = f"has {channels} channels at {rate} Hz, too much to read"
                raise refusal(name, fact, "convert it to mono")
            try:
                block = file.read(max(1, BLOCK // channels), dtype="float32", always_2d=True)
            except Exception as fault:
                raise cut_off(name, f" or damaged ({_line(fault)})") from None
            if not len(block):
                break
            blocks.append(torch.from_numpy(block))
            total += len(block)
        guessed = "MPEG" in file.subtype  # an mp3 does not know its length
    if known and total < expected and not guessed:
        raise cut_off(name, f" after {total} of {expected} samples")
    return mono(blocks, name), rate


def _line(fault):
    """One line of an error, in libsndfile's own words: without the name of our bytes."""
    words = getattr(fault, "error_string", None) or str(fault)
    return " ".join(words.split())[:200] or type(fault).__name__


def mono(blocks, name):
    """Blocks (n, channels) of a sound -> (N,) contiguous float32: the mean of the channels. Where
    they cancel (the mean has less than a tenth of the energy that unrelated channels would leave),
    the loudest one is taken. AudioError without samples or if a value is not finite."""
    if not sum(block.numel() for block in blocks):
        raise refusal(name, "holds no samples", "record it again")
    channels = blocks[0].shape[1]
    if channels == 1:
        mixed = torch.cat([block[:, 0] for block in blocks])
    else:
        mixed = torch.cat([block.double().mean(-1).float() for block in blocks])
    if not torch.isfinite(mixed).all():
        raise refusal(name, "holds values that are not finite (NaN or infinity)", "write it again")
    if channels > 1:
        energy = sum(block.double().square().sum(0) for block in blocks)  # (channels,)
        if mixed.double().square().sum() < 0.1 * energy.sum() / channels**2:
            mixed = torch.cat([block[:, energy.argmax()] for block in blocks])
    return mixed.contiguous()


def check_rate(name, rate):
    """Raise AudioError for a rate that is no number within RATES."""
    if not isinstance(rate, numbers.Real) or not RATES[0] <= rate <= RATES[1]:
        raise refusal(name, f"claims {rate!r} samples a second", "save it again at 8 to 96 kHz")
