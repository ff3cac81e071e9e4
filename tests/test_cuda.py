"""On an NVIDIA GPU: the same seed, the same weights; the same step as the CPU's."""

import pytest
import torch

from mnist_cnn import fit, make_model, parse_arguments

pytestmark = pytest.mark.cuda


def test_the_same_seed_gives_the_same_weights(small_splits):
    splits = [[part.cuda() for part in split] for split in small_splits]
    args = parse_arguments(["--device", "cuda", "--epochs", "2"])
    first, second = (fit(args, *splits, []).state_dict() for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_one_training_step_agrees_with_the_cpu():
    torch.manual_seed(0)
    pixels, labels = torch.randn(128, 1, 28, 28), torch.randint(10, (128,))
    start = make_model(0, "cpu").state_dict()
    stepped = []
    for device in ("cpu", "cuda"):
        model = make_model(0, device)
        model.load_state_dict(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.015, 0.9, weight_decay=1e-4)
        output = model(pixels.to(device))
        torch.nn.functional.nll_loss(output, labels.to(device)).backward()
        optimizer.step()
        stepped.append([p.detach().cpu() for p in model.parameters()])
    for cpu, cuda in zip(*stepped, strict=True):
        torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-4)
