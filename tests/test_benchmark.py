"""The benchmark's variants train; how fast is for the benchmark to say, not for a test."""

from argparse import Namespace

import pytest
from benchmark import VARIANTS


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_for_more_steps_than_an_epoch_has(variant, data):
    run = VARIANTS[variant](Namespace(device="cpu", data_dir=data))
    run(6)  # an epoch of the small data has 5
    run(1)
