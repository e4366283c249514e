"""A blind listening test."""
import numpy as np

from aqaa.config import SAMPLE_RATE
from aqaa.evaluation.mos import opinions
from aqaa.notebook import show
from aqaa.notebook.base import Widget, pcm16
from aqaa.notebook.figures import array


class Listening(Widget):
    """A listening test: every sound gets a mark from 1 (bad) to 5 (excellent), in a random order and without its name.

    pairs: (name, wav) or (name, wav, transcript), wav (N,) at `rate` Hz; sounds of one system share its name. Each
    submission of the form is one listener; `rate_all` does the same without a page.
    """

    script = "listening"

    def __init__(self, pairs, interactive=False, rate=SAMPLE_RATE, seed=0):
        self.pairs = [(str(pair[0]), array(pair[1], 1, "a sound"), pair[2] if len(pair) > 2 else "") for pair in pairs]
        if not self.pairs:
            raise ValueError("a listening test needs sounds: pass pairs (name, wav).")
        self.rate, self.marks, self._shuffle = rate, [], np.random.default_rng(seed)
        super().__init__(interactive, done=False, results=[], order=self._order())
        if interactive:
            sounds = [pcm16(pair[1]) for pair in self.pairs]
            self._open(sounds=sounds, rate=rate, transcripts=[pair[2] for pair in self.pairs])

    def _order(self):
        return self._shuffle.permutation(len(self.pairs)).tolist()

    @property
    def names(self):
        """The names behind the sounds, in the order of the form: for after the marks are given."""
        return [self.pairs[which][0] for which in self._state["order"]]

    def rate_all(self, marks):
        """One listener's marks, one for each pair in the order of `pairs`. Raises ValueError unless all are 1 to 5."""
        if len(marks) != len(self.pairs) or not all(mark in (1, 2, 3, 4, 5) for mark in marks):
            raise ValueError(f"a listener gives {len(self.pairs)} marks from 1 to 5, not {list(marks)}.")
        self.marks.append([int(mark) for mark in marks])
        return self.result()

    def result(self):
        """{name: {"n", "mean", "low", "high"}}: mean opinion score and its 95 % interval, and "all" over several names.

        low and high are None for a single mark, and never leave the scale. Empty before the first listener.
        """
        marks = {}
        for row in self.marks:
            for (name, *_), mark in zip(self.pairs, row):
                marks.setdefault(name, []).append(mark)
        return opinions(marks)

    def _on_submit(self, message, _):
        scores = dict(zip(self._state["order"], message["scores"]))
        result = self.rate_all([scores[k] for k in range(len(self.pairs))])
        listeners = f"{len(self.marks)} listener{'s' * (len(self.marks) > 1)}"
        self._set(
            done=True,
            results=[{"title": name, **row} for name, row in result.items()],
            message=f"Thank you. {listeners} so far; result() has these numbers in the next cell.",
        )

    def _on_again(self, *_):
        self._set(done=False, order=self._order(), message="")

    def __repr__(self):
        return f"<listening test: {len(self.pairs)} sounds, {len(self.marks)} listeners>"

    def _static(self):
        shuffled = [self.pairs[which] for which in self._state["order"]]
        sounds = show.compare(*((f"Sound {k + 1}", *pair[1:]) for k, pair in enumerate(shuffled)), rate=self.rate)
        if not self.marks:
            return [
                sounds,
                show.table(
                    [["1 bad", "2 poor", "3 fair", "4 good", "5 excellent"]],
                    caption="How natural does each sound seem?",
                ),
            ]
        rows = [[name, *(value if isinstance(value, int) else "–" if value is None else f"{value:.2f}"
                         for value in row.values())] for name, row in self.result().items()]  # fmt: skip
        return [
            sounds,
            show.table(
                rows, ["sound", "marks", "mean", "from", "to"], "Mean opinion score with its 95 % confidence interval"
            ),
        ]
