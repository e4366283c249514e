"""Pictures of numbers: curves, bars, the ledger of an answer's time, a radar of scores; tables."""

import csv
from html import escape
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from matplotlib.ticker import LogLocator

from aqaa.notebook.figures import LINES, array, canvas, picture, printable, styled

DASHES = ("-", "--", "-.", ":")
PARTS = ("read", "linguistic", "semantic", "generate", "vocode")  # of Answer.timings, in order
# Of Answer.timings: line, words, and height of the words above the bars.
MARKS = (("first_token", ":", "first token", 1.02), ("first_audio", "--", "first sound", 1.13),
         ("total", "-", "end", 1.02))  # fmt: skip


@styled
def curves(rows, x="step", title="", alt="", log=True, columns=None, xlabel="", ylabel="",
           marks=None):  # fmt: skip
    """Lines of a training log.

    rows: dicts, or the path of a CSV; columns: which ones (default all but seconds). xlabel,
    ylabel: what the axes measure, with its unit; by default the names of the columns. marks:
    {words: x} of places to point out. The axis is logarithmic where log is true and all values are
    positive. The alt text names lines that lie on one another."""
    if isinstance(rows, (str, Path)):
        if not Path(rows).is_file():
            raise ValueError(f"there is no log {Path(rows).name}: name a CSV file.")
        with open(rows, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    if not rows or x not in rows[0]:
        raise ValueError(f"curves needs rows with a column {x!r}.")
    known = dict.fromkeys(name for row in rows for name in row if name not in (x, "seconds"))
    names = columns or list(known)
    series = {name: [(float(row[x]), float(row[name])) for row in rows
                     if row.get(name) not in (None, "")] for name in names}  # fmt: skip
    if not series or not all(series.values()):
        where = ", ".join(names) or "any column"
        raise ValueError(f"curves found no values to draw against {x!r} in {where}.")
    figure, (axis,) = canvas(2.8)
    for i, (name, points) in enumerate(series.items()):
        marker = "o" if len(points) < 15 else ""
        axis.plot(*zip(*points), DASHES[i % len(DASHES)], label=printable(name), marker=marker,
                  color=LINES[i % len(LINES)], markersize=4, linewidth=2)  # fmt: skip
    if log and min(value for points in series.values() for _, value in points) > 0:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    same = [f"{a} and {b} lie on one another" for a, b in combinations(series, 2)
            if _covered(axis, series[a], series[b])]  # fmt: skip
    above = axis.get_xaxis_transform()  # x in values, y in heights of the axis
    for words, place in (marks or {}).items():
        axis.axvline(place, color="0.35", linewidth=1)
        axis.text(place, 1.01, printable(words), transform=above, ha="center", fontsize=9)
    axis.grid(color="0.9")
    axis.set(xlabel=xlabel or x, ylabel=ylabel or ("value" if len(series) > 1 else names[0]))
    if len(series) > 1:
        figure.legend(loc="outside right upper", fontsize=9)
    words = alt or f"curves of {', '.join(series)} over {x}"
    return picture(figure, "; ".join([words, *same]), title)


def _covered(axis, first, second, apart=3):
    """Whether two lines [(x, y)] are never `apart` pixels apart where both have values."""
    first, second = dict(first), dict(second)
    shared = [x for x in first if x in second]
    if not shared:
        return False
    axis.get_ylim()  # limits are worked out when somebody asks
    heights = [axis.transData.transform([(x, line[x]) for x in shared])[:, 1]
               for line in (first, second)]  # fmt: skip
    return np.abs(heights[0] - heights[1]).max() < apart


@styled
def bars(values, unit="", title="", alt=""):
    """Horizontal bars of a dict name -> number, each with its number."""
    if not values:
        raise ValueError("bars needs a dict of names and numbers, and this one is empty.")
    numbers = array(list(values.values()), 1, "the values of bars")
    figure, (axis,) = canvas(0.75 + 0.3 * len(numbers))
    _bars(axis, [printable(name) for name in values], numbers)
    axis.set_xlabel(unit or "value")
    words = ", ".join(f"{name} {value:.3g}" for name, value in zip(values, numbers))
    return picture(figure, alt or f"bars: {words}{' ' if unit else ''}{unit}", title, colours=16)


def _bars(axis, names, numbers, left=0.0, mark="{:.3g}"):
    """Bars from top to bottom that begin at `left`, numbers at their ends."""
    look = {"color": LINES[5], "edgecolor": "0.3", "linewidth": 0.8}
    drawn = axis.barh(range(len(names)), numbers, left=left, **look)
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axis.bar_label(drawn, map(mark.format, numbers), padding=4, bbox=paper, zorder=4)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.tick_params(axis="y", length=0)
    return drawn


@styled
def ledger(timings, seconds=None, title="", alt=""):
    """Where the time of an answer went: a bar for each part of Answer.timings, and the first sound.
    seconds: of its sound, for the real-time factor. In a stream generate and vocode take turns."""
    parts = {name: timings[name] for name in PARTS if name in timings}
    if not parts:
        raise ValueError("ledger needs the timings of an Answer: they hold read, linguistic, "
                         "semantic and so on.")
    figure, (axis,) = canvas(1.3 + 0.3 * len(parts))
    starts = np.concatenate([[0], np.cumsum(list(parts.values()))[:-1]])
    turns = "vocode" in parts and timings.get("first_audio_share", 1) < 1
    if turns:
        starts[-1] = starts[-2]
    drawn = _bars(axis, list(parts), list(parts.values()), starts, "{:.3f} s")
    for bar in drawn[-2:] if turns else ():
        bar.set_hatch("///")
    total = timings.get("total", sum(parts.values()))
    last = total - timings.get("first_audio", 0) < 0.03 * total  # the first sound was all of it
    for name, dash, words, height in MARKS:
        if name in timings and not (last and name == "total"):
            words = "first sound, end" if last and name == "first_audio" else words
            time, side = timings[name], "right" if timings[name] > 0.7 * total else "left"
            axis.axvline(time, color=LINES[1], linestyle=dash, linewidth=1.6)
            axis.text(time, height, f" {words} {time:.2f} s ", transform=axis.get_xaxis_transform(),
                      ha=side, fontsize=9, color=LINES[1])  # fmt: skip
    label = "time since the question (s)"
    if seconds:
        label += f"; the sound lasts {seconds:.2f} s, real-time factor {total / seconds:.2f}"
    axis.set_xlabel(label)
    alt = alt or (f"where the time of an answer went: bars for {', '.join(parts)}; "
                  "marks at first token and first sound")  # fmt: skip
    return picture(figure, alt, title, colours=16)


@styled
def radar(scores, title="", alt=""):
    """Scores from 0 to 1 around a circle, with a table of the numbers below. scores: name -> score,
    or system -> {name -> score}; the names of the first system are the spokes. A score of None was
    not measured: its spoke stays free, and the table says so."""
    several = scores and all(isinstance(value, dict) for value in scores.values())
    systems = scores if several else {"score": scores}
    names = list(next(iter(systems.values())) or ())
    if len(names) < 3 or any(set(values) != set(names) for values in systems.values()):
        raise ValueError("radar needs at least three scores, and the same names for every system.")
    numbers = [value for values in systems.values() for value in values.values()]
    if not all(value is None or 0 <= value <= 1 for value in numbers):
        raise ValueError("radar draws scores between 0 and 1.")
    figure, (axis,) = canvas(4.4, subplot_kw={"projection": "polar"})
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    for i, (system, values) in enumerate(systems.items()):
        ring = [np.nan if values[name] is None else values[name] for name in names]
        look = {"color": LINES[i % len(LINES)], "linewidth": 1.8, "marker": "osD^v"[i % 5],
                "linestyle": DASHES[i % len(DASHES)], "label": printable(system)}  # fmt: skip
        axis.plot([*angles, angles[0]], [*ring, ring[0]], **look)
    axis.set_theta_zero_location("N")
    axis.set_theta_direction(-1)
    axis.set_rlabel_position(180 / len(names))
    axis.set_xticks(angles, [printable(name) for name in names])
    for label, side in zip(axis.get_xticklabels(), np.sin(angles)):
        outward = "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
        label.set_horizontalalignment(outward)
    axis.set_yticks((0.25, 0.5, 0.75, 1), ("25 %", "50 %", "75 %", "100 %"), fontsize=8)
    axis.set_ylim(0, 1)
    if len(systems) > 1:
        figure.legend(loc="outside right upper", fontsize=9)
    rows = [[name, *(_percent(values[name]) for values in systems.values())] for name in names]
    fallback = Table(rows, ["", *systems])
    words = alt or f"radar of {', '.join(names)} for {', '.join(systems)}"
    drawn = picture(figure, words, title, fallback._repr_html_(), colours=24)
    drawn.words = repr(fallback)
    return drawn


def _percent(share):
    return "not measured" if share is None else f"{100 * share:.0f} %"


class Table:
    """A table of rows (lists, or dicts whose keys are the head); aligned text without HTML."""

    def __init__(self, rows, head=None, caption=""):
        rows = list(rows)
        if rows and all(isinstance(row, dict) for row in rows):
            head = head or list(rows[0])
            rows = [[row.get(name, "") for name in head] for row in rows]
        self.rows = [[_cell(value) for value in row] for row in rows]
        self.head, self.caption = [str(name) for name in head or ()], caption
        self.lines = [self.head, *self.rows] if head else self.rows
        if not rows or len(set(map(len, self.lines))) != 1:
            raise ValueError("a table needs rows of the same number of cells, and a head of that "
                             "many if it has one.")
        numbers = [[isinstance(value, (int, float)) for value in row] for row in rows]
        self.right = [all(column) for column in zip(*numbers)]

    def __repr__(self):
        widths = [max(map(len, column)) for column in zip(*self.lines)]
        pads = [str.rjust if right else str.ljust for right in self.right]
        text = ["  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths)).rstrip()
                for line in self.lines]  # fmt: skip
        if self.head:
            text.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*([self.caption] if self.caption else []), *text])

    def _repr_html_(self):
        def row(cells, tag):
            sides = ["right" if right else "left" for right in self.right]
            inside = (f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>'
                      for side, cell in zip(sides, cells))  # fmt: skip
            return f"<tr>{''.join(inside)}</tr>"

        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        head = f"<thead>{row(self.head, 'th')}</thead>" if self.head else ""
        body = "".join(row(cells, "td") for cells in self.rows)
        return f"<table>{caption}{head}<tbody>{body}</tbody></table>"


def _cell(value):
    value = value.item() if isinstance(value, torch.Tensor) else value
    return f"{value:.4g}" if isinstance(value, (float, np.floating)) else str(value)
