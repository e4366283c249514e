"""Pictures of tokens: strips over time, the merged sequence, an answer by blocks, alignments."""

import matplotlib
import numpy as np
from matplotlib.patches import Patch

from aqaa import config
from aqaa.config import GROUP_SECONDS, SAMPLE_RATE
from aqaa.notebook import figures
from aqaa.notebook.figures import array, canvas, integers, picture, printable, styled, write
from aqaa.tokenizers import interleave

KINDS = {  # letter and colour (Okabe and Ito, a marker grey); black print is readable on each
    "text": ("T", "#56B4E9"), "linguistic": ("L", "#E69F00"),
    "semantic": ("S", "#2AA983"), "marker": ("M", "#D0D0D0"),
}  # fmt: skip
AUDIO = ("linguistic", "semantic")
CELL = 0.84  # height of a cell; rows are 1 apart
MANY = 250  # ids of a sequence, beyond which printed codes would make the picture too large a file


def token_cells(linguistic, semantic):
    """The time of each code, 60 or 40 ms: {"linguistic": [(start, end, code)], "semantic": …}."""
    rates = (config.LINGUISTIC_PER_GROUP, config.SEMANTIC_PER_GROUP)
    cells = {}
    for kind, codes, rate in zip(AUDIO, (linguistic, semantic), rates):
        codes = integers(codes, f"the {kind} codes")
        edges = [round(i * GROUP_SECONDS / rate, 3) for i in range(len(codes) + 1)]
        cells[kind] = list(zip(edges, edges[1:], codes))
    return cells


@styled
def streams(linguistic, semantic, wav=None, rate=SAMPLE_RATE, title="", alt=""):
    """Both sequences of codes as strips on one time axis, below the wave if there is one.
    linguistic: 60 ms a code, semantic: 40 ms. The shade goes with the code, so that repetitions are
    seen; codes are printed when they fit (about 3 s)."""
    cells = token_cells(linguistic, semantic)
    seconds = max(row[-1][1] for row in cells.values())
    if wav is None:
        figure, (axis,) = canvas(1.6)
    else:
        wave = array(wav, 1, "the sound")
        seconds = max(seconds, len(wave) / rate)
        figure, (above, axis) = canvas(1.6 + 1.2, 2, sharex=True, height_ratios=[1.0, 1.15])
        figures.draw_wave(above, wave, rate)
    for y, (kind, row) in zip((1, 0), cells.items()):
        fits = (row[0][1] - row[0][0]) / seconds * 600 > 8
        labels = [str(code) for *_, code in row] if fits else None
        _boxes(axis, y, row, KINDS[kind][1], labels, 90)
    axis.set_yticks((1, 0), ["L linguistic\n60 ms each", "S semantic\n40 ms each"], fontsize=9)
    axis.set(xlim=(0, seconds), ylim=(-0.5, 1.5), xlabel="time (s)")
    axis.tick_params(axis="y", length=0)
    first, second = map(len, cells.values())
    words = (f"{first} linguistic codes of 60 ms and {second} semantic codes of 40 ms "
             "on one time axis")  # fmt: skip
    return picture(figure, alt or words, title)


def _boxes(axis, y, spans, colour, labels=None, rotation=0, size=7):
    """A row of boxes (start, end, code): the shade of a colour goes with the code."""
    base = np.array(matplotlib.colors.to_rgb(colour))
    numbers = [code if isinstance(code, int) else sum(map(ord, str(code))) for *_, code in spans]
    # The golden ratio sends neighbouring codes to shades that are far apart.
    pale = [0.1 + 0.7 * (number * 0.618034 % 1) for number in numbers]
    shades = [base + (1 - base) * share for share in pale]
    starts, widths = [start for start, *_ in spans], [end - start for start, end, _ in spans]
    axis.bar(starts, CELL, widths, y - CELL / 2, align="edge", color=shades, edgecolor="white",
             linewidth=0.6)  # fmt: skip
    for (start, end, _), label in zip(spans, labels or ()):
        write(axis, (start + end) / 2, y, label, size, rotation)


def kinds_of(ids, id_ranges):
    return [interleave.KINDS[kind] for kind in interleave.kinds(ids, id_ranges)]


def _labels(ids, kinds, id_ranges, text):
    """What is printed in the cells: the piece of a text id, the code of an audio id, or the id."""
    first = {"linguistic": id_ranges.n_text, "semantic": id_ranges.semantic_start}
    return [printable(text.tokenizer.id_to_token(token)) if kind == "text" and text
            else str(token - first.get(kind, 0)) for token, kind in zip(ids, kinds)]  # fmt: skip


@styled
def sequence(ids, id_ranges, text=None, per_row=50, alt="", title=""):
    """A merged sequence as coloured cells T, L, S, M, read like a page, with a label in each. ids:
    of the backbone; id_ranges: model.ids; text: model.text, to print its pieces instead of numbers.
    Of more than 250 ids the codes are not printed."""
    ids = integers(ids, "the sequence")
    kinds = kinds_of(ids, id_ranges)
    labels = _labels(ids, kinds, id_ranges, text)
    if len(ids) > MANY:
        labels = ["" if kind in AUDIO else label for kind, label in zip(kinds, labels)]
    rows = -(-len(ids) // per_row)
    figure, (axis,) = canvas(0.62 + 0.6 * rows)
    for row in range(rows):
        part = slice(row * per_row, (row + 1) * per_row)
        _kind_cells(axis, -row, kinds[part], labels[part], upright=False)
    axis.set_yticks([-row for row in range(rows)], [str(row * per_row) for row in range(rows)])
    axis.set(xlim=(0, max(min(per_row, len(ids)), 25)), ylim=(0.5 - rows, 0.5), ylabel="place")
    words = f"sequence of {len(ids)} ids: {_key(figure, axis, kinds)}"
    return picture(figure, alt or words, title)


def _kind_cells(axis, y, kinds, labels, upright):
    """Cells one after the other, letter above, label below, which stands upright or lies."""
    colours = [KINDS[kind][1] for kind in kinds]
    axis.bar(range(len(kinds)), CELL, 1, y - CELL / 2, align="edge", color=colours,
             edgecolor="white", linewidth=0.8)  # fmt: skip
    for x, (kind, label) in enumerate(zip(kinds, labels)):
        write(axis, x + 0.5, y + 0.26, KINDS[kind][0], 7, weight="bold")
        write(axis, x + 0.5, y - 0.14, label, 6.5, 0 if upright else 90)


def _key(figure, axis, kinds):
    """The key of the colours; how many there are of each kind, in words."""
    axis.spines[:].set_visible(False)
    axis.set_xticks([])
    axis.tick_params(axis="y", length=0)
    shown = {kind: look for kind, look in KINDS.items() if kind in kinds}
    handles = [Patch(color=colour, label=f"{letter} {kind}")
               for kind, (letter, colour) in shown.items()]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=9)
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in shown)


@styled
def blocks(steps, ids, text, times=None, alt="", title=""):
    """An answer as it was generated: a row for each block, text pieces first, then audio cells.

    steps: of model.generate, or ids; ids: model.ids; text: model.text. times: seconds of a step,
    one number for all or each; then rows say when they were complete, with how much sound."""
    tokens = integers([getattr(step, "id", step) for step in steps], "the answer")
    kinds = kinds_of(tokens, ids)
    labels = _labels(tokens, kinds, ids, text)
    clock = _clock(times, len(tokens))
    ends = _block_ends(kinds)
    widest = max([b - a for a, b in zip([0, *ends], ends[:-1])] + [25])
    # (name, first, last): a long block goes on in the next line
    lines = [(f"block {number}" if first == a else "", first, min(first + widest, b))
             for number, (a, b) in enumerate(zip([0, *ends], ends), 1)
             for first in range(a, b, widest)]  # fmt: skip
    figure, (axis,) = canvas(0.5 + 0.5 * len(lines))
    for y, (_, a, b) in enumerate(lines):
        _kind_cells(axis, -y, kinds[a:b], labels[a:b], upright=True)
        seconds = sum(kind in AUDIO for kind in kinds[:b]) // config.GROUP_SIZE * GROUP_SECONDS
        at = "" if clock is None else f"at {clock[b - 1]:.2f} s: "
        write(axis, widest + 0.3, -y, f"{at}{seconds:.2f} s of sound", 8, ha="left", clip_on=False)
    axis.set_yticks([-y for y in range(len(lines))], [name for name, *_ in lines])
    axis.set(xlim=(0, widest * 1.27), ylim=(0.5 - len(lines), 0.5))
    words = f"answer of {len(ends)} blocks: {_key(figure, axis, kinds)}"
    return picture(figure, alt or words, title)


def _block_ends(kinds):
    """Where a block ends: after its audio, before the next text or the next piece's marker."""
    spoken = [kind in AUDIO for kind in kinds]
    ends = [i for i in range(1, len(kinds)) if spoken[i - 1] and not spoken[i] and any(spoken[i:])]
    return [*ends, len(kinds)]


def _clock(times, count):
    """Seconds from the start at which each step was done, or None."""
    if times is None:
        return None
    times = np.full(count, float(times)) if np.ndim(times) == 0 else array(times, 1, "times")
    if len(times) != count:
        raise ValueError(f"times must hold one number for each of the {count} steps, not "
                         f"{len(times)}.")
    return np.cumsum(times)


@styled
def alignment(x, y, names=("words", "codes"), title="", alt=""):
    """Two labelled sequences over the same time, as rows of boxes: lists of (start, end, label)."""
    for row, name in zip((x, y), names):
        if not row or any(len(box) != 3 or not box[0] < box[1] for box in row):
            raise ValueError(f"{name} must be a list of (start, end, label) with start before end.")
    figure, (axis,) = canvas(1.9)
    first, last = min(box[0] for box in [*x, *y]), max(box[1] for box in [*x, *y])
    for place, row, colour in ((1, x, KINDS["text"][1]), (0, y, KINDS["linguistic"][1])):
        widths = [(end - start) * (600 / (last - first)) for start, end, _ in row]  # pixels
        flat = all(7 * len(str(label)) < width for width, (*_, label) in zip(widths, row))
        labels = [printable(label) if flat or width > 9 else ""
                  for width, (*_, label) in zip(widths, row)]  # fmt: skip
        _boxes(axis, place, row, colour, labels, 0 if flat else 90, 9 if flat else 7)
    for edge in sorted({time for box in x for time in box[:2]}):
        axis.axvline(edge, color="0.4", linewidth=0.8, linestyle=":", zorder=3)
    axis.set_yticks((1, 0), names)
    axis.tick_params(axis="y", length=0)
    axis.set(xlim=(first, last), ylim=(-0.5, 1.5), xlabel="time (s)")
    words = f"{len(x)} {names[0]} above {len(y)} {names[1]} on one time axis"
    return picture(figure, alt or words, title)
