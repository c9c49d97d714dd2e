// Chapter 2: [0, 1] becomes -8 to 7.
{
  const { inputs, integers, values, levels } = data.unit;
  const number = $("number");
  const edge = { left: 34, right: 52, top: 14, bottom: 34 };
  number.max = inputs.length - 1;

  const draw = drawing("staircase", (add, width, height) => {
    const across = (x) => edge.left + x * (width - edge.left - edge.right);
    const up = (y) => height - edge.bottom - y * (height - edge.top - edge.bottom);
    const chosen = Number(number.value);
    levels.forEach((level, k) => {
      const on = k - 8 === integers[chosen] ? "on" : "";
      add("line", { x1: across(0), x2: across(1), y1: up(level), y2: up(level), class: "grid" });
      add("text", { x: edge.left - 8, y: up(level) + 4, "text-anchor": "end", class: on }, label(String(k - 8)));
      if (k % 3 === 0 || on)
        add("text", { x: across(1) + 8, y: up(level) + 4, class: on }, decimals(level, 3));
    });
    add("line", { x1: across(0), y1: up(0), x2: across(1), y2: up(1), class: "dash" });
    for (let k = 0; k <= 10; k += width < 480 ? 2 : 1)
      add("text", { x: across(k / 10), y: height - edge.bottom + 20, "text-anchor": "middle" }, decimals(k / 10, 1));
    // A stair's edge lies between the two places of the grid where the code changes.
    let steps = `M${across(0)} ${up(values[0])}`;
    inputs.forEach((x, k) => {
      if (k && integers[k] !== integers[k - 1]) steps += `H${across((x + inputs[k - 1]) / 2)}V${up(values[k])}`;
    });
    add("path", { d: `${steps}H${across(1)}`, class: "line" });
    const x = across(inputs[chosen]);
    const y = up(values[chosen]);
    add("path", { d: `M${x} ${up(0)}V${y}H${edge.left}`, class: "thin" });
    add("circle", { cx: x, cy: y, r: 5, class: "dot" });
    add("circle", { cx: x, cy: up(0), r: 9, class: "handle" });
  });

  draggable("staircase", (x, width) => {
    const share = (x - edge.left) / (width - edge.left - edge.right);
    move(number, Math.round(share * (inputs.length - 1)));
  });

  follow([number], () => {
    const k = Number(number.value);
    const code = label(String(integers[k]));
    $("number-in").textContent = decimals(inputs[k], 3);
    $("number-code").textContent = code;
    $("number-out").textContent = decimals(values[k], 3);
    $("number-error").textContent = signed(values[k] - inputs[k], 3);
    number.setAttribute("aria-valuetext", `${decimals(inputs[k], 3)} becomes code ${code}`);
    draw();
  });
}
