"""The planner: choose GPUs, a weight format and a context; see what fits, and how fast it talks.

Every number is a sum of aqaa/scale/plan.py, or was measured in a recorded run."""

from aqaa.backbone.memory import BITS
from aqaa.config import TOKENS_PER_SECOND
from aqaa.files import data_folder
from aqaa.notebook import show
from aqaa.notebook.base import Widget
from aqaa.notebook.figures import LINES, canvas, picture, styled
from aqaa.scale.plan import GPUS, INTERLEAVE_RATE, RANKS
from aqaa.scale.plan_table import check, plans, read_model, setups, what_would_fit

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)  # ids
PARTS = {  # of Plan.memory: words, colour (black print is readable on each), hatching where static
    "weights": ("weights", LINES[5], ""), "embedding": ("embedding", LINES[4], "///"),
    "cache": ("KV cache", "#2AA983", ""), "buffers": ("prefill buffers", LINES[3], "xxx"),
    "speech": ("tokenizers, vocoder", "#F0E442", ""),
    "reserved": ("driver, graphs", "#D0D0D0", "..."),
}  # fmt: skip
SHOWN = ("bf16", "fp8", "int4")  # in the static view; int8 weighs what fp8 does
COLUMNS = ("First sound: s after a question of 3 s. Wait: s from the first id on, for an answer so "
           "long never to stall. Where no rate was measured both are at best.")  # fmt: skip
RATES = {"audio alone": TOKENS_PER_SECOND, "text and audio": INTERLEAVE_RATE}  # tokens/s of speech


class Planner(Widget):
    """Choose GPUs, weight format and context; see memory by part, the rate, and the first sound.
    model: 130b, 3b, mini or a folder, as of `aqaa plan`; gpus, weights, context: what is chosen at
    first, as in `plan`. chosen: the Plan that is shown. The static view compares the usual GPUs."""

    script = "planner"

    def __init__(self, model="130b", interactive=False, gpus="1xH200", weights="int4",
                 context=2048):  # fmt: skip
        super().__init__(interactive)
        self.model = model
        self.plan(gpus, weights, context)
        if interactive:
            longest = read_model(model)[1].max_seq_len
            contexts = sorted({context, *(n for n in CONTEXTS if n <= longest)})
            parts, shown = [[name, *look[:2]] for name, look in PARTS.items()], self.chosen.setup
            self._open(model=shown.model, gpus=list(GPUS), counts=list(RANKS), parts=parts,
                       formats=list(BITS), rates=RATES, note=reliance(), contexts=contexts)

    def plan(self, gpus="1xH200", weights="int4", context=2048):
        """The Plan of GPUs ("4xH100-80"), a format and a context in ids, which the page then shows.
        Raises ValueError for what cannot be; what was shown then stays."""
        (setup,) = setups(self.model, [gpus], weights, context=context)
        (self.chosen,) = plans([setup], data_folder() / "runs")
        shown = {**self.chosen.to_dict(), "format": setup.format, "card": setup.gpu.memory}
        chosen = {"gpu": setup.gpu.name, "count": setup.count, "weights": weights,
                  "context": context}  # fmt: skip
        self._set(chosen=chosen, plan=shown, message=in_words(self.chosen))
        return self.chosen

    def _on_set(self, message, _):
        new = {name: message.get(name, value) for name, value in self._state["chosen"].items()}
        self.plan(f"{int(new['count'])}x{new['gpu']}", new["weights"], int(new["context"]))

    def __repr__(self):
        setup = self.chosen.setup
        return (f"<planner: {setup.model} {setup.format} on {setup.gpus}, {setup.context} ids, "
                f"{_filled(self.chosen)}>")  # fmt: skip

    def _static(self):
        setup = self.chosen.setup
        asked = setups(self.model, context=setup.context)
        asked = [one for one in asked if one.weights in SHOWN]
        planned = plans(asked, data_folder() / "runs")
        title = f"{setup.model}, {setup.context} ids of context, one listener"
        table = show.table(map(_row, planned), caption=f"{title}. {reliance()} {COLUMNS}")
        return [show.table([[self._state["message"]]], ["Chosen"]), compared(planned, title), table]


def reliance():
    """The evidence for the rates of a Plan, in words."""
    rows = check(data_folder() / "runs")
    shares = [row["share"] for row in rows if "tokens" in row["what"]]
    runs = "no run is recorded"
    if shares:
        files = ", ".join(sorted({row["file"] for row in rows}))
        runs = f"recorded runs reached {min(shares)} to {max(shares)} of them ({files})"
    return ("At most: by bytes and bandwidth, or by the instructions of our kernels. These are "
            f"ceilings, not estimates: {runs}.")  # fmt: skip


def _filled(plan):
    return f"{plan.total:.1f} of {plan.setup.gpu.memory:.1f} GiB a card"


def in_words(plan):
    """A Plan in a few sentences."""
    setup, wait = plan.setup, plan.delay[10]
    if not plan.fits:
        return what_would_fit(setup)
    if plan.interleave:
        verdict = "enough for text and audio together, so the first block is all the waiting"
    elif plan.steady:
        verdict = ("enough for audio, and an answer of 10 s never stalls if it waits for "
                   f"{wait:.2f} s")  # fmt: skip
    elif plan.steady is None:
        needed = "text and audio together" if plan.interleave is None else "audio"
        verdict = f"{needed} would keep up at the ceiling"
    else:
        verdict = (f"less than audio uses up: an answer of 10 s must wait for {wait:.1f} s, "
                   "longer ones more")  # fmt: skip
    return (f"{setup.format} on {setup.gpus} with {setup.context} ids: {_filled(plan)}; at most "
            f"{plan.ceiling:.0f} tokens a second, {_rate(plan)}: {verdict}.")


def _rate(plan):
    return "not measured" if plan.rate is None else f"measured {plan.rate:.0f}"


def _row(plan):
    setup = plan.setup
    cells = {"GPUs": setup.gpus, "weights": setup.format, "GiB": f"{plan.total:.1f}",
             "ms, least": f"{1000 * plan.floor:.1f}", "tokens/s, most": f"{plan.ceiling:.0f}",
             "measured": "no" if plan.rate is None else f"{plan.rate:.0f}",
             "first sound": f"{plan.first_sound[3]:.2f}", "enough for": _enough(plan),
             **{f"wait {n} s": f"{delay:.2f}" for n, delay in plan.delay.items()}}  # fmt: skip
    if not plan.fits:
        cells |= dict.fromkeys(list(cells)[3:], "–") | {"measured": "does not fit"}
    return cells


def _enough(plan):
    for words, able in (("text too", plan.interleave), ("audio", plan.steady)):
        if able is not False:
            return words if able else f"{words}, at most"
    return "neither"


@styled
def compared(plans, title="", alt=""):
    """Memory of one card by part beside its size, and the rates, of several Plans: a row each."""
    height, ratios = 1.1 + 0.22 * len(plans), {"width_ratios": (1.2, 1)}
    figure, (memory, rates) = canvas(height, 1, 2, sharey=True, gridspec_kw=ratios)
    rows, left = range(len(plans)), [0.0] * len(plans)
    for name, (words, colour, hatch) in PARTS.items():
        sizes = [plan.memory[name] for plan in plans]
        memory.barh(rows, sizes, 0.7, left, color=colour, hatch=hatch, edgecolor="0.3",
                    linewidth=0.4, label=words)  # fmt: skip
        left = [a + b for a, b in zip(left, sizes)]
    cards = [plan.setup.gpu.memory for plan in plans]
    memory.plot(cards, rows, "k|", ms=9, mew=2.5, label="the card")
    memory.set_yticks(rows, [f"{plan.setup.gpus} {plan.setup.format}" for plan in plans])
    memory.invert_yaxis()
    memory.set_xlabel("memory of one card (GiB)")
    fits = [row for row in rows if plans[row].fits]
    for row in set(rows) - set(fits):
        rates.text(11, row, "does not fit", fontsize=8, va="center", color=LINES[1])
    ceiling, known = [plans[row].ceiling for row in fits], [r for r in fits if plans[r].rate]
    rates.hlines(fits, 10, ceiling, color="0.85", linewidth=1.2, zorder=1)
    rates.plot(ceiling, fits, "|", color=LINES[0], ms=9, mew=2, label="at most")
    rate = [plans[row].rate for row in known]
    rates.plot(rate, known, "o", color=LINES[1], mfc="w", label="measured")
    for (words, needed), dash in zip(RATES.items(), ("--", ":")):
        label = f"{words} {needed:.4g}"
        rates.axvline(needed, color="k", linestyle=dash, linewidth=1.2, label=label)
    most = max([800, *ceiling])
    rates.set(xscale="log", xlabel="tokens a second", xlim=(10, most))
    steps = (1, 2, 5) if most < 1000 else (1,)
    ticks = [step * 10**k for k in range(1, 7) for step in steps if step * 10**k <= most]
    rates.set_xticks(ticks, map(str, ticks))
    rates.tick_params(axis="y", length=0)
    for axis, columns in ((memory, 3), (rates, 2)):
        axis.grid(axis="x", color="0.9")
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncol=columns, fontsize=8)
    gpus = ", ".join(dict.fromkeys(plan.setup.gpus for plan in plans))
    words = ("memory of one card by part beside its size, and tokens a second at most and as "
             f"measured, for {gpus}")  # fmt: skip
    return picture(figure, alt or words, title)
