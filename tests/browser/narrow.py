"""Pages of any width without JupyterLab: a widget's own script on a stand-in for its model, or plain HTML."""

import base64
import json

import torch

from aqaa import audio
from aqaa.notebook import base, explore, talk, widgets

# What the script asks of a model. Bytes come as base64 and are what the scripts expect: a DataView.
PAGE = """<!doctype html><meta name="viewport" content="width=device-width"><style>%s</style>
<style>body { margin: 0; padding: 8px; font: 14px sans-serif } img, audio { max-width: 100%% }</style>
<div id="root" style="max-width: %spx"></div>
<script type="module">
const bytes = (_, value) => value?.b64 === undefined ? value
  : new DataView(Uint8Array.from(atob(value.b64), (letter) => letter.charCodeAt(0)).buffer);
const traits = JSON.parse(%s, bytes);
const model = { get: (name) => traits[name], on() {}, send() {}, off() {} };
const source = new Blob([%s], { type: "text/javascript" });
const { default: make } = await import(URL.createObjectURL(source));
const parts = typeof make === "function" ? await make() : make;
await parts.initialize?.({ model });
await parts.render({ model, el: document.getElementById("root") });
window.done = true;
</script>"""
# Two shown parts that neither contains must not share more than a pixel; nothing may be wider than the page. Inside a
# box that scrolls, and in drawings, what does not fit is meant to move; words that go on in the next line are no box.
FAULTS = """() => {
  const words = (node) => (node.textContent || node.title || "").trim().slice(0, 30);
  const faults = [], said = (node) => `<${node.tagName.toLowerCase()}> ${words(node)}`;
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  if (wide > 0) faults.push(`the page is ${wide} px wider than the window`);
  const end = document.getElementById("root")?.getBoundingClientRect().right ?? window.innerWidth;
  const moves = "svg, pre, p, li, .aqaa-scroll, .aqaa-cells, .aqaa-axis";
  const skip = (node) => node.parentElement.closest(moves) || node.matches(".aqaa-cells, .aqaa-axis");
  const style = (node) => getComputedStyle(node).overflowX;
  const scrolls = (node) => node && (/auto|scroll/.test(style(node)) || scrolls(node.parentElement));
  const shown = (node) => node.checkVisibility() && node.getClientRects().length === 1;
  const parts = [...document.querySelectorAll("body *")].filter((node) => !skip(node) && shown(node)
    && !["SCRIPT", "STYLE", "OPTION", "BR"].includes(node.tagName) && node.id !== "root");
  const boxes = parts.map((node) => node.getBoundingClientRect());
  parts.forEach((node, i) => {
    const box = boxes[i];
    if (box.width && box.right > end + 1 && !scrolls(node.parentElement))
      faults.push(`${said(node)} ends ${Math.round(box.right - end)} px outside`);
    if (node.children.length && !node.matches("svg, button, label, select")) return;  // leaves, and what is pressed
    for (let j = i + 1; j < parts.length; j++) {
      const other = boxes[j];
      if (parts[j].children.length && !parts[j].matches("svg, button, label, select")) continue;
      if (node.contains(parts[j]) || parts[j].contains(node)) continue;
      const across = Math.min(box.right, other.right) - Math.max(box.left, other.left);
      const down = Math.min(box.bottom, other.bottom) - Math.max(box.top, other.top);
      if (across > 1 && down > 1) faults.push(`${said(node)} and ${said(parts[j])} overlap`);
    }
    if (node.scrollWidth > node.clientWidth + 1 && node.clientWidth && style(node) === "visible"
        && !node.matches("span, small, b, em, code, a, svg, option"))
      faults.push(`${said(node)} is too narrow for its words`);
  });
  return faults;
}"""


def encoded(value):
    """JSON of a trait; bytes as base64."""
    return json.dumps(value, default=lambda data: {"b64": base64.b64encode(bytes(data)).decode()})


def every_widget(model, question):
    """{name: widget} with a page for each, and something to show in it."""
    ids, wav = model.listen(question["path"]), audio.load_question(question["path"])
    states = [torch.full((80, 60), -8 + 2.0 * k) + torch.linspace(0, 4, 60) for k in range(5)]
    pairs = [("low", wav[:3200]), ("high", wav[3200:6400], question["transcript"]), ("high", wav[:3200])]
    marked = widgets.Listening(pairs, interactive=True)
    marked._receive(None, {"type": "submit", "scores": [4, 2, 5]}, [])
    voice = explore.VoiceControl(model, interactive=True)
    take = {"manner": "normal", "temperature": 0.3, "seed": 0, "seconds": 2.04, "f0": 168.0, "energy": -21.4}
    voice._set(takes=[{**take, "sound": base.pcm16(wav), "rate": 16_000}] * 2, said=1, message="Said it: 2.04 s.")
    player = talk.Player(interactive=True)
    player._set(phase="done", text=question["transcript"], sound=base.pcm16(wav), rate=16_000,
                message="2.2 s made in 4 pieces, first sound after 240 ms, 0 gaps.")  # fmt: skip
    conversation = widgets.Conversation(model, interactive=True)
    turn = {"item": "a", "question": question["transcript"], "answer": "well that would be forty two", "heard": "well",
            "interrupted": True, "ready_ms": 812, "sound_ms": 913,
            "blocks": [["text", "well that would be", 10], ["audio", 15], ["text", "two", 3], *[["audio", 15]] * 20]}
    conversation._set(turns=[turn] * 2, message=talk.Recorder.REFUSALS["NotAllowedError"])
    refused = widgets.Planner(interactive=True)
    refused._receive(None, {"type": "set", "count": 1, "gpu": "H100-80", "weights": "bf16"}, [])
    return {"recorder": talk.Recorder(question, interactive=True), "player": player, "voice": voice,
            "tokens": widgets.Tokens(model, ids, wav, interactive=True),
            "ode": widgets.Ode(states, torch.linspace(0, 1, 5), lambda state: wav[:800], interactive=True),
            "interleave": widgets.Interleave(24, 120, interactive=True),
            "listening": widgets.Listening(pairs, interactive=True), "marked": marked,
            "conversation": conversation,
            "planner": widgets.Planner(interactive=True), "refused": refused}  # fmt: skip


class Sheet:
    """One page of a given width. errors: whatever it logged as an error."""

    def __init__(self, browser, width, html=None, url=None):
        self.context, self.errors = browser.new_context(viewport={"width": width, "height": 900}), []
        self.page = self.context.new_page()
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda fault: self.errors.append(str(fault)))
        self.page.goto(url) if url else self.page.set_content(html)

    def close(self):
        self.context.close()


def live(browser, widget, width, window=None):
    """A Sheet with a live widget, `width` px wide with its margins; window: of the browser, the same by default."""
    view = widget._view
    traits = encoded({"data": view.data, "state": view.state})
    sheet = Sheet(browser, window or width, PAGE % (view._css, width - 16, script(traits), script(view._esm)))
    sheet.page.wait_for_function("window.done")
    return sheet


def script(text):
    """A string of JavaScript inside a script element."""
    return json.dumps(str(text)).replace("</", "<\\/")


def faults(sheet):
    """A sentence for everything that overlaps or sticks out."""
    return sheet.page.evaluate(FAULTS)
