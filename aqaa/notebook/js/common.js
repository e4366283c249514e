// What all widgets share: small elements, sound, and pictures of waves. State lives in Python; pages only show it.
// COLORS (kind of token -> colour, black is readable on each) stands above, as Python wrote it.

/** An element: h("button", { onclick, class: "x" }, "label"). true and false set and leave out an attribute. */
function h(tag, attributes = {}, ...children) {
  const node = tag === "svg" || h.svg.has(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  // A key pressed here belongs to this element: JupyterLab would move to another cell.
  if (h.keys.has(tag) || "tabindex" in attributes) node.setAttribute("data-lm-suppress-shortcuts", "true");
  node.append(...children.flat().filter((child) => child != null));
  return node;
}
h.keys = new Set(["button", "input", "select"]);
h.svg = new Set(["g", "rect", "text", "line", "title"]);

/** The frame of a widget, put into `el`. */
function frame(el, title, ...children) {
  el.append(h("section", { class: "aqaa", "aria-label": title }, h("div", { class: "aqaa-title" }, title), ...children));
}

/** Calls show(state) now and at every change. */
function follow(model, show) {
  const update = () => show(model.get("state"));
  model.on("change:state", update);
  update();
}

const seconds = (value) => `${value.toFixed(2)} s`;

/** 16-bit samples as Python sends them (a DataView) -> Float32Array. */
function samples(view) {
  const out = new Float32Array(view.byteLength >> 1);
  for (let i = 0; i < out.length; i++) out[i] = view.getInt16(2 * i, true) / 32767;
  return out;
}

/** One loudspeaker a widget: a new sound ends the one before. */
class Speaker {
  get context() {
    this.made ??= new AudioContext();
    return this.made;
  }

  /** Plays samples (Float32Array) and calls done() at their end, or when another sound takes over. */
  play(wave, rate, done = () => {}) {
    this.stop();
    if (!wave.length) return done();
    if (this.context.state === "suspended") this.context.resume();
    const source = this.source(wave, rate);
    this.current = { source, done };
    source.onended = () => this.current?.source === source && this.stop();
    source.start();
  }

  source(wave, rate) {
    const buffer = this.context.createBuffer(1, wave.length, rate);
    buffer.copyToChannel(wave, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.context.destination);
    return source;
  }

  stop() {
    const { source, done } = this.current ?? {};
    this.current = null;
    source?.stop();
    done?.();
  }

  close() {
    this.stop();
    this.made?.close();
    this.made = null;
  }
}

/** Part of a wave, from and to in seconds, faded over 3 ms at both ends so that the cut does not click. */
function cut(wave, rate, from, to) {
  const part = wave.slice(Math.max(0, Math.round(from * rate)), Math.round(to * rate));
  const fade = Math.min(Math.round(0.003 * rate), part.length >> 1);
  for (let i = 0; i < fade; i++) {
    part[i] *= i / fade;
    part[part.length - 1 - i] *= i / fade;
  }
  return part;
}

/** A button that plays what get() returns ([samples, rate]) and stops it when pressed again. */
function playButton(speaker, label, get, started = () => {}) {
  const button = h("button", { type: "button", class: "aqaa-play" }, `▶ ${label}`);
  let on = false;
  button.addEventListener("click", () => {
    if (on) return speaker.stop();
    const sound = get(), done = () => { on = false; button.textContent = `▶ ${label}`; };
    speaker.stop();
    on = true;
    button.textContent = `■ ${label}`;
    speaker.play(...sound, done);
    started();
  });
  return button;
}

/** Draws a wave (Float32Array) over the whole canvas, from its minimum to its maximum in each column. */
function drawWave(canvas, wave) {
  const scale = window.devicePixelRatio || 1, width = canvas.clientWidth || 480, height = canvas.clientHeight || 56;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d"), step = wave.length / canvas.width;
  const peak = wave.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-3);
  pen.fillStyle = getComputedStyle(canvas).color;
  for (let x = 0; x < canvas.width; x++) {
    let low = 0, high = 0;
    for (let i = Math.floor(x * step); i < (x + 1) * step && i < wave.length; i++) {
      low = Math.min(low, wave[i]);
      high = Math.max(high, wave[i]);
    }
    const top = (1 - high / peak) / 2, size = (high - low) / peak / 2;
    pen.fillRect(x, top * canvas.height, 1, Math.max(1, size * canvas.height));
  }
}

/** Marks under a picture that lasts `length` seconds, at round times; read out by nobody, the picture's label says it. */
function axis(length) {
  const step = [0.1, 0.2, 0.5, 1, 2, 5, 10].find((size) => length / size <= 10) ?? 20;
  return h("div", { class: "aqaa-axis", "aria-hidden": "true" }, Array.from({ length: Math.ceil(length / step - 0.3) }, (_, k) =>
    h("span", { style: `left: ${(100 * k * step) / length}%` }, `${Number((k * step).toFixed(1))} s`)));
}
