"""Pictures of a version for its report, as PNG bytes."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from sklearn.metrics import ConfusionMatrixDisplay, PrecisionRecallDisplay, RocCurveDisplay

from training.evaluate import Floats, Labels, equal_mass_bins

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def roc_figure(labels: Labels, probabilities: Mapping[str, Floats], *, title: str) -> bytes:
    """ROC and precision–recall, one line a data set or network; labels and probabilities [N] under the same key."""
    figure = new_figure(10, 4.6, title)
    roc, pr = figure.subplots(1, 2)
    for name, values in probabilities.items():
        RocCurveDisplay.from_predictions(labels, values, ax=roc, name=name)
        PrecisionRecallDisplay.from_predictions(labels, values, ax=pr, name=name)
    roc.plot([0, 1], [0, 1], "--", color="grey")
    pr.axhline(float(labels.mean()), linestyle="--", color="grey")
    roc.set(title="ROC", xlabel="1 − specificity", ylabel="sensitivity")
    pr.set(title="Precision and recall", xlabel="recall (sensitivity)", ylabel="precision")
    return png(figure)


def confusion_figure(labels: Labels, decided: Labels, *, classes: Sequence[str], title: str) -> bytes:
    """Counts of decisions [N] against labels [N]."""
    side = 3.6 + 0.3 * len(classes)
    figure = new_figure(side + 1, side, title)
    ConfusionMatrixDisplay.from_predictions(
        labels,
        decided,
        labels=range(len(classes)),
        display_labels=list(classes),
        ax=figure.subplots(),
        colorbar=False,
        cmap="Blues",
        xticks_rotation=45 if len(classes) > 2 else "horizontal",
    )
    return png(figure)


def reliability_figure(labels: Labels, probabilities: Floats, *, title: str) -> bytes:
    """Share of class 1 against the probability, in 15 bins of equal mass, with Wilson's 95% interval; labels [N]."""
    figure = new_figure(6, 5.6, title)
    curve, mass = figure.subplots(2, 1, height_ratios=[4, 1], sharex=True)
    bins = equal_mass_bins(probabilities)
    mean = np.array([probabilities[b].mean() for b in bins])
    share = np.array([labels[b].mean() for b in bins])
    count = np.array([len(b) for b in bins])
    centre = (share + 1.92 / count) / (1 + 3.84 / count)
    half = 1.96 * np.sqrt(share * (1 - share) / count + 0.96 / count**2) / (1 + 3.84 / count)
    curve.plot([0, 1], [0, 1], "--", color="grey")
    curve.errorbar(mean, share, yerr=[share - centre + half, centre + half - share], fmt="o-", capsize=2)
    curve.set(ylabel="observed share of the positive class", ylim=(-0.02, 1.02))
    mass.hist(probabilities, bins=40, range=(0, 1), color="grey")
    mass.set(xlabel="calibrated probability", ylabel="images")
    return png(figure)


def decision_curve_figure(labels: Labels, probabilities: Floats, *, title: str) -> bytes:
    """Net benefit of acting at a threshold probability (Vickers and Elkin 2006), against acting on all or none."""
    figure = new_figure(6, 4.4, title)
    axes = figure.subplots()
    thresholds = np.linspace(0.01, 0.95, 95)
    odds = thresholds / (1 - thresholds)
    acted = probabilities >= thresholds[:, None]
    true = (acted & (labels == 1)).mean(axis=1)
    false = (acted & (labels == 0)).mean(axis=1)
    prevalence = float(labels.mean())
    axes.plot(thresholds, true - odds * false, label="act on the model")
    axes.plot(thresholds, prevalence - odds * (1 - prevalence), label="act on every image", color="tab:orange")
    axes.axhline(0, label="act on none", color="grey")
    axes.set(xlabel="threshold probability", ylabel="net benefit", ylim=(-0.05, prevalence + 0.05))
    axes.legend()
    return png(figure)


def history_figure(history: Sequence[Mapping[str, float]], *, title: str) -> bytes:
    """Losses and held-out ROC-AUC against epochs."""
    figure = new_figure(10, 4, title)
    losses, ranking = figure.subplots(1, 2)
    for key, label in (
        ("train_loss", "training (smoothed labels)"),
        ("held_out_log_loss", "held-out, EMA weights"),
    ):
        losses.plot(*_points(history, key), "o-", label=label)
    losses.set(xlabel="epoch", title="Loss")
    losses.legend()
    for key, label in (("held_out_roc_auc", "held-out"), ("held_out_extra_roc_auc", "held-out of data.extra")):
        if any(key in row for row in history):
            ranking.plot(*_points(history, key), "o-", label=label)
            ranking.legend()
    ranking.set(xlabel="epoch", title="ROC-AUC, EMA weights")
    return png(figure)


def gates_figure(quantiles: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str) -> bytes:
    """Distribution of the gate's `a` over images and channels for each network: (values of `a`, share at or below)."""
    figure = new_figure(10, 3.6, title)
    for axes, (name, (values, shares)) in zip(
        figure.subplots(1, len(quantiles), squeeze=False)[0], quantiles.items(), strict=True
    ):
        axes.plot(values, shares)
        axes.set(
            title=name, xlabel="a, the share of conv4 in the fused map", ylabel="channels at or below", ylim=(0, 1)
        )
    return png(figure)


def spread_figure(values: Mapping[str, Sequence[float]], *, title: str) -> bytes:
    """A box of half of each kind's values, whiskers at 1% and 99%, on a logarithmic scale with a line at 1."""
    figure = new_figure(9, 0.32 * len(values) + 1.4, title)
    axes = figure.subplots()
    names = list(values)[::-1]
    axes.boxplot([values[name] for name in names], orientation="horizontal", whis=(1, 99), sym=".", tick_labels=names)
    axes.set(xscale="log")
    axes.axvline(1, color="tab:red", linestyle="--")
    return png(figure)


def degradation_figure(found: Mapping[str, Sequence[tuple[float, float]]], *, clean: float, title: str) -> bytes:
    """For each kind of degradation (accuracy, share of the images that are referred for it) by strength, from 1."""
    columns = 5
    lines = -(-len(found) // columns)
    figure = new_figure(11, 2.1 * lines + 0.6, title)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (kind, points) in zip(grid, found.items(), strict=False):
        strengths = range(1, len(points) + 1)
        axes.axhline(clean, color="grey", linestyle=":")
        axes.plot(strengths, [accuracy for accuracy, _ in points], "o-", label="accuracy")
        axes.plot(strengths, [referred for _, referred in points], "s--", color="tab:red", label="referred")
        axes.set(title=kind, ylim=(0, 1.02), xticks=strengths)
    grid[0].legend(fontsize=8)
    for axes in grid[len(found) :]:
        axes.set_axis_off()
    return png(figure)


def new_figure(width: float, height: float, title: str) -> "Figure":
    """An empty figure of that size in inches; drawn without a screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure


def png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()


def _points(history: Sequence[Mapping[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Epochs and values where `key` was measured."""
    rows = [row for row in history if key in row]
    return [row["epoch"] for row in rows], [row[key] for row in rows]
