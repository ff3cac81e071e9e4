"""The data: rotation against torchvision, normalisation, each image once an epoch."""

import math

import pytest
import torch
from torchvision.transforms import InterpolationMode, functional

from mnist_cnn import (
    affine,
    load_mnist,
    normalise,
    synthetic_digits,
    train_batches,
)


def numbered_images(count):
    """Images whose pixels are all equal to the number of the image, and these numbers."""
    numbers = torch.arange(count)
    return numbers.byte().view(-1, 1, 1).expand(count, 28, 28), numbers


def test_rotation_agrees_with_torchvision(datasets):
    pixels = datasets[0][0][:200].unsqueeze(1).float() / 255
    torch.manual_seed(0)
    degrees = torch.cat([torch.empty(180).uniform_(-180, 180), torch.arange(-10, 10)])
    rotated = affine(pixels, degrees, torch.zeros(200, 2))
    for image, angle, mine in zip(pixels, degrees.tolist(), rotated, strict=True):
        expected = functional.rotate(image, angle, InterpolationMode.BILINEAR)
        torch.testing.assert_close(mine, expected, atol=1e-3, rtol=0)


def test_a_shift_and_then_a_rotation_agree_with_torchvision(datasets):
    pixels = datasets[0][0][:200].unsqueeze(1).float() / 255
    torch.manual_seed(0)
    degrees = torch.empty(200).uniform_(-180, 180)
    shifts = torch.empty(200, 2).uniform_(-5, 5)
    mine = affine(pixels, degrees, shifts)
    for i, angle in enumerate(degrees.tolist()):
        # torchvision rotates first (and clockwise), so the shift rotates with the image.
        x, y = shifts[i].double().tolist()
        cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        rotated = [x * cosine + y * sine, y * cosine - x * sine]
        unchanged = {"scale": 1.0, "shear": [0.0]}
        expected = functional.affine(
            pixels[i],
            -angle,
            rotated,
            **unchanged,
            interpolation=InterpolationMode.BILINEAR,
        )
        torch.testing.assert_close(mine[i], expected, atol=1e-3, rtol=0)


def test_rotation_fills_with_black_before_normalising():
    white = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    ((pixels, _),) = train_batches(white, torch.zeros(1), 1, 180, 0)
    black = normalise(torch.zeros(1))
    assert pixels.min() == black


def test_normalisation_uses_mean_01307_and_deviation_03081():
    pixels = torch.tensor([0.0, 255.0])
    expected = torch.tensor([-0.1307 / 0.3081, (1 - 0.1307) / 0.3081])
    torch.testing.assert_close(normalise(pixels), expected)


def test_real_training_images_have_zero_mean_and_unit_deviation(real_mnist):
    images, _ = load_mnist(real_mnist, train=True)
    pixels = normalise(images.float())
    assert pixels.mean().item() == pytest.approx(0, abs=1e-3)
    assert pixels.std().item() == pytest.approx(1, abs=1e-3)


def test_an_epoch_shows_each_image_once_with_its_label():
    batches = list(train_batches(*numbered_images(250), 64, 0, 0))
    pixels = torch.cat([pixels for pixels, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    torch.testing.assert_close(pixels[:, 0, 14, 14], normalise(labels.float()))
    assert labels.sort().values.tolist() == list(range(250))


def test_the_last_short_batch_is_kept():
    batches = train_batches(*numbered_images(250), 64, 7, 0)
    assert [len(labels) for _, labels in batches] == [64, 64, 64, 58]


def test_each_epoch_has_an_order_of_its_own():
    images, labels = numbered_images(250)
    first, second = (
        torch.cat([batch for _, batch in train_batches(images, labels, 64, 0, 0)])
        for _ in range(2)
    )
    assert not torch.equal(first, second)


def test_each_image_is_rotated_by_its_own_angle(datasets):
    image = datasets[0][0][:1].expand(32, 28, 28)
    ((pixels, _),) = train_batches(image, torch.zeros(32), 32, 7, 0)
    assert len(pixels.flatten(1).unique(dim=0)) == 32


def test_angles_fill_the_range_of_the_flag():
    # A dot 10 pixels right of the centre goes up and down by 10 sin(angle).
    dot = torch.zeros(2000, 28, 28, dtype=torch.uint8)
    dot[:, 13:15, 23:25] = 255
    ((pixels, _),) = train_batches(dot, torch.zeros(2000), 2000, 30, 0)
    weight = pixels - pixels.min()
    rows = (weight.sum(dim=(1, 3)) * torch.arange(28)).sum(1) / weight.sum(
        dim=(1, 2, 3)
    )
    degrees = torch.rad2deg(torch.asin((13.5 - rows) / 10))
    assert degrees.min().item() == pytest.approx(-30, abs=1)
    assert degrees.max().item() == pytest.approx(30, abs=1)
    assert degrees.mean().item() == pytest.approx(0, abs=1.2)  # 3 standard errors


def test_shifts_fill_the_range_of_the_flag_on_both_axes():
    dot = torch.zeros(2000, 28, 28, dtype=torch.uint8)
    dot[:, 13:15, 13:15] = 255
    batches = train_batches(dot, torch.zeros(2000), 2000, 0, 3)
    ((pixels, _),) = batches
    weight = pixels - pixels.min()
    for axis in (2, 3):
        profile = weight.sum(dim=5 - axis)[:, 0]
        shifted = (profile * torch.arange(28)).sum(1) / profile.sum(1) - 13.5
        assert shifted.min().item() == pytest.approx(-3, abs=0.1)
        assert shifted.max().item() == pytest.approx(3, abs=0.1)
        assert shifted.mean().item() == pytest.approx(0, abs=0.12)  # 3 standard errors


def test_ranges_of_zero_leave_the_images_as_they_are(datasets):
    batches = train_batches(*datasets[0], 600, 0, 0)
    ((pixels, labels),) = batches
    originals = normalise(datasets[0][0].unsqueeze(1).float())
    assert torch.equal(
        pixels.flatten(1).sort(dim=0).values, originals.flatten(1).sort(dim=0).values
    )
    assert labels.sort().values.tolist() == datasets[0][1].sort().values.tolist()


def test_synthetic_digits_look_like_mnist_tensors():
    images, labels = synthetic_digits(6000, seed=0)
    assert images.shape == (6000, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.unique().tolist() == list(range(10))
    assert 0.05 < images.float().mean().item() / 255 < 0.25


def test_synthetic_digits_repeat_with_their_seed_and_only_with_it():
    assert torch.equal(synthetic_digits(50, 3)[0], synthetic_digits(50, 3)[0])
    assert not torch.equal(synthetic_digits(50, 3)[0], synthetic_digits(50, 4)[0])


def test_synthetic_digits_of_one_kind_differ():
    images, labels = synthetic_digits(500, seed=0)
    fives = images[labels == 5]
    assert len(fives.flatten(1).unique(dim=0)) == len(fives)


def test_idx_files_are_read_as_they_were_written(data, datasets):
    for train, written in zip((True, False), datasets, strict=True):
        images, labels = load_mnist(data, train)
        assert torch.equal(images, written[0])
        assert torch.equal(labels, written[1])
