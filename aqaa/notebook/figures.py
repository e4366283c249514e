"""Pictures for a committed notebook: small, always the same bytes, readable without colour.

Every figure is a PNG of few colours on white (for dark pages) with a text that says what is in it.
Lines differ in colour (Okabe and Ito's palette) and dash; maps use viridis, which greys well."""

import base64
import io
import re
from html import escape
from pathlib import Path

import matplotlib
import matplotlib.style
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from aqaa import audio
from aqaa.config import SAMPLE_RATE

STYLE = matplotlib.rc_params_from_file(
    Path(__file__).with_suffix(".mplstyle"), use_default_template=False)  # fmt: skip
LINES = STYLE["axes.prop_cycle"].by_key()["color"]
WIDTH = 9.0  # inches, 720 pixels
PALETTE = 48  # colours of a PNG
LEVELS = 20  # steps of a colour map: enough for the eye, and the file is a third
COLUMNS = 300  # frames of a map; more are not seen in 600 pixels


class Picture:
    """A PNG with its words: bytes, what is seen, the title above, more HTML below."""

    def __init__(self, png, alt, title="", extra=""):
        self.png, self.alt, self.title, self.extra = png, alt, title, extra
        self.width, self.height = Image.open(io.BytesIO(png)).size
        self.words = ""  # what a text-only reader gets below the line that names the figure

    def __repr__(self):
        return f"<figure: {self.alt}>" + ("\n" + self.words if self.words else "")

    def _repr_html_(self):
        data = base64.b64encode(self.png).decode()
        return (
            f'<figure style="margin:0"><figcaption>{escape(self.title or self.alt)}</figcaption>'
            f'<img alt="{escape(self.alt)}" width="{self.width}" height="{self.height}" style="'
            f'max-width:100%;height:auto;background:#fff" src="data:image/png;base64,{data}">'
            f"{self.extra}</figure>"
        )


styled = matplotlib.style.context(["default", STYLE])  # a decorator: whatever the reader has set


def canvas(height, rows=1, columns=1, **options):
    """A figure of `height` inches and its axes in a flat list; nothing global is touched."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def picture(figure, alt, title="", extra="", colours=PALETTE):
    """Matplotlib figure -> Picture of few colours, without a date: the same bytes each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba", dpi=80)
    width, height = figure.canvas.get_width_height()
    pixels = Image.frombytes("RGBA", (width, height), buffer.getvalue()).convert("RGB")
    buffer = io.BytesIO()
    _few_colours(np.asarray(pixels), colours).save(buffer, "PNG", optimize=True)
    return Picture(buffer.getvalue(), alt, title, extra)


def _few_colours(pixels, colours, apart=10):
    """(H, W, 3) uint8 -> palette image of the commonest colours; others become the nearest.
    Pillow's own methods mix rare colours: a thin line would change its hue, and the legend not."""
    packed = pixels.astype(np.int64) @ (65536, 256, 1)
    known, place, counts = np.unique(packed, return_inverse=True, return_counts=True)
    known = np.stack([known >> 16, known >> 8 & 255, known & 255], 1)
    left, palette = counts.copy(), []
    while left.any() and len(palette) < colours:
        palette.append(known[left.argmax()])
        left[np.abs(known - palette[-1]).max(1) < apart] = 0
    nearest = np.square(known[:, None] - np.array(palette)[None]).sum(-1).argmin(1)
    image = Image.fromarray(nearest[place].reshape(packed.shape).astype(np.uint8), "P")
    image.putpalette(np.array(palette, dtype=np.uint8).tobytes())
    return image


def array(values, dims, name):
    """Tensor, array or nested lists -> float32 array of `dims` dimensions. Raises ValueError."""
    if isinstance(values, torch.Tensor):
        values = values.detach().float().cpu().numpy()
    try:
        values = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers in a tensor or an array.") from None
    if values.ndim != dims:
        expected = f"{dims} dimension{'s' * (dims > 1)}"
        raise ValueError(f"{name} must have {expected}, not the shape {values.shape}.")
    if not values.size or not np.isfinite(values).all():
        fact = "holds NaN or infinity" if values.size else "is empty"
        raise ValueError(f"{name} {fact}: nothing can be drawn.")
    return values


def integers(codes, name):
    """A row of codes or ids -> list of ints."""
    codes = codes.tolist() if hasattr(codes, "tolist") else codes
    row = isinstance(codes, (list, tuple))
    if not row or not all(isinstance(code, (int, np.integer)) for code in codes):
        raise ValueError(f"{name} must be one row of whole numbers.")
    if not codes:
        raise ValueError(f"{name} is empty: nothing can be drawn.")
    return [int(code) for code in codes]


@styled
def waveform(wav, rate=SAMPLE_RATE, title="", alt=""):
    """Pressure over time. wav: (N,) at `rate` Hz."""
    wav = array(wav, 1, "the sound")
    figure, (axis,) = canvas(1.7)
    draw_wave(axis, wav, rate)
    axis.set_xlabel("time (s)")
    alt = alt or f"waveform of a sound of {len(wav) / rate:.2f} s"
    return picture(figure, alt, title, colours=16)


def draw_wave(axis, wav, rate):
    """A filled outline: the lowest and the highest sample of each pixel's time."""
    edges = _edges(len(wav), 600)
    low, high = np.minimum.reduceat(wav, edges), np.maximum.reduceat(wav, edges)
    axis.fill_between(edges / rate, low, high, color=LINES[0], linewidth=0.6)
    limit = max(float(np.abs(wav).max()), 1e-3) * 1.05
    axis.set(xlim=(0, len(wav) / rate), ylim=(-limit, limit), ylabel="amplitude")
    axis.yaxis.set_major_locator(MaxNLocator(3))


@styled
def spectrogram(wav, rate=SAMPLE_RATE, title="", alt=""):
    """Whisper's log-mel of 80 bins of wav (N,) at `rate` Hz, in dB below the loudest."""
    wav = torch.from_numpy(array(wav, 1, "the sound"))
    seconds, bins = len(wav) / rate, 80
    if seconds < 0.03:
        raise ValueError(f"a spectrogram needs 30 ms of sound, not {1000 * seconds:.0f} ms.")
    log_mel = audio.log_mel(audio.resample(wav, rate), bins).numpy()  # (bins, frames)
    decibel = 40 * (log_mel - log_mel.max())  # log10 of power / 4 + 1, hence 40
    figure, (axis,) = canvas(2.6)
    image = _map(axis, decibel, seconds, Normalize(-80, 0))
    ticks = (-80, -60, -40, -20, 0)
    figure.colorbar(image, ax=axis, label="dB below the loudest", pad=0.01, ticks=ticks)
    hertz = np.array([250, 500, 1000, 2000, 4000, 8000])
    above = 15 + 27 * np.log(np.maximum(hertz, 1000) / 1000) / np.log(6.4)
    mels = np.where(hertz < 1000, hertz * 3 / 200, above)  # Slaney's scale
    places = np.minimum(mels / mels[-1] * (bins + 1) - 0.5, bins)
    axis.set_yticks(places, [f"{f / 1000:g}" for f in hertz])
    axis.set(ylabel="frequency (kHz)", xlabel="time (s)", ylim=(0, bins))
    words = f"mel spectrogram of a sound of {seconds:.2f} s, 0 to 8 kHz"
    return picture(figure, alt or words, title)


def _edges(size, most):
    """Where `most` pieces of a row begin, evenly over all of it, so that time stays in place."""
    count = min(size, most)
    return np.arange(count) * size // count


def _map(axis, matrix, width, norm, levels=LEVELS, height=None):
    """(bins, frames) as an image of `width` seconds or frames; a pixel averages its frames."""
    edges = _edges(matrix.shape[1], COLUMNS)
    matrix = np.add.reduceat(matrix, edges, axis=1) / np.diff([*edges, matrix.shape[1]])
    extent = (0, width, 0, height or len(matrix))
    colours = matplotlib.colormaps["viridis"].resampled(levels)
    axis.spines[:].set_visible(False)
    return axis.imshow(matrix, cmap=colours, norm=norm, origin="lower", aspect="auto",
                       extent=extent, interpolation="nearest")  # fmt: skip


def mel(matrix, hop_seconds=0.010, title="", alt="", bins="mel bin", unit="value"):
    """Any (bins, frames) map over time; hop_seconds between frames; bins, unit: labels."""
    matrix = array(matrix, 2, "the map")
    n_bins, frames = matrix.shape
    alt = alt or f"map of {n_bins} bins and {frames} frames, {frames * hop_seconds:.2f} s"
    return maps([("", matrix)], hop_seconds, alt, title, bins, unit)


@styled
def maps(pairs, hop_seconds=0.010, alt="", title="", bins="mel bin", unit="value"):
    """Several (title, (bins, frames)) maps below each other: one time axis, one colour scale."""
    pairs = [(str(name), array(matrix, 2, f"the map {name!r}")) for name, matrix in pairs]
    if not pairs:
        raise ValueError("maps needs at least one pair (title, matrix).")
    alt = alt or "maps below each other: " + ", ".join(name for name, _ in pairs)
    height = 0.5 + (2.1 if len(pairs) == 1 else 1.55 * len(pairs))
    figure, axes = canvas(height, len(pairs), sharex=True)
    norm = _norm([matrix for _, matrix in pairs])
    for axis, (name, matrix) in zip(axes, pairs):
        image = _map(axis, matrix, matrix.shape[1] * hop_seconds, norm)
        axis.set(ylabel=bins)
        axis.set_title(name, fontsize=10, loc="left")
        axis.tick_params(bottom=axis is axes[-1])
    axes[-1].set_xlabel("time (s)")
    axes[-1].set_xlim(0, max(matrix.shape[1] for _, matrix in pairs) * hop_seconds)
    figure.colorbar(image, ax=axes, label=unit, pad=0.01)
    return picture(figure, alt, title)


def _norm(matrices):
    """One scale for all; a few outliers (1 in 1000) may saturate."""
    values = np.concatenate([matrix.ravel() for matrix in matrices])
    low, high = np.quantile(values, (0.001, 0.999))
    return Normalize(low, high if high > low else low + 1)


@styled
def trajectory(states, times, title="", alt="", bins="mel bin", hop_seconds=0.010,
               unit="log amplitude"):  # fmt: skip
    """Noise becoming a mel: (bins, frames) `states` at ODE `times` from 0 to 1, side by side.
    hop_seconds between frames; unit of what the states hold; one scale of colours."""
    states = [array(state, 2, "a state") for state in states]
    if not states or len(states) != len(times):
        raise ValueError(f"trajectory needs one time for each state, not {len(times)} for "
                         f"{len(states)}.")
    columns = min(len(states), 6)
    rows = -(-len(states) // columns)
    figure, axes = canvas(0.4 + 1.5 * rows, rows, columns, sharex=True, sharey=True)
    norm = _norm(states[-1:])  # the end decides: noise is wider than any mel
    for axis, state, time in zip(axes, states, times):
        # Bins and frames are picked, not averaged: averaged noise would look like less noise.
        picked = state[:: max(1, len(state) // 40), :: max(1, state.shape[1] // 80)]
        image = _map(axis, picked, state.shape[1] * hop_seconds, norm, levels=14, height=len(state))
        axis.set_title(f"t = {float(time):.2f}", fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(2))
    for axis in axes[len(states) :]:
        axis.set_visible(False)
    figure.supxlabel("time (s)", fontsize=10)
    figure.supylabel(bins, fontsize=10)
    figure.colorbar(image, ax=axes, label=unit, pad=0.01)
    words = f"{len(states)} pictures of a mel at times {float(times[0]):g} to {float(times[-1]):g}"
    return picture(figure, alt or words, title)


@styled
def attention(weights, rows=None, columns=None, title="", alt="",
              names=("looking (query)", "looked at (key)")):  # fmt: skip
    """Heat map of weights (Q, K): which key each query looks at. rows, columns: labels, printed if
    they fit; names: of the two axes. The scale ends where three of four queries have their largest
    weight: a query that is sure of one key does not darken all the others."""
    weights = array(weights, 2, "the weights")
    queries, keys = weights.shape
    for labels, size, name in ((rows, queries, "rows"), (columns, keys, "columns")):
        if labels is not None and len(labels) != size:
            raise ValueError(f"attention needs {size} labels for its {name}, not {len(labels)}.")
    figure, (axis,) = canvas(np.clip(0.9 + (0.1 if rows is None else 0.18) * queries, 2.4, 5.5))
    colours = matplotlib.colormaps["viridis"].resampled(LEVELS)
    low, high = min(0.0, float(weights.min())), float(np.quantile(weights.max(1), 0.75))
    high = high if high > low else max(float(weights.max()), low + 1.0)
    norm = PowerNorm(0.5, low, high, clip=True)
    image = axis.imshow(weights, cmap=colours, norm=norm, aspect="auto", interpolation="nearest")
    over = "max" if weights.max() > 1.001 * high else "neither"
    figure.colorbar(image, ax=axis, label="weight (colours by square root)", pad=0.01, extend=over)
    axis.set(xlabel=names[1], ylabel=names[0])
    for side, labels, most, turn in ((axis.yaxis, rows, 40, 0), (axis.xaxis, columns, 60, 90)):
        if labels is not None and len(labels) <= most:
            words = [printable(label) for label in labels]
            side.set_ticks(range(len(labels)), words, fontsize=8, rotation=turn)
        side.set_tick_params(length=2)
    return picture(figure, alt or f"attention of {queries} queries to {keys} keys", title)


def write(axis, x, y, label, size=8, rotation=0, **options):
    """Text in the middle of a cell, left out of the layout, which hundreds would slow down."""
    options = {"ha": "center", "va": "center", "clip_on": True, **options}
    axis.text(x, y, label, fontsize=size, rotation=rotation, **options).set_in_layout(False)


def printable(label):
    """Characters that the font lacks become dots, so that no warning is printed."""
    return re.sub(r"[^ -\u024f\u0370-\u03ff\u2013-\u2026▁]", "·", str(label))
