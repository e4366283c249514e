"""The spoken corpus: whole shards, resumable, repeatable; manners and acoustic labels measured on the sound."""

import json
import subprocess

import numpy as np
import pytest

from aqaa.training import corpus as K
from aqaa.training import voices as V


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    items = K.plan(0.001)
    few = [i for i in items if i.role == "answer"][:20] + [i for i in items if i.role == "question"][:30]
    few += [i for i in items if i.role == "generic"][:6]
    few = [i for i in few if "hts" not in i.voice]  # its model takes long to load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(K, "PER_SHARD", 16)
        folder = tmp_path_factory.mktemp("corpus")
        return few, folder, K.speak(few, folder, workers=1, progress=False)


def test_everything_planned_is_spoken_and_sounds(spoken):
    items, _, corpus = spoken
    assert corpus.complete and [i.id for i in corpus.items()] == [i.id for i in items]
    for item in corpus.items():
        wav = corpus.wav(item)
        assert wav.dtype == np.int16 and len(wav) == item.length and 0.5 < len(wav) / 16_000 < 12
        assert V.rms(wav / 32768) > 0.005 and item.phones and item.rate > 0
        assert item.role != "answer" or len(wav) % 1920 == 0


def test_filters_and_answers(spoken):
    _, _, corpus = spoken
    assert {i.role for i in corpus.items(role="answer")} == {"answer"}
    assert all(i.cell == "new_new" for i in corpus.items(split="eval", cell="new_new"))
    assert all(corpus.answers()[i.answer_id] is i for i in corpus.items(role="answer"))


def test_acoustic_labels_are_measured(spoken):
    _, _, corpus = spoken
    for item in corpus.items():
        assert not item.want or V.belongs(dict(f0=item.f0, spread=item.spread, rate=item.rate), item.want)


def test_an_interrupted_shard_is_spoken_again_exactly(spoken, monkeypatch):
    items, folder, corpus = spoken
    monkeypatch.setattr(K, "PER_SHARD", 16)
    npy, jsonl = K._names(folder, 1)
    before, lines = npy.read_bytes(), jsonl.read_bytes()
    untouched = K._names(folder, 0)[0].stat().st_mtime_ns
    jsonl.unlink()
    npy.unlink()  # a reader may still look into the old file
    npy.write_bytes(b"half")
    assert not K.Corpus(folder).complete
    again = K.speak(items, folder, workers=1, progress=False)
    assert again.complete and npy.read_bytes() == before and jsonl.read_bytes() == lines
    assert K._names(folder, 0)[0].stat().st_mtime_ns == untouched


def test_a_changed_plan_is_refused(spoken):
    items, folder, _ = spoken
    with pytest.raises(ValueError, match="another plan"):
        K.speak(items[:-1], folder, workers=1, progress=False)


def test_missing_engine_says_how_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(V.shutil, "which", lambda name: None if name == "festival" else name)
    with pytest.raises(FileNotFoundError, match="festival not found.*apt-get install"):
        K.speak(K.plan(0.001), tmp_path)


def test_no_corpus_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no corpus"):
        K.Corpus(tmp_path)


def test_resume_must_be_wanted(spoken):
    with pytest.raises(ValueError, match="already holds shards"):
        K.main(spoken[1], resume=False)


def test_exported_questions_are_described(spoken, tmp_path):
    _, _, corpus = spoken
    entries = K.export_questions(corpus, tmp_path, per_category=1)
    assert entries == json.loads((tmp_path / "questions.json").read_text())
    for entry in entries:
        wav, rate = K.soundfile.read(tmp_path / entry["file"])
        assert rate == 16_000 and len(wav) and entry["voice_seen"] == (entry["voice"] in V.TRAINING)


@pytest.fixture(scope="module")
def manners():
    texts = ["the little dog ran after the ball", "seven plus five is equal to twelve"]
    jobs = [(V.ANSWER_VOICE, text, how) for how in V.MANNERS.values() for text in texts]
    wavs = [V.say_answer(*sound, name) for sound, name in zip(V.synthesize(jobs), np.repeat(list(V.MANNERS), 2))]
    measured = {}
    for name, wav in zip(np.repeat(list(V.MANNERS), 2), wavs):
        speech = V.trim(wav / np.float32(32768))
        measured.setdefault(str(name), []).append(V.measure(speech, 9) | {"level": 20 * np.log10(V.rms(speech))})
    return {n: {key: np.mean([m[key] for m in both]) for key in both[0]} for n, both in measured.items()}


@pytest.mark.parametrize(
    "name, key, low, high",
    [
        ("slow", "rate", 0, 0.75), ("fast", "rate", 1.3, 9), ("high", "f0", 1.3, 9), ("low", "f0", 0, 0.77),
        ("happy", "f0", 1.2, 9), ("happy", "rate", 1.1, 9), ("happy", "spread", 1.2, 9), ("sad", "rate", 0, 0.85),
        ("sad", "f0", 0, 0.9), ("sad", "spread", 0, 0.7), ("angry", "rate", 1.15, 9), ("calm", "rate", 0, 0.92),
    ],
)
def test_manners_differ_from_normal_in_the_right_direction(manners, name, key, low, high):
    assert low < manners[name][key] / manners["normal"][key] < high


def test_levels_of_the_manners(manners):
    level = {name: values["level"] for name, values in manners.items()}
    assert -21.5 < level["normal"] < -18.5
    assert level["loud"] > level["normal"] + 4 and level["angry"] > level["normal"] + 4
    assert level["soft"] < level["normal"] - 7 and level["sad"] < level["normal"] - 2


def test_a_variation_keeps_its_promises():
    rng = np.random.default_rng(0)
    speech = np.sin(np.arange(16_000) * 0.05).astype(np.float32)
    clean = V.Draw(gain=-20, lead=0.1, trail=0.2)
    wav = V.vary(speech, clean, rng)
    assert len(wav) == 16_000 + 4800 and not wav[:1600].any()
    assert abs(20 * np.log10(V.rms(wav[1600:17_600] / 32768)) + 20) < 0.1
    noisy = V.vary(speech, V.Draw(gain=-20, lead=0.1, trail=0.2, snr=20), rng)
    assert abs(20 * np.log10(V.rms(noisy[:1600] / 32768)) + 40) < 1
    assert len(V.to_16k(speech, 16_000, 1.1)) == pytest.approx(16_000 / 1.1, rel=0.01)


def test_phones_follow_the_text():
    texts = ["the opposite of hot is cold", "seven plus five"]
    phones = K.phones_of(texts)
    assert phones["seven plus five"] == "s eh v ax n p l ah s f ay v".split()
    assert "pau" not in phones[texts[0]] and len(phones) == 2


def test_festival_speaks_in_one_process(monkeypatch):
    calls = []
    run = subprocess.run
    monkeypatch.setattr(V.subprocess, "run", lambda *a, **k: calls.append(a) or run(*a, **k))
    draws = [V.draw(np.random.default_rng(i)) for i in range(3)]
    sounds = V.synthesize([("festival:kal_diphone", "what is seven plus five", d) for d in draws])
    assert len(calls) == 1 and all(len(samples) > 8000 for samples, _ in sounds)
