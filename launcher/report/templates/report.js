// Draws what report.py found. One colour a phase in all charts; charts are drawn when they come into sight.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const keys = data.runs.flatMap((run) => run.phases.map((phase) => phase.key));
const LIGHT = ["#2457c5", "#d1495b", "#1a7f4b", "#b9770e", "#7b4bb7", "#0f8a9d", "#8a5a44", "#c2458f", "#5d6778", "#6b8e23"];
const DARK = ["#8ab4ff", "#ff8f9c", "#6fd6a0", "#f2c266", "#c3a6f5", "#6cd3e3", "#d3a68f", "#f39ad0", "#aab4c4", "#b7d36b"];
const SECTIONS = { learning: "Does it learn?", policy: "The policy of PPO", machines: "How it runs", rest: "Everything else" };
const SPENT = {
  waiting: "#b8c0cc", loading: "#f2c266", training: "#4f86e8", steps: "#4f86e8", sync: "#9aa7f0", generate: "#7b6fe0", score: "#6cc0cf",
  learn: "#3f9d77", evaluating: "#d0a5dd", saving: "#5d6778", other: "#8d97a6", redone: "#e0796f", recovering: "#c2458f",
};
const MOMENTS = { // words, Plotly's symbol, the same for the legend, colour
  checkpoint: ["checkpoint", "line-ns-open", "|", "#dfe9ff"], failure: ["failure", "x", "✕", "#d1342f"], resize: ["other number of workers", "diamond", "◆", "#7b4bb7"],
  moved: ["moved to other machines", "triangle-right", "▶", "#b9770e"], stopped: ["stopped", "square", "■", "#5d6778"], rewound: ["taken back", "triangle-left", "◀", "#7b4bb7"],
  warning: ["warning", "triangle-up", "▲", "#d99a1c"], done: ["phase finished", "circle", "●", "#1a7f4b"],
};
const STRETCHES = { ...data.spent_on, training: "training", redone: "training that was lost" };
const hidden = new Set();
const drawn = new Map(); // element -> what draws it

const el = (tag, attributes = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
};
const isDark = () => root.classList.contains("dark");
const colour = (key) => (isDark() ? DARK : LIGHT)[keys.indexOf(key) % LIGHT.length];
const ink = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const hms = (s) => (s >= 3600 ? `${Math.floor(s / 3600)}:${String(Math.floor((s % 3600) / 60)).padStart(2, "0")}` : `${Math.floor(s / 60)}`) + `:${String(Math.floor(s % 60)).padStart(2, "0")}`;
// Names come from folders and files: Plotly would take tags in them for its own.
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const CONFIG = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };

function layout(more) {
  return {
    margin: { l: 58, r: 14, t: 8, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { family: "system-ui, sans-serif", size: 12, color: ink("--quiet") }, hovermode: "x unified",
    dragmode: window.matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
    hoverlabel: { bgcolor: ink("--card"), bordercolor: ink("--line"), font: { color: ink("--ink"), size: 12 } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: ink("--quiet"), activecolor: ink("--accent") }, ...more,
  };
}
const axis = (more) => ({ gridcolor: ink("--line"), zerolinecolor: ink("--line"), linecolor: ink("--line"), automargin: true, ...more });

function smoothed(values) { // mean of a window, so that a wild curve shows where it goes
  const width = Math.max(1, Math.round(values.length / 40));
  const sums = [0];
  for (const value of values) sums.push(sums[sums.length - 1] + value);
  return values.map((_, i) => {
    const from = Math.max(0, i - width), to = Math.min(values.length, i + width + 1);
    return (sums[to] - sums[from]) / (to - from);
  });
}

function curves(chart) {
  const over = document.getElementById("axis").value, smooth = document.getElementById("smooth").checked;
  const traces = [];
  for (const curve of chart.curves) {
    if (hidden.has(curve.of)) continue;
    const line = colour(curve.of), x = curve[over], few = x.length < 40;
    if (curve.low && curve.high) {
      const quiet = { x, mode: "lines", line: { width: 0, color: line }, hoverinfo: "skip", type: "scatter" };
      traces.push({ ...quiet, y: curve.low }, { ...quiet, y: curve.high, fill: "tonexty", fillcolor: line + "22" });
    }
    const wild = smooth && x.length > 20;
    traces.push({
      x, y: curve.value, name: plain(curve.of), type: "scatter", mode: few ? "lines+markers" : "lines", opacity: wild ? 0.3 : 1,
      line: { color: line, width: wild ? 1 : 2 }, marker: { size: 5, color: line },
      hovertemplate: chart.fraction ? "%{y:.1%}" : "%{y:.4~g}",
    });
    if (wild) traces.push({ x, y: smoothed(curve.value), name: plain(curve.of) + ", smoothed", type: "scatter", mode: "lines", line: { color: line, width: 2.5 }, hovertemplate: "%{y:.4~g}" });
  }
  const words = { step: "step", tokens: "tokens", hours: "hours of training" };
  return [traces, layout({
    xaxis: axis({ title: { text: words[over], standoff: 6 } }),
    yaxis: axis({ title: { text: chart.unit, standoff: 6 }, tickformat: chart.fraction ? ".2~%" : "", rangemode: chart.section === "machines" ? "tozero" : "normal", type: document.getElementById("log").checked && !chart.fraction ? "log" : "linear" }),
  })];
}

function timeline() {
  const traces = [], rows = [];
  const scale = Math.max(...data.runs.map((run) => run.length), 1);
  const [unit, per] = scale > 7200 ? ["hours", 3600] : scale > 180 ? ["minutes", 60] : ["seconds", 1];
  for (const run of data.runs) for (const phase of run.phases) rows.push([phase.key, run, phase.name]);
  for (const [kind, words] of Object.entries(STRETCHES)) {
    const bars = rows.flatMap(([key, run, name]) => run.stretches.filter((s) => s.phase === name && s.kind === kind).map((s) => [key, s]));
    if (!bars.length) continue;
    traces.push({
      type: "bar", orientation: "h", y: bars.map(([key]) => plain(key)), base: bars.map(([, s]) => s.begin / per), x: bars.map(([, s]) => (s.end - s.begin) / per),
      marker: { color: SPENT[kind], line: { width: 0 } }, width: 0.5, customdata: bars.map(([, s]) => `${words}: ${hms(s.end - s.begin)}, attempt ${s.attempt}`), hovertemplate: "%{customdata}<extra></extra>",
    });
  }
  for (const [kind, [, symbol, , fill]] of Object.entries(MOMENTS)) {
    const dots = rows.flatMap(([key, run, name]) => run.moments.filter((m) => m.phase === name && m.kind === kind).map((m) => [key, m]));
    if (!dots.length) continue;
    const isTick = kind === "checkpoint";
    traces.push({
      type: "scatter", mode: "markers", y: dots.map(([key]) => plain(key)), x: dots.map(([, m]) => m.at / per),
      marker: { symbol, size: isTick ? 16 : 12, color: fill, line: { width: isTick ? 2 : 1, color: isTick ? fill : ink("--card") } },
      customdata: dots.map(([, m]) => plain(m.text).slice(0, 160)), hovertemplate: "%{customdata}<extra></extra>",
    });
  }
  const height = 90 + 44 * rows.length;
  return [traces, layout({ barmode: "overlay", hovermode: "closest", height, xaxis: axis({ title: { text: `${unit} since the run began` }, rangemode: "tozero" }), yaxis: axis({ autorange: "reversed", type: "category", categoryarray: rows.map(([key]) => plain(key)) }) })];
}

function spent() {
  const phases = data.runs.flatMap((run) => run.phases).filter((phase) => Object.keys(phase.time).length);
  const whole = phases.map((phase) => Object.values(phase.time).reduce((sum, seconds) => sum + seconds, 0));
  const kinds = Object.keys(data.spent_on).filter((kind) => phases.some((phase) => phase.time[kind]));
  const traces = kinds.map((kind) => ({
    type: "bar", orientation: "h", y: phases.map((phase) => plain(phase.key)), x: phases.map((phase, i) => (phase.time[kind] || 0) / whole[i]),
    customdata: phases.map((phase) => hms(phase.time[kind] || 0)), hovertemplate: `${data.spent_on[kind]}: %{customdata}, %{x:.1%}<extra></extra>`,
    marker: { color: SPENT[kind] },
  }));
  return [traces, layout({ barmode: "stack", hovermode: "closest", height: 80 + 40 * phases.length, margin: { l: 58, r: 30, t: 8, b: 40 }, xaxis: axis({ tickformat: ".0%", range: [0, 1], tickvals: [0, 0.25, 0.5, 0.75, 1] }), yaxis: axis({ autorange: "reversed", type: "category" }) })];
}

function legend(id, entries) { // [words, colour, glyph]
  for (const [words, fill, glyph] of entries) {
    const item = el("li", { textContent: words, className: glyph ? "glyph" : "" });
    item.style.setProperty("--dot", fill);
    if (glyph) item.dataset.glyph = glyph;
    document.getElementById(id).append(item);
  }
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
}, { rootMargin: "300px" });

function draw(element) {
  const [traces, form] = drawn.get(element)();
  element.dataset.drawn = traces.length;
  Plotly.react(element, traces, form, CONFIG);
}
function later(element, make) { drawn.set(element, make); seen.observe(element); }
function redraw() { for (const element of drawn.keys()) if (element.dataset.drawn !== undefined) draw(element); }

function chips() {
  const place = document.getElementById("chips");
  for (const key of keys.filter((key) => data.charts.some((chart) => chart.curves.some((curve) => curve.of === key)))) {
    const chip = el("button", { type: "button", className: "chip", textContent: key });
    const show = () => { chip.style.setProperty("--dot", colour(key)); chip.setAttribute("aria-pressed", String(!hidden.has(key))); };
    chip.addEventListener("click", () => { hidden.has(key) ? hidden.delete(key) : hidden.add(key); show(); redraw(); });
    chip.addEventListener("recolour", show);
    show();
    place.append(chip);
  }
}

function charts() {
  const place = document.getElementById("charts");
  for (const [section, title] of Object.entries(SECTIONS)) {
    const mine = data.charts.filter((chart) => chart.section === section);
    if (!mine.length) continue;
    const grid = el("div", { className: "grid" });
    for (const chart of mine) {
      const canvas = el("div", { className: "canvas" });
      grid.append(el("div", { className: "chart" }, el("h4", { textContent: chart.title }), el("p", { textContent: chart.about }), canvas));
      later(canvas, () => curves(chart));
    }
    place.append(section === "rest" ? el("details", { className: "group" }, el("summary", { textContent: title }), grid) : el("div", { className: "group" }, el("h3", { textContent: title }), grid));
  }
}

function setTheme(dark) {
  root.classList.toggle("dark", dark);
  for (const chip of document.querySelectorAll(".chip")) chip.dispatchEvent(new Event("recolour"));
  redraw();
}

const wantsDark = window.matchMedia("(prefers-color-scheme: dark)");
root.classList.toggle("dark", wantsDark.matches);
chips();
charts();
later(document.getElementById("timeline"), timeline);
later(document.getElementById("spent"), spent);
const any = (test) => data.runs.some(test);
legend("timeline-legend", [
  ...Object.entries(STRETCHES).filter(([kind]) => any((run) => run.stretches.some((s) => s.kind === kind))).map(([kind, words]) => [words, SPENT[kind]]),
  ...Object.entries(MOMENTS).filter(([kind]) => any((run) => run.moments.some((m) => m.kind === kind))).map(([kind, [words, , glyph, fill]]) => [words, kind === "checkpoint" ? "#8aa4d6" : fill, glyph]),
]);
legend("spent-legend", Object.entries(data.spent_on).filter(([kind]) => any((run) => run.phases.some((phase) => phase.time[kind]))).map(([kind, words]) => [words, SPENT[kind]]));
for (const id of ["axis", "smooth", "log"]) document.getElementById(id).addEventListener("change", redraw);
document.getElementById("theme").addEventListener("click", () => setTheme(!isDark()));
wantsDark.addEventListener("change", (event) => setTheme(event.matches));
window.addEventListener("beforeprint", () => { for (const element of drawn.keys()) draw(element); });
