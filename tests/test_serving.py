"""Several listeners at once: everyone gets the answer that they would get alone."""

import threading
import time
from pathlib import Path

import pytest
import torch

from aqaa import loading
from aqaa.backbone import generation
from aqaa.pipeline import AQAA
from aqaa.scale.serving import Batch, Server
from aqaa.scale.vllm.client import EngineError
from aqaa.scale.vllm.client import Server as Far
from aqaa.tokenizers import dialogue
from tests.conftest import RATE, tone
from tests.stub_server import serve

QUESTIONS = Path(__file__).resolve().parent.parent / "data" / "questions"
NAMES = ("sum_q001813", "capital_q001864", "say_sad_q002455")
DEADLINE = 30  # s: nobody waits for ever


@pytest.fixture(scope="module")
def mini():
    return loading.load("mini")


@pytest.fixture
def sounds():
    tones = (0.4, 120), (1, 200), (0.6, 90)
    return [(torch.from_numpy(tone(seconds, pitch=pitch)), RATE) for seconds, pitch in tones]


def alone(model, prompts, options):
    return [list(model.generate(prompt, **given)) for prompt, given in zip(prompts, options, strict=True)]


def together(model, prompts, options, **settings):
    """The same from one Batch, each listener in a thread of its own."""
    found = [None] * len(prompts)
    with Batch(model.backbone, **settings) as batch:
        shared = AQAA(model.config, lambda name: getattr(model, name))
        shared.engine = batch

        def listen(i):
            found[i] = list(shared.generate(prompts[i], **options[i]))

        threads = [threading.Thread(target=listen, args=(i,), daemon=True) for i in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE)
    return found


def test_three_listeners_hear_what_each_would_hear_alone(mini):
    """The shipped model: ids exactly, sound exactly, at the default temperature with seeds of their own."""
    questions = [str(QUESTIONS / f"{name}.wav") for name in NAMES]
    near = [mini.stream(question, seed=seed).answer for seed, question in enumerate(questions)]
    with Server(mini) as server:
        listeners = [server.submit(question, seed=seed) for seed, question in enumerate(questions)]
        pieces = [list(listener) for listener in listeners]
        far = [listener.answer for listener in listeners]
    for one, other, heard in zip(near, far, pieces, strict=True):
        assert one.tokens == other.tokens and one.text == other.text
        assert torch.equal(one.audio, other.audio) and torch.equal(one.audio, torch.cat([p.audio for p in heard]))
        assert one.confidence == pytest.approx(other.confidence, abs=1e-5)
    assert len({answer.text for answer in far}) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_join_and_leave_at_any_token(tiny, sounds, batch_size):
    """Lengths, layouts, settings and rules differ; more listeners than seats."""
    heard = [tiny.listen(sound) for sound in sounds]
    prompts = [tiny.prompt(ids) for ids in heard * 2]
    options = [
        {"max_tokens": 60, "seed": 1}, {"max_tokens": 7, "temperature": 0}, {"max_tokens": 90, "temperature": 2.0},
        {"max_tokens": 50, "layout": dialogue.layout("audio_only")}, {"max_tokens": 1}, {"max_tokens": 0},
    ]  # fmt: skip
    for one, other in zip(alone(tiny, prompts, options), together(tiny, prompts, options, batch_size=batch_size)):
        assert [(step.id, step.kind) for step in one] == [(step.id, step.kind) for step in other]
        assert [step.logprob for step in one] == pytest.approx([step.logprob for step in other], abs=1e-4)


def test_they_are_truly_answered_together(tiny, sounds, monkeypatch):
    """A step of the batch serves several; one after the other would need the sum of all lengths."""
    prompts, widths = [tiny.prompt(tiny.listen(sound)) for sound in sounds], []
    feed, submitted = generation.Decoder.feed, threading.Event()

    def counted(self, embeddings, *rest):
        submitted.wait(DEADLINE)
        widths.append(embeddings.shape[0])
        return feed(self, embeddings, *rest)

    monkeypatch.setattr(generation.Decoder, "feed", counted)
    with Batch(tiny.backbone) as batch:
        options = {"max_tokens": 80, "temperature": 0, "min_audio": 75}
        listeners = [batch.generate(prompt, tiny.ids, tiny.layout, **options) for prompt in prompts]
        submitted.set()
        assert [len(list(listener)) for listener in listeners] == [80, 80, 80]
    assert widths.count(3) >= 75 and len(widths) <= 90


def test_a_server_elsewhere_serves_them_too(tiny, sounds):
    near = [tiny.stream(sound, seed=2, max_tokens=80).answer for sound in sounds]
    with serve(tiny) as stub, Server(tiny, engine=Far(stub.url)) as server:
        listeners = [server.submit(sound, seed=2, max_tokens=80) for sound in sounds]
        for one, listener in zip(near, listeners, strict=True):
            assert one.tokens == listener.answer.tokens and torch.equal(one.audio, listener.answer.audio)


def test_a_listener_can_go_on_after_a_fault(tiny, sounds):
    options = {"temperature": 0, "max_tokens": 150, "min_audio": 100}
    near = tiny.stream(sounds[0], **options).answer
    with serve(tiny, fault="dies", after=80) as stub, Server(tiny, engine=Far(stub.url)) as server:
        listener = server.submit(sounds[0], **options)
        heard = []
        with pytest.raises(EngineError, match="lost after"):
            for piece in listener:
                heard.append(piece)
        with pytest.raises(EngineError):  # whoever asks again hears it again, and does not hang
            next(iter(listener))
        stub.fault = None
        heard += list(listener.resume())
        assert torch.equal(torch.cat([piece.audio for piece in heard]), near.audio)
        assert listener.answer.tokens == near.tokens


def test_one_fault_does_not_disturb_the_others(tiny, sounds):
    with Server(tiny) as server:
        good = server.submit(sounds[0], seed=1, max_tokens=60)
        silent = server.submit((torch.zeros(RATE), RATE))
        strange = server.submit(sounds[1], max_tokens=60, temperature=-1)
        with pytest.raises(ValueError, match="temperature"):
            list(strange)
        with pytest.raises(ValueError):
            list(silent)
        assert good.answer.tokens == tiny.ask(sounds[0], seed=1, max_tokens=60).tokens
        with pytest.raises(ValueError):
            list(silent.resume())  # it never began: it begins again, and fails again


def test_a_fault_in_the_batch_reaches_every_listener(tiny, sounds, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    prompts = [tiny.prompt(tiny.listen(sound)) for sound in sounds]
    with Batch(tiny.backbone) as batch:
        with monkeypatch.context() as patch:
            patch.setattr(generation.Decoder, "feed", fail)
            for listener in [batch.generate(prompt, tiny.ids, tiny.layout) for prompt in prompts]:
                with pytest.raises(RuntimeError, match="out of memory"):
                    next(listener)
        assert len(list(batch.generate(prompts[0], tiny.ids, tiny.layout, max_tokens=9))) == 9  # it lives on


def test_closing_ends_those_who_wait(tiny, sounds):
    prompt = tiny.prompt(tiny.listen(sounds[0]))
    batch = Batch(tiny.backbone, batch_size=1)
    first, second = (batch.generate(prompt, tiny.ids, tiny.layout, max_tokens=1500, min_audio=1400) for _ in range(2))
    next(first)
    batch.close()
    for listener in (first, second):
        with pytest.raises(EngineError, match="closed"):
            list(listener)
    with pytest.raises(EngineError, match="closed"):
        list(batch.generate(prompt, tiny.ids, tiny.layout))


def test_a_listener_that_leaves_gives_up_the_seat(tiny, sounds):
    prompt, began = tiny.prompt(tiny.listen(sounds[0])), time.monotonic()
    with Batch(tiny.backbone, batch_size=1) as batch:
        first = batch.generate(prompt, tiny.ids, tiny.layout, max_tokens=3000, min_audio=2900)
        next(first)
        first.close()
        assert len(list(batch.generate(prompt, tiny.ids, tiny.layout, max_tokens=3))) == 3
    assert time.monotonic() - began < DEADLINE
