"""`aqaa plan`: from "4xH100-80" and a model's name to Plans, and recorded runs beside them."""

import json
import re
import sys
from contextlib import suppress
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

from aqaa.backbone.memory import BITS, resident_bytes
from aqaa.config import BackboneConfig, preset
from aqaa.scale import plan as sums

MODELS = {  # built in; 3b: Step-Audio-TTS-3B and EditX
    "130b": BackboneConfig, "full": BackboneConfig,
    "3b": lambda: BackboneConfig(74_752, 3072, 8192, 32, 48, 4),
    "mini": lambda: preset("mini").backbone,
}  # fmt: skip
COLUMNS = ("GPUs", "weights", "GiB each", "spare", "GB/token", "ms least", "ceiling", "tokens/s",
           "audio", "with text", "first sound", "delay 10 s")  # fmt: skip


def parse_gpus(text):
    """From "4xH100-80" to (Gpu, 4); a bare name is one card. Raises ValueError."""
    if re.search(r"[+,;]", text):
        raise ValueError(f"{text!r} mixes GPUs: shared layers wait for the slowest and fit the "
                         "smallest, plan as many of that one.")

    def plain(name):
        return re.sub(r"[-_\s]", "", name).lower()

    count, name = re.fullmatch(r"(?:(\d+)\s*[x×*])?\s*(.*)", text.strip(), re.I | re.S).groups()
    gpu = {plain(known): gpu for known, gpu in sums.GPUS.items()}.get(plain(name))
    if gpu is None or count == "0":
        known = ", ".join(sums.GPUS)
        raise ValueError(f"unknown GPUs {text!r}: write 4xH100-80, with one of {known}.")
    return gpu, int(count or 1)


def read_model(source):
    """"130b", "3b", "mini" or a folder → (name, BackboneConfig, its quantization block or {}).

    The folder has a config.json, ours or a published one. Raises ValueError.
    """
    if source in MODELS:
        return source.replace("full", "130b"), MODELS[source](), {}
    path = Path(source) / "config.json"
    if not path.is_file():
        raise ValueError(f"{source!r} is neither 130b, 3b, mini nor a folder with a config.json.")
    names = [field.name for field in fields(BackboneConfig)]
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        sizes = data.get("backbone") or data.get("text_config") or data
        backbone = BackboneConfig(**{name: sizes[name] for name in names if name in sizes})
        missing = set(names[:6]) - set(sizes)
    except (ValueError, TypeError, AttributeError) as fault:
        raise ValueError(f"{path} is not a configuration ({fault}): get the file again.") from None
    if missing := ", ".join(sorted(missing)):
        raise ValueError(f"{path} does not say {missing}: it is not of a Step-1 model.")
    return Path(source).resolve().name, backbone, data.get("quantization") or {}


def setups(source, gpus=(), weights=None, group=None, context=2048):
    """Setups of all GPUs (texts; none: the usual ones) by all formats (None: all, or the folder's).

    group: of int4, by default the largest that divides. Raises ValueError for what cannot be.
    """
    model, backbone, quantization = read_model(source)
    if not 0 < context <= (most := backbone.max_seq_len):
        raise ValueError(f"a context of {context} ids is impossible: the model takes 1 to {most}.")
    formats = [weights] if weights else [quantization["weights"]] if quantization else list(BITS)
    group = group or quantization.get("group")
    usual = sums.USUAL if resident_bytes(backbone, "bf16") > 100e9 else sums.SMALL
    asked = []
    for gpu, count in map(parse_gpus, gpus or usual):
        setup = sums.Setup(model, backbone, gpu, count, context=context)
        sums.check_ranks(setup)
        for name in formats:
            size = (group or sums.largest_group(backbone, count)) if name == "int4" else None
            asked.append(replace(setup, weights=name, group=size))
    return asked


def what_would_fit(setup):
    """A sentence: the nearest setup that fits in place of one that does not."""
    need = sums.plan(setup).total
    problem = (f"{setup.model} in {setup.format} with {setup.context} ids needs {need:.1f} GiB on "
               f"each of {setup.gpus}, which has {setup.gpu.memory:.1f}")  # fmt: skip
    formats = [name for name in ("bf16", "fp8", "int4") if BITS[name] <= BITS[setup.weights]]
    counts = [count for count in sums.ALL_REDUCE if count >= setup.count]
    for count, weights in product(counts, formats):
        with suppress(ValueError):  # so many GPUs cannot share this model
            group = sums.largest_group(setup.backbone, count) if weights == "int4" else None
            other = replace(setup, count=count, weights=weights, group=group)
            if sums.plan(other).fits:
                return f"{problem}: {other.format} on {other.gpus} would fit."
    return f"{problem}: larger GPUs are needed, such as H200."


def check(folder):
    """The model against every recorded run: [{file, what, predicted, measured, ratio, possible}].

    A record is a JSON of `folder` that says "what": "scale" and has
      "setup": {"model": "130b", "gpus": "1xH200", "weights": "int4", "group": 128}
      "decode": [{"context": 2048, "tokens_per_s": …}, …]
      "prefill": [{"ids": 517, "seconds": …}, …]            (may be missing)
    ratio: measured / predicted; possible: the bytes allow it. Raises ValueError for broken records.
    """
    rows, names = [], ("what", "predicted", "measured", "ratio", "possible")
    for path in sorted(Path(folder).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            for what, predicted, measured, possible in _compared(record):
                row = what, predicted, measured, round(measured / predicted, 3), possible
                rows.append({"file": path.name, **dict(zip(names, row, strict=True))})
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as fault:
            raise ValueError(f"{path} is not a whole record ({type(fault).__name__} {fault}): "
                             "run it again.") from None
    return rows


def _compared(record):
    """(what, predicted, measured, possible) of each point of a record; none of other kinds."""
    if record.get("what") != "scale":
        return
    asked = record["setup"]
    options = asked["model"], [asked["gpus"]], asked["weights"], asked.get("group")
    for point in record["decode"]:
        (setup,) = setups(*options, point["context"])
        planned, rate = sums.plan(setup), point["tokens_per_s"]
        yield f"tokens/s at {point['context']}", planned.rate, rate, rate <= planned.ceiling
    for point in record.get("prefill", ()):
        predicted, seconds = sums.prefill_seconds(*setups(*options), point["ids"]), point["seconds"]
        possible = seconds >= predicted * sums.PREFILL_SHARE
        yield f"prefill of {point['ids']}, s", predicted, seconds, possible


def main(args):
    """`aqaa plan`; args: model, gpus, weights, group, context, json. Returns 1 if none fits."""
    asked = setups(args.model, args.gpus, args.weights, args.group, args.context)
    plans = [sums.plan(setup) for setup in asked]
    print(json.dumps([planned.to_dict() for planned in plans]) if args.json else table(plans))
    if any(planned.fits for planned in plans):
        return 0
    print("aqaa:", what_would_fit(asked[-1]), file=sys.stderr)
    return 1


def table(plans):
    """Plans as lines of text."""
    lines = [COLUMNS, *map(_cells, plans)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)
    setup = plans[0].setup
    return f"""\
{setup.model}, {setup.context} ids of context, one listener; rates are estimates \
(EFFICIENCY in plan.py).
{rows}
audio: at least 41.7 tokens/s, which speech alone uses; with text: 69.4, while the text lasts.
first sound: s after a question of 3 s. delay: how late an answer of 10 s must start so that it \
never stalls."""


def _cells(p):
    """A Plan as the cells under COLUMNS."""
    setup = p.setup
    cells = (setup.gpus, setup.format, f"{p.total:.1f}", f"{p.spare:.1f}")
    if not p.fits:
        return (*cells, *["-"] * 4, "no", "no", "does not fit", "-")
    steady, interleave = ("yes" if able else "no" for able in (p.steady, p.interleave))
    return (*cells, f"{p.streamed:.3g}", f"{1000 * p.floor:.3g}", f"{p.ceiling:.0f}",
            f"{p.rate:.0f}", steady, interleave, f"{p.first_sound[3]:.2f}",
            f"{p.delay[10]:.2f}")  # fmt: skip
