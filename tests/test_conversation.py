"""Turns without a microphone: a clock of the test, packets of a buzzing voice and of noise, tiny weights."""

import gc
import weakref

import numpy as np
import pytest
import torch

from aqaa import audio
from aqaa.conversation import MAX_ANSWER, Conversation, State, Timing, Turn, words_heard
from aqaa.voice_activity import Activity, detector
from tests.conftest import RATE, fails, tone

RNG = np.random.default_rng
PACKET = 320
LONG = {"max_tokens": 400, "min_audio": 150}  # ids: 3.6 s of sound at least


class Person:
    """Drives a Conversation: time passes with the sound, and each unit of work takes `cost` seconds."""

    def __init__(self, model, cost=0.01, **options):
        self.now, self.cost, self.events = 0.0, cost, []
        options = {"seed": 3, "max_tokens": 60} | options
        self.talk = Conversation(model, clock=lambda: self.now, **options)
        self.noise = RNG(0)

    def say(self, sound, work=True):
        """Push it in packets; between two the model works as long as its units fit."""
        for packet in torch.as_tensor(sound).split(PACKET):
            until = self.now + len(packet) / RATE
            while work and self.talk.busy and self.now + self.cost <= until:
                self.now += self.cost
                self.events += self.talk.work()
            self.now = until
            self.events += self.talk.push(packet)
        return self

    def quiet(self, seconds, **options):
        return self.say((1e-3 * self.noise.standard_normal(int(seconds * RATE))).astype(np.float32), **options)

    def kinds(self):
        kinds = [event.kind for event in self.events]
        return [kind for i, kind in enumerate(kinds) if kind != "piece" or kinds[i - 1] != "piece"]

    def at(self, kind):
        return next(event.at for event in self.events if event.kind == kind)


@pytest.fixture
def person(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "transcribe", lambda ids: f"question of {len(ids)} ids")
    return lambda **options: Person(tiny, **options).quiet(0.5)


WHOLE = ["started", "paused", "ended", "piece", "answered", "transcribed", "finished"]


def test_a_turn_from_silence_to_silence(tiny, person):
    one = person().say(tone(1.0)).quiet(3.0)
    assert one.kinds() == WHOLE and one.talk.state is State.SILENCE and not one.talk.busy
    answered = next(event.text for event in one.events if event.kind == "answered")
    (_, question), (_, answer) = one.talk.history
    assert answer == answered and question.startswith("question of")
    assert one.at("started") == pytest.approx(0.5 + 0.12, abs=0.05)
    assert one.at("paused") == pytest.approx(1.5 + 0.2, abs=0.1)
    assert one.at("ended") == one.at("piece") == pytest.approx(1.5 + 0.7, abs=0.1)  # it was ready
    sounds = [len(event.audio) / RATE for event in one.events if event.kind == "piece"]
    assert one.at("finished") == pytest.approx(one.at("ended") + sum(sounds), abs=0.05)
    assert dict(one.talk.counts) == {"turns": 1, "speculations": 1, "used": 1}


def test_the_same_sound_gives_the_same_events_whatever_the_packets(tiny, person):
    one, other = (person().say(tone(1.0)).quiet(3.0) for _ in range(2))
    assert [(e.kind, e.at, e.text) for e in one.events] == [(e.kind, e.at, e.text) for e in other.events]
    sound = np.concatenate([np.zeros(8000, np.float32), tone(1.0), np.zeros(16_000, np.float32)])
    found = []
    for size in (7, 160, 333, 5000):
        talk = Conversation(tiny, clock=lambda: 0.0)
        found.append([event.kind for packet in torch.from_numpy(sound).split(size) for event in talk.push(packet)])
    assert found == [["started", "paused", "ended"]] * 4


def test_a_speculation_says_what_ask_says(tiny, person, monkeypatch):
    heard, stream = [], tiny.stream
    monkeypatch.setattr(tiny, "stream", lambda ids, **options: heard.append(ids) or stream(ids, **options))
    one = person().say(tone(1.0)).quiet(3.0)
    (ids,) = heard
    answer = tiny.ask(ids, seed=3, max_tokens=60)
    live = torch.cat([event.audio for event in one.events if event.kind == "piece"])
    assert one.talk.history[1][1] == answer.text and len(live) == len(answer.audio)


def test_more_speech_discards_the_speculation(person):
    one = person().say(tone(0.8)).quiet(0.4).say(tone(0.8)).quiet(3.0)
    assert one.kinds() == [*WHOLE[:2], "resumed", *WHOLE[1:]]
    assert one.talk.counts["speculations"] == 2 and one.talk.counts["used"] == one.talk.counts["turns"] == 1
    (_, question), _ = one.talk.history
    alone = person().say(tone(0.8)).quiet(3.0)
    n, of_one_half = (int(text.split()[2]) for text in (question, alone.talk.history[0][1]))
    assert n - of_one_half == pytest.approx(1.2 / 0.024, abs=10)  # both halves and the pause between them


def test_speech_before_any_sound_of_the_answer_is_still_the_question(person):
    one = person(speculate=False, cost=5.0).say(tone(0.8)).quiet(0.9)
    assert one.talk.state is State.REPLYING and not one.talk.counts["turns"]
    one.say(tone(0.5))
    assert one.talk.state is State.SPEAKING and one.kinds()[-1] == "resumed"
    one.cost = 0.01
    one.quiet(3.0)
    assert one.kinds()[-4:] == WHOLE[-4:] and len(one.talk.history) == 2
    assert one.talk.counts["turns"] == 1 and not one.talk.counts["speculations"]


def test_an_interruption_stops_the_sound_and_keeps_what_was_heard(person):
    one = person(**LONG).say(tone(1.0)).quiet(1.6)
    assert one.talk.state is State.REPLYING
    one.say(tone(0.36))
    (event,) = [event for event in one.events if event.kind == "interrupted"]
    assert one.kinds()[-2:] == ["interrupted", "started"] and one.talk.state is State.SPEAKING
    assert event.at - (one.now - 0.36) <= 0.32  # after 0.3 s of speech, in the packet that makes them
    said = "".join(event.text for event in one.events if event.kind == "piece").split()
    heard = event.text.split()
    assert heard == said[: len(heard)] and len(heard) < len(said)
    one.say(tone(0.5)).quiet(4.0)
    first, second = one.talk.history[:2], one.talk.history[2:]
    assert (first[1][1] == event.text if heard else not second) and one.talk.counts["interruptions"] == 1


def test_a_player_may_know_better_what_was_heard(person):
    one = person(**LONG).say(tone(1.0)).quiet(1.6).say(tone(0.36)).quiet(0.1)
    said = "".join(event.text for event in one.events if event.kind == "piece").split()
    one.talk.truncate(100.0)
    assert one.talk.history[1][1].split() == said
    one.talk.truncate(0.0)
    assert one.talk.history == []


def test_an_answer_that_was_played_out_here_was_cut_short_there(person):
    """A player starts later than the clock thinks; its listener's words correct the prompt of the next question."""
    one = person().say(tone(0.6)).quiet(3.0)
    assert one.talk.state is State.SILENCE and len(one.talk.history) == 2
    one.say(tone(0.5))
    assert one.talk._listener.history == one.talk.history
    one.talk.truncate(0.0)
    assert one.talk.history == one.talk._listener.history == []


def test_a_button_in_mid_word_ends_the_question(person):
    one = person(speculate=False).say(tone(0.8))
    one.events += one.talk.commit()
    one.say(tone(0.06), work=False)
    assert one.talk.state is State.REPLYING and one.kinds()[-1] == "ended"
    one.say(tone(0.2), work=False)  # more than the rest of a word
    assert one.talk.state is State.SPEAKING and one.kinds()[-1] == "resumed"


def test_what_goes_on_too_long_is_not_kept(person, monkeypatch):
    monkeypatch.setattr("aqaa.conversation.LONGEST", 2 * RATE)
    one = person(speculate=False).say(tone(0.8), work=False).quiet(3.0, work=False)
    assert sum(map(len, one.talk._unheard + one.talk._held)) <= 2 * RATE + PACKET
    one.say(tone(0.5), work=False).quiet(0.3, work=False)
    assert one.talk.state is State.REPLYING and "resumed" not in one.kinds()
    assert one.quiet(4.0).talk.counts["turns"] == 1


def test_turns_are_found_in_another_way_from_now_on(person):
    one = person()
    one.talk.tune("energy", Timing(end=0.3, pause=0.3, before=0.0), speculate=False)
    one.quiet(0.5).say(tone(1.0)).quiet(0.8)
    assert one.kinds()[:3] == ["started", "paused", "ended"]
    assert one.at("ended") == pytest.approx(2.0 + 0.3, abs=0.15) and len(one.talk._before) == 15  # frames: 0.3 s
    with fails("bells", error=ValueError):
        one.talk.tune("bells")


@pytest.mark.parametrize("sound", [tone(0.2), 0.3 * RNG(1).standard_normal(16_000).astype(np.float32)])
def test_a_short_word_or_a_noise_does_not_interrupt(person, sound):
    one = person(**LONG).say(tone(1.0)).quiet(1.2)
    assert one.talk.state is State.REPLYING
    one.say(sound).quiet(0.3)
    assert one.talk.state is State.REPLYING and "interrupted" not in one.kinds()


def test_who_may_not_interrupt_is_not_heard(person):
    one = person(**LONG, interruptible=False).say(tone(1.0)).quiet(1.2).say(tone(1.0))
    assert one.talk.state is State.REPLYING and one.kinds().count("started") == 1


def test_a_button_begins_and_ends_a_question(person):
    one = person(detector="pressed", interruptible=False)  # its quiet half second begins the question
    one.say(tone(1.0)).quiet(2.0)
    assert one.kinds() == ["started"] and one.talk.state is State.SPEAKING
    one.events += one.talk.commit()
    assert one.talk.state is State.REPLYING and one.talk.commit() == []
    while one.talk.busy:
        one.events += one.talk.work()
    assert one.kinds() == ["started", "ended", "piece", "answered", "transcribed"]


def test_stop_leaves_a_question_or_an_answer(person):
    one = person().say(tone(1.0))
    assert one.talk.stop() == [] and one.talk.state is State.SILENCE
    one.quiet(1.0)
    assert one.kinds() == ["started"]
    one.say(tone(1.0)).quiet(0.8)
    (event,) = one.talk.stop()
    assert event.kind == "interrupted" and one.talk.state is State.SILENCE
    one.quiet(2.0)
    assert one.kinds()[-1] == "transcribed" and not one.talk.busy


def test_a_click_is_refused_in_a_sentence(person, monkeypatch):
    one = person(timing=Timing(start=0.04, pause=0.1, before=0.02))
    def short(listener):
        raise audio.AudioError(audio.TOO_SHORT)

    monkeypatch.setattr("aqaa.listening.Listener.peek", short)
    one.say(tone(0.2)).quiet(2.0)
    assert one.kinds() == ["started", "paused", "ended", "refused"]
    assert one.events[-1].text == audio.TOO_SHORT and one.talk.state is State.SILENCE
    assert one.talk.counts["refused"] == 1 and one.talk.history == []


def test_a_question_without_an_end_is_ended(person, monkeypatch):
    monkeypatch.setattr("aqaa.conversation.LONGEST", 2 * RATE)
    one = person(cost=0.002).say(tone(4.0), work=False)
    assert one.kinds() == ["started", "ended"] and one.talk.state is State.REPLYING


def test_a_fault_of_the_model_ends_one_turn(tiny, person, monkeypatch):
    one = person()
    with monkeypatch.context() as broken, pytest.raises(RuntimeError):
        broken.setattr(tiny, "stream", fail)
        one.say(tone(1.0)).quiet(2.0)
    assert one.talk.stop() == [] and one.talk.state is State.SILENCE
    one.events.clear()
    assert one.quiet(0.5).say(tone(1.0)).quiet(3.0).kinds() == WHOLE and len(one.talk.history) == 2


def fail(*_, **__):
    raise RuntimeError("no")


def test_the_oldest_turns_leave_a_full_context(tiny, person, monkeypatch):
    one = person()
    monkeypatch.setattr("aqaa.conversation.MAX_ANSWER", one.talk._room - 240)
    for _ in range(4):
        one.say(tone(0.6)).quiet(2.5)
    assert one.talk.counts["turns"] == 4 and 2 <= len(one.talk.history) < 8


def test_a_full_context_is_half_emptied_so_that_not_every_turn_reads_it_anew(tiny, person):
    talk = person().say(tone(0.8)).talk
    talk._hear()
    ids, add = talk._listener.ids, lambda: talk.turns.append(Turn([], "what is one plus two", "one plus two is three"))
    room, own = talk._room - MAX_ANSWER - 100, len(tiny.prompt(talk._listener.ids))
    shortened = []
    for _ in range(300):
        add()
        before = len(talk.turns)
        talk._listener.history = talk.history
        talk._shorten(ids)
        assert talk._listener.history == talk.history and len(tiny.prompt(ids, talk.history)) <= room
        if len(talk.turns) < before:
            shortened.append(len(talk.turns))
            assert room - own < 2 * (len(tiny.prompt(ids, talk.history)) - own) + 100
    assert 1 <= len(shortened) <= 300 / min(shortened)


def test_a_discarded_answer_leaves_no_memory(tiny, person):
    one = person().say(tone(0.8)).quiet(0.5)
    talk = weakref.ref(one.talk._talk)
    gc.disable()
    try:
        one.talk.stop()
        assert talk() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("seconds, total, expected", [
    (0.0, 4.0, ""), (1.0, 4.0, "one"), (4.0, 4.0, "(slow) one two three four five"),
    (0.75, None, "one two"), (0.1, None, ""), (99, None, "(slow) one two three four five"),
])  # fmt: skip
def test_words_heard_are_whole_and_tags_take_no_time(seconds, total, expected):
    text = "(slow) one two three four five"
    found = words_heard(text, seconds, total, letters=12.0)
    assert found == expected or found == f"(slow) {expected}"


# ---- voice activity ----


def speech_share(sound, **options):
    one = Activity(**options)
    return np.mean([one(frame) for frame in torch.as_tensor(sound).float().split(PACKET) if len(frame) == PACKET])


@pytest.mark.parametrize("snr", [40, 20, 15])
@pytest.mark.parametrize("color", [0.0, 0.9])
def test_a_voice_stands_out_of_noise(snr, color):
    from aqaa.corpus.degrade import noise, rms

    voice = tone(1.0)
    sound = np.concatenate([np.zeros(2 * RATE), voice, np.zeros(2 * RATE)])
    sound = noise(sound, snr, RNG(2), color, level=rms(voice))
    one = Activity()
    found = np.array([one(frame) for frame in torch.from_numpy(sound).float().split(PACKET)])
    assert found[100:150].mean() > 0.85 and found[:100].mean() < 0.03 and found[158:].mean() < 0.03


@pytest.mark.parametrize("level", [1e-5, 1e-3, 0.05, 0.5])
def test_steady_noise_and_silence_are_no_speech(level):
    assert speech_share(level * RNG(3).standard_normal(6 * RATE)) < 0.02
    assert speech_share(np.zeros(RATE)) == 0
    hum = level * np.sin(2 * np.pi * 100 * np.arange(10 * RATE) / RATE)
    assert speech_share(hum) < 0.4  # until the background is known


def test_detectors_have_names(monkeypatch):
    assert isinstance(detector("energy"), Activity) and detector("pressed")(torch.zeros(320))
    with fails("bells", "energy, silero, pressed", error=ValueError):
        detector("bells")
    monkeypatch.setitem(__import__("sys").modules, "silero_vad", None)
    with fails("silero-vad", "pip install", error=ValueError):
        detector("silero")
