"""The rules of an answer as they travel with a request to another engine, and are kept to there.

Before each draw of the engine's own sampler a Follower strikes out what the layout's machine
(aqaa.tokenizers.interleave) does not allow. Imports no torch and no engine."""

import json
from dataclasses import asdict, dataclass
from math import exp, log

from aqaa.config import IdsConfig
from aqaa.tokenizers import dialogue

KEY = "aqaa"  # of the rules among the extra arguments of a request


@dataclass(frozen=True)
class Rules:
    """What `generate` takes beside temperature and the like."""

    layout: object  # a dialogue.Layout or TextOnly
    ids: IdsConfig
    min_audio: int = 0
    said: int = 0  # ids at the end of the prompt that belong to the answer
    repetition: object = None  # a generation.Repetition

    @classmethod
    def of(cls, layout, ids, min_audio=0, repetition=None):
        """Rules of a layout, which may be a dialogue.Resumed one. Raises ValueError for others."""
        said = len(layout.said) if isinstance(layout, dialogue.Resumed) else 0
        layout = layout.layout if said else layout
        if not isinstance(layout, (dialogue.Layout, dialogue.TextOnly)):
            raise ValueError(f"a {type(layout).__name__} cannot be sent to an engine: "
                             "use a Layout or TextOnly.")
        return cls(layout, ids, min_audio, said, repetition)

    def to_json(self):
        """One string, which is all that an engine's request has room for."""
        rules = asdict(self)
        if isinstance(self.layout, dialogue.TextOnly):
            rules["layout"] = None
        return json.dumps(rules)

    @classmethod
    def from_json(cls, text):
        """The inverse. Raises ValueError for anything else."""
        try:
            given = json.loads(text)
            layout = given["layout"]
            layout = dialogue.TextOnly() if layout is None else dialogue.Layout(**layout)
            ids, repetition = IdsConfig(**given["ids"]), given["repetition"]
            if repetition is not None:
                from aqaa.backbone.generation import Repetition

                repetition = Repetition(**{**repetition, "kinds": tuple(repetition["kinds"])})
            return cls(layout, ids, int(given["min_audio"]), int(given["said"]), repetition)
        except (ValueError, TypeError, KeyError) as fault:
            raise ValueError(f"no rules of an answer ({fault}): "
                             "use the same aqaa here and at the server.") from None


class Follower:
    """One request of an engine: `read` its ids as they come, `mask` the logits of the next one."""

    def __init__(self, rules, n_prompt):
        self.rules, self.n_prompt = rules, n_prompt
        self.first = n_prompt - rules.said  # where the answer begins
        self.machine, self.ids = rules.layout.machine(rules.ids, rules.min_audio), []

    def read(self, tokens):
        """Take the ids that follow those read so far. One that breaks the rules ends the masks."""
        for token in tokens:
            if len(self.ids) >= self.first and self.machine is not None:
                try:
                    self.machine.advance(token)
                except ValueError:  # the client objects
                    self.machine = None
            self.ids.append(token)

    def mask(self, logits):
        """logits (V,), in place: -inf for what may not come. Left alone after the end."""
        if self.machine is None or self.machine.finished:
            return
        may, repetition = self.machine.allowed(), self.rules.repetition
        markers = list(may.markers)
        kept, marks = logits[may.start : may.stop].clone(), logits[markers].clone()
        logits.fill_(float("-inf"))
        logits[may.start : may.stop] = kept
        logits[markers] = marks
        if repetition and len(kept) + len(markers) > 1:  # the only id left is never banned
            if (banned := repetition.banned(self.ids, may)) is not None:
                logits[banned] = float("-inf")


def among_legal(may, logprob, likeliest):
    """The log-probability of an id among those that may come, from {id: logprob} of the likeliest.

    A model that only ever chose among legal ids (the mini) has any probability on the others. What
    is not listed counts as legal in the share in which the less likely half of the list is."""
    probs = sorted(((exp(value), may.start <= other < may.stop or other in may.markers)
                    for other, value in likeliest.items()), reverse=True)  # fmt: skip
    tail = probs[(len(probs) + 1) // 2 :]
    rest, seen = max(0.0, 1.0 - sum(prob for prob, _ in probs)), sum(prob for prob, _ in tail)
    share = sum(prob for prob, fits in tail if fits) / seen if seen else 1.0
    legal = sum(prob for prob, fits in probs if fits) + rest * share
    return min(0.0, logprob - log(max(legal, exp(logprob))))
