"""The house in order: imports one way, sizes, one list of dependencies, README's commands."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "aqaa").rglob("*.py"))
LAYERS = (  # a module may import from layers above its own line, and within its own package
    {"aqaa", "config", "files", "processor", "records", "threads"},
    {"audio", "sound_files", "sound_headers", "amx"},
    {"kernels"},
    {"tokenizers", "backbone", "vocoder"},  # never from each other
    {"pipeline", "checkpoints", "listening", "foreign", "shards", "released", "verify"},
    {"training", "evaluation", "lineage", "scale", "notebook", "doctor", "bench"},
    {"cli", "options"},
    {"__main__"},
)
BUDGET = {  # lines; what a reader reads to understand the model comes first
    "config threads audio tokenizers backbone vocoder amx kernels pipeline listening": 5_020,
    "sound_files sound_headers": 520,  # whatever files people have
    "aqaa __main__ cli options doctor bench records checkpoints released shards foreign": 2_280,
    "files processor verify": 500,  # whole files or none, what this processor has, what is checked before it is used
    "training evaluation": 4_400,
    "scale": 3_450,
    "notebook": 2_000,
}
APART = {"tokenizers", "backbone", "vocoder"}
PIP_SECTION = re.compile(r"^ +- pip:\n((?: {6}.*\n?)+)", re.MULTILINE)


def part_of(path):
    """config, audio, tokenizers, …: the first name below `aqaa`."""
    inside = path.relative_to(ROOT / "aqaa")
    return inside.parts[0] if len(inside.parts) > 1 else "aqaa" if inside.name == "__init__.py" else inside.stem


def layer_of(part):
    return next(i for i, names in enumerate(LAYERS) if part in names)


def imports(path):
    """Dotted names below `aqaa` that a file imports, also inside functions."""
    package = ["aqaa", *path.relative_to(ROOT / "aqaa").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "aqaa":
                yield name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    mine = part_of(path)
    for name in imports(path):
        other = (name.split(".") + ["aqaa"])[1]
        if not any(other in names for names in LAYERS):
            other = "aqaa"  # a name such as aqaa.__version__
        if other == mine or mine == "aqaa":
            continue
        assert layer_of(other) <= layer_of(mine), f"{mine} imports {name}"
        assert not {mine, other} <= APART, f"{mine} imports {name}"


def test_every_module_has_its_place():
    for path in FILES:
        layer_of(part_of(path))


def test_no_file_is_long_and_the_package_is_small():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
    sizes = {part_of(path): 0 for path in FILES}
    for path in FILES:
        sizes[part_of(path)] += lengths[str(path.relative_to(ROOT))]
    for parts, most in BUDGET.items():
        assert sum(sizes.pop(part) for part in parts.split()) < most, parts
    assert not sizes, "these have no budget"


def names_no_encoding(call):
    """Whether a call opens text in whatever encoding the machine prefers (cp1252 on many)."""
    method = isinstance(call.func, ast.Attribute)
    name = call.func.attr if method else getattr(call.func, "id", "")
    owner = getattr(call.func.value, "id", "") if method else ""
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in given or None in given:
        return False
    if name in ("read_text", "write_text"):
        return method and owner != "checkpoints"
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


def test_the_command_line_knows_the_stages_of_training():
    from aqaa import cli
    from aqaa.training import run

    assert cli.STAGES == (*run.ORDER, "all")


def test_readme_shows_the_recorded_results():
    result = subprocess.run([sys.executable, ".ci/readme.py", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
