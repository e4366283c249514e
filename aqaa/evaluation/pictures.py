"""`aqaa bench pictures`: questions about drawn pictures, in words by rule, in sound by an ear.

Questions are the evaluation's of corpus/pictures.py, as codes; scenes are drawn from seeds that no
training draws from. Beside it the same questions with another picture, whose answer differs: what
is right there by chance was not seen."""

import numpy as np
from tqdm import tqdm

from aqaa.corpus import pictures
from aqaa.corpus.codes import stored_codes
from aqaa.evaluation.accuracy import make_judge, share
from aqaa.files import data_folder
from aqaa.tokenizers import interleave
from aqaa.tokenizers.text import normalise

APART = 997  # mixed into the seeds of scenes, so that they are no batch of a training


def measure(model, limit=None, seed=0, progress=False):
    """Ask an AQAA `limit` questions of each cell (all). Returns {cell: {"text", "sound", "blind":
    share}}, the same by kind of question, and "rows"."""
    planned = pictures.plan(seed=seed)
    known = {item.text for item in planned if item.role == "answer"}
    items = [item for item in planned if item.role == "picture" and item.split == "eval"]
    cells = dict.fromkeys(item.cell for item in items)
    chosen = [item for cell in cells for item in [i for i in items if i.cell == cell][:limit]]
    codes = stored_codes(data_folder() / "codes")
    rows, sounds = [], []
    for item in tqdm(chosen, disable=not progress, unit="question"):
        kind, thing = item.intent.removeprefix("picture_"), item.slots["thing"]
        scene, other = two_scenes(kind, thing, np.random.default_rng([APART, seed, item.seed]))
        heard = interleave.merge(*codes[item.id], model.ids)
        size = model.config.vision.image_size
        answer = model.ask(heard, image=pictures.draw(scene, size), temperature=0.0)
        blind = model.ask(heard, image=pictures.draw(other, size), temperature=0.0)
        want = pictures.answer(scene, kind, thing)
        rows.append({"id": item.id, "cell": item.cell, "kind": kind, "question": item.text,
                     "want": want, "text": answer.text, "right": answer.text == want,
                     "blind": blind.text == want, "sure": round(answer.confidence, 3)})  # fmt: skip
        sounds.append(answer.audio.numpy())
    judge, _ = make_judge(known, [row["text"] for row in rows], seed)
    for row, words in zip(rows, judge.hear_all(sounds, False, 1), strict=True):
        row |= {"heard": words, "sound": words == normalise(row["want"])}
    return {"cells": summarise(rows), "rows": rows}


def summarise(rows):
    """{cell, kind or "all": {"text", "sound", "blind": share}}; "count_some" are counts that are
    not zero: most shapes are in no picture, so that "no" is a good guess."""
    groups = {"all": rows}
    for key in ("cell", "kind"):
        for name in dict.fromkeys(row[key] for row in rows):
            groups[name] = [row for row in rows if row[key] == name]
    groups["count_some"] = [row for row in groups.get("count", ()) if " no " not in row["want"]]
    scores = {"text": "right", "sound": "sound", "blind": "blind"}
    return {name: {score: share([row[key] for row in group]) for score, key in scores.items()}
            for name, group in groups.items() if group and name}  # fmt: skip


def two_scenes(kind, thing, rng):
    """A Scene of which a question can be asked, and another with another answer."""
    scene = other = None
    while scene is None or other is None:
        drawn = pictures.scene(rng)
        if (kind, thing) in pictures.asked(drawn):
            if scene is None:
                scene = drawn
            elif pictures.answer(drawn, kind, thing) != pictures.answer(scene, kind, thing):
                other = drawn
    return scene, other


def table(result):
    """The shares as lines of text, percent with standard errors."""
    lines = [f"{'':18}{'n':>5}{'text':>14}{'sound':>14}{'other picture':>15}"]
    for name, scores in result["cells"].items():
        cells = [f"{100 * one['share']:.1f} ± {100 * one['error']:.1f}" for one in scores.values()]
        lines.append(f"{name:18}{scores['text']['n']:>5}{cells[0]:>14}{cells[1]:>14}{cells[2]:>15}")
    return "\n".join(lines)
