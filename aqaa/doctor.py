"""`aqaa doctor`: what this machine has, and what it lacks for asking, training and judging.

`aqaa doctor FOLDER`: what a folder of weights is good for, by names and headers alone."""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import tomllib
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from aqaa.files import ModelError, fingerprint
from aqaa.weights.sources import find, roles

KNOWN = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def main(folders=(), preset="mini", as_json=False):
    """Print a report on this machine, or on `folders`, and its faults on stderr. Returns 0 if `aqaa
    ask` can work here (or all folders are whole and fit), else 1."""
    report, faults = _folders(folders) if folders else _machine(preset)
    if as_json and report:
        print(json.dumps(report))
    for title, rows in {} if as_json else report.items():
        print(title)
        for name, value in rows.items():
            for line in value if isinstance(value, list) else [value]:
                print(f"  {name:14} {line}")
    for fault in faults:
        print("aqaa:", fault, file=sys.stderr)
    return int(bool(faults))


def _machine(preset):
    """({title: {name: value}}, faults) of what is here; a list takes a line for each entry."""
    report = {"versions": versions(), "devices": devices(), "speech engines": engines()}
    report["weights"] = weights(preset)
    fault = report["weights"].get("fault")
    return report, [fault] if fault else []


def _folders(names):
    """The same of folders and, if they are whole, of their fit; an odd one stops no other."""
    lost = [name for name in names if name != "mini" and not os.path.isdir(name)]
    faults = [f"no folder at {name}: name one that holds weights." for name in lost]
    report, sources = {}, {}
    for name in names:
        try:
            for path in () if name in lost else _places(name):
                rows, parts = folder(path)
                report[str(path)] = rows
                faults += rows["faults"]
                sources |= parts
        except Exception as fault:  # a damaged file may raise anything
            reason = " ".join(str(fault).split())
            faults.append(f"{name} cannot be read ({reason}): get the folder again.")
    if sources and not faults:
        from aqaa.weights import released

        if len(sources) == sum(map(len, released.PARTS.values())):  # do they make a system?
            with listed(faults):
                released.combine(released.PUBLISHED, sources)
    return report, faults


@contextmanager
def listed(faults):
    """Within it a ModelError becomes an entry of the list `faults`."""
    try:
        yield
    except ModelError as fault:
        faults.append(str(fault))


def _places(name):
    """A folder, and those in it that hold weights (Step-Audio-TTS-3B brings two vocoders)."""
    path = find(name)
    inside = sorted(folder for folder in path.iterdir() if folder.is_dir() and roles(folder))
    return [path, *inside] if not inside or roles(path) else inside


def folder(path):
    """(rows for the report, {part: released.Source} of what is whole) of a folder, by headers."""
    from aqaa.weights import model_folder, released
    from aqaa.weights.shards import in_bytes

    files = [file for file in path.rglob("*") if file.is_file()]
    size = f"{in_bytes(sum(file.stat().st_size for file in files))} in {len(files)} files"
    rows = {"roles": roles(path), "size": size, "licence": licence(path)}
    sources, faults = {}, []
    if any((path / f"{part}.safetensors").is_file() for part in model_folder.PARTS):
        rows |= {"roles": ["model"], **weights(path)}
        faults += [rows.pop("fault")] if "fault" in rows else []
    elif not rows["roles"]:
        remedy = "name a released folder, or one like data/mini"
        faults.append(f"{path} holds nothing that aqaa knows: {remedy}.")
    else:
        for part, look in chain(*(released.PARTS[role].items() for role in rows["roles"])):
            rows[part] = "not usable"
            with listed(faults):
                sources[part] = look(path)
                rows[part] = sources[part].facts
                rows |= {"note": sources[part].note} if sources[part].note else {}
    if "semantic" in sources:
        same = fingerprint(path / released.ONNX)["sha256"] == KNOWN["first_s3"]
        rows["semantic"] += f", {'' if same else 'not '}the file of CosyVoice-300M-25Hz"
    with listed(faults):
        released.recorded(path, hashes=True)
    return rows | {"faults": faults}, sources


def licence(path):
    """What a LICENSE file, or the head of README.md, says; "not stated" if nothing."""
    for file in sorted(path.glob("LICENSE*")):
        text = file.read_text(encoding="utf-8", errors="replace")
        names = (short for words, short in KNOWN["licences"].items() if words in text)
        return next(names, f"see {file.name}")
    try:
        text = (path / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "not stated"
    head = re.match(r"\s*---(.*?)---", text, re.DOTALL)
    match = re.search(r"^license: *(\S+)", head[1], re.MULTILINE) if head else None
    return f"{match[1]} (README.md)" if match else "not stated"


def versions():
    rows = {name: version(name, "not installed") for name in ("aqaa", *KNOWN["packages"])}
    return {"python": platform.python_version(), **rows}


def version(package, missing):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return missing


def devices():
    """Processors, and what they can compute in bf16."""
    import torch

    from aqaa.fast import amx
    from aqaa.processor import cpuinfo

    here = cpuinfo("flags").split()
    flags = [flag for flag in KNOWN["cpu_flags"] if flag in here]
    name = cpuinfo("model name") or platform.processor() or platform.machine()
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    rows = {"cpu": f"{name}, {threads}, {' '.join(flags) or 'no wide vectors'}"}
    try:
        amx.compiled()
        rows["amx"] = "ready: --amx uses it"
    except ValueError as fault:
        rows["amx"] = f"not usable: {fault}"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        rows[f"cuda:{index}"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {bf16}"
    return rows if torch.cuda.device_count() else {**rows, "cuda": "none"}


def engines():
    """Where each speech engine is, or how to get it; making or judging speech needs them."""
    rows = {name: shutil.which(name) or f"missing (for {purpose}): apt-get install {packages}"
            for name, (purpose, packages) in KNOWN["engines"].items()}  # fmt: skip
    for name, (purpose, extra) in KNOWN["natural"].items():
        rows[name] = version(name, f"missing (for {purpose}): pip install 'aqaa[{extra}]'")
    return rows


def weights(source):
    """Size and hash of every weight file, or {"fault": one sentence}."""
    from aqaa.weights import model_folder

    try:
        folder = find(source)
        model_folder.read_config(folder)
        rows = {"folder": str(folder)}
        for name, facts in model_folder.inspect(folder).items():
            known = "as recorded" if facts["as_recorded"] else "NOT as recorded"
            size = f"{facts['bytes'] / 1e6:6.1f} MB"
            rows[name] = f"{size}  sha256 {facts['sha256'][:16]}  {known}"
        return rows
    except ModelError as fault:
        return {"fault": str(fault)}
