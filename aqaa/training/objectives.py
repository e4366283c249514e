"""Training of the backbone: next-token prediction on packed rows of examples (examples.py).

Pre-training and supervised fine-tuning share this objective; their mixtures and the parents of
their weights stand in stages.py."""

import numpy as np
import torch
import torch.nn.functional as F

from aqaa.backbone import step1
from aqaa.training.examples import ANSWER_WEIGHT, Examples

KINDS = ("text", "linguistic", "semantic")  # of a target: which rows of the head compete for it
TEXT, LINGUISTIC, SEMANTIC = range(3)


class NextToken:
    """A backbone whose softmax runs over the ids that a layout's machine would allow: a new one of
    the config's size, or `model`."""

    def __init__(self, config, model=None):
        self.ids = ids = config.ids
        self.markers = torch.tensor(sorted((ids.eot, ids.text_start, ids.audio_end)))
        self.model = model or step1.build(config.backbone)
        self.modules = {"model": self.model}

    def kinds(self, ids):
        """Kind of each target ids[1:]: where a marker may end the audio, it competes with audio."""
        target, before = ids[1:], ids[:-1]
        kinds = np.where(target >= self.ids.n_text, LINGUISTIC, TEXT)
        kinds = np.where(target >= self.ids.semantic_start, SEMANTIC, kinds)
        # Audio ends only where a group does, and there the next id would be a linguistic one. A
        # padded layout may end behind a block of text_end, and text_start may come behind a block
        # of text: audio would go on there as well.
        in_audio = (before >= self.ids.n_text) | (before == self.ids.text_end)
        in_audio |= target == self.ids.text_start
        ends_audio = np.isin(target, self.markers) & in_audio
        return np.where(ends_audio, LINGUISTIC, kinds)

    @staticmethod
    def blank(rows, length):
        """A batch (rows, length) that holds no example yet, as arrays: input_ids, targets, kinds,
        weights, and segments, which number the examples of a row from 1 so that attention stays
        inside one."""
        shape = (rows, length)
        batch = {key: np.zeros(shape, np.int64) for key in ("input_ids", "segments", "targets")}
        return {**batch, "kinds": np.full(shape, -1), "weights": np.zeros(shape, np.float32)}

    def put(self, batch, row, start, ids, weights):
        """Put an example, ids (N,) and their weights (N,), into a row of a batch from `start` on.
        It takes N - 1 places: the last id is only ever a target."""
        place = (row, slice(start, start + len(ids) - 1))
        batch["input_ids"][place] = ids[:-1]
        batch["targets"][place] = ids[1:]
        batch["kinds"][place] = self.kinds(ids)
        batch["weights"][place] = weights[1:]
        batch["segments"][place] = batch["segments"][row].max() + 1

    def losses(self, batch):
        """Cross-entropy of the targets that have a weight, kind by kind.

        batch: as of `LanguageTask.batch`. Yields (kind, at (B, T) bool, losses (n,) in nats), n
        being the true values of `at`, in their order; kinds without a target are left out."""
        scores = self.scores(batch)
        for kind, rows in enumerate(self.head_rows()):
            # Most positions of a row ask for one kind of id, whose rows are a part of the head:
            # computing just these logits is cheaper, and trains what decoding will do.
            at = (batch["kinds"] == kind) & (batch["weights"] > 0)
            if not at.any():
                continue
            logits = scores(at, rows.to(at.device)).float()  # (n, rows)
            columns = self.columns(batch["targets"][at], kind)  # (n,)
            yield kind, at, F.cross_entropy(logits, columns, reduction="none")

    def scores(self, batch):
        """A function (at (B, T) bool with n true values, rows) -> logits (n, rows) of a batch."""
        hidden = self.model.model(
            input_ids=batch["input_ids"], segment_ids=batch["segments"]
        ).last_hidden_state  # (B, T, D)
        return lambda at, rows: self.model.logits(hidden, at, rows)

    def total(self, weights):
        """What a sum over targets is divided by: their weights."""
        return weights.sum()

    def head_rows(self):
        """Rows of lm_head that compete for a target of each kind, in the order of KINDS."""
        first, border, end = self.ids.n_text, self.ids.semantic_start, self.ids.end
        linguistic = torch.cat([torch.arange(first, border), self.markers])
        return [torch.arange(first), linguistic, torch.arange(border, end)]

    def columns(self, targets, kind):
        """Position of each target (n,) among the head rows of its kind."""
        if kind == TEXT:
            return targets
        if kind == SEMANTIC:
            return targets - self.ids.semantic_start
        place = torch.searchsorted(self.markers.to(targets.device), targets)  # markers come last
        is_marker = targets < self.ids.n_text
        return torch.where(is_marker, self.ids.n_linguistic + place, targets - self.ids.n_text)


class LanguageTask(NextToken):
    """Next-token prediction on packed examples.

    book, mixture, options: as of `Examples`. A batch has `rows` rows of `length` ids. floor: share
    of the learning rate `lr` that is left at the end; outer: factor on that of embeddings and head.
    """

    warmup, patience = 0.02, 4
    kind = Examples

    def __init__(self, book, mixture, *, floor=0.02, rows=12, length=512, lr=2e-3, outer=1.0,
                 **options):  # fmt: skip
        super().__init__(book.config)
        self.examples = self.kind(book, mixture, **options)
        # Ids that may follow sound besides the markers, where a layout has some.
        starts = getattr(self.examples.layout, "starts", ())
        self.markers = torch.tensor(sorted({*self.markers.tolist(), *starts}))
        self.floor, self.rows, self.length = floor, rows, length
        self.lr, self.outer = lr, outer

    @classmethod
    def from_run(cls, run, stage):
        """The task of a stage, from its parent's weights, or from the codebooks without any."""
        lr = 1e-3 if run.init else 2e-3  # weights that have learnt go on gently
        options = {"floor": stage.floor, "lr": lr, **stage.settings}
        task = cls(run.book(), stage.mixture, **options)
        if not run.start(stage, task.model):
            task.hear_alike(*run.codebooks())
        return task

    @torch.no_grad()
    def hear_alike(self, linguistic, semantic, seed=0):
        """Start the audio embeddings from the codebooks (K, D): like sounds have like vectors. A
        random projection keeps the distances of the codes, whatever the width of the model."""
        table = self.model.model.embed_tokens.weight  # (vocabulary, hidden)
        generator = torch.Generator().manual_seed(seed)
        first = self.ids.n_text
        for codes in (linguistic, semantic):
            codes = (codes - codes.mean(0)) / codes.std()
            width = codes.shape[1]
            mix = torch.randn(width, table.shape[1], generator=generator) / width**0.5
            table[first : first + len(codes)] = codes @ mix * table[:first].std()
            first += len(codes)

    def batch(self, rng):
        """Examples packed into the rows of a batch (see `blank`)."""
        return self.packed(rng)[0]

    def packed(self, rng):
        """A batch, and what examples have beside ids and weights, in the order of their places."""
        batch, beside = self.blank(self.rows, self.length), [[] for _ in range(self.rows)]
        filled = np.zeros(self.rows, dtype=int)
        misses = 0
        while misses < self.patience:  # so many fitted in no row: the rows are full enough
            ids, weights, *more = self.examples.draw(rng)
            size = len(ids) - 1  # the last id is only ever a target
            room = np.flatnonzero(filled + size <= self.length)
            if not len(room):
                misses += 1
                continue
            row = room[0]
            self.put(batch, row, filled[row], ids, weights)
            filled[row] += size
            beside[row] += more
        return {key: torch.from_numpy(value) for key, value in batch.items()}, sum(beside, [])

    def loss(self, batch, step):
        """Weighted mean of the cross-entropy (scalar), and that of each kind for the log."""
        logs, total = {}, 0.0
        all_weights = self.total(batch["weights"])
        for kind, at, losses in self.losses(batch):
            # One denominator for all kinds: a target counts by its weight alone, not by how many
            # of its kind this batch happens to hold.
            weights = batch["weights"][at]
            total = total + (losses * weights).sum() / all_weights
            # The log tells how well answers go; questions, which nobody can foresee, stay out.
            answers = weights >= ANSWER_WEIGHT
            if answers.any():
                logs[KINDS[kind]] = losses[answers].detach().mean()
        return total, logs
