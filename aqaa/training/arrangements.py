"""Other ways to put an answer into one sequence, for the ablations: pieces joined without markers
(AQAA paper, Table 2), and one of the two codebooks alone (paper 2.1)."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from aqaa.tokenizers.dialogue import EVERY_LAYOUT, Allowed, Layout, Machine
from aqaa.tokenizers.text import MANNERS
from aqaa.training.examples import Examples
from aqaa.training.objectives import LINGUISTIC, SEMANTIC, LanguageTask

BOTH = EVERY_LAYOUT["ratio_10_15"]
MARKED = replace(BOTH, name="marker_preserving", marked=True)


@dataclass(frozen=True)
class Chained(Layout):
    """Pieces that were interleaved one by one, then joined: nothing marks their border but the tag
    of a manner, which only here may follow sound. starts: ids of these tags."""

    starts: tuple = ()

    def machine(self, ids, min_audio=0):
        return ChainedMachine(self, ids, min_audio)


class ChainedMachine(Machine):
    """A Machine for which another piece may begin where an answer may end."""

    def allowed(self):
        may = super().allowed()
        if self.ids.eot not in may.markers:
            return may
        return may._replace(markers=(*may.markers, *self.layout.starts))

    def _advance_marker(self, token):
        if token in self.layout.starts:  # the first text id of the next piece
            self._begin_piece()
            self.text_used = 1
        else:
            super()._advance_marker(token)


def chained(ids):
    """Pre-interleaved concatenation; the other two of Table 2 are marked Layouts and unmarked ones.
    ids: IdsConfig."""
    starts = tuple(range(ids.first_text, ids.first_text + len(MANNERS)))
    return Chained("pre_interleaved", 10, 15, starts=starts)


@dataclass(frozen=True)
class OneCodebook:
    """The layout 10 : 15 without the ids of one codebook. kept: "linguistic" or "semantic"."""

    kept: str

    @property
    def name(self):
        return f"{self.kept} alone"

    @property
    def dropped(self):
        return "linguistic" if self.kept == "semantic" else "semantic"

    def keeps(self, tokens, ids):
        """(N,) bool: which of the ids (N,) stay."""
        border = np.asarray(tokens) >= ids.semantic_start
        audio = np.asarray(tokens) >= ids.n_text
        return ~(audio & (border != (self.kept == "semantic")))

    def only(self, tokens, ids):
        """The ids that stay, a list."""
        return np.asarray(tokens)[self.keeps(tokens, ids)].tolist()

    def arrange_pieces(self, pieces, ids):
        return BOTH.arrange_pieces(pieces, ids)  # whole: `OneExamples` drops last

    def parse(self, tokens, ids):
        return BOTH.parse(tokens, ids)

    def machine(self, ids, min_audio=0):
        return OneMachine(self, ids, min_audio)


class OneMachine:
    """Follows the layout of both codebooks and puts in what is dropped: its place, not its value,
    is what the machine of both needs."""

    def __init__(self, layout, ids, min_audio):
        self.layout, self.ids = layout, ids
        self.both = BOTH.machine(ids, min_audio)

    @property
    def finished(self):
        return self.both.finished

    def allowed(self):
        """Allowed; where both would begin a group or end, so may the one that is kept."""
        may = self.both.allowed()
        if may.kind != self.layout.dropped:
            return may
        if self.layout.kept == "linguistic":
            self._skip()
            return self.both.allowed()
        return Allowed("semantic", self.ids.semantic_start, self.ids.end, may.markers)

    def _skip(self):
        """Put in ids of the codebook that is dropped, as long as one is due."""
        while (may := self.both.allowed()).kind == self.layout.dropped:
            self.both.advance(may.start)

    def advance(self, token):
        may = self.both.allowed()
        if may.kind == self.layout.dropped and token not in may.markers:
            self._skip()
        self.both.advance(token)


class AnyLayout(Examples):
    """Examples in every layout, one as often as the other."""

    def draw(self, rng):
        layouts = (*EVERY_LAYOUT.values(), MARKED)
        self.layout = layouts[rng.integers(len(layouts))]
        return super().draw(rng)


class EveryLayout(LanguageTask):
    """Language training in which no layout has an advantage."""

    kind = AnyLayout


class Fresh(LanguageTask):
    """Language training from nothing but the codebooks, whatever a run starts from."""

    @classmethod
    def from_run(cls, run, stage):
        settings = {"floor": stage.floor, **stage.settings}
        if isinstance(settings.get("layout"), OneCodebook):
            cls = OneCodebookTask
        task = cls(run.book(), stage.mixture, **settings)
        task.hear_alike(*run.codebooks())
        return task


class OneExamples(Examples):
    """Examples without the ids of the codebook that the layout drops."""

    def draw(self, rng):
        ids, weights = super().draw(rng)
        stay = self.layout.keeps(ids, self.ids)
        return ids[stay], weights[stay]


class OneCodebookTask(Fresh):
    """The same of one codebook: examples lose the ids of the other one."""

    kind = OneExamples

    @property
    def ends_semantic(self):
        """Whether sound ends beside semantic ids, as linguistic ones are not there."""
        return self.examples.layout.kept == "semantic"

    def kinds(self, ids):
        kinds = super().kinds(ids)
        return np.where(kinds == LINGUISTIC, SEMANTIC, kinds) if self.ends_semantic else kinds

    def head_rows(self):
        rows = super().head_rows()
        if self.ends_semantic:
            rows[SEMANTIC] = torch.cat([rows[SEMANTIC], self.markers])
        return rows

    def columns(self, targets, kind):
        if not self.ends_semantic or kind != SEMANTIC:
            return super().columns(targets, kind)
        place = torch.searchsorted(self.markers.to(targets.device), targets)
        last = self.ids.n_semantic + place
        return torch.where(targets < self.ids.n_text, last, targets - self.ids.semantic_start)


def surprise(backbone, book, layout, count=200):
    """{"nats_linguistic", "nats_semantic"}: mean nats of a code, as the backbone foresees it from
    those before it, in utterances of a book; e to that power is the perplexity."""
    kind = OneCodebookTask if isinstance(layout, OneCodebook) else LanguageTask
    task = kind(book, {"next": 1.0}, layout=layout, heard=0.0)
    task.model.load_state_dict(backbone.state_dict())
    sums = {LINGUISTIC: [], SEMANTIC: []}
    for index in book.questions[:count]:
        ids = np.concatenate([[book.config.ids.bos], book.audio[index]])
        if kind is OneCodebookTask:
            ids = ids[layout.keeps(ids, book.config.ids)]
        batch = task.blank(1, len(ids) - 1)
        task.put(batch, 0, 0, ids, np.ones(len(ids)))
        batch = {key: torch.from_numpy(value) for key, value in batch.items()}
        with torch.no_grad():
            for one, _, losses in task.losses(batch):
                if one in sums:
                    sums[one] += losses.tolist()
    names = {LINGUISTIC: "nats_linguistic", SEMANTIC: "nats_semantic"}
    return {names[one]: round(float(np.mean(row)), 4) for one, row in sums.items() if row}
