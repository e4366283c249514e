"""`aqaa bench quantize`: what fewer bits do to the mini: to its scores, to its answers, and to its bytes.

Two comparisons with the unquantised model. Teacher-forced: over the answers of evaluation dialogues, how far the scores
of legal ids are off, and how often the likeliest id stays. Free: greedy answers to evaluation questions, and to the
shipped recordings; are their words the same, and are they right?
"""

import copy
import json
from pathlib import Path

import torch
from tqdm import tqdm

from aqaa import files, loading
from aqaa.backbone.memory import linear_bytes
from aqaa.batching import MAX_ANSWER, answer_batch
from aqaa.corpus.dialogues import dialogues
from aqaa.records import report
from aqaa.scale.quantize import dequantized, n_bytes, quantize_
from aqaa.tokenizers.text import normalise

VARIANTS = {  # what is compared: format, group, method
    "int8": ("int8", None, "rtn"),
    "fp8": ("fp8", None, "rtn"),
    "int4 g64 rtn": ("int4", 64, "rtn"),  # 128 does not divide the mini's 704
    "int4 g64 gptq": ("int4", 64, "gptq"),
    "int4 g32 gptq": ("int4", 32, "gptq"),
}
CALIBRATION = 256  # dialogues of the training split
FORCED = 64  # evaluation dialogues whose scores are compared
QUESTIONS = 930  # evaluation questions answered: all of them
BATCH = 64


# ---- scores ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def scores(model, found, ids, layout):
    """Logits of the legal ids at every position of the answers: a list of (R,) fp32, in order."""
    from aqaa.backbone.generation import Vocabulary

    rows, vocabulary = [], Vocabulary(model)
    for dialogue in found:
        hidden = model.model(input_ids=torch.tensor([dialogue.ids], device=model.device)).last_hidden_state[0]
        machine = layout.machine(ids)
        for position, token in enumerate(dialogue.ids[dialogue.start :], dialogue.start - 1):
            rows.append(vocabulary.scores(hidden[position], machine.allowed()).cpu())
            machine.advance(token)
    return rows


def compare(reference, others):
    """{"agreement", "relative_error", "kl"} of two lists of scores: the share of positions with the same likeliest id,
    the error's size over that of the centred scores, and the mean divergence in nats."""
    same = [int(a.argmax() == b.argmax()) for a, b in zip(reference, others, strict=True)]
    centred = [(a - a.mean(), b - b.mean()) for a, b in zip(reference, others, strict=True)]
    error, size = sum((a - b).square().sum() for a, b in centred), sum(a.square().sum() for a, _ in centred)
    pairs = ((a.log_softmax(0), b.log_softmax(0)) for a, b in zip(reference, others, strict=True))
    divergence = [float((p.exp() * (p - q)).sum()) for p, q in pairs]
    n = len(same)
    return {"agreement": sum(same) / n, "relative_error": float(error / size) ** 0.5, "kl": sum(divergence) / n}


# ---- answers --------------------------------------------------------------------------------------------------------


class WordsOnly:
    """A layout whose answers are cut off when their text is complete: the words are as they would be, in less time."""

    def __init__(self, layout):
        self.layout = layout

    def machine(self, ids, min_audio=0):
        return _WordsMachine(self.layout.machine(ids, min_audio))


class _WordsMachine:
    """Stands in for interleave.Machine."""

    def __init__(self, machine):
        self.inner, self.allowed, self.advance = machine, machine.allowed, machine.advance

    @property
    def finished(self):
        return self.inner.finished or self.inner.text_done


def words(model, prompts):
    """The words of greedy answers to prompts (lists of ids), as they are judged. model: an AQAA."""
    from aqaa.backbone.generation import generate_batch

    answered = generate_batch(
        model.backbone, prompts, model.ids, WordsOnly(model.layout), max_tokens=MAX_ANSWER, batch_size=BATCH
    )
    texts = ([step.id for step in steps if step.kind == "text"] for steps in answered)
    return [normalise(model.text.decode(ids)) for ids in texts]


def shipped(model):
    """[(words of the model's answer, expected words)] of the recordings in data/questions."""
    from aqaa import audio

    folder = files.data_folder() / "questions"
    rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    wavs = [audio.load_question(folder / row["file"]) for row in rows]
    answers = answer_batch(model, wavs, temperature=0.0)
    return [(text, normalise(row["answer"])) for (text, _), row in zip(answers, rows, strict=True)]


# ---- the whole ------------------------------------------------------------------------------------------------------


def measure(model, forced, asked, calibration, variants=VARIANTS, *, recordings=True, progress=False):
    """{name: facts} of the unquantised backbone of an AQAA ("none") and of each variant of it.

    forced, asked: Dialogues for scores and for answers; calibration: Dialogues for gptq. right: share of answers that
    are the expected ones; kept: of the answers that the unquantised model has right, how many are still so; of_right:
    right / right of the unquantised; same: share of answers word for word the same. bytes: see n_bytes; planned: of
    the linear layers with their scales, as aqaa/scale/plan.py counts them.
    """
    plain, prompts = model.backbone, [dialogue.prompt for dialogue in asked]
    expected, rows = [dialogue.answer for dialogue in asked], [dialogue.ids for dialogue in calibration]
    found, reference = {}, None
    try:
        for name in tqdm(["none", *variants], desc="formats", disable=not progress):
            size = n_bytes(plain)
            if name != "none":
                weights, group, method = variants[name]
                heard = rows if method == "gptq" else None
                model.backbone = quantize_(copy.deepcopy(plain), weights, group, rows=heard)
                size = n_bytes(model.backbone) | {"planned": linear_bytes(model.config.backbone, weights, group)}
                dequantized(model.backbone)  # the same numbers, sooner
            now = (
                scores(model.backbone, forced, model.ids, model.layout), words(model, prompts),
                shipped(model) if recordings else [],
            )  # fmt: skip
            reference = reference or now
            found[name] = {"bytes": size, **_facts(reference, now, expected)}
    finally:
        model.backbone = plain
    return found


def _facts(reference, now, expected):
    (first, before, said_before), (others, after, said_after) = reference, now
    facts = {"scores": compare(first, others), "questions": _answers(before, after, expected)}
    if said_after:
        texts = ([text for text, _ in said] for said in (said_before, said_after))
        facts["recordings"] = _answers(*texts, [answer for _, answer in said_after])
    return facts


def _answers(before, after, expected):
    was = [text == answer for text, answer in zip(before, expected, strict=True)]
    now = [text == answer for text, answer in zip(after, expected, strict=True)]
    n, both = len(expected), sum(a and b for a, b in zip(was, now, strict=True))
    same = sum(a == b for a, b in zip(before, after, strict=True))
    return {
        "n": n, "right": sum(now) / n, "of_right": sum(now) / max(sum(was), 1), "kept": both / max(sum(was), 1),
        "same": same / n,
    }  # fmt: skip


def main(args):
    """`aqaa bench quantize`; args: preset, device, seed, limit (how many questions), json, out."""
    from aqaa.records import about

    if args.out and not Path(args.out).resolve().parent.is_dir():  # said now, not after minutes of work
        raise FileNotFoundError(f"{args.out} cannot be written, its folder does not exist: make it first")
    model = loading.load(args.preset, device=args.device)
    asked = dialogues(args.preset, "eval", args.limit or QUESTIONS, args.seed)
    step = max(1, len(asked) // FORCED)
    calibration = dialogues(args.preset, "train", CALIBRATION, args.seed)
    found = measure(model, asked[::step][:FORCED], asked, calibration, progress=not args.json)
    positions = sum(len(dialogue.ids) - dialogue.start for dialogue in asked[::step][:FORCED])
    facts = {"calibration": len(calibration), "scored_positions": positions}
    report(args, {**about("quantize", args.device), **facts, "formats": found}, table(found))


def table(found):
    """The result as lines of text."""
    lines = [f"{'':15}{'MB':>7}{'same id':>9}{'error':>8}{'KL':>9}{'right':>8}{'of right':>10}{'kept':>8}{'same':>8}"]
    for name, facts in found.items():
        size = sum(facts["bytes"][part] for part in ("linear", "scale", "other")) / 1e6
        score, answers = facts["scores"], facts["questions"]
        lines.append(
            f"{name:15}{size:7.2f}{score['agreement']:9.4f}{score['relative_error']:8.4f}{score['kl']:9.5f}"
            f"{answers['right']:8.4f}{answers['of_right']:10.4f}{answers['kept']:8.4f}{answers['same']:8.4f}"
        )
    return lines
