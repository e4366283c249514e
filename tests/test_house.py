"""The house in order: imports one way, sizes, one list of dependencies, README's commands."""

import ast
import graphlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from notebooks.house import APART, FLOORS, PICTURE, draw, graph, part_of, rooms, texts

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "aqaa").rglob("*.py"))
BUDGET = {  # lines; what a reader reads to understand the model comes first
    # Pictures, turns, hearing again; few-step flow left, and 33 spare lines of seven rooms below.
    "config audio tokenizers backbone vocoder answer hearings listening pipeline": 5_446,
    "voice_activity conversation": 502,  # turns of a live conversation
    "fast": 1_062,
    "sound_files sound_headers": 516,  # whatever files people have
    "aqaa __main__ cli options places doctor records loading weights": 2_440,  # W4A16, ablations, talk, full size, eval
    "files processor": 396,  # the writers of checkpoints and refusals came in from training and weights
    "corpus pitch batching training evaluation": 14_430,  # pictures, turns; few-step flow, prose of a judge left
    "lineage": 1_900,  # the room that was empty: nine systems on one interface; cascade and listener left for it
    "scale": 2_301,  # what training takes, listeners, nodes, prices, W4A16, several machines
    "notebook": 2_187,  # a conversation in a widget: calls, turns, blocks
    "terminal": 141,  # a microphone around a conversation
    "serve": 1_254,  # the interfaces that other software speaks: speech, chat, realtime; pictures in a chat
}
READING = "config audio tokenizers backbone vocoder answer hearings listening pipeline".split()
PIP_SECTION = re.compile(r"^ +- pip:\n((?: {6}.*\n?)+)", re.MULTILINE)


def floor_of(name):
    (floor,) = [i for i, parts in enumerate(FLOORS) if part_of(name) in parts.split()]
    return floor


def misplaced(edges):
    """Imports that lead upwards or between rooms that stand apart, as "a -> b"."""
    return [
        f"{name} -> {other}"
        for name, others in edges.items()
        for other in sorted(others)
        if floor_of(other) > floor_of(name)
        or part_of(other) != part_of(name) and {part_of(name), part_of(other)} <= APART
    ]


def circle(edges):
    """The first circle of imports as a list of modules, or None."""
    try:
        list(graphlib.TopologicalSorter(edges).static_order())
    except graphlib.CycleError as fault:
        return fault.args[1]


def test_imports_lead_downwards_and_no_two_files_import_each_other():
    edges = graph(texts())
    assert misplaced(edges) == []
    assert circle(edges) is None


@pytest.mark.parametrize("name, line, found", [
    ("aqaa.files", "from aqaa.weights import verify", "aqaa.files -> aqaa.weights.verify"),  # upwards
    ("aqaa.tokenizers.text", "import aqaa.backbone.step1", "aqaa.tokenizers.text -> aqaa.backbone.step1"),  # apart
    ("aqaa.backbone.attention", "    from aqaa.backbone.generation import generate", None),  # a circle of two files
    ("aqaa.backbone.attention", "    from aqaa.backbone.step1 import build", None),  # a circle of three
])  # fmt: skip
def test_a_planted_import_is_seen(name, line, found):
    planted = texts()
    planted[name] += f"\ndef planted():\n    {line.strip()}\n" if line.startswith(" ") else f"\n{line}\n"
    edges = graph(planted)
    if found:
        assert found in misplaced(edges)
    else:
        assert misplaced(edges) == [] and name in circle(edges)


def test_the_picture_of_the_house_is_of_today():
    """Rooms and arrows as they are; lines, which move with every commit, within a hundred."""
    def read(svg):
        words = re.search(r"<desc>\n(.*)\n</desc>", svg, re.DOTALL)[1]
        return {room: (int(lines), below) for room, lines, below in re.findall(r"(\w+), (\d+) lines: (.*)", words)}

    drawn, today = read(PICTURE.read_text(encoding="utf-8")), read(draw(rooms(texts())))
    renew = "stale: run `python -m notebooks.house`"
    assert {room: below for room, (_, below) in drawn.items()} == {room: b for room, (_, b) in today.items()}, renew
    assert all(abs(drawn[room][0] - lines) <= 100 for room, (lines, _) in today.items()), renew
    assert PICTURE.stat().st_size < 60_000


def test_every_module_has_its_place():
    for name in texts():
        assert name == "aqaa" or floor_of(name) >= 0


def test_no_file_is_long_and_the_package_is_small():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
    sizes = dict.fromkeys((part_of(name) for name in texts()), 0)
    for name, text in texts().items():
        sizes[part_of(name)] += len(text.splitlines())
    for parts, most in BUDGET.items():
        assert sum(sizes.pop(part) for part in parts.split()) < most, parts
    assert not sizes, "these have no budget"


def functions(text):
    """(name, lines) of every function of a text."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.end_lineno - node.lineno + 1


def test_no_function_that_a_student_reads_is_long():
    long = [
        f"{module}.{name}: {lines} lines"
        for module, text in texts().items()
        if part_of(module) in READING or module == "aqaa.training.objectives"
        for name, lines in functions(text)
        if lines > 60
    ]
    assert long == []


@pytest.mark.parametrize("pattern, homes", [
    (r"class \w*DecoderLayer\b", {"aqaa.backbone.layers"}),  # one decoder layer
    (r"class Step1\w*Attention\b", {"aqaa.backbone.layers"}),  # one attention forward; its kernels stand in fast
    (r"^def draw\(rows|\bcumsum\(-1\) - |torch\.multinomial", {"aqaa.backbone.generation"}),  # one draw loop
    (r'"human"', {"aqaa.tokenizers.dialogue"}),  # one chat template
    (r"os\.(replace|rename)\(", {"aqaa.files"}),  # one atomic writer
])  # fmt: skip
def test_what_there_is_one_of(pattern, homes):
    found = {module for module, text in texts().items() if re.search(pattern, text, re.MULTILINE)}
    assert found == homes


def test_no_file_of_the_model_imports_its_faster_twins():
    below = FLOORS[: floor_of("aqaa.fast")]
    for module, others in graph(texts()).items():
        if any(part_of(module) in floor.split() for floor in below):
            assert "fast" not in map(part_of, others), module


def names_no_encoding(call):
    """Whether a call opens text in whatever encoding the machine prefers (cp1252 on many)."""
    method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if method else getattr(call.func, "id", "")
    owner = getattr(call.func.value, "id", "") if method else ""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given or None in given:
        return False
    if name in ("read_text", "write_text"):
        return method and owner != "model_folder"
    places = {"open": 0 if method and owner not in ("io", "os") else 1, "fdopen": 1}
    if name not in places and not name.endswith("TemporaryFile") or owner == "Image":
        return False
    mode = given.get("mode", next(iter(call.args[places.get(name, 0):]), None))
    mode = getattr(mode, "value", "b") if mode else "w+b" if name.endswith("TemporaryFile") else "r"
    return "b" not in str(mode) and owner != "os"


@pytest.mark.parametrize("text, lacks", [
    ("open(path)", True), ("open(path, 'a')", True), ("open(path, mode='w')", True), ("path.open()", True),
    ("path.read_text()", True), ("Path(a).write_text(b, errors='replace')", True), ("io.open(path)", True),
    ("tempfile.NamedTemporaryFile('w')", True),
    ("open(path, 'rb')", False), ("path.open('wb')", False), ("open(path, encoding='utf-8')", False),
    ("path.read_text(encoding='utf-8')", False), ("tempfile.TemporaryFile(dir=a)", False), ("os.open(a, b)", False),
    ("path.read_bytes()", False), ("Image.open(a)", False),
])  # fmt: skip
def test_a_call_that_names_no_encoding_is_seen(text, lacks):
    assert names_no_encoding(ast.parse(text).body[0].value) is lacks


def test_every_text_file_is_opened_with_an_encoding():
    others = [path for folder in ("tests", "notebooks", ".ci") for path in sorted((ROOT / folder).rglob("*.py"))]
    lacking = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES + others
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and names_no_encoding(node)
    ]
    assert lacking == []


def test_importing_aqaa_is_light():
    code = "import sys, aqaa; print(sorted({'torch', 'numpy', 'transformers', 'tokenizers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_conda_and_pip_install_the_same():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    lines = [line.strip().removeprefix("- ") for line in PIP_SECTION.search(text)[1].splitlines()]
    assert lines == ["-r lock/all.txt"], "the pip section installs what is pinned and nothing else"
    (python,) = re.findall(r"- python=(\S+)", text)
    assert project()["requires-python"].split(",")[0] == f">={python}"
    others = re.findall(r"^ +- ([\w=.-]+)$", text, re.MULTILINE)  # channels, then what conda itself installs
    assert others == ["conda-forge", f"python={python}", "pip"]


def wanted(*extras):
    """Requirements of the project with some of its extras, as packaging reads them."""
    optional = project()["optional-dependencies"]
    lines = [*project()["dependencies"], *(line for extra in extras for line in optional[extra])]
    return [Requirement(line) for line in lines if not line.startswith("aqaa[")]


def pins(name):
    """{package: [(version, marker or None, number of hashes)]} of a file of lock/."""
    found = {}
    for entry in re.split(r"\n(?=[a-z0-9])", (ROOT / "lock" / name).read_text(encoding="utf-8"))[1:]:
        pin, *hashes = entry.replace("\\\n", "").split("--hash=sha256:")
        requirement = Requirement(pin)
        (version,) = requirement.specifier
        assert version.operator == "=="
        found.setdefault(requirement.name, []).append((version.version, requirement.marker, len(hashes)))
    return found


@pytest.mark.parametrize("name, extras", [("core.txt", ()), ("all.txt", ("notebooks", "test", "train"))])
def test_what_is_installed_is_pinned_within_the_ranges(name, extras):
    locked = pins(name)
    assert all(hashes for entries in locked.values() for *_, hashes in entries)
    for requirement in wanted(*extras):
        for version, *_ in locked[requirement.name]:
            assert requirement.specifier.contains(version), f"{requirement} and {version}: run lock/make"


def test_asking_and_testing_install_the_same_versions():
    core, everything = pins("core.txt"), pins("all.txt")
    assert {name: [pin[0] for pin in entries] for name, entries in core.items()} == {
        name: [pin[0] for pin in everything[name]] for name in core
    }


def test_every_range_has_two_ends():
    for requirement in wanted("notebooks", "test", "train", "full"):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators in ({"=="}, {">=", "<"}), f"{requirement} is open: say what was tested"


def test_the_newest_versions_lie_beyond_the_upper_bounds_and_the_pair_stays():
    from importlib import util

    spec = util.spec_from_file_location("versions", ROOT / ".ci" / "versions.py")
    versions = util.module_from_spec(spec)
    spec.loader.exec_module(versions)
    newest = {Requirement(line).name: Requirement(line).specifier for line in versions.requirements(newest=True)}
    oldest = {Requirement(line).name: Requirement(line).specifier for line in versions.requirements(newest=False)}
    assert newest["transformers"].contains("99") and not oldest["transformers"].contains("99")
    assert newest["torch"] == oldest["torch"] and not newest["torch"].contains("99")
    assert {requirement.name for requirement in wanted("notebooks", "test", "train")} <= newest.keys() == oldest.keys()


def test_torch_and_torchaudio_are_one_version():
    pair = dict(re.findall(r"^(torch|torchaudio)==(\S+)$", "\n".join(project()["dependencies"]), re.MULTILINE))
    assert len(set(pair.values())) == 1 and len(pair) == 2


def test_the_version_is_said_once_and_the_citation_agrees():
    import aqaa

    assert project()["dynamic"] == ["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == aqaa.__version__
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:200]
    assert project()["license"] == "Apache-2.0"


def readme_command(name):
    """The code block after `<!-- command:name -->` in README.md."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(rf"<!-- command:{name} -->\s*```\w*\n(.*?)\n```", text, re.DOTALL)[1]


def test_ci_runs_what_the_readme_says():
    result = subprocess.run(["bash", ".ci/run", "--list"], cwd=ROOT, capture_output=True, text=True, check=True)
    ask, tests = readme_command("ask"), readme_command("test")
    assert result.stdout.splitlines() == [ask, tests]
    question = re.search(r"aqaa ask (\S+) ", ask)[1]
    assert (ROOT / question).is_file()
    assert ask.startswith("python3 -m venv .venv && ") and ask.endswith("-o answer.wav")
    assert tests.startswith("python3 -m venv .venv && ") and "lock/all.txt" in tests and "-m pytest" in tests


def test_ci_takes_its_options_and_no_others(tmp_path):
    """Without git or python3 on the PATH it stops behind its arguments, which it has read by then."""
    (tmp_path / "bash").symlink_to(shutil.which("bash"))
    for tool in ("awk", "dirname", "dpkg", "id", "mktemp", "rm"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or shutil.which("true"))
    for option, code, words in ((None, 127, "git"), ("--newest", 127, "git"), ("--latest", 2, "option --latest")):
        command = ["bash", ".ci/run", *([option] if option else [])]
        env = {"PATH": str(tmp_path)}
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, encoding="utf-8")
        assert result.returncode == code and words in result.stderr, result.stderr


def test_readme_shows_the_recorded_results():
    result = subprocess.run([sys.executable, ".ci/readme.py", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
