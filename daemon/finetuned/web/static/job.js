// The page of one job: everything that is known of it, and it grows while the job runs.

import { $, append, ask, badge, bytes, duration, element, headed, jobLink, listen, logLine, LOSSES, moment, orderButton, renew, rungText, say, table } from "./common.js";
import { JobCharts } from "./charts.js";
import { figures, findings, sample } from "./report.js";

const MOST = 5; // jobs in one chart
const COLUMNS = 12; // steps in the table of answers
const id = $("#job").dataset.job;
const path = `/api/jobs/${encodeURIComponent(id)}`;
const charts = new JobCharts();
const compared = new Set(new URLSearchParams(location.search).getAll("with").filter((other) => other !== id).slice(0, MOST - 1));

const shell = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

function summary(job) {
  const runs = job.status === "running" && job.started_at;
  const took = runs ? `, for ${duration(Date.now() / 1000 - job.started_at)}` : job.seconds == null ? "" : `, took ${duration(job.seconds)}`;
  const loss = Object.entries(LOSSES).filter(([name]) => job.progress[name] != null).map(([name, words]) => `${words} ${job.progress[name].toFixed(4)}`);
  const facts = [
    `${job.training_file} (${bytes(job.bytes)})${job.validation_file ? `, held out: ${job.validation_file}` : ""}${job.profile ? `, profile ${job.profile}` : ""}`,
    `${job.model}, dropped ${moment(job.created_at)}${took}${job.attempt ? `, attempt ${job.attempt}` : ""}${job.where?.words ? ` ${job.where.words}` : ""}`,
  ];
  if (job.why_waiting) facts.push(`waits: ${job.why_waiting}`);
  if (job.progress.total_steps) facts.push([`step ${job.progress.step ?? 0} of ${job.progress.total_steps}`, ...loss].join(", "));
  const lines = facts.map((text) => element("p", {}, text));
  if (job.duplicate_of) lines.push(element("p", {}, "trained before as ", jobLink(job.duplicate_of)));
  if (job.error) lines.push(element("p", { class: "bad" }, [job.error.param, job.error.message].filter(Boolean).join(": ")));
  $("#summary").replaceChildren(...lines);
  $("#status").replaceChildren(badge(job.status));
  const verbs = { failed: ["retry"], cancelled: ["retry"], succeeded: [], running: ["cancel"] }[job.status] ?? ["first", "last", "cancel"];
  renew($("#buttons"), verbs, () => verbs.map((verb) => orderButton(id, verb, verb[0].toUpperCase() + verb.slice(1))));
}

function adapter(job) {
  $("#adapter").hidden = !job.fine_tuned_model;
  if (!job.fine_tuned_model) return;
  $("#download").href = `${path}/adapter.zip`;
  $("#download").hidden = !job.base_model;
  const base = job.base_model;
  const folder = `${$("#job").dataset.base}/adapters/${job.fine_tuned_model}`;
  if (!base) $("#load").textContent = `${folder} is not there any more`;
  else if (job.plan?.method === "full") {
    $("#load").textContent = ["# a whole model:", "from transformers import AutoModelForCausalLM", "",
      `model = AutoModelForCausalLM.from_pretrained(${JSON.stringify(folder)})`, "",
      "# or, in a shell:", `vllm serve ${shell(folder)}`].join("\n");
  } else {
    $("#load").textContent = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM", "",
      `model = AutoModelForCausalLM.from_pretrained(${JSON.stringify(base)})`,
      `model = PeftModel.from_pretrained(model, ${JSON.stringify(folder)})`, "",
      "# or, in a shell:", `vllm serve ${shell(base)} --enable-lora --lora-modules ${shell(`${job.fine_tuned_model}=${folder}`)}`].join("\n");
  }
}

// A row an attempt, and one for each rung that it climbed down.
function timeline(job) {
  const head = ["When", "What", "How it ended", "Step", "Rung", "Settings changed"];
  const rows = job.timeline.map((row) => {
    const ended = row.outcome ?? (job.status === "running" ? "running" : "");
    const how = row.outcome === "fallback" ? [] : [ended ? badge(ended) : "", " ", row.then ?? ""];
    const why = row.outcome !== "fallback" && row.why ? element("div", { class: "quiet" }, row.why) : null;
    const changed = Object.entries(row.changed).map(([name, [before, now]]) => `${name}: ${JSON.stringify(before)}, now ${JSON.stringify(now)}`);
    return element("tr", { class: row.outcome === "fallback" ? "fallback" : "" },
      element("td", {}, moment(row.at)), element("td", {}, row.what, why), element("td", {}, ...how),
      element("td", { class: "number" }, row.step ?? ""), element("td", {}, rungText(row.rung)), element("td", {}, changed.join("\n")));
  });
  $("#timeline-section").hidden = !rows.length;
  renew($("#timeline"), [job.timeline, job.status], () => [element("tr", {}, ...head.map((text) => element("th", {}, text))), ...rows.map((row) => headed(head, row))]);
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

let known = null;
async function show() {
  const job = await ask(path);
  if (!job) return;
  known = job;
  summary(job);
  timeline(job);
  if (!["succeeded", "failed", "cancelled"].includes(job.status)) follow(); // it may have been tried again
  adapter(job);
  benchmark(job.benchmark);
  $("#settings").replaceChildren(table(job.hyperparameters));
  const report = job.data_report;
  $("#data_report").replaceChildren(...(report ? [...findings(report), ...sample(report), figures(report)] : ["not there yet"]));
  $("#plan").replaceChildren(job.plan ? table(job.plan) : "not there yet");
}

// A row a question, a column a step; an answer that differs from the one before is marked.
async function predictions() {
  const answer = await ask(`/api/predictions?job=${encodeURIComponent(id)}`);
  if (!answer?.data.length) return;
  $("#predictions-section").hidden = false;
  const every = [...new Set(answer.data.map((one) => one.step))];
  const steps = every.filter((_, place) => every.length <= COLUMNS || place === every.length - 1 || place % Math.ceil(every.length / (COLUMNS - 1)) === 0);
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
  $("#predictions").replaceChildren(element("tr", {}, ...head.map((text) => element("th", {}, text))), ...rows.map((row) => headed(head, row)));
  const exact = (step) => answer.data.filter((one) => one.step === step && one.exact).length;
  const some = steps.length < every.length ? `; ${steps.length} of ${every.length} times are shown` : "";
  $("#score").textContent = `${exact(steps[0])} of ${questions.size} right at first, ${exact(steps.at(-1))} now${some}`;
}

async function compare(other) {
  if (compared.size >= MOST - 1) {
    say(`${MOST} jobs are all that a chart holds; Alone takes the others out.`, true);
    return;
  }
  compared.add(other);
  if (!(await charts.load(other))) {
    compared.delete(other);
    say(`There is no job ${other}.`, true);
  }
  history.replaceState(null, "", `${location.pathname}?${[...compared].map((one) => `with=${encodeURIComponent(one)}`).join("&")}`);
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

const QUIET = new Set(["message", "metrics", "checkpoint", "predictions"]); // events that change nothing in what `show` shows
let soon = null;
const showSoon = () => {
  soon ??= setTimeout(() => {
    soon = null;
    show();
  }, 500);
};

let last = null; // the number of the newest event
let following = false;
function follow() {
  if (following) return;
  following = true;
  listen(`${path}/events?${last === null ? "last=400" : `after=${last}`}`, {
    event: (event) => {
      last = event.id.split("-").at(-1);
      append($("#log"), logLine(event));
      if (event.type === "metrics") charts.add(id, event.data);
      if (event.type === "predictions") predictions();
      if (!QUIET.has(event.type)) showSoon();
    },
    end: () => {
      following = false;
      showSoon();
    },
  });
}

await Promise.all([charts.load(id), predictions(), show()]);
for (const other of compared) charts.load(other).then((there) => there || compared.delete(other));
follow();
// Everything is asked for anew when the job has come further, its figures alone are told.
listen("/api/now/events", {
  now: (now) => {
    const found = [...now.running, ...now.queue, ...now.finished].find((job) => job.id === id);
    if (!known || (!found && known.status !== "running")) return;
    if (!found || found.status !== known.status || found.attempt !== known.attempt) showSoon();
    else summary((known = { ...known, ...found }));
  },
});
const recent = await ask("/api/jobs?limit=50");
$("#others").replaceChildren(...(recent?.data ?? []).filter((job) => job.id !== id).map((job) => element("option", { value: job.id })));
