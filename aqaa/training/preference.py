"""Direct preference optimisation of spoken answers (AQAA paper 3.3; Rafailov et al. 2023).

With all tokens in the sum, text and audio of an answer drift apart, the paper finds; so its Eq. 2
leaves audio tokens out. Here a term belongs to text where text ids compete for the place, and to
audio where audio ids do: the softmax runs over the ids that the layout's machine allows, as in
`LanguageTask` and in generation. So the eot that ends the audio is a decision about audio, and
under "text_masked" no row of lm_head that makes sound has any gradient; the trunk is shared, and
what that does to speech has to be measured. β, pairs and learning rate are not published."""

import zlib
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F

from aqaa.files import fingerprint, reading, replacing
from aqaa.training.loop import autocast
from aqaa.training.objectives import LINGUISTIC, SEMANTIC, TEXT, NextToken
from aqaa.training.pairs import read_pairs

Objective = namedtuple("Objective", "kinds anchor")  # terms of the sum; weight of the SFT loss
OBJECTIVES = {
    "plain": Objective((TEXT, LINGUISTIC, SEMANTIC), 0.0),
    "text_masked": Objective((TEXT,), 0.0),  # the paper's
    "speech_only": Objective((LINGUISTIC, SEMANTIC), 0.0),
    "anchored": Objective((TEXT,), 1.0),  # text_masked, and the chosen answer is learnt as in SFT
}
CHOSEN, REJECTED = 0, 1
HELD_OUT = 10  # one question in so many is kept to measure on


def dpo_loss(logprobs, reference, beta):
    """−log σ(β · margin) of each pair (P,), and its margin in nats (P,).

    logprobs, reference (P, 2): log-probabilities of the chosen and of the rejected answer, summed
    over the tokens that count, by the model and by the one it started from. The margin says how
    much more the model has come to prefer the chosen answer than its reference does."""
    gained = logprobs - reference  # (P, 2)
    margin = gained[:, CHOSEN] - gained[:, REJECTED]
    return -F.logsigmoid(beta * margin), margin


class PreferenceTask(NextToken):
    """DPO on pairs of answers to the same question.

    config: AQAAConfig; pairs: list of `pairs.Pair`, of which a tenth of the questions is held out;
    objective: a name of OBJECTIVES; a batch has `rows` pairs. The model must hold the weights of
    the parent when `refer` is called: it computes the reference once. ValueError for an unknown
    objective or no pairs."""

    warmup = 0.1
    weight_decay = 0.0  # the reference holds the weights back; and masked rows stay as they are

    def __init__(self, config, pairs, *, objective="text_masked", beta=0.1, rows=8, lr=5e-5,
                 floor=0.02, model=None):  # fmt: skip
        if objective not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise ValueError(f"unknown objective {objective!r}: choose one of {known}")
        if not pairs:
            raise ValueError("there is no pair to learn from: make some with `aqaa train pairs`")
        super().__init__(config, model)
        self.pairs, self.objective, self.beta = pairs, objective, beta
        self.rows, self.lr, self.floor = rows, lr, floor
        held = [zlib.crc32(pair.question.encode()) % HELD_OUT == 0 for pair in pairs]
        self.train = np.flatnonzero(~np.array(held)) if not all(held) else np.arange(len(pairs))
        self.test = np.flatnonzero(held) if any(held) else np.arange(len(pairs))
        self.reference = None  # (N, 2, 3): pair, answer, kind

    @classmethod
    def from_run(cls, run, stage):
        """The task of a stage, from its parent's weights and the pairs of the run."""
        path, parent = run.pairs_file(), run.part_file(stage.parent)
        task = cls(run.config, read_pairs(path, run.config.ids, of=run.tokenizers()),
                   floor=stage.floor, **stage.settings)  # fmt: skip
        run.start(stage, task.model)
        task.model.to(run.device)
        of = " ".join(fingerprint(one)["sha256"] for one in (path, parent))
        task.refer((run.base or run.out) / "reference.npz", of)  # variants of a run share it
        return task

    def refer(self, path=None, of=""):
        """Compute the reference, or read it from `path` if it is of the same pairs and weights."""
        if path and path.exists():
            with reading(path, "remove it; it is computed again"), np.load(path) as file:
                if str(file["of"]) == of:
                    self.reference = torch.from_numpy(file["logprobs"])
                    return
        self.reference = self.logprobs(range(len(self.pairs)))
        if path:
            with replacing(path) as part, open(part, "wb") as file:
                np.savez_compressed(file, of=of, logprobs=self.reference.numpy())

    @torch.no_grad()
    def logprobs(self, numbers):
        """Log-probabilities (P, 2, 3) of both answers of some pairs by kind, without gradient."""
        device, parts = self.model.lm_head.weight.device, []
        for start in range(0, len(numbers), self.rows):
            batch = self.collate(numbers[start : start + self.rows])
            batch = {key: value.to(device) for key, value in batch.items()}
            with autocast(device):
                parts.append(self.summed(batch).cpu())
        return torch.cat(parts)

    def batch(self, rng):
        chosen = rng.choice(self.train, min(self.rows, len(self.train)), replace=False)
        return {**self.collate(chosen), "reference": self.reference[chosen]}  # (P, 2, 3)

    def collate(self, numbers):
        """A batch as of `LanguageTask`, each answer in a row of its own: of pair p the chosen one
        in row 2p, the rejected one below it. Only answers have a weight."""
        rows = [
            (np.array([*self.pairs[n].prompt, *answer]), len(self.pairs[n].prompt))
            for n in numbers
            for answer in (self.pairs[n].chosen, self.pairs[n].rejected)
        ]
        batch = self.blank(len(rows), max(len(ids) for ids, _ in rows) - 1)
        for row, (ids, start) in enumerate(rows):
            self.put(batch, row, 0, ids, np.arange(len(ids)) >= start)  # the prompt is given
        return {key: torch.from_numpy(value) for key, value in batch.items()}

    def summed(self, batch):
        """Log-probabilities of answers (P, 2, 3), summed over the targets of each kind."""
        count = len(batch["input_ids"])
        sums = [torch.zeros(count, device=batch["weights"].device) for _ in range(3)]
        for kind, at, losses in self.losses(batch):
            sums[kind] = sums[kind].index_add(0, at.nonzero()[:, 0], -losses)
        return torch.stack(sums, -1).view(count // 2, 2, 3)

    def loss(self, batch, step):
        """Mean over pairs of the DPO loss, and with an anchor the SFT loss of chosen answers."""
        objective = OBJECTIVES[self.objective]
        logprobs, counted = self.summed(batch), list(objective.kinds)
        reference = batch["reference"][..., counted].sum(-1)
        losses, margin = dpo_loss(logprobs[..., counted].sum(-1), reference, self.beta)
        loss = losses.mean()
        logs = {"accuracy": (margin > 0).float().mean(), "margin": margin.detach().mean()}
        if objective.anchor:
            tokens = self.total(batch["weights"][::2])
            anchor = -logprobs[:, CHOSEN].sum() / tokens
            loss, logs["anchor"] = loss + objective.anchor * anchor, anchor.detach()
        return loss, logs

    def finish(self, seed):
        """What held-out pairs show: share preferred, margin in nats, and how far the chosen
        answers' audio has moved from the reference, in nats an answer."""
        after, before = self.logprobs(self.test), self.reference[self.test]
        counted = list(OBJECTIVES[self.objective].kinds)
        _, margin = dpo_loss(after[..., counted].sum(-1), before[..., counted].sum(-1), self.beta)
        moved = (after - before)[:, CHOSEN, [LINGUISTIC, SEMANTIC]].sum(-1)
        held_out = {
            "pairs": len(self.test), "preferred": round((margin > 0).float().mean().item(), 4),
            "margin": round(margin.mean().item(), 3), "audio": round(moved.mean().item(), 3),
        }  # fmt: skip
        return {"objective": self.objective, "beta": self.beta, "pairs": len(self.pairs),
                "held_out": held_out}  # fmt: skip
