// The page Now: renewed by a stream, without reloading.

import { $, append, ask, badge, bytes, clock, duration, element, jobLink, listen, logLine, lossOf, order, orderButton, renew, resultOf, rungText } from "./common.js";
import { drawGpus, JobCharts } from "./charts.js";

let followed = null; // the job whose curves, GPUs and log are shown
let chosen = new URLSearchParams(location.search).get("job"); // of several that run, if the user has chosen one
let unfollow = null;
const charts = new JobCharts();

$("#pause").addEventListener("click", () => order("/api/queue/pause"));
$("#resume").addEventListener("click", () => order("/api/queue/resume"));

function hindrances(now) {
  const said = [];
  if (!now.daemon_pid) said.push("The daemon is not running: start it with `finetuned run`.");
  if (now.waits) said.push(`Waiting: ${now.waits}. It goes on by itself when that is over.`);
  if (now.paused) said.push(`Paused: ${now.paused}. No job starts.`);
  for (const gpu of now.gpus) if (now.daemon_pid && gpu.state === "set_aside") said.push(`A GPU is set aside: ${gpu.why}`);
  for (const asked of now.orders) said.push(`Asked for: ${asked.before ? `${asked.job} before ${asked.before}` : `${asked.verb} ${asked.job ?? ""}`}`);
  renew($("#hindrances"), said, () => said.map((text) => element("p", { class: "hindrance" }, text)));
}

function sentence(job) {
  const left = job.progress.seconds_left;
  const when = job.progress.phase === "training" && left != null ? `, done at ${clock(Date.now() / 1000 + left)}` : "";
  return `${job.training_file}: ${job.sentence}${when}`;
}

const chosenOf = (now) => now.running.find((job) => job.id === chosen) ?? now.running[0];

function choose(id) {
  chosen = id;
  history.replaceState(null, "", `?job=${encodeURIComponent(id)}`);
  show(newest);
}

// One job in detail; of several each with its sentence, and the chosen one in detail.
function running(now) {
  const jobs = now.running;
  const one = jobs.length === 1;
  const shown = chosenOf(now);
  const nothing = now.queued ? "Nothing is running" : "Nothing to do: drop a file";
  $("#sentence").textContent = one ? sentence(shown) : jobs.length ? `${jobs.length} jobs are running` : nothing;
  $("#pause").hidden = Boolean(now.paused);
  $("#resume").hidden = !now.paused;
  $("#curves").hidden = $("#log-section").hidden = !shown;
  for (const place of document.querySelectorAll(".of-job")) place.textContent = one || !shown ? "" : `of ${shown.training_file}`;
  const facts = jobs.map((job) => [job.id, job.attempt, job.model, job.where?.words, job.rung, job === shown]);
  $("#running").classList.toggle("several", jobs.length > 1);
  renew($("#running"), facts, () => jobs.map((job) => element("li", { "data-job": job.id, "aria-current": !one && job === shown && "true" },
    one ? null : element("p", { class: "sentence" }),
    element("progress", { "aria-label": "steps" }),
    element("p", {}, jobLink(job.id), `, attempt ${job.attempt}, of ${job.model}`, job.where?.words ? `, ${job.where.words}` : ""),
    job !== shown ? null : element("p", { class: "quiet" }, rungText(job.rung), element("span", { id: "why" }, whys.get(job.id) ?? "")),
    element("p", { class: "buttons" }, job === shown ? null : element("button", { type: "button", onclick: () => choose(job.id) }, "Show"), orderButton(job.id, "cancel", "Cancel")))));
  [...$("#running").children].forEach((item, place) => {
    const job = jobs[place];
    if (!one) item.querySelector(".sentence").textContent = sentence(job);
    item.querySelector("progress").max = job.progress.total_steps || 1;
    item.querySelector("progress").value = job.progress.step ?? 0;
  });
}

const whys = new Map();
async function why(id) {
  const job = await ask(`/api/jobs/${encodeURIComponent(id)}`);
  const said = job?.timeline.findLast((row) => row.why)?.why ?? job?.plan?.choices?.micro_batch_tokens?.reason;
  whys.set(id, said ? ` - ${said}` : "");
  if ($("#why")) $("#why").textContent = whys.get(id);
}

async function follow(id) {
  if (id === followed) return;
  followed = id;
  unfollow?.();
  $("#log").replaceChildren();
  if (!id) return;
  why(id);
  await charts.load(id);
  if (id !== followed) return;
  charts.only(id);
  unfollow = listen(`/api/jobs/${encodeURIComponent(id)}/events?last=100`, {
    event: (event) => {
      append($("#log"), logLine(event));
      if (event.type === "metrics") charts.add(id, event.data);
      if (["rung", "plan", "attempt"].includes(event.type)) why(id);
    },
  });
}

function queue(now) {
  $("#queued").textContent = now.queued ? `${now.queued} waiting` : "empty";
  all = now.queued === now.queue.length;
  const waiting = now.queue.map((job) => {
    const again = job.not_before * 1000 > Date.now() ? `again at ${clock(job.not_before)}` : null;
    return { id: job.id, file: job.training_file, waits: [again, job.why_waiting].filter(Boolean).join(": ") };
  });
  renew($("#queue"), waiting, () => waiting.map((job) => element("li", { "data-job": job.id, draggable: "true" },
    element("span", { class: "grow" }, jobLink(job.id, job.file), " ", element("small", {}, job.waits)),
    element("span", { class: "buttons" }, orderButton(job.id, "first", "First"), orderButton(job.id, "last", "Last"), orderButton(job.id, "cancel", "Cancel")))));
  renew($("#inbox"), now.inbox, () => now.inbox.map((entry) => element("li", { class: "quiet" }, `inbox/${entry.file} ${entry.what}. ${entry.remedy}`)));
}

// Dragging: a job is put right before the one over which it is let go, or behind all. The buttons do it by keyboard.
let all = true; // whether the whole queue is shown
let dragged = null;
let newest = null; // what came in meanwhile

const over = (event) => [...$("#queue").children].find((item) => {
  const { top, height } = item.getBoundingClientRect();
  return event.clientY < top + height / 2;
});

function mark(target) {
  for (const item of $("#queue").children) item.classList.toggle("before", item === target);
  $("#queue").classList.toggle("behind", dragged !== null && target === undefined);
}

$("#queue").addEventListener("dragstart", (event) => {
  dragged = event.target.closest?.("[data-job]")?.dataset.job ?? null;
  if (dragged) event.dataTransfer.setData("text/plain", dragged);
});
$("#queue").addEventListener("dragover", (event) => {
  if (!dragged) return;
  event.preventDefault();
  mark(over(event));
});
$("#queue").addEventListener("drop", (event) => {
  if (!dragged) return;
  event.preventDefault();
  const target = over(event);
  const place = $(`#queue [data-job="${CSS.escape(dragged)}"]`);
  const path = `/api/jobs/${encodeURIComponent(dragged)}`;
  if (target && target !== place && target !== place?.nextElementSibling) order(`${path}/before?job=${encodeURIComponent(target.dataset.job)}`);
  else if (!target && all && place !== $("#queue").lastElementChild) order(`${path}/last`);
});
document.addEventListener("dragend", () => {
  dragged = null;
  mark(null);
  if (newest) show(newest);
});

function finished(now) {
  renew($("#finished"), now.finished, () => now.finished.map((job) => {
    const took = job.seconds == null ? "" : duration(job.seconds);
    const said = [resultOf(job), ...(job.error ? [] : [lossOf(job.progress)?.join(" "), took])].filter(Boolean).join(", ");
    const retry = ["failed", "cancelled"].includes(job.status) ? orderButton(job.id, "retry", "Retry") : null;
    return element("li", { "data-job": job.id }, badge(job.status), element("span", { class: "grow" }, jobLink(job.id, job.training_file), " ", element("small", {}, said)), retry);
  }));
  $("#none").hidden = now.finished.length > 0;
}

// What is done on a GPU, or why nothing is; the daemon says so only while it runs.
function doing(gpu, now) {
  if (gpu.jobs.length) return gpu.jobs.flatMap((id, place) => [place ? ", " : "", jobLink(id, now.running.find((job) => job.id === id)?.training_file ?? id)]);
  if (!now.daemon_pid) return [];
  return [{ usable: "free", set_aside: "set aside" }[gpu.state] ?? gpu.why];
}

function figuresOf(gpu) {
  const parts = [
    gpu.utilization != null && `${gpu.utilization}% busy`,
    gpu.memory_used != null && `${bytes(gpu.memory_used)} of ${bytes(gpu.memory_total ?? 0)}`,
    gpu.temperature != null && `${gpu.temperature} °C`,
    gpu.power != null && `${Math.round(gpu.power)} W`,
  ].filter(Boolean);
  if (!gpu.jobs.length || !parts.length) return []; // nobody looks at a GPU that has nothing to do
  const held = gpu.throttle_reasons?.length ? element("span", { class: "warning" }, `held back by ${gpu.throttle_reasons.join(", ")}`) : null;
  return [element("span", { class: "quiet" }, ` ${parts.join(", ")}`), element("meter", { min: 0, max: gpu.memory_total ?? 1, value: gpu.memory_used ?? 0, "aria-label": "memory" }), held];
}

function gpus(now) {
  $("#gpus").hidden = !now.gpus.length;
  $("#gpu-charts").hidden = !now.running.length;
  renew($("#gpu-list"), [now.gpus, now.running.map((job) => job.id), Boolean(now.daemon_pid)], () => now.gpus.map((gpu) => element("p", { "data-gpu": gpu.uuid },
    `GPU ${gpu.index} ${gpu.name}: `, ...doing(gpu, now), ...figuresOf(gpu))));
}

async function renewGpus() {
  if (!followed || document.hidden || $("#gpus").hidden) return;
  const id = followed;
  const answer = await ask(`/api/gpus?job=${encodeURIComponent(id)}`);
  if (answer && id === followed) drawGpus(answer.curves, Object.fromEntries(answer.data.map((gpu) => [gpu.uuid, `GPU ${gpu.index}`])));
}

function show(now) {
  newest = now;
  hindrances(now);
  running(now);
  if (!dragged) queue(now);
  finished(now);
  gpus(now);
  const id = chosenOf(now)?.id ?? null;
  if (id !== followed) follow(id).then(renewGpus);
}

listen("/api/now/events", { now: show });
setInterval(renewGpus, 10_000);
