"""Training: the learning rate, what a seed fixes, precise BatchNorm, TTA, real MNIST."""

import math

import pytest
import torch
from conftest import assert_same_run, assert_same_weights, result, tensors, write_idx
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook

import mnist_cnn


@pytest.fixture
def steps():
    """The optimizer's settings in each step that it takes during the test."""
    settings = []
    handle = register_optimizer_step_post_hook(
        lambda optimizer, *_: settings.append(dict(optimizer.param_groups[0]))
    )
    yield settings
    handle.remove()


def one_cycle_rates(steps, lr, **settings):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
    schedule = OneCycleLR(optimizer, lr, total_steps=steps, **settings)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_the_learning_rate_of_each_batch_is_that_of_one_cycle_lr(train, steps):
    folder = train("--epochs", 3, "--batch-size", 64)
    rates = [step["lr"] for step in steps]
    settings = {"pct_start": 0.2, "div_factor": 10, "final_div_factor": 100}
    assert rates == one_cycle_rates(3 * 10, 0.015, **settings)
    rows = (folder / "metrics.csv").read_text().splitlines()[1:]
    assert [float(row.split(",")[1]) for row in rows] == rates[9::10]


def test_schedule_flags_shape_the_curve(train, steps):
    flags = ["--lr", 0.1, "--pct-start", 0.5, "--div-factor", 4]
    train(*flags, "--final-div-factor", 50, "--epochs", 2, "--batch-size", 100)
    rates = [step["lr"] for step in steps]
    assert rates[0] == pytest.approx(0.1 / 4)
    assert rates[5] == max(rates) == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.1 / 4 / 50)


def test_optimizer_flags_hold_in_every_step(train, steps):
    train("--momentum", 0.7, "--weight-decay", 0.003, "--epochs", 2)
    assert {step["momentum"] for step in steps} == {0.7}
    assert {step["weight_decay"] for step in steps} == {0.003}


@pytest.mark.parametrize("pct_start", ["0", "0.2", "0.99"])
def test_any_share_of_warm_up_works_in_a_run_of_five_batches(train, steps, pct_start):
    train("--epochs", 1, "--batch-size", 120, "--pct-start", pct_start)
    assert len(steps) == 5


def test_a_batch_larger_than_the_train_set_holds_all_of_it(train, steps):
    train("--epochs", 2, "--batch-size", 60000)
    assert len(steps) == 2


def test_the_same_command_gives_the_same_weights(train):
    assert_same_run(train("--epochs", 2), train("--epochs", 2))


def test_an_epoch_does_not_depend_on_how_the_one_before_drew(train):
    """The random state of an epoch comes from its seed and number alone."""
    short, long = train("--epochs", 1), train("--epochs", 2)
    assert result(short)["loss"] != result(long)["loss"]
    assert_same_weights(train("--epochs", 2), long)


@pytest.mark.parametrize(
    "flag", ["--seed=2", "--dropout=0", "--rotation=0", "--shift=2"]
)
def test_the_flag_reaches_the_training(train, flag):
    first, second = (
        tensors(train("--epochs", 1, *more) / "final.pt") for more in ([], [flag])
    )
    assert not torch.equal(first["conv1.weight"], second["conv1.weight"])


def test_bf16_computes_in_less_precision_and_learns_nearly_the_same(train):
    fp32, bf16 = train("--epochs", 3), train("--epochs", 3, "--precision", "bf16")
    assert result(fp32)["loss"] != result(bf16)["loss"]
    assert result(fp32)["loss"] == pytest.approx(result(bf16)["loss"], rel=0.1)
    assert {tensor.dtype for tensor in tensors(bf16 / "final.pt").values()} == {
        torch.float32,
        torch.int64,
    }


def test_fp32_does_not_use_tf32(train):
    train("--epochs", 1, "--precision", "tf32")
    assert torch.backends.cudnn.allow_tf32
    train("--epochs", 1)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_the_size_of_test_batches_does_not_change_the_result(train):
    whole, pieces = (train("--epochs", 1, "--test-batch-size", n) for n in (200, 33))
    assert result(whole)["loss"] == pytest.approx(result(pieces)["loss"], abs=1e-4)


# Precise BatchNorm


@pytest.mark.parametrize("dropout", [0, 0.5])
def test_precise_bn_has_the_mean_of_all_training_images(
    call, datasets, tmp_path, dropout
):
    """Without dropout, each image with the same weight, the last short batch too."""
    train_set = mnist_cnn.synthetic_digits(2001, 0)
    write_idx(tmp_path / "odd", [train_set, datasets[1]])
    flags = ["--data-dir", "odd", "--epochs", 1, "--precise-bn", "--out", "run"]
    assert call(*flags, "--dropout", dropout).returncode == 0
    model = mnist_cnn.Net().eval()
    model.load_state_dict(tensors(tmp_path / "run" / "seed-1" / "final.pt"))
    with torch.no_grad():
        x = mnist_cnn.normalise(train_set[0].unsqueeze(1))
        first = torch.relu(model.conv1(x))
        second = torch.relu(model.conv2(model.norm1(first)))
    for norm, seen in ((model.norm1, first), (model.norm2, second)):
        seen = seen.transpose(0, 1).flatten(1)
        torch.testing.assert_close(
            norm.running_mean, seen.mean(1), rtol=1e-2, atol=1e-3
        )
        torch.testing.assert_close(norm.running_var, seen.var(1), rtol=3e-2, atol=1e-3)


def test_precise_bn_changes_nothing_but_the_statistics(train):
    usual, precise = (
        tensors(train("--epochs", 2, flag) / "final.pt")
        for flag in ("--no-precise-bn", "--precise-bn")
    )
    for name, tensor in usual.items():
        changed = "running" in name or "tracked" in name
        assert torch.equal(tensor, precise[name]) != changed, name


# Test-time augmentation


class BrightestColumn(nn.Module):
    """A model that knows only in which column the light is: log-probabilities by column."""

    def __init__(self, probabilities):
        super().__init__()
        self.table = torch.tensor(probabilities).log()

    def forward(self, inputs):
        return self.table[inputs.sum(dim=(1, 2)).argmax(dim=1)]


def test_tta_is_the_mean_probability_over_nine_shifts():
    column = [[0.5] * 2] * 28
    column[9], column[10], column[11] = [0.9, 0.1], [0.2, 0.8], [0.6, 0.4]
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, 5, 10] = 255
    output = mnist_cnn.predict_tta(BrightestColumn(column), image, 1)
    mean = (0.9 + 0.2 + 0.6) / 3  # shifts up and down leave it in its column
    torch.testing.assert_close(output, torch.tensor([[mean, 1 - mean]]).log())


def test_tta_does_not_change_the_accuracy_beside_it(train):
    plain, tta = train("--epochs", 2), train("--epochs", 2, "--tta")
    assert result(plain)["accuracy"] == result(tta)["accuracy"]
    assert "tta_accuracy" not in result(plain)
    assert math.isfinite(result(tta)["tta_accuracy"])


def test_an_epoch_of_real_mnist_reaches_95_percent(real_run):
    assert result(real_run)["accuracy"] >= 95
