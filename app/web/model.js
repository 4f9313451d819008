// The model page: a version's figures with their intervals, its thresholds, and the pictures of its report.

import { byId, coverageWords, el, percent } from "./dom.js";
import { readKey, reportPicture } from "./server.js";
import { limits } from "./verdict.js";

const METRICS = {
  roc_auc: "ROC-AUC",
  pr_auc: "Precision-recall AUC",
  sensitivity: "Sensitivity",
  specificity: "Specificity",
  balanced_accuracy: "Balanced accuracy",
  accuracy: "Accuracy",
  precision: "Precision",
  f1: "F1",
  ece: "Calibration error (ECE), lower is better",
  brier: "Brier score, lower is better",
  log_loss: "Log loss, lower is better",
};

const PICTURES = {
  roc: "ROC curve on the held-out images",
  reliability: "Reliability: how often what was called likely was so",
  confusion: "Confusion matrix at the balanced operating point",
  decision_curve: "Decision curve: net benefit against treating all or none",
  roc_elsewhere: "ROC curve on images of other places",
  reliability_elsewhere: "Reliability on images of other places",
  robustness: "What noise, blur, light and other corruptions cost",
  contact_sheet: "Lesion outlines, and maps of the evidence",
  gates: "What the fusion gate lets through",
  history: "Training",
};

let urls = []; // of the pictures that are shown

/** Fill #model-body with a version as GET /models lists it. */
export function showModel({ version, manifest, problem, report }) {
  urls.forEach(URL.revokeObjectURL);
  urls = [];
  const body = byId("model-body");
  if (!manifest) {
    body.replaceChildren(el("p", { class: "banner" }, problem));
    return;
  }
  const pictures = report.filter((file) => file.endsWith(".png"));
  pictures.sort((a, b) => place(a) - place(b));
  const parts = [
    el("p", { class: "lead" }, about(manifest)),
    card("Limits", el("ul", { class: "limits" }, limits(manifest).map((limit) => el("li", {}, limit)))),
    card(
      "How good it is",
      el("p", { class: "muted" }, "Values with their 95% intervals. The bars show the interval from 0 to 1."),
      el("div", { class: "tables" }, metricTable(`Held out: ${manifest.split.held_out_images} images of ${manifest.split.data}`, manifest.metrics), Object.entries(manifest.external_metrics).map(([name, metrics]) => metricTable(`Elsewhere: ${name}`, metrics))),
    ),
    el("div", { class: "tables" }, card("Operating points", pointTable(manifest)), card("When it refers to a person", coverageTable(manifest))),
    pictures.length > 0 && card("Pictures of its report", el("div", { class: "plots" }, pictures.map((file) => plot(version, file)))),
    // A link cannot carry the key
    report.includes("report.html") && !readKey() && el("p", {}, el("a", { href: `models/${version}/report/report.html` }, "The whole report")),
    card("Where it comes from", el("dl", { class: "facts" }, origin(manifest).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))))),
  ];
  body.replaceChildren(...parts.filter(Boolean));
}

function card(title, ...children) {
  return el("section", { class: "card" }, el("h2", {}, title), children);
}

function about({ classes, split, created }) {
  return `Tells ${classes.join(" from ")}. Trained on ${split.training_images} images, published ${created.slice(0, 10)}.`;
}

function metricTable(caption, metrics) {
  const names = [...Object.keys(METRICS), ...Object.keys(metrics)].filter((name, place, all) => name in metrics && all.indexOf(name) === place);
  const rows = names.map((name) => {
    const { value, low, high } = metrics[name];
    return [METRICS[name] ?? name.replaceAll("_", " "), value.toFixed(3), `${low.toFixed(3)} to ${high.toFixed(3)}`, el("span", { class: "interval", "--low": Math.min(1, low), "--high": Math.min(1, high), "--value": Math.min(1, value), "aria-hidden": "true" }, el("i"))];
  });
  return table(caption, ["Metric", "Value", "95% interval"], rows);
}

function pointTable({ operating_points: points, classes }) {
  const rows = Object.entries(points).map(([name, { threshold }]) => [name, percent(threshold)]);
  return table(`Called ${classes.at(-1)} at or above`, ["Operating point", "Threshold"], rows);
}

function coverageTable({ abstention }) {
  const rows = Object.entries(abstention).map(([name, rule]) => [coverageWords(name), Object.entries(rule.coverage).map(([label, share]) => `${label} ${percent(share)}`).join(", "), percent(rule.refer_rate)]);
  if (!rows.length) return el("p", {}, "Never: this version has no abstention rule.");
  return table("Measured on its held-out images", ["Coverage", "Reached", "Referred"], rows);
}

/** A cell beyond the heads is a picture of the cells before it. */
function table(caption, heads, rows) {
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    el(
      "table",
      { class: "figures" },
      el("caption", {}, caption),
      el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)), rows[0]?.length > heads.length && el("td", { class: "drawn" }))),
      el("tbody", {}, rows.map(([head, ...cells]) => el("tr", {}, el("th", { scope: "row" }, head), cells.map((cell) => el("td", { class: cell instanceof Node ? "drawn" : false }, cell))))),
    ),
  );
}

const stem = (file) => file.replace(/\.\w+$/, "");

function place(file) {
  const known = Object.keys(PICTURES).indexOf(stem(file));
  return known < 0 ? Infinity : known;
}

function plot(version, file) {
  const caption = PICTURES[stem(file)] ?? stem(file).replaceAll("_", " ");
  const image = el("img", { alt: caption });
  const link = el("a", { target: "_blank", "aria-label": `${caption}, at full size` }, image);
  const figure = el("figure", {}, link, el("figcaption", {}, caption));
  reportPicture(version, file).then(
    (blob) => {
      urls.push(URL.createObjectURL(blob));
      link.href = image.src = urls.at(-1);
    },
    (refusal) => link.replaceWith(el("p", { class: "muted" }, refusal.title)),
  );
  return figure;
}

function origin(manifest) {
  const { architecture, preprocessing } = manifest;
  return [
    ["Model", `${manifest.name}, version ${manifest.version}`],
    ["Network", [architecture.backbone, architecture.gate && `ASFF, gate ${architecture.gate}`].filter(Boolean).join(" with ")],
    ["It sees", `${preprocessing.size} × ${preprocessing.size} pixels, whatever the image has`],
    ["Calibrated on", manifest.calibrated_on || "not told"],
    ["Commit", manifest.git_commit],
    ["Licence", manifest.licence],
  ];
}
