"""The network: its size, its layers, and dropout that is faster but no different."""

import pytest
import torch

from mnist_cnn import Dropout

SUMMARY = """
Conv2d-1 100, BatchNorm2d-2 20, Dropout-3 0, Conv2d-4 1,456, BatchNorm2d-5 32, Dropout-6 0,
MaxPool2d-7 0, Conv2d-8 170, Conv2d-9 1,456, BatchNorm2d-10 32, Dropout-11 0,
Conv2d-12 2,320, BatchNorm2d-13 32, Dropout-14 0, MaxPool2d-15 0, Conv2d-16 170,
Conv2d-17 1,456, BatchNorm2d-18 32, Dropout-19 0, Conv2d-20 2,320, BatchNorm2d-21 32,
Dropout-22 0, Conv2d-23 170, AdaptiveAvgPool2d-24 0
"""


def test_a_run_prints_the_24_layers_and_9798_parameters_fewer_than_ten_thousand(
    trained,
):
    output = trained[1]
    rows = [line.split() for line in output.splitlines() if "[-1," in line]
    expected = [row.split() for row in SUMMARY.replace("\n", " ").split(", ")]
    assert [[row[0], row[-1]] for row in rows] == expected
    assert "Total params: 9,798\nTrainable params: 9,798\n" in output
    assert "Forward/backward pass size (MB): 0.70" in output
    assert "Params size (MB): 0.04" in output
    assert "Estimated Total Size (MB): 0.74" in output


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
def test_dropout_drops_a_fraction_p_independently_and_scales_the_others(p):
    torch.manual_seed(0)
    output = Dropout(p)(torch.ones(4_000_000))
    torch.testing.assert_close(output.unique(), torch.tensor([0, 1 / (1 - p)]))
    dropped = output == 0
    assert dropped.float().mean().item() == pytest.approx(p, abs=1e-3)
    for distance in (1, 2, 16, 784):
        both = (dropped[distance:] & dropped[:-distance]).float().mean().item()
        assert both == pytest.approx(p**2, abs=2e-3 * p)  # 4 standard errors


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last]
)
def test_dropout_stops_the_gradient_where_it_dropped(memory_format):
    x = torch.ones(4, 10, 6, 6).to(memory_format=memory_format).requires_grad_()
    output = Dropout(0.3)(x)
    output.backward(torch.full((4, 10, 6, 6), 2.0))  # arrives channels first
    torch.testing.assert_close(x.grad, 2 * output.detach())
