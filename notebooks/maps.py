"""What the notebooks say of themselves: README.md's map and TEACH.md's table of exercises; used by build.py."""

import ast
import json
import re

from notebooks.form import tags


def title(nb):
    """Heading of the first cell without its number."""
    return re.sub(r"^#\s*(\d\d\b)?[\s:·.–—-]*", "", nb.cells[0].source.strip().splitlines()[0]).strip()


def paragraph(text):
    """The first paragraph after the last heading, as plain Markdown without its label ("**Exercise 1.**") and links."""
    last = re.split(r"^#+ .*$", text, flags=re.MULTILINE)[-1].strip()
    prose = " ".join(re.split(r"\n\s*\n", last)[0].split())
    prose = re.sub(r"^\*\*[^*]{1,40}[.:]\*\*\s*|^\*\*[^*]{1,40}\*\*[.:]\s*", "", prose)
    prose = re.sub(r"\*\*([^*`]+)\*\*", r"\1", prose)
    return re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", prose)


def sentence(text):
    """The first sentence of that paragraph."""
    return re.split(r"(?<=[.!?])\s+(?=[A-Z`$*(\d])", paragraph(text))[0].strip()


def said(nb, index):
    """What the self-check of the exercise in cell `index` says: messages of check(), else the "not yet" lines."""
    checks, hints = [], []
    for cell in (nb.cells[index], *(c for c in nb.cells[index + 1 : index + 3] if "solution" in tags(c))):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "check":
                checks += [words(arg) for arg in node.args[1:2]]
            elif isinstance(node, ast.Constant | ast.JoinedStr) and "not yet" in words(node):
                hints.append(words(node).split("not yet", 1)[1].lstrip(": "))
    found = [text for text in dict.fromkeys(checks or hints) if text]
    return "; ".join(found)


def words(node):
    """The text of a string in the source; what is computed becomes "…"."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def exercises(nb):
    """(task, what its self-check says) of every cell tagged exercise; the task is the Markdown before it."""
    task, found = "", []
    for index, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown":
            task = re.split(r"\s*\**Hints?:|\s+\*[^*]+\*$", paragraph(cell.source))[0] or task
        elif "exercise" in tags(cell):
            found.append((task, said(nb, index)))
    return found


def between(text, mark, new):
    """`text` with `new` between <!-- mark --> and <!-- /mark -->; None when it has no such place."""
    place = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    return place.sub(lambda found: f"{found[1]}{new}\n{found[2]}", text) if place.search(text) else None


def maps(root, notebooks):
    """[(file, mark, text)]: what is generated from [(path, notebook)] and data/runs/notebooks.json."""
    path = root / "data" / "runs" / "notebooks.json"
    run = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"notebooks": {}}
    rows = ["| notebook | one idea | seconds | hardware |", "|---|---|---|---|"]
    for path, nb in notebooks:
        seconds = run["notebooks"].get(path.stem, {}).get("seconds")
        needs = "a GPU" if re.search(r"[Nn]eeds?\b[^.]* a GPU", nb.cells[0].source) else "2 CPU cores"
        idea, seconds = cellular(sentence(nb.cells[0].source)), "–" if seconds is None else round(seconds)
        rows.append(f"| [{path.stem[:2]} {title(nb)}](notebooks/{path.name}) | {idea} | {seconds} | {needs} |")
    made = sorted({f"{e['date']}, commit {e['commit']}, {e['hardware']}" for e in run["notebooks"].values()})
    if made:
        rows += ["", f"*Seconds in a fresh kernel: {'; '.join(made)}; `python notebooks/build.py build`*"]
    table = ["| notebook | exercise | its self-check says |", "|---|---|---|"]
    for path, nb in notebooks:
        for number, (task, check) in enumerate(exercises(nb), 1):
            table.append(f"| [{path.stem[:2]}.{number}]({path.name}) | {cellular(task)} | {cellular(check)} |")
    return [(root / "README.md", "notebooks", "\n".join(rows)),
            (root / "notebooks" / "TEACH.md", "exercises", "\n".join(table))]


def cellular(text):
    """Fit for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
