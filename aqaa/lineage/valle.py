"""VALL-E: speech as language, in whatever voice it is shown (Wang et al. 2023, arXiv 2301.02111).

A text and the codes of three seconds of somebody's speech go in, codes of the text in that voice
come out (codec.py), from two transformers of the mini's decoder layers:
  AR    the first codebook, code by code, behind the text and the prompt (section 4.2.1)
  NAR   every further level at once, from the text, all levels of the prompt and the levels before
        it; a stage embedding says which level is wanted (section 4.2.2)
As in the paper the prompt is a prefix of what AR says, and its transcript one of the text; here
text_end ends the transcript and audio_start the prompt. As it only speaks, the mini hears and
writes for it; the asker's own voice is the prompt."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from aqaa import audio
from aqaa.backbone import attention
from aqaa.backbone.generation import generate
from aqaa.backbone.layers import PlainStep1, PlainTrunk
from aqaa.config import SAMPLE_RATE, TTS
from aqaa.fast import prepare
from aqaa.lineage.codec import LEVELS, RATE, SIZE, ResidualCodec, nearest
from aqaa.lineage.system import SILENCE, Writer
from aqaa.tokenizers import dialogue
from aqaa.tokenizers.dialogue import Allowed
from aqaa.tokenizers.text import normalise
from aqaa.vocoder.hift import HiFT
from aqaa.vocoder.streaming import WaveStream

PROMPT_SECONDS = 3.0
NAR_LAYERS = 4
LONGEST, SHORTEST = 9, 2  # codes of one level for an id of the text; 98 in 100 lie between
SAMPLING = {"temperature": 0.7, "top_p": 0.9}


def first_codes(config, size=SIZE):
    """The AQAAConfig of AR: its ids are those of the text, then the codes of the first level."""
    ids = replace(config.ids, n_linguistic=size, n_semantic=0)
    return replace(config, ids=ids, backbone=replace(config.backbone, vocab_size=ids.end))


def prefix(text, heard, shown, tokenizer, ids):
    """Ids behind which AR goes on: text ids, those of the prompt's transcript `heard` (perhaps
    none), and the prompt's codes `shown` (n,) of the first level."""
    asked = [*heard, ids.text_end, *text]
    said = dialogue.prompt([("user", asked)], tokenizer, ids, marker=TTS)
    return [*said, *(int(code) + ids.n_text for code in shown), ids.audio_start]


@dataclass
class FirstCodes:
    """A Layout, and its own Machine: codes of the first level, then eot, not before `fewest`."""

    fewest: int = 1
    ids: object = None
    finished: bool = False

    def machine(self, ids, min_audio=0):
        return FirstCodes(self.fewest, ids)

    def allowed(self):
        markers = () if self.fewest > 0 else (self.ids.eot,)
        return Allowed("linguistic", self.ids.n_text, self.ids.end, markers)

    def advance(self, token):
        self.finished, self.fewest = token == self.ids.eot, self.fewest - 1


class NAR(nn.Module):
    """Levels 1 … L-1 of the codes (level 0 is AR's), one level a pass, all frames at once.

    A position is the sum of up to L embeddings of one table: a text id, or the codes of a frame at
    all levels (prompt) or at those before the wanted one; id 0, which no text has, fills up. The
    logits of a level are products with its own rows of the table, as in the paper."""

    def __init__(self, config, levels=LEVELS, size=SIZE, layers=NAR_LAYERS):
        super().__init__()
        self.levels, self.size, self.n_text = levels, size, config.ids.n_text
        sizes = {"vocab_size": self.n_text + levels * size, "num_hidden_layers": layers}
        self.trunk = PlainTrunk(replace(config.backbone, pad_token_id=0, **sizes))
        self.embed_stage = nn.Embedding(levels, config.backbone.hidden_size)
        nn.init.normal_(self.trunk.embed_tokens.weight, std=0.05)
        nn.init.normal_(self.embed_stage.weight, std=0.05)
        with torch.no_grad():
            self.trunk.embed_tokens.weight[0] = 0

    def positions(self, text, prompt, codes, level):
        """text (n,), prompt (P, L), codes (T, level or more) -> ids (n + P + T, L) and stages of
        the positions, `level` for the frames to predict, 0 for all that is known."""
        known = len(text) + len(prompt)
        ids = torch.zeros(known + len(codes), self.levels, dtype=torch.long)
        rows = self.n_text + self.size * torch.arange(self.levels)  # where each level begins
        ids[: len(text), 0] = torch.as_tensor(text)
        ids[len(text) : known] = torch.as_tensor(prompt).long() + rows
        ids[known:, :level] = torch.as_tensor(codes).long()[:, :level] + rows[:level]
        stages = torch.zeros(len(ids), dtype=torch.long)
        stages[known:] = level
        return ids, stages

    def forward(self, ids, stages, sizes):
        """Positions of one or more examples, one behind the other -> hidden states (N, D).

        sizes: the numbers of their positions. Attention stays within an example; half of its heads
        look back, half ahead, and so they tell the past from what comes."""
        hidden = self.trunk.embed_tokens(ids).sum(1) + self.embed_stage(stages)  # (N, D)
        bias = both_ways(self.trunk.bias(1, 1).shape[1], max(sizes)).to(hidden)
        return self.trunk.run(hidden[None], bias, sizes=sizes)[0]

    def logits(self, hidden, level):
        """Hidden states (…, D) of frames -> logits (…, K) of their codes at a level."""
        first = self.n_text + level * self.size
        return hidden @ self.trunk.embed_tokens.weight[first : first + self.size].T

    @torch.inference_mode()
    def complete(self, text, prompt, first, centroids):
        """Codes (T, L) of a text whose first level (T,) is known, in the voice of the prompt.

        The paper takes the likeliest code. A small network is seldom sure, and the likeliest of
        many may be far from all others: here it is the code nearest to the mean that is expected,
        by the `centroids` (L, K, D) of the codec."""
        codes = torch.as_tensor(first)[:, None]
        for level in range(1, self.levels):
            ids, stages = self.positions(text, prompt, codes, level)
            hidden = self(ids, stages, [len(ids)])[-len(codes) :]
            expected = self.logits(hidden, level).softmax(-1) @ centroids[level]  # (T, D)
            codes = torch.cat([codes, nearest(expected, centroids[level])[:, None]], 1)
        return codes


def both_ways(heads, size):
    """An additive mask (1, H, N, N) of distances: even heads look back, odd ones ahead."""
    back = attention.sqrt_bias(attention.slopes(heads), size, size)
    return torch.where((torch.arange(heads) % 2 == 0)[:, None, None], back, back.mT)


class VALLE(Writer):
    """The mini hears and writes, VALL-E says it with the asker's own voice."""

    name = "vall-e"

    @cached_property
    def codec(self):
        return self.part("codec", ResidualCodec(self.model.config.mel))

    @cached_property
    def ar(self):
        return prepare(self.part("ar", PlainStep1(first_codes(self.model.config).backbone)))

    @cached_property
    def nar(self):
        return self.part("nar", NAR(self.model.config))

    @cached_property
    def hift(self):
        """The mini's vocoder, which has learnt to speak in all voices."""
        return prepare(self.part("voices", HiFT(self.model.config.hift)))

    def answer(self, turns):
        self.asker = turns[-1]
        return super().answer(turns)

    def spoken(self, text):
        return self.say(text, self.asker)

    def say(self, text, prompt=None, seconds=PROMPT_SECONDS):
        """A text in the voice of `prompt`, (n,) at 16 kHz, whose last `seconds` are heard; without
        a prompt in any voice. Returns ((N,) samples, their rate). Raises AudioError for a prompt
        that is silent or too short, ModelError before the training."""
        rate, text = self.hift.config.sampling_rate, self.model.text.encode(normalise(text))
        if not text:
            return SILENCE, rate
        codes = self.codes(text, *self.enrolled(prompt, seconds))
        with torch.inference_mode():
            mel = self.codec.mel(self.codec.decode(codes))[None]
            wave = WaveStream(self.hift, seed=self.seed).push(mel, final=True)
        return wave.numpy(), rate

    def enrolled(self, prompt, seconds=PROMPT_SECONDS):
        """(ids of its words, codes (P, L)) of what the voice is copied from."""
        if prompt is None or not seconds:
            return [], torch.zeros(0, self.codec.levels, dtype=torch.long)
        wav = audio.trim_silence(audio.load_question((prompt, SAMPLE_RATE)))
        wav = wav[-int(seconds * SAMPLE_RATE) :]
        heard = self.model.text.encode(normalise(self.model.transcribe((wav, SAMPLE_RATE))))
        return heard, self.codec.encode(self.codec.read(wav))

    def codes(self, text, heard, shown):
        """Codes (T, L) of text ids: AR makes the first level, NAR all the others."""
        ids = first_codes(self.model.config, self.codec.size).ids
        before = prefix(text, heard, shown[:, 0], self.model.text, ids)
        steps = generate(self.ar, before, ids, FirstCodes(SHORTEST * len(text)), seed=self.seed,
                         max_tokens=LONGEST * len(text) + RATE, **SAMPLING)  # fmt: skip
        first = [step.id - ids.n_text for step in steps if step.kind != "marker"]
        return self.nar.complete(text, shown, first, self.codec.centroids)
