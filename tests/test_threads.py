"""Threads: one for small networks, the caller's for large ones, and the caller's again after every call."""

import pytest
import torch
from torch import nn

from aqaa import threads
from aqaa.pipeline import AQAA
from tests.conftest import RATE, tone


@pytest.fixture
def three():
    """A program that has chosen three threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def watched(monkeypatch):
    """The thread counts that torch was given, in order."""
    seen, real = [], torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda n: (seen.append(n), real(n)))
    return seen


def test_a_small_network_takes_one_thread_and_a_large_one_all(three, monkeypatch):
    small, large = nn.Linear(8, 8), nn.Linear(8, 8)
    monkeypatch.setattr(threads, "LARGE", 100)
    threads._counted[large] = 100
    with threads.suited_to(small):
        assert torch.get_num_threads() == 1
    with threads.suited_to(small, large):
        assert torch.get_num_threads() == 3
    with threads.suited_to():
        assert torch.get_num_threads() == 3


def test_no_more_threads_than_the_caller_has(monkeypatch):
    seen = watched(monkeypatch)
    monkeypatch.setattr(threads, "LARGE", 0)
    before = torch.get_num_threads()
    with threads.suited_to(nn.Linear(2, 2)):
        assert torch.get_num_threads() == before
    assert seen == []


def calls(model):
    """Each way of asking."""
    question = (tone(), RATE)
    chat = model.chat(max_tokens=20)
    listener = model.listener()
    yield "listen", lambda: model.listen(question)
    yield "ask", lambda: model.ask(question, max_tokens=20)
    yield "stream", lambda: [torch.get_num_threads() for _ in model.stream(question, max_tokens=20)]
    yield "generate", lambda: [torch.get_num_threads() for _ in model.generate(model.prompt("hot"), max_tokens=9)]
    yield "transcribe", lambda: model.transcribe(question)
    first = model.ids.n_text, model.ids.n_text + model.ids.n_linguistic
    yield "synthesize", lambda: model.synthesize([first[0]] * 2 + [first[1]] * 3)
    yield "chat", lambda: chat.ask(question)
    yield "listener", lambda: (listener.push(tone()), listener.finish())


def test_the_callers_setting_survives_every_call_and_every_piece(tiny, three, monkeypatch):
    seen = watched(monkeypatch)
    for name, call in calls(tiny):
        seen.clear()
        result = call()
        assert torch.get_num_threads() == 3, name
        assert 1 in seen, f"{name} computed with the caller's three threads"
        if name in ("stream", "generate"):
            assert set(result) == {3}, f"between two pieces of {name} the caller's setting holds"


def test_it_survives_a_fault(tiny, three):
    class Broken(nn.Module):
        def encode(self, wav):
            raise RuntimeError("no")

    model = AQAA(tiny.config, {"linguistic": Broken()}.__getitem__)
    with pytest.raises(RuntimeError, match="no"):
        model.listen((tone(), RATE))
    assert torch.get_num_threads() == 3
