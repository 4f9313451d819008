"""MODEL_CARD.md and DATA_CARD.md, generated from the manifest; their figures are never typed by hand."""

from collections.abc import Collection, Mapping
from typing import Any

from app.model.labels import NOTICE
from app.model.manifest import Manifest, Metric

LIMITS = (
    "**Research use only.** It is not a medical device and must not decide about a patient.",
    "It has seen the images of its data card, squashed to a square. Other kinds of photographs, devices, clinics and "
    "lesions degrade it.",
    "Folds keep near-duplicates together (thumbnails that correlate above 0.97); other images of one patient may still "
    "lie on both sides.",
    "A class-activation map shows where the model's evidence lies, coarsely, and not whether the evidence is right.",
)
LIMITS_OF_ISIC = (
    "**Dark skin is nearly absent** from the ISIC images that it has seen. On DDI, a model trained on similar data "
    "scored a ROC-AUC of 0.72 on light and 0.57 on dark skin (Daneshjou et al. 2022).",
    "Surgical ink and rulers are shortcuts: ink raised false positives by about 40 points in PMC6694463.",
)
LICENCE_OF_ISIC = "trained on ISIC images, CC-0 and CC-BY-NC"
SOURCES = {
    "isic2020/train": "the paper's training images, ISIC archive, 224×224 JPEG, squashed to a square by their makers",
    "isic2019": "images of three further sources in ISIC 2019 (HAM10000, BCN20000, MSK), shorter side 224",
}


def limits(manifest: Manifest) -> tuple[str, ...]:
    """What is to be said against a version, whatever it was trained on and started from."""
    data = manifest.training_config["data"]
    seen = {data["root"], data.get("extra"), *data.get("without", ())}
    return LIMITS + (LIMITS_OF_ISIC if seen & SOURCES.keys() else ())


def licence(folders: Collection[str]) -> str:
    """Of weights that were trained on images in these folders."""
    images = LICENCE_OF_ISIC if set(folders) <= SOURCES.keys() else "what the licence of the images asks is not stated"
    return f"Apache-2.0 (weights and code); {images}"


def metric_table(metrics: Mapping[str, Metric]) -> str:
    rows = "\n".join(f"| {name} | {m.value:.4f} | {m.low:.4f} to {m.high:.4f} |" for name, m in metrics.items())
    return f"| metric | value | 95% interval |\n| --- | --- | --- |\n{rows}"


def model_card(manifest: Manifest, *, epochs: int, seconds: float) -> str:
    """The card of a version, as Markdown.

    Args:
        epochs: of the published run. seconds: what they took.
    """
    split, config = manifest.split, manifest.training_config
    gate = manifest.architecture.gate
    network = f"ASFF ResNet-50, gate `{gate}`" if gate else "plain ResNet-50"
    points = "\n".join(f"| {name} | {p.threshold:.4f} |" for name, p in manifest.operating_points.items())
    rules = "\n".join(
        f"| {coverage} | {', '.join(f'{name} {share:.3f}' for name, share in rule.coverage.items())} "
        f"| {rule.refer_rate:.3f} |"
        for coverage, rule in manifest.abstention.items()
    )
    elsewhere = "".join(
        f"\n### `{name}`\n\nThe same networks, calibration and threshold on images of other clinics, held out too.\n\n"
        f"{metric_table(metrics)}\n"
        for name, metrics in manifest.external_metrics.items()
    )
    return f"""# {manifest.name} {manifest.version}

{NOTICE}

{network}, stride variant {manifest.architecture.stride_variant}, after arXiv 2510.03876. Classes: \
{", ".join(manifest.classes)}. Made {manifest.created:%Y-%m-%d} from commit `{manifest.git_commit}`. \
The full report is [report/report.html](report/report.html), the data are described in [DATA_CARD.md](DATA_CARD.md).

## Training

{split.training_images} images of {_folders(config)}, start `{config["model"]["start"]}`, {epochs} epochs, \
{seconds / 60:.0f} minutes in all. The published weights are the exponential moving average at the last epoch. \
{_stop(config, epochs)}{_mixture(config)}The whole configuration is in `manifest.json`.

![loss and ROC-AUC](report/history.png)

## Held-out figures

{_held_out(manifest)} Probabilities and decisions are cross-fitted: each image is judged by a bias, a temperature \
and a threshold that were fitted without it. Intervals are 95% percentile bootstrap over images.

{metric_table(manifest.metrics)}
{elsewhere}
## Decisions

Temperature {manifest.temperature:.4f}. A probability of `{manifest.classes[-1]}` at or above the threshold is positive.

| operating point | threshold |
| --- | --- |
{points}

Abstention is class-conditional conformal prediction: an image whose prediction set does not hold exactly one class is
referred.

| coverage asked for | share of each class whose set holds it | referred |
| --- | --- | --- |
{rules}
{_refusal(manifest)}{_beside(manifest)}{_int8(manifest)}
## Limits

{_list(limits(manifest))}
"""


def _refusal(manifest: Manifest) -> str:
    """What becomes of images that are no dermoscopy, where the version measures it."""
    limits = manifest.out_of_distribution
    if limits is None:
        return ""
    rows = "\n".join(f"| {kind} | {value:.4f} |" for kind, value in limits.auroc.items())
    flagged = ", ".join(f"{share:.1%} of `{source}`" for source, share in limits.flagged.items())
    return f"""
## Images that it does not know

An image whose pooled features lie too far from those of the training images is referred ({limits.fitted_on}).
Of held-out dermoscopy that flags {flagged}. AUROC of foreign images against held-out dermoscopy, by kind:

| kind | AUROC |
| --- | --- |
{rows}

They are pictures that software packages carry, and drawn ones. Clinical photographs of skin without a lesion were not
to be had, so nothing is known about those.
"""


def _beside(manifest: Manifest) -> str:
    """What the version takes beside the image, where it does."""
    found = manifest.metadata
    if found is None:
        return ""
    rows = "\n".join(
        f"| {known} | {auc.value:.4f} | {found.gain[known].value:+.4f} | {found.gain[known].low:+.4f} to "
        f"{found.gain[known].high:+.4f} |"
        for known, auc in found.roc_auc.items()
    )
    return f"""
## Beside the image: {", ".join(found.fields)} (experimental)

A small head moves the logits where a request tells more than the image; where it does not, they stay as they are.
It was trained on {found.trained_on}.
The figures are of {found.held_out}.
Thresholds and prediction sets are those of the image alone.

| known | ROC-AUC | gain on the image alone | 95% interval |
| --- | --- | --- | --- |
{rows}
"""


def _int8(manifest: Manifest) -> str:
    """What the int8 graph changes, where one was made."""
    found = manifest.quantization
    if found is None:
        return ""
    rows = "\n".join(f"| {name} | {value:.4f} | {found.int8[name]:.4f} |" for name, value in found.float32.items())
    moved, alike = found.probability_difference, found.cam_correlation
    shipped = "It ships with this version." if found.shipped else "It lost too much and does not ship."
    return f"""
## In int8

Post-training quantisation with NNCF, on the same {found.images} held-out images, at the threshold `balanced`. {shipped}

| metric | float32 | int8 |
| --- | --- | --- |
{rows}

The probability of an image moves by {moved["median"]:.4f} in the median, {moved["p99"]:.4f} for one in a hundred and \
{moved["max"]:.4f} at most; its map correlates with that of float32 at {alike["median"]:.4f} in the median, \
{alike["p01"]:.4f} for one in a hundred and {alike["min"]:.4f} at worst.
"""


def data_card(manifest: Manifest, counts: Mapping[str, Mapping[str, int]], *, skin: str) -> str:
    """What a version was trained and measured on, as Markdown.

    Args:
        counts: source -> class -> held-out images.
        skin: the statement on skin tone, empty where it was not measured.
    """
    split = manifest.split
    header = " | ".join(manifest.classes)
    origin = "Where the images come from, and under which licence, is not stated."
    if counts.keys() <= SOURCES.keys():
        origin = (
            "Licence of the images: CC-0 and CC-BY-NC (ISIC archive). They are not distributed with this model. No "
            "image of the paper's test set was used, looked for or seen.\n\n"
            f"{skin}\n"
            "There are no patient identifiers, no age, sex or site, and labels were taken as they are; a part of the "
            "benign ones was never confirmed by histology."
        )
    rows = "\n".join(
        " | ".join([f"| `{source}`", *(str(kinds.get(name, 0)) for name in manifest.classes), SOURCES.get(source, "")])
        + " |"
        for source, kinds in counts.items()
    )
    return f"""# Data of {manifest.name} {manifest.version}

Images that its figures were measured on, each held out by the network that judged it:

| source | {header} | what |
| --- |{" --- |" * len(manifest.classes)} --- |
{rows}

{split.training_images} images trained the published weights. Folds: {split.folds}, stratified by class; images whose
32×32 grey thumbnails correlate above 0.97 in any of the eight flips and turns share a fold, and images of a further
folder that resemble the first one's so closely are left out. SHA-256 over names, contents and folds:
`{split.fingerprint}`.

{origin}
"""


def _held_out(manifest: Manifest) -> str:
    split = manifest.split
    if split.held_out_fold < 0:
        return (
            f"The published weights have seen all of the data. These are the figures of their recipe: networks trained "
            f"alike, each without one fold, judged the fold that they had not seen ({manifest.calibrated_on}; "
            f"near-duplicates share a fold)."
        )
    return (
        f"Fold {split.held_out_fold} of {split.folds} ({split.held_out_images} images, near-duplicates kept together) "
        "was not trained on."
    )


def _stop(config: Mapping[str, Any], epochs: int) -> str:
    planned = sum(phase["epochs"] for phase in config["phases"])
    if epochs == planned:
        return "No epoch was chosen by its held-out score. "
    return (
        f"Of {planned} epochs planned the run ended after {epochs}: it stops where the held-out log-loss has not "
        f"improved for {config['optimisation']['patience']} epochs, so that its end was chosen by held-out scores. "
    )


def _mixture(config: Mapping[str, Any]) -> str:
    share = config["model"].get("start_share", 0)
    if not share:
        return ""
    partner = config["model"].get("mixed_with")
    other = f"run `{partner}`" if partner else "start"
    return (
        f"They were then mixed with the weights of the {other}, whose share is {share:g}: it was chosen among a few by "
        "the held-out scores (docs/experiments.md), so these figures are a little kind to it. "
    )


def _folders(config: Mapping[str, Any]) -> str:
    data = config["data"]
    return " and ".join(f"`{folder}`" for folder in (data["root"], data.get("extra")) if folder)


def _list(items: tuple[str, ...]) -> str:
    return "\n".join(f"- {item}" for item in items)
