"""Every number of a run, read from one small TOML file and checked before anything is computed."""

import os
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.model.manifest import Gate, StrideVariant

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Stage = Literal["conv1", "layer1", "layer2", "layer3", "layer4"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    root: str  # folder with one sub-folder a class, absolute or under DERMLENS_DATA_DIR; "drawn" draws images
    classes: list[str] = ["benign", "malignant"]
    folds: int = Field(5, ge=2)
    held_out_fold: int = Field(0, ge=0)


class Model(Section):
    start: str  # "random", "torchvision" (downloads IMAGENET1K_V2), or an .npz under DERMLENS_DATA_DIR
    stride_variant: StrideVariant
    gate: Gate | Literal["none"]  # "none": the plain ResNet-50 baseline


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


class Phase(Section):
    """A stretch of epochs at one resolution."""

    epochs: int = Field(ge=1)
    size: int = Field(ge=32, multiple_of=32)  # pixels
    frozen: list[Stage] = []


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
