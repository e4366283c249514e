"""The ground that all widgets stand on: one class, live on a page or static in `show`'s figures.

The page draws, records and plays; Python keeps the state and does the work. Messages from a page may be read only
*between* cells, and with "Run All" after the last of them, so a widget never waits for one.
"""

import json
import threading
from functools import lru_cache
from pathlib import Path

from aqaa.notebook import show
from aqaa.notebook.figures import array

SCRIPTS = Path(__file__).with_name("js")


def pcm16(wav):
    """(N,) samples in -1..1 -> bytes, 16-bit little-endian, as every page takes them."""
    return (array(wav, 1, "the sound").clip(-1, 1) * 32767).round().astype("<i2").tobytes()


@lru_cache
def front_end(script):
    """The anywidget class of one script; made when first needed, so that static views need no anywidget."""
    import anywidget
    import traitlets

    colours = "const COLORS = " + json.dumps({kind: colour for kind, (_, colour) in show.KINDS.items()}) + ";\n"
    common, own, style = (
        (SCRIPTS / name).read_text(encoding="utf-8") for name in ("common.js", f"{script}.js", "widgets.css")
    )
    return type(script.title(), (anywidget.AnyWidget,), {
        "_esm": colours + common + own,
        "_css": style,
        "data": traitlets.Dict().tag(sync=True),  # what never changes
        "state": traitlets.Dict().tag(sync=True),  # what does; a page that is loaded later begins with it
    })  # fmt: skip


class Widget:
    """A view that is live (interactive=True) or static. A message {"type": "x"} of the page goes to `_on_x`."""

    script = ""  # the file in js/ that draws it

    def __init__(self, interactive, **state):
        self.interactive, self._view = interactive, None
        self._state = {"error": "", "message": "", **state}
        self._lock = threading.RLock()  # a thread at work and a page's message may change the state at one time

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
        """A message of the page. A fault is shown in the widget: a traceback would go where nobody looks."""
        try:
            if self._state["error"]:
                self._set(error="")
            getattr(self, f"_on_{message['type']}")(message, buffers)
        except Exception as fault:
            self._set(error=str(fault) or type(fault).__name__)

    def _static(self):
        """The static view: a list of what `show` draws."""
        raise NotImplementedError

    def _repr_mimebundle_(self, include=None, exclude=None):
        """There is no `_repr_html_`: IPython would call it for a live widget as well."""
        if self._view is None:
            return {"text/plain": repr(self), "text/html": "".join(part._repr_html_() for part in self._static())}
        data, metadata = self._view._repr_mimebundle_()
        return {**data, "text/plain": repr(self)}, metadata
