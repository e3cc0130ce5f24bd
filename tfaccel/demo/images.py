"""The demo's images: the built-in sample or the user's own, checked before anything is trained."""

from __future__ import annotations

import os
import pathlib

import numpy as np

from tfaccel.archives import read_archive

SMALLEST_IMAGE = 10  # what the demo's network leaves at least one pixel of


def sample_path() -> pathlib.Path:
    """The built-in sample: 6,000 images of Fashion-MNIST (MIT licence)."""
    return pathlib.Path(__file__).parent.parent / "data" / "fashion_mnist_sample.npz"


def load_images(path: str | os.PathLike | None = None) -> dict[str, np.ndarray]:
    """Reads and checks images and labels.

    Args:
        path: A `.npz` file with `x_train`, `y_train`, `x_test`, `y_test`; None for the sample.

    Returns:
        Images as float32 of shape `(images, height, width, channels)`, scaled to 0..1 where they are
        integers, and labels as int32 of shape `(images,)`.

    Raises:
        ValueError: No such file, a missing array, no images, or labels out of range.
    """
    source = pathlib.Path(path) if path is not None else sample_path()
    names = ("x_train", "y_train", "x_test", "y_test")
    archive = read_archive(source)
    missing = [name for name in names if name not in archive]
    if missing:
        raise ValueError(
            f"{source} has no {', '.join(missing)}. Allowed: {', '.join(names)}. Write it with "
            "np.savez(path, x_train=..., y_train=..., x_test=..., y_test=...)."
        )
    data = {name: archive[name] for name in names}
    for split in ("train", "test"):
        data[f"x_{split}"] = _check_images(data[f"x_{split}"], f"x_{split}")
    if data["x_train"].shape[1:] != data["x_test"].shape[1:]:
        raise ValueError(
            f"x_train has images of shape {data['x_train'].shape[1:]}, x_test of "
            f"{data['x_test'].shape[1:]}. Allowed: one shape for both."
        )
    for split in ("train", "test"):
        data[f"y_{split}"] = _check_labels(
            data[f"y_{split}"], len(data[f"x_{split}"]), f"y_{split}", data["y_train"]
        )
    return data


def _check_images(images: np.ndarray, name: str) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    usable = images.ndim == 4 and np.issubdtype(images.dtype, np.number) and len(images) > 0
    if not usable or min(images.shape[1:3]) < SMALLEST_IMAGE or images.shape[3] == 0:
        raise ValueError(
            f"{name} has shape {images.shape} and dtype {images.dtype}. Allowed: at least one image, "
            f"(images, height, width) or (images, height, width, channels), numbers, height and width "
            f"≥ {SMALLEST_IMAGE}."
        )
    if np.issubdtype(images.dtype, np.integer):
        return (images / np.float32(255)).astype(np.float32)
    if not np.isfinite(images).all():
        raise ValueError(f"{name} holds NaN or infinite values. Allowed: finite numbers. Remove them.")
    return images.astype(np.float32)


def _check_labels(labels: np.ndarray, images: int, name: str, train_labels: np.ndarray) -> np.ndarray:
    labels = labels.reshape(-1)
    if len(labels) != images:
        raise ValueError(f"{name} has {len(labels)} labels for {images} images. Allowed: one each.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{name} has dtype {labels.dtype}. Allowed: class numbers 0, 1, 2 … as integers. Use "
            "np.argmax(labels, axis=-1) on one-hot labels."
        )
    classes = int(train_labels.max()) + 1
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes or classes > len(train_labels):
        raise ValueError(
            f"{name} has labels {lowest}..{highest}, with {classes} classes in y_train's "
            f"{len(train_labels)} labels. Allowed: 0..{classes - 1} in both, and no more classes than "
            "labels. Number the classes from 0."
        )
    return labels.astype(np.int32)
