// The page Drop: send a file, read what the check says of it, then let it be trained.

import { $, ask, element, say, table } from "./common.js";

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
      if (answer.error) say([answer.error.message, answer.error.remedy].filter(Boolean).join("\n"), true);
      done(answer.error ? undefined : answer);
    });
    $("#uploading").textContent = `sending ${file.name}`;
    $("#sent").value = 0;
    $("#upload").hidden = false;
    request.send(file);
  });
}

async function take(file) {
  if (!file) return;
  say("");
  const answer = await send("/api/drops", file);
  if (!answer) return;
  if (waiting) fetch(`/api/drops/${waiting.id}`, { method: "DELETE" });
  waiting = answer;
  $("#name").textContent = answer.file;
  $("#held-out").value = "";
  $("#choices").hidden = false;
  check();
}

let turn = 0;
async function check() {
  const mine = (turn += 1);
  $("#report-section").hidden = false;
  $("#verdict").textContent = "checking ...";
  $("#report").replaceChildren(element("progress", { "aria-label": "checking" }));
  const chosen = { profile: $("#profile").value, settings: settings() };
  const facts = await ask(`/api/drops/${waiting.id}/check`, { method: "POST", body: JSON.stringify(chosen) });
  if (mine !== turn) return;
  $("#report").replaceChildren();
  $("#verdict").textContent = facts ? (facts.verdict === "usable" ? `${facts.file} is usable` : `${facts.file} is refused`) : "not checked";
  if (facts) $("#report").replaceChildren(...report(facts));
}

function report(facts) {
  const shown = [];
  if (facts.reason) shown.push(element("p", { class: "bad" }, [facts.reason.where, facts.reason.what, facts.reason.remedy].filter(Boolean).join(". ")));
  if (facts.unchecked) shown.push(element("p", { class: "quiet" }, facts.unchecked));
  if (facts.training) {
    const { rows, tokens, supervised, steps, epochs } = facts.training;
    shown.push(element("p", {}, `${rows} rows, ${tokens} tokens of which ${supervised} are learned, ${steps} steps, ${epochs} epochs`));
  }
  if (facts.sample?.pieces) {
    const pieces = facts.sample.pieces.map(([text, learned]) => (learned ? element("mark", {}, text) : text));
    shown.push(element("p", { class: "quiet" }, `line ${facts.sample.line} as the model sees it; what is learned is marked`), element("pre", {}, ...pieces));
  }
  const { sample, reason, training, ...rest } = facts;
  shown.push(element("details", {}, element("summary", {}, "The whole report"), element("div", { class: "wide" }, table(rest))));
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
}

$("#file").addEventListener("change", () => take($("#file").files[0]));
$("#again").addEventListener("click", check);
$("#profile").addEventListener("change", check);
$("#held-out").addEventListener("change", async () => {
  if ($("#held-out").files[0] && (await send(`/api/drops/${waiting.id}/eval`, $("#held-out").files[0]))) check();
});
$("#confirm").addEventListener("click", async () => {
  const chosen = { profile: $("#profile").value, settings: settings() };
  $("#confirm").disabled = true;
  const answer = await ask(`/api/drops/${waiting.id}/confirm`, { method: "POST", body: JSON.stringify(chosen) });
  $("#confirm").disabled = false;
  if (!answer) return;
  clear();
  say(`${answer.said}; the page Now shows it.`);
});
$("#forget").addEventListener("click", async () => {
  const answer = await ask(`/api/drops/${waiting.id}`, { method: "DELETE" });
  if (answer) say(answer.said);
  clear();
});
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
  take(event.dataTransfer.files[0]);
});
