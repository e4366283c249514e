"""The notebooks run as committed and with other parameters, and keep the house's conventions.

A run of the tests executes every chapter once: as committed, or with another seed and question. Which of the two
changes with every commit, so two commits cover both; AQAA_NOTEBOOKS=both does both at once, `build.py check` compares
them all.
`AQAA_NOTEBOOKS=both pytest tests/test_notebooks.py -k 03` is enough while writing notebook 03.
"""

import ast
import importlib
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import nbformat
import numpy as np
import pytest
from nbformat import v4

from aqaa.corpus import intents
from notebooks import build, form, maps, pages

ROOT = Path(__file__).resolve().parent.parent
PATHS = build.notebooks()
RECORD = ROOT / "data" / "runs" / "notebooks.json"
QUESTIONS = json.loads((ROOT / "data/questions/questions.json").read_text(encoding="utf-8"))
INTENTS = sorted({entry["intent"] for entry in QUESTIONS})
TAGS = {"parameters", "nbval-check-output", "nbval-ignore-output", "nbval-skip", "raises-exception", "exercise",
        "solution", "hide-input", "gpu"}  # fmt: skip
BUDGET = 60  # s on two cores
LARGEST, ALL = 300 * 1024, 3 * 1024 * 1024  # bytes of a notebook, of all
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def turns(paths, commits, both):
    """(chapters to run as committed, chapters to run with other parameters)."""
    odd = {path: (int(path.stem[:2]) + commits) % 2 for path in paths}
    return tuple([path for path in paths if both or odd[path] == turn] for turn in (0, 1))


def commits():
    """How many there are; 0 where this is no clone."""
    found = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return int(found.stdout) if found.returncode == 0 else 0


AS_COMMITTED, OTHERWISE = turns(PATHS, commits(), os.environ.get("AQAA_NOTEBOOKS") == "both")


# --- the fourteen run -----------------------------------------------------------------------------------------


def nbval(path, cwd=ROOT):
    """Run a notebook in a process of its own, so that any choice of tests and any number of workers will do.

    Every cell must run; those tagged nbval-check-output must print what is committed.
    """
    options = "--nbval-lax --nbval-current-env --nbval-cell-timeout=600 -q --tb=short --color=no"
    with tempfile.TemporaryDirectory() as folder, build.environment(folder):
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        return subprocess.run(
            [sys.executable, "-m", "pytest", *options.split(), "-p", "no:cacheprovider", "-p", "no:xdist", str(path)],
            cwd=cwd, env=env, capture_output=True, text=True, timeout=1800,
        )  # fmt: skip


@pytest.mark.parametrize("path", AS_COMMITTED, ids=lambda path: path.stem)
def test_runs_and_repeats_what_is_committed(path):
    result = nbval(path)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]


def other_parameters(nb, number):
    """Another seed, and another question where there is one: over the notebooks, all kinds of questions are asked."""
    parameters = {"seed": 7}
    first = form.code_cells(nb)[0]
    mine = assigned(first).get("question_name")
    if mine:
        asked = set(INTENTS)
        if "any intent of the curriculum" in first.source:  # of its facts: no game, nothing unknown
            asked &= set(intents.INTENTS)
        others = sorted(asked - {mine})
        parameters["question_name"] = others[5 * number % len(others)]
    return parameters


@pytest.mark.parametrize("path", OTHERWISE, ids=lambda path: path.stem)
def test_runs_with_another_seed_and_question(path):
    nb = build.read(path)
    parameters = other_parameters(nb, int(path.stem[:2]))
    done, _ = build.run(nb, path.stem, parameters)  # a cell that raises or warns is named by the error
    injected = next(cell for cell in done.cells if "injected-parameters" in form.tags(cell))
    assert assigned(injected) == parameters


def assigned(cell):
    """{name: value} of the literals that a cell assigns."""
    nodes = [node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: node.value.value for node in nodes if isinstance(node.value, ast.Constant)}


def imported(path):
    """(module, name) of every import in a notebook's cells, those of other chapters' turns too."""
    for cell in form.code_cells(build.read(path)):
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!")))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom):
                yield from ((node.module, alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((alias.name, None) for alias in node.names)


def missing(pairs):
    """What cannot be imported: each chapter runs in every second commit only, a name that left is seen in each."""
    for module, name in sorted(set(pairs), key=str):
        found = importlib.import_module(module)
        inside = [part.name for part in pkgutil.iter_modules(getattr(found, "__path__", []))]
        if name and not hasattr(found, name) and name not in inside:
            yield f"{module} has no {name}"


def test_what_chapters_import_exists():
    assert not list(missing(pair for path in PATHS for pair in imported(path)))
    assert list(missing([("aqaa.audio", "no_such_name"), ("aqaa", "audio")])) == ["aqaa.audio has no no_such_name"]


def test_every_chapter_has_its_turn():
    assert sorted([*AS_COMMITTED, *OTHERWISE]) == PATHS or AS_COMMITTED == OTHERWISE == PATHS
    (one, two), (later, sooner) = (turns(PATHS, number, False) for number in (6, 7))
    assert one == sooner and two == later and sorted([*one, *two]) == PATHS
    assert turns(PATHS, 6, True) == (PATHS, PATHS)


# --- conventions ----------------------------------------------------------------------------------------------


def conventions(nb, number, root=ROOT):
    """A sentence for every convention that a notebook breaks."""
    yield from head(nb, number)
    yield from skeleton(nb)
    yield from cells(nb)
    yield from tagged(nb)
    yield from answers(nb)
    yield from committed(nb)
    yield from prose(nb, root)


def head(nb, number):
    first, second, third = nb.cells[:3]
    if first.cell_type != "markdown" or not re.match(rf"# {number:02} \S", first.source):
        yield f"cell 1 is not Markdown that begins with `# {number:02} Title`"
    if not maps.sentence(first.source):
        yield "cell 1 promises nothing"
    if not re.search(r"\d\s*(s|seconds?|minutes?)\b", first.source) or "GPU" not in first.source:
        yield "cell 1 does not state the price: seconds on 2 cores, and on a GPU"
    if "](../aqaa/" not in first.source:
        yield "cell 1 links to no module"
    if second.cell_type != "code" or form.tags(second) != ["parameters"]:
        yield "cell 2 is not the one tagged `parameters`"
    else:
        found = assigned(second)
        question = found.pop("question_name", None)
        if list(found.items()) != [("preset", "mini"), ("seed", 0), ("interactive", False)]:
            yield 'cell 2 does not assign preset = "mini", seed = 0, interactive = False'
        if len(ast.parse(second.source).body) != 3 + (question is not None):
            yield "cell 2 holds more than parameters"
        if question not in (None, *INTENTS):
            yield f"question_name = {question!r} is none of data/questions"
        if (question is None) != ("question_name" not in "".join(cell.source for cell in form.code_cells(nb)[1:])):
            yield "question_name is a parameter without a use, or used without being a parameter"
    if third.cell_type != "code" or "show.setup(seed)" not in third.source or "aqaa" not in third.source:
        yield "cell 3 does not import and call show.setup(seed)"


def skeleton(nb):
    text = "\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    names = [section.splitlines()[0].strip() for section in sections]
    if [name for name in names if re.match("Break it|Exercises|Recap", name)] != names[-3:] or len(names) < 3:
        yield f"does not end in the sections Break it, Exercises, Recap: {names}"
    if not 4 <= len(names) - 3 <= 7:
        yield f"{len(names) - 3} sections, not 4 to 7, before Break it"
    for name, section in list(zip(names, sections))[:-3]:
        if "**Before you run" not in section:
            yield f"section {name!r} asks nothing before it runs"
    if not re.search(r"arxiv", sections[-1] if sections else "", re.IGNORECASE):
        yield "the recap has no reference (arXiv id)"
    code = "\n".join(cell.source for cell in form.code_cells(nb))
    if "show.source(" not in code or code.count("show.check(") < 3:
        yield "shows no code of the package, or checks fewer than three things"


def cells(nb):
    code = form.code_cells(nb)
    lengths = [len([line for line in cell.source.splitlines() if line.strip()]) for cell in code]
    if not 12 <= len(code) <= 25:
        yield f"{len(code)} code cells, not 12 to 25"
    for cell, length in zip(code, lengths):
        if length > 12:
            yield f"{length} lines, more than 12, in cell {form.label(cell)}"
    if median(lengths) > 6:
        yield f"the median cell has {median(lengths)} lines, more than 6"
    for cell in code:
        if re.search(r"^\s*[!%]", cell.source, re.MULTILINE):
            yield f"a magic or shell command in cell {form.label(cell)}"


def tagged(nb):
    code = form.code_cells(nb)
    for cell in nb.cells:
        if unknown := set(form.tags(cell)) - TAGS:
            yield f"unknown tags: {', '.join(sorted(unknown))}"
    checked = [cell for cell in code if "nbval-check-output" in form.tags(cell)]
    if not 4 <= len(checked) <= 8:
        yield f"{len(checked)} cells tagged nbval-check-output, not 4 to 8"
    for cell in checked:
        if not form.texts(cell) or "nbval-ignore-output" in form.tags(cell):
            yield f"nothing is compared in cell {form.label(cell)}"
    places = [i for i, cell in enumerate(code) if "exercise" in form.tags(cell)]
    if not 2 <= len(places) <= 4:
        yield f"{len(places)} exercises, not 2 to 4"
    for i in places:
        if i + 1 == len(code) or "solution" not in form.tags(code[i + 1]):
            yield f"no solution follows the exercise in cell {form.label(code[i])}"
    for number, (task, check) in enumerate(maps.exercises(nb), 1):
        if not task or not check:
            yield f"exercise {number} has no task (Markdown before it) or no self-check (show.check, or 'not yet: ')"


def answers(nb):
    """An exercise must check a property: whoever reads its cell, or runs a part of it, must not have the answer."""
    code = form.code_cells(nb)
    for cell, solution in zip(code, code[1:]):
        if "exercise" in form.tags(cell) and "solution" in form.tags(solution):
            for name in blanks(cell):
                told = next((node for node in ast.walk(ast.parse(cell.source)) if compares(node, name)), None)
                if told is not None:
                    yield f"`{ast.unparse(told)}` tells the answer in cell {form.label(cell)}"
                shown = set(re.findall(r"\d[\d_]*", cell.source + "".join(form.texts(cell))))
                if str(solved(solution, name)) in {number.replace("_", "") for number in shown}:
                    yield f"{name} = {solved(solution, name)} can be read in cell {form.label(cell)}"


def blanks(cell):
    """Names of the numbers that a reader is to fill in: what the cell sets to a number at its top level."""
    return [name for name, value in assigned(cell).items() if type(value) in (int, float)]


def compares(node, name):
    """`name == expression`, or `abs(name - expression) < …`, where the expression is the answer."""
    if not isinstance(node, ast.Compare):
        return False
    sides, ends = [node.left, *node.comparators], any(isinstance(op, ast.Eq) for op in node.ops)
    for side in (node.left, *getattr(node.left, "args", [])):
        if isinstance(side, ast.BinOp) and isinstance(side.op, ast.Sub):
            sides, ends = [side.left, side.right], True
    bare = [isinstance(side, ast.Name) and side.id == name for side in sides]
    free = [all(getattr(part, "id", "") != name for part in ast.walk(side)) for side in sides]
    return ends and any(bare) and any(free)


def solved(cell, name):
    """The number that a solution assigns to `name` where it can be worked out without the notebook, else None."""
    for node in ast.parse(cell.source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            try:
                value = eval(ast.unparse(node.value), {"np": np, "math": math})
            except NameError:
                return None
            return value if value > 9 else None  # a digit may stand anywhere
    return None


def committed(nb):
    if form.normalise(nb) != nb:
        yield "is not in the form that build.py writes"
    code = form.code_cells(nb)
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        yield "was not run from top to bottom"
    yield from form.faults(nb)
    for cell in code:
        calls = [ast.unparse(node.value.func) for node in ast.parse(cell.source).body
                 if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]  # fmt: skip
        if not cell.outputs and any(re.match(r"print$|show\.(?!setup)", call) for call in calls):
            yield f"the output is missing in cell {form.label(cell)}"
        for out in cell.outputs:
            yield from markup(out.get("data", {}).get("text/html", ""), form.label(cell))


def markup(text, where):
    """What must not be in HTML that a cell shows."""
    text = form.EMBEDDED.sub("data:", text)
    for tag in re.findall(r"<(?:img|audio)\b[^>]*>", text):
        if not re.search(r"""\b(alt|aria-label)\s*=\s*["'][^"']*\w""", tag) or "autoplay" in tag:
            yield f"an image without alt text, or a sound without label or with autoplay, in cell {where}"
    if found := pages.REMOTE.search(text):
        yield f"{found[0]}… comes from the network in cell {where}"


def prose(nb, root):
    for cell in nb.cells:
        if found := form.place(cell.source):
            yield f"the absolute path {found} in the source of {cell.id}"
        if cell.cell_type == "markdown":
            for url in re.findall(r"\]\(([^)\s]+)\)", cell.source):
                if not re.match(r"[a-z]+:|#", url) and not (root / "notebooks" / url.partition("#")[0]).exists():
                    yield f"the link {url} leads nowhere"
            if re.search(r"!\[\s*\]\(", cell.source):
                yield f"an image without alt text in {cell.id}"


@each
def test_keeps_the_conventions(path):
    found = list(conventions(build.read(path), int(path.stem[:2])))
    if path.stat().st_size > LARGEST:
        found.append(f"{path.stat().st_size / 1024:.0f} KB, more than {LARGEST / 1024:.0f}")
    entry = json.loads(RECORD.read_text(encoding="utf-8"))["notebooks"].get(path.stem, {}) if RECORD.exists() else {}
    if not entry.get("seconds", BUDGET + 1) <= BUDGET:
        found.append(f"took {entry.get('seconds', 'nobody knows how many')} s when it was built, more than {BUDGET}")
    stated = re.search(r"(\d+) s(?:econds)? on (?:2|two)", build.read(path).cells[0].source)
    if stated and entry.get("seconds", 0) > 2 * int(stated[1]):
        found.append(f"states {stated[1]} s as its price and took {entry['seconds']} s")
    assert not found, "\n".join([path.stem, *found])


def test_there_are_fourteen_and_together_they_are_small():
    assert [int(path.stem[:2]) for path in PATHS] == list(range(14))
    assert sum(path.stat().st_size for path in PATHS) <= ALL
    seconds = [entry["seconds"] for entry in json.loads(RECORD.read_text(encoding="utf-8"))["notebooks"].values()]
    assert sum(seconds) < 12 * 60


def test_the_maps_are_up_to_date():
    for path, mark, text in maps.maps(ROOT, [(path, build.read(path)) for path in PATHS]):
        old = path.read_text(encoding="utf-8")
        assert maps.between(old, mark, text) == old, f"{path.name}: run `python notebooks/build.py teach`"


def test_a_reader_sees_no_red_box():
    """No chapter shows a warning or a traceback, in whatever kind of output it came."""
    for path in PATHS:
        for cell in form.code_cells(build.read(path)):
            kinds = {out.output_type if out.output_type == "error" else out.get("name") for out in cell.outputs}
            assert not kinds & {"error", "stderr"}, f"{path.stem}: {form.label(cell)}"
            for line in form.texts(cell, ("text/plain", "text/html")):
                assert not re.search(r"\b\w*Warning:|Traceback \(most", line), f"{path.stem}: {line}"


def test_a_reader_can_tell_all_curves_apart():
    for path in PATHS:
        for cell in form.code_cells(build.read(path)):
            for line in form.texts(cell):
                assert "lie on one another" not in line, f"{path.stem}: {line}"


def test_every_committed_notebook_is_valid():
    for path in PATHS:
        nbformat.validate(json.loads(path.read_text(encoding="utf-8")))


# --- the lint itself ------------------------------------------------------------------------------------------


def ran(source, printed="", *named):
    """A code cell as it looks after a run."""
    shown = [v4.new_output("stream", name="stdout", text=printed)] if printed else []
    return v4.new_code_cell(source, metadata={"tags": list(named)}, execution_count=1, outputs=shown)


def proper():
    """A notebook that keeps every convention."""
    prices = "**Needs** nothing. 9 s on 2 cores, 3 s on a GPU. Code: [audio](../aqaa/audio.py)"
    made = [v4.new_markdown_cell(f"# 01 Sound\n\nHear a tone, then see it. More.\n\n{prices}"),
            ran('preset = "mini"  # or "full"\nseed = 0\ninteractive = False', "", "parameters"),
            ran("import aqaa\nfrom aqaa.notebook import show\n\nshow.setup(seed)")]  # fmt: skip
    for name in ("One", "Two", "Three", "Four"):
        made += [v4.new_markdown_cell(f"## {name}\n\n**Before you run:** how many?"),
                 ran(f"show.source(aqaa.{name})", "source\n"),
                 ran('show.check(1 < 2, "one is less")', "ok: one is less\n", "nbval-check-output")]  # fmt: skip
    made += [v4.new_markdown_cell("## Break it"), ran("print(1)", "1\n"), v4.new_markdown_cell("## Exercises")]
    task = "Done.\n\n### Now\n\n**Exercise 1.** Square `n ** 2`, **twice**.\nThe [code](../aqaa/audio.py). Hint: two."
    for _ in range(2):
        made += [v4.new_markdown_cell(task),
                 ran('n = 2\nprint("not yet: n is two" if n < 4 else "ok")', "not yet: n is two\n", "exercise"),
                 ran('show.check(4 == 4, f"n is {4}")', "ok: n is 4\n", "solution")]  # fmt: skip
    made.append(v4.new_markdown_cell("## Recap\n\narXiv:2506.08967, section 2"))
    return form.normalise(v4.new_notebook(cells=made))


def test_the_lint_accepts_a_proper_notebook():
    nb = proper()
    assert list(conventions(nb, 1)) == []
    assert maps.title(nb) == "Sound" and maps.sentence(nb.cells[0].source) == "Hear a tone, then see it."
    assert maps.exercises(nb) == [("Square `n ** 2`, twice. The code.", "n is …")] * 2


def put(index, **changes):
    return lambda nb: nb.cells[index].update(changes)


@pytest.mark.parametrize("change, sentence", [
    (put(0, source="# Sound"), "begins with `# 01 Title`"),
    (put(0, source="# 01 Sound\n\nHear."), "does not state the price"),
    (put(1, metadata={}), "cell 2 is not the one tagged"),
    (put(1, source='preset = "mini"\nseed = 1\ninteractive = False'), "cell 2 does not assign"),
    (put(1, source='preset = "mini"\nseed = 0\ninteractive = False\nprint(seed)'), "holds more than parameters"),
    (put(1, source='preset = "mini"\nseed = 0\ninteractive = False\nquestion_name = "x"'), "none of data/questions"),
    (put(2, source="import aqaa"), "show.setup(seed)"),
    (put(3, source="## One"), "asks nothing"),
    (put(3, source="**Before you run:** ?"), "3 sections, not 4 to 7"),
    (put(3, source="## One **Before you run** [a](../aqaa/nothing.py)"), "leads nowhere"),
    (put(3, source="## One **Before you run** `/home/me/x.wav`"), "absolute path /home/me"),
    (put(4, source="x = 1\n" * 13), "13 lines, more than 12"),
    (put(4, source="!pip install x"), "magic or shell command"),
    (put(4, outputs=[]), "output is missing"),
    (put(4, execution_count=7), "not run from top to bottom"),
    (put(4, metadata={"tags": ["slow"]}), "unknown tags: slow"),
    (put(4, metadata={"collapsed": True}), "not in the form that build.py writes"),
    (put(5, outputs=[]), "nothing is compared"),
    (put(4, outputs=[v4.new_output("stream", name="stderr", text="a Warning: b")]), "writes to stderr: a Warning: b"),
    (put(4, outputs=[v4.new_output("stream", name="stdout", text="<x at 0x7f0011223344>")]), "shows 0x7f0011223344"),
    (put(4, outputs=[v4.new_output("stream", name="stdout", text="in /usr/lib/x.py")]), "shows /usr/lib"),
    (put(4, outputs=[v4.new_output("error", ename="ValueError", evalue="no")]), "ValueError: no"),
    (put(4, outputs=[v4.new_output("display_data", data={"text/html": "<img src='data:x'>"})]), "without alt text"),
    (put(4, outputs=[v4.new_output("display_data", data={"text/html": "<script src='https://a.b/c.js'>"})]), "network"),
    (put(15, source="## Mend it"), "does not end in the sections"),
    (put(-1, source="## Recap"), "no reference"),
    (put(19, metadata={}), "1 exercises, not 2 to 4"),
    (put(20, metadata={}), "no solution follows"),
    (put(19, source='n = 2\nprint("ok" if n == len(range(44)) else "not yet: n")'), "`n == len(range(44))` tells"),
    (put(19, source='n = 2\nk = 3 * 44\nprint("ok" if n == k else "not yet: n")'), "`n == k` tells the answer"),
    (put(19, source='n = 2\nprint("ok" if abs(n - 7 * 11) < 1 else "not yet: n")'), "tells the answer"),
    (put(20, source='n = 5 * 5\nshow.check(n == 25, "n")'), None),
    (lambda nb: (put(19, source='n = 2\nprint("ok" if n * n > 624 else "not yet: 25 is right")')(nb),
                 put(20, source='n = 5 * 5\nshow.check(n == 25, "n")')(nb)), "n = 25 can be read"),
    (lambda nb: nb.cells.extend(proper().cells[4:6] * 8), "code cells, not 12 to 25"),
])  # fmt: skip
def test_the_lint_finds(change, sentence):
    nb = proper()
    change(nb)
    if sentence is None:
        assert list(conventions(nb, 1)) == []
    else:
        assert any(sentence in fault for fault in conventions(nb, 1)), list(conventions(nb, 1))
