"""`aqaa plan`: from "4xH100-80" and a model's name to Plans, as a table or JSON, and held against recorded runs."""

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

from aqaa.backbone.memory import BITS, resident_bytes  # fmt: skip
from aqaa.config import BackboneConfig, preset
from aqaa.scale.plan import (
    ALL_REDUCE,
    GPUS,
    PREFILL_SHARE,
    SMALL,
    USUAL,
    Setup,
    check_ranks,
    largest_group,
    plan,
    prefill_seconds,
)

COLUMNS = ("GPUs", "weights", "GiB each", "spare", "GB/token", "ms least", "ceiling", "tokens/s", "audio", "with text",
           "first sound", "delay 10 s")  # fmt: skip


# ---- from words -----------------------------------------------------------------------------------------------------


def parse_gpus(text):
    """"4xH100-80" → (Gpu, 4); a bare name is one card. Raises ValueError for unknown or mixed ones."""
    if re.search(r"[+,;]", text):
        raise ValueError(
            f"{text!r} mixes GPUs: shared layers wait for the slowest and fit the smallest, plan as many of that one."
        )
    found = re.fullmatch(r"(?:(\d+)\s*[x×*])?\s*(.+)", text.strip(), re.IGNORECASE)
    names = {_plain(name): name for name in GPUS}
    name = names.get(_plain(found[2])) if found else None
    if name is None or found[1] == "0":
        raise ValueError(f"unknown GPUs {text!r}: write 4xH100-80, with one of {', '.join(GPUS)}.")
    return GPUS[name], int(found[1] or 1)


def _plain(name):
    return re.sub(r"[-_\s]", "", name).lower()


def read_model(source):
    """"130b", "3b", "mini" or a folder with config.json → (name, BackboneConfig, its quantization block or {}).

    Raises ValueError.
    """
    if source in ("130b", "full"):
        return "130b", BackboneConfig(), {}
    if source == "3b":  # Step-Audio-TTS-3B and EditX
        return "3b", BackboneConfig(74_752, 3072, 8192, 32, 48, 4), {}
    if source == "mini":
        return "mini", preset("mini").backbone, {}
    path = Path(source) / "config.json"
    if not path.is_file():
        raise ValueError(f"{source!r} is neither 130b, 3b, mini nor a folder with a config.json.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        inner = data.get("backbone") or data.get("text_config") or data
        backbone = BackboneConfig(**{f.name: inner[f.name] for f in fields(BackboneConfig) if f.name in inner})
        sizes = {f.name for f in fields(BackboneConfig)[:6]}
        missing = sizes - set(inner)
    except (ValueError, TypeError, AttributeError) as fault:
        raise ValueError(f"{path} is not a configuration ({fault}): get the file again.") from None
    if missing:
        raise ValueError(f"{path} does not say {', '.join(sorted(missing))}: it is not of a Step-1 model.")
    return Path(source).resolve().name, backbone, data.get("quantization") or {}


def setups(source, gpus=(), weights=None, group=None, context=2048):
    """Setups of every combination asked for: GPUs (texts; none: the usual ones), formats (None: all, or the folder's).

    int4 takes the largest group that divides, unless `group` is given. Raises ValueError for what cannot be.
    """
    model, backbone, quantization = read_model(source)
    if not 0 < context <= backbone.max_seq_len:
        raise ValueError(f"a context of {context} ids is not possible: the model takes 1 to {backbone.max_seq_len}.")
    formats = [weights] if weights else [quantization["weights"]] if quantization else list(BITS)
    group = group or quantization.get("group")
    usual = USUAL if resident_bytes(backbone, "bf16") > 100e9 else SMALL
    found = []
    for gpu, count in map(parse_gpus, gpus or usual):
        check_ranks(Setup(model, backbone, gpu, count))
        for name in formats:
            size = (group or largest_group(backbone, count)) if name == "int4" else None
            found.append(Setup(model, backbone, gpu, count, name, size, context))
    return found


def what_would_fit(setup):
    """A sentence: the nearest setup that fits in place of one that does not."""
    need = plan(setup)
    problem = (
        f"{setup.model} in {setup.format} with {setup.context} ids needs {need.total:.1f} GiB on each of "
        f"{setup.count}x{setup.gpu.name}, which has {setup.gpu.memory:.1f}"
    )
    for count in (n for n in ALL_REDUCE if n >= setup.count):
        for weights in (w for w in ("bf16", "fp8", "int4") if BITS[w] <= BITS[setup.weights]):
            try:
                group = largest_group(setup.backbone, count) if weights == "int4" else None
                other = Setup(setup.model, setup.backbone, setup.gpu, count, weights, group, setup.context)
                if plan(other).fits:
                    return f"{problem}: {other.format} on {count}x{setup.gpu.name} would fit."
            except ValueError:
                continue
    return f"{problem}: larger GPUs are needed, such as H200."


def ensure_fits(setup):
    """The Plan of a Setup that fits. Raises ValueError, before anything is loaded, for one that does not."""
    found = plan(setup)
    if not found.fits:
        raise ValueError(what_would_fit(setup))
    return found


# ---- recorded runs --------------------------------------------------------------------------------------------------


def check(folder):
    """Hold the model against every recorded run: rows of {file, what, predicted, measured, ratio, possible}.

    A record is a JSON of `folder` that says "what": "scale" and has
      "setup": {"model": "130b", "gpus": "1xH200", "weights": "int4", "group": 128}
      "decode": [{"context": 2048, "tokens_per_s": …}, …]
      "prefill": [{"ids": 517, "seconds": …}, …]            (may be missing)
    ratio is measured / predicted; possible: not faster than the bytes allow. Raises ValueError for a broken record.
    """
    rows = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.get("what") == "scale":
                rows += [{"file": path.name, **row} for row in _compared(record)]
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as fault:
            raise ValueError(f"{path} is not a whole record ({type(fault).__name__} {fault}): run it again.") from None
    return rows


def _compared(record):
    said = record["setup"]
    for point in record["decode"]:
        (setup,) = setups(said["model"], [said["gpus"]], said["weights"], said.get("group"), point["context"])
        found, rate = plan(setup), point["tokens_per_s"]
        yield _row(f"tokens/s at {point['context']}", found.rate, rate, rate <= found.ceiling)
    for point in record.get("prefill", ()):
        (setup,) = setups(said["model"], [said["gpus"]], said["weights"], said.get("group"))
        predicted = prefill_seconds(setup, point["ids"])
        least = predicted * PREFILL_SHARE
        yield _row(f"prefill of {point['ids']}, s", predicted, point["seconds"], point["seconds"] >= least)


def _row(what, predicted, measured, possible):
    ratio = round(measured / predicted, 3)
    return {"what": what, "predicted": predicted, "measured": measured, "ratio": ratio, "possible": possible}


# ---- the command ----------------------------------------------------------------------------------------------------


def main(args):
    """`aqaa plan`; args: model, gpus, weights, group, context, json. Returns 1 if nothing that was asked for fits."""
    plans = [plan(setup) for setup in setups(args.model, args.gpus, args.weights, args.group, args.context)]
    print(json.dumps([found.to_dict() for found in plans]) if args.json else table(plans))
    if any(found.fits for found in plans):
        return 0
    print("aqaa:", what_would_fit(plans[-1].setup), file=sys.stderr)
    return 1


def table(plans):
    """Plans as lines of text."""
    lines = [COLUMNS, *map(_cells, plans)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    out = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    setup = plans[0].setup
    return "\n".join([
        f"{setup.model}, {setup.context} ids of context, one listener; rates are estimates (EFFICIENCY in plan.py).",
        *out,
        "audio: at least 41.7 tokens/s, which speech alone uses; with text: 69.4, while the text lasts.",
        "first sound: s after a question of 3 s. delay: how late an answer of 10 s must start so that it never stalls.",
    ])  # fmt: skip


def _cells(found):
    setup = found.setup
    cells = (f"{setup.count}x{setup.gpu.name}", setup.format, f"{found.total:.1f}", f"{found.spare:.1f}")
    if not found.fits:
        return (*cells, *["-"] * 4, "no", "no", "does not fit", "-")
    rates = (f"{found.streamed:.3g}", f"{1000 * found.floor:.3g}", f"{found.ceiling:.0f}", f"{found.rate:.0f}")
    said = ("yes" if found.steady else "no", "yes" if found.interleave else "no")
    return (*cells, *rates, *said, f"{found.first_sound[3]:.2f}", f"{found.delay[10]:.2f}")
