"""`aqaa bench accuracy`: does the mini answer right, in words and in sound, on new questions?

The text is compared word for word, the sound is given to the judge (lenient and strict), and the
teacher's own recording of the same answer is judged beside it: that is the ceiling. The judge's
grammar holds all answers of the curriculum and every text the model wrote, so that it may hear the
model say something else than its text."""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from zlib import crc32

import numpy as np

from aqaa.batching import ask_all, own_sampling
from aqaa.config import SAMPLE_RATE
from aqaa.corpus import engines, intents, play, speak
from aqaa.corpus import plan as P
from aqaa.corpus.facts import pieces
from aqaa.evaluation import whisper
from aqaa.evaluation.controls import RULES, directions, in_tune
from aqaa.evaluation.judges import Judge, missing_words
from aqaa.lineage.system import Aqaa
from aqaa.tokenizers.text import NOTES, normalise

CELLS = {  # of the corpus, and what they are called in the table
    "seen_seen": "seen wording, seen voice", "seen_new": "seen wording, new voice",
    "new_seen": "new wording, seen voice", "new_new": "new wording, new voice",
    "slot_seen": "seen wording, unseen slot", "read_only": "facts only ever read",
    "known_natural": "seen wording, natural voice", "new_natural": "new wording, natural voice",
    "outside_seen": "outside the world, seen voice",
    "outside_natural": "outside the world, natural voice",
    "follow_seen": "second turn, seen voice", "follow_natural": "second turn, natural voice",
    "apart_seen": "unrelated second turn, seen voice",
    "apart_natural": "unrelated second turn, natural voice",
    "play_seen": "creativity, roles, games, seen voice",
    "play_natural": "creativity, roles, games, natural voice",
    "voice_natural": "how do I sound, natural voice",
    "sing_seen": "singing, seen voice", "sing_natural": "singing, natural voice",
    "unheard": "sound without words",
    "switch_seen": "two manners in a sentence, seen voice",
    "switch_natural": "two manners in a sentence, natural voice",
}  # fmt: skip
# {cell: (the cell whose questions it asks, the one of whose dialogues a first turn stands before)}
APART = {"apart_seen": ("seen_seen", "follow_seen"),
         "apart_natural": ("known_natural", "follow_natural")}  # fmt: skip
METRICS = {  # of a Row, and their heading
    "text": "text", "lenient": "spoken", "strict": "strict", "agrees": "agrees",
    "manner_ok": "manner", "teacher_lenient": "ceiling", "teacher_strict": "c.strict",
}  # fmt: skip
HEARD = {"lenient": "heard", "strict": "heard_strict"}  # how the judge listens, and its sentence
UNDERSTANDING = "Voice Understanding"
OPEN = 100  # answers that the open judge hears, at two seconds each
FEWEST_ANSWERS = 500  # a smaller grammar makes guessing easy


@dataclass
class Row:
    """One question asked. Scores are None where they do not apply or were not measured."""

    id: str
    cell: str
    category: str
    intent: str
    voice: str
    question: str
    expected: str
    written: str = ""  # the model's text
    confidence: float = 0.0
    heard: str = ""  # by the lenient judge, in the model's sound
    heard_strict: str = ""
    seconds: float = 0.0  # of sound
    manner: str = "normal"  # or several: "slow fast", "do mi sol"
    text: bool | None = None  # the text is the expected one
    lenient: bool | None = None  # the judge hears the expected words
    strict: bool | None = None
    agrees: bool | None = None  # the lenient judge hears the model's own text
    manner_ok: bool | None = None  # right direction, against the teacher's normal one; in tune
    teacher_lenient: bool | None = None  # the same of the teacher's recording
    teacher_strict: bool | None = None


def measure(model, corpus, limit=None, text_only=False, seed=0, workers=2, progress=False):
    """Ask an AQAA the evaluation questions of `corpus`, `limit` of each cell at most. Returns facts
    about the run, "summary" (see `summarise`) and "rows" (Rows as dicts). Raises ValueError if the
    corpus holds no questions."""
    items = questions(corpus, limit)
    if not items:
        raise ValueError(f"{corpus.folder} holds no evaluation questions: make the corpus again")
    started = time.monotonic()
    rows = [Row(i.id, i.cell, i.category, i.intent, i.voice, i.text, normalise(i.answer),
                manner=" ".join(how for _, how in pieces(i.answer, i.manner or "normal")))
            for i in items]  # fmt: skip
    sounds = [None] * len(rows)
    wavs, label = [recording(corpus, item) for item in items], "asking" if progress else None
    before = [history(model, corpus, item, seed) for item in items]
    given = ask_all(model, wavs, histories=before, seed=seed, speak=not text_only, progress=label)
    for i, written, sound, sure in given:
        rows[i].written, rows[i].text = written, written == rows[i].expected
        rows[i].confidence = round(sure, 4)
        sounds[i] = sound
        rows[i].seconds = 0.0 if sound is None else round(len(sound) / SAMPLE_RATE, 3)
    settings = {name: repr(value) for name, value in own_sampling().items()}
    facts = {"questions": len(rows), "seed": seed, "sampling": settings}
    if not text_only:
        facts |= score_sound(rows, items, sounds, corpus, workers, seed, progress)
        if not whisper.missing():
            facts["open_judge"] = open_judge(rows, items, sounds, corpus, seed)
    minutes = round((time.monotonic() - started) / 60, 2)
    return {**facts, "minutes": minutes, "summary": summarise(rows),
            "rows": [asdict(row) for row in rows]}  # fmt: skip


def questions(corpus, limit=None):
    """Evaluation questions, `limit` of each cell at most, spread evenly over the cell."""
    cells = {cell: corpus.items(split="eval", cell=APART.get(cell, (cell,))[0]) for cell in CELLS}
    return [replace(item, cell=cell)
            for cell, items in cells.items() for item in P.spread(items, limit)]  # fmt: skip


def history(model, corpus, item, seed=0):
    """What was said before a question, () of most: the first one of a second question is spoken to
    the model, which writes down what it hears and what it answers, right or not."""
    if item.cell in APART:
        others = corpus.items(split="eval", cell=APART[item.cell][1])
        item = others[crc32(item.id.encode()) % len(others)] if others else item
    if item.role != "follow":
        return ()
    return Aqaa(model, seed).before([recording(corpus, corpus.before(item))])


def score_sound(rows, items, sounds, corpus, workers, seed, progress):
    """Fill in every score of `sounds`, (N,) float at 16 kHz of each row; facts about the judge."""
    answers = all_answers() | {row.expected for row in rows}
    judge, unsayable = make_judge(answers, [row.written for row in rows], seed)
    spoken = corpus.answers()
    # The teacher's answers repeat among questions: each is heard once.
    known = sorted({item.answer_id for item in items} & set(spoken))
    recordings = [recording(corpus, spoken[name]) for name in known]
    for mode, heard in HEARD.items():
        strict, label = mode == "strict", progress and f"judge, {mode}"
        sentences = judge.hear_all(sounds, strict, workers, label)
        for row, sentence in zip(rows, sentences, strict=True):
            setattr(row, heard, sentence)
            setattr(row, mode, sentence == row.expected)
            if not strict:
                row.agrees = bool(sentence) and sentence == row.written
        label = progress and f"judge, teacher {mode}"
        taught = dict(zip(known, judge.hear_all(recordings, strict, workers, label), strict=True))
        for row, item in zip(rows, items, strict=True):
            if item.answer_id in taught:
                setattr(row, f"teacher_{mode}", taught[item.answer_id] == row.expected)
    texts = {row.expected for row, item in zip(rows, items, strict=True) if item.manner in RULES}
    normal = {normalise(item.answer): item for item in spoken.values() if item.manner == "normal"}
    normal = {text: recording(corpus, normal[text]) for text in texts & set(normal)}
    for row, item, sound in zip(rows, items, sounds, strict=True):
        parts = pieces(item.answer, item.manner)
        if item.manner in NOTES:
            row.manner_ok = sound is not None and in_tune([how for _, how in parts], sound)
        elif item.manner in RULES and row.expected in normal:
            row.manner_ok = directions(parts, sound, normal[row.expected], judge)
    return {"grammar": len(judge.answers), "answers": len(answers), "unsayable_texts": unsayable}


def open_judge(rows, items, sounds, corpus, seed):
    """{"answers", "teacher"}: word error that a judge without a list of answers finds in some of
    the `sounds`, against the model's own text, and in the teacher's recordings of what was wanted.
    """
    chosen = [i for i, row in enumerate(rows) if row.written and sounds[i] is not None]
    chosen, spoken = P.spread(chosen, OPEN), corpus.answers()
    taught = [spoken[name] for name in sorted({items[i].answer_id for i in chosen} & set(spoken))]
    recordings = [recording(corpus, item) for item in taught]
    said = [normalise(rows[i].written) for i in chosen]
    wanted = [normalise(item.text) for item in taught]
    return {"answers": whisper.judged(said, [sounds[i] for i in chosen], seed),
            "teacher": whisper.judged(wanted, recordings, seed)}  # fmt: skip


def make_judge(answers, written, seed=0):
    """(Judge, number of texts left out): its grammar holds both, its bigrams the answers alone. A
    text with a word that the dictionary lacks cannot be heard: it is left out and never agrees."""
    answers = {normalise(answer) for answer in answers}
    others = {normalise(text) for text in written} - answers - {""}
    unknown = set(missing_words(others))
    sayable = {text for text in others if not unknown & set(text.split())}
    return Judge(answers | sayable, bigrams=answers, seed=seed), len(others - sayable)


def share(values):
    """{"n", "share", "error"} of booleans, None left out. error: the standard error with two
    successes and two failures more (Agresti & Coull 1998): a perfect score of few is not exact."""
    values = [bool(value) for value in values if value is not None]
    if not values:
        return {"n": 0, "share": None, "error": None}
    n, right = len(values), sum(values)
    adjusted = (right + 2) / (n + 4)
    error = float(np.sqrt(adjusted * (1 - adjusted) / (n + 4)))
    return {"n": n, "share": right / n, "error": error}


def summarise(rows):
    """{group: {metric: share}} for all rows, each cell, each category, new voices, each manner."""
    groups = {"all": rows}
    groups |= {name: [row for row in rows if row.cell == cell] for cell, name in CELLS.items()}
    for name in sorted({row.category for row in rows}):
        groups[name] = [row for row in rows if row.category == name]
    heard = groups.get(UNDERSTANDING, ())
    groups[f"{UNDERSTANDING}, new voices"] = [row for row in heard if row.cell.endswith("_new")]
    groups |= {f"manner: {name}": [row for row in rows if row.manner == name] for name in RULES}
    return {name: {metric: share(getattr(row, metric) for row in members) for metric in METRICS}
            for name, members in groups.items() if members}  # fmt: skip


def table(result):
    """A result as lines of text: percent and standard error of each group."""
    summary = result["summary"]
    width = max(map(len, summary)) + 1
    lines = [f"{'':{width}}    n" + "".join(f"{heading:>12}" for heading in METRICS.values())]
    for name, scores in summary.items():
        n = max(entry["n"] for entry in scores.values())
        cells = "".join(f"{_percent(entry):>12}" for entry in scores.values())
        lines.append(f"{name:<{width}}{n:5}{cells}")
    facts = f"{result['questions']} questions in {result['minutes']} min"
    lines += [f"{facts}; in percent ± standard error.", "manner: rules over length, f0 level, f0 "
              "range and energy; the moods too, they do not measure emotion."]  # fmt: skip
    if (few := result.get("answers", FEWEST_ANSWERS)) < FEWEST_ANSWERS:
        lines.append(f"The judge chose among only {few} answers: its lenient scores flatter.")
    return "\n".join(lines)


def _percent(entry):
    known = entry["share"] is not None
    return f"{100 * entry['share']:.1f} ±{100 * entry['error']:.1f}" if known else "-"


def evaluation_corpus(folder, seed=0, workers=2):
    """The questions of the corpus in `folder`, also while it is growing; without any, those for
    evaluation and their answers are spoken into `evaluation` there. Interrupted speaking goes on.
    """
    places = speak.places(folder)
    if "questions" in places:
        return speak.Corpus(folder)
    place = Path(folder) if places.keys() == {""} else Path(folder) / "evaluation"
    corpus = speak.Corpus(place) if (place / "plan.json").exists() else None
    if corpus and corpus.complete:
        return corpus
    items = P.plan(seed=seed)
    asked = P.asked_in(items, "eval")
    joined = play.joined(seed=seed)
    more = [item for item in joined if item.split == "eval" and item.role != "answer"]
    lacks = engines.absent({item.voice for item in more})
    more = [item for item in more if engines.of([item.voice])[0] not in lacks]
    wanted = {item.answer_id for item in asked + more}
    # The normal form of a manner's answer is the reference that the manner is measured against.
    texts = {normalise(item.answer) for item in asked + more if item.manner in RULES}
    answers = [item for item in items + joined if item.role == "answer"]
    answers = [item for item in answers if item.answer_id in wanted
               or item.manner == "normal" and item.answer in texts]  # fmt: skip
    planned = answers + asked + more
    if corpus and corpus.heads[""]["hash"] != speak.plan_hash(planned):
        return corpus
    return speak.speak(planned, place, workers)


def all_answers():
    """Every text that the curriculum may want to hear, but stories: each has words of its own."""
    known = {fact.answer for intent in intents.INTENTS.values() for fact in intent.facts}
    games = [rows for name, rows in play.facts().items() if name != "story"]
    return known | {fact.answer for rows in games for fact in rows}


def recording(corpus, item):
    """Its samples as (N,) float32."""
    return corpus.wav(item).astype(np.float32) / 32768
