"""What `aqaa eval` can ask: anything that answers sound with words and sound.

A system has `name` and answer(turns) -> Reply; turns: (N,) float32 at 16 kHz each, the questions of
a dialogue in their order, of which the last one is answered. `cascade` and `listener` are made of
the abilities of the same model: recognise, answer in writing, read aloud."""

import base64
import io
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from aqaa.config import AQTA, SAMPLE_RATE, TTS
from aqaa.files import ModelError, brief
from aqaa.pipeline import text_ids
from aqaa.tokenizers import dialogue, interleave

PATIENCE = 120.0  # s for an answer of a server
SILENCE = np.zeros(0, np.float32)


class SystemFault(OSError):
    """A system that is gone or sends what it should not, in one sentence: the run ends there, and
    what was answered is kept."""


@dataclass(frozen=True)
class Reply:
    """text; audio (N,) float32 at `rate` Hz; first, seconds: s until the first sound and until all
    of it, None where nobody measured."""

    text: str
    audio: np.ndarray
    rate: int = SAMPLE_RATE
    first: float | None = None
    seconds: float | None = None


class Aqaa:
    """The model itself: one network hears, writes and speaks."""

    name = "aqaa"

    def __init__(self, model, seed=0):
        self.model, self.seed = model, seed

    def answer(self, turns):
        """Reply to the last of the `turns`; what was said before is kept as words."""
        said = self.before(turns[:-1])
        answer = self.model.stream((turns[-1], SAMPLE_RATE), history=said, seed=self.seed).answer
        audio, took = np.asarray(answer.audio, np.float32), answer.timings
        return Reply(answer.text, audio, answer.sample_rate, took.get("first_audio"), took["total"])

    def before(self, turns):
        """[(role, text), …] of earlier turns: each is heard, transcribed and answered in words."""
        said = []
        for turn in turns:
            heard, written = self.heard(turn, said)
            said += [("user", heard), ("assistant", written)]
        return said

    def heard(self, turn, said):
        """(transcript, answer in words) of one earlier turn."""
        ids = self.model.listen((turn, SAMPLE_RATE))
        prompt = self.model.prompt(ids, said)
        return self.model.transcribe(ids), self.written(prompt)

    def written(self, prompt):
        """The words of an answer; its sound is not made."""
        steps = text_ids(self.model.generate(prompt, seed=self.seed))
        return self.model.text.decode(steps).strip()

    def spoken(self, text):
        """(N,) of a text, read aloud by the model's own voice, and its rate."""
        prompt = self.model.prompt(self.model.text.encode(text), marker=TTS)
        layout = dialogue.layout("audio_only")
        ids = [step.id for step in self.model.generate(prompt, layout=layout, seed=self.seed)]
        whole = interleave.groups(ids, self.model.ids).reshape(-1).tolist()
        audio = self.model.synthesize(whole, seed=self.seed) if whole else SILENCE
        return np.asarray(audio, np.float32), self.model.vocoder.sample_rate


class Listener(Aqaa):
    """One network hears and writes, then another speaks: nothing but words is passed on."""

    name = "listener"

    def answer(self, turns):
        began, said = time.monotonic(), self.before(turns[:-1])
        text = self.thought(turns[-1], said)
        audio, rate = self.spoken(text)
        took = time.monotonic() - began
        return Reply(text, audio, rate, took, took)  # it speaks when all is done

    def thought(self, turn, said):
        """The answer to a sound (N,), in words."""
        ids = self.model.listen((turn, SAMPLE_RATE))
        return self.told(self.model.prompt(ids, said, marker=AQTA))

    def told(self, prompt):
        """What follows a prompt where only words may come."""
        layout = dialogue.TextOnly()
        steps = self.model.generate(prompt, layout=layout, seed=self.seed, max_tokens=80)
        return self.model.text.decode([step.id for step in steps]).strip()


class Cascade(Listener):
    """Recogniser, language model and synthesizer in a row."""

    name = "cascade"

    def thought(self, turn, said):
        heard = self.model.transcribe(self.model.listen((turn, SAMPLE_RATE)))
        return self.told(self.model.prompt(self.model.text.encode(heard), said))


class Recorded:
    """Answers that lie in a folder: ID.wav and ID.txt each; one that is missing is no answer."""

    def __init__(self, folder):
        self.folder, self.name = Path(folder), Path(folder).name
        self.item = None  # whose answer is asked for; `evaluate` sets it

    def answer(self, turns):
        sound, words = (self.folder / f"{self.item}.{kind}" for kind in ("wav", "txt"))
        text = words.read_text(encoding="utf-8").strip() if words.is_file() else ""
        if not sound.is_file():
            return Reply(text, SILENCE)
        try:
            audio, rate = soundfile.read(sound, dtype="float32", always_2d=True)
        except (OSError, soundfile.LibsndfileError) as fault:
            said = f"{sound} is no sound file ({brief(fault)}): record it again."
            raise SystemFault(said) from None
        return Reply(text, audio.mean(1), rate)


class Endpoint:
    """A server with OpenAI's /v1/chat/completions, sound in and out."""

    def __init__(self, url, model="aqaa", token="none"):
        self.name, self.model, self.token = url.rstrip("/"), model, token

    def answer(self, turns):
        messages, reply, began = [], None, time.monotonic()
        for turn in turns:
            if reply is not None:
                messages.append({"role": "assistant", "content": reply["transcript"]})
            messages.append({"role": "user", "content": [_sound(turn)]})
            began = time.monotonic()
            reply = self._ask(messages)
        took = time.monotonic() - began
        try:
            file = io.BytesIO(base64.b64decode(reply["data"]))
            audio, rate = soundfile.read(file, dtype="float32", always_2d=True)
        except (ValueError, TypeError, soundfile.LibsndfileError) as fault:
            raise self._stranger(fault) from None
        return Reply(reply["transcript"].strip(), audio.mean(1), rate, took, took)

    def _ask(self, messages):
        """{"data", "transcript"} of the answer. Raises SystemFault."""
        body = {"model": self.model, "messages": messages, "modalities": ["text", "audio"],
                "audio": {"voice": "aqaa", "format": "wav"}}  # fmt: skip
        header = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"}
        place = self.name.removesuffix("/v1") + "/v1/chat/completions"
        asked = urllib.request.Request(place, json.dumps(body).encode(), header)
        try:
            with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
                reply = json.load(answer)["choices"][0]["message"]["audio"]
            if not isinstance(reply["transcript"], str):
                raise TypeError("its transcript is no text")
            return reply
        except urllib.error.HTTPError as fault:
            raise SystemFault(f"{self.name} refuses ({fault.code}): see its log.") from None
        except (OSError, urllib.error.URLError) as fault:
            raise SystemFault(f"{self.name} does not answer ({brief(fault)}): is it running? "
                              "--resume goes on where it was lost.") from None
        except (ValueError, LookupError, TypeError) as fault:
            raise self._stranger(fault) from None

    def _stranger(self, fault):
        return SystemFault(f"{self.name} answers otherwise than OpenAI's chat with sound "
                           f"({brief(fault)}): name another server.")  # fmt: skip


def _sound(turn):
    """A message's part with the sound (N,) of a question."""
    file = io.BytesIO()
    soundfile.write(file, turn, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


OWN = {kind.name: kind for kind in (Aqaa, Cascade, Listener)}


def make(name, load, seed=0):
    """A system by its name: one of OWN, the address of a server, or a folder of answers. load: a
    function that gives the model, called where it is needed. Raises ModelError for another name."""
    if name in OWN:
        return OWN[name](load(), seed)
    if name.startswith(("http://", "https://")):
        return Endpoint(name)
    if Path(name).is_dir():
        return Recorded(name)
    raise ModelError(f"there is no system {name!r}: choose {', '.join(OWN)}, the address of a "
                     "server, or a folder with an ID.wav and ID.txt for each answer.")  # fmt: skip
