// Curves, drawn by plotly in the page's own colours, light or dark.

import { ask } from "./common.js";

const LONGEST = 4000; // points of a curve, before the server is asked to thin it again
const COLOURS = ["#2563eb", "#ea580c", "#16a34a", "#9333ea", "#0891b2"];
const dark = matchMedia("(prefers-color-scheme: dark)");
const drawn = new Map();

// Exponents as "e": raised ones plotly would draw with style attributes, which the policy blocks.
function layout(title, more) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), automargin: true, exponentformat: "e" };
  return {
    title: { text: title, font: { size: 13 }, x: 0.02, xanchor: "left" },
    font: { color: colour("--text"), size: 11 },
    paper_bgcolor: colour("--card"),
    plot_bgcolor: colour("--card"),
    margin: { l: 45, r: 10, t: 32, b: 30 },
    showlegend: false,
    hovermode: "x",
    ...more,
    xaxis: { ...axis, ...more.xaxis },
    yaxis: { ...axis, ...more.yaxis },
  };
}

export function draw(node, title, traces, more = {}) {
  if (!window.Plotly) return;
  if (!traces.some((trace) => trace.x.length)) {
    if (drawn.delete(node)) window.Plotly.purge(node); // another job's, which has such figures
    node.classList.remove("drawn");
    return;
  }
  node.classList.add("drawn");
  node.closest("section").classList.add("drawn");
  drawn.set(node, [title, traces, more]);
  window.Plotly.react(node, traces, layout(title, more), { displayModeBar: false, responsive: true });
}

dark.addEventListener("change", () => {
  for (const [node, [title, traces, more]] of drawn) draw(node, title, traces, more);
});

const line = (curve, name, number, more = {}) => ({
  x: curve.step, y: curve.value, name, type: "scatter", mode: curve.step.length < 2 ? "markers" : "lines", line: { color: COLOURS[number % COLOURS.length], width: 1.5 }, ...more,
});

const LEGEND = { showlegend: true, legend: { orientation: "h", y: -0.15 } };
const FROM_ZERO = { yaxis: { rangemode: "tozero" } };
const CHARTS = [
  ["loss", "loss"],
  ["learning_rate", "learning rate"],
  ["tokens_per_second", "tokens/s"],
  ["grad_norm", "gradient norm"],
  ["reward", "reward"],
];
const SHOWN = new Set(["train_loss", "valid_loss", "learning_rate", "tokens_per_second", "grad_norm", "reward"]);
const OF_RECIPES = /^(loss|grad_norm|reward)_/; // a recipe's own figures, drawn where the one is that they begin with
const WHOLE = { grad_norm: "all", reward: "gain" };

// The charts of one job, or of up to five to compare; steps that come in are added.
export class JobCharts {
  constructor() {
    this.jobs = new Map();
    this.coming = new Map(); // of jobs whose curves are asked for: the steps that come in meanwhile
    this.waiting = null;
  }

  // Whether there is such a job.
  async load(job) {
    if (this.coming.has(job)) return true;
    this.coming.set(job, []);
    const answer = await ask(`/api/jobs/${encodeURIComponent(job)}/curves`);
    const missed = this.coming.get(job);
    this.coming.delete(job);
    if (!answer) return false;
    this.set(job, answer.curves);
    for (const figures of missed) this.add(job, figures);
    return true;
  }

  set(job, curves) {
    this.jobs.set(job, curves);
    this.drawSoon();
  }

  only(job) {
    for (const other of this.jobs.keys()) if (other !== job) this.jobs.delete(other);
    this.drawSoon();
  }

  add(job, figures) {
    this.coming.get(job)?.push(figures);
    const curves = this.jobs.get(job);
    if (!curves || figures.step == null) return;
    let long = false;
    for (const name of Object.keys(figures)) {
      if (typeof figures[name] !== "number" || !(SHOWN.has(name) || OF_RECIPES.test(name))) continue;
      const curve = (curves[name] ??= { step: [], value: [] });
      if (!curve.step.length || figures.step > curve.step.at(-1)) {
        curve.step.push(figures.step);
        curve.value.push(figures[name]);
      } else {
        const place = curve.step.lastIndexOf(figures.step); // it is done again after an interruption
        if (place >= 0) curve.value[place] = figures[name];
      }
      long ||= curve.step.length > LONGEST;
    }
    if (long) this.load(job);
    this.drawSoon();
  }

  drawSoon() {
    this.waiting ??= setTimeout(() => {
      this.waiting = null;
      this.draw();
    }, 200);
  }

  draw() {
    const many = this.jobs.size > 1;
    for (const [name, title] of CHARTS) {
      const traces = [...this.jobs].flatMap(([job, curves], number) => {
        const own = many ? [] : Object.keys(curves).filter((one) => OF_RECIPES.test(one) && one.startsWith(`${name}_`));
        const parts = own.map((one, place) => line(curves[one], one.slice(name.length + 1), place + 2));
        if (name !== "loss") return curves[name] ? [line(curves[name], parts.length ? WHOLE[name] : job, number), ...parts] : [];
        const held_out = { mode: "lines+markers", marker: { size: 6 } };
        return [
          curves.train_loss && line(curves.train_loss, many ? job : "training", number),
          curves.valid_loss && line(curves.valid_loss, many ? `${job}, held out` : "held out", many ? number : 1, held_out),
          ...parts,
        ].filter(Boolean);
      });
      const legend = name === "loss" || traces.length > this.jobs.size;
      draw(document.getElementById(name), title, traces, legend ? LEGEND : FROM_ZERO);
    }
  }
}

// What the GPUs did, over the time of day: one line a GPU, named as people do.
export function drawGpus(curves, names) {
  const charts = [["utilization", "utilisation, %", 1], ["memory_used", "memory, GiB", 2 ** 30], ["temperature", "temperature, °C", 1], ["power", "power, W", 1]];
  for (const [name, title, unit] of charts) {
    const traces = Object.entries(curves).map(([uuid, of], number) =>
      line({ step: of[name].step.map((at) => new Date(at * 1000)), value: of[name].value.map((value) => value / unit) }, names[uuid] ?? uuid, number));
    if (name === "utilization") {
      traces.push(...Object.values(curves).map((of) => ({
        x: of.throttled.map((one) => new Date(one.at * 1000)), y: of.throttled.map(() => 100), text: of.throttled.map((one) => one.why.join(", ")),
        name: "held back", type: "scatter", mode: "markers", marker: { symbol: "triangle-down", size: 8, color: COLOURS[1] },
      })));
    }
    draw(document.getElementById(name), title, traces, Object.keys(curves).length > 1 ? { ...FROM_ZERO, ...LEGEND } : FROM_ZERO);
  }
}
