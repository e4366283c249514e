"""`aqaa eval`: any system that answers, judged on the same spoken questions in nine categories.

Our set is a folder (or a zip) with set.json, {"name", "items": [{"id", "category", "turns":
[{"file", "text"}, …], "answer", "manner", "normal"}, …]}, and its sounds; "answer" is the text that
is right, "normal" what `controls.measure` found in the same answer said normally, where the manner
counts; `sets` reads it, and published ones.
Text and sound are scored apart (StepEval-Audio-360's categories, AQAA paper 4). Each answer is one
line of a JSONL file, written when it is known, so that a run that was cut off goes on."""

import io
import json
import time
import zipfile
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from aqaa import audio
from aqaa.config import SAMPLE_RATE
from aqaa.corpus import plan as P
from aqaa.corpus.facts import pieces
from aqaa.evaluation import language_judge, quality, whisper
from aqaa.evaluation.accuracy import all_answers, make_judge, recording
from aqaa.evaluation.agreement import SCORES, compare, lines
from aqaa.evaluation.controls import RULES, Measures, changes, follows, in_tune, measure
from aqaa.evaluation.language_judge import ASPECTS
from aqaa.evaluation.mos import mean, resampled, wilson
from aqaa.evaluation.report import page
from aqaa.evaluation.robustness import CLEAN, conditions, kept
from aqaa.evaluation.sets import CATEGORIES, SHIPPED, load
from aqaa.evaluation.systems import make
from aqaa.files import ModelError, brief, probe, reading, replacing, write_json
from aqaa.records import about
from aqaa.tokenizers.text import NOTES, normalise

MEANS = ("quality", *ASPECTS, *(f"{aspect}_speech" for aspect in ASPECTS))  # from 1 to 5
TOLD = ("in percent, with intervals of 95 %; gap: points that the sound is behind the text; first: "
        "s to the first sound, median; rtf: s of work a second of sound; quality (DNSMOS) and a "
        "judge's grades are from 1 to 5; kept: of those right when clean.")  # fmt: skip
EACH = 40  # questions of a category
OPUS = 0.95  # how small the sounds of a set become: about 14 kbit/s
UNSHIPPED = "piper:joe"  # learnt from another voice, whose recordings are for research
KNOWN = ("seen_seen", "slot_seen", "read_only")  # cells whose wordings and voices training had


# ---- one answer ----------------------------------------------------------------------------------


def judge(question, reply, ear, speaks=True):
    """Scores of a Reply as a dict of a row; None: it does not apply, or cannot be measured. ear:
    the answers that the judge chooses among; what was written joins them. Questions of published
    sets are heard by the open recogniser alone. speaks: whether the system is meant to."""
    written, sound = normalise(reply.text), audio.resample(reply.audio, reply.rate)
    sound = np.asarray(sound, np.float32)
    opened = None if whisper.missing() or not speaks else whisper.heard(sound)
    row = {"written": reply.text, "heard": opened or "", "transcribed": opened,
           "sounds": round(len(sound) / SAMPLE_RATE, 3), "text": question.right(reply.text),
           "spoken": None if opened is None else question.right(opened),
           "agrees": None}  # fmt: skip
    if question.rule == "whole" and speaks:
        listens, unsayable = make_judge(ear | {question.answer}, [reply.text])
        heard = listens.hear(sound) if len(sound) else ""
        row |= {"heard": heard, "spoken": heard == question.answer,
                "agrees": None if unsayable else bool(heard) and heard == written}  # fmt: skip
    row["manner"] = _manner(question, sound) if speaks else None
    row["words"] = row["errors"] = None
    if opened is not None and written:
        wanted = whisper.words(reply.text).split()
        row["words"], row["errors"] = len(wanted), whisper.edits(wanted, opened.split())
    told = measure(sound, reply.text)
    row |= {"f0": round(told.f0, 1) or None, "energy": round(told.energy, 1),
            "rate": round(told.rate, 2) or None, "quality": quality.dnsmos(sound)}  # fmt: skip
    if reply.seconds is not None:
        row["first"], row["seconds"] = round(reply.first, 3), round(reply.seconds, 3)
    return row


def _manner(question, sound):
    """Whether a sound (N,) is in tune, or differs from the normal one as asked; None: no rule."""
    notes = question.manner.split()
    if notes and set(notes) <= set(NOTES):
        return bool(len(sound)) and in_tune(notes, sound)
    if question.manner not in RULES or not question.normal or not len(sound):
        return None
    return follows(question.manner, changes(measure(sound), Measures(**question.normal)))


# ---- a run ---------------------------------------------------------------------------------------


def evaluate(system, questions, out, *, resume=False, quiet=False):
    """Ask a system all questions; rows of `out`, a JSONL file beside a folder of the sounds.
    Returns the rows. Raises WriteError, ModelError, and SystemFault where the system is lost."""
    out, rows = Path(out), []
    if resume and out.exists():
        rows = _kept(out, system.name)
    elif out.exists():
        raise ModelError(f"{out} is there already: --resume goes on with it, or name another.")
    done, ear = {row["id"] for row in rows}, all_answers()
    todo = [question for question in questions if question.id not in done]
    sounds = out.with_suffix("")
    sounds.mkdir(parents=True, exist_ok=True)
    with replacing(out) as part:  # a last line that was cut off is gone
        part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for question in tqdm(todo, system.name, disable=quiet, unit="question"):
        system.item = question.id
        began = time.monotonic()
        reply = system.answer(question.turns)
        row = {"id": question.id, "system": system.name, "category": question.category,
               "asked": question.texts, "expected": question.answer, "wanted": question.manner,
               **judge(question, reply, ear, getattr(system, "speaks", True))}  # fmt: skip
        if question.condition != CLEAN:
            row["condition"] = question.condition
        row["minutes"] = round((time.monotonic() - began) / 60, 4)
        with replacing(sounds / f"{question.id}.ogg") as part, open(part, "wb") as file:
            soundfile.write(file, reply.audio if len(reply.audio) else np.zeros(160, np.float32),
                            reply.rate, format="OGG", subtype="VORBIS")  # fmt: skip
        rows.append(row)
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        del question.turns
    return rows


def rows_of(path):
    """Rows of a JSONL file; a last line that was cut off does not count. Raises ModelError."""
    rows = []
    with reading(path, "name the file of a run"):
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if lacking := {"id", "category"} - set(row):
                    raise KeyError(*lacking)
                rows.append(row)
            except (ValueError, TypeError, KeyError) as fault:
                if number < len(lines):
                    raise ValueError(f"line {number} is no row ({brief(fault)})") from None
    return rows


def _kept(path, name):
    """Rows of a run that goes on. Raises ModelError for those of another system."""
    rows = rows_of(path)
    if others := {row["system"] for row in rows} - {name}:
        raise ModelError(f"{path} holds answers of {others.pop()}: name another file for {name}.")
    return rows


def summarise(rows):
    """{category or "all": {score: {"n", "share", "interval"}, …, "word_error", "first", "rtf"}}.

    Intervals are of 95 %. gap: points that the sound is behind the text. Of a sweep the clean."""
    found, rows = {}, [row for row in rows if row.get("condition", CLEAN) == CLEAN]
    names = [name for name in CATEGORIES if any(row["category"] == name for row in rows)]
    names += sorted({row["category"] for row in rows} - set(names))
    for name in ["all", *names]:
        mine = [row for row in rows if name in ("all", row["category"])]
        found[name] = scores = {}
        for score in SCORES:
            if known := [row[score] for row in mine if row.get(score) is not None]:
                scores[score] = wilson(sum(known), len(known))
        if {"text", "spoken"} <= set(scores):
            scores["gap"] = round(scores["text"]["share"] - scores["spoken"]["share"], 1)
        if heard := [row for row in mine if row.get("words")]:
            counted = [row["errors"] for row in heard], [row["words"] for row in heard]
            scores["word_error"] = {"n": len(heard), **resampled(*counted)}
        if sure := [row["quality"] for row in mine if row.get("quality") is not None]:
            scores["quality"] = mean(sure)
        if timed := [row for row in mine if row.get("first") is not None]:
            scores["first"] = round(float(np.median([row["first"] for row in timed])), 3)
            took, sound = (sum(row[key] for row in timed) for key in ("seconds", "sounds"))
            scores["rtf"] = round(took / sound, 3) if sound else None
    return found


def table(summary, heads=(*SCORES, "gap", "word_error", *MEANS, "first", "rtf")):
    """A summary as lines of text; columns that nothing stands in are left out."""
    heads = [key for key in heads if any(key in scores for scores in summary.values())]
    lines = [["", "n", *(name.replace("_", " ") for name in heads)]]
    for name, scores in summary.items():
        n = max((one["n"] for one in scores.values() if isinstance(one, dict)), default=0)
        lines.append([name, str(n), *(_cell(scores.get(head)) for head in heads)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines]  # fmt: skip
    return "\n".join(rows)


def _cell(score):
    if isinstance(score, dict):
        value = score.get("share", score.get("error", score.get("mean")))
        return f"{value} ({score['interval'][0]}–{score['interval'][1]})" if score["interval"] \
            else str(value)  # fmt: skip
    return "-" if score is None else str(score)


# ---- making a set --------------------------------------------------------------------------------


def pack(corpus, path, each=EACH, again=()):
    """Write a set as a zip from the evaluation questions of a corpus: `each` of every category, in
    wordings or voices that were never in training, spread evenly; sounds as Opus. again: a corpus
    in which another voice says what UNSHIPPED says in the first."""
    instead = {item.id: item for item in again and again.items()}
    spoken = corpus.answers()
    normal = {normalise(item.answer): item for item in spoken.values() if item.manner == "normal"}
    items, sounds = [], {}
    for category in CATEGORIES:
        asked = [item for item in corpus.items(split="eval") if item.category == category
                 and item.role in ("question", "follow") and item.cell not in KNOWN]
        asked = [instead.get(item.id, item) for item in asked]
        asked = [item for item in asked if item.voice != UNSHIPPED]
        for item in P.spread(asked, each):
            said = [corpus.before(item)] if item.role == "follow" else []
            said, turns = [instead.get(one.id, one) for one in [*said, item]], []
            for one in said:
                file = io.BytesIO()
                samples = recording(again if one.id in instead else corpus, one)
                soundfile.write(file, samples, SAMPLE_RATE, format="OGG", subtype="OPUS",
                                compression_level=OPUS)  # fmt: skip
                sounds[f"{one.id}.ogg"] = file.getvalue()
                turns.append({"file": f"{one.id}.ogg", "text": one.text})
            parts = pieces(item.answer, item.manner or "normal")
            manner = " ".join(how for _, how in parts)
            row = {"id": item.id, "category": category, "turns": turns, "answer": item.answer,
                   "manner": manner, "voice": item.voice, "cell": item.cell}  # fmt: skip
            if manner in RULES and (one := normal.get(normalise(item.answer))):
                told = asdict(measure(recording(corpus, one)))
                row["normal"] = {name: round(value, 3) for name, value in told.items()}
            items.append(row)
    with replacing(Path(path)) as part, zipfile.ZipFile(part, "w") as file:
        file.writestr("set.json", json.dumps({"name": SHIPPED, "items": items}))
        for name, content in sounds.items():
            file.writestr(name, content)
    return items


# ---- the command ---------------------------------------------------------------------------------


def main(system, load_model, *, set_name=SHIPPED, limit=None, out=None, report=None, resume=False,
         noise=None, judge=None, audit=None, seed=0, as_json=False, lineage="work/lineage",
         device="cpu"):  # fmt: skip
    """`aqaa eval`. load_model: a function that gives the model, where a system is made of it."""
    if audit and not judge:
        raise ValueError("--audit asks a judge: name it with --judge.")
    names = conditions(noise) if noise else [CLEAN]
    title, questions = load(set_name)
    chosen = [one for name in dict.fromkeys(item.category for item in questions)
              for one in P.spread([item for item in questions if item.category == name], limit)]
    chosen = [one if name == CLEAN else replace(one, condition=name, id=f"{one.id}@{name}".replace(
        " ", "-")) for name in names for one in chosen]  # fmt: skip
    grader = language_judge.make(judge, device) if judge else None
    if report:  # now: a page that cannot be written is told before anything is asked
        probe(Path(report).absolute().parent)
    asked = make(system, load_model, seed, lineage, device)
    out = Path(out or f"work/eval-{Path(asked.name).name}.jsonl")
    rows = evaluate(asked, chosen, out, resume=resume)
    summary = summarise(rows)
    told = {**about("eval"), "system": asked.name, "set": title, "questions": len(rows),
            "trained": getattr(asked, "trained", dict)()}  # fmt: skip
    if noise:
        told["conditions"] = kept(rows)

    def save():
        write_json(out.with_suffix(".json"), {**told, "summary": summary, "rows": rows})
        if report:
            with replacing(Path(report)) as part:
                Path(part).write_text(page(f"{asked.name} on {title}", rows, summary, told,
                                           out.with_suffix(""), Path(report).parent),
                                      encoding="utf-8")  # fmt: skip

    save()
    if grader:
        clean = [row for row in rows if row.get("condition", CLEAN) == CLEAN]
        verdicts = language_judge.Verdicts(out.with_suffix(".verdicts.jsonl"), grader)
        grades = language_judge.grade(verdicts, clean)
        told["judge"] = language_judge.summarise(grades, clean, summary, grader.name)
        told["judge"] |= {"name": grader.name, "ceiling": language_judge.ceiling(verdicts, clean)}
        if audit:
            sounds = out.with_suffix("")
            told["judge"]["audit"] = language_judge.audit(verdicts, clean, sounds, audit)
        save()
    more = {key: told[key] for key in ("conditions", "judge") if key in told}
    if as_json:
        return print(json.dumps({**summary, **more}))
    print(table(summary), TOLD, sep="\n")
    if noise:
        print(table(told["conditions"], ("text", "kept_text", "spoken", "kept_spoken")))
    if judge:
        print("judge:", json.dumps(told["judge"]))


def compare_runs(paths, judge=None, out=None, as_json=False, device="cpu"):
    """`aqaa eval --compare A B …`: every pair; with a judge also which answers it prefers."""
    runs = {str(path): rows_of(path) for path in paths}
    if len(runs) < 2:
        raise ValueError("--compare takes two runs or more: name another file.")
    pairs = {" / ".join(pair): [runs[name] for name in pair] for pair in combinations(runs, 2)}
    found = {name: compare(*pair) for name, pair in pairs.items()}
    if judge:
        verdicts = language_judge.Verdicts(out or "work/compare.verdicts.jsonl",
                                           language_judge.make(judge, device))  # fmt: skip
        for name, pair in pairs.items():
            found[name]["preferred"] = language_judge.prefer(verdicts, *pair)
    if as_json:
        return print(json.dumps(found if len(found) > 1 else next(iter(found.values()))))
    for name, one in found.items():
        print(*([name] if len(found) > 1 else []), *lines(one), sep="\n")
