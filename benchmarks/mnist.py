"""MNIST in its official files, from a directory that the user names."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pooch

# The files as published by LeCun, Cortes and Burges, and a mirror of them.
MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
CHECKSUMS = {
    "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
}
IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
LABELS = {"train": "train-labels-idx1-ubyte", "test": "t10k-labels-idx1-ubyte"}


def load_images(data_dir: Path, split: str) -> np.ndarray:
    """The images of a split, `"train"` or `"test"`: float32 in [0, 1], shape `(examples, 784)`."""
    pixels = read_idx(find_file(data_dir, IMAGES[split]))
    return pixels.reshape(len(pixels), -1).astype(np.float32) / 255


def load_labels(data_dir: Path, split: str) -> np.ndarray:
    """The labels of a split, `"train"` or `"test"`: int32, shape `(examples,)`."""
    return read_idx(find_file(data_dir, LABELS[split])).astype(np.int32)


def find_file(data_dir: Path, name: str) -> Path:
    """The place of an official file: in the directory, in `mnist` below it, or downloaded there."""
    for folder in (data_dir, data_dir / "mnist", data_dir / "MNIST" / "raw"):
        for candidate in (folder / f"{name}.gz", folder / name):
            if candidate.exists():
                return candidate
    archive = f"{name}.gz"
    print(f"{name} is not in {data_dir}: downloading it from {MIRROR}", flush=True)
    return Path(
        pooch.retrieve(
            MIRROR + archive, known_hash=CHECKSUMS[archive], fname=archive, path=data_dir / "mnist"
        )
    )


def read_idx(path: Path) -> np.ndarray:
    """Reads an idx file of bytes, gzipped or not.

    Raises:
      ValueError: the file is not an idx file of bytes, or is cut short.
    """
    raw = path.read_bytes()
    data = gzip.decompress(raw) if path.suffix == ".gz" else raw
    zeros, kind, axes = struct.unpack_from(">HBB", data)
    if zeros != 0 or kind != 8:
        msg = f"{path} is not an idx file of bytes: it starts with {data[:4]!r}."
        raise ValueError(msg)
    shape = struct.unpack_from(f">{axes}I", data, 4)
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * axes)
    if body.size != np.prod(shape):
        msg = f"{path} holds {body.size} bytes; its header announces an array of shape {shape}."
        raise ValueError(msg)
    return body.reshape(shape)
