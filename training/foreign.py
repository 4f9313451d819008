"""Images that are no dermoscopy, from packages that carry pictures and from a seed: what the service should refuse.

Two sets that share no source: one to choose the method on, one to measure it on. Clinical photographs of skin without
a lesion are in no package; the nearest here are faces, other photographs, and drawn skin without a lesion.
"""

import gzip
import io
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Part = Literal["choose", "evaluate"]

SIZE = 224  # pixels
CROPS = 24  # of a picture, the first of them whole
DRAWN = 24  # of each generator

# Part -> kind -> package and file of a picture
PICTURES: dict[Part, dict[str, tuple[tuple[str, str], ...]]] = {
    "choose": {
        "photograph": (("skimage.data", "coffee.png"), ("sklearn.datasets.images", "china.jpg")),
        "face": (("skimage.data", "astronaut.png"),),
        "microscopy": (("skimage.data", "cell.png"),),
        "radiology": (("pydicom.data.test_files", "CT_small.dcm"), ("matplotlib.mpl-data.sample_data", "s1045.ima.gz")),
        "texture": (("skimage.data", "brick.png"), ("skimage.data", "coins.png")),
        "text": (("skimage.data", "page.png"),),
        "screen": (("skimage.data", "color.png"),),
    },
    "evaluate": {
        "photograph": (
            ("skimage.data", "chelsea.png"),
            ("skimage.data", "rocket.jpg"),
            ("skimage.data", "motorcycle_left.png"),
            ("skimage.data", "camera.png"),
            ("skimage.data", "hubble_deep_field.jpg"),
            ("sklearn.datasets.images", "flower.jpg"),
        ),
        "face": (("matplotlib.mpl-data.sample_data", "grace_hopper.jpg"),),
        "microscopy": (("skimage.data", "ihc.png"),),
        "fundus": (("skimage.data", "retina.jpg"), ("skimage.data", "microaneurysms.png")),
        "radiology": (
            ("pydicom.data.test_files", "MR_small.dcm"),
            ("pydicom.data.test_files.dicomdirtests.77654033.CR1", "6154"),
            ("pydicom.data.test_files.dicomdirtests.77654033.CT2", "17106"),
        ),
        "texture": (("skimage.data", "grass.png"), ("skimage.data", "gravel.png")),
        "text": (("skimage.data", "text.png"),),
        "screen": (("skimage.data", "logo.png"), ("matplotlib.mpl-data.sample_data", "Minduka_Present_Blue_Pack.png")),
    },
}
# Where the head is in them, as shares of the sides: left, top, right, bottom
FACES = {"astronaut.png": (0.3, 0.05, 0.6, 0.45), "grace_hopper.jpg": (0.25, 0.1, 0.75, 0.55)}
SKINS = ((236, 205, 186), (222, 178, 154), (190, 140, 110), (140, 96, 72), (92, 62, 48))  # light to dark


class Foreign(NamedTuple):
    kind: str
    name: str
    pixels: NDArray[np.uint8]  # [3,224,224]


def foreign_images(part: Part) -> Iterator[Foreign]:
    """Every image of a part, the same at each call.

    Raises:
        ValueError: a package that carries some of them is not installed.
    """
    for kind, pictures in PICTURES[part].items():
        for package, file in pictures:
            picture = _read(package, file)
            if kind == "face":
                picture = _part_of(picture, FACES[file])
            rng = np.random.default_rng([len(file), *file.encode()])
            for number in range(CROPS):
                crop = _crop(picture, rng) if number else picture
                yield Foreign(kind, f"{file} {number}", _planes(crop))
    for kind, draw in GENERATORS.items():
        for number in range(DRAWN):
            rng = np.random.default_rng([number, part == "choose", *kind.encode()])
            yield Foreign(kind, f"{kind} {number}", _planes(draw(rng)))


def _read(package: str, file: str) -> Image.Image:
    name, *folders = package.split(".")
    try:
        data = Path(str(files(name).joinpath(*folders, file))).read_bytes()
        if package.startswith("pydicom"):
            return _radiograph(data)
    except (ModuleNotFoundError, OSError) as error:
        raise ValueError(f"no {file} in {package} ({error}): pip install 'dermlens[training]'") from None
    if file == "s1045.ima.gz":  # a slice of a head, 16 bits without a header
        values = np.frombuffer(gzip.decompress(data), dtype="<u2").reshape(256, 256)
        return _grey(values)
    return Image.open(io.BytesIO(data)).convert("RGB")


def _radiograph(data: bytes) -> Image.Image:
    import pydicom

    return _grey(pydicom.dcmread(io.BytesIO(data)).pixel_array)


def _grey(values: NDArray[np.generic]) -> Image.Image:
    """Intensities over their own range."""
    low, high = np.percentile(values.astype(np.float64), (0.5, 99.5))
    scaled = (255 * (values.astype(np.float64) - low) / max(high - low, 1)).clip(0, 255)
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")


def _part_of(picture: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    width, height = picture.size
    left, top, right, bottom = box
    return picture.crop((int(left * width), int(top * height), int(right * width), int(bottom * height)))


def _crop(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A square of 0.3 to 1 times the shorter side, mirrored on every other time."""
    width, height = picture.size
    side = int(min(width, height) * rng.uniform(0.3, 1))
    left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    square = picture.crop((left, top, left + side, top + side))
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.integers(2) else square


def _planes(picture: Image.Image) -> NDArray[np.uint8]:
    """Squashed as serving does it (docs/decisions/001-squash.md)."""
    square = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _image(values: NDArray[np.float64]) -> Image.Image:
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def _noise(rng: np.random.Generator) -> Image.Image:
    """White noise in colour or grey, or noise of one scale."""
    scale = int(rng.choice([1, 1, 4, 16]))
    coarse = rng.uniform(0, 255, (SIZE // scale, SIZE // scale, int(rng.choice([1, 3]))))
    return _image(np.broadcast_to(coarse, (*coarse.shape[:2], 3))).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def _flat(rng: np.random.Generator) -> Image.Image:
    return Image.new("RGB", (SIZE, SIZE), tuple(int(c) for c in rng.integers(0, 256, 3)))


def _gradient(rng: np.random.Generator) -> Image.Image:
    ends = rng.uniform(0, 255, (2, 3))
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:1:224j, 0:1:224j] - 0.5
    along = (0.5 + (x * np.cos(angle) + y * np.sin(angle)) / np.sqrt(2))[:, :, None]
    return _image(along * ends[0] + (1 - along) * ends[1])


def _text(rng: np.random.Generator) -> Image.Image:
    """A page of words that mean nothing."""
    page = Image.new("RGB", (620, 620), tuple(int(c) for c in rng.integers(225, 256, 3)))
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(float(rng.uniform(12, 40)))
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    for line in range(int(rng.integers(6, 26))):
        words = ["".join(rng.choice(letters, int(rng.integers(2, 10)))) for _ in range(8)]
        draw.text((20, 20 + 24 * line), " ".join(words), fill=tuple(int(c) for c in rng.integers(0, 90, 3)), font=font)
    return page


def _plot(rng: np.random.Generator) -> Image.Image:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), dpi=80)
    axes = figure.subplots()
    x = np.linspace(0, 10, 60)
    match int(rng.integers(4)):
        case 0:
            axes.plot(x, rng.normal(0, 1, (60, 3)).cumsum(axis=0))
        case 1:
            axes.scatter(rng.normal(size=80), rng.normal(size=80), c=rng.uniform(size=80))
        case 2:
            axes.bar(range(8), rng.uniform(1, 9, 8), color=tuple(rng.uniform(0, 1, 3)))
        case _:
            axes.imshow(rng.uniform(size=(8, 8)), cmap=str(rng.choice(["viridis", "hot", "Greys"])))
    axes.set(title="a plot", xlabel="x", ylabel="y")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _shapes(rng: np.random.Generator) -> Image.Image:
    picture = Image.new("RGB", (SIZE, SIZE), tuple(int(c) for c in rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(3, 12))):
        (left, right), (top, bottom) = np.sort(rng.integers(0, SIZE, (2, 2)), axis=1)
        shape = draw.ellipse if rng.integers(2) else draw.rectangle
        shape((int(left), int(top), int(right), int(bottom)), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
    return picture


def _bare_skin(rng: np.random.Generator) -> Image.Image:
    """Skin colour, unevenly lit, with grain and no lesion."""
    skin = np.array(SKINS[int(rng.integers(len(SKINS)))]) + rng.normal(0, 6, 3)
    light = np.asarray(_noise_plane(rng, side=4)) + np.asarray(_noise_plane(rng, side=14)) / 2
    grain = rng.normal(0, rng.uniform(1, 6), (SIZE, SIZE, 1))
    return _image(skin * (1 + 0.12 * light[:, :, None]) + grain).filter(ImageFilter.GaussianBlur(0.7))


def _noise_plane(rng: np.random.Generator, *, side: int) -> Image.Image:
    coarse = rng.normal(0, 1, (side, side)).astype(np.float32)
    return Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


GENERATORS: dict[str, Callable[[np.random.Generator], Image.Image]] = {
    "noise": _noise,
    "flat": _flat,
    "gradient": _gradient,
    "drawn text": _text,
    "plot": _plot,
    "shapes": _shapes,
    "drawn skin": _bare_skin,
}
