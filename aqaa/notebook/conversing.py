"""A conversation in a notebook: press once, speak many times."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import groupby
from threading import Event

import torch

from aqaa import audio
from aqaa.config import GROUP_SECONDS, GROUP_SIZE, SAMPLE_RATE
from aqaa.conversation import State, Turn
from aqaa.notebook import show
from aqaa.notebook.base import Widget
from aqaa.notebook.talk import Recorder
from aqaa.pipeline import SPOKEN, text_ids
from aqaa.serve import sound
from aqaa.serve.realtime import Session, line
from aqaa.serve.worker import Worker

PACKET = sound.RATE // 10  # samples of an event, where a recording speaks
LEFT = "left"  # id of the events that end a call: their faults are nobody's


@lru_cache(1)
def worker():
    """One thread for all conversations of this kernel."""
    return Worker()


class Watched:
    """A model that keeps what it was asked for last: its Steps are an answer's ids as they come."""

    def __init__(self, model):
        self._model, self.asked = model, None

    def __getattr__(self, name):
        return getattr(self._model, name)

    def stream(self, *question, **options):
        self.asked = self._model.stream(*question, **options)
        return self.asked


@dataclass(eq=False)
class Exchange:
    """A question, the id of its item, and the answer. said: the Conversation's Turn of it; pcm: its
    sound; ready_ms, sound_ms: from the end of speech until it was made, and until it was played."""

    item: str
    question: str | None = None
    answer: str = ""
    answer_item: str | None = None
    cut: bool = False
    ready_ms: int | None = None
    sound_ms: int | None = None
    steps: list = field(default_factory=list)
    pcm: bytearray = field(default_factory=bytearray)
    said: Turn | None = None

    @property
    def heard(self):
        """The words of the answer that were heard; None: not known yet."""
        return self.said and self.said.answer

    @property
    def interrupted(self):
        """Was not all of it heard?"""
        return self.cut or self.heard is not None and self.heard.split() != self.answer.split()

    def shared(self):
        """What readers and pages have alike."""
        return {"question": self.question, "answer": self.answer.strip(), "heard": self.heard,
                "interrupted": self.interrupted, "ready_ms": self.ready_ms,
                "sound_ms": self.sound_ms}  # fmt: skip


def in_blocks(steps, model):
    """Steps of an answer in the order of its layout: ["text", words, ids] and ["audio", ids]."""
    blocks, size = [], model.layout.audio_block
    for spoken, run in groupby(steps, lambda step: step.kind in SPOKEN):
        run = list(run)
        if spoken:
            blocks += [["audio", min(size, len(run) - k)] for k in range(0, len(run), size)]
        elif ids := text_ids(run):
            blocks.append(["text", model.text.decode(ids), len(ids)])
    return blocks


class Call(Session):
    """A Session from a press of the button to the next: its events fill `turns`, Exchanges. told:
    takes each event; changed(k): turn k is another; None: all may be. past: (role, text) pairs that
    were said before. `gone` is set when it has been left and has nothing more to do."""

    def __init__(self, model, told, turns, changed, past=(), **options):
        self.turns, self._changed = turns, changed
        self._now, self._speech_end = None, 0.0  # the Exchange that goes on; on the talk's clock
        self.leaving, self.gone = False, Event()
        super().__init__(Watched(model), told, **options)
        texts = [text for _, text in past]  # question, answer, question, …
        self.talk.turns += [Turn([], *pair) for pair in zip(texts[::2], texts[1::2])]

    def leave(self, item=None, heard_ms=0):
        """End question and answer; item: what was sounding, until heard_ms. From any thread."""
        events = [{"type": "response.cancel"}]
        if item:  # what was not heard is forgotten before the answer ends
            events.insert(0, {"type": "conversation.item.truncate", "item_id": item,
                              "audio_end_ms": int(heard_ms)})  # fmt: skip
        for event in events:
            self.put(line({**event, "event_id": LEFT}))
        self.leaving = True

    def drain(self):
        super().drain()
        self._look()

    def work(self):
        super().work()
        self._look()

    def _look(self):
        now, asked = self._now, self.model.asked
        if now and now.answer_item and len(asked.steps) > len(now.steps):
            now.steps = list(asked.steps)
            self._changed(self.turns.index(now))
        if self.leaving and not self.inbox:
            self.talk.stop()
            if not self.busy:  # the last question has been transcribed
                self.gone.set()

    def tell(self, kind, **content):
        if content.get("error", {}).get("event_id") == LEFT:
            return
        super().tell(kind, **content)
        if note := getattr(self, f"_{kind.replace('.', '_')}", None):  # below, by their names
            note(content)

    def _of(self, item):
        return next((turn for turn in self.turns if item in (turn.item, turn.answer_item)), None)

    def _conversation_item_added(self, content):
        if content["item"]["role"] == "user":
            self._now = Exchange(content["item"]["id"])
            self.turns.append(self._now)
            self._changed(len(self.turns) - 1)

    def _conversation_item_deleted(self, content):
        if turn := self._of(content["item_id"]):
            self.turns.remove(turn)
            self._now = None
            self._changed(None)

    def _conversation_item_input_audio_transcription_completed(self, content):
        if turn := self._of(content["item_id"]):
            turn.question = content["transcript"]
            self._changed(None)

    def _conversation_item_truncated(self, content):
        self._changed(None)

    def _input_audio_buffer_speech_stopped(self, content):
        self._speech_end = self.talk.clock() - self.talk.timing.end

    def _response_output_item_added(self, content):
        now = self._now
        now.answer_item, now.said = content["item"]["id"], self.talk.turns[-1]
        now.ready_ms = round(1000 * (self.talk.clock() - self._speech_end))

    def _response_output_audio_transcript_delta(self, content):
        self._now.answer += content["delta"]

    def _response_output_audio_delta(self, content):
        self._now.pcm += sound.unpacked(content["delta"])

    def _response_done(self, content):
        if self._now and self._now.answer_item:
            self._look()
            self._now.cut = content["response"]["status"] == "cancelled"
            self._now = None
            self._changed(None)


class Conversation(Widget):
    """Press Talk once, speak many times: a pause ends a turn, speaking interrupts the answer.

    The notebook's own channel carries the sound both ways, no port of its own is needed; the page
    gets the microphone on localhost or https only. Tried in JupyterLab 4.6 and Notebook 7.6 with
    Chromium; not in VS Code, in Colab, or behind a JupyterHub. The model works in a thread: cells
    run meanwhile, at its cost, and with ipykernel 7 the page is heard while they do.

    model: an AQAA; options: of its `ask`, and of aqaa.conversation.Conversation. turns: what was
    said, a dict for each question. Pressing Stop, loading the page again, clearing the output and
    `stop` end a call, and the next one goes on from there; Start over forgets what was said.

    fallback: recordings (as Recorder takes them) that ask in the static form, on a clock that
    counts only their sound: it always gives the same."""

    script = "conversation"
    rate = sound.RATE
    KEPT = 50  # turns whose sound is kept
    PATIENCE = 10  # seconds until a call that is left has ended

    def __init__(self, model, fallback=(), interactive=False, **options):
        super().__init__(interactive, turns=[], call="")
        self.model, self.options, self._made, self._call, self._past = model, options, [], None, []
        self._questions = []
        if interactive:
            self._open(group=GROUP_SECONDS / GROUP_SIZE)
        else:
            self._listen(fallback)

    @property
    def turns(self):
        """Dicts of question and answer (texts; None: not known yet), heard (the words of the answer
        that were), interrupted, ready_ms and sound_ms (from the end of speech until the first sound
        was made, and was played), ids of the answer, audio (N,) at `rate` Hz, None of old ones."""
        return [{**turn.shared(), "ids": [step.id for step in turn.steps],
                 "audio": sound.samples(bytes(turn.pcm)) if turn.pcm else None}
                for turn in self._made]  # fmt: skip

    @property
    def talking(self):
        """Is somebody on the page's microphone?"""
        return self._call is not None

    def stop(self, item=None, heard_ms=0):
        """End the call, as the button does; what was said stays."""
        call, self._call = self._call, None
        if call:
            call.leave(item, heard_ms)
            worker().wake()
            call.gone.wait(self.PATIENCE)
            worker().remove(call)
            self._past = call.talk.history
            self._set(call="", turns=self._shown())

    def close(self):
        """Stop, and leave the page; what was said stays, as the static form shows it."""
        self.stop()
        view, self._view = self._view, None
        if view is not None:
            view.close()

    def _called(self, told, **options):
        """A new Call that goes on from what was said."""
        options = {**self.options, **options}
        return Call(self.model, told, self._made, self._changed, self._past, **options)

    def _shown(self):
        return [self._page_turn(turn) for turn in list(self._made)]

    def _page_turn(self, turn):
        return {**turn.shared(), "item": turn.item, "blocks": in_blocks(turn.steps, self.model)}

    def _changed(self, number):
        """Tell the page: one turn, whose answer grows, as a message; all in the state."""
        if number is None:
            for turn in self._made[: -self.KEPT]:
                turn.pcm.clear()
            self._set(turns=self._shown())
        else:
            turn = self._page_turn(self._made[number])
            self._tell({"type": "turn", "number": number, "turn": turn})

    # ---- what the page says ----

    def _on_start(self, message, _):
        self.stop()
        name = message["call"]
        self._call = self._called(partial(self._pass_on, name))
        self._set(call=name, message="")
        worker().add(self._call)

    def _pass_on(self, name, event):
        """An event of the Session, to the page that made the call."""
        if event["type"] == "error":
            self._set(message=event["error"]["message"])
        elif event["type"] == "input_audio_buffer.speech_started" and self._state["message"]:
            self._set(message="")
        self._tell({"type": "event", "call": name, "event": event})

    def _on_event(self, message, _):
        if self._call and message["call"] == self._state["call"]:
            self._call.put(message["text"])
            worker().wake()

    def _on_first(self, message, _):
        """When the first sound of an answer was played."""
        for turn in self._made:
            if turn.answer_item == message["item"]:
                turn.sound_ms = int(message["ms"])
                self._changed(self._made.index(turn))

    def _on_stop(self, message, _):
        self.stop(message.get("item"), message.get("heard") or 0)

    def _on_clear(self, *_):
        self.stop()
        self._made, self._past = [], []
        self._set(turns=[], message="")

    def _on_error(self, message, _):
        other = f"The microphone could not be opened ({message.get('message')})."
        self._set(message=Recorder.REFUSALS.get(message["name"], other))

    # ---- without a page ----

    def _listen(self, fallback):
        """Recordings ask one after the other, each when the last answer has been played."""
        self._questions = [audio.load_question(ask["path"] if isinstance(ask, Mapping) else ask)
                           for ask in fallback]  # fmt: skip
        heard = [0]  # samples
        call = self._called(lambda event: None, clock=lambda: heard[0] / sound.RATE)

        def hear(wav):
            for part in wav.split(PACKET):
                heard[0] += len(part)
                packed = sound.packed(sound.pcm(part))
                call.put(line({"type": "input_audio_buffer.append", "audio": packed}))
                call.drain()
                while call.busy:
                    call.work()

        quiet = torch.zeros(PACKET)
        for question in self._questions:
            hear(torch.cat([quiet, audio.resample(question, SAMPLE_RATE, sound.RATE), quiet]))
            while call.talk.state is not State.SILENCE:
                hear(quiet)
        self._past = call.talk.history

    def __repr__(self):
        count = len(self._made)
        return f"<conversation: {count} turn{'s' * (count != 1)}>"

    def _static(self):
        turns = self.turns
        if not turns:
            return [show.table([["Conversation", "Nothing was said."]])]
        rows = [[number, turn["question"] or "(unclear)", turn["answer"]]
                for number, turn in enumerate(turns, 1)]  # fmt: skip
        parts = [show.table(rows, ["turn", "question, as it was heard", "answer"], "What was said")]
        for number, turn in enumerate(turns):  # recordings are kept, what a microphone brought not
            sounds = [show.sound(wav, title=f"Question {number + 1}")
                      for wav in self._questions[number : number + 1]]  # fmt: skip
            if turn["audio"] is not None:
                sounds.append(show.sound(turn["audio"], self.rate, f"Answer {number + 1}"))
            parts += [show.compare(*sounds)] if sounds else []
        last = turns[-1]["ids"]
        if last:
            title = "The last answer as it came"
            parts.append(show.blocks(last, self.model.ids, self.model.text, title=title))
        return parts
