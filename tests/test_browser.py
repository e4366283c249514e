"""The widgets where they live: JupyterLab in headless Chromium, with a microphone that plays a spoken question.

What is asserted is the sound itself: the samples that a page was given to play, and those that its microphone heard.
"""

import json
import re

import numpy as np
import pytest
import soundfile
from scipy import stats
from scipy.signal import fftconvolve

from .browser import lab, narrow

playwright = lab.need("anywidget", "jupyterlab")

RATE = 16_000
QUESTION = lab.ROOT / "data" / "questions" / "product_q001959.wav"
BEFORE, AFTER = 0.3, 1.5  # seconds of silence around the question in the microphone
CELLS = {
    "load": """
import time
import numpy as np, torch
import aqaa
from aqaa.notebook import talk
from aqaa.notebook import explore
from aqaa.notebook import show, widgets
torch.set_num_threads(1)
model = aqaa.load("mini")
question = show.question("product")""",
    "recorder": "recorder = talk.Recorder(question, interactive=True)\nrecorder",
    "recorded": "np.save('recorded.npy', recorder.audio())\nprint(recorder.state, recorder.message)",
    "player": "player = talk.Player(interactive=True)\nplayer",
    "ask": "player.play_stream(model, recorder, seed=1);",
    "answer": "np.save('answer.npy', player.join(60).answer.audio)\nprint(player.answer.text, '|', player.report)",
    "slowly": """
class Patient:  # an answer of long pieces that needs a second for each
    vocoder = model.vocoder
    def stream(self, question, **sampling):
        for piece in model.stream(question, **sampling):
            yield aqaa.Piece(piece.text, piece.audio.repeat(10))
            time.sleep(1)
player.play_stream(Patient(), question["path"]);""",
    "stopped": "player.join(60)\nprint(player.answer, player.report['where'], len(player.heard))",
    "form": """
tones = [torch.sin(torch.arange(3200) * k / 20) / 4 for k in (1, 2, 3)]
form = widgets.Listening([("low", tones[0]), ("high", tones[1], "a tone"), ("high", tones[2])], interactive=True)
form""",
    "result": "import json\nprint(json.dumps(form.result()))",
    "tokens": """
ids = model.listen(question["path"])
wav = aqaa.audio.load_question(question["path"])
tokens = widgets.Tokens(model, ids, wav, interactive=True)
tokens""",
    "ode": """
states = [torch.full((80, 60), -8 + 2.0 * k) + torch.linspace(0, 4, 60) for k in range(5)]
flat = lambda mel: torch.full((800,), float(mel.mean()) / 20)
ode = widgets.Ode(states, torch.linspace(0, 1, 5), flat, interactive=True)
ode""",
    "interleave": "blocks = widgets.Interleave(24, 120, interactive=True)\nblocks",
    "planner": "planner = widgets.Planner(interactive=True)\nplanner",
    "planned": "print(planner)",
    "voice": "voice = explore.VoiceControl(model, interactive=True)\nvoice",
    "said": "np.save('said.npy', voice.takes[0]['wav'])\nprint(*map(voice.takes[0].get, ('manner', 'temperature')))",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of the notebooks, with the microphone's file in it."""
    folder = tmp_path_factory.mktemp("notebooks")
    lab.write_microphone(folder / "microphone.wav", QUESTION, BEFORE, AFTER)
    lab.write_notebook(folder / "talk.ipynb", CELLS)
    return folder


@pytest.fixture(scope="module")
def browser(place):
    with playwright.sync_playwright() as driver:
        chromium = lab.launch(driver, place / "microphone.wav")
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def chapter(place):
    """00 as shipped but for `interactive`, in the folder of the notebooks: the ids of its cells."""
    path = lab.ROOT / "notebooks" / "00_talk.ipynb"
    nb = json.loads(path.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        cell["source"] = "".join(cell["source"]).replace("interactive = False", "interactive = True", 1)
        cell |= {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
    assert sum("interactive = True  #" in cell["source"] for cell in nb["cells"]) == 1
    (place / path.name).write_text(json.dumps(nb), encoding="utf-8")
    return [cell["id"] for cell in nb["cells"]]


@pytest.fixture(scope="module")
def server(place, tmp_path_factory):
    running = lab.Lab(place, tmp_path_factory.mktemp("home"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def shared(browser, server):
    """The notebook in a page that may use the microphone."""
    open_page = lab.Book(browser, server, "talk.ipynb", CELLS, permissions=["microphone"])
    open_page.need("load")
    yield open_page
    open_page.close()


@pytest.fixture
def book(shared):
    """That page; no test may leave an error in its console."""
    shared.errors.clear()
    shared.forget()
    yield shared
    assert shared.errors == []


def likeness(part, whole):
    """Greatest normalised correlation of (N,) with any N samples of (M,), and where they begin."""
    match = fftconvolve(whole, part[::-1], "valid")
    power = np.maximum(fftconvolve(whole**2, np.ones(len(part)), "valid"), 1e-6)
    score = match / np.sqrt(power * (part**2).sum())
    return score.max(), score.argmax()


def pieces_heard(question, recorded, length=RATE // 5):
    """[(likeness, how late)] of every fifth of a second of a question (N,) that is not quiet. A busy computer's
    microphone drops a few samples now and then: the pieces behind are as they were, only a little earlier."""
    found = []
    for start in range(0, len(question) - length, length):
        piece = question[start : start + length]
        if np.sqrt((piece**2).mean()) > 0.2 * np.sqrt((question**2).mean()):
            score, at = likeness(piece, recorded)
            found.append((score, (at - start) / RATE))
    return found


def test_a_dropped_moment_costs_a_piece_and_another_question_all_of_them():
    question, _ = soundfile.read(QUESTION, dtype="float32")
    quiet = np.zeros(RATE // 2, np.float32)
    dropped = np.concatenate([quiet, question[:9000], question[9300:20000], question[20500:], quiet])
    scores = [score for score, late in pieces_heard(question, dropped) if abs(late - 0.5) < 0.1]
    assert np.mean(np.array(scores) > 0.8) >= 0.75 and likeness(question, dropped)[0] < 0.8
    other, _ = soundfile.read(next(lab.ROOT.glob("data/questions/capital_q*.wav")), dtype="float32")
    assert np.mean([score > 0.8 and abs(late - 0.5) < 0.1 for score, late in
                    pieces_heard(question, np.concatenate([quiet, other, quiet]))]) < 0.2  # fmt: skip


def record(book, seconds):
    """Press Record, wait until so much is recorded, press Stop."""
    book.need("recorder")
    book.button("recorder", "Record").click()
    book.until(lambda: seconds < float(book.says("recorder", r"(\d+\.\d) s")[1]), "the recording")
    book.button("recorder", "Stop").click()
    book.says("recorder", "Recorded [0-9.]+ s")


def assert_heard(place, book, seconds):
    """The recording holds the question that the microphone played."""
    assert book.run("recorded").startswith("recorded")
    recorded, (question, _) = np.load(place / "recorded.npy"), soundfile.read(QUESTION)
    assert len(recorded) / RATE > seconds - 0.2
    found = pieces_heard(question.astype(np.float32), recorded)
    first = np.median([late for score, late in found if score > 0.8])
    assert np.mean([score > 0.8 and abs(late - first) < 0.2 for score, late in found]) >= 0.75, found
    assert first < BEFORE + 1
    return recorded


def ask(book):
    """Ask what is recorded; the answer's words and what was played."""
    book.need("player")
    book.forget()
    book.run("ask")
    said = book.run("answer").split(" | ")[0]
    return said, book.silence()


def test_record_ask_and_the_answer_is_what_plays(book, place):
    seconds = BEFORE + soundfile.info(QUESTION).duration + 0.2
    record(book, seconds)
    first = assert_heard(place, book, seconds)
    said, sounds = ask(book)
    answer = np.load(place / "answer.npy")
    heard = np.concatenate([sound["samples"] for sound in sounds])
    assert {sound["rate"] for sound in sounds} == {RATE} and len(sounds) >= 2
    assert len(heard) == len(answer) > RATE // 2
    assert np.abs(heard - answer).max() < 1e-4 and np.sqrt((heard**2).mean()) > 0.005
    ends = [sound["from"] + len(sound["samples"]) / RATE for sound in sounds]
    gaps = sum(after["from"] > end + 0.002 for end, after in zip(ends, sounds[1:]))
    assert all(after["from"] > end - 0.002 for end, after in zip(ends, sounds[1:]))  # one after the other
    assert sounds[-1]["ended"] >= ends[-1] - 0.1 and not any("stopped" in sound for sound in sounds)
    assert f"“{said}”" in book.output("player").inner_text() and said
    report = book.says("player", r"made in (\d+) pieces, first sound after (\d+) ms, (\d+) gaps?\.")
    assert (int(report[1]), int(report[3])) == (len(sounds), gaps)

    record(book, 1.5)  # a second recording takes the place of the first
    assert book.run("recorded").startswith("recorded Recorded")
    assert len(np.load(place / "recorded.npy")) < len(first)


PRESS_ON_SOUND = """(stop) => { const timer = setInterval(() => {
  if (window.played.some((sound) => sound.stopped)) clearInterval(timer); else if (window.played.length) stop.click();
}, 20); }"""


def test_stop_in_the_middle_of_an_answer(book):
    book.need("player")
    book.button("player", "Stop").evaluate(PRESS_ON_SOUND)  # by the page's own clock: this one may be late
    book.run("slowly")
    book.says("player", "Stopped: ")
    said, where, made = book.run("stopped").split()
    assert said == "None" and where == "kernel"
    sounds = book.played()
    assert sounds and all(sound["stopped"] < sound["from"] + len(sound["samples"]) / RATE for sound in sounds)
    assert int(made) >= sum(len(sound["samples"]) for sound in sounds)
    book.page.wait_for_timeout(1500)  # longer than the next piece would have taken
    assert len(book.played()) == len(sounds)


def test_a_second_load_shows_the_same_and_stays_silent(book, place):
    record(book, 1.0)
    said, _ = ask(book)
    file = place / "talk.ipynb"
    before = file.stat().st_mtime_ns  # an earlier test may have saved the same words
    book.page.keyboard.press("Control+s")
    book.until(
        lambda: file.stat().st_mtime_ns > before and said in file.read_text(encoding="utf-8"), "the saved notebook"
    )
    book.load()
    book.says("recorder", "Recorded [0-9.]+ s")
    book.says("player", "first sound after")
    assert f"“{said}”" in book.output("player").inner_text()
    assert book.played() == []
    book.button("player", "Play again").click()
    (sound,) = book.silence()
    assert np.abs(sound["samples"] - np.load(place / "answer.npy")).max() < 1e-4
    record(book, 1.0)  # and everything still works
    assert book.run("recorded").startswith("recorded")


def test_without_permission_the_fallback_is_asked(browser, server, shared, place):
    denied = lab.Book(browser, server, "talk.ipynb", CELLS)
    try:
        denied.run("recorder")
        denied.button("recorder", "Record").press("Space")
        denied.says("recorder", "does not allow this page to use the microphone")
        assert denied.run("recorded").startswith("refused")
        assert np.allclose(np.load(place / "recorded.npy"), soundfile.read(QUESTION, dtype="float32")[0], atol=1e-4)
        denied.button("recorder", "Record").focus()
        denied.page.keyboard.press("Tab")
        denied.page.keyboard.press("Enter")  # Play
        (sound,) = denied.silence()
        assert np.abs(sound["samples"] - np.load(place / "recorded.npy")).max() < 1e-4
        _, sounds = ask(denied)
        heard = np.concatenate([sound["samples"] for sound in sounds])
        assert np.abs(heard - np.load(place / "answer.npy")).max() < 1e-4
        assert denied.errors == []
    finally:
        denied.close()


def test_the_listening_form_ends_in_an_interval(book):
    book.run("form")
    form = book.output("form")
    for k, mark in ((1, "4 good"), (2, "2 poor"), (3, "5 excellent")):
        assert form.get_by_role("group", name=f"Sound {k}").get_by_role("radio").count() == 5
        if k == 3:  # not all are judged: the form says which one is missing, and goes there
            book.button("form", "Submit").click()
            book.says("form", "Play sound 3 before you judge it")
        book.button("form", f"Play sound {k}").click()
        form.get_by_role("group", name=f"Sound {k}").get_by_label(mark).check()
    sounds = book.played()
    assert len({round(float(np.abs(np.diff(sound["samples"])).mean()), 4) for sound in sounds}) == len(sounds) == 3
    book.button("form", "Submit").press("Enter")
    book.says("form", "1 listener so far")
    assert form.get_by_role("table").get_by_role("row").count() == 4
    result = json.loads(book.run("result").splitlines()[-1])
    assert result["all"]["mean"] == pytest.approx(11 / 3) and result["low"]["n"] == 1 and result["high"]["n"] == 2
    expected = np.clip(stats.t.interval(0.95, 2, 11 / 3, stats.sem([4, 2, 5])), 1, 5)  # marks end there
    assert (result["all"]["low"], result["all"]["high"]) == pytest.approx(tuple(expected))
    assert f"{expected[0]:.2f}" in form.inner_text()


def test_tokens_by_keyboard(book):
    book.run("tokens")
    wave, _ = soundfile.read(QUESTION, dtype="float32")
    book.output("tokens").get_by_role("gridcell").first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Enter"):
        book.page.keyboard.press(key)
    book.says("tokens", r"semantic token \d+ · 0\.12–0\.16 s")
    sound = book.silence()[-1]["samples"]
    part = wave[round(0.12 * RATE) : round(0.16 * RATE)]
    assert len(sound) == len(part) and np.abs(sound - part)[60:-60].max() < 1e-4
    book.says("tokens", r"Nearest codes.*\d+ \(\d\.\d\d")


def test_the_stepper_and_the_ratio_by_keyboard(book):
    book.run("ode")
    slider = book.output("ode").get_by_role("slider")
    book.says("ode", r"step 4 of 4, t = 1\.000")
    slider.focus()
    book.page.keyboard.press("ArrowLeft")
    book.says("ode", r"step 3 of 4, t = 0\.750")
    assert book.silence()[-1]["samples"] == pytest.approx(np.zeros(800), abs=1e-4)  # the mel's mean is 0 there
    book.run("interleave")
    book.says("interleave", r"First sound after 0\.25 s")
    book.output("interleave").get_by_label("Text tokens a block").focus()
    book.page.keyboard.press("ArrowRight")
    book.says("interleave", r"First sound after 0\.26 s")
    book.output("interleave").get_by_role("combobox").select_option("text_cot")
    book.says("interleave", r"First sound after 0\.40 s")


def test_the_planner_by_keyboard(book):
    book.run("planner")
    book.says("planner", r"int4 g128 on 1xH200 with 2048 ids: [\d.]+ of 139\.8 GiB")
    assert book.output("planner").get_by_role("table").count() == 3
    for label, key in (("Number", "8"), ("GPU", "H100"), ("Context", "4")):
        book.output("planner").get_by_label(label, exact=False).first.focus()
        book.page.keyboard.type(key)
    book.says("planner", r"int4 g64 on 8xH100-80 with 4096 ids")
    assert book.output("planner").get_by_role("img", name="79.1 GiB").count() == 1
    book.output("planner").get_by_label("Number").select_option("1")
    book.output("planner").get_by_label("Weights").select_option("bf16")
    book.says("planner", r"needs [\d.]+ GiB on each of 1xH100-80.* would fit")
    assert book.output("planner").get_by_role("table").count() == 1
    assert "bf16 on 1xH100-80, 4096 ids" in book.run("planned")


def test_the_voice_control_speaks(book, place):
    book.run("voice")
    book.output("voice").get_by_label("slow").check()
    slider = book.output("voice").get_by_label("Temperature")
    slider.focus()
    book.page.keyboard.press("ArrowRight")
    book.button("voice", "Speak").click()
    book.says("voice", r"Said it: [\d.]+ s", lab.CELL)
    (sound,) = book.silence()
    assert book.run("said") == "slow 0.4"
    assert np.abs(sound["samples"] - np.load(place / "said.npy")).max() < 1e-4
    assert book.output("voice").get_by_role("row").count() == 2


# ---- 00 as a stranger runs it ---------------------------------------------------------------------------------------


def test_run_all_plays_while_later_cells_still_run(browser, server, chapter):
    """What 00 promises of Run All, in a browser that lets a page sound only after somebody has pressed something."""
    book = lab.Book(browser, server, "00_talk.ipynb", chapter)
    try:
        asking = next(i for i in chapter if "play_stream" in book.cell(i).inner_text())
        book.run_all()
        before = book.until(lambda: book.played() and book.waiting(), "the first sound, before the last cell", lab.CELL)
        told = book.says(asking, r"made in (\d+) pieces, first sound after (\d+) ms, (\d+) gaps?\.", lab.CELL)
        assert before > 5 and book.waiting() > 2  # it has been heard and reported, and cells still wait
        sounds = book.silence()
        gaps = sum(b["from"] > a["from"] + len(a["samples"]) / a["rate"] + 0.002 for a, b in zip(sounds, sounds[1:]))
        assert (int(told[1]), int(told[3])) == (len(sounds), gaps) and int(told[2]) > 0
        assert sum(len(sound["samples"]) for sound in sounds) > RATE // 2 and not any("stopped" in s for s in sounds)
        book.button(asking, "Play again").click()  # in the page, while Python is busy
        again = book.until(lambda: len(book.played()) > len(sounds) and book.played()[-1], "the second time")
        assert np.array_equal(again["samples"], np.concatenate([sound["samples"] for sound in sounds]))
        book.until(lambda: not book.waiting(), "the last cell", 4 * lab.CELL)
        book.page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=1000 * lab.CELL)
        book.says(asking, re.escape(told[0]))  # Python has read the page's report by now, and says the same
        assert book.page.locator('[data-mime-type$="stderr"], [data-mime-type$="error"]').count() == 0
        assert "it heard:" in book.page.locator(".jp-Notebook").inner_text() and book.errors == []
    finally:
        book.close()


# ---- narrow windows -------------------------------------------------------------------------------------------------

WIDTHS = ((390, 390), (620, 620), (360, 1000))  # px of the widget, of the window


@pytest.fixture(scope="module")
def mini():
    import aqaa

    return aqaa.load("mini")


def test_no_widget_overlaps_itself_or_leaves_a_narrow_window(browser, mini):
    from aqaa.notebook import show

    for name, widget in narrow.every_widget(mini, show.question("product")).items():
        for width, window in WIDTHS:
            sheet = narrow.live(browser, widget, width, window)
            assert (narrow.faults(sheet), sheet.errors) == ([], []), f"{name}, {width} of {window} px"
            sheet.close()


@pytest.mark.parametrize("width", [390, 620])
def test_no_page_of_the_site_overlaps_itself_or_leaves_a_narrow_window(browser, width, tmp_path):
    from notebooks import build, pages

    pages.site(lab.ROOT, [(path, build.read(path)) for path in build.notebooks()], tmp_path)
    for path in sorted(tmp_path.glob("[0-9it]*.html")):
        sheet = narrow.Sheet(browser, width, url=path.as_uri())
        assert narrow.faults(sheet) == [], f"{path.name}, {width} px"
        sheet.close()


@pytest.mark.parametrize(("body", "sentence"), [
    ("<div style='position: absolute'>one</div><div style='position: absolute'>two</div>", "overlap"),
    ("<div style='width: 900px'>wide</div>", "outside"),
    ("<div style='width: 40px; white-space: nowrap'>many words in a little box</div>", "too narrow for its words"),
    ("<button style='margin-left: -30px'>a</button><button style='margin-left: -9px'>b</button>", "overlap"),
])  # fmt: skip
def test_what_does_not_fit_is_found(browser, body, sentence):
    sheet = narrow.Sheet(browser, 390, body)
    assert any(sentence in fault for fault in narrow.faults(sheet)), narrow.faults(sheet)
    sheet.close()
