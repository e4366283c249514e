// Microphone -> 32-bit samples in Python. The browser's own processing is off: the tokenizers want the voice as it is.

const TAP = `registerProcessor("tap", class extends AudioWorkletProcessor {
  process(inputs) { const c = inputs[0][0]; if (c) this.port.postMessage(c.slice()); return true; } });`;
const BLOCKS = 32;  // of 128 samples in a message: about 90 ms

export default () => {
  const speaker = new Speaker(), listeners = new Set();
  let live = null;  // one microphone for all views of this recorder
  const changed = () => listeners.forEach((listener) => listener());

  async function start(model) {
    const mine = live = { blocks: [], count: 0, level: 0 };
    changed();
    try {
      if (!navigator.mediaDevices) throw { name: "InsecurePage" };
      mine.stream = await navigator.mediaDevices.getUserMedia({ audio: {
        channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false } });
      mine.context = new AudioContext();
      const url = URL.createObjectURL(new Blob([TAP], { type: "text/javascript" }));
      await mine.context.audioWorklet.addModule(url);
      URL.revokeObjectURL(url);
      if (live !== mine) return release(mine);
      const tap = new AudioWorkletNode(mine.context, "tap", { numberOfOutputs: 0 });
      mine.rate = mine.context.sampleRate;
      model.send({ type: "start", rate: mine.rate });
      tap.port.onmessage = ({ data }) => {
        if (live !== mine) return;
        mine.blocks.push(data);
        mine.count += data.length;
        if (mine.blocks.length >= BLOCKS) { flush(model, mine); changed(); }
        if (mine.count >= model.get("data").limit * mine.rate) stop(model);
      };
      mine.context.createMediaStreamSource(mine.stream).connect(tap);
      changed();
    } catch (fault) {
      release(mine);
      live = null;
      model.send({ type: "error", name: fault.name, message: fault.message });
      changed();
    }
  }

  function flush(model, mine) {
    const out = new Float32Array(mine.blocks.reduce((sum, block) => sum + block.length, 0));
    let at = 0;
    for (const block of mine.blocks.splice(0)) { out.set(block, at); at += block.length; }
    mine.level = out.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    if (out.length) model.send({ type: "chunk" }, undefined, [out.buffer]);
  }

  function release(mine) {
    mine.stream?.getTracks().forEach((track) => track.stop());
    mine.context?.close();
  }

  function stop(model) {
    const mine = live;
    live = null;
    if (mine?.rate) { flush(model, mine); model.send({ type: "stop" }); }
    if (mine) release(mine);
    changed();
  }

  return {
    initialize({ model }) {
      if (model.get("state").phase === "recording") model.send({ type: "stop" });  // its page is gone
    },

    render({ model, el }) {
      const { fallback, rate, transcript, limit } = model.get("data");
      const current = () => model.get("state").sound ?? fallback;
      const record = h("button", { type: "button", "aria-pressed": "false", onclick: () => {
        speaker.stop();
        if (live) stop(model); else start(model);
      } });
      const play = playButton(speaker, "Play", () => [samples(current()), rate]);
      const clear = h("button", { type: "button", onclick: () => model.send({ type: "clear" }) }, "Use the sample question");
      const meter = h("meter", { min: 0, max: 1, "aria-label": "microphone level" });
      const clock = h("span", { "aria-hidden": "true" });
      const status = h("span", { role: "status" });
      const picture = h("canvas", { style: "height: 56px", role: "img" }), marks = h("div", {});
      const wave = h("div", {}, picture, marks);
      frame(el, "Your question", h("div", { class: "aqaa-row" }, record, play, clear, meter, clock), status, wave,
        h("small", {}, `Up to ${limit} s. The recording stays in this notebook's kernel; nothing is written to disk.`));
      let drawn = null;

      const show = () => {
        const state = model.get("state"), closing = !live && state.phase === "recording";
        record.disabled = closing || (live && !live.rate);
        record.textContent = live ? "■ Stop" : state.sound ? "● Record again" : "● Record";
        record.setAttribute("aria-pressed", String(Boolean(live)));
        play.disabled = Boolean(live);
        clear.hidden = !state.sound || live;
        meter.hidden = clock.hidden = !live?.rate;
        if (live?.rate) {
          meter.value = live.level;
          clock.textContent = `${(live.count / live.rate).toFixed(1)} s`;
        }
        const words = !live ? state.message : live.rate ? "Recording: speak now, then press Stop."
          : "Waiting for the microphone: the browser may ask you to allow it.";
        if (status.textContent !== words) status.textContent = words;
        wave.hidden = Boolean(live);
        if (live || closing || drawn === current()) return;
        drawn = current();
        const sound = samples(drawn);
        picture.setAttribute("aria-label", `Waveform, ${seconds(sound.length / rate)}: `
          + (state.sound ? "your recording" : `the sample question${transcript ? `, “${transcript}”` : ""}`));
        marks.replaceChildren(axis(sound.length / rate));
        requestAnimationFrame(() => drawWave(picture, sound));
      };
      listeners.add(show);
      follow(model, show);
      return () => {
        listeners.delete(show);
        if (listeners.size) return;
        stop(model);  // nobody sees any more that it records
        speaker.close();
      };
    },
  };
};
