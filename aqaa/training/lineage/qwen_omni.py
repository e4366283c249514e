"""How Qwen-Omni learns: the Talker, from the states of the Thinker and the text that it wrote.

No sound is needed, the shipped codes have it all. Settings: feed, what the Talker reads (one of
lineage.qwen_omni.FEEDS); detach, whether its loss stops before the Thinker, which then stays what
was shipped; without it the Thinker goes on learning to write as well."""

from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F

from aqaa.config import AQTA
from aqaa.lineage.features import packed
from aqaa.lineage.qwen_omni import FEEDS, LAYOUT, Omni, QwenOmni
from aqaa.tokenizers import dialogue
from aqaa.training.examples import ANSWER_WEIGHT, Examples
from aqaa.training.lineage import sounds
from aqaa.training.objectives import LanguageTask, NextToken
from aqaa.training.stages import Stage

STAGES = (
    Stage("talker", "a second transformer speaks what the first one writes",
          "aqaa.training.lineage.qwen_omni:TalkerTask", 1200, "backbone",
          mixture={"aqtaa": 0.8, "turns": 0.2}, settings={"feed": "both", "detach": True}),
)  # fmt: skip


class Thoughts(Examples):
    """Examples as (ids that the Thinker reads and writes, how many of them are the prompt, ids of
    text and audio in the Talker's blocks)."""

    def spoken(self, index):
        return self.book.spoken(index)  # (words, audio ids), each for one of the two

    def example(self, marker, question, answer, turns=()):
        words, audio = answer
        asked = [*turns, ("user", question)]
        prompt = dialogue.prompt(asked, self.book.tokenizer, self.ids, marker=AQTA)
        answer = self.layout.arrange(words, audio, self.ids)
        if self.ids.text_start in answer:  # what is written after the last sound, nobody speaks
            answer = [*answer[: answer.index(self.ids.text_start)], self.ids.eot]
        return np.array([*prompt, *words, self.ids.eot]), len(prompt), np.array(answer)


class TalkerTask(LanguageTask):
    """Next audio id of the Talker. size: of its ids in a batch, in one long row."""

    def __init__(self, book, mixture, *, feed="both", detach=True, floor=0.02, size=3072, lr=2e-3):
        NextToken.__init__(self, book.config, Omni(book.config, feed))
        self.examples = Thoughts(book, mixture, layout=LAYOUT)
        self.detach, self.floor, self.size, self.lr = detach, floor, size, lr

    @classmethod
    def from_run(cls, run, stage):
        task = cls(run.book(), stage.mixture, floor=stage.floor, **stage.settings)
        run.start(stage, task.model.thinker)
        task.model.begin()
        return task

    def batch(self, rng):
        """See `NextToken.blank`, of the Talker. asked, asked_segments (1, M): what the Thinker
        reads; reads (R,): places there from which the texts' ids are drawn, targets (R,): these."""
        drawn = []
        while sum(len(answer) - 1 for _, _, answer in drawn) < self.size:
            drawn.append(self.examples.draw(rng))
        batch, start = self.blank(1, sum(len(answer) - 1 for _, _, answer in drawn)), 0
        asked, segments, reads, written, known = [], [], [], [], 0
        for number, (ids, prompt, answer) in enumerate(drawn, 1):
            weights = (answer >= self.ids.n_text) | (answer == self.ids.eot)
            self.put(batch, 0, start, answer, weights * np.float32(ANSWER_WEIGHT))
            asked.append(ids[:-1])
            segments.append([number] * (len(ids) - 1))
            count = int((answer[:-1] < self.ids.n_text).sum())  # words, and text_end for eot
            reads.append(known + prompt - 1 + np.arange(count))
            written.append(ids[prompt : prompt + count])
            start, known = start + len(answer) - 1, known + len(ids) - 1
        batch |= {"asked": np.hstack(asked)[None], "asked_segments": np.hstack(segments)[None],
                  "reads": np.hstack(reads), "written": np.hstack(written)}  # fmt: skip
        return {key: torch.from_numpy(value) for key, value in batch.items()}

    def thoughts(self, batch):
        """(R, H): the Thinker's states from which the ids of its texts are drawn."""
        trunk = self.model.thinker.model
        with torch.no_grad() if self.detach else nullcontext():
            x = trunk.embed_tokens(batch["asked"])
            return packed(trunk, x, batch["asked_segments"])[0, batch["reads"]]

    def scores(self, batch):
        """See `NextToken.scores`: of the Talker, fed by the `states` (R, H) of `thoughts`."""
        talker, ids = self.model.talker, batch["input_ids"]
        in_text = ids < self.ids.n_text  # (1, N): words and text_end
        x = talker.model.embed_tokens(ids)
        fed = self.model.fed(batch["states"], ids[in_text]).to(x.dtype)
        x = x.masked_scatter(in_text[..., None], fed)
        hidden = packed(talker.model, x, batch["segments"])
        return lambda at, rows: talker.logits(hidden, at, rows)

    def loss(self, batch, step):
        """That of the Talker; and of the Thinker's text, where the Thinker learns."""
        states = self.thoughts(batch)
        loss, logs = super().loss({**batch, "states": states}, step)
        if not self.detach:
            logits = self.model.thinker.logits(states, rows=slice(0, self.ids.n_text)).float()
            logs["written"] = F.cross_entropy(logits, batch["written"])
            loss = loss + logs["written"]
        return loss, logs


def compare(run, count=120, feeds=tuple(FEEDS)):
    """What the Talker needs to read: see `sounds.compare`."""
    variants = {feed: {"feed": feed} for feed in feeds}
    return sounds.compare(run, QwenOmni, STAGES[0], variants, count)
