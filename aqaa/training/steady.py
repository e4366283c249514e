"""Finished audio tokenizers learn to hear more, and their codebooks stay as they are.

A recogniser that learns on gives every sound other codes, and all that was learnt from the old ones
(the language model, the vocoder) is lost. Here the codebook stays, and the tokenizer as it was is
the teacher. Where it hears well, in the voices that it was trained on, what it makes of a clean
utterance is the target for every bent copy: noise, lines and microphones shall change fewer codes.
Where it hears badly, in natural voices, the phones are the target (CTC through the codes)."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from aqaa.corpus.voices import TRAINING
from aqaa.tokenizers.phones import PhoneHeads, code_vectors
from aqaa.tokenizers.semantic import distances
from aqaa.training import features
from aqaa.training.speech_tokenizers import LinguisticTask, SemanticTask, upsampled_ctc

SHARES = {"hibari": 2.0, "kokoro": 8.0, "people": 6.0}  # drawn so much more: many speakers most
NEAR = 0.25  # weight of the distance to the nearest code, where no code is given
TEMPERATURE = 0.25  # of the codes' competition: softer, and rows flee from all codes
MASKS = {"widest": 8, "time_widest": 0}  # a code of 60 ms cannot be guessed from its neighbours


def present(x, lengths):
    """(B, T, D), (B,) -> (B, T): which rows belong to an utterance."""
    return torch.arange(x.shape[1], device=lengths.device)[None] < lengths[:, None]


class Steady:
    """What both tasks share. old: the tokenizer as it was. heads: PhoneHeads, which learn along.
    natural: of each utterance, whether the old tokenizer is no teacher for it."""

    lr, warmup, told = 4e-4, 0.05, ("phone_error", "kept")

    def prepare(self, old, heads, natural):
        """Set the task up around the weights of `old`."""
        self.old, self.natural = old.eval().requires_grad_(False), torch.as_tensor(natural)
        self.model.load_state_dict(old.state_dict())
        self.head = getattr(heads, self.name)
        self.modules = {"model": self.model, "head": self.head}
        self.masks = {**self.masks, **MASKS}
        # The mean squared distance of a row to its code: the unit in which codes compete.
        batch = self.batch(np.random.default_rng(0))
        mask = present(batch["x"], batch["lengths"])
        with torch.no_grad():
            rows = self.rows(self.old, batch["clean"], batch["lengths"])
        self.spread = self.distance(rows)[mask].min(-1).values.mean().item()

    @classmethod
    def from_run(cls, run, stage):
        _, items = run.items()
        data, tests = run.utterances(cls.kind)
        # People are natural, too. The answer voice is not: the vocoder has learnt from its codes.
        natural = [item.voice not in TRAINING and not item.is_voiced for item in items]
        shares = [SHARES.get(item.voice.split(":")[0], 1.0) for item in items]
        data.weights = data.weights * np.where(natural, shares, 1.0)
        dev = [i for i, item in enumerate(items) if natural[i] and item.split == "dev"]
        tests = {"answer_voice": tests.get("answer_voice", ()), "natural_dev": dev}
        tests = {name: rows for name, rows in tests.items() if len(rows)}
        task = cls(getattr(run.config, stage.part), data, tests)
        heads = PhoneHeads(run.config)
        if run.part_file("heads").exists():
            run.part("heads", heads)
        task.prepare(run.part(stage.parent), heads.train(), natural)
        return task

    def event(self, progress):
        """Nothing: a codebook that is to stay is never set anew."""

    def batch(self, rng):
        indices, batch = self.draw(rng)
        batch["natural"] = self.natural[indices]
        return batch

    def loss(self, batch, step):
        """Cross-entropy to the codes of the teacher where there is one, CTC through the codes."""
        lengths, mask = batch["lengths"], present(batch["x"], batch["lengths"])
        self.old.to(mask.device)
        with torch.no_grad():
            taught = self.distance(self.rows(self.old, batch["clean"], lengths))[mask]
        hidden = self.rows(self.model, batch["x"], lengths)  # (B, T, D)
        distance = self.distance(hidden)[mask]  # (n, K)
        logits = -distance / (TEMPERATURE * self.spread)
        natural = batch["natural"][:, None].expand_as(mask)[mask]  # (n,)
        targets = taught.argmin(-1)
        codes = F.cross_entropy(logits, targets, reduction="none")
        kept = (distance.argmin(-1) == targets)[~natural].float()
        codes = (codes * ~natural).sum() / (~natural).sum().clamp(min=1)
        near = (distance.min(-1).values * natural).sum() / natural.sum().clamp(min=1) / self.spread
        ctc, _ = upsampled_ctc(self.head, self.through(hidden, mask), lengths, batch["targets"],
                               batch["counts"], self.factor)  # fmt: skip
        logs = {"codes": codes.detach(), "ctc": ctc.detach(), "near": near.detach()}
        if len(kept):
            logs["kept"] = 100 * kept.mean()
        return codes + ctc + NEAR * near, logs

    @torch.no_grad()
    def evaluate(self, indices):
        """Of utterances: phone error in percent, read through the codes, and percent of the codes
        that are the teacher's."""
        same = []

        def read(x, lengths, part):
            mask = present(x, lengths)
            hidden, before = (self.rows(one, x, lengths) for one in (self.model, self.old))
            same.append(self.model.quantize(hidden)[mask] == self.old.quantize(before)[mask])
            return self.head(self.through(hidden, mask))

        error = self.recognise(indices, read)
        return error, 100 * torch.cat(same).float().mean().item()

    def finish(self, seed):
        """Measure: {"phone_error": {test: percent}, "kept": {test: percent of the old codes}}."""
        return self.tested()


class SteadyLinguistic(Steady, LinguisticTask):
    """The linguistic tokenizer, by the distance of its output to the centroids."""

    name = "linguistic"

    def rows(self, model, x, lengths):
        return model(x, lengths)

    def distance(self, hidden):
        """(B, T, D) -> (B, T, K)"""
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 would change codes
            x, centroids = hidden.float(), self.old.centroids
            lengths = x.square().sum(-1, keepdim=True), centroids.square().sum(-1)
            return lengths[0] - 2 * x @ centroids.T + lengths[1]

    def through(self, hidden, mask):
        """The nearest centroids, with the gradient of `hidden`."""
        hidden = hidden.float() * mask[..., None]
        rows = self.old.centroids[self.distance(hidden).argmin(-1)] * mask[..., None]
        return hidden + (rows - hidden).detach()


class SteadySemantic(Steady, SemanticTask):
    """The semantic tokenizer, by the distance of its directions to the codebook."""

    name = "semantic"

    def rows(self, model, x, lengths):
        return features.hidden(model, x, lengths)

    def distance(self, hidden):
        """(B, T, D) -> (B, T, K)"""
        return distances(hidden, self.old.quantizer._codebook.embed)

    def through(self, hidden, mask):
        """The vectors of the nearest codes, with the gradient of the directions of `hidden`."""
        unit = F.normalize(hidden.float(), dim=-1) * math.sqrt(hidden.shape[-1]) * mask[..., None]
        rows = code_vectors(self.old, self.old.quantize(hidden), mask)
        return unit + (rows - unit).detach()
