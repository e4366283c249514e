"""/v1/realtime: a Conversation behind the events of OpenAI's Realtime interface.

With server_vad the Conversation finds the turns; with turn_detection null the client ends them by
input_audio_buffer.commit, and response.create lets the answer come. Sound is pcm of 24 kHz both
ways. `instructions` and `voice` are kept and told back; the model has one voice and no commands.
A session that waits for the model is told its place by the event queue.updated."""

import json
import uuid
from collections import deque

from aqaa import audio
from aqaa.config import SAMPLE_RATE
from aqaa.conversation import Conversation, State, Timing
from aqaa.serve import sound
from aqaa.serve.requests import MODEL, Fault, fault_of, object_of, take

OPEN = (State.SPEAKING, State.PAUSED)
DETECTION = {"type": "server_vad", "silence_duration_ms": 700, "prefix_padding_ms": 500,
             "interrupt_response": True, "create_response": True}  # fmt: skip
FORMAT = {"type": "audio/pcm", "rate": sound.RATE}
ALL = 1e9  # seconds: the whole answer


def new(kind):
    return f"{kind}_{uuid.uuid4().hex[:20]}"


class Session:
    """A job of the Worker. send: takes each event, a dict, from any thread; sampling: of `ask`."""

    def __init__(self, model, send, **sampling):
        self.model, self._send, self.inbox = model, send, deque()
        self.talk, self.answer, self._place = Conversation(model, **sampling), None, None
        self._items, self._untold = [], []  # ids of all, and of questions not transcribed yet
        self._next = self._said = None  # those of the question being asked, of the latest answer
        self._sent, self._later, self._committed = 0, [], False
        self._given = self._taken = 0  # letters of events: one thread writes each number
        self._input = audio.Resampled(sound.RATE, SAMPLE_RATE)
        self.settings = {
            "type": "realtime", "id": new("sess"), "object": "realtime.session", "model": MODEL,
            "output_modalities": ["audio"], "instructions": "", "audio": {
                "input": {"format": FORMAT, "turn_detection": dict(DETECTION)},
                "output": {"format": FORMAT, "voice": MODEL}},
        }  # fmt: skip
        self.tell("session.created", session=self.settings)

    def tell(self, kind, **content):
        self._send({"type": kind, "event_id": new("event"), **content})

    def complain(self, fault, event_id=None):
        self.tell("error", error={**fault.body, "event_id": event_id})

    # ---- a job of the worker ----

    @property
    def busy(self):
        return self.talk.busy

    def work(self):
        self._place = None
        self._pass_on(self.talk.work())

    def put(self, text):
        """An event of the client, for `drain`."""
        self._given += len(text)
        self.inbox.append(text)

    @property
    def unread(self):
        """Letters of events that wait for `drain`."""
        return self._given - self._taken

    def drain(self):
        while self.inbox:
            text = self.inbox.popleft()
            self._taken += len(text)
            self._take(text)

    def place(self, place):
        if self.answer and place != self._place:  # who still speaks does not wait
            self._place = place
            self.tell("queue.updated", place=place)

    def fail(self, fault):
        self.complain(fault_of(fault))
        self._stop("failed", "error")
        waiting = sum(turn.question is None for turn in self.talk.turns)
        del self._untold[: max(0, len(self._untold) - waiting)]  # a transcript that failed

    # ---- what the client sends ----

    def _take(self, text):
        event_id = None
        try:
            message = object_of(text, "an event")
            event_id, kind = message.get("event_id"), message.get("type")
            if kind not in HANDLERS:
                raise Fault(f"there is no event {kind!r}: {', '.join(HANDLERS)} are known.", "type")
            HANDLERS[kind](self, message)
        except ValueError as fault:
            self.complain(fault_of(fault), event_id)

    def _update(self, message):
        wanted = take(message, "session", dict)
        if wanted.get("output_modalities") not in (None, ["audio"]):
            raise Fault('answers are spoken: send ["audio"].', "session.output_modalities")
        sides = take(wanted, "audio", dict, {})
        heard, said = take(sides, "input", dict, {}), take(sides, "output", dict, {})
        for side in (heard, said):
            if side.get("format") not in (None, FORMAT, {"type": "audio/pcm"}):
                raise Fault(f"sound is audio/pcm at {sound.RATE}: send that.", "session.audio")
        own = self.settings["audio"]
        if "turn_detection" in heard:
            own["input"]["turn_detection"] = self._detect(heard["turn_detection"])
        own["output"]["voice"] = take(said, "voice", str | dict, own["output"]["voice"])
        instructions = take(wanted, "instructions", str, self.settings["instructions"])
        self.settings["instructions"] = instructions
        self.tell("session.updated", session=self.settings)

    def _detect(self, wanted):
        """Set the Conversation's detector; returns the setting as it is told back."""
        if wanted is None:
            self.talk.tune("pressed", speculate=False, interruptible=False)
            if not self.answer and self.talk.state is State.REPLYING:  # it is whole: see _answered
                self._leave()
            return None
        if not isinstance(wanted, dict) or wanted.get("type") not in ("server_vad", "semantic_vad"):
            raise Fault("turn_detection is null or of the type server_vad.", "turn_detection")
        if wanted.get("create_response") is False:
            raise Fault("turns that are found are answered: send turn_detection null to decide.",
                        "turn_detection.create_response")  # fmt: skip
        setting = {**DETECTION, **{name: wanted[name] for name in DETECTION if name in wanted}}
        seconds = {}
        for name in ("silence_duration_ms", "prefix_padding_ms"):
            if isinstance(setting[name], bool) or not isinstance(setting[name], int | float) or (
                    not 0 <= setting[name] <= 5000):  # fmt: skip
                raise Fault(f"{name} is {setting[name]!r}: send 0 to 5000.", "turn_detection")
            seconds[name] = setting[name] / 1000
        end = max(seconds["silence_duration_ms"], 0.1)
        timing = Timing(pause=min(Timing.pause, end), end=end, before=seconds["prefix_padding_ms"])
        self.talk.tune("energy", timing, interruptible=bool(setting["interrupt_response"]))
        return setting

    @property
    def manual(self):
        """Does the client end the turns?"""
        return self.settings["audio"]["input"]["turn_detection"] is None

    def _append(self, message):
        wav = self._input.push(sound.samples(sound.unpacked(take(message, "audio", str))))
        if self.manual and (self._committed or self.answer):
            if sum(map(len, self._later)) > audio.MAX_SECONDS * SAMPLE_RATE:
                raise Fault(f"the buffer holds {audio.MAX_SECONDS} s: wait for response.done.")
            self._later.append(wav)
            return
        self._hear(wav)

    def _hear(self, wav):
        self._sent += len(wav)
        self._pass_on(self.talk.push(wav))

    def _commit(self, message):
        if self.manual and (self._committed or self.answer):
            raise Fault("the last question is not answered yet: wait for response.done.")
        self._hear(self._input.finish())
        self._input = audio.Resampled(sound.RATE, SAMPLE_RATE)
        if self.talk.state not in OPEN:
            raise Fault("the buffer holds no 0.12 s of sound: append some, then commit.",
                        code="input_audio_buffer_commit_empty")  # fmt: skip
        if not self.manual:
            self._pass_on(self.talk.commit())
            return
        self._committed = True
        self._question()

    def _clear(self, message):
        if self.talk.state in OPEN and not self._committed:
            self.talk.stop()
        self._later = []
        self._input = audio.Resampled(sound.RATE, SAMPLE_RATE)
        self.tell("input_audio_buffer.cleared")

    def _create(self, message):
        if self.answer:
            raise Fault("an answer is being made: wait for response.done, or cancel it.",
                        code="conversation_already_has_active_response")  # fmt: skip
        if not self._committed:
            raise Fault("there is no question: append sound and commit it.", code="no_question")
        self._pass_on(self.talk.commit())

    def _cancel(self, message):
        if not self.answer:
            raise Fault("no answer is being made.", code="response_cancel_not_active")
        self._stop("cancelled", "client_cancelled")

    def _truncate(self, message):
        milliseconds, item_id = take(message, "audio_end_ms", int), take(message, "item_id", str)
        if item_id != self._said:
            raise Fault(f"{item_id!r} is not the latest answer: name that one.", "item_id")
        if self.talk.state is State.REPLYING:
            self._stop("cancelled", "client_cancelled")
        self.talk.truncate(max(0, milliseconds) / 1000)
        self.tell("conversation.item.truncated", item_id=item_id, content_index=0,
                  audio_end_ms=milliseconds)  # fmt: skip

    def _stop(self, status, reason):
        """End the question, or the answer, at once."""
        unheard = self._committed or self.answer and not self.answer["sounds"]
        if unheard:
            self._delete()  # the Conversation forgets a turn of which nothing was heard
        self._committed = False
        self.talk.stop()
        self._close(status, reason)

    # ---- what the conversation tells: _started of "started" … ----

    def _pass_on(self, events):
        for event in events:
            if tell := getattr(self, f"_{event.kind}", None):  # a pause is not told
                tell(event)

    def _started(self, event):
        self._next = new("item")
        if not self.manual:
            self.tell("input_audio_buffer.speech_started", item_id=self._next,
                      audio_start_ms=self._sent // 16)  # fmt: skip

    def _resumed(self, event):
        if self.answer:  # the turn had ended, and goes on
            self._close("cancelled", "turn_detected")
            self._delete()
            self._started(event)

    def _delete(self):
        """The latest question is none."""
        if self._untold:
            self._items.remove(item_id := self._untold.pop())
            self.tell("conversation.item.deleted", item_id=item_id)

    def _question(self):
        """Tell the item of the question that has ended."""
        self._untold.append(self._next)
        before = self._items[-1] if self._items else None
        self.tell("input_audio_buffer.committed", item_id=self._next, previous_item_id=before)
        content = [{"type": "input_audio", "transcript": None}]
        item = {"id": self._next, "role": "user", "status": "completed", "content": content}
        self._item(item, done=True)

    def _item(self, item, done=False):
        item = {"object": "realtime.item", "type": "message", **item}
        before = self._items[-1] if self._items else None
        for kind in ("added", "done") if done else ("added",):
            self.tell(f"conversation.item.{kind}", item=item, previous_item_id=before)
        self._items.append(item["id"])

    def _ended(self, event):
        if not self.manual:
            self.tell("input_audio_buffer.speech_stopped", item_id=self._next,
                      audio_end_ms=self._sent // 16)  # fmt: skip
        if not self._committed:
            self._question()
        self._committed = False
        rate = audio.Resampled(self.model.vocoder.sample_rate, sound.RATE)
        self.answer = {"id": new("resp"), "item": new("item"), "text": "", "sounds": False,
                       "rate": rate}  # fmt: skip
        self.tell("response.created", response=self._response("in_progress"))

    def _response(self, status, output=(), **details):
        return {"id": self.answer["id"], "object": "realtime.response", "status": status,
                "status_details": details or None, "output": list(output), "usage": None,
                "output_modalities": ["audio"]}  # fmt: skip

    def _message(self, status):
        part = {"type": "output_audio", "transcript": self.answer["text"].strip()}
        return {"id": self.answer["item"], "object": "realtime.item", "type": "message",
                "role": "assistant", "status": status,
                "content": [part] if status != "in_progress" else []}  # fmt: skip

    def _about(self, kind, inner=True, **content):
        """An event of the answer's item."""
        where = {"response_id": self.answer["id"], "output_index": 0}
        where |= {"item_id": self.answer["item"], "content_index": 0} if inner else {}
        self.tell(f"response.{kind}", **where, **content)

    def _piece(self, event):
        if not self.answer["sounds"]:
            self.answer["sounds"], self._said = True, self.answer["item"]
            self._about("output_item.added", inner=False, item=self._message("in_progress"))
            self._item(self._message("in_progress"))
            self._about("content_part.added", part={"type": "audio", "transcript": ""})
        self.answer["text"] += event.text
        if event.text:
            self._about("output_audio_transcript.delta", delta=event.text)
        self._delta(self.answer["rate"].push(event.audio))

    def _delta(self, wav):
        if len(wav):
            self._about("output_audio.delta", delta=sound.packed(sound.pcm(wav)))

    def _answered(self, event):
        self._delta(self.answer["rate"].finish())
        if self.manual:  # nobody waits until the sound has been played: the client decides
            self._leave()
        self._close("completed")

    def _leave(self):
        """The whole answer counts as heard, until the client says otherwise."""
        self.talk.stop()
        self.talk.truncate(ALL)

    def _close(self, status, reason=None, error=None):
        """Tell that the answer is over, if there is one."""
        if not self.answer:
            return
        item = self._message("completed" if status == "completed" else "incomplete")
        if self.answer["sounds"]:
            text = item["content"][0]["transcript"]
            self._about("output_audio.done")
            self._about("output_audio_transcript.done", transcript=text)
            self._about("content_part.done", part={"type": "audio", "transcript": text})
            self._about("output_item.done", inner=False, item=item)
            self.tell("conversation.item.done", item=item, previous_item_id=None)
        details = {"type": status, "reason": reason, "error": error} if reason else {}
        output = [item] if self.answer["sounds"] else []
        self.tell("response.done", response=self._response(status, output, **details))
        self.answer, later, self._later = None, self._later, []
        for wav in later:  # what came while the answer was made is the next question
            self._hear(wav)

    def _interrupted(self, event):
        self._close("cancelled", "turn_detected")

    def _refused(self, event):
        self._delete()
        self.complain(Fault(event.text, code="no_question"))
        self._close("failed", "error", {"type": "invalid_request_error", "code": "no_question"})

    def _transcribed(self, event):
        if self._untold:
            self.tell("conversation.item.input_audio_transcription.completed", content_index=0,
                      item_id=self._untold.pop(0), transcript=event.text, usage=None)  # fmt: skip


HANDLERS = {
    "session.update": Session._update, "input_audio_buffer.append": Session._append,
    "input_audio_buffer.commit": Session._commit, "input_audio_buffer.clear": Session._clear,
    "response.create": Session._create, "response.cancel": Session._cancel,
    "conversation.item.truncate": Session._truncate,
}  # fmt: skip


def line(event):
    return json.dumps(event, separators=(",", ":"))
