// Chapter 4: a cloud of gradients on four scales.
{
  const { inputs, offsets, scales } = data.spread;
  const farthest = data.spread.largest_middle;
  const NAMES = { linear: "linear", base2: "base 2", base4: "base 4", base10: "base 10" };
  const middle = $("middle");
  const radios = [...document.querySelectorAll("[name=scale]")];
  const edge = 20;
  const decades = Math.round(-Math.log10(inputs[inputs.length - 1]));
  middle.max = farthest;
  middle.value = farthest - 50;

  const chosen = () => radios.find((radio) => radio.checked).value;
  const place = () => farthest - middle.value; // To the right means larger; the table begins with the largest.

  const draw = drawing("cloud", (add, width, height) => {
    const across = (x) => width - edge + (Math.log10(x) / decades) * (width - 2 * edge);
    const ruler = height - 76;
    const { levels, values } = scales[chosen()];
    const all = [0, ...offsets.map((offset) => Math.min(Math.max(place() + offset, 0), inputs.length - 1))];
    all.forEach((k, j) => {
      const x = across(inputs[k]);
      const y = j ? 22 + ((j * 17) % 41) * 2 : 14;
      if (values[k]) add("line", { x1: x, y1: y, x2: across(values[k]), y2: ruler, class: "line", "stroke-opacity": 0.35 });
      add("circle", { cx: x, cy: y, r: j ? 3.6 : 5, class: values[k] ? "dot" : "gone" });
    });
    add("text", { x: edge, y: 16 }, "small");
    add("text", { x: width - edge - 10, y: 18, "text-anchor": "end" }, "the largest");
    add("line", { x1: edge, x2: width - edge, y1: ruler, y2: ruler, class: "axis" });
    levels.forEach((level) =>
      add("rect", { x: across(level) - 2, y: ruler - 9, width: 4, height: 18, rx: 2, class: "dot" }));
    const lowest = across(levels[0]);
    if (lowest > edge + 90) add("text", { x: lowest - 10, y: ruler - 8, "text-anchor": "end" }, "below: zero");
    const base = height - 34;
    add("line", { x1: edge, x2: width - edge, y1: base, y2: base, class: "axis" });
    for (let k = 0; k <= decades; k++) {
      const x = across(10 ** -k);
      add("line", { x1: x, x2: x, y1: base, y2: base + 7, class: "axis" });
      if (width > 480 || k % 2 === 0)
        add("text", { x, y: base + 24, "text-anchor": "middle" }, k ? power("10", -k) : "1");
    }
    add("circle", { cx: across(inputs[place()]), cy: base, r: 9, class: "handle" });
  });

  draggable("cloud", (x, width) => {
    const share = (width - edge - x) / (width - 2 * edge);
    move(middle, farthest - Math.round(share * (inputs.length - 1)));
  });

  const rows = Object.entries(NAMES).map(([name, words]) => {
    const row = $("survival").insertRow();
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = words;
    row.append(head);
    return { name, row, survive: row.insertCell(), moved: row.insertCell() };
  });

  follow([middle, ...radios], () => {
    for (const { name, row, survive, moved } of rows) {
      const { survivors, moved: by } = scales[name];
      row.classList.toggle("on", name === chosen());
      survive.textContent = `${survivors[place()]} of ${offsets.length}`;
      moved.textContent = by[place()] === null ? "–" : `${decimals(100 * by[place()], 0)} %`;
    }
    middle.setAttribute("aria-valuetext", `${short(inputs[place()])} of the largest`);
    draw();
  });
}
