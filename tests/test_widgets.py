"""Widgets without a browser: what they do with the messages of a page, and what they show without one."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from aqaa import config
from aqaa.answer import Piece
from aqaa.evaluation.mos import interval
from aqaa.notebook import base, explore, planner, talk, widgets
from aqaa.scale import plan as sums
from aqaa.scale.plan_table import plans, setups
from aqaa.sound_headers import AudioError
from aqaa.tokenizers import dialogue, interleave
from aqaa.tokenizers.text import MANNERS, tagged

from .conftest import RATE, tone

WAIT = 20  # seconds a thread may take


class Page:
    """Stands in for the anywidget: keeps what it is sent, and says what a page would say."""

    def __init__(self, data, state):
        self.data, self.state, self.sent = data, state, []

    def on_msg(self, handler):
        self.handler = handler

    def send(self, message, buffers):
        self.sent.append((message, buffers))

    def says(self, kind, *buffers, **message):
        self.handler(self, {"type": kind, **message}, list(buffers))

    def heard(self):
        return [message["type"] for message, _ in self.sent]


@pytest.fixture
def page(monkeypatch):
    """Widgets made after this have a Page as their view: page(widget)."""
    monkeypatch.setattr(base, "front_end", lambda script: Page)
    return lambda widget: widget._view


def html(widget):
    """The static view, and that nothing in it needs a script or a network."""
    bundle = widget._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html"} and "0x" not in bundle["text/plain"]
    assert "<script" not in bundle["text/html"] and "http" not in bundle["text/html"]
    return bundle["text/html"]


def speak(page, seconds=0.6, rate=44_100, pitch=150.0):
    wave = tone(seconds, rate, pitch)
    page.says("start", rate=rate)
    for part in np.array_split(wave, 4):
        page.says("chunk", memoryview(part.tobytes()))
    return wave


def test_a_static_recorder_holds_its_fallback(question):
    recorder = talk.Recorder(question, transcript="a tone")
    assert recorder.state == "fallback" and repr(recorder) == "<recorder: fallback, 0.60 s>"
    assert np.allclose(recorder.audio(), tone(), atol=1e-4) and recorder.audio(8000).shape == (4800,)
    assert "<audio" in html(recorder) and "a tone" in html(recorder)


def test_the_fallback_may_be_samples_or_a_question_of_the_collection(question):
    assert torch.equal(talk.Recorder((tone(), RATE)).audio(), torch.from_numpy(tone()))
    assert talk.Recorder({"path": question, "transcript": "hello"}).transcript == "hello"
    with pytest.raises(AudioError, match="missing|no such|not there|does not exist"):
        talk.Recorder("nowhere.wav")


def test_record_twice_then_go_back(page, question):
    recorder = talk.Recorder(question, interactive=True)
    front = page(recorder)
    assert recorder.state == front.state["phase"] == "idle"
    for pitch in (150.0, 300.0):
        wave = speak(front, pitch=pitch)
        assert recorder.state == "recording"
        with pytest.raises(RuntimeError, match="press its Stop button"):
            recorder.audio()
        front.says("stop")
        assert recorder.state == "recorded" and repr(recorder) == "<recorder: recorded, 0.60 s>"
        assert np.array_equal(recorder.audio(44_100), wave)
        assert len(recorder.audio()) == 9600 and len(front.state["sound"]) == 2 * 9600
    front.says("clear")
    assert recorder.state == "idle" and front.state["sound"] is None
    assert np.allclose(recorder.audio(), tone(), atol=1e-4)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([("error", {"name": "NotAllowedError", "message": "Permission denied"})], "does not allow this page"),
        ([("error", {"name": "NotFoundError", "message": ""})], "No microphone was found"),
        ([("error", {"name": "InsecurePage", "message": ""})], "localhost or https"),
        ([("error", {"name": "OddError", "message": "why not"})], "OddError: why not"),
        ([("start", {"rate": 48_000}), ("stop", {})], "Only 0.0 s"),
        ([("start", {"rate": 48_000}), ("chunk", np.zeros(24_000, np.float32)), ("stop", {})], "is silent"),
        ([("start", {"rate": 48_000}), ("chunk", np.full(24_000, np.nan, np.float32)), ("stop", {})], "is silent"),
    ],
)
def test_a_refusal_says_why_and_the_fallback_stands_in(page, question, messages, reason):
    recorder = talk.Recorder(question, interactive=True)
    for kind, content in messages:
        words, sound = (content, ()) if isinstance(content, dict) else ({}, (content.tobytes(),))
        page(recorder).says(kind, *sound, **words)
    assert recorder.state == "refused" and reason in recorder.message and "sample question is used" in recorder.message
    assert len(recorder.audio()) == 9600


def test_a_recording_has_a_limit_and_stray_messages_do_no_harm(page, question):
    recorder = talk.Recorder(question, interactive=True)
    front = page(recorder)
    front.says("chunk", tone().tobytes())
    front.says("stop")
    assert recorder.state == "idle"
    front.says("start", rate=8000)
    second = np.full(8000, 0.5, np.float32).tobytes()
    for _ in range(recorder.LIMIT + 5):
        front.says("chunk", second)
    front.says("chunk", b"abc")
    front.says("stop")
    assert len(recorder.audio(8000)) == recorder.LIMIT * 8000
    front.says("nonsense")
    assert "nonsense" in front.state["error"]
    front.says("clear")
    assert front.state["error"] == ""


def test_a_static_player_collects_the_answer(tiny, question):
    player = talk.Player()
    assert repr(player) == "<player: idle, 0.00 s>" and "Nothing said yet" in html(player)
    assert player.play_stream(tiny, question, seed=3, max_tokens=120) is player
    whole = tiny.ask(question, seed=3, max_tokens=120)
    assert player.answer.tokens == whole.tokens and player.text == player.answer.text
    assert torch.equal(player.heard, player.answer.audio)
    assert player.report["where"] == "kernel" and player.report["chunks"] >= 1 and player.report["first_ms"] > 0
    assert repr(player).startswith(f"<player: done, {player.answer.seconds:.2f} s") and "<audio" in html(player)


def test_a_recorder_can_be_asked_directly(tiny, question):
    player = talk.Player().play_stream(tiny, talk.Recorder(question), max_tokens=60)
    assert player.answer.tokens == tiny.ask(question, max_tokens=60).tokens


def finish(player):
    player.join(WAIT)
    assert not player._thread.is_alive()


def until(condition):
    """Wait for a thread, but not for ever."""
    end = time.monotonic() + WAIT
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


def in_order(messages, player):
    """The numbered messages of one answer and nothing else, and their sound is the answer."""
    kinds = [message["type"] for message, _ in messages if message["type"] != "silence"]
    assert kinds[0] == "start" and kinds[-1] == "end" and set(kinds[1:-1]) == {"chunk"}
    numbers = [message["number"] for message, _ in messages]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return b"".join(sound for message, sound in messages if message["type"] == "chunk")


def test_a_page_that_python_cannot_hear_yet_gets_the_answer_in_the_state(page, tiny, question):
    """With Run All nothing that a page says is read before the last cell."""
    player = talk.Player(interactive=True).play_stream(tiny, question, seed=3, max_tokens=120)
    front = page(player)
    finish(player)
    assert front.sent == [] and player.answer.text == front.state["text"].strip()
    waiting = [(message, message["sound"]) for message in front.state["waiting"]]
    assert abs(waiting[0][0]["sent"] / 1000 - time.time()) < WAIT
    assert in_order(waiting, player) == base.pcm16(player.answer.audio) == front.state["sound"]
    assert "pieces, the first of them after" in front.state["message"] and "sound" not in front.state["message"]
    front.says("ready")  # after the last cell; later, that of a page that was loaded again: it stays silent
    assert front.sent == [] and front.state["waiting"] == []
    front.says("report", chunks=7, gaps=1, first_ms=240)
    assert player.report == {"chunks": 7, "gaps": 1, "first_ms": 240, "where": "page"}
    assert "7 pieces, first sound after 240 ms, 1 gap." in front.state["message"]
    player.play_stream(tiny, question, seed=3, max_tokens=120)  # now Python knows that a page listens
    finish(player)
    sent = [(message, bytes(buffers[0]) if buffers else None) for message, buffers in front.sent]
    assert in_order(sent, player) == front.state["sound"] and front.state["waiting"] == []


def test_a_page_that_comes_late_misses_nothing_and_hears_nothing_twice(page):
    model, player = Slow(), talk.Player(interactive=True)
    front, kept = page(player), []
    player.play_stream(model, "q")
    until(lambda: sum(message["type"] == "chunk" for message in front.state["waiting"]) >= 2)
    kept += [message["number"] for message in front.state["waiting"]]
    front.says("ready")
    model.more.release()
    until(lambda: "chunk" in front.heard())
    player.stop()
    model.more.release()
    finish(player)
    kept += [message["number"] for message, _ in front.sent]
    assert kept == list(range(kept[0], kept[0] + len(kept)))


class Slow:
    """A model whose answer never ends; `more` lets one piece out."""

    vocoder = SimpleNamespace(sample_rate=RATE)

    def __init__(self):
        self.more = threading.Semaphore(2)

    def stream(self, question, **sampling):
        while self.more.acquire(timeout=WAIT):
            yield Piece(" la", torch.from_numpy(tone(0.1)))


@pytest.mark.parametrize("by", ["page", "cell"])
def test_stop_in_the_middle(page, by):
    model, player = Slow(), talk.Player(interactive=True)
    front = page(player)
    front.says("ready")
    player.play_stream(model, "q")
    until(lambda: front.heard().count("chunk") >= 2)
    front.says("stop") if by == "page" else player.stop()
    model.more.release()
    finish(player)
    assert player.answer is None and front.state["phase"] == "stopped" and player.text == "la la"
    assert len(player.heard) == 2 * 1600 and "Stopped" in front.state["message"]


def test_a_second_question_ends_the_first(page):
    first, player = Slow(), talk.Player(interactive=True)
    page(player).says("ready")
    player.play_stream(first, "q")
    thread = player._thread
    first.more.release()
    second = Slow()
    threading.Timer(0.05, first.more.release).start()
    player.play_stream(second, "q")
    assert not thread.is_alive()
    player.stop()
    second.more.release()
    finish(player)


def test_a_fault_is_shown_and_raised_where_it_is_waited_for(page, tiny):
    silent = (np.zeros(RATE, np.float32), RATE)
    with pytest.raises(AudioError, match="silent"):
        talk.Player().play_stream(tiny, silent)
    player = talk.Player(interactive=True).play_stream(tiny, silent)
    with pytest.raises(AudioError, match="silent"):
        player.join(WAIT)
    assert "silent" in page(player).state["error"] and page(player).state["phase"] == "failed"
    player.join(WAIT)  # said once


def test_gaps_are_waits_between_pieces():
    assert talk.waits([]) == {"chunks": 0, "gaps": 0, "first_ms": None}
    pieces = [(0.5, 1.0), (1.0, 1.0), (2.6, 1.0), (3.0, 0.5)]
    assert talk.waits(pieces) == {"chunks": 4, "gaps": 1, "first_ms": 500.0}


def test_neighbours_are_the_nearest_others():
    table = torch.tensor([[0.0], [1.0], [3.0], [7.0], [7.5]])
    near = explore.neighbours([3, 0, 3], table, count=2)
    assert list(near) == [0, 3] and [other for other, _ in near[0]] == [1, 2] and [o for o, _ in near[3]] == [4, 2]
    usual = float((table - 7).abs().flatten().median())
    assert near[3][0][1] == round(0.5 / usual, 3)


def test_the_token_inspector_takes_merged_ids_or_two_rows(page, tiny, question):
    ids = tiny.listen(question)
    both = interleave.split(ids, tiny.ids)
    static = widgets.Tokens(tiny, ids, tone())
    assert repr(static) == f"<tokens: {len(both[0])} linguistic, {len(both[1])} semantic, 0.60 s>"
    assert "<img" in html(static) and "<table" in html(static)
    rows = page(widgets.Tokens(tiny, both, tone(), interactive=True)).data["rows"]
    assert [row["codes"] for row in rows] == list(both)
    assert [round(row["step"], 6) for row in rows] == [0.06, 0.04]
    assert all(set(row["near"]) == set(map(str, row["codes"])) for row in rows)
    with pytest.raises(ValueError, match="both kinds"):
        widgets.Tokens(tiny, [tiny.ids.n_text], tone())


def test_the_voice_control_asks_as_the_training_did(tiny, monkeypatch):
    asked = []
    generate = type(tiny).generate
    monkeypatch.setattr(type(tiny), "generate", lambda self, prompt, **options: (
        asked.append(prompt) or generate(self, prompt, **options | {"max_tokens": 30})))
    control = explore.VoiceControl(tiny, "the river runs")
    control.speak("slow", temperature=0)
    words = tiny.text.encode(tagged("the river runs", "slow"))
    assert asked[0] == dialogue.prompt([("user", words)], tiny.text, tiny.ids, marker=config.TTS)
    assert tiny.text.encode("(slow)")[-1] in asked[0]


def test_the_voice_control_speaks_and_measures(page, tiny, monkeypatch):
    monkeypatch.setattr(explore.VoiceControl, "LONGEST", 30)
    control = explore.VoiceControl(tiny, "good morning", interactive=True)
    front = page(control)
    assert sorted(m for group in front.data["groups"].values() for m in group) == sorted([*MANNERS, "normal"])
    front.says("speak", manner="happy", temperature=0.5, seed=2, sentence="The river runs")
    assert front.state["phase"] == "speaking" or front.state["takes"]
    control._thread.join(WAIT)
    (take,) = front.state["takes"]
    assert take["manner"] == "happy" and take["rate"] == RATE and front.heard() == ["play"]
    assert take["sound"] == base.pcm16(control.takes[0]["wav"])
    front.says("speak", manner="happy", temperature=0.5, seed=2, sentence="  ")
    control._thread.join(WAIT)
    assert "type a sentence" in front.state["error"] and front.state["phase"] == "idle"
    with pytest.raises(ValueError, match="unknown manner 'merry'"):
        control.speak("merry")


def test_the_static_voice_control_says_its_manners(tiny, monkeypatch):
    monkeypatch.setattr(explore.VoiceControl, "LONGEST", 30)
    control = explore.VoiceControl(tiny, "good morning", manners=("normal", "slow"))
    shown = html(control)
    assert shown.count("<audio") == 2 and "pitch, Hz" in shown
    assert html(control) == shown and len(control.takes) == 2
    assert repr(control) == '<voice control: "good morning", 2 takes>'


def test_blocks_come_in_the_order_of_the_layout():
    blocks = widgets.Interleave(13, 50).plan(10, 15, tokens_per_second=100)
    assert [(b["kind"], b["count"]) for b in blocks] == [
        ("text", 10), ("audio", 15), ("text", 4), ("audio", 15), ("audio", 15), ("audio", 5)]  # 3 words and text_end
    first = blocks[1]
    assert first["ready"] == first["plays"] == pytest.approx(0.25) and first["seconds"] == pytest.approx(0.36)
    assert blocks[3]["plays"] == pytest.approx(0.61) and blocks[3]["wait"] == 0  # ready at 0.44, when the first plays


def test_a_slow_model_leaves_silence_and_text_first_delays_the_first_sound():
    slow = explore.schedule(20, 60, 10, 15, tokens_per_second=30)
    assert sum(b["wait"] for b in slow[2:] if b["kind"] == "audio") > 0.5
    fast, late = (explore.schedule(20, 60, size, 15, 100)[1]["plays"] for size in (10, 21))
    assert late > fast
    assert explore.schedule(20, 60, 0, 15, 100)[0]["kind"] == "audio"
    with pytest.raises(ValueError, match="above 0"):
        explore.schedule(20, 60, 10, 15, 0)


@pytest.mark.parametrize(("n_text", "n_audio"), [(13, 95), (24, 120), (4, 60)])
def test_ids_and_seconds_put_the_layouts_in_one_order(n_text, n_audio):
    """What a chapter counts in ids until the vocoder can speak, the widget says in seconds."""
    ids, made = config.IdsConfig(), {}
    sound = interleave.merge([0] * (n_audio // 5 * 2), [0] * (n_audio // 5 * 3), ids)
    for name, layout in dialogue.LAYOUTS.items():
        answer = layout.arrange([ids.first_text] * n_text, sound, ids)
        audible = [place for place, token in enumerate(answer, 1) if token >= ids.n_text]
        made[name] = audible[explore.FIRST - 1]
    shown = html(widgets.Interleave(n_text, n_audio))
    for name, place in made.items():
        assert f'>{name}</td><td style="text-align:left">{place / 100:.2f}<' in shown, (name, place)


def test_a_long_block_is_spoken_while_it_is_made():
    long = explore.schedule(6, 100, 6, 50, 100)[1]
    assert long["plays"] == pytest.approx(0.21) and long["ready"] == pytest.approx(0.56) and long["wait"] == 0
    slow = explore.schedule(6, 100, 6, 50, 20)[1]  # five tokens take 0.25 s and last 0.12 s
    assert slow["wait"] == pytest.approx(7 * 0.25 - 9 * 0.12)  # nine groups are spoken until the tenth is made


def test_dragging_plans_anew(page):
    widget = widgets.Interleave(20, 62, interactive=True)
    front = page(widget)
    layouts = front.data["layouts"]
    assert widget.n_audio == 60 and layouts["ratio_3_5"] == [3, 5] and layouts["text_cot"] == [21, 15]
    front.says("set", text_block=3, audio_block=5)
    assert (front.state["text_block"], front.state["audio_block"], front.state["tokens_per_second"]) == (3, 5, 100)
    assert front.state["blocks"] == explore.schedule(20, 60, 3, 5, 100)
    front.says("set", audio_block=7)
    assert "multiple of 5" in front.state["error"] and front.state["audio_block"] == 5
    assert repr(widget) == "<interleave: 20 text and 60 audio tokens, 3:5>"
    shown = html(widgets.Interleave(20, 60))
    assert "<img" in shown and all(name in shown for name in dialogue.LAYOUTS)
    with pytest.raises(ValueError, match="at least one group"):
        widgets.Interleave(3, 4)


def test_the_stepper_shows_and_sounds_every_state(page):
    states = [torch.full((1, 8, 30), float(k)) + torch.arange(30) / 30 for k in range(4)]
    calls = []

    def synth(state):
        calls.append(state.shape)
        return state.flatten() / 10

    static = widgets.Ode(states, [0, 0.1, 0.4, 1], synth)
    assert repr(static) == "<ode: 3 steps, mel (8 bins, 30 frames)>" and not calls
    assert "<img" in html(static) and html(static).count("<audio") == 3
    assert calls == [(1, 8, 30)] * 3 and torch.equal(static.sound(3), states[3].flatten() / 10)
    data = page(widgets.Ode(states, [0, 0.1, 0.4, 1], synth, interactive=True)).data
    assert len(data["sounds"]) == 4 and [len(picture) for picture in data["pictures"]] == [240] * 4
    assert data["pictures"][3][29] == 255 and data["pictures"][3][0] == 0 and len(data["palette"]) == 768
    with pytest.raises(ValueError, match="one time for each"):
        widgets.Ode(states, [0, 1], synth)


@pytest.mark.parametrize("marks", [[3, 4, 5, 4, 2, 5], [3, 3, 4, 3, 2, 3], [1, 5], [4, 5, 5], [1, 2, 1], [4, 4, 4]])
def test_the_interval_is_students(marks):
    mean, low, high = interval(marks)
    assert mean == np.mean(marks)
    if np.std(marks):
        assert 1 <= low < mean < high <= 5  # no mean of marks lies outside their scale
        students = np.clip(stats.t.interval(0.95, len(marks) - 1, mean, stats.sem(marks)), 1, 5)
        assert (low, high) == pytest.approx(tuple(students))
    else:
        assert low == high == 4
    assert interval(marks[:1]) == (marks[0], None, None)


def test_a_listener_is_asked_in_random_order_without_names(page):
    pairs = [("teacher", tone(0.1)), ("mini", tone(0.2), "good morning"), ("teacher", tone(0.3))]
    form = widgets.Listening(pairs, interactive=True)
    front = page(form)
    assert form.result() == {} and "teacher" not in str({**front.data, "sounds": None})
    given = {0: 5, 1: 2, 2: 4}
    for listeners in (1, 2):
        front.says("submit", scores=[given[which] for which in front.state["order"]])
        assert front.state["done"] and len(form.marks) == listeners
        assert form.names == [pairs[which][0] for which in front.state["order"]]
        front.says("again")
        assert not front.state["done"] and sorted(front.state["order"]) == [0, 1, 2]
    result = form.result()
    assert result["teacher"] == dict(zip(("n", "mean", "low", "high"), (4, *interval([5, 4, 5, 4]))))
    assert result["mini"]["mean"] == 2 and result["all"]["n"] == 6
    for scores in ([1, 2], [1, 2, 6], [1, 2, 2.5], [0, 1, 2]):
        front.says("submit", scores=scores)
        assert front.state["error"] and len(form.marks) == 2
    assert repr(form) == "<listening test: 3 sounds, 2 listeners>"


def test_the_static_listening_test(tiny):
    form = widgets.Listening([("mini", tone(0.2), "good morning")])
    assert "5 excellent" in html(form) and "Sound 1" in html(form) and "mini" not in html(form)
    with pytest.raises(ValueError, match="1 marks from 1 to 5"):
        form.rate_all([0])
    assert form.rate_all([4]) == {"mini": {"n": 1, "mean": 4, "low": None, "high": None}}
    assert "95 % confidence" in html(form)
    with pytest.raises(ValueError, match="needs sounds"):
        widgets.Listening([])


def test_the_static_planner_compares_the_usual_gpus():
    static = widgets.Planner(context=8192)
    shown = html(static)
    card = f"{static.chosen.total:.1f} of 139.8 GiB a card"
    assert repr(static) == f"<planner: 130b int4 g128 on 1xH200, 8192 ids, {card}>"
    assert "<img" in shown and "with 8192 ids" in shown and card in shown
    for found in plans(setups("130b", context=8192)):
        setup = found.setup
        row = f">{setup.count}x{setup.gpu.name}</td><td style=\"text-align:left\">{setup.format}</td>"
        assert (row in shown) == (setup.weights != "int8")
        if found.fits and setup.weights != "int8":
            numbers = (found.floor * 1000, 1), (found.ceiling, 0), (found.rate or 0, 0), (found.delay[20], 2)
            line = shown[shown.index(row) :].split("</tr>")[0]
            assert (">no<" in line) == (found.rate is None)
            numbers = [number for number in numbers if number[0]]
            assert all(f">{number:.{digits}f}<" in line for number, digits in numbers), (setup.format, line)
    assert shown.count("does not fit") == 3 and html(widgets.Planner(context=8192)) == shown


def test_choosing_plans_anew(page):
    widget = widgets.Planner(interactive=True)
    front = page(widget)
    assert front.data["counts"] == [1, 2, 4, 8] and "RTX-4090" in front.data["gpus"] and 32768 in front.data["contexts"]
    assert {name for name, *_ in front.data["parts"]} == set(front.state["plan"]["memory"])
    front.says("set", count=8, gpu="H100-80")
    front.says("set", context=4096)
    (setup,) = setups("130b", ["8xH100-80"], "int4", context=4096)
    assert front.state["plan"] == {**sums.plan(setup).to_dict(), "format": "int4 g64", "card": 79.1}
    assert widget.chosen == sums.plan(setup) and "8xH100-80 with 4096 ids" in front.state["message"]
    front.says("set", count=1, weights="bf16")
    assert not front.state["plan"]["fits"] and "would fit" in front.state["message"]
    assert "bf16 on 1xH100-80" in repr(widget)
    front.says("set", count=3)
    assert "3 GPUs cannot share" in front.state["error"] and front.state["chosen"]["count"] == 1
    with pytest.raises(ValueError, match="unknown GPUs 'abacus'"):
        widget.plan("abacus")


def test_the_planner_says_what_estimates_are_worth(tmp_path, monkeypatch):
    assert "measured 28: less than audio uses up" in planner.in_words(widgets.Planner().chosen)
    assert "not measured: audio would keep up" in planner.in_words(widgets.Planner(gpus="1xH100-80").chosen)
    assert "ceilings, not estimates" in planner.reliance() and "h200-130b-int4.json" in planner.reliance()
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(planner, "data_folder", lambda: tmp_path)
    assert "no run is recorded" in planner.reliance()
    run = '{"what": "scale", "setup": {"model": "130b", "gpus": "H200", "weights": "int4"}, "decode": [%s]}'
    (tmp_path / "runs" / "a.json").write_text(run % '{"context": 2048, "tokens_per_s": 14}', encoding="utf-8")
    (share,) = {row["share"] for row in planner.check(tmp_path / "runs")}
    assert f"reached {share} to {share}" in planner.reliance() and 0.2 < share < 0.21


def test_a_small_model_has_a_planner_too():
    static = widgets.Planner("mini", gpus="1xRTX-4090", weights="bf16")
    assert "1xRTX-4090" in html(static) and static.chosen.fits and "does not fit" not in html(static)


def test_every_widget_has_a_page(tiny, question):
    pytest.importorskip("anywidget")
    states = [torch.zeros(8, 30), torch.rand(8, 30)]
    made = [
        talk.Recorder(question, interactive=True),
        talk.Player(interactive=True),
        widgets.Tokens(tiny, tiny.listen(question), tone(), interactive=True),
        explore.VoiceControl(tiny, interactive=True),
        widgets.Interleave(20, 60, interactive=True),
        widgets.Ode(states, [0, 1], lambda state: state.flatten(), interactive=True),
        widgets.Listening([("a", tone())], interactive=True),
        widgets.Planner(interactive=True),
        widgets.Conversation(tiny, interactive=True),
    ]
    for widget in made:
        script = widget._view._esm
        assert "export default" in script and "http://" not in script.replace("http://www.w3.org/2000/svg", "")
        data, _ = widget._repr_mimebundle_()
        assert data["text/plain"] == repr(widget) and "application/vnd.jupyter.widget-view+json" in data
    assert len({type(widget._view) for widget in made}) == len(widgets.__all__) == 9
