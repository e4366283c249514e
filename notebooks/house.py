"""The house: which room of aqaa/ imports which. `python -m notebooks.house` draws house.svg."""

import ast
from pathlib import Path

ROOT, PICTURE = Path(__file__).resolve().parent.parent, Path(__file__).with_suffix(".svg")
FLOORS = (  # bottom to top; a file imports from below, and from its own floor without a circle
    "config files processor pitch",
    "sound_headers sound_files audio records",
    "tokenizers backbone vocoder",  # these three never from each other
    "fast",
    "answer hearings listening pipeline voice_activity conversation",
    "weights loading doctor",
    "corpus",
    "batching lineage",
    "scale",
    "evaluation",
    "training",
    "notebook terminal serve",
    "cli options places", "__main__",
)
APART = {"tokenizers", "backbone", "vocoder"}
WIDTH, BOX, ROW, STEP = 800, (108, 34), 54, 42  # pixels
PAINT, SHADES = 'fill="#fff" stroke="#333"', ("#f4f4f0", "#e8eef4")  # of boxes, of floors


def texts():
    """{module: its text} of the package."""
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"):
            path.read_text(encoding="utf-8") for path in sorted((ROOT / "aqaa").rglob("*.py"))}


def part_of(name):
    """config, audio, tokenizers, …: the first name below `aqaa`, or `aqaa` itself."""
    return (name.split(".") + ["aqaa"])[1] if "." in name else name


def imported(text, modules):
    """Names of those `modules` that a text imports, also inside its functions."""
    for node in ast.walk(ast.parse(text)):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            assert not getattr(node, "level", 0), "imports are absolute"
            module = getattr(node, "module", alias.name)
            yield from [name for name in (f"{module}.{alias.name}", module) if name in modules][:1]


def graph(texts):
    """{module: the modules that it imports} of {module: text}; `aqaa` itself is lazy: left out."""
    return {
        name: set(imported(text, texts)) - {"aqaa", name}
        for name, text in texts.items()
        if name != "aqaa"
    }


def rooms(texts):
    """{room: (its lines in hundreds, sorted rooms that it imports)}, bottom to top."""
    names = [room for floor in FLOORS for room in floor.split()]
    lines, below = dict.fromkeys(names, 0), {room: set() for room in names}
    for name, others in graph(texts).items():
        lines[part_of(name)] += len(texts[name].splitlines())
        below[part_of(name)] |= set(map(part_of, others)) - {part_of(name)}
    return {room: (round(lines[room], -2), sorted(below[room])) for room in lines}


def draw(house):
    """The house as SVG. An arrow leads to an imported room where no chain of other arrows does."""
    def reach(room):
        return set(house[room][1]).union(*map(reach, house[room][1]))

    places, y, bands, arrows, boxes = {}, 10, [], [], []
    for floor in (line.split() for line in reversed(FLOORS)):
        steps = [len(reach(room) & set(floor)) for room in floor]
        height = ROW + STEP * max(steps)
        colour = SHADES[len(bands) % 2]
        bands.append(f'<rect y="{y}" width="{WIDTH}" height="{height}" fill="{colour}"/>')
        for i, room in enumerate(floor):  # whoever imports a neighbour stands a step above it
            x = WIDTH * (2 * i + 1) // (2 * len(floor))
            if len(floor) == 1:  # lone rooms turn left and right, so that arrows do not pile up
                x += (150, -150)[len(bands) % 2]
            places[room] = x, y + (ROW - BOX[1]) // 2 + STEP * (max(steps) - steps[i])
        y += height
    for room, (lines, below) in house.items():
        (x, top), empty = places[room], "small" if below else "to come"
        size = f"{lines:,} lines" if lines else empty
        boxes += [
            f'<rect x="{x - BOX[0] // 2}" y="{top}" width="{BOX[0]}" height="{BOX[1]}" {PAINT}/>',
            f'<text x="{x}" y="{top + 15}"><tspan font-weight="bold">{room}</tspan>',
            f'<tspan x="{x}" dy="14">{size}</tspan></text>',
        ]
        for other in below:
            if any(other in reach(third) for third in below):
                continue
            to, end = places[other]
            middle = (top + BOX[1] + end) // 2
            path = f"M{x} {top + BOX[1]}C{x} {middle} {to} {middle} {to} {end - 2}l-3-6m3 6l3-6"
            arrows.append(f'<path d="{path}"/>')
    desc = (f"{room}, {lines} lines: {' '.join(below)}" for room, (lines, below) in house.items())
    size = f'viewBox="0 0 {WIDTH} {y + 10}" style="background:#fff"'
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', "<desc>", *desc, "</desc>", *bands,
        '<g fill="none" stroke="#0072B2">', *arrows, "</g>",
        '<g font-family="sans-serif" font-size="12" text-anchor="middle">', *boxes, "</g></svg>\n",
    ])  # fmt: skip


if __name__ == "__main__":
    PICTURE.write_text(draw(rooms(texts())), encoding="utf-8")
