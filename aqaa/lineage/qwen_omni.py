"""Qwen2.5-Omni (arXiv 2503.20215): a Thinker writes, and a Talker speaks while it goes on.

The Thinker is the language model: it hears the question and writes. The Talker is a second, smaller
transformer of the same layers. For each id of the text it reads the Thinker's hidden state, from
which the id was drawn, and the id itself: the state knows what is meant, also of words that are
still to come, the id says which of the likely words was taken. Text and audio take turns in the
Talker's sequence as in the mini's, 10 ids to 15, so it begins before the Thinker ends."""

from dataclasses import replace

import torch
from torch import nn

from aqaa.backbone import generation
from aqaa.backbone.layers import PlainStep1
from aqaa.config import AQTA, SAMPLE_RATE
from aqaa.lineage.features import Streaming
from aqaa.pipeline import MAX_ANSWER, MIN_AUDIO, SAMPLING
from aqaa.tokenizers import dialogue

FEEDS = {"both": (1.0, 1.0), "hidden": (1.0, 0.0), "text": (0.0, 1.0)}  # states, ids of the text
TALKER = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
          "num_attention_heads": 6}  # fmt: skip
LAYOUT = "ratio_10_15"
LIKE = 0.1  # deviation of embeddings: what is read of the states begins as large
MOST_WORDS = 80  # text ids of an answer


class Omni(nn.Module):
    """A Thinker of the backbone's size, a Talker, and what the Talker reads: one of FEEDS.

    Raises ValueError for another feed."""

    def __init__(self, config, feed="both"):
        super().__init__()
        if feed not in FEEDS:
            raise ValueError(f"unknown feed {feed!r}: choose one of {', '.join(FEEDS)}.")
        talks = replace(config.backbone, **TALKER)
        self.thinker, self.talker = PlainStep1(config.backbone), PlainStep1(talks)
        self.read = nn.Linear(config.backbone.hidden_size, talks.hidden_size, bias=False)
        self.register_buffer("feed", torch.tensor(FEEDS[feed]))  # known to whoever loads it

    @torch.no_grad()
    def begin(self, seed=0):
        """Start the Talker's tables from the Thinker's, through a random projection that keeps
        distances: like ids stay alike."""
        generator = torch.Generator().manual_seed(seed)
        there, here = self.read.in_features, self.read.out_features
        mix = torch.randn(there, here, generator=generator) / here**0.5
        self.talker.model.embed_tokens.weight.copy_(self.thinker.model.embed_tokens.weight @ mix)
        self.talker.lm_head.weight.copy_(self.thinker.lm_head.weight @ mix)
        nn.init.normal_(self.read.weight, std=LIKE / there**0.5, generator=generator)

    def fed(self, hidden, text):
        """(…, H') of the Thinker's states (…, H) and of the text ids (…) drawn from them."""
        states, words = self.feed.tolist()
        return states * self.read(hidden) + words * self.talker.model.embed_tokens(text)


class QwenOmni(Streaming):
    """Thinks in words and talks along with them."""

    name = "qwen-omni"

    def __init__(self, model, seed=0, folder=None):
        super().__init__(model, seed, folder)
        self.net = self.part("talker", Omni(model.config))

    def heard(self, turn, said):
        """(transcript, answer in words) of an earlier turn: the Talker stays silent."""
        thought = self.model.text.decode([token for token, _ in self.thoughts(turn, said)])
        return self.model.transcribe((turn, SAMPLE_RATE)), thought.strip()

    @torch.inference_mode()
    def thoughts(self, turn, said):
        """(id of the text, the state (1, H) from which it was drawn), one by one, eot included."""
        thinker, ids = self.net.thinker, self.model.ids
        prompt = self.model.prompt(self.model.listen((turn, SAMPLE_RATE)), said, marker=AQTA)
        machine, vocabulary = dialogue.TextOnly(ids), generation.Vocabulary(thinker)
        row = self.row(prompt, machine, MOST_WORDS)
        decoder = generation.Decoder(thinker, 1, len(prompt) + MOST_WORDS)
        new = prompt
        while not row.finished:
            hidden = decoder.feed(generation.embed(thinker, [new]))
            generation.draw([row], hidden, vocabulary)
            new = row.history[-1:]
            yield new[0], hidden

    def row(self, prompt, machine, most):
        """A generation.Row of this system's sampling and seed."""
        generator = torch.Generator().manual_seed(self.seed)
        sampling = SAMPLING["temperature"], SAMPLING["top_p"]
        return generation.Row(prompt, machine, most, *sampling, None, generator)

    @torch.inference_mode()
    def drawn(self, turn, said):
        ids, net, thoughts = self.model.ids, self.net, self.thoughts(turn, said)
        machine = dialogue.layout(LAYOUT).machine(ids, MIN_AUDIO)
        row, vocabulary = self.row([], machine, MAX_ANSWER), generation.Vocabulary(net.talker)
        decoder, hidden, state = generation.Decoder(net.talker, 1, MAX_ANSWER), None, None
        while not row.finished:
            may = machine.allowed()
            if may.kind == "text":  # the Thinker's turn; what it ends with ends the text
                token, state = next(thoughts, (ids.eot, state))
                token = ids.text_end if token == ids.eot else token
                row.take(token, may, 0.0)
                x = net.fed(state, torch.tensor([[token]]))
            else:
                generation.draw([row], hidden, vocabulary)
                token = row.history[-1]
                x = generation.embed(net.talker, [[token]])
            if token != ids.eot:
                hidden = decoder.feed(x)
            if token >= ids.first_text:
                yield ("audio" if token >= ids.n_text else "text"), token
