"""The house in order: imports one way, sizes, one list of dependencies, README's commands."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "aqaa").rglob("*.py"))
LAYERS = (  # a module may import from layers above its own line, and within its own package
    {"aqaa", "config", "files", "processor"},
    {"audio", "amx"},
    {"kernels"},
    {"tokenizers", "backbone", "vocoder"},  # never from each other
    {"pipeline", "checkpoints", "listening", "foreign", "shards", "released"},
    {"training", "evaluation", "lineage", "scale", "notebook", "doctor", "bench"},
    {"cli"},
    {"__main__"},
)
BUDGET = {  # lines; what a reader reads to understand the model comes first
    "config audio tokenizers backbone vocoder amx kernels pipeline listening": 4_600,
    "aqaa __main__ cli doctor bench checkpoints files processor released shards foreign": 1_900,
    "training evaluation": 4_300,
    "scale": 3_200,
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
    for node in ast.walk(ast.parse(path.read_text())):
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
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: n for name, n in lengths.items() if n > 400} == {}
    sizes = {part_of(path): 0 for path in FILES}
    for path in FILES:
        sizes[part_of(path)] += lengths[str(path.relative_to(ROOT))]
    for parts, most in BUDGET.items():
        assert sum(sizes.pop(part) for part in parts.split()) < most, parts
    assert not sizes, "these have no budget"


def test_importing_aqaa_is_light():
    code = "import sys, aqaa; print(sorted({'torch', 'numpy', 'transformers', 'tokenizers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_conda_and_pip_install_the_same():
    text = (ROOT / "environment.yml").read_text()
    lines = [line.strip().removeprefix("- ") for line in PIP_SECTION.search(text)[1].splitlines()]
    assert len(lines) == 1, "the pip section installs this package and nothing else"
    found = re.fullmatch(r"--editable \.\[([\w,]+)\]", lines[0])
    assert set(found[1].split(",")) <= set(project()["optional-dependencies"])
    (python,) = re.findall(r"- python=(\S+)", text)
    assert project()["requires-python"] == f">={python}"
    others = re.findall(r"^ +- ([\w=.-]+)$", text, re.MULTILINE)  # channels, then what conda itself installs
    assert others == ["conda-forge", f"python={python}", "pip"]


def test_torch_and_torchaudio_are_one_version():
    pins = dict(re.findall(r"^(torch|torchaudio)==(\S+)$", "\n".join(project()["dependencies"]), re.MULTILINE))
    assert len(set(pins.values())) == 1 and len(pins) == 2


def test_the_version_is_said_once_and_the_citation_agrees():
    import aqaa

    assert project()["dynamic"] == ["version"]
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == aqaa.__version__
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
    assert project()["license"] == "Apache-2.0"


def readme_command(name):
    """The code block after `<!-- command:name -->` in README.md."""
    text = (ROOT / "README.md").read_text()
    return re.search(rf"<!-- command:{name} -->\s*```\w*\n(.*?)\n```", text, re.DOTALL)[1]


def test_ci_runs_what_the_readme_says():
    result = subprocess.run(["bash", ".ci/run", "--list"], cwd=ROOT, capture_output=True, text=True, check=True)
    ask, tests = readme_command("ask"), readme_command("test")
    assert result.stdout.splitlines() == [ask, tests]
    question = re.search(r"aqaa ask (\S+) ", ask)[1]
    assert (ROOT / question).is_file()
    assert ask.startswith("python3 -m venv .venv && ") and ask.endswith("-o answer.wav")
    assert tests.startswith("python3 -m venv .venv && ") and "[test]" in tests and "-m pytest" in tests


def test_the_command_line_knows_the_stages_of_training():
    from aqaa import cli
    from aqaa.training import run

    assert cli.STAGES == (*run.ORDER, "all")


def test_readme_shows_the_recorded_results():
    result = subprocess.run([sys.executable, ".ci/readme.py", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
