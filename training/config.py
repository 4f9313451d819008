"""Every number of a run, read from one small TOML file and checked before anything is computed."""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.model.manifest import Gate, StrideVariant

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
MAX_CLASSES = 100
Stage = Literal["conv1", "layer1", "layer2", "layer3", "layer4"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    root: str  # folder with one sub-folder a class, absolute or under DERMLENS_DATA_DIR; "drawn" draws images
    classes: list[str] = ["benign", "malignant"]
    extra: str | None = None  # a second folder of the same classes that joins training, twins of `root` left out
    root_share: float = Field(1, ge=0, le=1)  # of the first folder's training images, drawn anew for each epoch
    extra_share: float = Field(1, ge=0, le=1)  # of the second folder's
    without: list[str] = []  # folders that the start has seen: what has a twin in one of them is left out
    crop_frame: bool = False  # crop dark frames away, in training and in serving
    # Folders whose near-duplicates are found without dark frames, in which all images look alike (decision 019); the
    # others keep the folds that earlier runs held out
    lit_folds: list[Literal["root", "extra"]] = []
    folds: int = Field(5, ge=2)
    held_out_fold: int = Field(0, ge=-1)  # -1 holds nothing out: the last run, after the folds have told how good it is

    @model_validator(mode="after")
    def _has_epochs(self) -> "Data":
        if not (self.root_share or (self.extra and self.extra_share)):
            raise ValueError("data.root_share and data.extra_share leave an epoch without images")
        return self


class Model(Section):
    # "random", "torchvision" (downloads IMAGENET1K_V2), an .npz under DERMLENS_DATA_DIR, or "version:FOLDER" (--init)
    start: str
    start_share: float = Field(0, ge=0, le=1)  # of a published start in the weights, see training/mix.py
    mixed_with: str | None = None  # the run whose weights have that share, in place of the start's
    backbone: Literal["resnet50", "densenet169", "mobilenet_v2", "alexnet", "squeezenet1_1"] = "resnet50"
    stride_variant: StrideVariant  # of ResNet-50
    gate: Gate | Literal["none"]  # "none": the plain baseline

    @model_validator(mode="after")
    def _gate_fits(self) -> "Model":
        if self.backbone != "resnet50" and self.gate != "none":
            raise ValueError(f"model.gate is {self.gate}, but only resnet50 has one: {self.backbone} takes none")
        return self


class Optimisation(Section):
    batch_size: int = Field(ge=1)  # global: all processes together
    head_lr: Positive
    trunk_lr: Positive  # of layer4
    layer_decay: Positive  # factor from one stage to the one below it
    weight_decay: float = Field(ge=0)
    warmup_steps: int = Field(ge=0)  # at the start of every phase
    label_smoothing: Fraction
    ema_decay: Fraction
    batch_norm: Literal["frozen", "train"]
    patience: int = Field(ge=1)  # epochs without a better held-out log-loss before stopping
    precision: Literal["auto", "float32", "bfloat16"] = "float32"  # auto: bfloat16 on CUDA and on CPUs with AVX512-BF16


class Augmentation(Section):
    """Half-widths of uniform distributions around "unchanged"; 0 switches a kind off."""

    rotation: float = Field(ge=0)  # degrees
    scale: float = Field(ge=0, lt=1)
    shift: float = Field(ge=0)  # fraction of the side
    shear: float = Field(ge=0)
    brightness: Fraction
    contrast: Fraction
    saturation: Fraction
    hue: float = Field(ge=0)  # degrees
    erase: float = Field(ge=0, le=0.9)  # longest side of the erased box, fraction of the image side
    tint: Fraction = 0.0  # gain of each colour channel on its own: another lamp, another camera
    blur: Fraction = 0.0  # blend with a 4-times reduced copy at most: another focus, another resolution
    noise: Fraction = 0.0  # standard deviation of Gaussian noise at most, of white: a poor sensor, little light
    jpeg: Fraction = 0.0  # 1 minus the lowest JPEG quality: 0.7 compresses down to a quality of 30
    hairs: float = Field(0.0, ge=0, le=1)  # probability of drawn hairs, and half of it of a drawn ruler
    mixup: float = Field(0.0, ge=0)  # Beta(mixup, mixup) weights of a second image and its label (arXiv 1710.09412)


class Phase(Section):
    """A stretch of epochs at one resolution."""

    epochs: int = Field(ge=1)
    size: int = Field(ge=32, multiple_of=32)  # pixels
    frozen: list[Stage] = []
    evaluate: Literal["every", "last"] = "every"  # epochs after which the held-out fold is measured


class Config(Section):
    name: str
    seed: int
    data: Data
    model: Model
    optimisation: Optimisation
    augmentation: Augmentation
    phases: list[Phase] = Field(min_length=1)

    @model_validator(mode="after")
    def _fold_exists(self) -> "Config":
        if self.data.held_out_fold >= self.data.folds:
            raise ValueError(f"data.held_out_fold is {self.data.held_out_fold} of {self.data.folds} folds, from 0")
        return self

    def with_data(self, folder: Path) -> "Config":
        """The same run on another folder, whose sub-folders are the classes; named after the folder.

        Raises:
            ValueError: the folder has fewer than 2 or more than 100 sub-folders.
        """
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}: give one with a sub-folder a class")
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not 2 <= len(classes) <= MAX_CLASSES:
            raise ValueError(f"{folder} has {len(classes)} sub-folders: one for each of 2 to {MAX_CLASSES} classes")
        changes = {"root": str(folder.resolve()), "classes": classes, "extra": None, "lit_folds": ["root"]}
        data = self.data.model_dump() | changes
        return Config.model_validate(self.model_dump() | {"data": data, "name": folder.resolve().name})

    def with_fold(self, fold: int) -> "Config":
        """The same run with another fold held out."""
        return Config.model_validate(self.model_dump() | {"data": self.data.model_dump() | {"held_out_fold": fold}})

    @property
    def run_name(self) -> str:
        """Folder of the run: one for each fold of a recipe."""
        fold = self.data.held_out_fold
        return f"{self.name}-all" if fold < 0 else f"{self.name}-fold{fold}"

    @property
    def epochs(self) -> int:
        return sum(phase.epochs for phase in self.phases)

    def phase_of(self, epoch: int) -> tuple[Phase, int]:
        """The phase that an epoch (from 0) falls in, and the epoch's place within it."""
        for phase in self.phases:
            if epoch < phase.epochs:
                return phase, epoch
            epoch -= phase.epochs
        raise ValueError("epoch past the end of the schedule")


def load_config(path: Path) -> Config:
    """Read and check a TOML file.

    Raises:
        ValueError: the file is missing, no TOML, or a value is unknown or out of range; the message names it.
    """
    try:
        return Config.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        raise ValueError(f"no such config: {path}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {where}: {first['msg']}") from None


def data_dir() -> Path:
    """`DERMLENS_DATA_DIR`, by default `../shared/data` beside the repository."""
    return Path(os.environ.get("DERMLENS_DATA_DIR", "../shared/data"))
