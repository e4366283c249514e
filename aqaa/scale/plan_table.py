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
from aqaa.files import data_folder
from aqaa.scale import plan as sums
from aqaa.scale import plan_train as train
from aqaa.weights.packing import quantization_of

MODELS = {  # built in; 3b: Step-Audio-TTS-3B and EditX
    "130b": BackboneConfig, "full": BackboneConfig,
    "3b": lambda: BackboneConfig(74_752, 3072, 8192, 32, 48, 4),
    "mini": lambda: preset("mini").backbone,
}  # fmt: skip
COLUMNS = ("GPUs", "weights", "GiB each", "spare", "GB/token", "ms: bytes", "instr.", "ceiling",
           "tokens/s", "audio", "with text", "first sound", "delay 10 s")  # fmt: skip
VERDICT = {True: "yes", False: "no", None: "open"}  # open: the ceiling allows it, no run says so


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
    """"130b", "3b", "mini" or a folder → (name, BackboneConfig, its quantization block or {}). The
    folder has a config.json, ours or a published one. Raises ValueError."""
    if source in MODELS:
        return source.replace("full", "130b"), MODELS[source](), {}
    path = Path(source) / "config.json"
    if not path.is_file():
        raise ValueError(f"{source!r} is neither 130b, 3b, mini nor a folder with a config.json.")
    names, quantization = [field.name for field in fields(BackboneConfig)], {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        sizes = data.get("backbone") or data.get("text_config") or data
        backbone = BackboneConfig(**{name: sizes[name] for name in names if name in sizes})
        missing = ", ".join(sorted(set(names[:6]) - set(sizes)))
        with suppress(ValueError):  # packed otherwise: whatever the format, it can be planned
            quantization = quantization_of(data)
    except (ValueError, TypeError, AttributeError) as fault:
        raise ValueError(f"{path} is not a configuration ({fault}): get the file again.") from None
    if missing:
        raise ValueError(f"{path} does not say {missing}: it is not of a Step-1 model.")
    return Path(source).resolve().name, backbone, quantization


def setups(source, gpus=(), weights=None, group=None, context=2048, **others):
    """Setups of all GPUs (texts; none: the usual ones) by all formats (None: all, or the folder's).
    group: of int4, by default the largest; others: of a Setup. Raises ValueError."""
    model, backbone, quantization = read_model(source)
    if not 0 < context <= (most := backbone.max_seq_len):
        raise ValueError(f"a context of {context} ids is impossible: the model takes 1 to {most}.")
    formats = [weights] if weights else [quantization["weights"]] if quantization else list(BITS)
    group = group or quantization.get("group")
    usual = sums.USUAL if resident_bytes(backbone, "bf16") > 100e9 else sums.SMALL
    asked = []
    for gpu, count in map(parse_gpus, gpus or usual):
        setup = sums.Setup(model, backbone, gpu, count, context=context, **others)
        sums.check_ranks(setup)
        for name in formats:
            size = (group or sums.largest_group(backbone, count)) if name == "int4" else None
            asked.append(replace(setup, weights=name, group=size))
    return asked


def what_would_fit(setup):
    """A sentence: the nearest setup that fits in place of one that does not."""
    need = sums.plan(setup).total
    ids = f"{setup.context} ids"
    ids += f" for each of {setup.listeners} listeners" if setup.listeners > 1 else ""
    problem = (f"{setup.model} in {setup.format} with {ids} needs {need:.1f} GiB on "
               f"each of {setup.gpus}, which has {setup.gpu.memory:.1f}")  # fmt: skip
    formats = [name for name in ("bf16", "fp8", "int4") if BITS[name] <= BITS[setup.weights]]
    counts = [count for count in sums.RANKS if count >= setup.count]
    for count, weights in product(counts, formats):
        with suppress(ValueError):  # so many GPUs cannot share this model
            group = sums.largest_group(setup.backbone, count) if weights == "int4" else None
            other = replace(setup, count=count, weights=weights, group=group)
            if sums.plan(other).fits:
                return f"{problem}: {other.format} on {other.gpus} would fit."
    return f"{problem}: larger GPUs are needed, such as H200."


def check(folder):
    """Every recorded run against its limits: [{file, what, limit, measured, share, possible}].

    A record is a JSON of `folder` that says "what": "scale" and has
      "setup": {"model": "130b", "gpus": "1xH200", "weights": "int4", "group": 128}
      "decode": [{"context": 2048, "tokens_per_s": …}, …]
      "fp8": {"decode": […]}, "prefill": [{"ids": 517, "seconds": …}, …]     (may be missing)
    share: of the limit that was reached; possible: no more than all. ValueError: broken records."""
    rows = []
    for name, record in records(folder):
        for setup, rate in _rates(record):
            what, limit = f"{setup.weights} tokens/s at {setup.context}", sums.plan(setup).ceiling
            rows.append((name, what, limit, rate, rate / limit))
        for setup, ids, seconds in _prefills(record):
            limit = sums.prefill_seconds(setup, ids)
            what = f"{setup.weights} prefill of {ids}, s"
            rows.append((name, what, limit, seconds, limit / seconds))
    names = ("file", "what", "limit", "measured", "share")
    return [{**dict(zip(names, (*row[:2], *(round(value, 3) for value in row[2:])))),
             "possible": row[4] <= 1} for row in rows]  # fmt: skip


def measured(setup, runs):
    """The Measured of those `runs` (of `records`) that had just this Setup, at the nearest context;
    None without one: what other cards, formats or numbers of listeners reach is not known."""
    if (setup.nodes, setup.listeners) != (1, 1):
        return None
    alike, found = replace(setup, price=None, context=0), None
    for name, record in runs:
        rates = [(abs(other.context - setup.context), other, rate)
                 for other, rate in _rates(record) if _alike(other, alike)]  # fmt: skip
        distance, other, rate = min(rates, key=lambda row: row[0], default=(None, None, 0))
        if rates and (found is None or distance < found[0]):
            prompts = [row[1:] for row in _prefills(record) if _alike(row[0], alike)]
            ids, seconds = max(prompts, default=(0, 1.0))
            share = ids and sums.prefill_seconds(other, ids) / seconds or None
            run = sums.Measured(name, rate / sums.plan(other).ceiling, share,
                                record.get("vocoder", {}).get("rtf"), record.get("note", ""))
            found = distance, run
    return found and found[1]


def _alike(setup, wanted):
    return replace(setup, context=0, model=wanted.model) == wanted


def records(folder):
    """[(file name, record)] of each run of the full model in a folder. Raises ValueError."""
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(record, dict) and record.get("what") == "scale":
                list(_rates(record)), list(_prefills(record))  # whether it is whole
                found.append((path.name, record))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as fault:
            raise ValueError(f"{path} is not a whole record ({type(fault).__name__} {fault}): "
                             "run it again.") from None
    return found


def _rates(record):
    """(Setup, ids a second) of each point of a record."""
    asked, fp8 = record["setup"], record.get("fp8", {}).get("decode", ())
    own = asked["weights"], asked.get("group"), record["decode"]
    for weights, group, points in (own, ("fp8", None, fp8)):
        for point in points:
            (setup,) = setups(asked["model"], [asked["gpus"]], weights, group, point["context"])
            yield setup, point["tokens_per_s"]


def _prefills(record):
    """(Setup, ids, s) of each prompt of a record."""
    asked = record["setup"]
    for point in record.get("prefill", ()):
        (setup,) = setups(asked["model"], [asked["gpus"]], asked["weights"], asked.get("group"))
        yield setup, point["ids"], point["seconds"]


def plans(asked, folder=None):
    """The Plan of each Setup, with what the runs recorded in `folder` (data/runs) reached."""
    folder = data_folder() / "runs" if folder is None else folder
    runs = records(folder)
    return [sums.plan(setup, measured(setup, runs)) for setup in asked]


def _trainings(args):
    """Trainings that `aqaa plan --train METHOD` asks for."""
    model, backbone, _ = read_model(args.model)
    asked = []
    for method in train.METHODS if args.train == "all" else [args.train]:
        given = [(gpus, args.nodes) for gpus in args.gpus]
        for gpus, nodes in given or train.USUAL[method]:
            gpu, count = parse_gpus(gpus)
            setup = sums.Setup(model, backbone, gpu, count, context=args.context, nodes=nodes)
            asked.append(train.Training(method, setup, args.rows, args.rank))
    return asked


def main(args):
    """`aqaa plan`, with its options. Returns 1 if none fits."""
    if args.train:
        asked, shown, advice = _trainings(args), train.table, train.what_would_fit
        rows = planned = list(map(train.to_dict, asked))
    else:
        asked = setups(args.model, args.gpus, args.weights, args.group, args.context,
                       listeners=args.listeners, nodes=args.nodes, price=args.price)  # fmt: skip
        planned, shown, advice = plans(asked), table, what_would_fit
        rows = [one.to_dict() for one in planned]
    print(json.dumps(rows) if args.json else shown(planned))
    if not (fits := any(row["fits"] for row in rows)):
        print("aqaa:", advice(asked[-1]), file=sys.stderr)
    return int(not fits)


def table(planned):
    setup, runs = planned[0].setup, sorted({(p.measured.file, p.measured.note)
                                            for p in planned if p.measured})  # fmt: skip
    more = ("listeners",) if setup.listeners > 1 or setup.nodes > 1 or setup.price else ()
    more += ("an hour",) if setup.price else ()
    lines = [(*COLUMNS, *more), *(_cells(p)[: len(COLUMNS) + len(more)] for p in planned)]
    runs = "; ".join(": ".join(filter(None, run)) for run in runs) or "no run of these is recorded"
    many = f"{setup.listeners} listeners" if setup.listeners > 1 else "one listener"
    nodes = f", {setup.nodes} nodes in a row of so many GPUs each" if setup.nodes > 1 else ""
    said = f"""\
{setup.model}, {planned[0].parameters:,} parameters, {setup.context} ids of context, {many}{nodes}.
{sums.aligned(lines)}
ceiling: tokens/s of a listener at most, by the longer of bytes / bandwidth and, with our kernels
and one row, their instructions. tokens/s: measured ({runs}).
audio: at least 41.7 tokens/s, which speech alone uses; with text: 69.4, while the text lasts; \
open: not measured.
first sound: s after a question of 3 s. delay: how late an answer of 10 s must start so that it \
never stalls. >=: at best."""
    if more:
        said += "\nlisteners: in real time, at most, by memory and ceilings."
    if setup.price:
        said += (f" an hour: of speech, at {setup.price:g} for a GPU and hour, while {many} speak; "
                 ">=: at best.")  # fmt: skip
    return said


def _cells(p):
    """A Plan as the cells under COLUMNS, then listeners and cost."""
    setup, least = p.setup, "" if p.measured else ">="
    cells = (setup.gpus, setup.format, f"{p.total:.1f}", f"{p.spare:.1f}")
    if not p.fits:
        return (*cells, *["-"] * 5, "no", "no", "does not fit", "-", str(p.most_listeners), "-")
    issued = 1000 * p.least["instructions"]
    return (*cells, f"{p.streamed:.3g}", f"{1000 * p.least['bytes']:.3g}",
            f"{issued:.3g}" if issued else "-", f"{p.ceiling:.0f}",
            f"{p.rate:.0f}" if p.rate else "not measured", VERDICT[p.steady],
            VERDICT[p.interleave], f"{least}{p.first_sound[3]:.2f}", f"{least}{p.delay[10]:.2f}",
            str(p.most_listeners), f"{least}{p.cost or 0:.2f}")  # fmt: skip
