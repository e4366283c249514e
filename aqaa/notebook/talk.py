"""Recording a question and playing the answer."""

import threading
import time
from collections.abc import Mapping

import numpy as np
import torch

from aqaa import audio
from aqaa.answer import playout
from aqaa.config import SAMPLE_RATE
from aqaa.notebook import show
from aqaa.notebook.base import Widget, pcm16


class Recorder(Widget):
    """A question from the microphone; `audio()` is the recording, else the fallback. fallback: a
    path, (samples, rate), or an entry of `show.questions`. state: "fallback" (static), "idle",
    "recording", "recorded", or "refused" with the reason in `message`."""

    script = "recorder"
    LIMIT = 30  # seconds
    SHORTEST = 0.3  # seconds: less is a slip of the finger
    REFUSALS = {
        "NotAllowedError": "The browser does not allow this page to use the microphone "
                           "(see its address bar).",
        "NotFoundError": "No microphone was found.",
        "NotReadableError": "The microphone is in use by another program.",
        "InsecurePage": "A browser gives the microphone only to pages on localhost or https.",
    }

    def __init__(self, fallback, interactive=False, transcript=""):
        if isinstance(fallback, Mapping):
            fallback, transcript = fallback["path"], fallback["transcript"]
        self.fallback, self.transcript = audio.load_question(fallback), transcript
        phase = "idle" if interactive else "fallback"
        super().__init__(interactive, phase=phase, message=self._ready(), sound=None)
        self._chunks, self._rate, self._recording = [], SAMPLE_RATE, None
        if interactive:
            self._open(fallback=pcm16(self.fallback), rate=SAMPLE_RATE, transcript=transcript,
                       limit=self.LIMIT)  # fmt: skip

    @property
    def state(self):
        """Where it is: "fallback", "idle", "recording", "recorded" or "refused"."""
        return self._state["phase"]

    @property
    def message(self):
        """The same in a sentence for the reader."""
        return self._state["message"]

    def audio(self, rate=SAMPLE_RATE):
        """The recording, else the fallback: (N,) at `rate` Hz. RuntimeError while it records."""
        if self.state == "recording":
            raise RuntimeError("the recorder is still recording: press its Stop button, then run "
                               "this cell again.")
        recorded = self.state == "recorded"
        wav, own = (self._recording, self._rate) if recorded else (self.fallback, SAMPLE_RATE)
        return audio.resample(wav, own, to=rate)

    def __repr__(self):
        seconds = "" if self.state == "recording" else f", {len(self.audio()) / SAMPLE_RATE:.2f} s"
        return f"<recorder: {self.state}{seconds}>"

    def _static(self):
        title = "Your question: the sample"
        return [show.sound(self.fallback, title=title, transcript=self.transcript)]

    def _ready(self):
        words = f" (“{self.transcript}”)" if self.transcript else ""
        return f"Nothing recorded yet; the sample question{words} stands in."

    def _refuse(self, reason):
        message = f"{reason} The sample question is used instead."
        self._set(phase="refused", message=message, sound=None)

    def _on_start(self, message, _):
        self._chunks, self._rate = [], int(message["rate"])
        self._set(phase="recording", message="Recording: speak now, then press Stop.", sound=None)

    def _on_chunk(self, _, buffers):
        if self.state == "recording" and sum(map(len, self._chunks)) < self.LIMIT * self._rate:
            self._chunks.append(np.frombuffer(buffers[0], "<f4").copy())

    def _on_stop(self, *_):
        if self.state != "recording":
            return
        wave = np.concatenate([np.zeros(0, np.float32), *self._chunks])
        seconds = len(wave) / self._rate
        if seconds < self.SHORTEST:
            self._refuse(f"Only {seconds:.1f} s were recorded.")
        elif not np.isfinite(wave).all() or np.abs(wave).max() < audio.SILENCE:
            self._refuse("The recording is silent: is the right microphone chosen, and not muted?")
        else:
            self._recording = torch.from_numpy(wave)
            self._set(phase="recorded", message=f"Recorded {seconds:.1f} s. Run the next cell.",
                      sound=pcm16(audio.resample(self._recording, self._rate)))  # fmt: skip

    def _on_error(self, message, _):
        name = message["name"]
        other = f"The microphone could not be opened ({name}: {message.get('message')})."
        self._refuse(self.REFUSALS.get(name, other))

    def _on_clear(self, *_):
        self._set(phase="idle", message=self._ready(), sound=None)


class Player(Widget):
    """Plays an answer while it is being made: show it in one cell, call `play_stream` in the next.

    answer: the finished Answer, None before that and after a stop. heard: (N,) samples of it, or of
    what was made before the stop. report: see `waits`; first_ms counts from the call, and "where"
    is the "page", or the "kernel", which knows when pieces were ready.

    With "Run All" the kernel hears a page only after the last cell, but a page sees changes of the
    state at once: pieces travel in the state until the page has said that it is there."""

    script = "player"
    rate = SAMPLE_RATE

    def __init__(self, interactive=False):
        super().__init__(interactive, phase="idle", text="", sound=None, rate=SAMPLE_RATE,
                         message="Nothing said yet.", waiting=[])  # fmt: skip
        self.answer, self.report, self.heard = None, {}, torch.zeros(0)
        self._thread, self._fault, self._halt = None, None, threading.Event()
        self._number, self._listening = 0, False
        if interactive:
            self._open()

    @property
    def text(self):
        return self._state["text"].strip()

    def play_stream(self, model, question, **sampling):
        """Ask the model, and return itself: interactive at once, otherwise when the answer is made.
        question: a Recorder, or as of model.stream, like sampling. What still plays is stopped."""
        if isinstance(question, Recorder):
            question = (question.audio(), SAMPLE_RATE)
        self.stop()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()
        self.answer, self.report, self.heard, self._fault = None, {}, torch.zeros(0), None
        self.rate = model.vocoder.sample_rate
        self._halt.clear()
        self._set(phase="listening", text="", sound=None, rate=self.rate, error="", waiting=[],
                  message="hearing the question …")  # fmt: skip
        arguments = model, question, sampling
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self._thread.start()
        return self if self.interactive else self.join()

    def stop(self):
        """Silence; an answer that is being made ends after the piece at work."""
        self._halt.set()
        self._say("silence")

    def join(self, timeout=None):
        """Wait until the answer is made (seconds at most); the page's Stop button is not heard
        meanwhile. Raises what went wrong."""
        if self._thread is not None:
            self._thread.join(timeout)
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault
        return self

    def _run(self, model, question, sampling):
        began, ready, pieces = time.perf_counter(), [], []
        self._say("start", sent=1000 * time.time())
        try:
            talk = model.stream(question, **sampling)
            for piece in talk:
                if self._halt.is_set():
                    break
                if len(piece.audio):
                    ready.append((time.perf_counter() - began, len(piece.audio) / self.rate))
                    pieces.append(piece.audio)
                    self._say("chunk", pcm16(piece.audio), rate=self.rate)
                self._set(phase="speaking", text=self._state["text"] + piece.text,
                          message="making the answer …")  # fmt: skip
            self.heard = torch.cat([torch.zeros(0), *pieces])
            stopped = self._halt.is_set()
            self.answer = None if stopped else getattr(talk, "answer", None)  # a generator has none
            self.report = {**waits(ready), "where": "kernel"}
            sound = pcm16(self.heard) if len(self.heard) else None
            phase = "stopped" if stopped else "done"
            self._set(phase=phase, sound=sound, message=self._summary(stopped))
            self._say("end")
        except Exception as fault:  # the thread has nobody above it
            self._fault = fault
            self._set(phase="failed", error=str(fault), message="")

    def _say(self, kind, *sound, **message):
        """To the page, numbered, so that it takes everything once: a message, or in the state while
        the page is not known to listen."""
        if self._view is None:
            return
        with self._lock:
            self._number += 1
            message = {"type": kind, "number": self._number, **message}
            if self._listening:
                self._tell(message, *sound)
            else:
                message["sound"] = sound[0] if sound else None
                self._set(waiting=[*self._state["waiting"], message])

    def _summary(self, stopped):
        """A kernel knows when pieces were ready; only a page knows when they were heard."""
        report, began = self.report, "Stopped: " * stopped
        made = f"{began}{len(self.heard) / self.rate:.1f} s made in {report['chunks']} pieces"
        if report["where"] == "kernel":
            return f"{made}, the first of them after {report['first_ms'] or 0:.0f} ms."
        gaps = f"{report['gaps']} gap{'s' * (report['gaps'] != 1)}"
        return f"{made}, first sound after {report['first_ms'] or 0:.0f} ms, {gaps}."

    def _on_ready(self, *_):
        """The page has had what waits; it was there all the time."""
        with self._lock:
            self._listening = True
            self._set(waiting=[])

    def _on_stop(self, *_):
        self._halt.set()

    def _on_report(self, message, _):
        self.report = {name: message[name] for name in ("chunks", "gaps", "first_ms")}
        self.report["where"] = "page"
        self._set(message=self._summary(self._state["phase"] == "stopped"))

    def __repr__(self):
        words = f' "{self.text}"' if self.text else ""
        return f"<player: {self._state['phase']}, {len(self.heard) / self.rate:.2f} s{words}>"

    def _static(self):
        if not len(self.heard):
            return [show.table([["Answer", self._state["message"]]])]
        return [show.sound(self.heard, self.rate, "Answer", self.text)]  # no times: always the same


def waits(pieces):
    """Play-out of pieces [(ready s, seconds of sound)]: chunks, gaps (waits between), first_ms."""
    gaps = sum(gap > 0 for gap in playout(pieces).gaps[1:])
    first = 1000 * pieces[0][0] if pieces else None
    return {"chunks": len(pieces), "gaps": gaps, "first_ms": first}
