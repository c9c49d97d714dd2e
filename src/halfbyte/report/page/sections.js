"use strict";
/* The parts of a group in the order of the page; what concerns layers is in layers.js. */

const withUnit = (group) => (group.unit ? `${group.metric}, ${group.unit}` : group.metric);
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function headline(group) {
  const facts = [
    ["Task", group.description || group.task],
    ["Judged by", `${withUnit(group)}; ${group.higher ? "higher" : "lower"} is better`],
    ["Recipes", Words.list(group.recipes.map((r) => r.name))],
    ["Seeds", group.seeds.join(", ")],
    ["Commit", group.made.commits.length > 1 ? `${group.made.commits.length}, listed below` : group.made.commits[0]],
    ["Machine", group.made.machines.join("; ")],
  ];
  const more = [
    `size ${group.size}`,
    group.stash ? `stash ${group.stash}` : "",
    group.fine_tune ? `${Words.counted(group.fine_tune, "epoch")} of fine-tuning` : "",
  ];
  const many = group.recipes.length > 6;
  if (many) facts[2][1] = `${group.recipes.length}, listed below`;
  return [
    el("h2", {}, `${group.task}, ${group.model}`),
    el("p", { class: "quiet" }, more.filter(Boolean).join(", ")),
    el("dl", { class: "facts" }, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))),
    underWay(group),
  ];
}

function underWay(group) {
  const runs = group.recipes.flatMap((r) => r.running.map((run) => ({ ...run, recipe: r.name })));
  if (!runs.length) return null;
  const line = (run) => {
    const label = `${run.recipe}, seed ${run.seed}: epoch ${run.epoch} of ${run.epochs}`;
    return el(
      "li",
      {},
      el("progress", { max: run.epochs, value: run.epoch, "aria-label": label }),
      ` ${label}, ${run.metric} ${Words.fixed(run.value)} so far`,
    );
  };
  return el("ul", { class: "running", "aria-label": "Runs without a record yet" }, runs.map(line));
}

/* The interval of the difference, drawn to the same scale in every row; the line in the middle is no difference. */
function interval(paired, extent, group, recipe) {
  const [mean, low, high] = paired;
  const at = (value) => 4 + (136 * (value - extent[0])) / (extent[1] - extent[0]);
  const stroke = `var(${look(group, recipe).name})`;
  return svg(
    "svg",
    { class: "interval", viewBox: "0 0 144 18", "aria-hidden": "true" },
    svg("line", { x1: at(0), x2: at(0), y1: 1, y2: 17, stroke: "var(--muted)", "stroke-dasharray": "2 2" }),
    svg("line", { x1: at(low), x2: at(high), y1: 9, y2: 9, stroke, "stroke-width": 2 }),
    svg("circle", { cx: at(mean), cy: 9, r: 3.5, fill: stroke }),
  );
}

function reading(recipe, group) {
  if (recipe.name === group.baseline) return "baseline";
  if (!recipe.paired) return recipe.mean === null ? "" : "needs 3 seeds";
  const [, low, high] = recipe.paired;
  if (low <= 0 && high >= 0) return "no difference seen";
  return low > 0 === group.higher ? "better" : "worse";
}

function gaps(group) {
  const finished = group.recipes.filter((r) => r.mean !== null);
  if (!finished.length) return [el("p", {}, "No run has finished yet.")];
  const ends = finished.flatMap((r) => (r.paired ? r.paired.slice(1) : []));
  const paired = ends.length > 0;
  const reach = [Math.min(0, ...ends), Math.max(0, ...ends)];
  if (reach[0] === reach[1]) reach[1] = reach[0] + 1;
  const spread = (one) => Words.fixed(one.mean) + (one.std === null ? "" : ` ± ${Words.fixed(one.std)}`);
  const measured = (one, runs) => {
    if (one.mean === null) return "";
    if (one.lacking) return `${spread(one)} (${runs - one.lacking} of ${Words.counted(runs, "run")})`;
    return spread(one) + (one.gap === null ? "" : ` (${Words.signed(one.gap)})`);
  };
  const row = (r) => {
    const between = r.paired ? `${Words.signed(r.paired[1])} to ${Words.signed(r.paired[2])}` : "";
    const broken = r.nonfinite ? ` (${Words.counted(r.nonfinite, "tensor")} held NaN or infinity)` : "";
    return el(
      "tr",
      {},
      el("th", { scope: "row", class: "nowrap" }, swatch(group, r.name), " ", el("code", { title: r.about }, r.name)),
      number(String(r.seeds.length), { class: "number wide" }),
      number(spread(r)),
      number(r.gap === null ? "" : Words.signed(r.gap)),
      paired ? number(between) : null,
      paired ? el("td", { class: "wide" }, r.paired ? interval(r.paired, reach, group, r.name) : "") : null,
      el("td", { class: "nowrap" }, reading(r, group) + broken),
      r.further.map((one) => number(measured(one, r.seeds.length))),
    );
  };
  const names = [["Recipe"], ["Seeds", "number wide"], [withUnit(group), "number"], [`Gap to ${group.baseline}`, "number"]];
  if (paired) names.push(["95 % interval", "number"], ["", "wide empty"]);
  names.push(["Reading"], ...group.further.map((name) => [withUnit({ ...group, metric: capital(name) }), "number"]));
  const about = paired
    ? "Mean ± sample standard deviation over seeds. The interval is Student's, of the difference seed by seed."
    : "Mean ± sample standard deviation over seeds. From three seeds on the difference gets an interval.";
  const head = headings(names);
  if (paired) head.querySelector("th.empty").replaceWith(el("td", { class: "wide" }));
  const table = el("table", { class: paired ? null : "fit" }, head, el("tbody", {}, finished.map(row)));
  const more = group.further.length ? ` In brackets behind ${Words.list(group.further)}: the gap.` : "";
  return [el("p", { class: "quiet" }, about + more), scrolling(`Results of ${group.task}, ${group.model}`, table)];
}

/* The end is what counts, and the beginning hides it. */
function secondHalf(line, half) {
  const from = line.epochs.findIndex((epoch) => epoch > half);
  return Object.fromEntries(Object.entries(line).map(([name, values]) => [name, values.slice(Math.max(0, from))]));
}

function curves(group, id, state) {
  const charts = el("div", { class: "charts" });
  const make = (curve) => () => {
    const found = Object.entries(curve.data[state.on] || {}).filter(([name]) => state.shown.has(name));
    const data = [];
    const half = Math.max(...found.map(([, line]) => line.epochs.at(-1))) / 2;
    for (const [recipe, whole] of found) {
      const line = state.range === "end" ? secondHalf(whole, half) : whole;
      const { name, dash } = look(group, recipe);
      const common = { x: line.epochs, mode: "lines", hoverinfo: "skip", line: { width: 0 } };
      if (line.low) {
        data.push({ ...common, y: line.low });
        data.push({ ...common, y: line.high, fill: "tonexty", fillcolor: Charts.faint(name, 0.15) });
      }
      data.push({
        x: line.epochs,
        y: line.mean,
        name: recipe,
        mode: line.mean.length <= 40 ? "lines+markers" : "lines",
        line: { color: Charts.color(name), width: 1.8, dash: ["solid", "dash", "dot"][dash] },
        marker: { size: 3.5, color: Charts.color(name) },
        hovertemplate: `%{y:.4g} in epoch %{x}<extra>${Words.plain(recipe)}</extra>`,
      });
    }
    return [data, Charts.layout(Charts.axis("epoch", { tickformat: "d" }), Charts.axis(""))];
  };
  const draw = (curve) => {
    const ends = Object.entries(curve.data[state.on] || {}).map(([n, line]) => `${n} ${Words.fixed(line.mean.at(-1))}`);
    const unit = curve.label === group.metric && group.unit ? `, ${group.unit}` : "";
    const title = capital(curve.label) + unit;
    return figure(title, `${title} by epoch. At the end: ${ends.join(", ")}.`, make(curve));
  };
  charts.append(...group.curves.map(draw));
  const redraw = () => Charts.again(charts);
  const either = (key) => ([value, text]) =>
    el(
      "label",
      { class: "chip" },
      el("input", {
        type: "radio",
        id: `${id}-${key}-${value}`,
        name: `${id}-${key}`,
        checked: state[key] === value,
        onchange: () => {
          state[key] = value;
          redraw();
        },
      }),
      text,
    );
  const boxes = group.recipes.map((r, place) =>
    el("input", {
      type: "checkbox",
      id: `${id}-show-${place}`,
      checked: state.shown.has(r.name),
      onchange: (event) => {
        state.shown[event.target.checked ? "add" : "delete"](r.name);
        redraw();
      },
    }),
  );
  const every = (checked) => () => {
    state.shown = new Set(checked ? group.recipes.map((r) => r.name) : []);
    boxes.forEach((box) => (box.checked = checked));
    redraw();
  };
  const chips = group.recipes.map((r, place) => el("label", { class: "chip" }, boxes[place], swatch(group, r.name), r.name));
  const many = group.recipes.length > 3;
  return [
    el("h3", {}, "Curves"),
    el("p", { class: "quiet" }, "A line is the mean over seeds, a band goes from the lowest to the highest."),
    el(
      "div",
      { class: "bar" },
      el("fieldset", {}, el("legend", {}, "Measured on"), [["test", "test data"], ["train", "training data"]].map(either("on"))),
      el("fieldset", {}, el("legend", {}, "Epochs"), [["all", "all"], ["end", "second half"]].map(either("range"))),
      el(
        "fieldset",
        {},
        el("legend", {}, "Recipes"),
        many ? el("button", { type: "button", class: "small no-print", onclick: every(true) }, "All") : null,
        many ? el("button", { type: "button", class: "small no-print", onclick: every(false) }, "None") : null,
        chips,
      ),
    ),
    charts,
  ];
}

function meter(share, color) {
  const width = `${Math.max(1, Math.min(100, 100 * share)).toFixed(1)}%`;
  return el("span", { class: "meter", "aria-hidden": "true" }, el("span", { "--share": width, "--color": color }));
}

function costs(group) {
  const rows = group.recipes.filter((r) => r.mean !== null);
  if (!rows.length) return [];
  const most = (name) => Math.max(...rows.map((r) => r[name] || 0));
  const [kept, peak, step] = ["kept", "peak", "step_ratio"].map(most);
  const cell = (text, value, all, color) => number([text, value === null || !all ? "" : meter(value / all, color)]);
  const row = (r) => {
    const color = `var(${look(group, r.name).name})`;
    const ratio = r.kept_ratio === null || r.name === group.baseline ? "" : ` (${Words.ratio(r.kept_ratio)})`;
    return el(
      "tr",
      {},
      el("th", { scope: "row", class: "nowrap" }, swatch(group, r.name), " ", el("code", {}, r.name)),
      cell(Words.bytes(r.kept) + ratio, r.kept, kept, color),
      peak ? cell(Words.bytes(r.peak), r.peak, peak, color) : null,
      cell(Words.ratio(r.step_ratio), r.step_ratio, step, color),
    );
  };
  const names = [["Recipe"], ["Kept for backward", "number"]];
  if (peak) names.push(["Peak memory of the process", "number"]);
  names.push([`Time of a step, ${group.baseline}'s = 1`, "number"]);
  const about =
    "Kept for backward is what the network held between forward and backward at the first batch, parameters aside. " +
    "Times are ratios, and there only where one machine ran all of the same sources. What else the machine did during a run is in them: halfbyte bench measures speed side by side.";
  const table = el("table", { class: "fit" }, headings(names), el("tbody", {}, rows.map(row)));
  return [
    el("h3", {}, "Memory and time"),
    el("p", { class: "quiet" }, about),
    scrolling(`Memory and time of ${group.task}, ${group.model}`, table),
  ];
}

function modeled(group) {
  const found = group.modeled;
  if (!found) return [];
  const row = (r) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, el("code", {}, r.recipe)),
      number(Words.whole(r.cycles)),
      number(Words.ratio(r.faster)),
      number(Words.fixed(r.energy_pj / 1e6, 1)),
      number(Words.ratio(r.less_energy)),
    );
  const names = [["Recipe"], ["Cycles", "number"], [`Faster than ${found.base}`, "number"], ["Energy, µJ", "number"]];
  names.push([`Less energy than ${found.base}`, "number"]);
  const table = el("table", { class: "fit" }, headings(names), el("tbody", {}, found.rows.map(row)));
  const without = found.left_out.length ? ` It has no arrays for ${Words.list(found.left_out)}.` : "";
  return [
    el("h3", {}, "On an accelerator, modeled"),
    el(
      "p",
      { class: "quiet" },
      `One training step of ${found.batch} samples on ${found.machine}: ${found.what}. Nothing of this was measured.${without}`,
    ),
    scrolling(`Modeled cycles and energy of ${group.task}, ${group.model}`, table),
  ];
}

function made(group) {
  const told = [...group.made.versions, ...group.made.machines];
  const mixed = group.made.commits.length > 1;
  if (!mixed) told.push(`commit ${group.made.commits[0]}`);
  const ran = group.recipes.map((r) => el("li", {}, `${r.name}: ${r.runs}`));
  const settings = Object.entries(group.made.settings)
    .filter(([, value]) => value !== null && value !== "" && value !== 0 && !(Array.isArray(value) && !value.length))
    .map(([name, value]) => `${name.replace(/_/g, " ")} ${value}`);
  return [
    el("h3", {}, "How it was made"),
    el(
      "div",
      { class: "made quiet" },
      el("code", {}, group.made.command),
      el("p", {}, told.join("; ")),
      mixed ? el("ul", { "aria-label": "Commits" }, ran) : null,
      el("p", {}, settings.join(", ")),
      group.notes.length ? el("ul", {}, group.notes.map((note) => el("li", {}, note))) : null,
    ),
  ];
}
