// Press once, speak many times: a Live (aqaa/serve/live.js) whose events go through the widget's comm. What was said is
// kept in Python: a page shows it, one that is loaded later too.

const CELL = 4;  // pixels of an audio id
const OFF = "the microphone is off";

export default () => {
  const listeners = new Set();
  let live = null, words = OFF, level = 0, turns = [];  // live: one microphone for all views
  const changed = () => listeners.forEach((listener) => listener());

  async function start(model) {
    const call = Math.random().toString(36).slice(2);
    const mine = live = new Live((event) => model.send({ type: "event", call, text: JSON.stringify(event) }), {
      said: (now) => { words = now; changed(); },
      level: (peak) => { level = peak; changed(); },
      first: (item, ms) => model.send({ type: "first", item, ms }),
    });
    mine.call = call;
    words = "asking for the microphone";
    changed();
    try {
      if (!await mine.open()) return;
    } catch (fault) {
      mine.close();
      if (live !== mine) return;
      live = null;
      words = OFF;
      model.send({ type: "error", name: fault.name, message: fault.message });
      return changed();
    }
    model.send({ type: "start", call });
    mine.listen();
    changed();
  }

  /** The call is over: by this page's button, or because Python says so. */
  function end(model, told = false) {
    const mine = live;
    if (!mine) return;
    live = null;
    const last = mine.close();
    if (!told) model.send({ type: "stop", ...last });
    words = OFF;
    level = 0;
    changed();
  }

  const count = (turn, kind) => turn.blocks.filter(([name]) => name === kind).reduce((sum, block) => sum + block.at(-1), 0);

  function block([kind, ...content]) {
    if (kind === "text") return h("span", { class: "aqaa-block", style: `background: ${COLORS.text}` }, content[0].trim());
    const cells = `repeating-linear-gradient(90deg, ${COLORS.linguistic} 0 ${2 * CELL}px, ${COLORS.semantic} 0 ${5 * CELL}px)`;
    return h("span", { class: "aqaa-block", style: `width: ${CELL * content[0]}px; background: ${cells}` });
  }

  /** One turn; its blocks are a picture, the line below says the same in words. */
  function drawn(turn, group) {
    const audio = count(turn, "audio"), facts = [];
    if (audio) facts.push(`${count(turn, "text")} text and ${audio} audio ids, ${seconds(audio * group)} of sound`);
    if (turn.sound_ms !== null) facts.push(`first sound ${seconds(turn.sound_ms / 1000)} after the end of speech`);
    if (turn.ready_ms !== null) facts.push(`made after ${seconds(turn.ready_ms / 1000)}`);
    if (turn.interrupted) facts.push(turn.heard ? `interrupted; heard: “${turn.heard}”` : "interrupted");
    return h("li", {},
      h("p", { class: "aqaa-asked" }, turn.question === null ? "…" : turn.question || "(unclear)"),
      h("p", { class: "aqaa-said" }, turn.answer),
      h("div", { class: "aqaa-blocks", "aria-hidden": "true" }, turn.blocks.map(block)),
      h("small", {}, facts.join(" · ")));
  }

  return {
    initialize({ model }) {
      turns = model.get("state").turns;
      if (model.get("state").call) model.send({ type: "stop" });  // its page is gone
      model.on("msg:custom", (message) => {
        if (message.type === "turn") {
          turns = Object.assign([...turns], { [message.number]: message.turn });
          changed();
        } else if (message.call === live?.call && live) live.take(message.event);
      });
      model.on("change:state", () => {
        const state = model.get("state");
        turns = state.turns;
        if (live && state.call === live.call) live.known = true;
        else if (live?.known || state.error) end(model, true);  // stopped by a cell, or by another page
      });
    },

    render({ model, el }) {
      const { group } = model.get("data");
      const talk = h("button", { type: "button", "aria-pressed": "false", onclick: () => { if (live) end(model); else start(model); } });
      const again = h("button", { type: "button", onclick: () => { end(model); model.send({ type: "clear" }); } }, "Start over");
      const meter = h("meter", { min: 0, max: 1, "aria-label": "microphone level" });
      const status = h("span", { role: "status" }), fault = h("p", { class: "aqaa-error", role: "alert" });
      const list = h("ol", { class: "aqaa-turns", "aria-live": "polite", tabindex: 0, "aria-label": "what was said" });
      frame(el, "Conversation", h("div", { class: "aqaa-row" }, talk, again, meter, status), fault, list,
        h("small", {}, "A pause ends your turn, speaking interrupts; with headphones it does not hear itself. "
          + "What you say stays in this notebook's kernel; nothing is written to disk."));
      let shown = [];  // the turns as they stand in the list, in JSON

      const show = () => {
        const state = model.get("state"), wanted = turns.map((turn) => JSON.stringify(turn));
        talk.textContent = live ? "■ Stop" : "● Talk";
        talk.setAttribute("aria-pressed", String(Boolean(live)));
        again.hidden = !turns.length;
        meter.hidden = !live?.began;
        meter.value = level;
        if (status.textContent !== words) status.textContent = words;
        const said = state.error || state.message;
        if (fault.textContent !== said) fault.textContent = said;
        if (wanted.join() === shown.join()) return;
        wanted.forEach((text, k) => {
          if (text === shown[k]) return;
          const item = drawn(turns[k], group);
          if (list.children[k]) list.children[k].replaceWith(item); else list.append(item);
        });
        while (list.children.length > wanted.length) list.lastChild.remove();
        shown = wanted;
        list.scrollTop = list.scrollHeight;
      };
      listeners.add(show);
      follow(model, show);
      return () => {
        listeners.delete(show);
        if (!listeners.size) end(model);  // nobody sees any more that it listens
      };
    },
  };
};
