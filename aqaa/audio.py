"""Sound in and out: files, sample rates, loudness, and the four spectral front ends.

Every front end is plain torch, takes float32 waves of shape (..., N), and reproduces the official one: Kaldi's fbank
(linguistic tokenizer), Whisper's log-mel (semantic tokenizer), and matcha's mel (vocoder).
"""

import io
import math
import numbers
import os
import struct
from functools import lru_cache, wraps
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from aqaa.config import SAMPLE_RATE
from aqaa.files import replacing

MIN_SECONDS = 0.06  # below it neither tokenizer gives a code
MAX_SECONDS = 60  # rows of the mini's semantic positions, and what it was trained to listen to
SILENCE = 1e-4  # peak of a question that holds nothing to hear, full scale = 1
RATES = (1_000, 1_000_000)  # Hz; anything else is a damaged header
UNKNOWN_SIZE = 0x7FF00000  # writers to a pipe put a number above it for "until the end"


class AudioError(ValueError):
    """A sound that cannot be used; its one sentence names the sound, the fault and the remedy."""


# ---- files ----------------------------------------------------------------------------------------------------------


def read(path, max_seconds=None):
    """Read a sound file of any format libsndfile knows (wav, flac, ogg, mp3), channels averaged.

    Returns (samples (N,) float32 tensor, rate in Hz). Raises AudioError for a path that is missing, a folder, empty,
    not sound, cut off, without samples, longer than `max_seconds`, or holding values that are not finite.
    """
    import soundfile

    path = Path(path)
    _check_file(path)
    try:
        with soundfile.SoundFile(path) as file:
            rate, expected = file.samplerate, file.frames
            if max_seconds and expected > max_seconds * rate:
                raise _too_long(path, expected / rate, max_seconds)
            samples = file.read(dtype="float32", always_2d=True)
            estimated = file.format.startswith("MP")  # an mp3 does not know its length
    except (soundfile.LibsndfileError, RuntimeError) as fault:
        raise AudioError(f"{path} is not a sound file that can be read ({fault}): convert it to wav.") from None
    if len(samples) < expected and not estimated:
        raise AudioError(f"{path} is cut off after {len(samples)} of {expected} samples: get the whole file.")
    return _mono(torch.from_numpy(samples), path), rate


def _check_file(path):
    if not path.exists():
        raise AudioError(f"{path} does not exist: check the name.")
    if path.is_dir():
        raise AudioError(f"{path} is a folder: name a sound file in it.")
    try:
        with open(path, "rb") as file:
            head = file.read(12)
            if path.is_file() and not head:
                raise AudioError(f"{path} is empty: record or copy it again.")
            if head[:4] == b"RIFF" and head[8:] == b"WAVE":
                missing = _missing_bytes(file, path.stat().st_size)
                if missing > 0:
                    raise AudioError(f"{path} is cut off, {missing} bytes are missing: get the whole file.")
    except OSError as fault:
        raise AudioError(f"{path} cannot be read ({fault.strerror}): check its permissions.") from None


def _missing_bytes(file, size):
    """How much of a RIFF file's data chunk lies beyond the end of the file (libsndfile would not say)."""
    place = 12
    while place + 8 <= size:
        file.seek(place)
        name, length = struct.unpack("<4sI", file.read(8))
        if name == b"data":
            return 0 if length >= UNKNOWN_SIZE else place + 8 + length - size
        place += 8 + length + length % 2
    return 0  # no data chunk: libsndfile refuses the file by itself


def _mono(samples, name):
    """(N, channels) -> (N,), checked for emptiness and for values that are no numbers."""
    if samples.numel() == 0:
        raise AudioError(f"{name} holds no samples: record it again.")
    mono = samples.double().mean(-1).float() if samples.shape[-1] > 1 else samples[..., 0]
    if not torch.isfinite(mono).all():
        raise AudioError(f"{name} holds values that are not finite (NaN or infinity): write it again.")
    return mono.contiguous()


def _too_long(name, seconds, limit):
    return AudioError(f"{name} lasts {seconds:.0f} s, the limit is {limit:g} s: cut it into shorter questions.")


def write(path, samples, rate):
    """Write (N,) samples in [-1, 1] (numpy or tensor) as a 16-bit wav, all or nothing: a temporary file is renamed.

    Raises AudioError when the samples are unusable or the place cannot be written (folder missing, disk full).
    """
    import soundfile

    path = Path(path)
    if path.suffix.lower() not in ("", ".wav", ".part"):
        raise AudioError(f"{path} would be written as wav: give it a name that ends in .wav.")
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().float().cpu().numpy()
    samples = np.atleast_1d(np.asarray(samples, dtype=np.float32).squeeze())
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise AudioError(f"{path} was not written: the sound must be one channel of finite values.")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(samples, -1, 1), int(rate), format="WAV", subtype="PCM_16")
    try:
        _write_bytes(Path(os.path.realpath(path)), buffer.getbuffer())
    except OSError as fault:
        raise AudioError(f"{path} cannot be written ({fault.strerror}): choose another place or free some.") from None


def _write_bytes(path, data):
    with replacing(path, parents=False) as part:
        part.write_bytes(data)


def load_question(question, max_seconds=MAX_SECONDS):
    """A question as both tokenizers take it: (N,) float32 tensor, mono, 16 kHz, not yet peak-normalised.

    `question` is a path, or (samples, rate) with samples (N,), (N, channels) or (channels, N), integers or floats,
    numpy or torch. Raises AudioError when it is unreadable, silent, shorter than 60 ms or longer than `max_seconds`.
    """
    if isinstance(question, (str, os.PathLike)):
        name, (samples, rate) = Path(question), read(question, max_seconds)
    else:
        name = "the sound"
        try:
            samples, rate = question
        except (TypeError, ValueError):
            raise AudioError("a question is a path or a pair (samples, rate): pass one of them.") from None
        samples = _mono(_channels_last(samples), name)
    if not isinstance(rate, numbers.Real) or not RATES[0] <= rate <= RATES[1]:
        raise AudioError(f"{name} claims {rate!r} samples a second: save it again at 8 to 96 kHz.")
    seconds = len(samples) / rate
    if seconds > max_seconds:
        raise _too_long(name, seconds, max_seconds)
    if seconds < MIN_SECONDS:
        raise AudioError(f"{name} lasts {1000 * seconds:.0f} ms, at least {1000 * MIN_SECONDS:.0f} ms are needed.")
    if samples.abs().max() < SILENCE:
        raise AudioError(f"{name} is silent: check the microphone or the file.")
    return resample(samples, rate)


def _channels_last(samples):
    """Whatever a caller has -> float32 (N, channels), integers scaled to [-1, 1]."""
    samples = np.asarray(samples.detach().cpu() if isinstance(samples, torch.Tensor) else samples)
    samples = torch.from_numpy(samples.copy()) if samples.dtype.kind in "fi" else torch.zeros(0, dtype=torch.bool)
    if not (samples.is_floating_point() or samples.dtype in (torch.int16, torch.int32)) or samples.ndim not in (1, 2):
        raise AudioError("the samples must be numbers in one or two dimensions (float, int16 or int32).")
    if not samples.is_floating_point():
        samples = samples.double() / -float(torch.iinfo(samples.dtype).min)
    if samples.ndim == 1:
        samples = samples[:, None]
    return (samples if samples.shape[0] >= samples.shape[1] else samples.T).float()


# ---- rate, loudness, silence ----------------------------------------------------------------------------------------


def full_precision(function):
    """Spectra and distances need float32 also inside an autocast region.

    The first argument, a tensor or an array, names the device.
    """

    @wraps(function)
    def wrapped(wav, *args, **kwargs):
        wav = torch.as_tensor(wav)
        with torch.autocast(wav.device.type, enabled=False):
            return function(wav, *args, **kwargs)

    return wrapped


@full_precision
def resample(wav, rate, to=SAMPLE_RATE):
    """(..., N) at `rate` -> (..., ceil(N to / rate)); windowed sinc, bit for bit torchaudio.transforms.Resample."""
    rate, to = int(rate), int(to)
    if rate == to or wav.shape[-1] == 0:
        return wav
    divisor = math.gcd(rate, to)
    rate, to = rate // divisor, to // divisor
    length = math.ceil(wav.shape[-1] * to / rate)
    if rate * to > 2**24:  # rates with no common divisor: their kernel would fill the memory
        return _resample_directly(wav, rate, to, length)
    kernel, width = _sinc_kernel(rate, to)
    padded = F.pad(wav.reshape(-1, 1, wav.shape[-1]), (width, width + rate))
    phases = F.conv1d(padded, kernel.to(wav), stride=rate)  # (B, to, N / rate)
    return phases.transpose(1, 2).reshape(*wav.shape[:-1], -1)[..., :length]


def _sinc(time, base, rate):
    """Hann-windowed sinc of 6 zero crossings at `time` (in units of the base period)."""
    time = (time * base).clamp(-6, 6)
    window = torch.cos(time * math.pi / 12) ** 2
    angle = time * math.pi
    return torch.where(angle == 0, torch.ones_like(angle), angle.sin() / angle) * window * (base / rate)


@lru_cache(maxsize=8)
def _sinc_kernel(rate, to):
    base = min(rate, to) * 0.99
    width = math.ceil(6 * rate / base)
    taps = torch.arange(-width, width + rate, dtype=torch.float64)[None, None] / rate
    phases = torch.arange(0, -to, -1)[:, None, None] / to
    return _sinc(phases + taps, base, rate).float(), width


def _resample_directly(wav, rate, to, length, piece=1 << 16):
    """The same sum, each output sample with its own few weights."""
    base = min(rate, to) * 0.99
    width = math.ceil(6 * rate / base)
    padded = F.pad(wav, (width, 2 * width + 2))
    outputs = []
    for start in range(0, length, piece):
        place = torch.arange(start, min(start + piece, length), device=wav.device, dtype=torch.float64) * rate / to
        taps = place.long()[:, None] + torch.arange(-width, width + 2, device=wav.device)
        weights = _sinc((taps - place[:, None]) / rate, base, rate).to(wav.dtype)
        outputs.append((padded[..., taps.clamp_max(wav.shape[-1] + width) + width] * weights).sum(-1))
    return torch.cat(outputs, -1)


def energy_norm(wav):
    """Scale (..., N) so that its peak is 0.999, at most a hundredfold (Step-Audio's energy_norm_fn)."""
    return wav / wav.abs().amax(-1, keepdim=True).clamp_min(0.01) * 0.999


def trim_silence(wav, top_db=20.0):
    """(N,) at 16 kHz without its quiet ends, 50 ms of lead-in kept, a whole number of 15 ms steps plus 220 ms long.

    Frames of 512 every 128 count when they are within `top_db` of the loudest (librosa.effects.trim, then Step-Audio's
    cut); missing ends are zeros.
    """
    n = wav.shape[-1]
    energy = F.pad(wav, (256, 256)).unfold(-1, 512, 128).square().mean(-1)
    loud = (10 * torch.log10(energy.clamp_min(1e-10) / energy.max().clamp_min(1e-10)) > -top_db).nonzero()
    first, last = 128 * loud[0].item(), min(n, 128 * (loud[-1].item() + 1))
    start = first - int(0.05 * SAMPLE_RATE)
    length = int(math.ceil((last - first) / 240) * 240 + 0.27 * SAMPLE_RATE)
    padded = F.pad(wav, (max(0, -start), 0))[max(0, start):][:length]
    return F.pad(padded, (0, length - len(padded)))


# ---- front ends -----------------------------------------------------------------------------------------------------


@full_precision
def fbank(wav, n_mels=80, window="hamming", dither=0.0):
    """Kaldi filter-bank energies: (..., N) at 16 kHz -> (..., (N - 400) // 160 + 1, n_mels), natural log.

    25 ms frames every 10 ms, without padding; fewer than 400 samples give no frame. Scale the wave by 32768 first where
    the official recipe does. `window` is "hamming" or "povey"; `dither` is the spread of added noise.
    """
    if wav.shape[-1] < 400:
        return wav.new_zeros(*wav.shape[:-1], 0, n_mels)
    frames = wav.unfold(-1, 400, 160)  # (..., T, 400)
    if dither:
        frames = frames + dither * torch.randn_like(frames)
    frames = frames - frames.mean(-1, keepdim=True)
    frames = frames - 0.97 * torch.cat([frames[..., :1], frames[..., :-1]], -1)
    frames = F.pad(frames * _window(window).to(wav), (0, 112))
    power = torch.fft.rfft(frames).abs().square()
    return (power @ _kaldi_bank(n_mels).to(wav).T).clamp_min(torch.finfo(torch.float32).eps).log()


@lru_cache
def _window(name):
    if name == "hamming":
        return torch.hamming_window(400, periodic=False)
    if name == "povey":
        return torch.hann_window(400, periodic=False) ** 0.85
    raise ValueError(f"unknown window {name!r}: choose hamming or povey")


@lru_cache
def _kaldi_bank(n_mels, low=20.0, high=8000.0):
    """(n_mels, 257): triangles that are linear in mel; the last bin has no weight."""
    mel_low, mel_high = (1127 * math.log(1 + f / 700) for f in (low, high))
    step = (mel_high - mel_low) / (n_mels + 1)
    index = torch.arange(n_mels)[:, None]
    centre, right = mel_low + (index + 1.0) * step, mel_low + (index + 2.0) * step
    left = mel_low + index * step
    mel = 1127 * (1 + SAMPLE_RATE / 512 * torch.arange(256)[None] / 700).log()
    bank = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp_min(0)
    return F.pad(bank, (0, 1))


@full_precision
def log_mel(wav, n_mels=128):
    """Whisper's log-mel: (..., N) at 16 kHz, N > 200 -> (..., n_mels, N // 160), about -1 to 1.5.

    The loudest bin of each item sets its floor (8 below, in log10), so items are not to be padded before this.
    """
    spectrum = _stft(F.pad(wav[..., None, :], (200, 200), mode="reflect").squeeze(-2), 400, 160, 400)[..., :-1]
    mels = _slaney_bank(SAMPLE_RATE, 400, n_mels, 0, 8000).to(wav) @ spectrum.abs().square()
    logs = mels.clamp_min(1e-10).log10()
    return (torch.maximum(logs, logs.amax((-2, -1), keepdim=True) - 8) + 4) / 4


@full_precision
def mel(wav, config):
    """The vocoder's mel (matcha mel_spectrogram): (..., N) at config.sampling_rate -> (..., num_mels, N // hop)."""
    pad = (config.n_fft - config.hop_size) // 2
    padded = F.pad(wav[..., None, :], (pad, pad), mode="reflect").squeeze(-2)
    spectrum = torch.view_as_real(_stft(padded, config.n_fft, config.hop_size, config.win_size))
    magnitude = (spectrum.square().sum(-1) + 1e-9).sqrt()
    bank = _slaney_bank(config.sampling_rate, config.n_fft, config.num_mels, config.fmin, config.fmax)
    return (bank.to(wav) @ magnitude).clamp_min(1e-5).log()


def _stft(wav, n_fft, hop, win):
    flat = wav.reshape(-1, wav.shape[-1])
    window = torch.hann_window(win, device=wav.device, dtype=wav.dtype)
    spectrum = torch.stft(flat, n_fft, hop, win, window, center=False, return_complex=True)
    return spectrum.reshape(*wav.shape[:-1], *spectrum.shape[-2:])


@lru_cache
def _slaney_bank(rate, n_fft, n_mels, fmin, fmax):
    """(n_mels, n_fft // 2 + 1): Slaney's mel scale and area norm, in float64, then float32."""
    step = math.log(6.4) / 27  # logarithmic above 1 kHz = 15 mel, linear below

    def to_mel(hz):
        return 15 + math.log(hz / 1000) / step if hz >= 1000 else hz * 3 / 200

    mels = np.linspace(to_mel(fmin), to_mel(fmax), n_mels + 2)
    hz = np.where(mels >= 15, 1000 * np.exp(step * (mels - 15)), mels * 200 / 3)
    slopes = hz[:, None] - np.linspace(0, rate / 2, n_fft // 2 + 1)
    gaps = np.diff(hz)
    bank = np.maximum(0, np.minimum(-slopes[:-2] / gaps[:-1, None], slopes[2:] / gaps[1:, None]))
    return torch.from_numpy(bank * (2 / (hz[2:] - hz[:-2]))[:, None]).float()
