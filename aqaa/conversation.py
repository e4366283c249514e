"""Turns of a spoken conversation: who speaks, when the model works, what of its answer was heard.

    SILENCE -> SPEAKING -> PAUSED -> REPLYING -> SILENCE
                  ^          |          |
                  +----------+----------+    speech goes on, or interrupts

A pause starts an answer that may never be heard (a speculation); more speech discards it, a longer
pause ends the turn and lets it out. Nothing here opens a microphone, a socket or a thread:

    talk = Conversation(model)              # detector="energy", clock=time.monotonic, seed=0, …
    for event in talk.push(samples): …      # (n,) floats at 16 kHz, any n; never slow
    while talk.busy:                        # one unit of the model's work: some 10 to 200 ms
        for event in talk.work(): …         # call push between two, or queue for the model
    talk.commit()                           # the question ends now (a button, a client)
    talk.stop()                             # no more of this question, or of this answer
    talk.truncate(seconds)                  # so much of the last answer was really heard
    talk.state, talk.history, talk.counts

All of them but `truncate` return Events in order; `at` is the clock's time. Kinds:
    "started"      the user speaks             "paused"       a speculation may begin
    "resumed"      and the speculation is gone "ended"        the turn is the model's
    "piece"        text and audio (N,) to play, at model.vocoder.sample_rate
    "answered"     all pieces are out; text is the whole answer
    "interrupted"  drop all sound now; text is what had been heard of it
    "finished"     all sound has been played   "refused"      no question; text says why
    "transcribed"  text is the question, as the history keeps it
One thread at a time may call it. A fault of the model comes out of `work`: call `stop` then."""

import re
import time
from collections import Counter, deque
from dataclasses import dataclass
from enum import StrEnum

import torch

from aqaa import audio
from aqaa.backbone import generation
from aqaa.config import SAMPLE_RATE
from aqaa.listening import Listener
from aqaa.pipeline import MAX_ANSWER
from aqaa.voice_activity import detector as named

LONGEST = (audio.MAX_SECONDS - 2) * SAMPLE_RATE  # samples of a question; a listener takes few more
ROOM = 8192  # ids of a dialogue that the cache is made for
EVERY = 0.24  # seconds between two looks of the listener
LETTERS = 14.0  # a second, until an answer has shown how fast this voice speaks
TAG = re.compile(r"\(\w*\)$")  # (slow): written, not spoken


class State(StrEnum):
    """Who has the turn."""

    SILENCE = "silence"
    SPEAKING = "user speaking"
    PAUSED = "user paused"
    REPLYING = "bot replying"


@dataclass(frozen=True)
class Timing:
    """Seconds: of speech that begin a question (start) or an interruption, of quiet that begin a
    speculation (pause) or end the turn, and of sound before the first speech that is kept."""

    start: float = 0.12
    pause: float = 0.2
    end: float = 0.7
    interruption: float = 0.3
    before: float = 0.5


@dataclass(frozen=True)
class Event:
    """Something happened at `at`, seconds of the conversation's clock; see the module."""

    kind: str
    at: float
    text: str = ""
    audio: torch.Tensor | None = None


@dataclass(eq=False)
class Turn:
    """question: None until it is transcribed, its ids till then; answer: as far as it was heard."""

    ids: list
    question: str | None = None
    answer: str | None = None


class Conversation:
    """Turns with one person. model: an AQAA; detector: a name of voice_activity.DETECTORS, or
    what has `frame` and says of so many samples whether they are speech; clock: gives seconds;
    speculate: answer in pauses; interruptible: listen while replying; sampling: as of `ask`.
    counts: of turns, speculations, used, interruptions, refused; turns: Turns, oldest first."""

    def __init__(self, model, *, detector="energy", timing=Timing(), clock=time.monotonic,
                 speculate=True, interruptible=True, **sampling):  # fmt: skip
        self.model, self.clock, self.sampling = model, clock, sampling
        self.state, self.counts, self.letters = State.SILENCE, Counter(), LETTERS
        # One cache for all turns: keys and values of the history stay, once it has begun.
        self._room = min(ROOM, model.config.backbone.max_seq_len)
        self._prefill = None if model.engine else generation.Prefill(model.decoder, self._room)
        self.turns, self._rest = [], torch.zeros(0)  # samples that are no whole frame yet
        self._speech = self._quiet = 0.0  # seconds of the present run
        self._talk = self._last = None  # answer being made; turn, text, seconds of the last one
        self._forget()
        self.tune(detector, timing, speculate, interruptible)

    def tune(self, detector, timing=Timing(), speculate=True, interruptible=True):
        """Find turns in another way from now on; arguments as of the class. Raises ValueError."""
        self.detector = named(detector) if isinstance(detector, str) else detector
        self.timing, self.speculate, self.interruptible = timing, speculate, interruptible
        self._seconds = self.detector.frame / SAMPLE_RATE
        before = timing.before + max(timing.start, timing.interruption)
        self._before = deque(maxlen=max(1, round(before / self._seconds)))  # frames

    def _forget(self):
        """Neither a question nor an answer."""
        self._unheard, self._held = [], []  # frames for the listener: now, and if speech goes on
        self._listener, self._length = None, 0  # and samples of the question
        self._drop()

    def _drop(self):
        """No answer."""
        if self._talk:
            self._talk.close()
        self._talk = self._turn = self._fault = None
        self._whole = False  # all pieces are made
        self._kept, self._sounds, self._text = [], [], ""  # not let out; (when, seconds) out

    @property
    def history(self):
        """(role, text) pairs of the turns so far: questions as transcribed, answers as heard."""
        return [pair for turn in self.turns if turn.question and turn.answer
                for pair in (("user", turn.question), ("assistant", turn.answer))]  # fmt: skip

    def _event(self, kind, text="", sound=None):
        return Event(kind, self.clock(), text, sound)

    # ---- what the microphone brings ----

    def push(self, samples):
        """(n,) samples at 16 kHz, n may be 0 -> Events. Raises AudioError, as a Listener."""
        samples = torch.cat([self._rest, audio.packet(samples)])
        whole = len(samples) // self.detector.frame * self.detector.frame
        self._rest = samples[whole:].clone()
        events = self._played()
        for frame in samples[:whole].split(self.detector.frame) if whole else ():
            events += self._take(frame, self.detector(frame))
        return events

    def _take(self, frame, speech):
        self._speech = self._speech + self._seconds if speech else 0.0
        self._quiet = 0.0 if speech else self._quiet + self._seconds
        self._before.append(frame)
        if self.state is State.SILENCE:
            return self._begin() if self._lasts(self.timing.start) else []
        if self.state is State.SPEAKING:
            return self._listen(frame)
        if not self._sounds:  # nothing of the answer is out: this may still be the question
            if self._length < LONGEST:  # else the question cannot go on
                self._held.append(frame)
                self._length += len(frame)
            paused = self.state is State.PAUSED
            if (paused or self.interruptible) and self._lasts(self.timing.start):
                return self._resume() if self._length < LONGEST else []
            over = self._quiet > self.timing.end - self._seconds / 2
            return self._end() if paused and over else []
        if self.interruptible and self._lasts(self.timing.interruption):
            self.counts["interruptions"] += 1
            return [*self._hush(), *self._begin()]
        return []

    def _lasts(self, seconds):
        return self._speech > seconds - self._seconds / 2

    def _begin(self):
        self._forget()
        self._unheard = list(self._before)
        self._length = sum(map(len, self._unheard))
        self.state = State.SPEAKING
        return [self._event("started")]

    def _listen(self, frame):
        self._unheard.append(frame)
        self._length += len(frame)
        if self._length >= LONGEST:
            return self._end()
        if self._quiet > self.timing.pause - self._seconds / 2:
            self.state = State.PAUSED
            return [self._event("paused")]
        return []

    def _resume(self):
        if self._turn in self.turns:  # the turn had ended, but nothing of its answer was out
            self.turns.remove(self._turn)
        self._drop()
        self._unheard += self._held
        self._held, self.state = [], State.SPEAKING
        return [self._event("resumed")]

    def _end(self):
        self.state = State.REPLYING
        events = [self._event("ended")]
        if self._fault:
            return events + self._refuse()
        if self._talk:
            self.turns.append(self._turn)
            for piece in self._kept:
                events += self._let_out(piece)
            self._kept = []
        return events

    def _refuse(self):
        text, self.state = self._fault, State.SILENCE
        self.counts["refused"] += 1
        self._forget()
        return [self._event("refused", text)]

    def _hush(self):
        """End the answer that is out; the clock tells what was heard of it."""
        total = sum(seconds for _, seconds in self._sounds) if self._whole else None
        self._last = self._turn, self._text, total
        self.truncate(self._heard_seconds())
        return [self._event("interrupted", self._turn.answer)]

    def commit(self):
        """End the question now -> Events; none if there is no question."""
        if self.state not in (State.SPEAKING, State.PAUSED):
            return []
        self._speech = 0.0  # the rest of a word that is still being spoken resumes nothing
        return self._end()

    def stop(self):
        """Leave this question, or this answer, as it is; the next sound is a new question."""
        events = []
        if self.state is State.REPLYING and self._sounds:
            events = self._hush()
        elif self._turn in self.turns:
            self.turns.remove(self._turn)
        self._forget()
        self._before.clear()
        self.state, self._speech = State.SILENCE, 0.0
        return events

    # ---- what was heard ----

    def _heard_seconds(self):
        """Seconds of the sound that is out, which a player has played by now."""
        now, end, heard = self.clock(), 0.0, 0.0
        for ready, seconds in self._sounds:
            begin = max(ready, end)
            heard += min(max(now - begin, 0.0), seconds)
            end = begin + seconds
        return heard

    def truncate(self, seconds):
        """Correct the history: so many seconds of the answer that ended last were played."""
        if self._last:
            turn, text, total = self._last
            turn.answer = words_heard(text, seconds, total, self.letters)
            if self._listener:  # the next question has begun
                self._listener.history = self.history

    def _played(self):
        """Silence again, once all sound has been played."""
        if self.state is not State.REPLYING or not self._whole:
            return []
        total = sum(seconds for _, seconds in self._sounds)
        if self._heard_seconds() < total - 1e-6:
            return []
        self._last = self._turn, self._text, total
        self._turn.answer, self.state = self._text, State.SILENCE
        self._forget()
        return [self._event("finished")]

    # ---- what the model does ----

    @property
    def busy(self):
        """Is there work for the model?"""
        return self._next() is not None

    def work(self):
        """Do one unit of it -> Events."""
        job = self._next()
        return [*(job() if job else ()), *self._played()]

    def _next(self):
        """The most urgent unit of work, or None."""
        answering = self.state is State.REPLYING or self.speculate and self.state is State.PAUSED
        waiting = self._untranscribed()
        if self.state is State.SILENCE or self._fault:
            return waiting and self._transcribe
        if self._talk:
            return self._speak if not self._whole else waiting and self._transcribe
        if waiting:  # before the next answer, which needs the history
            return self._transcribe
        if sum(map(len, self._unheard)) >= EVERY * SAMPLE_RATE or answering and self._unheard:
            return self._hear
        return self._answer if answering else None

    def _untranscribed(self):
        return next((turn for turn in self.turns if turn.question is None), None)

    def _transcribe(self):
        turn = self._untranscribed()
        ids, turn.ids, turn.question = turn.ids, [], ""  # if it fails, it is not tried for ever
        turn.question = self.model.transcribe(ids)
        return [self._event("transcribed", turn.question)]

    def _hear(self):
        if self._listener is None:
            self._listener = Listener(self.model, every=EVERY, history=self.history,
                                      prefill=self._prefill)  # fmt: skip
        self._shorten(self._listener.ids)
        frames, self._unheard = self._unheard, []
        self._listener.push(torch.cat(frames))
        return []

    def _shorten(self, ids):
        """Once the context is full, leave out the oldest turns, for ever, until half is free."""
        room = self._room - MAX_ANSWER - 100  # and a look's new ids
        history = self._listener.history
        if len(self.model.prompt(ids, history)) > room:  # what stays is read anew: not every turn
            room = (room + len(self.model.prompt(ids))) // 2
        while history and len(self.model.prompt(ids, history)) > room:
            history = history[2:]
            while self.turns and not (self.turns[0].question and self.turns[0].answer):
                del self.turns[:1]  # it was never in the history
            del self.turns[:1]
        self._listener.history = history

    def _answer(self):
        self._speculative = self.state is State.PAUSED
        self.counts["speculations"] += self._speculative
        try:
            ids = self._listener.peek()
        except audio.AudioError as fault:
            self._fault = str(fault)
            return self._refuse() if self.state is State.REPLYING else []
        self._shorten(ids)
        self._turn = Turn(ids)
        if self.state is State.REPLYING:
            self.turns.append(self._turn)
        options = {"prefill": self._prefill} if self._prefill else {}
        history = self._listener.history
        self._talk = self.model.stream(ids, history=history, **options, **self.sampling)
        return []

    def _speak(self):
        piece = next(iter(self._talk), None)
        self._whole = piece is None
        if self.state is State.PAUSED:
            self._kept.append(piece)
            return []
        return self._let_out(piece)

    def _let_out(self, piece):
        """Events of a Piece that may be heard; None: the answer is whole."""
        if piece is None:
            self._text = self._text.strip()
            if seconds := sum(seconds for _, seconds in self._sounds):
                self.letters = max(1.0, spoken_letters(self._text) / seconds)
            return [self._event("answered", self._text)]
        self._text += piece.text
        event = self._event("piece", piece.text, piece.audio)
        if len(piece.audio):
            if not self._sounds:
                self.counts["turns"] += 1
                self.counts["used"] += self._speculative
                self._held = []
            self._sounds.append((event.at, len(piece.audio) / self.model.vocoder.sample_rate))
        return [event]


def spoken_letters(text):
    """How many letters of an answer, with the spaces between them, are spoken."""
    return sum(len(word) + 1 for word in text.split() if not TAG.match(word))


def words_heard(text, seconds, total, letters):
    """The words of an answer that were spoken whole in its first `seconds`. total: seconds of the
    whole answer, None as long as it is not known: then `letters` a second. Text runs ahead of
    sound, and no piece says where its words lie; speech is taken as even."""
    if total is not None:
        letters = spoken_letters(text) / max(total, 1e-9)
    left, words = seconds * letters + 1e-6, []
    for word in text.split():
        left -= 0 if TAG.match(word) else len(word) + 1
        if left < 0:
            break
        words.append(word)
    return " ".join(words) if any(not TAG.match(word) for word in words) else ""
