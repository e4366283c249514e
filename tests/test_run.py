"""A whole training run in miniature, spoken by tones, a few steps a stage: from the corpus to a model that answers.

The sizes are those of the `tiny` fixtures, so the answers are noise; that every stage finds what it needs is the point.
"""

import json
import re
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import aqaa
from aqaa import cli, pipeline
from aqaa.corpus import plan
from aqaa.corpus import voices as V
from aqaa.corpus.codes import load_codes, store_codes, stored_codes
from aqaa.files import ModelError, data_folder
from aqaa.tokenizers import dialogue, phones
from aqaa.training import ablations, examples, features, heads, judged, pairs, stages
from aqaa.training import run as K
from aqaa.training.loop import read_log
from aqaa.weights import model_folder
from tests import tones
from tests.conftest import tiny_config

CONFIG = tiny_config()
ORDER = list(stages.STAGES)
TRAINED = [stage.name for stage in stages.TABLE if stage.task]
RECORDED = [name for name in ORDER if name in (*TRAINED, "codes", "pairs", "merge")]
CANDIDATES = [stage.name for stage in stages.TABLE if stage.part and not stage.exported]
STEPS = 3  # the quantiser of the semantic tokenizer comes with the third


def options(folder, **more):
    return dict(
        out=folder / "run", corpus=folder / "corpus", export=folder / "model", config=CONFIG, scale=0.002, steps=STEPS,
        workers=1, quiet=True, resume=True, **more,
    )  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_plots():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(K.Trainer, "_plot", lambda self: None)
        patch.setattr(judged, "MAX_ANSWER", 60)  # a model that knows nothing goes on and on
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory, no_plots):
    """The folder of a finished miniature: run, corpus and model."""
    folder = tmp_path_factory.mktemp("recipe")
    with pytest.MonkeyPatch.context() as patch:
        tones.install(patch)
        K.main("all", **options(folder))
    return folder


@pytest.fixture
def run(place):
    return K.Run(**options(place))


@pytest.fixture
def beside(place, tmp_path):
    """Makes a run in a folder of its own, of the corpus of `place`."""
    return lambda **more: K.Run(**{**options(tmp_path), "corpus": place / "corpus", **more})


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


# ---- what a run leaves ----------------------------------------------------------------------------------------------


def test_the_finished_model_answers_a_question(place, run, monkeypatch):
    monkeypatch.setitem(pipeline.SAMPLING, "max_tokens", 80)
    model = aqaa.load(place / "model")
    corpus, items = run.items()
    question = next(item for item in items if item.role == "question" and item.split == "eval")
    answer = model.ask((corpus.wav(question) / np.float32(32768), 16_000))
    assert answer.seconds >= 0.3 and answer.audio.isfinite().all() and answer.audio.abs().max() > 0
    text, audio = dialogue.layout().parse(answer.tokens["answer"], CONFIG.ids)
    cut = len(answer.tokens["answer"]) == 80  # so little trained, it may not end by itself
    assert (cut or len(audio) % 5 == 0) and answer.text == model.text.decode(text).strip()
    assert model_folder.inspect(place / "model")["flow"]["as_recorded"]


def test_every_stage_leaves_its_traces(place):
    record = read(place / "run" / "record.json")
    for stage in TRAINED:
        assert record[stage]["steps"] == STEPS and record[stage]["seed"] == 0 and record[stage]["seconds"] >= 0
        assert np.isfinite(list(record[stage]["last"].values())).all()
        assert {"date", "commit", "hardware", "torch"} <= set(record[stage])
        assert (place / "run" / "parts" / f"{stage}.safetensors").is_file()
        assert read_log(place / "run" / f"{stage}.csv")[-1]["step"] == str(STEPS)
        state = torch.load(place / "run" / f"{stage}.ckpt", weights_only=True)
        for tensors in state["modules"].values():
            assert all(value.isfinite().all() for value in tensors.values())
    assert set(record["linguistic"]["phone_error"]) == {"answer_voice", "seen_voices", "new_voices", "both_new"}
    assert set(record["semantic"]["f0_semitones"]) == set(record["semantic"]["phone_error"])
    exported = read(place / "model" / "record.json")
    assert {name: value for name, value in exported.items() if name != "files"} == record


def test_codes_are_those_of_the_finished_tokenizers(place, run):
    """What the backbone learns from is what it will hear: encode() of the parts, up to fp16 on disk."""
    corpus, items = run.items()
    codes = load_codes(run.out, items)
    for which, name in enumerate(("linguistic", "semantic")):
        module, same, total = run.part(f"steady_{name}", model_folder.build(name, CONFIG)), 0, 0
        for i in range(0, len(items), 40):
            heard = module.encode(features.as_heard(items[i], corpus.wav(items[i])), energy_norm=False).numpy()
            stored = codes[i][which]
            assert len(stored) <= len(heard) <= len(stored) + 1  # the semantic tokenizer rounds its last row up
            same, total = same + (stored == heard[: len(stored)]).sum(), total + len(stored)
        assert same / total > 0.9
        record = read(run.out / "record.json")["codes"][name]
        assert 1 < record["perplexity"] <= record["used"] <= record["size"]


def test_held_out_answers_are_seen_by_no_tokenizer_and_no_vocoder(run):
    _, items = run.items()
    data, tests = run.utterances("lfr")
    train = [items[i] for i in np.flatnonzero(data.weights)]
    kept = [i for i, item in enumerate(items) if plan.held_out(item)]
    spoken, waves = run.spoken()
    assert kept and {items[i].role for i in kept} == {"answer"}
    assert not {items[i].id for i in kept} & {item.id for item in train + spoken}
    assert [len(wave) for wave in waves] == [item.length for item in spoken]
    assert set(tests["answer_voice"].tolist()) == set(kept)
    assert {item.split for item in train} == {"train"}
    for name, cell in (("seen_voices", "seen_seen"), ("new_voices", "seen_new"), ("both_new", "new_new")):
        assert {items[i].cell for i in tests[name]} == {cell}


def test_the_book_knows_every_answer(run):
    book = run.book()
    assert {item.split for item in book.items} == {"train"}
    assert book.questions and all(book.items[i].answer_id in book.answers for i in book.questions)
    assert all(book.encode(book.items[i].text) for i in book.voiced)
    assert {"question", "answer", "read_only"} <= set(book.lines[0]) and any(line["read_only"] for line in book.lines)


# ---- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["linguistic", "sft1", "dpo"])
def test_a_finished_stage_takes_no_further_step(place, run, monkeypatch, stage):
    path = place / "run" / "parts" / f"{stage}.safetensors"
    before = path.read_bytes()
    monkeypatch.setattr(K.Trainer, "_one_step", lambda self: pytest.fail("a finished stage was trained"))
    run.stage(stage)
    assert path.read_bytes() == before
    assert read(place / "run" / "record.json")[stage]["steps"] == STEPS


@pytest.mark.parametrize("stage", ["pretrain_audio", "pretrain_joined", "pretrain", "sft2", "dpo", "vision", "sight",
                                   "turns"])
def test_an_interrupted_stage_ends_with_the_same_bytes(place, monkeypatch, stage):
    """A stage, stopped after a step and resumed, against the same as part of `all`."""
    part, log = place / "run" / "parts" / f"{stage}.safetensors", place / "run" / f"{stage}.csv"
    wanted, step = part.read_bytes(), K.Trainer._one_step

    def stop(trainer):
        signal.raise_signal(signal.SIGINT)
        return step(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(K.Trainer, "_one_step", stop)
        with pytest.raises(KeyboardInterrupt):
            K.main(stage, **{**options(place), "resume": False})
    assert torch.load(place / "run" / f"{stage}.ckpt", weights_only=True)["step"] == 1
    assert not log.exists() and part.read_bytes() == wanted
    K.main(stage, **options(place))
    assert part.read_bytes() == wanted
    assert [row["step"] for row in read_log(log)] == [str(STEPS)]


def test_interrupted_pairs_go_on_where_they_stopped(place, tmp_path, monkeypatch):
    """Chunks that are done are not made again, and the file is that of an unbroken run."""
    run, making, made = tmp_path / "run", pairs.make, []
    shutil.copytree(place / "run", run, ignore=shutil.ignore_patterns("features", "*.ckpt*", "pairs*"))
    monkeypatch.setattr(pairs, "CHUNK", 1)

    def make(backbone, book, questions, *args, **more):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(questions)
        return making(backbone, book, questions, *args, **more)

    monkeypatch.setattr(pairs, "make", make)
    with pytest.raises(KeyboardInterrupt):
        K.main("pairs", **options(tmp_path))
    assert len(made) == 1 and not (run / "pairs.npz").exists()
    made[:] = [None, None]  # no more interrupts
    K.main("pairs", **options(tmp_path))
    assert made[2:] and not any(set(made[2]) & set(questions) for questions in made[3:])
    resumed = pairs.read_pairs(run / "pairs.npz", CONFIG.ids)
    shutil.rmtree(run / "pairs")
    monkeypatch.setattr(pairs, "make", making)
    K.main("pairs", **options(tmp_path))
    assert pairs.read_pairs(run / "pairs.npz", CONFIG.ids) == resumed


def test_merging_is_of_the_three_parents(place, run):
    states = [run.part(name).state_dict() for name in ("sft1", "sft2", "dpo", "merge")]
    for name, merged in states[3].items():
        wanted = (5 * states[0][name] + 5 * states[1][name] + states[2][name]) / 11
        torch.testing.assert_close(merged, wanted, rtol=2e-3, atol=1e-4)  # fp16 on disk
    record = read(place / "run" / "record.json")["merge"]
    assert (record["parents"], record["weights"]) == (["sft1", "sft2", "dpo"], [5, 5, 1])


def test_a_parent_that_was_not_trained_is_named(place, beside):
    """A model folder stands in for any stage; two parents of one file would merge to itself."""
    later = beside(init=place / "model")
    with pytest.raises(ModelError, match="sft2 has not been trained, .*backbone.safetensors would stand in for two"):
        later.stage("merge")


def test_pairs_are_of_the_tokenizers_at_hand(place, run, tmp_path):
    """Ids of other tokenizers mean something else: such pairs are refused, and named."""
    later = run.beside(tmp_path / "later", 1)
    (later.out / "parts").mkdir()
    shutil.copy(place / "run" / "parts" / "semantic.safetensors", later.out / "parts" / "steady_linguistic.safetensors")
    with pytest.raises(ModelError, match="pairs.npz belongs to other tokenizers"):
        later.stage("dpo")


def test_the_semantic_tokenizer_has_a_codebook_after_a_single_step(place, beside):
    short = beside(steps=1)
    (short.out / "features").symlink_to(place / "run" / "features")
    short.stage("semantic")
    embed = short.part("semantic", model_folder.build("semantic", CONFIG)).quantizer._codebook.embed
    assert len(embed.unique(dim=0)) == CONFIG.semantic.n_codebook_size and embed.norm(dim=-1).min() > 0.3


def test_a_run_may_start_from_a_model_folder(place, beside):
    """Its parts stand in for stages that have not run."""
    later = beside(init=place / "model")
    for name in ("linguistic", "semantic"):
        blank, first = model_folder.build(name, CONFIG), model_folder.build(name, CONFIG)
        assert later.start(stages.STAGES[name], first)
        assert first.training and not same_weights(first, blank)
        assert same_weights(first, later.part(name, blank))
    backbone = later.part("pretrain", model_folder.build("backbone", CONFIG))
    assert same_weights(backbone, aqaa.load(place / "model").backbone)
    later._record("sft1", {"steps": 3})
    record, earlier = (read(folder / "record.json")["sft1"] for folder in (later.out, place / "model"))
    assert record["steps"] == 3 and record["continues"] == earlier


def test_without_a_parent_and_a_model_folder_a_stage_starts_afresh(run):
    module = model_folder.build("hift", CONFIG)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert not run.start(stages.STAGES["hift"], module) and module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_stage_before_its_time_says_what_is_missing(tmp_path, beside):
    with pytest.raises(ModelError, match="linguistic.safetensors is missing"):
        beside().stage("codes")
    with pytest.raises(FileNotFoundError, match="run `aqaa train codes` first"):
        beside().stage("flow")
    with pytest.raises(FileNotFoundError, match="holds no corpus"):
        beside(corpus=tmp_path / "none").stage("features")


@pytest.mark.parametrize("content", [b"", b'{"flow": {"steps', b"[]", bytes(40)])
def test_half_a_record_is_told_before_anything_is_trained(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "record.json").write_bytes(content)
    with pytest.raises(ModelError, match="record.json is cut short or damaged .*: remove it; it only says how"):
        K.Run(**options(tmp_path))


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_trained(tmp_path, capsys, place):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert cli.main(["train", "sft1", "--out", str(tmp_path / place)]) == 1
    said = capsys.readouterr().err
    assert re.fullmatch("aqaa: .*(cannot be written .*free some room|cannot be a folder, .*name another).*\n", said)


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown stage 'sft9'.*corpus, features.*all"):
        K.main("sft9", **options(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_only_the_named_stage_runs(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(K.Run, "stage", lambda self, name: done.append(name))
    K.main("codes", **options(tmp_path))
    K.main("all", **options(tmp_path))
    assert done == ["codes", *stages.STAGES]


@pytest.mark.parametrize("scale, steps, wanted", [(1, None, 5000), (0.1, None, 2000), (1e-6, None, 2), (0.1, 7, 7)])
def test_steps_are_those_of_the_table_by_scale_or_as_told(tmp_path, monkeypatch, scale, steps, wanted):
    def trainer(task, folder, name, steps, **more):
        raise InterruptedError(name, steps)

    monkeypatch.setattr(K, "Trainer", trainer)
    monkeypatch.setattr(K, "resolve_name", lambda name: SimpleNamespace(from_run=lambda run, stage: None))
    with pytest.raises(InterruptedError) as told:
        K.Run(**{**options(tmp_path), "scale": scale, "steps": steps}).stage("sft1")
    assert told.value.args == ("sft1", wanted)


def test_a_stage_that_is_planted_in_the_table_needs_nothing_else(place, tmp_path, monkeypatch, capsys):
    """Help, order, parent, mixture, training, record and export follow from its entry."""
    planted = replace(stages.STAGES["sft1"], name="sft3", help="a third course", parent="sft1", mixture={"aqta": 1.0})
    order = [*stages.STAGES.values()]
    order.insert(-1, planted)
    monkeypatch.setattr(stages, "STAGES", {stage.name: stage for stage in order})
    assert cli.main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"turns .*\n  sft3 +a third course\n  export ", shown)
    run, drawn, started = tmp_path / "run", set(), []
    shutil.copytree(place / "run", run, ignore=shutil.ignore_patterns("features"))
    with monkeypatch.context() as patch:
        stage, part, aqta = K.Run.stage, K.Run.part, examples.Examples.aqta
        ran = []
        patch.setattr(K.Run, "stage", lambda self, name: ran.append(name))
        K.main("all", **options(tmp_path))
        assert ran == [*ORDER[:-1], "sft3", "export"]
        patch.setattr(K.Run, "stage", stage)
        patch.setattr(K.Run, "part", lambda self, name, module: started.append(name) or part(self, name, module))
        patch.setattr(examples.Examples, "aqta", lambda self, rng: drawn.add("aqta") or aqta(self, rng))
        for kind in ("aqtaa", "asr", "text", "tqaa", "tts", "next"):
            patch.setattr(examples.Examples, kind, lambda self, rng, kind=kind: pytest.fail(f"{kind} was drawn"))
        K.main("sft3", **options(tmp_path))
        K.main("export", **options(tmp_path))
    assert started == ["sft1"] and drawn == {"aqta"}
    parts, record = run / "parts", read(run / "record.json")
    assert list(record) == [*RECORDED, "sft3"] and record["sft3"]["steps"] == STEPS
    exported = (tmp_path / "model" / "backbone.safetensors").read_bytes()
    assert exported == (parts / "sft3.safetensors").read_bytes() != (parts / "sft1.safetensors").read_bytes()


def test_candidates_are_not_exported(place):
    """What comes after sft1 waits for a table that says it is better."""
    exported = (place / "model" / "backbone.safetensors").read_bytes()
    parts = {name: (place / "run" / "parts" / f"{name}.safetensors").read_bytes() for name in CANDIDATES}
    assert exported == (place / "run" / "parts" / "sft1.safetensors").read_bytes() not in parts.values()
    assert len(set(parts.values())) == len(CANDIDATES)


# ---- helpers --------------------------------------------------------------------------------------------------------


def test_held_out_is_a_stable_twentieth_of_the_answers():
    class Item:
        def __init__(self, role, name):
            self.role, self.id = role, name

    kept = [name for name in (f"a{i:04d}" for i in range(4000)) if plan.held_out(Item("answer", name))]
    assert 150 < len(kept) < 250 and kept[:3] == [name for name in kept if name <= kept[2]]
    assert not any(plan.held_out(Item(role, name)) for role in ("question", "generic") for name in kept)


# ---- phone heads ----------------------------------------------------------------------------------------------------


def test_heads_learn_from_training_alone_and_are_measured_on_the_tests(place, run):
    task = heads.HeadsTask.from_run(run, stages.STAGES["heads"])
    _, items = run.items()
    train = {tuple(phones.phone_ids(item.phones)) for item in items if item.split == "train"}
    data = task.heard["semantic"]
    assert {tuple(data.phones[i]) for i in np.flatnonzero(task.buckets.probs)} <= train
    assert [len(part.lengths) for part in task.heard.values()] == [len(data.phones)] * 2
    assert not set(np.flatnonzero(task.buckets.probs)) & {i for rows in task.tests.values() for i in rows}
    error = read(run.out / "record.json")["heads"]["phone_error"]
    assert set(error) == {"linguistic", "semantic"} and set(error["semantic"]) == set(task.tests)
    assert aqaa.load(place / "model").heads is not None


def test_what_a_head_learns_from_is_what_it_will_hear(run):
    """The rows of a clip are those that `heard` computes, up to fp16 on disk."""
    corpus, items = run.items()
    data, _ = run.utterances("log_mel")
    semantic = run.part("semantic", model_folder.build("semantic", CONFIG))
    (longest,) = np.argsort(data.lengths)[-1:]
    rows = heads.listened(semantic, data, np.array([longest])).rows
    codes = semantic.encode(features.as_heard(items[longest], corpus.wav(items[longest])), energy_norm=False)
    wanted = phones.code_vectors(semantic, codes[None])[0, : len(rows)]
    same = torch.isclose(torch.from_numpy(rows).float(), wanted, atol=1e-2).all(-1)
    assert same.float().mean() > 0.9


def test_a_backbone_that_stays_is_as_sure_as_it_was(place, tmp_path):
    """What calibration found out about it goes with it; a new one starts uncalibrated. Eyes fit their own backbone."""
    shutil.copytree(place / "model", tmp_path / "before")
    settings = read(tmp_path / "before" / "config.json")
    settings["confidence"] = {"slope": 0.5, "offset": -2.0, "again": 0.7}
    (tmp_path / "before" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    later = K.Run(**{**options(tmp_path), "init": tmp_path / "before", "corpus": place / "corpus"})
    later.export()
    assert read(tmp_path / "model" / "config.json")["confidence"] == settings["confidence"]
    assert (tmp_path / "model" / "vision.safetensors").exists()
    (later.out / "parts").mkdir(exist_ok=True)
    shutil.copy(place / "run" / "parts" / "sft1.safetensors", later.out / "parts")
    later.export()
    assert read(tmp_path / "model" / "config.json")["confidence"] == {"slope": 1.0, "offset": 0.0, "again": 0.0}
    assert not (tmp_path / "model" / "vision.safetensors").exists()


def test_heads_leave_with_the_encoders_that_they_know(place, tmp_path):
    """Where an encoder is new, heads of the model folder would read another one's rows."""
    later = K.Run(**{**options(tmp_path), "init": place / "model", "corpus": place / "corpus"})
    later.export()
    assert (tmp_path / "model" / "heads.safetensors").exists()
    (later.out / "parts").mkdir(exist_ok=True)
    shutil.copy(place / "run" / "parts" / "steady_linguistic.safetensors", later.out / "parts")
    later.export()
    assert not (tmp_path / "model" / "heads.safetensors").exists()
    shutil.copy(place / "run" / "parts" / "heads.safetensors", later.out / "parts")
    later.export()
    assert aqaa.load(tmp_path / "model").heads is not None


@pytest.mark.parametrize("stage, part", [("pretrain", "backbone"), ("linguistic", "linguistic")])
def test_what_was_trained_here_is_exported_though_a_later_stage_was_not(place, tmp_path, stage, part):
    """The last stage that makes a part, as steady_…, did not run: the part of `init` is an older one."""
    later = K.Run(**{**options(tmp_path), "init": place / "model", "corpus": place / "corpus"})
    (later.out / "parts").mkdir(exist_ok=True)
    made = later.out / "parts" / f"{stage}.safetensors"
    made.write_bytes((place / "run" / "parts" / f"{stage}.safetensors").read_bytes())
    assert made.read_bytes() != (place / "model" / f"{part}.safetensors").read_bytes()
    later.export()
    assert (tmp_path / "model" / f"{part}.safetensors").read_bytes() == made.read_bytes()


def going_on(place, folder):
    """A run in `folder` that goes on from the model of `place`, with its own copies of what it needs."""
    shutil.copytree(place / "model", folder / "before" / "model")
    shutil.copytree(place / "codes", folder / "before" / "codes")
    later = K.Run(**{**options(folder), "init": folder / "before" / "model", "corpus": place / "corpus"})
    (later.out / "features").symlink_to(place / "run" / "features")
    return later


def test_what_the_vocoder_learnt_to_say_keeps_its_codes_when_ears_are_new(place, run, tmp_path):
    later, (_, items) = going_on(place, tmp_path), run.items()
    folder = later.init.parent / "codes"
    earlier = stored_codes(folder)
    marked = {name: tuple((codes + 1) % 16 for codes in pair) for name, pair in earlier.items()}
    for path in folder.glob("codes*.npz"):
        with np.load(path) as file:
            names = file["ids"].tolist()
        store_codes(path, names, *zip(*(marked[name] for name in names), strict=True))
    later.stage("codes")
    codes = stored_codes(later.out)
    assert codes.keys() == earlier.keys() and {item.role for item in items} >= {"question", "answer"}
    for item in items:
        wanted = (marked if item.is_voiced else earlier)[item.id]
        assert all(np.array_equal(a, b) for a, b in zip(codes[item.id], wanted, strict=True))


def test_what_the_answer_voice_says_has_its_codes_in_a_file_of_its_own(place, run):
    _, items = run.items()
    voiced = {item.id for item in items if item.is_voiced and item.part != "pictures"}  # those have one, too
    with np.load(place / "run" / "codes_answers.npz") as file:
        assert set(file["ids"].tolist()) == voiced and voiced
    with np.load(place / "run" / "codes.npz") as file:
        assert not voiced & set(file["ids"].tolist())


def test_the_vocoder_hears_nothing_of_the_evaluation(run):
    items, waves = run.spoken()
    assert len(items) == len(waves) > 0 and {item.split for item in items} == {"train"}
    assert {item.role for item in items} == {"answer", "generic"} and {item.voice for item in items} == {V.ANSWER_VOICE}


def test_codes_of_a_part_do_not_take_the_place_of_the_whole(place, tmp_path):
    later = going_on(place, tmp_path)
    later.stage("codes")
    later.export()
    weights = (tmp_path / "model" / "backbone.safetensors").stat().st_mtime_ns
    path = later.out / "codes.npz"
    with np.load(path) as file:
        names = file["ids"].tolist()[:-3]
    pairs = stored_codes(later.out)
    store_codes(path, names, *zip(*(pairs[name] for name in names), strict=True))
    with pytest.raises(ValueError, match="has 3 utterances that .* lacks: code the whole part, export to another"):
        later.export()
    assert (tmp_path / "model" / "backbone.safetensors").stat().st_mtime_ns == weights
    assert stored_codes(tmp_path / "codes").keys() == pairs.keys()


# ---- ablations ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ablate(place, tmp_path, monkeypatch):
    """Runs an ablation of the miniature; its folders are copies."""
    shutil.copytree(place / "run", tmp_path / "run", ignore=shutil.ignore_patterns("features", "*.ckpt*"))
    more = {"corpus": place / "corpus", "seeds": 2, "questions": 3}
    monkeypatch.setattr(judged, "listen", lambda model, book, answers, *rest: [deafen(one) for one in answers])
    return lambda name, **options_: ablations.main(name, **{**options(tmp_path), **more, **options_})


def deafen(one):
    one.sound = one.agrees = False


def test_an_ablation_trains_each_variant_with_each_seed_and_goes_on(ablate, tmp_path, monkeypatch, capsys):
    some = {name: ablations.LAYOUTS[name] for name in ("ratio_10_15", "padded_10_15")}
    monkeypatch.setitem(ablations.ABLATIONS, "layouts", some)
    monkeypatch.setattr(ablations, "LAYOUTS", some)
    monkeypatch.setattr(ablations, "PARENT_TIME", 1)
    monkeypatch.setattr(ablations, "ONCE", set())  # a neighbour's layout, too, with each seed
    result = ablate("layouts")
    assert [(row["variant"], row["seed"]) for row in result["runs"]] == [(v, s) for s in (0, 1) for v in some]
    assert {"date", "commit", "hardware", "command"} <= set(result) and result["steps"] == STEPS
    assert all(row["n"] == 3 and row["steps"] == STEPS and set(row["skills"]) for row in result["runs"])
    told = capsys.readouterr().out
    assert all(name in told for name in some) and "3 questions a run, 4 runs" in told
    path = tmp_path / "runs" / "ablation-layouts.json"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")  # a plot beside the numbers
    assert read(path) == result and not list((tmp_path / "run" / "ablations").rglob("*.ckpt*"))
    short = {**result, "runs": result["runs"][:3]}
    path.write_text(json.dumps(short), encoding="utf-8")
    made = []
    trained = ablations.trained
    monkeypatch.setitem(ablations.MAKERS, "layouts", lambda *args: made.append(args[2:]) or trained(*args))
    again = ablate("layouts")
    assert made == [("padded_10_15", 1)] and again["runs"][:3] == result["runs"][:3]
    assert without_time(again["runs"][3]) == without_time(result["runs"][3])


def without_time(row):
    """What does not depend on how fast a machine is."""
    return {key: value for key, value in row.items() if key != "training_seconds"}


def test_preference_variants_start_from_one_parent_and_share_its_reference(ablate, tmp_path, monkeypatch):
    some = dict(list(ablations.PREFERENCE.items())[:3])
    monkeypatch.setitem(ablations.ABLATIONS, "preference", some)
    (tmp_path / "run" / "record.json").unlink()  # as where the pairs are the shipped ones and nothing ran here
    result = ablate("preference", seeds=1)
    parent, *trained = result["runs"]
    assert parent["variant"] == "sft1" and "held_out" not in parent
    assert all(row["held_out"]["pairs"] for row in trained)
    folders = sorted(path.name for path in (tmp_path / "run" / "ablations").iterdir())
    assert folders == ["preference-plain__β_0_1-0", "preference-plain__β_0_2-0"]
    assert not list((tmp_path / "run" / "ablations").rglob("reference.npz"))


def test_merges_are_judged_and_barriers_measured(ablate, monkeypatch):
    some = {name: ablations.MERGES[name] for name in ("5:5:1", "4:0:0", "slerp", "ties")}
    monkeypatch.setitem(ablations.ABLATIONS, "merge", some)
    result = ablate("merge", seeds=1)
    assert [row["variant"] for row in result["runs"]] == list(some)
    assert set(result["barriers"]) == {"sft1 - sft2", "sft1 - dpo", "sft2 - dpo"}
    for line in result["barriers"].values():
        assert len(line["losses"]) == 5 and line["barrier"] >= 0


def test_unknown_ablations_are_refused(tmp_path):
    names = "layouts, joins, codebooks, preference, merge"
    with pytest.raises(ValueError, match=f"unknown ablation 'colours': choose one of {names}"):
        ablations.main("colours", **options(tmp_path))


def test_a_table_follows_from_the_runs():
    def row(variant, seed, text):
        others = {"sound": 0.5, "agrees": 1, "refuses": 0, "seconds": 2, "n": 9, "skills": {"Sing": text / 2}}
        return {"variant": variant, "seed": seed, "text": text, **others}

    runs = [row("a", 0, 0.5), row("a", 1, 0.7), row("a", 2, 0.6), row("b", 0, 0.1)]
    mean, half = ablations.summary(runs)["a"]["text"]
    assert mean == pytest.approx(0.6) and half == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-3)
    assert ablations.summary(runs)["b"]["text"] == (0.1, None)
    assert "60.0 ±24.8" in ablations.table({"runs": runs})
    assert ablations.by_skill(runs) == {"a": {"Sing": pytest.approx(0.3)}, "b": {"Sing": 0.05}}


@pytest.mark.parametrize("name", ablations.ABLATIONS)
def test_every_ablation_is_recorded_with_three_seeds(name):
    """Fewer only for layouts that the paper does not have; each run alike, and the steps of all equal."""
    result = read(data_folder() / "runs" / f"ablation-{name}.json")
    seeds = {variant: [row["seed"] for row in result["runs"] if row["variant"] == variant]
             for variant in ablations.ABLATIONS[name]}  # fmt: skip
    assert sum(map(len, seeds.values())) == len(result["runs"])
    assert {"date", "commit", "hardware", "command"} <= set(result)
    assert all(found == ([0] if variant in ablations.ONCE else [0, 1, 2]) for variant, found in seeds.items())
    assert {row["n"] for row in result["runs"]} == {result["questions"]}
    assert {row["steps"] for row in result["runs"] if "steps" in row} <= {result["steps"]}


def test_statistics_order_the_layouts(run):
    """Text ahead of sound: the more of it a block has, the more is visible; all of it in text_cot."""
    book = run.book(dev=True)
    found = {name: ablations.statistics(book, dialogue.layout(name)) for name in dialogue.EVERY_LAYOUT}
    assert found["audio_only"] == {"distance": None, "visible": None, "before": None}
    assert found["text_cot"]["before"] == 0 and found["text_cot"]["visible"] == max(
        row["visible"] for row in found.values() if row["visible"] is not None
    )
    assert found["ratio_3_5"]["visible"] < found["ratio_10_15"]["visible"]
    assert found["ratio_6_50"]["before"] > found["ratio_10_15"]["before"]
