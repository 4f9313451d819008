"""The report is made of what a version carries, and of nothing else."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.model import metadata, store
from app.model.manifest import Abstention, MetadataFusion, Metric, OutOfDistribution
from app.model.out_of_distribution import FILE
from tests.conftest import NAME, ROOT, make_manifest
from training.calibrate import cross_fitted, fit, judge
from training.config import load_config
from training.evaluate import Figures, add_external
from training.held_out import HeldOut, predictions_csv
from training.report import main, read_rows, verdict, write_report

SMOKE = load_config(ROOT / "training" / "configs" / "smoke.toml")
METRIC = Metric(value=0.91234, low=0.9, high=0.92)


def table(rows: Sequence[Mapping[str, object]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def pair(**changes: str) -> dict[str, str]:
    return {
        "network": "asff-branch",
        "baseline": "resnet50",
        "only_network_right": "7",
        "only_baseline_right": "5",
        "mcnemar_p": "0.77",
        "auc_network": "0.95",
        "auc_baseline": "0.94",
        "auc_difference": "0.01",
        "auc_low": "-0.01",
        "auc_high": "0.03",
        "delong_p": "0.4",
    } | changes


def publish(root: Path, files: Mapping[str, bytes], **changes: Any) -> Path:
    labels = np.arange(40) % 2
    logits = np.stack([np.zeros(40), np.linspace(-3, 3, 40)], axis=1).astype(np.float32)
    images = HeldOut(
        [f"{i}.png" for i in range(40)], labels, np.zeros(40, dtype=np.int64), np.zeros(40, dtype=bool), logits
    )
    rule = Abstention(
        quantiles={"benign": 0.3, "malignant": 0.2},
        coverage={"benign": 0.951, "malignant": 0.949},
        refer_rate=0.123,
        fitted_on="here",
    )
    fields: dict[str, Any] = {
        "training_config": SMOKE.model_dump(mode="json"),
        "metrics": {"roc_auc": METRIC, "accuracy": METRIC},
        "abstention": {"0.95": rule},
        "calibrated_on": "40 images of somewhere",
    }
    manifest = make_manifest(**fields | changes)
    carried = {
        store.WEIGHTS: b"",
        "report/predictions.csv": predictions_csv(
            [(images, cross_fitted(labels, logits), manifest.split.data)], ("benign", "malignant")
        ),
        "report/history.csv": table([{"epoch": 1, "train_loss": 0.5, "held_out_log_loss": "", "seconds": 60}]),
    }
    return store.publish(root, manifest, {**carried, **files})


def test_the_report_of_a_version_that_carries_little(tmp_path: Path) -> None:
    folder = publish(tmp_path, {})
    write_report(folder)
    page = (folder / "report" / "report.html").read_text()
    assert "0.9123 (0.9000–0.9200)" in page
    assert re.search(r"an ECE of 0\.\d{3};", page)
    assert "0.123" in page
    assert "Research use only" in page
    for heading in ("Robustness", "The comparison", "Skin tone", "Explanations", "Other clinics"):
        assert f"<h2>{heading}</h2>" not in page
    for name in ("roc", "confusion", "reliability", "decision_curve", "history"):
        assert (folder / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f'src="{name}.png"' in page
    card = (folder / "MODEL_CARD.md").read_text()
    assert "| roc_auc | 0.9123 | 0.9000 to 0.9200 |" in card
    assert "| 0.95 | benign 0.951, malignant 0.949 | 0.123 |" in card
    data = (folder / "DATA_CARD.md").read_text()
    assert "| `none` | 20 | 20 |" in data
    for of_isic in ("Dark skin", "ISIC", "paper"):  # it says nothing of data that it does not know
        assert of_isic not in card + data + page
    assert store.verify(tmp_path, NAME, "1").files.keys() == {
        store.WEIGHTS,
        "report/predictions.csv",
        "report/history.csv",
    }


def test_the_report_on_the_papers_images_names_the_paper_and_what_is_known_of_them(tmp_path: Path) -> None:
    config = SMOKE.model_copy(update={"data": SMOKE.data.model_copy(update={"root": "isic2020/train"})})
    split = make_manifest().split.model_copy(update={"data": "isic2020/train"})
    folder = publish(tmp_path, {}, training_config=config.model_dump(mode="json"), split=split)
    write_report(folder)
    assert "<td>0.9717</td>" in (folder / "report" / "report.html").read_text()
    assert "Dark skin is nearly absent" in (folder / "MODEL_CARD.md").read_text()
    assert "CC-BY-NC" in (folder / "DATA_CARD.md").read_text()


def test_evidence_that_a_version_carries_is_shown(tmp_path: Path) -> None:
    names = ("accuracy", "precision", "sensitivity", "specificity", "f1", "roc_auc", "pr_auc")
    row: dict[str, object] = {"network": "asff-branch", "parameters": 31_000_000}
    row |= {key: 0.9 for name in names for key in (name, f"{name}_low", f"{name}_high")}
    gates = [{"network": "asff-branch", "quantity": "mean", "at": "", "a": 0.4321}]
    gates += [
        {"network": "asff-branch", "quantity": f"sd_between_{k}", "at": "", "a": 0.1} for k in ("images", "channels")
    ]
    gates += [{"network": "asff-branch", "quantity": "quantile", "at": str(q), "a": q} for q in (0, 0.5, 1)]
    add_external(tmp_path / "external.csv", "version 1", "isic2019", Figures(77, {"roc_auc": METRIC}))
    files = {
        "report/comparison/table.csv": table([row]),
        "report/comparison/paired.csv": table([pair()]),
        "report/comparison/gates.csv": table(gates),
        "report/external.csv": (tmp_path / "external.csv").read_bytes(),
    }
    folder = publish(tmp_path, files, external_metrics={"isic2019": {"roc_auc": METRIC}})
    main(["--store", str(tmp_path), "--version", "1"])
    page = (folder / "report" / "report.html").read_text()
    assert "31.0 M" in page
    assert "asff-branch does not differ detectably from resnet50 here" in page
    assert "0.4321" in page
    assert "77" in page
    assert (folder / "report" / "gates.png").is_file()
    assert "### `isic2019`" in (folder / "MODEL_CARD.md").read_text()


def test_pooled_collections_of_isic_2019_are_told_apart(tmp_path: Path) -> None:
    """One is mostly benign, the other mostly malignant: pooled they score high, whatever is so within each."""
    labels = np.tile([0, 0, 0, 1], 10)
    labels = np.concatenate([labels, 1 - labels, [0, 1]])
    first = [24_306] * 40 + [53_453] * 40 + [14, 16]
    names = [f"benign/ISIC_{number + i:07}.jpg" for i, number in enumerate(first)]
    within = np.tile([-0.2, -0.1, 0.1, 0.0], 20)
    offset = np.concatenate([within[:40] - 2, within[40:] + 2, [0.0, 0.0]])
    logits = np.stack([np.zeros(82), offset], axis=1).astype(np.float32)
    abroad = HeldOut(names, labels, np.zeros(82, dtype=np.int64), np.ones(82, dtype=bool), logits)
    home = HeldOut([f"{i}.png" for i in range(82)], labels, abroad.folds, ~abroad.extra, logits)
    judged = judge(logits, fit(labels, logits))
    parts = [(home, judged, make_manifest().split.data), (abroad, judged, "isic2019")]
    predictions = predictions_csv(parts, ("benign", "malignant"))
    folder = publish(tmp_path, {"report/predictions.csv": predictions}, external_metrics={"isic2019": {}})
    write_report(folder)
    page = (folder / "report" / "report.html").read_text()
    rows = dict(re.findall(r"<td>isic2019</td><td>(\w+)</td>(.*?)</tr>", page))
    assert set(rows) == {"HAM10000", "BCN20000"}  # one image of a class is too few for a figure
    ham, bcn = (re.findall(r"<td>(.*?)</td>", rows[name]) for name in ("HAM10000", "BCN20000"))
    assert ham[:2] == ["40", "0.250"]
    assert bcn[:2] == ["40", "0.750"]
    assert ham[2].startswith("0.667 (")
    assert bcn[2].startswith("0.333 (")


def test_when_it_does_not_answer_is_shown(tmp_path: Path) -> None:
    limits = OutOfDistribution(
        method="ppca-mahalanobis",
        threshold=1.5,
        fitted_on="40 training images",
        flagged={"none": 0.0123},
        auroc={"photograph": 0.9876},
    )
    files = {
        "report/ood.csv": table(
            [
                {"kind": "none", "images": 40, "foreign": False, "auroc": "", "flagged": 0.0123},
                {"kind": "photograph", "images": 9, "foreign": True, "auroc": 0.9876, "flagged": 0.75},
            ]
        ),
        "report/ood_scores.csv": table([{"kind": k, "score": s} for k in ("none", "photograph") for s in (0.5, 2)]),
        "report/ood_methods.csv": table([{"method": "another", "auroc": 0.9}]),
        "report/quality.csv": table(
            [
                {"group": "as it is", "images": 40, "accuracy": 0.9, "severe": 0.0},
                *({"group": f"blur {n}", "images": 40, "accuracy": 0.7654, "severe": 0.1 * n} for n in range(1, 6)),
                {"group": "sharpness below 1, to 2", "images": 40, "accuracy": 0.8, "severe": ""},
            ]
        ),
    }
    folder = publish(tmp_path, files | {FILE: b""}, out_of_distribution=limits)
    write_report(folder)
    page = (folder / "report" / "report.html").read_text()
    for figure in ("0.9876", "1.2%", "75.0%", "another", "0.7654"):
        assert figure in page
    for picture in ("ood.png", "quality.png"):
        assert (folder / "report" / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in page
    card = (folder / "MODEL_CARD.md").read_text()
    assert "| photograph | 0.9876 |" in card
    assert "1.2% of `none`" in card


def test_what_a_version_takes_beside_the_image_is_on_its_card_as_an_experiment(tmp_path: Path) -> None:
    gain = Metric(value=0.0321, low=-0.0123, high=0.0777)
    about = MetadataFusion(
        experimental=True,
        fields=("age", "site"),
        trained_on="7 drawn lesions",
        held_out="8 drawn lesions",
        roc_auc={"all fields": METRIC},
        gain={"all fields": gain},
    )
    folder = publish(tmp_path, {metadata.FILE: b""}, metadata=about)
    write_report(folder)
    card = (folder / "MODEL_CARD.md").read_text()
    assert "## Beside the image: age, site (experimental)" in card
    assert "7 drawn lesions" in card
    assert "| all fields | 0.9123 | +0.0321 | -0.0123 to +0.0777 |" in card


def test_a_verdict_follows_the_tests() -> None:
    assert "is better than" in verdict(pair(delong_p="0.01"))
    assert "is worse than" in verdict(pair(delong_p="0.01", auc_difference="-0.01"))
    assert "is better than" in verdict(pair(mcnemar_p="0.04"))
    fewer = {"mcnemar_p": "0.001", "only_network_right": "15", "only_baseline_right": "40"}
    assert "is worse than" in verdict(pair(**fewer))  # whatever the sign of a difference of AUC that is none
    assert "is better and worse than" in verdict(pair(**fewer, delong_p="0.01"))


def test_external_figures_replace_those_of_the_same_setting(tmp_path: Path) -> None:
    path = tmp_path / "evidence" / "external.csv"
    for value in (0.7, 0.8):
        add_external(path, "a", "clinic", Figures(5, {"roc_auc": Metric(value=value, low=0, high=1)}))
    add_external(path, "b", "clinic", Figures(5, {"roc_auc": METRIC}))
    assert [(row["setting"], row["value"]) for row in read_rows(path)] == [("a", "0.800000"), ("b", "0.912340")]


def test_a_version_without_predictions_says_so(tmp_path: Path) -> None:
    store.publish(tmp_path, make_manifest(), {store.WEIGHTS: b""})
    with pytest.raises(SystemExit, match=r"carries no report/predictions\.csv"):
        main(["--store", str(tmp_path), "--version", "1"])
