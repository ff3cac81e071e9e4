"""The table of accuracies on changed test images."""

import statistics
import sys

import pytest
import torch
from conftest import SCRIPT, result
from robustness import CHANGES, changed, main


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
    assert lines[2].startswith(f"| as they are | {statistics.mean(values):.2f} ± ")


def test_a_folder_without_models_ends_in_one_line(data, monkeypatch, capsys):
    command = ["robustness.py", str(SCRIPT.parent / "tests"), "--data-dir", str(data)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="1"):
        main()
    assert capsys.readouterr().err.count("\n") == 1
