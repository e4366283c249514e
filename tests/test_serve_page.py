"""The page of `aqaa serve` in headless Chromium, whose microphone asks one question again and again."""

import re

import pytest

from .browser import lab

playwright = lab.need("starlette", "uvicorn", "websockets")

from .test_serve import serving  # noqa: E402

QUESTION = lab.ROOT / "data" / "questions" / "product_q001959.wav"
BEFORE, AFTER = 0.8, 2.2  # seconds of silence around the question in the microphone
LONG = {"seed": 3, "max_tokens": 900, "min_audio": 600}  # ids: over 14 s of sound, which every question interrupts
WAIT = 120  # seconds


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "microphone.wav"
    lab.write_microphone(path, QUESTION, BEFORE, AFTER)
    with playwright.sync_playwright() as driver:
        chromium = lab.launch(driver, path)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """A page that may use the microphone and keeps what it plays; it may leave no error in its console."""
    context = browser.new_context(permissions=["microphone"])
    page, errors = context.new_page(), []
    page.set_default_timeout(1000 * WAIT)
    page.add_init_script(lab.EAR)
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda fault: errors.append(str(fault)))
    yield page
    context.close()
    assert errors == []


def state(page, pattern):
    """Wait until the page says so."""
    page.wait_for_function("(words) => new RegExp(words).test(document.getElementById('state').textContent)",
                           arg=pattern, timeout=1000 * WAIT)  # fmt: skip


def asked(page, count):
    """Wait until so many questions have their line, and so have their answers."""
    done = "(n) => ['user', 'bot'].every((kind) => document.querySelectorAll(`li.${kind}`).length >= n)"
    page.wait_for_function(done, arg=count, timeout=1000 * WAIT)


def test_three_turns_an_interruption_and_a_reload(tiny, browser, page):
    with serving(tiny, **LONG) as address:
        page.goto(address)
        page.get_by_role("button").click()
        state(page, "speak")
        asked(page, 3)
        played = page.evaluate("window.played")
        assert {sound["rate"] for sound in played} == {24_000} and any(map(any, (s["samples"] for s in played)))
        assert any("stopped" in sound for sound in played)  # the next question interrupts
        page.get_by_role("button").click()
        state(page, "the microphone is off")
        page.reload()
        assert page.locator("li").count() == 0
        page.get_by_role("button").click()
        asked(page, 1)
        assert page.locator("li.fault").count() == 0


def test_a_wrong_token_is_told(tiny, browser):
    with serving(tiny, token="secret") as address:
        context = browser.new_context(permissions=["microphone"])
        page = context.new_page()
        page.goto(address)
        page.get_by_role("button").click()
        state(page, "another token")
        page.get_by_label(re.compile("Token")).fill("secret")
        page.get_by_role("button").click()
        state(page, "speak")
        context.close()
