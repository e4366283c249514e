"""The command line as tried by somebody who has read nothing: odd words, odd files, odd names, odd consoles."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from aqaa import cli, options, places
from tests.conftest import RATE, tone

LONG = "q" * 300
Q = "ok.wav"  # a good question, in the folder where all this happens

SILLY = [  # words after `aqaa`, exit code, what the sentence says
    # no command, or hardly one
    ([], 2, ["commands:", "For a start", "aqaa ask"]),
    (["help"], 0, ["commands"]),
    (["--help"], 0, ["commands"]),
    (["--version"], 0, ["aqaa 0.1"]),
    (["help", "plan"], 0, ["--gpus"]),
    (["aks", Q], 2, ["'aks'", "did you mean ask"]),
    (["docter"], 2, ["did you mean doctor"]),
    (["transcribe", Q], 2, ["'transcribe'", "choose one of ask, chat"]),
    ([Q], 2, ["did you mean aqaa ask ok.wav"]),
    (["--loud"], 2, ["'--loud' in front of a command"]),
    # missing, surplus or misspelt words
    (["ask"], 2, ["QUESTION"]),
    (["ask", Q, "--temprature", "0"], 2, ["'--temprature'", "did you mean --temperature"]),
    (["ask", Q, "--colour", "blue"], 2, ["'--colour'", "--help"]),
    (["ask", Q, "-o"], 2, ["expected one argument"]),
    (["ask", Q, "-o", ""], 2, ["name is empty"]),
    (["listen", Q, "other.wav"], 2, ["one word too many", "other.wav"]),
    (["train"], 2, ["STAGE"]),
    (["train", "flwo"], 2, ["'flwo'", "did you mean flow"]),
    (["train", "everything"], 2, ["'everything'", "choose one of corpus"]),
    (["train", "ablation", "colours"], 2, ["'colours'", "choose one of layouts"]),
    (["train", "merge", "--weights", "5:x"], 2, ["'5:x'", "5:5:1"]),
    (["bench", "sped"], 2, ["did you mean speed"]),
    (["bench", "parts", "--only", "flo"], 2, ["did you mean flow"]),
    (["convert", "mini"], 2, ["OUT"]),
    (["convert", "mini", "out", "--weights", "int3"], 2, ["'int3'", "did you mean int"]),
    (["convert", "mini", "out", "--method", "gtpq"], 2, ["did you mean gptq"]),
    (["plan", "--weights", "fp16"], 2, ["'fp16'"]),
    # numbers that are none, or are out of range
    (["ask", Q, "--seed", str(2**70)], 2, ["whole number from 0"]),
    (["ask", Q, "--seed", "-1"], 2, ["'-1'", "whole number from 0"]),
    (["ask", Q, "--seed", "1.5"], 2, ["'1.5'", "whole number"]),
    (["ask", Q, "--seed", "x"], 2, ["'x'"]),
    (["train", "flow", "--seed", "9" * 5000], 2, ["whole number"]),
    (["ask", Q, "--temperature", "hot"], 2, ["'hot'", "0 or a number"]),
    (["ask", Q, "--temperature", "inf"], 2, ["'inf'"]),
    (["ask", Q, "--temperature", "nan"], 2, ["'nan'"]),
    (["ask", Q, "--temperature", "-0.5"], 2, ["'-0.5'"]),
    (["ask", Q, "--temperature", "1e-300"], 2, ["'1e-300'"]),
    (["ask", Q, "--top-p", "0"], 2, ["above 0"]),
    (["ask", Q, "--top-p", "1.5"], 2, ["1 at most"]),
    (["ask", Q, "--top-p", "nan"], 2, ["'nan'"]),
    (["train", "flow", "--minutes", "-3"], 2, ["'-3'", "above 0"]),
    (["train", "flow", "--minutes", "nan"], 2, ["'nan'", "minutes"]),
    (["train", "flow", "--minutes", "inf"], 2, ["'inf'"]),
    (["train", "flow", "--steps", "0"], 2, ["1 or more"]),
    (["train", "flow", "--scale", "2"], 2, ["1 at most"]),
    (["train", "corpus", "--workers", "0"], 2, ["from 1 to 1024"]),
    (["train", "corpus", "--workers", "1000000"], 2, ["from 1 to 1024"]),
    (["bench", "scale", "--layers", "0"], 2, ["1 or more"]),
    (["bench", "--limit", "few"], 2, ["'few'"]),
    (["plan", "--context", "0"], 2, ["1 or more"]),
    # questions that are none
    (["ask", "missing.wav"], 1, ["missing.wav does not exist"]),
    (["listen", "missing.wav"], 1, ["missing.wav does not exist"]),
    (["chat", "missing.wav"], 1, ["missing.wav does not exist"]),
    (["ask", "file/q.wav"], 1, ["file/q.wav does not exist"]),
    (["ask", "folder"], 1, ["folder is a folder"]),
    (["ask", "empty.wav"], 1, ["empty.wav is empty"]),
    (["ask", ""], 1, ["does not exist"]),
    (["ask", "loop.wav"], 1, ["loop.wav is a loop of links"]),
    (["ask", LONG], 1, ["longer than any file can have"]),
    (["ask", "fifo"], 1, ["fifo is a named pipe", "aqaa ask - < fifo"]),
    (["ask", "/dev/zero"], 1, ["/dev/zero is a device"]),
    (["ask", "a\0b"], 1, ["null"]),
    (["ask", "-", "-"], 1, ["only once"]),
    # places that cannot take an answer
    (["ask", Q, "-o", "x.mp3"], 1, ["x.mp3", ".wav"]),
    (["ask", Q, "-o", "-"], 1, ["not written to stdout"]),
    (["ask", Q, "-o", Q], 1, ["is the question itself"]),
    (["ask", Q, "-o", "loop.wav"], 1, ["loop.wav cannot be written"]),
    (["ask", Q, "-o", LONG], 1, ["cannot be written", "longer than"]),
    (["ask", Q, "-o", "w" * 250], 1, ["longer than 240 bytes"]),
    (["ask", Q, "-o", "file/a.wav"], 1, ["file/a.wav cannot be written"]),
    (["ask", Q, "-o", "no/such/folder/a.wav"], 1, ["no/such/folder/a.wav cannot be written"]),
    (["ask", Q, "-o", "/proc/a.wav"], 1, ["/proc/a.wav cannot be written"]),
    (["ask", Q, Q, "-o", "both.wav"], 1, ["both.wav would be one wav"]),
    (["ask", Q, Q, "-o", "file"], 1, ["file cannot be written"]),
    (["bench", "--out", "file/x.json"], 1, ["file/x.json cannot be written"]),
    (["bench", "--out", "folder"], 1, ["folder is a folder"]),
    (["train", "flow", "--out", "file/run"], 1, ["--out file/run", "is a file"]),
    (["train", "corpus", "--corpus", "loop.wav"], 1, ["--corpus loop.wav"]),
    (["convert", "mini", "file"], 1, ["OUT file", "is a file"]),
    # weights, engines and devices that are not there
    (["ask", Q, "--preset", "maxi"], 1, ["unknown preset 'maxi'"]),
    (["ask", Q, "--preset", "full"], 1, ["--tokenizer and --backbone and --vocoder names none"]),
    (["ask", Q, "--preset", "folder"], 1, ["config.json is missing"]),
    (["ask", Q, "--preset", "/no/such/folder"], 1, ["/no/such/folder"]),
    (["ask", Q, "--tokenizer", "folder"], 1, ["folder holds nothing of Step-Audio-Tokenizer"]),
    (["ask", Q, "--backbone", "folder"], 1, ["folder holds nothing of Step-Audio-AQAA"]),
    (["ask", Q, "--vocoder", "nowhere"], 1, ["no folder at nowhere"]),
    (["ask", Q, "--speaker", Q], 1, ["needs a released vocoder"]),
    (["ask", Q, "--dtype", "float8"], 1, ["'float8'", "bfloat16"]),
    (["ask", Q, "--engine", "ftp://x"], 1, ["'ftp://x'", "http://127.0.0.1:8000"]),
    (["ask", Q, "--engine", "http://x:port"], 1, ["http://x:port"]),
    (["ask", Q, "--device", "toaster"], 1, ["'toaster'", "--device cpu"]),
    (["ask", Q, "--device", "cuda:99"], 1, ["'cuda:99'"]),
    (["ask", Q, "--device", "cuda", "--amx"], 1, ["cuda"]),
    (["train", "flow", "--device", "gpu"], 1, ["'gpu'"]),
    (["train", "sft1", "--init", "nowhere"], 1, ["no folder at nowhere", "--init"]),
    (["train", "ablation"], 1, ["aqaa train ablation layouts"]),
    (["train", "sft1", "merge"], 1, ["aqaa train ablation layouts"]),
    (["train", "merge", "--parents", "nowhere", "--export", "m"], 1, ["no folder at nowhere", "--parents"]),
    (["bench", "--preset", "maxi"], 1, ["unknown preset 'maxi'"]),
    (["convert", "nowhere", "out"], 1, ["'nowhere'"]),
    (["convert", "mini", "out", "--method", "gptq", "--calibration", "none.json"], 1, ["none.json does not exist"]),
    (["plan", "nowhere"], 1, ["'nowhere'"]),
    (["plan", "--gpus", "3xToaster"], 1, ["'3xToaster'"]),
    (["doctor", "/nonexistent"], 1, ["no folder at /nonexistent"]),
    (["doctor", "file"], 1, ["no folder at file"]),
]

CHILD = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
TRY_ALL = """
import contextlib, io, json, sys, time
from aqaa import cli
for args in json.load(sys.stdin):
    out, err, began = io.StringIO(), io.StringIO(), time.perf_counter()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(args)
    heavy = sorted({"torch", "numpy", "transformers", "soundfile"} & set(sys.modules))
    print(json.dumps([code, out.getvalue(), err.getvalue(), time.perf_counter() - began, heavy]))
"""


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """What each of SILLY gives, all in one fresh process: [exit code, stdout, stderr, seconds, heavy modules]."""
    place = tmp_path_factory.mktemp("strangers")
    soundfile.write(place / Q, tone(), RATE)
    (place / "empty.wav").touch()
    (place / "file").write_text("mine", encoding="utf-8")
    (place / "folder").mkdir()
    (place / "loop.wav").symlink_to("loop.wav")
    os.mkfifo(place / "fifo")
    before = sorted(os.listdir(place))
    done = subprocess.run(
        [sys.executable, "-c", TRY_ALL], input=json.dumps([args for args, *_ in SILLY]), cwd=place, env=CHILD,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(place)) == before  # nothing was left behind
    assert (place / "file").read_text(encoding="utf-8") == "mine"
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_silly_uses_are_many_and_all_different():
    assert len(SILLY) >= 60 and len({tuple(args) for args, *_ in SILLY}) == len(SILLY)


@pytest.mark.parametrize("number", range(len(SILLY)), ids=lambda i: " ".join(SILLY[i][0])[:40].replace("\0", "0"))
def test_a_silly_use_gets_its_sentence_at_once(tried, number):
    args, expected, words = SILLY[number]
    code, out, err, seconds, heavy = tried[number]
    assert code == expected, err
    told = err if code and args else out
    assert all(word in told for word in words), told
    assert "Traceback" not in err and heavy == [] and seconds < 2  # 0.01 s where nobody else is at work
    if code == 0:
        assert err == ""
    if code == 1:
        assert err.startswith("aqaa: ") and err.count("\n") == 1 and err.endswith(".\n") and out == ""
    if code == 2 and args:
        assert err.startswith("usage: aqaa") and re.match(r"aqaa( \w+)?: error: ", err.splitlines()[-1]) and out == ""


# ---- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", cli.COMMANDS)
def test_help_has_an_example_that_can_be_parsed_and_the_defaults(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    example = text.split("example: ")[1]
    assert example == options.COMMANDS[verb]["example"] and example.startswith(f"aqaa {verb} ")
    args = vars(options.parse(example.split()[1:]))
    least = {"ask": ["q"], "chat": [], "listen": ["q"], "train": ["flow"], "convert": ["a", "b"]}.get(verb, [])
    for name, value in vars(options.parse([verb, *least])).items():
        if value not in (None, False, [], verb, *least) and value != least:
            assert f"({value})" in text, name
    assert args["verb"] == verb


def test_the_defaults_that_help_tells_are_those_of_the_pipeline():
    from aqaa import loading, pipeline
    from aqaa.weights.sources import ROLES

    assert options.SAMPLING.items() <= pipeline.SAMPLING.items()
    assert tuple(options.RELEASED) == ROLES
    assert all(str(loading.dtype_of(name)) == f"torch.{name}" for name in options.DTYPES)


def test_a_question_may_stand_behind_an_option():
    args = options.parse(["ask", "a.wav", "--json", "b.wav", "-o", "out", "c.wav"])
    assert args.questions == ["a.wav", "b.wav", "c.wav"] and args.json and args.output == "out"


# ---- one odd file ---------------------------------------------------------------------------------------------------

FAULTS = (
    TypeError("an integer is required"), ValueError("embedded null"), RuntimeError("shape\n[1, 2]"), MemoryError(),
    OSError(5, "Input/output error"), KeyError("fmt"), ZeroDivisionError("division by zero"), RecursionError("deep"),
    UnicodeEncodeError("utf-8", "\udce4", 0, 1, "surrogates"), AssertionError(), StopIteration(), EOFError(),
    ValueError(), OSError(),
)  # fmt: skip


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """quick(step, fault): ask odd.wav between two good ones, where `step` raises for odd.wav and all else is short."""
    import torch

    from aqaa import audio
    from aqaa.answer import Answer

    monkeypatch.chdir(tmp_path)
    for name, pitch in (("one", 100), ("odd", 200), ("two", 150)):
        soundfile.write(f"{name}.wav", tone(pitch=pitch), RATE)
    times = {"first_audio": 0.1, "total": 0.2}
    tokens = dict.fromkeys(("text", "linguistic", "semantic"), ())
    answer = Answer("yes", torch.zeros(1600), RATE, tokens, times, 0.9)

    def call(step="", fault=None, *args, names=("one.wav", "odd.wav", "two.wav"), **attributes):
        odd = audio.load_question("odd.wav")

        def raising(kind, result):
            def run(value, *rest):
                if kind == step and "odd" in str(value) or torch.is_tensor(value) and torch.equal(value, odd):
                    raise fault
                return result(value, *rest)

            return run

        with monkeypatch.context() as patch:
            patch.setattr(cli, "_load", lambda args: None)
            if step == "read":
                patch.setattr(audio, "load_question", raising("read", audio.load_question))
            asked = raising("answer", lambda wav: answer)
            patch.setattr(cli, "_responder", lambda *_: lambda wav: asked(wav[0] if step == "answer" else ""))
            patch.setattr(audio, "write", raising("write", audio.write))
            return cli.main(["ask", *names, "-o", "out", *args])

    return call


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault!r:.30}")
@pytest.mark.parametrize("step", ["read", "answer", "write"])
def test_whatever_one_file_raises_the_others_are_answered(quick, capsys, step, fault):
    assert quick(step, fault, "--json") == 1
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["question"] for row in rows] == ["one.wav", "odd.wav", "two.wav"]
    assert set(rows[1]) == {"question", "error"} and rows[0]["text"] == rows[2]["text"] == "yes"
    assert err == f"aqaa: {rows[1]['error']}\n" and err.startswith("aqaa: odd.wav: ") and err.count("\n") == 1
    assert sorted(os.listdir("out")) == ["one.wav", "two.wav"]


@pytest.mark.parametrize("fault, words", [
    (FAULTS[0], r"TypeError in \w+\.py, line \d+: an integer"), (FAULTS[3], "not enough memory"),
    (FAULTS[4], r"\(Input/output error\)"), (FAULTS[10], r"StopIteration in .*no reason was given"),
])  # fmt: skip
def test_a_fault_that_nobody_foresaw_says_where_it_was(quick, capsys, fault, words):
    assert quick("answer", fault) == 1
    assert re.search(words, capsys.readouterr().err)


def test_faults_of_the_weights_end_the_run(quick, capsys):
    from aqaa.files import ModelError

    assert quick("answer", ModelError("flow.safetensors is damaged.")) == 1
    out, err = capsys.readouterr()
    assert err == "aqaa: flow.safetensors is damaged.\n" and out.count("\n") == 1


# ---- odd names, odd consoles ----------------------------------------------------------------------------------------

NAMES = [
    "frage_\udce4.wav", "\udcff\udcfe.wav", "a\udc80b c.wav", "问" * 80 + ".wav", "é" * 120 + ".wav",
    "w" * 251 + ".wav", "问题.wav", "😀.wav", "new\nline.wav", "-dash.wav", "two  blanks .wav", ".wav",
]  # fmt: skip


def test_every_name_is_answered(quick, tmp_path, capsys):
    for name in NAMES:
        shutil.copy("one.wav", os.fsencode(name))
    names = [f"./{name}" for name in NAMES]
    assert quick("", None, "--json", names=names) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in rows] == names
    assert len({row["audio"] for row in rows}) == len(NAMES) == len(os.listdir("out"))
    assert all(soundfile.info(os.fsencode(row["audio"])).frames == 1600 for row in rows)


def test_long_names_that_begin_alike_keep_apart(quick, capsys):
    names = ["问" * 80 + f"{end}.wav" for end in "abc"]
    for name in names:
        shutil.copy("one.wav", name)
    assert quick("", None, names=names) == 0
    made = os.listdir("out")
    assert len(made) == 3 and all(len(os.fsencode(name)) <= places.LONGEST_NAME for name in made)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
def test_a_console_of_few_letters_stops_nothing(quick, monkeypatch, encoding):
    names = ["问题.wav", "one.wav", "frage_\udce4.wav", "missing_😀.wav"]
    for name in (names[0], names[2]):
        shutil.copy("one.wav", os.fsencode(name))
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in "oe"]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    code = quick("", None, names=names)
    for stream in streams:
        stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    assert code == 1 and len(out.splitlines()) == 3 and "one.wav -> out/one.wav" in out
    assert len(err.splitlines()) == 1 and "does not exist" in err


def test_names_on_stdin_may_be_any_bytes(quick, monkeypatch, capsys):
    odd = os.fsencode("frage_\udce4.wav")
    shutil.copy("one.wav", odd)
    stdin = io.TextIOWrapper(io.BytesIO(b"one.wav\n\nmissing.wav\n" + odd + b"\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    monkeypatch.setattr(cli, "_load", lambda args: None)
    monkeypatch.setattr(cli, "_responder", lambda *_: lambda wav: pytest.fail("asked"))
    monkeypatch.setattr(cli, "_try", lambda question, step, *_: (None, f"{question} was read"))
    assert cli.main(["chat", "--json", "-o", "talk"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["question"] for row in rows] == ["one.wav", "missing.wav", "frage_\udce4.wav"]
    assert not os.path.exists("talk")


def test_standard_input_has_a_name_of_its_own(quick, monkeypatch, capsys):
    from aqaa import audio

    good = audio.load_question("one.wav")
    monkeypatch.setattr(audio, "load_question", lambda name, *_: good)
    assert quick("", None, "--json", names=["-", "one.wav"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["question"], row["audio"]) for row in rows] == [("-", "out/stdin.wav"), ("one.wav", "out/one.wav")]


SCRIPTS = ("recorder", "player", "voice", "tokens", "interleave", "ode", "listening", "planner")


@pytest.mark.parametrize("script", SCRIPTS)
def test_widgets_load_whatever_the_locale(script, monkeypatch):
    from aqaa.notebook import base

    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "cp1252")
    base.front_end.cache_clear()
    made = base.front_end(script)
    base.front_end.cache_clear()
    assert "▶" in str(made._esm) and "â" not in str(made._esm)


# ---- the ends of a run ----------------------------------------------------------------------------------------------


def start(*args, unbuffered="", **pipes):
    env = {**CHILD, "PYTHONUNBUFFERED": unbuffered}
    return subprocess.Popen([sys.executable, "-m", "aqaa", *args], env=env, text=True, **pipes)


def test_ctrl_c_is_one_line_and_130(tmp_path):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    talk = start("chat", "-o", str(tmp_path / "talk"), **pipes)
    talk.stdin.write("missing.wav\n")
    talk.stdin.flush()
    assert "does not exist" in talk.stderr.readline()  # it waits for the next name now
    talk.send_signal(signal.SIGINT)
    out, err = talk.communicate(timeout=60)
    assert (talk.returncode, out, err) == (130, "", "aqaa: interrupted\n")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_before_there_is_a_command_line(monkeypatch, capsys):
    from aqaa import __main__ as command

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    assert command.main() == 130 and capsys.readouterr().err == "aqaa: interrupted\n"


@pytest.mark.parametrize("args", [["plan"], ["plan", "--json"], ["--help"], ["ask", "--help"]])
def test_a_reader_that_goes_away_ends_the_run_silently(args):
    reader, writer = os.pipe()
    os.close(reader)
    with start(*args, stdout=writer, stderr=subprocess.PIPE) as run:
        os.close(writer)
        assert run.communicate(timeout=60)[1] == "" and run.returncode == 1


@pytest.mark.parametrize("args, unbuffered", [(["plan"], ""), (["plan"], "1"), (["doctor", "--help"], "")])
def test_a_full_disk_under_stdout_is_one_sentence(args, unbuffered):
    with open("/dev/full", "wb") as full:
        run = start(*args, unbuffered=unbuffered, stdout=full, stderr=subprocess.PIPE)
        err = run.communicate(timeout=60)[1]
    assert run.returncode == 1 and err.startswith("aqaa: the ") and "(No space left on device)" in err
    assert err.count("\n") == 1


def test_closed_streams_are_no_fault():
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m aqaa plan >&- 2>&- <&-"], env=CHILD)
    assert done.returncode == 0


# ---- timings --------------------------------------------------------------------------------------------------------


def test_loading_is_not_counted(monkeypatch, capsys, tmp_path, tiny_folder, question):
    from aqaa import pipeline
    from aqaa.weights import model_folder

    events = []

    def noted(name, function):
        return lambda *args, **options: (events.append(name), function(*args, **options))[1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(pipeline.SAMPLING, "max_tokens", 80)
    monkeypatch.setattr(model_folder, "load_part", noted("load", model_folder.load_part))
    monkeypatch.setattr(model_folder, "read_text", noted("load", model_folder.read_text))
    monkeypatch.setattr(pipeline, "Ledger", noted("clock", pipeline.Ledger))
    args = ["ask", str(question), "--preset", str(tiny_folder), "--json"]
    assert cli.main([*args, "--engine", "fast"]) == 0
    out, err = capsys.readouterr()
    assert events == ["load"] * 6 + ["clock"]
    assert json.loads(out)["first_audio_ms"] is None
    assert err == "aqaa: note: --engine fast changes nothing on a CPU: its kernels need a GPU.\n"
    events.clear()
    assert cli.main([*args, "--stream"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert events == ["load"] * 6 + ["clock"]
    assert 0 <= facts["first_audio_ms"] <= 1000 * facts["real_time_factor"] * facts["seconds"] + 1
    assert np.isfinite(soundfile.read("answer.wav")[0]).all()
