// From noise to speech in steps: drag the step, see the mel, hear what the vocoder makes of it.

export default () => ({
  render({ model, el }) {
    const { pictures, bins, frames, times, sounds, rate, palette, hop, low, high } = model.get("data");
    const speaker = new Speaker(), last = times.length - 1;
    const loud = h("input", { type: "checkbox", checked: true });
    const slider = h("input", { type: "range", min: 0, max: last, step: 1, value: last, style: "width: 24rem",
      oninput: () => show(Number(slider.value)), onchange: () => loud.checked && hear(),
      "aria-label": "step of the solver" });
    const title = h("output", { role: "status", style: "min-width: 16em" });
    const picture = h("canvas", { role: "img", style: "height: 200px; image-rendering: pixelated" });
    const scale = h("span", { class: "aqaa-key", style: "width: 12em; background: linear-gradient(to right, "
      + Array.from({ length: 9 }, (_, k) => color(Math.min(255, k * 32))).join(", ") + ")" });
    const hear = () => speaker.play(samples(sounds[Number(slider.value)]), rate);
    function color(value) {
      return `rgb(${palette.getUint8(3 * value)}, ${palette.getUint8(3 * value + 1)}, ${palette.getUint8(3 * value + 2)})`;
    }

    function show(step) {
      const mel = pictures[step];
      picture.width = frames;
      picture.height = bins;
      const pen = picture.getContext("2d"), image = pen.createImageData(frames, bins);
      for (let bin = 0; bin < bins; bin++) for (let frame = 0; frame < frames; frame++) {
        const value = mel.getUint8(bin * frames + frame), at = 4 * ((bins - 1 - bin) * frames + frame);  // low bins below
        for (let c = 0; c < 3; c++) image.data[at + c] = palette.getUint8(3 * value + c);
        image.data[at + 3] = 255;
      }
      pen.putImageData(image, 0, 0);
      title.textContent = `step ${step} of ${last}, t = ${times[step].toFixed(3)}`;
      slider.setAttribute("aria-valuetext", title.textContent);
      picture.setAttribute("aria-label", `Mel spectrogram at ${title.textContent}: ${bins} bins over ${seconds(frames * hop)}`);
    }

    frame(el, "From noise to mel", h("div", { class: "aqaa-row" }, h("label", {}, "Step", slider), title,
      playButton(speaker, "Play", () => [samples(sounds[Number(slider.value)]), rate]), h("label", {}, loud, "sound after dragging")),
    h("div", { class: "aqaa-ladder" }, h("small", { style: "writing-mode: vertical-rl; transform: rotate(180deg); text-align: center" }, `mel bin, 0 to ${bins - 1}`),
      picture, h("span"), axis(frames * hop)),
    h("small", {}, `log energy: ${low.toFixed(1)} `, scale, ` ${high.toFixed(1)} or more`));
    show(last);
    return () => speaker.close();
  },
});
