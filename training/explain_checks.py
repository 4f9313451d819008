"""The checks of explanations: each takes a network and images, and gives values an image under named conditions.

What they must show to pass is in training/explain_eval.py.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from scipy.stats import rankdata
from torch import Tensor, nn
from tqdm import tqdm

from app.model.labels import calibrate
from training.corruptions import KINDS, corrupt
from training.train import autocast

Maps = NDArray[np.float32]  # [N,h,w], signed, at the network's own resolution
Masks = NDArray[np.bool_]  # [N,H,W]
Values = NDArray[np.float64]  # [N], one an image

BATCH = 16
# From the head down, as the networks name them; a stage that a network lacks is passed over
STAGES = {
    "head": ("head",),
    "fusion": ("fusion",),
    "layer4": ("trunk.layer4",),
    "layer3": ("trunk.layer3",),
    "layer2": ("trunk.layer2",),
    "layer1": ("trunk.layer1",),
    "conv1": ("trunk.conv1", "trunk.bn1"),
}
DRAWS = 3  # random networks that the images are shared out to: one alone could be like the trained one by chance
STEPS = 10  # of equal area, in deletion and insertion
STRENGTHS = (1, 3, 5)
NOTHING_FOUND = 0  # the first class
KEPT_IN_PLACE = tuple(kind for kind in KINDS if kind != "rotation")  # a turned image has a turned map
OPINION_IMAGES = 16  # captum needs some hundred passes an image
INTEGRATION_STEPS = 12


@dataclass(frozen=True)
class Network:
    name: str
    model: nn.Module  # gives logits float[B,K] and maps float[B,K,h,w]; in eval mode
    size: int  # pixels of its input
    precision: str = "float32"  # as in `config.Optimisation`


@dataclass(frozen=True)
class Sample:
    """The held-out images that all networks are asked about, classes taking turns."""

    images: Tensor  # uint8[N,3,H,W]
    labels: Tensor  # int64[N]
    masks: Masks  # all False: no lesion found

    def first(self, count: int) -> "Sample":
        return Sample(self.images[:count], self.labels[:count], self.masks[:count])


@dataclass(frozen=True)
class Seen:
    logits: NDArray[np.float32]  # [N,K]
    cams: NDArray[np.float32]  # [N,K,h,w]

    @property
    def predicted(self) -> NDArray[np.int64]:
        return np.asarray(self.logits.argmax(axis=1), dtype=np.int64)

    def maps(self, classes: NDArray[np.int64]) -> Maps:
        """The map of one class an image."""
        return self.cams[np.arange(len(classes)), classes]


@torch.inference_mode()
def look(network: Network, images: Tensor) -> Seen:
    """Forward passes over float32[N,3,S,S] in 0..255."""
    device = next(network.model.parameters()).device
    logits, cams = [], []
    for batch in images.split(BATCH):
        with autocast(network.precision, device):
            output = network.model(batch.to(device).contiguous(memory_format=torch.channels_last))
        logits.append(output[0].float().cpu())
        cams.append(output[1].float().cpu())
    return Seen(torch.cat(logits).numpy(), torch.cat(cams).numpy())


def resized(images: Tensor, size: int) -> Tensor:
    """uint8[N,3,H,W] -> float32[N,3,size,size], as the networks are evaluated."""
    if images.shape[-1] == size:
        return images.float()
    return F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)


def upsampled(maps: Maps, height: int, width: int) -> Maps:
    """[N,h,w] -> [N,height,width], bilinear."""
    if not len(maps):
        return np.zeros((0, height, width), dtype=np.float32)  # torch refuses an empty batch
    tensor = torch.from_numpy(np.ascontiguousarray(maps))[:, None]
    return F.interpolate(tensor, size=(height, width), mode="bilinear", align_corners=False)[:, 0].numpy()


def centre_blob(height: int, width: int) -> NDArray[np.float32]:
    """What needs no network: a Gaussian in the middle, a quarter of the side wide, float32[height,width]."""
    y, x = (np.linspace(-1, 1, n) * (n - 1) / n for n in (height, width))  # centres of the cells
    return np.exp(-(y[:, None] ** 2 + x[None] ** 2) / (2 * 0.5**2)).astype(np.float32)


# Likeness of maps


def rank_correlation(first: Maps, second: Maps) -> Values:
    """Spearman's correlation over positions, [N]; 0 where a map is flat."""
    a, b = (rankdata(m.reshape(len(m), -1), axis=1) for m in (first, second))
    a, b = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (a, b))
    norm = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(axis=1) / np.where(norm > 0, norm, 1), dtype=np.float64)


def overlap(first: Maps, second: Maps) -> Values:
    """Share of the highest fifth of one map's positions that are in the other's too, [N]."""
    count = max(1, first[0].size // 5)
    a, b = (
        rankdata(-m.reshape(len(m), -1).astype(np.float64), method="ordinal", axis=1) <= count for m in (first, second)
    )
    return np.asarray((a & b).sum(axis=1) / count, dtype=np.float64)


# A map turned upside down shows the same places: without the sign it is as like as before
LIKENESS: dict[str, Callable[[Maps, Maps], Values]] = {
    "signed": rank_correlation,
    "absolute": lambda first, second: np.abs(rank_correlation(first, second)),
    "overlap": overlap,
}


def likeness(first: Maps, second: Maps) -> dict[str, Values]:
    """Every measure of `LIKENESS`, [N] each."""
    return {name: measure(first, second) for name, measure in LIKENESS.items()}


def of_other_images(measure: Callable[[Maps, Maps], Values], first: Maps, second: Maps, *, shifts: int = 5) -> Values:
    """The measure between each map and those of up to five other images, mean [N]: what chance and habit give."""
    count = min(shifts, len(first) - 1)
    return np.asarray(np.mean([measure(first, np.roll(second, k, axis=0)) for k in range(1, count + 1)], axis=0))


# The checks: (network, sample) -> condition -> one value an image


def randomisation(network: Network, sample: Sample) -> dict[str, Values]:
    """Cascading model randomisation (Adebayo et al. 2018, arXiv 1810.03292): the weights are drawn anew from the head
    down, and the map of the class first predicted is compared with the trained network's.

    `floor`: likeness of the trained network's maps of different images. `end − floor`: when all weights are random.
    """
    images = resized(sample.images, network.size)
    whole = look(network, images)
    original = whole.maps(whole.predicted)
    result: dict[str, Values] = {}
    draws = max(1, min(DRAWS, len(images) // 4))  # batch norm needs some images for its statistics
    for draw in range(draws):
        mine = slice(draw, None, draws)
        for stage, seen in cascade(network, images[mine], seed=draw):
            for measure, values in likeness(original[mine], seen.maps(whole.predicted[mine])).items():
                result.setdefault(f"{stage}, {measure}", np.empty(len(images)))[mine] = values
    for measure, like in LIKENESS.items():
        floor = of_other_images(like, original, original)
        result |= {f"floor, {measure}": floor, f"end − floor, {measure}": result[f"conv1, {measure}"] - floor}
    return result


def cascade(network: Network, images: Tensor, *, seed: int) -> Iterator[tuple[str, Seen]]:
    """The network's answers after each stage's weights were drawn anew, on top of the stages above."""
    model = copy.deepcopy(network.model)
    random = Network(network.name, model, network.size, network.precision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norms: list[nn.BatchNorm2d] = []
        for stage, paths in STAGES.items():
            parts = [part for path in paths if (part := _part(model, path)) is not None]
            if not parts:
                continue
            for module in (m for part in parts for m in part.modules()):
                if callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
                if isinstance(module, nn.BatchNorm2d):
                    norms.append(module)
            # New weights under old statistics, or none, would blow up or die out from layer to layer
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over the batches
                norm.train()
            if norms:
                look(random, images)
            model.eval()
            yield stage, look(random, images)


def _part(model: nn.Module, path: str) -> nn.Module | None:
    part: nn.Module | None = model
    for name in path.split("."):
        part = getattr(part, name, None)
    return part


def deletion_insertion(network: Network, sample: Sample) -> dict[str, Values]:
    """Deletion and insertion (RISE: Petsiuk et al. 2018, arXiv 1806.07421): area under the predicted class's
    probability as the places that a map ranks highest are painted over with the image's mean colour, or let
    through a blur. Of images that are not called by the first class.

    Beside the map itself a random one of the same resolution and the centre blob; `map − random` is paired.
    """
    images = resized(sample.images, network.size)
    seen = look(network, images)
    found = seen.predicted > NOTHING_FOUND
    images, classes, own = images[found], seen.predicted[found], seen.maps(seen.predicted)[found]
    noise = np.random.default_rng(0).random(own.shape, dtype=np.float32)
    rivals = {"map": own, "random": noise, "centre": np.broadcast_to(centre_blob(*own.shape[1:]), own.shape)}

    def probability(stack: Tensor, image: int) -> Values:
        return calibrate(look(network, stack).logits, 1.0)[:, classes[image]]

    result: dict[str, Values] = {}
    for name in ("deletion", "insertion"):
        areas = {
            rival: area_under_steps(images, maps, probability, insertion=name == "insertion")
            for rival, maps in tqdm(rivals.items(), desc=name, leave=False, disable=None)
        }
        result |= {f"{name}, {rival}": values for rival, values in areas.items()}
        for rival in ("random", "centre"):
            result[f"{name}, map − {rival}"] = areas["map"] - areas[rival]
    return result


def area_under_steps(
    images: Tensor, maps: Maps, probability: Callable[[Tensor, int], Values], *, insertion: bool
) -> Values:
    """Area [N], 0..1, under `probability(float32[STEPS+1,3,S,S], image)` against the share of pixels changed.

    Args:
        images: float32[N,3,S,S].
        maps: [N,h,w]; what ranks highest is changed first.
    """
    side = images.shape[-1]
    large = upsampled(maps, side, side).reshape(len(maps), side * side)
    areas = []
    for index, image in enumerate(images):
        rank = np.empty(side * side, dtype=np.int64)
        rank[np.argsort(-large[index], kind="stable")] = np.arange(side * side)
        shares = torch.linspace(0, side * side, STEPS + 1)[:, None, None, None]
        changed = torch.from_numpy(rank).view(1, 1, side, side) < shares
        if insertion:
            stack = torch.where(changed, image, _blurred(image))
        else:
            stack = torch.where(changed, image.mean(dim=(1, 2), keepdim=True), image)
        areas.append(np.trapezoid(probability(stack, index), dx=1 / STEPS))
    return np.asarray(areas, dtype=np.float64)


def _blurred(image: Tensor) -> Tensor:
    """float32[3,S,S] with nothing finer than a tenth of its side."""
    sigma = image.shape[-1] / 10
    return torch.from_numpy(ndimage.gaussian_filter(image.numpy(), (0, sigma, sigma)))


def lesion_share(network: Network, sample: Sample) -> dict[str, Values]:
    """Share of the positive evidence inside the lesion (energy-based pointing game: Wang et al. 2020, Score-CAM,
    arXiv 1910.01279), beside the lesion's share of the picture and the centre blob's share inside it.

    Images without a lesion mask or without positive evidence do not count; how many says `no mask`, `no evidence`.
    `, first class` marks the figures of images that are called by the first class.
    """
    seen = look(network, resized(sample.images, network.size))
    maps = seen.maps(seen.predicted)
    has_mask, has_evidence = sample.masks.any(axis=(1, 2)), maps.max(axis=(1, 2)) > 0
    result = {"no mask": (~has_mask).astype(np.float64), "no evidence": (~has_evidence).astype(np.float64)}
    for suffix, called in (("", seen.predicted > NOTHING_FOUND), (", first class", seen.predicted == NOTHING_FOUND)):
        own, masks = (values[called & has_mask & has_evidence] for values in (maps, sample.masks))
        blobs = np.broadcast_to(centre_blob(*own.shape[1:]), own.shape)
        inside, area, centre = inside_share(own, masks), masks.mean(axis=(1, 2)), inside_share(blobs, masks)
        peaks = upsampled(own, *masks.shape[1:]).reshape(len(own), math.prod(masks.shape[1:])).argmax(axis=1)
        result |= {
            f"map{suffix}": inside,
            f"area{suffix}": area,
            f"centre{suffix}": centre,
            f"map − area{suffix}": inside - area,
            f"map − centre{suffix}": inside - centre,
            f"peak inside{suffix}": np.array([m.flat[p] for m, p in zip(masks, peaks, strict=True)], dtype=np.float64),
        }
    return result


def inside_share(maps: Maps, masks: Masks) -> Values:
    """Share [N] of each map's positive part, brought to the mask's resolution, that lies in the mask."""
    positive = np.maximum(upsampled(maps, *masks.shape[1:]), 0).astype(np.float64)
    total = positive.sum(axis=(1, 2))
    return np.asarray((positive * masks).sum(axis=(1, 2)) / np.where(total > 0, total, 1))


def stability(network: Network, sample: Sample) -> dict[str, Values]:
    """Rank correlation of the maps before and after a corruption, which leaves every spot where it was.

    `floor`: between maps of different images.
    """
    whole = look(network, resized(sample.images, network.size))
    original = whole.maps(whole.predicted)
    result = {"floor": of_other_images(rank_correlation, original, original)}
    for kind in tqdm(KEPT_IN_PLACE, desc="stability", leave=False, disable=None):
        for strength in STRENGTHS:
            spoilt = [corrupt(image.numpy(), kind, strength=strength, seed=i) for i, image in enumerate(sample.images)]
            seen = look(network, resized(torch.from_numpy(np.stack(spoilt)), network.size))
            result[f"{kind} {strength}"] = rank_correlation(original, seen.maps(whole.predicted))
    return result


def second_opinions(network: Network, sample: Sample) -> dict[str, Values]:
    """IntegratedGradients (arXiv 1703.01365) and Occlusion (arXiv 1311.2901) by captum, from the image's mean colour,
    at the map's resolution: rank correlation with the map, and their own evidence inside the lesion.

    `other images`: the correlation of a map with the opinions on other images.
    """
    sample = sample.first(OPINION_IMAGES)
    images = resized(sample.images, network.size)
    seen = look(network, images)
    own, has_mask = seen.maps(seen.predicted), sample.masks.any(axis=(1, 2))
    result = {"map, inside": inside_share(own[has_mask], sample.masks[has_mask])}
    for name, opinion in captum_maps(network, images, seen.predicted, own.shape[1:3]).items():
        together = rank_correlation(own, opinion)
        apart = of_other_images(rank_correlation, own, opinion)
        result[f"{name}, correlation"] = together
        result[f"{name}, other images"] = apart
        result[f"{name}, own − other"] = together - apart
        result[f"{name}, inside"] = inside_share(opinion[has_mask], sample.masks[has_mask])
    result["area"] = sample.masks[has_mask].mean(axis=(1, 2))
    return result


def captum_maps(network: Network, images: Tensor, classes: NDArray[np.int64], grid: tuple[int, int]) -> dict[str, Maps]:
    """Signed attributions [N,h,w] of `logit_c − mean of the other logits`, summed over colours, averaged to `grid`."""
    from captum.attr import IntegratedGradients, Occlusion

    device = next(network.model.parameters()).device
    target = torch.from_numpy(classes).to(device)
    mean = images.mean(dim=(2, 3), keepdim=True).expand_as(images).to(device)

    def evidence(inputs: Tensor, target: Tensor) -> Tensor:
        logits: Tensor = network.model(inputs)[0].float()
        of_class = logits.gather(1, target[:, None])[:, 0]
        return of_class - (logits.sum(dim=1) - of_class) / (logits.shape[1] - 1)

    model = network.model.requires_grad_(False)  # gradients for the image alone
    gradients = IntegratedGradients(evidence).attribute(
        images.to(device),
        baselines=mean,
        additional_forward_args=target,
        n_steps=INTEGRATION_STEPS,
        internal_batch_size=BATCH,
    )
    with torch.inference_mode(), autocast(network.precision, device):
        occlusion = Occlusion(evidence).attribute(
            images.to(device),
            sliding_window_shapes=(3, network.size // 4, network.size // 4),
            strides=(3, network.size // 8, network.size // 8),
            baselines=mean,
            additional_forward_args=target,
        )
    model.requires_grad_(True)
    found = {"integrated-gradients": gradients, "occlusion": occlusion}
    return {
        name: F.adaptive_avg_pool2d(a.detach().float().sum(dim=1, keepdim=True), grid)[:, 0].cpu().numpy()
        for name, a in found.items()
    }


CHECKS: dict[str, Callable[[Network, Sample], dict[str, Values]]] = {
    "randomisation": randomisation,
    "deletion-insertion": deletion_insertion,
    "lesion-share": lesion_share,
    "stability": stability,
    "second-opinions": second_opinions,
}
