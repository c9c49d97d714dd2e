"use strict";
/* The layers of a recipe: all at a glance, a table that a word filters, and each layer's charts when it is opened. */

const withName = (row) => row.name || "(model)";

/* From the first layer to the last: blue to orange, through what both kinds of color blindness tell apart. */
function depth(place, count) {
  const share = count < 2 ? 0 : place / (count - 1);
  const light = matchMedia("print").matches || getComputedStyle(document.documentElement).colorScheme !== "dark";
  return `hsl(${(215 + 175 * share) % 360}, ${light ? 65 : 70}%, ${light ? 42 : 66}%)`;
}

function matching(view, words) {
  const terms = words.toLowerCase().split(/\s+/).filter(Boolean);
  const text = (row) => [row.name, row.type, row.recipe, row.why, row.fprop, row.dgrad, row.wgrad].join(" ").toLowerCase();
  return view.rows.map((row, place) => ({ row, place })).filter(({ row }) => terms.every((term) => text(row).includes(term)));
}

function spark(values, color) {
  const there = values.map((v, i) => [i, v]).filter(([, v]) => v !== null && v !== undefined);
  if (there.length < 2) return "";
  const all = there.map(([, v]) => v);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const x = (i) => (110 * i) / (values.length - 1) + 1;
  const y = (v) => (high === low ? 12 : 21 - (18 * (v - low)) / (high - low));
  const points = there.map(([i, v]) => `${x(i).toFixed(1)},${y(v).toFixed(1)}`).join(" ");
  return svg(
    "svg",
    { class: "spark", viewBox: "0 0 112 24", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("polyline", { points, fill: "none", stroke: color, "stroke-width": 1.5, "vector-effect": "non-scaling-stroke" }),
  );
}

function overview(view, state, rows) {
  const measure = MEASURES[state.measure];
  const own = rows.filter(({ row }) => row.slots[state.slot] && row.slots[state.slot][state.measure]);
  const values = ({ row }) => row.slots[state.slot][state.measure];
  const y = measure.percent ? { tickformat: ".0%", rangemode: "tozero" } : {};
  if (state.as === "lines") {
    const series = own.map(({ row, place }) => ({
      x: view.steps,
      y: values({ row }),
      name: withName(row),
      color: depth(place, view.rows.length),
      width: 1.4,
    }));
    return lines(series, "batch", "", { y: { ...y, hoverformat: measure.percent ? ".1%" : ".4g" } });
  }
  const short = (name) => (name.length > 26 ? "…" + name.slice(-25) : name);
  const fmt = measure.percent ? ".1%" : ".4g";
  const data = {
    type: "heatmap",
    z: own.map(values),
    x: view.steps.map(String),
    y: own.map(({ place }) => String(place)),
    customdata: own.map(({ row }) => view.steps.map(() => Words.plain(withName(row)))),
    colorscale: [[0, Charts.faint("--c1", 0.06)], [1, Charts.color("--c1")]],
    colorbar: { thickness: 10, outlinewidth: 0, tickformat: measure.percent ? ".0%" : "" },
    hovertemplate: `%{customdata}<br>batch %{x}: %{z:${fmt}}<extra></extra>`,
    xgap: 0.5,
    ygap: 0.5,
  };
  const every = Math.max(1, Math.ceil(own.length / 22));
  const ticks = own.filter((_, i) => i % every === 0);
  const names = {
    type: "category",
    autorange: "reversed",
    tickvals: ticks.map(({ place }) => String(place)),
    ticktext: ticks.map(({ row }) => Words.plain(short(withName(row)))),
  };
  return [[data], Charts.layout(Charts.axis("batch", { type: "category", nticks: 8, tickangle: 0 }), Charts.axis("", names))];
}

/* How often each code was used: a column a step, a row a value, zero in the middle. */
function codesChart(found, entry, part, view) {
  const format = found.formats[entry.formats[part]];
  const pictures = entry.codes[part];
  const count = Math.max(...pictures.map((p) => (p ? p.length : 0)));
  const order = format ? format.order : [...Array(count).keys()];
  const value = (i) => (format ? Number(format.values[i].toPrecision(4)) : `code ${order[i]}`);
  const rows = order.map((_, i) => i);
  const data = {
    type: "heatmap",
    z: order.map((code) => pictures.map((p) => (p ? p[code] / 10000 : null))),
    x: view.pictured.map(String),
    y: rows,
    customdata: order.map((_, i) => pictures.map(() => value(i))),
    colorscale: [[0, Charts.faint("--c1", 0.04)], [0.15, Charts.faint("--c1", 0.45)], [1, Charts.color("--c1")]],
    zmin: 0,
    colorbar: { thickness: 8, outlinewidth: 0, tickformat: ".0%" },
    hovertemplate: "%{customdata}: %{z:.2%} in batch %{x}<extra></extra>",
    xgap: 1,
    ygap: 1,
  };
  const ticks = rows.filter((i) => order.length <= 8 || i % 3 === 0 || i === order.length - 1);
  const y = { tickvals: ticks, ticktext: ticks.map((i) => String(value(i))) };
  return [[data], Charts.layout(Charts.axis("batch", { type: "category", nticks: 5, tickangle: 0 }), Charts.axis("", y))];
}

function detail(found, view, row, state) {
  const entry = row.slots[state.slot];
  if (!entry) return el("p", { class: "quiet" }, "Nothing was seen of this operand in this layer.");
  const name = withName(row);
  const one = (key, color) => ({ x: view.steps, y: entry[key], name: MEASURES[key].label, color: Charts.color(color) });
  const chart = (caption, keys, more) =>
    figure(
      caption,
      `${caption} of ${name}; at the end ${keys.map((k) => `${MEASURES[k].label} ${MEASURES[k].say(entry[k].at(-1))}`).join(", ")}`,
      () => lines(keys.map((key, place) => one(key, `--c${1 + place}`)), "batch", "", more),
    );
  const shares = { y: { tickformat: ".0%", rangemode: "tozero", hoverformat: ".2%" } };
  const charts = [
    chart("Scale, log2", ["log2_scale"]),
    chart("Underflow (blue) and saturation (orange)", ["underflow_rate", "saturation_rate"], shares),
    chart("Cosine to the operand before", ["cosine"]),
    chart("SQNR, dB", ["sqnr_db"]),
  ];
  if (entry.gradient_to_noise) charts.push(chart("Gradient to noise; below 1 learning stalls", ["gradient_to_noise"]));
  (entry.codes || []).forEach((_, part) => {
    const format = entry.formats[part] || "codes";
    const caption = `How often each value of ${format} was used`;
    charts.push(figure(caption, `${caption} by ${name}`, () => codesChart(found, entry, part, view), "codes"));
  });
  const what = [formatsOf(row) && `fprop / dgrad / wgrad: ${formatsOf(row)}`, row.state].filter(Boolean).join("; ");
  return el("div", {}, what ? el("p", { class: "quiet" }, what) : null, el("div", { class: "charts small-ones" }, charts));
}

function layerTable(found, view, state, rows, id) {
  const columns = ["underflow_rate", "saturation_rate", "sqnr_db", "cosine", "log2_scale"];
  const probed = view.steps.length > 0;
  const opens = view.steps.length > 1;
  const body = el("tbody");
  for (const { row, place } of rows) {
    const entry = row.slots[state.slot];
    const last = (key) => (entry && entry[key] ? MEASURES[key].say(entry[key].at(-1)) : "");
    const box = `${id}-layer-${place}`;
    const open = state.open.has(withName(row));
    const button = el(
      "button",
      { type: "button", class: "open", id: box, "aria-expanded": String(open), "aria-controls": open ? `${box}-more` : null },
      el("code", {}, withName(row)),
    );
    const line = el(
      "tr",
      {},
      el("th", { scope: "row" }, opens && entry ? button : el("code", {}, withName(row))),
      el("td", { class: "wide" }, row.type || ""),
      el("td", {}, row.recipe || ""),
      el("td", { class: "wide" }, row.why || ""),
      probed ? columns.map((key) => number(last(key))) : null,
      opens ? el("td", {}, entry && entry[state.measure] ? spark(entry[state.measure], depth(place, view.rows.length)) : "") : null,
      opens ? null : el("td", { class: "wide" }, el("code", {}, formatsOf(row))),
    );
    body.append(line);
    const show = () => {
      const inner = detail(found, view, row, state);
      const width = line.children.length;
      line.after(el("tr", { class: "detail", id: `${box}-more` }, el("td", { colspan: width }, inner)));
    };
    if (open && opens && entry) show();
    button.addEventListener("click", () => {
      const more = document.getElementById(`${box}-more`);
      if (more) {
        Charts.forget(more);
        more.remove();
        state.open.delete(withName(row));
      } else {
        state.open.add(withName(row));
        show();
      }
      button.setAttribute("aria-expanded", String(!more));
      if (more) button.removeAttribute("aria-controls");
      else button.setAttribute("aria-controls", `${box}-more`);
    });
  }
  const names = [["Layer"], ["Type", "wide"], ["Recipe"], ["By rule", "wide"]];
  if (probed) names.push(...columns.map((key) => [MEASURES[key].label, "number"]));
  if (opens) names.push(["Over the run"]);
  else names.push(["fprop / dgrad / wgrad", "wide"]);
  return el("table", {}, headings(names), body);
}

function formatsOf(row) {
  const all = [row.fprop, row.dgrad, row.wgrad];
  return all.every((text) => !text || text === "-") ? "" : all.join(" / ");
}

function layerView(found, group, id, state) {
  const recipes = Object.keys(group.layers);
  if (!recipes.length) return [];
  if (!recipes.includes(state.recipe)) state.recipe = recipes.includes("ibm2020") ? "ibm2020" : recipes[0];
  const frame = el("div");
  const count = el("output", { class: "quiet", "for": `${id}-filter` });
  const part = el("div");

  function refresh() {
    const view = group.layers[state.recipe];
    const rows = matching(view, state.filter);
    count.textContent = `${rows.length} of ${Words.counted(view.rows.length, "layer")}`;
    Charts.forget(part);
    const seen = view.steps.length > 1;
    const label = `${MEASURES[state.measure].label} of every layer by batch; the table below has the last values`;
    const chart = seen ? figure(`${MEASURES[state.measure].label}, layer by layer`, label, () => overview(view, state, rows), "map") : null;
    const table = layerTable(found, view, state, rows, id);
    part.replaceChildren(...[chart, scrolling(`Layers of ${group.task}, ${group.model}, under ${state.recipe}`, table)].filter(Boolean));
  }

  function choice(label, key, options, rebuilt) {
    const picked = (event) => {
      state[key] = event.target.value;
      rebuilt();
    };
    const items = options.map(([value, text]) => el("option", { value, selected: state[key] === value }, text));
    return el("label", { class: "field" }, label, el("select", { id: `${id}-${key}`, onchange: picked }, items));
  }

  function rebuild() {
    const view = group.layers[state.recipe];
    const slots = [...new Set(view.rows.flatMap((row) => Object.keys(row.slots)))];
    const order = Object.keys(OPERANDS);
    slots.sort((a, b) => order.indexOf(a) - order.indexOf(b));
    if (!slots.includes(state.slot)) state.slot = slots[0] || "";
    const measures = Object.keys(MEASURES).filter((m) => view.rows.some((r) => r.slots[state.slot] && r.slots[state.slot][m]));
    if (!measures.includes(state.measure)) state.measure = measures[0] || "log2_scale";
    if (!state.as) state.as = view.rows.length <= 24 ? "lines" : "map";
    const seeds = view.seeds > 1 ? ` Means over ${view.seeds} seeds.` : "";
    const filter = el("input", {
      type: "search",
      id: `${id}-filter`,
      value: state.filter,
      autocomplete: "off",
      spellcheck: "false",
      placeholder: "name, type, rule or format",
      oninput: (event) => {
        state.filter = event.target.value;
        refresh();
      },
    });
    const after = () => {
      Charts.forget(frame);
      const focus = document.activeElement && document.activeElement.id;
      rebuild();
      if (focus && document.getElementById(focus)) document.getElementById(focus).focus();
    };
    frame.replaceChildren(
      ...[
        el("p", { class: "quiet" }, about(view) + seeds),
        el(
          "div",
          { class: "bar" },
          choice("Recipe", "recipe", recipes.map((name) => [name, name]), after),
          slots.length ? choice("Operand", "slot", slots.map((slot) => [slot, OPERANDS[slot] || slot]), after) : null,
          measures.length ? choice("Measure", "measure", measures.map((m) => [m, MEASURES[m].label]), refresh) : null,
          view.steps.length > 1 ? choice("Drawn as", "as", [["lines", "lines"], ["map", "map"]], refresh) : null,
          el("label", { class: "field no-print" }, "Filter layers", filter),
          count,
        ),
        part,
      ].filter(Boolean),
    );
    refresh();
  }

  rebuild();
  return [el("h3", {}, "Layers"), frame];
}

function about(view) {
  if (!view.steps.length) return "Which rule gave each layer its recipe. The records hold nothing that probes saw.";
  if (view.steps.length === 1) return "Which rule gave each layer its recipe, and what quantization did to it at the last batch.";
  return "Which rule gave each layer its recipe, and what quantization did to it over the run; numbers are of the last batch.";
}
