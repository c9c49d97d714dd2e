// What all chapters share: the tables, drawing, dragging, and numbers in words. Nothing here rounds a number of the
// story: what is shown comes from the tables, cut to a few digits for reading.

const data = JSON.parse(document.getElementById("data").textContent);

function $(id) {
  return document.getElementById(id);
}

/** An SVG element; `text` is its content, if any. */
function shape(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** A number with that many decimals and a real minus sign. */
function decimals(x, count) {
  const text = x.toFixed(count);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
}

/** The same with its sign, also for what is above zero. */
function signed(x, count) {
  const text = decimals(x, count);
  return Number(x.toFixed(count)) > 0 ? `+${text}` : text;
}

/** A number of any size with three digits that count. */
function short(x) {
  if (x === 0) return "0";
  const places = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(x))));
  return places > 6 ? x.toExponential(1).replace("-", "−") : decimals(x, places);
}

/** A label of a table, with a real minus sign. */
function label(text) {
  return text.replace("-", "−");
}

const TINY = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

/** A power, as people write it. */
function power(base, exponent) {
  return base + [...String(exponent)].map((sign) => TINY[sign]).join("");
}

/**
 * A drawing that is made anew when its width changes, so that its letters keep their size on any screen.
 * `draw(add, width, height)` calls `add(name, attributes, text)`. Returns the function that draws it again.
 */
function drawing(id, draw) {
  const svg = $(id);
  let width = 0;
  function again() {
    const box = svg.getBoundingClientRect();
    width = box.width;
    if (!width) return;
    const parts = [];
    draw((name, attributes, text) => parts.push(shape(name, attributes, text)), width, box.height);
    svg.setAttribute("viewBox", `0 0 ${width} ${box.height}`);
    svg.replaceChildren(...parts);
  }
  new ResizeObserver(() => {
    if (Math.abs(svg.getBoundingClientRect().width - width) > 0.5 && !matchMedia("print").matches) again();
  }).observe(svg);
  return again;
}

/** Sets a slider as if somebody had moved it. */
function move(input, value) {
  const before = input.value;
  input.value = value;
  if (input.value !== before) input.dispatchEvent(new Event("input", { bubbles: true }));
}

/** Dragging in a drawing moves a slider. `place(x, width, first)` gets where the pointer is, and moves it. */
function draggable(id, place) {
  const svg = $(id);
  let held = false;
  const at = (event, first) => {
    const box = svg.getBoundingClientRect();
    place(event.clientX - box.left, box.width, first);
  };
  svg.addEventListener("pointerdown", (event) => {
    held = true;
    svg.setPointerCapture(event.pointerId);
    at(event, true);
  });
  svg.addEventListener("pointermove", (event) => held && at(event, false));
  for (const end of ["pointerup", "pointercancel"]) svg.addEventListener(end, () => (held = false));
}

/** Calls `show` now and whenever one of the inputs is moved. */
function follow(inputs, show) {
  for (const input of inputs) input.addEventListener("input", show);
  show();
}

/** A path through points [x, y, shown]; where `cut` says so, and after a point that is not shown, it begins anew. */
function path(points, cut = () => false) {
  const begins = (k) => k === 0 || cut(k) || points[k - 1][2] === false;
  const parts = points.map(([x, y, shown], k) =>
    shown === false ? "" : `${begins(k) ? "M" : "L"}${x.toFixed(1)} ${y.toFixed(1)}`);
  return parts.join("");
}

{
  const button = $("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const show = () => button.setAttribute("aria-pressed", String(isDark()));
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  system.addEventListener("change", show);
  show();
  $("version").textContent = data.version;
}
