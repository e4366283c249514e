"""What to install in place of the pinned versions: `python .ci/versions.py newest|oldest` prints requirements.

newest: every package of pyproject.toml with its extras test and train, without an upper bound; oldest: with its range.
"""

import re
import sys
import tomllib
from pathlib import Path

PAIR = ("torch", "torchaudio")  # no newer torchaudio exists, and another torch does not load it


def requirements(newest):
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["notebooks"], *extras["test"], *extras["train"], "setuptools>=77"]
    for line in wanted:
        name = re.match(r"[\w.-]+", line)[0]
        if name == project["name"]:
            continue
        yield re.sub(r",?<[^,;]+", "", line) if newest and name not in PAIR else line


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1] == "newest")))
