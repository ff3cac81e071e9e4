"""Training: the network, dropout, the learning rate, precision, real MNIST."""

import pytest
import torch
from conftest import load, result
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from mnist_cnn import Dropout, Net

SUMMARY = """
Conv2d-1 100, BatchNorm2d-2 20, Dropout-3 0, Conv2d-4 1,456, BatchNorm2d-5 32, Dropout-6 0,
MaxPool2d-7 0, Conv2d-8 170, Conv2d-9 1,456, BatchNorm2d-10 32, Dropout-11 0,
Conv2d-12 2,320, BatchNorm2d-13 32, Dropout-14 0, MaxPool2d-15 0, Conv2d-16 170,
Conv2d-17 1,456, BatchNorm2d-18 32, Dropout-19 0, Conv2d-20 2,320, BatchNorm2d-21 32,
Dropout-22 0, Conv2d-23 170, AdaptiveAvgPool2d-24 0
"""


def test_fewer_than_10000_parameters():
    assert sum(weights.numel() for weights in Net().parameters()) < 10_000


def test_the_24_layers_are_those_of_the_published_network(trained):
    """Goes when your network is another one: no other test knows its layers."""
    output = trained[1]
    rows = [line.split() for line in output.splitlines() if "[-1," in line]
    expected = [row.split() for row in SUMMARY.replace("\n", " ").split(", ")]
    assert [[row[0], row[-1]] for row in rows] == expected
    assert "Total params: 9,798\nTrainable params: 9,798\n" in output
    assert "Forward/backward pass size (MB): 0.70" in output
    layers = Net(dropout=0.3).modules()
    assert {layer.p for layer in layers if isinstance(layer, Dropout)} == {0.3}


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_drops_a_fraction_p_independently_and_scales_the_others(p, layout):
    torch.manual_seed(0)
    x = torch.ones(500, 10, 20, 40).to(memory_format=layout).requires_grad_()
    output = Dropout(p)(x)
    output.backward(torch.full(x.shape, 2.0))  # arrives channels first
    torch.testing.assert_close(x.grad, 2 * output.detach())
    torch.testing.assert_close(output.unique(), torch.tensor([0, 1 / (1 - p)]))
    dropped = output.flatten() == 0
    assert dropped.float().mean().item() == pytest.approx(p, abs=1e-3)
    for distance in (1, 2, 16, 784):
        both = (dropped[distance:] & dropped[:-distance]).float().mean().item()
        assert both == pytest.approx(p**2, abs=2e-3 * p)  # 4 standard errors


@pytest.fixture
def steps():
    """The optimizer's settings in each step that it takes during the test."""
    settings = []
    handle = register_optimizer_step_post_hook(
        lambda optimizer, *_: settings.append(dict(optimizer.param_groups[0]))
    )
    yield settings
    handle.remove()


DEFAULTS = {"pct_start": 0.2, "div_factor": 10, "final_div_factor": 100}
OTHERS = {"pct_start": 0.5, "div_factor": 4, "final_div_factor": 50}


@pytest.mark.parametrize(("lr", "settings"), [(0.015, DEFAULTS), (0.1, OTHERS)])
def test_each_learning_rate_is_that_of_one_cycle_lr(train, steps, lr, settings):
    flags = ["--lr=0.1", "--pct-start=0.5", "--div-factor=4", "--final-div-factor=50"]
    flags = [] if settings is DEFAULTS else flags
    folder = train("--epochs", 3, "--batch-size", 64, *flags)
    rates = [step["lr"] for step in steps]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr)
    schedule = OneCycleLR(optimizer, lr, total_steps=3 * 10, **settings)
    expected = []
    for _ in range(3 * 10):
        expected += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert expected == rates
    rows = (folder / "metrics.csv").read_text().splitlines()[1:]
    assert [float(row.split(",")[2]) for row in rows] == rates[9::10]


def test_optimizer_flags_hold_in_every_step(train, steps):
    train("--momentum", 0.7, "--weight-decay", 0.003, "--epochs", 2)
    assert {step["momentum"] for step in steps} == {0.7}
    assert {step["weight_decay"] for step in steps} == {0.003}


@pytest.mark.parametrize("pct_start", ["0", "0.2", "0.99"])
def test_any_share_of_warm_up_works_in_a_run_of_five_batches(train, steps, pct_start):
    train("--epochs", 1, "--batch-size", 120, "--pct-start", pct_start)
    assert len(steps) == 5


def test_a_dry_run_takes_a_step_and_leaves_no_files(call, data, train, steps, tmp_path):
    process = call("--data-dir", data, "--dry-run", "--epochs", 7)
    assert process.returncode == 0
    assert "--resume" not in process.stdout
    assert len(steps) == 1
    assert not list(tmp_path.iterdir())
    assert len(list(train("--dry-run").iterdir())) == 5


@pytest.mark.parametrize("flag", ["--seed=2", "--rotation=0", "--shift=2"])
def test_the_flag_reaches_the_training(train, flag):
    first = load(train("--epochs", 1) / "final.pt")
    second = load(train("--epochs", 1, flag) / "final.pt")
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_bf16_computes_in_less_precision_and_learns_nearly_the_same(train):
    fp32, bf16 = train("--epochs", 3), train("--epochs", 3, "--precision", "bf16")
    first, second = (result(folder)["eval_loss"] for folder in (fp32, bf16))
    assert first != second
    assert first == pytest.approx(second, rel=0.1)
    dtypes = {tensor.dtype for tensor in load(bf16 / "final.pt").values()}
    assert dtypes == {torch.float32, torch.int64}


def test_fp32_does_not_use_tf32(train):
    train("--epochs", 1, "--precision", "tf32")
    assert torch.backends.cudnn.allow_tf32
    train("--epochs", 1)
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_an_epoch_of_real_mnist_reaches_97_percent(real_run):
    assert result(real_run)["accuracy"] >= 97
