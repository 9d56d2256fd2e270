// The page Now: renewed by a stream, without reloading.

import { $, append, ask, badge, bytes, clock, duration, element, jobLink, listen, logLine, order, orderButton } from "./common.js";
import { drawGpus, JobCharts } from "./charts.js";

let followed = null;
let unfollow = null;
const charts = new JobCharts();

$("#pause").addEventListener("click", () => order("/api/queue/pause"));
$("#resume").addEventListener("click", () => order("/api/queue/resume"));

function hindrances(now) {
  const said = [];
  if (!now.daemon_pid) said.push("The daemon is not running: start it with `finetuned run`.");
  if (now.waits) said.push(`Waiting: ${now.waits}. It goes on by itself when that is over.`);
  if (now.paused) said.push(`Paused: ${now.paused}. No job starts.`);
  for (const why of Object.values(now.gpus_aside ?? {})) said.push(`A GPU is set aside: ${why}`);
  for (const asked of now.orders) said.push(`Asked for: ${asked.verb} ${asked.job ?? ""}`);
  $("#hindrances").replaceChildren(...said.map((text) => element("p", { class: "hindrance" }, text)));
}

function sentence(job) {
  const left = job.progress.seconds_left;
  const when = job.progress.phase === "training" && left != null ? `, done at ${clock(Date.now() / 1000 + left)}` : "";
  return `${job.training_file}: ${job.sentence}${when}`;
}

function running(now) {
  const [job] = now.running;
  $("#sentence").textContent = job ? sentence(job) : now.queued ? "Nothing is running" : "Nothing to do: drop a file";
  $("#pause").hidden = Boolean(now.paused);
  $("#resume").hidden = !now.paused;
  $("#curves").hidden = $("#log-section").hidden = !job;
  if (!job) {
    $("#running").replaceChildren();
    return;
  }
  const { step = 0, total_steps: total } = job.progress;
  const rung = Object.entries(job.rung).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`).join(", ");
  $("#running").replaceChildren(
    element("progress", { value: step, max: total || 1, "aria-label": "steps" }),
    element("p", {}, jobLink(job.id), `, attempt ${job.attempt}, of ${job.model}`),
    element("p", { class: "quiet" }, rung, element("span", { id: "why" }, whys.get(job.id) ?? "")),
    element("p", { class: "buttons" }, orderButton(job.id, "cancel", "Cancel")),
  );
}

const whys = new Map();
async function why(id) {
  const job = await ask(`/api/jobs/${encodeURIComponent(id)}`);
  const last = job?.rungs.at(-1)?.message;
  whys.set(id, last ? ` - ${last}` : "");
  if ($("#why")) $("#why").textContent = whys.get(id);
}

async function follow(id) {
  if (id === followed) return;
  followed = id;
  unfollow?.();
  $("#log").replaceChildren();
  if (!id) return;
  why(id);
  const answer = await ask(`/api/jobs/${encodeURIComponent(id)}/curves`);
  if (answer && id === followed) {
    charts.set(id, answer.curves);
    charts.only(id);
  }
  unfollow = listen(`/api/jobs/${encodeURIComponent(id)}/events?last=100`, {
    event: (event) => {
      append($("#log"), logLine(event));
      if (event.type === "metrics") charts.add(id, event.data);
      if (event.type === "rung") why(id);
    },
  });
}

function queue(now) {
  $("#queued").textContent = now.queued ? `${now.queued} waiting` : "empty";
  $("#queue").replaceChildren(...now.queue.map((job) => {
    const waits = job.not_before * 1000 > Date.now() ? `again at ${clock(job.not_before)}` : job.progress.waits;
    return element("li", { "data-job": job.id },
      element("span", { class: "grow" }, jobLink(job.id, job.training_file), " ", element("small", {}, waits ?? "")),
      element("span", { class: "buttons" }, orderButton(job.id, "first", "First"), orderButton(job.id, "last", "Last"), orderButton(job.id, "cancel", "Cancel")));
  }));
  $("#inbox").replaceChildren(...now.inbox.map((entry) => element("li", { class: "quiet" }, `inbox/${entry.file} ${entry.what}. ${entry.remedy}`)));
}

function finished(now) {
  $("#finished").replaceChildren(...now.finished.map((job) => {
    const loss = job.progress.valid_loss ?? job.progress.train_loss;
    const took = job.started_at ? duration(job.finished_at - job.started_at) : "";
    const said = job.error?.message ?? [loss != null ? `loss ${loss.toFixed(4)}` : "", took].filter(Boolean).join(", ");
    const retry = ["failed", "cancelled"].includes(job.status) ? orderButton(job.id, "retry", "Retry") : null;
    return element("li", { "data-job": job.id }, badge(job.status), element("span", { class: "grow" }, jobLink(job.id), " ", element("small", {}, said)), retry);
  }));
}

function gpus(now) {
  $("#gpus").hidden = !now.gpus.length;
  $("#gpu-list").replaceChildren(...now.gpus.map((gpu) => element("p", {},
    `GPU ${gpu.index} ${gpu.name}: ${gpu.utilization ?? "?"}% busy, ${bytes(gpu.memory_used ?? 0)} of ${bytes(gpu.memory_total ?? 0)}, ${gpu.temperature ?? "?"} °C, ${Math.round(gpu.power ?? 0)} W`,
    element("meter", { min: 0, max: gpu.memory_total ?? 1, value: gpu.memory_used ?? 0, "aria-label": "memory" }),
    gpu.throttle_reasons?.length ? element("span", { class: "warning" }, `held back by ${gpu.throttle_reasons.join(", ")}`) : null)));
}

async function renewGpus() {
  if (!followed || document.hidden || $("#gpus").hidden) return;
  const answer = await ask(`/api/gpus?job=${encodeURIComponent(followed)}`);
  if (answer) drawGpus(answer.curves);
}

listen("/api/now/events", {
  now: (now) => {
    hindrances(now);
    running(now);
    queue(now);
    finished(now);
    gpus(now);
    follow(now.running[0]?.id ?? null).then(renewGpus);
  },
});
setInterval(renewGpus, 10_000);
