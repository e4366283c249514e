"""`aqaa eval`: any system that answers, judged on the same spoken questions in nine categories.

A set is a folder (or a zip) with set.json, {"name", "items": [{"id", "category", "turns": [{"file",
"text"}, …], "answer", "manner", "normal"}, …]}, and its sounds; "answer" is the text that is right,
"normal" what `controls.measure` found in the same answer said normally, where the manner counts.
Text and sound are scored apart (StepEval-Audio-360's categories, AQAA paper 4). Each answer is one
line of a JSONL file, written when it is known, so that a run that was cut off goes on."""

import io
import json
import time
import zipfile
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import comb
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from aqaa import audio
from aqaa.config import SAMPLE_RATE
from aqaa.corpus import plan as P
from aqaa.corpus.facts import pieces
from aqaa.evaluation import whisper
from aqaa.evaluation.accuracy import all_answers, make_judge, recording
from aqaa.evaluation.controls import RULES, Measures, changes, follows, in_tune, measure
from aqaa.evaluation.mos import resampled
from aqaa.evaluation.report import page
from aqaa.evaluation.systems import make
from aqaa.files import ModelError, brief, data_folder, reading, replacing, write_json
from aqaa.records import about
from aqaa.tokenizers.text import NOTES, normalise

SHIPPED = "stepeval-mini"
SCORES = ("text", "spoken", "agrees", "manner")  # shares; `words` is a word error in percent
CATEGORIES = (
    "Speech Emotion Control", "Creativity", "Language Ability", "Gaming", "Role-playing",
    "Logical Reasoning", "Voice Understanding", "Voice Instruction Following", "Sing",
)  # fmt: skip
EACH = 40  # questions of a category
OPUS = 0.95  # how small the sounds of a set become: about 14 kbit/s
UNSHIPPED = "piper:joe"  # learnt from another voice, whose recordings are for research
KNOWN = ("seen_seen", "slot_seen", "read_only")  # cells whose wordings and voices training had


@dataclass
class Question:
    """One item of a set. texts: of its turns; turns: their sounds, (N,) float32 at 16 kHz each,
    read from `files` of `place` when they are asked."""

    id: str
    category: str
    texts: list
    answer: str
    manner: str = "normal"
    normal: dict | None = None
    files: list = field(default_factory=list, repr=False)
    place: object = field(default=None, repr=False)

    @cached_property
    def turns(self):
        return [_sound(self.place, name) for name in self.files]


def load(name):
    """(name of a set, [Question, …]). Raises ModelError where there is none, or it is no set."""
    path = data_folder() / f"{SHIPPED}.zip" if name == SHIPPED else Path(name)
    place = path if path.is_dir() else None
    if place is None:
        if not path.is_file():
            raise ModelError(f"there is no set at {path}: name a folder with a set.json, or "
                             f"{SHIPPED}.")  # fmt: skip
        with reading(path, "get the set again"):
            place = zipfile.ZipFile(path)
    with reading(path, "get the set again"):
        told = json.loads(_bytes(place, "set.json"))
        items = [_question(item, place) for item in told["items"]]
    if not items or len({item.id for item in items}) < len(items):
        raise ModelError(f"{path} holds no questions, or two of one id: get the set again.")
    return str(told.get("name", path.stem)), items


def _question(item, place):
    turns = item["turns"]
    texts, files = [turn["text"] for turn in turns], [turn["file"] for turn in turns]
    return Question(str(item["id"]), item["category"], texts, normalise(item["answer"]),
                    item.get("manner") or "normal", item.get("normal"), files, place)  # fmt: skip


def _bytes(place, name):
    return place.read(name) if isinstance(place, zipfile.ZipFile) else (place / name).read_bytes()


def _sound(place, name):
    """(N,) float32 at 16 kHz of a file of a set. Raises ModelError."""
    try:
        samples, rate = soundfile.read(io.BytesIO(_bytes(place, name)), dtype="float32",
                                       always_2d=True)  # fmt: skip
    except (OSError, KeyError, soundfile.LibsndfileError) as fault:
        said = f"{name} of the set cannot be read ({brief(fault)}): get it again."
        raise ModelError(said) from None
    return np.asarray(audio.resample(samples.mean(1), rate), np.float32)


# ---- one answer ----------------------------------------------------------------------------------


def judge(question, reply, ear):
    """Scores of a Reply as a dict of a row; None: it does not apply, or cannot be measured. ear:
    the answers that the judge chooses among; what was written joins them."""
    written, sound = normalise(reply.text), audio.resample(reply.audio, reply.rate)
    sound = np.asarray(sound, np.float32)
    listens, unsayable = make_judge(ear | {question.answer}, [reply.text])
    heard = listens.hear(sound) if len(sound) else ""
    row = {"written": reply.text, "heard": heard, "sounds": round(len(sound) / SAMPLE_RATE, 3)}
    row |= {"text": written == question.answer, "spoken": heard == question.answer,
            "agrees": None if unsayable else bool(heard) and heard == written}  # fmt: skip
    row["manner"] = _manner(question, sound)
    row["words"] = row["errors"] = None
    if not whisper.missing() and written:
        wanted, found = written.split(), whisper.heard(sound).split()
        row["words"], row["errors"] = len(wanted), whisper.edits(wanted, found)
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
               **judge(question, reply, ear)}  # fmt: skip
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

    Intervals are of 95 %. gap: points that the sound is behind the text."""
    found = {}
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
        if timed := [row for row in mine if row.get("first") is not None]:
            scores["first"] = round(float(np.median([row["first"] for row in timed])), 3)
            took, sound = (sum(row[key] for row in timed) for key in ("seconds", "sounds"))
            scores["rtf"] = round(took / sound, 3) if sound else None
    return found


def wilson(right, n):
    """{"n", "share", "interval"} in percent: Wilson's interval of 95 %, which leaves room where all
    of a few are right, as draws of the same few would not."""
    share, z = right / n, 1.96
    center = share + z * z / (2 * n)
    reach = z * (share * (1 - share) / n + (z / (2 * n)) ** 2) ** 0.5
    edges = [100 * (center + side) / (1 + z * z / n) for side in (-reach, reach)]
    return {"n": n, "share": round(100 * share, 1), "interval": [round(edge, 1) for edge in edges]}


def compare(ours, theirs):
    """{score: {"n", "only_first", "only_second", "difference", "p"}} of two runs, on the questions
    that both were asked; p: of as uneven a split by chance (McNemar's exact test)."""
    others, found = {row["id"]: row for row in theirs}, {}
    pairs = [(row, others[row["id"]]) for row in ours if row["id"] in others]
    if not pairs:
        raise ModelError("the two runs have no question in common: compare runs of one set.")
    for score in SCORES:
        both = [(a[score], b[score]) for a, b in pairs
                if a.get(score) is not None and b.get(score) is not None]  # fmt: skip
        if not both:
            continue
        first, second = sum(a and not b for a, b in both), sum(b and not a for a, b in both)
        n, least = first + second, min(first, second)
        p = min(1.0, 2 * sum(comb(n, k) for k in range(least + 1)) / 2**n)
        found[score] = {"n": len(both), "only_first": first, "only_second": second,
                        "difference": round(100 * (first - second) / len(both), 1),
                        "p": round(p, 4)}  # fmt: skip
    return found


def table(summary):
    """A summary as lines of text."""
    heads = (*SCORES, "gap", "word_error", "first", "rtf")
    lines = [["", "n", *(name.replace("_", " ") for name in heads)]]
    for name, scores in summary.items():
        n = max(score["n"] for score in scores.values() if isinstance(score, dict))
        lines.append([name, str(n), *(_cell(scores.get(head)) for head in heads)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines]  # fmt: skip
    told = ("in percent, with intervals of 95 %; gap: points that the sound is behind the text; "
            "first: s to the first sound, median; rtf: s of work a second of sound.")  # fmt: skip
    return "\n".join([*rows, told])


def _cell(score):
    if isinstance(score, dict):
        low, high = score["interval"]
        return f"{score.get('share', score.get('error'))} ({low}–{high})"
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
         compared=None, seed=0, as_json=False):  # fmt: skip
    """`aqaa eval`. load_model: a function that gives the model, where a system is made of it."""
    if compared:
        found = compare(*map(rows_of, compared))
        print(json.dumps(found) if as_json else "\n".join(
            f"{name}: {one['n']} questions, {one['only_first']} right only in the first, "
            f"{one['only_second']} only in the second, {one['difference']:+} points, p {one['p']}"
            for name, one in found.items()))  # fmt: skip
        return
    title, questions = load(set_name)
    chosen = [one for name in dict.fromkeys(item.category for item in questions)
              for one in P.spread([item for item in questions if item.category == name], limit)]
    asked = make(system, load_model, seed)
    out = Path(out or f"work/eval-{Path(asked.name).name}.jsonl")
    rows = evaluate(asked, chosen, out, resume=resume)
    summary = summarise(rows)
    if report:
        with replacing(Path(report)) as part:
            Path(part).write_text(page(f"{asked.name} on {title}", rows, summary,
                                       out.with_suffix(""), Path(report).parent), encoding="utf-8")
    head = {**about("eval"), "system": asked.name, "set": title, "questions": len(rows)}
    write_json(out.with_suffix(".json"), {**head, "summary": summary, "rows": rows})
    print(json.dumps(summary) if as_json else table(summary))
