// Drag the ratio of text to audio tokens; Python plans the answer, the page draws it.

const WIDTH = 900, LEFT = 86, ROW = 34, GAP = 16;

export default () => ({
  render({ model, el }) {
    const { layouts, n_text, n_audio } = model.get("data");
    const numbers = {};
    const slider = (name, label, min, max, step) => {
      const output = h("output", {});
      const input = h("input", { type: "range", min, max, step, oninput: () => {
        output.textContent = input.value;
        model.send({ type: "set", [name]: Number(input.value) });
      } });
      numbers[name] = { input, output };
      return h("label", {}, label, input, output);
    };
    const preset = h("select", { onchange: () => {
      const [text_block, audio_block] = layouts[preset.value] ?? [];
      if (audio_block) model.send({ type: "set", text_block, audio_block });
    } }, h("option", { value: "" }, "your own"), Object.keys(layouts).map((name) => h("option", { value: name }, name)));
    const summary = h("p", { role: "status" });
    const drawing = h("div", { class: "aqaa-scroll" });
    frame(el, `An answer of ${n_text} text and ${n_audio} audio tokens`,
      h("div", { class: "aqaa-sliders" }, h("label", {}, "Layout of the paper", preset), slider("text_block", "Text tokens a block", 0, n_text + 1, 1),
        slider("audio_block", "Audio tokens a block", 5, 60, 5),
        slider("tokens_per_second", "Tokens generated a second", 10, 300, 5)), summary, drawing);

    follow(model, (state) => {
      for (const [name, { input, output }] of Object.entries(numbers)) {
        if (document.activeElement !== input) input.value = state[name];
        output.textContent = state[name];
      }
      preset.value = Object.keys(layouts).find((name) => layouts[name][0] === state.text_block
        && layouts[name][1] === state.audio_block) ?? "";
      summary.textContent = state.message;
      const { blocks } = state, sounds = blocks.filter((block) => block.kind === "audio");
      const end = Math.max(...blocks.map((block) => block.ready), ...sounds.map((block) => block.plays + block.seconds));
      const x = (time) => LEFT + (WIDTH - LEFT - 20) * (time / end);
      const box = (from, to, row, fill, label, title) => h("g", {}, h("title", {}, title),
        h("rect", { x: x(from), y: row * (ROW + GAP) + 4, width: Math.max(1, x(to) - x(from) - 1), height: ROW, rx: 3, fill, stroke: "currentColor" }),
        ...label.filter((words) => x(to) - x(from) > 7.5 * words.length + 4).slice(0, 1).map((words) =>
          h("text", { x: (x(from) + x(to)) / 2, y: row * (ROW + GAP) + 4 + ROW / 2 + 4, class: "aqaa-ink" }, words)));
      const axis = 2 * (ROW + GAP) + 8, step = [0.1, 0.2, 0.5, 1, 2, 5, 10].find((size) => end / size <= 12) ?? 20;
      const ticks = Array.from({ length: Math.floor(end / step) + 1 }, (_, k) => k * step);
      drawing.replaceChildren(h("svg", { viewBox: `0 0 ${WIDTH} ${axis + 26}`, role: "img", "aria-label": state.message, style: "min-width: 40rem" },
        h("text", { x: 0, y: 4 + ROW / 2 + 4 }, "generated"), h("text", { x: 0, y: ROW + GAP + 4 + ROW / 2 + 4 }, "heard"),
        blocks.map((block) => box(block.start, block.ready, 0, COLORS[block.kind === "text" ? "text" : "semantic"],
          block.kind === "text" ? [`T${block.count}`, "T"] : [`A${block.count}`, "A"], `${block.count} ${block.kind} tokens, ready at ${seconds(block.ready)}`)),
        sounds.map((block, k) => box(block.plays, block.plays + block.seconds, 1, COLORS.semantic, [`sound ${k + 1}`, `${k + 1}`],
          `sound ${k + 1} from ${seconds(block.plays)}${block.wait > 0.005 && k ? `, after ${seconds(block.wait)} of silence` : ""}`)),
        ticks.map((time) => h("g", {}, h("line", { x1: x(time), x2: x(time), y1: axis - 6, y2: axis, stroke: "currentColor" }),
          h("text", { x: x(time), y: axis + 14, "text-anchor": "middle" }, `${Number(time.toFixed(1))}`))),
        h("text", { x: 0, y: axis + 14 }, "time, s")),
      h("small", {}, "T: a block of text tokens, A: of audio tokens, with their number. Below, the sound of each audio block."));
    });
  },
});
