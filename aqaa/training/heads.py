"""The phone heads: CTC on what two finished tokenizers hear, which themselves stay as they are.

Each utterance is encoded once; the heads then read it many times, at next to no cost."""

import numpy as np
import torch

from aqaa.tokenizers.phones import FACTORS, PhoneHeads, code_vectors
from aqaa.training import features
from aqaa.training.features import LengthBuckets, Utterances
from aqaa.training.speech_tokenizers import phone_error, upsampled_ctc

KINDS = {"linguistic": "lfr", "semantic": "log_mel"}  # the features that each tokenizer reads
UTTERANCES = 4000  # to learn from: some three hours
BUDGET = 1600  # semantic rows of a batch


class HeadsTask:
    """Both heads at once. heard: {"linguistic", "semantic": Utterances of the rows that its head
    reads}, of the same utterances; train: those to learn from; tests: {name: others}."""

    lr = 2e-3

    def __init__(self, config, heard, train, tests=None):
        self.heard, self.tests = heard, tests or {}
        lengths = heard["semantic"].lengths
        weights = np.zeros(len(lengths))
        weights[train] = 1.0
        self.buckets = LengthBuckets(lengths, BUDGET, weights)
        self.model = PhoneHeads(config)
        self.modules = {"model": self.model}

    @classmethod
    def from_run(cls, run, stage):
        heard, makers = {}, run.makers()
        for name, kind in KINDS.items():
            data, tests = run.utterances(kind)
            probs = data.weights / data.weights.sum()
            count = min(UTTERANCES, np.count_nonzero(probs))
            train = np.random.default_rng(run.seed).choice(len(probs), count, False, probs)
            chosen = np.unique(np.concatenate([train, *tests.values()]).astype(int))
            heard[name] = listened(run.part(makers[name]), data, chosen)
        tests = {name: np.searchsorted(chosen, rows) for name, rows in tests.items()}
        task = cls(run.config, heard, np.searchsorted(chosen, train), tests)
        run.start(stage, task.model)
        return task

    def batch(self, rng):
        indices, batch = self.buckets.draw(rng), {}
        for name, data in self.heard.items():
            batch[name], batch[f"{name}_lengths"] = data.gather(indices)
        batch["targets"], batch["counts"] = self.heard["semantic"].targets(indices)
        return batch

    def loss(self, batch, step):
        losses = {}
        for name, factor in FACTORS.items():
            head, rows, lengths = getattr(self.model, name), batch[name], batch[f"{name}_lengths"]
            targets = batch["targets"], batch["counts"]
            losses[name], _ = upsampled_ctc(head, rows, lengths, *targets, factor)
        return sum(losses.values()), {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def evaluate(self, name, indices):
        """Phone error in percent of one tokenizer on the utterances `indices`."""
        head = getattr(self.model, name)
        return phone_error(self.heard[name], indices, FACTORS[name], lambda rows, *_: head(rows))

    def finish(self, seed):
        """Measure: {"phone_error": {tokenizer: {test: percent}}}."""
        self.model.eval()
        return {"phone_error": {
            name: {test: round(self.evaluate(name, rows), 2) for test, rows in self.tests.items()}
            for name in FACTORS
        }}  # fmt: skip


@torch.no_grad()
def listened(model, data, chosen, size=32):
    """The `chosen` of `data`, as a head reads them from a tokenizer: Utterances of its rows (fp16),
    of the linguistic one hidden states, of the semantic one the vectors of its codes."""
    rows = [None] * len(chosen)
    order = np.argsort(data.lengths[chosen], kind="stable")  # so that little is padded
    for part in np.split(order, range(size, len(order), size)):
        x, lengths = data.gather(chosen[part])
        hidden = features.hidden(model, x, lengths)
        if not hasattr(model, "centroids"):
            hidden = code_vectors(model, model.quantize(hidden))
        for place, row, length in zip(part, hidden, lengths.tolist(), strict=True):
            rows[place] = row[:length].half().numpy()
    lengths, phones = data.lengths[chosen], [data.phones[i] for i in chosen]
    return Utterances(np.concatenate(rows), lengths, phones)
