"""The one form in which a notebook is committed, and what must not be in it. Used by build.py and the tests."""

import os
import re
from copy import deepcopy

HIDDEN = {"solution", "hide-input"}  # tags of cells whose source starts folded
DROPPED = ("application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json")
# Two names at least, so that "a/b" and "</b>" pass; an address in memory is another one in every run.
PLACE = re.compile(r"(?<![\w.:<}\])/\\-])/[A-Za-z][\w.-]*/[\w.-]+|\b[A-Z]:\\\w|\b0x[0-9a-fA-F]{7,}")
EMBEDDED = re.compile(r"data:[\w/+.-]+;base64,[\w+/=]+")


class Failure(Exception):
    """Something that cannot be done, in one sentence."""


def read(path):
    """The notebook at `path`. Raises Failure when it is not one."""
    import nbformat

    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise Failure(f"{path.name} is not a notebook: {str(error).splitlines()[0]}") from None


def write(path, nb):
    """Write all of it or nothing."""
    import nbformat

    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, nbformat.writes(nb) + "\n")


def replace(path, text):
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def tags(cell):
    return cell.metadata.get("tags", [])


def code_cells(nb):
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def label(cell):
    """How a message names a code cell: `[3] x = 1`."""
    return f"[{cell.get('execution_count') or ' '}] {cell.source.strip().splitlines()[0]}"


def normalise(nb):
    """A copy that tells neither who ran it, nor when, nor how long it took: kernel, tags, counts 1..N, ids c00…"""
    from nbformat import v4

    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    new = v4.new_notebook(metadata={"kernelspec": kernel, "language_info": {"name": "python"}})
    make = {"markdown": v4.new_markdown_cell, "raw": v4.new_raw_cell, "code": v4.new_code_cell}
    count = 0
    for cell in (cell for cell in nb.cells if cell.source.strip()):
        metadata = {"tags": list(tags(cell))} if tags(cell) else {}
        same = {"id": f"c{len(new.cells):02}", "source": cell.source.strip("\n")}
        if cell.cell_type == "code":
            if HIDDEN & set(tags(cell)):
                metadata["jupyter"] = {"source_hidden": True}
            ran = cell.get("execution_count") is not None
            count += ran
            same.update(execution_count=count if ran else None, outputs=outputs(cell, count) if ran else [])
        new.cells.append(make[cell.cell_type](metadata=metadata, **same))
    return new


def outputs(cell, count):
    """What a code cell shows: printed text in one piece, no live widgets (their static form stays), short errors."""
    kept = []
    for out in deepcopy(cell.outputs):
        if out.output_type == "stream" and kept and kept[-1].get("name") == out.name:
            kept[-1].text += out.text  # how the kernel cut the text into messages is chance
            continue
        if "data" in out:
            out.data = {kind: value for kind, value in out.data.items() if kind not in DROPPED}
            out.metadata = {}
            if not out.data:
                continue
        if out.output_type == "execute_result":
            out.execution_count = count
        if out.output_type == "error":
            out.traceback = [f"{out.ename}: {out.evalue}"]  # the whole one names files and colours
        kept.append(out)
    return kept


def texts(cell, kinds=("text/plain",)):
    """Lines that a cell printed or returned; figures and sounds by their text."""
    lines = []
    for out in cell.get("outputs", []):
        if out.output_type == "error":
            lines.append(f"{out.ename}: {out.evalue}")
            continue
        shown = [out.text] if "text" in out else [out.data.get(kind, "") for kind in kinds]
        lines += "\n".join(shown).splitlines()
    return lines


def place(text):
    """The first absolute path or address in memory that a text names, else None."""
    found = PLACE.search(EMBEDDED.sub("", text))
    return found[0] if found else None


def faults(nb):
    """A sentence for everything in a notebook that ran which must not be committed."""
    for cell in code_cells(nb):
        for out in cell.outputs:
            if out.output_type == "error" and "raises-exception" not in tags(cell):
                said = (out.evalue.strip() or "no message").splitlines()[-1]
                yield f"cell {label(cell)}: {out.ename}: {said}"
            elif out.get("name") == "stderr":
                lines = out.text.strip().splitlines() or [""]
                line = next((line for line in lines if "Warning" in line), lines[-1])
                yield f"cell {label(cell)}: writes to stderr: {EMBEDDED.sub('', line).strip()}"
        for line in texts(cell, ("text/plain", "text/html")):
            if found := place(line):
                yield f"cell {label(cell)}: shows {found}, which is another one on another computer"


def drift(old, new):
    """A sentence for every cell whose text is not what is committed; images and sounds are not compared."""
    if normalise(old) != old:
        yield "is not in the form that `build` writes"
    for before, after in zip(normalise(old).cells, new.cells):
        was, now = texts(before), texts(after)
        if before.cell_type == "code" and "nbval-ignore-output" not in tags(before) and was != now:
            pairs = zip([*was, *["nothing"] * len(now)], [*now, *["nothing"] * len(was)])
            was, now = next(pair for pair in pairs if pair[0] != pair[1])
            yield f"cell {label(after)}: committed {was!r}, now {now!r}"
