// What the model says of one image, for the screen and for paper.

import { bytes, capital, coverageWords, el, icon, percent } from "./dom.js";

/** The card beside the image; `manifest` is of the version that answered, or undefined where it is not known. */
export function verdict({ file, answer }, manifest) {
  const { decision, image } = answer;
  const kind = decision.refer ? "refer" : decision.positive === false ? "below" : "above";
  return el(
    "section",
    { class: `card verdict ${kind}`, "aria-label": "Verdict" },
    el(
      "div",
      { class: "headline" },
      icon(decision.refer ? "person" : kind),
      el("div", {}, el("h3", {}, headline(answer)), el("p", {}, explanation(answer))),
    ),
    list(decision.refer ? "Why" : "Note", decision.reasons, "reasons"),
    chances(answer, manifest),
    list("Image quality", image.warnings, "warnings"),
    facts(file, answer),
    el("p", { class: "fine" }, answer.notice),
  );
}

/** One page of paper. `pictures` are nodes. */
export function report({ file, answer, at }, manifest, pictures) {
  const { decision } = answer;
  return [
    el("header", {}, el("p", { class: "brand" }, "dermlens"), el("p", {}, at.toLocaleString())),
    el("p", { class: "notice" }, answer.notice),
    el("div", { class: "report-pictures" }, pictures),
    el("h1", {}, headline(answer)),
    el("p", { class: "lead" }, explanation(answer)),
    list(decision.refer ? "Why" : "Note", decision.reasons, "reasons"),
    chances(answer, manifest),
    list("Image quality", answer.image.warnings, "warnings"),
    facts(file, answer),
    el("h2", {}, "Limits"),
    el("ul", { class: "limits" }, limits(manifest).map((limit) => el("li", {}, limit))),
    el("p", { class: "sign" }, el("span", {}, "Read by"), el("span", {}, "Finding"), el("span", {}, "Date")),
  ];
}

export function headline({ decision, label }) {
  return decision.refer ? "Refer to a person" : capital(label);
}

/** In one sentence, what the headline rests on. */
export function explanation({ decision, label, probabilities }) {
  if (decision.refer) return "The model abstains on this image: its number is not an answer.";
  if (decision.threshold === null) return `The likeliest of ${Object.keys(probabilities).length} classes.`;
  const [last] = Object.keys(probabilities).slice(-1);
  const side = decision.positive ? "at or above" : "below";
  return `The probability of ${last} is ${side} the threshold of the operating point ${decision.operating_point}. Called ${label}.`;
}

/** What any reader of a number must know; with the version's own figures, from its manifest. */
export function limits(manifest) {
  const told = Object.entries(manifest?.external_metrics ?? {}).map(([name, metrics]) => auc(`On ${name}, images of other places`, metrics));
  if (manifest) told.unshift(auc(`On ${manifest.split.held_out_images} held-out images of ${manifest.split.data}`, manifest.metrics));
  return [
    "The probability is the model's, for one image. It knows neither the patient nor the lesion's history.",
    ...told.filter(Boolean),
    "Other devices, clinics, skin tones and lesion types than it has seen make it worse, and its number alone does not show that.",
    "The coloured map shows where the model's evidence lies, coarsely, not whether the evidence is right.",
  ];
}

function auc(where, { roc_auc: metric }) {
  return metric && `${where} its ROC-AUC is ${metric.value.toFixed(3)} (95% interval ${metric.low.toFixed(3)} to ${metric.high.toFixed(3)}).`;
}

function list(title, entries, kind) {
  if (!entries.length) return null;
  const mark = kind === "warnings" ? icon("warning") : null;
  return el("div", { class: `told ${kind}` }, el("h4", {}, mark, title), el("ul", {}, entries.map((entry) => el("li", {}, capital(entry)))));
}

function chances(answer, manifest) {
  const entries = Object.entries(answer.probabilities);
  return entries.length === 2 ? gauge(answer, manifest) : ranking(entries);
}

/** The probability of the last of two classes, its threshold, and where the model would abstain. */
function gauge({ decision, probabilities }, manifest) {
  const [[first, other], [last, chance]] = Object.entries(probabilities);
  const band = abstains(manifest?.abstention?.[decision.coverage], first, last);
  const said = [`Probability of ${last} ${percent(chance)}`];
  if (decision.threshold !== null) said.push(`threshold ${percent(decision.threshold)}`);
  if (band) said.push(`between ${percent(band.from)} and ${percent(band.to)} the model abstains`);
  return el(
    "div",
    { class: "chance" },
    el("p", { class: "number" }, el("strong", {}, percent(chance)), el("span", {}, ` probability of ${last}`)),
    el(
      "div",
      { class: "gauge", role: "img", "aria-label": `${said.join("; ")}.`, "--chance": chance },
      band && el("span", { class: "band", "--from": band.from, "--to": band.to }),
      el("span", { class: "fill" }),
      decision.threshold !== null && el("span", { class: "mark", "--at": decision.threshold }),
    ),
    el("p", { class: "ends muted", "aria-hidden": "true" }, el("span", {}, "0%"), el("span", {}, "100%")),
    el(
      "ul",
      { class: "keys muted" },
      decision.threshold !== null &&
        el("li", {}, el("span", { class: "key mark", "aria-hidden": "true" }), `Threshold ${percent(decision.threshold)}, ${decision.operating_point}`),
      band && el("li", {}, el("span", { class: "key band", "aria-hidden": "true" }), `Abstains from ${percent(band.from)} to ${percent(band.to)}`),
      el("li", {}, el("span", { class: "key", "aria-hidden": "true" }), `${capital(first)} ${percent(other)}`),
    ),
  );
}

/** Where not exactly one of two classes reaches its quantile, on the scale of the last; null where nowhere. */
function abstains(rule, first, last) {
  if (!rule) return null;
  const [from, to] = [rule.quantiles[last], 1 - rule.quantiles[first]].sort((a, b) => a - b);
  return from < to ? { from, to } : null;
}

function ranking(entries) {
  const best = entries.toSorted((a, b) => b[1] - a[1]).slice(0, 5);
  const rows = best.map(([name, chance]) =>
    el("li", { "--chance": chance }, el("span", {}, name), el("strong", {}, percent(chance)), el("span", { class: "line", "aria-hidden": "true" })),
  );
  return el("div", { class: "chance" }, el("h4", {}, "Probabilities"), el("ol", { class: "ranking" }, rows));
}

function facts(file, { decision, image, label, model, request_id: request }) {
  const plausible = decision.prediction_set?.join(", ") || "none";
  const rows = [
    ["File", file.name],
    ["Image", `${image.width} × ${image.height}, ${image.format}, ${bytes(file.size)}`],
    ["Model", `${model.name}, version ${model.version}`],
    decision.operating_point && ["Operating point", `${decision.operating_point}: ${label}`],
    decision.coverage && [`Plausible at ${coverageWords(decision.coverage)}`, plausible],
    ["Request", request],
  ];
  return el("dl", { class: "facts" }, rows.filter(Boolean).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}
