// Runs in a page that holds the report in a frame; writes what it measured into #result as JSON.
const frame = document.querySelector("iframe");
const luminance = ([r, g, b]) => {
  const linear = [r, g, b].map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
};
const numbers = (color) => (color.match(/[\d.]+/g) || []).map(Number);
const shown = (doc, view) => {
  const low = [];
  const background = (e) => {
    for (; e; e = e.parentElement) {
      const c = numbers(view.getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c.slice(0, 3);
    }
    return null;
  };
  const seen = new Set();
  for (const e of doc.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || ["SCRIPT", "STYLE", "NOSCRIPT", "OPTION", "title", "desc"].includes(e.tagName) || e.disabled) continue;
    const style = view.getComputedStyle(e), svg = e instanceof view.SVGElement;
    const behind = background(svg ? e.closest("figure, div, li, main, body") : e);
    const front = numbers(svg ? style.fill : style.color).slice(0, 3);
    if (!behind) continue;
    const key = [e.tagName, e.className.baseVal ?? e.className, front, behind].join("|");
    if (seen.has(key)) continue;
    seen.add(key);
    const [a, b] = [luminance(front), luminance(behind)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push([key, Math.round(ratio * 100) / 100]);
  }
  return { low, checked: seen.size };
};
frame.addEventListener("load", () => {
  const doc = frame.contentDocument, view = frame.contentWindow, out = {};
  try {
    out.title = doc.title;
    out.width = doc.documentElement.clientWidth;
    out.overflow = [...doc.querySelectorAll("body *")].filter((e) => {
      const box = e.getBoundingClientRect();
      return box.width && box.right > out.width + 0.5 && !e.closest(".scroll, nav ul, pre");
    }).map((e) => `${e.tagName}.${e.className.baseVal ?? e.className}`).slice(0, 5);
    out.scrolls = doc.documentElement.scrollWidth;
    out.dark = view.matchMedia("(prefers-color-scheme: dark)").matches;
    for (const d of doc.querySelectorAll("details")) d.open = true;
    Object.assign(out, shown(doc, view));
    const cards = () => [...doc.querySelectorAll("#sample-list .sample")];
    const facts = (c) => c.querySelector("header").textContent;
    const set = (id, value) => {
      doc.getElementById(id).value = value;
      doc.getElementById(id).dispatchEvent(new view.Event("input", { bubbles: true }));
    };
    const key = (target, k) => target.dispatchEvent(new view.KeyboardEvent("keydown", { key: k, bubbles: true, cancelable: true }));
    out.count = () => doc.getElementById("f-count").textContent;
    out.all = out.count();
    out.page = cards().length;
    key(doc.body, "n");
    out.second = out.count();
    key(doc.body, "p");
    key(doc.body, "j");
    key(doc.body, "j");
    out.focused = cards().indexOf(doc.activeElement);
    set("f-step", "20");
    out.step20 = out.count();
    out.onlyStep20 = cards().every((c) => facts(c).startsWith("step 20"));
    set("f-low", "1");
    out.rewarded = out.count();
    set("f-high", "0.5");
    out.nobody = out.count();
    set("f-low", "");
    set("f-high", "");
    set("f-step", "");
    set("f-sort", "gap");
    out.largest = cards().slice(0, 3).map((c) => Number(facts(c).match(/largest \|d\| ([\d.]+)/)[1]));
    const token = doc.querySelector("#sample-list .text:not(.prompt) span");
    out.colours = [...new Set([...doc.querySelectorAll("#sample-list .text span")].map((s) => s.className))].sort();
    token.click();
    out.detail = token.closest(".sample").querySelector(".detail-line").textContent;
    const svg = doc.querySelector("svg[data-chart=reward]"), box = svg.getBoundingClientRect();
    svg.dispatchEvent(new view.PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 20, bubbles: true }));
    out.tip = svg.parentNode.querySelector(".tip").textContent;
    key(svg, "Home");
    out.first = svg.parentNode.querySelector(".tip").textContent;
    out.scripts = doc.querySelectorAll("script").length;
    out.images = doc.querySelectorAll("img").length;
    delete out.count;
  } catch (error) {
    out.error = String(error.stack);
  }
  document.getElementById("result").textContent = JSON.stringify(out);
});
