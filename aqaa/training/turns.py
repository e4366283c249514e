"""How the mini learns second questions in any words, when all else is learnt: low-rank changes of
the backbone (backbone/lora.py), which count only where a turn came before. The backbone itself
stays frozen, so whatever is asked first is answered as it was."""

from torch.func import functional_call

from aqaa.backbone.lora import Turns
from aqaa.training.objectives import LanguageTask


class AdaptedTask(LanguageTask):
    """Next-token prediction by the frozen backbone with the changes of a part, `self.lora`."""

    warmup, lr, floor, patience = 0.03, 2e-3, 0.02, 30  # short examples fill gaps of long ones

    def freeze(self, part, lora):
        """Train `part` from now on, and of the backbone the changes `lora` alone."""
        self.backbone, self.model, self.lora = self.model.requires_grad_(False), part, lora
        self.modules = {"model": part}

    def begin(self, run, stage):
        """Take the weights that a run has, of the part and of the backbone; returns the task."""
        run.start(stage, self.model)
        run.part(run.makers()["backbone"], self.backbone)
        return self

    def scores(self, batch):
        trunk = self.backbone.to(batch["input_ids"].device).model
        weights = {name: trunk.get_parameter(name) + change for name, change in self.lora.changes()}
        embeddings = self.embedded(trunk.embed_tokens(batch["input_ids"]), batch)
        given = {"inputs_embeds": embeddings, "segment_ids": batch["segments"]}
        hidden = functional_call(trunk, weights, kwargs=given).last_hidden_state  # (B, T, D)
        return lambda at, rows: self.backbone.logits(hidden, at, rows)

    def embedded(self, embeddings, batch):
        """What takes the place of the embeddings (B, T, D) of a batch's ids."""
        return embeddings


class TurnsTask(AdaptedTask):
    """Second questions behind their first ones, and any questions behind any others."""

    def __init__(self, book, mixture, **options):
        super().__init__(book, mixture, **options)
        turns = Turns(book.config)
        self.freeze(turns, turns)

    @classmethod
    def from_run(cls, run, stage):
        task = cls(run.book(), stage.mixture, floor=stage.floor, **stage.settings)
        return task.begin(run, stage)
