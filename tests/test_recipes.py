"""Recipes, the held-out images, and what the recipes add to the reference."""

import json
import math

import pytest
import torch
from conftest import write_idx
from torch import nn

import mnist_cnn

REFERENCE = {
    "epochs": 19,
    "batch_size": 128,
    "lr": 0.015,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "dropout": 0.05,
    "rotation": 7,
    "shift": 0,
    "pct_start": 0.2,
    "div_factor": 10,
    "final_div_factor": 100,
    "precise_bn": False,
}


def recipe_of(args):
    return {name: getattr(args, name) for name in REFERENCE}


# Recipes


def test_the_reference_is_the_default(flags):
    assert recipe_of(flags()) == REFERENCE
    assert recipe_of(flags("--recipe", "reference")) == REFERENCE


BETTER = {"weight_decay": 5e-4, "dropout": 0, "precise_bn": True}
BEST = {"lr": 0.2, "rotation": 10, "shift": 1.5}
QUICK = {"epochs": 6, "batch_size": 64, "lr": 0.15, "rotation": 5, "shift": 0.5}


@pytest.mark.parametrize(("name", "own"), [("best", BEST), ("quick", QUICK)])
def test_a_recipe_changes_these_defaults_and_no_other(flags, name, own):
    assert recipe_of(flags("--recipe", name)) == {**REFERENCE, **BETTER, **own}


@pytest.mark.parametrize("order", [1, -1])
def test_a_given_flag_wins_over_the_recipe_before_or_after_it(flags, order):
    given = [["--recipe", "best"], ["--lr", 0.015, "--no-precise-bn"]][::order]
    args = flags(*given[0], *given[1])
    changed = {"lr": 0.015, "precise_bn": False}
    assert recipe_of(args) == {**REFERENCE, **mnist_cnn.RECIPES["best"], **changed}


def test_a_resumed_run_keeps_its_recipe_and_its_flags(call, small_data, tmp_path):
    folder = tmp_path / "run"
    given = ["--recipe", "quick", "--epochs", 1, "--lr", 0.1, "--device", "cpu"]
    assert call("--data-dir", small_data, *given, "--out", folder).returncode == 0
    args = mnist_cnn.parse_arguments(["--resume", str(folder)])
    expected = {**REFERENCE, **mnist_cnn.RECIPES["quick"], "epochs": 1, "lr": 0.1}
    assert recipe_of(args) == expected
    process = call("--resume", folder, "--recipe", "best")
    assert process.returncode == 2
    assert "--recipe best contradicts quick" in process.stderr


# The hold-out


def held_out(flags, data, count):
    return mnist_cnn.load_splits(flags("--data-dir", data, "--holdout", count))


def test_the_holdout_is_the_end_of_the_training_images(flags, small_data, small_splits):
    (train, train_labels), (test, test_labels) = held_out(flags, small_data, 250)
    images, labels = small_splits[0]
    assert torch.equal(train, images[:350])
    assert torch.equal(train_labels, labels[:350])
    assert torch.equal(test, images[350:])
    assert torch.equal(test_labels, labels[350:])


def test_with_a_holdout_the_test_set_is_not_read(
    call, tmp_path, small_splits, no_network
):
    raw = write_idx(tmp_path / "small", small_splits)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (raw / name).write_bytes(b"not to be read")
    flags = ["--data-dir", tmp_path / "small", "--epochs", 1]
    assert call(*flags).returncode == 1
    process = call(*flags, "--holdout", 100, "--out", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    assert "last 100 training images" in process.stdout
    assert "the best was picked on held-out images" in process.stdout


def test_without_a_holdout_training_has_all_images(flags, small_data):
    (train, _), (test, _) = held_out(flags, small_data, 0)
    assert (len(train), len(test)) == (600, 200)


def test_a_holdout_works_on_synthetic_digits_too(call):
    process = call("--synthetic", "--dry-run", "--holdout", 59_000)
    assert process.returncode == 0, process.stderr


def test_a_holdout_that_leaves_nothing_to_train_on_is_refused(error_of, small_data):
    error = error_of("--data-dir", small_data, "--holdout", 600, status=1)
    assert "--holdout 600 leaves none of 600 images" in error


# What is new in them


def test_precise_bn_ends_with_the_statistics_of_the_plain_training_images(
    flags, small_splits
):
    args = flags("--epochs", 2, "--precise-bn", "--dropout", 0)
    model = mnist_cnn.fit(args, *small_splits, [])
    with torch.no_grad():
        pixels = mnist_cnn.normalise(small_splits[0][0].unsqueeze(1))
        seen = torch.relu(model.conv1(pixels)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.norm1.running_mean, seen.mean(dim=1))
    torch.testing.assert_close(model.norm1.running_var, seen.var(dim=1))


def test_precise_bn_changes_nothing_but_the_statistics(flags, small_splits):
    usual, precise = (
        mnist_cnn.fit(flags("--epochs", 2, flag), *small_splits, [])
        for flag in ("--no-precise-bn", "--precise-bn")
    )
    for mine, theirs in zip(precise.parameters(), usual.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(precise.norm6.running_mean, usual.norm6.running_mean)


class BrightestColumn(nn.Module):
    """A model that knows only in which column the light is: log-probabilities by column."""

    def __init__(self, probabilities):
        super().__init__()
        self.table = torch.tensor(probabilities).log()

    def forward(self, pixels):
        return self.table[pixels.sum(dim=(1, 2)).argmax(dim=1)]


def test_test_time_augmentation_is_the_mean_probability_over_the_positions():
    column = [[0.5] * 2] * 28
    column[9], column[10], column[11] = [0.9, 0.1], [0.2, 0.8], [0.6, 0.4]
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, 5, 10] = 255
    output = mnist_cnn.predict_moved(BrightestColumn(column), image, 1)
    mean = (0.9 + 0.2 + 0.6) / 3  # moves up and down leave it in its column
    torch.testing.assert_close(output, torch.tensor([[mean, 1 - mean]]).log())


def test_the_nine_positions_are_black_where_the_image_came_from():
    white = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    black = mnist_cnn.normalise(torch.zeros(1))
    seen = []

    class Spy(nn.Module):
        def forward(self, pixels):
            middle_row, middle_column = pixels[0, 0, 14], pixels[0, 0, :, 14]
            lines = (middle_row == black, middle_column == black)
            seen.append([line.nonzero().flatten().tolist() for line in lines])
            return torch.zeros(1, 10)

    mnist_cnn.predict_moved(Spy(), white, 1)
    edges = ([], [0], [27])
    assert sorted(seen) == sorted([x, y] for x in edges for y in edges)


def test_tta_is_reported_beside_the_final_accuracy(call, small_data, tmp_path):
    given = ["--data-dir", small_data, "--epochs", 2, "--runs", 2, "--device", "cpu"]
    for name in ("plain", "tta"):
        more = ["--tta"] * (name == "tta")
        assert call(*given, *more, "--out", tmp_path / name).returncode == 0
    plain, tta = (
        json.loads((tmp_path / name / "result.json").read_text())
        for name in ("plain", "tta")
    )
    assert tta["final_accuracy"] == plain["final_accuracy"]
    assert "tta_accuracy" not in plain
    values = [run["tta_accuracy"] for run in tta["runs"]]
    assert tta["tta_accuracy"] == pytest.approx(sum(values) / 2)
    deviation = abs(values[0] - values[1]) / math.sqrt(2)
    # scipy.stats: t.ppf(0.975, 1) = 12.706204736174694
    expected = 12.706204736174694 * deviation / math.sqrt(2)
    assert tta["tta_interval_95"] == pytest.approx(expected, rel=1e-4)
