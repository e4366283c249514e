// Choose GPUs, a format and a context; Python plans, the page draws what it found.

const WIDTH = 900, LEFT = 4, ROW = 34;

export default () => ({
  render({ model, el }) {
    const { model: name, gpus, counts, formats, contexts, parts, rates, note } = model.get("data");
    const choices = {};
    const choice = (key, label, values, read = String) => {
      const select = h("select", { onchange: () => model.send({ type: "set", [key]: read(select.value) }) },
        values.map((value) => h("option", { value }, String(value))));
      choices[key] = select;
      return h("label", {}, label, select);
    };
    const fault = h("p", { class: "aqaa-error", role: "alert" }), summary = h("p", { role: "status" });
    const drawing = h("div", { class: "aqaa-scroll" }), tables = h("div", { class: "aqaa-row", style: "align-items: start" });
    frame(el, `What ${name} needs, and how fast it could talk`,
      h("div", { class: "aqaa-row" }, choice("count", "Number", counts, Number), choice("gpu", "GPU", gpus),
        choice("weights", "Weights", formats), choice("context", "Context, ids", contexts, Number)),
      fault, summary, drawing, tables, h("small", {}, note));

    const box = (x, y, width, fill, label, title, attributes = {}) => h("g", {}, h("title", {}, title),
      h("rect", { x, y, width: Math.max(0.5, width), height: ROW, fill, stroke: "currentColor", ...attributes }),
      width > 7.5 * label.length + 6 ? h("text", { x: x + width / 2, y: y + ROW / 2 + 4, class: "aqaa-ink" }, label) : null);
    const mark = (x, y, words, line = 1) => h("g", {}, h("line", { x1: x, x2: x, y1: y - 5, y2: y + ROW + 5, stroke: "currentColor",
      "stroke-width": 3 }), h("text", { x: Math.min(x, WIDTH - 4), y: y + ROW + 4 + 15 * line,
      "text-anchor": x > WIDTH / 2 ? "end" : "start" }, words));
    const heading = (y, words) => h("text", { x: LEFT, y: y - 9 }, words);
    const table = (caption, head, rows) => h("table", {}, h("caption", {}, caption),
      h("thead", {}, h("tr", {}, head.map((title) => title ? h("th", { scope: "col" }, title) : h("td")))),
      h("tbody", {}, rows.map(([first, ...cells]) => h("tr", {}, h("th", { scope: "row" }, first), cells.map((cell) => h("td", {}, cell))))));

    follow(model, ({ chosen, plan, message, error }) => {
      for (const [key, select] of Object.entries(choices)) select.value = chosen[key];
      if (fault.textContent !== error) fault.textContent = error;
      summary.textContent = message;
      const { memory, card, total, ceiling, rate, fits } = plan;
      const gib = (size) => `${size.toFixed(1)} GiB`, scale = (WIDTH - 2 * LEFT - 8) / Math.max(card, total);
      let x = LEFT;
      const stack = parts.map(([key, words, fill]) => {
        const width = memory[key] * scale;
        x += width;
        return box(x - width, 20, width, fill, words, `${words} ${gib(memory[key])}`);
      });
      const top = Math.max(ceiling, ...Object.values(rates)) * 1.05, at = (value) => LEFT + (WIDTH - 2 * LEFT) * (value / top);
      const speed = !fits ? [] : [
        heading(112, `speed: at most ${ceiling.toFixed(0)} tokens/s (dashed), ${rate ? `measured ${rate.toFixed(0)} (filled)` : "not measured"}, beside what speech uses up`),
        box(LEFT, 112, at(ceiling) - LEFT, "none", "", `at most ${ceiling.toFixed(1)} tokens a second`, { "stroke-dasharray": "5 3" }),
        ...(rate ? [box(LEFT, 112, at(rate) - LEFT, COLORS.text, "", `measured ${rate.toFixed(1)} tokens a second`)] : []),
        ...Object.entries(rates).map(([words, value], k) => mark(at(value), 112, `${words} ${value.toFixed(1)} tokens/s`, k + 1)),
      ];
      drawing.replaceChildren(h("svg", { viewBox: `0 0 ${WIDTH} ${fits ? 186 : 80}`, role: "img", style: "min-width: 40rem",
        "aria-label": `Memory of a card by part, ${gib(total)} of ${gib(card)}${fits ? `, and its rate beside ${Object.keys(rates).join(" and ")}` : ""}` },
      heading(20, `memory: ${gib(total)} on each card`), stack, mark(LEFT + card * scale, 20, `card ${gib(card)}`), speed));
      const key = (fill) => h("span", { class: "aqaa-key", style: `background: ${fill}; margin-right: 0.5em`, "aria-hidden": "true" });
      const late = Object.entries(plan.delay), first = Object.entries(plan.first_sound);
      tables.replaceChildren(
        table("Memory of one card", ["part", "GiB"], [...parts.map(([part, words, fill]) => [[key(fill), words], memory[part].toFixed(2)]),
          ["all", total.toFixed(2)], [fits ? "left over" : "lacking", Math.abs(plan.spare).toFixed(2)]]),
        ...(fits ? [h("div", { class: "aqaa-stack" }, table("One token", ["", "value"], [["read from memory, GB", plan.streamed.toFixed(1)], ["at least, ms", (1000 * plan.floor).toFixed(1)],
          ["measured, ms", rate ? (1000 / rate).toFixed(1) : "no"], ["at most, tokens/s", ceiling.toFixed(1)],
          ["measured, tokens/s", rate ? rate.toFixed(1) : "no"]]),
        table(rate ? "Waiting, by the measured rate" : "Waiting, at best", ["", "seconds"], [...first.map(([asked, time]) => [`first sound after a question of ${asked} s`, time.toFixed(2)]),
          ...late.map(([answer, time]) => [`head start of an answer of ${answer} s`, time.toFixed(2)])]))] : []));
    });
  },
});
