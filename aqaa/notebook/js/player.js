// Plays pieces of sound right behind one another while Python is still making the next ones.

const LEAD = 0.05;  // seconds before the first piece and after a gap: time to schedule

export default () => {
  const speaker = new Speaker();
  let sources = new Set(), open = false, next = 0, began = 0, counts = null;
  const listeners = new Set();
  const changed = () => listeners.forEach((listener) => listener());

  function silence() {
    open = false;
    for (const source of sources) { source.onended = null; source.stop(); }
    sources = new Set();
    speaker.stop();
    changed();
  }

  function add(message, buffer) {
    const wave = samples(buffer), context = speaker.context;
    if (context.state === "suspended") context.resume().then(changed);
    const now = context.currentTime;
    if (counts.chunks && next < now) counts.gaps += 1;
    if (!counts.chunks || next < now) next = now + LEAD;
    counts.first_ms ??= Math.round(performance.now() - began + 1000 * (next - now));
    counts.chunks += 1;
    const source = speaker.source(wave, message.rate);
    sources.add(source);
    source.onended = () => { sources.delete(source); changed(); };
    source.start(next);
    next += wave.length / message.rate;
    changed();
  }

  return {
    initialize({ model }) {
      model.on("msg:custom", (message, buffers) => {
        if (message.type === "start") {
          silence();
          open = true;  // a page that was loaded in the middle of an answer stays silent
          began = performance.now() - message.age_ms;
          next = 0;
          counts = { chunks: 0, gaps: 0, first_ms: null };
        } else if (message.type === "silence") silence();
        else if (message.type === "chunk" && open) add(message, buffers[0]);
        else if (message.type === "end" && open) model.send({ type: "report", ...counts });
      });
      model.send({ type: "ready" });
    },

    render({ model, el }) {
      const stop = h("button", { type: "button", onclick: () => { silence(); model.send({ type: "stop" }); } }, "■ Stop");
      const again = playButton(speaker, "Play again", () => [samples(model.get("state").sound), model.get("state").rate]);
      const enable = h("button", { type: "button", onclick: () => speaker.context.resume().then(changed) }, "Enable sound");
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
        status.textContent = sources.size && !busy ? "speaking …" : state.message;
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
