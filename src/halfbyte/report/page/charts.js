"use strict";
/* Charts are drawn when they come into view, and again when the colors change. */

const Charts = (() => {
  const known = new Map();
  const CONFIG = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: "reset" };
  let begun = false;
  const near = new IntersectionObserver(
    (entries) => entries.forEach((entry) => entry.isIntersecting && draw(entry.target)),
    { rootMargin: "150px" },
  );

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function faint(name, share) {
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(color(name).slice(at, at + 2), 16));
    return `rgba(${r},${g},${b},${share})`;
  }

  function axis(title, more = {}) {
    return {
      title: { text: title, standoff: 8, font: { size: 12 } },
      gridcolor: color("--line"),
      linecolor: color("--line"),
      zeroline: false,
      automargin: true,
      exponentformat: "power",
      ...more,
    };
  }

  function layout(x, y, more = {}) {
    const transparent = "rgba(0,0,0,0)";
    return {
      paper_bgcolor: transparent,
      plot_bgcolor: transparent,
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("--muted") },
      margin: { l: 52, r: 10, t: 10, b: 40 },
      showlegend: false,
      hovermode: "closest",
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      hoverlabel: {
        bgcolor: color("--surface"),
        bordercolor: color("--line"),
        font: { color: color("--ink") },
        namelength: -1,
      },
      xaxis: x,
      yaxis: y,
      ...more,
    };
  }

  function draw(node) {
    const chart = known.get(node);
    if (!begun || !chart || chart.drawn) return;
    chart.drawn = true;
    const [data, shape] = chart.make();
    Plotly.react(node, data, shape, CONFIG);
  }

  /* Takes a node of fixed height and a function that returns traces and layout. */
  function add(node, make) {
    known.set(node, { make, drawn: false });
    near.observe(node);
  }

  /* Draws anew those charts that are drawn, in today's colors and of today's choice. */
  function again(within = document) {
    for (const [node, chart] of known) {
      if (!chart.drawn || !within.contains(node)) continue;
      chart.drawn = false;
      draw(node);
    }
  }

  function all() {
    begin();
    for (const node of known.keys()) draw(node);
  }

  function forget(within) {
    for (const node of [...known.keys()]) {
      if (!within.contains(node)) continue;
      near.unobserve(node);
      if (known.get(node).drawn) Plotly.purge(node);
      known.delete(node);
    }
  }

  /* Plotly is nearly all of the file. It waits as text until the tables are on the screen, and is read then. */
  function begin() {
    if (begun) return;
    begun = true;
    const waiting = document.getElementById("plotly");
    document.head.append(el("script", {}, waiting.textContent));
    waiting.remove();
    for (const node of known.keys()) {
      near.unobserve(node);
      near.observe(node);
    }
  }

  addEventListener("beforeprint", all);
  matchMedia("print").addEventListener("change", () => again());
  return { add, again, axis, begin, color, faint, forget, layout };
})();

/* A chart with its caption; what it shows is said in words to those who do not see it. */
function figure(caption, label, make, kind = "") {
  const node = el("div", { class: `chart ${kind}`.trim(), role: "img", "aria-label": label });
  Charts.add(node, make);
  return el("figure", {}, el("figcaption", {}, caption), node);
}

/* A quiet line chart of one thing over steps. */
function lines(series, x, y, more = {}) {
  const few = (points) => (points.length <= 40 ? "lines+markers" : "lines");
  const data = series.map((one) => ({
    x: one.x,
    y: one.y,
    name: Words.plain(one.name),
    mode: few(one.y),
    line: { color: one.color, width: one.width || 1.8, dash: one.dash },
    marker: { size: 3.5, color: one.color },
    hovertemplate: `%{y}<extra>${Words.plain(one.name)}</extra>`,
  }));
  return [data, Charts.layout(Charts.axis(x, { tickformat: ",d", nticks: 6 }), Charts.axis(y, more.y), more.layout)];
}
