"""`aqaa bench people FOLDER`: recordings of one's own, and the open judge of what is answered."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import aqaa
from aqaa import audio, cli
from aqaa.evaluation import folder as F
from aqaa.evaluation import whisper
from aqaa.files import data_folder
from aqaa.tokenizers.text import normalise
from tests.conftest import RATE

QUESTIONS = data_folder() / "questions"


@pytest.fixture(scope="module")
def asked():
    """(name, transcript, answer) of the first shipped question of its world that the mini answers."""
    model, entries = aqaa.load("mini"), json.loads((QUESTIONS / "questions.json").read_text(encoding="utf-8"))
    entry = next(
        one for one in entries if one["cell"] == "seen_seen" and one["manner"] == "normal"
        and normalise(model.ask(QUESTIONS / one["file"], seed=0).text) == one["answer"]
    )  # fmt: skip
    return entry["file"], entry["transcript"], entry["answer"]


@pytest.fixture
def place(tmp_path, asked):
    shutil.copy(QUESTIONS / asked[0], tmp_path / "one.wav")
    shutil.copy(QUESTIONS / asked[0], tmp_path / "two.wav")
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    (tmp_path / F.LIST).write_text(
        f"# mine\none.wav: {asked[1]}\n\ntwo.wav: {asked[1]} -> something else\nbad.wav: hello\n"
        "gone.wav: hello\nwhat\n", encoding="utf-8",
    )  # fmt: skip
    return tmp_path


def test_ear_mind_and_mouth_are_told_and_bad_files_stop_nobody(place, asked, capsys):
    result = F.measure(aqaa.load("mini"), str(place))
    assert result["recordings"] == 2 and result["right"] == 1 and result["wrong"] == 1 and result["not known"] == 0
    one, two = result["rows"]
    assert (one["file"], one["said"], one["answer"]) == ("one.wav", asked[1], asked[2]) and one["judged"] == "right"
    assert two["answer"] == one["answer"] and two["judged"] == "wrong" and 0 <= one["confidence"] <= 1
    assert result["word_error"] == whisper.word_error([(asked[1], row["heard"]) for row in result["rows"]])[0]
    assert [name in " ".join(result["faults"]) for name in ("bad.wav", "gone.wav", "'what'")] == [True] * 3
    told = F.table(result)
    assert one["failed"] in (None, "mouth") and two["failed"] in ("ear", "mind") and "failed: ear " in told
    assert "2 recordings" in told and told.count("left out: ") == 3 and "1 right, 0 honest, 1 wrong" in told
    assert "mind:" in capsys.readouterr().out
    assert (one["mouth"] is None) == bool(whisper.missing())


def examined(**changes):
    good = {"said": "what is two", "heard": "what is two", "phones": None, "phone_error": None, "answer": "two",
            "confidence": 0.9, "judged": "right", "known": True, "mouth": "two"}  # fmt: skip
    return F.Examined(**{**good, **changes})


@pytest.mark.parametrize("changes, failed, errors", [
    ({}, None, {"ear": 0, "mind": 0, "mouth": 0}), ({"mouth": None}, None, {"ear": 0, "mind": 0}),
    ({"heard": "what is too"}, None, {"ear": 33.3, "mind": 0, "mouth": 0}),  # it was understood all the same
    ({"heard": "what is too", "judged": "wrong"}, "ear", {"ear": 33.3, "mind": 100, "mouth": 0}),
    ({"judged": "wrong"}, "mind", {"ear": 0, "mind": 100, "mouth": 0}),
    ({"judged": "not known", "known": False, "said": None}, None, {"mouth": 0}),
    ({"judged": "honest", "known": False, "heard": "what"}, None, {"ear": 66.7, "mouth": 0}),
    ({"mouth": "too"}, "mouth", {"ear": 0, "mind": 0, "mouth": 100}),
])  # fmt: skip
def test_which_of_the_three_failed(changes, failed, errors):
    found = examined(**changes)
    assert found.failed == failed and found.errors == errors
    assert str(found).endswith(F.VERDICTS[failed]) and found.heard in str(found) and repr(found) == str(found)


def test_one_recording_is_examined_as_a_path_and_as_samples(asked, monkeypatch):
    monkeypatch.setattr(whisper, "missing", lambda: ["all"])
    model = aqaa.load("mini")
    found = F.examine(model, QUESTIONS / asked[0], asked[1])  # the curriculum brings the answer
    assert found.known and found.answer == asked[2] and found.judged == "right" and found.errors["mind"] == 0
    assert found.phones and found.mouth is None and found.failed is None and "not judged" in str(found)
    wav, rate = soundfile.read(QUESTIONS / asked[0])
    bare = F.examine(model, (wav, rate))
    assert (bare.said, bare.judged, bare.heard, bare.errors) == (None, "not known", found.heard, {})
    with pytest.raises(aqaa.AudioError):
        F.examine(model, (np.zeros(RATE), RATE))


def test_a_manifest_will_do(place, asked):
    (place / F.LIST).unlink()
    rows = [{"file": f"{name}.wav", "text": text} for name, text in
            (("one", "What is a black hole?"), ("two", asked[1]))]
    (place / "manifest.json").write_text(json.dumps(rows), encoding="utf-8")
    said = [(place / "one.wav", "what is a black hole", None), (place / "two.wav", asked[1], None)]
    assert F.listed(place) == (said, [])
    rows[0]["file"] = "gone.wav"  # one bad entry never stops the others
    rows += [{"file": "one.wav", "text": "x", "split": "train"}, {"text": "no file"}, 7]
    (place / "manifest.json").write_text(json.dumps(rows), encoding="utf-8")
    found, faults = F.listed(place)
    assert found == said[1:]
    assert [words for words in ("entry 4 of", "entry 5 of", "gone.wav is named in manifest.json but is not there.")
            if not any(words in fault for fault in faults)] == [] and len(faults) == 3  # fmt: skip
    for few, words in (([], "names no recording .*see its splits"), ([rows[0]], "gone.wav is named")):
        (place / "manifest.json").write_text(json.dumps(few), encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            F.listed(place)


@pytest.mark.parametrize("content, said", [
    (None, "holds no questions.txt: write one"), ("", "names no recording that is there: it is empty"),
    ("x.wav: hello", "is not there"), (b"\xff\xfe: x", "damaged"), ("x.wav:  ", "is no `file: what is said`"),
])  # fmt: skip
def test_a_folder_without_a_list_is_one_sentence(tmp_path, content, said):
    if content is not None:
        (tmp_path / F.LIST).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said):
        F.listed(tmp_path)


@pytest.mark.parametrize("arguments", [["people"], ["people", "nowhere"], ["codes", "."]])
def test_the_folder_belongs_to_people_alone(arguments, capsys):
    assert cli.main(["bench", *arguments]) in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1


def test_the_curriculum_brings_its_answers():
    known = F.known_answers()
    assert "the capital of france is paris" in known["what is the capital of france"]
    assert all(len(answers) == 1 for question, answers in known.items() if question.startswith("what is "))


@pytest.mark.parametrize("written, plain", [
    ("12-9 is 3.", "twelve minus nine is three"), ("I am counting 7-8-9 -10", "i am counting seven eight nine ten"),
    ("6x3 = 18", "six times three is equal to eighteen"),
    ("It's 250 miles!", "it's two hundred fifty miles"),
    ("A well-known 1,024", "a well known one thousand twenty four"),
    ("3, 4 or 10,000", "three four or ten thousand"), ("$5 & 7%", "dollars five and seven percent"), ("", ""),
])  # fmt: skip
def test_what_whisper_writes_becomes_words(written, plain):
    assert whisper.words(written) == plain


def test_numbers_are_spelled_as_they_grow():
    spelled = [whisper.spelled(n) for n in (0, 21, 100, 101, 999, 1000, 1001, 20_300, 999_999)]
    assert spelled[3:5] == ["one hundred one", "nine hundred ninety nine"] and len(set(spelled)) == 9
    assert spelled[7] == "twenty thousand three hundred"
    assert whisper.spelled(1_000_002) == "one zero zero zero zero zero two"


def test_word_error_counts_words():
    assert whisper.word_error([("a b c d", "a x c"), ("", "")]) == (50.0, 4)
    assert audio.resample(torch.zeros(2400), 24_000).shape == (1600,)  # what an answer at 24 kHz becomes


@pytest.mark.skipif(bool(whisper.missing()), reason="the open judge needs the packages of [judge]")
def test_the_open_judge_hears_a_spoken_question(asked):
    wav, _ = __import__("soundfile").read(QUESTIONS / asked[0])
    assert len(set(whisper.heard(wav).split()) & set(asked[1].split())) >= 3  # an old synthesizer is hard to hear
    assert whisper.heard(np.zeros(16_000)) == ""


def test_a_missing_judge_is_one_sentence(monkeypatch):
    monkeypatch.setattr(whisper.importlib.util, "find_spec", lambda name: None)
    whisper._model.cache_clear()
    with pytest.raises(FileNotFoundError, match="the open judge needs it; run `pip install 'aqaa.judge.'`"):
        whisper.heard(np.ones(100))


def test_a_damaged_judge_is_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "model.bin.part1").write_bytes(b"half")
    monkeypatch.setattr(whisper, "missing", list)
    monkeypatch.setitem(__import__("sys").modules, "faster_whisper", type("M", (), {"WhisperModel": None}))
    spec = type("S", (), {"origin": str(Path(tmp_path, "__init__.py"))})
    monkeypatch.setattr(whisper.importlib.util, "find_spec", lambda name: spec)
    whisper._model.cache_clear()
    with pytest.raises(ValueError, match="damaged or of another version"):
        whisper.heard(np.ones(100))
