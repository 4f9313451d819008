"""Write the report of a version from the CSV files it carries: HTML, pictures, model card and data card.

python -m training.report        # or: make report
"""

import argparse
import csv
import html
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.model import store
from app.model.labels import NOTICE
from app.model.manifest import Manifest, Metric
from training import plots
from training.evaluate import Floats, Labels, calibration_floor, decision_metrics
from training.isic import collections
from training.model_card import data_card, limits, model_card
from training.statistics import FEWEST, auc_with_interval

PREDICTIONS = "report/predictions.csv"
# arXiv 2510.03876, on its own 660 test images; from its abstract and its confusion matrix
PAPERS_DATA = "isic2020/train"
PAPER = {
    "accuracy": 0.9318,
    "precision": 0.9208,
    "sensitivity": 0.9300,
    "specificity": 0.9333,
    "f1": 0.9254,
    "roc_auc": 0.9717,
    "pr_auc": 0.9670,
}
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;
background:#fff}table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:left}th{background:#f3f3f3}img{max-width:100%}
.notice{border-left:4px solid #b00;
padding:.5rem 1rem;background:#fff5f5}.wide{overflow-x:auto}"""

Row = Mapping[str, str]


@dataclass(frozen=True)
class Predictions:
    """The rows of predictions.csv."""

    names: list[str]
    labels: Labels  # [N]
    sources: NDArray[np.str_]  # [N], folder of the data
    probabilities: Floats  # [N], of the last class, cross-fitted
    decided: Labels  # [N], cross-fitted


def write_report(folder: Path) -> None:
    """Render `report/`, MODEL_CARD.md and DATA_CARD.md of a published version from its manifest and CSV files.

    Raises:
        StoreError: there is no such version. ValueError: it carries no predictions.
    """
    manifest = store.read_manifest(folder.parent.parent, folder.parent.name, folder.name)
    report = folder / "report"
    if not (folder / PREDICTIONS).is_file():
        raise ValueError(f"{folder} carries no {PREDICTIONS}: it was published before reports were made from it")
    history = [{k: float(v) for k, v in row.items() if v} for row in read_rows(report / "history.csv")]
    predictions = _read_predictions(folder / PREDICTIONS, manifest)
    skin = _skin(report)
    sections = [
        _held_out_section(manifest, predictions, report),
        _decision_section(manifest),
        _refusal_section(manifest, report),
        _elsewhere_section(manifest, predictions, report),
        _comparison_section(report),
        _robustness_section(report),
        _skin_section(report, skin),
        _explanation_section(report),
        _training_section(manifest, history, report),
        "<h2>Limits</h2>" + "".join(f"<p>{_bold(line)}</p>" for line in limits(manifest)),
    ]
    title = f"{manifest.name} {manifest.version}"
    (report / "report.html").write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>"
        f'<p class="notice">{NOTICE}</p>{"".join(section for section in sections if section)}</html>\n'
    )
    seconds = sum(row["seconds"] for row in history)
    (folder / "MODEL_CARD.md").write_text(model_card(manifest, epochs=len(history), seconds=seconds))
    counts: dict[str, dict[str, int]] = {}
    for source, label in zip(predictions.sources, predictions.labels, strict=True):
        kinds = counts.setdefault(str(source), {})
        kinds[manifest.classes[label]] = kinds.get(manifest.classes[label], 0) + 1
    (folder / "DATA_CARD.md").write_text(data_card(manifest, counts, skin=skin))


def _held_out_section(manifest: Manifest, predictions: Predictions, report: Path) -> str:
    home = predictions.sources == manifest.split.data
    labels, probabilities = predictions.labels[home], predictions.probabilities[home]
    title = f"{manifest.name} {manifest.version}, {manifest.calibrated_on}"
    figures = {
        "confusion.png": plots.confusion_figure(
            labels, predictions.decided[home], classes=manifest.classes, title="Decisions, cross-fitted"
        )
    }
    columns = ["metric", "held out (95% interval)"]
    rows = [[name, _interval(metric)] for name, metric in manifest.metrics.items()]
    said = [f"{manifest.calibrated_on}. Network, calibration and threshold have not seen the image that they judge."]
    if manifest.split.data == PAPERS_DATA:
        columns.append("the paper")
        rows = [[*row, f"{PAPER[row[0]]:.4f}" if row[0] in PAPER else ""] for row in rows]
        said.append(
            "The paper's column is of its own 660 test images, on which it also chose its epoch; nobody here has seen "
            "them, so the columns are not a comparison."
        )
    if len(manifest.classes) == 2:
        figures |= {
            "roc.png": plots.roc_figure(labels, {"held out": probabilities}, title=title),
            "reliability.png": plots.reliability_figure(labels, probabilities, title="Reliability, bins of equal mass"),
            "decision_curve.png": plots.decision_curve_figure(labels, probabilities, title="Decision curve"),
        }
        floor = calibration_floor(probabilities)
        said.append(
            f"On {len(labels)} images a perfectly calibrated network would show an ECE of {floor:.3f}; resampling adds "
            "to it, so that the interval of the ECE lies too high."
        )
    return (
        f"<h2>Held-out figures</h2><p>{html.escape(' '.join(said))}</p>"
        + _table(columns, rows)
        + _pictures(report, figures)
    )


def _decision_section(manifest: Manifest) -> str:
    points = [[name, f"{p.threshold:.4f}", p.fitted_on] for name, p in manifest.operating_points.items()]
    rules = [
        [coverage, *(f"{rule.coverage[name]:.3f}" for name in manifest.classes), f"{rule.refer_rate:.3f}"]
        for coverage, rule in manifest.abstention.items()
    ]
    return (
        f"<h2>Decisions</h2><p>Temperature {manifest.temperature:.4f}.</p>"
        + _table(["operating point", "threshold", "fitted on"], points)
        + "<p>Abstention: class-conditional conformal prediction. An image whose set does not hold exactly one class "
        "is referred.</p>" + _table(["coverage", *(f"{name}: covered" for name in manifest.classes), "referred"], rules)
    )


def _refusal_section(manifest: Manifest, report: Path) -> str:
    """What the version does with images that are no dermoscopy, and with spoilt ones."""
    limits, parts = manifest.out_of_distribution, []
    if limits is not None and (report / "ood.csv").is_file():
        rows = [
            [row["kind"], row["images"], f"{float(row['auroc']):.4f}" if row["auroc"] else "", _share(row["flagged"])]
            for row in read_rows(report / "ood.csv")
        ]
        scores: dict[str, list[float]] = {}
        for row in read_rows(report / "ood_scores.csv"):
            scores.setdefault(row["kind"], []).append(float(row["score"]))
        picture = {"ood.png": plots.spread_figure(scores, title="Score, as a multiple of the threshold")}
        methods = read_rows(report / "ood_methods.csv")
        parts.append(
            f"<p>Distance of the pooled features from the training images; {html.escape(limits.fitted_on)}. AUROC is "
            "against held-out dermoscopy at home; an image above the threshold is referred. The foreign images are "
            "pictures that packages carry, and drawn ones: no clinical photograph of skin is among them.</p>"
            + _table(["kind", "images", "AUROC", "flagged"], rows)
            + _pictures(report, picture)
            + "<p>What else was tried, on foreign images from other sources:</p>"
            + _table(list(methods[0]), [list(row.values()) for row in methods])
        )
    for name, words in (
        ("quality.csv", "Held-out images, spoilt in five strengths, and bands beyond each limit of the quality gate."),
        ("tta.csv", "Test-time augmentation with the four flips, on the same held-out images; differences are paired."),
    ):
        if (report / name).is_file():
            found = read_rows(report / name)
            parts.append(f"<p>{words}</p>")
            if name == "quality.csv":
                parts.append(_degradations(found, report))
            parts.append(_table(list(found[0]), [list(row.values()) for row in found]))
    return "<h2>When it does not answer</h2>" + "".join(parts) if parts else ""


def _degradations(rows: Sequence[Row], report: Path) -> str:
    """Accuracy by strength, of the rows that are called after a kind and its strength."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        kind, _, strength = row["group"].rpartition(" ")
        if strength.isdigit() and row.get("severe"):
            found.setdefault(kind, []).append((float(row["accuracy"]), float(row["severe"])))
    if not found:
        return ""
    title = "Accuracy of spoilt images, and the share of them that is referred; dotted: as they are"
    picture = plots.degradation_figure(found, clean=float(rows[0]["accuracy"]), title=title)
    return _pictures(report, {"quality.png": picture})


def _share(text: str) -> str:
    return f"{float(text):.1%}"


def _elsewhere_section(manifest: Manifest, predictions: Predictions, report: Path) -> str:
    rows = [
        [f"version {manifest.version}: trained with it, held out", name, "", *_key_metrics(metrics)]
        for name, metrics in manifest.external_metrics.items()
    ]
    if (report / "external.csv").is_file():
        grouped: dict[tuple[str, str, str], dict[str, Metric]] = {}
        for row in read_rows(report / "external.csv"):
            metric = Metric(value=float(row["value"]), low=float(row["low"]), high=float(row["high"]))
            grouped.setdefault((row["setting"], row["data"], row["images"]), {})[row["metric"]] = metric
        rows += [[*where, *_key_metrics(metrics)] for where, metrics in grouped.items()]
    if not rows:
        return ""
    figures = {}
    for name in manifest.external_metrics:
        theirs = predictions.sources == name
        if theirs.any() and len(manifest.classes) == 2:
            labels, probabilities = predictions.labels[theirs], predictions.probabilities[theirs]
            figures["roc_elsewhere.png"] = plots.roc_figure(labels, {name: probabilities}, title=f"{name}, held out")
            figures["reliability_elsewhere.png"] = plots.reliability_figure(labels, probabilities, title=name)
    columns = ["setting", "data", "images", "ROC-AUC", "balanced accuracy", "sensitivity", "specificity", "ECE"]
    return (
        "<h2>Other clinics</h2>"
        + _table(columns, rows)
        + _pictures(report, figures)
        + (_collections_table(predictions, list(manifest.external_metrics)) if len(manifest.classes) == 2 else "")
    )


def _collections_table(predictions: Predictions, sources: Sequence[str]) -> str:
    """Figures within each collection of ISIC 2019, where labels and images of several are pooled."""
    rows = []
    for source, (collection, members) in itertools.product(sources, collections(predictions.names).items()):
        mine = (predictions.sources == source) & members
        labels = predictions.labels[mine]
        auc = auc_with_interval(labels, predictions.probabilities[mine])
        if len(auc) == 3:
            decisions = decision_metrics(labels, predictions.decided[mine] == 1)
            figures = (labels.mean(), decisions["sensitivity"], decisions["specificity"])
            share, sensitivity, specificity = (f"{figure:.3f}" for figure in figures)
            interval = f"{auc[0]:.3f} ({auc[1]:.3f}–{auc[2]:.3f})"
            rows.append([source, collection, str(len(labels)), share, interval, sensitivity, specificity])
    if not rows:
        return ""
    return (
        "<p>The same held-out images by the collection that they come from. These differ in how many of their images "
        "are malignant, so the ROC-AUC over all rewards telling collections apart; within one of them it does "
        f"not. Collections with fewer than {FEWEST} images of a class are left out.</p>"
    ) + _table(["data", "collection", "images", "malignant", "ROC-AUC", "sensitivity", "specificity"], rows)


def _key_metrics(metrics: Mapping[str, Metric]) -> list[str]:
    names = ("roc_auc", "balanced_accuracy", "sensitivity", "specificity", "ece")
    return [_interval(metrics[name]) if name in metrics else "" for name in names]


def _comparison_section(report: Path) -> str:
    folder = report / "comparison"
    if not (folder / "table.csv").is_file():
        return ""
    names = ("accuracy", "precision", "sensitivity", "specificity", "f1", "roc_auc", "pr_auc")
    rows = [
        [row["network"], f"{int(row['parameters']) / 1e6:.1f} M"]
        + [f"{float(row[n]):.3f} ({float(row[f'{n}_low']):.3f}–{float(row[f'{n}_high']):.3f})" for n in names]
        for row in read_rows(folder / "table.csv")
    ]
    pairs = read_rows(folder / "paired.csv") if (folder / "paired.csv").is_file() else []
    quantiles: dict[str, tuple[list[float], list[float]]] = {}
    facts: dict[str, dict[str, str]] = {}
    for row in read_rows(folder / "gates.csv") if (folder / "gates.csv").is_file() else []:
        if row["quantity"] == "quantile":
            values, shares = quantiles.setdefault(row["network"], ([], []))
            values.append(float(row["a"]))
            shares.append(float(row["at"]))
        else:
            facts.setdefault(row["network"], {})[row["quantity"]] = row["a"]
    gates = {"gates.png": plots.gates_figure(quantiles, title="What the gates do, on held-out images")}
    verdicts = "".join(f"<p>{html.escape(verdict(pair))}</p>" for pair in pairs)
    return (
        "<h2>The comparison</h2><p>Same folds, held-out images, start, budget and augmentation; AlexNet and SqueezeNet "
        "from scratch, as the paper had them. The budget is short (training/configs/compare.toml), so the figures "
        "lie below those of the published version.</p>"
        + _table(["network", "parameters", *names], rows)
        + verdicts
        + _table(
            ["gate", "mean of a", "spread between images", "spread between channels"],
            [[name, f["mean"], f["sd_between_images"], f["sd_between_channels"]] for name, f in facts.items()],
        )
        + _pictures(report, gates if quantiles else {})
    )


def verdict(pair: Row) -> str:
    """What a paired row says, in a sentence."""
    difference = float(pair["auc_difference"])
    found = {"delong_p": difference, "mcnemar_p": int(pair["only_network_right"]) - int(pair["only_baseline_right"])}
    shown = {difference > 0 for test, difference in found.items() if float(pair[test]) < 0.05}
    result = {
        (): "does not differ detectably from",
        (True,): "is better than",
        (False,): "is worse than",
        (False, True): "is better and worse than",
    }[tuple(sorted(shown))]
    return (
        f"{pair['network']} {result} {pair['baseline']} here: ROC-AUC difference {difference:+.4f} "
        f"({float(pair['auc_low']):+.4f} to {float(pair['auc_high']):+.4f}), DeLong p = {pair['delong_p']}; "
        f"alone right on {pair['only_network_right']} images against {pair['only_baseline_right']}, "
        f"McNemar p = {pair['mcnemar_p']}."
    )


def _robustness_section(report: Path) -> str:
    if not (report / "robustness.csv").is_file():
        return ""
    from training.robustness import robustness_figure

    picture = {"robustness.png": robustness_figure(read_rows(report / "robustness.csv"))}
    rows = [
        [
            *(row[key] for key in ("network", "kind", "metric", "images")),
            f"{float(row['value']):.3f} ({float(row['low']):.3f} to {float(row['high']):.3f})",
        ]
        for row in read_rows(report / "robustness_summary.csv")
        if row["kind"] in ("clean", "all") or " - " in row["network"]
    ]
    return (
        "<h2>Robustness</h2><p>Held-out images under eight corruptions, five strengths each; the threshold was fitted "
        "on other, clean images. Training drew hairs and rulers of this kind too, so these two are no surprise to the "
        "networks. Below: means over the strengths; a difference is paired, on the same images.</p>"
        + _pictures(report, picture)
        + _table(["network", "corruption", "metric", "images", "mean (95% interval)"], rows)
    )


def _skin(report: Path) -> str:
    if not (report / "skin_tone.csv").is_file():
        return ""
    from training.skin_tone import statement

    return statement(read_rows(report / "skin_tone.csv"))


def _skin_section(report: Path, skin: str) -> str:
    if not skin:
        return ""
    rows = read_rows(report / "skin_tone.csv")
    return (
        "<h2>Skin tone</h2><p>Individual typology angle, estimated from the skin around the lesion; a dermoscope's "
        f"light is not calibrated, so the classes are rough.</p><p><strong>{html.escape(skin)}</strong></p>"
        + _table(list(rows[0]), [list(row.values()) for row in rows])
    )


def _explanation_section(report: Path) -> str:
    if not (report / "explanations.csv").is_file():
        return ""
    from training.explain_eval import judge
    from training.explain_eval import read_rows as read_explanations

    found = read_explanations(report / "explanations.csv")
    rows = [
        [
            name,
            criterion.claim,
            f"{row.value:.3f} ({row.low:.3f} to {row.high:.3f})",
            f"{criterion.rule} {criterion.limit:g}",
            str(row.images),
            "pass" if passes else "FAIL",
        ]
        for name in dict.fromkeys(row.network for row in found)
        for criterion, row, passes in judge([row for row in found if row.network == name])
    ]
    columns = ["network", "claim", "mean (95% interval)", "criterion", "images", "verdict"]
    sheet = (
        "<p>Outline of the lesion (a classical segmentation, training/lesion_mask.py) and map of each network, without "
        "the photograph, which is not ours to distribute.</p>"
        '<img src="contact_sheet.png" alt="lesion outlines and maps">'
    )
    return "<h2>Explanations</h2>" + _table(columns, rows) + (sheet if (report / "contact_sheet.png").is_file() else "")


def _training_section(manifest: Manifest, history: Sequence[Mapping[str, float]], report: Path) -> str:
    figure = plots.history_figure(history, title=f"{manifest.name} {manifest.version}")
    return f"<h2>Training</h2><p>{manifest.split.training_images} images, {len(history)} epochs.</p>" + _pictures(
        report, {"history.png": figure}
    )


def _read_predictions(path: Path, manifest: Manifest) -> Predictions:
    rows = read_rows(path)
    last = manifest.classes[-1]
    return Predictions(
        names=[row["name"] for row in rows],
        labels=np.array([int(row["label"]) for row in rows]),
        sources=np.array([row["source"] for row in rows]),
        probabilities=np.array([float(row[f"probability_{last}"]) for row in rows]),
        decided=np.array([int(row["decided"]) for row in rows]),
    )


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _pictures(report: Path, figures: Mapping[str, bytes]) -> str:
    for name, data in figures.items():
        (report / name).write_bytes(data)
    return "".join(f'<img src="{name}" alt="{name.removesuffix(".png").replace("_", " ")}">' for name in figures)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _interval(metric: Metric) -> str:
    return f"{metric.value:.4f} ({metric.low:.4f}–{metric.high:.4f})"


def _bold(line: str) -> str:
    """A line of Markdown whose only mark is one bold phrase at its start."""
    if not line.startswith("**"):
        return html.escape(line)
    _, phrase, rest = line.split("**", 2)
    return f"<strong>{html.escape(phrase)}</strong>{html.escape(rest)}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.report", description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, default=Path("model_store"))
    parser.add_argument("--name", default="asff-resnet50")
    parser.add_argument("--version", help="default: the current one")
    options = parser.parse_args(arguments)
    try:
        folder = options.store / options.name / (options.version or store.current(options.store, options.name))
        write_report(folder)
    except (ValueError, store.StoreError) as error:
        sys.exit(f"training.report: {error}")
    print(f"wrote {folder / 'report' / 'report.html'}, MODEL_CARD.md and DATA_CARD.md")


if __name__ == "__main__":
    main()
