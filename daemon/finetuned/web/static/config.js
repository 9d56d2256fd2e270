// The page Config: the text of the file, saved only on top of what was read.

import { $, ask, say } from "./common.js";

let version = null;

async function load() {
  const config = await ask("/api/config");
  if (!config) return;
  $("#text").value = config.text;
  version = config.version;
}

$("#load").addEventListener("click", () => {
  say("");
  load();
});
$("#save").addEventListener("click", async () => {
  const answer = await ask("/api/config", { method: "POST", body: JSON.stringify({ text: $("#text").value, version }) });
  if (!answer) return;
  version = answer.version;
  say(answer.said);
});
load();
