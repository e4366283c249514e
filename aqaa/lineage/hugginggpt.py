"""HuggingGPT (2303.17580) at mini size: a planner that has others do the work.

Its four stages, of which `log` keeps what each gave:
  task planning         a small network reads the request and emits tasks, each a vector, with what
                        it works on: what was given, or the result of an earlier task
  model selection       the tool whose description is nearest to the task's vector
  task execution        the tools run, as far as what they work on is there
  response generation   words and sound of the results are put together
The planner knows no tool: one that is described in other words, or a new one, needs no training."""

import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from aqaa.config import SAMPLE_RATE
from aqaa.corpus.wider import UNHEARD
from aqaa.files import brief
from aqaa.lineage import tools
from aqaa.lineage.system import SILENCE, Reply, Writer
from aqaa.lineage.tools import SOUND, TEXT, TOOLS, Reader, Tool
from aqaa.tokenizers.text import normalise
from aqaa.weights.model_folder import build, load_part

GIVEN = -1  # the source of a task that works on what came with the request
ALOUD = "answer aloud"  # what is asked of every spoken question, in front of its words
MOST = 5  # tasks of a plan
KEY = 48  # size of the vectors of tasks and of descriptions
END = "."  # behind every request: what is attended to when all is read
SHOWN = 0.12  # share of a task's attention that a word needs to be listed
ROLES = "recogniser", "language"  # of backbones of AudioGPT
STAGES = ("task planning", "model selection", "task execution", "response generation")


@dataclass(frozen=True)
class Task:
    """One task of a plan. words: those of the request that it comes from; source: GIVEN, or the
    place of the task whose result it works on; prob: of its tool among all that there are."""

    words: str
    tool: Tool
    source: int
    prob: float


class Refused(str):
    """The sentence that stands where a tool gave no result."""


# ---- the planner ---------------------------------------------------------------------------------


class Planner(nn.Module):
    """Reads a request and emits a vector for each task; encodes descriptions into the same space.

    A task's vector is made of the request's words that it attends to and of the decoder's state:
    the words, which pass the same projection as those of descriptions, find tools that training
    never saw; the state knows tasks that no word names. B requests of T words, S steps, J tools."""

    def __init__(self, width=48, state=64):
        super().__init__()
        self.reader = Reader(width)  # its table of words serves descriptions, too
        self.salience = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
        self.project = nn.Linear(width, KEY, bias=False)
        self.start = nn.Linear(2 * width, state)
        self.cell = nn.GRUCell(KEY + 2 * width, state)
        self.query, self.look = nn.Linear(state, width), nn.Linear(2 * width, width)
        self.score, self.seen = nn.Linear(width, 1), nn.Linear(1, width, bias=False)
        self.wish = nn.Linear(state + 2 * width, KEY)
        self.stop_head = nn.Linear(state + 2 * width, 1)
        self.asks, self.offers = nn.Linear(state + KEY, KEY), nn.Linear(state + KEY, KEY)
        self.given = nn.Parameter(torch.randn(KEY) / KEY**0.5)
        self.log_scale = nn.Parameter(torch.tensor(2.3))  # cosines become logits of up to ± 10

    def keys(self, descriptions):
        """J descriptions → vectors (J, KEY) of length 1."""
        vectors, there = self.reader.words([normalise(one).split() for one in descriptions])
        weights = self.salience(vectors)[..., 0].masked_fill(~there, -1e9).softmax(-1)
        return F.normalize(self.project((weights[..., None] * vectors).sum(1)), dim=-1)

    def forward(self, requests, steps=MOST):
        """requests: B lists of words → tasks (B, S, KEY) of length 1, logits (B, S) of being beyond
        the last task, logits (B, S, S) of sources, of which 0 is what was given and i the task
        i - 1, and the attention (B, S, T)."""
        vectors, hidden, there = self.reader([[*words, END] for words in requests])
        looked, last = self.look(hidden), hidden.masked_fill(~there[..., None], -1.0).amax(1)
        state, task = torch.tanh(self.start(last)), vectors.new_zeros(len(requests), KEY)
        context, made, offered = torch.zeros_like(last), [], [self.given.expand(len(requests), -1)]
        read = torch.zeros_like(vectors[..., :1])  # (B, T, 1): how much each word was attended to
        for _ in range(steps):
            state = self.cell(torch.cat([task, context], -1), state)
            scores = torch.tanh(looked + self.seen(read) + self.query(state)[:, None])
            scores = self.score(scores)[..., 0]  # (B, T)
            weights = scores.masked_fill(~there, -1e9).softmax(-1)[..., None]
            read = read + weights
            context = (weights * hidden).sum(1)
            both = torch.cat([state, context], -1)
            task = self.project((weights * vectors).sum(1)) + self.wish(both)
            task = F.normalize(task, dim=-1)
            known = torch.cat([state, task], -1)
            sources = (self.asks(known)[:, None] * torch.stack(offered, 1)).sum(-1)  # (B, so far)
            sources = F.pad(sources, (0, steps - len(offered)), value=-1e9)
            made.append((task, self.stop_head(both)[:, 0], sources, weights[..., 0]))
            offered.append(self.offers(known))
        return [torch.stack(part, 1) for part in zip(*made)]

    def choose(self, tasks, keys):
        """Logits (…, J) of tasks (…, KEY): scalar products with descriptions."""
        return self.log_scale.exp() * tasks @ keys.T

    @torch.no_grad()
    def plan(self, words, tools, kind):
        """[Task, …] of a request. kind: "sound" or "text", what comes with it. A tool is chosen
        among those for whose kind there is anything, and works on that."""
        tasks, stops, sources, weights = (part[0] for part in self([words]))
        logits = self.choose(tasks, self.keys([tool.description for tool in tools]))
        plan, kinds = [], [kind]
        for step in range(MOST if words else 0):
            if step and stops[step] > 0:
                break
            fits = torch.tensor([tool.takes in kinds for tool in tools])
            probs = logits[step].cpu().masked_fill(~fits, -1e9).softmax(-1)
            tool = tools[int(probs.argmax())]
            pointed = sources[step, : len(kinds)].tolist()
            source = max((i for i, one in enumerate(kinds) if one == tool.takes),
                         key=pointed.__getitem__)  # fmt: skip
            said = [word for word, weight in zip(words, weights[step].tolist()) if weight > SHOWN]
            plan.append(Task(" ".join(said), tool, source - 1, float(probs.max())))
            kinds.append(tool.gives)
        return plan


# ---- the system ----------------------------------------------------------------------------------


class HuggingGPT(Writer):
    """Plans, chooses, runs tools and sums up. More tools join by `add`, with nothing but a
    description."""

    name = "hugginggpt"

    def __init__(self, model, seed=0, folder=None):
        super().__init__(model, seed, folder)
        self.planner = self.part("planner", Planner())
        self.describer = self.part("describer", tools.Describer())
        # AudioGPT's recogniser and language model do their work here too, where they lie beside.
        beside, models = Path(folder).parent / "audiogpt" / "parts", [model, model]
        if all((beside / f"{name}.safetensors").exists() for name in ROLES):
            blank = (build("backbone", model.config, plain=True) for _ in ROLES)
            models = [tools.role(model, load_part(beside, *one)) for one in zip(ROLES, blank)]
        self.ear, self.language = models[0], Writer(models[1], seed)
        self.said, self.log, self.tools = (), [], list(TOOLS)
        self._last = None, ""  # what was recognised last
        self.run = {
            "recogniser": self.recognised, "synthesizer": self.spoken,
            "answerer": lambda words: tools.replied(self.language, words, self.said),
            **{name: lambda sound, name=name: self.describer.says(name, *sound)
               for name in tools.ASPECTS},
            **{name: lambda sound, change=change: (change(sound[0]), sound[1])
               for name, change in tools.CHANGERS.items()},
        }  # fmt: skip

    def add(self, tool, run):
        """One more Tool; run(sound or text) gives what it says to give."""
        self.tools.append(tool)
        self.run[tool.name] = run

    def answer(self, turns):
        began, said = time.monotonic(), self.before(turns[:-1])
        _, reply = self.asked(turns[-1], said)
        took = time.monotonic() - began
        return replace(reply, first=took, seconds=took)

    def heard(self, turn, said):
        words, reply = self.asked(turn, said, aloud=False)
        return words, reply.text

    def asked(self, turn, said, aloud=True):
        """(transcript, Reply) of a spoken question (N,), whose words are the request."""
        words = self.recognised((turn, SAMPLE_RATE))
        return words, self.handle(f"{ALOUD} {words}", (turn, SAMPLE_RATE), said, aloud)

    def recognised(self, sound):
        """The words of a sound; of one that was read for its request not twice."""
        if self._last[0] is not sound[0]:
            self._last = sound[0], self.ear.transcribe(sound)
        return self._last[1]

    def handle(self, request, given, said=(), aloud=True):
        """Reply to a request in words and what it is about, a sound ((N,), Hz) or a text. said: the
        turns before it. aloud=False: only what is needed for the words is run."""
        self.log, self.said = [], said
        kind = TEXT if isinstance(given, str) else SOUND
        tasks = self.planner.plan(normalise(request).split(), self.tools, kind)
        self._did(0, *(f"{i}: {task.words!r} of {_of(task)}" for i, task in enumerate(tasks)))
        self._did(1, *(f"{i}: {task.tool.name}, which {task.tool.description} ({task.prob:.0%})"
                       for i, task in enumerate(tasks)))  # fmt: skip
        results = self.executed(tasks, given, aloud)
        self._did(2, *(f"{i}: {_shown(result)}" for i, result in results.items()))
        reply = self.summed_up(tasks, results, aloud)
        self._did(3, reply.text)
        return reply

    def executed(self, tasks, given, aloud=True):
        """{place of a task: its result}. What a tool cannot do is Refused in a sentence, and what
        depends on it is left out."""
        wanted = {i for i, task in enumerate(tasks) if aloud or task.tool.gives == TEXT}
        for i in reversed(range(len(tasks))):
            wanted |= {tasks[i].source} if i in wanted else set()
        results = {}
        for i, task in enumerate(tasks):
            source = given if task.source == GIVEN else results.get(task.source)
            if i not in wanted or source is None or isinstance(source, Refused):
                continue
            try:
                results[i] = self.run[task.tool.name](source)
            except Exception as fault:  # of whatever model: the others can still do their part
                results[i] = Refused(f"the {task.tool.name} failed: {brief(fault)}")
        return results

    def summed_up(self, tasks, results, aloud=True):
        """The Reply: the last sound, and all words of which no further words were made."""
        used = {task.source for task in tasks if task.tool.gives == TEXT}
        words = [result for i, result in results.items()
                 if isinstance(result, Refused) or isinstance(result, str) and i not in used]
        sounds = [result for result in results.values() if not isinstance(result, str)]
        text = " and ".join(words) or ("here is the recording" if sounds else UNHEARD)
        sound = sounds[-1] if sounds else (SILENCE, SAMPLE_RATE)
        if aloud and not sounds:  # a plan of words alone: they are read aloud all the same
            with suppress(Exception):  # else the words stand alone
                sound = self.spoken(normalise(text))
        return Reply(text, *sound)

    def _did(self, stage, *what):
        self.log.append((STAGES[stage], "; ".join(what)))


def _of(task):
    return "what was given" if task.source == GIVEN else f"the result of {task.source}"


def _shown(result):
    if isinstance(result, str):
        return str(result)
    samples, rate = result
    return f"{len(samples) / rate:.1f} s of sound"
