"""Qwen2-Audio, Kimi-Audio and Qwen-Omni: what is heard, which stream says what and when, what learns from what."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from aqaa import cli
from aqaa.backbone import generation
from aqaa.config import AQTA, ASR_MARKER, preset
from aqaa.corpus import speak
from aqaa.corpus import voices as V
from aqaa.corpus.codes import codes_file, store_codes
from aqaa.evaluation import systems
from aqaa.files import ModelError
from aqaa.lineage import features, kimi_audio, qwen_omni
from aqaa.lineage.kimi_audio import BLANK, Kimi
from aqaa.lineage.qwen_omni import Omni
from aqaa.tokenizers import dialogue
from aqaa.training import run as K
from aqaa.training.lineage import kimi_audio as TK
from aqaa.training.lineage import qwen2_audio as T2
from aqaa.training.lineage import qwen_omni as TO
from aqaa.training.lineage import sounds, table
from aqaa.weights.model_folder import load_part
from tests import tones
from tests.conftest import RATE, SENTENCES, tiny_config, tone
from tests.test_language import dialogues, item

CONFIG = tiny_config()
IDS = CONFIG.ids
STAGES = {"qwen2-audio": T2.STAGES, "kimi-audio": TK.STAGES, "qwen-omni": TO.STAGES}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Weights that know nothing would go on and on."""
    for module in (kimi_audio, qwen_omni):
        monkeypatch.setattr(module, "MAX_ANSWER", 90)


@pytest.fixture(scope="module")
def book(tiny_text):
    return dialogues(tiny_text)


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_folder, book):
    """A folder of weights (tiny), the codes of its answers, and a corpus spoken by tones."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_folder, folder / "tiny")
    names = ["a0", "a1", "a2"]
    pairs = [(book.audio[i][book.audio[i] < IDS.semantic_start] - IDS.n_text,
              book.audio[i][book.audio[i] >= IDS.semantic_start] - IDS.semantic_start) for i in range(3)]  # fmt: skip
    store_codes(codes_file(folder / "codes", "answers"), names, *zip(*pairs, strict=True))
    items = [replace(one, voice=V.ANSWER_VOICE if one.role in ("answer", "generic") else "espeak:en")
             for one in book.items if one.role != "generic"]  # fmt: skip
    late = replace(item(11, "question", "say good morning", "sum", "count from one", "a0"), split="dev")
    with pytest.MonkeyPatch.context() as patch:
        tones.install(patch)
        speak.speak([*items, replace(late, voice="espeak:en")], folder / "corpus", workers=1, progress=False)
    return folder


def install(patch, book):
    patch.setattr(K, "preset", lambda name: CONFIG)
    patch.setattr(K.Run, "book", lambda run, dev=False: book)
    patch.setattr(K.Trainer, "_plot", lambda trainer: None)


def given(home, *more):
    return ["--steps", "2", "--out", str(home / "out"), "--init", str(home / "tiny"), "--corpus",
            str(home / "corpus"), *more]  # fmt: skip


@pytest.fixture(scope="module")
def trained(home, book):
    """The folder where all three were trained by the command, two steps a stage."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch, book)
        for name in STAGES:
            assert cli.main(["train", "lineage", name, *given(home)]) == 0
    return home / "out"


@pytest.fixture
def run(home, book, monkeypatch):
    install(monkeypatch, book)
    return K.Run(home / "out" / "other", home / "corpus", init=home / "tiny", quiet=True)


def made(name, tiny, trained):
    return systems.make(name, lambda: tiny, folder=trained)


# ---- stages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STAGES)
def test_a_trained_system_answers_two_questions(trained, tiny, name):
    system = made(name, tiny, trained)
    assert system.name == name
    for turns in ([tone()], [tone(), tone(seconds=1.2)]):
        reply = system.answer(turns)
        assert isinstance(reply.text, str) and reply.rate == tiny.vocoder.sample_rate
        assert reply.audio.dtype == np.float32 and len(reply.audio) > 0.3 * RATE and np.abs(reply.audio).max() > 0
        assert (0 < reply.first <= reply.seconds) and (name == "qwen2-audio") <= (reply.first == reply.seconds)


@pytest.mark.parametrize("name", STAGES)
def test_training_goes_on_where_it_stopped(trained, home, book, name, monkeypatch):
    install(monkeypatch, book)
    monkeypatch.setattr(sounds, "heard", lambda *_: pytest.fail("features were computed again"))
    parts = sorted((trained / name / "parts").glob("*.safetensors"))
    before = [path.read_bytes() for path in parts]
    assert [path.stem for path in parts] == sorted(stage.name for stage in STAGES[name])
    parts[-1].unlink()
    monkeypatch.setattr(K.Trainer, "_one_step", lambda trainer: pytest.fail("a step was taken again"))
    assert cli.main(["train", "lineage", name, *given(home, "--resume")]) == 0
    assert [path.read_bytes() for path in parts] == before


@pytest.mark.parametrize("name", ["qwen2-audio", "kimi-audio"])
@pytest.mark.parametrize("there", [False, True])
def test_a_corpus_that_asks_nothing_is_one_sentence(home, book, name, there, tmp_path, monkeypatch, capsys):
    install(monkeypatch, book)
    if there:
        with pytest.MonkeyPatch.context() as patch:
            tones.install(patch)
            speak.speak([replace(book.items[0], voice=V.ANSWER_VOICE)], tmp_path / "corpus", workers=1, progress=False)
    words = given(home)[:-1] + [str(tmp_path / "corpus")]
    words[words.index("--out") + 1] = str(tmp_path / "out")
    assert cli.main(["train", "lineage", name, *words]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aqaa: ")]
    assert len(told) == 1 and ("asks nothing" if there else "holds no corpus") in told[0], told


@pytest.mark.parametrize("name", STAGES)
def test_a_system_that_was_not_trained_says_so(tiny, tmp_path, name):
    with pytest.raises(ModelError, match=f"{name} has not been trained here .* `aqaa train lineage {name}`"):
        made(name, tiny, tmp_path)


def test_the_stages_fit_together():
    for name, stages in STAGES.items():
        assert table.stages(name) is stages and all(stage.part == "backbone" for stage in stages)
        assert [stage.parent for stage in stages] == ["", *(stage.name for stage in stages[:-1])]
        assert all(abs(sum(stage.mixture.values()) - 1) < 1e-9 for stage in stages)


# ---- sounds ---------------------------------------------------------------------------------------------------------


def test_stored_features_are_those_of_the_encoder(run, home, tiny):
    heard = sounds.Sounds(run, codes=True)
    opened = speak.Corpus(home / "corpus")
    assert heard.rows.dtype == np.float16
    for index, one in enumerate(heard.book.items[: len(heard.starts) - 1]):
        wav = opened.wav(one).astype(np.float32) / 32768
        expected = features.rows(tiny, wav)
        clear, bent = heard.features(index, 0), heard.features(index, 1)
        assert clear.shape == bent.shape and len(expected) - len(clear) in (0, 1)
        assert torch.allclose(clear[:-1], expected[: len(clear) - 1], atol=0.02)  # the last row sees where a sound ends
        assert not torch.allclose(clear, bent, atol=0.005)
        assert [len(ids) for ids in heard.book.heard[index]] == [len(heard.book.audio[index])] * 2
        ids = tiny.listen((wav, RATE))
        same = np.mean(np.array(ids[: len(heard.book.audio[index])]) == heard.book.audio[index][: len(ids)])
        assert same > 0.8
    assert {heard.book.items[i].split for i in heard.book.questions} == {"train"}
    assert all(i < len(heard.starts) - 1 for i in heard.book.spoken_words)


def test_rare_questions_and_natural_voices_are_chosen_first():
    items = [item(i, "question", "a", "many") for i in range(400)] + [item(i, "question", "a", "few") for i in range(9)]
    found = sounds.chosen(items, 100, 0)
    assert len(found) == 100 and sum(one.intent == "few" for one in found) > 4  # of 2 by chance
    assert sounds.chosen(items, 1000, 0) == items and sounds.chosen(items, 100, 0) == found


def test_features_damaged_on_disk_are_one_sentence(run):
    sounds.Sounds(run)
    path = run.out / "sounds" / "rows.npy"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ModelError, match="remove its folder and train again.$"):
        sounds.Sounds(run)
    shutil.rmtree(path.parent)


def test_variants_are_trained_alike_and_asked_the_same(run, monkeypatch, tmp_path):
    pytest.importorskip("pocketsphinx")
    monkeypatch.setattr(sounds.stepeval, "all_answers", lambda: set(SENTENCES))
    monkeypatch.setattr(sounds.stepeval.whisper, "missing", lambda: ["whisper"])  # one ear is enough
    run.steps, run.out = 1, tmp_path
    kimi = TK.compare(run, 1)
    assert list(kimi) == ["delay 6", "delay 0"] and all(row["text"]["n"] == 1 for row in kimi.values())
    places = [tmp_path / "compare" / str(i) / "parts" for i in range(2)]
    assert [int(load_part(place, "heads", Kimi(CONFIG)).delay) for place in places] == [6, 0]
    assert K.read_object(tmp_path / "compare.json", "") == kimi


# ---- Qwen2-Audio ----------------------------------------------------------------------------------------------------


def test_two_rows_become_one():
    x = torch.arange(10.0).reshape(5, 2)
    assert features.pooled(x).tolist() == [[1, 2], [5, 6], [8, 9]]
    assert features.pooled(x[:1]).tolist() == [[0, 1]]


def test_features_lie_at_the_times_of_the_ids():
    x = torch.arange(6.0)[:, None]
    assert features.beside(x, 10)[:, 0].tolist() == [0, 2, 0, 1, 2, 3, 5, 3, 4, 5]
    assert features.beside(x[:0], 0).shape == (0, 1)


def test_features_are_not_rounded(trained, tiny):
    """Two sounds with the same codes are heard as two."""
    one = tone(1.0)
    other = one + np.random.default_rng(0).normal(0, 1e-4, len(one)).astype(np.float32)
    assert tiny.listen((one, RATE)) == tiny.listen((other, RATE))
    for name in ("qwen2-audio", "kimi-audio"):
        net, found = made(name, tiny, trained).net, []
        for wav in (one, other):
            rows = features.rows(tiny, wav)
            if name == "qwen2-audio":
                rows = features.pooled(rows)
                x = net.embeddings(torch.full((1, len(rows)), net.place), rows)
                found.append(net.backbone.logits(net.backbone.model.run(x, net.backbone.model.bias(*[len(rows)] * 2))))
            else:
                ids = torch.tensor([tiny.listen((wav, RATE))])
                heard = torch.ones_like(ids, dtype=torch.bool)
                x = net.embeddings(torch.zeros_like(ids), ids, heard, features.beside(rows, ids.shape[1]))
                found.append(net.text.logits(net.run(x, net.bias(*[ids.shape[1]] * 2))[0]))
        assert found[0].shape == found[1].shape and not torch.equal(*found)


def test_qwen2_audio_never_reads_codes(trained, tiny, monkeypatch):
    system = made("qwen2-audio", tiny, trained)

    def refuse(*_, **__):
        raise AssertionError("codes were made")

    monkeypatch.setattr(tiny.semantic, "quantize", refuse)
    monkeypatch.setattr(tiny.linguistic, "quantize", refuse)
    monkeypatch.setattr(tiny, "listen", refuse)
    with pytest.raises(AssertionError, match="codes were made"):
        tiny.transcribe((tone(), RATE))
    assert len(system.answer([tone(), tone(seconds=1.2)]).audio)


def test_what_qwen2_audio_learns_from_holds_no_code(run):
    task = T2.HearingTask.from_run(run, T2.STAGES[0])
    assert all(len(ids) == 0 for i in task.examples.book.spoken_words for ids in task.examples.book.heard[i])
    batch = task.batch(np.random.default_rng(0))
    ids = batch["input_ids"]
    assert ids.max() < IDS.n_text and (batch["targets"] < IDS.n_text).all()  # text alone
    assert (ids == IDS.im_patch).sum() == len(batch["features"]) > 0
    assert {AQTA, ASR_MARKER} == {int(ids[0, i + 1]) for i in (ids[0] == IDS.bos).nonzero()[:, 0]}
    loss = task.loss(batch, 0)[0]
    loss.backward()
    assert task.model.projector.linear.weight.grad.abs().sum() > 0  # features are learnt from
    again = task.batch(np.random.default_rng(0))
    assert all(torch.equal(again[key], value) for key, value in batch.items())


# ---- Kimi-Audio -----------------------------------------------------------------------------------------------------


@pytest.fixture
def heads(run):
    torch.manual_seed(0)
    stage = TK.STAGES[0]
    return TK.HeadsTask.from_run(run, replace(stage, settings={**stage.settings, "size": 900}))


def starts(ids, prompt):
    """The first step of an answer's text and of its audio."""
    return [prompt + int(np.flatnonzero(np.array(stream[prompt:]) != BLANK)[0]) for stream in ids]


@pytest.mark.parametrize("delay", [6, 0, 3])
def test_audio_is_shifted_against_text_by_the_delay(heads, delay):
    heads.examples.delay = delay
    for seed in range(20):
        for kind in ("aqtaa", "turns"):
            rng = np.random.default_rng(seed)
            ids, weights = getattr(heads.examples, kind)(rng)
            first = int(weights.any(0).argmax())
            text, audio = starts(ids, first)
            assert text == first and audio == first + delay
            assert ids[1, ids[1] != BLANK][-1] == IDS.eot and (ids[0, ids[0] != BLANK][-1]) == IDS.text_end
            said = ids[1, audio:][ids[1, audio:] >= IDS.n_text]
            assert (weights[1, audio : audio + len(said) + 1] == 1).all() and not weights[1, :audio].any()
            assert any(np.array_equal(said, heads.examples.book.audio[i]) for i in heads.examples.book.voiced)
    ids, weights = heads.examples.asr(np.random.default_rng(0))
    assert not weights[1].any() and weights[0].any()  # a transcript is not spoken


def test_a_batch_has_the_shift_and_features_where_a_question_is_heard(heads):
    batch = heads.batch(np.random.default_rng(0))
    assert batch["input_ids"].shape[0] == 2 and (batch["input_ids"][0] < IDS.n_text).all()
    assert batch["heard"].sum() == len(batch["features"]) > 0
    assert (batch["input_ids"][1:][batch["heard"]] >= IDS.n_text).all()
    assert not (batch["weights"][1][batch["heard"][0]] > 0).any()
    assert torch.equal(*batch["segments"])
    lags = []
    for number in batch["segments"][0].unique():
        at = (batch["segments"][0] == number) & (batch["weights"] > 0)
        if at[1].any():
            lags.append(int(at[1].int().argmax() - at[0].int().argmax()))
    assert len(lags) > 3 and set(lags) == {6}


def test_generated_audio_lags_six_steps(trained, tiny):
    system = made("kimi-audio", tiny, trained)
    pairs = list(system.steps(tone(), ()))
    assert [audio for _, audio in pairs[:6]] == [BLANK] * 6 and pairs[6][1] >= IDS.n_text
    assert all(text != BLANK for text, _ in pairs[:1])
    texts = [text for text, _ in pairs]
    if IDS.text_end in texts:
        end = texts.index(IDS.text_end)
        assert set(texts[end + 1 :]) <= {BLANK} and BLANK not in texts[:end]
    audio = [token for _, token in pairs if token >= IDS.n_text]
    assert all((token >= IDS.semantic_start) == (i % 5 > 1) for i, token in enumerate(audio))
    system.net.delay.fill_(0)
    assert next(iter(system.steps(tone(), ())))[1] >= IDS.n_text


def test_heads_are_parallel_and_the_trunk_is_shared(heads):
    net, batch = heads.model, heads.batch(np.random.default_rng(0))
    at = torch.zeros_like(batch["segments"], dtype=torch.bool)

    def logits():
        with torch.no_grad():
            scores, both = heads.scores(batch), []
            for row in range(2):
                here = at.clone()
                here[row, :50] = True
                both.append(scores(here, slice(IDS.n_text)))
        return both

    before = logits()
    for changed, moved in ((net.audio, (False, True)), (net.text, (True, False)), (net.trunk, (True, True))):
        kept = {name: value.clone() for name, value in changed.state_dict().items()}
        with torch.no_grad():
            for weight in changed.parameters():
                weight.add_(torch.randn(weight.shape) * 0.1)
        assert tuple(not torch.equal(a, b) for a, b in zip(before, logits(), strict=True)) == moved
        changed.load_state_dict(kept)
    for row, (own, other) in enumerate(((net.text, net.audio), (net.audio, net.text))):
        net.zero_grad()
        weights = batch["weights"].clone()
        weights[1 - row] = 0
        heads.loss({**batch, "weights": weights}, 0)[0].backward()
        assert all(weight.grad is None or not weight.grad.any() for weight in other.parameters())
        assert all(weight.grad.any() for weight in [*own.layers.parameters(), *net.trunk.parameters()])


def test_both_heads_begin_as_the_shipped_last_layers(heads, tiny):
    net, backbone = heads.model, tiny.decoder
    assert not net.embed_tokens.weight[BLANK].any()  # a blank adds nothing
    ids = torch.randint(1, IDS.end, (1, 20))
    heard = torch.ones_like(ids, dtype=torch.bool)
    x = net.embeddings(torch.zeros_like(ids), ids, heard, torch.randn(20, CONFIG.semantic.n_audio_state))
    with torch.no_grad():
        hidden = net.run(x, net.bias(20, 20))
        expected = backbone.model.run(backbone.model.embed_tokens(ids), backbone.model.bias(20, 20))
    assert torch.allclose(hidden[:1], expected, atol=1e-2) and torch.equal(hidden[0], hidden[1])  # fp16 on disk


def test_step_by_step_is_as_all_at_once(trained, tiny):
    net = made("kimi-audio", tiny, trained).net
    text, audio = torch.randint(0, IDS.n_text, (1, 12)), torch.randint(IDS.n_text, IDS.end, (1, 12))
    with torch.inference_mode():
        x = net.embeddings(text, audio)
        whole = net.run(x, net.bias(12, 12))
        model = type("Model", (), {"model": net})
        decoder = generation.Decoder(model, 1, 20)
        parts = [decoder.feed(x[:, :7]), *(decoder.feed(x[:, i : i + 1]) for i in range(7, 12))]
    assert torch.allclose(torch.stack(parts, 1), whole[:, 6:], atol=1e-5)


# ---- Qwen-Omni ------------------------------------------------------------------------------------------------------


def talker(run, **settings):
    torch.manual_seed(0)
    stage = TO.STAGES[0]
    return TO.TalkerTask.from_run(run, replace(stage, settings={**stage.settings, "size": 600, **settings}))


def test_each_text_id_is_read_with_the_state_it_was_drawn_from(run):
    task = talker(run)
    batch = task.batch(np.random.default_rng(0))
    asked, reads, written = batch["asked"][0], batch["reads"], batch["written"]
    ids = batch["input_ids"][0]
    assert len(reads) == len(written) == (ids < IDS.n_text).sum()
    inside = written != IDS.eot
    assert torch.equal(asked[reads[inside] + 1], written[inside])  # the state before an id foretells it
    text_end = torch.where(inside, written, IDS.text_end)
    assert torch.equal(ids[ids < IDS.n_text], text_end)
    taught = batch["targets"][batch["weights"] > 0]
    assert ((taught >= IDS.n_text) | (taught == IDS.eot)).all()  # the Talker writes nothing
    assert IDS.text_start not in ids


@pytest.mark.parametrize("feed, reads", [("both", (True, True)), ("hidden", (True, False)), ("text", (False, True))])
def test_the_feed_says_what_the_talker_reads(run, feed, reads):
    net = talker(run, feed=feed).model
    hidden, text = torch.randn(2, 1, 3, CONFIG.backbone.hidden_size), torch.tensor([[[50, 60, 70]], [[51, 61, 71]]])
    plain, others = net.fed(hidden[0], text[0]), (net.fed(hidden[1], text[0]), net.fed(hidden[0], text[1]))
    assert tuple(not torch.equal(plain, other) for other in others) == reads
    loaded = Omni(CONFIG)
    loaded.load_state_dict(net.state_dict())
    assert torch.equal(loaded.fed(hidden[0], text[0]), plain)  # whoever loads it feeds it alike


def test_another_feed_is_refused(run):
    with pytest.raises(ValueError, match="unknown feed 'all': choose one of both, hidden, text."):
        talker(run, feed="all")


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("feed", ["both", "text"])
def test_the_talkers_loss_reaches_the_thinker_or_not(run, detach, feed):
    task = talker(run, detach=detach, feed=feed)
    net, batch = task.model, task.batch(np.random.default_rng(0))
    states = task.thoughts(batch)
    if detach:
        assert not states.requires_grad
    else:
        states.retain_grad()
    task_loss = sum(losses.sum() for _, _, losses in task.losses({**batch, "states": states}))  # of the Talker alone
    task_loss.backward()
    reached = [weight.grad is not None and bool(weight.grad.any()) for weight in net.thinker.model.layers.parameters()]
    assert all(reached) == any(reached) == (not detach and feed == "both")
    assert net.read.weight.grad is not None and bool(net.read.weight.grad.any()) == (feed == "both")
    assert all(weight.grad.any() for weight in net.talker.model.layers.parameters())
    loss, logs = task.loss(batch, 0)
    assert loss.isfinite() and ("written" in logs) != detach


def test_a_thinker_out_of_reach_stays_as_it_was_shipped(trained, tiny):
    net = made("qwen-omni", tiny, trained).net
    shipped = tiny.decoder.state_dict()
    assert all(torch.allclose(value, shipped[name], atol=1e-3) for name, value in net.thinker.state_dict().items())
    whole = Omni(preset("mini"))
    talks, thinks = (sum(weight.numel() for weight in part.parameters()) for part in (whole.talker, whole.thinker))
    assert 1.5e6 < talks < 3e6 < 4e6 < thinks


def test_the_talker_begins_before_the_thinker_ends(trained, tiny, monkeypatch):
    system = made("qwen-omni", tiny, trained)
    system.net.thinker.lm_head.weight.data[IDS.eot] = 0
    monkeypatch.setattr(dialogue.TextOnly, "allowed", lambda self: dialogue.Allowed("text", 68, 128, ()))
    monkeypatch.setattr(qwen_omni, "MOST_WORDS", 25)
    order, thoughts = [], system.thoughts

    def watched(turn, said):
        for thought in thoughts(turn, said):
            order.append("thought")
            yield thought

    monkeypatch.setattr(system, "thoughts", watched)
    for kind, token in system.drawn(tone(), ()):
        order.append(kind)
        assert (token >= IDS.n_text) == (kind == "audio")
    first = order.index("audio")
    assert order[:first] == ["thought", "text"] * 10 and order.count("text") == 25
    assert order[first : first + 15] == ["audio"] * 15 and order[first + 15] == "thought"  # and goes on with it


def test_the_thinker_writes_what_it_would_write_alone(trained, tiny):
    """The Talker changes no word."""
    system = made("qwen-omni", tiny, trained)
    alone = [token for token, _ in system.thoughts(tone(), ())]
    talking = [token for kind, token in system.drawn(tone(), ()) if kind == "text"]
    assert talking == [token for token in alone if token >= IDS.first_text][: len(talking)] and talking
