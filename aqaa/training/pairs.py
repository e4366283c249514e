"""Pairs for preference training: two answers to one question, of which one is better.

The paper does not say how its pairs were made. Here SFT-1 answers each question several times; the
words are judged by rule, the sound by an outside ear. Of the answers the best and the worst make a
pair; where none is right, the recorded answer takes the place of the best. Step-Audio met "deaf
hacking", answers that pretend not to have heard: such an answer to a clear question is rejected,
and to a question that breaks off or drowns in noise it is chosen."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from aqaa.config import GROUP_SIZE
from aqaa.files import ModelError, brief, fingerprint, reading, replacing
from aqaa.tokenizers import dialogue
from aqaa.training import judged as J
from aqaa.training.examples import swapped

WHYS = ("sampled", "taught", "deaf", "unclear")
REFUSALS = ("i did not hear you", "please say that again", "i could not understand you")
TEMPERATURES = (0.7, 1.0, 1.3, 1.0)  # of the answers to one question; each has a seed of its own
DEAF = 0.1  # share of questions that also give a pair of each of the last two kinds, one at least
CHUNK = 32  # questions between two writings
AGAIN = "make it with `aqaa train pairs`"


@dataclass(frozen=True)
class Pair:
    """Ids of a prompt and of two answers to it, eot included. why: one of WHYS; question: its id.
    """

    prompt: list
    chosen: list
    rejected: list
    why: str
    question: str


# ---- the file -----------------------------------------------------------------------------------


def write_pairs(path, pairs, of=""):
    """Write pairs as a small npz. of: the tokenizers that their ids belong to (`tokenizers`)."""
    rows = [ids for pair in pairs for ids in (pair.prompt, pair.chosen, pair.rejected)]
    ids = np.concatenate([np.zeros(0, np.int64), *map(np.asarray, rows)]).astype(np.int64)
    lengths = np.array([len(row) for row in rows], dtype=np.uint16).reshape(-1, 3)
    with replacing(path) as part, open(part, "wb") as file:
        np.savez_compressed(
            file, of=of, lengths=lengths,
            ids=ids.astype(np.min_scalar_type(int(ids.max(initial=0)))),  # uint16 for the mini
            why=np.array([WHYS.index(pair.why) for pair in pairs], dtype=np.uint8),
            question=np.array([pair.question for pair in pairs], dtype=str),
        )  # fmt: skip


def read_pairs(path, ids, layout=None, of=None):
    """[Pair, …] of a file. ids: IdsConfig; layout: what the answers follow, by default the released
    model's; of: as they were written, if that shall be checked. Raises ModelError for a file that
    is missing, damaged or of other tokenizers, and for a pair that teaches nothing or wrongly."""
    path, layout = Path(path), layout or dialogue.layout()
    if not path.is_file():
        raise ModelError(f"{path} is missing: {AGAIN}.")
    with reading(path, AGAIN), np.load(path) as file:
        written = str(file["of"])
        rows = np.split(file["ids"].astype(np.int64), file["lengths"].astype(int).cumsum()[:-1])
        names = file["question"].tolist()
        whys = [WHYS[i] for i in file["why"]]
        if not len(rows) == 3 * len(names) == 3 * len(whys) and names:
            raise ValueError(f"{len(names)} questions and {len(rows)} sequences")
    if of is not None and written != of:
        raise ModelError(f"{path} belongs to other tokenizers than these weights: {AGAIN}.")
    result = []
    for number, (name, why) in enumerate(zip(names, whys, strict=True)):
        pair = Pair(*(row.tolist() for row in rows[3 * number : 3 * number + 3]), why, name)
        if fault := fault_of(pair, ids, layout):
            raise ModelError(f"{path}: pair {number} ({name}) {fault}: {AGAIN}.")
        result.append(pair)
    return result


def fault_of(pair, ids, layout):
    """What is wrong with a pair, as half a sentence, or None."""
    if pair.chosen == pair.rejected:
        return "has two equal answers, so neither is better"
    if not pair.prompt:
        return "has no question"
    most = max(*pair.prompt, *pair.chosen, *pair.rejected, 0)
    if most >= ids.end:
        return f"has the id {most}, and the last one is {ids.end - 1}"
    for name in ("chosen", "rejected"):
        machine = layout.machine(ids)
        try:
            for token in getattr(pair, name):
                machine.advance(token)
        except ValueError as fault:
            return f"has a {name} answer that layout {layout.name} cannot hold ({brief(fault)})"
        if not machine.finished:
            return f"has a {name} answer that does not end"
    return None


# ---- making them --------------------------------------------------------------------------------


def best_and_worst(book, layout, tried):
    """A Pair of several Judged answers to one question, or None where all are equally right."""
    tried = [one for one in tried if one.whole]
    if not tried:
        return None
    best, worst = max(tried, key=lambda one: one.score), min(tried, key=lambda one: one.score)
    chosen, why = best.ids, "sampled"
    if best.score < 2:  # not even the best is right
        chosen, why = recorded(book, layout, best.question), "taught"
    elif worst.score == best.score:
        return None
    return Pair(*J.prompts(book, [best.question]), chosen, worst.ids, why,
                book.items[best.question].id)  # fmt: skip


def recorded(book, layout, question):
    """Ids of the answer that was spoken for the corpus."""
    item = book.items[question]
    return layout.arrange(*book.spoken(book.answers[item.answer_id]), book.config.ids)


def holds(book, layout, question):
    """Whether the layout can hold the recorded answer: its text must not outlive its sound."""
    pair = Pair([0], recorded(book, layout, question), [], "deaf", "")
    return "chosen" not in fault_of(pair, book.config.ids, layout)


def deafness(book, layout, question, refusal, answered, rng):
    """(a Pair that rejects deafness to a clear question, the audio of that one made unclear)."""
    item, heard, ids = book.items[question], book.audio[question], book.config.ids
    good = next((one.ids for one in answered if one.whole and one.score == 2), None)
    pair = Pair(*J.prompts(book, [question]), good or recorded(book, layout, question), refusal,
                "deaf", item.id)  # fmt: skip
    if rng.random() < 0.5:  # it breaks off before it has asked anything
        groups = len(heard) // GROUP_SIZE
        return pair, heard[: GROUP_SIZE * max(1, groups // 5)]
    return pair, swapped(heard, ids, 0.9, rng)


def make(backbone, book, questions, layout, *, hear=None, seed=0, temperatures=TEMPERATURES,
         deaf=DEAF, **sampling):  # fmt: skip
    """Pairs of the questions at these places of a book: a list of Pair.

    hear(answers): lets an ear fill in the sound of a list of Judged, or None. sampling: top_p,
    max_tokens, rule of `judged.answers`."""
    rng = np.random.default_rng(seed)
    tried = [J.answers(backbone, book, questions, layout, temperature=temperature,
                       seed=seed * len(temperatures) + turn, **sampling)
             for turn, temperature in enumerate(temperatures)]  # fmt: skip
    if hear:
        hear([one for turn in tried for one in turn if one.whole])
    by_question = list(zip(*tried, strict=True))
    pairs = [best_and_worst(book, layout, row) for row in by_question]
    usable = [i for i, question in enumerate(questions) if holds(book, layout, question)]
    some = [i for i in usable if rng.random() < deaf] or usable[:1]
    texts = [REFUSALS[rng.integers(len(REFUSALS))] for _ in some]
    voices = J.say(backbone, book, texts, temperature=0.3, top_p=0.9, seed=seed) if some else []
    unclear = []
    for i, text, audio in zip(some, texts, voices, strict=True):
        refusal = layout.arrange(book.encode(text), audio, book.config.ids)
        pair, dim = deafness(book, layout, questions[i], refusal, by_question[i], rng)
        pairs.append(pair)
        prompt = dialogue.prompt([("user", dim)], book.tokenizer, book.config.ids)
        unclear.append((questions[i], prompt, refusal))
    if unclear:  # what the model says although it cannot know
        places, asked, refusals = zip(*unclear, strict=True)
        guesses = J.answers(backbone, book, list(places), layout, asked=list(asked), seed=seed,
                            temperature=1.0, **sampling)  # fmt: skip
        for guess, prompt, refusal in zip(guesses, asked, refusals, strict=True):
            if guess.whole and guess.text not in REFUSALS:
                name = book.items[guess.question].id
                pairs.append(Pair(prompt, refusal, guess.ids, "unclear", name))
    return [pair for pair in pairs if pair and not fault_of(pair, book.config.ids, layout)]


def from_run(run, stage, count=600, **options):
    """Pairs of `count` training questions (at scale 1; --steps in its place), made by the weights
    of a stage's parent; writes pairs.npz. Work that was begun goes on where it stopped. Returns
    what is recorded."""
    book, backbone, layout = run.book(), run.part(stage.parent), dialogue.layout()
    count = min(len(book.questions), run.steps or max(8, round(count * run.scale)))
    chosen = np.random.default_rng(run.seed).permutation(book.questions)[:count]
    of, model = run.tokenizers(), run.model(backbone)
    made = f"{of} {fingerprint(run.part_file(stage.parent))['sha256']} {run.seed} {count}"
    pairs = []

    def hear(answers):
        J.listen(model, book, answers, run.workers, run.seed)

    for start in range(0, count, CHUNK):
        path = run.out / "pairs" / f"{start:05d}.npz"
        if not (run.resume and path.is_file() and _made(path) == made):
            questions = chosen[start : start + CHUNK].tolist()
            some = make(backbone, book, questions, layout, hear=hear, seed=run.seed + start,
                        **options)  # fmt: skip
            write_pairs(path, some, made)
            if not run.quiet:
                print(f"pairs: {start + len(questions)} of {count} questions", flush=True)
        pairs += read_pairs(path, run.config.ids, layout)
    write_pairs(run.out / "pairs.npz", pairs, of)
    whys = [pair.why for pair in pairs]
    return {"questions": count, "pairs": {why: whys.count(why) for why in WHYS}, "seed": run.seed}


def _made(path):
    """What a file was made of; "" for a damaged one."""
    try:
        with reading(path, AGAIN), np.load(path) as file:
            return str(file["of"])
    except ModelError:
        return ""
