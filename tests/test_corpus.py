"""The spoken corpus: whole shards, resumable, repeatable; acoustic labels measured on the sound.

Everything is tried with the speaker of tones; where the synthesizers are installed, once more with them.
"""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from aqaa import files
from aqaa.corpus import degrade, engines, parts
from aqaa.corpus import plan as P
from aqaa.corpus import speak as K
from aqaa.corpus import voices as V
from aqaa.files import ModelError
from tests import tones

SPEAKERS = ["tones", "engines"] if tones.ENGINES else ["tones"]


def take_over(patch, speaker):
    """Small shards, spoken by `speaker`."""
    patch.setattr(K, "PER_SHARD", 16)
    if speaker == "tones":
        tones.install(patch)


def some_items():
    """A few Items of each role; none of the HTS voice, whose model takes long to load."""
    planned = [item for item in P.plan(0.001) if "hts" not in item.voice]
    counts = {"answer": 14, "question": 22, "generic": 6}
    return [item for role, count in counts.items() for item in [i for i in planned if i.role == role][:count]]


def speak(items, folder):
    return K.speak(items, folder, workers=1, progress=False)


@pytest.fixture(scope="module", params=SPEAKERS)
def spoken(request, tmp_path_factory):
    """(items, folder, Corpus, name of the speaker)"""
    items, folder = some_items(), tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        take_over(patch, request.param)
        return items, folder, speak(items, folder), request.param


def test_everything_planned_is_spoken_and_sounds(spoken):
    items, _, corpus, _ = spoken
    assert corpus.complete and [i.id for i in corpus.items()] == [i.id for i in items]
    for item in corpus.items():
        wav = corpus.wav(item)
        assert wav.dtype == np.int16 and len(wav) == item.length and 0.5 < len(wav) / 16_000 < 12
        assert degrade.rms(wav / 32768) > 0.005 and item.phones and item.rate > 0
        assert item.role != "answer" or len(wav) % 1920 == 0


def test_filters_and_answers(spoken):
    corpus = spoken[2]
    assert {i.role for i in corpus.items(role="answer")} == {"answer"}
    assert all(i.cell == "new_new" for i in corpus.items(split="eval", cell="new_new"))
    assert all(corpus.answers()[i.answer_id] is i for i in corpus.items(role="answer"))


def test_the_same_item_always_sounds_the_same(spoken, monkeypatch, tmp_path):
    items, _, corpus, speaker = spoken
    take_over(monkeypatch, speaker)
    few = items[:2] + items[20:24]
    again = speak(few, tmp_path)
    for item, twin in zip(again.items(), [corpus.items()[items.index(item)] for item in few]):
        assert np.array_equal(again.wav(item), corpus.wav(twin))
        assert (item.voice, item.f0, item.rate, item.spread) == (twin.voice, twin.f0, twin.rate, twin.spread)


def test_an_interrupted_shard_is_spoken_again_exactly(spoken, monkeypatch):
    items, folder, corpus, speaker = spoken
    take_over(monkeypatch, speaker)
    npy, jsonl = K._names(folder, 1)
    before, lines = npy.read_bytes(), jsonl.read_bytes()
    untouched = K._names(folder, 0)[0].stat().st_mtime_ns
    jsonl.unlink()
    npy.unlink()  # a reader may still look into the old file
    npy.write_bytes(b"half")
    assert not K.Corpus(folder).complete
    again = speak(items, folder)
    assert again.complete and npy.read_bytes() == before and jsonl.read_bytes() == lines
    assert K._names(folder, 0)[0].stat().st_mtime_ns == untouched
    assert not list(folder.glob(".*.part"))


def test_scratch_folders_of_killed_runs_are_swept(spoken, monkeypatch, tmp_path):
    """A process that was killed left its folder, others are in use or of other things."""
    items, folder, _, speaker = spoken
    take_over(monkeypatch, speaker)
    monkeypatch.setattr(files, "MEMORY", str(tmp_path))
    machine, dead = files.process_tag()[:8], subprocess.Popen(["true"])
    dead.wait()
    gone = [tmp_path / f"aqaa-{machine}-{dead.pid}-{name}" for name in ("a1", "b2", "c3")]
    stay = [tmp_path / name for name in (f"aqaa-{files.process_tag()}-d4", f"aqaa-00000000-{dead.pid}-e5", "aqaa-f6")]
    for place in gone + stay:
        place.mkdir()
        (place / "0.wav").write_bytes(bytes(99))
    half = folder / f".shard_0001.npy.{machine}-{dead.pid}.0a1b2c3d.part"
    half.write_bytes(b"half")
    assert speak(items, folder).complete
    assert sorted(tmp_path.iterdir()) == sorted(stay) and not half.exists()


@pytest.mark.parametrize("name, data", [
    ("plan.json", b'{"hash'), ("plan.json", b""), ("shard_0000.jsonl", b'{"id": 1'), ("shard_0000.jsonl", b"\xff"),
    ("shard_0000.npy", b"half"), ("shard_0000.npy", b""),
])  # fmt: skip
def test_a_torn_corpus_is_one_sentence(spoken, tmp_path, name, data):
    folder = shutil.copytree(spoken[1], tmp_path / "corpus")
    (folder / name).write_bytes(data)
    with pytest.raises(ModelError, match=f"{name} is cut short or damaged .*: remove it.*`aqaa train corpus --resume`"):
        corpus = K.Corpus(folder)
        corpus.wav(corpus.items()[0])


def test_a_changed_plan_is_refused(spoken, monkeypatch):
    items, folder, _, speaker = spoken
    take_over(monkeypatch, speaker)
    with pytest.raises(ValueError, match="another plan"):
        speak(items[:-1], folder)


def test_resume_must_be_wanted(spoken, tmp_path):
    shutil.copytree(spoken[1], tmp_path / "open")
    with pytest.raises(ValueError, match="open already holds shards"):
        parts.main(tmp_path, resume=False)


@pytest.mark.parametrize("want", V.CLASSES)
def test_a_question_is_said_again_until_it_sounds_as_wanted(monkeypatch, tmp_path, want):
    tones.install(monkeypatch)
    asked = [item for item in P.plan(0.001) if item.want == want and item.split in ("train", "eval")][:3]
    assert asked
    for item in speak(asked, tmp_path).items():
        assert V.belongs(vars(item), want)
        planned = next(one for one in asked if one.id == item.id)
        assert (item.voice in V.TRAINING) == (planned.voice in V.TRAINING)


def test_a_class_that_cannot_be_reached_is_one_sentence(monkeypatch, tmp_path):
    tones.install(monkeypatch)
    monkeypatch.setitem(V.CLASSES, "fast", {"rate": [50, 99]})
    asked = [item for item in P.plan(0.001) if item.want == "fast"][:1]
    with pytest.raises(RuntimeError, match="became fast in 60 tries"):
        speak(asked, tmp_path)


def test_an_engine_that_says_nothing_is_named(monkeypatch, tmp_path):
    tones.install(monkeypatch)
    monkeypatch.setattr(engines, "synthesize", lambda jobs: [(np.zeros(16_000, np.float32), 16_000) for _ in jobs])
    answer = next(item for item in P.plan(0.001) if item.role == "answer")
    with pytest.raises(RuntimeError, match=f"{V.ANSWER_VOICE} said nothing"):
        speak([answer], tmp_path)


def test_missing_engine_says_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(engines.shutil, "which", lambda name: None if name == "festival" else name)
    with pytest.raises(FileNotFoundError, match="festival not found.*apt-get install"):
        K.speak(P.plan(0.001), tmp_path)


def test_no_corpus_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no corpus"):
        K.Corpus(tmp_path)


@pytest.mark.parametrize("scale", [0.001, 0.02])
def test_a_miniature_speaks_every_answer_that_its_training_asks_for(scale):
    items = P.plan(scale)
    spoken = {item.id for item in items if item.role == "answer"}
    assert {item.answer_id for item in items if item.role == "question" and item.split == "train"} <= spoken
    assert len({item.id for item in items}) == len(items)


def test_phones_are_read_line_by_line(monkeypatch):
    """flite's front end prints a line a text, pauses included; another number of lines means it has changed."""

    given = []

    def run(command, **_):
        given.extend(Path(command[-1]).read_text(encoding="utf-8").split("\n\n"))
        return SimpleNamespace(stdout="pau hh aw pau\npau n aw pau\npau dh ih s pau\n")

    monkeypatch.setattr(K.subprocess, "run", run)
    assert K.phones_of(["how", "now"]) == {"how": ["hh", "aw"], "now": ["n", "aw"]}
    assert given[:2] == ["how.", "now."] and len(given) == 3 and len(given[2].split()) > 1
    with pytest.raises(RuntimeError, match="2 utterances of 1 texts"):
        K.phones_of(["how"])


if tones.ENGINES:

    def test_phones_follow_the_text():
        texts = ["the opposite of hot is cold", "seven plus five"]
        phones = K.phones_of(texts)
        assert phones["seven plus five"] == "s eh v ax n p l ah s f ay v".split()
        assert "pau" not in phones[texts[0]] and len(phones) == 2

    @pytest.mark.parametrize("texts", [["yes"], ["the sun is warm", "yes"], ["oh", "no", "yes"]])
    def test_a_text_of_one_word_has_its_phones_wherever_it_stands(texts):
        phones = K.phones_of(texts)
        assert list(phones) == texts and phones["yes"] == ["y", "eh", "s"] and all(phones.values())


def test_more_shards_than_a_worker_may_speak_are_all_spoken(monkeypatch, tmp_path):
    """Workers are renewed on the way; a pool that renewed its own stopped for good after eight shards."""
    items = [item for item in P.plan() if item.voice == "espeak:en-us+m1" and not item.want][:6]
    if lacks := K.engines.absent(["espeak:en-us", "flite:slt"]):
        pytest.skip(f"{lacks} not found: `{K.engines.DEBIAN}` brings it")
    monkeypatch.setattr(K, "PER_SHARD", 1)
    monkeypatch.setattr(K, "ROUND", 2)
    corpus = K.speak(items, tmp_path, workers=2, progress=False)
    assert corpus.complete and [item.id for item in corpus.items()] == [item.id for item in items]
