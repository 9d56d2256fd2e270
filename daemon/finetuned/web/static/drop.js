// The page Drop: send a file, read what the check says of it, then let it be trained.

import { $, ask, bytes, counted, duration, element, moment, say, told } from "./common.js";
import { figures, findings, sample } from "./report.js";

let waiting = null; // the file that was sent: {id, file, bytes}

// fetch cannot tell how much is sent; this can.
function send(path, file) {
  $("#confirm").disabled = true;
  return new Promise((done) => {
    const request = new XMLHttpRequest();
    request.open("POST", `${path}?name=${encodeURIComponent(file.name)}`);
    request.upload.addEventListener("progress", (event) => {
      $("#sent").value = event.total ? event.loaded / event.total : 0;
    });
    request.addEventListener("loadend", () => {
      $("#upload").hidden = true;
      $("#confirm").disabled = false;
      let answer = {};
      try {
        answer = JSON.parse(request.responseText);
      } catch {
        answer = { error: { message: "The upload broke off: the server is gone, or there is no room for the file on its disk." } };
      }
      if (answer.error) say(told(answer.error), true);
      done(answer.error ? undefined : answer);
    });
    $("#uploading").textContent = `sending ${file.name}`;
    $("#sent").value = 0;
    $("#upload").hidden = false;
    request.send(file);
  });
}

const isHeldOut = (file) => /\.eval\.(jsonl(\.gz|\.zst)?|json)$/i.test(file.name);

// Of files that are dropped together one is the data, and one may be its held-out rows.
async function takeAll(files) {
  const held_out = files.find(isHeldOut);
  const data = files.filter((file) => !isHeldOut(file));
  if (!data.length && waiting) await hold(held_out);
  else await take(data[0] ?? held_out, data.length ? held_out : null);
  if (data.length > 1) say(`One file at a time: of these ${data.length} it is ${data[0].name}.`, true);
}

async function take(file, held_out) {
  if (!file) return;
  say("");
  const answer = await send("/api/drops", file);
  if (!answer) return;
  if (waiting) await fetch(`/api/drops/${waiting.id}`, { method: "DELETE" });
  goOn(answer);
  if (held_out) await hold(held_out);
  else check();
}

function goOn(drop) {
  waiting = drop;
  $("#name").textContent = drop.file;
  $("#held-out").value = "";
  $("#choices").hidden = false;
  earlier();
}

// What was sent before the page was loaded, and neither confirmed nor thrown away.
async function earlier() {
  const answer = await ask("/api/drops");
  if (!answer) return;
  const others = answer.data.filter((drop) => drop.id !== waiting?.id);
  $("#earlier").hidden = !others.length;
  $("#earlier ul").replaceChildren(...others.map((drop) => element("li", {},
    `${drop.file} (${bytes(drop.bytes)})${drop.held_out ? ` with ${drop.held_out}` : ""}, sent ${moment(drop.created_at)} `,
    element("span", { class: "buttons" },
      element("button", { type: "button", onclick: () => { goOn(drop); check(); } }, "Go on"),
      element("button", { type: "button", onclick: () => forget(drop) }, "Throw it away")))));
}

async function forget(drop) {
  const answer = await ask(`/api/drops/${drop.id}`, { method: "DELETE" });
  if (answer) say(answer.said);
  if (drop === waiting) clear();
  else earlier();
}

async function hold(file) {
  if (!file) return;
  await send(`/api/drops/${waiting.id}/eval`, file);
  check();
}

let turn = 0;
let wrong = false; // whether what is said at the top is of the last check
async function check() {
  const mine = (turn += 1);
  $("#report-section").hidden = false;
  $("#verdict").textContent = "checking ...";
  $("#report").replaceChildren(element("progress", { "aria-label": "checking" }));
  $("#confirm").disabled = false;
  const chosen = { profile: $("#profile").value, settings: settings() };
  const facts = await ask(`/api/drops/${waiting.id}/check`, { method: "POST", body: JSON.stringify(chosen) });
  if (mine !== turn) return;
  $("#report").replaceChildren();
  $("#verdict").textContent = facts ? (facts.verdict === "usable" ? `${facts.file} is usable` : `${facts.file} is refused`) : "Not checked: mend what is said above, and check again";
  if (wrong && facts) say("");
  wrong = !facts;
  if (!facts) return;
  $("#confirm").disabled = facts.verdict !== "usable"; // it would fail; other settings may change that
  $("#report").replaceChildren(...report(facts));
}

// What it says of the kinds of errors stands in the report below.
function refusal({ reason: { where, what, remedy }, errors }) {
  const said = `${where ? `${where}: ` : ""}${Object.keys(errors ?? {}).length ? what.replace(/:\n[^]*$/, "") : what}`;
  return element("p", { class: "bad" }, `${said.replace(/\.$/, "")}. ${remedy}`);
}

function report(facts) {
  const shown = [];
  if (facts.reason) shown.push(refusal(facts));
  if (facts.unchecked) shown.push(element("p", { class: "quiet" }, facts.unchecked));
  if (facts.training) {
    const { rows, tokens, supervised, steps, rows_a_step: each, epochs } = facts.training;
    const share = tokens ? ` (${((100 * supervised) / tokens).toFixed(1)}%)` : "";
    const left = facts.bad_rows ? ` (${facts.bad_rows.toLocaleString()} bad ${facts.bad_rows === 1 ? "one is" : "ones are"} left out)` : "";
    const lines = [
      `${counted(rows, "row")}${facts.format ? ` of ${facts.format}` : ""}${left}, ${counted(tokens, "token")} of which ${supervised.toLocaleString()}${share} are learned`,
      `${counted(steps, "step")} of ${counted(each, "row")}, ${counted(epochs, "epoch")}`,
    ];
    if (facts.held_out) lines.push(`held out: ${counted(facts.held_out.rows, "row")} of ${facts.held_out.file}`);
    if (facts.estimate) lines.push(`about ${duration(60 * facts.estimate.minutes)}, as ${facts.estimate.jobs === 1 ? "the earlier job" : `${facts.estimate.jobs} earlier jobs`} of this model`);
    shown.push(...lines.map((line) => element("p", {}, line)));
  }
  shown.push(...findings(facts), ...sample(facts), element("details", {}, element("summary", {}, "The whole report"), figures(facts)));
  return shown;
}

function settings() {
  const given = {};
  for (const field of document.querySelectorAll("#settings [name]")) {
    if (field.value === "") continue;
    try {
      given[field.name] = JSON.parse(field.value);
    } catch {
      given[field.name] = field.value;
    }
  }
  return given;
}

function clear() {
  waiting = null;
  turn += 1;
  $("#choices").hidden = $("#report-section").hidden = true;
  $("#file").value = "";
  earlier();
}

$("#file").addEventListener("change", () => take($("#file").files[0]));
$("#again").addEventListener("click", check);
$("#profile").addEventListener("change", check);
$("#settings").addEventListener("change", () => {
  $("#confirm").disabled = false;
});
$("#held-out").addEventListener("change", () => hold($("#held-out").files[0]));
$("#confirm").addEventListener("click", async () => {
  const chosen = { profile: $("#profile").value, settings: settings() };
  $("#confirm").disabled = true;
  const answer = await ask(`/api/drops/${waiting.id}/confirm`, { method: "POST", body: JSON.stringify(chosen) });
  $("#confirm").disabled = false;
  if (!answer) return;
  clear();
  say(`${answer.said}; `, false, element("a", { href: "/" }, "the page Now"), " shows it.");
});
$("#forget").addEventListener("click", () => forget(waiting));
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("#target").classList.add("over");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("#target").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("#target").classList.remove("over");
  takeAll([...event.dataTransfer.files]);
});
earlier();
