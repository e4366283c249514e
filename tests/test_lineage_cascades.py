"""AudioGPT and HuggingGPT: what passes between their parts, who chooses tools and by what, what is logged; both are
trained here for some seconds."""

import json
import shutil

import numpy as np
import pytest
import soundfile
import torch

from aqaa import loading
from aqaa.corpus import speak
from aqaa.corpus import voices as V
from aqaa.corpus.plan import Item, plan
from aqaa.files import ModelError, data_folder
from aqaa.lineage import audiogpt, hugginggpt, tools
from aqaa.lineage.hugginggpt import GIVEN, STAGES, Task
from aqaa.lineage.tools import SOUND, TOOLS, Tool
from aqaa.tokenizers.text import normalise
from aqaa.training.lineage import audiogpt as learns
from aqaa.training.lineage import hugginggpt as plans
from aqaa.training.lineage import table
from aqaa.training.loop import Trainer, read_log
from aqaa.training.run import Run
from aqaa.weights.model_folder import save_part
from tests import tones
from tests.conftest import RATE, fails, tiny_config, tone
from tests.test_language import dialogues

BY_NAME = {tool.name: tool for tool in TOOLS}


class Planning(plans.PlannerTask):
    lr, rows, measured = 2e-2, 24, 30  # hasty, but enough for the test


class Analysing(learns.AnalystTask):
    lr, rows = 2e-2, 32


def spoken_tones(seed, each=10):
    """(measures, wants) of tones that sound as each of the wanted voices."""
    rng, measured, wants = np.random.default_rng(seed), [], []
    while len(wants) < each * len(tools.WANTS):
        want = tools.WANTS[len(wants) // each]
        voice = V.pick(rng, V.TRAINING, want)
        sound = tones.say(voice, "the river runs down to the ocean", V.draw(rng, want))
        if V.belongs(V.measure(V.trim(sound), 9), want):
            measured.append(tools.measures(sound))
            wants.append(want)
    return measured, wants


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("words"), "none", scale=0.03, quiet=True)
    return learns.asked(run)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, items):
    """What both leave, `audiogpt` and `hugginggpt`, after some seconds of training; measured by the way."""
    place, found = tmp_path_factory.mktemp("lineage"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_plot", lambda self: None)
        for name, make, steps in (
            ("analyst", lambda: Analysing(*items), 120), ("planner", lambda: Planning(*items), 180),
            ("describer", lambda: learns.DescriberTask(*spoken_tones(0), spoken_tones(1, 4)), 150),
        ):  # fmt: skip
            torch.manual_seed(0)
            task = make()
            Trainer(task, place / "run", name, steps, quiet=True).run()
            found[name] = task.finish(0)
            for system in ("audiogpt", "hugginggpt"):
                save_part(place / system / "parts", name, task.model)
    shipped = data_folder() / "mini" / "backbone.safetensors"
    for name in hugginggpt.ROLES:
        shutil.copy(shipped, place / "audiogpt" / "parts" / f"{name}.safetensors")
    (place / "found.json").write_text(json.dumps(found), encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def found(folder):
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def mini():
    return loading.load("mini")


@pytest.fixture
def chat(mini, folder):
    return audiogpt.AudioGPT(mini, 0, folder / "audiogpt")


@pytest.fixture
def hub(mini, folder):
    return hugginggpt.HuggingGPT(mini, 0, folder / "hugginggpt")


def hears(monkeypatch, system, words):
    """The system's recogniser hears these words, whatever it is given."""
    monkeypatch.setattr(system.ear, "transcribe", lambda sound: words)


def question(intent):
    listed = json.loads((data_folder() / "questions" / "questions.json").read_text(encoding="utf-8"))
    one = next(one for one in listed if one["intent"] == intent)
    sound, rate = soundfile.read(data_folder() / "questions" / one["file"], dtype="float32")
    assert rate == RATE
    return sound, one


# ---- AudioGPT -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    "what is the capital of italy", "say the soup is cold slowly", "am i a man or a woman",
])  # fmt: skip
def test_only_words_pass_between_the_parts_of_audiogpt(chat, monkeypatch, words):
    """Other sounds, the same words: the same answer, as long as the describer writes the same."""
    hears(monkeypatch, chat, words)
    monkeypatch.setattr(chat.describer, "says", lambda aspect, wav: f"it is {aspect}")
    monkeypatch.setattr(chat, "spoken", lambda text: (np.frombuffer(text.encode(), np.uint8), 1))
    one, two = (chat.answer([tone(seconds)]) for seconds in (0.5, 1.1))
    assert one.text == two.text and np.array_equal(one.audio, two.audio) and one.text
    assert bytes(one.audio).decode() == one.text  # the synthesizer had nothing else


def test_the_four_steps_of_audiogpt_are_logged_in_order_for_every_turn(chat, monkeypatch):
    hears(monkeypatch, chat, "say the soup is cold slowly")
    monkeypatch.setattr(chat, "spoken", lambda text: (np.zeros(8, np.float32), 16_000))
    chat.answer([tone(), tone()])
    assert [step for step, _ in chat.log] == list(audiogpt.STEPS) * 2
    heard, analysed, assigned, answered = (what for _, what in chat.log[:4])
    assert heard == "say the soup is cold slowly" and assigned.split(":")[0] in audiogpt.TOOLS
    assert analysed.split()[0] == assigned.split(":")[0] and answered
    chat.answer([tone()])
    assert len(chat.log) == 4  # of this answer alone


def test_what_a_question_asks_for_is_read_off_the_plan():
    def one(text, answer, manner="normal", **more):
        return learns.labels(Item("q", "train", "", "question", text, "v", answer=answer, manner=manner, **more))

    assert one("be a mouse and say hello to me", "hello to me", "high") == ("read", "high", slice(5, 8))
    assert one("repeat hello to me", "hello to me") == ("repeat", "normal", slice(1, 4))
    assert one("what is one plus one", "one plus one is equal to two") == ("answer", "normal", slice(0, 0))
    assert one("sing cat", "cat (mi) cat", "do", category="Sing")[0] == "sing"
    assert one("am i happy", "yes", intent="voice_mood", category="Voice Understanding")[0] == "voice_mood"
    assert one("now sadly", "hello", "sad", intent="follow_manner") == ("again", "sad", slice(0, 0))
    assert one("once more", "hello", "sad", intent="follow_again") == ("again", "normal", slice(0, 0))


def test_the_tool_is_chosen_by_a_trained_network(chat, found):
    assert found["analyst"]["dev"]["all"] > 75 and found["analyst"]["n"] > 100
    asked = "what is the capital of france", "sing a scale", "is my voice high or low", "do i sound happy or sad"
    chosen = [chat.analyst.analyse(words.split()).tool for words in asked]
    assert chosen == ["answer", "sing", "voice_pitch", "voice_mood"]


def test_the_last_answer_is_said_again_in_another_manner(chat, monkeypatch):
    said = [("user", "repeat x"), ("assistant", "(fast) the soup is cold")]
    for analysis, text in (
        (audiogpt.Analysis("again", "sad"), "(sad) the soup is cold"), (audiogpt.Analysis("again"), said[1][1]),
        (audiogpt.Analysis("read", "low", "the soup"), "(low) the soup"),
        (audiogpt.Analysis("repeat", "low", "the soup"), "the soup"),
    ):  # fmt: skip
        monkeypatch.setattr(chat.analyst, "analyse", lambda words, analysis=analysis: analysis)
        assert chat.called("some words", said, None) == text
    monkeypatch.setattr(chat.language, "told", lambda prompt: "asked of the language model")
    for lacking in (audiogpt.Analysis("read", "low"), audiogpt.Analysis("repeat")):
        monkeypatch.setattr(chat.analyst, "analyse", lambda words, lacking=lacking: lacking)
        assert chat.called("some words", [], None) == "asked of the language model"


# ---- the tools ------------------------------------------------------------------------------------------------------


def test_the_describer_hears_voices_apart(found, folder):
    right = found["describer"]["dev"]
    assert set(right) == set(tools.WANTS) and np.mean(list(right.values())) > 80, right
    assert set(tools.ASPECTS) == {"voice_pitch", "voice_rate", "voice_mood", "voice_person"}
    assert not tools.measures(np.zeros(0)).any() and not tools.measures(np.zeros(9000)).any()


def test_changers_change_one_thing():
    sound = tones.say("flite:slt", "the river runs down to the ocean", V.Draw())
    before = tools.measures(sound)
    octaves, level = before[1], before[5]
    for factor in (0.7, 1.4):
        longer = tools.stretched(sound, factor)
        assert abs(len(longer) / len(sound) - factor) < 0.01
        assert abs(tools.measures(longer)[1] - octaves) < 0.05
    for semitones in (-4, 4):
        higher = tools.shifted(sound, semitones)
        assert len(higher) == len(sound)
        assert abs(12 * (tools.measures(higher)[1] - octaves) - semitones) < 0.7
    assert abs(10 * (tools.measures(tools.louder(sound, -8))[5] - level) + 8) < 0.5
    assert np.abs(tools.louder(sound, 40)).max() <= 1.0
    assert len(tools.stretched(sound[:40], 2)) == len(tools.shifted(sound[:40], 3)) == 40  # too short for anything


def test_any_word_has_a_vector_and_padding_does_not_count():
    torch.manual_seed(0)
    reader = tools.Reader()
    lines = [["what", "is", "zorbelquax"], ["what"]]
    vectors, hidden, there = reader(lines)
    assert there.tolist() == [[True] * 3, [True, False, False]] and not hidden[1, 1:].any()
    alone = reader(lines[1:])
    assert torch.allclose(alone[1][0, 0], hidden[1, 0], atol=1e-6) and torch.allclose(alone[0][0, 0], vectors[1, 0])


# ---- HuggingGPT -----------------------------------------------------------------------------------------------------


def test_requests_are_what_they_say_and_the_test_has_wordings_of_its_own():
    for test in (False, True):
        composer = plans.Composer(np.random.default_rng(1), test)
        for number in (1, 2, 3) * 40:
            words, names, sources = composer.request(number)
            assert len(names) == len(sources) == number == len(set(names)) and sources[0] == GIVEN
            kinds = [plans.KINDS[names[0]][0]]
            for name, source in zip(names, sources):
                assert plans.KINDS[name][0] == kinds[source + 1]
                kinds.append(plans.KINDS[name][1])
    known, kept = (plans.Composer(None, test).phrases for test in (False, True))
    assert set(known) == set(kept) == set(BY_NAME) and not any(set(known[name]) & set(kept[name]) for name in known)
    assert all(one.count("{x}") == 1 for stock in (known, kept) for phrases in stock.values() for one in phrases)


def test_plans_fall_with_their_length(found):
    right = found["planner"]
    assert right["plans_one"] > 60 and right["plans_one"] >= right["plans_three"] > 20, right
    assert right["other_descriptions_one"] > 40 and right["spoken"] > 60, right  # where tools are told in other words


def test_the_planner_is_small(folder):
    assert sum(path.stat().st_size for path in (folder / "hugginggpt" / "parts").glob("[dp]*.safetensors")) < 1e6


def test_a_tool_joins_by_a_description_alone(hub):
    """Training never saw these words: request and description share them, and that is enough."""
    assert "backwards" not in str(plans.REQUESTS) + str(TOOLS)
    tool = Tool("reverser", "plays a recording backwards", SOUND, SOUND)
    hub.add(tool, lambda sound: (sound[0][::-1], sound[1]))
    sound = tone(0.3)
    reply = hub.handle("play this recording backwards", (sound, RATE))
    assert np.array_equal(reply.audio, sound[::-1]) and "reverser" in hub.log[1][1]
    plan = hub.planner.plan("play this recording faster".split(), hub.tools, SOUND)
    assert plan[0].tool.name == "faster"  # the others are found as before


def test_the_four_stages_of_hugginggpt_are_logged_in_order(hub, monkeypatch):
    hears(monkeypatch, hub, "what is the capital of france")
    hub.run |= {"synthesizer": lambda text: (np.ones(160, np.float32), 16_000)}
    reply = hub.answer([tone()])
    assert [stage for stage, _ in hub.log] == list(STAGES)
    planned, chosen, done, told = (what.split("; ") for _, what in hub.log)
    assert len(planned) == len(chosen) == len(done) == 3 and told == [reply.text]
    assert [line.split()[1].strip(",") for line in chosen] == ["recogniser", "answerer", "synthesizer"]
    assert done[0] == "0: what is the capital of france" and done[2].endswith("of sound")
    assert len(reply.audio) == 160 and reply.seconds == reply.first > 0


def test_earlier_turns_are_heard_and_not_spoken(hub, monkeypatch):
    hears(monkeypatch, hub, "what is the capital of france")
    spoken, seen = [], []
    monkeypatch.setattr(tools, "replied", lambda writer, words, said: seen.append(list(said)) or f"answer {len(said)}")
    hub.run["synthesizer"] = lambda text: spoken.append(text) or (np.ones(9), 9)
    assert hub.answer([tone(), tone(), tone()]).text == "answer 4"
    before = [("user", "what is the capital of france"), ("assistant", "answer 0")]
    assert spoken == ["answer 4"] and seen[:2] == [[], before] and seen[2][:2] == before


@pytest.mark.parametrize("name", ["chat", "hub"])
def test_a_question_about_the_voice_goes_to_who_hears_it(request, monkeypatch, name):
    system = request.getfixturevalue(name)
    hears(monkeypatch, system, "is my voice high or low")
    high, low = (tones.say("flite:slt", "is my voice high or low", V.Draw(pitch=pitch)) for pitch in (1.6, 0.5))
    said = tools.ASPECTS["voice_pitch"]
    assert [system.heard(sound, [])[1] for sound in (high, low)] == [said["high"], said["low"]]


def plan_of(*steps):
    return [Task("", BY_NAME[name], source, 1.0) for name, source in steps]


def test_results_go_where_the_plan_says(hub):
    hub.run |= {
        "recogniser": lambda sound: f"words of {len(sound[0])}", "synthesizer": lambda text: (np.ones(len(text)), 1),
        "slower": lambda sound: (np.repeat(sound[0], 2), sound[1]), "voice_pitch": lambda sound: "it is low",
    }  # fmt: skip
    tasks = plan_of(("slower", GIVEN), ("recogniser", 0), ("voice_pitch", GIVEN), ("synthesizer", 1))
    results = hub.executed(tasks, (np.zeros(5), RATE))
    assert results[1] == "words of 10" and len(results[3][0]) == len("words of 10")
    reply = hub.summed_up(tasks, results)
    assert reply.text == "words of 10 and it is low" and reply.rate == 1 and len(reply.audio) == 11
    assert set(hub.executed(tasks, (np.zeros(5), RATE), aloud=False)) == {0, 1, 2}  # nobody waits for the sound
    hub.run["synthesizer"] = hub.spoken = lambda text: (np.full(3, 2.0), 9)
    words = plan_of(("voice_pitch", GIVEN))
    assert hub.summed_up(words, hub.executed(words, (np.zeros(5), RATE))).rate == 9  # words alone are read aloud


@pytest.mark.parametrize("broken, text", [
    ("recogniser", "the recogniser failed: out of order"), ("answerer", "the answerer failed: out of order"),
    ("synthesizer", "an answer and the synthesizer failed: out of order"),
])  # fmt: skip
def test_a_tool_that_fails_leaves_a_sentence(hub, monkeypatch, broken, text):
    def fault(value):
        raise RuntimeError("out of order\nTraceback")

    tasks = plan_of(("recogniser", GIVEN), ("answerer", 0), ("synthesizer", 1))
    monkeypatch.setattr(hub.planner, "plan", lambda *_: tasks)
    monkeypatch.setattr(hub, "spoken", fault)
    hub.run |= {"recogniser": lambda sound: "a question", "answerer": lambda words: "an answer", "synthesizer": fault}
    hub.run[broken] = fault
    reply = hub.handle("some words", (tone(), RATE))
    assert reply.text == text and not len(reply.audio) and len(hub.log) == 4


def test_a_request_is_never_too_odd(hub, monkeypatch):
    monkeypatch.setattr(hub, "spoken", lambda text: (np.zeros(4, np.float32), 16_000))
    for request, given in (("", tone()), ("?!", tone()), ("xyz " * 60, tone()), ("read it", "")):
        reply = hub.handle(request, given if isinstance(given, str) else (given, RATE))
        assert isinstance(reply.text, str) and len(hub.log) == 4


# ---- both -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chat", "hub"])
def test_both_answer_two_shipped_questions(request, name):
    system, right = request.getfixturevalue(name), []
    for intent in ("capital", "say_sad"):
        sound, one = question(intent)
        reply = system.answer([sound])
        assert len(reply.audio) / reply.rate > 0.5 and np.isfinite(reply.audio).all()
        assert 0 < reply.first <= reply.seconds
        right.append(normalise(reply.text) == normalise(one["answer"]))
    assert any(right), system.log


def test_without_training_there_is_a_sentence(mini, tmp_path):
    for kind in (audiogpt.AudioGPT, hugginggpt.HuggingGPT):
        with fails("has not been trained here", f"aqaa train lineage {kind.name}", error=ModelError):
            kind(mini, 0, tmp_path)


def test_their_stages_run_and_go_on(tiny_folder, tiny_text, tmp_path, monkeypatch):
    tones.install(monkeypatch)
    monkeypatch.setattr(Trainer, "_plot", lambda self: None)
    monkeypatch.setattr(Run, "book", lambda run: dialogues(tiny_text))
    monkeypatch.setattr(plans.PlannerTask, "measured", 3)
    corpus = tmp_path / "corpus"
    wanted = [item for item in plan(scale=0.002) if item.want]
    speak.speak(wanted[::3], corpus / "questions", workers=1, progress=False)
    given = dict(out=tmp_path, corpus=corpus, init=tiny_folder, config=tiny_config(), scale=0.002, quiet=True)
    for name, module in (("audiogpt", learns), ("hugginggpt", plans)):
        for steps in (2, 3):
            table.main(name, steps=steps, resume=True, **given)
            record = json.loads((tmp_path / name / "record.json").read_text(encoding="utf-8"))
            for stage in module.STAGES:
                assert read_log(tmp_path / name / f"{stage.name}.csv")[-1]["step"] == str(steps)
                assert (tmp_path / name / "parts" / f"{stage.name}.safetensors").exists()
                assert record[stage.name]["steps"] == steps and np.isfinite(record[stage.name]["last"]["loss"])
