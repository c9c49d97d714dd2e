"use strict";
/* Puts the page together, keeps what was chosen, and in a live page asks for news. */

const Page = (() => {
  const main = document.getElementById("main");
  const chosen = new Map();
  const PAUSE_MS = 2000;
  const FEW = 7;

  /* What was chosen for a group survives a refresh. */
  function state(group) {
    const key = JSON.stringify([group.task, group.model, group.size, group.stash, group.fine_tune]);
    if (!chosen.has(key)) {
      const names = group.recipes.map((r) => r.name);
      const first = names.length <= FEW ? names : [group.baseline, ...names.filter((n) => n !== group.baseline)].slice(0, FEW);
      chosen.set(key, {
        known: new Set(names),
        on: "test",
        range: "all",
        shown: new Set(first),
        layers: { recipe: "", slot: "dgrad.grad_output", measure: "log2_scale", as: "", filter: "", open: new Set() },
      });
    }
    const found = chosen.get(key);
    for (const { name } of group.recipes) {
      if (!found.known.has(name) && found.shown.size < FEW) found.shown.add(name);
      found.known.add(name);
    }
    return found;
  }

  function section(found, group, place) {
    const id = `g${place}`;
    const own = state(group);
    return el(
      "section",
      { class: "group", id, "aria-label": `${group.task}, ${group.model}, size ${group.size}` },
      headline(group),
      el("h3", {}, "Results"),
      gaps(group),
      curves(group, id, own),
      layerView(found, group, id, own.layers),
      costs(group),
      modeled(group),
      made(group),
    );
  }

  function contents(found) {
    if (found.groups.length < 2) return [];
    const name = (g) => [g.task, g.model, g.size, g.stash && `stash ${g.stash}`, g.fine_tune && "fine-tuned"].filter(Boolean).join(", ");
    const items = found.groups.map((group, place) => el("li", {}, el("a", { href: `#g${place}` }, name(group))));
    return [el("nav", { "aria-label": "What is compared" }, el("ul", {}, items))];
  }

  function show(found) {
    Charts.forget(main);
    const focus = document.activeElement;
    const [id, at] = [focus && focus.id, focus && focus.type === "search" ? focus.selectionStart : null];
    const empty = el("p", {}, "Nothing has been written yet. The end of a run's first epoch brings the first numbers.");
    const groups = found.groups.map((group, place) => section(found, group, place));
    main.replaceChildren(...contents(found), ...(groups.length ? groups : [empty]));
    const recipes = new Set(found.groups.flatMap((g) => g.recipes.map((r) => r.name)));
    const runs = found.groups.flatMap((g) => g.recipes.map((r) => r.seeds.length)).reduce((a, b) => a + b, 0);
    document.getElementById("what").textContent = `${Words.counted(recipes.size, "recipe")}, ${Words.counted(runs, "finished run")}`;
    const again = id && document.getElementById(id);
    if (again && again !== document.activeElement) {
      again.focus({ preventScroll: true });
      if (at !== null) again.setSelectionRange(at, at);
    }
  }

  function theme() {
    const button = document.getElementById("theme");
    const root = document.documentElement;
    const system = matchMedia("(prefers-color-scheme: dark)");
    const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
    const shown = () => {
      button.setAttribute("aria-pressed", String(dark()));
      Charts.again();
    };
    button.addEventListener("click", () => {
      root.dataset.theme = dark() ? "light" : "dark";
      shown();
    });
    system.addEventListener("change", shown);
    shown();
  }

  /* A run writes at the end of each epoch; the server answers 304 until then. */
  async function follow() {
    const status = document.getElementById("status");
    const say = (text, gone) => {
      if (status.textContent !== text) status.textContent = text;
      status.dataset.state = gone ? "gone" : "";
    };
    let tag = "";
    say("Live: waiting for news.");
    for (;;) {
      try {
        const answer = await fetch("data.json", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
        if (answer.status === 200) {
          const news = await answer.json();
          if (tag) show(news);
          tag = answer.headers.get("ETag");
          say(`Live: as of ${new Date().toLocaleTimeString()}.`);
        }
      } catch {
        say("The server has stopped; this is what it showed last.", true);
      }
      await new Promise((resume) => setTimeout(resume, PAUSE_MS));
    }
  }

  show(JSON.parse(document.getElementById("data").textContent));
  theme();
  if (document.body.dataset.live) follow();
  return { show };
})();
