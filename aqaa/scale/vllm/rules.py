"""The rules of an answer as they travel with a request to another engine, and how they are kept to there.

The engine's own sampler draws the ids; before each draw a Follower strikes out what the layout's machine
(aqaa.tokenizers.interleave) does not allow. No torch and no engine is imported here: a mask is three assignments to a
row of scores, whoever made them.
"""

import json
from dataclasses import asdict, dataclass

from aqaa.config import IdsConfig
from aqaa.tokenizers import dialogue

KEY = "aqaa"  # of the rules among the extra arguments of a request


@dataclass(frozen=True)
class Rules:
    """What `generate` is told beside temperature and the like. said: how many of the prompt's last ids are answer."""

    layout: object  # an dialogue.Layout or TextOnly
    ids: IdsConfig
    min_audio: int = 0
    said: int = 0
    repetition: object = None  # a generation.Repetition

    @classmethod
    def of(cls, layout, ids, min_audio=0, repetition=None):
        """Rules of a layout, which may be an dialogue.Resumed one. Raises ValueError for a layout of one's own."""
        said = len(layout.said) if isinstance(layout, dialogue.Resumed) else 0
        layout = layout.layout if said else layout
        if not isinstance(layout, (dialogue.Layout, dialogue.TextOnly)):
            raise ValueError(f"a {type(layout).__name__} cannot be sent to an engine: use a Layout or TextOnly.")
        return cls(layout, ids, min_audio, said, repetition)

    def to_json(self):
        """One string, which is all that an engine's request has room for."""
        layout = None if isinstance(self.layout, dialogue.TextOnly) else asdict(self.layout)
        repetition = self.repetition and asdict(self.repetition)
        return json.dumps({"layout": layout, "ids": asdict(self.ids), "min_audio": self.min_audio, "said": self.said,
                           "repetition": repetition})

    @classmethod
    def from_json(cls, text):
        """The inverse. Raises ValueError for anything else."""
        try:
            given = json.loads(text)
            layout = given["layout"]
            layout = dialogue.TextOnly() if layout is None else dialogue.Layout(**layout)
            return cls(layout, IdsConfig(**given["ids"]), int(given["min_audio"]), int(given["said"]),
                       _repetition(given["repetition"]))
        except (ValueError, TypeError, KeyError) as fault:
            raise ValueError(f"no rules of an answer ({fault}): use the same aqaa here and at the server.") from None


def _repetition(given):
    if given is None:
        return None
    from aqaa.backbone.generation import Repetition

    return Repetition(**{**given, "kinds": tuple(given["kinds"])})


class Follower:
    """One request of an engine: `read` its ids as they become known, `mask` the scores of the next one."""

    def __init__(self, rules, n_prompt):
        self.rules, self.n_prompt = rules, n_prompt
        self.first = n_prompt - rules.said  # where the answer begins
        self.machine, self.ids = rules.layout.machine(rules.ids, rules.min_audio), []

    def read(self, tokens):
        """Take the ids that follow those read so far. One that breaks the rules ends them: the client will object."""
        for token in tokens:
            if len(self.ids) >= self.first and self.machine is not None:
                try:
                    self.machine.advance(token)
                except ValueError:
                    self.machine = None
            self.ids.append(token)

    def mask(self, row):
        """row (V,), a tensor of scores, in place: -inf for what may not come. Left alone after the end."""
        if self.machine is None or self.machine.finished:
            return
        may, repetition = self.machine.allowed(), self.rules.repetition
        markers = list(may.markers)
        kept, marks = row[may.start : may.stop].clone(), row[markers].clone()
        row.fill_(float("-inf"))
        row[may.start : may.stop], row[markers] = kept, marks
        banned = repetition.banned(self.ids, may) if repetition and len(kept) + len(markers) > 1 else None
        if banned is not None:
            row[banned] = float("-inf")
