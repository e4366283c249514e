"""Training of SpeechGPT (2305.11000): three stages of one model, each from the one before it, and
the completer. `compare` measures what the chain of modality is worth."""

import numpy as np
import torch
import torch.nn.functional as F

from aqaa.config import GROUP_SIZE, LINGUISTIC_PER_GROUP, SEMANTIC_PER_GROUP
from aqaa.corpus.plan import held_out, spread
from aqaa.evaluation.stepeval import wilson
from aqaa.files import write_json
from aqaa.lineage.speechgpt import INSTRUCTIONS, Completer
from aqaa.lineage.units import UNITS, layout, prompt, sound
from aqaa.training import judged
from aqaa.training.lineage.steps import StepsTask, begin, book, left_by
from aqaa.training.stages import Stage
from aqaa.weights.model_folder import build

TASK = "aqaa.training.lineage.speechgpt:SpeechTask"
STAGES = (
    Stage("adapt", "modality adaptation: units, continued", TASK, 120, "backbone",
          mixture={"next": 1.0}, floor=0.3),
    Stage("tune", "cross-modal instruction tuning: units and words", TASK, 300, "backbone", "adapt",
          mixture={"asr": 0.55, "tts": 0.35, "text": 0.10}, floor=0.3),
    Stage("chain", "chain of modality: units, words, words, units", TASK, 600, "backbone", "tune",
          mixture={"chain": 0.35, "direct": 0.35, "speak": 0.20, "tts": 0.10}),
    Stage("completer", "linguistic codes of semantic ones, for the vocoder",
          "aqaa.training.lineage.speechgpt:CompleterTask", 800, "completer"),
)  # fmt: skip


class SpeechTask(StepsTask):
    """A stage of the language model: units and words, each task in one of its wordings."""

    @classmethod
    def from_run(cls, run, stage):
        task = cls(book(run), stage.mixture, INSTRUCTIONS, UNITS, floor=stage.floor,
                   **stage.settings)  # fmt: skip
        begin(run, stage, task.model)
        return task


class CompleterTask:
    """Cross-entropy of the linguistic codes of the answer voice, given its semantic ones.

    book: its voiced utterances teach, held-out answers aside; a batch has `rows` pieces of `groups`
    groups at most, padding has no weight."""

    lr, warmup = 2e-3, 0.02

    def __init__(self, book, rows=48, groups=32):
        self.ids, self.rows, self.groups = book.config.ids, rows, groups
        self.model = Completer(self.ids)
        self.modules = {"model": self.model}
        sizes = LINGUISTIC_PER_GROUP, SEMANTIC_PER_GROUP
        starts = np.repeat([self.ids.n_text, self.ids.semantic_start], sizes)
        codes = {i: book.audio[i].reshape(-1, GROUP_SIZE) - starts for i in book.voiced}
        kept = {i for i in book.voiced if held_out(book.items[i])}
        self.train = [codes[i] for i in book.voiced if i not in kept] or list(codes.values())
        self.test = [codes[i] for i in sorted(kept)]

    @classmethod
    def from_run(cls, run, stage):
        return cls(book(run), **stage.settings)

    def batch(self, rng):
        codes = np.zeros((self.rows, self.groups, GROUP_SIZE), np.int64)
        known = np.zeros((self.rows, self.groups), bool)
        for row in range(self.rows):
            one = self.train[rng.integers(len(self.train))]
            first = rng.integers(max(len(one) - self.groups, 0) + 1)
            one = one[first : first + self.groups]
            codes[row, : len(one)], known[row, : len(one)] = one, True
        return {"codes": torch.from_numpy(codes), "known": torch.from_numpy(known)}

    def loss(self, batch, step):
        sizes = LINGUISTIC_PER_GROUP, SEMANTIC_PER_GROUP
        linguistic, semantic = batch["codes"].split(sizes, -1)
        logits, right = self.model(semantic)[batch["known"]].float(), linguistic[batch["known"]]
        loss = F.cross_entropy(logits.flatten(0, 1), right.flatten())
        return loss, {"right": (logits.argmax(-1) == right).float().mean()}

    @torch.no_grad()
    def finish(self, seed):
        """The share of right codes in answers that nothing learns from."""
        self.model.eval()
        right = [self.model(torch.from_numpy(one[None, :, 2:])).argmax(-1)[0].numpy() == one[:, :2]
                 for one in self.test]  # fmt: skip
        share = float(np.mean(np.concatenate(right))) if right else None
        return {"held_out_right": share and round(share, 4), "held_out": len(right)}


def compare(run, tasks=("chain", "speak", "direct"), *, questions=120, seed=0):
    """How the model answers spoken questions of the development split by its whole chain, by its
    words alone, and at once: [{"task", "right", "sound", "heard"}, …], shares of texts that are
    right and of sounds in which pocketsphinx hears the right words, as of `stepeval.wilson`; also
    in compare.json of the run."""
    model = left_by(run, "chain", build("backbone", run.config))
    completer = left_by(run, "completer", Completer(run.config.ids))
    asked, ids, rows = book(run, dev=True), run.config.ids, []
    chosen = spread(asked.questions, questions)
    for task in tasks:
        steps = layout(task, UNITS)
        prompts = [prompt(INSTRUCTIONS[task][0], sound(asked.audio[i], UNITS, ids),
                          asked.tokenizer, ids) for i in chosen]  # fmt: skip
        answers = judged.answers(model, asked, chosen, steps, asked=prompts, seed=seed,
                                 temperature=0.3, top_p=0.9)  # fmt: skip
        for one in answers:
            one.audio = completer.complete(steps.split(one.ids, ids)[1])
        judged.listen(run.model(model), asked, answers, run.workers, seed)
        found = {name: [getattr(one, name) for one in answers] for name in ("right", "sound")}
        shares = {name: wilson(sum(each), len(each)) for name, each in found.items()}
        rows.append({"task": task, **shares, "heard": [one.heard for one in answers]})
        write_json(run.out / "compare.json", {"rows": rows})
    return rows
