"""Which files of a folder are images to classify, and how what comes of one is written."""

import os
from pathlib import Path
from typing import NamedTuple

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".dcm"}


class Found(NamedTuple):
    """What a folder holds: images in the order of their names, and how many other files."""

    images: list[Path]
    others: int


def refuse_overwriting(image: Path, *outputs: Path) -> None:
    """Raise ValueError where an output is the image itself, or another output."""
    taken = {image.resolve()}
    for output in outputs:
        if output.resolve() in taken:
            raise ValueError(f"{output}: would overwrite what is read or written here: give another file")
        taken.add(output.resolve())


def write_whole(path: Path, data: bytes) -> None:
    """Whole or not at all; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def images_in(folder: Path, *, recursive: bool, leave_out: Path | None = None) -> Found:
    """The files of a folder that are named as images are; hidden ones, and links to folders, are passed over.

    Args:
        recursive: also those of its sub-folders.
        leave_out: a sub-folder that is not looked into.

    Raises:
        OSError: a folder cannot be read.
    """
    images, others = [], 0

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=refuse):
        kept = [name for name in sorted(folders) if recursive and not name.startswith(".")]
        folders[:] = [name for name in kept if leave_out is None or Path(place, name).resolve() != leave_out]
        for name in sorted(names):
            path = Path(place, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                images.append(path)
            else:
                others += 1
    return Found(images, others)
