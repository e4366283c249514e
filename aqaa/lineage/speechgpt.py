"""SpeechGPT: units of speech are words of the language model, and it thinks in text before it
speaks (Zhang et al. 2023, arXiv 2305.11000).

Its units come from ONE codebook, here the semantic codes (25 Hz); no linguistic id stands in its
questions or answers. It learns in three stages (`aqaa.training.lineage.speechgpt`): modality
adaptation on units alone, cross-modal instruction tuning between units and words, and the chain of
modality: units of the question -> its transcript -> the answer in words -> units of the answer, in
one sequence, so it speaks last. The task is told in words at the head of the question.

SpeechGPT makes sound of units by a unit HiFi-GAN. The vocoder of the mini wants both codebooks, so
in that place a small `Completer` guesses the linguistic codes of the answer voice from the units,
and flow and HiFT go on from there."""

from functools import cached_property

import torch
from torch import nn

from aqaa.config import LINGUISTIC_PER_GROUP, SEMANTIC_PER_GROUP
from aqaa.lineage.units import UNITS, Stepwise
from aqaa.processor import suited_to

INSTRUCTIONS = {  # several wordings of each task are learnt; the first one is used to ask
    "asr": ("write down the words", "what was said", "put this into words"),
    "tts": ("read this aloud", "say these words", "speak this text"),
    "text": ("answer in words", "write an answer"),
    "answer": ("listen and answer in words", "hear this and write an answer"),
    "direct": ("answer at once in speech", "speak at once"),
    "read": ("answer in speech", "think then speak"),
    "speak": ("listen then write and speak an answer", "write your answer then say it"),
    "chain": ("step by step write the question and the answer then speak",
              "write what you hear then your answer then say it"),
}  # fmt: skip


class SpeechGPT(Stepwise):
    """Hears units, writes question and answer, speaks units."""

    name, stage, words, group = "speechgpt", "chain", INSTRUCTIONS, UNITS

    @cached_property
    def completer(self):
        return self.part("completer", Completer(self.model.ids))

    def merged(self, audio):
        return self.completer.complete(audio)


class Completer(nn.Module):
    """Linguistic codes, 2 a group, of semantic ones, 3 a group, each group from about 1.4 s before
    it to as much behind it. ids: IdsConfig; B rows of G groups."""

    def __init__(self, ids, width=128, depth=3, kernel=9):
        super().__init__()
        self.ids = ids
        self.embed = nn.Embedding(ids.n_semantic, width // 4)
        self.first = nn.Conv1d(SEMANTIC_PER_GROUP * (width // 4), width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width),
                nn.Conv1d(width, 2 * width, 1), nn.GELU(), nn.Dropout(0.1),
                nn.Conv1d(2 * width, width, 1),
            )
            for _ in range(depth)
        )  # fmt: skip
        self.head = nn.Linear(width, LINGUISTIC_PER_GROUP * ids.n_linguistic)

    def forward(self, semantic):
        """Codes (B, G, 3) -> logits (B, G, 2, n_linguistic)."""
        x = self.first(self.embed(semantic).flatten(2).transpose(1, 2))  # (B, width, G)
        for block in self.blocks:
            x = x + block(x)
        logits = self.head(x.transpose(1, 2))
        return logits.unflatten(-1, (LINGUISTIC_PER_GROUP, self.ids.n_linguistic))

    @torch.inference_mode()
    def complete(self, units):
        """Semantic ids of an answer (N,) -> its merged ids, 5 for each whole 3, a list."""
        whole = len(units) // SEMANTIC_PER_GROUP * SEMANTIC_PER_GROUP  # a limit may cut the last
        if not whole:
            return []
        semantic = torch.as_tensor(units[:whole]).view(1, -1, SEMANTIC_PER_GROUP)
        with suited_to(self):
            linguistic = self(semantic - self.ids.semantic_start).argmax(-1) + self.ids.n_text
        return torch.cat([linguistic, semantic], -1).flatten().tolist()
