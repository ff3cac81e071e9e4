"""On an NVIDIA GPU: the same seed, the same weights; resumed too; the CPU's step."""

import pytest
import torch
from conftest import assert_same_run, rows, run, start

from mnist_cnn import Net, make_model

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_the_same_command_gives_the_same_weights(call, data, tmp_path, device):
    flags = ["--data-dir", data, "--device", device, "--epochs", 2, "--out"]
    for folder in ("first", "second"):
        assert call(*flags, folder).returncode == 0
    assert_same_run(tmp_path / "first" / "seed-1", tmp_path / "second" / "seed-1")


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("momentum", [0.9, 0])
def test_a_step_without_a_cuda_graph_gives_the_same_weights(
    call, data, tmp_path, monkeypatch, precision, momentum
):
    flags = ["--data-dir", data, "--device", "cuda", "--epochs", 2]
    flags += ["--precision", precision, "--momentum", momentum, "--runs", 2, "--out"]
    assert call(*flags, "graph").returncode == 0
    forward = Net.forward
    # .item() waits for the device, which no graph can.
    monkeypatch.setattr(
        Net, "forward", lambda net, x: (x[0].sum().item(), forward(net, x))[1]
    )
    process = call(*flags, "none")
    assert "warning: no CUDA graph" in process.stderr
    for seed in ("seed-1", "seed-2"):
        assert_same_run(tmp_path / "graph" / seed, tmp_path / "none" / seed)


def test_seeds_side_by_side_equal_each_alone(call, data, tmp_path):
    flags = ["--data-dir", data, "--device", "cuda", "--epochs", 2, "--out"]
    assert call(*flags, "many", "--runs", 12).returncode == 0
    for seed in (1, 5, 12):
        assert call(*flags, f"seed {seed}", "--seed", seed).returncode == 0
        name = f"seed-{seed}"
        assert_same_run(tmp_path / "many" / name, tmp_path / f"seed {seed}" / name)


def test_a_killed_run_is_resumed_to_the_same_weights(data, tmp_path):
    flags = ["--data-dir", data, "--device", "cuda", "--epochs", 4]
    flags += ["--runs", 2, "--out"]
    assert run(*flags, "whole", cwd=tmp_path).returncode == 0
    with start(*flags, "cut", cwd=tmp_path) as process:
        next(line for line in process.stdout if rows(line))
        process.kill()
    assert run("--resume", "cut", cwd=tmp_path).returncode == 0
    for seed in ("seed-1", "seed-2"):
        assert_same_run(tmp_path / "whole" / seed, tmp_path / "cut" / seed)


def test_one_training_step_agrees_with_the_cpu():
    torch.manual_seed(0)
    inputs, labels = torch.randn(128, 1, 28, 28), torch.randint(10, (128,))
    start = make_model(1, 0, "cpu", "fp32").state_dict()
    stepped = []
    for device in ("cpu", "cuda"):
        model = make_model(1, 0, device, "fp32")
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.015, 0.9, weight_decay=1e-4)
        output = model(inputs.to(device))
        torch.nn.functional.nll_loss(output, labels.to(device)).backward()
        optimizer.step()
        stepped.append([p.detach().cpu() for p in model.parameters()])
    for cpu, cuda in zip(*stepped, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-4)
