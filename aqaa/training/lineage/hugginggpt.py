"""Training of HuggingGPT's planner, on requests that are composed of the phrases of requests.toml.

A request names one to three tasks, in wordings of which some are kept for the test; a task works on
what is given, on the last result, or on the given sound again. Tools with made-up names teach that
a description alone must do; spoken questions of the curriculum, what to do when none is named."""

import tomllib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from aqaa.corpus.curriculum import VOICE
from aqaa.corpus.wider import words_of
from aqaa.lineage.hugginggpt import ALOUD, GIVEN, Planner
from aqaa.lineage.tools import SOUND, TEXT, TOOLS, Tool
from aqaa.training.lineage import audiogpt
from aqaa.training.lineage.audiogpt import MISHEARD, asked, balanced
from aqaa.training.stages import Stage

STAGES = (
    Stage("planner", "which tasks a request asks for", f"{__name__}:PlannerTask", 1000),
    audiogpt.DESCRIBER,
)
REQUESTS = tomllib.loads(Path(__file__).with_name("requests.toml").read_text(encoding="utf-8"))
KINDS = {tool.name: (tool.takes, tool.gives) for tool in TOOLS}
CHANGES = SOUND, SOUND  # what a tool of a made-up name takes and gives
SPOKEN = 0.25  # share of spoken questions, whose plans no word tells
COUNTS = (0.25, 0.35, 0.4)  # shares of one, two and three tasks among the others
INVENTED, UNKNOWN = 4, 0.12  # tools of made-up names in a batch; chance of a task to be of these
OTHER, BACK, REVERSED = 0.2, 0.25, 0.2  # chances: a text is given; the given sound is meant once
# more; the last task is named first
ANY = 0.2  # chance that just any words stand between two tasks


class Composer:
    """Draws requests. test: every task in a wording that is kept for it, and so is some of what
    stands between. pool: words of which any may stand there as well."""

    def __init__(self, rng, test=False, pool=()):
        self.rng, self.pool = rng, pool
        self.phrases = {name: words_of(text)[test] for name, text in REQUESTS["phrases"].items()}
        self.descriptions = {name: words_of(text)[0] for name, text
                             in REQUESTS["descriptions"].items()}  # fmt: skip
        self.made_up = {name: words_of(text)[0] for name, text in REQUESTS["made_up"].items()}
        self.things = {name: words_of(text)[0] for name, text in REQUESTS["things"].items()}
        self.words = {name: sum(words_of(text)[: 1 + test], [])
                      for name, text in REQUESTS["between"].items()}  # fmt: skip

    def pick(self, pool):
        return pool[self.rng.integers(len(pool))]

    def request(self, count, invented=()):
        """(words, names of tools, sources) of a request for `count` tasks. invented: made-up names
        of tools that change sound."""
        while True:  # until each task has a tool that fits
            kinds = [TEXT if self.rng.random() < OTHER else SOUND]
            names, sources, said = [], [], []
            while len(names) < count and (task := self._task(kinds, names, invented)):
                name, source, phrase = task
                names.append(name)
                sources.append(source)
                said.append(phrase)
                kinds.append(KINDS.get(name, CHANGES)[1])
            if len(names) == count:
                return self.joined(said).split(), names, sources

    def _task(self, kinds, names, invented):
        """(name, source, phrase) of one more task, behind those of `names`, or None where no tool
        fits. kinds: of what was given, then of their results."""
        again = bool(names) and kinds[0] == SOUND and self.rng.random() < BACK
        source = GIVEN if again else len(names) - 1
        kind, thing = kinds[source + 1], "again" if again else "result" if names else kinds[0]
        able = [name for name, (takes, _) in KINDS.items() if takes == kind and name not in names]
        if names and names[-1] != "recogniser":  # only questions are answered, no remarks on voices
            able = [name for name in able if name != "answerer"]
        if not able:
            return None
        if kind == SOUND and invented and self.rng.random() < UNKNOWN:
            name, phrase = self.pick(invented), self.pick(self.made_up["phrases"])
        else:
            name = self.pick(able)
            phrase = self.pick(self.phrases[name])
        return name, source, phrase.format(x=self.pick(self.things[thing]), v=name)

    def joined(self, said):
        """One request of the phrases of its tasks."""
        backward = len(said) > 1 and self.rng.random() < REVERSED
        text, *others = said[:-1] if backward else said
        for place, phrase in enumerate(others, 2):
            final = place == len(said) > 2 and self.rng.random() < 0.4
            text = f"{text} {self.between('last' if final else 'joint')} {phrase}"
        if backward:
            text = self.pick(self.words["back"]).format(a=text, b=said[-1])
        first = len(said) > 1 and not backward and self.rng.random() < 0.3
        return f"{self.between('first' if first else 'open')} {text} {self.between('close')}"

    def between(self, kind):
        """What stands before, between or behind tasks: of its kind, or any words at all."""
        if not len(self.pool) or self.rng.random() > ANY:
            return self.pick(self.words[kind])
        return " ".join(self.rng.choice(self.pool, self.rng.integers(1, 5)))

    def described(self, tool):
        """A Tool's own description, another one, or what it does in the words of a request."""
        thing = "a recording" if tool.takes == SOUND else "a text"
        done = self.pick(self.phrases[tool.name]).format(x=thing)
        return self.pick((tool.description, self.pick(self.descriptions[tool.name]), done))

    def invent(self, count):
        """{made-up name: a description}."""
        pairs = self.rng.choice(self.made_up["syllables"], (count, 2))
        names = {"".join(pair) for pair in pairs.tolist()}
        return {name: self.pick(self.made_up["descriptions"]).format(v=name)
                for name in sorted(names)}  # fmt: skip


def spoken(item):
    """(words, names of tools, sources) of a spoken question, an Item."""
    words = f"{ALOUD} {item.text}".split()
    if item.category == VOICE:
        return words, [item.intent, "synthesizer"], [GIVEN, 0]
    return words, ["recogniser", "answerer", "synthesizer"], [GIVEN, 0, 1]


class PlannerTask:
    """Tools, sources and ends of plans, of ever other requests and with tools in ever other
    descriptions. items: questions of the training split; dev: others, to measure with."""

    lr, rows = 1.5e-2, 64
    measured = 200  # requests of each length

    def __init__(self, items, dev=()):
        self.items, self.dev = items, dev
        self.probs = balanced([item.intent for item in items])
        self.pool = np.array(sorted({word for item in items for word in item.text.split()}))
        self.model = Planner()
        self.modules = {"model": self.model}

    @classmethod
    def from_run(cls, run, stage):
        return cls(*asked(run))

    def batch(self, rng):
        composer = Composer(rng, pool=self.pool)
        invented = composer.invent(INVENTED)
        described = {tool.name: composer.described(tool) for tool in TOOLS} | invented
        names, requests, tools, sources = list(described), [], [], []
        for _ in range(self.rows):
            if rng.random() < SPOKEN:
                words, plan, of = spoken(self.items[rng.choice(len(self.items), p=self.probs)])
            else:
                count = 1 + int(rng.choice(len(COUNTS), p=COUNTS))
                words, plan, of = composer.request(count, list(invented))
            requests.append(self.misheard(words, rng))
            missing = [-1] * (len(COUNTS) + 1 - len(plan))  # the step behind the last one as well
            tools.append([names.index(name) for name in plan] + missing)
            sources.append([one + 1 for one in of] + missing)
        return {"requests": requests, "descriptions": list(described.values()),
                "tools": torch.tensor(tools), "sources": torch.tensor(sources)}  # fmt: skip

    def misheard(self, words, rng):
        """Half of all requests as they are, of the others some words wrong, and some too many."""
        if rng.random() < 0.5:
            return words
        wrong, more = rng.random((2, len(words))) < MISHEARD
        other = rng.choice(self.pool, (len(words), 2)).tolist()
        return [one for word, w, m, (o, e) in zip(words, wrong, more, other)
                for one in ([e] * int(m) + [o if w else word])]  # fmt: skip

    @torch.autocast("cpu", enabled=False)
    def loss(self, batch, step):
        tasks, stops, sources, _ = self.model(batch["requests"], batch["tools"].shape[1])
        logits = self.model.choose(tasks, self.model.keys(batch["descriptions"]))
        ended = batch["tools"] < 0  # (B, S)
        # Only the first step behind the last task is one at which the planner has to stop.
        counted = torch.cat([torch.ones_like(ended[:, :1]), ~ended[:, :-1]], 1)
        losses = {
            "tool": F.cross_entropy(logits.transpose(1, 2), batch["tools"], ignore_index=-1),
            "source": F.cross_entropy(sources.transpose(1, 2), batch["sources"], ignore_index=-1),
            "stop": F.binary_cross_entropy_with_logits(stops[counted], ended[counted].float()),
        }
        return sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}

    def finish(self, seed):
        """Shares of plans that are right in all their tools and sources, in percent: of requests in
        kept wordings for one, two and three tasks, of the same with tools in kept descriptions, and
        of spoken questions of the development split."""
        self.model.eval()
        found = {"n": self.measured, "n_spoken": len(self.dev)}
        for title, tools in (("plans", TOOLS), ("other_descriptions", reworded())):
            for number, name in enumerate(("one", "two", "three"), 1):
                composer = Composer(np.random.default_rng((seed, number)), test=True)
                drawn = [composer.request(number) for _ in range(self.measured)]
                found[f"{title}_{name}"] = self.share(tools, drawn)
        if self.dev:
            found["spoken"] = self.share(TOOLS, list(map(spoken, self.dev)))
        return found

    def share(self, tools, drawn):
        """Percent of requests, (words, names, sources) each, of which the plan is right."""
        return round(100 * sum(planned(self.model, tools, *one) for one in drawn) / len(drawn), 1)


def reworded():
    """The tools in the descriptions that are kept for the test."""
    kept = {name: words_of(text)[1][0] for name, text in REQUESTS["descriptions"].items()}
    return [Tool(tool.name, kept[tool.name], tool.takes, tool.gives) for tool in TOOLS]


def planned(model, tools, words, names, sources):
    """Whether a planner makes this plan of a request."""
    plan = model.plan(words, tools, KINDS[names[0]][0])
    return [task.tool.name for task in plan] == names and [task.source for task in plan] == sources
