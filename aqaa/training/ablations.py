"""`aqaa train ablation NAME`: a claim of the paper as an experiment that anyone can repeat.

Each variant is trained alike, with several seeds, and judged alike: on questions of the development
split, which nothing learns from, in words by rule and in sound by an outside ear. A run that is
done stands in the results and is not made again with --resume."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student

from aqaa.config import TOKENS_PER_SECOND
from aqaa.corpus.plan import spread
from aqaa.files import check_file, fingerprint, read_object, write_json
from aqaa.records import about
from aqaa.tokenizers import dialogue, interleave
from aqaa.tokenizers.text import normalise
from aqaa.training import judged, merging, stages
from aqaa.training.objectives import LanguageTask
from aqaa.training.pairs import REFUSALS
from aqaa.training.preference import OBJECTIVES
from aqaa.training.run import Run
from aqaa.weights import model_folder

QUESTIONS = 120  # of the development split
SAMPLING = {"temperature": 0.3, "top_p": 0.9}
PARENTS = ("sft1", "sft2", "dpo")
BETAS = (0.1, 0.2)
FIGURES = ("text", "sound", "agrees", "refuses", "seconds")  # of the printed table

LAYOUTS = {name: ("sft1", {"layout": name}) for name in dialogue.EVERY_LAYOUT}
PREFERENCE = {"sft1": ("", {}), **{
    f"{objective}, β {beta}": ("dpo", {"objective": objective, "beta": beta})
    for objective in OBJECTIVES for beta in BETAS
}}  # fmt: skip
MERGES = {
    "5:5:1": ("linear", PARENTS, (5, 5, 1)),  # the paper's
    **{":".join(map(str, row)): ("linear", PARENTS, row) for row in merging.simplex(4)},
    "slerp": ("slerp", PARENTS[:2], (1, 1)),
    "ties": ("ties", PARENTS, (0, 1, 1)),  # changes of the others since sft1
}
ABLATIONS = {"layouts": LAYOUTS, "preference": PREFERENCE, "merge": MERGES}
STARTS = {"layouts": ("pretrain",), "preference": ("sft1",), "merge": PARENTS}  # what they need


def main(name, *, seeds=3, questions=QUESTIONS, results=None, **options):
    """Run every variant of an ablation with every seed; write and print what came out.

    options: of `run.Run`; its folder holds the parents, or its `init` does. results: folder of the
    JSON, by default `runs` beside the exported model. Returns the result. Raises ValueError for an
    unknown name, ModelError where a parent has not been trained."""
    if name not in ABLATIONS:
        raise ValueError(f"unknown ablation {name!r}: choose one of {', '.join(ABLATIONS)}")
    run = Run(**options)
    for stage in STARTS[name]:
        check_file(run.part_file(stage))
    path = Path(results or run.export_folder.parent / "runs") / f"ablation-{name}.json"
    head = about(f"ablation {name}", run.device)
    starts = {stage: fingerprint(run.part_file(stage))["sha256"] for stage in STARTS[name]}
    settings = {"minutes": run.minutes, "steps": run.steps, "questions": questions}
    result = {**head, **settings, "parents": starts}
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
            if (variant, seed) not in done:
                backbone, layout, told = MAKERS[name](run, name, variant, seed)
                row = figures(run, backbone, layout, book, asked, seed)
                result["runs"].append({"variant": variant, "seed": seed, **told, **row})
                write_json(path, result)
    if name == "merge" and "barriers" not in result:
        result["barriers"] = barriers(run, book)
    write_json(path, result)
    print(table(result))
    return result


# ---- one run ------------------------------------------------------------------------------------


def trained(run, name, variant, seed):
    """(backbone, layout, what training told) of a variant: a stage with other settings."""
    stage_name, settings = ABLATIONS[name][variant]
    layout = dialogue.layout(settings.get("layout", "ratio_10_15"))
    if not stage_name:  # the parent as it is
        return run.part(variant), layout, {}
    plain = re.sub(r"\W", "_", variant)
    folder = run.out / "ablations" / f"{name}-{plain}-{seed}"
    stage = stages.STAGES[stage_name]
    child = run.beside(folder, seed)
    child.train(replace(stage, settings={**stage.settings, **settings}))
    told = read_object(folder / "record.json", "remove it")[stage_name]
    backbone = child.part(stage_name)
    for path in folder.glob("*.ckpt*"):  # ten times the size of the weights, and of no more use
        path.unlink()
    facts = {"steps": told["steps"], "training_seconds": told["seconds"]}
    return backbone, layout, facts | {key: told[key] for key in ("held_out",) if key in told}


def averaged(run, name, variant, seed):
    """(backbone, layout, {}) of a merge of parents; the seed is only that of the answers."""
    method, parents, weights = ABLATIONS[name][variant]
    states = merging.trained(run, parents)
    backbone = model_folder.build("backbone", run.config)
    model_folder.fit(backbone, merging.merged(states, weights, method), variant)
    return backbone, dialogue.layout(), {}


MAKERS = {"layouts": trained, "preference": trained, "merge": averaged}


def figures(run, backbone, layout, book, asked, seed):
    """What answers to questions of a book are worth: shares of right texts and sounds, of sounds
    that say their own text, of refusals; seconds, log-probability of audio; texts by category."""
    answers = judged.answers(backbone, book, asked, layout, seed=seed, **SAMPLING)
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
    return {
        "n": len(answers), **{key: round(float(np.mean(row)), 4) for key, row in rows.items()},
        "skills": {key: round(float(np.mean(row)), 4) for key, row in sorted(skills.items())},
    }  # fmt: skip


def statistics(book, layout):
    """Of the recorded answers in a layout, after IST-LM (2412.16102): how far a spoken word stands
    behind its text, in ids; how many later text ids are visible when it is spoken; and the share
    that is spoken before its text. Words are placed in the sound by their share of the text."""
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
    """{variant: {figure: (mean over seeds, half of its 95 % interval or None for one seed)}}."""
    result = {}
    for variant in dict.fromkeys(row["variant"] for row in runs):
        rows = [row for row in runs if row["variant"] == variant]
        result[variant] = {}
        for figure in FIGURES:
            values = np.array([row[figure] for row in rows], dtype=float)
            n, half = len(values), None
            if n > 1:  # of Student's distribution: seeds are few
                half = float(student.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5)
            result[variant][figure] = float(values.mean()), half
    return result


def table(result):
    """A result as lines of text: percent over seeds, with 95 % intervals."""
    rows = summary(result["runs"])
    width = max(map(len, rows), default=8) + 1
    lines = ["".join([f"{'variant':<{width}}", *(f"{figure:>14}" for figure in FIGURES)])]
    for variant, values in rows.items():
        cells = []
        for figure, (mean, half) in values.items():
            scale = 1 if figure == "seconds" else 100
            error = "" if half is None else f" ±{half * scale:.1f}"
            cells.append(f"{mean * scale:.1f}{error}")
        lines.append("".join([f"{variant:<{width}}", *(f"{cell:>14}" for cell in cells)]))
    counts = [row["n"] for row in result["runs"]]
    facts = f"{max(counts, default=0)} questions a run, {len(result['runs'])} runs"
    return "\n".join([*lines, f"{facts}; in percent, seconds apart; ± 95 % over seeds."])
