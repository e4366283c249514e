"""VALL-E: speech as language, in whatever voice it is shown (Wang et al. 2023, arXiv 2301.02111).

A text and the codes of three seconds of somebody's speech go in, codes of the text in that voice
come out (codec.py), from two transformers of the mini's decoder layers:
  AR    the first codebook, code by code, behind the text and the prompt (section 4.2.1)
  NAR   every further level at once, from the text, all levels of the prompt and the levels before
        it; a stage embedding says which level is wanted (section 4.2.2)
As in the paper the prompt is a prefix of what AR says, and its transcript one of the text; here
text_end ends the transcript and audio_start the prompt. Text and codes have positions of their own
in the paper; Step-1 knows distances alone. A code and an id of the text are as far apart as in time
if the text were said evenly (as in Deep Voice 3, 1710.07654): minutes of training find no other
alignment. Rate and voice are the prompt's, the asker's own; the mini hears and writes."""

from dataclasses import replace
from functools import cached_property

import torch
from torch import nn

from aqaa import audio
from aqaa.backbone import attention
from aqaa.backbone.generation import Decoder, Prefill, generate
from aqaa.backbone.layers import PlainStep1, PlainTrunk
from aqaa.config import SAMPLE_RATE, TTS
from aqaa.fast import prepare
from aqaa.lineage.codec import LEVELS, RATE, SIZE, ResidualCodec, nearest
from aqaa.lineage.system import SILENCE, Writer
from aqaa.lineage.units import Steps
from aqaa.tokenizers import dialogue
from aqaa.tokenizers.text import normalise
from aqaa.vocoder.hift import HiFT
from aqaa.vocoder.streaming import WaveStream

PROMPT_SECONDS = 3.0
NAR_LAYERS = 4
SILENT = 7  # codes of an utterance that are silence, at its ends
SLOW, USUAL, FAST = 6.6, 4.2, 2.6  # codes of one level for an id of the text
SAID = 400  # place of the first code that is said; those of a prompt begin at 0
SAMPLING = {"temperature": 0.7, "top_p": 0.9}


def rate_of(codes, text):
    """Codes for each id of a text, of an utterance of so many codes and ids."""
    return min(SLOW, max(FAST, (codes - SILENT) / max(text, 1)))


def evenly(count, rate, first=0):
    """Places of `count` ids of a text that is said evenly from place `first` on."""
    return [first + 1 + rate * (i + 0.5) for i in range(count)]


def prefix(text, heard, shown, rate, tokenizer, ids):
    """What AR goes on behind: (ids, their places in time, -1 for what has none), two lists.

    text: ids; heard: those of the prompt's transcript, perhaps none; shown: the prompt's codes (n,)
    of the first level; rate: codes for each id of the text."""
    asked = [("user", [*heard, ids.text_end, *text])]
    said = dialogue.prompt(asked, tokenizer, ids, marker=TTS)
    places, end = [-1.0] * len(said), said.index(ids.text_end)
    places[end - len(heard) : end] = evenly(len(heard), rate_of(len(shown), len(heard)))
    places[end + 1 : end + 1 + len(text)] = evenly(len(text), rate, SAID)
    said += [int(code) + ids.n_text for code in shown] + [ids.audio_start]
    return said, [*places, *map(float, range(len(shown))), SAID - 1.0]


class AR(PlainStep1):
    """The backbone's layers, with distances in time between text and codes.

    Its `ids` are those of the text, then the `size` codes of the first level."""

    def __init__(self, config, size=SIZE):
        ids = replace(config.ids, n_linguistic=size, n_semantic=0)
        super().__init__(replace(config.backbone, vocab_size=ids.end))
        self.ids = ids

    def bias(self, ids, places):
        """The distance bias (B, H, T, T) of sequences (B, T) and their places (B, T)."""
        index, timed = torch.arange(ids.shape[1], device=ids.device), places >= 0
        steps = index[:, None] - index  # (T, T)
        text = timed & (ids >= self.ids.first_text) & (ids < self.ids.n_text)
        across = (timed & ~text)[:, :, None] & text[:, None]  # from codes, or audio_start, to text
        apart = (places[:, :, None] + 1 - places[:, None]).abs()  # from what comes next
        root = torch.where(across, apart, steps.clamp(min=0)).sqrt()  # (B, T, T)
        slope = attention.slopes(self.config.num_attention_heads).to(root)
        return (-slope[:, None, None] * root[:, None]).masked_fill(steps < 0, -torch.inf)

    def forward(self, ids, places):
        """Hidden states (B, T, D) of sequences (B, T), filled up at the right."""
        return self.model.run(self.model.embed_tokens(ids), self.bias(ids, places))

    def continued(self, before, places, least, most, seed=0):
        """The codes (T,), from `least` to `most`, that follow a `prefix`."""
        prefill = Prefill(self, 0, Timed(self, before, places, most))
        steps = generate(self, before, self.ids, Steps(0, "L"), seed=seed, max_tokens=most,
                         min_audio=least, prefill=prefill, **SAMPLING)  # fmt: skip
        return [step.id - self.ids.n_text for step in steps if step.kind != "marker"]


class Timed(Decoder):
    """A Decoder whose bias is AR's, of a `prefix` and of as many codes as may follow."""

    def __init__(self, ar, before, places, most):
        super().__init__(ar, 1, min(len(before) + most, ar.config.max_seq_len))
        ids = torch.tensor([[*before, *[ar.ids.n_text] * most]])  # whichever code it will be
        places = torch.tensor([[*places, *range(SAID, SAID + most)]])
        self.bias = ar.bias(ids[:, : self.size], places[:, : self.size])

    def feed(self, embeddings):
        start, end = self.cache.length, self.cache.length + embeddings.shape[1]
        hidden = self.model.model.run(embeddings, self.bias[:, :, start:end, :end], self.cache)
        self.cache.length = end
        return hidden[:, -1]


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
        self.trunk.embed_tokens.weight.data[0] = 0

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
        back = self.trunk.bias(max(sizes), max(sizes))  # (1, H, n, n)
        even = torch.arange(back.shape[1], device=back.device)[:, None, None] % 2 == 0
        bias = torch.where(even, back, back.mT).to(hidden)
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


class VALLE(Writer):
    """The mini hears and writes, VALL-E says it with the asker's own voice."""

    name = "vall-e"

    @cached_property
    def codec(self):
        return self.part("codec", ResidualCodec(self.model.config.mel))

    @cached_property
    def ar(self):
        return prepare(self.part("ar", AR(self.model.config)))

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
        said = audio.trim_silence(audio.load_question((prompt, SAMPLE_RATE)))
        wav = said[-int(seconds * SAMPLE_RATE) :]
        heard = self.model.text.encode(normalise(self.model.transcribe((wav, SAMPLE_RATE))))
        return heard, self.codec.encode(self.codec.read(wav))

    def codes(self, text, heard, shown):
        """Codes (T, L) of text ids: AR makes the first level, NAR all the others."""
        rate = rate_of(len(shown), len(heard)) if heard else USUAL
        before = prefix(text, heard, shown[:, 0], rate, self.model.text, self.ar.ids)
        least, most = int(0.6 * rate * len(text)), int(1.5 * rate * len(text)) + RATE
        first = self.ar.continued(*before, least, most, self.seed)
        return self.nar.complete(text, shown, first, self.codec.centroids)
