"""The table of accuracies on changed test images."""

import sys

import pytest
import torch
from conftest import SCRIPT, result
from robustness import CHANGES, cell, changed, main


def test_an_unchanged_image_is_unchanged(datasets):
    images = datasets[1][0]
    assert torch.equal(changed(images, 0, 0, 0), images)


def test_a_shift_goes_right_and_down(datasets):
    images = datasets[1][0]
    shifted = changed(images, 0, 2, 1)
    assert torch.equal(shifted[:, 1:, 2:], images[:, :-1, :-2])
    assert shifted[:, 0].sum() + shifted[:, :, :2].sum() == 0


def test_the_first_row_is_the_result_of_the_run(trained, data, monkeypatch, capsys):
    command = ["robustness.py", str(trained[0]), "--data-dir", str(data)]
    monkeypatch.setattr(sys, "argv", command)
    main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(CHANGES)
    values = [result(seed)["eval_accuracy"] for seed in trained[0].glob("seed-*")]
    assert lines[2] == f"| as they are | {cell(values)} |"


def test_a_folder_without_models_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["robustness.py", str(SCRIPT.parent / "tests")])
    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err.count("\n") == 1


def test_a_cell_gives_mean_and_interval_of_several_models_only():
    assert cell([99.5]) == "99.50"
    # scipy.stats.t.interval(0.95, 4, 99.288, scipy.stats.sem(values))
    assert cell([99.30, 99.14, 99.32, 99.41, 99.27]) == "99.29 ± 0.12"
