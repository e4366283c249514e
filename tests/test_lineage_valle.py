"""VALL-E: a residual codec, AR on its first level, NAR on the others, a voice that is copied from a prompt."""

import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch

from aqaa import cli
from aqaa.config import preset
from aqaa.corpus.plan import STORED, Item
from aqaa.lineage import valle
from aqaa.lineage.codec import FLOOR, STACK, ResidualCodec
from aqaa.lineage.units import Steps
from aqaa.lineage.valle import AR, NAR, VALLE, prefix
from aqaa.lineage.voiceprint import Voiceprint, similarity_by_prompt
from aqaa.sound_headers import AudioError
from aqaa.training.lineage import table
from aqaa.training.lineage.codec import Speech
from aqaa.training.lineage.valle import ARTask, NARTask, heard_as
from tests.conftest import RATE, SENTENCES, fails, tiny_config, tone

VOICES = {"espeak:en+m1": 100, "espeak:en+f1": 200, "hibari:heart": 180}  # and about how high they are


def speak(folder, count=18, **facts):
    """A corpus as `aqaa train corpus` leaves it, of tones: every third item in a voice."""
    items, waves, offset = [], [], 0
    for number in range(count):
        voice, pitch = list(VOICES.items())[number % 3]
        pitch += number / 10
        wav = (tone(0.8 + 0.05 * number, pitch=pitch) * 30_000).astype(np.int16)
        given = {"split": "train", "role": "question", "text": SENTENCES[number % 8], "voice": voice, **facts}
        items.append(Item(f"q{number:06d}", cell="", f0=pitch, shard=0, offset=offset, length=len(wav), **given))
        waves.append(wav)
        offset += len(wav)
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps({"items": count}), encoding="utf-8")
    np.save(folder / "shard_0000.npy", np.concatenate(waves))
    lines = [json.dumps({name: asdict(item)[name] for name in STORED}) for item in items]
    (folder / "shard_0000.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return speak(tmp_path_factory.mktemp("spoken") / "corpus")


def train(out, init, corpus, steps):
    table.main("vall-e", out, init=init, corpus=corpus, config=tiny_config(), steps=steps, quiet=True)


@pytest.fixture(scope="module")
def trained(corpus, tiny_folder, tmp_path_factory):
    """The folder of a VALL-E of tiny width after two steps of each stage."""
    out = tmp_path_factory.mktemp("lineage")
    train(out, tiny_folder, corpus, steps=2)
    return out / "vall-e"


@pytest.fixture
def system(tiny, trained):
    return VALLE(tiny, folder=trained)


@pytest.fixture(scope="module")
def codec():
    """Fitted to noise around 40 places."""
    torch.manual_seed(0)
    codec = ResidualCodec(preset("mini").mel, levels=5, size=16)
    places = torch.randn(40, STACK * 80) * 2 - 4
    codec.data = places[torch.randint(40, (600,))] + torch.randn(600, STACK * 80)
    for _ in range(20):
        codec.learn(codec.data, decay=0.5)
    return codec


@pytest.fixture(scope="module")
def nar():
    torch.manual_seed(0)
    return NAR(tiny_config(), levels=4, size=8, layers=2).eval()


def test_each_level_of_the_codec_comes_closer(codec):
    codes = codec.encode(codec.data)
    assert codes.shape == (600, 5) and codes.max() < 16
    errors = [(codec.decode(codes[:, :n]) - codec.data).square().mean() for n in range(1, 6)]
    assert errors[0] < codec.data.var() and all(b < 0.98 * a for a, b in zip(errors, errors[1:], strict=False))
    assert all(len(level.unique()) > 10 for level in codes.T)  # centroids that serve nobody were moved


def test_a_mel_is_stacked_and_comes_back(codec):
    mel = torch.randn(2, 80, 4 * STACK + 3) * 3 - 6
    vectors = codec.stacked(mel)
    assert vectors.shape == (2, 4, STACK * 80)
    assert torch.equal(codec.mel(vectors), mel[..., : 4 * STACK].clamp(min=FLOOR))
    silence = np.zeros(RATE, np.float32)
    heard = [codec.read(np.concatenate([silence, tone(1.0), *rest])) for rest in ([], [silence])]
    assert torch.equal(*heard) and 25 <= len(heard[0]) <= 34  # 25 a second, and a little silence


def level_logits(nar, text, prompt, codes, level):
    ids, stages = nar.positions(text, prompt, codes, level)
    with torch.no_grad():
        return nar.logits(nar(ids, stages, [len(ids)])[-len(codes) :], level)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_level_sees_the_levels_before_it_the_text_and_the_whole_prompt(nar, level):
    text, codes = [60, 61, 62], (torch.arange(7)[:, None] + torch.arange(4)) % 8
    prompt = codes[2:] * 3 % 8
    before = level_logits(nar, text, prompt, codes, level)
    assert before.shape == (7, 8)

    def moved(**changed):
        given = {"text": text, "prompt": prompt, "codes": codes} | changed
        return (level_logits(nar, **given, level=level) - before).abs().amax(1)

    for other in range(4):  # one code of one level
        one = codes.clone()
        one[3, other] = (one[3, other] + 1) % 8
        change = moved(codes=one)
        assert (change > 1e-6).all() if other < level else (change == 0).all(), other  # frames before and behind
        one = prompt.clone()
        one[2, other] = (one[2, other] + 1) % 8
        assert (moved(prompt=one) > 1e-6).all()
    assert (moved(text=[60, 63, 62]) > 1e-6).all() and (moved(prompt=prompt[:0]) > 1e-6).all()
    assert (moved(codes=codes[[1, 0, 2, 3, 4, 5, 6]])[2:] > 1e-7).all()  # order counts


def test_the_stage_tells_the_level(nar):
    text, prompt, codes = [60], torch.randint(8, (3, 4)), torch.randint(8, (4, 4))
    ids, stages = nar.positions(text, prompt, codes, 2)
    assert stages.tolist() == [0] * 4 + [2] * 4
    with torch.no_grad():
        hidden, others = (nar(ids, given, [8]) for given in (stages, stages.where(stages == 0, torch.tensor(3))))
    assert ((hidden - others).abs().amax(1) > 1e-5).all()


def test_packed_examples_do_not_see_each_other(nar):
    rows = [nar.positions([60] * n, torch.randint(8, (n, 4)), torch.randint(8, (5, 4)), 1) for n in (2, 4)]
    with torch.no_grad():
        alone = torch.cat([nar(ids, stages, [len(ids)]) for ids, stages in rows])
        together = nar(torch.cat([rows[0][0], rows[1][0]]), torch.cat([rows[0][1], rows[1][1]]), [9, 13])
    assert torch.allclose(alone, together, atol=1e-5)


def test_all_levels_are_filled_in_one_pass_each(nar, monkeypatch):
    passes, forward = [], nar.forward
    monkeypatch.setattr(nar, "forward", lambda ids, stages, sizes: passes.append(stages) or forward(ids, stages, sizes))
    codes = nar.complete([60, 61], torch.randint(8, (3, 4)), [1, 2, 3, 4, 5], torch.randn(4, 8, 16))
    assert codes.shape == (5, 4) and codes[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert [int(stages.max()) for stages in passes] == [1, 2, 3]


def sequence(system, said, heard=(62,), shown=(5, 6), text=(60, 61)):
    """(ids (1, T), places (1, T)) of AR behind some codes that it has said."""
    ids = system.ar.ids
    before, places = prefix(list(text), list(heard), list(shown), 4.0, system.model.text, ids)
    before, places = before + [ids.n_text + code for code in said], places + [valle.SAID + i for i in range(len(said))]
    return torch.tensor([before]), torch.tensor([places])


def test_ar_reads_text_and_first_codes(system):
    ids = system.ar.ids
    assert system.ar.lm_head.out_features == ids.end == ids.n_text + 512
    (row,), (places,) = (x.tolist() for x in sequence(system, []))
    assert row[-3:] == [ids.n_text + 5, ids.n_text + 6, ids.audio_start] and places[-3:] == [0, 1, valle.SAID - 1]
    start = row.index(62)
    assert row[start : start + 4] == [62, ids.text_end, 60, 61]
    assert places[start + 1] == -1 and places[start + 2 : start + 4] == [valle.SAID + 3, valle.SAID + 7]
    assert 0 < places[start] < 10 and set(places[:start] + places[start + 4 : -3]) == {-1}


def test_ar_is_causal(system):
    with torch.no_grad():
        one, two, three = (system.ar(*sequence(system, said)) for said in ([1, 2, 3, 4], [1, 2, 7, 8], [9, 2, 3, 4]))
    assert torch.equal(one[:, :-2], two[:, :-2]) and not torch.allclose(one[:, -2:], two[:, -2:], atol=1e-4)
    assert not torch.allclose(one[:, -1], three[:, -1], atol=1e-5)


def test_a_code_and_a_text_are_as_far_apart_as_in_time(system):
    ids, places = sequence(system, [1, 2, 3, 4, 5, 6])
    bias = system.ar.bias(ids, places)[0]
    text = ids[0].tolist().index(61)  # said at 7
    start = ids.shape[1] - 7  # audio_start
    assert bias.shape == (4, ids.shape[1], ids.shape[1]) and (bias[:, 3, 4:] == -torch.inf).all()
    near = bias[0, start:, text]
    assert near.argmax() == 6 and near[-1] > near[0] and near[:-1].diff().min() > 0  # the last asks for 6
    assert torch.allclose(near, bias[0, start, start] - (7 - torch.arange(7.0)).sqrt() / 4)  # of the steepest head
    assert torch.allclose(bias[0, start + 3, start], -torch.tensor(3.0).sqrt() / 4)  # between codes: in codes


def test_ar_goes_on_code_by_code_as_in_one_pass(system):
    """The likeliest codes with a cache are those of whole passes; text_end and words never come."""
    ar, ids = system.ar, system.ar.ids
    before = [x[0].tolist() for x in sequence(system, [])]
    drawn = ar.continued(*before, 4, 9, seed=3)
    assert 4 <= len(drawn) <= 9 and all(0 <= code < 512 for code in drawn)
    assert drawn == ar.continued(*before, 4, 9, seed=3) != ar.continued(*before, 9, 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(valle, "SAMPLING", {"temperature": 0, "top_p": 1.0})
        greedy = ar.continued(*before, 6, 6)
    with torch.no_grad():
        hidden = ar(*sequence(system, greedy))[0, -len(greedy) - 1 : -1]
    assert ar.logits(hidden, rows=slice(ids.n_text, ids.end)).argmax(-1).tolist() == greedy


def test_the_first_codes_end_with_eot_and_not_before_there_are_some():
    ids = AR(tiny_config()).ids
    machine = Steps(0, "L").machine(ids, 2)
    for token in (ids.n_text, ids.n_text + 1):
        assert machine.allowed() == ("linguistic", ids.n_text, ids.end, ()) and not machine.finished
        machine.advance(token)
    assert machine.allowed().markers == (ids.eot,)
    machine.advance(ids.eot)
    assert machine.finished


def test_two_questions_are_answered_in_the_askers_voice(system, monkeypatch):
    shown, silence = [], torch.zeros(0, 4, dtype=torch.long)
    monkeypatch.setattr(system, "enrolled", lambda *given: shown.append(given) or ([], silence))
    monkeypatch.setattr(system, "thought", lambda turn, said: "seven plus five is twelve")
    for pitch in (120.0, 240.0):
        asked = tone(pitch=pitch)
        reply = system.answer([tone(), asked])
        assert reply.text == "seven plus five is twelve" and reply.rate == RATE and np.isfinite(reply.audio).all()
        assert len(reply.audio) % 640 == 0 and 0.2 * RATE < len(reply.audio) and np.abs(reply.audio).max() < 1
        assert shown.pop() == (asked, 3.0)


def test_a_question_goes_all_the_way(system):
    reply = system.answer([tone(4.0)])
    assert isinstance(reply.text, str) and reply.audio.dtype == np.float32 and reply.seconds > 0


def test_the_last_three_seconds_are_the_prompt_and_without_one_it_speaks_too(system):
    long = np.concatenate([tone(3.0, pitch=90.0), tone(3.0, pitch=220.0)])
    heard, shown = system.enrolled(long)
    assert shown.shape[1] == 4 and 70 <= len(shown) <= 82 and isinstance(heard, list)
    other = np.concatenate([tone(2.0, pitch=150.0), long[2 * RATE :]])
    assert torch.equal(shown, system.enrolled(other)[1])  # what is longer ago does not count
    assert system.enrolled(None)[1].shape == system.enrolled(long, 0)[1].shape == (0, 4)
    alone, again = system.say("it is twelve")[0], system.say("it is twelve")[0]
    behind = system.say("it is twelve", long)[0]
    assert len(alone) and np.array_equal(alone, again) and not np.array_equal(alone[:2000], behind[:2000])
    assert len(system.say("?!", long)[0]) == 0
    with pytest.raises(AudioError):
        system.say("hello", np.zeros(RATE, np.float32))


def test_it_says_what_was_not_trained(tiny, tmp_path):
    with fails("vall-e has not been trained", "aqaa train lineage vall-e"):
        VALLE(tiny, folder=tmp_path).say("hello")


# ---- training ------------------------------------------------------------------------------------


def some_speech(corpus):
    torch.manual_seed(0)
    speech = Speech(corpus, preset("mini").mel, ResidualCodec(preset("mini").mel, 3, 8))
    speech.codec.centroids.normal_(-4, 2)
    return speech


def test_prompts_are_of_the_same_voice_and_pitch(corpus):
    speech = Speech(corpus, preset("mini").mel)
    assert len(speech.items) == 18
    rng, found = np.random.default_rng(0), 0
    for index, item in enumerate(speech.items):
        if (other := speech.alike(index, rng)) is not None:
            found += 1
            assert other != index and speech.items[other].voice == item.voice
            assert abs(speech.items[other].f0 / item.f0 - 1) < 0.06
    assert found > 12


def test_what_was_drawn_before_changes_no_batch(corpus, tiny_text):
    """So a run that is resumed sees what an unbroken one sees."""
    def tasks():
        speech = some_speech(corpus)
        return [kind(tiny_config(), speech, tiny_text) for kind in (ARTask, NARTask)]

    for one, other in zip(tasks(), tasks(), strict=True):
        one.batch(np.random.default_rng(1))
        first, second = (task.batch(np.random.default_rng(2)) for task in (one, other))
        assert first.keys() == second.keys()
        for key, value in first.items():
            ours, theirs = (sum(one, []) if key == "groups" else [one] for one in (value, second[key]))
            assert all(torch.equal(*map(torch.as_tensor, pair)) for pair in zip(ours, theirs, strict=True)), key


def test_ar_begins_with_what_the_mini_can_read_aloud(corpus, tiny, tiny_text):
    task = ARTask(tiny_config(), some_speech(corpus), tiny_text)
    shares = heard_as(task.speech, tiny.semantic)
    assert shares.shape == (8, 32) and torch.allclose(shares.sum(1), torch.ones(8)) and (shares > 0.5).any()
    task.begin(tiny.backbone, tiny.semantic, tiny.ids.semantic_start)
    for own, other in zip(task.model.model.layers.parameters(), tiny.backbone.model.layers.parameters(), strict=True):
        assert torch.equal(own, other)
    for own, other in ((task.model.lm_head, tiny.backbone.lm_head),
                       (task.model.model.embed_tokens, tiny.backbone.model.embed_tokens)):  # fmt: skip
        text, codes = own.weight.split([tiny.ids.n_text, 8])
        assert torch.equal(text, other.weight[: tiny.ids.n_text])
        torch.testing.assert_close(codes, shares @ other.weight[tiny.ids.semantic_start : tiny.ids.end])


def test_ar_learns_every_code_and_no_text(corpus, tiny_text):
    speech = some_speech(corpus)
    task, seen = ARTask(tiny_config(), speech, tiny_text), set()
    for seed in range(60):
        ids, places, weights = task.draw(np.random.default_rng(seed))
        assert len(ids) == len(places) == len(weights)
        (start,) = np.flatnonzero(ids == task.ids.audio_start)
        shown = int((ids[:start] >= task.ids.n_text).sum())
        end = int(np.flatnonzero(ids == task.ids.text_end)[0])
        told = ids[end - 1] >= task.ids.first_text
        assert places[start:].tolist() == list(range(valle.SAID - 1, valle.SAID + len(ids) - start - 1))
        text = places[(ids >= task.ids.first_text) & (ids < task.ids.n_text) & (places >= valle.SAID)]
        assert len(text) and text.max() < 1.4 * (places.max() - valle.SAID) + valle.SAID  # the rate is jittered
        assert (weights[start + 1 :] == 1).all() and ids[-1] == task.ids.eot and weights[start] == 0
        assert weights[: start - shown].sum() == 0 and (weights[start - shown : start] == (shown > 0 and told)).all()
        seen.add((shown > 0, bool(told)))
    assert (True, True) in seen and (False, False) in seen


def test_a_prompt_that_is_cut_is_told_its_share_of_the_words(corpus, tiny_text, monkeypatch):
    for name, value in {"LONGEST": 10, "PAIRS": 1.0, "UNTOLD": 0.0}.items():
        monkeypatch.setattr(f"aqaa.training.lineage.valle.{name}", value)
    task, others = ARTask(tiny_config(), speech := some_speech(corpus), tiny_text), []
    alike = speech.alike
    monkeypatch.setattr(speech, "alike", lambda *given: others.append(alike(*given)) or others[-1])
    for seed in range(12):
        ids, places, _ = task.draw(np.random.default_rng(seed))
        if (other := others.pop()) is not None:
            heard = ((ids < task.ids.n_text) & (places >= 0) & (places < valle.SAID - 1)).sum()
            words = len(task.words(other))
            assert abs(heard / words - 10 / len(speech.codes(other))) <= 1 / words


def test_it_runs_from_the_command_line_and_resumes(corpus, tmp_path, capsys, trained):
    rows = {name: (trained / f"{name}.csv").read_text(encoding="utf-8") for name in ("codec", "voices", "ar", "nar")}
    assert all("level1" in row or "loss" in row for row in rows.values())
    distance = json.loads((trained / "record.json").read_text(encoding="utf-8"))["codec"]["mel_distance"]
    assert len(distance) == 4 and distance[-1] < distance[0]
    args = ["train", "lineage", "vall-e", "--steps", "2", "--corpus", str(corpus), "--out", str(tmp_path)]
    assert cli.main(args) == 0
    told, stages = capsys.readouterr().out, ("codec", "voices", "ar", "nar")
    assert re.findall(r"^(\w+): [\d.]+ min$", told, re.MULTILINE) == list(stages)
    parts = {name: (tmp_path / "vall-e" / "parts" / f"{name}.safetensors").read_bytes() for name in stages}
    assert cli.main([*args, "--resume"]) == 0  # all is done: nothing is learnt anew
    assert parts == {name: (tmp_path / "vall-e" / "parts" / f"{name}.safetensors").read_bytes() for name in stages}


@pytest.mark.parametrize("make, words", [
    (lambda folder: folder, ("holds no corpus", "aqaa train corpus")),
    (lambda folder: speak(folder, role="generic", manner="soft"), ("no clean speech",)),
])  # fmt: skip
def test_a_corpus_that_is_missing_or_useless_is_one_sentence(tmp_path, tiny_folder, make, words):
    folder = make(tmp_path / "none")
    with fails(*words):
        train(tmp_path / "out", tiny_folder, folder, steps=1)


# ---- how alike voices are ------------------------------------------------------------------------


def test_like_voices_have_like_prints_and_a_prompt_that_is_copied_shows():
    voices = [tone(1.0, pitch=pitch) for pitch in np.geomspace(80, 300, 24)]
    voiceprint = Voiceprint(voices, preset("mini").mel)
    low, high = tone(1.5, pitch=100.0), tone(1.5, pitch=260.0)
    assert voiceprint.similarity(low, 0.3 * low) > 0.99  # loudness is no voice
    assert voiceprint.similarity(low, tone(1.2, pitch=102.0)) > voiceprint.similarity(low, high) + 0.5

    class Parrot:
        """Says the last seconds that it was shown, a voice of its own without any."""

        def say(self, text, prompt, seconds):
            return (prompt[-int(seconds * RATE) :] if seconds else tone(1.0, pitch=170.0)), RATE

    said = [("hello", low), ("hello", high)]
    rows = similarity_by_prompt(Parrot(), voiceprint, said)
    assert rows[3]["mean"] > 0.99 > rows[0]["mean"] and rows[3]["mean"] >= rows[1]["mean"] > rows["other"]["mean"]
    assert rows["halves"]["mean"] > 0.8 and rows[0]["n"] == 2
