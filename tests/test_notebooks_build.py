"""notebooks/build.py on tiny notebooks: build, check, open, close, html, diff, and what it says when it cannot."""

import json
import re
import subprocess

import pytest
from nbformat import v4

from notebooks import build, form

from .test_notebooks import ROOT, nbval, ran

AUDIO = '<audio controls aria-label="a" src="data:audio/mpeg;base64,//uQ"></audio>'
TEXT = f"""# %% [markdown]
# # 00 Tiny
#
# Hear nothing. It costs $\\frac{{1}}{{2}}$ s; see [audio](../aqaa/audio.py) and [this](00_tiny.ipynb).

# %% tags=["parameters"]
n = 2

# %% tags=["nbval-check-output"]
print("n is")
print(n)

# %%
from IPython.display import HTML

HTML('{AUDIO}')

# %% [markdown]
# Make n three.

# %% tags=["exercise"]
print("not yet: n is three" if n < 3 else "ok")

# %% tags=["solution"]
print(3)

# %% tags=["raises-exception"]
1 / 0
"""


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A repository with nothing but one text in build/, README.md and TEACH.md."""
    monkeypatch.setattr(build, "ROOT", tmp_path)
    for name in ("build", "notebooks", "aqaa"):
        (tmp_path / name).mkdir()
    (tmp_path / "aqaa" / "audio.py").write_text("rate = 16_000\n", encoding="utf-8")
    (tmp_path / "build" / "00_tiny.py").write_text(TEXT, encoding="utf-8")
    (tmp_path / "README.md").write_text("a\n<!-- notebooks -->\n<!-- /notebooks -->\nz\n", encoding="utf-8")
    (tmp_path / "notebooks" / "TEACH.md").write_text("<!-- exercises -->\nold\n<!-- /exercises -->\n", encoding="utf-8")
    return tmp_path


def test_close_build_check_and_open(house, capsys):
    path, text, record = house / "notebooks/00_tiny.ipynb", house / "build/00_tiny.py", "data/runs/notebooks.json"
    assert build.main(["close", "0"]) == 0, capsys.readouterr().err  # a new notebook
    first, nb = path.read_bytes(), build.read(path)
    assert re.search(r"00_tiny +\d+\.\d s +\d KB$", capsys.readouterr().out, re.MULTILINE)
    assert [cell.id for cell in nb.cells] == [f"c{i:02}" for i in range(len(nb.cells))]
    assert [form.tags(cell) for cell in form.code_cells(nb)] == [
        ["parameters"], ["nbval-check-output"], [], ["exercise"], ["solution"], ["raises-exception"]]  # fmt: skip
    assert [cell.execution_count for cell in form.code_cells(nb)] == [1, 2, 3, 4, 5, 6]
    assert nb.cells[2].outputs[0].text == "n is\n2\n" and nb.cells[6].metadata.jupyter.source_hidden
    assert nb.cells[7].outputs[0].traceback == ["ZeroDivisionError: division by zero"]
    assert set(nb.metadata) == {"kernelspec", "language_info"}
    entry = json.loads((house / record).read_text(encoding="utf-8"))
    assert {"date", "commit", "hardware", "command"} <= set(entry) and entry["notebooks"]["00_tiny"]["seconds"] > 0
    assert "| [00 Tiny](notebooks/00_tiny.ipynb) | Hear nothing. |" in (house / "README.md").read_text(encoding="utf-8")
    exercises = (house / "notebooks/TEACH.md").read_text(encoding="utf-8")
    assert "| [00.1](00_tiny.ipynb) | Make n three. | n is three |" in exercises

    assert build.main(["build"]) == 0 and path.read_bytes() == first  # byte for byte

    assert build.main(["open", "00"]) == 0
    assert text.read_text(encoding="utf-8").split() == TEXT.split()  # blank lines may differ
    text.write_text(text.read_text(encoding="utf-8") + "\n# %%\nn + 1\n", encoding="utf-8")
    assert build.main(["open", "00"]) == 1 and "has changes" in capsys.readouterr().err
    assert build.main(["close", "00", "--no-run"]) == 0 and build.read(path).cells[-1].source == "n + 1"
    assert build.main(["open", "00", "--force"]) == 0 and "n + 1" in text.read_text(encoding="utf-8")


def prepared(house, *sources):
    """Path of a notebook in the form that build writes: (source, printed, tags…) a cell."""
    path = house / "notebooks" / "01_made.ipynb"
    build.write(path, form.normalise(v4.new_notebook(cells=[ran(*source) for source in sources])))
    return path


def test_drift_is_found_and_named(house, capsys):
    path = prepared(house, ("print(1)", "1\n"), ("print(2)", "3\n", "nbval-check-output"), ("print(4)", "5\n"),
                    ("print(6)", "7\n", "nbval-ignore-output"))  # fmt: skip
    before = path.read_bytes()
    assert build.main(["check", "01"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "01_made: cell [2] print(2): committed '3', now '2'", "01_made: cell [3] print(4): committed '5', now '4'"]
    assert path.read_bytes() == before
    result = nbval(path, house)  # strict where it is asked to be, lax elsewhere
    assert result.returncode == 1 and re.search(r"1 failed, 3 passed", result.stdout), result.stdout


@pytest.mark.parametrize("source, sentence", [
    ("n = 1\n\n1 / 0", "cell [1] n = 1: ZeroDivisionError: division by zero"),
    ("import warnings; warnings.warn('careful')", "writes to stderr: "),
    ("open('left', 'w').close()", "wrote left beside itself"),
])  # fmt: skip
def test_a_notebook_that_fails_is_named_and_left_alone(house, capsys, source, sentence):
    path = prepared(house, (source, "fine\n"))
    before = path.read_bytes()
    assert build.main(["build", "01"]) == 1
    said = capsys.readouterr().err.strip()
    assert said.startswith("01_made: ") and sentence in said and "\n" not in said
    assert path.read_bytes() == before
    assert sorted(other.name for other in path.parent.iterdir()) == ["01_made.ipynb", "TEACH.md"]


def test_bad_requests_get_a_sentence(house, capsys):
    for command, sentence in ((["build", "77"], "no notebook 77 in notebooks/: there are none"),
                              (["close", "03"], "no notebook 03 in build/: there are 00"),
                              (["diff"], "git could not be set up")):  # fmt: skip
        assert build.main(command) == 1
        assert sentence in capsys.readouterr().err
    (house / "notebooks" / "02_bad.ipynb").write_text("{", encoding="utf-8")
    assert build.main(["check", "2"]) == 1 and "02_bad.ipynb is not a notebook" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        build.main(["sing"])
    assert usage.value.code == 2


def test_the_site_plays_without_network_or_javascript(house, capsys):
    sound = v4.new_output("display_data", data={"text/html": AUDIO})
    words = "# 00 Tiny\n\nHear $x \\le \\frac{1}{2}$, $\\nonsense$ in [audio](../aqaa/audio.py).\n\n$$\nx^2\n$$"
    nb = v4.new_notebook(cells=[
        v4.new_markdown_cell(words),
        ran("n = '<b>'", "<b>\n"), ran("secret = 1", "1\n", "solution")])
    nb.cells[1].outputs.append(sound)
    build.write(house / "notebooks" / "00_tiny.ipynb", form.normalise(nb))
    assert build.main(["html", "--out", str(house / "site")]) == 0
    site = house / "site"
    assert {path.stem for path in site.iterdir()} == {"00_tiny", "aqaa_audio.py", "index", "teach"}
    page = (site / "00_tiny.html").read_text(encoding="utf-8")
    assert "<audio" in page and "&lt;b&gt;" in page and "<code>\\nonsense</code>" in page
    assert page.count("<svg") == 2 and 'aria-label="x \\le \\frac{1}{2}"' in page
    assert re.search(r"<details><summary>Solution</summary>.*secret.*</details>", page, re.DOTALL)
    for path in site.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "<script" not in text and not re.search(r"""(src|href)=["']?(https?:)?//""", text)
        for target in re.findall(r'<a href="([^"#]+)"', text):
            assert (site / target).is_file(), f"{path.name} → {target}"
    assert "00 Tiny" in (site / "index.html").read_text(encoding="utf-8")
    sound.data["text/html"] = '<script src="https://cdn.example/x.js"></script>'
    nb.cells[1].outputs[-1] = sound
    build.write(house / "notebooks" / "00_tiny.ipynb", form.normalise(nb))
    assert build.main(["html"]) == 1 and "00_tiny: loads something from the network" in capsys.readouterr().err


def test_git_shows_notebooks_as_text(house, capsys):
    subprocess.run(["git", "init", "-q", str(house)], check=True)
    (house / ".gitattributes").write_bytes((ROOT / ".gitattributes").read_bytes())
    path = prepared(house, ("print(1)", "1\n"))
    subprocess.run(["git", "add", "."], cwd=house, check=True)
    assert build.main(["diff"]) == 0
    prepared(house, ("print(2)", "2\n", "exercise"))
    shown = subprocess.run(["git", "diff", path.name], cwd=path.parent, capture_output=True, text=True, check=True)
    lines = [line for line in shown.stdout.splitlines() if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert lines == ["-# %%", "-print(1)", '+# %% tags=["exercise"]', "+print(2)"], shown
