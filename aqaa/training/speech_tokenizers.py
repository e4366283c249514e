"""Training of the two audio tokenizers, from scratch.

Linguistic (AQAA paper 2.1: a recogniser's encoder, then k-means): the SANM encoder learns to spell
phones with CTC through a head that is thrown away; k-means over its output gives the centroids.
Semantic (CosyVoice 1.0: supervised VQ inside a recogniser): the encoder first learns without a
quantiser, then the codebook starts from k-means of its normalised output and is trained straight
through, while a decoder that is thrown away must read phones, melody (f0) and the mel out of the
codes alone."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from aqaa.tokenizers.linguistic import LinguisticTokenizer
from aqaa.tokenizers.phones import CLASSES, FACTORS, PhoneHead, best_path, error_rate
from aqaa.tokenizers.semantic import SemanticTokenizer
from aqaa.training import features
from aqaa.training.augment import Augment, kaldi_bank, slaney_bank
from aqaa.training.features import LengthBuckets, measure_cmvn


def upsampled_ctc(head, hidden, lengths, targets, target_lengths, factor):
    """CTC with `factor` outputs a row, so that fast speech has more frames than phones.

    head: Linear D -> factor * classes. hidden: (B, T, D). Returns (loss per phone, log-probs
    (B, T * factor, classes))."""
    batch, rows, _ = hidden.shape
    log_probs = head(hidden).float().reshape(batch, rows * factor, -1).log_softmax(-1)
    in_time, lengths = log_probs.transpose(0, 1), lengths * factor
    loss = F.ctc_loss(in_time, targets, lengths, target_lengths, zero_infinity=True)
    return loss, log_probs


def spec_augment(x, rng, bands, n_mels, widest=12, time_widest=6):
    """Mask a band of mels and a stretch of time per utterance (B, T, bands * n_mels), in place."""
    for row in x:
        width = int(rng.integers(0, widest + 1))
        low = int(rng.integers(0, n_mels - width + 1))
        row.view(-1, bands, n_mels)[:, :, low : low + width] = 0
        width = int(rng.integers(0, time_widest + 1))
        if width and len(row) > 3 * width:
            start = int(rng.integers(0, len(row) - width))
            row[start : start + width] = 0
    return x


def phone_error(data, indices, factor, read, size=16):
    """Phone error in percent on some of Utterances, `size` at once. read(x, lengths, part) gives
    the CTC logits, `factor` outputs a row."""
    predicted = []
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        x, lengths = data.gather(part)
        logits = read(x, lengths, part).reshape(len(part), -1, CLASSES)
        predicted += best_path(logits, lengths * factor)
    return error_rate(predicted, [data.phones[i] for i in indices])


@torch.no_grad()
def kmeans(x, count, rounds=25, seed=0):
    """Lloyd's k-means from random rows, empty clusters re-seeded. x (N, D) -> (count, D)."""
    generator = torch.Generator().manual_seed(seed)
    centroids = x[torch.randperm(len(x), generator=generator)[:count]].clone()
    for _ in range(rounds):
        codes, distance = nearest(x, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, codes, x)
        sizes = torch.bincount(codes, minlength=count)
        centroids = sums / sizes.clamp(min=1)[:, None]
        empty = (sizes == 0).nonzero().flatten()
        if len(empty):  # an empty cluster goes where the fit is worst
            centroids[empty] = x[distance.topk(len(empty)).indices]
    return centroids


def nearest(x, centroids, rows=16384):
    """Index of the nearest centroid of each row of x (N, D), and its squared distance, both (N,).
    Computed `rows` rows at a time: the whole table of distances would not fit into memory."""
    square = (centroids**2).sum(1)
    codes, distance = [], []
    for part in x.split(rows):
        score, index = (square - 2 * part @ centroids.T).min(1)
        codes.append(index)
        distance.append(score + (part**2).sum(1))
    return torch.cat(codes), torch.cat(distance)


class PhoneTask:
    """What both tasks share: utterances with phones, drawn in batches of similar length.

    data: Utterances. tests: {name: rows of `data` on which errors are measured}. budget: rows of
    features in a batch. `kind`: of the features. `factor`: CTC outputs a row. `masks`: options of
    spec_augment. `level`: the deviation of a random loudness. `augment`: bends the features.
    `told`: names of what `evaluate` tells of utterances, in its order."""

    lr, told = 2e-3, ("phone_error",)

    def __init__(self, config, data, tests=None, budget=1200):
        self.config, self.data, self.tests = config, data, tests or {}
        self.buckets = LengthBuckets(data.lengths, budget, data.weights)
        self.augment = self.bender(config)

    @classmethod
    def bender(cls, config):
        """The Augment of this tokenizer's features."""
        return Augment(config.n_mels, *cls.bank(config.n_mels), unit=cls.unit)

    @classmethod
    def from_run(cls, run, stage):
        task = cls(getattr(run.config, stage.part), *run.utterances(cls.kind))
        run.start(stage, task.model)
        return task

    def draw(self, rng):
        """(indices of the utterances, tensors); of these `x` (B, T, D) is masked, `clean` not."""
        indices = self.buckets.draw(rng)
        x, lengths = self.data.gather(indices)
        level = rng.normal(0, self.level, (len(indices), 1, 1)).astype(np.float32)
        x, clean, factors = self.augment(x + torch.from_numpy(level), lengths, rng)
        x, clean = self.normalised(x), self.normalised(clean)
        for _ in range(2):  # two bands and two stretches: one is too easily guessed from the rest
            spec_augment(x, rng, n_mels=self.config.n_mels, **self.masks)
        targets, counts = self.data.targets(indices)
        batch = {"x": x, "clean": clean, "lengths": lengths, "targets": targets, "counts": counts,
                 "octaves": factors.log2()}  # fmt: skip
        return indices, batch

    def normalised(self, x):
        """What the network reads of raw features (B, T, D)."""
        return x

    def tested(self):
        """{name of `told`: {test: figure}}."""
        for module in self.modules.values():
            module.eval()
        scores = {test: self.evaluate(rows) for test, rows in self.tests.items()}
        return {name: {test: round(score[i], 3) for test, score in scores.items()}
                for i, name in enumerate(self.told)}  # fmt: skip

    def recognise(self, indices, read, budget=16):
        """`phone_error` on utterances, of what the network reads of them."""
        return phone_error(self.data, indices, self.factor,
                           lambda x, *rest: read(self.normalised(x), *rest), budget)  # fmt: skip


class LinguisticTask(PhoneTask):
    """CTC on phones through the streaming encoder; rows (T, 560) are normalised LFR features."""

    kind, factor, level, unit = "lfr", FACTORS["linguistic"], 0.25, 1.0
    bank = staticmethod(kaldi_bank)

    def __init__(self, config, data, tests=None, budget=1200):
        super().__init__(config, data, tests, budget)
        self.masks = {"bands": config.lfr_m}
        self.model = LinguisticTokenizer(config)
        self.head = PhoneHead(config.output_size, self.factor)
        self.modules = {"model": self.model, "head": self.head}

    @classmethod
    def from_run(cls, run, stage):
        task = super().from_run(run, stage)
        if not task.model.add_shift.any():  # weights that training starts from bring their own
            measure_cmvn(task.data, task.model)
        return task

    def normalised(self, x):
        return (x + self.model.add_shift.cpu()) * self.model.rescale.cpu()

    def batch(self, rng):
        return self.draw(rng)[1]

    def loss(self, batch, step):
        hidden = self.model(batch["x"], batch["lengths"])  # (B, T, D)
        targets, counts = batch["targets"], batch["counts"]
        loss, _ = upsampled_ctc(self.head, hidden, batch["lengths"], targets, counts, self.factor)
        return loss, {}

    @torch.no_grad()
    def evaluate(self, indices, budget=16):
        """(phone error in percent,) on the utterances `indices`."""
        return (self.recognise(indices, lambda x, n, _: self.head(self.model(x, n)), budget),)

    @torch.no_grad()
    def finish(self, seed):
        """Measure the encoder, then set its centroids. Returns {"phone_error": {test: percent}}."""
        told = self.tested()
        size, rng, hidden = self.config.codebook_size, np.random.default_rng(seed), []
        while sum(map(len, hidden)) < 250 * size:
            batch = self.draw(rng)[1]  # degraded: a code covers what noise makes of it
            x, lengths = batch["x"], batch["lengths"]
            out = self.model(x, lengths).float()
            hidden += [row[:length] for row, length in zip(out, lengths.tolist(), strict=True)]
        self.model.centroids.copy_(kmeans(torch.cat(hidden), size))
        return told


class SemanticTask(PhoneTask):
    """Recognition and prosody through a quantiser that comes after `quantise_from` of the training.

    rows: (T, 4 * 128) log-mel at 25 Hz; extra: "f0" (T, 4) in octaves above F0_FLOOR, 0 where
    unvoiced."""

    kind, factor, level, unit = "log_mel", FACTORS["semantic"], 0.05, 4 * math.log(10)
    told = "phone_error", "f0_semitones"
    bank = staticmethod(slaney_bank)
    masks = {"bands": 4, "widest": 16, "time_widest": 4}

    def __init__(self, config, data, tests=None, budget=2000, quantise_from=0.6):
        super().__init__(config, data, tests, budget)
        self.quantise_from, self.quantising = quantise_from, False
        self.model = SemanticTokenizer(config)
        self.decoder = SemanticDecoder(config, self.factor)
        # Moving averages of each code: how often it is taken, and the sum of the rows that took it.
        self.register = nn.Module()
        size, width = config.n_codebook_size, config.n_audio_state
        self.register.register_buffer("size", torch.ones(size))
        self.register.register_buffer("total", torch.zeros(size, width))
        self.modules = {"model": self.model, "decoder": self.decoder, "register": self.register}

    @property
    def codebook(self):
        """(K, D)"""
        return self.model.quantizer._codebook.embed

    def event(self, progress):
        """Turn the quantiser on when its time comes, with a codebook from k-means over what the
        encoder says by then."""
        self.quantising = self.quantising or bool(self.register.total.any())  # of a checkpoint
        if self.quantising or progress < self.quantise_from:
            return
        size, rng, rows = self.config.n_codebook_size, np.random.default_rng(0), []
        device = next(self.model.parameters()).device
        self.model.eval()
        with torch.no_grad():
            while sum(map(len, rows)) < 60 * size:
                x, lengths = self.data.gather(self.buckets.draw(rng))
                hidden, mask = self.hidden(x.to(device), lengths)
                rows.append(F.normalize(hidden[mask].float(), dim=-1).cpu())
        self.model.train()
        codebook = kmeans(torch.cat(rows), size, rounds=12)
        self.codebook.data.copy_(codebook)
        self.register.total.copy_(codebook * self.register.size.cpu()[:, None])
        self.quantising = True

    def batch(self, rng):
        indices, batch = self.draw(rng)
        f0, _ = self.data.gather(indices, self.data.extra["f0"])  # (B, T, 4)
        # Stretched frequencies move the pitch too; zero stays the mark of unvoiced frames.
        moved = (f0 + batch["octaves"][:, None, None]).clamp(min=1e-3)
        batch["f0"] = torch.where(f0 > 0, moved, f0)
        return batch

    def hidden(self, x, lengths):
        """x (B, T, 512) at 25 Hz -> hidden (B, T, D), mask (B, T)."""
        lengths = lengths.to(x.device)
        mask = torch.arange(x.shape[1], device=x.device)[None] < lengths[:, None]
        return features.hidden(self.model, x, lengths), mask

    def loss(self, batch, step):
        """CTC, melody, voicing and mel read through the codes, and the distance to the codes."""
        lengths, counts = batch["lengths"], batch["counts"]
        hidden, mask = self.hidden(batch["x"], lengths)
        unit = F.normalize(hidden.float(), dim=-1)  # the codebook compares directions
        logs, commit = {}, 0.0
        if self.quantising:
            quantised, codes = self.quantise(unit, mask)
            # The encoder stays near its codes; the codes follow it by moving averages.
            commit = F.mse_loss(unit[mask], quantised[mask].detach()) * unit.shape[-1]
            usage = torch.bincount(codes, minlength=self.config.n_codebook_size) / len(codes)
            logs["perplexity"] = torch.exp(-(usage * (usage + 1e-9).log()).sum())
            # Straight through: forward the code, backward as if there were no quantiser.
            unit = unit + (quantised - unit).detach()
        out = self.decoder(unit, mask)
        head = self.decoder.phone_head
        ctc, _ = upsampled_ctc(head, out, lengths, batch["targets"], counts, self.factor)
        melody, voicing, mel = self.decoder.sound_losses(out, mask, batch["f0"], batch["clean"])
        logs.update(ctc=ctc.detach(), f0=melody.detach() * 12, mel=mel.detach())  # f0 in semitones
        return ctc + 2.0 * melody + 0.3 * voicing + 1.0 * mel + 0.25 * commit, logs

    def quantise(self, unit, mask):
        """Nearest codes of the valid rows of unit (B, T, D): vectors (B, T, D) and codes (n,). In
        training the codebook follows the rows by moving averages; dead codes are re-seeded."""
        flat = unit[mask].detach()  # (n, D)
        with torch.autocast(flat.device.type, enabled=False):  # bf16 would change one code in 14
            codes, _ = nearest(flat, self.codebook)
        if self.model.training and flat.isfinite().all():
            size, total = self.register.size, self.register.total
            size.mul_(0.98).add_(torch.bincount(codes, minlength=len(size)).float(), alpha=0.02)
            sums = torch.zeros_like(total).index_add_(0, codes, flat)
            total.mul_(0.98).add_(sums, alpha=0.02)
            dead = (size < 0.05).nonzero().flatten()[: len(flat)]
            if len(dead):
                picks = torch.randperm(len(flat), device=flat.device)[: len(dead)]
                total[dead] = flat[picks]
                size[dead] = 1.0
            self.codebook.data.copy_(total / size[:, None].clamp(min=1e-3))
        quantised = torch.zeros_like(unit)
        quantised[mask] = self.codebook[codes]
        return quantised, codes

    @torch.no_grad()
    def evaluate(self, indices, budget=16):
        """Phone error in percent and median f0 error in semitones, read from the codes alone."""
        semitones = []

        def read(x, lengths, part):
            f0, _ = self.data.gather(part, self.data.extra["f0"])
            hidden, mask = self.hidden(x, lengths)
            out = self.decoder(self.codebook[self.model.quantize(hidden)], mask)
            melody = self.decoder.melody_head(out)[..., :4]
            voiced = (f0 > 0) & mask[..., None]
            semitones.append(12 * (melody - f0)[voiced].abs())
            return self.decoder.phone_head(out)

        error = self.recognise(indices, read, budget)
        return error, torch.cat(semitones).median().item()

    def finish(self, seed):
        """Measure: {"phone_error": {test: percent}, "f0_semitones": {test: median error}}."""
        self.event(1.0)  # a very short run may have ended before the quantiser came
        return self.tested()


class SemanticDecoder(nn.Module):
    """Reads the codes while they are learned: two transformer layers, then a head a question."""

    def __init__(self, config, factor):
        super().__init__()
        size = config.n_audio_state
        self.scale = size**0.5
        self.position = nn.Conv1d(size, size, 7, padding=3, groups=size)
        layer = nn.TransformerEncoderLayer(
            size, config.n_audio_head, 3 * size, dropout=0.0, activation="gelu",
            batch_first=True, norm_first=True,
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(size)
        self.phone_head = nn.Linear(size, factor * CLASSES)
        self.melody_head = nn.Linear(size, 8)  # 4 f0 values and 4 voicing logits a row
        self.mel_head = nn.Linear(size, 4 * config.n_mels)

    def forward(self, unit, mask):
        """unit (B, T, D) of vectors of length about 1, mask (B, T) of the valid -> (B, T, D)."""
        x = unit * self.scale * mask[..., None]
        x = x + self.position(x.transpose(1, 2)).transpose(1, 2)
        return self.norm(self.layers(x, src_key_padding_mask=~mask))

    def sound_losses(self, out, mask, f0, mel):
        """L1 of the melody in octaves where voiced, voicing cross-entropy, L1 of the log-mel."""
        heads = self.melody_head(out).float()
        melody, voicing = heads[..., :4], heads[..., 4:]
        voiced = (f0 > 0) & mask[..., None]
        errors = (melody - f0)[voiced].abs()
        melody_loss = errors.mean() if voiced.any() else melody.sum() * 0
        voicing_loss = F.binary_cross_entropy_with_logits(voicing[mask], (f0[mask] > 0).float())
        mel_loss = (self.mel_head(out).float() - mel)[mask].abs().mean()
        return melody_loss, voicing_loss, mel_loss
