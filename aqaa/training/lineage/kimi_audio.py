"""How Kimi-Audio learns: both streams of an answer at once, from the shipped backbone.

A batch has two rows, text and audio, which the trunk reads as one, added; the losses of a row come
from its own head. Setting `delay`: of audio behind text, in steps."""

import numpy as np
import torch

from aqaa.backbone.layers import PlainStep1
from aqaa.config import AQTA
from aqaa.lineage.features import beside, packed
from aqaa.lineage.kimi_audio import BLANK, DELAY, Kimi, KimiAudio, streams
from aqaa.tokenizers import dialogue
from aqaa.training.examples import ANSWER_WEIGHT, TEXT_WEIGHT
from aqaa.training.lineage import sounds
from aqaa.training.lineage.sounds import Heard, Sounds
from aqaa.training.objectives import LanguageTask, NextToken
from aqaa.training.stages import Stage

STAGES = (
    Stage("heads", "two heads side by side, of what was heard as codes and as features",
          "aqaa.training.lineage.kimi_audio:HeadsTask", 850, "backbone",
          mixture={"aqtaa": 0.55, "turns": 0.2, "aqta": 0.1, "asr": 0.1, "text": 0.05},
          settings={"delay": DELAY}),
)  # fmt: skip


class Pairs(Heard):
    """Examples of two streams."""

    def __init__(self, sounds, mixture, delay, **options):
        super().__init__(sounds, mixture, **options)
        self.delay = delay

    def noisy(self, rng, index):
        audio = super().noisy(rng, index)
        self.features = beside(self.features, len(audio))
        return audio

    def spoken(self, index):
        return self.book.spoken(index)  # (words, audio ids), for a stream each

    def example(self, marker, question, answer, turns=()):
        """ids (2, N) of text and audio, and the weights (2, N) of each as a target."""
        words, audio = answer if isinstance(answer, tuple) else (answer[:-1], None)
        if audio is None:
            marker = marker or AQTA
        asked = [*turns, ("user", question)]
        prompt = dialogue.prompt(asked, self.book.tokenizer, self.ids, marker=marker)
        ids = np.array(streams(prompt, words, audio, self.delay, self.ids))
        weights = (ids != BLANK) * np.array([[TEXT_WEIGHT], [ANSWER_WEIGHT]], np.float32)
        weights[:, : len(prompt)] = 0
        return ids, weights


class HeadsTask(LanguageTask):
    """Next text and next audio. size: steps of a batch, in one long row."""

    def __init__(self, sounds, mixture, *, delay=DELAY, floor=0.02, size=3072, lr=1e-3):
        NextToken.__init__(self, sounds.book.config, Kimi(sounds.book.config, delay))
        self.examples = Pairs(sounds, mixture, delay)
        self.floor, self.size, self.lr = floor, size, lr

    @classmethod
    def from_run(cls, run, stage):
        task = cls(Sounds(run, codes=True), stage.mixture, floor=stage.floor, **stage.settings)
        backbone = PlainStep1(run.config.backbone)
        if run.start(stage, backbone):
            task.model.begin(backbone)
        return task

    def batch(self, rng):
        """See `NextToken.blank`, with a row of text and one of audio; features (P, D) are those
        of the questions' audio ids, where `heard` (1, N) is true."""
        drawn = self.examples.filled(rng, self.size)
        length = sum(ids.shape[1] - 1 for ids, _, _ in drawn)
        batch, start, features = self.blank(2, length), 0, []
        batch["heard"] = np.zeros((1, length), bool)
        for ids, weights, heard in drawn:
            for row in range(2):
                self.put(batch, row, start, ids[row], weights[row])
            asked = int(weights.any(0).argmax())  # ids of the prompt
            batch["heard"][0, start : start + asked] = ids[1, :asked] != BLANK
            features.append(heard)
            start += ids.shape[1] - 1
        batch = {key: torch.from_numpy(value) for key, value in batch.items()}
        return batch | {"features": torch.cat(features)}

    def scores(self, batch):
        net, (text, audio) = self.model, batch["input_ids"]
        x = net.embeddings(text[None], audio[None], batch["heard"], batch["features"])  # (1, N, H)
        hidden = packed(net, x, batch["segments"][:1])  # (2, N, H)

        def logits(at, rows):  # a kind of target is of one row alone
            row = 0 if at[0].any() else 1
            return (net.text, net.audio)[row].logits(hidden[row], at[row], rows)

        return logits


def compare(run, count=120, delays=(DELAY, 0)):
    """What the delay is good for: see `sounds.compare`."""
    variants = {f"delay {delay}": {"delay": delay} for delay in delays}
    return sounds.compare(run, KimiAudio, STAGES[0], variants, count)
