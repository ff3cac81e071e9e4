"""The data: rotation against torchvision, each image once an epoch, IDX files."""

import gzip
import math
import os
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import assert_one_line, write_idx
from torchvision.transforms import InterpolationMode, functional

import mnist_cnn
from mnist_cnn import augment, load_mnist, normalise


def changed(image, degrees, right, down):
    """Return an image shifted and then rotated, counter-clockwise."""
    # torchvision rotates first (and clockwise), so the shift rotates with the image.
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    shift = [right * cosine + down * sine, down * cosine - right * sine]
    bilinear = InterpolationMode.BILINEAR
    return functional.affine(image.float(), -degrees, shift, 1.0, [0.0], bilinear)


@pytest.mark.parametrize(("rotation", "shift"), [(180, 5), (30, 0), (0, 3)])
def test_images_are_shifted_and_rotated_as_by_torchvision(datasets, rotation, shift):
    images = 255 - datasets[0][0][:200]  # the edges turn black
    torch.manual_seed(0)
    degrees = torch.empty(200).uniform_(-rotation, rotation).tolist()
    shifts = torch.empty(200, 2).uniform_(-shift, shift).tolist()
    torch.manual_seed(0)
    mine = augment(images, Namespace(rotation=rotation, shift=shift))
    expected = [changed(x, y, *z) for x, y, z in zip(images, degrees, shifts)]
    torch.testing.assert_close(mine, torch.stack(expected), atol=0.3, rtol=0)


def test_training_images_have_zero_mean_and_unit_deviation(real_mnist):
    pixels = normalise(load_mnist(real_mnist, "train")[0])
    assert pixels.mean().item() == pytest.approx(0, abs=1e-3)
    assert pixels.std().item() == pytest.approx(1, abs=1e-3)


def test_an_epoch_shows_each_image_once_in_random_order(train, datasets, monkeypatch):
    shown = []

    def watched(images, *settings):
        shown.extend(image.numpy().tobytes() for image in images)
        return augment(images, *settings)

    monkeypatch.setattr(mnist_cnn, "augment", watched)
    train("--epochs", 1)
    expected = [image.numpy().tobytes() for image in datasets[0][0]]
    assert shown != expected
    assert sorted(shown) == sorted(expected)


def idx_files(folder):
    return sorted((folder / "MNIST" / "raw").iterdir())


@pytest.fixture(params=["unpacked", "gz"])
def small(request, datasets, tmp_path):
    """A --data-dir of a test's own, its IDX files unpacked or as .gz."""
    folder = write_idx(tmp_path / "small", datasets)
    for path in idx_files(folder) if request.param == "gz" else []:
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        path.unlink()
    return folder


def test_idx_files_are_read_as_they_were_written(small, datasets, monkeypatch):
    monkeypatch.delattr("torchvision.datasets.MNIST")
    before = {path: path.read_bytes() for path in idx_files(small)}
    for part, written in zip(("train", "t10k"), datasets, strict=True):
        images, labels = load_mnist(small, part)
        assert torch.equal(images, written[0])
        assert torch.equal(labels, written[1])
    assert {path: path.read_bytes() for path in idx_files(small)} == before


@pytest.mark.parametrize("which", range(4))
def test_a_damaged_or_missing_file_is_named_and_all_are_left_alone(call, small, which):
    path = idx_files(small)[which]
    good = path.read_bytes()
    for bad in (good[:-100], b"\xff" * 4 + good[4:], b""):
        path.write_bytes(bad)
        assert_one_line(call("--data-dir", small), 1, path)
        assert path.read_bytes() == bad
    path.unlink()
    assert_one_line(call("--data-dir", small), 1, path)
    assert len(idx_files(small)) == 3


UNLIKE = {
    "size": lambda images, labels: (images[:, :, :27], labels),
    "count": lambda images, labels: (images, labels[1:]),
    "label": lambda images, labels: (images, labels + 1),
    "none": lambda images, labels: (images[:0], labels[:0]),
}


@pytest.mark.parametrize("problem", UNLIKE)
def test_files_that_are_not_like_mnist_are_named(call, tmp_path, datasets, problem):
    write_idx(tmp_path / "small", [datasets[0], UNLIKE[problem](*datasets[1])])
    assert_one_line(call("--data-dir", "small"), 1, "t10k-")


def test_a_download_appears_whole_even_beside_another(datasets, tmp_path, monkeypatch):
    def slow_download(folder, download):
        assert download
        write_idx(Path(folder), datasets)
        barrier.wait(timeout=60)

    barrier = threading.Barrier(2)
    monkeypatch.setattr("torchvision.datasets.MNIST", slow_download)
    with ThreadPoolExecutor() as pool:
        loads = [pool.submit(load_mnist, tmp_path / "data", "train") for _ in range(2)]
        for load in loads:
            assert torch.equal(load.result()[0], datasets[0][0])
    assert [path.name for path in (tmp_path / "data" / "MNIST").iterdir()] == ["raw"]


def test_a_failed_download_is_explained_and_leaves_no_file(call, tmp_path, monkeypatch):
    def broken_download(folder, download):
        raw = Path(folder, "MNIST", "raw")
        raw.mkdir(parents=True)
        (raw / "train-images-idx3-ubyte").write_bytes(b"part")
        raise RuntimeError("connection lost")

    monkeypatch.setattr("torchvision.datasets.MNIST", broken_download)
    raw = os.path.join("none", "MNIST", "raw")
    assert_one_line(call("--data-dir", "none"), 1, raw, "README", "connection lost")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_holdout_is_the_end_of_the_training_set_and_replaces_the_test_set(
    call, small
):
    for path in idx_files(small)[:2]:
        path.write_bytes(b"not to be read")
    flags = ["--data-dir", str(small), "--device", "cpu", "--epochs", "1"]
    assert call(*flags).returncode == 1
    process = call(*flags, "--holdout", "100")
    assert process.returncode == 0, process.stderr
    assert "validation accuracy" in process.stdout
    assert "test" not in process.stdout
    args = mnist_cnn.parse_arguments([*flags, "--holdout", "100"])
    train_set, validation_set = mnist_cnn.load_datasets(args)
    images, labels = load_mnist(small, "train")
    assert torch.equal(torch.cat([train_set[0], validation_set[0]]), images)
    assert torch.equal(validation_set[1], labels[-100:])
