"""Preference training: which terms count, what has no gradient, pairs that are refused, and how pairs are made."""

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from aqaa.corpus import plan, play, wider
from aqaa.files import data_folder
from aqaa.tokenizers import dialogue
from aqaa.tokenizers.text import TextTokenizer, normalise
from aqaa.training import judged as J
from aqaa.training import objectives as K
from aqaa.training import pairs as P
from aqaa.training import preference as D
from aqaa.training.loop import Trainer, autocast
from aqaa.training.run import Run
from tests.conftest import SENTENCES, fails, tiny_config
from tests.test_language import library

CONFIG = tiny_config()
IDS = CONFIG.ids
LAYOUT = dialogue.layout()


@pytest.fixture(scope="module")
def book(tiny_text):
    return library(tiny_text)


def answer(book, question, words=None, audio=None):
    """Ids of an answer of these words and the audio of an utterance of the book."""
    spoken = book.audio[book.answers[book.items[question].answer_id] if audio is None else audio]
    return LAYOUT.arrange(book.encode(words or book.items[question].answer), spoken, IDS)


@pytest.fixture(scope="module")
def pairs(book):
    """A pair of each question: the head of its answer, and other words with another sound."""
    made = []
    for i, question in enumerate(book.questions):
        right = answer(book, question, " ".join(book.items[question].answer.split()[:3]))
        wrong = answer(book, question, f"no {SENTENCES[i][:6]}", audio=i % 3)
        (prompt,) = J.prompts(book, [question])
        made.append(P.Pair(prompt, right, wrong, "sampled", book.items[question].id))
    return made


def task_of(pairs, **options):
    torch.manual_seed(0)
    task = D.PreferenceTask(CONFIG, pairs, **{"rows": 3, **options})
    task.refer()
    return task


# ---- the loss -------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_formula():
    logprobs, reference = torch.tensor([[-3.0, -5.0], [-2.0, -1.0]]), torch.tensor([[-4.0, -5.5], [-2.0, -3.0]])
    losses, margin = D.dpo_loss(logprobs, reference, 0.2)
    assert margin.tolist() == pytest.approx([1 - 0.5, 0 - 2])
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-0.2 * m)) for m in (0.5, -2)])


@pytest.mark.parametrize("objective", D.OBJECTIVES)
def test_at_its_reference_a_model_prefers_neither(pairs, objective):
    task = task_of(pairs, objective=objective)
    with autocast("cpu"):  # as in training
        loss, logs = task.loss(task.batch(np.random.default_rng(0)), 0)
    anchor = float(logs.get("anchor", 0.0))
    assert loss.item() - anchor == pytest.approx(math.log(2), abs=1e-5) and abs(float(logs["margin"])) < 1e-3


def test_summed_logprobs_are_those_of_answers_alone(pairs, monkeypatch):
    """Against a plain forward pass: restricted softmax at each place of the answer, prompt left out."""
    monkeypatch.setattr(D, "autocast", lambda device: nullcontext())
    task = task_of(pairs)
    sums = task.logprobs([1])[0]
    for side, ids in enumerate((pairs[1].chosen, pairs[1].rejected)):
        whole = torch.tensor([*pairs[1].prompt, *ids])
        with torch.no_grad():
            logits = task.model(input_ids=whole[None, :-1]).logits[0].float()
        wanted, start = [0.0, 0.0, 0.0], len(pairs[1].prompt) - 1
        for at, kind in list(enumerate(task.kinds(whole.numpy())))[start:]:
            rows = task.head_rows()[kind]
            column = (rows == whole[at + 1]).nonzero()[0, 0]
            wanted[kind] += float(logits[at, rows].log_softmax(-1)[column])
        assert sums[side].tolist() == pytest.approx(wanted, rel=1e-4)


def gradients(task):
    """(gradient of the logits' hidden states by place (B, T, D), that of lm_head), and the batch."""
    batch, seen = task.batch(np.random.default_rng(0)), {}
    trunk = task.model.model.forward

    def keep(*args, **kwargs):
        out = trunk(*args, **kwargs)
        out.last_hidden_state.retain_grad()
        seen["hidden"] = out.last_hidden_state
        return out

    task.model.model.forward = keep
    task.model.zero_grad()
    # A margin of zero has a gradient too: log σ is steepest around there.
    task.loss(batch, 0)[0].backward()
    task.model.model.forward = trunk
    return seen["hidden"].grad, task.model.lm_head.weight.grad, batch


def test_masked_audio_has_exactly_no_gradient(pairs):
    """Neither at any place where audio ids compete, nor in any row of lm_head that makes sound."""
    hidden, head, batch = gradients(task_of(pairs, objective="text_masked"))
    text = (batch["kinds"] == K.TEXT) & (batch["weights"] > 0)
    assert (hidden[~text] == 0).all() and (hidden[text] != 0).any(-1).all()
    assert (head[IDS.n_text :] == 0).all() and (head[: IDS.n_text] != 0).any()


def test_speech_only_is_its_mirror_and_plain_is_both(pairs):
    hidden, head, batch = gradients(task_of(pairs, objective="speech_only"))
    text = (batch["kinds"] == K.TEXT) | (batch["weights"] == 0)
    assert (hidden[text] == 0).all() and (hidden[~text] != 0).any(-1).all()
    markers = torch.zeros(IDS.n_text, dtype=bool)
    markers[[IDS.eot, IDS.text_start, IDS.audio_end]] = True
    assert (head[: IDS.n_text][~markers] == 0).all() and (head[IDS.n_text :] != 0).any()
    both = gradients(task_of(pairs, objective="plain"))[0]
    assert (both[batch["weights"] > 0] != 0).any(-1).all() and (both[batch["weights"] == 0] == 0).all()


def test_an_anchor_learns_the_chosen_answer_and_its_sound(pairs):
    hidden, head, batch = gradients(task_of(pairs, objective="anchored"))
    audio = (batch["kinds"] > K.TEXT) & (batch["weights"] > 0)
    assert (hidden[::2][audio[::2]] != 0).any(-1).all()  # chosen answers stand in even rows
    assert (hidden[1::2][audio[1::2]] == 0).all() and (head[IDS.n_text :] != 0).any()


def test_training_raises_the_margin_and_leaves_the_rows_of_sound(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_plot", lambda self: None)
    task = task_of(pairs, lr=2e-3)
    before = task.model.lm_head.weight.detach().clone()
    Trainer(task, tmp_path, "dpo", 12, quiet=True).run()
    told = task.finish(0)
    assert told["held_out"]["margin"] > 0 and told["pairs"] == len(pairs) and told["objective"] == "text_masked"
    after = task.model.lm_head.weight
    assert torch.equal(after[IDS.n_text :], before[IDS.n_text :]) and not torch.equal(after, before)


def test_the_reference_is_computed_once_for_the_same_weights(pairs, tmp_path, monkeypatch):
    task, path = task_of(pairs), tmp_path / "reference.npz"
    task.refer(path, "these")
    known = task.reference
    monkeypatch.setattr(D.PreferenceTask, "logprobs", lambda self, numbers: torch.zeros(len(pairs), 2, 3))
    task.refer(path, "these")
    assert torch.equal(task.reference, known)
    task.refer(path, "others")
    assert not task.reference.any()
    path.write_bytes(b"PK")
    with fails("reference.npz is cut short or damaged", "remove it"):
        task.refer(path, "these")


def test_unknown_objectives_and_no_pairs_are_refused(pairs):
    with pytest.raises(ValueError, match="unknown objective 'ppo': choose one of plain, text_masked"):
        D.PreferenceTask(CONFIG, pairs, objective="ppo")
    with pytest.raises(ValueError, match="no pair to learn from"):
        D.PreferenceTask(CONFIG, [])


def test_held_out_questions_are_never_drawn(book, pairs):
    many = [P.Pair(pairs[0].prompt, pairs[0].chosen, pairs[0].rejected, "sampled", f"q{i}") for i in range(80)]
    task = task_of(many)
    assert 2 < len(task.test) < 20 and not set(task.test) & set(task.train)
    assert len(task.test) + len(task.train) == 80


# ---- the file of pairs ----------------------------------------------------------------------------------------------


def test_pairs_come_back_as_they_were_and_small(pairs, tmp_path):
    path = tmp_path / "pairs.npz"
    P.write_pairs(path, pairs, "these")
    assert P.read_pairs(path, IDS, of="these") == pairs
    with np.load(path) as file:
        assert file["ids"].dtype.itemsize <= 2
    P.write_pairs(path, [], "these")
    assert P.read_pairs(path, IDS) == []


def test_the_shipped_pairs_are_of_the_shipped_weights_and_teach_nothing_of_what_is_kept_from_training(tmp_path):
    run = Run(tmp_path, tmp_path, init=data_folder() / "mini", quiet=True)
    pairs = P.read_pairs(run.pairs_file(), run.config.ids, of=run.tokenizers())
    assert len(pairs) > 200 and {pair.why for pair in pairs} == set(P.WHYS)
    planned = plan.plan() + play.joined()
    splits = {item.id: item.split for item in planned + wider.unknown(planned)}
    assert {splits[pair.question] for pair in pairs} == {"train"}
    text = TextTokenizer.from_file(run.tokenizer_file())
    for pair in pairs:
        chosen, rejected = (normalise(text.decode(LAYOUT.parse(ids, run.config.ids)[0]))
                            for ids in (pair.chosen, pair.rejected))  # fmt: skip
        refusing = {"deaf": rejected, "unclear": chosen}.get(pair.why)
        assert refusing is None or refusing in P.REFUSALS


def replaced(pair, **more):
    return P.Pair(**{**pair.__dict__, **more})


BROKEN = {
    "two equal answers": lambda pair: {"rejected": pair.chosen},
    "no question": lambda pair: {"prompt": []},
    "the last one is": lambda pair: {"prompt": [*pair.prompt, IDS.end]},
    "chosen answer that layout ratio_10_15 cannot hold": lambda pair: {"chosen": [IDS.n_text, IDS.eot]},
    "rejected answer that does not end": lambda pair: {"rejected": pair.rejected[:-1]},
}


@pytest.mark.parametrize("words", BROKEN)
def test_pairs_that_teach_nothing_or_wrongly_are_refused(pairs, tmp_path, words):
    path = tmp_path / "pairs.npz"
    P.write_pairs(path, [pairs[0], replaced(pairs[1], **BROKEN[words](pairs[1]))])
    with fails("pairs.npz: pair 1 (q4)", words, "aqaa train pairs"):
        P.read_pairs(path, IDS)


def test_a_file_that_is_none_is_refused(pairs, tmp_path):
    path = tmp_path / "pairs.npz"
    with fails("pairs.npz is missing"):
        P.read_pairs(path, IDS)
    P.write_pairs(path, pairs, "these")
    with fails("other tokenizers"):
        P.read_pairs(path, IDS, of="others")
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"no file of numpy"):
        path.write_bytes(content)
        with fails("cut short or damaged", "aqaa train pairs"):
            P.read_pairs(path, IDS)


# ---- how they are made ----------------------------------------------------------------------------------------------


def judged(book, question, right, sound=None, whole=True, words=None):
    ids = answer(book, question, words)
    return J.Judged(question, ids, whole, words or J.expected(book, question), [], 0.0, right, "", sound)


def test_best_and_worst_make_a_pair_and_the_recording_stands_in(book):
    question = book.questions[1]
    right, wrong = judged(book, question, True, True), judged(book, question, False, False, words="no")
    pair = P.best_and_worst(book, LAYOUT, [wrong, right, wrong])
    assert (pair.chosen, pair.rejected, pair.why) == (right.ids, wrong.ids, "sampled")
    assert P.best_and_worst(book, LAYOUT, [right, right]) is None
    assert P.best_and_worst(book, LAYOUT, [judged(book, question, True, whole=False)]) is None
    unheard = judged(book, question, True, False)  # right words, another sound
    taught = P.best_and_worst(book, LAYOUT, [wrong, unheard])
    assert taught.why == "taught" and taught.rejected == wrong.ids
    assert LAYOUT.parse(taught.chosen, IDS)[1] == book.audio[book.answers["a1"]].tolist()


def test_making_pairs_keeps_only_good_ones_and_is_repeatable(book, tiny):
    heard = []

    def hear(answers):
        heard.extend(answers)

    options = dict(hear=hear, deaf=1.0, max_tokens=120, top_p=1.0)
    made = P.make(tiny.backbone, book, book.questions, LAYOUT, **options)
    assert made == P.make(tiny.backbone, book, book.questions, LAYOUT, **options)
    assert all(one.whole for one in heard)
    assert not [fault for pair in made if (fault := P.fault_of(pair, IDS, LAYOUT))]
    refusals = {tuple(book.encode(text)) for text in P.REFUSALS}

    def refuses(ids):
        return tuple(LAYOUT.parse(ids, IDS)[0]) in refusals

    deaf = [pair for pair in made if pair.why == "deaf"]
    held = [book.items[i].id for i in book.questions if P.holds(book, LAYOUT, i)]  # text ends before sound
    assert 0 < len(held) and [pair.question for pair in deaf] == held
    assert all(refuses(pair.rejected) and not refuses(pair.chosen) for pair in deaf)
    clear = {pair.question: pair.prompt for pair in deaf}
    for pair in made:
        if pair.why == "unclear":
            assert refuses(pair.chosen) and not refuses(pair.rejected) and pair.prompt != clear[pair.question]


def test_an_ear_hears_the_sound_of_answers(book, tiny, monkeypatch):
    ones = [judged(book, book.questions[0], True), judged(book, book.questions[1], False, words="no")]
    said = iter(["seven plus five is twelve", ""])

    class Ear:
        def hear_all(self, sounds, *rest):
            return [next(said) for _ in sounds]

    monkeypatch.setattr(J, "make_judge", lambda known, texts, seed: (Ear(), 0))
    monkeypatch.setattr(J, "speak_ids", lambda *args: np.zeros(10, np.float32))
    J.listen(tiny, book, ones)
    assert [(one.sound, one.agrees) for one in ones] == [(True, True), (False, False)]
    assert [one.score for one in ones] == [2, 0]


def test_the_rule_reads_the_manner(book):
    question = book.questions[0]  # its answer is slow
    text = J.expected(book, question)
    assert J.exactly(book, question, text) and "slow" in text
    assert not J.exactly(book, question, book.items[question].answer)


# ---- TRL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["plain", "text_masked", "speech_only"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of TRL, about transformers
def test_trl_computes_the_same_loss(pairs, tmp_path, tiny_text, objective, monkeypatch):
    """trl.DPOTrainer on the transformers model: a collator leaves out what an objective does not count. Its softmax
    runs over the whole vocabulary; with that one, ours has the same loss and the same gradient."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'aqaa[train]' brings it")
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class Whole(D.PreferenceTask):
        def head_rows(self):
            return [torch.arange(IDS.end)] * 3

        def columns(self, targets, kind):
            return targets

    class Masking(DataCollatorForPreference):
        def torch_call(self, examples):
            batch = super().torch_call(examples)
            for ids, mask in zip(batch["input_ids"].numpy(), batch["completion_mask"], strict=True):
                mask[1:] *= torch.from_numpy(np.isin(ours.kinds(ids), D.OBJECTIVES[objective].kinds))
            return batch

    monkeypatch.setattr(D, "autocast", lambda device: nullcontext())  # both in fp32
    torch.manual_seed(0)
    ours = Whole(CONFIG, pairs, objective=objective, beta=0.2)
    ours.refer()
    model, reference = copy.deepcopy(ours.model), copy.deepcopy(ours.model)
    tiny_text.save_pretrained(tmp_path)
    trainer = trl.DPOTrainer(
        model, ref_model=reference, data_collator=Masking(0), processing_class=AutoTokenizer.from_pretrained(tmp_path),
        args=trl.DPOConfig(output_dir=str(tmp_path), beta=0.2, report_to=[], use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
    )  # fmt: skip
    with torch.no_grad():  # away from the reference
        for one, other in zip(ours.model.parameters(), model.parameters(), strict=True):
            noise = 0.05 * torch.randn_like(one)
            one.add_(noise)
            other.add_(noise)
    loss, _ = ours.loss({**ours.collate(range(3)), "reference": ours.reference[:3]}, 0)
    data = [{"prompt_ids": one.prompt, "chosen_ids": one.chosen, "rejected_ids": one.rejected} for one in pairs[:3]]
    theirs = trainer.compute_loss(trainer.model, Masking(0).torch_call(data))
    assert abs(loss.item() - math.log(2)) > 1e-3  # the noise did something
    assert theirs.item() == pytest.approx(loss.item(), abs=1e-5)
    loss.backward()
    theirs.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, ours.model.lm_head.weight.grad, rtol=1e-3, atol=1e-6)
