// Choose a manner and a temperature, press Speak, compare what was measured.

let number = 0;

export default () => {
  const speaker = new Speaker();

  function initialize({ model }) {
    model.on("msg:custom", (message) => {  // the answer to the button just pressed: never at the load of a page
      const [take] = model.get("state").takes;
      if (message.type === "play") speaker.play(samples(take.sound), take.rate);
    });
  }

  function render({ model, el }) {
    const { groups } = model.get("data"), name = `aqaa-manner-${number += 1}`;
    const radio = (manner) => h("label", {}, h("input", { type: "radio", name, value: manner, checked: manner === "normal" }), manner);
    const shown = h("output", {}, "0.3");
    const temperature = h("input", { type: "range", min: 0, max: 1.2, step: 0.1, value: 0.3,
      oninput: () => { shown.textContent = Number(temperature.value).toFixed(1); } });
    const seed = h("input", { type: "number", min: 0, max: 9999, value: 0, style: "width: 5em; font: inherit" });
    const sentence = h("input", { type: "text", value: model.get("state").sentence, maxlength: 120,
      style: "flex: 1; min-width: 12rem; font: inherit; padding: 0.2em 0.4em" });
    const speak = h("button", { type: "submit" }, "Speak");
    const status = h("span", { role: "status" }), fault = h("p", { class: "aqaa-error", role: "alert" });
    const takes = h("div", {});
    const form = h("form", { style: "display: grid; gap: 0.6em", onsubmit: (event) => {
      event.preventDefault();
      speak.disabled = true;
      model.send({ type: "speak", manner: form.querySelector(`[name=${name}]:checked`).value, sentence: sentence.value,
        temperature: Number(temperature.value), seed: Number(seed.value) });
    } },
      h("label", { class: "aqaa-row" }, "Sentence", sentence),
      h("div", { class: "aqaa-row" }, Object.entries(groups).map(([legend, manners]) =>
        h("fieldset", {}, h("legend", {}, legend), manners.map(radio)))),
      h("div", { class: "aqaa-row" }, h("label", {}, "Temperature", temperature, shown), h("label", {}, "Seed", seed), speak, status),
      h("small", {}, "The model takes one manner at a time: it is written as a tag at the head of the sentence."));
    frame(el, "Voice control", form, fault, takes);

    let drawn = null;
    follow(model, (state) => {
      speak.disabled = state.phase === "speaking";
      status.textContent = state.message;
      if (fault.textContent !== state.error) fault.textContent = state.error;
      if (drawn === state.said) return;
      drawn = state.said;
      takes.replaceChildren(...(state.takes.length ? [h("div", { class: "aqaa-scroll" }, h("table", {}, h("caption", {}, "What was said, newest first"),
        h("thead", {}, h("tr", {}, ["manner", "temperature", "seed", "speech, s", "pitch, Hz", "level, dB", "sound"].map((title) =>
          h("th", { scope: "col" }, title)))),
        h("tbody", {}, state.takes.map((take) => h("tr", {}, h("th", { scope: "row" }, take.manner), [take.temperature, take.seed,
          take.seconds.toFixed(2), take.f0 ? take.f0.toFixed(0) : "–", take.energy.toFixed(1)].map((value) => h("td", {}, String(value))),
        h("td", {}, playButton(speaker, `Play ${take.manner}`, () => [samples(take.sound), take.rate])))))))] : []));
    });
    return () => speaker.close();
  }

  return { initialize, render };
};
