"""Pictures of a version for its report, as PNG bytes."""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import ConfusionMatrixDisplay, PrecisionRecallDisplay, RocCurveDisplay

from training.evaluate import Floats, Labels

matplotlib.use("Agg")  # no screen on a training host


def held_out_figure(
    labels: Labels, probabilities: Floats, positive: NDArray[np.bool_], *, classes: Sequence[str], title: str
) -> bytes:
    """ROC, precision–recall, reliability and confusion of labels [N] and calibrated probabilities [N]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 9), layout="constrained")
    (roc, pr), (reliability, confusion) = figure.subplots(2, 2)
    figure.suptitle(title)
    RocCurveDisplay.from_predictions(labels, probabilities, ax=roc, plot_chance_level=True)
    PrecisionRecallDisplay.from_predictions(labels, probabilities, ax=pr, plot_chance_level=True)
    roc.set_title("ROC")
    pr.set_title("Precision and recall")
    bins = np.array_split(np.argsort(probabilities, kind="stable"), 15)
    reliability.plot([0, 1], [0, 1], "--", color="grey")
    reliability.plot([probabilities[b].mean() for b in bins], [labels[b].mean() for b in bins], "o-")
    reliability.set(title="Reliability, 15 bins of equal mass", xlabel="mean probability", ylabel=f"share {classes[1]}")
    ConfusionMatrixDisplay.from_predictions(
        labels, positive.astype(int), display_labels=list(classes), ax=confusion, colorbar=False
    )
    confusion.set_title("Decisions at the balanced operating point")
    return _png(figure)


def history_figure(history: Sequence[dict[str, float]], *, title: str) -> bytes:
    """Losses and held-out ROC-AUC against epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, ranking = figure.subplots(1, 2)
    figure.suptitle(title)
    epochs = [row["epoch"] for row in history]
    for key, label in (
        ("train_loss", "training (smoothed labels)"),
        ("held_out_log_loss", "held-out, EMA weights"),
    ):
        losses.plot(epochs, [row[key] for row in history], label=label)
    losses.set(xlabel="epoch", title="Loss")
    losses.legend()
    ranking.plot(epochs, [row["held_out_roc_auc"] for row in history])
    ranking.set(xlabel="epoch", title="Held-out ROC-AUC, EMA weights")
    return _png(figure)


def _png(figure: "matplotlib.figure.Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return buffer.getvalue()
