"""Training of VALL-E (2301.02111): its codec and HiFT (codec.py), then AR and NAR.

Two utterances of one voice and nearly one pitch, a prompt and what is said behind it, are AR's
pairs; NAR is shown one end of an utterance, or another one like it, and completes the other."""

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from aqaa import audio
from aqaa.lineage.codec import RATE
from aqaa.lineage.valle import AR, NAR, PROMPT_SECONDS, SAID, prefix, rate_of
from aqaa.tokenizers.text import TextTokenizer, normalise
from aqaa.training.lineage.codec import speech
from aqaa.training.stages import Stage
from aqaa.weights import model_folder

CODEC, HERE = "aqaa.training.lineage.codec", "aqaa.training.lineage.valle"
STAGES = (
    Stage("codec", "residual k-means of mel frames", f"{CODEC}:CodecTask", 120),
    Stage("voices", "HiFT speaks the codec's mels in all voices", f"{CODEC}:VoicesTask", 500,
          "hift", settings={"adversarial_from": 2.0}),  # never: adversaries would need hours
    Stage("ar", "text to the first codebook", f"{HERE}:ARTask", 300, "backbone"),
    Stage("nar", "the other codebooks", f"{HERE}:NARTask", 500),
)  # fmt: skip
LONGEST = int(PROMPT_SECONDS * RATE)  # vectors of a prompt
PAIRS, UNTOLD = 0.5, 0.2  # shares of AR's examples behind a prompt; of prompts without transcript
ROWS = 12  # examples of AR that are filled up to one length
JITTER = 0.1  # of the logarithm of the rate that AR is told: a prompt's is not quite that


class ARTask:
    """Cross-entropy of the next code of the first level, or the end. Half of the examples stand
    behind a prompt; a batch has about `size` ids."""

    lr, warmup = 1e-3, 0.02

    def __init__(self, config, speech, tokenizer, *, size=3500):
        self.speech, self.tokenizer, self.size = speech, tokenizer, size
        self.model = AR(config, speech.codec.size)
        self.ids = self.model.ids
        self.modules = {"model": self.model}
        self.rows = torch.tensor([*range(self.ids.n_text, self.ids.end), self.ids.eot])

    @classmethod
    def from_run(cls, run, stage):
        tokenizer = TextTokenizer.from_file(run.tokenizer_file())
        task = cls(run.config, speech(run, "codec"), tokenizer, **stage.settings)
        shipped = model_folder.build("backbone", run.config)
        run.start(stage, shipped)
        task.begin(shipped, run.part("semantic"), run.config.ids.semantic_start)
        return task

    @torch.no_grad()
    def begin(self, backbone, semantic, start):
        """Take the layers and text ids of a backbone that can read aloud: it knows how sound
        follows a text, if in other codes. Ours begin as means of the semantic ids, from `start` on,
        that its tokenizer hears in the same 40 ms."""
        own, n_text = self.model, self.ids.n_text
        own.model.layers.load_state_dict(backbone.model.layers.state_dict())
        own.model.norm.load_state_dict(backbone.model.norm.state_dict())
        shares = heard_as(self.speech, semantic)  # (K, n_semantic)
        for one, other in ((own.model.embed_tokens, backbone.model.embed_tokens),
                           (own.lm_head, backbone.lm_head)):  # fmt: skip
            one.weight[:n_text] = other.weight[:n_text]
            one.weight[n_text:] = shares @ other.weight[start : start + shares.shape[1]]

    def batch(self, rng):
        """`groups` of examples of like length: what `draw` gives, each (B, T), filled up by 0."""
        drawn, count = [], 0
        while count < self.size:
            drawn.append([torch.from_numpy(part) for part in self.draw(rng)])
            count += len(drawn[-1][0]) - 1
        drawn.sort(key=lambda example: len(example[0]))
        groups = (zip(*drawn[i : i + ROWS]) for i in range(0, len(drawn), ROWS))
        return {"groups": [[pad_sequence(part, True) for part in group] for group in groups]}

    def loss(self, batch, step):
        losses, right, device = [], [], self.model.lm_head.weight.device
        for group in batch["groups"]:
            ids, places, weights = (part.to(device) for part in group)
            known, targets = weights[:, 1:] > 0, ids[:, 1:]
            targets = targets.where(targets != self.ids.eot, self.ids.end) - self.ids.n_text
            hidden, targets = self.model(ids[:, :-1], places[:, :-1])[known], targets[known]
            logits = self.model.logits(hidden, rows=self.rows.to(device)).float()  # (M, K + 1)
            losses.append(F.cross_entropy(logits, targets, reduction="none"))
            right.append(logits.argmax(-1) == targets)
        return torch.cat(losses).mean(), {"right": torch.cat(right).float().mean()}

    def draw(self, rng):
        """One example: ids (N,), their places (N,) and the weight of each as a target (N,)."""
        index, codes = self.speech.draw(rng)
        first, text, heard, shown = codes[:, 0], self.words(index), [], []
        told = False
        if rng.random() < PAIRS and (other := self.speech.alike(index, rng)) is not None:
            whole, words = self.speech.codes(other)[:, 0], self.words(other)
            shown = whole[-LONGEST:]
            if told := rng.random() > UNTOLD:  # its share of the words, as if evenly said
                heard = words[len(words) * (len(whole) - len(shown)) // len(whole) :]
            else:  # a piece of any length, whose words nobody wrote down
                shown = shown[-int(rng.integers(10, len(shown) + 10)) :]
        rate = rate_of(len(first), len(text)) * np.exp(rng.normal(0, JITTER))
        before, places = prefix(text, heard, shown, rate, self.tokenizer, self.ids)
        ids = np.array([*before, *(first + self.ids.n_text).tolist(), self.ids.eot])
        places = np.array([*places, *(SAID + np.arange(len(first) + 1))], np.float32)
        weights = np.zeros(len(ids), np.float32)
        weights[len(before) :] = 1.0
        weights[len(before) - 1 - len(shown) : len(before) - 1] = told  # it says its transcript too
        return ids, places, weights

    def words(self, index):
        return self.tokenizer.encode(normalise(self.speech.items[index].text))


class NARTask:
    """Cross-entropy of all codes of one level, drawn anew each step; rows are packed."""

    lr, warmup = 2e-3, 0.02

    def __init__(self, config, speech, tokenizer, *, size=2500):
        self.speech, self.tokenizer, self.size = speech, tokenizer, size
        levels, codes, _ = speech.codec.centroids.shape
        self.model = NAR(config, levels, codes)
        self.modules = {"model": self.model}
        table = self.model.trunk.embed_tokens.weight
        for level, centroids in enumerate(speech.codec.centroids):
            first = self.model.n_text + level * codes
            like(table[first : first + codes], centroids, table.detach().std())

    @classmethod
    def from_run(cls, run, stage):
        tokenizer = TextTokenizer.from_file(run.tokenizer_file())
        return cls(run.config, speech(run, "codec"), tokenizer, **stage.settings)

    def batch(self, rng):
        """`ids` (N, L) and `stages` (N,) of `NAR.positions`, `sizes` of the examples, `targets`
        (M,) of the positions with a stage, and their level."""
        level = int(rng.integers(1, self.model.levels))
        ids, stages, targets, sizes = [], [], [], []
        while sum(sizes) < self.size:
            text, prompt, codes = self.example(rng)
            one, stage = self.model.positions(text, prompt, codes, level)
            ids, stages = [*ids, one], [*stages, stage]
            targets, sizes = [*targets, codes[:, level].astype(np.int64)], [*sizes, len(one)]
        targets = torch.from_numpy(np.concatenate(targets))
        return {"ids": torch.cat(ids), "stages": torch.cat(stages), "sizes": sizes,
                "targets": targets, "level": level}  # fmt: skip

    def example(self, rng):
        """(text ids, codes of the prompt (P, L), codes (T, L)) of an utterance, one end of which is
        the prompt, or another like it, or nothing."""
        index, codes = self.speech.draw(rng)
        text = self.tokenizer.encode(normalise(self.speech.items[index].text))
        how = rng.random()
        if how < 0.15:
            return text, codes[:0], codes
        if how < 0.4 and (other := self.speech.alike(index, rng)) is not None:
            return text, self.speech.codes(other)[-LONGEST:], codes
        cut = int(min(LONGEST, rng.uniform(0.1, 0.7) * len(codes)))
        if rng.random() < 0.5:
            return text, codes[:cut], codes[cut:]
        return text, codes[len(codes) - cut :], codes[: len(codes) - cut]

    def loss(self, batch, step):
        hidden = self.model(batch["ids"], batch["stages"], batch["sizes"])
        logits = self.model.logits(hidden[batch["stages"] > 0], batch["level"]).float()
        right = (logits.argmax(-1) == batch["targets"]).float().mean()
        return F.cross_entropy(logits, batch["targets"]), {"right": right}


@torch.no_grad()
def heard_as(speech, semantic, count=300):
    """(K, n_semantic): the share of each semantic code in what has a code of the first level, over
    some utterances; both tokenizers have 25 codes a second."""
    codec, rng = speech.codec, np.random.default_rng(0)
    counts = torch.zeros(codec.size, semantic.config.n_codebook_size)
    for index in rng.permutation(len(speech.items))[:count]:
        wav = codec.clip(speech.wave(index))
        ours = codec.encode(codec.stacked(audio.mel(wav, codec.config)))[:, 0]
        theirs = semantic.encode(wav, energy_norm=False)
        both = min(len(ours), len(theirs))
        counts.index_put_((ours[:both], theirs[:both]), torch.ones(both), accumulate=True)
    counts += 0.02 * counts.mean(0)  # a code that was not heard begins as the mean of all
    return counts / counts.sum(1, keepdim=True)


@torch.no_grad()
def like(table, centroids, scale, seed=0):
    """Fill a table (K, width) so that like centroids (K, D) have like vectors: a random projection
    keeps their distances. scale: the standard deviation of its values."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(centroids.shape[1], table.shape[1], generator=generator)
    vectors = (centroids - centroids.mean(0)) @ mix
    table.copy_(vectors / vectors.std().clamp(min=1e-6) * scale)
