"""The part of the corpus that joined last: a score is what is asked for, every note has its slot, natural voices that
ask how they sound can sound so, more wordings ask for known facts, and what is held out stays out."""

import numpy as np
import pytest

from aqaa import options
from aqaa.config import GROUP_SECONDS, SAMPLE_RATE
from aqaa.corpus import engines, natural, play, sing, speak, switches, wider
from aqaa.corpus import intents as C
from aqaa.corpus import voices as V
from aqaa.corpus.facts import pieces
from aqaa.corpus.plan import answer_items
from aqaa.evaluation.controls import in_tune
from aqaa.files import data_folder
from aqaa.tokenizers.text import MANNERS, NOTES, TextTokenizer, normalise, tagged

ITEMS = play.later_plan()
ASKED = [item for item in ITEMS if item.category == "Sing" and item.role == "question"]
HEARD = [item for item in ITEMS if item.want]
MORE = [item for item in ITEMS if item.role in ("question", "follow") and item.category != "Sing" and not item.want]
SUNG = {item.id: item for item in ITEMS if item.role == "answer" and item.manner in NOTES}
DRILLS = [item for item in ITEMS if item.role == "generic"]
SLOT = round(V.NOTE_GROUPS * GROUP_SECONDS * SAMPLE_RATE)


def score(item):
    return [note for _, note in pieces(item.answer, item.manner)]


def hummed(notes, off=0.0):
    """A sound that hums notes in their slots, `off` semitones too high, a gap at the end of each."""
    t = np.arange(SLOT) / SAMPLE_RATE
    tones = [sum(np.sin(2 * np.pi * k * V.NOTES[n].note * 2 ** (off / 12) * t) / k for k in range(1, 9)) for n in notes]
    return np.concatenate([0.1 * tone * (t < 0.4) for tone in tones]).astype(np.float32)


def test_counts_are_those_of_the_table_and_a_miniature_sings_only_what_it_needs():
    for cell, count in sing.SING["cells"].items():
        assert len([item for item in ASKED if item.cell == cell]) == count
    for intent, counts in sing.SING["counts"].items():
        mine = [item for item in ASKED if item.intent == intent and item.split == "train"]
        assert len(mine) == sum(counts.values())
    assert len(DRILLS) == play.PLAY["switch"]["drills"]
    few = play.later_plan(0.001)
    sung = {i.answer_id for i in few if i.role == "answer" and i.manner in NOTES}
    assert sung == {i.answer_id for i in few if i.category == "Sing" and i.role == "question"} and len(few) < 250


def test_the_answer_is_the_score_of_what_is_asked():
    called = {name: note for note, name in sing.NAMES.items() if note != "octave"}
    for item in ASKED:
        answer = SUNG[item.answer_id]
        assert (answer.text, answer.manner) == (item.answer, item.manner) and item.category == "Sing"
        if item.intent == "notes":
            assert score(item) == [called[name] for name in item.slots.values()]
        if item.intent in ("notes", "scale_up", "scale_down"):
            assert normalise(item.answer).split() == [sing.NAMES[note] for note in score(item)]
        if item.intent == "word":
            assert set(normalise(item.answer).split()) == {item.slots["w"]}
            f0 = [V.NOTES[note].note for note in score(item)]
            assert f0 == sorted(f0, reverse=item.slots["d"] == "going down")


def test_training_never_hears_what_evaluation_asks():
    asked, others = ([i for i in ASKED if (i.split == "eval") == new] for new in (True, False))
    assert not {i.core for i in asked} & {i.core for i in others}
    for intent in ("word", "notes"):
        mine, heard = ({i.answer for i in rows if i.intent == intent} for rows in (asked, others))
        assert len(mine) >= 5 and not mine & heard
    assert not {i.voice for i in others} & {*V.NATURAL_HELD_OUT, *V.EVALUATION}
    assert {i.voice for i in asked if i.cell == "sing_natural"} == set(V.NATURAL_HELD_OUT)
    assert all(SUNG[i.answer_id].split == "train" for i in others)
    patterns = C.held_out_patterns()
    assert not [i.text for i in others if any(pattern.search(i.text) for pattern in patterns)]


def test_natural_voices_ask_how_they_sound():
    entry, known = play.PLAY["heard"], {item.id: item for item in answer_items()}
    assert set(entry["voices"]) == set(V.CLASSES) > set(entry["held_out"])
    for item in HEARD:
        new = item.split == "eval"
        assert item.cell == ("voice_natural" if new else "") and item.category == "Voice Understanding"
        assert item.voice in entry["held_out" if new else "voices"][item.want].split()
        assert item.voice in (V.NATURAL_HELD_OUT if new else V.NATURAL)
        assert known[item.answer_id].text == item.answer
        intent = C.INTENTS[item.intent]
        assert item.core in (intent.held_out if new else intent.cores)
        item.part = "later"
        assert not wider.is_copied(item)  # another mouth would sound otherwise
    assert {i.want for i in HEARD if i.split == "train"} == set(V.CLASSES)


def test_more_wordings_ask_for_known_facts():
    known = {item.id: item for item in answer_items() + play.plan() if item.role == "answer"}
    for item in MORE:
        answer = known[item.answer_id]
        assert item.split == "train" and (answer.text, answer.manner) == (item.answer, item.manner)
        assert (item.role == "follow") == bool(wider.turns_before(item))
    patterns = C.held_out_patterns()
    kept = {core for intent in C.INTENTS.values() for core in intent.held_out + intent.dev}
    kept |= {core for table in (wider.WIDER["follow"], play.PLAY["intents"]) for entry in table.values()
             for core in wider.lines_of(entry["wordings"])[1]}  # fmt: skip
    assert not [i.text for i in MORE if any(pattern.search(i.text) for pattern in patterns)]
    assert not {item.core for item in MORE} & kept and not {item.text for item in MORE} & kept
    assert {item.voice for item in MORE} <= {*V.TRAINING, *V.NATURAL}
    for intent in C.INTENTS.values():
        heard = intent.cores + intent.later + intent.more
        assert len(set(heard)) == len(heard) >= (7 if intent.category == "Voice Understanding" else 15), intent.name


def test_one_question_has_one_answer():
    """No wording of one intent, filled, is one of another, nor a known question."""
    answers = {}
    for item in ASKED:
        assert answers.setdefault(item.text, item.answer) == item.answer, item.text
    honest = {item.text for item in wider.plan() if item.category == wider.HONESTY}
    others = {item.text for item in play.plan() if item.role == "question"}
    assert not answers.keys() & (C.bare_questions() | honest | others)


def test_no_id_meets_another():
    ids = [item.id for item in answer_items() + play.joined()]
    assert len(ids) == len(set(ids))


def test_drills_change_their_manner_once_anywhere():
    places = []
    for item in DRILLS:
        (first, one), (rest, other) = pieces(item.text, item.manner)
        assert [one, other] in switches.PAIRS and first and rest and item.is_voiced and item.split == "train"
        places.append(len(first.split()) / len(f"{first} {rest}".split()))
    assert min(places) < 0.3 and max(places) > 0.7
    assert len({normalise(item.text) for item in DRILLS}) > 0.95 * len(DRILLS)


def test_a_note_fills_its_slot_and_is_on_its_pitch():
    for length in (0.1, 0.4, 2.0):  # whatever the engine made of the word
        tone = np.sin(2 * np.pi * 200 * np.arange(int(length * 24_000)) / 24_000).astype(np.float32)
        assert len(V.say_answer(tone, 24_000, "mi")) == SLOT
    assert V.NOTES["octave"].note == pytest.approx(2 * V.NOTES["do"].note)
    assert V.NOTES["sol"].note / V.NOTES["do"].note == pytest.approx(1.5, rel=0.01)
    assert set(V.NOTES) == set(NOTES) and not set(NOTES) & set(MANNERS)


@pytest.mark.skipif(bool(engines.ENGINES["hibari"].missing()), reason="hibari is not installed")
def test_the_answer_voice_sings_in_tune():
    item = next(item for item in SUNG.values() if item.intent == "scale_up")
    parts = pieces(item.text, item.manner)
    sounds = natural.speak_hibari([("heart", words, V.HOW[note]) for words, note in parts])
    wav = np.concatenate([V.say_answer(*sound, note) for sound, (_, note) in zip(sounds, parts, strict=True)])
    assert in_tune(score(item), wav / 32768)


def test_notes_are_measured():
    notes = ["do", "mi", "sol"]
    assert in_tune(notes, hummed(notes)) and in_tune(notes, hummed(notes, 0.7))
    assert not in_tune(notes, hummed(notes, 1.3)) and not in_tune(notes, hummed(notes[::-1]))
    assert not in_tune(notes, hummed(notes[:2])) and not in_tune(notes, hummed([*notes, "do"]))
    assert not in_tune(notes, np.zeros(3 * SLOT, np.float32)) and not in_tune(notes, np.zeros(0, np.float32))


def test_the_shipped_tokenizer_reads_a_score():
    text = TextTokenizer.from_file(data_folder() / "mini" / "tokenizer.json")
    ids = text.encode(tagged("doe (re) ray", "do"))
    assert [i for i in ids if i < 68] == [52, 53]
    assert pieces(text.decode(ids[1:]), "do") == [("doe", "do"), ("ray", "re")]


def test_every_part_of_the_corpus_can_be_asked_for_alone():
    assert tuple(options.COMMANDS["train"]["options"]["--only"]["one_of"]) == speak.PARTS
