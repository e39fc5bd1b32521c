"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const NS = "http://www.w3.org/2000/svg";
  const make = (tag, className, text) => {
    const e = document.createElement(tag);
    if (className) e.className = className;
    if (text !== undefined) e.textContent = text;
    return e;
  };
  const show = (v) => {
    if (v === null || v === undefined) return "–";
    const a = Math.abs(v);
    let t;
    if (a === 0) t = "0";
    else if (a < 1e-3 || a >= 1e6) t = a.toExponential(2);
    else if (Number.isInteger(a)) t = a.toLocaleString("en-US");
    else t = a >= 1000 ? Math.round(a).toLocaleString("en-US") : String(Number(a.toPrecision(4)));
    return (v < 0 ? "−" : "") + t;
  };

  // Charts: the values at the step nearest to the pointer, or to the arrow keys' place.
  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = data.charts[svg.dataset.chart];
    if (!chart) continue;
    const figure = svg.parentNode, hover = svg.querySelector(".hover"), rule = hover.querySelector("line");
    const tip = make("div", "tip");
    tip.hidden = true;
    tip.setAttribute("role", "status");
    figure.append(tip);
    const scale = ([low, high, start, end], v, log) => {
      if (log) [low, high, v] = [Math.log10(low), Math.log10(high), Math.log10(v)];
      return start + (end - start) * (high > low ? (v - low) / (high - low) : 0.5);
    };
    const centre = (p) => (p.length > 2 ? (p[0] + p[2]) / 2 : p[0]);
    const places = [...new Set(chart.lines.flatMap((l) => l.p.map(centre)))].sort((a, b) => a - b);
    let place = places.length - 1;
    const hide = () => { hover.setAttribute("hidden", ""); tip.hidden = true; };
    const draw = () => {
      const x = places[place], px = scale(chart.x, x);
      rule.setAttribute("x1", px);
      rule.setAttribute("x2", px);
      hover.querySelectorAll("circle").forEach((c) => c.remove());
      tip.replaceChildren();
      let title = "";
      for (const line of chart.lines) {
        let best = null;
        for (const p of line.p) if (!best || Math.abs(centre(p) - x) < Math.abs(centre(best) - x)) best = p;
        if (!best) continue;
        const exact = Math.abs(centre(best) - x) < 1e-9;
        const steps = best.length > 2 ? `steps ${show(best[0])} to ${show(best[2])}` : `step ${show(best[0])}`;
        if (!title || exact) title = steps;
        const dot = document.createElementNS(NS, "circle");
        dot.setAttribute("class", "c" + line.c);
        dot.setAttribute("r", 4);
        dot.setAttribute("cx", scale(chart.x, centre(best)));
        dot.setAttribute("cy", scale(chart.y, best[1], chart.log));
        hover.append(dot);
        const range = best.length > 2 ? ` (${show(best[3])} to ${show(best[4])})` : "";
        const row = make("div", "c" + line.c);
        row.append(make("i"), make("span", "", `${line.name} ${show(best[1])}${range}${exact ? "" : `, ${steps}`}`));
        tip.append(row);
      }
      tip.prepend(make("b", "", title));
      hover.removeAttribute("hidden");
      tip.hidden = false;
      const at = (px / chart.w) * svg.clientWidth + svg.offsetLeft;
      const room = figure.clientWidth - tip.offsetWidth - 6;
      tip.style.left = Math.max(6, Math.min(room, at < figure.clientWidth / 2 ? at + 12 : at - tip.offsetWidth - 12)) + "px";
      tip.style.top = svg.offsetTop + 8 + "px";
    };
    svg.addEventListener("pointermove", (e) => {
      const box = svg.getBoundingClientRect(), px = ((e.clientX - box.left) / box.width) * chart.w;
      place = 0;
      places.forEach((x, i) => {
        if (Math.abs(scale(chart.x, x) - px) < Math.abs(scale(chart.x, places[place]) - px)) place = i;
      });
      draw();
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (e) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -places.length, End: places.length }[e.key];
      if (e.key === "Escape") hide();
      if (move === undefined) return;
      e.preventDefault();
      if (!tip.hidden) place += move;
      place = Math.max(0, Math.min(places.length - 1, place));
      draw();
    });
  }

  // Samples: filter, sort, page; only textContent is ever set.
  const list = document.getElementById("sample-list");
  if (!list) return;
  const PAGE = 10, get = (id) => document.getElementById(id);
  const controls = ["f-step", "f-low", "f-high", "f-sort"].map(get);
  let found = [], page = 0;
  const gapClass = (d) => {
    const a = Math.abs(d), level = data.bins.filter((b) => a >= b).length;
    return level ? (d > 0 ? "u" : "n") + level : "";
  };
  const card = (s, number) => {
    const box = make("article", "sample"), head = make("header");
    box.tabIndex = 0;
    box.setAttribute("aria-label", `sample ${number}, step ${s.step}, reward ${show(s.reward)}`);
    const fact = (name, value) => {
      const span = make("span", "", name + " ");
      span.append(make("b", "", value));
      head.append(span);
    };
    fact("step", s.step);
    if (s.index !== null) fact("prompt", s.index);
    fact("reward", show(s.reward));
    if (s.mean !== null) fact("mean |d|", show(s.mean));
    if (s.max !== null) fact("largest |d|", show(s.max));
    fact("ends with", s.finish || "–");
    fact("label", s.label);
    box.append(head, make("h4", "", "Prompt"), make("div", "text prompt", s.prompt));
    box.append(make("h4", "", s.tokens.length ? "Response, token by token" : "Response (its tokens were not saved)"));
    const text = make("div", "text");
    const detail = make("div", "detail-line");
    detail.setAttribute("aria-live", "polite");
    const describe = (t) => t[4] === 2 ? `“${t[0].trim() || t[0]}”  said by a tool, not by the model` : t[4] ? `“${t[0].trim() || t[0]}”  engine ${show(t[2])}; left out of the loss` : `“${t[0].trim() || t[0]}”  trainer ${show(t[1])}, engine ${show(t[2])}, d ${t[3] > 0 ? "+" : ""}${show(t[3])}`;
    if (s.tokens.length) {
      for (const t of s.tokens) {
        const span = make("span", t[4] === 2 ? "tool" : t[4] ? "soft" : t[3] === null ? "" : gapClass(t[3]), t[0]);
        span.title = describe(t);
        span.addEventListener("click", () => { detail.textContent = describe(t); });
        text.append(span);
      }
      if (s.cut) text.append(make("em", "soft", ` … ${s.cut} more tokens`));
      const known = s.tokens.filter((t) => t[3] !== null);
      const worst = known.sort((a, b) => Math.abs(b[3]) - Math.abs(a[3]))[0];
      detail.textContent = worst ? "Largest gap: " + describe(worst) : "The trainer's log-probabilities of this sample were not saved.";
    } else {
      text.textContent = s.response;
    }
    box.append(text, detail);
    return box;
  };
  const render = () => {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.max(0, Math.min(pages - 1, page));
    list.replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map((s, i) => card(s, page * PAGE + i + 1)));
    get("f-count").textContent = found.length
      ? `${page * PAGE + 1} to ${Math.min(found.length, (page + 1) * PAGE)} of ${found.length}`
      : "no sample fits";
    get("f-back").disabled = page === 0;
    get("f-next").disabled = page === pages - 1;
  };
  const filter = () => {
    const [step, low, high, sort] = controls.map((c) => c.value);
    found = data.samples.filter((s) =>
      (step === "" || s.step === Number(step)) &&
      (low === "" || (s.reward !== null && s.reward >= Number(low))) &&
      (high === "" || (s.reward !== null && s.reward <= Number(high))));
    const by = { gap: (s) => -(s.max ?? -1), low: (s) => s.reward ?? Infinity, high: (s) => -(s.reward ?? -Infinity) }[sort];
    if (by) found = [...found].sort((a, b) => by(a) - by(b));
    page = 0;
    render();
  };
  controls.forEach((c) => c.addEventListener("input", filter));
  const turn = (by) => { page += by; render(); };
  get("f-back").addEventListener("click", () => turn(-1));
  get("f-next").addEventListener("click", () => turn(1));
  document.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName)) return;
    if (!"jknp".includes(e.key) || e.key.length !== 1) return;
    const cards = [...list.children], now = cards.indexOf(document.activeElement);
    if (e.key === "n") turn(1);
    else if (e.key === "p") turn(-1);
    else cards[Math.max(0, Math.min(cards.length - 1, now + (e.key === "j" ? 1 : -1)))]?.focus();
    if (e.key === "n" || e.key === "p") list.firstElementChild?.focus();
  });
  filter();
})();
