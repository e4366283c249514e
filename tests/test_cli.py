"""The command line, called in this process: exit codes, one sentence for each fault, nothing half-written."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from aqaa import cli, pipeline
from tests.conftest import RATE, tone

QUICK = ["--temperature", "0"]


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setitem(pipeline.SAMPLING, "max_tokens", 80)


@pytest.fixture
def run(capsys, tmp_path, monkeypatch, tiny_folder):
    """run(args…) -> (exit code, stdout, stderr), in an empty folder, with the tiny weights as preset."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)

    def call(*args, preset=tiny_folder):
        preset = ["--preset", str(preset)] if preset and args[0] in ("ask", "chat", "listen", "doctor", "bench") else []
        code = cli.main([*map(str, args), *preset])
        out, err = capsys.readouterr()
        return code, out, err

    call.place = place
    return call


def one_sentence(err, *words):
    """stderr is a single line `aqaa: …` that holds the words, and no traceback."""
    assert err.startswith("aqaa: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    assert all(str(word) in err for word in words), err
    return True


def is_answer(path, seconds=0.3):
    wave, rate = soundfile.read(path)
    info = soundfile.info(path)
    assert (rate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
    assert len(wave) >= seconds * rate and np.isfinite(wave).all()
    return True


# ---- good input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, output", [("a.wav", ["-o", "a.wav"]), ("answer.wav", [])])
def test_one_question(run, question, name, output):
    code, out, err = run("ask", question, *output)
    assert (code, err) == (0, "")
    assert is_answer(run.place / name) and os.listdir(run.place) == [name]
    assert str(question) in out and name in out


def test_json_is_one_line_with_everything(run, question):
    code, out, err = run("ask", question, "--json", "-o", "a.wav")
    (line,) = out.splitlines()
    facts = json.loads(line)
    assert set(facts) == {
        "question", "text", "audio", "seconds", "first_audio_ms", "real_time_factor", "confidence", "tokens",
    }  # fmt: skip
    assert facts["question"] == str(question) and facts["audio"] == "a.wav"
    assert facts["seconds"] > 0.3 and 0 <= facts["confidence"] <= 1 and facts["real_time_factor"] > 0
    assert facts["first_audio_ms"] is None  # all sound came at once
    assert set(facts["tokens"]) == {"text", "linguistic", "semantic"}


def test_several_questions_go_to_a_folder(run, question, tmp_path):
    (tmp_path / "other").mkdir()
    twin = shutil.copy(question, tmp_path / "other" / question.name)
    code, out, err = run("ask", question, twin, "-o", "new/answers", "--json")
    assert (code, err) == (0, "")
    places = [json.loads(line)["audio"] for line in out.splitlines()]
    assert places == ["new/answers/question.wav", "new/answers/question-2.wav"]
    assert all(is_answer(place) for place in places)


def test_the_same_seed_gives_the_same_file(run, question):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run("ask", question, "-o", f"{name}.wav", "--seed", seed, "--temperature", 1)[0] == 0
    a, b, c = ((run.place / f"{name}.wav").read_bytes() for name in "abc")
    assert a == b != c


def test_streaming_shows_the_words_and_leaves_the_same_text(run, question):
    code, out, err = run("ask", question, "--stream", "-o", "s.wav", *QUICK)
    assert code == 0 and is_answer(run.place / "s.wav")
    words = out.splitlines()[0].strip()
    assert words in out.splitlines()[-1]
    told = json.loads(run("ask", question, "--stream", "--json", *QUICK)[1])
    assert told["text"] == words and told["first_audio_ms"] >= 0


def test_listen_shows_every_token(run, question):
    code, out, err = run("listen", question)
    names = ("linguistic", "semantic", "merged", "prompt", "answer", "text", "confidence")
    assert code == 0 and all(f"\n{name}" in out for name in names)
    facts = json.loads(run("listen", question, "--json")[1])
    assert len(facts["merged"]) % 5 == 0 and set(names) < set(facts)
    assert os.listdir(run.place) == []


def test_chat_answers_turn_by_turn(run, question, monkeypatch):
    code, out, err = run("chat", question, question, "-o", "talk", "--json")
    assert code == 0 and len(out.splitlines()) == 2
    assert sorted(os.listdir(run.place / "talk")) == ["question-2.wav", "question.wav"]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n\n"))
    assert run("chat", "-o", "piped")[0] == 0
    assert is_answer(run.place / "piped" / "question.wav")


@pytest.mark.parametrize("name, subtype, rate", [
    *(("q.wav", "PCM_16", rate) for rate in (8_000, 11_025, 22_050, 44_100, 96_000)),
    ("q.wav", "PCM_24", RATE), ("q.wav", "FLOAT", RATE), ("q.wav", "PCM_U8", RATE), ("q.wav", "ULAW", RATE),
    ("q.flac", "PCM_16", RATE), ("q.ogg", "VORBIS", RATE), ("q.mp3", "MPEG_LAYER_III", RATE),
])  # fmt: skip
def test_other_rates_and_formats_and_two_channels(run, tmp_path, name, subtype, rate):
    wave = tone(rate=rate)
    soundfile.write(tmp_path / name, wave if rate != RATE else np.stack([wave, 0.5 * wave], 1), rate, subtype=subtype)
    assert run("ask", tmp_path / name, "-o", "a.wav")[0] == 0
    assert is_answer(run.place / "a.wav")


def test_a_question_nobody_understands_is_answered_all_the_same(run, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 3 * RATE).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", noise, RATE)
    code, out, err = run("ask", tmp_path / "noise.wav", "-o", "a.wav", "--json")
    assert code == 0 and is_answer(run.place / "a.wav")
    assert 0 <= json.loads(out)["confidence"] <= 1


# ---- bad questions --------------------------------------------------------------------------------------------------


def bad_question(kind, folder):
    """Writes a question that cannot be used; returns its path."""
    path = folder / "bad.wav"
    good = io.BytesIO()
    soundfile.write(good, tone(), RATE, format="WAV")
    wave = {
        "zero samples": np.zeros(0),
        "nan": np.where(np.arange(9600) == 5000, np.nan, 0.1),
        "infinite": np.where(np.arange(9600) == 5000, np.inf, 0.1),
        "silence": np.zeros(9600),
        "ten minutes": np.full(10 * 60 * 8000, 0.1),
        "too short": tone(0.03),
    }.get(kind)
    if wave is not None:
        soundfile.write(path, wave.astype(np.float32), 8000 if kind == "ten minutes" else RATE, subtype="FLOAT")
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({
            "empty": b"", "text": b"what is seven plus five?\n" * 50, "header cut": good.getvalue()[:20],
            "cut": good.getvalue()[:5000], "header only": good.getvalue()[:44],
            "lying header": good.getvalue()[:40] + struct.pack("<I", 10**9) + good.getvalue()[44:],
        }[kind])  # fmt: skip
    return path


KINDS = (
    "missing", "folder", "empty", "text", "header cut", "cut", "header only", "lying header", "zero samples", "nan",
    "infinite", "silence", "ten minutes", "too short",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_question_is_one_sentence(run, tmp_path, kind):
    path = bad_question(kind, tmp_path)
    code, out, err = run("ask", path, "-o", "a.wav")
    assert code == 1 and out == ""
    assert one_sentence(err, path)
    assert os.listdir(run.place) == []


@pytest.mark.parametrize("kind", ["missing", "nan", "text"])
def test_the_others_are_answered(run, tmp_path, question, kind):
    path = bad_question(kind, tmp_path)
    code, out, err = run("ask", question, path, question, "-o", "out", "--json")
    assert code == 1 and one_sentence(err, path)
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["question"] for row in rows] == [str(question), str(path), str(question)]
    assert "error" in rows[1] and str(path) in rows[1]["error"]
    assert sorted(os.listdir(run.place / "out")) == ["question-2.wav", "question.wav"]


def test_a_folder_made_for_nothing_goes_away(run, tmp_path):
    code, out, err = run("ask", tmp_path / "no.wav", tmp_path / "none.wav", "-o", "out")
    assert code == 1 and err.count("aqaa: ") == 2
    assert os.listdir(run.place) == []


def test_a_bad_question_is_told_without_weights(run, tmp_path):
    code, out, err = run("ask", tmp_path / "no.wav", preset="no such preset")
    assert code == 1 and one_sentence(err, "no.wav", "does not exist")


# ---- bad places -----------------------------------------------------------------------------------------------------


def test_a_question_is_not_overwritten(run, question):
    before = question.read_bytes()
    code, out, err = run("ask", question, "-o", question)
    assert code == 1 and one_sentence(err, question)
    assert run("ask", question, "-o", question.parent)[0] == 0  # a folder: the answer gets another name
    assert question.read_bytes() == before and is_answer(question.parent / "question-2.wav")


def test_a_disk_that_fills_up_leaves_nothing(run, question, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("aqaa.audio.os.replace", full)
    code, out, err = run("ask", question, "-o", "a.wav")
    assert code == 1 and one_sentence(err, "a.wav", "No space left")
    assert os.listdir(run.place) == []


# ---- bad weights, bad usage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["missing", "cut short"])
@pytest.mark.parametrize("part", ["linguistic", "flow"])
def test_bad_weights(run, question, tmp_path, tiny_folder, part, fault):
    folder = shutil.copytree(tiny_folder, tmp_path / "weights")
    path = folder / f"{part}.safetensors"
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    code, out, err = run("ask", question, question, "-o", "out", preset=folder)
    assert code == 1 and one_sentence(err, path, fault)
    assert os.listdir(run.place) == []


def test_no_weights_anywhere(run, question, monkeypatch, tmp_path):
    monkeypatch.setenv("AQAA_DATA", str(tmp_path / "nowhere"))
    code, out, err = run("ask", question, preset=None)
    assert code == 1 and one_sentence(err, "AQAA_DATA")


def test_interruption_is_quiet(run, question, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("aqaa.pipeline.AQAA.ask", interrupt)
    code, out, err = run("ask", question, question, "-o", "out")
    assert code == 130 and one_sentence(err, "interrupted")
    assert os.listdir(run.place) == []


# ---- the other commands ---------------------------------------------------------------------------------------------


def test_doctor_finds_everything_or_says_what_is_missing(run, monkeypatch):
    code, out, err = run("doctor")
    assert code == 0 and "torch" in out and "espeak-ng" in out and "as recorded" in out
    monkeypatch.setenv("PATH", "")
    report = json.loads(run("doctor", "--json")[1])
    assert "apt-get install" in report["speech engines"]["flite"]
    assert set(report["weights"]) == {"folder", "linguistic", "semantic", "backbone", "flow", "hift"}
    code, out, err = run("doctor", preset="maxi")
    assert code == 1 and "maxi" in out and one_sentence(err, "maxi")


def test_doctor_sees_changed_weights(run, tmp_path, tiny_folder):
    folder = shutil.copytree(tiny_folder, tmp_path / "weights")
    path = folder / "flow.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "NOT as recorded" in run("doctor", preset=folder)[1]


def test_bench_reports_speed(run, monkeypatch, tmp_path):
    monkeypatch.setenv("AQAA_DATA", str(tmp_path))
    code, out, err = run("bench", "speed", "--limit", "1", "--json", "--out", "speed.json")
    assert code == 0
    facts = json.loads(out)
    assert facts == json.loads((run.place / "speed.json").read_text(encoding="utf-8"))
    assert facts["real_time_factor"] > 0 and 0 < facts["stream_first_audio_share"] <= 1
    assert facts["parameters"]["flow"] > 0


def test_train_hands_its_options_over(run, monkeypatch):
    from aqaa.training import run as training

    seen = {}
    monkeypatch.setattr(training, "main", lambda stage, **options: seen.update(options, stage=stage))
    code, out, err = run("train", "flow", "--steps", "7", "--resume", "--out", "o", "--seed", "5")
    assert code == 0
    assert {k: seen[k] for k in ("stage", "steps", "resume", "out", "seed")} == {
        "stage": "flow", "steps": 7, "resume": True, "out": "o", "seed": 5,
    }  # fmt: skip


def test_an_ablation_has_a_name_of_its_own(run, monkeypatch):
    from aqaa.training import ablations

    seen = {}
    monkeypatch.setattr(ablations, "main", lambda what, **options: seen.update(options, what=what))
    code, out, err = run("train", "ablation", "layouts", "--seeds", "2", "--minutes", "12", "--resume")
    assert code == 0 and not {"parents", "weights", "method", "stage"} & set(seen)
    assert {k: seen[k] for k in ("what", "seeds", "minutes", "questions", "resume")} == {
        "what": "layouts", "seeds": 2, "minutes": 12.0, "questions": 120, "resume": True,
    }  # fmt: skip


def test_model_folders_are_merged(run, tiny_folder, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    parents = ("--parents", tiny_folder, "--parents", other)
    code, out, err = run("train", "merge", *parents, "--weights", "5:1", "--export", tmp_path / "merged")
    assert code == 0 and (tmp_path / "merged" / "backbone.safetensors").is_file(), err
    code, out, err = run("train", "merge", *parents, "--weights", "5:5:1", "--export", tmp_path / "again")
    assert code == 1 and one_sentence(err, "linear of 2 models and 3 weights")
    code, out, err = run("train", "merge", *parents, "--weights", "5:1")
    assert code == 1 and one_sentence(err, "another folder", "--export")


def test_training_that_cannot_start_is_one_sentence(run):
    code, out, err = run("train", "flow", "--out", "o", "--corpus", "nothing")
    assert code == 1 and one_sentence(err, "nothing")


def test_python_m_aqaa_is_the_command():
    result = subprocess.run([sys.executable, "-m", "aqaa", "--version"], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.startswith("aqaa 0.1")
