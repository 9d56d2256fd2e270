// What was found in a file of rows: on the page Drop before it is trained, on its job's page afterwards.

import { counted, element, table } from "./common.js";

function finding([code, { count, lines, detail, share, remedy }]) {
  const part = share == null ? "" : ` (${(100 * share).toFixed(1)}%)`;
  const where = lines.length ? `, ${count > lines.length ? "first " : ""}at line ${lines.join(", ")}` : "";
  const why = detail ? ` (${detail})` : "";
  return element("li", {}, element("strong", {}, code), `: ${counted(count, "row")}${part}${where}${why}. `, element("span", { class: "quiet" }, remedy));
}

function found(title, faults, kind) {
  const list = Object.entries(faults ?? {}).sort(([, one], [, other]) => other.count - one.count);
  return list.length ? [element("h3", { class: kind }, title), element("ul", {}, ...list.map(finding))] : [];
}

// Errors and warnings, each with its remedy, those of the held-out rows behind.
export function findings(report) {
  const { held_out: held } = report;
  return [
    ...found("Errors", report.errors, "bad"),
    ...found("Warnings", report.warnings, "warning"),
    ...(held ? found(`Errors in ${held.file}`, held.errors, "bad") : []),
    ...(held ? found(`Warnings in ${held.file}`, held.warnings, "warning") : []),
  ];
}

// A row as the model sees it.
export function sample(report) {
  if (!report.sample?.pieces) return [];
  const pieces = report.sample.pieces.map(([text, learned]) => (learned ? element("mark", {}, text) : text));
  return [element("p", { class: "quiet" }, `Line ${report.sample.line} as the model sees it; what is learned is marked:`), element("pre", {}, ...pieces)];
}

// All else, as it was told.
export function figures(report) {
  const { errors, warnings, sample: _, reason, training, held_out: held, ...rest } = report;
  if (rest.tokens?.histogram) {
    const bars = rest.tokens.histogram.map(([to, rows]) => [`to ${to.toLocaleString()} tokens`, counted(rows, "row")]);
    rest.tokens = { ...rest.tokens, histogram: Object.fromEntries(bars) };
  }
  if (held) rest.held_out = { file: held.file, rows: held.rows, tokens: held.tokens };
  return element("div", { class: "wide" }, table(rest));
}
