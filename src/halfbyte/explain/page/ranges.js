// Chapter 3: one ruler that stays and one that is stretched. Every range on the grid is a row of a table.
{
  const PLACES = 20; // Of the grid, from 0 to 1.
  const low = $("low");
  const high = $("high");
  const edge = 14;
  const row = () => data.ranges.rows[`${low.value},${high.value}`];

  function lane(add, across, title, y, { inputs, integers }, levels) {
    const bottom = y + 92;
    add("text", { x: edge, y, class: "big" }, title);
    inputs.forEach((x, k) => {
      const level = levels[integers[k] + 8];
      const from = across(x);
      const to = across(level);
      const opacity = Math.min(1, 0.18 + 18 * Math.abs(level - x));
      add("line", { x1: from, y1: y + 26, x2: to, y2: bottom, class: "line", "stroke-opacity": opacity });
      add("circle", { cx: from, cy: y + 24, r: 3, class: "dot ink" });
    });
    add("line", { x1: across(0), x2: across(1), y1: bottom, y2: bottom, class: "axis" });
    const gap = across(levels[1]) - across(levels[0]);
    const every = [1, 3, 15].find((count) => count * gap > 26) ?? 15;
    levels.forEach((level, k) => {
      add("line", { x1: across(level), x2: across(level), y1: bottom - 5, y2: bottom + 5, class: "thin" });
      if (k % every) return;
      const crowded = every * gap <= 26; // Then the two labels that are left move apart.
      const x = across(level) + (crowded ? (k ? 4 : -4) : 0);
      const anchor = crowded ? (k ? "start" : "end") : "middle";
      add("text", { x, y: bottom + 20, "text-anchor": anchor }, label(String(k - 8)));
    });
  }

  const draw = drawing("rulers", (add, width, height) => {
    const across = (x) => edge + x * (width - 2 * edge);
    const { inputs, levels, own, fixed } = row();
    const ends = [low.value / PLACES, high.value / PLACES];
    for (const end of ends) add("line", { x1: across(end), x2: across(end), y1: 30, y2: height - 8, class: "dash" });
    lane(add, across, "A fixed ruler", 16, { inputs, integers: fixed.integers }, data.ranges.fixed);
    lane(add, across, "Stretched to this round", 170, { inputs, integers: own.integers }, levels);
    for (const end of ends) add("circle", { cx: across(end), cy: height - 10, r: 8, class: "handle" });
  });

  let held = low;
  draggable("rulers", (x, width, first) => {
    const place = Math.round(((x - edge) / (width - 2 * edge)) * PLACES);
    if (first) held = Math.abs(place - low.value) <= Math.abs(place - high.value) ? low : high;
    move(held, held === low ? Math.min(place, high.value - 1) : Math.max(place, Number(low.value) + 1));
  });

  // The ends never meet: the one that is moved stops before the other.
  low.addEventListener("input", () => (low.value = Math.min(low.value, high.value - 1)));
  high.addEventListener("input", () => (high.value = Math.max(high.value, Number(low.value) + 1)));
  const buttons = [...document.querySelectorAll("[data-range]")];

  function show() {
    for (const end of [low, high]) end.setAttribute("aria-valuetext", decimals(end.value / PLACES, 2));
    for (const button of buttons)
      button.setAttribute("aria-pressed", String(button.dataset.range === `${low.value},${high.value}`));
    for (const ruler of ["fixed", "own"]) {
      $(`${ruler}-used`).textContent = `${row()[ruler].used} of 16`;
      $(`${ruler}-error`).textContent = decimals(row()[ruler].error, 4);
    }
    draw();
  }

  for (const button of buttons)
    button.addEventListener("click", () => {
      [low.value, high.value] = button.dataset.range.split(",");
      show();
    });
  follow([low, high], show);
}
