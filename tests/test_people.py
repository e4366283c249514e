"""Recordings of people: what is wrong with one is a sentence, and what the model is tested on is never trained on."""

import hashlib
import io
import json
import re

import numpy as np
import pytest
import soundfile

from aqaa import cli
from aqaa.corpus import engines, parts, people, speak
from aqaa.corpus import voices as V
from aqaa.corpus.plan import plan
from aqaa.files import ModelError
from tests import tones

RATES = {"a.wav": 16_000, "b.flac": 44_100, "c.ogg": 48_000, "d.mp3": 8_000, "e.wav": 11_025}


def clip(text, rate, voice="espeak:en-us+m1"):
    """A recording (N,) float32: tones, at any rate."""
    return V.to_16k(tones.say(voice, text, V.Draw()), 16_000, 16_000 / rate)


def write(folder, entries, sounds=None, rates=()):
    """A folder of recordings, each named in `entries` with its text; sounds: bytes or samples for some of them."""
    folder.mkdir(exist_ok=True)
    for entry in entries:
        name, sound = entry["file"], (sounds or {}).get(entry["file"])
        rate = dict(rates).get(name, RATES.get(name, 16_000))
        if isinstance(sound, bytes):
            (folder / name).write_bytes(sound)
        elif (sounds or {}).get(name, True) is not None:
            wav = clip(f"{name} {entry['text']}", rate) if sound is None else sound
            soundfile.write(folder / name, wav, rate)
    (folder / "manifest.json").write_text(json.dumps(entries), encoding="utf-8")
    return folder


def entries(*names, **more):
    return [{"file": name, "text": f"the coffee of {name[0]}", **more} for name in names]


@pytest.fixture
def spoken(monkeypatch):
    tones.install(monkeypatch)
    real = people.play  # recordings are read, not spoken
    monkeypatch.setattr(engines, "synthesize", lambda jobs: real(jobs))


# ---- what is heard --------------------------------------------------------------------------------------------------


def test_every_format_and_rate_is_heard_in_three_renders(tmp_path, spoken):
    folder = write(tmp_path / "cups", entries(*RATES))
    found, faults = people.clips([folder])
    assert not faults and [one.text for one in found] == [f"the coffee of {name[0]}" for name in RATES]
    items = people.plan(found)
    assert len(items) == 3 * len(RATES) == len({item.id for item in items}) == len({item.seed for item in items})
    assert {item.voice for item in items} == {"people:cups"} and {item.role for item in items} == {"people"}
    corpus = speak.speak(items, tmp_path / "corpus", workers=1, progress=False)
    for item in corpus.items(role="people", split="train"):
        wav, own = corpus.wav(item), found[int(item.id[1:]) // 3]
        samples, rate = people.read(own.path)
        assert wav.dtype == np.int16 and 0.6 < len(wav) / 16_000 / (len(samples) / rate) < 2 and item.phones and item.f0
        assert item.slots == {"file": own.path.name} and not item.source  # no path of this machine
    lengths = [item.length for item in corpus.items()]
    assert len(set(lengths)) > len(RATES)  # played at other speeds


def test_renders_stay_in_bounds_and_one_seed_is_one_render(tmp_path, spoken):
    draws = [V.draw_recording(np.random.default_rng(i)) for i in range(200)]
    assert all(0.9 <= draw.playback <= 1.12 and -32 <= draw.gain <= -14 for draw in draws)
    assert 0.2 < np.mean([bool(draw.line) for draw in draws]) < 0.4 and any(draw.room for draw in draws)
    found, _ = people.clips([write(tmp_path / "cups", entries("a.wav"))])
    assert people.plan(found) == people.plan(found) != people.plan(found, seed=1)
    one, two = (speak.speak(people.plan(found), tmp_path / name, workers=1, progress=False) for name in "xy")
    assert all(np.array_equal(one.wav(a), two.wav(b)) for a, b in zip(one.items(), two.items(), strict=True))


def test_only_what_is_for_training_is_heard(tmp_path):
    heard = entries("a.wav", split="train") + entries("b.flac") + entries("d.mp3", split=None)
    listed = heard + entries("c.ogg", split="evaluation") + entries("e.wav", split="Train")
    found, faults = people.clips([write(tmp_path / "cups", listed)])
    assert [one.path.name for one in found] == ["a.wav", "b.flac", "d.mp3"] and not faults


def test_a_moved_folder_is_the_same_plan(tmp_path):
    one, two = (write(tmp_path / name / "cups", entries("a.wav")) for name in "xy" if not (tmp_path / name).mkdir())
    plans = [people.plan(people.clips([folder])[0]) for folder in (one, two)]
    assert speak.plan_hash(plans[0]) == speak.plan_hash(plans[1]) and plans[0] != plans[1]


# ---- what is wrong with one -----------------------------------------------------------------------------------------


def wave(samples, rate=16_000):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


@pytest.mark.parametrize("fault, sound, words", [
    ({}, None, r"bad\.wav does not exist: check the name\."),
    ({}, b"not a sound at all", r"bad\.wav .*: .*\."),
    ({}, b"", r"bad\.wav is empty"),
    ({}, wave(np.zeros(0)), r"bad\.wav holds no samples"),
    ({}, wave(np.zeros(16_000)), r"bad\.wav is silent: record it again\."),
    ({}, wave(np.ones(31 * 16_000) * 0.1), r"bad\.wav lasts 31 s, the limit is 30 s"),
    ({}, wave(np.ones(999) * 0.1, 500), r"bad\.wav claims 500 samples a second"),
    ({"text": "two 2 cups"}, 1, r"has a text with '2' in it: spell numbers out\."),
    ({"text": "Two cups"}, 1, r"has a text with 'T' in it: write words in a-z and '\."),
    ({"text": "two cups."}, 1, r"has a text with '\.' in it"),
    ({"text": "café"}, 1, r"has a text with 'é' in it"),
    ({"text": "  "}, 1, r"has no text: write what is said in it\."),
    ({"text": None}, 1, "has no text"),
    ({"text": 7}, 1, "has no text"),
    ({"file": ""}, 1, r"manifest\.json has an entry without a file: name its sound\."),
    ({"file": 7}, 1, "has an entry without a file"),
    ({"file": "."}, 1, "is a folder"),
])  # fmt: skip
def test_a_bad_recording_is_one_sentence_and_the_rest_goes_on(tmp_path, fault, sound, words):
    folder = write(tmp_path / "cups", entries("a.wav", "bad.wav"), {"bad.wav": sound} if sound != 1 else {})
    listed = [*entries("bad.wav"), *entries("a.wav")]
    listed[0] |= fault
    (folder / "manifest.json").write_text(json.dumps([*listed, 7]), encoding="utf-8")
    found, (told, entry) = people.clips([folder])
    assert [one.path.name for one in found] == ["a.wav"] and "has an entry without a file" in entry
    assert re.search(words, told) and "\n" not in told and told.endswith(".") and "Traceback" not in told


@pytest.mark.parametrize("content, words", [
    (None, r"manifest\.json is missing: it lists"), ("{", "cut short or damaged"),
    ('{"a.wav": 1}', "holds a dict, not a list"), ("7", "holds a int"), ("[]", "no recording in .* can be trained on"),
])  # fmt: skip
def test_a_manifest_that_is_none_is_one_sentence(tmp_path, content, words):
    if content is not None:
        (tmp_path / "manifest.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        people.clips([tmp_path])


# ---- what is held out -----------------------------------------------------------------------------------------------


def test_what_the_model_is_tested_on_is_refused_by_its_sound(tmp_path):
    """The same samples in another format, name and folder; another split is no overlap."""
    mine = V.to_int16(clip("hello", 16_000))
    write(tmp_path / "tests", entries("a.wav", split="evaluation"), {"a.wav": mine})
    kept = people.hold_out([tmp_path / "tests"], "our own", tmp_path / "held_out.txt")
    assert kept == people.held_out_of(tmp_path / "held_out.txt") and len(kept) == 1
    assert (tmp_path / "held_out.txt").read_text(encoding="utf-8").startswith("# Never in training: our own.\n")
    folder = write(tmp_path / "cups", entries("b.flac", "z.flac"), {"z.flac": mine}, {"z.flac": 16_000})
    with pytest.raises(ValueError, match=r"z\.flac is one of the recordings that this model is tested on: take it out"):
        people.clips([folder], tmp_path / "held_out.txt")
    assert len(people.clips([folder])[0]) == 2  # by the shipped list it is not known
    listed = entries("b.flac") + entries("z.flac", split="tests")
    (folder / "manifest.json").write_text(json.dumps(listed), encoding="utf-8")
    assert [one.path.name for one in people.clips([folder], tmp_path / "held_out.txt")[0]] == ["b.flac"]


@pytest.mark.parametrize("order", [("train", "evaluation"), ("evaluation", None)])
def test_one_sound_under_both_splits_is_refused(tmp_path, order):
    mine = V.to_int16(clip("hello", 16_000))
    listed = entries("a.wav", split=order[0]) + entries("z.flac", split=order[1])
    folder = write(tmp_path / "cups", listed, {"a.wav": mine, "z.flac": mine})
    with pytest.raises(ValueError, match=r"z\.flac is the same sound as .*a\.wav, of another split: leave one"):
        people.clips([folder])


def test_one_sound_twice_is_heard_once(tmp_path):
    mine = V.to_int16(clip("hello", 16_000))
    folder = write(tmp_path / "cups", entries("a.wav", "z.wav"), {"a.wav": mine, "z.wav": mine})
    found, faults = people.clips([folder, folder])
    assert [one.path.name for one in found] == ["a.wav"] and len(faults) == 3
    assert all("is the same sound as" in fault for fault in faults)


def test_the_shipped_list_has_all_of_the_recordings_for_tests():
    held_out = people.held_out_of(people.HELD_OUT)
    assert len(held_out) == 103 + 120 + 14 and all(re.fullmatch("[0-9a-f]{16}", line) for line in held_out)
    assert people.HELD_OUT.read_text(encoding="utf-8").startswith("# Never in training: 103 ")


def test_a_digest_is_of_the_samples_as_they_are_stored(tmp_path):
    samples = np.random.default_rng(0).integers(-32768, 32767, 999).astype(np.int16)
    for name in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / name, samples, 8000)
        read, rate = people.read(tmp_path / name)
        assert rate == 8000 and people.digest(read) == hashlib.sha256(samples.tobytes()).hexdigest()[:16]


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_speaks_what_it_can_and_counts_the_rest(tmp_path, spoken, capsys):
    folder = write(tmp_path / "cups", entries("a.wav", "b.flac", "bad.wav"), {"bad.wav": b"x"})
    words = ["train", "corpus", "--people", str(folder), "--only", "people", "--workers", "1", "--resume"]
    words += ["--corpus", str(tmp_path / "corpus"), "--out", str(tmp_path / "run")]
    for line in ("people: 6 utterances, about 0.0 hours, 1 minutes", "people: all is there"):
        assert cli.main(words) == 0
        out = capsys.readouterr().out
        assert line in out and "6 utterances, 0.0 hours in " in out and "1 of the recordings were left out." in out
        assert len(re.findall(r"bad\.wav .*\.\n", out)) == 1
    corpus = speak.Corpus(tmp_path / "corpus")
    assert corpus.complete and {item.part for item in corpus.items()} == {"people"}


@pytest.mark.parametrize("words, told", [
    (["corpus", "--only", "people"], "no recordings are named: give their folder with --people FOLDER."),
    (["corpus", "--only", "open", "--people", "cups"], "recordings are no part of open: leave out --people"),
    (["corpus", "--people", "nowhere"], "no folder at nowhere: --people names one with a manifest.json."),
    (["corpus", "--people", "empty"], "empty/manifest.json is missing"),
    (["flow", "--people", "cups"], "--people is for `aqaa train corpus`: leave it out."),
    (["sft1", "--only", "open"], "--only is for `aqaa train corpus`: leave it out."),
])  # fmt: skip
def test_what_makes_no_sense_is_one_sentence(tmp_path, monkeypatch, spoken, capsys, words, told):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "cups", entries("a.wav"))
    (tmp_path / "empty").mkdir()
    assert cli.main(["train", *words, "--out", "run", "--corpus", "corpus"]) == 1
    err = capsys.readouterr().err
    assert told in err and "Traceback" not in err and not (tmp_path / "corpus").exists()


def test_people_join_the_other_parts(tmp_path, spoken, monkeypatch):
    monkeypatch.setattr(parts, "plan", lambda scale, seed: [i for i in plan(scale, seed) if i.role == "answer"][:9])
    monkeypatch.setattr(engines, "synthesize", lambda jobs: [
        people.play([job])[0] if job[0].startswith("people") else tones.synthesize([job])[0] for job in jobs
    ])  # fmt: skip
    folder = write(tmp_path / "cups", entries("a.wav"))
    corpus = parts.main(tmp_path / "corpus", scale=0.001, workers=1, people=[folder])
    assert list(corpus.places) == [*"questions open wider play later turns pictures people".split()] and corpus.complete
    assert {item.part: corpus.wav(item).any() for item in corpus.items()} == dict.fromkeys(corpus.places, True)
    assert len({item.id for item in corpus.items()}) == len(corpus.items())
    with pytest.raises(ModelError, match="manifest.json is missing"):
        parts.main(tmp_path / "corpus", scale=0.001, workers=1, people=[tmp_path])
