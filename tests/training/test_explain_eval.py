"""Each check on networks small enough to know the answer: `Seeing` shows what it decides by, `Blind` shows noise."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from torch import Tensor, nn

from app.model.architecture import Output
from tests.conftest import ROOT, random_model
from training import explain_checks, explain_eval
from training.config import load_config
from training.data import load_dataset
from training.explain_checks import (
    CHECKS,
    Network,
    Sample,
    area_under_steps,
    centre_blob,
    inside_share,
    overlap,
    rank_correlation,
)
from training.explain_eval import contact_sheet, evaluate, held_out_sample, judge, load_runs, main, summarise

SIDE, CELLS = 32, 8


class Seeing(nn.Module):
    """Evidence for class 1 in each cell of 4×4 pixels is its brightness above a threshold; the map says so."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(130.0))

    def forward(self, images: Tensor) -> Output:
        cells = F.avg_pool2d(images.float().mean(dim=1), SIDE // CELLS)
        evidence = F.softplus((cells - self.threshold) / 10)
        score = evidence.mean(dim=(1, 2)) - 0.3
        shown = self.shown(images, evidence)
        maps = torch.stack([-shown, shown], dim=1).detach()
        return Output(torch.stack([-score, score], dim=1), maps, evidence.flatten(1))

    def shown(self, _images: Tensor, evidence: Tensor) -> Tensor:
        return evidence


class Blind(Seeing):
    """The same decisions beside a map that hangs on the last bit of the image and on nothing that matters."""

    def shown(self, images: Tensor, evidence: Tensor) -> Tensor:
        maps = [torch.rand(CELLS, CELLS, generator=torch.Generator().manual_seed(int(i.sum()))) for i in images.long()]
        return torch.stack(maps) if maps else evidence


class Patches(nn.Module):
    """One layer of patch filters and a head, under the names of `LesionNet`."""

    def __init__(self, *, blind: bool) -> None:
        super().__init__()
        self.blind = blind
        self.trunk = nn.ModuleDict({"conv1": nn.Conv2d(3, 64, 4, stride=4), "bn1": nn.BatchNorm2d(64)})
        self.head = nn.Linear(64, 2)

    def forward(self, images: Tensor) -> Output:
        features = F.relu(self.trunk["bn1"](self.trunk["conv1"](images.float() / 255)))
        cams = torch.einsum("kc,bchw->bkhw", self.head.weight, features)
        if self.blind:
            cams = F.avg_pool2d(images.float().mean(dim=1, keepdim=True), 4).expand(-1, 2, -1, -1)
        pooled = features.mean(dim=(2, 3))
        return Output(self.head(pooled), cams.detach(), pooled)


def bright_spots(count: int = 24) -> Sample:
    """Grey images whose one smooth bright spot, anywhere, is the lesion."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:SIDE, :SIDE]
    images, masks = [], []
    for _ in range(count):
        centre = rng.uniform(4, SIDE - 4, 2)
        spot = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / (2 * 5**2))
        texture = gaussian_filter(rng.normal(0, 60, (SIDE, SIDE)), 4)
        images.append(np.broadcast_to((70 + texture + 170 * spot).clip(0, 255), (3, SIDE, SIDE)))
        masks.append(spot > 0.5)
    pixels = torch.from_numpy(np.stack(images).astype(np.uint8))
    return Sample(pixels, torch.arange(count) % 2, np.stack(masks))


def noise(count: int = 24) -> Sample:
    images = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    return Sample(images.to(torch.uint8), torch.arange(count) % 2, np.zeros((count, SIDE, SIDE), dtype=bool))


def network(model: nn.Module) -> Network:
    return Network("toy", model.eval(), SIDE)


def verdicts(model: nn.Module, check: str, sample: Sample) -> dict[str, bool]:
    rows = summarise("toy", check, CHECKS[check](network(model), sample))
    return {criterion.condition: passed for criterion, _, passed in judge(rows)}


@pytest.mark.parametrize("check", ["deletion-insertion", "lesion-share", "stability", "second-opinions"])
def test_a_right_map_passes_and_one_that_ignores_the_network_fails(check: str) -> None:
    right, wrong = (verdicts(model, check, bright_spots()) for model in (Seeing(), Blind()))
    assert right
    assert all(right.values()), right
    assert not any(wrong.values()), wrong


def test_random_weights_destroy_the_map_of_a_network_and_not_that_of_a_picture() -> None:
    torch.manual_seed(1)
    assert list(verdicts(Patches(blind=False), "randomisation", noise()).values()) == [True]
    assert list(verdicts(Patches(blind=True), "randomisation", noise()).values()) == [False]


def test_the_cascade_goes_from_the_head_down_and_leaves_the_network_alone() -> None:
    toy, images = network(Patches(blind=False)), noise(6).images.float()
    before = {name: tensor.clone() for name, tensor in toy.model.state_dict().items()}
    whole = explain_checks.look(toy, images)
    stages = dict(explain_checks.cascade(toy, images, seed=0))
    assert list(stages) == ["head", "conv1"]
    assert not np.allclose(stages["head"].cams, whole.cams)
    assert not np.allclose(stages["conv1"].cams, stages["head"].cams)
    assert all(torch.equal(before[name], tensor) for name, tensor in toy.model.state_dict().items())


def test_rank_correlation_is_spearmans() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 9, (2, 5, 4, 3)).astype(np.float32)  # with ties
    expected = [spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(first, second, strict=True)]
    assert rank_correlation(first, second) == pytest.approx(expected)
    assert rank_correlation(first, np.exp(first)) == pytest.approx(np.ones(5))
    assert rank_correlation(first, -first) == pytest.approx(-np.ones(5))
    assert rank_correlation(first, np.ones_like(first)).tolist() == [0] * 5


def test_overlap_of_the_highest_fifth() -> None:
    first = np.arange(10, dtype=np.float32).reshape(1, 2, 5)
    half = first.copy()
    half[0, 0, 0], half[0, 1, 4] = 9, 0
    assert [overlap(first, other)[0] for other in (first, half, -first)] == [1, 0.5, 0]


def test_area_under_steps_by_hand() -> None:
    """One bright quarter is all that counts: it goes in the first quarter of the steps, or in the last."""
    image = torch.zeros(1, 3, SIDE, SIDE)
    image[:, :, : SIDE // 2, : SIDE // 2] = 200
    best = np.array([[[1, 0], [0, 0]]], dtype=np.float32)

    def brightest(stack: Tensor, _image: int) -> np.ndarray:
        return np.asarray((stack[:, 0, : SIDE // 2, : SIDE // 2] == 200).float().mean(dim=(1, 2)), dtype=np.float64)

    found = {sign: area_under_steps(image, sign * best, brightest, insertion=False)[0] for sign in (1, -1)}
    assert found[1] < 0.3
    assert found[-1] > 0.7


def test_inside_share_by_hand() -> None:
    masks = np.zeros((3, 8, 8), dtype=bool)
    masks[:, :4] = True
    flat, top, negative = np.ones((8, 8)), np.zeros((8, 8)), -np.ones((8, 8))
    top[1], negative[0] = 3, 1
    maps = np.stack([flat, top, negative]).astype(np.float32)
    assert inside_share(maps, masks) == pytest.approx([0.5, 1, 1])
    assert inside_share(np.zeros_like(maps), masks) == pytest.approx([0, 0, 0])


@pytest.mark.parametrize("cells", [5, 10])
def test_the_centre_blob_is_in_the_middle(cells: int) -> None:
    blob = centre_blob(cells, cells)
    assert np.allclose(blob, blob[::-1, ::-1])
    assert blob[0, 0] < 0.2
    assert blob.max() > 0.9


def test_images_without_a_mask_are_counted_and_leave_the_shares_alone() -> None:
    sample = bright_spots()
    masks = sample.masks.copy()
    masks[::4] = False
    found = explain_checks.lesion_share(network(Seeing()), replace(sample, masks=masks))
    everything = explain_checks.lesion_share(network(Seeing()), sample)
    assert (found["no mask"].mean(), everything["no mask"].mean()) == (0.25, 0)
    kept = explain_checks.look(network(Seeing()), sample.images.float()).predicted[np.arange(24) % 4 > 0].sum()
    assert 0 < len(found["map"]) == kept < len(everything["map"])


def test_a_network_that_finds_nothing_passes_nothing() -> None:
    toy = Seeing()
    toy.threshold.data += 1000
    for check in ("deletion-insertion", "lesion-share"):
        assert not any(verdicts(toy, check, bright_spots(4)).values())


def test_an_interval_holds_the_mean_and_shrinks_with_images() -> None:
    rng = np.random.default_rng(0)
    small, large = (summarise("n", "c", {"x": rng.normal(5, 1, size)})[0] for size in (20, 2000))
    assert small.low < small.value < small.high
    assert large.high - large.low < (small.high - small.low) / 5
    assert large.value == pytest.approx(5, abs=0.1)


def test_finished_checks_are_kept_until_the_weights_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "new" / "explanations.csv", []

    def first(_network: Network, _sample: Sample) -> dict[str, np.ndarray]:
        calls.append("first")
        return {"a, b": np.array([1.0, 2.0])}

    def second(_network: Network, _sample: Sample) -> dict[str, np.ndarray]:
        calls.append("second")
        if calls.count("second") == 1:
            raise KeyboardInterrupt
        return {"c": np.array([3.0])}

    monkeypatch.setattr(explain_eval, "CHECKS", {"one": first, "two": second})
    toy, sample = network(Seeing()), bright_spots(2)
    with pytest.raises(KeyboardInterrupt):
        evaluate([toy], sample, path)
    rows = evaluate([toy], sample, path)
    assert calls == ["first", "second", "second"]
    assert [(r.condition, r.value, r.images) for r in rows[1:]] == [("a, b", 1.5, 2), ("c", 3.0, 1)]
    assert evaluate([toy], sample, path) == rows
    assert len(calls) == 3
    changed = Seeing()
    changed.threshold.data += 1
    evaluate([network(changed)], sample, path)
    assert calls[3:] == ["first", "second"]


def test_held_out_images_come_in_turns_of_classes_and_the_same_each_time() -> None:
    config = load_config(ROOT / "training" / "configs" / "smoke.toml")
    dataset = load_dataset(config.data, seed=config.seed, progress=False)
    sample, again = (held_out_sample(dataset, 0, images=8, seed=1) for _ in range(2))
    assert sample.labels.tolist() == [0, 1] * 4
    assert torch.equal(sample.images, again.images)
    held_out = dataset.images[dataset.split(0).held_out]
    assert all(any(torch.equal(image, other) for other in held_out) for image in sample.images)
    with pytest.raises(ValueError, match="holds no image out"):
        held_out_sample(dataset, -1, images=8, seed=1)
    with pytest.raises(ValueError, match="at least 2"):
        held_out_sample(dataset, 0, images=1, seed=1)


def test_a_contact_sheet_without_photographs_holds_none_of_their_pixels() -> None:
    class Fixed(Seeing):
        def forward(self, images: Tensor) -> Output:
            ramp = torch.linspace(-1, 1, CELLS).expand(len(images), 2, CELLS, CELLS)
            logits = torch.tensor([[0.0, 1.0]]).repeat(len(images), 1)
            return Output(logits, ramp, logits)

    toy, sample = network(Fixed()), bright_spots(6)
    other = replace(sample, images=255 - sample.images)
    plain = [contact_sheet([toy, toy], s, photographs=False) for s in (sample, other)]
    assert plain[0] == plain[1]
    shown = [contact_sheet([toy, toy], s, photographs=True) for s in (sample, other)]
    assert shown[0] != shown[1]


def test_the_command_from_runs_to_verdicts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(ROOT / "training" / "configs" / "smoke.toml")
    phases = [config.phases[-1].model_copy(update={"size": SIDE})]
    config = config.model_copy(update={"phases": phases})
    monkeypatch.setattr(explain_eval, "from_run", lambda _folder: (config, Patches(blind=False).eval()))
    main(["--run", "asff=a", "--run", "resnet50=b", "--images", "6", "--evidence", str(tmp_path)])
    printed = capsys.readouterr().out
    claims = len(explain_eval.CRITERIA)
    assert len(re.findall(r"(?:pass|FAIL) -?[\d.]+ \[", printed)) + printed.count("nan [") == 2 * claims
    assert printed.count(f" of {claims} pass") == 2
    rows = explain_eval.read_rows(tmp_path / "explanations.csv")
    for name in ("asff", "resnet50"):
        assert {r.check for r in rows if r.network == name} == {"fingerprint", *CHECKS}
    for file in ("contact_sheet.png", "contact_sheet_photographs.png"):
        with Image.open(tmp_path / file) as sheet:
            assert sheet.size[0] > 400


def test_the_served_network_is_randomised_stage_by_stage() -> None:
    images, fewer = noise(4).images.float(), [s for s in explain_checks.STAGES if s != "fusion"]
    for model, stages in ((random_model("branch_softmax"), list(explain_checks.STAGES)), (random_model(None), fewer)):
        served = Network("served", model, SIDE)
        seen = dict(explain_checks.cascade(served, images, seed=0))
        assert list(seen) == stages
        assert all(np.isfinite(s.cams).all() and s.cams.std() > 0 for s in seen.values())


def test_runs_that_hold_other_images_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "training" / "configs" / "smoke.toml")
    configs = {"a": config, "b": config.with_fold(1), "c": config.model_copy(update={"seed": config.seed + 1})}
    monkeypatch.setattr(explain_eval, "from_run", lambda folder: (configs[folder.name], Seeing()))
    assert [n.name for n in load_runs(["x=a", "y=a"])[1]] == ["x", "y"]
    for runs in (["x=a", "y=b"], ["x=a", "y=c"]):
        with pytest.raises(ValueError, match="held-out images are not the same"):
            load_runs(runs)
    with pytest.raises(ValueError, match="two runs have one name"):
        load_runs(["x=a", "x=a"])


@pytest.mark.parametrize(
    ("runs", "message"),
    [(["runs/x"], "write NAME=FOLDER"), (["a=runs/nothing-there"], "no runs/nothing-there")],
)
def test_runs_that_cannot_be_read_are_refused(runs: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_runs(runs)
