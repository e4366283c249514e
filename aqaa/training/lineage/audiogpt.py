"""Training of AudioGPT's parts, each by itself: recogniser, language model, describer of voices,
and who reads off a question's words what they ask for. Only the describer needs sound, the
recogniser codes, the others nothing but words."""

from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from aqaa.corpus import play, speak
from aqaa.corpus.curriculum import VOICE
from aqaa.corpus.plan import plan, spread
from aqaa.corpus.wider import turns_before
from aqaa.lineage.audiogpt import HOW, NAMES, Analyst
from aqaa.lineage.system import Writer
from aqaa.lineage.tools import ASPECTS, MEASURES, WANTS, Describer, measures, replied
from aqaa.pipeline import AQAA
from aqaa.tokenizers import dialogue
from aqaa.tokenizers.text import MANNERS, TextTokenizer, normalise, tagged
from aqaa.training.examples import UNHEARD
from aqaa.training.objectives import LanguageTask, NextToken
from aqaa.training.stages import LANGUAGE, Stage

MISHEARD = 0.06  # share of a question's words, or ids, that a recogniser gets wrong
SOUNDS, WRITTEN = 1200, 300  # from which the describer learns; answers that are judged
HERE = __name__
DESCRIBER = Stage("describer", "what a voice is like, in words", f"{HERE}:DescriberTask", 1000)
STAGES = (
    Stage("analyst", "which tool a question's words ask for", f"{HERE}:AnalystTask", 1000),
    DESCRIBER,
    Stage("recogniser", "speech to its words, nothing else", LANGUAGE, 500, "backbone",
          mixture={"asr": 1.0}, settings={"rows": 6, "heard": 0.0}),
    Stage("language", "written answers to written questions", f"{HERE}:WritingTask", 200,
          "backbone"),
)  # fmt: skip


def asked(run):
    """Questions, second ones too, of the training and of the development split, as they are
    planned: only words are needed."""
    items = plan(run.scale, run.seed) + play.joined(run.scale, run.seed)
    items = [item for item in items
             if item.role in ("question", "follow") and item.intent != UNHEARD]  # fmt: skip
    return tuple([item for item in items if item.split == split] for split in ("train", "dev"))


def balanced(names):
    """Probability of each of some names (N,): rare ones are drawn more often than there are."""
    counts = Counter(names)
    weights = np.array([counts[name] ** -0.5 for name in names])
    return weights / weights.sum()


def labels(item):
    """(tool, manner, argument as a slice of the question's words) of an Item: of a sentence that is
    to be said, the place where it stands in the question; role and adverb are its manner."""
    words, answer, nothing = item.text.split(), item.answer.split(), slice(0, 0)
    if item.category == VOICE:
        return item.intent, "normal", nothing
    if item.category == "Sing":
        return "sing", "normal", nothing
    if item.intent in ("follow_again", "follow_manner"):
        return "again", item.manner if item.intent == "follow_manner" else "normal", nothing
    for start in range(len(words) - len(answer) + 1):
        if words[start : start + len(answer)] == answer:
            styled = item.manner in MANNERS
            place = slice(start, start + len(answer))
            return "read" if styled else "repeat", item.manner if styled else "normal", place
    return "answer", "normal", nothing


class AnalystTask:
    """Tools, manners and arguments of questions, some of whose words were misheard."""

    lr, rows = 1e-2, 64

    def __init__(self, items, dev=()):
        self.dev, self.lines = dev, [item.text.split() for item in items]
        self.labels = [labels(item) for item in items]
        self.probs = balanced([tool + how for tool, how, _ in self.labels])
        self.pool = np.array(sorted({word for line in self.lines for word in line}))
        self.model = Analyst()
        self.modules = {"model": self.model}

    @classmethod
    def from_run(cls, run, stage):
        return cls(*asked(run))

    def batch(self, rng):
        lines, tools, manners, insides = [], [], [], []
        for row in rng.choice(len(self.lines), self.rows, p=self.probs):
            words, (tool, how, place) = self.lines[row], self.labels[row]
            wrong = rng.random(len(words)) < MISHEARD * rng.integers(3)
            other = rng.choice(self.pool, len(words))
            lines.append([str(o) if w else word for word, o, w in zip(words, other, wrong)])
            tools.append(NAMES.index(tool))
            manners.append(HOW.index(how))
            insides.append([place.start <= i < place.stop for i in range(len(words))])
        longest = max(map(len, lines))
        inside = torch.tensor([row + [False] * (longest - len(row)) for row in insides])
        return {"lines": lines, "tools": torch.tensor(tools), "manners": torch.tensor(manners),
                "inside": inside.float()}  # fmt: skip

    @torch.autocast("cpu", enabled=False)
    def loss(self, batch, step):
        tools, manners, inside, there = self.model(batch["lines"])
        losses = {
            "tool": F.cross_entropy(tools, batch["tools"]),
            "manner": F.cross_entropy(manners, batch["manners"]),
            "argument": F.binary_cross_entropy_with_logits(inside[there], batch["inside"][there]),
        }
        return sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}

    def finish(self, seed):
        """Shares of the development questions, in percent, of which all three are right."""
        right = Counter()
        self.model.eval()
        for item in self.dev:
            found, (tool, how, place) = self.model.analyse(item.text.split()), labels(item)
            same = found.tool == tool
            if tool in ("repeat", "read", "again"):
                said = " ".join(item.text.split()[place])
                same = same and found.manner == how and (tool == "again" or found.argument == said)
            right += Counter(all=same, **{tool: same})
        counts = Counter(["all"] * len(self.dev) + [labels(item)[0] for item in self.dev])
        return {"dev": {name: round(100 * right[name] / n, 1) for name, n in counts.items()},
                "n": len(self.dev)}  # fmt: skip


class DescriberTask:
    """The two voices of each aspect are told apart by what is measured of them."""

    lr, rows = 3e-3, 64

    def __init__(self, measured, wants, dev=((), ())):
        """measured: arrays (MEASURES,), each of a sound whose want is known; dev: others."""
        self.measured = torch.from_numpy(np.stack(measured))
        self.wants, self.dev = torch.tensor([WANTS.index(want) for want in wants]), dev
        self.model = Describer()
        self.model.mean.copy_(self.measured.mean(0))
        self.model.scale.copy_(self.measured.std(0) + 1e-3)
        self.modules = {"model": self.model}
        groups = [[WANTS.index(want) for want in said] for said in ASPECTS.values()]
        self.rivals = torch.zeros(len(WANTS), len(WANTS), dtype=torch.bool)
        for group in groups:
            self.rivals[np.ix_(group, group)] = True

    @classmethod
    def from_run(cls, run, stage):
        corpus, pairs = speak.Corpus(run.corpus_folder), []
        for split in ("train", "dev"):
            items = spread([item for item in corpus.items(split=split) if item.want], SOUNDS)
            wavs = (corpus.wav(item) / np.float32(32768) for item in items)
            pairs.append((list(map(measures, wavs)), [item.want for item in items]))
        return cls(*pairs[0], pairs[1])

    def batch(self, rng):
        rows = torch.from_numpy(rng.integers(len(self.wants), size=self.rows))
        # A little off everywhere, most of all in level: who asks stands nearer or farther.
        noise = torch.from_numpy(rng.normal(size=(self.rows, MEASURES)).astype(np.float32))
        return {"measured": self.measured[rows] + 0.1 * self.model.scale.cpu() * noise,
                "wants": self.wants[rows]}  # fmt: skip

    @torch.autocast("cpu", enabled=False)
    def loss(self, batch, step):
        logits, rivals = self.model(batch["measured"]), self.rivals.to(batch["wants"].device)
        logits = logits.masked_fill(~rivals[batch["wants"]], -1e9)
        return F.cross_entropy(logits, batch["wants"]), {}

    @torch.no_grad()
    def finish(self, seed):
        """Shares of the development questions that are described rightly, in percent."""
        right, counts = Counter(), Counter()
        self.model.eval()
        for measured, want in zip(*self.dev):
            logits = self.model(torch.from_numpy(measured)[None])[0]
            (said,) = [said for said in ASPECTS.values() if want in said]
            best = max(said, key=lambda one: float(logits[WANTS.index(one)]))
            right[want] += best == want
            counts[want] += 1
        return {"dev": {want: round(100 * right[want] / n, 1) for want, n in counts.items()},
                "n": sum(counts.values())}  # fmt: skip


class WritingTask(LanguageTask):
    """The backbone as a language model of text alone: written questions, as a recogniser would have
    them, behind earlier turns where there were any, and their written answers."""

    floor, lr, rows, length = 0.02, 1e-3, 6, 512

    def __init__(self, config, text, items, dev=()):
        NextToken.__init__(self, config)
        self.config, self.text, self.items, self.examples = config, text, items, self
        self.dev, self.probs = spread(dev, WRITTEN), balanced([item.intent for item in items])

    @classmethod
    def from_run(cls, run, stage):
        # No text has the answers of Voice Understanding.
        known = ([item for item in items if item.category != VOICE] for items in asked(run))
        task = cls(run.config, TextTokenizer.from_file(run.tokenizer_file()), *known)
        run.start(stage, task.model)
        return task

    def draw(self, rng):
        """One example: ids (N,) and the weight of each as a target (N,)."""
        item, other = (self.items[i] for i in rng.choice(len(self.items), 2, p=self.probs))
        turns = turns_before(item)
        if not turns and rng.random() < 0.2:  # turns that do not matter
            turns = [("user", other.text), ("assistant", tagged(other.answer, other.manner))]
        asked, ids = np.array(self.text.encode(item.text)), self.ids
        wrong = rng.random(len(asked)) < MISHEARD * rng.integers(3)
        asked = np.where(wrong, rng.integers(ids.first_text, ids.n_text, len(asked)), asked)
        prompt = dialogue.prompt([*turns, ("user", asked.tolist())], self.text, ids)
        answer = [*self.text.encode(tagged(item.answer, item.manner)), ids.eot]
        weights = np.zeros(len(prompt) + len(answer), np.float32)
        weights[len(prompt) :] = 1.0
        return np.array([*prompt, *answer], np.int64), weights

    def finish(self, seed):
        """Share of the development questions, as they are written, whose answer is right."""
        parts = {"text": self.text, "backbone": self.model.eval()}
        writer = Writer(AQAA(self.config, parts.__getitem__), seed)
        right = [normalise(replied(writer, item.text, turns_before(item))) == normalise(item.answer)
                 for item in self.dev]  # fmt: skip
        return {"written": round(100 * sum(right) / max(1, len(right)), 1), "n": len(right)}
