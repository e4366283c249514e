"""`aqaa eval`: sets, systems, scores, runs that are cut off, pages, two runs compared."""

import base64
import io
import json
import re
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import soundfile

from aqaa import cli, loading
from aqaa.corpus import plan as P
from aqaa.corpus import play
from aqaa.corpus import voices as V
from aqaa.evaluation import report, robustness, stepeval, systems
from aqaa.evaluation.stepeval import CATEGORIES
from aqaa.files import ModelError, data_folder
from aqaa.lineage import registry
from aqaa.lineage.system import Aqaa
from tests.conftest import RATE, tone

pytest.importorskip("pocketsphinx")
QUESTIONS = {"capital": "Language Ability", "opposite": "Language Ability", "sum": "Logical Reasoning",
             "say_sad": "Speech Emotion Control"}  # fmt: skip


@pytest.fixture(scope="module")
def shipped():
    listed = json.loads((data_folder() / "questions" / "questions.json").read_text(encoding="utf-8"))
    return {one["intent"]: one for one in reversed(listed)}


@pytest.fixture(scope="module")
def few(tmp_path_factory, shipped):
    """A set of four of the shipped questions."""
    folder, items = tmp_path_factory.mktemp("few"), []
    for intent, category in QUESTIONS.items():
        one = shipped[intent]
        (folder / one["file"]).write_bytes((data_folder() / "questions" / one["file"]).read_bytes())
        items.append({"id": intent, "category": category, "answer": one["answer"],
                      "turns": [{"file": one["file"], "text": one["transcript"]}]})  # fmt: skip
    (folder / "set.json").write_text(json.dumps({"name": "few", "items": items}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, few, shipped):
    """Answers to it in a folder: a right one, a wrong one, one of silence, one that is missing."""
    folder = tmp_path_factory.mktemp("recorded")
    answer, rate = soundfile.read(data_folder() / "example_answer.wav", dtype="float32")
    for name, text, sound in (
        ("capital", shipped["capital"]["answer"], answer), ("opposite", "<b>nine</b> & more", tone()),
        ("sum", "", tone() * 0),
    ):  # fmt: skip
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        soundfile.write(folder / f"{name}.wav", sound, rate if name == "capital" else RATE)
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(few, system, out, *more):
    return cli.main(["eval", "--set", str(few), "--system", str(system), "--out", str(out), *more])


def test_the_shipped_set_has_nine_categories_and_nothing_of_training():
    name, questions = stepeval.load("stepeval-mini")
    assert name == "stepeval-mini" and len(questions) == 360
    counts = {category: sum(one.category == category for one in questions) for category in CATEGORIES}
    assert len(counts) == 9 and set(counts.values()) == {stepeval.EACH}
    planned = {item.id: item for item in P.plan() + play.joined()}
    heard = {(item.text, item.voice) for item in planned.values() if item.split == "train"}
    words = {text for text, _ in heard}
    told = json.loads(zipfile.ZipFile(data_folder() / "stepeval-mini.zip").read("set.json"))["items"]
    voices = {one["id"]: one["voice"] for one in told}
    for one in questions:
        item, voice = planned[one.id], voices[one.id]
        assert item.split == "eval" and item.text == one.texts[-1] and (item.text, voice) not in heard
        assert one.texts[-1] not in words or voice not in V.TRAINING or item.want, one.id
    assert sum(len(one.files) == 2 for one in questions) >= 15  # second turns
    assert sum(voice in V.NATURAL_HELD_OUT for voice in voices.values()) >= 120
    assert stepeval.UNSHIPPED not in voices.values()
    sounds = [question.turns[-1] for question in questions[::40]]
    assert all(wav.dtype == np.float32 and 0.4 < len(wav) / RATE < 20 for wav in sounds)


def test_scores_of_recorded_answers(few, recorded, tmp_path, capsys):
    out, page = tmp_path / "a.jsonl", tmp_path / "pages" / "a.html"
    assert run(few, recorded, out, "--report", str(page)) == 0
    rows = {row["id"]: row for row in lines(out)}
    assert list(rows) == list(QUESTIONS)
    assert [rows[name]["text"] for name in QUESTIONS] == [True, False, False, False]
    assert rows["capital"]["sounds"] > 1 and rows["sum"]["heard"] == rows["say_sad"]["heard"] == ""
    assert not rows["capital"]["spoken"]  # the recording says something else
    summary = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["summary"]
    assert summary["all"]["text"]["share"] == 25.0 and summary["Language Ability"]["text"]["n"] == 2
    low, high = summary["all"]["text"]["interval"]
    assert 0 <= low < 25 < high <= 100 and summary["all"]["gap"] == 25.0
    assert "Logical Reasoning" in capsys.readouterr().out
    html = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;nine&lt;/b&gt; &amp; more" in html and "<b>nine" not in html
    for name in re.findall(r'src="([^"]+)"', html):
        assert (page.parent / name).resolve().is_file()
    first = html.index("Wrong in text or in sound: 4")
    assert html.count("<article") == 4 and first < html.index("<article") and "http" not in html


def test_a_run_that_was_cut_off_goes_on(few, recorded, tmp_path, monkeypatch):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert run(few, recorded, whole) == 0
    real = systems.Recorded.answer

    def gone(system, turns):
        if system.item == "sum":
            raise systems.SystemFault("the recorder is gone: look for it.")
        return real(system, turns)

    monkeypatch.setattr(systems.Recorded, "answer", gone)
    assert run(few, recorded, cut) == 1 and [row["id"] for row in lines(cut)] == ["capital", "opposite"]
    monkeypatch.undo()
    with open(cut, "a", encoding="utf-8") as file:
        file.write('{"id": "su')  # a line that a kill left behind
    assert run(few, recorded, cut) == 1  # not without being asked
    assert run(few, recorded, cut, "--resume") == 0
    assert [{**row, "minutes": 0} for row in lines(cut)] == [{**row, "minutes": 0} for row in lines(whole)]
    assert run(few, recorded, whole, "--resume") == 0 and len(lines(whole)) == 4  # nothing was left to do


def test_the_mini_answers_and_others_ask_for_training(few, tmp_path):
    mini = loading.load("mini")
    _, questions = stepeval.load(few)
    system, out = systems.make("aqaa", lambda: mini), tmp_path / "aqaa.jsonl"
    rows = stepeval.evaluate(system, questions[:2], out, quiet=True)
    assert [row["system"] for row in rows] == ["aqaa"] * 2 and all(row["sounds"] > 0.5 for row in rows)
    assert any(row["text"] for row in rows), rows
    assert all(0 < row["first"] < row["seconds"] for row in rows)  # it streams
    for name in registry.TRAINED:
        with pytest.raises(ModelError, match=f"aqaa train lineage {name}"):
            systems.make(name, lambda: mini, folder=tmp_path).answer(questions[0].turns)
    assert all(60 < row["f0"] < 500 and row["rate"] > 1 and -60 < row["energy"] < 0 for row in rows)


def test_earlier_turns_reach_a_system(few):
    heard = []

    class Model(Aqaa):
        def heard(self, turn, said):
            heard.append((len(turn), list(said)))
            return f"asked {len(turn)}", f"answered {len(turn)}"

    said = Model(None).before([np.zeros(5), np.zeros(7)])
    assert said == [("user", "asked 5"), ("assistant", "answered 5"), ("user", "asked 7"), ("assistant", "answered 7")]
    assert heard == [(5, []), (7, said[:2])]


@contextmanager
def server(reply):
    """A stand-in for a server with OpenAI's chat; reply(messages) -> (code, bytes)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code, content = reply(self.path, body["messages"])
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    listens = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listens.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listens.server_address[1]}/v1"
    finally:
        listens.shutdown()
        listens.server_close()
        thread.join()


def message(text, data):
    return json.dumps({"choices": [{"message": {"audio": {"data": data, "transcript": text}}}]}).encode()


def spoken(text):
    file = io.BytesIO()
    soundfile.write(file, tone(), RATE, format="WAV")
    return message(text, base64.b64encode(file.getvalue()).decode())


def test_a_server_is_asked_turn_by_turn():
    seen = []

    def reply(path, messages):
        seen.append((path, [one["role"] for one in messages]))
        return 200, spoken(f" answer {len(messages)} ")

    with server(reply) as url:
        answer = systems.make(url, None).answer([tone(), tone()])
    assert answer.text == "answer 3" and answer.rate == RATE and len(answer.audio) == len(tone())
    assert seen == [("/v1/chat/completions", ["user"]), ("/v1/chat/completions", ["user", "assistant", "user"])]


@pytest.mark.parametrize("content, code, said", [
    (b"{}", 200, "answers otherwise"), (b"no json", 200, "answers otherwise"), (b"", 500, "refuses \\(500\\)"),
    (message("a", "AAAA"), 200, "answers otherwise"), (message(3, ""), 200, "answers otherwise"),
])  # fmt: skip
def test_a_server_that_answers_otherwise_is_one_sentence(few, tmp_path, content, code, said, capsys):
    with server(lambda path, messages: (code, content)) as url:
        assert run(few, url, tmp_path / "a.jsonl") == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aqaa: ")]
    assert len(told) == 1 and re.search(said, told[0])


def test_two_runs_are_compared_in_pairs(tmp_path, capsys):
    def rows(texts, spoken=None):
        return [{"id": str(i), "category": "Sing", "text": right, "spoken": spoken} for i, right in enumerate(texts)]

    found = stepeval.compare(rows([True] * 6 + [False]), rows([False] * 5 + [True] * 2))
    told = found["text"]
    assert list(found) == ["text"] and {key: told[key] for key in list(told)[:5]} == {
        "n": 7, "only_first": 5, "only_second": 1, "difference": 57.1, "p": 0.2188,
    }  # fmt: skip
    assert told["kappa"] == -0.312 and told["both_wrong"] == 0 and told["overlap"] == 0
    assert stepeval.compare(rows([True] * 5), rows([False] * 5))["text"]["p"] == 0.0625
    assert stepeval.compare(rows([True]), rows([True]))["text"]["p"] == 1.0
    with pytest.raises(ModelError, match="no question in common"):
        stepeval.compare(rows([True]), [])
    for name, texts in (("a", [True] * 4), ("b", [False] * 4)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows(texts))), encoding="utf-8")
    assert cli.main(["eval", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    said = "text: 4 questions, 4 right only in the first, 0 only in the second, +100.0 points, p 0.125"
    assert said in capsys.readouterr().out


def test_the_systems_are_named(capsys):
    assert cli.main(["eval", "--systems"]) in (None, 0)
    assert capsys.readouterr().out.split() == list(registry.SYSTEMS) == [
        "aqaa", "audiogpt", "hugginggpt", "vall-e", "speechgpt", "audiopalm", "qwen2-audio", "kimi-audio", "qwen-omni",
    ]  # fmt: skip


@pytest.mark.parametrize("words, said", [
    (["--system", "nobody"], "there is no system 'nobody': choose aqaa"), (["--set", "/nowhere"], "there is no set at"),
    (["--set", "FEW/set.json"], "set.json"), (["--system", "http://127.0.0.1:9"], "does not answer"),
    (["--report", "/proc/none/page.html"], "/proc/none"), (["--out", "/proc/none/a.jsonl"], "none"),
])  # fmt: skip
def test_bad_input_is_one_sentence(few, recorded, tmp_path, words, said, capsys):
    words = [word.replace("FEW", str(few)) for word in words]
    given = {"--set": str(few), "--system": str(recorded), "--out": str(tmp_path / "a.jsonl")} | dict([words])
    assert cli.main(["eval", *(word for pair in given.items() for word in pair)]) == 1
    err = capsys.readouterr().err
    told = [line for line in err.splitlines() if line.startswith("aqaa: ")]
    assert len(told) == 1 and said in told[0] and "Traceback" not in err


@pytest.mark.parametrize("broken", ["{", '{"items": []}', '{"items": [{"id": 1}]}', '{"items": 3}', "[]"])
def test_a_broken_set_is_named(tmp_path, broken):
    (tmp_path / "set.json").write_text(broken, encoding="utf-8")
    with pytest.raises(ModelError, match="get the set again"):
        stepeval.load(tmp_path)


@pytest.mark.parametrize("name", list(registry.SYSTEMS))
def test_a_recorded_table_is_that_of_its_answers(name):
    path = data_folder() / "runs" / f"eval-{name}.json"
    if not path.exists():
        pytest.skip(f"no run of {name} is recorded")
    record = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(json.dumps(stepeval.summarise(record["rows"]))) == record["summary"]
    asked = {question.id: question for question in stepeval.load("stepeval-mini")[1]}
    assert len(record["rows"]) == record["questions"] and {row["system"] for row in record["rows"]} == {name}
    assert all(asked[row["id"]].answer == row["expected"] for row in record["rows"])


def test_what_is_recorded_of_noise_is_of_its_answers():
    path = data_folder() / "runs" / "noise.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert list(record["systems"]) == list(registry.SYSTEMS)
    asked = {row["id"] for row in record["systems"]["aqaa"]["rows"] if "condition" not in row}
    assert len(asked) == record["questions"]
    for found in record["systems"].values():
        assert json.loads(json.dumps(robustness.kept(found["rows"]))) == found["conditions"]
        assert len(found["rows"]) == len(asked) * len(found["conditions"])
        assert {row["id"].split("@")[0] for row in found["rows"]} == asked


def test_a_page_of_few_categories_has_no_radar():
    score = {"n": 3, "share": 50.0, "interval": [10.0, 90.0]}
    names = ["all", *CATEGORIES]
    drawn = report.radar({name: {"text": score, "spoken": score} for name in names})
    assert drawn.count("<text") == 10 and drawn.count("<polygon") == 4 + 2 and "Sing: text 50" in drawn
    assert report.radar({"all": {"text": score}, "Sing": {"text": score}}) == ""
