"""`aqaa bench people FOLDER`: another ear. Recordings of your own: what of them is understood?

The folder holds sound files and questions.txt, a line a file: `file: what is said -> right answer`
(the answer may be left out: a question of the curriculum brings its own). Reported for each file:
the ear (phones and words it heard), the mind (answer, confidence, right or not) and the mouth (what
an outside recogniser hears in the spoken answer)."""

import re
from pathlib import Path

import numpy as np

from aqaa import audio
from aqaa.corpus.plan import asked_in, plan
from aqaa.evaluation import whisper
from aqaa.files import reading
from aqaa.sound_headers import AudioError
from aqaa.tokenizers.phones import error_rate
from aqaa.tokenizers.text import normalise

LIST = "questions.txt"
LINE = re.compile(r"(?P<file>[^:]+):(?P<text>[^>]*?)(->(?P<answer>.*))?")
KINDS = ("right", "wrong", "not known")


def listed(folder):
    """([(path, text, answer or None), …], faults) of a folder. Raises ValueError or ModelError
    where there is no list."""
    path = Path(folder) / LIST
    if not path.is_file():
        raise ValueError(f"{folder} holds no {LIST}: write one, a line a recording, such as "
                         "`hello.wav: what is the capital of france -> the capital of france is "
                         "paris`.")
    rows, faults = [], []
    with reading(path, "write it anew, as plain text in UTF-8"):
        lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = LINE.fullmatch(line.strip())
        if not found or not normalise(found["text"]):
            faults.append(f"line {number} of {path} is no `file: what is said`: {line.strip()!r}")
            continue
        sound = Path(folder) / found["file"].strip()
        if not sound.is_file():
            faults.append(f"{sound} is named in {LIST} but is not there.")
            continue
        answer = normalise(found["answer"]) if found["answer"] else None
        rows.append((sound, normalise(found["text"]), answer))
    if not rows:
        why = (faults or ["it is empty"])[0]
        raise ValueError(f"{path} names no recording that is there: {why}")
    return rows, faults


def known_answers():
    """{question: answers that are right} of the curriculum, in every wording of its plan."""
    answers = {}
    for split in ("train", "dev", "eval"):
        for item in asked_in(plan(), split):
            if not item.want:  # the answer lies in the words
                answers.setdefault(normalise(item.text), set()).add(normalise(item.answer))
    return answers


def measure(model, target, seed=0, progress=True):
    """Ask an AQAA what the recordings of folder `target` ask. Returns counts, word errors, "faults"
    and "rows". Raises ValueError or ModelError for a folder without a list."""
    listing, faults = listed(target)
    known, rows = known_answers(), []
    phones_of = _phones_of(model)
    for path, text, answer in listing:
        try:
            row = _row(model, path, text, {answer} if answer else known.get(text), phones_of, seed)
        except AudioError as fault:
            faults.append(str(fault))
            continue
        rows.append(row)
        if progress:
            print(_told(row), flush=True)
    error, count = whisper.word_error([(row["said"], row["heard"]) for row in rows])
    result = {"recordings": len(rows), "words": count, "word_error": round(error, 1)}
    result |= {kind: sum(row["judged"] == kind for row in rows) for kind in KINDS}
    if spoken := [row for row in rows if row["mouth"] is not None]:
        error, count = whisper.word_error([(row["answer"], row["mouth"]) for row in spoken])
        result |= {"mouth_word_error": round(error, 1), "mouth_words": count}
    if measured := [row for row in rows if row["phone_error"] is not None]:
        mean = np.mean([row["phone_error"] for row in measured])
        result["phone_error"] = round(float(mean), 1)
    return {**result, "faults": faults, "rows": rows}


def _phones_of(model):
    """The function that spells a text in phones; None without phone heads or without flite."""
    from aqaa.corpus import engines, speak

    return None if model.heads is None or engines.absent(["flite:slt"]) else speak.phones_of


def _row(model, path, text, right, phones_of, seed):
    heard = normalise(model.transcribe(str(path)))
    answer = model.ask(str(path), seed=seed)
    written = normalise(answer.text)
    judged = "not known" if right is None else "right" if written in right else "wrong"
    error = None
    if phones_of:
        wanted = phones_of([text])[text]
        ear = [phone.name for phone in model.phones(str(path))["linguistic"]]
        error = round(error_rate([ear], [wanted]), 1)
    mouth = None
    if not whisper.missing():
        mouth = whisper.heard(audio.resample(answer.audio, answer.sample_rate))
    return {
        "file": path.name, "said": text, "heard": heard, "phone_error": error, "answer": written,
        "confidence": round(answer.confidence, 4), "judged": judged, "mouth": mouth,
    }  # fmt: skip


def _told(row):
    phones = "" if row["phone_error"] is None else f" (phone error {row['phone_error']:.0f} %)"
    mouth = "" if row["mouth"] is None else f"\n  mouth: {row['mouth']}"
    return (f"{row['file']}: {row['said']}\n  ear:   {row['heard']}{phones}\n  mind:  "
            f"{row['answer']} ({row['confidence']:.2f}, {row['judged']}){mouth}")  # fmt: skip


def table(result):
    """The sums as text; faults below."""
    lines = ["", f"{result['recordings']} recordings, {result['words']} words said: "
             f"{result['word_error']:.1f} % of them misheard"]  # fmt: skip
    if "phone_error" in result:
        lines.append(f"phone error of the linguistic tokenizer {result['phone_error']:.1f} %")
    lines.append(", ".join(f"{result[kind]} {kind}" for kind in KINDS))
    if "mouth_word_error" in result:
        lines.append(f"of {result['mouth_words']} words answered, "
                     f"{result['mouth_word_error']:.1f} % are not heard as written")  # fmt: skip
    return "\n".join(lines + [f"left out: {fault}" for fault in result["faults"]])
