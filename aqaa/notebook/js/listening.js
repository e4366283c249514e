// A listening test: sounds in a random order without their names, a mark from 1 to 5 each.

const MARKS = ["1 bad", "2 poor", "3 fair", "4 good", "5 excellent"];
let number = 0;

export default () => ({
  render({ model, el }) {
    const { sounds, rate, transcripts } = model.get("data"), speaker = new Speaker(), group = `aqaa-mos-${number += 1}`;
    const form = h("form", { style: "display: grid; gap: 0.6em", novalidate: true, onsubmit: submit });
    const fault = h("p", { class: "aqaa-error", role: "alert" });
    const results = h("div", { class: "aqaa-stack" });
    frame(el, "Listening test: how natural does each sound seem?", form, fault, results);
    let order = null, heard = new Set();

    function ask(next) {
      order = next;
      heard = new Set();
      form.replaceChildren(...order.map((which, k) => h("fieldset", {}, h("legend", {}, `Sound ${k + 1}`),
        playButton(speaker, `Play sound ${k + 1}`, () => [samples(sounds[which]), rate], () => heard.add(k)),
        MARKS.map((mark, m) => h("label", {}, h("input", { type: "radio", name: `${group}-${k}`, value: m + 1 }), mark)),
        transcripts[which] ? h("small", {}, `“${transcripts[which]}”`) : null)),
      h("div", {}, h("button", { type: "submit" }, "Submit")));
    }

    function submit(event) {
      event.preventDefault();
      const scores = order.map((_, k) => Number(form.querySelector(`[name=${group}-${k}]:checked`)?.value ?? 0));
      const missing = scores.findIndex((score, k) => !score || !heard.has(k));
      if (missing >= 0) {
        fault.textContent = heard.has(missing) ? `Sound ${missing + 1} has no mark yet.` : `Play sound ${missing + 1} before you judge it.`;
        form.querySelectorAll("fieldset")[missing].querySelector(heard.has(missing) ? "input" : "button").focus();
        return;
      }
      fault.textContent = "";
      speaker.stop();
      model.send({ type: "submit", scores });
    }

    const round = (value) => (value == null ? "–" : value.toFixed(2));
    follow(model, (state) => {
      if (JSON.stringify(state.order) !== JSON.stringify(order) || state.done !== form.hidden) ask(state.order);
      form.hidden = state.done;
      if (state.error) fault.textContent = state.error;
      results.hidden = !state.done;
      results.replaceChildren(h("p", { role: "status" }, state.message),
        h("div", { class: "aqaa-scroll" }, h("table", {}, h("caption", {}, "Mean opinion score with its 95 % confidence interval"),
          h("thead", {}, h("tr", {}, ["sound", "marks", "mean", "from", "to"].map((name) => h("th", { scope: "col" }, name)))),
          h("tbody", {}, state.results.map((row) => h("tr", {}, h("th", { scope: "row" }, row.title),
            [row.n, round(row.mean), round(row.low), round(row.high)].map((value) => h("td", {}, String(value)))))))),
        h("button", { type: "button", onclick: () => model.send({ type: "again" }) }, "Another listener"));
    });
    return () => speaker.close();
  },
});
