"""JupyterLab or Notebook 7 on a free port, headless Chromium with a fake microphone, an ear for what its pages play."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parent.parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
START = 120  # seconds that a server or a page may take to come up
CELL = 180  # seconds of one cell; the first one loads a model
UI = 60  # seconds until a click has had its effect
KINDS = {  # module: where a notebook is opened, and what is seen when its kernel is ready
    "jupyterlab": ("lab/tree", "text=Python 3 (ipykernel) | Idle"),
    "notebook": ("notebooks", '.jp-Notebook-ExecutionIndicator[data-status="idle"]'),
}
SETTINGS = {
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
}
# Everything that a page sends to its loudspeaker, with the time on the audio clock, is kept in window.played.
EAR = """
window.played = [];
const { start, stop } = AudioBufferSourceNode.prototype;
const later = AudioScheduledSourceNode.prototype.stop;
AudioBufferSourceNode.prototype.start = function (when = 0, ...rest) {
  const clock = this.context, from = Math.max(when, clock.currentTime);
  const sound = { from, rate: this.buffer.sampleRate, samples: Array.from(this.buffer.getChannelData(0)) };
  this.addEventListener("ended", () => { sound.ended ??= clock.currentTime; });
  this.sound = sound;
  window.played.push(sound);
  return start.call(this, when, ...rest);
};
AudioScheduledSourceNode.prototype.stop = function (...rest) {
  if (this.sound) this.sound.stopped = this.context.currentTime;
  return later.apply(this, rest);
};
"""


def find_browser():
    """Path of a full Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def need(*packages):
    """Skip the tests of a module where a package or Chromium is missing; playwright's synchronous interface."""
    for package in (*packages, "playwright.sync_api"):
        found = pytest.importorskip(package, reason=f"the browser test needs {package}: pip install -e '.[test]'")
    if find_browser() is None:
        pytest.skip("the browser test needs chromium: apt-get install chromium", allow_module_level=True)
    return found


def write_microphone(path, question, before, after):
    """What Chromium's microphone hears again and again: a recording with seconds of a quiet room around it. (Not of
    silence: a short recording may hold nothing else, and is refused then.)"""
    wave, rate = soundfile.read(question)
    rng = np.random.default_rng(0)
    silence = [0.003 * rng.standard_normal(int(seconds * rate)) for seconds in (before, after)]
    soundfile.write(path, np.concatenate([silence[0], wave, silence[1]]), rate)


def write_notebook(path, cells):
    """cells: {name: source}."""
    made = [{"cell_type": "code", "id": name, "metadata": {}, "source": source.strip(), "outputs": [],
             "execution_count": None} for name, source in cells.items()]  # fmt: skip
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    book = {"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    Path(path).write_text(json.dumps(book), encoding="utf-8")


class Lab:
    """A server over `folder`; nothing of the user's own set-up is read or written."""

    def __init__(self, folder, home, settings=None, module="jupyterlab"):
        self.place, self.ready = KINDS[module]
        for name, values in {**SETTINGS, **(settings or {})}.items():
            path = home / "settings" / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values), encoding="utf-8")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://localhost:{port}", home / "lab.log"
        names = {"HOME": "", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data",
                 "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings",
                 "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython"}  # fmt: skip
        env = {**os.environ, **{name: str(home / part) for name, part in names.items()}, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", module, "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
                   f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder}",
                   "--IdentityProvider.token=", "--ServerApp.password=",
                   "--ServerApp.disable_check_xsrf=True"]  # fmt: skip
        with open(self.log, "wb") as log:
            pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            self.process = subprocess.Popen(command, env=env, cwd=folder, start_new_session=True, **pipes)
        try:
            self._wait()
        except BaseException:
            self.close()
            raise

    def _wait(self):
        end = time.monotonic() + START
        while time.monotonic() < end and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/api", timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        said = self.log.read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"Jupyter did not start:\n{said[-2000:]}")

    def close(self):
        """End the server and its kernels."""
        try:
            request = urllib.request.Request(f"{self.url}/api/shutdown", method="POST", data=b"")
            urllib.request.urlopen(request, timeout=10).close()
            self.process.wait(15)
        except (urllib.error.URLError, OSError, subprocess.TimeoutExpired):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


def launch(playwright, microphone):
    """Chromium whose microphone plays the file `microphone` (wav) again and again."""
    return playwright.chromium.launch(
        executable_path=find_browser(), headless=True, timeout=1000 * START,
        args=["--no-sandbox", "--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={microphone}",
              "--autoplay-policy=no-user-gesture-required", "--disable-dev-shm-usage"],
    )  # fmt: skip


class Book:
    """One notebook in one page. errors: whatever the page logged as an error."""

    def __init__(self, browser, lab, name, cells, permissions=()):
        self.context = browser.new_context(permissions=list(permissions), viewport={"width": 1300, "height": 1000})
        self.context.set_default_timeout(1000 * UI)
        self.page = self.context.new_page()
        self.page.add_init_script(EAR)
        self.url, self.ready = f"{lab.url}/{lab.place}/{name}", lab.ready
        self.places, self.done, self.errors = list(cells), set(), []
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda fault: self.errors.append(str(fault)))
        self.load(f"{self.url}?reset")

    def load(self, url=None):
        """Load the page, the first time or again."""
        self.page.goto(url or self.url, timeout=1000 * START)
        self.page.locator(".jp-Notebook .jp-Cell").nth(len(self.places) - 1).wait_for(timeout=1000 * START)
        self.page.locator(self.ready).first.wait_for(timeout=1000 * START)  # a key before is lost

    def cell(self, name):
        """Locator of a cell."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(self.places.index(name))

    def output(self, name):
        """Locator of its outputs."""
        return self.cell(name).locator(".jp-Cell-outputArea")

    def run(self, name, timeout=CELL):
        """Run a cell by keyboard; returns what it printed. AssertionError when it raised or wrote to stderr."""
        cell = self.cell(name)
        prompt = cell.locator(".jp-InputArea-prompt")
        before = prompt.inner_text()
        cell.locator(".cm-content").click()
        self.page.keyboard.press("Control+Enter")
        self.until(lambda: re.search(r"\d", now := prompt.inner_text()) and now != before, f"cell {name}", timeout)
        self.done.add(name)
        faults = self.output(name).locator('[data-mime-type$="stderr"], [data-mime-type$="error"]')
        assert faults.count() == 0, f"cell {name}: {faults.first.inner_text()}"
        return self.output(name).inner_text().strip()

    def run_all(self):
        """Run every cell by the menu, as a reader does; returns at once."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    def waiting(self):
        """How many cells wait or run; those whose source is folded have no prompt and are not counted."""
        return self.page.evaluate("""[...document.querySelectorAll(".jp-Notebook .jp-InputArea-prompt")]
            .filter((prompt) => prompt.textContent.includes("*")).length""")

    def need(self, *names):
        """Run the cells that have not been run in this page."""
        for name in names:
            if name not in self.done:
                self.run(name)

    def until(self, true, what, timeout=UI):
        """Wait until true() is; its value. AssertionError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if value := true():
                return value
            self.page.wait_for_timeout(50)
        raise AssertionError(f"waited {timeout} s for {what}")

    def button(self, name, text):
        """Locator of a button in the outputs of a cell, by part of its label."""
        return self.output(name).get_by_role("button", name=text)

    def says(self, name, pattern, timeout=UI):
        """Wait until the outputs of a cell match; the match."""
        try:
            return self.until(lambda: re.search(pattern, self.output(name).inner_text()), repr(pattern), timeout)
        except AssertionError as fault:
            raise AssertionError(f"{fault} in {name}, which says {self.output(name).inner_text()!r}") from None

    def forget(self):
        """Empty the list of what was played."""
        self.page.evaluate("window.played.length = 0")

    def played(self):
        """What was sent to the loudspeaker since `forget`: dicts from, ended, stopped (s), rate, samples (N,)."""
        sounds = self.page.evaluate("window.played")
        return [{**sound, "samples": np.array(sound["samples"], np.float32)} for sound in sounds]

    def silence(self):
        """Wait until all that was started has ended; returns it."""
        self.until(lambda: self.page.evaluate("window.played.length && window.played.every((sound) => sound.ended)"),
                   "the end of the sound")
        return self.played()

    def close(self):
        self.context.close()
