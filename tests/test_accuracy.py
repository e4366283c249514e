"""The bench counts what it should: right, wrong, silent and unsayable answers, each cell for itself."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aqaa import batching
from aqaa.backbone import step1
from aqaa.batching import ask_all
from aqaa.config import preset
from aqaa.corpus.plan import Item
from aqaa.evaluation import accuracy, bench, whisper
from aqaa.evaluation.accuracy import APART, CELLS, METRICS, Row, make_judge, measure, questions, share
from aqaa.pipeline import AQAA
from tests.test_judges import SAID, SOUNDS

OWN = [cell for cell in CELLS if cell not in APART]


class Shelf:
    """A corpus in memory: a question for each cell, the three answers in turn, the second one slowly. Those of
    unrelated second turns are read from other cells."""

    folder = "nowhere"

    def __init__(self):
        self.made, self.sounds = [], {}
        for i, text in enumerate(SAID):
            self._add(SOUNDS[i], f"a{i}", "train", "", "answer", text, answer=text, manner="normal", answer_id=f"a{i}")
        slow = np.repeat(SOUNDS[1], 2)
        self._add(slow, "a3", "train", "", "answer", SAID[1], answer=SAID[1], manner="slow", answer_id="a3")
        for number, cell in enumerate(OWN):
            i = (number + 1) % 3  # seen_new, one of the two cells of new voices, asks for the third answer
            manner, answer_id = ("slow", "a3") if i == 1 else ("normal", f"a{i}")
            category = "Voice Understanding" if i == 2 else "Language Ability"
            asked = dict(answer=SAID[i], manner=manner, answer_id=answer_id, category=category)
            self._add(np.full(800, i / 10), f"q{i}", "eval", cell, "question", "?", **asked)

    def _add(self, wav, name, split, cell, role, text, **fields):
        self.made.append(Item(name, split, cell, role, text, "voice", 0, **fields))
        self.sounds[name + cell] = (np.asarray(wav) * 32767).astype(np.int16)

    def items(self, **wanted):
        return [item for item in self.made if all(getattr(item, name) == value for name, value in wanted.items())]

    def wav(self, item):
        return self.sounds[item.id + APART.get(item.cell, (item.cell,))[0]]

    def answers(self):
        return {item.answer_id: item for item in self.items(role="answer")}


@pytest.fixture
def ask(monkeypatch):
    """A parrot knows which of the three questions was asked, and answers by playing the recording."""

    def ask(texts=SAID, sounds=SOUNDS, open_judge=None, **options):
        def batch(model, wavs, seed=0, histories=None, **sampling):
            asked = [round(float(wav[0]) * 10) for wav in wavs]
            return [(texts[i], [] if sounds[i] is None else [i], 0.5) for i in asked]

        parrot = SimpleNamespace(config=preset("mini"), synthesize=lambda ids, seed: torch.from_numpy(sounds[ids[0]]))
        monkeypatch.setattr(batching, "answer_batch", batch)
        monkeypatch.setattr(whisper, "missing", lambda: [] if open_judge else ["all"])
        monkeypatch.setattr(whisper, "heard", open_judge)
        result = measure(parrot, Shelf(), workers=1, **options)
        return [Row(**row) for row in result["rows"]], result

    return ask


def test_the_open_judge_hears_the_models_words_and_the_teachers(ask):
    """Against the model's own text, not the wanted one; manners written in it are no words."""
    texts = ["(slow) one two (fast) three", *SAID[1:]]
    told = {len(SOUNDS[0]): "one two", len(SOUNDS[1]): SAID[1], len(SOUNDS[1]) * 2: SAID[1], len(SOUNDS[2]): SAID[2]}
    _, result = ask(texts, open_judge=lambda wav: told[len(wav)])
    made, teacher = result["open_judge"]["answers"], result["open_judge"]["teacher"]
    first = sum(row["expected"] == SAID[0] for row in result["rows"])
    assert made["n"] == len(CELLS) and made["error"] == pytest.approx(100 * first / made["words"], abs=0.06)
    wrong = len(set(SAID[0].split()) - {"one", "two"})
    assert teacher["n"] == 3 and teacher["error"] >= 100 * wrong / teacher["words"] - 0.06
    low, high = made["interval"]
    assert 0 <= low <= made["error"] <= high


def test_a_perfect_model(ask):
    rows, result = ask(sounds=[SOUNDS[0], np.repeat(SOUNDS[1], 2), SOUNDS[2]])
    summary = result["summary"]
    assert len(rows) == result["questions"] == len(CELLS) and result["answers"] > 500
    others = [row for row in rows if row.manner == "normal"]
    assert all(row.text for row in rows) and all(r.lenient and r.agrees and r.teacher_lenient for r in others)
    assert all(row.strict == row.teacher_strict for row in others) and any(row.strict for row in others)
    assert [row.manner_ok for row in rows] == [True if row.manner == "slow" else None for row in rows]
    for name in CELLS.values():
        assert summary[name]["text"]["n"] == 1 and summary[name]["text"]["share"] == 1
    assert summary["Voice Understanding, new voices"]["text"]["n"] == 1
    assert summary["manner: slow"]["manner_ok"]["share"] == 1
    json.dumps(result)


def test_wrong_words_wrong_sound_and_silence(ask):
    rows, facts = ask(["seven plus five is equal to ten", SAID[1], "xqzt"], [SOUNDS[0], SOUNDS[2], None])
    wrong, swapped, silent = ([row for row in rows if row.expected == text] for text in SAID)
    assert wrong and all((row.text, row.lenient, row.agrees) == (False, True, False) for row in wrong)
    assert all((row.text, row.lenient, row.agrees, row.manner_ok) == (True, False, False, False) for row in swapped)
    assert all((row.heard, row.lenient, row.strict, row.agrees) == ("", False, False, False) for row in silent)
    assert facts["unsayable_texts"] == 1 and facts["grammar"] == facts["answers"] + 1


def test_text_only_measures_text_only(ask):
    rows, result = ask(text_only=True)
    assert all(row.text and row.lenient is None and row.teacher_lenient is None for row in rows)
    assert result["summary"]["all"]["lenient"]["share"] is None and "-" in accuracy.table(result)


def test_the_grammar_has_all_answers_and_what_was_written():
    judge, unsayable = make_judge(SAID, ["The Opposite of hot is  warm", SAID[0], "", "zzxq"])
    assert judge.answers == sorted([*SAID, "the opposite of hot is warm"]) and unsayable == 1
    assert judge.bigrams == sorted(SAID)
    assert len(accuracy.all_answers()) >= accuracy.FEWEST_ANSWERS


def test_limit_spreads_over_a_cell():
    made = [Item(i, "eval", "seen_new", "question", "?", "voice") for i in range(10)]
    corpus = SimpleNamespace(items=lambda split, cell: [item for item in made if item.cell == cell])
    assert [item.id for item in questions(corpus, 3)] == [0, 3, 6]
    assert len(questions(corpus)) == len(questions(corpus, 50)) == 10
    corpus.folder, made[:] = "here", []
    with pytest.raises(ValueError, match="here holds no evaluation questions"):
        measure(None, corpus)


def test_an_unrelated_second_turn_is_a_first_question_behind_the_first_of_another(monkeypatch):
    """Which one depends on the question alone, and all are used; what it is scored by is its own answer."""
    cells = {"seen_seen": "question", "follow_seen": "follow", "known_natural": "question", "follow_natural": "follow"}
    made = [Item(f"{cell}{i}", "eval", cell, role, "?", "voice") for cell, role in cells.items() for i in range(20)]
    corpus = SimpleNamespace(
        items=lambda **wanted: [one for one in made if all(getattr(one, k) == v for k, v in wanted.items())],
        before=lambda item: item.id)  # fmt: skip
    monkeypatch.setattr(accuracy, "recording", lambda corpus, name: name)
    monkeypatch.setattr(accuracy, "Aqaa", lambda *_: SimpleNamespace(before=lambda turns: turns))
    asked = questions(corpus)
    apart = {cell: [item for item in asked if item.cell == cell] for cell in APART}
    for cell, (own, others) in APART.items():
        assert [item.id for item in apart[cell]] == [f"{own}{i}" for i in range(20)]
        found = [accuracy.history(None, corpus, item)[0] for item in apart[cell]]
        assert all(name.startswith(others) for name in found) and len(set(found)) > 8
        assert found == [accuracy.history(None, corpus, item)[0] for item in apart[cell]]
    assert not any(accuracy.history(None, corpus, item) for item in asked if item.cell == "seen_seen")


def test_without_a_corpus_only_the_evaluation_is_spoken(monkeypatch, tmp_path):
    from aqaa.corpus import plan, play, speak

    monkeypatch.setattr(play, "joined", lambda seed: [])
    shelf, spoken = Shelf(), {}
    unasked = Item("a9", "train", "", "answer", "x", "voice", 0, answer="x", manner="normal", answer_id="a9")
    trained = Item("q9", "train", "", "question", "?", "voice", 0, answer="x", answer_id="a9")
    monkeypatch.setattr(plan, "plan", lambda seed: [*shelf.made, unasked, trained])
    monkeypatch.setattr(speak, "speak", lambda items, folder, workers: spoken.update({folder: items}))
    accuracy.evaluation_corpus(tmp_path)
    ((place, items),) = spoken.items()
    assert place == tmp_path / "evaluation"  # where it is in nobody's way
    assert {item.id for item in items} == {"a0", "a1", "a2", "a3", "q0", "q1", "q2"}
    spoken.clear()
    mine = shelf.items(role="answer") + shelf.items(role="question")
    head = {"hash": speak.plan_hash(mine), "items": 9, "shards": 1}

    def begun(folder, **more):
        folder.mkdir(exist_ok=True)
        (folder / "plan.json").write_text(json.dumps({**head, **more}), encoding="utf-8")

    begun(place)
    accuracy.evaluation_corpus(tmp_path)  # interrupted: goes on
    assert len(spoken.pop(place)) == 4 + len(OWN)
    begun(place, hash="another")
    assert accuracy.evaluation_corpus(tmp_path).heads[""]["hash"] == "another" and not spoken
    begun(tmp_path / "open")  # a part without questions
    assert accuracy.evaluation_corpus(tmp_path).folder == place
    begun(tmp_path / "questions")
    assert accuracy.evaluation_corpus(tmp_path).folder == tmp_path and not spoken


def test_a_place_that_does_not_exist_is_told_before_the_work(tmp_path):
    with pytest.raises(FileNotFoundError, match="folder does not exist"):
        bench.main("accuracy", out=tmp_path / "no" / "x.json")


@given(st.lists(st.sampled_from([True, False, None])))
def test_shares(values):
    counted = [value for value in values if value is not None]
    result = share(values)
    assert result["n"] == len(counted)
    if not counted:
        assert result["share"] is result["error"] is None
        return
    assert result["share"] == pytest.approx(sum(counted) / len(counted)) and 0 < result["error"] <= 0.25


def test_the_table_has_a_line_a_group():
    rows = [Row("q", cell, "Language Ability", "plural", "v", "?", "x", text=True) for cell in CELLS]
    result = {"summary": accuracy.summarise(rows), "questions": 6, "minutes": 1, "answers": 3}
    *lines, facts, _, warning = accuracy.table(result).splitlines()
    assert all(heading in lines[0] for heading in METRICS.values())
    assert [line.split("  ")[0] for line in lines[1:]] == ["all", *CELLS.values(), "Language Ability"]
    assert "100.0 ±" in lines[1] and len({len(line) for line in lines}) == 1
    assert "6 questions in 1 min" in facts and "only 3 answers" in warning


def codes(each):
    """A tokenizer that gives so many codes a group."""
    return SimpleNamespace(encode_batch=lambda wavs: [torch.arange(each * (len(wav) // 1920)) for wav in wavs])


LETTERS = SimpleNamespace(  # a text tokenizer of the special pieces and one text id a byte
    encode=lambda text, **_: [68 + byte for byte in text.encode()],
    decode=lambda ids: " ".join(f"t{token}" for token in ids),
)


def test_questions_are_answered_in_batches_by_a_real_backbone():
    """Untrained, so what it says is noise; but it is whole groups of legal codes, and each question keeps its place."""
    config = preset("mini")
    torch.manual_seed(0)
    backbone = step1.build(config.backbone).eval()
    parts = {"backbone": backbone, "linguistic": codes(2), "semantic": codes(3), "text": LETTERS}
    model = AQAA(config, parts.__getitem__)
    model.synthesize = lambda ids, seed: torch.full((len(ids),), 0.1)
    wavs = [np.zeros(1920 * n, np.float32) for n in (4, 2, 3)]
    first, again = (list(ask_all(model, wavs, batch=2, max_tokens=45)) for _ in range(2))
    assert [i for i, _, _, _ in first] == [1, 2, 0]
    assert all(0 < sure < 1 for *_, sure in first)
    assert all(text.startswith("t") and len(sound) % 5 == 0 and len(sound) for _, text, sound, _ in first)
    assert [text for _, text, *_ in first] == [text for _, text, *_ in again]
    assert all(sound is None for _, _, sound, _ in ask_all(model, wavs, speak=False, max_tokens=12))
