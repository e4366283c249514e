"""What notebooks show: figures small and the same each time, players that play, words for those who see no picture."""

import base64
import io
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from aqaa.notebook import show
from aqaa.tokenizers import dialogue, interleave
from tests.conftest import RATE, tiny_config, tone

IDS = tiny_config().ids
TEXT = SimpleNamespace(tokenizer=SimpleNamespace(id_to_token=lambda token: f"▁p{token}"))
LINGUISTIC, SEMANTIC = [3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8, 9, 7, 9]
AUDIO = interleave.merge(LINGUISTIC, SEMANTIC, IDS)
ANSWER = dialogue.layout("ratio_10_15").arrange(range(70, 82), AUDIO * 2, IDS)
MAP = np.random.default_rng(0).standard_normal((80, 60))
TIMINGS = {"read": 0.1, "linguistic": 0.2, "semantic": 0.1, "generate": 0.5, "vocode": 0.4, "first_token": 0.42,
           "first_audio": 1.3, "total": 1.3, "first_audio_share": 1.0}  # fmt: skip
SCORES = {"logic": 0.5, "language": 0.9, "voice": 0.2}

FIGURES = {
    "waveform": lambda: show.waveform(tone(), RATE, "A tone"),
    "spectrogram": lambda: show.spectrogram(torch.from_numpy(tone(3.0))),
    "mel": lambda: show.mel(MAP, title="Noise"),
    "maps": lambda: show.maps([("one", MAP), ("two", MAP[:, :30])]),
    "streams": lambda: show.streams(LINGUISTIC, torch.tensor(SEMANTIC), tone(0.36)),
    "sequence": lambda: show.sequence([1, *AUDIO * 8], IDS, TEXT),
    "blocks": lambda: show.blocks(ANSWER, IDS, TEXT, times=0.01),
    "attention": lambda: show.attention(torch.softmax(torch.from_numpy(MAP), 1), columns=[f"k{i}" for i in range(60)]),
    "alignment": lambda: show.alignment([(0, 0.2, "a"), (0.2, 0.3, "river")], [(0, 0.15, 3), (0.15, 0.3, 4)]),
    "trajectory": lambda: show.trajectory([MAP * (1 - t) for t in (0, 0.5, 0.9)], [0, 0.5, 0.9]),
    "curves": lambda: show.curves([{"step": i, "loss": 1 / (i + 1), "other": ""} for i in range(20)], columns=["loss"]),
    "bars": lambda: show.bars({"one": 1, "two": 2.5}, "s"),
    "ledger": lambda: show.ledger(TIMINGS, 2.0),
    "radar": lambda: show.radar({"mini": SCORES, "full": {name: 1 - score for name, score in SCORES.items()}}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_small_described_and_the_same_each_time(name):
    figure = FIGURES[name]()
    html = figure._repr_html_()
    assert html == FIGURES[name]()._repr_html_()
    assert len(html) < 40_000
    alt = re.search(r'<img alt="([^"]+)"', html)[1]
    assert len(alt) > 8 and repr(figure).startswith(f"<figure: {alt}>")
    assert "0x" not in repr(figure) and "<figcaption>" in html and "http" not in html
    image = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])))
    assert image.mode == "P" and image.width == 720 and image.height < 800
    edge = np.asarray(image.convert("RGB"))
    frame = np.concatenate([edge[0], edge[-1], edge[:, 0], edge[:, -1]])
    assert (frame.min(1) > 200).mean() > 0.98  # white around: nothing is cut off at an edge


def test_every_public_name_of_the_contract_is_there():
    names = "setup sound compare waveform spectrogram mel maps streams sequence blocks attention alignment trajectory"
    names += " curves bars radar ledger table shape source recorded released check question questions"
    assert set(names.split()) <= set(show.__all__)
    assert all(hasattr(show, name) and getattr(show, name).__doc__ for name in names.split())


def test_title_and_alt_are_escaped_and_used():
    figure = show.bars({"a": 1}, title="<b>", alt='say "hi" & go')
    assert "<figcaption>&lt;b&gt;<" in figure._repr_html_()
    assert 'alt="say &quot;hi&quot; &amp; go"' in figure._repr_html_()
    assert repr(figure) == '<figure: say "hi" & go>'


def test_a_picture_shows_what_it_is_given():
    """The strong bins are bright: a low tone below, a high one above."""

    def brightness(pitch):
        time = np.arange(RATE) / RATE
        image = Image.open(io.BytesIO(show.spectrogram(np.sin(2 * np.pi * pitch * time), RATE).png)).convert("L")
        inside = np.asarray(image, dtype=float)[12:160, 80:600]
        return inside[:74].mean(), inside[74:].mean()

    above, below = brightness(200)
    assert below > above
    above, below = brightness(6000)
    assert above > below


@pytest.mark.parametrize("at", (0.25, 0.75))
def test_thinning_keeps_time(at):
    """A click in 4.1 s of sound, more than there are columns, is drawn at its place."""
    wav = np.zeros(int(4.1 * RATE))
    wav[int(at * len(wav))] = 1
    for figure, left, right in ((show.spectrogram(wav), 52, 655), (show.waveform(wav), 58, 717)):
        grey = np.asarray(Image.open(io.BytesIO(figure.png)).convert("L"), dtype=float)[12:100, left:right]
        column = np.abs(grey - np.median(grey, 1, keepdims=True)).sum(0).argmax()
        assert abs(column / grey.shape[1] - at) < 0.015


def test_kinds_differ_in_letter_and_in_lightness_enough_for_black_print():
    letters, colours = zip(*show.KINDS.values())
    assert "".join(letters) == "TLSM" and len(set(colours)) == 4
    for colour in colours:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        assert (light + 0.05) / 0.05 > 4.5  # WCAG AA against black


def test_cells_cover_the_right_times():
    cells = show.token_cells(LINGUISTIC, SEMANTIC)
    assert cells["linguistic"][1] == (0.06, 0.12, 1) and cells["semantic"][1] == (0.04, 0.08, 6)
    for row in cells.values():
        assert row[0][0] == 0 and row[-1][1] == 0.36
        assert all(left[1] == right[0] for left, right in zip(row, row[1:]))


def test_an_answer_has_a_row_for_each_block_and_its_own_clock():
    from aqaa.notebook.strips import _block_ends, _clock, kinds_of

    assert "2 blocks: 12 text, 12 linguistic, 18 semantic, 2 marker" in repr(show.blocks(ANSWER, IDS, TEXT))
    assert _block_ends(kinds_of(ANSWER, IDS)) == [25, len(ANSWER)]
    assert np.allclose(_clock(0.5, 3), [0.5, 1, 1.5]) and np.allclose(_clock([1, 2, 3], 3), [1, 3, 6])


def test_a_player_is_mp3_of_the_right_length_and_loudness():
    wav = 0.1 * tone(1.3)
    player = show.sound(wav, RATE, title="A <tone>", transcript="mm & mm")
    assert repr(player) == '<sound 1.30 s @ 16000 Hz "mm & mm">'
    html = player._repr_html_()
    assert html == show.sound(torch.from_numpy(wav), RATE, title="A <tone>", transcript="mm & mm")._repr_html_()
    assert '<audio controls preload="none"' in html and "autoplay" not in html
    assert 'aria-label="A &lt;tone&gt;, mm &amp; mm, 1.30 s"' in html and "“mm &amp; mm”" in html
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])))
    assert rate == RATE and abs(len(heard) - len(wav)) <= 1152
    assert abs(np.abs(heard).max() - 10 ** (-3 / 20)) < 0.1
    assert len(html) < 1.3 * 9_000
    quiet, _ = soundfile.read(io.BytesIO(show.sound(wav, level=False).mp3))
    assert np.abs(quiet).max() < 0.2


def test_a_rate_that_mp3_lacks_is_raised_and_silence_stays_silent():
    heard, rate = soundfile.read(io.BytesIO(show.sound(np.zeros(9_000), 18_000).mp3))
    assert rate == 22_050 and abs(len(heard) / rate - 0.5) < 0.06 and np.abs(heard).max() < 1e-3


def test_compare_takes_pairs_and_players():
    row = show.compare(("one", tone()), ("two", tone(), "words"), show.sound(tone(rate=24_000), 24_000, "three"))
    assert repr(row).splitlines() == [
        "one: <sound 0.60 s @ 16000 Hz>", 'two: <sound 0.60 s @ 16000 Hz "words">', "three: <sound 0.60 s @ 24000 Hz>",
    ]  # fmt: skip
    assert row._repr_html_().count("<audio") == 3


def test_a_table_is_html_and_aligned_text():
    table = show.table([{"part": "a<b", "s": 1.23456}, {"part": "longer", "s": 22}], caption="Times")
    assert repr(table).splitlines() == ["Times", "part        s", "------  -----", "a<b     1.235", "longer     22"]
    html = table._repr_html_()
    assert "<caption>Times</caption>" in html and "a&lt;b" in html and html.count("<tr>") == 3
    assert repr(show.table([[1, "x"]])) == "1  x"


def staircase(n, slope):
    """What a causal bias alone prefers: softmax of -slope times distance, (n, n)."""
    gap = np.arange(n)[:, None] - np.arange(n)
    weights = np.where(gap < 0, 0.0, np.exp(-slope * np.maximum(gap, 0)))
    return weights / weights.sum(1, keepdims=True)


ONE_SURE = np.full((12, 40), 0.01) + 0.02 * (np.arange(40) % 5 == np.arange(12)[:, None] % 5)


@pytest.mark.parametrize("weights", [staircase(100, 0.0)[::8], staircase(60, 0.1)[::5], np.r_[np.eye(1, 40), ONE_SURE]])
def test_one_sure_query_does_not_darken_the_others(weights):
    image = np.asarray(Image.open(io.BytesIO(show.attention(weights).png)).convert("RGB"))
    cells = image[40:-45, 70:600].reshape(-1, 3).astype(int) @ (299, 587, 114) / 1000  # brightness below the first row
    assert (cells > 60).mean() > 0.45  # they are no single purple: much is clearly brighter than nothing
    assert len(np.unique(cells.round())) > 1


@pytest.mark.parametrize(("rows", "log", "said"), [
    ([{"step": i, "a": 0.1 + i / 1000, "b": 0.1, "c": 200.0 * i} for i in range(20)], False, ["a and b"]),
    ([{"step": i, "a": 0.1 + i / 1000, "b": 0.15, "c": 200.0 * i + 1} for i in range(20)], True, []),
    ([{"step": i, "a": float(i), "b": float(i), "c": float(i)} for i in range(5)], False,
     ["a and b", "a and c", "b and c"]),
    ([{"step": i, ("a", "b")[i % 2]: 1.0} for i in range(20)], False, []),
])  # fmt: skip
def test_curves_that_nobody_can_tell_apart_are_named(rows, log, said):
    alt = show.curves(rows, log=log).alt
    assert re.findall(r"(\w and \w) lie on one another", alt) == said


def test_radar_has_its_numbers_as_a_table():
    figure = show.radar(SCORES)
    assert repr(figure).splitlines()[-1].split() == ["voice", "20", "%"]
    assert "<table>" in figure._repr_html_()


def test_what_was_not_measured_is_no_zero_in_a_radar():
    open_spoke, zero = show.radar({**SCORES, "song": None}), show.radar({**SCORES, "song": 0})
    assert repr(open_spoke).splitlines()[-1].split() == ["song", "not", "measured"]
    assert open_spoke.png != zero.png


def test_axes_take_the_names_and_units_they_are_given():
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    assert show.curves(rows).png != show.curves(rows, xlabel="time (s)", ylabel="loss (nats)").png
    marked = [show.curves(rows, marks=marks).png for marks in (None, {"half": 1.5}, {"middle": 1.5}, {"half": 1.6})]
    assert len(set(marked)) == 4
    assert show.attention(MAP).png != show.attention(MAP, names=("frame", "code")).png


def test_in_a_stream_generating_and_vocoding_take_turns():
    """Also where the first sound came after what all generation took together."""
    late = {**TIMINGS, "first_audio": 1.0}
    assert show.ledger(late).png != show.ledger({**late, "first_audio_share": 0.4}).png


def test_shape_names_axes(capsys):
    show.shape("mel", torch.zeros(1, 80, 258), "batch", "bins", "frames")
    show.shape("ids", np.zeros(3, np.int64), "tokens")
    show.shape("list", [1, 2], "tokens")
    assert capsys.readouterr().out.splitlines() == [
        "mel  (batch 1, bins 80, frames 258)  float32", "ids  (tokens 3)  int64", "list  (tokens 2)  list",
    ]  # fmt: skip


def test_source_is_the_packages_code_with_a_relative_path():
    from aqaa import answer, audio, pipeline

    shown = show.source(audio.log_mel)
    assert repr(shown).startswith("<source of log_mel in aqaa/audio.py, ")
    words = shown._repr_markdown_()
    assert words.startswith("`aqaa/audio.py`") and "```python\n@full_precision\ndef log_mel" in words
    assert show.source(pipeline.AQAA.ask).code.startswith("def ask(")  # methods lose their indentation
    assert "def seconds" in show.source(answer.Answer.seconds).code
    assert "Vocoder(" in show.source(pipeline.AQAA.vocoder).code
    with pytest.raises(ValueError, match="no code in this package"):
        show.source(json.dumps)


def test_recorded_says_where_a_number_comes_from(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    run = {"date": "2000-01-01", "commit": "abc", "hardware": "2 cores", "command": "aqaa bench x", "value": 7}
    (tmp_path / "runs" / "x.json").write_text(json.dumps(run), encoding="utf-8")
    monkeypatch.setenv("AQAA_DATA", str(tmp_path))
    assert show.recorded("x")["value"] == 7
    assert capsys.readouterr().out == "recorded on 2000-01-01, commit abc, 2 cores: aqaa bench x\n"
    with pytest.raises(ValueError, match="no run 'y' is recorded in data/runs: there are x"):
        show.recorded("y")


def test_check_prints_or_fails_with_its_sentence(capsys):
    show.check(torch.tensor(True), "the sky is up")
    assert capsys.readouterr().out == "ok: the sky is up\n"
    with pytest.raises(AssertionError, match="this does not hold: two is three"):
        show.check(2 == 3, "two is three")
    with pytest.raises(ValueError, match="many values"):
        show.check(torch.tensor([True, True]), "all")


def test_a_released_folder_is_what_the_environment_names(monkeypatch, tmp_path, capsys):
    for role, name in show.PUBLISHED.items():
        monkeypatch.setenv(f"AQAA_{role.upper()}", str(tmp_path))
        assert show.released(role) == tmp_path and capsys.readouterr().out == ""
        for nothing in (lambda v: monkeypatch.setenv(v, ""), monkeypatch.delenv):
            nothing(f"AQAA_{role.upper()}")
            assert show.released(role) is None
            said = capsys.readouterr().out
            assert f"$AQAA_{role.upper()} " in said and name in said and said.count("\n") == 1


def test_questions_are_found_by_intent_or_name():
    known = show.questions()
    assert all(entry["path"].is_file() and not entry["path"].is_absolute() for entry in known)
    entry = show.question("capital")
    assert entry["intent"] == "capital" and show.question(entry["file"]) == entry
    with pytest.raises(ValueError, match="choose one of .*capital"):
        show.question("nonsense")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: show.sound([]), "the sound is empty"),
        (lambda: show.sound(np.array([0, np.nan])), "NaN or infinity"),
        (lambda: show.sound(np.zeros((2, 9))), r"1 dimension, not the shape \(2, 9\)"),
        (lambda: show.sound("a.wav"), "must be numbers"),
        (lambda: show.sound(tone(), 0), "cannot be played"),
        (lambda: show.compare(), "needs sounds"),
        (lambda: show.compare(tone()), r"takes \(title, wav\)"),
        (lambda: show.spectrogram(tone(0.02)), "30 ms"),
        (lambda: show.mel(np.zeros(9)), "2 dimensions"),
        (lambda: show.maps([]), "at least one"),
        (lambda: show.streams([], [1]), "the linguistic codes is empty"),
        (lambda: show.streams([0.5], [1]), "whole numbers"),
        (lambda: show.sequence([], IDS), "empty"),
        (lambda: show.blocks(ANSWER, IDS, TEXT, times=[1, 2]), "one number for each of"),
        (lambda: show.attention(MAP, rows=["a"]), "80 labels"),
        (lambda: show.alignment([], [(0, 1, "a")]), "words must be a list"),
        (lambda: show.trajectory([MAP], [0, 1]), "one time for each state"),
        (lambda: show.curves([{"a": 1}]), "column 'step'"),
        (lambda: show.curves("absent.csv"), "no log absent.csv"),
        (lambda: show.bars({}), "empty"),
        (lambda: show.ledger({}), "timings of an Answer"),
        (lambda: show.radar({"a": 1, "b": 0}), "at least three"),
        (lambda: show.radar({"a": 1, "b": 0, "c": 7}), "between 0 and 1"),
        (lambda: show.table([[1, 2], [3]]), "same number of cells"),
        (lambda: show.shape("x", np.zeros((2, 3)), "a"), "give as many names"),
        (lambda: show.questions("tests"), "no questions.json"),
        (lambda: show.released("speaker"), "choose tokenizer, backbone, vocoder"),
    ],
)
def test_bad_input_gets_one_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        call()
    assert str(caught.value).endswith((".", "!")) and "\n" not in str(caught.value)


def test_setup_seeds_everything_quietly():
    code = (
        "import warnings, random; warnings.simplefilter('error');"
        "import numpy as np, torch; from aqaa.notebook import show;"
        "draw = lambda: (show.setup(3), random.random(), np.random.rand(), torch.rand(1).item());"
        "assert draw() == draw(); assert torch.get_num_threads() == 1; print(torch.tensor([1e-4]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and result.stderr == "" and "e-" not in result.stdout, result.stderr
