"""Training: the learning rate, what a seed fixes, precision, TTA, real MNIST."""

import pytest
import torch
from conftest import assert_same_run, result, tensors
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
    assert [float(row.split(",")[2]) for row in rows] == rates[9::10]


def test_flags_shape_the_schedule(train, steps):
    flags = ["--lr", 0.1, "--pct-start", 0.5, "--div-factor", 4]
    train(*flags, "--final-div-factor", 50, "--epochs", 2, "--batch-size", 100)
    rates = [step["lr"] for step in steps]
    assert rates[5] == max(rates) == pytest.approx(0.1)
    assert [rates[0], rates[-1]] == pytest.approx([0.1 / 4, 0.1 / 4 / 50])


def test_optimizer_flags_hold_in_every_step(train, steps):
    train("--momentum", 0.7, "--weight-decay", 0.003, "--epochs", 2)
    assert {step["momentum"] for step in steps} == {0.7}
    assert {step["weight_decay"] for step in steps} == {0.003}


@pytest.mark.parametrize("pct_start", ["0", "0.2", "0.99"])
def test_any_share_of_warm_up_works_in_a_run_of_five_batches(train, steps, pct_start):
    train("--epochs", 1, "--batch-size", 120, "--pct-start", pct_start)
    assert len(steps) == 5


def test_the_same_command_gives_the_same_weights(train):
    """Also when another run came before it: the random state is the seed's alone."""
    first = train("--epochs", 2)
    train("--epochs", 1)
    assert_same_run(first, train("--epochs", 2))


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
    assert result(fp32)["eval_loss"] != result(bf16)["eval_loss"]
    assert result(fp32)["eval_loss"] == pytest.approx(
        result(bf16)["eval_loss"], rel=0.1
    )
    dtypes = {tensor.dtype for tensor in tensors(bf16 / "final.pt").values()}
    assert dtypes == {torch.float32, torch.int64}


def test_fp32_does_not_use_tf32(train):
    train("--epochs", 1, "--precision", "tf32")
    assert torch.backends.cudnn.allow_tf32
    train("--epochs", 1)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


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
    output = mnist_cnn.predict(BrightestColumn(column), image, tta=True)
    mean = (0.9 + 0.2 + 0.6) / 3  # shifts up and down leave it in its column
    torch.testing.assert_close(output, torch.tensor([[mean, 1 - mean]]).log())


def test_with_tta_the_accuracy_of_the_run_is_that_of_nine_shifts(train, datasets):
    plain, tta = train("--epochs", 2), train("--epochs", 2, "--tta")
    assert_same_run(plain, tta)
    assert result(plain)["accuracy"] == result(plain)["eval_accuracy"]
    model, (images, labels) = mnist_cnn.load_model(tta / "final.pt"), datasets[1]
    correct = mnist_cnn.predict(model, images, tta=True).argmax(dim=1) == labels
    accuracy = 100 * correct.double().mean().item()
    assert result(tta)["accuracy"] == pytest.approx(accuracy)


def test_an_epoch_of_real_mnist_reaches_97_percent(real_run):
    assert result(real_run)["accuracy"] >= 97
