// The page of one job: everything that is known of it, and it grows while the job runs.

import { $, append, ask, badge, bytes, duration, element, jobLink, listen, logLine, moment, orderButton, table } from "./common.js";
import { JobCharts } from "./charts.js";

const MOST = 5; // jobs in one chart
const id = $("#job").dataset.job;
const path = `/api/jobs/${encodeURIComponent(id)}`;
const charts = new JobCharts();
const compared = new Set(new URLSearchParams(location.search).getAll("with"));

function summary(job) {
  const took = job.started_at ? duration((job.finished_at ?? Date.now() / 1000) - job.started_at) : null;
  const loss = ["train_loss", "valid_loss"].filter((name) => job.progress[name] != null).map((name) => `${name.replace("_", " ")} ${job.progress[name].toFixed(4)}`);
  const facts = [
    `${job.training_file} (${bytes(job.bytes)})${job.validation_file ? `, held out: ${job.validation_file}` : ""}${job.profile ? `, profile ${job.profile}` : ""}`,
    `${job.model}, dropped ${moment(job.created_at)}${took ? `, took ${took}` : ""}, attempt ${job.attempt}`,
    [`step ${job.progress.step ?? 0} of ${job.progress.total_steps ?? "?"}`, ...loss].join(", "),
  ];
  const lines = facts.map((text) => element("p", {}, text));
  if (job.duplicate_of) lines.push(element("p", {}, "trained before as ", jobLink(job.duplicate_of)));
  if (job.error) lines.push(element("p", { class: "bad" }, [job.error.param, job.error.message].filter(Boolean).join(": ")));
  $("#summary").replaceChildren(...lines);
  $("#status").replaceChildren(badge(job.status));
  const verbs = { failed: ["retry"], cancelled: ["retry"], succeeded: [], running: ["cancel"] }[job.status] ?? ["first", "last", "cancel"];
  $("#buttons").replaceChildren(...verbs.map((verb) => orderButton(id, verb, verb[0].toUpperCase() + verb.slice(1))));
}

function adapter(job) {
  $("#adapter").hidden = !job.fine_tuned_model;
  if (!job.fine_tuned_model) return;
  $("#download").href = `${path}/adapter.zip`;
  const base = job.model;
  $("#load").textContent = [
    "from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
    `model = AutoModelForCausalLM.from_pretrained(${JSON.stringify(base)})`,
    `model = PeftModel.from_pretrained(model, ${JSON.stringify(`adapters/${job.fine_tuned_model}`)})`, "",
    "# or", `vllm serve ${base} --enable-lora --lora-modules ${job.fine_tuned_model}=adapters/${job.fine_tuned_model}`,
  ].join("\n");
}

// A row a model; words and intervals come from the API as people read them.
function benchmark(found) {
  $("#benchmark-section").hidden = !found;
  if (!found) return;
  const [head, ...rows] = found.table;
  const line = (tag, cells) => element("tr", {}, ...cells.map((text) => element(tag, {}, text)));
  $("#benchmark").replaceChildren(line("th", head), ...rows.map((cells) => line("td", cells)));
  $("#benchmark-file").textContent = `${found.data.file}, ${found.data.rows} rows`;
  $("#benchmark-said").replaceChildren(...found.sentences.map((text) => element("p", { class: text.startsWith("CONTAMINATED") ? "bad" : "" }, text)));
}

async function show() {
  const job = await ask(path);
  if (!job) return;
  summary(job);
  adapter(job);
  benchmark(job.benchmark);
  $("#settings").replaceChildren(table(job.hyperparameters));
  for (const name of ["data_report", "plan"]) $(`#${name}`).replaceChildren(job[name] ? table(job[name]) : "not there yet");
}

// A row a question, a column a step; an answer that differs from the one before is marked.
async function predictions() {
  const answer = await ask(`/api/predictions?job=${encodeURIComponent(id)}`);
  if (!answer?.data.length) return;
  $("#predictions-section").hidden = false;
  const steps = [...new Set(answer.data.map((one) => one.step))];
  const questions = Map.groupBy(answer.data, (one) => one.sample);
  const head = ["question", "wanted", ...steps.map((step) => (step === 0 ? "before" : `step ${step}`))];
  const rows = [...questions.values()].map((answers) => {
    let before = null;
    const cells = steps.map((step) => {
      const one = answers.find((other) => other.step === step);
      const said = one ? one.error ? `(${one.error})` : one.answer : "";
      const changed = before !== null && said !== before;
      before = said;
      return element("td", { class: [changed ? "changed" : "", one?.exact ? "good" : "", one?.error ? "bad" : ""].join(" ") }, said, one?.exact ? " ✓" : "");
    });
    return element("tr", {}, element("td", {}, answers[0].prompt), element("td", {}, answers[0].expected), ...cells);
  });
  $("#predictions").replaceChildren(element("tr", {}, ...head.map((text) => element("th", {}, text))), ...rows);
  const exact = (step) => answer.data.filter((one) => one.step === step && one.exact).length;
  $("#score").textContent = `${exact(steps[0])} of ${questions.size} right at first, ${exact(steps.at(-1))} now`;
}

async function draw(job) {
  const answer = await ask(`/api/jobs/${encodeURIComponent(job)}/curves`);
  if (answer) charts.set(job, answer.curves);
}

function compare(other) {
  if (compared.size < MOST - 1) compared.add(other);
  history.replaceState(null, "", `?${[...compared].map((one) => `with=${encodeURIComponent(one)}`).join("&")}`);
  draw(other);
}

$("#compare").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("#other").value && $("#other").value !== id) compare($("#other").value);
  $("#other").value = "";
});
$("#alone").addEventListener("click", () => {
  compared.clear();
  history.replaceState(null, "", location.pathname);
  charts.only(id);
});

const timeline = new Set(["phase", "rung", "error", "plan", "benchmark", "result"]);
let soon = null;
const showSoon = () => {
  soon ??= setTimeout(() => {
    soon = null;
    show();
  }, 500);
};

show();
predictions();
await draw(id);
for (const other of compared) draw(other);
listen(`${path}/events?last=400`, {
  event: (event) => {
    append($("#log"), logLine(event));
    if (timeline.has(event.type) || event.level !== "info") append($("#timeline"), logLine(event));
    if (event.type === "metrics") charts.add(id, event.data);
    if (event.type === "predictions") predictions();
    if (event.type !== "message") showSoon();
  },
});
listen("/api/now/events", { now: showSoon });
const recent = await ask("/api/jobs?limit=50");
$("#others").replaceChildren(...(recent?.data ?? []).filter((job) => job.id !== id).map((job) => element("option", { value: job.id })));
