"""`aqaa train ablation NAME`: a claim of the paper as an experiment that anyone can repeat.

Each variant is trained alike, with several seeds, and judged alike: on questions of the development
split, which nothing learns from, in words by rule and in sound by an outside ear. A run that is
done stands in the results and is not made again with --resume."""

import re
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student

from aqaa.batching import speak_ids
from aqaa.config import TOKENS_PER_SECOND
from aqaa.corpus.facts import pieces
from aqaa.corpus.plan import spread
from aqaa.evaluation.accuracy import make_judge
from aqaa.evaluation.controls import directions
from aqaa.files import data_folder, fingerprint, read_object, write_json
from aqaa.records import about
from aqaa.tokenizers import dialogue, interleave
from aqaa.tokenizers.text import normalise
from aqaa.training import arrangements, judged, merging, stages
from aqaa.training.loop import save_figure
from aqaa.training.objectives import LanguageTask
from aqaa.training.pairs import REFUSALS
from aqaa.training.preference import OBJECTIVES
from aqaa.training.run import Run
from aqaa.weights import model_folder

QUESTIONS = 120  # of the development split
SAMPLING = {"temperature": 0.3, "top_p": 0.9}
PARENTS = ("sft1", "sft2", "dpo")
BETAS = (0.1, 0.2)
FIGURES = ("text", "sound", "agrees", "refuses", "seconds",  # of the printed table, in its order;
           "switch", "switch_text", "nats_linguistic", "nats_semantic")  # these of two ablations
ONCE = {layout.name for layout in dialogue.NEIGHBOURS}  # not the paper's own rows: one seed
TAKES = 4  # answers to each question with a change of manner: there are few
PARENT_TIME = 8  # how many times longer than its variants the common parent learns

# {variant: (the stage that trains it, or "" for a parent as it is; what differs in its settings)}
LAYOUTS = {name: ("layouts", {"layout": layout}) for name, layout in dialogue.EVERY_LAYOUT.items()}
FAVOUR = {"switch": 12.0}  # manners that change in mid-sentence are few among all answers
JOINS = {
    "pre_interleaved": ("joins", {"favour": FAVOUR, "layout": arrangements.chained}),
    "marker_removal": ("joins", {"favour": FAVOUR, "layout": arrangements.BOTH}),
    "marker_preserving": ("joins", {"favour": FAVOUR, "layout": arrangements.MARKED}),
}  # fmt: skip
CODEBOOKS = {
    "both": ("codebooks", {"layout": arrangements.BOTH}),
    **{one: ("codebooks", {"layout": arrangements.OneCodebook(one)})
       for one in ("linguistic", "semantic")},
}  # fmt: skip
PREFERENCE = {"sft1": ("", {}), **{  # six times the rate of the stage: variants take few steps
    f"{objective}, β {beta}": ("dpo", {"objective": objective, "beta": beta, "lr": 3e-4})
    for objective in OBJECTIVES for beta in BETAS
}}  # fmt: skip
MERGES = {
    "5:5:1": ("linear", PARENTS, (5, 5, 1)),  # the paper's
    **{":".join(map(str, row)): ("linear", PARENTS, row) for row in merging.simplex(4)},
    "slerp": ("slerp", PARENTS[:2], (1, 1)),
    "ties": ("ties", PARENTS, (0, 1, 1)),  # changes of the others since sft1
}
ABLATIONS = {"layouts": LAYOUTS, "joins": JOINS, "codebooks": CODEBOOKS,
             "preference": PREFERENCE, "merge": MERGES}  # fmt: skip
STARTS = {"layouts": ("parent",), "joins": ("parent",), "codebooks": (), "preference": ("sft1",),
          "merge": PARENTS}  # what they need
MADE = {"layouts": ("parent",), "joins": ("parent",), "codebooks": (), "preference": ("pairs",),
        "merge": ("sft2", "pairs", "dpo")}  # of that, what is made here if need be


def main(name, *, seeds=3, questions=QUESTIONS, results=None, **options):
    """Run every variant of an ablation with every seed; write, draw and print what came out.

    options: of `run.Run`; parents that its folder lacks are trained first, from `init` (the shipped
    model) where they have a parent of their own. results: folder of JSON and PNG, by default
    `runs` beside the exported model. Returns the result. Raises ValueError for an unknown name."""
    if name not in ABLATIONS:
        raise ValueError(f"unknown ablation {name!r}: choose one of {', '.join(ABLATIONS)}")
    run = Run(**{**options, "init": options.get("init") or data_folder() / "mini"})
    for stage in MADE[name]:
        made = run.pairs_file() if stage == "pairs" else run.out / "parts" / f"{stage}.safetensors"
        if not made.exists():
            prepared(run, stage)
    path = Path(results or run.export_folder.parent / "runs") / f"ablation-{name}.json"
    starts = {stage: fingerprint(run.part_file(stage))["sha256"] for stage in STARTS[name]}
    settings = {"minutes": run.minutes, "steps": run.steps, "questions": questions}
    result = {**about(f"ablation {name}", run.device), **settings, "parents": starts}
    record = run.recorded()
    result["parents_took"] = {stage: {key: told[key] for key in ("steps", "seconds") if key in told}
                              for stage in MADE[name] if (told := record.get(stage))}  # fmt: skip
    kept = read_object(path, "remove it, or leave --resume out") if path.exists() else {}
    same = all(kept.get(key) == result[key] for key in (*settings, "parents"))
    result["runs"] = kept.get("runs", []) if run.resume and same else []
    book = run.book(dev=True)
    asked = spread(book.questions, questions)
    if name == "layouts":
        result["statistics"] = {one: statistics(book, dialogue.layout(one)) for one in LAYOUTS}
    done = {(row["variant"], row["seed"]) for row in result["runs"]}
    for seed in range(seeds):  # all variants once, then again: a run that ends early has them all
        for variant in ABLATIONS[name]:
            if (variant, seed) not in done and (seed == 0 or variant not in ONCE):
                backbone, layout, told = MAKERS[name](run, name, variant, seed)
                row = figures(run, backbone, layout, book, asked, seed)
                if name == "joins":
                    row |= switches(run, backbone, layout, book, seed)
                elif name == "codebooks":
                    row |= arrangements.surprise(backbone, book, layout)
                result["runs"].append({"variant": variant, "seed": seed, **told, **row})
                write_json(path, result)
    if name == "merge":
        result["barriers"] = barriers(run, book)
    write_json(path, result)
    bars(result, path.with_suffix(".png"))
    print(table(result))
    return result


# ---- one run ------------------------------------------------------------------------------------


def prepared(run, stage):
    """Train what variants start from; the common parent longer than they are."""
    longer = PARENT_TIME if stage == "parent" else 1
    run = copy(run)
    run.minutes, run.steps = (value and longer * value for value in (run.minutes, run.steps))
    if stage in stages.STAGES:
        run.stage(stage)
    else:
        torch.manual_seed(run.training_seed)
        run.train(stages.named(stage))


def trained(run, name, variant, seed):
    """(backbone, layout, what training told) of a variant: a stage with other settings."""
    stage_name, settings = ABLATIONS[name][variant]
    layout = settings.get("layout", arrangements.BOTH)
    if callable(layout):
        layout = layout(run.config.ids)
    if not stage_name:  # the parent as it is
        return run.part(variant), layout, {}
    settings = {**settings, "layout": layout} if "layout" in settings else settings
    folder = run.out / "ablations" / re.sub(r"[^\w-]", "_", f"{name}-{variant}-{seed}")
    stage = stages.named(stage_name)
    child = run.beside(folder, seed)
    child.train(replace(stage, settings={**stage.settings, **settings}))
    told = child.recorded()[stage_name]
    for path in folder.glob("*.ckpt*"):  # ten times the size of the weights, and of no more use
        path.unlink()
    facts = {"steps": told["steps"], "training_seconds": told["seconds"]}
    facts |= {key: told[key] for key in ("held_out",) if key in told}
    return child.part(stage_name), layout, facts


def averaged(run, name, variant, seed):
    """(backbone, layout, {}) of a merge of parents; the seed is only that of the answers."""
    method, parents, weights = ABLATIONS[name][variant]
    merged = merging.merged(merging.trained(run, parents), weights, method)
    backbone = model_folder.build("backbone", run.config)
    model_folder.fit(backbone, merged, variant)
    return backbone, dialogue.layout(), {}


MAKERS = {name: averaged if name == "merge" else trained for name in ABLATIONS}


def figures(run, backbone, layout, book, asked, seed):
    """What answers to questions of a book are worth: shares of right texts and sounds, of sounds
    that say their own text, of refusals; seconds, log-probability of audio; texts by category."""
    alone, prompts = isinstance(layout, arrangements.OneCodebook), judged.prompts(book, asked)
    if alone:
        prompts = [layout.only(ids, book.config.ids) for ids in prompts]
    answers = judged.answers(backbone, book, asked, layout, asked=prompts, seed=seed, **SAMPLING)
    if not alone:  # the vocoder needs both codebooks
        judged.listen(run.model(backbone, layout), book, answers, run.workers, seed)
    skills = {}
    for one in answers:
        skills.setdefault(book.items[one.question].category, []).append(one.right)
    rows = {
        "text": [one.right for one in answers], "sound": [one.sound for one in answers],
        "agrees": [one.agrees for one in answers],
        "refuses": [normalise(one.text) in REFUSALS for one in answers],
        "seconds": [len(one.audio) / TOKENS_PER_SECOND for one in answers],
        "audio_logprob": [one.logprob for one in answers],
    }  # fmt: skip
    if alone:
        rows |= dict.fromkeys(("sound", "agrees", "seconds"))
    means = {key: row and round(float(np.mean(row)), 4) for key, row in rows.items()}
    shares = {key: round(float(np.mean(row)), 4) for key, row in sorted(skills.items())}
    return {"n": len(answers), **means, "skills": shares}


def switches(run, backbone, layout, book, seed):
    """What answers are worth whose manner changes in the middle, TAKES to each question: how often
    every part, held against the same words of the recorded normal answer, is said as it should be
    (`switch`), and how often the text is right, tags included."""
    asked = [i for i in book.questions if book.items[i].intent == "switch"] * TAKES
    answers = judged.answers(backbone, book, asked, layout, seed=seed, **SAMPLING)
    model = run.model(backbone, layout)
    normal = {normalise(item.text): i for i, item in enumerate(book.items)
              if item.role == "answer" and item.manner in ("", "normal")}  # fmt: skip
    judge, _ = make_judge([book.items[i].answer for i in book.questions], [])
    changed = []
    for one in answers:
        item = book.items[one.question]
        sound = speak_ids(model, one.audio, seed)
        as_said = speak_ids(model, book.audio[normal[normalise(item.answer)]].tolist(), seed)
        parts = pieces(item.answer, item.manner)
        changed.append(bool(len(sound)) and directions(parts, sound, as_said, judge))
    shares = {"switch": changed, "switch_text": [one.right for one in answers]}
    means = {key: round(float(np.mean(row)), 4) for key, row in shares.items()}
    return {"switches": len(answers), **means}


def statistics(book, layout):
    """Of recorded answers in a layout, after IST-LM (2412.16102): how many ids a word's sound is
    behind its text, how many later text ids are visible by then, and the share that is spoken
    before its text. Words are placed in the sound by their share of the text."""
    distance, visible, before = [], [], []
    for index in book.voiced[:200]:
        words, audio = book.spoken(index)
        ids = np.array(layout.arrange(words, audio, book.config.ids))
        kinds = interleave.kinds(ids, book.config.ids)
        text = np.flatnonzero(kinds == interleave.TEXT)
        sound = np.flatnonzero((kinds == interleave.LINGUISTIC) | (kinds == interleave.SEMANTIC))
        if not len(text) or not len(sound):
            continue
        spoken = sound[np.arange(len(text)) * len(sound) // len(text)]  # of each text id
        distance += (spoken - text).tolist()
        visible += (np.searchsorted(text, spoken) - np.arange(1, len(text) + 1)).tolist()
        before += (spoken < text).tolist()
    means = {"distance": distance, "visible": visible, "before": before}
    return {key: round(float(np.mean(row)), 3) if row else None for key, row in means.items()}


@torch.no_grad()
def barriers(run, book, points=5):
    """Loss of spoken answers along the line between each two parents, and its rise above it."""
    task = LanguageTask(book, {"aqtaa": 1.0}, rows=4)
    batch = task.batch(np.random.default_rng(0))

    def loss(state):
        model_folder.fit(task.model, state, "a point between two models")
        return float(task.loss(batch, 0)[0])

    states = dict(zip(PARENTS, merging.trained(run, PARENTS), strict=True))
    result = {}
    for one, other in (PARENTS[:2], PARENTS[::2], PARENTS[1:]):
        losses, height = merging.barrier(loss, states[one], states[other], points)
        losses = [round(value, 4) for value in losses]
        result[f"{one} - {other}"] = {"losses": losses, "barrier": round(height, 4)}
    return result


# ---- what came out ------------------------------------------------------------------------------


def summary(runs):
    """{variant: {figure: (mean over seeds, half of its 95 % interval)}}, the same figures for each
    variant. None stands for what a variant lacks, and for the interval of a single seed."""
    shown = [one for one in FIGURES if any(row.get(one) is not None for row in runs)]
    result = {}
    for variant in dict.fromkeys(row["variant"] for row in runs):
        rows = [row for row in runs if row["variant"] == variant]
        result[variant] = {}
        for figure in shown:
            values = [row[figure] for row in rows if row.get(figure) is not None]
            n, half = len(values), None
            if n > 1:  # of Student's distribution: seeds are few
                half = float(student.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
            result[variant][figure] = float(np.mean(values)) if values else None, half
    return result


def table(result):
    """A result as lines of text: percent over seeds, with 95 % intervals."""
    rows = summary(result["runs"])
    shown = list(next(iter(rows.values()), ()))
    width = max(map(len, rows), default=8) + 1
    lines = ["".join([f"{'variant':<{width}}", *(f"{figure:>17}" for figure in shown)])]
    for variant, values in rows.items():
        cells = [cell(figure, *value) for figure, value in values.items()]
        lines.append("".join([f"{variant:<{width}}", *(f"{one:>17}" for one in cells)]))
    counts = [row["n"] for row in result["runs"]]
    facts = f"{max(counts, default=0)} questions a run, {len(result['runs'])} runs"
    return "\n".join([*lines, f"{facts}; in percent, seconds and nats apart; ± 95 % over seeds."])


def by_skill(runs):
    """{variant: {skill: share of right texts, mean over seeds}}."""
    result = {}
    for row in runs:
        result.setdefault(row["variant"], []).append(row["skills"])
    return {variant: {skill: float(np.mean([row[skill] for row in rows])) for skill in rows[0]}
            for variant, rows in result.items()}  # fmt: skip


def bars(result, path):
    """Draw a result into a PNG: a panel for each figure, a bar for each variant, its interval."""
    rows = summary(result["runs"])
    shown = list(next(iter(rows.values())))

    def fill(figure):
        panels = figure.subplots(1, len(shown), sharey=True)
        for name, axis in zip(shown, panels, strict=True):
            pairs = [values[name] for values in rows.values()]
            means, halves = np.array(pairs, dtype=float).T  # None becomes nan, which is not drawn
            axis.barh(list(rows), means, xerr=halves, capsize=2)
            axis.set(title=name.replace("_", " "), xlim=(0, None))
        panels[0].invert_yaxis()  # the first variant on top, in every panel

    save_figure(path, (2 * len(shown) + 1, 0.3 * len(rows) + 1), fill)


def cell(figure, mean, half):
    """A mean and half its interval, as words; a dash for no mean."""
    scale, digits = (1, 2) if figure == "seconds" or figure.startswith("nats") else (100, 1)
    error = "" if half is None else f" ±{half * scale:.{digits}f}"
    return "–" if mean is None else f"{mean * scale:.{digits}f}{error}"
