"""`aqaa bench people FOLDER`: another ear. Recordings of your own: what of them is understood?

The folder holds sound files and questions.txt, a line a file: `file: what is said -> right answer`
(the answer may be left out: a question of the curriculum brings its own), or a manifest.json, a
list of {"file", "text"}, of which entries with a "split" count only if it is "evaluation". Reported
for each file: the ear (phones and words it heard), the mind (answer, confidence, right or not) and
the mouth (what an outside recogniser hears in the spoken answer).

`examine(model, "mine.wav", "what is the capital of france")` does it for one recording: printed, it
says which of the three failed."""

import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np

from aqaa import audio
from aqaa.corpus import engines, people, play, speak, wider
from aqaa.corpus.facts import number
from aqaa.corpus.plan import plan
from aqaa.evaluation import whisper
from aqaa.files import reading
from aqaa.sound_headers import AudioError
from aqaa.tokenizers.phones import error_rate
from aqaa.tokenizers.text import normalise

LIST = "questions.txt"
LINE = re.compile(r"(?P<file>[^:]+):(?P<text>[^>]*?)(->(?P<answer>.*))?")
MISHEARD = 25.0  # percent of an answer's words: an outside judge errs too
VERDICTS = {
    None: "None of the three failed.",
    "ear": "The ear failed: other words were heard than were said.",
    "mind": "The mind failed: the ear did its part, but the answer is not right.",
    "mouth": "The mouth failed: an outside judge hears other words than were written.",
}
EVALUATION = "evaluation"  # the split that counts, as does an entry without one
KINDS = ("right", "honest", "wrong", "not known")  # honest: it says that it does not know


def listed(folder):
    """([(path, text, answer or None), …], faults) of a folder. Raises ValueError or ModelError
    where there is no list."""
    path = Path(folder) / LIST
    if not path.is_file():
        if (Path(folder) / "manifest.json").is_file():
            return _of_manifest(Path(folder))
        raise ValueError(f"{folder} holds no {LIST}: write one, a line a recording, such as "
                         "`hello.wav: what is the capital of france -> the capital of france is "
                         "paris`.")
    rows, faults = [], []
    with reading(path, "write it anew, as plain text in UTF-8"):
        lines = path.read_text(encoding="utf-8").splitlines()
    for place, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = LINE.fullmatch(line.strip())
        if not found or not normalise(found["text"]):
            faults.append(f"line {place} of {path} is no `file: what is said`: {line.strip()!r}")
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


def _of_manifest(folder):
    """The same of a manifest.json, which names no answers."""
    rows, faults = [], []
    for place, entry in enumerate(people.manifest(folder), 1):
        try:
            if entry.get("split", EVALUATION) != EVALUATION:
                continue
            sound = folder / entry["file"]
            text = entry["text"] if "text" in entry else number(int(entry["digit"]))
            rows.append((sound, normalise(text), None))
        except (ValueError, LookupError, TypeError, AttributeError):
            faults.append(f"entry {place} of {folder}/manifest.json is no file with its text: "
                          f"{str(entry):.60}")  # fmt: skip
    faults += [f"{path} is named in manifest.json but is not there."
               for path, *_ in rows if not path.is_file()]  # fmt: skip
    rows = [row for row in rows if row[0].is_file() and row[1]]
    if not rows:
        raise ValueError(f"{folder}/manifest.json names no recording for evaluation that is there: "
                         f"{(faults or ['see its splits'])[0]}")  # fmt: skip
    return rows, faults


@dataclass(frozen=True)
class Examined:
    """What became of one recording: texts in plain words, errors in percent, None: not known.

    said; heard: by the ear, as words; phones: the same as names, phone_error of them; answer: of
    the mind, its confidence and how it is judged, one of KINDS; known: is there a right answer to
    judge it by; mouth: what the judge hears in it."""

    said: str | None
    heard: str
    phones: list | None
    phone_error: float | None
    answer: str
    confidence: float
    judged: str
    known: bool
    mouth: str | None

    @property
    def errors(self):
        """{part: percent wrong} of the parts that could be judged: of words, or of the answer."""
        found = {"ear": _word_error(self.said, self.heard)}
        found["mind"] = 100.0 * (self.judged != "right") if self.known else None
        found["mouth"] = _word_error(self.answer, self.mouth)
        return {part: error for part, error in found.items() if error is not None}

    @property
    def failed(self):
        """"ear", "mind" or "mouth", the first that did not do its part; None if all did, as far as
        they could be judged. A question that is misheard but answered rightly was heard."""
        if self.judged == "honest":
            return None
        if self.judged != "right" and self.errors.get("ear"):
            return "ear"
        if self.errors.get("mind"):
            return "mind"
        return "mouth" if self.errors.get("mouth", 0.0) > MISHEARD else None

    def __str__(self):
        phones = "" if self.phone_error is None else f" (phone error {self.phone_error:.0f} %)"
        mouth = f"not judged: {whisper.INSTALL}" if self.mouth is None else self.mouth
        return "\n".join([
            self.said or "(nobody says what was said)", f"  ear:   {self.heard}{phones}",
            f"  mind:  {self.answer} ({self.confidence:.2f}, {self.judged})", f"  mouth: {mouth}",
            f"  {VERDICTS[self.failed]}",
        ])  # fmt: skip

    __repr__ = __str__


def _word_error(wanted, found):
    if wanted is None or found is None:
        return None
    return round(whisper.word_error([(wanted, found)])[0], 1)


def examine(model, sound, said=None, answer=None, seed=0):
    """Examined of one recording (a path, or (samples, rate)). said: its words; answer: the right
    one, which the curriculum brings for its own questions. Raises AudioError."""
    said = normalise(said) if said else None
    right = {normalise(answer)} if answer else known_answers().get(said)
    ids = model.listen(sound)
    heard = normalise(model.transcribe(ids))
    given = model.ask(ids, seed=seed)
    written = normalise(given.text)
    judged = "not known" if right is None else "right" if written in right else "wrong"
    if right is None and written in wider.HONEST:
        judged = "honest"
    phones = error = mouth = None
    if model.heads is not None:
        phones = [phone.name for phone in model.phones(sound)["linguistic"]]
    if said and phones is not None and not engines.absent(["flite:slt"]):
        error = round(error_rate([phones], [speak.phones_of([said])[said]]), 1)
    if not whisper.missing():
        mouth = whisper.heard(audio.resample(given.audio, given.sample_rate))
    confidence = round(given.confidence, 4)
    known = right is not None
    return Examined(said, heard, phones, error, written, confidence, judged, known, mouth)


@cache
def known_answers():
    """{question: answers that are right} of the curriculum, in every wording of its plan."""
    answers, items = {}, plan() + play.joined()
    for item in (one for one in items if one.role == "question"):
        if not item.want and item.category != wider.HONESTY:  # the answer lies in the words
            answers.setdefault(normalise(item.text), set()).add(normalise(item.answer))
    return answers


def measure(model, target, seed=0, progress=True):
    """Ask an AQAA what the recordings of folder `target` ask. Returns counts, word errors, "faults"
    and "rows". Raises ValueError or ModelError for a folder without a list."""
    listing, faults = listed(target)
    rows = []
    for path, text, answer in listing:
        try:
            found = examine(model, path, text, answer, seed)
        except AudioError as fault:
            faults.append(str(fault))
            continue
        row = {"file": path.name, **asdict(found), "failed": found.failed}
        del row["phones"], row["known"]  # long, and told by "judged"
        rows.append(row)
        if progress:
            print(f"{path.name}: {found}", flush=True)
    error, count = whisper.word_error([(row["said"], row["heard"]) for row in rows])
    result = {"recordings": len(rows), "words": count, "word_error": round(error, 1)}
    result |= {kind: sum(row["judged"] == kind for row in rows) for kind in KINDS}
    if spoken := [row for row in rows if row["mouth"] is not None]:
        error, count = whisper.word_error([(row["answer"], row["mouth"]) for row in spoken])
        result |= {"mouth_word_error": round(error, 1), "mouth_words": count}
    if measured := [row["phone_error"] for row in rows if row["phone_error"] is not None]:
        result["phone_error"] = round(float(np.mean(measured)), 1)
    return {**result, "faults": faults, "rows": rows}


def table(result):
    """The sums as text; faults below."""
    lines = ["", f"{result['recordings']} recordings, {result['words']} words said: "
             f"{result['word_error']:.1f} % of them misheard"]  # fmt: skip
    if "phone_error" in result:
        lines.append(f"phone error of the linguistic tokenizer {result['phone_error']:.1f} %")
    lines.append(", ".join(f"{result[kind]} {kind}" for kind in KINDS))
    failed = [row["failed"] for row in result["rows"]]
    counts = (f"{part} {failed.count(part)}" for part in ("ear", "mind", "mouth"))
    lines.append(f"failed: {', '.join(counts)}")
    if "mouth_word_error" in result:
        lines.append(f"of {result['mouth_words']} words answered, "
                     f"{result['mouth_word_error']:.1f} % are not heard as written")  # fmt: skip
    return "\n".join(lines + [f"left out: {fault}" for fault in result["faults"]])
