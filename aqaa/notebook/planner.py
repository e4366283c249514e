"""The planner: choose GPUs, a weight format and a context; see what fits, and how soon and how fast it could talk.

Every number is a sum of aqaa/scale/plan.py, which says what in it is arithmetic and what an assumption.
"""

from aqaa.backbone.memory import BITS
from aqaa.config import TOKENS_PER_SECOND
from aqaa.files import data_folder
from aqaa.notebook import show
from aqaa.notebook.base import Widget
from aqaa.notebook.figures import LINES, canvas, picture, styled
from aqaa.scale.plan import ALL_REDUCE, GPUS, INTERLEAVE_RATE, plan
from aqaa.scale.plan_table import check, read_model, setups, what_would_fit

CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)  # ids
PARTS = {  # of Plan.memory: words, colour (black print is readable on each), and hatching where only shown
    "weights": ("weights", LINES[5], ""), "embedding": ("embedding", LINES[4], "///"),
    "cache": ("KV cache", "#2AA983", ""), "buffers": ("prefill buffers", LINES[3], "xxx"),
    "speech": ("tokenizers, vocoder", "#F0E442", ""), "reserved": ("driver, graphs", "#D0D0D0", "..."),
}  # fmt: skip
SHOWN = ("bf16", "fp8", "int4")  # in the static view; int8 weighs what fp8 does
COLUMNS = "First sound: s after a question of 3 s. Wait: s from the first id on, for an answer so long never to stall."
RATES = {"audio alone": TOKENS_PER_SECOND, "text and audio": INTERLEAVE_RATE}  # tokens/s that speech uses up


class Planner(Widget):
    """Choose GPUs, weight format and context; see memory by part, the rate, and when speech could begin.

    model: 130b, 3b, mini or a folder, as of `aqaa plan`; gpus, weights, context: what is chosen at first, as in `plan`.
    found: the aqaa.scale.plan.Plan that is shown. The static view compares the usual GPUs.
    """

    script = "planner"

    def __init__(self, model="130b", interactive=False, gpus="1xH200", weights="int4", context=2048):
        super().__init__(interactive)
        self.model = model
        self.plan(gpus, weights, context)
        if interactive:
            longest = read_model(model)[1].max_seq_len
            self._open(
                model=self.found.setup.model,
                gpus=list(GPUS),
                counts=list(ALL_REDUCE),
                formats=list(BITS),
                contexts=sorted({context, *(n for n in CONTEXTS if n <= longest)}),
                parts=[[name, *looks[:2]] for name, looks in PARTS.items()],
                rates=RATES,
                note=reliance(),
            )

    def plan(self, gpus="1xH200", weights="int4", context=2048):
        """The Plan of GPUs ("4xH100-80"), a format and a context in ids; what the page shows from now on.

        Raises ValueError for what cannot be; what was shown then stays.
        """
        (setup,) = setups(self.model, [gpus], weights, context=context)
        self.found = plan(setup)
        chosen = {"gpu": setup.gpu.name, "count": setup.count, "weights": weights, "context": context}
        card = {"format": setup.format, "card": setup.gpu.memory}
        self._set(chosen=chosen, plan={**self.found.to_dict(), **card}, message=in_words(self.found))
        return self.found

    def _on_set(self, message, _):
        new = {**self._state["chosen"], **{name: message[name] for name in self._state["chosen"] if name in message}}
        self.plan(f"{int(new['count'])}x{new['gpu']}", new["weights"], int(new["context"]))

    def __repr__(self):
        setup = self.found.setup
        card = f"{self.found.total:.1f} of {setup.gpu.memory:.1f} GiB a card"
        return f"<planner: {setup.model} {setup.format} on {setup.count}x{setup.gpu.name}, {setup.context} ids, {card}>"

    def _static(self):
        setup = self.found.setup
        plans = [plan(one) for one in setups(self.model, context=setup.context) if one.weights in SHOWN]
        title = f"{setup.model}, {setup.context} ids of context, one listener"
        table = show.table([_row(one) for one in plans], caption=f"{title}. {reliance()} {COLUMNS}")
        chosen = show.table([[self._state["message"]]], ["Chosen"])
        return [chosen, compared(plans, title), table]


def reliance():
    """What the rates of a Plan rest on, in words."""
    ratios = [row["ratio"] for row in check(data_folder() / "runs") if row["what"].startswith("tokens")]
    said = f"recorded runs reached {min(ratios)} to {max(ratios)} of them" if ratios else "no recorded run confirms any"
    where = "measured for int4 and fp8 on one H200, elsewhere assumed"
    return f"At most: bandwidth over bytes a token. Estimates rest on efficiencies, {where}: {said}."


def in_words(found):
    """A Plan in a few sentences."""
    setup = found.setup
    if not found.fits:
        return what_would_fit(setup)
    if found.interleave:
        verdict = "enough for text and audio together, so the first block is all the waiting"
    elif found.steady:
        verdict = f"enough for audio, and an answer of 10 s never stalls if it waits for {found.delay[10]:.2f} s"
    else:
        verdict = f"less than audio uses up: an answer of 10 s must wait for {found.delay[10]:.1f} s, longer ones more"
    return (
        f"{setup.format} on {setup.count}x{setup.gpu.name} with {setup.context} ids: {found.total:.1f} of "
        f"{setup.gpu.memory:.1f} GiB a card; at most {found.ceiling:.0f} tokens a second, by estimate "
        f"{found.rate:.0f}, {verdict}."
    )


def _row(found):
    """A line of the static table."""
    setup = found.setup
    cells = {
        "GPUs": f"{setup.count}x{setup.gpu.name}", "weights": setup.format, "GiB": f"{found.total:.1f}",
        "ms, least": f"{1000 * found.floor:.1f}", "tokens/s, most": f"{found.ceiling:.0f}",
        "estimate": f"{found.rate:.0f}", "first sound": f"{found.first_sound[3]:.2f}",
        "enough for": "text too" if found.interleave else "audio" if found.steady else "neither",
        **{f"wait {n} s": f"{delay:.2f}" for n, delay in found.delay.items()},
    }  # fmt: skip
    if not found.fits:
        cells |= dict.fromkeys(list(cells)[3:], "–") | {"estimate": "does not fit"}
    return cells


@styled
def compared(plans, title="", alt=""):
    """Memory of one card by part beside its size, and the rates, of several Plans: a row for each of them."""
    figure, (memory, rates) = canvas(1.1 + 0.22 * len(plans), 1, 2, sharey=True, gridspec_kw={"width_ratios": (1.2, 1)})
    gpus = [f"{found.setup.count}x{found.setup.gpu.name}" for found in plans]
    rows, left = range(len(plans)), [0.0] * len(plans)
    for name, (words, colour, hatch) in PARTS.items():
        sizes = [found.memory[name] for found in plans]
        memory.barh(rows, sizes, 0.7, left, color=colour, hatch=hatch, edgecolor="0.3", linewidth=0.4, label=words)
        left = [a + b for a, b in zip(left, sizes)]
    memory.plot([found.setup.gpu.memory for found in plans], rows, "k|", ms=9, mew=2.5, label="the card")
    memory.set_yticks(rows, [f"{name} {found.setup.format}" for name, found in zip(gpus, plans)])
    memory.invert_yaxis()
    memory.set_xlabel("memory of one card (GiB)")
    fits = [row for row in rows if plans[row].fits]
    for row in set(rows) - set(fits):
        rates.text(11, row, "does not fit", fontsize=8, va="center", color=LINES[1])
    rate, ceiling = [plans[row].rate for row in fits], [plans[row].ceiling for row in fits]
    rates.hlines(fits, rate, ceiling, color="0.6", linewidth=1.2, zorder=1)
    rates.plot(ceiling, fits, "|", color=LINES[0], ms=9, mew=2, label="at most")
    rates.plot(rate, fits, "o", color=LINES[1], mfc="w", label="estimate")
    for (words, needed), dash in zip(RATES.items(), ("--", ":")):
        rates.axvline(needed, color="k", linestyle=dash, linewidth=1.2, label=f"{words} {needed:.4g}")
    most = max([800, *ceiling])
    rates.set(xscale="log", xlabel="tokens a second", xlim=(10, most))
    ticks = [step * 10**k for k in range(1, 7) for step in ((1, 2, 5) if most < 1000 else (1,)) if step * 10**k <= most]
    rates.set_xticks(ticks, map(str, ticks))
    rates.tick_params(axis="y", length=0)
    for axis, columns in ((memory, 3), (rates, 2)):
        axis.grid(axis="x", color="0.9")
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncol=columns, fontsize=8)
    words = "memory of one card by part beside its size, and tokens a second at most and by estimate, for "
    return picture(figure, alt or words + ", ".join(dict.fromkeys(gpus)), title)
