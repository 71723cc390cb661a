"""Files as MNIST's, of random numbers."""

import gzip
import struct

import numpy as np

from benchmarks import mnist


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def make_mnist(folder, examples=1000):
    rng = np.random.default_rng(0)
    for split, count in (("train", examples), ("test", 50)):
        write_idx(folder / f"{mnist.IMAGES[split]}.gz", rng.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{mnist.LABELS[split]}.gz", rng.integers(0, 10, count))
