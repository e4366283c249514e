"""The one entry of every measurement, `aqaa bench NAME`: a new one is an entry here and a file.

A measurement is a module with `measure(...)`, which returns a plain dict. The names of its
arguments say what it needs: a loaded `model`, the `corpus` of evaluation questions, options of the
command line. `table(result)` is what a reader sees of it; without one, a line a value."""

import importlib
import inspect
import json
from pathlib import Path

BENCHES = {  # name: its module in aqaa.evaluation
    "speed": "speed", "accuracy": "accuracy", "synthesis": "synthesis", "codes": "codes",
    "parts": "parts", "quantize": "quantization", "streaming": "streaming", "scale": "gpu_speed",
    "hearing": "hearing", "turns": "conversations", "people": "folder",
    "calibration": "calibration", "pictures": "pictures",
}  # fmt: skip


def main(name, *, preset="mini", device="cpu", out=None, as_json=False, **options):
    """Measure `name`, print its table or JSON, write JSON to the file `out`. Returns 1 for faults.

    options: whatever else it may take. "rows" of a result, its single cases, stand in the file
    only. A measurement that takes `out` writes and prints each number as it is made. Raises
    FileNotFoundError if the folder of `out` is missing."""
    from aqaa.files import write_json
    from aqaa.records import about

    if out and not Path(out).resolve().parent.is_dir():
        raise FileNotFoundError(f"{out} cannot be written, its folder does not exist: make it.")
    bench = importlib.import_module(f"aqaa.evaluation.{BENCHES[name]}")
    wanted = inspect.signature(bench.measure).parameters
    options |= {"preset": preset, "device": device, "out": out, "progress": not as_json}
    if "model" in wanted:
        from aqaa import loading

        options["model"] = loading.load(preset, device=device)
    if "corpus" in wanted:
        from aqaa.evaluation.accuracy import evaluation_corpus

        options["corpus"] = evaluation_corpus(*(options[x] for x in ("corpus", "seed", "workers")))
    given = {key: options[key] for key in wanted if options.get(key) is not None}
    result = bench.measure(**given)
    if "out" not in wanted:
        result = about(name, device if {"model", "device"} & set(wanted) else "cpu") | result
        if out:
            write_json(out, result)
    if as_json:
        print(json.dumps({key: value for key, value in result.items() if key != "rows"}))
    elif "out" not in wanted:
        rows = "\n".join(f"{name:28} {value}" for name, value in result.items())
        print(bench.table(result) if hasattr(bench, "table") else rows)
    return int(bool(result.get("faults")))
