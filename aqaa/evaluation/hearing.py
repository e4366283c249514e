"""`aqaa bench hearing`: whom do the two audio tokenizers hear, and do their codes bear noise?

Phone error, by the phone heads that travel with the weights: of the linguistic encoder, and of the
semantic tokenizer through its codes. Families of voices speak known questions and open sentences;
people are heard as they are. Then the share of codes that a clip keeps under noise, in a room, over
lines and through codecs. Results of several weights stand side by side in one file, by label."""

import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from aqaa import files
from aqaa.config import SAMPLE_RATE
from aqaa.corpus import degrade
from aqaa.evaluation import hearing_clips as clips_of
from aqaa.evaluation.mos import resampled
from aqaa.files import ModelError
from aqaa.pipeline import NO_HEADS
from aqaa.records import about
from aqaa.tokenizers.phones import PHONE_IDS

TOKENIZERS = ("linguistic", "semantic")
CELL = "{error:5.1f} ({interval[0]:.1f}–{interval[1]:.1f})"  # of the printed table
ROOM = 0.3, 0.3  # seconds of echo, and its share
AGREEMENT, STEADY = "agreement", ("seen", "other", "kokoro")  # families whose codes are compared
EACH = 20  # clips of them, of each kind of text: 120 in all, eleven times
CHANGES = {  # name: function of (wave (N,), generator)
    **{f"noise {snr} dB": partial(lambda wav, rng, snr: degrade.noise(wav, snr, rng), snr=snr)
       for snr in (20, 10, 5)},
    "room": lambda wav, rng: degrade.room(wav, *ROOM, rng)[: len(wav)],
    **{name: partial(lambda wav, rng, line: line(wav), line=line)
       for name, line in degrade.LINES.items()},
}  # fmt: skip


def measure(model, seed=0, folder="work/hearing", people=(), only=None, limit=None, label="now",
            out=None, progress=True):  # fmt: skip
    """Phone errors and code agreement of an AQAA, `limit` clips of each set at most. folder: of
    spoken clips. people: folders of recordings (hearing_clips.recorded). only: a family, "people",
    or "agreement". label: the entry of the file `out` that is written; its others stay, and with
    `only` the other families of this one. Raises ModelError for weights without phone heads,
    ValueError for a faulty folder of people or an unknown family."""
    families = [*clips_of.SPOKEN, *clips_of.PEOPLE]
    names = [*families, "people", AGREEMENT]
    if only and only not in names:
        raise ValueError(f"bench hearing knows no {only!r}: choose one of {', '.join(names)}.")
    if model.heads is None and only != AGREEMENT:
        raise ModelError(NO_HEADS)
    wanted, started = [only] if only else names, time.monotonic()
    recordings = {Path(one).name: clips_of.recorded(one) for one in people if "people" in wanted}
    head = about("hearing", model.device)
    earlier = files.read_object(out, "remove it") if out and Path(out).exists() else {}
    entry = earlier.get(label, {}) if only else {}  # one family is renewed, the others stay
    missing = {name: why for name, why in entry.get("missing", {}).items() if name not in wanted}
    absent = {name: clips_of.absent(name) for name in families if name in wanted}
    missing |= {name: fault for name, fault in absent.items() if fault}
    if "people" in wanted and not people:
        missing["people"] = "name folders of recordings with a manifest.json by --people FOLDER."
    errors, spoken = entry.get("phone_error", {}), {}
    entry = {**entry, **head, "seed": seed, "phone_error": errors, "missing": missing}
    result = {**earlier, **head, label: entry}
    tell = partial(print, flush=True) if progress else lambda text: None
    for name, clips in _sets(wanted, missing, folder, recordings, limit, seed, tell):
        if name.split(",")[0] in wanted or name in recordings:
            tell(f"listening to {name}")
            errors[name] = error_of(model, clips_of.with_phones(clips), seed)
        spoken.setdefault(name.split(",")[0], []).extend(clips[:EACH])
        if out:  # already now: the last sets may take long to be spoken
            files.write_json(out, result)
    if AGREEMENT in wanted:
        tell("comparing codes")
        chosen = {name: spoken[name] for name in STEADY if name in spoken}
        entry[AGREEMENT] = agreement(model, chosen)
    entry["minutes"] = round((time.monotonic() - started) / 60, 2)
    if out:
        files.write_json(out, result)
    tell(table(result))
    return result


def _sets(wanted, missing, folder, recordings, limit, seed, tell):
    """(name of a set, its Clips), one by one; of families that speak, a set of each kind of text.
    Those whose codes are compared come without being wanted themselves."""
    for family in clips_of.PEOPLE:
        if family in wanted and family not in missing:
            yield family, clips_of.people(family)[:limit]
    yield from ((name, clips[:limit]) for name, clips in recordings.items())
    needed = {*wanted, *(STEADY if AGREEMENT in wanted else ())}
    speaking = [name for name in clips_of.SPOKEN if name in needed and not clips_of.absent(name)]
    lines = clips_of.texts(seed) if speaking else {}
    for family in speaking:
        tell(f"reading or speaking {family}")
        for kind, pairs in lines.items():
            yield f"{family}, {kind}", clips_of.spoken(family, pairs[:limit], folder, seed)


def error_of(model, clips, seed=0):
    """{"n", "phones", tokenizer: {"error", "interval"}}: phone error in percent of Clips with
    phones, and where it lies in 95 of 100 draws of as many clips."""
    from torchaudio.functional import edit_distance

    counts = np.array([len(clip.phones) for clip in clips])
    errors = {name: np.zeros(len(clips)) for name in TOKENIZERS}
    for i, clip in enumerate(clips):
        for name, phones in model.phones((clip.wav, SAMPLE_RATE)).items():
            ids = [PHONE_IDS[phone.name] for phone in phones]
            errors[name][i] = edit_distance(ids, list(clip.phones))
    result = {"n": len(clips), "phones": int(counts.sum())}
    return result | {name: resampled(wrong, counts, seed) for name, wrong in errors.items()}


def agreement(model, families):
    """{change: {"n", tokenizer: percent of its codes that stay, "families": {name: the same}}} of
    {name: Clips}, each change of a clip drawn anew but always alike."""
    kept = {change: {} for change in CHANGES}
    for family, clips in families.items():
        for number, clip in enumerate(clips):
            before = _codes(model, clip.wav)
            for change, apply in CHANGES.items():
                rng = np.random.default_rng([number, *change.encode()])
                after = _codes(model, np.float32(apply(clip.wav, rng)))
                row = [(old == new).float().mean().item() for old, new in zip(before, after)]
                kept[change].setdefault(family, []).append(row)
    result = {}
    for change, rows in kept.items():
        each = {name: _percent(shares) for name, shares in rows.items()}
        whole = [row for shares in rows.values() for row in shares]
        result[change] = {"n": len(whole), **_percent(whole), "families": each}
    return result


def _percent(shares):
    means = 100 * np.mean(shares, 0) if len(shares) else (float("nan"),) * 2
    return {name: round(float(mean), 1) for name, mean in zip(TOKENIZERS, means, strict=True)}


def _codes(model, wav):
    """Both code sequences of a whole wave (N,): nothing is cut, so that frames stay aligned."""
    wav = torch.as_tensor(wav, device=model.device)
    return [getattr(model, name).encode(wav) for name in TOKENIZERS]


def table(result):
    """All entries of a result as text, each label a group of columns."""
    labels = {name: entry for name, entry in result.items() if isinstance(entry, dict)}
    lines = []
    for label, entry in labels.items():
        lines += ["", f"{label}: {entry['date']}, commit {entry['commit']}"]
        if entry["phone_error"]:
            lines += [f"{'phone error, %':22}clips  phones  linguistic           semantic (codes)"]
        for name, row in entry["phone_error"].items():
            cells = [CELL.format(**row[kind]) for kind in TOKENIZERS]
            lines.append(f"{name:22}{row['n']:5}{row['phones']:8}  {cells[0]:21}{cells[1]}")
        if entry.get(AGREEMENT):
            lines += ["", f"{'codes that stay, %':22}clips  linguistic  semantic"]
        for name, row in entry.get(AGREEMENT, {}).items():
            lines.append(f"{name:22}{row['n']:5}{row['linguistic']:12.1f}{row['semantic']:10.1f}")
        lines += [f"left out: {name}: {fault}" for name, fault in entry["missing"].items()]
    return "\n".join([*lines, "", "In brackets: 95 % of draws of as many clips."])
