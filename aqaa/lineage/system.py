"""What every system of the lineage is: it answers sound with words and sound.

A system has `name` and answer(turns) -> Reply; turns: (N,) float32 at 16 kHz each, the questions of
a dialogue in their order, of which the last one is answered. `Aqaa` is the model itself, `Writer` a
system that writes its answer and then has it read aloud. Both know the abilities of the model that
the others are made of: recognise, answer in writing, read aloud."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aqaa.config import AQTA, SAMPLE_RATE, TTS
from aqaa.files import ModelError, read_object
from aqaa.pipeline import text_ids
from aqaa.tokenizers import dialogue, interleave
from aqaa.weights.model_folder import load_part

SILENCE = np.zeros(0, np.float32)


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

    def __init__(self, model, seed=0, folder=None):
        """folder: where `aqaa train lineage NAME` left the weights of a system that has its own."""
        self.model, self.seed, self.folder = model, seed, folder
        self.sizes = {}  # parameters of its own parts

    def part(self, name, module):
        """`module` with the weights that a stage of this system's training left, in eval mode.
        Raises ModelError where it was not trained."""
        if not self.folder or not (Path(self.folder) / "parts" / f"{name}.safetensors").exists():
            raise ModelError(f"{self.name} has not been trained here (no {name} in {self.folder}): "
                             f"run `aqaa train lineage {self.name}`.")  # fmt: skip
        self.sizes[name] = sum(one.numel() for one in module.parameters())
        return load_part(Path(self.folder) / "parts", name, module)

    def trained(self):
        """{"parameters": millions of the parts that answers needed, "minutes" of all training}."""
        if not self.sizes:
            return {}
        record = read_object(Path(self.folder) / "record.json", "train the system again")
        minutes = sum(told["seconds"] for told in record.values()) / 60
        millions = sum(self.sizes.values()) / 1e6
        return {"parameters": round(millions, 2), "minutes": round(minutes, 1)}

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


class Writer(Aqaa):
    """One part hears and writes, then another speaks: nothing but words is passed on."""

    def heard(self, turn, said):
        return self.model.transcribe((turn, SAMPLE_RATE)), self.thought(turn, said)

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
