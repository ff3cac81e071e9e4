"""On an NVIDIA GPU: the same seed, the same weights; resumed too; the CPU's step."""

import pytest
import torch
from conftest import ROW, assert_same_run, metrics, run, start
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from mnist_cnn import Net, make_model, make_step, make_training, parse_arguments

pytestmark = pytest.mark.cuda
if not torch.cuda.is_available():
    pytest.skip("no CUDA device here", allow_module_level=True)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("momentum", [0.9, 0])
def test_eager_steps_give_the_same_weights(call, data, tmp_path, precision, momentum):
    flags = ["--data-dir", data, "--device", "cuda", "--epochs", 2, "--runs", 2]
    flags += ["--precision", precision, "--momentum", momentum, "--out"]
    assert call(*flags, "graph").stderr == ""
    assert call(*flags, "eager", "--eager").stderr == ""
    for seed in ("seed-1", "seed-2"):
        assert_same_run(tmp_path / "graph" / seed, tmp_path / "eager" / seed)


def test_a_step_that_cannot_be_captured_warns_and_gives_the_same_weights(
    call, data, tmp_path, monkeypatch
):
    flags = ["--data-dir", data, "--device", "cuda", "--epochs", 2, "--runs", 2]
    assert call(*flags, "--out", "eager", "--eager").returncode == 0
    forward = Net.forward
    # .item() waits for the device, which no graph can.
    monkeypatch.setattr(
        Net, "forward", lambda net, x: (x[0].sum().item(), forward(net, x))[1]
    )
    process = call(*flags, "--out", "none")
    assert process.stderr.count("warning: no CUDA graph") == 2
    for seed in ("seed-1", "seed-2"):
        assert_same_run(tmp_path / "eager" / seed, tmp_path / "none" / seed)


@pytest.mark.parametrize(("cycle_momentum", "warnings"), [(False, 0), (True, 1)])
def test_two_parameter_groups_and_a_momentum_that_changes_take_effect(
    call, data, tmp_path, monkeypatch, cycle_momentum, warnings
):
    def two_groups(args, seed, total_steps):
        torch.manual_seed(seed)
        model = make_model(args)
        weights = [x for x in model.parameters() if x.ndim > 1]
        others = [x for x in model.parameters() if x.ndim == 1]
        groups = [{"params": weights}, {"params": others, "weight_decay": 0}]
        optimizer = SGD(groups, 0.1, 0.9, weight_decay=0.01, fused=True)
        schedule = OneCycleLR(
            optimizer, [0.1, 0.01], total_steps, cycle_momentum=cycle_momentum
        )
        return model, optimizer, schedule

    monkeypatch.setattr("mnist_cnn.make_training", two_groups)
    flags = ["--data-dir", data, "--device", "cuda", "--epochs", 2]
    assert call(*flags, "--out", "eager", "--eager").stderr == ""
    errors = call(*flags, "--out", "graph").stderr
    assert errors.count("a parameter group has changed") == warnings
    assert_same_run(tmp_path / "graph" / "seed-1", tmp_path / "eager" / "seed-1")


@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_another_device(call, stopped, devices):
    folder = stopped("metrics.csv", "--epochs", 3, "--device", devices[0])
    assert call("--resume", folder.parent, "--device", devices[1]).returncode == 0
    losses = [row.split(",")[3] for row in metrics(folder)[1:]]
    assert sorted(losses, reverse=True) == losses


def test_seeds_side_by_side_equal_each_alone(train):
    flags = ["--device", "cuda:0", "--epochs", 2]
    many = train(*flags, "--runs", 12).parent
    for seed in (1, 5, 12):
        assert_same_run(many / f"seed-{seed}", train(*flags, "--seed", seed))


def test_a_killed_run_is_resumed_to_the_same_weights(data, tmp_path):
    flags = ["--data-dir", data, "--device", "cuda", "--epochs", 4, "--runs", 2]
    assert run(*flags, "--out", "whole", cwd=tmp_path).returncode == 0
    with start(*flags, "--out", "cut", until=ROW, cwd=tmp_path) as process:
        process.kill()
    assert run("--resume", "cut", cwd=tmp_path).returncode == 0
    for seed in ("seed-1", "seed-2"):
        assert_same_run(tmp_path / "whole" / seed, tmp_path / "cut" / seed)


def test_one_training_step_agrees_with_the_cpu():
    torch.manual_seed(0)
    inputs, labels = torch.randn(128, 1, 28, 28), torch.randint(10, (128,))
    stepped = []
    for device in ("cpu", "cuda"):
        flags = ["--dropout", "0", "--div-factor", "1", "--device", device]
        args = parse_arguments(flags)
        model, optimizer, _ = make_training(args, seed=1, total_steps=9)
        step = make_step(model, optimizer, args, torch.zeros(2, device=device))
        step(inputs.to(device), labels.to(device))
        stepped.append([p.detach().cpu() for p in model.parameters()])
    for cpu, cuda in zip(*stepped, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-4)
