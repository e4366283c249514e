"""The ground that all widgets stand on: one class, live on a page or static in `show`'s figures.

The page draws, records and plays; Python keeps the state and works. Messages from a page may be
read only *between* cells, with "Run All" after the last of them: a widget never waits for one."""

import json
import threading
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from aqaa.notebook.figures import array
from aqaa.notebook.strips import KINDS

SCRIPTS = Path(__file__).with_name("js")
MORE = {"conversation": [files("aqaa.serve") / "live.js"]}  # what a script shares with other pages


def pcm16(wav):
    """(N,) samples in -1..1 -> bytes, 16-bit little-endian, as every page takes them."""
    return (array(wav, 1, "the sound").clip(-1, 1) * 32767).round().astype("<i2").tobytes()


@lru_cache
def front_end(script):
    """The anywidget class of one script, made when needed: static views need no anywidget."""
    import anywidget
    import traitlets

    colours = json.dumps({kind: colour for kind, (_, colour) in KINDS.items()})
    names = ("common.js", f"{script}.js", "widgets.css")
    common, own, style = ((SCRIPTS / name).read_text(encoding="utf-8") for name in names)
    common += "".join(file.read_text(encoding="utf-8") for file in MORE.get(script, ()))
    # The data never change; the state does, and a page loaded later begins with it.
    synced = {name: traitlets.Dict().tag(sync=True) for name in ("data", "state")}
    parts = {"_esm": f"const COLORS = {colours};\n{common}{own}", "_css": style, **synced}
    return type(script.title(), (anywidget.AnyWidget,), parts)


class Widget:
    """A live (interactive=True) or static view; a page's message {"type": "x"} goes to _on_x.
    _static() lists what `show` draws in its place."""

    script = ""  # the file in js/ that draws it

    def __init__(self, interactive, **state):
        self.interactive, self._view = interactive, None
        self._state = {"error": "", "message": "", **state}
        self._lock = threading.RLock()  # threads and messages of the page both change the state

    def _open(self, **data):
        """Let a page in; data: what it needs and never changes."""
        self._view = front_end(self.script)(data=data, state=self._state)
        self._view.on_msg(self._receive)

    def _set(self, **changes):
        with self._lock:
            self._state = {**self._state, **changes}
            if self._view is not None:
                self._view.state = self._state

    def _tell(self, message, *buffers):
        if self._view is not None:
            self._view.send(message, list(buffers))

    def _receive(self, _, message, buffers):
        """A message of the page. A fault is shown in the widget: nobody sees a traceback here."""
        try:
            if self._state["error"]:
                self._set(error="")
            getattr(self, f"_on_{message['type']}")(message, buffers)
        except Exception as fault:
            self._set(error=str(fault) or type(fault).__name__)

    def _repr_mimebundle_(self, include=None, exclude=None):
        """There is no `_repr_html_`: IPython would call it for a live widget as well."""
        if self._view is None:
            words = repr(self)  # before the view, which may do work that changes it
            html = "".join(part._repr_html_() for part in self._static())
            return {"text/plain": words, "text/html": html}
        data, metadata = self._view._repr_mimebundle_()
        return {**data, "text/plain": repr(self)}, metadata
