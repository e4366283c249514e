"""Sound as continuous features, and sound that comes while an answer is still being drawn.

What the later systems of the lineage share. A tokenizer rounds what its encoder hears to the next
of some hundred codes; these systems read the encoder's hidden states themselves. Shapes: N samples
at 16 kHz, T rows at 25 Hz, D of the encoder, H of the language model."""

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from aqaa import audio
from aqaa.backbone import attention
from aqaa.config import GROUP_SIZE, SAMPLE_RATE, SEMANTIC_PER_GROUP
from aqaa.lineage.system import SILENCE, Aqaa, Reply

# Rows of the three in 120 ms that lie where the ids of a group do, two of 60 ms and three of 40.
BESIDE = (0, 2, 0, 1, 2)


@torch.inference_mode()
def rows(model, turn):
    """(T, D) of a sound (N,): the semantic encoder's hidden states, which `listen` would round.
    Raises AudioError as `listen` does."""
    wav = audio.load_question((turn, SAMPLE_RATE))
    start, end = audio.endpoints(wav)
    log_mel = model.semantic.features(audio.energy_norm(wav[start:end]))
    return model.semantic.hidden(log_mel[None])[0][0]


def pooled(features):
    """(T, D) → (⌈T / 2⌉, D): the mean of two rows; a last one that is left stays as it is."""
    return F.avg_pool1d(features.T[None], 2, ceil_mode=True)[0].T


def beside(features, count):
    """(count, D): for each of so many audio ids the row (T, D) at its time."""
    place = torch.arange(count)
    row = place // GROUP_SIZE * SEMANTIC_PER_GROUP + torch.tensor(BESIDE)[place % GROUP_SIZE]
    return features[row]


class Projector(nn.Module):
    """Features as embeddings: rows of one length, then one linear layer. No value is rounded.

    scale: deviation of what a fresh one gives; 0 adds nothing at first."""

    def __init__(self, config, scale):
        super().__init__()
        width = config.semantic.n_audio_state
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.linear = nn.Linear(width, config.backbone.hidden_size, bias=False)
        nn.init.normal_(self.linear.weight, std=scale / width**0.5)

    def forward(self, features):
        """(…, D) → (…, H)."""
        return self.linear(self.norm(features))


def packed(trunk, x, segments):
    """Hidden states (B, N, H) of packed rows of embeddings: attention stays within an example.
    segments (B, N) number the examples of a row, see `training.objectives.NextToken.blank`."""
    sizes = attention.segment_sizes(segments)
    longest = max(max(sizes), 1)
    return trunk.run(x, trunk.bias(longest, longest), sizes=sizes)


class Streaming(Aqaa):
    """A system that speaks while it writes."""

    def drawn(self, turn, said):
        """(kind, id) of an answer to a sound (N,), one after the other, as they are drawn: kind
        "text" or "audio"; audio ids come in whole groups, and markers not at all."""
        raise NotImplementedError

    def answer(self, turns):
        """Reply to the last of the `turns`: the vocoder gets each group as soon as it is whole."""
        said, began, first = self.before(turns[:-1]), time.monotonic(), None
        text, waiting, waves = [], [], [SILENCE]
        stream = self.model.vocoder.stream(self.seed)
        for kind, token in self.drawn(turns[-1], said):
            (text if kind == "text" else waiting).append(token)
            if len(waiting) == GROUP_SIZE:
                waves.append(stream.push(self.model.codes(waiting)).float().cpu().numpy())
                waiting = []
                if first is None and len(waves[-1]):
                    first = time.monotonic() - began
        waves.append(stream.finish().float().cpu().numpy())
        took, rate = time.monotonic() - began, self.model.vocoder.sample_rate
        words = self.model.text.decode(text).strip()
        return Reply(words, np.concatenate(waves), rate, first or took, took)
