"""MODEL_CARD.md, generated from the manifest; its figures are never typed by hand."""

from collections.abc import Sequence

from app.model.labels import NOTICE
from app.model.manifest import Manifest

LIMITS = """\
- **Research use only.** It is not a medical device and must not decide about a patient.
- It has seen one curated data set of dermoscopic images, squashed to 224×224. Clinical photographs, other devices,
  other clinics and rare lesion types degrade it: a plain fine-tune on these images scored a ROC-AUC of about 0.97 on
  images like them and 0.72 on clinics that it had never seen (../shared/DATA.md).
- **Dark skin is nearly absent** from the training data. On DDI, a model trained on similar data scored a ROC-AUC of
  0.72 on light and 0.57 on dark skin (../shared/PAPER.md).
- Surgical ink and rulers are shortcuts: ink raised false positives by about 40 points in PMC6694463.
- The data set holds near-duplicate frames and no patient identifiers. Folds keep images together whose thumbnails
  correlate above 0.97; other images of one patient may still lie on both sides.
- A class-activation map shows where the model's evidence lies at 14×14, not whether the evidence is right.
"""


def model_card(manifest: Manifest, history: Sequence[dict[str, float]]) -> str:
    """The card of a version, as Markdown."""
    split, config = manifest.split, manifest.training_config
    gate = manifest.architecture.gate
    network = f"ASFF ResNet-50, gate `{gate}`" if gate else "plain ResNet-50"
    seconds = sum(row["seconds"] for row in history)
    metrics = "\n".join(
        f"| {name} | {m.value:.4f} | {m.low:.4f} to {m.high:.4f} |" for name, m in manifest.metrics.items()
    )
    points = "\n".join(
        f"| {name} | {p.threshold:.4f} | {p.fitted_on} |" for name, p in manifest.operating_points.items()
    )
    return f"""# {manifest.name} {manifest.version}

{NOTICE}

{network}, stride variant {manifest.architecture.stride_variant}, after arXiv 2510.03876. Classes: \
{", ".join(manifest.classes)}. Made {manifest.created:%Y-%m-%d} from commit `{manifest.git_commit}`.

## Training

{split.training_images} images of `{split.data}`, start `{config["model"]["start"]}`, {len(history)} epochs, \
{seconds / 60:.0f} minutes in all. The published weights are the exponential moving average at the last epoch; no \
epoch was chosen by its held-out score. The whole configuration is in `manifest.json`.

![loss and ROC-AUC](report/training.png)

## Held-out figures

Fold {split.held_out_fold} of {split.folds} ({split.held_out_images} images, near-duplicates kept together) was not \
trained on. Probabilities and decisions are cross-fitted: each comes from a temperature and a threshold fitted on the \
other four fifths of the fold. Intervals are 95% percentile bootstrap over images.

| metric | value | 95% interval |
| --- | --- | --- |
{metrics}

![ROC, precision–recall, reliability, confusion](report/held_out.png)

## Operating points

Temperature {manifest.temperature:.4f}. A probability of `{manifest.classes[-1]}` at or above the threshold is positive.

| operating point | threshold | fitted on |
| --- | --- | --- |
{points}

## Limits

{LIMITS}"""
