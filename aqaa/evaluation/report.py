"""The page of an `aqaa eval` run: one HTML file that a browser opens from disk, without network."""

import html
import math
import os
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid #8886; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; }
article { border-left: 4px solid #2a8f5c; padding: .2rem .8rem; margin: .8rem 0; }
article.wrong { border-color: #c2452d; }
article p { margin: .1rem 0; overflow-wrap: anywhere; }
audio { height: 2rem; width: 100%; max-width: 24rem; }
small { opacity: .75; }
td small { white-space: nowrap; }
svg { max-width: 100%; height: auto; }
"""
HEADS = {"text": "text", "spoken": "sound", "agrees": "agree", "manner": "manner",
         "word_error": "word error", "quality": "quality", "chat": "chat",
         "relevance": "relevance", "factuality": "factuality"}  # fmt: skip
SIZE, RADIUS = 420, 130  # of the radar, in its own units
COLOURS = {"text": "#2166ac", "spoken": "#c2452d"}


def page(title, rows, summary, told, sounds, beside):
    """The whole HTML. rows, summary: of stepeval.py; told: what else its record says; sounds:
    folder of ID.ogg; beside: the folder of the page, from where the players look for them."""
    where = Path(os.path.relpath(sounds, beside)).as_posix()
    groups = {"Wrong in text or in sound": [], "Right in both": [], "Without a rule": []}
    for row, kind in ((row, _kind(row)) for row in rows):
        groups[list(groups)[kind]].append(_answer(row, where))
    parts = [
        f"<h1>{_plain(title)}</h1>",
        f"<p>{len(rows)} answers. In percent, quality and grades from 1 to 5, with intervals of "
        "95 %.</p>", radar(summary), _table(summary, HEADS), _conditions(told),
    ]  # fmt: skip
    for name, answers in groups.items():
        parts += [f"<h2>{name}: {len(answers)}</h2>", *answers] if answers or "W" != name[0] else []
    head = ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">')  # fmt: skip
    return f"{head}<title>{_plain(title)}</title><style>{STYLE}</style></head><body>\n" + (
        "\n".join(parts) + "\n</body></html>\n"
    )


def radar(summary):
    """An SVG: text and sound of each category as two polygons; a category without a score of one
    is left out of it."""
    names = [name for name in summary if name != "all"]
    if len(names) < 3:
        return ""

    def at(place, share):
        angle = 2 * math.pi * place / len(names) - math.pi / 2
        reach = RADIUS * share / 100
        return SIZE / 2 + reach * math.cos(angle), SIZE / 2 + reach * math.sin(angle)

    lines = []
    for share in (25, 50, 75, 100):
        ring = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(i, share) for i in range(len(names))))
        lines.append(f'<polygon points="{ring}" fill="none" stroke="#8886"/>')
    for i, name in enumerate(names):
        x, y = at(i, 122)
        end = "middle" if abs(x - SIZE / 2) < 20 else "start" if x > SIZE / 2 else "end"
        lines.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" fill="currentColor" '
                     f'text-anchor="{end}">{_plain(name)}</text>')  # fmt: skip
    told = []
    for score, colour in COLOURS.items():
        known = [(i, summary[name][score]["share"]) for i, name in enumerate(names)
                 if score in summary[name]]  # fmt: skip
        shape = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(i, share) for i, share in known))
        lines.append(f'<polygon points="{shape}" fill="{colour}" fill-opacity=".15" '
                     f'stroke="{colour}" stroke-width="2"/>')  # fmt: skip
        told.append(f'<tspan fill="{colour}">{HEADS[score]} </tspan>')
    lines.append(f'<text x="10" y="{SIZE - 8}" font-size="13">{"".join(told)}</text>')
    alt = "; ".join(f"{name}: text {summary[name]['text']['share']:g}" for name in names
                    if "text" in summary[name])  # fmt: skip
    # Names of categories stand outside the rings, so the picture is wider than it is high.
    return (f'<svg viewBox="-110 0 {SIZE + 220} {SIZE}" role="img" aria-label="{_plain(alt)}">'
            + "".join(lines) + "</svg>")  # fmt: skip


def _kind(row):
    """0 wrong in something, 1 right in all that a rule can tell, 2 nothing can be told."""
    known = [row[name] for name in ("text", "spoken") if row[name] is not None]
    return 2 if not known else int(all(known))


def _conditions(told):
    """The table of a sweep."""
    if "conditions" not in told:
        return ""
    heads = {"text": "text", "kept_text": "kept", "spoken": "sound", "kept_spoken": "kept"}
    return "<h2>Noise and lines</h2>" + _table(told["conditions"], heads)


def _table(summary, heads):
    heads = {key: heads[key] for key in heads if any(key in one for one in summary.values())}
    names = "".join(f"<th>{head}</th>" for head in heads.values())
    lines = [f"<tr><th></th><th>n</th>{names}</tr>"]
    for name, scores in summary.items():
        n = max((score["n"] for score in scores.values() if isinstance(score, dict)), default=0)
        cells = "".join(f"<td>{_cell(scores.get(head))}</td>" for head in heads)
        lines.append(f"<tr><td>{_plain(name)}</td><td>{n}</td>{cells}</tr>")
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def _cell(score):
    if score is None:
        return "–"
    value, edges = score.get("share", score.get("error", score.get("mean"))), score["interval"]
    return f"{value:g}" + (f"<br><small>{edges[0]:g}–{edges[1]:g}</small>" if edges else "")


def _answer(row, where):
    asked = " … ".join(row["asked"])
    marks = ", ".join(f"{HEADS[name]} {'right' if row[name] else 'wrong'}"
                      for name in ("text", "spoken", "manner") if row.get(name) is not None)
    kind = ' class="wrong"' if _kind(row) == 0 else ""
    place = ", ".join(map(_plain, filter(None, (row["category"], row["id"], row.get("condition")))))
    return (f"<article{kind}><p><b>{_plain(asked)}</b> <small>{place}: {marks or '–'}</small></p>"
            f"<p>written: {_plain(row['written']) or '–'}</p>"
            f"<p>heard: {_plain(row['heard']) or '–'}</p>"
            f"<p>wanted: {_plain(row['expected']) or '–'}</p>"
            f'<audio controls preload="none" src="{_plain(where)}/{_plain(row["id"])}.ogg"></audio>'
            "</article>")  # fmt: skip


def _plain(text):
    return html.escape(str(text), quote=True)
