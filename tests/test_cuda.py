"""On an NVIDIA GPU: the same seed, the same weights; resumed too; the CPU's step."""

import pytest
import torch
from conftest import assert_same_run

from mnist_cnn import make_model

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_the_same_command_gives_the_same_weights(call, data, tmp_path, device):
    flags = ["--data-dir", data, "--device", device, "--epochs", 2, "--out"]
    for folder in ("first", "second"):
        assert call(*flags, folder).returncode == 0
    assert_same_run(tmp_path / "first" / "seed-1", tmp_path / "second" / "seed-1")


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
