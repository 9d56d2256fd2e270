// What every page needs: elements, requests, streams, words for figures. Text goes in as text, never as markup.

export const $ = (selector) => document.querySelector(selector);

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

// A sentence at the top, where it is seen however far down the page is; `more` may hold links.
export function say(text, bad = false, ...more) {
  const place = $("#said");
  const close = element("button", { type: "button", class: "close", "aria-label": "Close", onclick: () => say("") }, "×");
  place.replaceChildren(close, text, ...more);
  place.hidden = !text;
  place.className = bad ? "bad" : "";
}

// An error as a text; some sentences hold their remedy already.
export const told = ({ message, remedy }) => (remedy && !message.endsWith(remedy) ? `${message}\n${remedy}` : message);

// Ask the server; an error becomes a sentence on the page, and undefined.
export async function ask(path, options) {
  try {
    const answer = await fetch(path, options);
    const content = await answer.json();
    if (answer.ok) return content;
    say(told(content.error), true);
  } catch (error) {
    say(`The server does not answer: ${error.message}`, true);
  }
  return undefined;
}

export async function order(path) {
  const answer = await ask(path, { method: "POST" });
  if (answer) say(answer.said);
}

// Show facts in a place, and leave it alone while they are the same: what is pressed, focused or dragged must stay.
const shown = new WeakMap();
export function renew(place, facts, make) {
  const told = JSON.stringify(facts);
  if (shown.get(place) === told) return;
  shown.set(place, told);
  place.replaceChildren(...make());
}

// Streams that broke off: what the page shows may be old then, and says so unless they are back in a moment.
const lost = new Set();
let waited = null;
function reached(path, well) {
  if (well) lost.delete(path);
  else lost.add(path);
  if (!lost.size) $("#lost").hidden = true;
  else waited ??= setTimeout(() => {
    waited = null;
    $("#lost").hidden = !lost.size;
  }, 2000);
}

// Follow a stream while the page is looked at; one that comes back goes on behind the last number it saw.
export function listen(path, handlers) {
  let source = null;
  let last = null;
  let over = false;
  const open = () => {
    if (source || over || document.hidden) return;
    const address = new URL(path, location.href);
    if (last !== null) {
      address.search = "";
      address.searchParams.set("after", last);
    }
    source = new EventSource(address);
    for (const [kind, handler] of Object.entries(handlers)) {
      source.addEventListener(kind, (message) => {
        if (message.lastEventId) last = message.lastEventId;
        handler(JSON.parse(message.data));
      });
    }
    source.addEventListener("end", close);
    source.addEventListener("open", () => reached(path, true));
    source.addEventListener("error", () => {
      reached(path, false);
      if (source?.readyState === EventSource.CLOSED) {
        source = null;
        setTimeout(open, 2000);
      }
    });
  };
  const shut = () => {
    source?.close();
    source = null;
    reached(path, true);
  };
  const looked = () => (document.hidden ? shut() : open());
  function close() {
    over = true;
    shut();
    document.removeEventListener("visibilitychange", looked);
  }
  document.addEventListener("visibilitychange", looked);
  open();
  return close;
}

export function duration(seconds) {
  const whole = Math.round(seconds);
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

export const time = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
export const moment = (seconds) => new Date(seconds * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
export function bytes(count) {
  const units = ["bytes", "KiB", "MiB", "GiB"];
  const unit = Math.min(Math.floor(Math.log2(Math.max(count, 1)) / 10), 3);
  return `${unit ? (count / 2 ** (10 * unit)).toFixed(1) : count} ${units[unit]}`;
}
// What came of a job: why there is nothing, or its adapter.
export const resultOf = (job) => job.error?.message ?? [job.fine_tuned_model, job.duplicate_of && `trained before as ${job.duplicate_of}`].filter(Boolean).join(", ");
export const LOSSES = { train_loss: "training loss", valid_loss: "held-out loss" };
// The held-out loss if there is one: [words, figure].
export function lossOf({ valid_loss: held, train_loss: trained }) {
  return held != null ? [LOSSES.valid_loss, held.toFixed(4)] : trained != null ? [LOSSES.train_loss, trained.toFixed(4)] : null;
}
export const counted = (number, noun) => `${number.toLocaleString()} ${noun}${number === 1 ? "" : "s"}`;
export const badge = (status) => element("span", { class: `badge ${status}` }, status.replaceAll("_", " "));
export const jobLink = (id, text = id) => element("a", { draggable: "false", href: `/jobs/${encodeURIComponent(id)}` }, text);
export const orderButton = (id, verb, text) =>
  element("button", { type: "button", "data-verb": verb, onclick: () => order(`/api/jobs/${encodeURIComponent(id)}/${verb}`) }, text);

export function rungText(rung) {
  const { batch_size: rows, gradient_accumulation: times, micro_batch_tokens: tokens, activation_checkpointing: again, tuning, max_length: longest } = rung ?? {};
  const size = rows ? `${rows} ${rows === 1 ? "row" : "rows"} x ${times ?? 1}` : "";
  return [size, tokens ? `at most ${tokens} tokens` : "", again ? "activations computed again" : "", tuning, longest ? `rows to ${longest} tokens` : ""].filter(Boolean).join(", ");
}

export function logLine(event) {
  return element("li", { class: event.level }, element("time", {}, time(event.created_at)), event.message);
}

// Add a line to a log, and keep showing its end if that is what is shown.
export function append(log, line, most = 500) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 30;
  log.append(line);
  while (log.childElementCount > most) log.firstElementChild.remove();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

// Where a page is narrow its cells stand below one another; each is named then.
export function headed(head, row) {
  [...row.cells].forEach((cell, place) => cell.setAttribute("data-head", head[place]));
  return row;
}

// A table of an object, tables within it for objects.
export function table(facts) {
  const shown = (value) => {
    if (value !== null && typeof value === "object") {
      if (Array.isArray(value) && value.every((one) => one === null || typeof one !== "object")) return value.join(", ");
      return table(value);
    }
    return String(value);
  };
  const rows = Object.entries(facts ?? {}).map(([name, value]) => element("tr", {}, element("th", {}, name), element("td", {}, shown(value))));
  return element("table", {}, ...rows);
}
