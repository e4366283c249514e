"""Training of the backbone: what an example looks like, which positions teach, and that packing changes nothing."""

import numpy as np
import pytest
import torch

from aqaa.config import AQTA, ASR_MARKER, TQAA, TTS
from aqaa.corpus.plan import Item
from aqaa.tokenizers import dialogue, interleave
from aqaa.tokenizers.text import FIRST_TEXT, tagged
from aqaa.training import examples as E
from aqaa.training import objectives as K
from aqaa.training.loop import Trainer, build_optimizers
from aqaa.training.stages import STAGES
from tests.conftest import SENTENCES, tiny_config

CONFIG = tiny_config()
IDS = CONFIG.ids
LINES = [{"question": SENTENCES[i], "answer": SENTENCES[i + 1], "manner": m, "intent": intent}
         for i, m, intent in ((0, "slow", "sum"), (2, "normal", "person"))]  # fmt: skip
MIXTURES = {name: stage.mixture for name, stage in STAGES.items() if stage.mixture and name != "sight"}
EXAMPLES = sorted({kind for mixture in MIXTURES.values() for kind in mixture})


def item(number, role, text, intent="", answer="", answer_id="", manner=""):
    one = Item(f"{role[0]}{number}", "train", "", role, text, "voice", 0, intent=intent, answer=answer, manner=manner)
    one.answer_id = answer_id
    return one


def library(tokenizer):
    """A Book of three answers, four questions, an answer-voice sentence and a sentence, with random codes."""
    items = [
        item(0, "answer", SENTENCES[1], manner="slow", answer_id="a0"),
        item(1, "answer", SENTENCES[3], manner="normal", answer_id="a1"),
        item(2, "answer", " ".join(SENTENCES[:4]), manner="happy", answer_id="a2"),
        item(3, "question", SENTENCES[0], "sum", SENTENCES[1], "a0", manner="slow"),
        item(4, "question", SENTENCES[2], "person", SENTENCES[3], "a1"),
        item(5, "question", SENTENCES[4], "person", SENTENCES[3], "a1"),
        item(6, "question", SENTENCES[6], "echo", " ".join(SENTENCES[:4]), "a2", manner="happy"),
        item(7, "generic", SENTENCES[5], manner="sad"),
        item(8, "generic", SENTENCES[7]),
    ]
    rng = np.random.default_rng(0)
    groups = [9, 7, 12, 4, 3, 5, 4, 2, 3]
    codes = [(rng.integers(0, 16, 2 * n), rng.integers(0, 32, 3 * n)) for n in groups]
    return E.Book(CONFIG, tokenizer, items, codes, LINES)


@pytest.fixture(scope="module")
def book(tiny_text):
    return library(tiny_text)


def make(book, stage="sft1", **options):
    torch.manual_seed(0)
    return K.LanguageTask(book, MIXTURES[stage], **{"rows": 3, "length": 300, **options})


@pytest.fixture(scope="module")
def task(book):
    return make(book)


def example(task, kind, seed=0):
    return getattr(task.examples, kind)(np.random.default_rng(seed))


def header(task, role):
    return [IDS.bot, *task.examples.book.encode(f"{role}\n")]


def parts_of(task, ids):
    """(where the question begins, where it ends, where the answer begins) in a list of ids."""
    asked, opened = header(task, "human"), [IDS.eot, *header(task, "assistant")]
    ends = [i for i in range(len(ids)) if ids[i : i + len(opened)] == opened]
    starts = [i + len(asked) for i in range(ends[-1]) if ids[i : i + len(asked)] == asked]
    assert ids[1 + (ids[1] < IDS.n_text and ids[1] != IDS.bot) :][: len(asked)] == asked and len(starts) == len(ends)
    return starts[-1], ends[-1], ends[-1] + len(opened)  # of the last turn


# ---- the book -------------------------------------------------------------------------------------------------------


def test_questions_without_a_spoken_answer_are_refused(tiny_text, book):
    items = [one for one in book.items if one.answer_id != "a1" or one.role == "question"]
    with pytest.raises(ValueError, match="1 answers were never spoken, a1 among them"):
        E.Book(CONFIG, tiny_text, items, [([], [])] * len(items), LINES)


def test_audio_is_merged_and_text_remembered(book):
    assert [len(audio) for audio in book.audio] == [5 * n for n in (9, 7, 12, 4, 3, 5, 4, 2, 3)]
    assert book.encode(SENTENCES[0]) is book.encode(SENTENCES[0])
    assert book.tokenizer.decode(book.encode(SENTENCES[0])) == SENTENCES[0]


# ---- one example ----------------------------------------------------------------------------------------------------


def test_voices_are_not_asked_about_in_writing(tiny_text):
    """No transcript holds the answer; so such a question is only ever heard."""
    book = library(tiny_text)
    for one in book.items:
        one.category = E.VOICE if one.intent == "person" else "Language Ability"
    drawer, rng = E.Examples(book, {}), np.random.default_rng(0)

    def intents(probs):
        return {book.items[drawer.pair(rng, probs)[0]].intent for _ in range(40)}

    assert intents(drawer.written_probs) == {"sum", "echo"} and "person" in intents(drawer.probs)


def dialogues(tokenizer, copies=None):
    """The library with a second question, and codes by name, some with copies."""
    book = library(tokenizer)
    second = item(9, "follow", SENTENCES[3], "follow_again", SENTENCES[1], "a0", manner="slow")
    second.slots = {"asked": SENTENCES[0], "answered": f"(slow) {SENTENCES[1]}"}
    noise = item(10, "question", SENTENCES[7], E.UNHEARD, SENTENCES[3], "a1")
    rng, items = np.random.default_rng(1), [*book.items, second, noise]
    names = [name for one in items for name in (one.id, *(copies or {}).get(one.id, ()))]
    stored = {name: (rng.integers(0, 16, 4), rng.integers(0, 32, 6)) for name in names}
    return E.Book(CONFIG, tokenizer, items, stored, LINES)


def test_a_second_question_stands_behind_the_first(tiny_text):
    book = dialogues(tiny_text)
    drawer, lengths = E.Examples(book, {}, noise=0), set()
    first = [t for role, text in (("user", SENTENCES[0]), ("assistant", f"(slow) {SENTENCES[1]}"))
             for t in dialogue.prompt([(role, text)], tiny_text, IDS, answer=False)[1:]]  # fmt: skip
    asked, follows = book.audio[9].tolist(), 0
    for seed in range(40):
        ids, weights = drawer.turns(np.random.default_rng(seed))
        ids = ids.tolist()
        lengths.add(ids.count(IDS.bot))
        at = [i for i in range(len(ids)) if ids[i : i + len(asked)] == asked]
        if at:
            follows += 1
            before = ids[: at[0] - len(header_of(book, "human"))]
            assert before[-len(first) :] == first
        assert not weights[: len(ids) - ids[::-1].index(IDS.bot)][:10].any()  # what was said before is given
    assert {4, 6} <= lengths <= {4, 6, 8} and 20 < follows < 40
    assert 9 not in book.questions and book.follows == [9]


def test_any_other_question_stands_behind_one_of_its_kind_more_often_than_behind_others(tiny_text):
    book = dialogues(tiny_text)
    drawer, counts = E.Examples(book, {}, noise=0, follows=0.0), {"sum": [], "person": []}
    said = {line["intent"]: tiny_text.encode(line["question"]) for line in LINES}
    for seed in range(200):
        ids = drawer.turns(np.random.default_rng(seed))[0].tolist()
        (asked,) = [i for i in book.questions if last(ids, book.audio[i].tolist()) >= 0]
        before = ids[: last(ids, book.audio[asked].tolist())]
        if (intent := book.items[asked].intent) in said:
            counts[intent].append(max(said, key=lambda name: last(before, said[name])) == intent)
    assert all(len(same) > 20 and 0.6 < np.mean(same) < 0.9 for same in counts.values())  # 3 of 4: there are two lines
    drawer = E.Examples(book, {}, noise=0, follows=1.0)
    drawn = [drawer.turns(np.random.default_rng(seed))[0].tolist() for seed in range(9)]
    assert all(last(ids, book.audio[9].tolist()) > 0 for ids in drawn)


def last(ids, part):
    """The last place in ids where `part` stands, or -1."""
    return max((i for i in range(len(ids)) if ids[i : i + len(part)] == part), default=-1)


def header_of(book, role):
    return [IDS.bot, *book.encode(f"{role}\n")]


def test_copies_are_heard_in_place_of_what_was_spoken(tiny_text):
    book = dialogues(tiny_text, {"q3": ("q3~1", "q3~2")})
    drawer = E.Examples(book, {}, noise=0)
    heard = {tuple(drawer.noisy(np.random.default_rng(seed), 3).tolist()) for seed in range(30)}
    assert heard == {tuple(ids.tolist()) for ids in book.heard[3]} and len(heard) == 3
    assert len(book.heard[4]) == 1 and book.audio[3] is book.heard[3][0]
    with pytest.raises(ValueError, match="there are no codes of a0: run `aqaa train codes`"):
        E.Book(CONFIG, tiny_text, book.items, {}, LINES)


def test_noise_has_no_words_and_is_not_asked_in_writing(tiny_text):
    book = dialogues(tiny_text)
    drawer, rng = E.Examples(book, {}), np.random.default_rng(0)
    assert 10 in book.questions and 10 not in book.spoken_words
    assert 10 in {drawer.pair(rng, drawer.probs)[0] for _ in range(60)}
    assert 10 not in {drawer.pair(rng, drawer.written_probs)[0] for _ in range(60)}


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize("seed", [0, 1])
def test_only_the_answer_and_what_was_heard_are_targets(task, kind, seed):
    ids, weights = example(task, kind, seed)
    assert ids[0] == IDS.bos and weights[0] == 0 and len(ids) == len(weights)
    if kind == "next":
        assert (ids[1:] >= IDS.n_text).all() and (weights[1:] == E.ANSWER_WEIGHT).all()
        return
    if kind == "joined":
        assert (weights[1:] == np.where(ids[1:] < IDS.n_text, E.TEXT_WEIGHT, E.ANSWER_WEIGHT)).all()
        return
    first, end, start = parts_of(task, ids.tolist())
    assert ids[-1] == IDS.eot
    assert (weights[start:] == np.where(ids[start:] < IDS.n_text, E.TEXT_WEIGHT, E.ANSWER_WEIGHT)).all()
    assert not weights[: first + 1].any() and not weights[end:start].any()
    assert (weights[first + 1 : end] == np.float32(E.HEARD_WEIGHT)).all()


def test_examples_are_what_their_names_say(book):
    task = make(book, noise=0)
    audio = {tuple(ids.tolist()): one for ids, one in zip(book.audio, book.items, strict=True)}
    said = {tuple(book.encode(text)): text for text in SENTENCES}
    said |= {tuple(book.encode(one.text)): one.text for one in book.items}
    said |= {tuple(book.encode(tagged(one.text, one.manner))): one.text for one in book.items}
    answers = {one.text: one.answer for one in book.items if one.role == "question"}
    markers = {"asr": ASR_MARKER, "tts": TTS, "tqaa": TQAA, "aqta": AQTA}
    for kind in set(EXAMPLES) - {"next", "joined"}:
        for seed in range(5):
            ids = example(task, kind, seed)[0].tolist()
            first, end, start = parts_of(task, ids)
            assert ids[1] == markers.get(kind, IDS.bot)
            question = tuple(ids[first:end])
            words, sound = (tuple(part) for part in task.examples.layout.parse(ids[start:], IDS))
            if kind == "text":
                manner = book.tokenizer.decode(words[:1])[1:-1] if words[0] < FIRST_TEXT else "normal"
                line = {"question": said[question], "answer": said[words], "manner": manner}
                assert any(line.items() <= one.items() for one in LINES) and not sound
            elif kind == "asr":
                assert audio[question].text == said[words] and not sound
            elif kind == "tts":
                assert book.tokenizer.decode(question) == tagged(audio[sound].text, audio[sound].manner)
                assert not words and audio[sound].role == "answer"
            elif kind == "tqaa":
                assert answers[said[question]] == said[words] == audio[sound].text
            else:
                assert answers[audio[question].text] == said[words] == audio[question].answer
                assert words == tuple(book.encode(tagged(said[words], audio[question].manner)))
                assert (not sound) if kind == "aqta" else audio[sound].text == said[words]


def test_joined_examples_say_every_word_once_in_letters_or_in_sound(book):
    task, seen = make(book, noise=0), set()
    for seed in range(40):
        ids = example(task, "joined", seed)[0][1:]
        audio = (ids >= IDS.n_text).tolist()
        assert sum(a != b for a, b in zip(audio, audio[1:])) <= 1 and audio.count(True) % 5 == 0
        seen.add((audio[0], audio[-1]))
        words, sound = task.examples.book.tokenizer.decode(ids[ids < IDS.n_text].tolist()), ids[audio].tolist()
        whole = [(one, said.tolist()) for one, said in zip(book.items, book.audio, strict=True)
                 if one.text.startswith(words) and (not sound or said.tolist()[-len(sound) :] == sound)
                 or one.text.endswith(words) and said.tolist()[: len(sound)] == sound]  # fmt: skip
        assert any(abs(len(words) / len(one.text) + len(sound) / len(said) - 1) < 0.35 for one, said in whole)
    assert {(True, False), (False, True)} <= seen


def test_embeddings_and_head_learn_at_a_rate_of_their_own(book):
    task = make(book, "pretrain_joined", outer=5.0)
    made = build_optimizers(task.modules, 1.0, outer=task.outer).values()
    groups = [group for one in made for group in one.param_groups]
    names = {id(parameter): name for name, parameter in task.model.named_parameters()}
    fast = {names[id(one)] for group in groups if group.get("factor") == 5.0 for one in group["params"]}
    assert fast == {"model.embed_tokens.weight", "lm_head.weight"}
    assert sum(len(group["params"]) for group in groups) == len(names)


@pytest.mark.parametrize("kind", ["aqtaa", "tqaa"])
@pytest.mark.parametrize("name", dialogue.EVERY_LAYOUT)
def test_the_machine_of_the_layout_allows_every_answer(book, kind, name):
    """What generation may say next, id by id, is what the loss lets compete there."""
    layout = dialogue.layout(name)
    task = make(book, layout=layout)
    rows = [set(ids.tolist()) for ids in task.head_rows()]
    for seed in range(4):
        ids = example(task, kind, seed)[0]
        start, machine = parts_of(task, ids.tolist())[2], layout.machine(IDS)
        for token, index in zip(ids[start:].tolist(), task.kinds(ids)[start - 1 :].tolist(), strict=True):
            may = machine.allowed()
            assert may.kind in (K.KINDS[index], "marker")  # a marker that must come competes with nothing
            assert {*range(may.start, may.stop), *may.markers} <= rows[index]
            machine.advance(token)
        assert machine.finished


@pytest.mark.parametrize("kind, marker", [("aqtaa", None), ("text", None), ("asr", ASR_MARKER)])
def test_prompts_are_those_of_the_pipeline(tiny, book, kind, marker):
    task = make(book, noise=0)
    ids = example(task, kind, 3)[0].tolist()
    first, end, start = parts_of(task, ids)
    question = tiny.text.decode(ids[first:end]) if kind == "text" else ids[first:end]
    assert tiny.prompt(question, marker=marker) == ids[:start]


def test_noise_in_a_question_keeps_the_kinds(book):
    quiet, noisy, index = E.Examples(book, {}, noise=0), E.Examples(book, {}, noise=0.5), 3
    clean = book.audio[index].copy()
    assert np.array_equal(quiet.noisy(np.random.default_rng(0), index), clean)
    changed = []
    for seed in range(30):
        heard = noisy.noisy(np.random.default_rng(seed), index)
        assert np.array_equal(interleave.kinds(heard, IDS), interleave.kinds(clean, IDS))
        changed.append((heard != clean).mean())
    assert 0.4 < np.mean(changed) < 0.55
    assert np.array_equal(book.audio[index], clean)  # the book itself is never touched


def test_what_was_misheard_elsewhere_is_misheard_here():
    """An id becomes only what it became in a bent copy, as often as there, and one that was always heard stays."""
    heard = [[np.array([1, 2, 3, 3]), np.array([1, 5, 4, 3]), np.array([1, 6, 4, 4])], [np.array([2, 9])],
             [np.array([2, 2]), np.array([7])]]  # fmt: skip
    confused = E.confusions(heard, 10)
    rng = np.random.default_rng(0)
    audio = np.array([1, 2, 3, 9])
    made = np.stack([E.misheard(audio, confused, 0.5, rng) for _ in range(2000)])
    assert [set(column) for column in made.T.tolist()] == [{1}, {2, 5, 6}, {3, 4}, {9}]
    assert np.allclose((made != audio).mean(0), [0, 0.5, 0.5, 0], atol=0.05) and abs((made == 5).mean() - 1 / 16) < 0.01
    assert audio.tolist() == [1, 2, 3, 9]
    assert np.array_equal(E.misheard(audio, E.confusions([[audio]], 10), 1.0, rng), audio)  # no copies at all


def test_utterances_without_copies_are_heard_as_if_they_had_some(book, monkeypatch):
    drawer = E.Examples(book, {}, noise=1e-9)
    first = book.audio[0]
    monkeypatch.setattr(book, "confused", E.confusions([[first, np.roll(first, 5)]], IDS.end))
    shares = [(drawer.noisy(np.random.default_rng(seed), 0) != first).mean() for seed in range(200)]
    assert 0.3 < np.mean(np.array(shares) > 0) < 0.6 and max(shares) < E.MISHEARD + 0.25


def test_answers_are_never_noisy(book):
    task = make(book, noise=1.0)
    for seed in range(4):
        ids = example(task, "aqtaa", seed)[0]
        _, audio = task.examples.layout.parse(ids[parts_of(task, ids.tolist())[2] :], IDS)
        assert any(np.array_equal(audio, one) for one in book.audio[:3])


def test_the_second_course_selects_stable_answers_and_special_skills(tiny_text):
    """Text that outlives its sound is no stable format; plain facts are only a reminder."""
    book = library(tiny_text)
    first, second, third, fourth = (book.items[i] for i in book.questions)
    second.category, third.category, fourth.manner = "Sing", "Logical Reasoning", ""
    drawer = E.Examples(book, {}, layout=dialogue.Layout("seven", 7, 15, late_text=True), selected=True, heard=0.0)
    unstable = [one for one, weight in zip((first, second, third, fourth), drawer.selected()) if not weight]
    assert unstable == [fourth] == [one for one in (first, second, third, fourth) if one.answer_id == "a2"]
    assert drawer.selected()[:3].tolist() == [1.0, 1.0, E.REMINDER] and not drawer.probs[3]
    assert drawer.probs.sum() == pytest.approx(1)
    for seed in range(3):
        ids, weights = drawer.aqtaa(np.random.default_rng(seed))
        start = len(ids) - int((weights > 0).sum())
        assert not weights[:start].any() and (weights[start:] > 0).all()  # nothing of the question
    with pytest.raises(ValueError, match="layout one_by_one ends no answer's text"):
        E.Examples(book, {}, layout=dialogue.Layout("one_by_one", 1, 15, late_text=True), selected=True)


def test_masks_show_what_the_loss_sees(task, book):
    ids, weights = example(task, "aqtaa")
    rows = E.masks(ids, weights, book.tokenizer, IDS)
    assert len(rows) == len(ids) and [weight for *_, weight in rows] == weights.tolist()
    assert rows[0] == ("<s>", "marker", 0.0) and rows[-1] == ("<|EOT|>", "marker", E.TEXT_WEIGHT)
    audio = [(piece, kind) for piece, kind, _ in rows if kind in ("linguistic", "semantic")]
    assert audio and all(piece.startswith("<audio_") for piece, _ in audio)
    assert {kind for *_, kind, _ in rows} == {"text", "linguistic", "semantic", "marker"}


# ---- kinds and rows of the head -------------------------------------------------------------------------------------


def test_an_end_after_audio_competes_with_audio(task):
    word, ling, sem = IDS.first_text, IDS.n_text, IDS.semantic_start
    ids = np.array([IDS.bos, IDS.bot, word, IDS.eot, ling, ling, sem, sem, sem, IDS.eot, word, IDS.text_end, ling])
    text, linguistic, semantic = K.TEXT, K.LINGUISTIC, K.SEMANTIC
    assert task.kinds(ids).tolist() == [
        text, text, text, linguistic, linguistic, semantic, semantic, semantic, linguistic, text, text, linguistic,
    ]  # fmt: skip
    late = np.array([sem, IDS.text_start, sem, IDS.audio_end, word, IDS.text_start])
    # The last one comes behind a full block of text: audio would go on there, as the machine says.
    assert task.kinds(late).tolist() == [linguistic, semantic, linguistic, text, linguistic]


def test_columns_find_each_target_among_its_rows(task):
    rows = task.head_rows()
    assert sum(map(len, rows)) == IDS.end + 3  # eot, text_start and audio_end stand in two of them
    for kind, ids in enumerate(rows):
        assert len(ids.unique()) == len(ids) and torch.equal(task.columns(ids, kind), torch.arange(len(ids)))


@pytest.mark.parametrize("stage", MIXTURES)
def test_every_target_that_counts_is_among_the_rows_that_compete(book, stage):
    task = make(book, stage)
    batch = task.batch(np.random.default_rng(0))
    for kind, rows in enumerate(task.head_rows()):
        targets = batch["targets"][(batch["kinds"] == kind) & (batch["weights"] > 0)]
        assert len(targets) and torch.equal(rows[task.columns(targets, kind)], targets)
    assert ((batch["kinds"] >= 0) == (batch["segments"] > 0)).all()


# ---- batches --------------------------------------------------------------------------------------------------------


def test_batches_belong_to_their_generator(task):
    one, same, other = (task.batch(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["input_ids"], other["input_ids"])


def test_rows_are_full_of_whole_examples(task):
    batch = task.batch(np.random.default_rng(0))
    assert (batch["segments"] > 0).float().mean() > 0.8
    for ids, targets, segments in zip(batch["input_ids"], batch["targets"], batch["segments"], strict=True):
        found = segments[segments > 0]
        assert torch.equal(found, found.sort().values) and not segments[len(found) :].any()
        for number in found.unique():
            at = (segments == number).nonzero().flatten()
            assert ids[at[0]] == IDS.bos and targets[at[-1]] in (IDS.eot, *range(IDS.semantic_start, IDS.end))
            assert torch.equal(ids[at[1:]], targets[at[:-1]])


def test_examples_longer_than_a_row_are_left_out(book):
    task = make(book, length=60, rows=2)
    batch = task.batch(np.random.default_rng(3))
    assert batch["input_ids"].shape == (2, 60) and (batch["segments"] > 0).any()


@pytest.mark.parametrize("stage", MIXTURES)
def test_the_mixture_is_drawn_by_its_shares(book, stage, monkeypatch):
    drawer, rng, drawn = E.Examples(book, MIXTURES[stage]), np.random.default_rng(0), []
    for kind in EXAMPLES:
        monkeypatch.setattr(drawer, kind, lambda _, kind=kind: drawn.append(kind))
    for _ in range(2000):
        drawer.draw(rng)
    assert sum(MIXTURES[stage].values()) == pytest.approx(1)
    for kind in EXAMPLES:
        assert drawn.count(kind) / 2000 == pytest.approx(MIXTURES[stage].get(kind, 0), abs=0.04)


def test_large_intents_lead_but_not_by_their_size(book):
    sums, one, two, echo = book.balance()  # intents: sum, person, person, echo
    assert sums + one + two + echo == pytest.approx(1) and one == two < sums == echo < one + two


def separately(task, batch):
    """(weighted sum of the losses, weights) of every example of a batch, each run on its own."""
    for row in range(len(batch["input_ids"])):
        for number in range(1, int(batch["segments"][row].max()) + 1):
            at = batch["segments"][row] == number
            alone = {key: value[row][at][None] for key, value in batch.items()}
            alone["segments"] = torch.ones_like(alone["segments"])
            weight = alone["weights"].sum()
            yield task.loss(alone, 0)[0] * weight, weight


def test_a_packed_batch_is_the_mean_of_its_examples(task):
    batch = task.batch(np.random.default_rng(0))
    with torch.no_grad():
        loss, logs = task.loss(batch, 0)
        sums, weights = zip(*separately(task, batch), strict=True)
    assert len(sums) > 6
    assert loss.item() == pytest.approx(float(sum(sums) / sum(weights)), rel=1e-5)
    assert set(logs) == {"text", "linguistic", "semantic"}
    for name, size in (("text", IDS.n_text), ("linguistic", IDS.n_linguistic + 3), ("semantic", IDS.n_semantic)):
        assert logs[name].item() == pytest.approx(np.log(size), rel=0.15)  # an untrained model knows nothing


def test_a_neighbour_in_the_row_changes_nothing(task):
    batch = task.batch(np.random.default_rng(0))
    first = batch["segments"] == 1
    other = torch.where(first, (batch["input_ids"] + 7) % IDS.end, batch["input_ids"])
    with torch.no_grad():
        before, after = (
            task.model.model(input_ids=ids, segment_ids=batch["segments"]).last_hidden_state
            for ids in (batch["input_ids"], other)
        )
    rest = batch["segments"] > 1
    assert torch.equal(before[rest], after[rest]) and not torch.allclose(before[first], after[first])


def test_codes_that_sound_alike_begin_alike(book):
    task = make(book, "pretrain")
    generator = torch.Generator().manual_seed(0)
    linguistic, semantic = torch.randn(16, 16, generator=generator), torch.randn(32, 16, generator=generator)
    linguistic[5] = linguistic[4] + 0.01
    table = task.model.model.embed_tokens.weight
    text = table[: IDS.n_text].clone()
    task.hear_alike(linguistic, semantic)
    audio = torch.nn.functional.normalize(table[IDS.n_text :].detach(), dim=-1)
    alike = audio @ audio.T - torch.eye(len(audio))
    assert alike[4, 5] > 0.99 and alike[4].argmax() == 5
    assert torch.equal(table[: IDS.n_text], text) and table.isfinite().all()
    assert 0.5 < (table[IDS.n_text :].std() / text.std()).item() < 2


def test_a_few_steps_already_help(book, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_plot", lambda self: None)
    task = make(book, "pretrain", rows=2, length=200)
    batch = task.batch(np.random.default_rng(0))
    before = task.loss(batch, 0)[0].item()
    Trainer(task, tmp_path, "toy", 20, quiet=True).run()
    assert task.loss(batch, 0)[0].item() < 0.97 * before


def test_natural_voices_and_what_only_one_word_decides_are_heard_more_often(tiny_text):
    book = library(tiny_text)
    book.items[3].voice = E.NATURAL[0]
    before = library(tiny_text).balance()
    ratio = book.balance() / before
    assert ratio[0] / ratio[1] == pytest.approx(E.NATURAL_WEIGHT) and np.allclose(ratio[1:], ratio[1])
    shares = book.by_voice(book.questions)
    assert shares.sum() == pytest.approx(1) and shares[0] / shares[1] == pytest.approx(E.NATURAL_WEIGHT)
    assert len(book.by_voice([])) == 0
    book = library(tiny_text)
    book.items[3].intent = "outside_near"
    ratio = book.balance() / before
    assert ratio[0] / ratio[1] == pytest.approx(E.INTENT_WEIGHTS["outside_near"])
