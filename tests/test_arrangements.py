"""Other ways to lay out an answer: pieces that are joined without markers, and one codebook alone."""

import numpy as np
import pytest
import torch

from aqaa.corpus.plan import Item
from aqaa.tokenizers import dialogue, interleave
from aqaa.training import arrangements as A
from aqaa.training import examples as E
from aqaa.training import objectives as K
from tests.conftest import SENTENCES, tiny_config
from tests.test_language import LINES, library

CONFIG = tiny_config()
IDS = CONFIG.ids
CHAINED = A.chained(IDS)
PARTS = SENTENCES[1][:12].strip(), SENTENCES[3][:12].strip()


@pytest.fixture(scope="module")
def book(tiny_text):
    """A book whose one answer is said slowly first and fast from its third group on."""
    words = f"{PARTS[0]} (fast) {PARTS[1]}"
    answer = Item("s0", "train", "", "answer", words, "voice", 0, manner="slow", answer_id="s0")
    question = Item("q0", "train", "", "question", SENTENCES[0], "voice", 0, intent="switch", answer=words,
                    manner="slow", answer_id="s0")  # fmt: skip
    rng = np.random.default_rng(0)
    codes = [(rng.integers(0, 16, 2 * n), rng.integers(0, 32, 3 * n)) for n in (8, 4)]
    return E.Book(CONFIG, tiny_text, [answer, question], codes, LINES, {"s0": [3]})


def legal(layout, answer):
    """The machine of a layout after an answer; each of its ids must have been allowed."""
    machine = layout.machine(IDS)
    for token in answer:
        may = machine.allowed()
        assert may.start <= token < may.stop or token in may.markers, (token, may)
        machine.advance(token)
    return machine


def test_pieces_are_cut_where_the_manner_changes(book):
    pieces = book.pieces(0)
    words, audio = book.spoken(0)
    assert [len(sound) for _, sound in pieces] == [15, 25]
    assert dialogue.join(pieces) == (list(words), list(audio))
    tags = [book.tokenizer.decode(list(text), False).split()[0] for text, _ in pieces]
    assert tags == ["(slow)", "(fast)"]
    codes = [interleave.split(ids.tolist(), IDS) for ids in book.audio]
    assert len(E.Book(CONFIG, book.tokenizer, book.items, codes, LINES).pieces(0)) == 1  # nobody knows where


@pytest.mark.parametrize("layout", [CHAINED, A.BOTH, A.MARKED], ids=lambda layout: layout.name)
def test_each_way_of_joining_holds_the_whole_answer(book, layout):
    drawn = E.Examples(book, {"aqtaa": 1.0}, layout=layout, noise=0.0)
    answer = drawn.spoken(0)
    assert legal(layout, answer).finished
    text, audio = layout.parse(answer, IDS)
    words, sound = book.spoken(0)
    assert text == list(words) and audio == list(sound)
    kept = answer.count(IDS.audio_start), answer.count(IDS.text_end)
    assert kept == {"pre_interleaved": (0, 2), "ratio_10_15": (0, 1), "marker_preserving": (2, 2)}[layout.name]


def test_only_a_manner_may_follow_sound_between_pieces(book):
    (first, sound), _ = book.pieces(0)
    machine = legal(CHAINED, CHAINED.arrange(first, sound, IDS)[:-1])
    assert set(machine.allowed().markers) == {IDS.eot, *CHAINED.starts}
    plain = legal(A.BOTH, A.BOTH.arrange(first, sound, IDS)[:-1])
    assert plain.allowed().markers == (IDS.eot,)
    assert book.tokenizer.decode([CHAINED.starts[0]], False) == "(slow)"


def test_a_manner_behind_sound_competes_with_sound(book):
    task = K.LanguageTask(book, {"aqtaa": 1.0}, layout=CHAINED, rows=1, length=200, noise=0.0)
    answer = np.array([IDS.eot, *task.examples.spoken(0)])
    kinds = task.kinds(answer)
    second = np.flatnonzero(answer[1:] == CHAINED.starts[1])[0]
    assert kinds[0] == K.TEXT and kinds[second] == K.LINGUISTIC
    column = task.columns(torch.tensor([CHAINED.starts[1]]), K.LINGUISTIC)
    assert task.head_rows()[K.LINGUISTIC][column] == CHAINED.starts[1]
    batch = task.batch(np.random.default_rng(0))
    loss, logs = task.loss(batch, 0)
    assert torch.isfinite(loss) and set(logs) == {"text", "linguistic", "semantic"}


@pytest.mark.parametrize("kept", ["linguistic", "semantic"])
def test_one_codebook_alone(book, kept):
    layout = A.OneCodebook(kept)
    both = A.BOTH.arrange(*book.spoken(0), IDS)
    answer = layout.only(both, IDS)
    kinds = {interleave.KINDS[kind] for kind in interleave.kinds(np.array(answer), IDS)}
    assert kept in kinds and layout.dropped not in kinds
    assert legal(layout, answer).finished  # its machine takes what the examples hold
    text, audio = layout.parse(answer, IDS)
    words, sound = book.spoken(0)
    assert text == list(words) and len(audio) == len(sound) // 5 * (2 if kept == "linguistic" else 3)


@pytest.mark.parametrize("kept", ["linguistic", "semantic"])
def test_the_other_codebook_is_nowhere_in_training(tiny_text, kept):
    task = A.OneCodebookTask(library(tiny_text), {"next": 0.4, "aqtaa": 0.4, "asr": 0.2}, layout=A.OneCodebook(kept),
                             rows=2, length=200)  # fmt: skip
    batch = task.batch(np.random.default_rng(0))
    ids = batch["input_ids"].numpy()
    low, high = (IDS.semantic_start, IDS.end) if kept == "linguistic" else (IDS.n_text, IDS.semantic_start)
    assert not ((low <= ids) & (ids < high)).any()
    dropped = K.SEMANTIC if kept == "linguistic" else K.LINGUISTIC
    assert not (batch["kinds"] == dropped).any()
    for kind, _, losses in task.losses(batch):
        assert kind != dropped and torch.isfinite(losses).all()
    told = A.surprise(task.model, task.examples.book, A.OneCodebook(kept))
    assert set(told) == {f"nats_{kept}"}


def test_what_variants_start_from_has_seen_every_layout(book):
    task = A.EveryLayout(book, {"aqtaa": 1.0}, rows=2, length=300)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(60):
        task.examples.draw(rng)
        seen.add(task.examples.layout.name)
    assert seen == {*dialogue.EVERY_LAYOUT, "marker_preserving"}


def test_an_intent_can_be_favoured(tiny_text):
    book = library(tiny_text)
    usual, more = (E.Examples(book, {"aqtaa": 1.0}, favour=favour) for favour in ({}, {"echo": 5.0}))
    place = [book.items[i].intent for i in book.questions].index("echo")
    odds = [one.probs[place] / (1 - one.probs[place]) for one in (usual, more)]
    assert odds[1] == pytest.approx(5 * odds[0])
