"""The widget that converses, without a browser: a page's messages in, events, turns and blocks out; tiny weights."""

import gc
import json
import weakref

import numpy as np
import pytest
import torch

from aqaa import audio
from aqaa.config import GROUP_SECONDS, GROUP_SIZE
from aqaa.notebook import base, conversing, widgets
from aqaa.serve import sound
from aqaa.tokenizers import interleave

from .conftest import RATE, tone
from .test_widgets import Page, html, until

SAMPLING = {"seed": 3, "max_tokens": 60}
LONG = {"seed": 3, "max_tokens": 200, "min_audio": 100}  # ids: 2.4 s of sound at least
QUIET = np.zeros(RATE, np.float32)
ASKED = np.concatenate([QUIET[: RATE // 2], tone(0.8), QUIET])  # 0.3 s more than end a turn


class Talker:
    """A page on whose microphone somebody speaks; the clock is the test's."""

    def __init__(self, model, **options):
        self.now = 0.0
        self.widget = widgets.Conversation(model, interactive=True, clock=lambda: self.now, **{**SAMPLING, **options})
        self.front = self.widget._view

    def press(self, call="a"):
        self.call = call
        self.front.says("start", call=call)
        return self

    def send(self, event, call=None):
        self.front.says("event", call=call or self.call, text=json.dumps(event))

    def hear(self, samples):
        for part in audio.resample(torch.as_tensor(samples), RATE, sound.RATE).split(2400):
            self.send({"type": "input_audio_buffer.append", "audio": sound.packed(sound.pcm(part))})

    def events(self, kind=""):
        told = [message["event"] for message, _ in self.front.sent if message["type"] == "event"]
        return [event for event in told if kind in event["type"]]

    def wait(self, kind, count=1):
        until(lambda: len(self.events(kind)) >= count)
        assert len(self.events(kind)) == count, [event["type"] for event in self.events()]

    def ask(self, count=1):
        """The `count`-th question of this page, answered but not played yet."""
        self.hear(ASKED)
        self.wait("response.done", count)
        return self

    def played(self):
        """The loudspeaker has finished."""
        self.now += 60
        self.hear(QUIET[:1600])
        until(lambda: self.widget.turns[-1]["heard"] is not None)
        return self

    def settled(self):
        """Wait until all questions have their words."""
        until(lambda: all(turn["question"] for turn in self.widget.turns))
        return self.widget.turns


def kinds(ids, model):
    """How many ids of an answer are words, how many sound."""
    names = [interleave.KINDS[kind] for kind in interleave.kinds(ids, model.ids)]
    return {"text": names.count("text"), "audio": names.count("linguistic") + names.count("semantic")}


def words(ids, model):
    text = [token for token, kind in zip(ids, interleave.kinds(ids, model.ids)) if kind == interleave.TEXT]
    return model.text.decode(text).strip()


@pytest.fixture
def talker(tiny, monkeypatch):
    monkeypatch.setattr(base, "front_end", lambda script: Page)
    monkeypatch.setattr(tiny, "transcribe", lambda ids: f"question of {len(ids)} ids")
    made = []

    def make(**options):
        made.append(Talker(tiny, **options))
        return made[-1]

    yield make
    for one in made:
        one.widget.stop()


def test_nothing_starts_until_it_is_pressed(talker):
    one = talker()
    assert repr(one.widget) == "<conversation: 0 turns>" and one.widget.turns == [] and not one.widget.talking
    one.call = "a"
    one.hear(ASKED)
    assert one.front.sent == [] and one.front.state["call"] == ""
    one.press()
    assert one.widget.talking and one.front.state["call"] == "a"
    one.wait("session.created")


def test_three_turns_and_what_the_next_cell_gets(talker, tiny):
    one = talker().press()
    for number in (1, 2, 3):
        one.ask(number).played()
    turns = one.settled()
    assert [turn["question"].startswith("question of") for turn in turns] == [True] * 3
    for turn in turns:
        assert turn["answer"] == turn["heard"] == words(turn["ids"], tiny) and not turn["interrupted"]
        seconds = len(turn["audio"]) / one.widget.rate
        assert seconds == pytest.approx(kinds(turn["ids"], tiny)["audio"] * GROUP_SECONDS / GROUP_SIZE, abs=0.1)
    assert turns[0]["ready_ms"] == 700  # this clock stands still: only the pause
    state = one.front.state["turns"]
    assert [{name: turn[name] for name in ("question", "answer")} for turn in state] == [
        {name: turn[name] for name in ("question", "answer")} for turn in turns]  # fmt: skip
    one.front.says("first", item=one.events("output_audio.delta")[0]["item_id"], ms=912)
    assert one.widget.turns[0]["sound_ms"] == 912 and repr(one.widget) == "<conversation: 3 turns>"


def test_blocks_come_while_the_answer_is_made(talker, tiny):
    one = talker(**LONG).press().ask()
    grown = [message["turn"]["blocks"] for message, _ in one.front.sent if message["type"] == "turn"]
    grown = [blocks for blocks in grown if blocks]
    sizes = [sum(block[-1] for block in blocks) for blocks in grown]
    assert len(sizes) > 3 and sizes == sorted(sizes)
    last, layout = one.front.state["turns"][0]["blocks"], tiny.layout
    for name, count in kinds(one.widget.turns[0]["ids"], tiny).items():
        assert sum(n for kind, *_, n in last if kind == name) == count
    assert all(n <= layout.audio_block and n % GROUP_SIZE == 0 for kind, *_, n in last if kind == "audio")
    assert last[0][0] == "text" and last[0][-1] <= layout.text_block and last[1] == ["audio", layout.audio_block]


def test_speech_interrupts_and_the_page_says_what_was_heard(talker):
    one = talker(**LONG).press().ask()
    one.now += 1.0
    item = one.events("output_audio.delta")[0]["item_id"]
    one.hear(tone(0.6))
    one.wait("speech_started", 2)
    one.send({"type": "conversation.item.truncate", "item_id": item, "audio_end_ms": 0})
    one.wait("truncated")
    assert one.widget.turns[0]["heard"] == "" and one.widget.turns[0]["interrupted"]
    assert one.front.state["turns"][0]["interrupted"]
    one.hear(QUIET)
    one.wait("response.done", 2)
    assert len(one.widget.turns) == 2 and not one.widget.turns[1]["interrupted"]


def test_a_call_ends_and_the_next_one_goes_on_from_there(talker):
    one = talker().press("a").ask().played()
    one.settled()
    first = weakref.ref(one.widget._call)
    one.front.says("stop")
    assert not one.widget.talking and one.front.state["call"] == "" and len(one.front.state["turns"]) == 1
    gc.collect()
    assert first() is None  # its cache is free
    said = one.widget.turns[0]
    one.hear(ASKED)  # what is still on its way is nobody's
    one.press("b").hear(ASKED)
    one.wait("response.done", 2)
    one.played().settled()
    assert one.widget._call.talk.history[:2] == [("user", said["question"]), ("assistant", said["answer"])]
    assert len(one.widget.turns) == 2
    one.front.says("clear")
    assert one.widget.turns == [] == one.front.state["turns"] and not one.widget.talking
    one.press("c").hear(ASKED)
    one.wait("response.done", 3)
    assert len(one.widget._call.talk.turns) == 1


@pytest.mark.parametrize("heard", [{}, {"heard": 10_000}])
def test_a_page_that_goes_in_the_middle_of_an_answer_leaves_what_it_heard(talker, heard):
    one = talker(**LONG).press().ask()
    one.now += 1.0
    if heard:
        heard["item"] = one.events("output_audio.delta")[0]["item_id"]
    one.front.says("stop", **heard)  # as the next page says at its beginning
    (turn,) = one.settled()
    assert turn["interrupted"] == (turn["heard"].split() != turn["answer"].split()) == (not heard)
    assert one.widget._past == ([("user", turn["question"]), ("assistant", turn["heard"])] if turn["heard"] else [])


def test_what_is_closed_leaves_its_static_form(talker):
    one = talker().press().ask()
    one.settled()
    one.front.close = lambda: one.front.state.update(closed=True)
    one.widget.close()
    assert one.front.state["closed"] and not one.widget.talking
    shown = html(one.widget)
    assert shown.count("<audio") == 1 and "question of" in shown and "What was said" in shown


def test_a_call_may_end_while_somebody_speaks_or_the_model_thinks(talker):
    one = talker().press("a")
    one.hear(tone(0.8))
    one.wait("speech_started")
    one.front.says("stop")
    assert one.widget.turns == [] and one.widget._past == []
    one.press("b").hear(ASKED)
    one.press("c")  # another page
    assert one.front.state["call"] == "c"
    one.front.says("event", call="b", text="{}")
    assert one.events("error") == [] and one.front.state["message"] == ""


def test_a_fault_is_a_sentence_and_the_next_question_is_answered(talker, tiny, monkeypatch):
    one, stream = talker(), tiny.stream

    def broken(*question, **options):
        monkeypatch.setattr(tiny, "stream", stream)
        raise MemoryError

    monkeypatch.setattr(tiny, "stream", broken)
    one.press().hear(ASKED)
    one.wait("error")
    assert "MemoryError" in one.front.state["message"]
    one.ask(len(one.events("response.done")) + 1)
    assert one.front.state["message"] == "" and one.widget.turns[-1]["answer"]
    one.send({"type": "nonsense"})
    until(lambda: one.front.state["message"])
    assert "nonsense" in one.front.state["message"]


def test_a_microphone_that_is_refused_is_told(talker):
    one = talker()
    one.front.says("error", name="NotAllowedError", message="")
    assert "does not allow this page" in one.front.state["message"]
    one.front.says("error", name="OddError", message="why not")
    assert "why not" in one.front.state["message"] and not one.widget.talking


def test_the_static_form_converses_with_recordings_and_gives_the_same_twice(tiny, question):
    one, other = (widgets.Conversation(tiny, [question, {"path": question}], **SAMPLING) for _ in range(2))
    assert repr(one) == "<conversation: 2 turns>" and html(one) == html(other)
    assert html(one).count("<audio") == 4 and "<img" in html(one) and not one.talking
    first, second = one.turns
    assert first["heard"] == first["answer"] and not second["interrupted"] and first["sound_ms"] is None
    assert first["answer"] == words(first["ids"], tiny)
    assert "Nothing was said" in html(widgets.Conversation(tiny))


def test_the_sound_of_old_turns_is_not_kept(tiny, question, monkeypatch):
    monkeypatch.setattr(conversing.Conversation, "KEPT", 1)
    turns = widgets.Conversation(tiny, [question] * 3, **SAMPLING).turns
    assert [turn["audio"] is None for turn in turns] == [True, True, False]
