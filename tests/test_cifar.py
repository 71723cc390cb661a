import hashlib
import tarfile

import numpy as np
import pytest

from benchmarks import cifar_data
from benchmarks.cifar_data import FORMATS


def write_records(path, images, *labels):
    """Official records: a byte for each kind of label, then the planes of red, green and blue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for record in zip(images, *labels, strict=True):
            image, *numbers = record
            file.write(bytes(numbers))
            for channel in range(3):
                file.write(image[:, :, channel].tobytes())


def make_cifar(folder, dataset="cifar10", examples=16):
    """A synthetic set with so many records in each file; a bright class can be told from a dark one."""
    form, rng = FORMATS[dataset], np.random.default_rng(0)
    made = {"train": [], "test": []}
    for split, names in form.files.items():
        for name in names:
            labels = rng.integers(0, 2, examples)
            images = rng.integers(0, 56, (examples, 32, 32, 3)) + 150 * labels[:, None, None, None]
            images = images.astype(np.uint8)
            coarse = [rng.integers(20, 250, examples)] * (form.label_bytes - 1)
            write_records(folder / form.folder / name, images, *coarse, labels)
            made[split].append((images, labels))
    return {
        split: tuple(map(np.concatenate, zip(*parts, strict=True))) for split, parts in made.items()
    }


@pytest.mark.parametrize("dataset", FORMATS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_splits_are_read_as_written(tmp_path, dataset, split):
    images, labels = make_cifar(tmp_path, dataset, examples=3)[split]
    received_images, received_labels = cifar_data.load_split(tmp_path, dataset, split)
    assert len(labels) == (15 if (dataset, split) == ("cifar10", "train") else 3)
    np.testing.assert_array_equal(received_images, images)
    np.testing.assert_array_equal(received_labels, labels)
    assert received_images.dtype == np.uint8
    assert received_labels.dtype == np.int32


def test_the_bytes_of_a_record(tmp_path):
    """By hand: label 7, then red 1, green 2 and blue 3, whose second pixel of the first row is 9."""
    planes = bytes([1]) * 1024 + bytes([2]) * 1024 + bytes([3, 9]) + bytes([3]) * 1022
    (tmp_path / "x.bin").write_bytes(bytes([7]) + planes)
    images, labels = cifar_data.read_records(tmp_path / "x.bin", FORMATS["cifar10"])
    assert labels.tolist() == [7]
    assert images[0, 0, 1].tolist() == [1, 2, 9]
    assert images[0, 1, 0].tolist() == [1, 2, 3]


def test_broken_and_missing_files(tmp_path):
    make_cifar(tmp_path, examples=2)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=r"data_batch_3.bin holds 6145 bytes; expected records of 3073"
    ):
        cifar_data.load_split(tmp_path, "cifar10", "train")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds 0 bytes"):
        cifar_data.load_split(tmp_path, "cifar10", "train")
    path.write_bytes(bytes([10]) + whole[1:])
    with pytest.raises(ValueError, match="has the label 10; expected less than 10"):
        cifar_data.load_split(tmp_path, "cifar10", "train")
    path.unlink()
    with pytest.raises(ValueError, match=r"data_batch_3.bin is missing"):
        cifar_data.load_split(tmp_path, "cifar10", "train")


@pytest.mark.parametrize("dataset", FORMATS)
def test_an_absent_folder_is_taken_from_the_official_archive(
    tmp_path, monkeypatch, capsys, dataset
):
    form = FORMATS[dataset]
    images, labels = make_cifar(tmp_path / "made", dataset, examples=2)["test"]
    archive = tmp_path / form.archive
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "made" / form.folder, form.folder)
    checksum = f"md5:{hashlib.md5(archive.read_bytes()).hexdigest()}"
    # An archive of the right checksum is already there, so that nothing is fetched.
    monkeypatch.setitem(cifar_data.FORMATS, dataset, form._replace(checksum=checksum))
    received_images, received_labels = cifar_data.load_split(tmp_path, dataset, "test")
    np.testing.assert_array_equal(received_images, images)
    np.testing.assert_array_equal(received_labels, labels)
    assert f"{form.folder} is not in {tmp_path}: downloading it from" in capsys.readouterr().out


def test_the_archive_is_asked_for_with_its_checksum(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        cifar_data.pooch, "retrieve", lambda url, **options: asked.update(url=url, **options)
    )
    cifar_data.find_folder(tmp_path, FORMATS["cifar100"])
    assert asked["url"] == "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
    assert asked["known_hash"] == "md5:03b5dce01913d631647c71ecec9e9cb8"
    assert asked["path"] == tmp_path


def test_channel_statistics():
    images = np.random.default_rng(1).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    images[..., 1] //= 4
    mean, deviation = cifar_data.channel_statistics(images)
    np.testing.assert_allclose(mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(deviation, images.std((0, 1, 2)), rtol=1e-6)


def test_augmented_images_are_shifted_and_mirrored_only():
    images = np.random.default_rng(2).integers(1, 256, (200, 6, 5, 3), dtype=np.uint8)
    received = cifar_data.crop_and_flip(images, np.random.default_rng(3), pad=2)
    assert received.dtype == np.uint8
    found = set()
    for before, after in zip(images, received, strict=True):
        padded = np.zeros((10, 9, 3), np.uint8)
        padded[2:8, 2:7] = before
        matches = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            if np.array_equal(
                padded[top : top + 6, left : left + 5][:, :: -1 if mirrored else 1], after
            )
        ]
        assert len(matches) == 1
        found.update(matches)
    # Of the 50 equally likely ones, 49 are expected among 200 images.
    assert len(found) > 40


def test_augmentation_is_a_function_of_the_generator():
    images = np.random.default_rng(2).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    one, same, other = (
        cifar_data.crop_and_flip(images, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
