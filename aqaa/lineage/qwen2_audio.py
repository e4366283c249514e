"""Qwen2-Audio (arXiv 2407.10759): continuous features in, text out; a second model speaks.

The encoder's hidden states are pooled by two and projected into the language model's embedding
space, where they stand in place of the question: nothing is rounded to codes, so what a codebook
has no entry for can still be heard. The answer is text alone; the mini's own voice reads it."""

import torch
from torch import nn

from aqaa.backbone import generation
from aqaa.backbone.layers import PlainStep1
from aqaa.config import AQTA, ASR_MARKER
from aqaa.lineage.features import Projector, pooled, rows
from aqaa.lineage.system import Writer
from aqaa.pipeline import SAMPLING
from aqaa.tokenizers.dialogue import TextOnly

LIMIT = 80  # text ids of an answer
FRESH = 0.1  # deviation of the backbone's own embeddings


class Hearing(nn.Module):
    """A language model whose embeddings of a question are features."""

    def __init__(self, config):
        super().__init__()
        self.place = config.ids.im_patch  # what stands for a picture in Step-1 stands for a sound
        self.backbone = PlainStep1(config.backbone)
        self.projector = Projector(config, FRESH)

    def embeddings(self, ids, features):
        """(…, H) of ids (…); those of its places are the features (P, D) of sounds, in order."""
        x = self.backbone.model.embed_tokens(ids)
        sounds = self.projector(features).to(x.dtype)
        return x.masked_scatter((ids == self.place)[..., None], sounds)


class Qwen2Audio(Writer):
    """Hears features, writes; then the mini reads it aloud."""

    name = "qwen2-audio"

    def __init__(self, model, seed=0, folder=None):
        super().__init__(model, seed, folder)
        self.net = self.part("answers", Hearing(model.config))

    def heard(self, turn, said):
        """(transcript, answer in words) of an earlier turn."""
        return self.told_of(turn, (), ASR_MARKER), self.thought(turn, said)

    def thought(self, turn, said):
        """The answer to a sound (N,), in words."""
        return self.told_of(turn, said, AQTA)

    @torch.inference_mode()
    def told_of(self, turn, said, marker):
        """What the language model writes where a control token asks for it."""
        features = pooled(rows(self.model, turn))
        prompt = self.model.prompt([self.net.place] * len(features), said, marker=marker)
        embeds = self.net.embeddings(torch.tensor([prompt]), features)
        temperature = 0.0 if marker == ASR_MARKER else SAMPLING["temperature"]
        steps = generation.generate(
            self.net.backbone, prompt, self.model.ids, TextOnly(), temperature=temperature,
            top_p=SAMPLING["top_p"], seed=self.seed, max_tokens=LIMIT, prompt_embeds=embeds,
        )  # fmt: skip
        return self.model.text.decode([step.id for step in steps]).strip()
