"""The widget that converses, in JupyterLab and Notebook 7; Chromium's microphone asks one question for ever."""

import json
from importlib.util import find_spec

import pytest

from .browser import lab

playwright = lab.need("anywidget", "jupyterlab")

QUESTION = lab.ROOT / "data" / "questions" / "product_q001959.wav"
BEFORE, AFTER = 0.8, 2.2  # seconds of silence around the question in the microphone
WAIT = 120  # seconds
ITS_OWN = {"notebook": ["Cannot read properties of undefined (reading 'schema')"]}  # 7.6 says so of any notebook
CELLS = {
    # answers of over 14 s, which every question interrupts
    "load": """
import json, torch
import aqaa
from aqaa.notebook import widgets
torch.set_num_threads(1)
model = aqaa.load("tiny")
conversation = widgets.Conversation(model, interactive=True, seed=3, max_tokens=900, min_audio=600)""",
    "talk": "conversation",
    "turns": """
kept = "question", "heard", "answer", "interrupted", "ready_ms", "sound_ms"
print(json.dumps([{name: turn[name] for name in kept} for turn in conversation.turns]))""",
}


@pytest.fixture(scope="module")
def place(tiny_folder, tmp_path_factory):
    """The folder of the notebook, with the microphone's file and the model in it."""
    folder = tmp_path_factory.mktemp("notebooks")
    lab.write_microphone(folder / "microphone.wav", QUESTION, BEFORE, AFTER)
    (folder / "tiny").symlink_to(tiny_folder)
    return folder


@pytest.fixture(scope="module", params=lab.KINDS)
def book(request, place, tmp_path_factory):
    """The notebook in a page that may use the microphone; it may leave no error in its console."""
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed: pip install {request.param}")
    lab.write_notebook(place / "talk.ipynb", CELLS)
    server = lab.Lab(place, tmp_path_factory.mktemp("home"), module=request.param)
    try:
        with playwright.sync_playwright() as driver:
            browser = lab.launch(driver, place / "microphone.wav")
            page = lab.Book(browser, server, "talk.ipynb", CELLS, permissions=["microphone"])
            yield page
            assert [fault for fault in page.errors if fault not in ITS_OWN.get(request.param, ())] == []
            browser.close()
    finally:
        server.close()


def turns(book):
    """What the next cell gets."""
    return json.loads(book.run("turns").splitlines()[-1])


def count(book):
    return book.output("talk").locator("li").count()


def test_three_turns_an_interruption_and_a_reload(book, place):
    book.run_all()
    book.says("talk", "the microphone is off", 2 * lab.CELL)
    book.until(lambda: not book.waiting(), "the last cell", lab.CELL)
    assert "[]" in book.output("turns").inner_text() and book.played() == []  # Run All starts nothing
    book.button("talk", "Talk").click()
    book.says("talk", "speak: a pause ends your turn|listening")
    book.says("talk", r"first sound \d+\.\d\d s after the end of speech", WAIT)
    book.says("talk", "interrupted", WAIT)
    book.until(lambda: count(book) >= 3, "the third turn", WAIT)
    assert len(turns(book)) >= 2  # cells run meanwhile
    assert book.output("talk").locator(".aqaa-block").count() > 3
    book.button("talk", "Stop").click()
    book.says("talk", "the microphone is off")
    book.until(lambda: all(turn["question"] is not None for turn in turns(book)), "the last question's words", WAIT)
    said = turns(book)
    first = said[0]
    assert first["interrupted"] and len(first["heard"]) < len(first["answer"])
    assert 700 <= first["ready_ms"] and 500 < first["sound_ms"] < 1000 * WAIT
    sounds = book.played()
    assert {sound["rate"] for sound in sounds} == {24_000} and any(sound["samples"].any() for sound in sounds)
    assert any("stopped" in sound for sound in sounds)

    book.button("talk", "Talk").click()  # goes on from there, until the page is loaded again
    book.until(lambda: count(book) > len(said), "one more turn", WAIT)
    turns(book)  # a key pressed in the widget is the widget's
    book.page.keyboard.press("Control+s")
    book.until(lambda: "widget-view" in (place / "talk.ipynb").read_text(encoding="utf-8"), "the saved notebook")
    book.load()
    book.says("talk", "the microphone is off")
    kept = count(book)
    assert kept > len(said) and book.played() == []
    book.button("talk", "Talk").click()
    book.until(lambda: count(book) > kept, "a turn of the new page", WAIT)
    book.run("talk")  # the cell again: nobody sees the old view any more, so it has ended
    book.says("talk", "the microphone is off")
    assert book.output("talk").locator("p.aqaa-error").inner_text() == ""
