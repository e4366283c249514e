"""Kimi-Audio (arXiv 2504.18425): two kinds of input, one trunk, two heads that run side by side.

A question is heard as codes and, added to their embeddings, as continuous features of the same
time. Behind a shared trunk stand two stacks of layers of equal make: one foretells text, the other
audio, and each step gives an id of both. Audio lags a few steps behind its words, so that these
are known when it is spoken; the embeddings of both ids, added, are the next input."""

from types import SimpleNamespace

import torch
from torch import nn

from aqaa.backbone import generation
from aqaa.backbone.layers import Head, Step1DecoderLayer, Step1RMSNorm, Trunk
from aqaa.config import AQTA, ASR_MARKER, SAMPLE_RATE
from aqaa.lineage.features import Projector, Streaming, beside, rows
from aqaa.pipeline import MAX_ANSWER, MIN_AUDIO, SAMPLING
from aqaa.tokenizers import dialogue

BLANK = 0  # the padding id: its embedding is zero and stays so, hence it adds nothing
DELAY = 6  # steps that audio lags behind text
OWN = 2  # layers of each head, where there are as many; those before them are shared
MOST_WORDS = 80  # text ids of an answer


def streams(prompt, words, sound, delay, ids):
    """[text (N,), audio (N,)] ids of a prompt and its answer, a pair a step, BLANK where a stream
    has nothing: words, then text_end; audio ids `delay` steps later, then eot (None: no sound)."""
    text = [*words, ids.text_end]
    audio = [] if sound is None else [*[BLANK] * delay, *map(int, sound), ids.eot]
    steps = max(len(text), len(audio))
    answer = [stream + [BLANK] * (steps - len(stream)) for stream in (text, audio)]
    return [asked + said for asked, said in zip(split(prompt, ids), answer, strict=True)]


def split(prompt, ids):
    """[text (N,), audio (N,)] of a prompt (N,), BLANK where an id is of the other kind."""
    text = [token if token < ids.n_text else BLANK for token in prompt]
    return [text, [token if token >= ids.n_text else BLANK for token in prompt]]


class Stack(Trunk, Head, nn.Module):
    """`count` decoder layers, of which the first is number `first` of the cache; with `n_ids` also
    a norm and an output layer."""

    def __init__(self, config, count, first, n_ids=0):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Step1DecoderLayer(config, first + i) for i in range(count))
        self.norm = nn.Identity()
        if n_ids:
            self.norm = Step1RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = nn.Linear(config.hidden_size, n_ids, bias=False)


class Kimi(Trunk, nn.Module):
    """Embeddings, the shared `trunk`, and the stacks `text` and `audio` side by side behind it."""

    def __init__(self, config, delay=DELAY):
        super().__init__()
        self.config = size = config.backbone
        own = min(OWN, size.num_hidden_layers - 1)
        shared = size.num_hidden_layers - own
        self.embed_tokens = nn.Embedding(size.vocab_size, size.hidden_size, BLANK)
        self.trunk = Stack(size, shared, 0)
        self.text = Stack(size, own, shared, config.ids.n_text)
        self.audio = Stack(size, own, shared + own, size.vocab_size)
        self.projector = Projector(config, 0.0)  # at first it hears as the backbone did
        self.register_buffer("delay", torch.tensor(delay))  # known to whoever loads the weights

    @property
    def layers(self):
        """All decoder layers, as a cache counts them."""
        return [*self.trunk.layers, *self.text.layers, *self.audio.layers]

    @torch.no_grad()
    def begin(self, backbone):
        """Take the weights of a PlainStep1, whose last layers serve both heads."""
        layers, shared = backbone.model.layers, len(self.trunk.layers)
        self.embed_tokens.load_state_dict(backbone.model.embed_tokens.state_dict())
        self.trunk.layers.load_state_dict(layers[:shared].state_dict())
        for head in (self.text, self.audio):
            head.layers.load_state_dict(layers[shared:].state_dict())
            head.norm.load_state_dict(backbone.model.norm.state_dict())
            head.lm_head.weight.copy_(backbone.lm_head.weight[: len(head.lm_head.weight)])

    def embeddings(self, text, audio, heard=None, features=None):
        """(…, H) of both streams (…), added; features (P, D) are those of the question's audio
        ids, where `heard` (…) is true."""
        x = self.embed_tokens(text) + self.embed_tokens(audio)
        if heard is None:
            return x
        added = self.projector(features).to(x.dtype)
        return x + torch.zeros_like(x).masked_scatter(heard[..., None], added)

    def run(self, hidden_states, bias, cache=None, sizes=None):
        """Embeddings (1, T, H) → hidden states (2, T, H) of text and of audio."""
        shared = self.trunk.run(hidden_states, bias, cache, sizes)
        return torch.cat([self.text.run(shared, bias, cache, sizes),
                          self.audio.run(shared, bias, cache, sizes)])  # fmt: skip


class KimiAudio(Streaming):
    """Hears codes and features; writes and speaks at once."""

    name = "kimi-audio"

    def __init__(self, model, seed=0, folder=None):
        super().__init__(model, seed, folder)
        self.net = self.part("heads", Kimi(model.config))

    def heard(self, turn, said):
        """(transcript, answer in words) of an earlier turn."""
        return self.words(turn, (), ASR_MARKER), self.words(turn, said, AQTA)

    def words(self, turn, said, marker):
        """What the text head writes while the audio stream stays blank."""
        drawn = self.drawn(turn, said, marker)
        return self.model.text.decode([token for _, token in drawn]).strip()

    def drawn(self, turn, said, marker=None):
        ids = self.model.ids
        for text, audio in self.steps(turn, said, marker):
            if text >= ids.first_text:
                yield "text", text
            if audio >= ids.n_text:
                yield "audio", audio

    @torch.inference_mode()
    def steps(self, turn, said, marker=None):
        """(text id, audio id) of each step of an answer to a sound (N,). marker: a control token
        that asks for words alone."""
        net, ids = self.net, self.model.ids
        prompt = self.model.prompt(self.model.listen((turn, SAMPLE_RATE)), said, marker=marker)
        text, audio = (torch.tensor([stream]) for stream in split(prompt, ids))  # (1, T)
        heard = audio != BLANK
        x = net.embeddings(text, audio, heard, beside(rows(self.model, turn), int(heard.sum())))
        decoder = generation.Decoder(SimpleNamespace(model=net), 1, len(prompt) + MAX_ANSWER)
        sampling = SAMPLING["temperature"], SAMPLING["top_p"], None
        generator = torch.Generator().manual_seed(self.seed)
        speaks = dialogue.layout("audio_only").machine(ids, MIN_AUDIO)
        text = generation.Row([], Words(ids), MOST_WORDS, *sampling, generator)
        audio = generation.Row([], speaks, MAX_ANSWER, *sampling, generator)
        heads = generation.Vocabulary(net.text), generation.Vocabulary(net.audio)
        for step in range(MAX_ANSWER):
            hidden = decoder.feed(x)  # (2, H)
            silent = marker is not None or step < int(net.delay)
            pair = (next_id(text, hidden[:1], heads[0]),
                    BLANK if silent else next_id(audio, hidden[1:], heads[1]))  # fmt: skip
            yield pair
            if text.finished and (marker is not None or audio.finished):
                return
            x = net.embeddings(*(torch.tensor([[token]]) for token in pair))


class Words(dialogue.TextOnly):
    """The machine of the text stream: text ids, then text_end."""

    def allowed(self):
        return super().allowed()._replace(markers=(self.ids.text_end,))

    def advance(self, token):
        self.finished = token == self.ids.text_end


def next_id(row, hidden, vocabulary):
    """The next id of a row from its head's hidden state (1, H); BLANK once it has ended."""
    if row.finished:
        return BLANK
    generation.draw([row], hidden, vocabulary)
    return row.history[-1]
