"""A blind listening test."""

import numpy as np

from aqaa.config import SAMPLE_RATE
from aqaa.evaluation.mos import interval
from aqaa.notebook import show
from aqaa.notebook.base import Widget, pcm16
from aqaa.notebook.figures import array


class Listening(Widget):
    """A listening test: each sound gets a mark from 1 (bad) to 5 (excellent), without its name.

    pairs: (name, wav) or (name, wav, transcript), wav (N,) at `rate` Hz; sounds of one system share
    its name; their order is random. Each submission of the form is one listener; `rate_all` does
    the same without a page.
    """

    script = "listening"

    def __init__(self, pairs, interactive=False, rate=SAMPLE_RATE, seed=0):
        triples = ((*pair, "")[:3] for pair in pairs)
        self.pairs = [(str(name), array(wav, 1, "a sound"), words) for name, wav, words in triples]
        if not self.pairs:
            raise ValueError("a listening test needs sounds: pass pairs (name, wav).")
        self.rate, self.marks, self._shuffle = rate, [], np.random.default_rng(seed)
        super().__init__(interactive, done=False, results=[], order=self._order())
        if interactive:
            sounds = [pcm16(pair[1]) for pair in self.pairs]
            self._open(sounds=sounds, rate=rate, transcripts=[pair[2] for pair in self.pairs])

    @classmethod
    def of_runs(cls, places, each=10, **options):
        """A test of runs of `aqaa eval` (JSONL files, or folders of ID.wav) and of a robot."""
        from aqaa.evaluation import mos_form  # here: no other widget needs what it imports

        return cls([(system, wav) for system, _, wav in mos_form.trials(places, each)], **options)

    def _order(self):
        return self._shuffle.permutation(len(self.pairs)).tolist()

    @property
    def names(self):
        """The names behind the sounds, in the order of the form: for after the marks are given."""
        return [self.pairs[which][0] for which in self._state["order"]]

    def rate_all(self, marks):
        """One listener's marks in the order of `pairs`. Raises ValueError unless all are 1 to 5."""
        if len(marks) != len(self.pairs) or not all(mark in (1, 2, 3, 4, 5) for mark in marks):
            raise ValueError(f"a listener gives {len(self.pairs)} marks from 1 to 5, not "
                             f"{list(marks)}.")
        self.marks.append([int(mark) for mark in marks])
        return self.result()

    def result(self):
        """{name: {"n", "mean", "low", "high"}}, with "all" of several names: mean opinion score and
        its 95 % interval, None for a single mark. Empty before the first listener."""
        marks = {}
        for row in self.marks:
            for (name, *_), mark in zip(self.pairs, row):
                marks.setdefault(name, []).append(mark)
        if len(marks) > 1:
            marks["all"] = [mark for row in marks.values() for mark in row]
        result = {}
        for name, row in marks.items():
            mean, low, high = interval(row)
            result[name] = {"n": len(row), "mean": mean, "low": low, "high": high}
        return result

    def _on_submit(self, message, _):
        scores = dict(zip(self._state["order"], message["scores"]))
        result = self.rate_all([scores[k] for k in range(len(self.pairs))])
        listeners = f"{len(self.marks)} listener{'s' * (len(self.marks) > 1)}"
        results = [{"title": name, **row} for name, row in result.items()]
        message = f"Thank you. {listeners} so far; result() has these numbers in the next cell."
        self._set(done=True, results=results, message=message)

    def _on_again(self, *_):
        self._set(done=False, order=self._order(), message="")

    def __repr__(self):
        return f"<listening test: {len(self.pairs)} sounds, {len(self.marks)} listeners>"

    def _static(self):
        pairs = [self.pairs[which] for which in self._state["order"]]
        named = [(f"Sound {number}", *pair[1:]) for number, pair in enumerate(pairs, 1)]
        marks = show.table([["1 bad", "2 poor", "3 fair", "4 good", "5 excellent"]],
                           caption="How natural does each sound seem?")  # fmt: skip
        if self.marks:
            rows = [[name, n, *("–" if value is None else f"{value:.2f}" for value in interval)]
                    for name, n, *interval in
                    ([name, *row.values()] for name, row in self.result().items())]  # fmt: skip
            marks = show.table(rows, ["sound", "marks", "mean", "from", "to"],
                               "Mean opinion score with its 95 % confidence interval")  # fmt: skip
        return [show.compare(*named, rate=self.rate), marks]
