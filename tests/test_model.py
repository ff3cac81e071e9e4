"""The network: its size, its layers, and dropout that is faster but no different."""

import pytest
import torch
import torchsummary

from mnist_cnn import Dropout, Net, make_model

SUMMARY = """
Conv2d-1 100, BatchNorm2d-2 20, Dropout-3 0, Conv2d-4 1,456, BatchNorm2d-5 32, Dropout-6 0,
MaxPool2d-7 0, Conv2d-8 170, Conv2d-9 1,456, BatchNorm2d-10 32, Dropout-11 0,
Conv2d-12 2,320, BatchNorm2d-13 32, Dropout-14 0, MaxPool2d-15 0, Conv2d-16 170,
Conv2d-17 1,456, BatchNorm2d-18 32, Dropout-19 0, Conv2d-20 2,320, BatchNorm2d-21 32,
Dropout-22 0, Conv2d-23 170, AdaptiveAvgPool2d-24 0
"""


def test_has_9798_parameters_fewer_than_ten_thousand():
    count = sum(p.numel() for p in Net().parameters() if p.requires_grad)
    assert count == 9798


def test_summary_prints_the_24_layers_and_their_sizes(capsys):
    torchsummary.summary(Net(), (1, 28, 28), device="cpu")
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if "[-1," in line]
    expected = [row.split() for row in SUMMARY.replace("\n", " ").split(", ")]
    assert [[row[0], row[-1]] for row in rows] == expected
    text = "\n".join(lines)
    assert "Total params: 9,798\nTrainable params: 9,798\n" in text
    assert "Forward/backward pass size (MB): 0.70" in text
    assert "Params size (MB): 0.04" in text
    assert "Estimated Total Size (MB): 0.74" in text


def test_returns_log_probabilities_of_ten_digits():
    output = Net().eval()(torch.randn(3, 1, 28, 28))
    assert output.shape == (3, 10)
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(3))


def test_memory_format_changes_no_result_and_no_gradient():
    torch.manual_seed(0)
    plain = Net(dropout=0).double()  # float32 sums round differently in another order
    fast = make_model(1, 0, "cpu", "fp32").double()
    fast.load_state_dict(plain.state_dict())
    pixels = torch.randn(16, 1, 28, 28).double()
    for model in (plain, fast):
        model(pixels)[:, 3].sum().backward()
    torch.testing.assert_close(fast(pixels), plain(pixels))
    for mine, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
def test_dropout_drops_a_fraction_p_and_scales_the_others(p):
    torch.manual_seed(0)
    output = Dropout(p)(torch.ones(4_000_000))  # standard error at most 0.00025
    assert (output == 0).float().mean().item() == pytest.approx(p, abs=1e-3)
    torch.testing.assert_close(output.unique(), torch.tensor([0, 1 / (1 - p)]))


def test_dropout_drops_neighbours_independently():
    torch.manual_seed(0)
    dropped = Dropout(0.05)(torch.ones(4_000_000)) == 0
    for distance in (1, 2, 16, 784):
        both = (dropped[distance:] & dropped[:-distance]).float().mean().item()
        assert both == pytest.approx(0.05**2, abs=1e-4)  # 4 standard errors


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last]
)
def test_dropout_stops_the_gradient_where_it_dropped(memory_format):
    x = torch.ones(4, 10, 6, 6).to(memory_format=memory_format).requires_grad_()
    output = Dropout(0.3)(x)
    output.backward(torch.full((4, 10, 6, 6), 2.0))  # arrives channels first
    torch.testing.assert_close(x.grad, 2 * output.detach())


def test_dropout_does_nothing_when_testing():
    x = torch.randn(100)
    assert torch.equal(Dropout(0.5).eval()(x), x)
