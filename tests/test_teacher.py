"""Distillation: wider networks, what a student learns from them, and what is refused."""

import functools
import json
import math
import os
import shutil
import sys
import zlib

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    assert_one_line,
    assert_same_run,
    assert_same_weights,
    result,
    tensors,
    write_idx,
)

import mnist_cnn


@pytest.fixture(scope="session")
def wide(data, tmp_path_factory):
    """The weights of a network twice as wide, trained on all but 100 images."""
    folder = tmp_path_factory.mktemp("wide")
    flags = ["--data-dir", data, "--device", "cpu", "--width", 2, "--holdout", 100]
    flags += ["--epochs", 2, "--batch-size", 64, "--lr", 0.1, "--out", folder / "wide"]
    mnist_cnn.main([str(flag) for flag in flags])
    return folder / "wide" / "seed-1" / "final.pt"


@pytest.fixture
def train(train):
    return functools.partial(train, "--epochs", 1)


# Width


def test_width_multiplies_the_hidden_channels():
    assert sum(p.numel() for p in mnist_cnn.Net(width=2).parameters()) == 38_082
    assert sum(p.numel() for p in mnist_cnn.Net(width=4).parameters()) == 150_138


def test_width_1_changes_nothing(train):
    assert_same_run(train("--width", 1), train())


def test_evaluating_takes_the_width_of_the_weights(call, data, wide):
    process = call("--data-dir", data, "--evaluate", wide, "--holdout", 100)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("38,082 parameters")
    assert f"Validation accuracy {result(wide.parent)['accuracy']:.2f} %" in (
        process.stdout
    )


# What the student learns


def test_the_soft_labels_are_the_mean_probability_of_the_teachers():
    """Two classes, where all can be computed by hand."""
    student, first, second = ([0.5, 0.5], [0.9, 0.1], [0.5, 0.5])
    output = torch.tensor([student]).log()
    teacher_outputs = torch.tensor([[first], [second]]).log()
    loss = mnist_cnn.distillation_loss(output, teacher_outputs, 1)
    mean = torch.tensor([0.7, 0.3])
    torch.testing.assert_close(loss, (mean * (mean / 0.5).log()).sum())


@pytest.mark.parametrize("temperature", [1, 2, 5])
def test_the_loss_agrees_with_kl_div_of_logits(temperature):
    torch.manual_seed(0)
    logits = torch.randn(2, 8, 10)
    outputs = logits.log_softmax(dim=2)
    loss = mnist_cnn.distillation_loss(outputs[0], outputs[1:], temperature)
    student, teacher = (logits / temperature).log_softmax(dim=2)
    soft = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    torch.testing.assert_close(loss, temperature**2 * soft)


def test_a_teacher_changes_what_is_learnt_and_two_of_it_are_as_one(train, wide):
    once, twice = train("--teacher", wide), train("--teacher", wide, wide)
    assert_same_weights(once, twice)
    assert result(once)["loss"] != result(train())["loss"]


def test_a_student_does_not_need_the_labels(train, wide, datasets, tmp_path):
    (images, labels), test_set = datasets
    write_idx(tmp_path / "wrong", [(images, (labels + 1) % 10), test_set])
    wrong = train("--teacher", wide, "--data-dir", tmp_path / "wrong")
    assert_same_weights(wrong, train("--teacher", wide))


def test_the_temperature_reaches_the_loss(train, wide):
    first, second = (
        train("--teacher", wide),
        train("--teacher", wide, "--temperature=3"),
    )
    assert result(first)["loss"] != result(second)["loss"]


def test_a_teacher_does_not_learn(train, wide, monkeypatch):
    """Neither its weights nor its BatchNorm statistics."""
    loaded = []

    def load_model(*arguments):
        loaded.append(original(*arguments))
        return loaded[0]

    original = mnist_cnn.load_model
    monkeypatch.setattr(mnist_cnn, "load_model", load_model)
    train("--teacher", wide, "--dropout", 0.5, "--precise-bn")
    for name, tensor in tensors(wide).items():
        assert torch.equal(tensor, loaded[0].state_dict()[name]), name
    assert all(weight.grad is None for weight in loaded[0].parameters())


def test_a_teacher_computes_in_the_precision_of_the_run(train, wide):
    fp32, bf16 = (
        train("--teacher", wide, "--precision", name) for name in ("fp32", "bf16")
    )
    assert result(fp32)["loss"] == pytest.approx(result(bf16)["loss"], rel=0.1)


# Resuming


@pytest.fixture
def taught(train, wide):
    """The folder of a taught run whose only seed is to be trained again."""
    folder = train("--teacher", wide).parent
    shutil.copytree(folder, folder.parent / "whole")
    shutil.rmtree(folder / "seed-1")
    return folder


def test_a_resumed_student_learns_from_the_same_teacher(taught, call):
    process = call("--resume", taught)
    assert process.returncode == 0, process.stderr
    assert_same_run(taught / "seed-1", taught.parent / "whole" / "seed-1")


def test_a_relative_teacher_is_found_from_another_folder(
    call, data, wide, tmp_path, monkeypatch
):
    teacher = os.path.relpath(wide, tmp_path)
    call("--data-dir", data, "--epochs", 1, "--teacher", teacher, "--out", "run")
    shutil.rmtree(tmp_path / "run" / "seed-1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    mnist_cnn.main(["--resume", "../run"])
    assert (tmp_path / "run" / "seed-1" / "final.pt").exists()


def test_the_configuration_names_the_teacher_with_a_checksum(taught, wide):
    config = json.loads((taught / "config.json").read_text())
    assert str(wide) in config["arguments"]
    assert config["flags"]["teacher"] == [zlib.crc32(wide.read_bytes())]


def test_resuming_with_another_teacher_is_refused(taught, call, tmp_path):
    torch.save(mnist_cnn.Net(width=2).state_dict(), tmp_path / "other.pt")
    process = call("--resume", taught, "--teacher", "other.pt")
    assert_one_line(process, 1, taught, "different teacher")


def test_a_teacher_that_was_moved_can_be_given_again(taught, call, tmp_path, wide):
    shutil.copy(wide, tmp_path / "moved.pt")
    assert call("--resume", taught, "--teacher", "moved.pt").returncode == 0


# What is refused


def test_a_wrong_or_missing_teacher_ends_with_one_line(call, data, tmp_path):
    (tmp_path / "foreign.pt").write_bytes(b"not weights")
    torch.save({"conv1.bias": torch.zeros(20)}, tmp_path / "incomplete.pt")
    weights = mnist_cnn.Net(width=2).state_dict()
    weights["conv3.weight"][0, 0, 0, 0] = math.nan
    torch.save(weights, tmp_path / "damaged.pt")
    for name in ("missing.pt", "foreign.pt", "incomplete.pt", "damaged.pt"):
        process = call("--data-dir", data, "--teacher", name)
        assert_one_line(process, 1, f"cannot use {name}")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("holdout", [50, 150])
def test_a_teacher_that_may_know_the_validation_images_is_refused(
    call, data, wide, tmp_path, holdout
):
    flags = ["--data-dir", data, "--teacher", wide, "--holdout", holdout]
    assert_one_line(call(*flags, "--out", "run"), 1, wide, "validation", "--holdout")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="makes a symbolic link")
def test_a_teacher_is_refused_wherever_it_is_named_from(call, data, wide, tmp_path):
    (tmp_path / "link.pt").symlink_to(wide)
    names = ["link.pt", os.path.relpath(wide, tmp_path)]
    for name in names:
        process = call("--data-dir", data, "--teacher", name, "--holdout", 50)
        assert_one_line(process, 1, name, "validation")


def test_a_teacher_trained_on_the_same_images_is_accepted(train, wide):
    assert train("--teacher", wide, "--holdout", 100)


def test_a_teacher_without_its_configuration_is_used_with_a_warning(
    call, data, wide, tmp_path
):
    shutil.copy(wide, tmp_path / "alone.pt")
    flags = ["--data-dir", data, "--teacher", "alone.pt", "--epochs", 1, "--out"]
    assert call(*flags, "first").stderr == ""
    for content in (None, '{"name": "another project"}'):
        if content:
            (tmp_path.parent / "config.json").write_text(content)
        process = call(*flags, f"with-{content is None}", "--holdout", 100)
        assert process.returncode == 0
        assert process.stderr.startswith("mnist_cnn.py: warning: alone.pt")
