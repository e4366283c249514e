// A microphone and a loudspeaker around a Session of realtime.py, whatever carries its events: the page of `aqaa serve`
// has a WebSocket, a notebook's widget its comm. Both put this text in front of their own.

/** The sound of one answer: pieces follow one another without a gap, and stop at once. */
class Sounding {
  constructor(context) { this.context = context; this.sources = []; this.reset(); }
  reset() { this.sources.forEach((source) => source.stop()); this.sources = []; this.item = null; this.end = 0; }
  /** When this piece starts, on the clock of the context. */
  play(item, wave) {
    if (item !== this.item) { this.item = item; this.first = null; this.length = 0; }
    const buffer = this.context.createBuffer(1, wave.length, Live.RATE), source = this.context.createBufferSource();
    buffer.copyToChannel(wave, 0);
    source.buffer = buffer;
    source.connect(this.context.destination);
    const start = Math.max(this.context.currentTime + 0.05, this.end);
    if (this.first === null) this.first = start;
    source.start(start);
    this.end = start + buffer.duration;
    this.length += buffer.duration;
    this.sources.push(source);
    source.onended = () => { this.sources = this.sources.filter((other) => other !== source); };
    return start;
  }
  get heard() { return Math.round(1000 * Math.max(0, Math.min(this.length, this.context.currentTime - this.first))); }
  get sounds() { return this.item !== null && this.context.currentTime < this.end; }
}

class Live {
  static RATE = 24000;  // samples a second, both ways
  static AT_ONCE = 2400;  // samples of a message
  static READY = "speak: a pause ends your turn";
  static WORDS = { "session.created": Live.READY, "input_audio_buffer.speech_started": "listening",
    "input_audio_buffer.speech_stopped": "thinking", "response.output_audio.delta": "answering",
    "response.done": Live.READY };
  static TAP = `registerProcessor("tap", class extends AudioWorkletProcessor {
    process(inputs) { const c = inputs[0][0]; if (c) this.port.postMessage(c.slice()); return true; } });`;

  static packed(floats) {
    const bytes = new DataView(new ArrayBuffer(2 * floats.length));
    floats.forEach((value, i) => bytes.setInt16(2 * i, Math.max(-1, Math.min(1, value)) * 32767, true));
    return btoa(Array.from(new Uint8Array(bytes.buffer), (byte) => String.fromCharCode(byte)).join(""));
  }

  static samples(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)), view = new DataView(bytes.buffer);
    return Float32Array.from({ length: bytes.length / 2 }, (_, i) => view.getInt16(2 * i, true) / 32768);
  }

  /** send(event) is for the Session; said(words): what goes on; level(peak) of the last message's sound; first(item, ms):
   *  from the end of speech to the first sound of an answer, on the clock of the sound card. */
  constructor(send, { said = () => {}, level = () => {}, first = () => {} } = {}) {
    Object.assign(this, { send, said, level, first, waiting: [], pause: 0, began: null, spoken: null });
  }

  /** Asks for the microphone; true when there is one and nobody has closed this meanwhile. Throws an Error that says why not. */
  async open() {
    if (!navigator.mediaDevices) {
      const sentence = "this page has no microphone: open it at 127.0.0.1, or by https";
      throw Object.assign(new Error(sentence), { name: "InsecurePage" });
    }
    this.stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: true } });
    if (this.closed) return this.#release();
    this.context = new AudioContext({ sampleRate: Live.RATE });
    this.sounding = new Sounding(this.context);
    const url = URL.createObjectURL(new Blob([Live.TAP], { type: "text/javascript" }));
    await this.context.audioWorklet.addModule(url);
    URL.revokeObjectURL(url);
    return this.closed ? this.#release() : true;
  }

  /** From now on the Session hears the microphone. */
  listen() {
    const tap = new AudioWorkletNode(this.context, "tap", { numberOfOutputs: 0 });
    tap.port.onmessage = ({ data }) => {
      if (this.closed) return;
      this.began ??= this.context.currentTime - data.length / Live.RATE;
      this.waiting.push(...data);
      if (this.waiting.length < Live.AT_ONCE) return;
      this.level(this.waiting.reduce((most, value) => Math.max(most, Math.abs(value)), 0));
      this.send({ type: "input_audio_buffer.append", audio: Live.packed(this.waiting) });
      this.waiting = [];
    };
    this.context.createMediaStreamSource(this.stream).connect(tap);
  }

  /** An event of the Session. */
  take(event) {
    const { type, item_id: item } = event, sounding = this.sounding;
    if (type === "queue.updated") this.said(`waiting: place ${event.place} in the line`);
    if (Live.WORDS[type]) this.said(Live.WORDS[type]);
    if (type === "session.created") this.pause = event.session.audio.input.turn_detection.silence_duration_ms;
    if (type === "input_audio_buffer.speech_started") {
      if (sounding.sounds)
        this.send({ type: "conversation.item.truncate", item_id: sounding.item, content_index: 0, audio_end_ms: sounding.heard });
      sounding.reset();
    }
    if (type === "input_audio_buffer.speech_stopped") this.spoken = event.audio_end_ms - this.pause;
    if (type === "response.output_audio.delta") {
      const fresh = item !== sounding.item, start = sounding.play(item, Live.samples(event.delta));
      if (fresh && this.spoken !== null) this.first(item, Math.round(1000 * (start - this.began) - this.spoken));
      this.spoken = null;
    }
  }

  /** Silence, and no microphone any more; returns what was still sounding: { item, heard } (ms), else {}. */
  close() {
    const { sounding } = this, last = sounding?.sounds ? { item: sounding.item, heard: sounding.heard } : {};
    this.closed = true;
    sounding?.reset();
    this.#release();
    return last;
  }

  #release() {
    this.stream?.getTracks().forEach((track) => track.stop());
    if (this.context && this.context.state !== "closed") this.context.close();
    return false;
  }
}
