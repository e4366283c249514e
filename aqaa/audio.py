"""Sound in and out: files, sample rates, loudness, and the three spectral front ends.

Every front end is plain torch, takes float32 waves of shape (..., N), and reproduces the official
one: Kaldi's fbank (linguistic tokenizer), Whisper's log-mel (semantic tokenizer), and matcha's mel
(vocoder). torchaudio's own are not used: its fbank has no batches and would cost every start 0.1 s
of import; its Slaney bank rounds otherwise, which moves the features that models learnt from.
"""

import io
import math
import os
from functools import lru_cache, wraps
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from aqaa.config import SAMPLE_RATE
from aqaa.files import replacing
from aqaa.sound_files import BLOCK, called, check_rate, mono, read
from aqaa.sound_headers import AudioError, refusal, too_long

TOO_SHORT = "the question is too short to hear anything in it: 0.2 s are needed."

MIN_SECONDS = 0.06  # below it neither tokenizer gives a code
MAX_SECONDS = 60  # rows of the mini's semantic positions, and what it was trained to listen to
SILENCE = 1e-4  # peak of a question that holds nothing to hear, full scale = 1
QUIET = int(0.75 * SAMPLE_RATE)  # samples of silence that a question keeps at either end
MP3_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)  # Hz
PEAK = 10 ** (-3 / 20)  # of a player's sound: 3 dB below full scale
MARGIN = 40  # periods of the lower rate: more than the window of `resample` has at either side
LOUD, FAINT = 10**-2.0, 10**-2.5  # energies that begin speech and carry it on: -20 and -25 dB


def write(path, samples, rate):
    """Write (N,) samples in [-1, 1] (numpy or tensor) as a 16-bit wav, whole or not at all.

    Raises AudioError when the samples are unusable or the place cannot be written.
    """
    import soundfile

    path = Path(path)
    if path.suffix.lower() not in ("", ".wav", ".part"):
        raise refusal(path, "would be written as wav", "give it a name that ends in .wav")
    if isinstance(samples, torch.Tensor):
        samples = samples.detach().float().cpu().numpy()
    samples = np.atleast_1d(np.asarray(samples, dtype=np.float32).squeeze())
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise refusal(path, "was not written", "the sound must be one channel of finite values")
    wav = io.BytesIO()
    soundfile.write(wav, np.clip(samples, -1, 1), int(rate), format="WAV", subtype="PCM_16")
    try:
        with replacing(Path(os.path.realpath(path)), parents=False) as part:
            part.write_bytes(wav.getbuffer())
    except OSError as fault:
        fact = f"cannot be written ({fault.strerror})"
        raise refusal(path, fact, "choose another place or free some") from None


def mp3(wav, rate, level=True):
    """(N,) -> bytes of an MP3 at a rate that MP3 knows, about 4 KB a second. level: put its peak at
    PEAK."""
    import soundfile

    if rate not in MP3_RATES:
        to = next((known for known in MP3_RATES if known >= rate), MP3_RATES[-1])
        wav, rate = resample(torch.from_numpy(wav), rate, to).numpy(), to
    peak = float(np.abs(wav).max())
    if level and peak > SILENCE:
        wav = wav * (PEAK / peak)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(wav, -1, 1), rate, format="MP3", subtype="MPEG_LAYER_III",
                    bitrate_mode="VARIABLE", compression_level=0.7)  # fmt: skip
    return buffer.getvalue()


def load_question(question, max_seconds=MAX_SECONDS):
    """A question as both tokenizers take it: (N,) float32 tensor, mono, 16 kHz, at its own level.

    `question` is a path, "-" for standard input, or (samples, rate); samples (N,), (N, channels) or
    (channels, N), floats or 16- or 32-bit integers: arrays, tensors, memoryviews, lists.
    AudioError if it is unreadable, silent, under 60 ms or over `max_seconds`, or beyond RATES.
    """
    if isinstance(question, (str, os.PathLike)):
        name, (samples, rate) = called(question), read(question, max_seconds)
    else:
        name = "the sound"
        try:
            samples, rate = question
        except (TypeError, ValueError):
            fact = "is a path or a pair (samples, rate)"
            raise refusal("a question", fact, "pass one of them") from None
        samples = mono(_channels_last(samples).split(BLOCK), name)
    check_rate(name, rate)
    seconds = len(samples) / rate
    if seconds > max_seconds:
        raise too_long(name, seconds, max_seconds)
    if seconds < MIN_SECONDS:
        fact = f"lasts {1000 * seconds:.0f} ms, at least {1000 * MIN_SECONDS:.0f} ms are needed"
        raise refusal(name, fact, "ask a longer question")
    if samples.abs().max() < SILENCE:
        raise refusal(name, "is silent", "check the microphone or the file")
    return resample(samples, rate)


def packet(samples):
    """Part of a live question, (n,) numbers as `load_question` takes them -> (n,) float32.

    n may be 0. Raises AudioError for several channels and values that are not finite.
    """
    samples = _channels_last(samples)
    if not samples.numel():
        return torch.zeros(0)
    if samples.shape[1] > 1 or not torch.isfinite(samples).all():
        fact = "must be one channel of finite values"
        raise refusal("the packet", fact, "leave it out, or send it again")
    return samples[:, 0]


def _channels_last(samples):
    """Anything that holds numbers -> float32 (N, channels), integers scaled to [-1, 1]."""
    try:
        if isinstance(samples, torch.Tensor):
            samples = samples.detach().cpu()
            samples = (samples.float() if samples.is_floating_point() else samples).numpy()
        samples = np.asarray(samples)
    except (TypeError, ValueError, RuntimeError):  # ragged lists, sparse tensors
        samples = np.array(None)
    dtype, scale = samples.dtype, 0
    if dtype.kind == "f" or dtype.name == "bfloat16":
        scale = 1
    elif dtype.kind == "i" and dtype.itemsize in (2, 4):
        scale = -float(np.iinfo(dtype).min)
    if not scale or samples.ndim not in (1, 2):
        needed = "numbers in one or two dimensions (float, int16 or int32)"
        raise AudioError(f"the samples must be {needed}.")
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and refused later
        samples = samples.astype(np.float64) / scale if scale > 1 else samples
        samples = torch.from_numpy(samples.astype(np.float32))  # in this machine's byte order
    if samples.ndim == 1:
        samples = samples[:, None]
    return samples if samples.shape[0] >= samples.shape[1] else samples.T


# ---- rate, loudness, silence ---------------------------------------------------------------------


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
    """(..., N) at `rate` -> (..., ceil(N to / rate)), by torchaudio's windowed sinc."""
    rate, to = int(rate), int(to)
    if rate == to or wav.shape[-1] == 0:
        return wav
    divisor = math.gcd(rate, to)
    rate, to = rate // divisor, to // divisor
    if rate * to > 2**20:  # hardly a common divisor: torchaudio's kernel would fill the memory
        return _resample_directly(wav, rate, to, math.ceil(wav.shape[-1] * to / rate))
    return _resampler(rate, to, wav.device, wav.dtype)(wav)


@lru_cache(maxsize=8)
def _resampler(rate, to, device, dtype):
    from torchaudio.transforms import Resample  # 0.1 s that questions at 16 kHz save

    return Resample(rate, to).to(device, dtype)


def _sinc(time, base, rate):
    """Hann-windowed sinc of 6 zero crossings at `time` (in units of the base period)."""
    time = (time * base).clamp(-6, 6)
    return torch.sinc(time) * torch.cos(time * math.pi / 12) ** 2 * (base / rate)


def _resample_directly(wav, rate, to, length, piece=1 << 14, phases=1024):
    """The same sum, with weights between those of the two nearest of `phases` positions."""
    base = min(rate, to) * 0.99
    width = math.ceil(6 * rate / base)
    taps = torch.arange(-width, width + 2, device=wav.device)
    position = torch.arange(phases + 1, device=wav.device, dtype=torch.float64)[:, None] / phases
    weights = _sinc((taps - position) / rate, base, rate).to(wav.dtype)  # (phases + 1, taps)
    padded = F.pad(wav, (width, 2 * width + 2))
    outputs = []
    for start in range(0, length, piece):
        output = torch.arange(start, min(start + piece, length), device=wav.device)
        place = output.double() * rate / to  # where each output sample lies among the input's
        first = place.long().clamp_max(wav.shape[-1])
        phase = (place - place.long()) * phases
        lower = phase.long()
        share = (phase - lower).to(wav.dtype)[:, None]
        weight = torch.lerp(weights[lower], weights[lower + 1], share)  # (piece, taps)
        outputs.append((padded[..., first[:, None] + taps + width] * weight).sum(-1))
    return torch.cat(outputs, -1)


class Resampled:
    """A stream at `rate` -> the same at `to`, packet by packet: together what `resample` gives of
    the whole, but a little later. `finish` gives what is left."""

    def __init__(self, rate, to):
        divisor = math.gcd(rate, to)
        self.rate, self.to, self.down, self.up = rate, to, rate // divisor, to // divisor
        self.margin = math.ceil(MARGIN * max(1, rate / to) / self.down) * self.down
        self._wav, self._lead = torch.zeros(0), 0  # samples not done, behind so many that are

    def push(self, samples, last=False):
        """(n,) float32, any n -> (m,)."""
        self._wav = torch.cat([self._wav, samples])
        end = len(self._wav)
        if not last:
            end = (end - self.margin) // self.down * self.down
        if end <= self._lead:
            return torch.zeros(0)
        whole = resample(self._wav, self.rate, self.to)
        made = whole[self._lead * self.up // self.down : math.ceil(end * self.up / self.down)]
        first = max(0, end - self.margin)
        self._wav, self._lead = self._wav[first:], end - first
        return made

    def finish(self):
        return self.push(torch.zeros(0), last=True)


def endpoints(wav):
    """(start, end) of the question in (N,) at 16 kHz, up to 0.75 s of quiet around it kept.

    Speech begins and ends with 50 ms within 20 dB of the question's level, and goes on in either
    direction while it stays within 25 dB (hysteresis). Questions that were recorded for themselves
    stay whole; of a microphone left running, silence and faint noise are cut.
    """
    n = wav.shape[-1]
    if n < 5 * 160:
        return 0, n
    energy, level = energies(wav)
    loud = (energy > LOUD * level).float()
    runs = loud.unfold(0, 5, 1).amin(-1).nonzero()[:, 0].tolist()  # first frames of 50 loud ms
    if not runs:
        return 0, n
    first, last = runs[0], runs[-1] + 4
    quiet = (energy <= FAINT * level).nonzero()[:, 0]
    first = max(quiet[quiet < first].tolist(), default=-1) + 1
    last = min(quiet[quiet > last].tolist(), default=len(energy)) - 1
    return max(0, 160 * first - QUIET), min(n, 160 * (last + 1) + QUIET)


def energies(wav):
    """(N,) at 16 kHz -> energies of its frames of 10 ms, (N // 160,), and its level, a scalar."""
    # The variance of 10 ms, not the power: some microphones have an offset.
    energy = wav[: len(wav) // 160 * 160].view(-1, 160).var(-1, correction=0)
    return energy, energy.topk(min(10, len(energy))).values[-1]  # the tenth loudest: no click


def energy_norm(wav):
    """Scale (..., N) to a peak of 0.999, at most a hundredfold (Step-Audio's energy_norm_fn)."""
    return wav / wav.abs().amax(-1, keepdim=True).clamp_min(0.01) * 0.999


def levelled(wavs, energy_normed, device):
    """Each of `wavs` (arrays or tensors) as a float32 tensor on `device`, at full level or not."""
    for wav in wavs:
        wav = torch.as_tensor(wav, dtype=torch.float32, device=device)
        yield energy_norm(wav) if energy_normed and len(wav) else wav


def trim_silence(wav, top_db=20.0):
    """(N,) at 16 kHz without its quiet ends: 50 ms of lead-in, whole steps of 15 ms, then 220 ms.

    Frames of 512 every 128 count when they are within `top_db` of the loudest (librosa's trim, then
    Step-Audio's cut); missing ends are zeros.
    """
    n = wav.shape[-1]
    energy = F.pad(wav, (256, 256)).unfold(-1, 512, 128).square().mean(-1)
    decibels = 10 * torch.log10(energy.clamp_min(1e-10) / energy.max().clamp_min(1e-10))
    loud = (decibels > -top_db).nonzero()
    first, last = 128 * loud[0].item(), min(n, 128 * (loud[-1].item() + 1))
    start = first - int(0.05 * SAMPLE_RATE)
    length = int(math.ceil((last - first) / 240) * 240 + 0.27 * SAMPLE_RATE)
    padded = F.pad(wav, (max(0, -start), 0))[max(0, start) :][:length]
    return F.pad(padded, (0, length - len(padded)))


# ---- front ends ----------------------------------------------------------------------------------


@full_precision
def fbank(wav, n_mels=80, window="hamming", dither=0.0):
    """Kaldi filter-bank energies: (..., N) at 16 kHz -> (..., (N - 400) // 160 + 1, n_mels), ln.

    25 ms frames every 10 ms, without padding; fewer than 400 samples give no frame. Scale the wave
    by 32768 first where the official recipe does. `window`: "hamming" or "povey"; `dither`: spread.
    """
    if wav.shape[-1] < 400:
        return wav.new_zeros(*wav.shape[:-1], 0, n_mels)
    frames = wav.unfold(-1, 400, 160)  # (..., T, 400)
    if dither:
        frames = frames + dither * torch.randn_like(frames)
    frames = frames - frames.mean(-1, keepdim=True)
    # Pre-emphasis inside each frame lifts the high formants, which are weaker in speech.
    frames = frames - 0.97 * torch.cat([frames[..., :1], frames[..., :-1]], -1)
    frames = F.pad(frames * _window(window).to(wav), (0, 112))  # 512, for the FFT
    power = torch.fft.rfft(frames).abs().square()  # (..., T, 257)
    energies = power @ _kaldi_bank(n_mels).to(wav).T
    return energies.clamp_min(torch.finfo(torch.float32).eps).log()


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
    left, centre, right = (mel_low + (index + shift) * step for shift in (0.0, 1.0, 2.0))
    mel = 1127 * (1 + SAMPLE_RATE / 512 * torch.arange(256)[None] / 700).log()
    bank = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre))
    return F.pad(bank.clamp_min(0), (0, 1))


@full_precision
def log_mel(wav, n_mels=128):
    """Whisper's log-mel: (..., N) at 16 kHz, N > 200 -> (..., n_mels, N // 160), about -1 to 1.5.

    The loudest bin of each item sets its floor (8 below, in log10): do not pad items before this.
    """
    spectrum = _stft(wav, 400, 160, 400, pad=200)[..., :-1]  # (..., 201, N // 160)
    mels = _slaney_bank(SAMPLE_RATE, 400, n_mels, 0, 8000).to(wav) @ spectrum.abs().square()
    logs = mels.clamp_min(1e-10).log10()
    return (torch.maximum(logs, logs.amax((-2, -1), keepdim=True) - 8) + 4) / 4


@full_precision
def mel(wav, config):
    """The vocoder's mel (matcha): (..., N) at config.sampling_rate -> (..., num_mels, N // hop)."""
    pad = (config.n_fft - config.hop_size) // 2  # frame t is centred on sample (t + 1/2) * hop
    spectrum = torch.view_as_real(_stft(wav, config.n_fft, config.hop_size, config.win_size, pad))
    magnitude = (spectrum.square().sum(-1) + 1e-9).sqrt()  # not zero: its gradient is finite
    sizes = config.sampling_rate, config.n_fft, config.num_mels, config.fmin, config.fmax
    return (_slaney_bank(*sizes).to(wav) @ magnitude).clamp_min(1e-5).log()


def _stft(wav, n_fft, hop, win, pad):
    """(..., N), reflected by `pad` at both ends -> complex (..., n_fft // 2 + 1, frames)."""
    flat = wav.reshape(-1, 1, wav.shape[-1])
    flat = F.pad(flat, (pad, pad), mode="reflect")[:, 0]
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
    gaps = np.diff(hz)[:, None]
    bank = np.maximum(0, np.minimum(-slopes[:-2] / gaps[:-1], slopes[2:] / gaps[1:]))
    return torch.from_numpy(bank * (2 / (hz[2:] - hz[:-2]))[:, None]).float()
