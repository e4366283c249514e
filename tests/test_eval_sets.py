"""Published sets in their own files, whatever their columns; the same questions in noise and over lines."""

import base64
import io
import json
import tarfile

import numpy as np
import pytest
import soundfile

from aqaa import cli
from aqaa.evaluation import robustness, sets, stepeval, whisper
from aqaa.files import ModelError
from tests.conftest import RATE, tone

CATEGORY = "Logical Reasoning"


def wav(hertz=220.0, rate=RATE):
    """The bytes of a wav."""
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(2 * np.pi * hertz * np.arange(rate // 2) / rate), rate, format="WAV")
    return file.getvalue()


def parquet(path, rows, **options):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.Table.from_pylist(rows), path, **options)


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")


def archive(path, names):
    with tarfile.open(path, "w:gz") as file:
        for hertz, name in enumerate(names, 200):
            member, content = tarfile.TarInfo(f"audios/{name}"), wav(hertz)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))


def said(role, text, name=None):
    return {"role": role, "content": [{"type": "audio" if name else "text", "audio": name, "text": text}]}


def stepeval_360(folder, nested=str):
    """As its repository: README.md, data/test-….parquet, audios.tar.gz; columns as nobody has published them."""
    turns = [[said("user", "who are you", "audios/a1.wav"), said("assistant", "I am a model"),
              said("user", "and who made you", "audios/a2.wav")], [said("user", "sing", "audios/b1.wav")]]  # fmt: skip
    rows = [{"conversation_id": f"c{n}", "ability": name, "conversation": json.dumps(one) if nested is str else one}
            for n, (one, name) in enumerate(zip(turns, ("Role_Playing", "sing")))]  # fmt: skip
    parquet(folder / "data" / "test-00000-of-00001.parquet", rows)
    archive(folder / "audios.tar.gz", ["a1.wav", "a2.wav", "b1.wav"])
    (folder / "README.md").write_text("license: apache-2.0", encoding="utf-8")
    return folder


@pytest.mark.parametrize("nested", [str, list])
def test_stepeval_audio_360_whatever_its_columns_are_called(tmp_path, nested):
    name, (first, second) = sets.load(stepeval_360(tmp_path, nested))
    assert name == "stepeval-audio-360" and (first.category, second.category) == ("Role-playing", "Sing")
    assert first.texts == ["who are you", "and who made you"] and first.rule is None and first.answer == ""
    assert [len(turn) for turn in first.turns] == [RATE // 2] * 2 and first.right("anything") is None
    assert not np.array_equal(*first.turns) and first.turns[0].dtype == np.float32
    assert sets.load(f"stepeval-audio-360:{tmp_path}")[0] == name


@pytest.mark.parametrize("row, told", [
    ({"category": "Sing", "path": "a folder"}, "columns are category, path: expected a category and names"),
    ({"one": "Nothing of the nine", "path": "a1.wav"}, "columns are one, path: expected a category and names"),
])  # fmt: skip
def test_other_columns_are_told_in_a_sentence(tmp_path, row, told):
    parquet(tmp_path / "data" / "test.parquet", [row])
    archive(tmp_path / "audios.tar.gz", ["a1.wav"])
    with pytest.raises(ModelError, match=told):
        sets.load(f"stepeval-audio-360:{tmp_path}")


def test_a_sound_that_the_archive_lacks_ends_the_run_and_keeps_what_was_answered(tmp_path, capsys):
    folder = stepeval_360(tmp_path / "set")
    archive(folder / "audios.tar.gz", ["a1.wav", "a2.wav"])
    (tmp_path / "answers").mkdir()
    assert cli.main(["eval", "--set", str(folder), "--system", str(tmp_path / "answers"), "--out",
                     str(tmp_path / "a.jsonl")]) == 1  # fmt: skip
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aqaa: ")]
    assert len(err) == 1 and "test-00000-of-00001.parquet, row 1, sound 0 of the set cannot be read" in err[0]
    (row,) = stepeval.rows_of(tmp_path / "a.jsonl")
    assert row["text"] is row["spoken"] is row["quality"] is None and row["expected"] == ""


def test_a_damaged_archive_is_told(tmp_path):
    (stepeval_360(tmp_path) / "audios.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ModelError, match="audios.tar.gz is damaged"):
        sets.load(tmp_path)


def test_parquet_without_its_reader_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "test.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(ModelError, match="pip install pyarrow"):
        sets.load(tmp_path)
    monkeypatch.undo()
    pytest.importorskip("pyarrow")
    with pytest.raises(ModelError, match="cut short or damaged"):
        sets.load(tmp_path)


def sound(hertz, encode=False):
    content = wav(hertz, 24_000)
    return {"bytes": base64.b64encode(content).decode() if encode else content, "path": None}


def voicebench(folder, write=parquet, end="parquet", encode=False):
    """Subsets as folders, their splits as files; mtbench has several turns."""
    write(folder / "alpacaeval" / f"test-00000-of-00001.{end}", [
        {"prompt": "Tell me a story.", "audio": sound(200, encode), "output": "Once upon a time there lived a king."}])
    write(folder / "sd-qa" / f"usa-00000-of-00001.{end}", [
        {"prompt": f"What is {n}?", "reference": "forty two", "audio": sound(201 + n, encode)} for n in range(3)])
    write(folder / "openbookqa" / f"test-00000-of-00001.{end}", [
        {"prompt": "Which one? A. B. C.", "reference": "B", "audio": sound(210, encode)}])
    write(folder / "mtbench" / f"test-00000-of-00001.{end}", [
        {"question_id": 81, "turns": ["Write.", "Again."], "audio1": sound(211, encode), "audio2": sound(212, encode)}])
    return folder


@pytest.mark.parametrize("how", [{}, {"write": jsonl, "end": "jsonl", "encode": True}])
def test_voicebench_in_parquet_and_jsonl(tmp_path, how):
    name, items = sets.load(voicebench(tmp_path, **how))
    names = [one.category for one in items]
    assert name == "voicebench" and names == ["alpacaeval", "mtbench", "openbookqa"] + ["sd-qa"] * 3
    story, talk, choice, number = items[:4]
    assert story.rule is None and story.texts == ["Tell me a story."] and story.answer.startswith("Once")
    assert talk.texts == ["Write.", "Again."] and len(talk.turns) == 2 and talk.rule is None
    assert choice.rule == "letter" and number.rule == "words"
    said = ("It is 42.", "It is forty-two!", "It is forty.", "")
    assert [number.right(text) for text in said] == [True, True, False, False]
    assert [len(one.turns[0]) for one in items] == [RATE // 2] * 6  # resampled
    assert not np.array_equal(items[3].turns[0], items[5].turns[0])


@pytest.mark.parametrize("text, right", [
    ("B", True), ("b.", True), ("The answer is B.", True), ("My choice: (b) a bear", True), ("B) a bear", True),
    ("A bear, so B", False), ("The answer is A.", False), ("a bird sings", False), ("", False),
])  # fmt: skip
def test_a_letter_is_taken_only_where_it_is_the_choice(text, right):
    assert sets.Question("q", "c", [""], "B", rule="letter").right(text) is right


def test_uro_bench_with_several_answers_and_several_rounds(tmp_path):
    for n in range(4):
        place = tmp_path / "basic" / ("TruthfulEval" if n < 2 else "MtBenchEval-en") / "wav"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{n}.wav").write_bytes(wav(300 + n))
    jsonl(tmp_path / "basic" / "TruthfulEval" / "test.jsonl", [
        {"id": 0, "source_wav": "wav/0.wav", "source_text": "Who?", "target_text": ["Ada Lovelace", "Lady Lovelace"]},
        {"id": 1, "source_wav": "wav/1.wav", "source_text": "说一个故事"}])
    jsonl(tmp_path / "basic" / "MtBenchEval-en" / "test.jsonl", [{"id": 0, "num_round": 2, "dialogue": [
        {"round": n, "source_wav": f"wav/{n + 1}.wav", "source_text": f"turn {n}", "target_text": f"answer number {n}"}
        for n in (1, 2)]}])  # fmt: skip
    name, (talk, who, story) = sets.load(tmp_path)
    assert name == "uro-bench" and (who.category, talk.category) == ("TruthfulEval", "MtBenchEval-en")
    assert who.right("It was Lady Lovelace.") and not who.right("It was a lady.") and story.right("x") is None
    assert talk.texts == ["turn 1", "turn 2"] and talk.answer == "answer number 2" and len(talk.turns) == 2
    with pytest.raises(ModelError, match="is not voicebench as it was published"):
        jsonl(tmp_path / "test.jsonl", [{"prompt": "no sound"}])
        sets.load(f"voicebench:{tmp_path}")


@pytest.mark.parametrize("lines, told", [
    ('{"a": 1}', "its columns are a: expected a category"), ("[1]", "cut short"), ("{", "cut short"),
    ("", "no questions"),
])  # fmt: skip
def test_files_of_no_set_are_one_sentence(tmp_path, lines, told):
    (tmp_path / "test.jsonl").write_text(lines, encoding="utf-8")
    with pytest.raises(ModelError, match=told):
        sets.load(tmp_path)


def test_open_questions_are_heard_by_the_open_recogniser(tmp_path, monkeypatch):
    (question,) = [one for one in sets.load(voicebench(tmp_path, jsonl, "jsonl", True))[1] if one.rule == "letter"]
    monkeypatch.setattr(whisper, "missing", lambda: [])
    monkeypatch.setattr(whisper, "heard", lambda sound: "the answer is b" if len(sound) else "")
    row = stepeval.judge(question, stepeval_reply("The answer is A.", tone()), set())
    assert (row["text"], row["spoken"], row["heard"], row["agrees"]) == (False, True, "the answer is b", None)
    assert (row["words"], row["errors"]) == (4, 1)
    silent = stepeval.judge(question, stepeval_reply("B", tone() * 0), set(), speaks=False)
    assert silent["text"] is True and silent["spoken"] is silent["words"] is silent["f0"] is None


def stepeval_reply(text, sound):
    from aqaa.lineage.system import Reply

    return Reply(text, sound)


# ---- noise and lines -----------------------------------------------------------------------------


def test_conditions_are_named_and_made_alike_each_time():
    names = robustness.conditions("20, noise  5,room,telephone,loss,clipping,20,clean,gsm")
    assert names == ["clean", "noise 20", "noise 5", "room", "telephone", "loss", "clipping", "gsm"]
    speech = tone()
    for name in names:
        one, same, other = (robustness.degraded(speech, name, seed) for seed in ("a", "a", "b"))
        assert np.array_equal(one, same) and one.dtype == np.float32 and len(one) >= len(speech)
        assert np.array_equal(one, speech) == (name == "clean"), name
        assert np.array_equal(one, other) == (name in ("clean", "telephone", "clipping", "gsm")), name
    for snr in (20, 5):
        noise = robustness.degraded(speech, f"noise {snr}", "a") - speech
        assert abs(20 * np.log10(np.std(speech) / np.std(noise)) - snr) < 0.2
    lost = robustness.degraded(np.ones(160_000, np.float32), "loss", "a").reshape(-1, 320)
    assert set(lost.mean(1)) == {0.0, 1.0} and 0.1 < (lost == 0).mean() < 0.25
    clipped = robustness.degraded(speech, "clipping", "a")
    assert abs(np.abs(clipped).max() * robustness.DRIVE - np.abs(speech).max()) < 1e-6
    with pytest.raises(ValueError, match="no condition 'rain': write decibels of noise or one of room"):
        robustness.conditions("rain")


def test_a_sweep_asks_each_question_in_each_condition(tmp_path, capsys):
    import zipfile

    told = json.loads(zipfile.ZipFile(sets.data_folder() / "stepeval-mini.zip").read("set.json"))["items"][:3]
    folder, answers, out = tmp_path / "set", tmp_path / "answers", tmp_path / "a.jsonl"
    folder.mkdir(), answers.mkdir()
    with zipfile.ZipFile(sets.data_folder() / "stepeval-mini.zip") as file:
        file.extractall(folder, [turn["file"] for one in told for turn in one["turns"]])
    (folder / "set.json").write_text(json.dumps({"items": told}), encoding="utf-8")
    for one in told[:2]:
        (answers / f"{one['id']}.txt").write_text(one["answer"], encoding="utf-8")
    (answers / f"{told[0]['id']}@noise-0.txt").write_text(told[0]["answer"], encoding="utf-8")
    words = ["eval", "--set", str(folder), "--system", str(answers), "--out", str(out), "--noise", "0"]
    assert cli.main([*words, "--report", str(tmp_path / "page.html")]) == 0
    rows = stepeval.rows_of(out)
    assert [row.get("condition") for row in rows] == [None] * 3 + ["noise 0"] * 3
    assert rows[3]["id"] == rows[0]["id"] + "@noise-0"
    record = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert record["summary"]["all"]["text"]["n"] == 3  # of the clean ones alone
    noisy = record["conditions"]["noise 0"]
    assert noisy["text"]["share"] == 33.3 and noisy["kept_text"]["share"] == 50.0 and noisy["kept_text"]["n"] == 2
    low, high = noisy["kept_text"]["interval"]
    assert 0 < low < 50 < high < 100 and "kept_text" not in record["conditions"]["clean"]
    assert "kept text" in (said := capsys.readouterr().out) and "50.0 (9.5–90.5)" in said
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Noise and lines" in page and page.count("<article") == 6
    assert cli.main([*words, "--resume"]) == 0 and stepeval.rows_of(out) == rows
    assert cli.main([*words[:-1], "rain", "--resume"]) == 1
