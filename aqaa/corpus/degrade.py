"""What happens to speech between a mouth and a recogniser: rooms, noise, telephone lines, codecs.

All take float samples (N,) at 16 kHz and return as many."""

import io
from functools import partial

import numpy as np
import soundfile
from scipy.signal import butter, fftconvolve, lfilter, resample_poly, sosfilt

from aqaa.config import SAMPLE_RATE

TELEPHONE = 300, 3400  # Hz


def rms(wav):
    return float(np.sqrt(np.mean(np.square(wav, dtype=np.float64)) + 1e-20))


def room(speech, seconds, wet, rng):
    """A room whose echo falls by 60 dB in `seconds`; wet: the echo's share. Longer by the echo."""
    n = int(seconds * SAMPLE_RATE)
    tail = rng.standard_normal(n) * np.exp(-6.9 * np.arange(n) / n)  # -60 dB at its end
    echo = fftconvolve(speech, tail)
    level = rms(speech) / rms(echo[: len(speech)])
    return np.pad(speech, (0, n - 1)) + wet * echo * level


def noise(wav, snr, rng, color=0.0, level=None):
    """Noise `snr` dB below `level` (of the wave by default). color: 0 white to 0.95 rumble."""
    made = lfilter([1], [1, -color], rng.standard_normal(len(wav)))
    return wav + made * ((level or rms(wav)) * 10 ** (-snr / 20) / rms(made))


def telephone(wav):
    """What an analogue line leaves: 300 to 3,400 Hz."""
    return sosfilt(butter(4, TELEPHONE, "bandpass", fs=SAMPLE_RATE, output="sos"), wav)


def _coded(wav, kind, subtype, rate=SAMPLE_RATE, **options):
    """Through a codec of soundfile and back, at another rate if it needs one."""
    wav = np.asarray(wav)
    peak = max(1.0, float(np.abs(wav).max()))
    sound = resample_poly(wav, rate, SAMPLE_RATE) if rate != SAMPLE_RATE else wav
    file = io.BytesIO()
    soundfile.write(file, np.clip(sound / peak, -1, 1), rate, subtype, format=kind, **options)
    file.seek(0)
    back, _ = soundfile.read(file)
    back = resample_poly(back, SAMPLE_RATE, rate) if rate != SAMPLE_RATE else back
    return np.pad(back, (0, max(0, len(wav) - len(back))))[: len(wav)] * peak


def narrow(wav):
    """Sampled at 8 kHz: nothing above 4 kHz."""
    return resample_poly(resample_poly(wav, 1, 2), 2, 1)[: len(wav)]


def _digital_line(wav, subtype):
    return _coded(telephone(wav), "WAV", subtype, 8000)


LINES = {
    "telephone": telephone,
    "narrow": narrow,
    "gsm": partial(_digital_line, subtype="GSM610"),
    "ulaw": partial(_digital_line, subtype="ULAW"),
    # compression_level: 0 is the codec's best, 1 its smallest, near 24 and 32 kbit/s at 16 kHz
    "mp3": partial(_coded, kind="MP3", subtype="MPEG_LAYER_III", compression_level=0.8),
    "opus": partial(_coded, kind="OGG", subtype="OPUS", compression_level=0.9),
}
