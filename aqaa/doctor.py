"""`aqaa doctor`: what this machine has, and what is missing for asking, for training, for judging.

`aqaa doctor FOLDER`: what a folder of weights is good for, from names and headers; weights are not loaded.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys

PACKAGES = ("torch", "torchaudio", "transformers", "soundfile", "safetensors", "numpy", "scipy", "tqdm", "pocketsphinx")
ENGINES = {  # program: what it is for, and the Debian packages that bring it and its voices
    "espeak-ng": ("questions in many voices", "espeak-ng"),
    "flite": ("questions and the answer voice", "flite"),
    "festival": ("questions", "festival festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts"),
}
LICENCES = {"Apache License": "Apache-2.0", "MIT License": "MIT"}  # words of a LICENSE file: its short name
SIGNS = {  # role of a folder: files that tell it
    "tokenizer": ("linguistic_tokenizer.npy", "dengcunqin"),
    "backbone": ("*.safetensors", "*.safetensors.index.json", "tokenizer.model"),
    "vocoder": ("flow.pt", "hift.pt", "cosyvoice.yaml"),
}
FIRST_S3 = "56285ddd4a83e883ee0cb9f8d69c1089b53a94b1f78ff7e4a0224a27eb4cb486"  # CosyVoice-300M-25Hz's own file
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def main(args):
    """Print the report. Returns 0 if `aqaa ask` can work here (or all folders are whole), 1 if not."""
    if args.folders:
        return _folders(args)
    report = {
        "versions": versions(), "devices": devices(), "speech engines": engines(), "weights": weights(args.preset),
    }
    _show(report, args.json)
    if fault := report["weights"].get("fault"):
        print("aqaa:", fault, file=sys.stderr)
    return int(fault is not None)


def _show(report, as_json):
    """Print {title: {name: value}}; a list takes a line for each of its entries."""
    if as_json:
        print(json.dumps(report))
        return
    for title, rows in report.items():
        print(title)
        for name, value in rows.items():
            for line in value if isinstance(value, list) else [value]:
                print(f"  {name:14} {line}")


def _folders(args):
    """Report on the folders named and, together, on whether they make a whole system; an odd one stops no other."""
    lost = [name for name in args.folders if name != "mini" and not os.path.isdir(name)]
    faults = [f"no folder at {name}: name one that holds weights." for name in lost]
    report, sources = {}, {}
    for name in args.folders:
        try:
            for path in () if name in lost else _places(name):
                report[str(path)], found = folder(path)
                faults += report[str(path)]["faults"]
                sources |= found
        except Exception as fault:  # whatever a damaged file raises
            faults.append(f"{name} cannot be read ({' '.join(str(fault).split())}): get the folder again.")
    if sources and not faults:
        faults += _together(sources)
    if report:
        _show(report, args.json)
    for fault in faults:
        print("aqaa:", fault, file=sys.stderr)
    return int(bool(faults))


def _together(sources):
    """Why the parts of several folders make no system; nothing if they do, or if some are not there."""
    from aqaa.config import AQAAConfig
    from aqaa.files import ModelError
    from aqaa.weights import released

    if len(sources) < sum(map(len, released.PARTS.values())):
        return []
    try:
        released.combine(AQAAConfig(), sources)
    except ModelError as fault:
        return [str(fault)]
    return []


def _places(name):
    """A folder, and those in it that hold weights (Step-Audio-TTS-3B brings two vocoders)."""
    from aqaa.weights import model_folder

    path = model_folder.find(name)
    inside = sorted(folder for folder in path.iterdir() if folder.is_dir() and roles(folder))
    return [path, *inside] if not inside or roles(path) else inside


def roles(path):
    """What a folder can stand in for, by the names of its files."""
    return [role for role, signs in SIGNS.items() if any(any(path.glob(sign)) for sign in signs)]


def folder(path):
    """What a folder holds: (rows for the report, {part: released.Source} of what is whole). Loads no weights."""
    from aqaa.files import ModelError, fingerprint
    from aqaa.weights import model_folder, released
    from aqaa.weights.shards import in_bytes

    files, sources, faults = [file for file in path.rglob("*") if file.is_file()], {}, []
    size = f"{in_bytes(sum(file.stat().st_size for file in files))} in {len(files)} files"
    rows = {"roles": roles(path), "size": size, "licence": licence(path)}
    if any((path / f"{part}.safetensors").is_file() for part in model_folder.PARTS):
        rows |= {"roles": ["model"], **weights(path)}
        faults += [rows.pop("fault")] if "fault" in rows else []
    elif not rows["roles"]:
        faults.append(f"{path} holds nothing that aqaa knows: name a released folder, or one like data/mini.")
    else:
        for part, look in [row for role in rows["roles"] for row in released.PARTS[role].items()]:
            try:
                sources[part] = look(path)
                rows[part] = sources[part].facts
                rows |= {"note": sources[part].note} if sources[part].note else {}
            except ModelError as fault:
                rows[part] = "not usable"
                faults.append(str(fault))
    if "semantic" in sources:
        same = fingerprint(path / released.ONNX)["sha256"] == FIRST_S3
        rows["semantic"] += f", {'' if same else 'not '}the file of CosyVoice-300M-25Hz"
    try:
        released.recorded(path, hashes=True)
    except ModelError as fault:
        faults.append(str(fault))
    return rows | {"faults": faults}, sources


def licence(path):
    """What a LICENSE file, or the head of README.md, says; "not stated" if nothing."""
    for file in sorted(path.glob("LICENSE*")):
        text = file.read_text(encoding="utf-8", errors="replace")
        return next((short for words, short in LICENCES.items() if words in text), f"see {file.name}")
    try:
        head = (path / "README.md").read_text(encoding="utf-8", errors="replace").split("---")
    except OSError:
        return "not stated"
    found = re.search(r"^license: *(\S+)", head[1], re.MULTILINE) if len(head) > 2 and not head[0].strip() else None
    return f"{found[1]} (README.md)" if found else "not stated"


def versions():
    """Version of Python and of every package that matters here."""
    found = {"python": platform.python_version()}
    for name in ("aqaa", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices():
    """Processors, and what they can compute in bf16."""
    import torch

    from aqaa.fast import amx
    from aqaa.processor import cpuinfo

    known = cpuinfo("flags").split()
    flags = [flag for flag in CPU_FLAGS if flag in known]
    found = {
        "cpu": f"{cpuinfo('model name') or platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {' '.join(flags) or 'no wide vectors'}"
    }
    try:
        amx.compiled()
        found["amx"] = "ready: --amx uses it"
    except ValueError as fault:
        found["amx"] = f"not usable: {fault}"
    gpus = range(torch.cuda.device_count())
    for index in gpus:
        card = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        found[f"cuda:{index}"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {bf16}"
    if not gpus:
        found["cuda"] = "none"
    return found


def engines():
    """Where each speech engine is, or how to get it; only `aqaa train corpus` and `aqaa bench accuracy` need them."""
    return {
        name: shutil.which(name) or f"missing (for {purpose}): apt-get install {packages}"
        for name, (purpose, packages) in ENGINES.items()
    }


def weights(source):
    """Size and hash of every weight file, or {"fault": one sentence}."""
    from aqaa.files import ModelError
    from aqaa.weights import model_folder

    try:
        folder = model_folder.find(source)
        model_folder.read_config(folder)
        found = {"folder": str(folder)}
        for name, facts in model_folder.inspect(folder).items():
            known = "as recorded" if facts["as_recorded"] else "NOT as recorded"
            found[name] = f"{facts['bytes'] / 1e6:6.1f} MB  sha256 {facts['sha256'][:16]}  {known}"
        return found
    except ModelError as fault:
        return {"fault": str(fault)}
