// Both streams of tokens under the wave: point at one to hear its moment and to see which codes are like it.

const AROUND = 0.15;  // seconds on both sides of a token, heard "in context"

export default () => ({
  render({ model, el }) {
    const { wav, rate, rows } = model.get("data");
    const speaker = new Speaker(), wave = samples(wav), length = wave.length / rate;
    const end = Math.max(length, ...rows.map((row) => row.codes.length * row.step));
    const SCALE = Math.min(700, 15000 / end);  // pixels a second: a 40 ms token has room for four digits
    const hover = h("input", { type: "checkbox", checked: true });
    const context = h("input", { type: "checkbox" });
    const detail = h("p", { role: "status", style: "min-height: 3.2em" }, "Point at a token, or use Tab and the arrow keys.");
    const picture = h("canvas", { style: `width: ${length * SCALE}px; height: 64px`, "aria-hidden": "true" });
    const lines = rows.map((row) => h("div", { role: "row", class: "aqaa-cells", "aria-label": row.kind }));
    const names = rows.map((row) => h("div", { "aria-hidden": "true" }, h("span", { class: "aqaa-streamname" },
      h("span", { class: "aqaa-key", style: `background: ${COLORS[row.kind]}` }),
      ` ${row.kind} tokens, one every ${Math.round(1000 * row.step)} ms`)));
    let touched = false;  // browsers let a page sound only after a click or a key

    const cells = rows.map((row, r) => row.codes.map((code, i) => h("div", {
      role: "gridcell", tabindex: r + i ? -1 : 0, "data-code": code,
      "aria-label": `${row.kind} ${code}, ${seconds(i * row.step)}`,
      style: `left: ${i * row.step * SCALE}px; width: ${row.step * SCALE}px; background: ${COLORS[row.kind]}`,
      onmouseenter: () => choose(r, i, hover.checked && touched), onfocus: () => choose(r, i, hover.checked && touched),
      onclick: () => { touched = true; move(r, i); choose(r, i, true); }, onkeydown: (event) => press(event, r, i),
    }, String(code))));
    rows.forEach((row, r) => lines[r].append(...cells[r]));

    function choose(r, i, sound) {
      const row = rows[r], code = row.codes[i], from = i * row.step, to = from + row.step;
      cells.forEach((line, other) => line.forEach((cell, j) =>
        cell.classList.toggle("aqaa-same", other === r && rows[r].codes[j] === code)));
      const times = row.codes.flatMap((other, j) => (other === code && j !== i ? [seconds(j * row.step)] : []));
      const near = row.near[code].map(([other, distance]) =>
        `${other} (${distance.toFixed(2)}${row.codes.includes(other) ? ", also heard here" : ""})`);
      detail.replaceChildren(h("b", {}, `${row.kind} token ${code}`),
        ` · ${from.toFixed(2)}–${seconds(to)} · ${times.length ? `again at ${times.join(", ")}` : "only here"}`, h("br"),
        `Nearest codes, distance as a share of the usual one: ${near.join(" · ")}`);
      const more = context.checked ? AROUND : 0;
      if (sound) speaker.play(cut(wave, rate, from - more, to + more), rate);
    }

    function move(r, i) {
      cells.flat().forEach((cell) => { cell.tabIndex = -1; });
      cells[r][i].tabIndex = 0;
      if (document.activeElement !== cells[r][i]) cells[r][i].focus();
    }

    function press(event, r, i) {
      touched = true;
      const last = rows[r].codes.length - 1, other = 1 - r;
      const across = Math.min(Math.floor(((i + 0.5) * rows[r].step) / rows[other].step), rows[other].codes.length - 1);
      const place = { ArrowRight: [r, Math.min(i + 1, last)], ArrowLeft: [r, Math.max(i - 1, 0)], Home: [r, 0],
        End: [r, last], ArrowDown: r ? [r, i] : [1, across], ArrowUp: r ? [0, across] : [r, i] }[event.key];
      if (place) move(...place);
      else if (event.key === "Enter" || event.key === " ") choose(r, i, true);
      else return;
      event.preventDefault();
    }

    const marks = Array.from({ length: Math.floor(end / 0.2) }, (_, k) =>
      h("span", { style: `left: ${k * 0.2 * SCALE}px` }, `${(k * 0.2).toFixed(1)} s`));
    frame(el, "Tokens of this sound",
      h("div", { class: "aqaa-row" }, playButton(speaker, "Play all", () => [wave, rate], () => { touched = true; }),
        h("label", {}, hover, "sound while pointing"), h("label", {}, context, "with 0.15 s around it")),
      h("div", { class: "aqaa-scroll" }, h("div", { style: `width: ${end * SCALE + 4}px` }, picture,
        h("div", { role: "grid", "aria-label": "tokens over time; arrow keys move, Enter plays" },
          lines.flatMap((line, r) => [names[r], line])),
        h("div", { class: "aqaa-axis", "aria-hidden": "true" }, marks))), detail);
    requestAnimationFrame(() => drawWave(picture, wave));
    return () => speaker.close();
  },
});
