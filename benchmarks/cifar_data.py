"""CIFAR-10 and CIFAR-100 in their official binary files, from a directory that the user names."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch

SITE = "https://www.cs.toronto.edu/~kriz/"
SIDE = 32
PIXELS = 3 * SIDE * SIDE


class Format(NamedTuple):
    """The official files of a data set.

    Attributes:
      archive: name of the archive that holds the folder.
      checksum: of the archive.
      folder: where the files lie.
      files: from a split to the names of its files.
      label_bytes: of each record, before its pixels; the last one is the label.
      classes: number of labels.
    """

    archive: str
    checksum: str
    folder: str
    files: dict[str, tuple[str, ...]]
    label_bytes: int
    classes: int


FORMATS = {
    "cifar10": Format(
        "cifar-10-binary.tar.gz",
        "md5:c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-batches-bin",
        {
            "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            "test": ("test_batch.bin",),
        },
        label_bytes=1,
        classes=10,
    ),
    # The first byte of a record is one of 20 coarse labels.
    "cifar100": Format(
        "cifar-100-binary.tar.gz",
        "md5:03b5dce01913d631647c71ecec9e9cb8",
        "cifar-100-binary",
        {"train": ("train.bin",), "test": ("test.bin",)},
        label_bytes=2,
        classes=100,
    ),
}


def load_split(data_dir: Path, dataset: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a split, `"train"` or `"test"`.

    Args:
      data_dir: the directory in which the official folder lies; without the folder it is downloaded there.
      dataset: `"cifar10"` or `"cifar100"`.
      split: `"train"` or `"test"`.

    Returns:
      Images, uint8 of shape `(examples, 32, 32, 3)`, and labels, int32 of shape `(examples,)`.

    Raises:
      ValueError: a file is missing, cut short or of another format.
    """
    form = FORMATS[dataset]
    folder = find_folder(data_dir, form)
    parts = [read_records(folder / name, form) for name in form.files[split]]
    images, labels = zip(*parts, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def find_folder(data_dir: Path, form: Format) -> Path:
    """The official folder, which is downloaded if the directory has none."""
    folder = data_dir / form.folder
    if not folder.exists():
        print(f"{form.folder} is not in {data_dir}: downloading it from {SITE}", flush=True)
        pooch.retrieve(
            SITE + form.archive,
            known_hash=form.checksum,
            fname=form.archive,
            path=data_dir,
            processor=pooch.Untar(extract_dir="."),
        )
    return folder


def read_records(path: Path, form: Format) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one file; a record is its label bytes and then all red, all green, all blue pixels.

    Raises:
      ValueError: the file is missing, does not consist of whole records, or has labels that there are not.
    """
    if not path.exists():
        msg = f"{path} is missing; remove its folder to have it downloaded anew, or put the file there."
        raise ValueError(msg)
    data = np.fromfile(path, np.uint8)
    length = form.label_bytes + PIXELS
    if not data.size or data.size % length:
        msg = f"{path} holds {data.size} bytes; expected records of {length} bytes each: it is cut or another file."
        raise ValueError(msg)
    records = data.reshape(-1, length)
    labels = records[:, form.label_bytes - 1].astype(np.int32)
    if labels.max() >= form.classes:
        msg = f"{path} has the label {labels.max()}; expected less than {form.classes}: it is another file."
        raise ValueError(msg)
    images = records[:, form.label_bytes :].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel of images `(examples, height, width, channels)`, as float32."""
    count = images[..., 0].size
    mean = images.mean(axis=(0, 1, 2), dtype=np.float64)
    # np.std would copy all images as float64.
    square = np.einsum("nhwc,nhwc->c", images, images, dtype=np.float64) / count
    return mean.astype(np.float32), np.sqrt(square - mean**2).astype(np.float32)


def crop_and_flip(images: np.ndarray, rng: np.random.Generator, pad: int = 4) -> np.ndarray:
    """Each image moved by up to `pad` pixels along both axes, black where it came from nowhere, and mirrored or not."""
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    top, left = rng.integers(0, 2 * pad + 1, (2, count, 1))
    mirrored = rng.integers(0, 2, (count, 1)) == 1
    rows, columns = top + np.arange(height), left + np.arange(width)
    columns = np.where(mirrored, columns[:, ::-1], columns)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
