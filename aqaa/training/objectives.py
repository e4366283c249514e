"""Training of the backbone: pre-training on text, recognition, synthesis and continuation, then question -> answer.

Stages follow the paper (3.1 and 3.2) at mini size. Every example is one sequence of the one vocabulary; an answer's
text begins with its manner, "(slow) …", unless that is the normal one, and its sound follows:
  text   written question -> written answer           asr   speech -> its words
  tts    words (and a manner) -> answer voice          next  speech, continued (audio continuation)
  tqaa   written question -> spoken answer             aqta  spoken question -> written answer (SFT-1)
  aqtaa  spoken question -> written and spoken answer, in blocks of the layout (SFT-1)
Several examples are packed in a row; attention stays inside an example.
"""

import numpy as np
import torch
import torch.nn.functional as F

from aqaa.backbone import step1
from aqaa.config import AQTA, TQAA, TTS
from aqaa.config import ASR_MARKER as ASR
from aqaa.corpus.curriculum import VOICE
from aqaa.tokenizers import dialogue
from aqaa.tokenizers.text import tagged

MIXTURES = {  # share of the examples drawn
    "pretrain": {"text": 0.20, "asr": 0.45, "tts": 0.15, "next": 0.05, "tqaa": 0.15},
    "sft1": {"aqtaa": 0.50, "aqta": 0.28, "asr": 0.06, "text": 0.03, "tqaa": 0.07, "tts": 0.06},
}
TEXT, LINGUISTIC, SEMANTIC = 0, 1, 2  # which rows of the head compete at a position
TEXT_WEIGHT, ANSWER_WEIGHT, HEARD_WEIGHT = 4.0, 1.0, 0.1


class LanguageTask:
    """Next-token prediction on packed rows. The softmax runs over the rows that the layout machine would allow."""

    warmup = 0.02

    def __init__(self, book, stage, rows=12, length=512, lr=2e-3, noise=0.05, layout=None):
        config = book.config
        self.floor = 0.3 if stage == "pretrain" else 0.02  # pre-training hands over a rate that is still high
        self.book, self.stage, self.rows, self.length, self.lr, self.noise = book, stage, rows, length, lr, noise
        self.ids = config.ids
        self.markers = sorted((config.ids.eot, config.ids.text_start, config.ids.audio_end))
        self.layout = layout or dialogue.layout()
        self.model = step1.build(config.backbone)
        self.mixture = MIXTURES[stage]
        encode = book.encode
        self.human, self.assistant = encode("human\n"), encode("assistant\n")
        self.chances = self._balance()
        askable = [book.items[i].category != VOICE for i in book.questions]  # in writing no voice is heard
        written = self.chances * askable if any(askable) else self.chances  # a book may hold nothing else
        self.written = written / written.sum()

    def modules(self):
        return {"model": self.model}

    @torch.no_grad()
    def hear_alike(self, linguistic, semantic, seed=0):
        """Start the audio embeddings from the codebooks (K, D): codes that sound alike begin with like vectors."""
        table, generator = self.model.model.embed_tokens.weight, torch.Generator().manual_seed(seed)
        first = self.ids.n_text
        for codes in (linguistic, semantic):
            codes = (codes - codes.mean(0)) / codes.std()
            mix = torch.randn(codes.shape[1], table.shape[1], generator=generator) / codes.shape[1] ** 0.5
            table[first:first + len(codes)] = codes @ mix * table[:first].std()
            first += len(codes)

    def _balance(self):
        """Chance of each spoken question: equal shares for intents, softened so that large ones still lead."""
        intents = [self.book.items[i].intent for i in self.book.questions]
        counts = {name: intents.count(name) for name in set(intents)}
        chance = np.array([counts[name] ** -0.4 for name in intents])
        return chance / chance.sum()

    def batch(self, rng):
        shape = (self.rows, self.length)
        out = {key: np.zeros(shape, dtype=np.int64) for key in ("input_ids", "segments", "targets")}
        out["kinds"] = np.full(shape, -1)
        out["weights"] = np.zeros(shape, dtype=np.float32)
        fill, count = np.zeros(self.rows, dtype=int), np.zeros(self.rows, dtype=int)
        misses = 0
        while misses < 4:
            ids, weights = self.example(rng)
            size = len(ids) - 1
            room = np.flatnonzero(fill + size <= self.length)
            if not len(room):
                misses += 1
                continue
            row = room[0]
            count[row] += 1
            here = slice(fill[row], fill[row] + size)
            out["input_ids"][row, here], out["targets"][row, here] = ids[:-1], ids[1:]
            out["kinds"][row, here] = self.kinds(ids)
            out["weights"][row, here] = weights[1:]
            out["segments"][row, here] = count[row]
            fill[row] += size
        return {key: torch.from_numpy(value) for key, value in out.items()}

    def kinds(self, ids):
        """Kind of each target: a marker that ends audio competes with linguistic tokens, any other with text."""
        target, before = ids[1:], ids[:-1]
        kinds = np.where(target >= self.ids.n_text, LINGUISTIC, TEXT)
        kinds = np.where(target >= self.ids.semantic_start, SEMANTIC, kinds)
        ends_audio = np.isin(target, self.markers) & (before >= self.ids.n_text)
        return np.where(ends_audio, LINGUISTIC, kinds)

    def example(self, rng):
        """One sequence: ids (N,) and the weight of each as a target (N,)."""
        kind = rng.choice(list(self.mixture), p=np.array(list(self.mixture.values())))
        return getattr(self, f"_{kind}")(rng)

    def _text(self, rng):
        line = self.book.lines[rng.integers(len(self.book.lines))]
        question = self.book.encode(line["question"])
        answer = self.book.encode(tagged(line["answer"], line["manner"]))
        return self._turns(None, question, answer_text=answer)

    def _asr(self, rng):
        index = int(rng.integers(len(self.book.items)))
        item = self.book.items[index]
        return self._turns(ASR, self._heard(rng, index), answer_text=self.book.encode(item.text))

    def _tts(self, rng):
        index = self.book.voiced[rng.integers(len(self.book.voiced))]
        item = self.book.items[index]
        words = self.book.encode(tagged(item.text, item.manner))
        return self._turns(TTS, words, answer_audio=self.book.audio[index])

    def _next(self, rng):
        index = int(rng.integers(len(self.book.items)))
        audio = self.book.audio[index]
        ids = np.concatenate([[self.ids.bos], audio])
        return ids, np.concatenate([[0], np.full(len(audio), ANSWER_WEIGHT)])

    def _tqaa(self, rng):
        item, answer = self._pair(rng, self.written)
        return self._turns(TQAA, self.book.encode(item.text), *self._spoken(answer))

    def _aqta(self, rng):
        item, _ = self._pair(rng)
        text = tagged(item.answer, item.manner)
        return self._turns(AQTA, self._heard(rng, self._last), answer_text=self.book.encode(text))

    def _aqtaa(self, rng):
        _, answer = self._pair(rng)
        return self._turns(None, self._heard(rng, self._last), *self._spoken(answer))

    def _pair(self, rng, chances=None):
        chances = self.chances if chances is None else chances
        self._last = self.book.questions[rng.choice(len(chances), p=chances)]
        item = self.book.items[self._last]
        return item, self.book.answers[item.answer_id]

    def _spoken(self, index):
        item = self.book.items[index]
        return self.book.encode(tagged(item.text, item.manner)), self.book.audio[index]

    def _heard(self, rng, index):
        """Audio ids of an utterance, some of them replaced by others of their kind."""
        audio = self.book.audio[index].copy()
        swap = rng.random(len(audio)) < self.noise
        semantic = audio >= self.ids.semantic_start
        random = np.where(
            semantic,
            rng.integers(self.ids.semantic_start, self.ids.end, len(audio)),
            rng.integers(self.ids.n_text, self.ids.semantic_start, len(audio)),
        )
        return np.where(swap, random, audio)

    def _turns(self, marker, question, answer_text=None, answer_audio=None):
        """The chat template around a question and an answer of text, of audio, or of both in the layout's blocks."""
        ids = self.ids
        head = [ids.bos] + ([marker] if marker else []) + [ids.bot, *self.human]
        tail = [ids.eot, ids.bot, *self.assistant]
        if answer_text is not None and answer_audio is not None:
            answer = self.layout.arrange(answer_text, answer_audio, ids)
        else:
            answer = [*(answer_text if answer_text is not None else answer_audio), ids.eot]
        sequence = np.array([*head, *question, *tail, *answer], dtype=np.int64)
        weights = np.zeros(len(sequence), dtype=np.float32)
        heard = slice(len(head) + 1, len(head) + len(question))
        weights[heard] = HEARD_WEIGHT
        written = sequence[-len(answer):] < ids.n_text
        weights[-len(answer):] = np.where(written, TEXT_WEIGHT, ANSWER_WEIGHT)
        return sequence, weights

    def loss(self, batch, step):
        hidden = self.model.model(input_ids=batch["input_ids"], segment_ids=batch["segments"]).last_hidden_state
        logs, total = {}, 0.0
        all_weights = batch["weights"].sum()
        for kind, rows in self.head_rows().items():
            at = (batch["kinds"] == kind) & (batch["weights"] > 0)
            if not at.any():
                continue
            logits = self.model.logits(hidden, at, rows.to(hidden.device)).float()
            column = self.columns(batch["targets"][at], kind)
            losses = F.cross_entropy(logits, column, reduction="none")
            weights = batch["weights"][at]
            total = total + (losses * weights).sum() / all_weights
            heavy = weights >= ANSWER_WEIGHT
            name = ("text", "linguistic", "semantic")[kind]
            if heavy.any():
                logs[name] = losses[heavy].detach().mean()
        return total, logs

    def head_rows(self):
        """Rows of lm_head that compete for each kind of target."""
        ids = self.ids
        return {
            TEXT: torch.arange(ids.n_text),
            LINGUISTIC: torch.cat([torch.arange(ids.n_text, ids.semantic_start), torch.tensor(self.markers)]),
            SEMANTIC: torch.arange(ids.semantic_start, ids.end),
        }

    def columns(self, targets, kind):
        """Position of each target among its head rows."""
        if kind == TEXT:
            return targets
        if kind == SEMANTIC:
            return targets - self.ids.semantic_start
        place = torch.searchsorted(torch.tensor(self.markers, device=targets.device), targets)
        return torch.where(targets < self.ids.n_text, self.ids.n_linguistic + place, targets - self.ids.n_text)
