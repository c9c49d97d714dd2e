// Chapter 5: one gradient, two sets of levels, two errors and their sum.
{
  const { inputs, even, odd, together, twice, signs, rms } = data.phases;
  const gradient = $("gradient");
  const edge = { left: 54, right: 14 };
  const LOST = -1.3; // Sums below this leave the drawing.
  const [first, last] = [inputs[0], inputs[inputs.length - 1]].map(Math.log2);
  gradient.max = inputs.length - 1;

  const draw = drawing("ladders", (add, width, height) => {
    const across = (x) => edge.left + ((Math.log2(x) - first) / (last - first)) * (width - edge.left - edge.right);
    const k = Number(gradient.value);
    const here = across(inputs[k]);
    const [top, floor] = [148, height - 26];
    const narrow = width < 480 ? "narrow" : "";
    const up = (error) => top + ((1.3 - error) / 2.6) * (floor - top);

    ladder("even", even, 34, -12);
    ladder("odd", odd, 92, 24);
    add("circle", { cx: here, cy: 63, r: 9, class: "handle" });

    function ladder(name, phase, y, text) {
      add("text", { x: 0, y: y + 4, class: name }, name);
      add("line", { x1: edge.left, x2: width - edge.right, y1: y, y2: y, class: "axis" });
      phase.levels.forEach((level) => {
        const on = phase.values[k] === level;
        add("rect", { x: across(level) - 2, y: y - 8, width: 4, height: 16, rx: 2, class: `dot ${name}`, "fill-opacity": on ? 1 : 0.35 });
        const words = phase.labels[phase.values.indexOf(level)];
        add("text", { x: across(level), y: y + text, "text-anchor": "middle", class: on ? name : "" }, words);
      });
      if (phase.values[k]) add("line", { x1: here, y1: 63, x2: across(phase.values[k]), y2: y, class: `line ${name}` });
    }

    for (const share of [-1, -0.5, 0, 0.5, 1]) {
      add("line", { x1: edge.left, x2: width - edge.right, y1: up(share), y2: up(share), class: share ? "grid" : "axis" });
      const words = share ? `${signed(100 * share, 0)} %` : "0";
      add("text", { x: edge.left - 8, y: up(share) + 4, "text-anchor": "end" }, words);
    }
    const jumps = (phase) => (j) => phase.values[j] !== phase.values[j - 1];
    const both = (j) => jumps(even)(j) || jumps(odd)(j);
    const curve = (errors, cut, name) => {
      const shown = errors.map((error, j) => [across(inputs[j]), up(error), error >= LOST]);
      add("path", { d: path(shown, cut), class: `line ${name} ${narrow}` });
    };
    curve(twice, jumps(even), "other");
    curve(even.error, jumps(even), "even");
    curve(odd.error, jumps(odd), "odd");
    curve(together, both, "sum");
    add("line", { x1: here, x2: here, y1: 72, y2: floor, class: "thin" });
    const dots = [[even.error, "even"], [odd.error, "odd"], [together, "ink"]];
    for (const [errors, name] of dots)
      if (errors[k] >= LOST) add("circle", { cx: here, cy: up(errors[k]), r: 4.5, class: `dot ${name}` });
    for (let octave = first; octave <= last; octave += width < 480 ? 4 : 2) {
      const x = across(2 ** octave);
      add("text", { x, y: height - 6, "text-anchor": "middle" }, octave < 0 ? `1/${2 ** -octave}` : String(2 ** octave));
    }
  });

  draggable("ladders", (x, width) => {
    const share = (x - edge.left) / (width - edge.left - edge.right);
    move(gradient, Math.round(share * (inputs.length - 1)));
  });

  follow([gradient], () => {
    const k = Number(gradient.value);
    const share = (x) => `${signed(100 * x, 0)} %`;
    $("gradient-in").textContent = short(inputs[k]);
    $("gradient-even").textContent = label(even.labels[k]);
    $("gradient-odd").textContent = label(odd.labels[k]);
    $("gradient-errors").textContent = `${share(even.error[k])}, ${share(odd.error[k])}`;
    $("gradient-sum").textContent = share(together[k]);
    const words = `${short(inputs[k])} becomes ${even.labels[k]} for dgrad and ${odd.labels[k]} for wgrad`;
    gradient.setAttribute("aria-valuetext", words);
    draw();
  });

  const percent = (x) => `${decimals(100 * x, 0)} %`;
  $("phases-facts").textContent =
    `Over numbers of all sizes in their range the two errors point apart in ${percent(signs.apart)} of the cases, both down in ` +
    `${percent(signs.both_down)}, and ${signs.both_up ? `both up in ${percent(signs.both_up)}` : "never both up"}. ` +
    `Their sum has a typical size (root mean square) of ${percent(rms.together)}; with one phase it would be ` +
    `${percent(rms.twice)}.`;
}
