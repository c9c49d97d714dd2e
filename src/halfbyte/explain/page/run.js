// Chapter 6: a recorded run, look by look. One hexadecimal digit of the record is one code.
{
  const { about, classes, loss, accuracy, answers, fp32, tensors } = data.run;
  const looks = about.steps.length;
  const step = $("step");
  const neuron = $("neuron");
  const play = $("play");
  let digit = 3;
  step.max = looks - 1;

  for (const [k, name] of [...classes].entries()) {
    const choice = document.createElement("label");
    const radio = Object.assign(document.createElement("input"), { type: "radio", name: "digit", value: k, checked: k === digit });
    const words = Object.assign(document.createElement("span"), { textContent: name });
    choice.append(radio, words);
    $("digits").append(choice);
    radio.addEventListener("input", () => {
      digit = k;
      show();
    });
  }

  // ---- The panels: each shows a piece of a tensor as cells ----

  const panels = [];
  let shelf;

  function group(words, className) {
    shelf = Object.assign(document.createElement("div"), { className: `tensors ${className}` });
    $("tensors").append(Object.assign(document.createElement("p"), { textContent: words, className: "group" }), shelf);
  }

  /**
   * @param title what the panel is called
   * @param name of the tensor
   * @param cells how many codes are shown, in rows of `columns`; `first()` says where in the tensor they begin
   * @param options `numbers`: whether each cell shows its number; `tile`: rows and columns of a tile, for many tiles
   */
  function panel(title, name, cells, columns, first, { numbers = false, tile = 0 } = {}) {
    const box = document.createElement("div");
    const back = name.includes("grad");
    box.className = numbers && cells === 64 ? "roomy" : "";
    const words = document.createElement("p");
    const [wide, tall] = back ? [32, 20] : numbers ? [20, 20] : [6, 6];
    const gap = numbers ? 1 : 0.4;
    const at = (k) => {
      if (!tile) return [(k % columns) * wide, Math.floor(k / columns) * tall];
      const [which, inside] = [Math.floor(k / (tile * tile)), k % (tile * tile)];
      const size = tile * wide + 4;
      return [(which % columns) * size + (inside % tile) * wide, Math.floor(which / columns) * size + Math.floor(inside / tile) * tall];
    };
    const [x, y] = at(cells - 1);
    const svg = shape("svg", { viewBox: `-1 -1 ${x + wide + 2} ${y + tall + 2}`, role: "img" });
    if (numbers) svg.style.maxWidth = `${(columns * wide) / 10}rem`;
    const rects = [];
    const texts = [];
    for (let k = 0; numbers && k < cells; k++) {
      const [left, top] = at(k);
      rects.push(shape("rect", { x: left, y: top, width: wide - gap, height: tall - gap, rx: 2 }));
      texts.push(shape("text", { x: left + (wide - gap) / 2, y: top + (tall - gap) / 2 + 0.5 }, ""));
    }
    // Small cells come by the hundred: one path a shade draws them all.
    const paths = numbers ? [] : [...Array(16).keys()].map((shade) => shape("path", { class: `q${shade}` }));
    const cell = `h${wide - gap}v${tall - gap}h${gap - wide}z`;
    svg.append(...rects, ...texts, ...paths);
    const pick = tile ? shape("rect", { class: "pick", width: tile * wide + 2, height: tile * tall + 2, rx: 1 }) : null;
    if (pick) svg.append(pick);
    const heading = Object.assign(document.createElement("h3"), { textContent: title });
    box.append(heading, words, svg);
    shelf.append(box);
    panels.push({ title, heading, name, cells, first, svg, rects, texts, paths, cell, words, pick, at, back });
  }

  function paint({ title, heading, name, cells, first, svg, rects, texts, paths, cell, words, pick, at, back }) {
    const { format, codes, ends, octaves } = tensors[name];
    const { shades, labels } = data.formats[format];
    const look = Number(step.value);
    const from = first();
    const drawn = paths.map(() => "");
    for (let k = 0; k < cells; k++) {
      const code = parseInt(codes[look][from + k], 16);
      if (paths.length) {
        drawn[shades[code]] += `M${at(k).join(" ")}${cell}`;
        continue;
      }
      rects[k].setAttribute("class", `q${shades[code]}`);
      texts[k].textContent = label(labels[code]);
      texts[k].setAttribute("class", `n${shades[code]}${back && labels[code].length > 3 ? " fraction" : ""}`);
    }
    paths.forEach((path, shade) => path.setAttribute("d", drawn[shade]));
    heading.textContent = typeof title === "function" ? title() : title;
    words.textContent = back
      ? `raised by ${power("2", octaves[look])}, rounded to the ${format.endsWith("odd") ? "odd" : "even"} phase`
      : `${ends[look].map((end) => decimals(end, 2)).join(" to ")}, as −8 to 7`;
    svg.setAttribute("aria-label", `${heading.textContent}: ${cells} codes, ${words.textContent}`);
    if (pick) {
      const [x, y] = at((neuron.value - 1) * 64);
      pick.setAttribute("x", x - 1.2);
      pick.setAttribute("y", y - 1.2);
    }
  }

  const mine = (count) => () => digit * count;
  const whole = () => 0;
  group("Forward. A digit goes in; each layer multiplies it by its weights and hands on what is above zero.", "forward");
  panel("The digit", "stem.fprop.input", 64, 8, mine(64), { numbers: true });
  panel(() => `Weights of unit ${neuron.value}`, "stem.fprop.weight", 64, 8, () => (neuron.value - 1) * 64, { numbers: true });
  panel("Layer 1: 16 units, 64 weights each", "stem.fprop.weight", 1024, 4, whole, { tile: 8 });
  panel("What layer 1 hands on", "body.fprop.input", 16, 4, mine(16), { numbers: true });
  panel("Layer 2: 16 units, 16 weights each", "body.fprop.weight", 256, 16, whole);
  panel("What layer 2 hands on", "head.fprop.input", 16, 4, mine(16), { numbers: true });
  panel("Layer 3: 10 answers, 16 weights each", "head.fprop.weight", 160, 16, whole);
  group("Backward. From the answer's error, a gradient for each unit: once for the layer below, once for the weights.", "back");
  panel("Answers 0 to 9, for the layer below", "head.dgrad.grad_output", 10, 5, mine(10), { numbers: true });
  panel("Answers 0 to 9, for the weights", "head.wgrad.grad_output", 10, 5, mine(10), { numbers: true });
  panel("Layer 2, for the layer below", "body.dgrad.grad_output", 16, 4, mine(16), { numbers: true });
  panel("Layer 2, for the weights", "body.wgrad.grad_output", 16, 4, mine(16), { numbers: true });
  panel("Layer 1, for the weights", "stem.wgrad.grad_output", 16, 4, mine(16), { numbers: true });

  for (let shade = 0; shade < 16; shade++)
    $("key").append(shape("rect", { x: shade * 16, y: 0, width: 15, height: 16, rx: 2, class: `q${shade}` }));

  // ---- The curve ----

  const edge = { left: 44, right: 96, top: 12, bottom: 26 };
  const drawCurve = drawing("curve", (add, width, height) => {
    const across = (look) => edge.left + (look / (looks - 1)) * (width - edge.left - edge.right);
    const up = (share) => edge.top + (1 - share / 100) * (height - edge.top - edge.bottom);
    for (const share of [0, 50, 100]) {
      add("line", { x1: edge.left, x2: across(looks - 1), y1: up(share), y2: up(share), class: share ? "grid" : "axis" });
      add("text", { x: edge.left - 8, y: up(share) + 4, "text-anchor": "end" }, `${share} %`);
    }
    const every = width < 480 ? 4 : 2;
    const marked = [0, 8, 16, 24, 32, 40, 48, looks - 1].filter((look, k) => k % every === 0 || look === looks - 1);
    for (const look of marked)
      add("text", { x: across(look), y: height - 6, "text-anchor": "middle" }, `${look ? "" : "step "}${about.steps[look]}`);
    for (const [curve, name] of [[fp32.accuracy, "other"], [accuracy, ""]])
      add("path", { d: path(curve.map((share, look) => [across(look), up(share)])), class: `line ${name}` });
    const [four, many] = [accuracy, fp32.accuracy].map((curve) => up(curve[looks - 1]));
    const apart = many < four ? [Math.max(four, many + 15), many] : [four, Math.max(many, four + 15)];
    add("text", { x: across(looks - 1) + 10, y: apart[0] + 6, class: "on" }, "four bits");
    add("text", { x: across(looks - 1) + 10, y: apart[1] + 2 }, "32 bits");
    const look = Number(step.value);
    add("line", { x1: across(look), x2: across(look), y1: edge.top, y2: up(0), class: "thin" });
    add("circle", { cx: across(look), cy: up(accuracy[look]), r: 7, class: "handle" });
  });

  draggable("curve", (x, width) => {
    stop();
    move(step, Math.round(((x - edge.left) / (width - edge.left - edge.right)) * (looks - 1)));
  });

  // ---- Time ----

  let clock = 0;

  function stop() {
    clearInterval(clock);
    clock = 0;
    play.textContent = "Play";
  }

  play.addEventListener("click", () => {
    if (clock) return stop();
    if (Number(step.value) === looks - 1) move(step, 0);
    play.textContent = "Pause";
    clock = setInterval(() => {
      move(step, Number(step.value) + 1);
      if (Number(step.value) === looks - 1) stop();
    }, 350);
  });
  for (const event of ["pointerdown", "keydown"]) step.addEventListener(event, stop);

  function show() {
    const look = Number(step.value);
    const done = about.steps[look];
    const answer = answers[look][digit];
    $("run-step").textContent = `${done} of ${about.steps[looks - 1]}`;
    $("run-loss").textContent = done ? decimals(loss[done - 1], 2) : "–";
    $("run-accuracy").textContent = `${decimals(accuracy[look], 1)} %`;
    $("run-answer").textContent = `${answer} ${answer === classes[digit] ? "✓" : "✗"}`;
    step.setAttribute("aria-valuetext", `step ${done}, ${decimals(accuracy[look], 1)} % read right`);
    neuron.setAttribute("aria-valuetext", `unit ${neuron.value}`);
    panels.forEach(paint);
    drawCurve();
  }

  follow([step, neuron], show);

  const final = (curve) => `${decimals(curve[looks - 1], 1)} %`;
  const caption = $("run-caption");
  const code = (text) => Object.assign(document.createElement("code"), { textContent: text });
  caption.append(
    "Recorded by ", code(about.command), ` at commit ${about.commit.revision.slice(0, 12)}, seed ${about.seed}: recipe `,
    code(about.recipe), `, network ${about.network}, ${about.epochs} passes in batches of ${about.batch_size}. ` +
      `In four bits it ends with ${final(accuracy)} of the test digits read right, and the same network from the same ` +
      `start in 32 bits with ${final(fp32.accuracy)} (dashed). That is one seed of a deliberately small network; the ` +
      "documentation's page of results compares larger ones over three seeds. The ten digits to choose from are looked " +
      "at by a copy, so that watching changes nothing.",
  );
}
