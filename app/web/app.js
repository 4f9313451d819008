// The page: its images, the queue that sends them, and what is shown of which.

import { announce, byId, capital, coverageWords, el, percent } from "./dom.js";
import { showModel } from "./model.js";
import * as server from "./server.js";
import { createTable, toCsv } from "./table.js";
import { explanation, headline, report, verdict } from "./verdict.js";
import { createViewer } from "./viewer.js";

const AT_ONCE = 4; // images on their way together
const SMALL = matchMedia("(max-width: 40rem)"); // as in style.css: the answer would be below the screen

// {file, status, answer, problem, at, maps, job}; `job` aborts what is under way, and a job that is no longer the
// item's own changes nothing
let items = [];
let selected = null;
let running = 0;
let listed = null; // the answer of GET /models

const table = createTable({ select: (item) => select(item, true), remove: removeItem, retry: (item) => enqueue([item]) });
const viewer = createViewer(evidence);

// ---------------------------------------------------------------- images in and out

function addFiles(files) {
  const added = [...files].map((file) => ({ file, status: "waiting", answer: null, problem: null, at: null, maps: new Map(), job: null }));
  if (!added.length) return;
  items.push(...added);
  added.forEach(table.add);
  announce(`${added.length} ${added.length === 1 ? "image" : "images"} added`);
  select(added[0], false);
  pump();
  if (SMALL.matches) byId(items.length > 1 ? "many" : "result").scrollIntoView();
}

function enqueue(some) {
  for (const item of some) {
    item.job?.abort();
    Object.assign(item, { status: "waiting", job: null, problem: null });
    item.maps.clear();
    show(item);
  }
  hideProblem();
  pump();
}

function removeItem(item) {
  item.job?.abort();
  item.job = null;
  const place = items.indexOf(item);
  items.splice(place, 1);
  table.remove(item);
  announce(`${item.file.name} removed`);
  if (item === selected) select(items[Math.min(place, items.length - 1)] ?? null, false);
  if (!items.length) byId("choose").focus();
  showProgress();
}

function removeAll() {
  for (const item of items) {
    item.job?.abort();
    item.job = null;
    table.remove(item);
  }
  items = [];
  select(null, false);
  hideProblem();
  showProgress();
  announce("All images removed");
  byId("choose").focus();
}

function cancel() {
  for (const item of items.filter(isOpen)) {
    item.job?.abort();
    Object.assign(item, { status: "cancelled", job: null });
    show(item);
  }
  hideProblem();
  showProgress();
  announce("Cancelled");
}

const isOpen = ({ status }) => status === "waiting" || status === "running";
const isLeft = ({ status }) => status === "failed" || status === "cancelled";

// ---------------------------------------------------------------- the queue

function pump() {
  while (running < AT_ONCE) {
    const next = selected?.status === "waiting" ? selected : items.find(({ status }) => status === "waiting");
    if (!next) break;
    running += 1;
    classify(next).finally(() => {
      running -= 1;
      pump();
    });
  }
  showProgress();
}

async function classify(item) {
  const job = new AbortController();
  Object.assign(item, { status: "running", job });
  show(item);
  try {
    const background = item !== selected;
    const options = { query: rule(), background, signal: job.signal, onWait: tellWait };
    const answer = background ? await server.predict(item.file, options) : await explain(item, { ...viewer.chosen, ...options });
    if (item.job !== job) return;
    Object.assign(item, { status: "done", answer, at: new Date() });
    hideWait();
    if (item === selected) announce(`${item.file.name}: ${headline(answer)}. ${explanation(answer)} ${answer.decision.reasons.join(". ")}`);
    // Another version was promoted; without its manifest only the scale lacks where it abstains
    if (!manifestOf(answer.model.version)) await readModels().catch(() => {});
  } catch (error) {
    if (item.job !== job) return;
    Object.assign(item, { status: "failed", answer: null, problem: asProblem(error) });
    if (item === selected) announce(`${item.file.name}: ${item.problem.title}`);
    if ([401, 403].includes(item.problem.status)) askForKey(item.problem);
  }
  show(item);
}

/** The explanation of an item for a target and a style, kept until the item is no longer shown. */
async function evidence(item, { target, style, signal }) {
  const kept = item.maps.get(`${target} ${style}`);
  return kept ?? explain(item, { target, style, query: rule(), signal, onWait: tellWait });
}

async function explain(item, { target, style, query, ...options }) {
  const answer = await server.explain(item.file, { query: { ...query, target, style }, ...options });
  item.maps.set(`${target} ${style}`, answer);
  hideWait();
  return answer;
}

function asProblem(error) {
  if (error instanceof server.Refusal) return error;
  console.error(error);
  return { title: "The file cannot be read", detail: "it may have been moved or changed: choose it again" };
}

function rule() {
  const [point, coverage] = [byId("operating-point").value, byId("coverage").value];
  return { ...(point && { operating_point: point }), ...(coverage && { coverage }) };
}

function askForKey(problem) {
  for (const item of items.filter(isOpen)) {
    item.job?.abort();
    Object.assign(item, { status: "failed", job: null, problem });
    show(item);
  }
  openKey(problem);
}

// ---------------------------------------------------------------- what is shown

function select(item, byHand) {
  const before = selected;
  selected = item;
  if (before && before !== item) {
    before.maps.clear();
    table.update(before, false);
  }
  byId("result").hidden = !item;
  if (!item) {
    viewer.clear();
    return;
  }
  byId("result-title").textContent = item.file.name;
  viewer.show(item);
  show(item);
  if (byHand) byId("result-title").focus();
}

function show(item) {
  table.update(item, item === selected);
  showProgress();
  if (item !== selected) return;
  const box = byId("verdict");
  if (item.status === "done") box.replaceChildren(verdict(item, manifestOf(item.answer.model.version)));
  else if (item.status === "failed") box.replaceChildren(failure(item));
  else box.replaceChildren(el("section", { class: "card verdict waiting" }, el("p", { class: isOpen(item) ? "busy" : "" }, isOpen(item) ? "The model is looking …" : "Cancelled")));
  byId("again").hidden = !isLeft(item);
  byId("print").hidden = item.status !== "done";
  viewer.refresh();
}

function failure({ problem }) {
  return el(
    "section",
    { class: "card verdict failed", "aria-label": "Problem" },
    el("div", { class: "headline" }, el("div", {}, el("h3", {}, problem.title), el("p", {}, capital(problem.detail ?? "")))),
    problem.request_id && el("p", { class: "fine" }, `Request ${problem.request_id}`),
  );
}

function showProgress() {
  const open = items.filter(isOpen).length;
  const count = (status) => items.filter((item) => item.status === status).length;
  const referred = items.filter(({ status, answer }) => status === "done" && answer.decision.refer).length;
  const words = [`${items.length - open} of ${items.length} answered`];
  if (referred) words.push(`${referred} to refer`);
  if (count("failed")) words.push(`${count("failed")} failed`);
  if (count("cancelled")) words.push(`${count("cancelled")} cancelled`);
  document.body.toggleAttribute("data-any", items.length > 0);
  byId("many").hidden = items.length < 2;
  byId("progress").hidden = open === 0;
  byId("progress").max = items.length || 1;
  byId("progress").value = items.length - open;
  byId("progress-words").textContent = words.join(", ");
  byId("cancel").hidden = open === 0;
  byId("retry").hidden = !items.some(isLeft);
  byId("retry").textContent = `Try ${items.filter(isLeft).length} again`;
  byId("export").disabled = open === items.length;
  if (open === 0 && items.length > 1 && byId("many").dataset.told !== words.join()) announce(words.join(", "));
  byId("many").dataset.told = open === 0 ? words.join() : "";
}

function showProblem({ title, detail }, kind = "") {
  byId("problem").dataset.kind = kind;
  byId("problem").replaceChildren(el("strong", {}, title), ` ${capital(detail ?? "")}`);
  byId("problem").hidden = false;
}

function hideProblem() {
  byId("problem").hidden = true;
}

function tellWait(waitS, { title, detail }) {
  showProblem({ title, detail: `${detail}. Trying again in ${waitS} s.` }, "wait");
}

function hideWait() {
  if (byId("problem").dataset.kind === "wait") hideProblem();
}

// ---------------------------------------------------------------- the model

const manifestOf = (version) => listed?.versions.find((entry) => entry.version === version)?.manifest;

/** What can be chosen, and what is said of it; throws Refusal. */
async function readModels() {
  listed = await server.models();
  const served = listed.versions.find((entry) => entry.served);
  byId("served").textContent = `${listed.name} · version ${served?.version ?? "unknown"}`;
  byId("formats").textContent = `JPEG, PNG or WebP, up to ${listed.limits.bytes / 1e6} MB. One lesion an image, as the dermatoscope gives it.`;
  const { operating_points: points = {}, abstention = {} } = served?.manifest ?? {};
  fill("operating-point", Object.keys(points), listed.defaults.operating_point);
  fill("coverage", [...Object.keys(abstention), "off"], listed.defaults.coverage, (name) => (name === "off" ? "off: never refers" : coverageWords(name)));
  explainRule();
  fill("version", listed.versions.map((entry) => entry.version).reverse(), served?.version, (version) => (version === served?.version ? `${version}, served` : version));
  if (!byId("model").hidden) showVersion();
}

async function start() {
  try {
    await readModels();
    hideProblem();
  } catch (error) {
    if ([401, 403].includes(error.status)) openKey(error);
    else showProblem(asProblem(error));
  }
}

function fill(id, values, preset, words = (value) => value) {
  const box = byId(id);
  const wanted = values.includes(box.value) ? box.value : preset;
  box.replaceChildren(...values.map((value) => el("option", { value, selected: value === wanted }, words(value))));
  box.disabled = values.length < 2;
}

function explainRule() {
  const served = listed?.versions.find((entry) => entry.served)?.manifest;
  const point = served?.operating_points[byId("operating-point").value];
  const rate = served?.abstention[byId("coverage").value]?.refer_rate;
  byId("operating-point-means").textContent = point ? `${served.classes.at(-1)} at ${percent(point.threshold)} or above` : "";
  byId("coverage-means").textContent = rate === undefined ? "refers nothing" : `referred ${percent(rate)} of its held-out images`;
}

function showVersion() {
  const entry = listed?.versions.find(({ version }) => version === byId("version").value);
  if (entry) showModel(entry);
}

// ---------------------------------------------------------------- the key

function openKey(problem) {
  byId("key-problem").hidden = !problem;
  if (problem) byId("key-problem").replaceChildren(el("strong", {}, problem.title), ` ${capital(problem.detail ?? "")}`);
  byId("key-forget").hidden = !server.readKey();
  byId("key-field").value = "";
  if (!byId("key").open) byId("key").showModal();
  byId("key-field").focus();
}

async function useKey(event) {
  event.preventDefault();
  server.keepKey(byId("key-field").value.trim());
  try {
    await readModels();
  } catch (error) {
    server.forgetKey();
    openKey(asProblem(error));
    return;
  }
  byId("key").close();
  announce("The key is accepted");
  hideProblem();
  enqueue(items.filter(({ problem }) => [401, 403].includes(problem?.status)));
}

function forget() {
  server.forgetKey();
  byId("key").close();
  announce("The key is forgotten");
}

// ---------------------------------------------------------------- paper and CSV

function printable() {
  const ready = selected?.status === "done" && !byId("images").hidden;
  document.documentElement.toggleAttribute("data-report", ready);
  byId("report").replaceChildren(...(ready ? report(selected, manifestOf(selected.answer.model.version), viewer.pictures()).filter(Boolean) : []));
}

function exportCsv() {
  const url = URL.createObjectURL(new Blob(["\ufeff", toCsv(items)], { type: "text/csv" }));
  el("a", { href: url, download: `dermlens-${new Date().toISOString().slice(0, 10)}.csv` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// ---------------------------------------------------------------- wiring

function showView() {
  const model = location.hash === "#model";
  byId("images").hidden = model;
  byId("model").hidden = !model;
  byId(model ? "to-model" : "to-images").setAttribute("aria-current", "page");
  byId(model ? "to-images" : "to-model").removeAttribute("aria-current");
  document.title = `${model ? "Model" : "Images"} · dermlens`;
  if (model) showVersion();
}

function onView() {
  showView();
  byId(byId("model").hidden ? "images-title" : "model-title").focus();
  scrollTo(0, 0);
}

function onDrag(event) {
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault(); // or the browser would leave this page for the file
  byId("over").hidden = event.type !== "dragover";
  if (event.type === "drop") {
    location.hash = "#images";
    addFiles(event.dataTransfer.files);
  }
}

function onPaste(event) {
  const { files } = event.clipboardData;
  if (files.length) addFiles(files);
  else if (!event.target.matches("input")) announce("There is no image in what was pasted");
}

function onFiles({ target }) {
  addFiles(target.files);
  target.value = ""; // so that the same file can be chosen again
}

byId("host").textContent = location.host;
for (const id of ["choose", "photograph"]) byId(id).addEventListener("change", onFiles);
for (const kind of ["dragover", "dragleave", "drop"]) addEventListener(kind, onDrag);
addEventListener("paste", onPaste);
addEventListener("hashchange", () => ["#images", "#model", ""].includes(location.hash) && onView());
addEventListener("beforeprint", printable);
byId("rule").addEventListener("change", () => {
  explainRule();
  enqueue(items.filter((item) => !isLeft(item)));
});
byId("version").addEventListener("change", showVersion);
byId("cancel").addEventListener("click", cancel);
byId("retry").addEventListener("click", () => enqueue(items.filter(isLeft)));
byId("export").addEventListener("click", exportCsv);
byId("clear").addEventListener("click", removeAll);
byId("again").addEventListener("click", () => enqueue([selected]));
byId("remove").addEventListener("click", () => removeItem(selected));
byId("print").addEventListener("click", () => print());
byId("key-open").addEventListener("click", () => openKey(null));
byId("key-close").addEventListener("click", () => byId("key").close());
byId("key-forget").addEventListener("click", forget);
byId("key-form").addEventListener("submit", useKey);
showView();
showProgress();
start();
