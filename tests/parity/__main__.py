"""Run every fixture under the given folders: `python -m tests.parity [--amx] FOLDER...`.

Adding a kind
    Write `function(path)` that yields `(output_name, max_error, allowed)` and list it in a module's
    `KINDS = {prefix: function}`; modules that are looked into are named in `MODULES` below.
    - A fixture is a `<name>.json`; `path` is that file without its suffix (pathlib.Path), so
      `tests.parity.common.load(path)` finds `<name>.safetensors` beside it. The longest prefix of `<name>` wins.
    - The key "io" is for folders that hold `io.safetensors`; there `path` is the folder, and the other files
      of the folder are not looked at.
    - A line passes when `max_error <= allowed` (NaN fails); integers that must be exact have allowed 0.
      `common.compare(name, got, want, meta)` makes such a tuple from the tolerance that the json states.
    An exception inside a kind becomes one FAIL line and the run goes on.
Prints a line per output, `N passed, M failed` at the end, and exits with 1 on a failure, 2 on wrong usage.
"""

import importlib.util
import sys
from pathlib import Path

import torch

from tests.parity import common

MODULES = ("tests.parity.speech_kinds", "tests.parity.vocoder_kinds", "tests.parity.backbone_kinds")


def kinds():
    """Every registered kind: {prefix: function}. A module that does not exist yet is left out."""
    found = {}
    for name in MODULES:
        if importlib.util.find_spec(name):
            found.update(importlib.import_module(name).KINDS)
    return found


def fixtures(folder):
    """(kind key, path) of every fixture below `folder`, sorted; the key is None where no kind matches."""
    known = kinds()
    backbones = {p.parent for p in folder.rglob("io.safetensors")}
    for home in sorted(backbones):
        yield ("io" if "io" in known else None), home
    for file in sorted(folder.rglob("*.json")):
        if file.parent in backbones:
            continue
        prefixes = [k for k in known if k != "io" and file.stem.startswith(k)]
        if prefixes or file.with_suffix(".safetensors").exists():
            yield max(prefixes, key=len, default=None), file.with_suffix("")


def check(key, path):
    """Lines (output, max_error, allowed, passed) of one fixture; never raises."""
    if key is None:
        yield "no-such-kind", float("nan"), 0.0, False
        return
    try:
        with torch.no_grad():
            for output, error, allowed in kinds()[key](path):
                yield output, float(error), float(allowed), float(error) <= float(allowed)
    except Exception as fault:  # a broken module must not hide the other fixtures
        reason = " ".join(f"{type(fault).__name__}: {fault}".split())
        yield f"[{reason[:200]}]", float("nan"), 0.0, False


def main(folders):
    """Check all folders; the exit status."""
    common.AMX = "--amx" in folders
    folders = [f for f in folders if f != "--amx"]
    missing = [f for f in folders if not Path(f).is_dir()]
    if not folders or missing:
        usage = "usage: python -m tests.parity [--amx] FOLDER..."
        print(f"no such folder: {missing[0]}" if missing else usage, file=sys.stderr)
        return 2
    passed = failed = 0
    for folder in folders:
        for key, path in fixtures(Path(folder)):
            for output, error, allowed, good in check(key, path):
                print(f"{path.name} {output} {error:.3g} {allowed:.3g} {'PASS' if good else 'FAIL'}", flush=True)
                passed, failed = passed + good, failed + (not good)
    print(f"{passed} passed, {failed} failed")
    return int(failed > 0 or passed == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
