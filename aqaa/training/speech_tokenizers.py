"""Training of the two audio tokenizers, from scratch.

Linguistic (AQAA paper 2.1: a recogniser's encoder, then k-means): the SANM encoder learns to spell phones with CTC
through a head that is thrown away, then k-means over its output gives the centroids.
Semantic (CosyVoice 1.0: supervised VQ inside a recogniser): the encoder first learns without a quantiser, then the
codebook starts from k-means of its normalised output and is trained straight through, while a decoder that is thrown
away must read phones, melody (f0), energy and the mel out of the codes alone.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from aqaa.tokenizers.linguistic import LinguisticTokenizer
from aqaa.tokenizers.semantic import SemanticTokenizer
from aqaa.training.loop import LengthBuckets

F0_FLOOR = 60.0  # Hz; melody is measured in octaves above it
PHONES = (
    "aa ae ah ao aw ax ay b ch d dh eh er ey f g hh ih iy jh k l m n ng ow oy p r s sh t th uh uw v w y z zh"
).split()


def phone_ids(phones):
    """CMU phone names to 1-based ids (0 is the CTC blank). Unknown names are left out."""
    table = {name: i + 1 for i, name in enumerate(PHONES)}
    return [table[p] for p in phones if p in table]


def upsampled_ctc(head, hidden, lengths, targets, target_lengths, factor):
    """CTC with `factor` outputs a row, so that fast speech has more frames than phones.

    head: Linear D -> factor * classes. hidden: (B, T, D). Returns (loss per phone, log-probs (B, T*factor, classes)).
    """
    batch, rows, _ = hidden.shape
    logits = head(hidden).float().reshape(batch, rows * factor, -1)
    log_probs = logits.log_softmax(-1)
    loss = F.ctc_loss(
        log_probs.transpose(0, 1), targets, lengths * factor, target_lengths, blank=0, zero_infinity=True
    )
    return loss, log_probs


def best_path(log_probs, lengths):
    """Greedy CTC: lists of phone ids. log_probs (B, T, classes), lengths (B,) in the same frames."""
    found = []
    for row, length in zip(log_probs.argmax(-1).tolist(), lengths.tolist(), strict=True):
        row = row[:length]
        found.append([p for i, p in enumerate(row) if p and (i == 0 or row[i - 1] != p)])
    return found


def edit_distance(a, b):
    """Levenshtein distance of two sequences."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def phone_error(found, wanted):
    """Errors over phones, in percent, of two lists of phone lists."""
    errors = sum(edit_distance(f, w) for f, w in zip(found, wanted, strict=True))
    return 100.0 * errors / max(sum(map(len, wanted)), 1)


class Utterances:
    """Feature rows of many utterances in memory (fp16), with phones and, for the semantic part, f0.

    rows: (sum T, D), lengths: (N,), phones: list of N lists of ids, extra: dict of (sum T, ...) arrays,
    weights: (N,) relative chance of each to be drawn.
    """

    def __init__(self, rows, lengths, phones, extra=None, weights=None):
        self.rows, self.lengths = rows, np.asarray(lengths)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self.phones, self.extra, self.weights = phones, extra or {}, weights

    def gather(self, indices, data=None):
        """Zero-padded (B, T, D) float32 tensor of `data` (default the feature rows) and lengths (B,)."""
        data = self.rows if data is None else data
        lengths = self.lengths[indices]
        out = np.zeros((len(indices), lengths.max(), *data.shape[1:]), dtype=np.float32)
        for row, index in enumerate(indices):
            out[row, : lengths[row]] = data[self.starts[index]:self.starts[index + 1]]
        return torch.from_numpy(out), torch.from_numpy(lengths)

    def targets(self, indices):
        """Concatenated phone ids and their counts, as ctc_loss takes them."""
        phones = [self.phones[i] for i in indices]
        flat = torch.tensor([p for row in phones for p in row], dtype=torch.long)
        return flat, torch.tensor([len(row) for row in phones])


def spec_augment(x, rng, bands, n_mels, widest=12, time_widest=6):
    """Mask one band of mel bins and one stretch of time per utterance, in place. x: (B, T, bands * n_mels)."""
    for row in x:
        width = int(rng.integers(0, widest + 1))
        low = int(rng.integers(0, n_mels - width + 1))
        row.view(-1, bands, n_mels)[:, :, low:low + width] = 0
        width = int(rng.integers(0, time_widest + 1))
        if width and len(row) > 3 * width:
            start = int(rng.integers(0, len(row) - width))
            row[start:start + width] = 0
    return x


class LinguisticTask:
    """CTC on phones through the streaming encoder. data: Utterances of normalised LFR rows (T, 560)."""

    lr = 2e-3
    factor = 3

    def __init__(self, config, data, budget=1200):
        self.config, self.data = config, data
        self.model = LinguisticTokenizer(config)
        size = config.output_size
        self.head = nn.Sequential(
            nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, self.factor * (len(PHONES) + 1))
        )
        self.buckets = LengthBuckets(data.lengths, budget, data.weights)

    def modules(self):
        return {"model": self.model, "head": self.head}

    def batch(self, rng):
        indices = self.buckets.draw(rng)
        x, lengths = self.data.gather(indices)
        level = torch.from_numpy(rng.normal(0, 0.25, (len(indices), 1, 1)).astype(np.float32))
        x = spec_augment(x + level, rng, self.config.lfr_m, self.config.n_mels)
        targets, counts = self.data.targets(indices)
        return {"x": x, "lengths": lengths, "targets": targets, "counts": counts}

    def loss(self, batch, step):
        hidden = self.model(batch["x"], batch["lengths"])
        loss, _ = upsampled_ctc(self.head, hidden, batch["lengths"], batch["targets"], batch["counts"], self.factor)
        return loss, {}

    @torch.no_grad()
    def evaluate(self, data, indices, budget=16):
        """Phone error in percent on the utterances `indices` of `data`."""
        found, wanted = [], []
        for start in range(0, len(indices), budget):
            part = indices[start:start + budget]
            x, lengths = data.gather(part)
            hidden = self.model(x, lengths)
            logits = self.head(hidden).reshape(len(part), -1, len(PHONES) + 1)
            found += best_path(logits, lengths * self.factor)
            wanted += [data.phones[i] for i in part]
        return phone_error(found, wanted)


@torch.no_grad()
def kmeans(x, count, rounds=25, seed=0):
    """Lloyd's k-means from random rows, empty clusters re-seeded. x (N, D) -> (count, D)."""
    generator = torch.Generator().manual_seed(seed)
    centroids = x[torch.randperm(len(x), generator=generator)[:count]].clone()
    for _ in range(rounds):
        nearest, distance = _nearest(x, centroids)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, x)
        sizes = torch.bincount(nearest, minlength=count)
        centroids = sums / sizes.clamp(min=1)[:, None]
        empty = (sizes == 0).nonzero().flatten()
        if len(empty):  # an empty cluster goes where the fit is worst
            centroids[empty] = x[distance.topk(len(empty)).indices]
    return centroids


def _nearest(x, centroids, rows=16384):
    nearest, distance = [], []
    square = (centroids**2).sum(1)
    for part in x.split(rows):
        score = square - 2 * part @ centroids.T
        value, index = score.min(1)
        nearest.append(index)
        distance.append(value + (part**2).sum(1))
    return torch.cat(nearest), torch.cat(distance)


class SemanticTask:
    """Recognition and prosody through a quantiser. data: Utterances of log-mel frames folded to 25 Hz rows.

    rows: (T, 4 * 128) log-mel at 25 Hz; extra: "f0" (T, 4) in octaves above F0_FLOOR, 0 where unvoiced.
    """

    lr = 2e-3
    factor = 2

    def __init__(self, config, data, budget=2000, quantise_from=0.6):
        self.config, self.data, self.quantise_from = config, data, quantise_from
        self.model = SemanticTokenizer(config)
        self.decoder = SemanticDecoder(config, self.factor)
        self.buckets = LengthBuckets(data.lengths, budget, data.weights)
        self.quantising = False
        self.register = nn.Module()
        self.register.register_buffer("size", torch.ones(config.n_codebook_size))
        self.register.register_buffer("total", torch.zeros(config.n_codebook_size, config.n_audio_state))

    def modules(self):
        return {"model": self.model, "decoder": self.decoder, "register": self.register}

    def event(self, progress):
        """Turn the quantiser on when its time comes, with a codebook from k-means over what the encoder says now."""
        self.quantising = self.quantising or bool(self.register.total.any())  # as it was in a checkpoint
        if self.quantising or progress < self.quantise_from:
            return
        rng = np.random.default_rng(0)
        rows = []
        self.model.eval()
        with torch.no_grad():
            while sum(map(len, rows)) < 60 * self.config.n_codebook_size:
                indices = self.buckets.draw(rng)
                x, lengths = self.data.gather(indices)
                hidden, mask = self._hidden(x.to(next(self.model.parameters()).device), lengths)
                rows.append(F.normalize(hidden[mask].float(), dim=-1).cpu())
        self.model.train()
        codebook = kmeans(torch.cat(rows), self.config.n_codebook_size, rounds=12)
        embed = self.model.quantizer._codebook.embed
        embed.data.copy_(codebook)
        self.register.total.copy_(codebook * self.register.size.cpu()[:, None])
        self.quantising = True

    def batch(self, rng):
        indices = self.buckets.draw(rng)
        x, lengths = self.data.gather(indices)
        f0, _ = self.data.gather(indices, self.data.extra["f0"])
        clean = x.clone()
        level = torch.from_numpy(rng.normal(0, 0.05, (len(indices), 1, 1)).astype(np.float32))
        x = spec_augment(x + level, rng, 4, self.config.n_mels, widest=16, time_widest=4)
        targets, counts = self.data.targets(indices)
        return {"x": x, "clean": clean + level, "lengths": lengths, "f0": f0, "targets": targets, "counts": counts}

    def _hidden(self, x, lengths):
        """x (B, T, 512) at 25 Hz -> hidden (B, T, D), mask (B, T)."""
        batch, rows, _ = x.shape
        log_mel = x.reshape(batch, rows * 4, -1).transpose(1, 2)  # (B, 128, 4T)
        hidden, _ = self.model.hidden(log_mel, lengths.to(x.device) * 4)
        mask = torch.arange(rows, device=x.device)[None] < lengths.to(x.device)[:, None]
        return hidden, mask

    def loss(self, batch, step):
        lengths = batch["lengths"]
        hidden, mask = self._hidden(batch["x"], lengths)
        unit = F.normalize(hidden.float(), dim=-1)
        logs, commit = {}, 0.0
        if self.quantising:
            quantised, codes = self._quantise(unit, mask)
            commit = F.mse_loss(unit[mask], quantised[mask].detach()) * unit.shape[-1]
            usage = torch.bincount(codes, minlength=self.config.n_codebook_size).float() / len(codes)
            logs["perplexity"] = torch.exp(-(usage * (usage + 1e-9).log()).sum())
            unit = unit + (quantised - unit).detach()
        out = self.decoder(unit, mask)
        ctc, _ = upsampled_ctc(
            self.decoder.phone_head, out, lengths, batch["targets"], batch["counts"], self.factor
        )
        melody, voicing, mel = self.decoder.sound_losses(out, mask, batch["f0"], batch["clean"])
        logs.update(ctc=ctc.detach(), f0=melody.detach() * 12, mel=mel.detach())
        return ctc + 2.0 * melody + 0.3 * voicing + 1.0 * mel + 0.25 * commit, logs

    def _quantise(self, unit, mask):
        """Nearest codes of the valid rows; the codebook follows them by moving averages, dead codes are re-seeded."""
        embed = self.model.quantizer._codebook.embed
        flat = unit[mask].detach()
        with torch.autocast(flat.device.type, enabled=False):  # in bf16 one code in fourteen would be another
            codes, _ = _nearest(flat, embed)
        if self.model.training and flat.isfinite().all():
            size, total = self.register.size, self.register.total
            size.mul_(0.98).add_(torch.bincount(codes, minlength=len(size)).float(), alpha=0.02)
            total.mul_(0.98).add_(torch.zeros_like(total).index_add_(0, codes, flat), alpha=0.02)
            dead = (size < 0.05).nonzero().flatten()[: len(flat)]
            if len(dead):
                picks = flat[torch.randperm(len(flat), device=flat.device)[: len(dead)]]
                total[dead], size[dead] = picks, 1.0
            embed.data.copy_(total / size[:, None].clamp(min=1e-3))
        quantised = torch.zeros_like(unit)
        quantised[mask] = embed[codes]
        return quantised, codes

    @torch.no_grad()
    def evaluate(self, data, indices, budget=16):
        """Phone error in percent and median f0 error in semitones, read from the codes alone."""
        found, wanted, semitones = [], [], []
        for start in range(0, len(indices), budget):
            part = indices[start:start + budget]
            x, lengths = data.gather(part)
            f0, _ = data.gather(part, data.extra["f0"])
            hidden, mask = self._hidden(x, lengths)
            codes = self.model.quantize(hidden)
            unit = self.model.quantizer._codebook.embed[codes]
            out = self.decoder(unit, mask)
            logits = self.decoder.phone_head(out).reshape(len(part), -1, len(PHONES) + 1)
            found += best_path(logits, lengths * self.factor)
            wanted += [data.phones[i] for i in part]
            melody = self.decoder.melody_head(out)[..., :4]
            voiced = (f0 > 0) & mask[..., None]
            semitones.append(12 * (melody - f0)[voiced].abs())
        return phone_error(found, wanted), torch.cat(semitones).median().item()


class SemanticDecoder(nn.Module):
    """What reads the codes while they are being learned: two transformer layers, then a head for each question."""

    def __init__(self, config, factor):
        super().__init__()
        size = config.n_audio_state
        self.scale = size**0.5
        self.position = nn.Conv1d(size, size, 7, padding=3, groups=size)
        layer = nn.TransformerEncoderLayer(
            size, config.n_audio_head, 3 * size, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(size)
        self.phone_head = nn.Linear(size, factor * (len(PHONES) + 1))
        self.melody_head = nn.Linear(size, 8)  # 4 f0 values and 4 voicing logits a row
        self.mel_head = nn.Linear(size, 4 * config.n_mels)

    def forward(self, unit, mask):
        """unit: (B, T, D) code vectors of length about 1. mask: (B, T) True where valid. Returns (B, T, D)."""
        x = unit * self.scale * mask[..., None]
        x = x + self.position(x.transpose(1, 2)).transpose(1, 2)
        return self.norm(self.layers(x, src_key_padding_mask=~mask))

    def sound_losses(self, out, mask, f0, mel):
        """L1 of the melody in octaves where voiced, voicing cross-entropy, and L1 of the log-mel."""
        heads = self.melody_head(out).float()
        melody, voicing = heads[..., :4], heads[..., 4:]
        voiced = (f0 > 0) & mask[..., None]
        melody_loss = (melody - f0)[voiced].abs().mean() if voiced.any() else melody.sum() * 0
        voicing_loss = F.binary_cross_entropy_with_logits(voicing[mask], (f0[mask] > 0).float())
        mel_loss = (self.mel_head(out).float() - mel)[mask].abs().mean()
        return melody_loss, voicing_loss, mel_loss
