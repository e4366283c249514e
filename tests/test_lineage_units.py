"""SpeechGPT and AudioPaLM: tasks told in words, answered in steps; their stages in miniature."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from aqaa import cli
from aqaa.corpus import plan
from aqaa.evaluation import systems
from aqaa.files import ModelError
from aqaa.lineage import audiopalm, speechgpt, units
from aqaa.lineage.units import MERGED, TASKS, UNITS, Steps
from aqaa.tokenizers import interleave
from aqaa.training import judged
from aqaa.training import run as K
from aqaa.training.lineage import audiopalm as P
from aqaa.training.lineage import speechgpt as S
from aqaa.training.lineage import steps as T
from aqaa.training.lineage import table
from aqaa.training.loop import Trainer
from tests.conftest import RATE, SENTENCES, tiny_config, tone
from tests.test_language import IDS, dialogues

CONFIG = tiny_config()
KINDS = {MERGED: audiopalm.TAGS, UNITS: speechgpt.INSTRUCTIONS}
NAMES = {"speechgpt": S, "audiopalm": P}


@pytest.fixture(scope="module")
def book(tiny_text):
    return dialogues(tiny_text)


def examples(book, group, **options):
    return T.StepExamples(book, {"next": 1.0}, KINDS[group], group, **{"noise": 0.0, **options})


def drawn(book, group, task, seed=0):
    """(prompt, answer) of an example, lists of ids."""
    rng, maker = np.random.default_rng(seed), examples(book, group)
    ids, weights = maker.steps(rng, task, **maker.parts(rng, task))
    start = len(ids) - ids.tolist()[::-1].index(IDS.bot)
    start += len(book.encode("assistant\n"))
    assert (weights[start:] >= 1).all() and ids[-1] == IDS.eot
    return ids[:start].tolist(), ids[start:].tolist()


# ---- answers in steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [UNITS, MERGED])
@pytest.mark.parametrize("texts", [0, 1, 2])
def test_whatever_the_machine_allows_is_taken_apart_again(texts, group):
    """A walk that chooses at random what may come next: texts in their order, then whole groups, then eot."""
    for seed in range(20):
        steps, rng, tokens, seen = Steps(texts, group), np.random.default_rng(seed), [], []
        machine = steps.machine(IDS, min_audio=len(group))
        while not machine.finished:
            may = machine.allowed()
            choices = [*range(may.start, may.stop), *list(may.markers) * 20]
            tokens.append(int(rng.choice(choices)))
            seen.append(may.kind)
            machine.advance(tokens[-1])
        written, audio = steps.split(tokens, IDS)
        assert len(written) == texts and all(written[-1:]) and tokens.count(IDS.text_end) == texts
        assert seen == sorted(seen, key=["text", "linguistic", "semantic"].index) or group == MERGED
        assert len(audio) >= len(group) and len(audio) % len(group) == 0
        letters = "".join("L" if token < IDS.semantic_start else "S" for token in audio)
        assert letters == group * (len(audio) // len(group))
        assert steps.arrange(written, audio, IDS) == tokens
        assert steps.parse(tokens, IDS) == (written[-1] if texts else [], audio)
        assert machine.allowed() == ("end", 0, 0, ())


def test_what_is_out_of_order_is_refused():
    steps, text, unit = Steps(2, UNITS), IDS.first_text, IDS.semantic_start
    machine = steps.machine(IDS)
    for token in (unit, IDS.n_text, IDS.eot, IDS.text_start):  # sound before words
        with pytest.raises(ValueError, match=f"id {token} is not legal here"):
            machine.advance(token)
    machine.advance(IDS.text_end)  # noise has no transcript
    with pytest.raises(ValueError, match="is not legal"):
        machine.advance(IDS.text_end)  # but an answer has words
    for token in (text, IDS.text_end, unit, unit):
        machine.advance(token)
    for token in (IDS.eot, text, IDS.n_text):  # in the middle of a group; text; the other codebook
        with pytest.raises(ValueError, match="is not legal"):
            machine.advance(token)
    for wrong in ([unit] * 4, [IDS.n_text] * 3, []):
        with pytest.raises(ValueError, match="is not legal"):
            steps.arrange([[text], [text]], wrong, IDS)
    assert Steps(1).arrange([[text]], [], IDS) == [text, IDS.eot]
    assert Steps(2).arrange([[], [text]], [], IDS) == [IDS.text_end, text, IDS.eot]
    assert Steps(2, UNITS).split([text, IDS.text_end], IDS) == ([[text], []], [])  # cut short


# ---- examples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [*speechgpt.INSTRUCTIONS, "next"])
def test_no_linguistic_id_is_in_what_speechgpt_hears_or_says(book, task):
    maker = T.StepExamples(book, {task: 1.0}, speechgpt.INSTRUCTIONS, UNITS)
    for seed in range(10):
        ids, weights = maker.draw(np.random.default_rng(seed))
        assert len(ids) == len(weights) and not ((ids >= IDS.n_text) & (ids < IDS.semantic_start)).any()
        assert (ids >= IDS.semantic_start).any() == (task != "text")


def test_the_chain_is_transcript_then_answer_then_units(book):
    for seed in range(10):
        asked, answer = drawn(book, UNITS, "chain", seed)
        heard = [token for token in asked if token >= IDS.n_text]
        (index,) = [i for i in (*book.questions, *book.follows) if book.audio[i][book.audio[i] >= IDS.semantic_start]
                    .tolist() == heard]  # fmt: skip
        item = book.items[index]
        texts, audio = units.layout("chain", UNITS).split(answer, IDS)
        said, whole = book.spoken(book.answers[item.answer_id])
        assert texts == [book.encode(item.text) if item.intent != "unheard" else [], said]
        assert audio == whole[whole >= IDS.semantic_start].tolist()
        at = [answer.index(IDS.text_end), answer.index(audio[0])]
        assert at[0] == len(texts[0]) and at[1] == len(texts[0]) + len(texts[1]) + 2


def test_tags_and_instructions_are_text_in_the_prompt(book):
    for group, words in KINDS.items():
        for task, wordings in words.items():
            for seed in range(4):
                asked, _ = drawn(book, group, task, seed)
                told = book.tokenizer.decode(asked)
                plain = [one.strip("[]") for one in wordings]
                assert any(f"human\n{one}" in told or f"human\n {one}" in told for one in plain), told
                assert not set(asked) & {35, 36, 37, 38}  # no control token of Step-1 names the task
    for words in KINDS.values():  # tasks that hear are told apart
        heard = [wording for task, some in words.items() if TASKS[task].hears for wording in some]
        assert len(heard) == len(set(heard))


def test_a_second_question_stands_behind_the_first(book):
    maker, counts = examples(book, MERGED), []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        ids, _ = maker.steps(rng, "speak", **maker.parts(rng, "speak"))
        counts.append(ids.tolist().count(IDS.bot))
    assert set(counts) == {2, 4} and 8 < counts.count(4) < 30


# ---- what competes --------------------------------------------------------------------------------------------------


def test_a_unit_competes_with_units_and_eot_alone(book):
    task = S.SpeechTask(book, {"chain": 1.0}, speechgpt.INSTRUCTIONS, UNITS, rows=2, length=300)
    batch = task.batch(np.random.default_rng(0))
    kinds = batch["kinds"][batch["weights"] > 0]
    assert set(kinds.tolist()) == {0, 2}
    rows = task.head_rows()[2].tolist()
    assert rows == [*range(IDS.semantic_start, IDS.end), IDS.eot]
    ends = batch["kinds"][(batch["targets"] == IDS.eot) & (batch["weights"] > 0)]
    assert len(ends) and (ends == 2).all()
    at = batch["targets"][(batch["kinds"] == 2) & (batch["weights"] > 0)]
    assert [rows[i] for i in task.columns(at, 2).tolist()] == at.tolist()
    loss, logs = task.loss(batch, 0)
    loss.backward()
    assert set(logs) == {"text", "semantic"}
    assert not task.model.lm_head.weight.grad[IDS.n_text : IDS.semantic_start].any()
    merged = P.TaggedTask(book, {"chain": 1.0}, audiopalm.TAGS, MERGED, rows=2, length=300)
    assert set(merged.batch(np.random.default_rng(0))["kinds"].unique().tolist()) == {-1, 0, 1, 2}


@pytest.mark.parametrize("name", NAMES)
def test_loss_falls_and_a_batch_is_a_function_of_its_step(book, name, tmp_path):
    words, group = (audiopalm.TAGS, MERGED) if name == "audiopalm" else (speechgpt.INSTRUCTIONS, UNITS)
    torch.manual_seed(0)
    task = T.StepsTask(book, {"chain": 0.7, "asr": 0.3}, words, group, rows=1, length=256, lr=1e-2)
    one, other = (task.batch(np.random.default_rng((0, 5))) for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)
    before = task.loss(one, 0)[0].item()
    Trainer(task, tmp_path, "a", 12, quiet=True).run()
    assert task.loss(one, 0)[0].item() < 0.9 * before


# ---- AudioPaLM grows ------------------------------------------------------------------------------------------------


def test_growth_keeps_what_the_text_model_was(book):
    torch.manual_seed(0)
    small = P.text_model(CONFIG).eval()
    grown = audiopalm.grow(small, IDS.n_audio)
    assert grown.config.vocab_size == IDS.end == grown.lm_head.out_features and small.config.vocab_size == IDS.n_text
    assert small.model.embed_tokens.num_embeddings == IDS.n_text  # it is a copy that grew
    old, new = small.state_dict(), grown.state_dict()
    assert old.keys() == new.keys()
    for name, value in old.items():
        assert torch.equal(new[name][: len(value)], value), name
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(new[name]) == IDS.end and new[name][IDS.n_text :].std() > 0
    ids = torch.tensor([book.encode(SENTENCES[0])])
    hidden = [model.model(input_ids=ids).last_hidden_state for model in (small, grown)]
    assert torch.equal(*hidden)
    text = slice(IDS.n_text)
    assert torch.equal(small.logits(hidden[0], rows=text), grown.logits(hidden[1], rows=text))
    with torch.no_grad():
        grown.lm_head.weight.add_(1)
    assert not torch.equal(grown.lm_head.weight[text], small.lm_head.weight)  # nothing is shared


# ---- the completer --------------------------------------------------------------------------------------------------


def test_the_completer_fills_groups_and_learns(book, tmp_path):
    torch.manual_seed(0)
    task = S.CompleterTask(book, rows=4, groups=8)
    batch = task.batch(np.random.default_rng(0))
    assert batch["codes"].shape == (4, 8, 5) and batch["codes"][..., 2:].max() < IDS.n_semantic
    before = task.loss(batch, 0)[0].item()
    Trainer(task, tmp_path, "c", 30, quiet=True).run()
    assert task.loss(batch, 0)[0].item() < before
    model = task.model.eval()
    whole = book.audio[0]
    spoken = whole[whole >= IDS.semantic_start].tolist()
    merged = model.complete(spoken)
    assert len(merged) == len(whole) and interleave.groups(merged, IDS).reshape(-1).tolist() == merged
    assert interleave.split(merged, IDS)[1] == [token - IDS.semantic_start for token in spoken]
    assert len(model.complete(spoken[:-1])) == len(merged) - 5  # a group that was cut short is left out
    assert model.complete([]) == model.complete(spoken[:2]) == []
    known = {i for i in book.voiced if not plan.held_out(book.items[i])}
    assert len(task.train) == (len(known) or len(book.voiced))
    assert set(task.finish(0)) == {"held_out_right", "held_out"}


# ---- stages ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder, book):
    """The folder where both were trained by the command, two steps a stage."""
    folder = tmp_path_factory.mktemp("lineage")
    with pytest.MonkeyPatch.context() as patch:
        install(patch, book)
        for name in NAMES:
            assert cli.main(["train", "lineage", name, *given(folder, tiny_folder)]) == 0
        yield folder


def install(patch, book):
    patch.setattr(K, "preset", lambda name: CONFIG)
    patch.setattr(K.Run, "book", lambda run, dev=False: book)
    patch.setattr(K.Trainer, "_plot", lambda trainer: None)


def given(folder, init, *more):
    return ["--steps", "2", "--out", str(folder), "--init", str(init), *more]


def test_speechgpt_has_three_stages_each_from_the_one_before():
    adapt, tune, chain, completer = S.STAGES
    assert [one.parent for one in S.STAGES] == ["", "adapt", "tune", ""] and completer.part == "completer"
    assert set(adapt.mixture) == {"next"}  # units alone
    assert all(TASKS[task].texts[:1] != ("said",) or not TASKS[task].hears for task in tune.mixture)
    assert {"asr", "tts"} <= set(tune.mixture) and "chain" in chain.mixture
    assert chain.mixture["chain"] == chain.mixture["direct"]  # neither has the better chance
    for module in NAMES.values():
        assert all(abs(sum(one.mixture.values()) - 1) < 1e-9 for one in module.STAGES if one.mixture)
    assert len(P.STAGES[1].mixture) > 4 and table.stages("audiopalm") is P.STAGES


def test_a_stage_starts_from_its_parent(place, tiny_folder, book, monkeypatch):
    install(monkeypatch, book)
    run = K.Run(place / "speechgpt", place, init=tiny_folder, quiet=True)
    kept = {one.name: T.left_by(run, one.name, K.model_folder.build("backbone", CONFIG)).state_dict()
            for one in S.STAGES[:3]}  # fmt: skip
    for stage in S.STAGES[:3]:
        start = S.SpeechTask.from_run(run, stage).model.state_dict()
        parent = kept[stage.parent] if stage.parent else run.part("sft1").state_dict()
        assert all(torch.equal(start[name], parent[name]) for name in start), stage.name
        assert any(not torch.equal(start[name], kept[stage.name][name]) for name in start)
    run = K.Run(place / "audiopalm", place, init=tiny_folder, quiet=True)
    text = T.left_by(run, "text", P.text_model(CONFIG)).state_dict()
    start = P.TaggedTask.from_run(run, P.STAGES[1]).model.state_dict()
    assert all(torch.equal(start[name][: len(value)], value) for name, value in text.items())
    scratch = P.TaggedTask.from_run(run, replace(P.STAGES[1], settings={"start": "scratch"})).model.state_dict()
    assert not torch.equal(scratch["lm_head.weight"][: IDS.n_text], text["lm_head.weight"])
    with pytest.raises(ValueError, match="unknown start 'nowhere': choose text or scratch"):
        P.TaggedTask.from_run(run, replace(P.STAGES[1], settings={"start": "nowhere"}))
    with pytest.raises(ModelError):
        S.SpeechTask.from_run(K.Run(place / "none", place, init=tiny_folder), S.STAGES[1])


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_where_it_stopped(place, tiny_folder, book, name, monkeypatch):
    install(monkeypatch, book)
    stages = table.stages(name)
    before = {one.name: (place / name / "parts" / f"{one.name}.safetensors").read_bytes() for one in stages}
    (place / name / "parts" / f"{stages[-1].name}.safetensors").unlink()
    steps = []
    monkeypatch.setattr(K.Trainer, "_one_step", lambda trainer: steps.append(trainer.name))
    assert cli.main(["train", "lineage", name, *given(place, tiny_folder, "--resume")]) == 0
    assert not steps  # every step was done
    after = {one.name: (place / name / "parts" / f"{one.name}.safetensors").read_bytes() for one in stages}
    assert before == after


@pytest.mark.parametrize("name", NAMES)
def test_both_answer_in_words_and_sound(place, tiny, name):
    system = systems.make(name, lambda: tiny, folder=place)
    assert system.name == name
    for turns in ([tone()], [tone(), tone(seconds=1.5)]):
        reply = system.answer(turns)
        assert isinstance(reply.text, str) and reply.audio.dtype == np.float32 and reply.audio.ndim == 1
        assert len(reply.audio) > 0.3 * RATE and np.isfinite(reply.audio).all() and np.abs(reply.audio).max() > 0
        assert reply.rate == tiny.vocoder.sample_rate and 0 < reply.first <= reply.seconds
    texts, audio = system.think(tone())
    first = IDS.semantic_start if name == "speechgpt" else IDS.n_text
    assert len(texts) == 2 and all(token >= first for token in audio)
    assert len(system.merged(audio)) == 5 * (len(audio) // len(system.group))
    texts, _ = systems.registry.system(name)(tiny, folder=place / name, task="speak").think(tone())
    assert len(texts) == 1


def test_a_generated_chain_is_transcript_answer_units(place, tiny, monkeypatch):
    """The ids themselves, as drawn: nothing of it is put in order afterwards."""
    kept = []

    def recording(model, prompt, ids, layout, **sampling):
        kept.append([])
        for step in units_generate(model, prompt, ids, layout, **sampling):
            kept[-1].append(step)
            yield step

    units_generate = units.generate
    monkeypatch.setattr(units, "generate", recording)
    monkeypatch.setitem(units.SAMPLING, "max_tokens", 400)
    speechgpt.SpeechGPT(tiny, folder=place / "speechgpt").answer([tone()])
    (steps,) = kept
    order = [step.kind for step in steps if step.kind != "marker"]
    assert order == sorted(order, reverse=True) and set(order) <= {"text", "semantic"}
    marks = [step.id for step in steps if step.kind == "marker"]
    assert marks in ([IDS.text_end] * 2 + [IDS.eot], [IDS.text_end] * 2, [IDS.text_end], [])
    assert len(steps) == 400 or marks[-1] == IDS.eot


def test_a_system_that_was_not_trained_says_so(tiny, tmp_path):
    for name in NAMES:
        with pytest.raises(ModelError, match=f"{name} has not been trained here .* `aqaa train lineage {name}`"):
            systems.make(name, lambda: tiny, folder=tmp_path).answer([tone()])


# ---- comparisons ----------------------------------------------------------------------------------------------------


def test_variants_of_audiopalm_are_compared(place, tiny_folder, book, monkeypatch):
    install(monkeypatch, book)
    monkeypatch.setattr(judged, "MAX_ANSWER", 30)
    run = K.Run(place / "audiopalm", place, init=tiny_folder, quiet=True)
    rows = P.compare(run, 2, questions=3, settings={"rows": 1, "length": 200})
    assert [row["variant"] for row in rows] == list(P.VARIANTS) and len({row["loss"] for row in rows}) == 3
    assert all(row["right"]["n"] == 3 and row["steps"] == 2 and 0 < row["loss"] < 9 for row in rows)
    assert K.read_object(run.out / "compare.json", "")["rows"] == rows


def test_the_chain_is_compared_with_answers_at_once(place, tiny_folder, book, monkeypatch):
    pytest.importorskip("pocketsphinx")
    install(monkeypatch, book)
    monkeypatch.setattr(judged, "MAX_ANSWER", 60)
    run = K.Run(place / "speechgpt", place, init=tiny_folder, quiet=True, workers=1)
    rows = S.compare(run, questions=2)
    assert [row["task"] for row in rows] == ["chain", "speak", "direct"]
    assert all(row["right"]["n"] == row["sound"]["n"] == 2 == len(row["heard"]) for row in rows)
    assert rows[2]["right"]["share"] == 0  # it writes nothing
