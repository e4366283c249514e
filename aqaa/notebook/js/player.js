// Plays pieces of sound right behind one another while Python is still making the next ones.

const LEAD = 0.05;  // seconds before the first piece and after a gap: time to schedule

export default () => {
  const speaker = new Speaker();
  let sources = new Set(), open = false, next = 0, began = 0, counts = null, taken = 0;
  const listeners = new Set();
  const changed = () => listeners.forEach((listener) => listener());

  function silence() {
    open = false;
    for (const source of sources) { source.onended = null; source.stop(); }
    sources = new Set();
    speaker.stop();
    changed();
  }

  function add(model, message, buffer) {
    const wave = samples(buffer), context = speaker.context;
    if (context.state === "suspended") context.resume().then(() => { begun(model); changed(); });
    const now = context.currentTime;
    if (counts.chunks && next < now) counts.gaps += 1;
    if (!counts.chunks || next < now) next = now + LEAD;
    if (!counts.chunks) counts.lead = next - now;
    begun(model);
    counts.chunks += 1;
    const source = speaker.source(wave, message.rate);
    sources.add(source);
    source.onended = () => { sources.delete(source); changed(); };
    source.start(next);
    next += wave.length / message.rate;
    changed();
  }

  /** Once the browser lets the first piece out, and the last one has come, Python is told what was heard. */
  function begun(model) {
    if (speaker.context.state !== "running" || !counts) return;
    counts.first_ms ??= Math.round(performance.now() - began + 1000 * counts.lead);
    if (counts.ended) model.send({ type: "report", chunks: counts.chunks, gaps: counts.gaps, first_ms: counts.first_ms });
  }

  // Everything is numbered and taken once, however it comes: as a message, or in the state while Python is busy with
  // cells and cannot read that this page is there. late: ms since it was said.
  function take(model, message, sound, late = 0) {
    if (message.number <= taken) return;
    taken = message.number;
    if (message.type === "start") {
      silence();
      open = true;  // a page that was loaded in the middle of an answer stays silent
      began = performance.now() - late;
      next = 0;
      counts = { chunks: 0, gaps: 0, lead: LEAD, first_ms: null, ended: false };
    } else if (message.type === "silence") silence();
    else if (message.type === "chunk" && open) add(model, message, sound);
    else if (message.type === "end" && open && counts.chunks) {
      counts.ended = true;
      begun(model);
      changed();
    }
  }

  /** What this page has heard of a whole answer; Python says the same once it has read our report. */
  function heard(state) {
    if (state.phase !== "done" || !open || !counts.ended || counts.first_ms === null) return null;
    const length = (state.sound.byteLength / 2 / state.rate).toFixed(1), { chunks, first_ms, gaps } = counts;
    return `${length} s made in ${chunks} pieces, first sound after ${first_ms} ms, ${gaps} gap${gaps === 1 ? "" : "s"}.`;
  }

  return {
    initialize({ model }) {
      const waiting = (late) => model.get("state").waiting.forEach((message) =>
        take(model, message, message.sound, message.sent && late ? Math.max(0, Date.now() - message.sent) : 0));
      model.on("msg:custom", (message, buffers) => take(model, message, buffers[0]));
      model.on("change:state", () => waiting(false));
      waiting(true);  // said before this script was loaded
      model.send({ type: "ready" });
    },

    render({ model, el }) {
      const stop = h("button", { type: "button", onclick: () => { silence(); model.send({ type: "stop" }); } }, "■ Stop");
      const again = playButton(speaker, "Play again", () => [samples(model.get("state").sound), model.get("state").rate]);
      const enable = h("button", { type: "button", onclick: () =>
        speaker.context.resume().then(() => { begun(model); changed(); }) }, "Enable sound");
      const said = h("p", { class: "aqaa-said", "aria-live": "polite" });
      const status = h("span", { role: "status" });
      const fault = h("p", { class: "aqaa-error", role: "alert" });
      frame(el, "Answer", h("div", { class: "aqaa-row" }, stop, again, enable, status), said, fault);
      const show = () => {
        const state = model.get("state"), busy = ["listening", "speaking"].includes(state.phase);
        stop.disabled = !busy && !sources.size;
        again.disabled = busy || sources.size > 0 || !state.sound;
        enable.hidden = !sources.size || speaker.context.state === "running";
        said.textContent = state.text ? `“${state.text.trim()}”` : "";
        const silent = sources.size && speaker.context.state !== "running";
        status.textContent = silent ? "The browser holds the sound back: press Enable sound."
          : sources.size ? "speaking …" : heard(state) ?? state.message;
        if (fault.textContent !== state.error) fault.textContent = state.error;
      };
      listeners.add(show);
      follow(model, show);
      return () => {
        listeners.delete(show);
        if (listeners.size) return;
        silence();
        speaker.close();
      };
    },
  };
};
