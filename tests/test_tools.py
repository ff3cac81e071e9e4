"""The two tools: robustness.py and benchmark.py, whose speed is for no test to judge."""

import itertools
import statistics
import sys
from argparse import Namespace

import pytest
from benchmark import VARIANTS
from conftest import result
from robustness import CHANGES, main


def test_the_first_row_is_the_result_of_the_run(trained, data, monkeypatch, capsys):
    command = ["robustness.py", str(trained[0]), "--data-dir", str(data)]
    monkeypatch.setattr(sys, "argv", command)
    main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(CHANGES)
    values = [result(seed)["eval_accuracy"] for seed in trained[0].glob("seed-*")]
    assert lines[2].startswith(f"| as they are | {statistics.mean(values):.2f} ± ")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_for_more_steps_than_an_epoch_has(variant, data):
    make, option = VARIANTS[variant]
    training = make(Namespace(device="cpu", data_dir=data), option)
    assert len(list(itertools.islice(training, 7))) == 7  # an epoch has 5
