"""`aqaa bench accuracy`: does the mini answer right, in words and in sound, on questions it has never heard?

Every evaluation question of the corpus is asked; the text is compared word for word, the sound is given to the judge
(lenient and strict), and the teacher's own recording of the same answer is judged beside it: that is the ceiling. The
judge's grammar holds all answers of the curriculum and every text the model wrote, so that it may hear the model say
something else than its text.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from aqaa.batching import ask_all, own_sampling
from aqaa.config import SAMPLE_RATE
from aqaa.evaluation.controls import RULES, direction
from aqaa.evaluation.judges import Judge, missing_words
from aqaa.records import report
from aqaa.tokenizers.text import normalise

CELLS = {  # of the corpus, and what they are called in the table
    "seen_seen": "seen wording, seen voice",
    "seen_new": "seen wording, new voice",
    "new_seen": "new wording, seen voice",
    "new_new": "new wording, new voice",
    "slot_seen": "seen wording, unseen slot",
    "read_only": "facts only ever read",
}
METRICS = {  # of a Row, and their heading
    "text": "text",
    "lenient": "spoken",
    "strict": "strict",
    "agrees": "agrees",
    "manner_ok": "manner",
    "teacher_lenient": "ceiling",
    "teacher_strict": "c.strict",
}
UNDERSTANDING = "Voice Understanding"
FEWEST_ANSWERS = 500  # a smaller grammar makes guessing easy


@dataclass
class Row:
    """One question asked. Scores are True, False, or None where they do not apply or were not measured."""

    id: str
    cell: str
    category: str
    intent: str
    voice: str
    question: str
    expected: str
    written: str = ""  # the model's text
    heard: str = ""  # by the lenient judge, in the model's sound
    heard_strict: str = ""
    seconds: float = 0.0  # of sound
    manner: str = "normal"
    text: bool | None = None  # the text is the expected one
    lenient: bool | None = None  # the judge hears the expected words
    strict: bool | None = None
    agrees: bool | None = None  # the lenient judge hears the model's own text
    manner_ok: bool | None = None  # the manner's direction, against the teacher's normal recording of the answer
    teacher_lenient: bool | None = None  # the judge hears the expected words in the teacher's recording
    teacher_strict: bool | None = None


# ---- asking ---------------------------------------------------------------------------------------------------------


# ---- scoring --------------------------------------------------------------------------------------------------------


def score(rows, sounds, judge, *, workers=1, progress=False):
    """Fill the spoken scores of `rows` from the sounds of the same answers ((N,) float at 16 kHz), in place."""
    label = "judge, {}" if progress else None
    for strict in (False, True):
        name = "strict" if strict else "lenient"
        heard = judge.hear_all(sounds, strict, workers, label and label.format(name))
        for row, sentence in zip(rows, heard, strict=True):
            if strict:
                row.heard_strict, row.strict = sentence, sentence == row.expected
            else:
                row.heard, row.lenient = sentence, sentence == row.expected
                row.agrees = bool(sentence) and sentence == row.written


def score_teacher(rows, answer_ids, recordings, judge, *, workers=1, progress=False):
    """Fill the ceiling: recordings {answer id: (N,) float} are heard once each; answer_ids: that of each row."""
    known = sorted(set(answer_ids) & set(recordings))
    for strict in (False, True):
        name = "strict" if strict else "lenient"
        label = f"judge, teacher {name}" if progress else None
        heard = dict(zip(known, judge.hear_all([recordings[i] for i in known], strict, workers, label), strict=True))
        for row, answer in zip(rows, answer_ids, strict=True):
            if answer in heard:
                setattr(row, f"teacher_{name}", heard[answer] == row.expected)


def score_manner(rows, sounds, normal):
    """Fill manner_ok for rows that ask for a manner; normal: {answer text: the teacher's normal recording}."""
    for row, sound in zip(rows, sounds, strict=True):
        if row.manner in RULES and row.expected in normal:
            row.manner_ok = direction(row.manner, sound, normal[row.expected])


def make_judge(answers, written, seed=0):
    """(Judge, number of texts left out): its grammar holds the answers and the written texts, its bigrams the answers'.

    A text with a word that the dictionary lacks cannot be heard: it is left out, and its row does not agree.
    """
    answers = {normalise(answer) for answer in answers}
    others = {normalise(text) for text in written} - answers - {""}
    strange = set(missing_words(others))
    sayable = {text for text in others if not strange & set(text.split())}
    return Judge(answers | sayable, bigrams=answers, seed=seed), len(others - sayable)


# ---- summing up -----------------------------------------------------------------------------------------------------


def share(values):
    """{"n", "share", "error"} of booleans, None left out. error is the standard error, after adding two successes and
    two failures (Agresti & Coull 1998), so that a perfect score of few questions does not look exact."""
    values = [bool(value) for value in values if value is not None]
    n = len(values)
    if not n:
        return {"n": 0, "share": None, "error": None}
    adjusted = (sum(values) + 2) / (n + 4)
    return {"n": n, "share": sum(values) / n, "error": float(np.sqrt(adjusted * (1 - adjusted) / (n + 4)))}


def summarise(rows):
    """{group: {metric: share}} for all rows, each cell, each category, and voice understanding from new voices."""
    groups = {"all": rows}
    groups |= {name: [row for row in rows if row.cell == cell] for cell, name in CELLS.items()}
    groups |= {name: [row for row in rows if row.category == name] for name in sorted({row.category for row in rows})}
    groups[f"{UNDERSTANDING}, new voices"] = [
        row for row in rows if row.category == UNDERSTANDING and row.cell.endswith("_new")
    ]
    for manner in RULES:
        groups[f"manner: {manner}"] = [row for row in rows if row.manner == manner]
    return {
        name: {metric: share(getattr(row, metric) for row in members) for metric in METRICS}
        for name, members in groups.items()
        if members
    }


def table(summary):
    """The summary as lines of text: percent and standard error."""
    width = max(map(len, summary)) + 1
    lines = [" " * width + "    n" + "".join(f"{heading:>12}" for heading in METRICS.values())]
    for name, scores in summary.items():
        n = max(entry["n"] for entry in scores.values())
        lines.append(f"{name:<{width}}{n:5}" + "".join(f"{_percent(entry):>12}" for entry in scores.values()))
    return "\n".join(lines)


def _percent(entry):
    return "-" if entry["share"] is None else f"{100 * entry['share']:.1f} ±{100 * entry['error']:.1f}"


# ---- the corpus -----------------------------------------------------------------------------------------------------


def evaluation_corpus(folder, seed=0, workers=2):
    """The corpus in `folder`; if there is none, only its evaluation questions and the answers to them are spoken.

    Speaking that was interrupted goes on. A training corpus that is still growing is taken as it is.
    """
    from aqaa.corpus import speak

    found = speak.Corpus(folder) if (Path(folder) / "plan.json").exists() else None
    if found and found.complete:
        return found
    items = speak.plan(seed=seed)
    asked = [item for item in items if item.split == "eval" and item.role == "question"]
    wanted = {item.answer_id for item in asked}
    texts = {item.answer for item in asked if item.manner in RULES}  # their normal form is the manner's reference
    answers = [
        item
        for item in items
        if item.role == "answer" and (item.answer_id in wanted or item.manner == "normal" and item.answer in texts)
    ]
    if found and found.head["hash"] != speak.plan_hash(answers + asked):
        return found
    return speak.speak(answers + asked, folder, workers)


def all_answers():
    """Every text that the curriculum may want to hear."""
    from aqaa.corpus import intents

    return {fact.answer for intent in intents.INTENTS.values() for fact in intent.facts}


def questions(corpus, limit=None):
    """Evaluation questions, `limit` of each cell at most, spread evenly over the cell."""
    chosen = []
    for cell in CELLS:
        items = corpus.items(role="question", split="eval", cell=cell)
        step = max(1.0, len(items) / limit) if limit else 1.0
        chosen += [items[int(i * step)] for i in range(min(len(items), limit or len(items)))]
    return chosen


def recording(corpus, item):
    """Its samples as float32."""
    return corpus.wav(item).astype(np.float32) / 32768


# ---- the whole ------------------------------------------------------------------------------------------------------


def evaluate(model, corpus, *, limit=None, text_only=False, workers=2, seed=0, progress=True, **sampling):
    """Ask `model` (an AQAA) the evaluation questions of `corpus`. Returns (rows, summary, facts about the run).

    Raises ValueError if the corpus holds none. sampling: temperature, top_p; the model's defaults without.
    """
    items = questions(corpus, limit)
    if not items:
        raise ValueError(f"{corpus.folder} holds no evaluation questions: make the corpus again")
    started = time.monotonic()
    rows = [
        Row(i.id, i.cell, i.category, i.intent, i.voice, i.text, normalise(i.answer), manner=i.manner or "normal")
        for i in items
    ]
    sounds = [None] * len(rows)
    asked = ask_all(
        model, [recording(corpus, item) for item in items], seed=seed, speak=not text_only,
        progress="asking" if progress else None, **sampling,
    )
    for i, written, sound in asked:
        rows[i].written, rows[i].text, sounds[i] = written, written == rows[i].expected, sound
        rows[i].seconds = 0.0 if sound is None else round(len(sound) / SAMPLE_RATE, 3)
    settings = {name: repr(value) for name, value in {**own_sampling(model), **sampling}.items()}
    facts = {"questions": len(rows), "seed": seed, "sampling": settings}
    if not text_only:
        facts |= _listen(rows, items, sounds, corpus, workers, seed, progress)
    facts["minutes"] = round((time.monotonic() - started) / 60, 2)
    return rows, summarise(rows), facts


def _listen(rows, items, sounds, corpus, workers, seed, progress):
    """All scores of the sound."""
    answers = all_answers() | {row.expected for row in rows}
    judge, unsayable = make_judge(answers, [row.written for row in rows], seed)
    score(rows, sounds, judge, workers=workers, progress=progress)
    spoken = corpus.answers()
    wanted = [item.answer_id for item in items]
    recordings = {name: recording(corpus, spoken[name]) for name in set(wanted) & set(spoken)}
    score_teacher(rows, wanted, recordings, judge, workers=workers, progress=progress)
    texts = {row.expected for row in rows if row.manner in RULES}
    normal = {
        normalise(item.answer): recording(corpus, item)
        for item in spoken.values()
        if item.manner == "normal" and normalise(item.answer) in texts
    }
    score_manner(rows, sounds, normal)
    return {"grammar": len(judge.answers), "answers": len(answers), "unsayable_texts": unsayable}


def main(args):
    """`aqaa bench accuracy`; args: preset, device, seed, corpus, limit (a cell), text_only, workers, json, out."""
    from aqaa import loading
    from aqaa.records import about

    if args.out and not Path(args.out).resolve().parent.is_dir():  # said now, not after minutes of work
        raise FileNotFoundError(f"{args.out} cannot be written, its folder does not exist: make it first")
    model = loading.load(args.preset, device=args.device)
    corpus = evaluation_corpus(args.corpus, args.seed, args.workers)
    rows, summary, facts = evaluate(
        model, corpus, limit=args.limit, text_only=args.text_only, workers=args.workers, seed=args.seed,
        progress=not args.json,
    )
    lines = [
        table(summary),
        f"{facts['questions']} questions in {facts['minutes']} min; in percent ± standard error.",
        "manner: rules over length, f0 level, f0 range and energy; the moods too, they do not measure emotion.",
    ]
    if facts.get("answers", FEWEST_ANSWERS) < FEWEST_ANSWERS:
        lines.append(f"The judge chose among only {facts['answers']} answers: its lenient scores flatter.")
    result = {**about("accuracy", args.device), **facts, "summary": summary}
    report(args, result, lines, {"rows": [asdict(row) for row in rows]})
    return 0
