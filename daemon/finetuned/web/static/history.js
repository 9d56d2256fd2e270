// The page History: every job, a page at a time; the address keeps what is asked for.

import { $, ask, badge, duration, element, headed, jobLink, listen, lossOf, moment, resultOf } from "./common.js";

const PAGE = 50;
const wanted = new URLSearchParams(location.search);
const offset = () => Number(wanted.get("offset") ?? 0);

const HEAD = [...document.querySelectorAll("#jobs th")].map((cell) => cell.textContent.trim());

function row(job) {
  const [kind, loss] = lossOf(job.progress) ?? ["", ""];
  return headed(HEAD, element("tr", {},
    element("td", {}, jobLink(job.id, job.training_file)),
    element("td", {}, badge(job.status)),
    element("td", {}, moment(job.created_at)),
    element("td", {}, job.finished_at ? moment(job.finished_at) : ""),
    element("td", { class: "number" }, job.seconds == null ? "" : duration(job.seconds)),
    element("td", { class: "number" }, loss, kind ? element("small", {}, ` ${kind.replace(" loss", "")}`) : null),
    element("td", {}, job.profile ?? ""),
    element("td", {}, resultOf(job))));
}

let turn = 0;
async function show() {
  const mine = (turn += 1);
  const query = new URLSearchParams(wanted);
  query.set("limit", PAGE);
  const answer = await ask(`/api/jobs?${query}`);
  if (!answer || mine !== turn) return;
  $("#jobs tbody").replaceChildren(...answer.data.map(row));
  const from = offset();
  $("#where").textContent = answer.total ? `${from + 1} to ${from + answer.data.length} of ${answer.total.toLocaleString()}` : wanted.has("text") || wanted.has("status") ? "No such job." : "No job yet.";
  $("#newer").disabled = from === 0;
  $("#older").disabled = !answer.has_more;
  const sort = wanted.get("sort") ?? "-created_at";
  for (const button of document.querySelectorAll("[data-sort]")) {
    const way = { [button.dataset.sort]: "ascending", [`-${button.dataset.sort}`]: "descending" }[sort];
    if (way) button.parentElement.setAttribute("aria-sort", way);
    else button.parentElement.removeAttribute("aria-sort");
    button.textContent = button.textContent.replace(/ [↑↓]$/, "") + ({ ascending: " ↑", descending: " ↓" }[way] ?? "");
  }
}

function want(changes, first = true) {
  for (const [name, value] of Object.entries(first ? { ...changes, offset: "" } : changes)) {
    if (value) wanted.set(name, value);
    else wanted.delete(name);
  }
  history.replaceState(null, "", `?${wanted}`);
  show();
}

$("#text").value = wanted.get("text") ?? "";
$("#status").value = wanted.get("status") ?? "";
$("#filter").addEventListener("submit", (event) => event.preventDefault());
$("#text").addEventListener("input", () => want({ text: $("#text").value }));
$("#status").addEventListener("change", () => want({ status: $("#status").value }));
$("#newer").addEventListener("click", () => want({ offset: Math.max(0, offset() - PAGE) }, false));
$("#older").addEventListener("click", () => want({ offset: offset() + PAGE }, false));
for (const button of document.querySelectorAll("[data-sort]")) {
  button.addEventListener("click", () => want({ sort: wanted.get("sort") === `-${button.dataset.sort}` ? button.dataset.sort : `-${button.dataset.sort}` }));
}

// Anew when a job came, went or changed its status; the figures of one that runs every ten seconds.
let seen = null;
let soon = null;
listen("/api/now/events", {
  now: (now) => {
    const jobs = JSON.stringify([now.queued, ...[now.running, now.queue, now.finished].map((part) => part.map((job) => [job.id, job.status]))]);
    if (jobs !== seen) clearTimeout(soon);
    soon = jobs === seen && soon !== null ? soon : setTimeout(() => {
      soon = null;
      show();
    }, jobs === seen ? 10_000 : 300);
    seen = jobs;
  },
});
