"""`aqaa bench quantize`: what fewer bits do to the mini: to its scores, its answers and its bytes.

Teacher-forced, over the answers of evaluation dialogues: how far are the scores of legal ids off
those of the unquantised model, and how often does the likeliest id stay? Free: are the words of
greedy answers to evaluation questions and the shipped recordings the same, and are they right?"""

import copy
import json
from functools import partial
from types import SimpleNamespace

import torch
from tqdm import tqdm

from aqaa import audio, files
from aqaa.backbone.generation import Vocabulary, generate_batch
from aqaa.backbone.memory import linear_bytes
from aqaa.batching import MAX_ANSWER, answer_batch
from aqaa.corpus.dialogues import dialogues
from aqaa.scale.quantize import dequantized, n_bytes, quantize_
from aqaa.tokenizers.dialogue import Machine
from aqaa.tokenizers.text import normalise

VARIANTS = {  # what is compared: format, group, method
    "int8": ("int8", None, "rtn"), "fp8": ("fp8", None, "rtn"),
    "int4 g64 rtn": ("int4", 64, "rtn"),  # 128 does not divide the mini's 704
    "int4 g64 gptq": ("int4", 64, "gptq"), "int4 g32 gptq": ("int4", 32, "gptq"),
}  # fmt: skip
CALIBRATION = 256  # dialogues of the training split
FORCED = 64  # evaluation dialogues whose scores are compared
QUESTIONS = 930  # evaluation questions answered: all of them
BATCH = 64


def measure(model, preset="mini", seed=0, limit=QUESTIONS, progress=True):
    """`compare_formats` of an AQAA, with `limit` evaluation questions beside its weights."""
    asked = dialogues(preset, "eval", limit, seed)
    forced = asked[:: max(1, len(asked) // FORCED)][:FORCED]
    calibration = dialogues(preset, "train", CALIBRATION, seed)
    formats = compare_formats(model, forced, asked, calibration, progress=progress)
    positions = sum(len(dialogue.ids) - dialogue.start for dialogue in forced)
    return {"calibration": len(calibration), "scored_positions": positions, "formats": formats}


def table(result):
    lines = [f"{'':15}{'MB':>7}{'same id':>9}{'error':>8}{'KL':>9}"
             f"{'right':>8}{'of right':>10}{'kept':>8}{'same':>8}"]  # fmt: skip
    for name, facts in result["formats"].items():
        size = sum(facts["bytes"][part] for part in ("linear", "scale", "other")) / 1e6
        row = "{:15}{:7.2f}{agreement:9.4f}{relative_error:8.4f}{kl:9.5f}"
        row += "{right:8.4f}{of_right:10.4f}{kept:8.4f}{same:8.4f}"
        lines.append(row.format(name, size, **facts["scores"], **facts["questions"]))
    return "\n".join(lines)


def compare_formats(model, forced, asked, calibration, variants=VARIANTS, *, recordings=True,
                    progress=False):  # fmt: skip
    """{name: facts} of the unquantised backbone of an AQAA ("none") and of each variant of it.

    forced, asked, calibration: Dialogues for scores, for answers, for gptq. bytes: see n_bytes;
    planned: of the linear layers with their scales, as aqaa/scale/plan.py counts them. scores: see
    `compare`; questions, recordings: see `compare_answers`."""
    plain, prompts = model.backbone, [dialogue.prompt for dialogue in asked]
    expected = [dialogue.answer for dialogue in asked]
    results, reference = {}, None
    try:
        for name in tqdm(["none", *variants], desc="formats", disable=not progress):
            size = n_bytes(plain)
            if name != "none":
                weights, group, method = variants[name]
                rows = [dialogue.ids for dialogue in calibration] if method == "gptq" else None
                model.backbone = quantize_(copy.deepcopy(plain), weights, group, rows=rows)
                size = n_bytes(model.backbone)
                size["planned"] = linear_bytes(model.config.backbone, weights, group)
                dequantized(model.backbone)  # the same numbers, sooner
            logits = scores(model.backbone, forced, model.ids, model.layout)
            texts = words(model, prompts)
            spoken, wanted = shipped(model) if recordings else ([], [])
            reference = reference or (logits, texts, spoken)
            facts = {"bytes": size, "scores": compare(reference[0], logits)}
            facts["questions"] = compare_answers(reference[1], texts, expected)
            if recordings:
                facts["recordings"] = compare_answers(reference[2], spoken, wanted)
            results[name] = facts
    finally:
        model.backbone = plain
    return results


@torch.inference_mode()
def scores(model, forced, ids, layout):
    """Logits of the legal ids, a list of (R,) fp32, at every position of Dialogues' answers."""
    rows, vocabulary = [], Vocabulary(model)
    for dialogue in forced:
        tokens = torch.tensor([dialogue.ids], device=model.device)
        hidden = model.model(input_ids=tokens).last_hidden_state[0]  # (T, D)
        machine = layout.machine(ids)
        # The id at a position is predicted by the hidden state before it.
        for position, token in enumerate(dialogue.ids[dialogue.start :], dialogue.start - 1):
            rows.append(vocabulary.scores(hidden[position], machine.allowed()).cpu())
            machine.advance(token)
    return rows


def compare(reference, others):
    """{"agreement", "relative_error", "kl"} of two lists of scores: share of positions with the
    same likeliest id, error's size over that of the centred scores, mean divergence in nats."""
    pairs = list(zip(reference, others, strict=True))
    same = [int(a.argmax() == b.argmax()) for a, b in pairs]
    # A constant added to all scores changes no probability: both are centred.
    centred = [(a - a.mean(), b - b.mean()) for a, b in pairs]
    error = sum((a - b).square().sum() for a, b in centred)
    size = sum(a.square().sum() for a, _ in centred)
    logs = ((a.log_softmax(0), b.log_softmax(0)) for a, b in pairs)
    divergence = [float((p.exp() * (p - q)).sum()) for p, q in logs]
    error, n = float(error / size) ** 0.5, len(same)
    return {"agreement": sum(same) / n, "relative_error": error, "kl": sum(divergence) / n}


class WordsMachine(Machine):
    """Ends an answer when its text is complete: the same words, without the sound's time."""

    @property
    def finished(self):
        return super().finished or self.text_done


def words(model, prompts):
    """The words of greedy answers of an AQAA to prompts (lists of ids), as they are judged."""
    layout = SimpleNamespace(machine=partial(WordsMachine, model.layout))
    options = {"max_tokens": MAX_ANSWER, "batch_size": BATCH}
    answers = generate_batch(model.backbone, prompts, model.ids, layout, **options)
    texts = ([step.id for step in steps if step.kind == "text"] for steps in answers)
    return [normalise(model.text.decode(ids)) for ids in texts]


def shipped(model):
    """(words of the model's answers, expected words) of the recordings in data/questions."""
    folder = files.data_folder() / "questions"
    rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    wavs = [audio.load_question(folder / row["file"]) for row in rows]
    texts = [text for text, _, _ in answer_batch(model, wavs, temperature=0.0)]
    return texts, [normalise(row["answer"]) for row in rows]


def compare_answers(before, after, expected):
    """{"n", "right", "of_right", "kept", "same"} of answers after a change, against those before.
    right: share of answers that are the expected ones; of_right: over the same share before; kept:
    share of those right before that still are; same: share that are word for word as before."""
    rows, n = list(zip(before, after, expected, strict=True)), len(expected)
    was = sum(old == wanted for old, _, wanted in rows)
    now = sum(new == wanted for _, new, wanted in rows)
    both = sum(old == new == wanted for old, new, wanted in rows)
    same = sum(old == new for old, new, _ in rows)
    of = {"of_right": now / max(was, 1), "kept": both / max(was, 1)}
    return {"n": n, "right": now / n, **of, "same": same / n}
