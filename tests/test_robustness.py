"""The table of accuracies on changed test images."""

import pytest
import torch
from robustness import CHANGES, accuracies, cell, changed, main

import mnist_cnn


def test_an_unchanged_image_is_unchanged(small_splits):
    images = small_splits[1][0]
    assert torch.equal(changed(images, 0, 0, 0), images)


def test_a_move_goes_right_and_down(small_splits):
    images = small_splits[1][0]
    moved = changed(images, 0, 2, 1)
    assert torch.equal(moved[:, 1:, 2:], images[:, :-1, :-2])
    assert moved[:, 0].sum() + moved[:, :, :2].sum() == 0


def test_both_ways_of_a_change_are_in_it():
    for moves in CHANGES.values():
        assert torch.tensor(moves).sum(dim=0).tolist() == [0, 0, 0]


def test_accuracy_is_the_mean_over_the_variants_for_each_model(
    flags, small_splits, tmp_path
):
    images, labels = small_splits[1]
    variants, expected = [images, changed(images, 40, 0, 0)], []
    for seed in (1, 2):
        folder = tmp_path / f"seed-{seed}"
        folder.mkdir()
        args = flags("--epochs", 2, "--seed", seed)
        mnist_cnn.run_seed(args, small_splits, [], folder)
        model = mnist_cnn.fit(args, *small_splits, [])
        outputs = [mnist_cnn.predict(model, variant, 200) for variant in variants]
        expected.append(sum(mnist_cnn.score(out, labels)[1] for out in outputs) / 2)
    assert accuracies(tmp_path, variants, labels) == pytest.approx(expected, abs=0.5)


def test_a_folder_without_models_and_a_damaged_model_end_in_one_line(
    monkeypatch, capsys, small_data, tmp_path
):
    folder = tmp_path / "run"
    monkeypatch.setattr(
        "sys.argv", ["robustness.py", str(folder), "--data-dir", str(small_data)]
    )
    with pytest.raises(SystemExit, match="1"):
        main()
    missing = capsys.readouterr().err
    folder.mkdir()
    (folder / "final.pt").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match="1"):
        main()
    damaged = capsys.readouterr().err
    assert "no final.pt" in missing
    assert "final.pt" in damaged
    assert missing.count("\n") == damaged.count("\n") == 1


def test_a_cell_gives_mean_and_interval_of_several_models_only():
    assert cell([99.5]) == "99.50"
    # scipy.stats.t.interval(0.95, 4, 99.288, scipy.stats.sem(values))
    assert cell([99.30, 99.14, 99.32, 99.41, 99.27]) == "99.29 ± 0.12"
