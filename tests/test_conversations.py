"""Simulated dialogues and the terminal: no microphone, a fixed cost of work, tiny weights."""

import io
import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aqaa import audio, cli, files, terminal
from aqaa.conversation import Event
from aqaa.evaluation import bench, conversations, streaming
from aqaa.evaluation.conversations import KINDS, PACE, Room, Said, reply, script, spoken, steady, summary
from tests.conftest import RATE, fails, tone

SAMPLING = {"seed": 0, "max_tokens": 60}
WAVS = [torch.from_numpy(np.pad(tone(seconds), (4000, 6000))) for seconds in (0.7, 1.0)]


@pytest.fixture(autouse=True)
def transcripts(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "transcribe", lambda ids: "what is seven plus five")


def test_a_question_without_its_quiet_ends():
    assert abs(len(spoken(WAVS[1])) - RATE) <= 480


def test_a_script_has_all_kinds_and_its_seed():
    made, again = script(WAVS, 200, 1), script(WAVS, 200, 1)
    assert all(np.array_equal(a.sound, b.sound) and a.wait == b.wait for a, b in zip(made, again, strict=True))
    assert {said.kind for said in made} == set(KINDS) and made[0].kind == "plain"
    assert all(said.cough == (said.kind == "cough") for said in made)
    lengths = {said.kind: len(said.sound) for said in made}
    assert lengths["hesitation"] >= lengths["plain"] - RATE / 2 and sum(KINDS.values()) == pytest.approx(1)


def test_the_reply_is_to_the_latest_question():
    sound = torch.zeros(10)
    events = [Event("started", 0), Event("ended", 1), Event("piece", 2, "", sound), Event("interrupted", 3),
              Event("started", 3), Event("ended", 5), Event("piece", 6, "word", sound[:0]),
              Event("piece", 7, "", sound), Event("piece", 8, "", sound)]  # fmt: skip
    assert reply(events[:3]) == 2 and reply(events[:5]) is None and reply(events) == 7


@pytest.mark.parametrize("cost", [0.005, 0.05])
def test_speculation_saves_time_and_loses_nothing(tiny, cost):
    turns = script(WAVS, 6, 0)
    rows = {name: Room(tiny, cost, speculate=name, sampling=SAMPLING).dialogue(turns) for name in (True, False)}
    found, plain = summary(rows[True], rows[False]), summary(rows[False], rows[True])
    assert found["turns"] == 6 and found["lost"] == plain["lost"] == 0
    assert plain["used"]["share"] == 0 and found["used"]["n"] == 6 and found["used"]["share"] > 0
    assert found["saved_ms_median"] >= 0 and found["latency_median_s"] <= plain["latency_median_s"]
    assert found["latency_median_s"] >= 0.6  # a turn ends after 0.7 s of quiet, never before
    assert plain["latency_95_s"] >= plain["latency_median_s"]


def test_the_clock_does_not_drift_and_the_same_seed_is_the_same_dialogue(tiny):
    rooms = [Room(tiny, 0.01, sampling=SAMPLING) for _ in range(2)]
    rows = [room.dialogue(script(WAVS, 3, 2)) for room in rooms]
    drop = [[{key: value for key, value in row.items() if key != "memory_mb"} for row in each] for each in rows]
    assert drop[0] == drop[1]
    assert all(0 <= room.now - room.sound < 0.02 for room in rooms)


def test_barge_in_is_heard_and_a_cough_is_not(tiny):
    long = SAMPLING | {"max_tokens": 500, "min_audio": 150}
    room = Room(tiny, 0.005, sampling=long)
    sound = spoken(WAVS[1]).numpy()
    rows = room.dialogue([Said("plain", 0.5, sound), Said("barge_in", 0.4, sound), Said("cough", 0.5, sound, True)])
    assert [row["barge_in"] for row in rows] == [None, True, None]
    assert [row["wrong_interruption"] for row in rows] == [None, None, False]
    assert room.talk.counts["interruptions"] == 1


def test_the_bench_has_a_table(tiny, monkeypatch):
    monkeypatch.setattr(conversations.audio, "load_question", lambda path: WAVS[0])
    result = conversations.measure(tiny, limit=2, progress=False, cost=0.01, max_tokens=60)
    assert bench.BENCHES["turns"] == "conversations"
    assert {"with speculation", "without speculation", "rows"} < set(result)
    assert "latency_median_s" in conversations.table(result) and "rows" not in conversations.table(result)
    assert result["with speculation"]["counts"]["turns"] >= 2


# ---- a long conversation ----


def test_a_long_conversation_ends_as_it_began(tiny, monkeypatch):
    monkeypatch.setattr(conversations.audio, "load_question", lambda path: WAVS[0])
    result = conversations.measure(tiny, limit=6, long=True, progress=False, cost=0.01, max_tokens=60)
    found = result["one conversation"]
    assert result["faults"] == {} and found["turns"] == len(result["rows"]["with"]) == 6 and found["lost"] == 0
    assert found["drift_s"] == pytest.approx(0, abs=1e-6) and 0 <= found["unheard_s"] < 0.02
    assert found["interruptions_by_nobody"] == 0 and found["minutes"] > 0.3
    assert found["history_ids_most"] >= max(row["history_ids"] for row in result["rows"]["with"][:3]) > 0
    assert "minutes" in conversations.table(result) and "rows" not in conversations.table(result)


def test_nobody_asks_with_a_hiss_or_a_crowd():
    folder = files.data_folder() / "questions"
    found = {path.name for path in folder.glob("*.wav")} - {path.name for path in folder.glob("[!u]*.wav")}
    entries = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    assert found == {entry["file"] for entry in entries if entry["voice"].startswith("noise:")} != set()
    assert len(streaming.shipped_questions(pattern="[!u]*.wav")) == len(entries) - len(found)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("own, kept", [({}, False), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}, True)])
def test_what_was_made_for_old_shapes_is_forgotten(own, kept):
    """300 lengths twice: with room for 256, none of the first round is left in the second."""
    code = ("import torch; from aqaa import processor; conv = torch.nn.Conv1d(64, 64, 3).requires_grad_(False)\n"
            "for i in range(600): conv(torch.zeros(1, 64, 1000 + i % 300))")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env=os.environ | {"ONEDNN_VERBOSE": "profile_create"} | own).stdout  # fmt: skip
    made = sum("cache_miss" in line and "convolution" in line for line in found.splitlines())
    assert 300 <= made < 310 if kept else made >= 600


def test_a_long_conversation_takes_its_time_but_does_not_wait_to_interrupt():
    slow, fast = script(WAVS, 60, 1, PACE), script(WAVS, 60, 1)
    factors = {said.kind == "barge_in": said.wait / other.wait for said, other in zip(slow, fast, strict=True)}
    assert factors == {True: 1, False: pytest.approx(PACE)}


def deaf(talk, _):
    """Drops packets, one in ten."""
    push = talk.push
    talk.push = lambda packet: [] if next(COUNT) % 10 == 0 else push(packet)


def mute(talk, _):
    """Gives no answer, but for the first one."""
    answer = talk._answer
    talk._answer = lambda: talk.stop() if talk.counts["turns"] else answer()


def leaky(talk, kept):
    """Keeps something of every question."""
    begin = talk._begin
    talk._begin = lambda: (kept.append(8.0), begin())[1]


COUNT = itertools.count()


@pytest.mark.parametrize("name, fault, told", [
    ("clock", deaf, "from the sound heard"), ("turns", mute, "3 of 4 have no answer"),
    ("memory", leaky, "% more at the end")])  # fmt: skip
def test_a_long_conversation_that_does_not_is_told(tiny, monkeypatch, name, fault, told):
    room, kept = Room(tiny, 0.01, sampling=SAMPLING), []
    fault(room.talk, kept)
    monkeypatch.setattr(conversations, "LONGEST", 5.0)
    monkeypatch.setattr(conversations, "memory", lambda: 100.0 + sum(kept))
    sound = spoken(WAVS[0]).numpy()
    _, faults = steady(room.dialogue([Said("plain", 0.3, sound)] * 4), room)
    assert list(faults) == [name] and told in faults[name]


def test_a_question_whose_rest_interrupts_its_answer_was_cut(tiny):
    sound = np.concatenate([spoken(WAVS[1]).numpy(), np.zeros(int(1.1 * RATE)), spoken(WAVS[0]).numpy()])
    room = Room(tiny, 0.005, sampling=SAMPLING | {"max_tokens": 500, "min_audio": 150})
    (row,) = room.dialogue([Said("hesitation", 0.5, sound)])
    assert row["cut"] and not row["lost"] and row["interruptions"] == 1 and room.talk.counts["turns"] == 2


# ---- the terminal ----


def test_a_speaker_plays_in_order_and_stops_at_once():
    speaker, out = terminal.Speaker(RATE), np.ones(5, np.float32)
    speaker.put(torch.arange(1.0, 4.0))
    speaker.put(torch.arange(4.0, 9.0))
    speaker.end()
    speaker.fill(out)
    assert out.tolist() == [1, 2, 3, 4, 5]
    speaker.fill(out)
    assert out.tolist() == [6, 7, 8, 0, 0]
    speaker.put(torch.ones(900))
    speaker.clear()
    speaker.fill(out)
    assert not out.any()


def test_a_speaker_of_another_rate_has_no_seams():
    speaker, wav, out = terminal.Speaker(24_000), torch.from_numpy(tone(0.5, 24_000)), np.ones(RATE // 2, np.float32)
    for part in wav.split(1000):
        speaker.put(part)
    speaker.end()
    speaker.fill(out)
    assert np.abs(out - audio.resample(wav, 24_000).numpy()).max() < 1e-4


class Card:
    """A sound card whose microphone brings one question, then quiet, until the answer was heard."""

    class PortAudioError(Exception):
        pass

    def __init__(self):
        self.played, self.sound = [], np.concatenate([np.zeros(RATE // 2), tone(1.0), np.zeros(4 * RATE)])

    def Stream(self, callback, blocksize, **options):
        assert options == {"samplerate": RATE, "channels": 1, "dtype": "float32"}
        self.callback, self.size = callback, blocksize
        return self

    def start(self):
        for frame in self.sound.astype(np.float32).reshape(-1, self.size, 1):
            out = np.zeros((self.size, 1), np.float32)
            self.callback(frame, out, None, None)
            self.played.append(out)

    def close(self):
        self.closed = True


def test_a_turn_at_the_terminal(tiny, monkeypatch):
    """The card is faster than any clock: what was recorded waits, and the answer is for the speaker."""
    card, out, made = Card(), io.StringIO(), []
    put = terminal.Speaker.put

    def converse(conversation, heard, speaker, out, one=terminal.converse):
        if heard.empty() and not conversation.busy:
            raise KeyboardInterrupt
        one(conversation, heard, speaker, out)

    monkeypatch.setattr(terminal, "converse", converse)
    monkeypatch.setattr(terminal.Speaker, "put", lambda self, wav: (made.append(wav), put(self, wav)))
    terminal.talk(tiny, out=out, library=card, **SAMPLING)
    assert sum(map(len, made)) > 0.3 * RATE and card.closed
    assert out.getvalue().startswith(terminal.WELCOME) and "what is seven plus five" in out.getvalue()


def test_an_interruption_empties_the_speaker():
    speaker, out = terminal.Speaker(RATE), io.StringIO()
    terminal.show([Event("piece", 0, "seven", torch.ones(100))], speaker, out)
    assert speaker.waiting
    terminal.show([Event("interrupted", 1, "")], speaker, out)
    assert not speaker.waiting and out.getvalue().startswith("seven")


def test_no_microphone_is_one_sentence(tiny):
    class None_(Card):
        def Stream(self, **_):
            raise self.PortAudioError("Error querying device -1")

    with fails("no microphone", "device -1", "aqaa chat", error=ValueError):
        terminal.talk(tiny, out=io.StringIO(), library=None_())


def test_without_a_sound_card_nothing_is_loaded(monkeypatch, capsys):
    def absent(**_):
        raise Card.PortAudioError("Error querying device -1")

    library = SimpleNamespace(PortAudioError=Card.PortAudioError, check_input_settings=absent)
    monkeypatch.setitem(__import__("sys").modules, "sounddevice", library)
    monkeypatch.setattr(cli, "_load", None)
    assert cli.main(["talk"]) == 1
    err = capsys.readouterr().err
    assert "no microphone" in err and "aqaa chat" in err and err.count("\n") == 1


def test_a_microphone_that_is_pulled_out_is_told(tiny, monkeypatch):
    monkeypatch.setattr(terminal, "GONE", 0.01)
    card = Card()
    card.sound = card.sound[:0]
    with fails("brought nothing", "plug it in", error=ValueError):
        terminal.talk(tiny, out=io.StringIO(), library=card)
    assert card.closed


def test_no_library_is_one_sentence_and_nothing_is_loaded(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "sounddevice", None)
    monkeypatch.setattr(cli, "_load", None)
    assert cli.main(["talk"]) == 1
    err = capsys.readouterr().err
    assert "sounddevice" in err and "pip install 'aqaa[talk]'" in err and err.count("\n") == 1
