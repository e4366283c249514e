"""How Qwen2-Audio learns: a new projector and the shipped backbone, on what was heard and written.

First to write down what is said, then also to answer (the paper's pre-training and fine-tuning);
the encoder stays as it is."""

import torch

from aqaa.config import AQTA, ASR_MARKER
from aqaa.lineage.features import packed, pooled
from aqaa.lineage.qwen2_audio import Hearing
from aqaa.training.lineage.sounds import Heard, Sounds
from aqaa.training.lineage.steps import begin
from aqaa.training.objectives import LanguageTask, NextToken
from aqaa.training.stages import Stage

TASK = "aqaa.training.lineage.qwen2_audio:HearingTask"
STAGES = (
    Stage("hears", "features in place of codes: what is said", TASK, 400, "backbone",
          mixture={"asr": 0.7, "aqta": 0.3}, floor=0.3),
    Stage("answers", "spoken questions, written answers", TASK, 750, "backbone", "hears",
          mixture={"aqta": 0.6, "turns": 0.2, "asr": 0.15, "text": 0.05}),
)  # fmt: skip


class Written(Heard):
    """Examples whose question is a row of places for features, and whose answer is text."""

    def noisy(self, rng, index):
        super().noisy(rng, index)
        self.features = pooled(self.features)
        return [self.ids.im_patch] * len(self.features)

    def spoken(self, index):
        return [*self.book.spoken(index)[0], self.ids.eot]  # another one says it

    def example(self, marker, question, answer, turns=()):
        marker = ASR_MARKER if marker == ASR_MARKER else AQTA
        return super().example(marker, question, answer, turns)


class HearingTask(LanguageTask):
    """Next-token prediction of text behind features. size: ids of a batch, in one long row."""

    def __init__(self, sounds, mixture, *, floor=0.02, size=3072, lr=1e-3):
        NextToken.__init__(self, sounds.book.config, Hearing(sounds.book.config))
        self.examples = Written(sounds, mixture)
        self.floor, self.size, self.lr = floor, size, lr

    @classmethod
    def from_run(cls, run, stage):
        task = cls(Sounds(run), stage.mixture, floor=stage.floor, **stage.settings)
        begin(run, stage, task.model if stage.parent else task.model.backbone)
        return task

    def batch(self, rng):
        """See `NextToken.blank`; features (P, D) are those of its places, in their order."""
        drawn = self.examples.filled(rng, self.size)
        batch, start = self.blank(1, sum(len(ids) - 1 for ids, _, _ in drawn)), 0
        for ids, weights, _ in drawn:
            self.put(batch, 0, start, ids, weights)
            start += len(ids) - 1
        batch = {key: torch.from_numpy(value) for key, value in batch.items()}
        return batch | {"features": torch.cat([features for _, _, features in drawn])}

    def scores(self, batch):
        net = self.model
        x = net.embeddings(batch["input_ids"], batch["features"])  # (1, N, H)
        hidden = packed(net.backbone.model, x, batch["segments"])
        return lambda at, rows: net.backbone.logits(hidden, at, rows)
