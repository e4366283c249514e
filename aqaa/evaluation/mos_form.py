"""A blind listening form of runs: `aqaa eval --mos a.jsonl b.jsonl --report form.html`.

One page that works from disk: each sound gets a mark from 1 to 5, in an order of each listener's
own, at one loudness, without a name; FORM.key.json beside it knows the names. A folder of ID.wav,
as of a teacher's recordings, is an anchor above; below stands a robot, made of the first run."""

import base64
import io
import json
import secrets
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import butter, sosfilt

from aqaa import audio
from aqaa.config import SAMPLE_RATE
from aqaa.corpus import plan as P
from aqaa.corpus.degrade import rms
from aqaa.evaluation.mos import SCALE, mean
from aqaa.evaluation.robustness import CLEAN
from aqaa.evaluation.stepeval import rows_of
from aqaa.files import ModelError, read_object, replacing, write_json

ROBOT, BUZZ, BANDS = "robot", 110, np.geomspace(100, 7000, 17)  # Hz
LEVEL, PEAK = 0.05, 0.98  # rms of every sound, and what it may reach
EACH = 10  # answers of a system


def trials(places, each=EACH):
    """[(system, id, wav (N,) at 16 kHz), …] of runs and folders of ID.wav, the same answers of
    each, and of a robot. Raises ModelError where they have none in common."""
    runs = {}
    for place in map(Path, places):
        if place.is_dir():
            found = {path.stem: path for path in sorted(place.glob("*.wav"))}
        else:
            rows = [row for row in rows_of(place) if row.get("condition", CLEAN) == CLEAN]
            found = {row["id"]: place.with_suffix("") / f"{row['id']}.ogg" for row in rows
                     if row.get("sounds")}  # fmt: skip
        runs[place.stem if place.stem not in runs else str(place)] = found
    shared = [name for name in next(iter(runs.values()))
              if all(name in run for run in runs.values())]  # fmt: skip
    if len(runs) < 2 or not shared:
        raise ModelError(f"{' and '.join(map(str, places))} have no spoken answer in common: name "
                         "two or more runs of one set.")  # fmt: skip
    made = []
    for name in P.spread(shared, each):
        for system, run in runs.items():
            made.append((system, name, _wav(run[name])))
        made.append((ROBOT, name, robot(made[-len(runs)][2])))
    return [(system, name, _level(wav)) for system, name, wav in made]


def _wav(path):
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError):
        raise ModelError(f"{path} cannot be read: keep the folder of a run beside it.") from None
    return np.asarray(audio.resample(samples.mean(1), rate), np.float32)


def _level(wav):
    wav = wav * (LEVEL / rms(wav))
    return (wav * min(1.0, PEAK / max(np.abs(wav).max(initial=0), 1e-9))).astype(np.float32)


def robot(wav):
    """wav (N,) without its melody: the envelope of 16 bands on a flat buzz (a channel vocoder)."""
    buzz = 2 * (np.arange(len(wav)) * BUZZ / SAMPLE_RATE % 1) - 1
    smooth, made = butter(2, 30, fs=SAMPLE_RATE, output="sos"), np.zeros(len(wav))
    for edges in pairwise(BANDS):
        band = butter(2, edges, "bandpass", fs=SAMPLE_RATE, output="sos")
        carrier = sosfilt(band, buzz)
        made += sosfilt(smooth, np.abs(sosfilt(band, wav))) * carrier / rms(carrier)
    return made.astype(np.float32)


def write(places, page, each=EACH):
    """Write the form and its key; returns the number of sounds. Raises WriteError, ModelError."""
    page, key, sounds = Path(page), {}, []
    for system, name, wav in trials(places, each):
        file, token = io.BytesIO(), secrets.token_hex(6)
        soundfile.write(file, wav, SAMPLE_RATE, format="OGG", subtype="VORBIS")
        content = base64.b64encode(file.getvalue()).decode()
        sounds.append({"id": token, "src": f"data:audio/ogg;base64,{content}"})
        key[token] = [system, name]
    sounds.sort(key=lambda one: one["id"])  # by tokens, which tell nothing
    form = {"form": secrets.token_hex(4), "page": page.name, "sounds": sounds}
    with replacing(page) as part:
        text = Path(__file__).with_name("listening_form.html").read_text(encoding="utf-8")
        Path(part).write_text(text.replace("DATA", json.dumps(form)), encoding="utf-8")
    write_json(page.with_suffix(".key.json"), {"form": form["form"], "sounds": key})
    return len(sounds)


def results(paths, page=None):
    """{system: {"n", "mean", "interval"}} of the files that listeners saved; one that is named
    twice counts once. page: the form; without it its name is looked for beside the first file."""
    given = [(path, read_object(path, "get it from the listener again")) for path in paths]
    page = Path(page or Path(paths[0]).parent / str(given[0][1].get("page")))
    key = read_object(page.with_suffix(".key.json"), "name the form with --report")
    marks, allowed = {}, range(int(SCALE[0]), int(SCALE[1]) + 1)
    for path, one in {str(one.get("listener")): (path, one) for path, one in given}.values():
        said = one.get("marks")
        if one.get("form") != key["form"] or not isinstance(said, dict) or not all(
                token in key["sounds"] and mark in allowed for token, mark in said.items()):
            raise ModelError(f"{path} holds no marks from 1 to 5 of the form {page}: name the "
                             "results of that form.")  # fmt: skip
        for token, mark in said.items():
            marks.setdefault(key["sounds"][token][0], []).append(mark)
    return {system: mean(row) for system, row in marks.items()}


def main(places, paths, page=None, limit=None, as_json=False):
    """`aqaa eval --mos` writes a form, `--mos-results` analyses what came back."""
    if paths:
        told = results(paths, page)
    else:
        page = page or "work/form.html"
        told = {"form": str(page), "sounds": write(places, page, limit or EACH)}
    if as_json or places:
        return print(json.dumps(told))
    for system, one in told.items():
        low, high = one["interval"] or ("-", "-")
        print(f"{system}: {one['mean']} ({low}–{high}), {one['n']} marks")
