// Many images at once: a table with thumbnails that sorts, and its rows as CSV.

import { byId, capital, el, icon, percent } from "./dom.js";

const THUMBNAIL = 88; // pixels, twice what is shown

const FAILED = { waiting: "Waiting", running: "Looking …", cancelled: "Cancelled", failed: "Failed" };
const COLUMNS = {
  file: { title: "Image", order: (item) => item.file.name.toLowerCase() },
  chance: { title: "Probability", order: (item) => (item.answer ? -chance(item)[1] : 1) },
  decision: { title: "Decision", order: decision },
};

/** Rows for items; `on` = {select, remove, retry}, each called with an item. Returns {add, update, remove}. */
export function createTable(on) {
  const rows = new Map(); // item -> row
  const body = byId("rows");
  const sorted = { by: null, down: false };
  let thumbnails = Promise.resolve();

  byId("columns").append(
    el("td", { class: "thumb" }),
    ...Object.entries(COLUMNS).map(([name, { title }]) =>
      el("th", { scope: "col", "data-column": name }, el("button", { type: "button", onclick: () => sortBy(name) }, title, el("span", { class: "arrow", "aria-hidden": "true" }))),
    ),
    el("td", {}),
  );

  function sortBy(name) {
    sorted.down = sorted.by === name && !sorted.down;
    sorted.by = name;
    for (const head of byId("columns").querySelectorAll("th")) {
      if (head.dataset.column === name) head.setAttribute("aria-sort", sorted.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    arrange();
  }

  function arrange() {
    if (!sorted.by) return;
    const { order } = COLUMNS[sorted.by];
    const sign = sorted.down ? -1 : 1;
    const items = [...rows.keys()].sort((a, b) => sign * compare(order(a), order(b)));
    const focused = document.activeElement;
    body.append(...items.map((item) => rows.get(item)));
    if (body.contains(focused)) focused.focus(); // a row that moves loses it
  }

  function add(item) {
    const canvas = el("canvas", { width: THUMBNAIL, height: THUMBNAIL, "aria-hidden": "true" });
    const row = el(
      "tr",
      {},
      el("td", { class: "thumb" }, canvas),
      el("th", { scope: "row" }, el("button", { type: "button", class: "name", onclick: () => on.select(item) }, item.file.name), el("small", {})),
      el("td", { class: "chance" }),
      el("td", { class: "decision" }),
      el("td", { class: "end" }, el("button", { type: "button", class: "quiet", "aria-label": `Remove ${item.file.name}`, onclick: () => on.remove(item) }, "×")),
    );
    rows.set(item, row);
    body.append(row);
    thumbnails = thumbnails.then(() => drawThumbnail(canvas, item.file)); // one by one: each is decoded whole
    update(item, false);
  }

  function update(item, selected) {
    const row = rows.get(item);
    if (!row) return;
    const [, head, chanceCell, decisionCell] = row.children;
    row.toggleAttribute("data-selected", selected);
    if (selected) head.firstChild.setAttribute("aria-current", "true");
    else head.firstChild.removeAttribute("aria-current");
    head.lastChild.textContent = remark(item);
    chanceCell.replaceChildren(...(item.answer ? chanceNodes(item) : []));
    const retry = ["failed", "cancelled"].includes(item.status) && el("button", { type: "button", class: "small", "aria-label": `Try ${item.file.name} again`, onclick: () => on.retry(item) }, "Try again");
    decisionCell.replaceChildren(el("span", { class: `badge ${kind(item)}` }, symbol(item), decision(item)), ...(retry ? [retry] : []));
    if (item.status === "done") arrange();
  }

  function remove(item) {
    rows.get(item).remove();
    rows.delete(item);
  }

  return { add, update, remove };
}

const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);

/** The class and probability that a table shows: the last of two, else the likeliest. */
function chance({ answer }) {
  const entries = Object.entries(answer.probabilities);
  return entries.length === 2 ? entries[1] : [answer.label, answer.probabilities[answer.label]];
}

function chanceNodes(item) {
  const [name, share] = chance(item);
  return [el("span", {}, percent(share), el("span", { class: "of" }, ` ${name}`)), el("span", { class: "line", "--chance": share, "aria-hidden": "true" })];
}

function decision(item) {
  if (item.status !== "done") return FAILED[item.status];
  return item.answer.decision.refer ? "Refer to a person" : capital(item.answer.label);
}

function kind({ status, answer }) {
  if (status !== "done") return status;
  return answer.decision.refer ? "refer" : answer.decision.positive === false ? "below" : "above";
}

function symbol(item) {
  const name = { refer: "person", above: "above", below: "below", failed: "failed" }[kind(item)];
  return name ? icon(name) : null;
}

function remark({ status, problem, answer }) {
  if (status === "failed") return [problem.title, problem.detail].filter(Boolean).join(": ");
  return status === "done" ? [...answer.decision.reasons, ...answer.image.warnings].map(capital).join("; ") : "";
}

/** A small copy; the whole picture is not kept. What is no image stays blank, and the server says why. */
async function drawThumbnail(canvas, file) {
  try {
    const bitmap = await createImageBitmap(file, { resizeHeight: THUMBNAIL, resizeQuality: "medium" });
    const x = (THUMBNAIL - bitmap.width) / 2;
    canvas.getContext("2d").drawImage(bitmap, x, 0);
    bitmap.close();
  } catch {
    canvas.classList.add("blank");
  }
}

/** RFC 4180, one line an item; opens in a spreadsheet without any cell being taken for a formula. */
export function toCsv(items) {
  const classes = [...new Set(items.flatMap(({ answer }) => Object.keys(answer?.probabilities ?? {})))];
  const header = [
    ...["file", "status", "label", ...classes.map((name) => `probability_${name}`)],
    ...["refer", "reasons", "prediction_set", "coverage", "operating_point", "threshold", "positive"],
    ...["width", "height", "format", "warnings", "model", "version", "request_id", "problem", "notice"],
  ];
  const lines = items.map(({ file, status, answer, problem }) => {
    const { decision = {}, image = {}, model = {}, probabilities = {} } = answer ?? {};
    return [
      ...[file.name, status, answer?.label, ...classes.map((name) => probabilities[name])],
      ...[decision.refer, decision.reasons?.join("; "), decision.prediction_set?.join(" "), decision.coverage],
      ...[decision.operating_point, decision.threshold, decision.positive],
      ...[image.width, image.height, image.format, image.warnings?.join("; "), model.name, model.version],
      ...[answer?.request_id ?? problem?.request_id, problem && `${problem.title}: ${problem.detail}`, answer?.notice],
    ];
  });
  return [header, ...lines].map((line) => `${line.map(cell).join(",")}\r\n`).join("");
}

function cell(value) {
  const text = String(value ?? "");
  const guarded = /^\s*[=+\-@＝＋－＠]|^[\t\r\n]/.test(text) ? `'${text}` : text;
  return `"${guarded.replaceAll('"', '""')}"`;
}
