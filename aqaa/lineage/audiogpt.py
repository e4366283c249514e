"""AudioGPT (2304.12995) at mini size: a text language model that calls tools of sound.

Its four steps, of which `log` keeps what each gave:
  modality transformation   the recogniser writes what the question says
  task analysis             a small network reads these words: which tool, which words of the
                            question are its argument, which manner
  tool assignment           the tool with its argument
  response generation       the tool's text, which the synthesizer then reads aloud
Nothing but text passes from one to the next: how the question sounded is lost, unless a describer
of voices, a tool at the edge as the recogniser is, says it in words."""

from dataclasses import dataclass

import torch
from torch import nn

from aqaa.config import SAMPLE_RATE
from aqaa.lineage.system import Writer
from aqaa.lineage.tools import ASPECTS, Describer, Reader, replied, role
from aqaa.tokenizers.text import MANNERS, normalise, tagged
from aqaa.weights.model_folder import build

TOOLS = {  # name: what it does, for the log
    "answer": "the language model answers, the synthesizer reads aloud",
    "repeat": "the synthesizer says the argument",
    "read": "the synthesizer says the argument in a manner",
    "again": "the synthesizer says the last answer again",
    "sing": "the language model writes a score, the synthesizer sings it",
    **{aspect: "the describer of voices listens" for aspect in ASPECTS},
}
NAMES, HOW = list(TOOLS), ("normal", *MANNERS)
STEPS = ("modality transformation", "task analysis", "tool assignment", "response generation")


@dataclass(frozen=True)
class Analysis:
    """What the words of a question ask for. prob: of the tool."""

    tool: str
    manner: str = "normal"
    argument: str = ""
    prob: float = 1.0

    def __str__(self):
        how = f", manner {self.manner}" if self.manner != "normal" else ""
        of = f", of {self.argument!r}" if self.argument else ""
        return f"{self.tool} ({self.prob:.0%}){how}{of}"


class Analyst(nn.Module):
    """A recurrent network over the words of a question; its three heads tell the tool, the manner,
    and which words are the argument."""

    def __init__(self, width=48):
        super().__init__()
        self.reader = Reader(width)
        self.tool_head = nn.Linear(2 * width, len(NAMES))
        self.manner_head = nn.Linear(2 * width, len(HOW))
        self.inside_head = nn.Linear(2 * width, 1)

    def forward(self, lines):
        """lines: B lists of words → logits of tools (B, tools) and manners (B, manners), of each
        word being in the argument (B, T), and which are words (B, T) bool."""
        _, hidden, there = self.reader(lines)  # (B, T, 2 D)
        most = hidden.masked_fill(~there[..., None], -1.0).amax(1)  # a tanh is above -1
        inside = self.inside_head(hidden)[..., 0]
        return self.tool_head(most), self.manner_head(most), inside, there

    @torch.no_grad()
    def analyse(self, words):
        """Analysis of a list of words."""
        tools, manners, inside, _ = self([words])
        prob, tool = tools[0].softmax(-1).max(-1)
        chosen = [word for word, logit in zip(words, inside[0].tolist()) if logit > 0]
        manner = HOW[int(manners[0].argmax())]
        return Analysis(NAMES[int(tool)], manner, " ".join(chosen), float(prob))


class AudioGPT(Writer):
    """Recogniser, language model and synthesizer, and tools that words choose."""

    name = "audiogpt"

    def __init__(self, model, seed=0, folder=None):
        super().__init__(model, seed, folder)
        self.analyst = self.part("analyst", Analyst())
        self.describer = self.part("describer", Describer())
        # Two more backbones: one only recognises, the other never hears anything.
        ear, language = (role(model, self.part(name, build("backbone", model.config, plain=True)))
                         for name in ("recogniser", "language"))  # fmt: skip
        self.ear, self.language = ear, Writer(language, seed)
        self.log = []  # (step, what it gave) of the last answer, and of the turns before it

    def answer(self, turns):
        self.log = []
        return super().answer(turns)

    def thought(self, turn, said):
        return self.heard(turn, said)[1]

    def heard(self, turn, said):
        """(transcript, answer in words) of a sound (N,), by the four steps."""
        words = self.ear.transcribe((turn, SAMPLE_RATE))
        self.log.append((STEPS[0], words))
        # Only the describer hears the question as well, and hands on nothing but its words.
        return words, self.called(words, said, lambda aspect: self.describer.says(aspect, turn))

    def called(self, words, said, described):
        """The answer to a question in words. said: the turns before it; described(aspect): what a
        describer that hears it writes."""
        spoken = [text for who, text in said if who == "assistant"]
        analysis = self.analyst.analyse(words.split()) if words.split() else Analysis("answer")
        tool, argument = analysis.tool, analysis.argument
        self.log.append((STEPS[1], str(analysis)))
        # A tool that lacks its argument leaves the question to the language model.
        if tool == "again" and not spoken or tool in ("repeat", "read") and not argument:
            tool = "answer"
        self.log.append((STEPS[2], f"{tool}: {TOOLS[tool]}"))
        if tool in ASPECTS:
            text = described(tool)
        elif tool == "again":
            restyled = tagged(normalise(spoken[-1]), analysis.manner)
            text = restyled if analysis.manner != "normal" else spoken[-1]
        elif tool in ("repeat", "read"):
            text = tagged(argument, analysis.manner if tool == "read" else "normal")
        else:
            text = replied(self.language, words, said)
        self.log.append((STEPS[3], text))
        return text
