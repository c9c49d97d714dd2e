"use strict";
/* How elements are made and numbers are said. Text goes into text nodes only, so that a name is never taken for markup. */

const SVG = "http://www.w3.org/2000/svg";

function element(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) made.style.setProperty(name, value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

const el = (tag, attributes = {}, ...children) => element(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => element(document.createElementNS(SVG, tag), attributes, children);

const Words = {
  minus: (text) => text.replace("-", "−"),
  fixed: (value, digits = 2) => (value === null ? "–" : Words.minus(value.toFixed(digits))),
  signed: (value, digits = 2) => (value === null ? "–" : (value > 0 ? "+" : "") + Words.minus(value.toFixed(digits))),
  ratio: (value) => (value === null ? "–" : value.toFixed(2) + "×"),
  percent: (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1) + " %"),
  whole: (value) => value.toLocaleString("en-US", { maximumFractionDigits: 0 }),
  bytes(value) {
    if (value === null) return "–";
    const units = ["bytes", "kB", "MB", "GB", "TB"];
    let place = 0;
    while (value >= 999.5 && place < units.length - 1) {
      value /= 1000;
      place += 1;
    }
    return (place === 0 ? value.toFixed(0) : value.toPrecision(3)) + " " + units[place];
  },
  counted: (count, word) => `${Words.whole(count)} ${word}${count === 1 ? "" : "s"}`,
  list: (items) => (items.length < 2 ? items.join("") : items.slice(0, -1).join(", ") + " and " + items.at(-1)),
  /* Plotly reads a little markup in its texts; a name is no markup. */
  plain: (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;"),
};

/* What a measure of a probe is called, how it is said, and what it means. */
const MEASURES = {
  log2_scale: { label: "log2 of the scale", say: (v) => Words.fixed(v, 1) },
  underflow_rate: { label: "Underflow", say: Words.percent, percent: true },
  saturation_rate: { label: "Saturation", say: Words.percent, percent: true },
  cosine: { label: "Cosine", say: (v) => Words.fixed(v, 3) },
  sqnr_db: { label: "SQNR, dB", say: (v) => Words.fixed(v, 1) },
  gradient_to_noise: { label: "Gradient to noise", say: (v) => Words.fixed(v, 2) },
};

const OPERANDS = {
  "dgrad.grad_output": "Gradient (dgrad)",
  "wgrad.grad_output": "Gradient (wgrad)",
  "fprop.input": "Input (fprop)",
  "fprop.weight": "Weight (fprop)",
  "dgrad.weight": "Weight (dgrad)",
  "wgrad.input": "Input (wgrad)",
};

/* A recipe's color and dash depend on its place, so that it looks the same in every chart and table of a group. */
function look(group, recipe) {
  const others = group.recipes.map((r) => r.name).filter((name) => name !== group.baseline);
  const place = others.indexOf(recipe);
  return place < 0 ? { name: "--c0", dash: 0 } : { name: `--c${1 + (place % 7)}`, dash: Math.floor(place / 7) % 3 };
}

function swatch(group, recipe) {
  const { name, dash } = look(group, recipe);
  return el("span", { class: "swatch", "data-dash": dash, "--color": `var(${name})`, "aria-hidden": "true" });
}

const number = (text, more = {}) => el("td", { class: "number", ...more }, text);

/* A table that is too wide for a screen scrolls in itself, and can be reached by keyboard. */
function scrolling(label, table) {
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, table);
}

function headings(names) {
  return el("thead", {}, el("tr", {}, names.map(([text, kind]) => el("th", { scope: "col", class: kind }, text))));
}
