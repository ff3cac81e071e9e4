"""Output files, resuming, statistics, evaluation: what a run leaves and what reads it."""

import csv
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    SCRIPT,
    assert_one_line,
    assert_same_run,
    assert_same_weights,
    metrics,
    result,
    start,
    tensors,
    write_idx,
)

import mnist_cnn

SEED_FILES = {"metrics.csv", "checkpoint.pt", "final.pt", "result.json", "report.png"}


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the finished run that a test may change."""
    shutil.copytree(trained[0], tmp_path / "copy")
    return tmp_path / "copy"


def unfinish(seed_folder, epochs):
    """Take a seed back to where it was after so many epochs, as a kill would."""
    kept = {"checkpoint.pt", "metrics.csv"} if epochs else set()
    for name in SEED_FILES - kept:
        (seed_folder / name).unlink()


# Output files


def test_a_run_leaves_its_files(trained):
    folder = trained[0]
    own = {"config.json", "result.json", "mnist_cnn.py"}
    assert names(folder) == own | {"seed-5", "seed-6", "seed-7"}
    assert (folder / "mnist_cnn.py").read_bytes() == SCRIPT.read_bytes()
    for seed in (5, 6, 7):
        assert names(folder / f"seed-{seed}") == SEED_FILES


def test_config_tells_arguments_flags_device_and_versions(trained):
    config = json.loads((trained[0] / "config.json").read_text())
    assert "--tta" in config["arguments"]
    assert config["flags"]["epochs"] == 2
    assert config["flags"]["lr"] == 0.015
    assert config["torch"] == torch.__version__
    assert config["device"].startswith("cpu")


def test_metrics_agree_with_the_result(trained):
    folder = trained[0] / "seed-6"
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    accuracies = [float(row["eval_accuracy"]) for row in rows]
    found = result(folder)
    assert found["accuracy"] == accuracies[-1]
    assert found["best"]["eval_accuracy"] == max(accuracies)
    assert found["best"]["epoch"] == accuracies.index(max(accuracies)) + 1
    assert found["seconds"] == float(rows[-1]["seconds"])
    for goal in (99.0, 99.4):
        first = [row for row in rows if float(row["eval_accuracy"]) >= goal][:1]
        epochs = [int(row["epoch"]) for row in first] or [None]
        assert found.get(f"epochs_to_{goal}") == epochs[0]


def test_saved_weights_have_the_accuracy_of_the_result(trained, datasets):
    model = mnist_cnn.Net()
    model.load_state_dict(tensors(trained[0] / "seed-5" / "final.pt"))
    images, labels = datasets[1]
    with torch.no_grad():
        output = model.eval()(mnist_cnn.normalise(images.unsqueeze(1)))
    accuracy = 100 * (output.argmax(dim=1) == labels).float().mean().item()
    found = result(trained[0] / "seed-5")
    assert found["accuracy"] == pytest.approx(accuracy)
    for digit in range(10):
        mask = labels == digit
        accuracy = 100 * (output[mask].argmax(dim=1) == digit).float().mean().item()
        assert found["accuracy_by_digit"][str(digit)] == pytest.approx(accuracy)


def test_runs_started_in_the_same_second_have_a_folder_each(data, tmp_path):
    flags = ["--data-dir", data, "--epochs", 1]
    both = [start(*flags, cwd=tmp_path) for _ in range(2)]
    for process in both:
        assert process.communicate(timeout=120)[1] == ""
    assert len(names(tmp_path / "runs")) == 2


def test_a_folder_that_exists_is_left_alone(call, data, tmp_path):
    (tmp_path / "mine").mkdir()
    process = call("--data-dir", data, "--out", "mine")
    assert_one_line(process, 1, "mine already exists", "--out", "--resume")
    assert names(tmp_path / "mine") == set()


def test_a_folder_that_cannot_be_made_is_named(call, data, tmp_path):
    (tmp_path / "file").touch()
    process = call("--data-dir", data, "--out", "file/run")
    assert_one_line(process, 1, os.path.join("file", "run"))


# Several seeds


def test_a_seed_of_several_runs_equals_that_seed_alone(trained, data, call, tmp_path):
    flags = ["--data-dir", data, "--device", "cpu", "--epochs", 2, "--batch-size", 64]
    call(*flags, "--seed", 6, "--out", "alone")
    assert_same_run(trained[0] / "seed-6", tmp_path / "alone" / "seed-6")
    assert "interval" not in result(tmp_path / "alone")["accuracy"]


@pytest.mark.parametrize("name", ["accuracy", "tta_accuracy"])
def test_the_result_has_mean_deviation_and_interval(trained, name):
    total = result(trained[0])[name]
    values = [result(trained[0] / f"seed-{seed}")[name] for seed in (5, 6, 7)]
    values = torch.tensor(values, dtype=torch.float64)
    assert total["mean"] == pytest.approx(values.mean().item())
    assert total["deviation"] == pytest.approx(values.std().item())
    half = 4.302652729749462 * values.std().item() / 3**0.5  # scipy: t.ppf(0.975, 2)
    assert total["interval"] == pytest.approx(half, rel=1e-5)


# scipy.stats: t.ppf(0.5 + confidence / 2, freedom)
@pytest.mark.parametrize(
    ("freedom", "confidence", "expected"),
    [
        (1, 0.95, 12.706204736174694),
        (4, 0.95, 2.7764451051977934),
        (5.5, 0.95, 2.501858617589239),
        (19, 0.95, 2.093024054408263),
        (99, 0.95, 1.9842169515086827),
        (9, 0.99, 3.2498355415921263),
    ],
)
def test_students_t_agrees_with_scipy(freedom, confidence, expected):
    found = mnist_cnn.student_t(freedom, confidence)
    assert found == pytest.approx(expected, rel=1e-4)


def test_torchrun_ranks_share_the_seeds_with_the_same_result(trained, data, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", str(SCRIPT), "--device", "cpu", "--tta"]
    torchrun += ["--runs", "3", "--seed", "5", "--epochs", "2", "--batch-size", "64"]
    process = subprocess.run(
        [*torchrun, "--data-dir", data, "--out", "shared"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("seed 7: ") == 1
    for seed in (5, 6, 7):
        folder = f"seed-{seed}"
        assert_same_run(trained[0] / folder, tmp_path / "shared" / folder)
    assert result(tmp_path / "shared")["accuracy"] == result(trained[0])["accuracy"]


def test_a_pytorch_without_distributed_trains(call, data, monkeypatch):
    monkeypatch.setattr(mnist_cnn, "distributed", None)
    assert call("--data-dir", data, "--dry-run").returncode == 0


# Resuming


@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
def test_runs_killed_at_random_moments_end_like_one_that_was_not(call, data, tmp_path):
    flags = ["--data-dir", data, "--device", "cpu", "--epochs", 10]
    call(*flags, "--out", "whole")
    moments = random.Random(0)
    folders = ["first", "second"]  # side by side, to save time
    commands = [[*flags, "--out", folder] for folder in folders]
    for _ in range(2):
        processes = [start(*command, cwd=tmp_path) for command in commands]
        for process in processes:
            while line := process.stdout.readline():
                if line.startswith("epoch"):  # from here on it trains and writes
                    break
            time.sleep(moments.uniform(0, 0.4))
            process.kill()
            process.communicate(timeout=60)
        commands = [["--resume", folder] for folder in folders]
    processes = [start(*command, cwd=tmp_path) for command in commands]
    for process, folder in zip(processes, folders, strict=True):
        assert process.communicate(timeout=120)[1] == ""
        assert_same_run(tmp_path / "whole" / "seed-1", tmp_path / folder / "seed-1")


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_the_printed_command_continues_a_stopped_run(data, tmp_path, call):
    flags = ["--data-dir", data, "--device", "cpu", "--epochs", 5, "--out"]
    with start(*flags, "stopped", cwd=tmp_path) as process:
        output = ""
        while not re.search(r"^ +1  ", output, re.MULTILINE):
            output += process.stdout.readline()
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    call(*flags, "whole")
    command = re.search(r"^python (.* --resume stopped)$", output, re.MULTILINE)[1]
    subprocess.run([sys.executable, *command.split()], cwd=tmp_path, check=True)
    assert_same_run(tmp_path / "whole" / "seed-1", tmp_path / "stopped" / "seed-1")


def test_resuming_trains_only_what_is_not_finished(trained, copy, call):
    (copy / "result.json").unlink()
    unfinish(copy / "seed-6", 2)
    shutil.rmtree(copy / "seed-7")
    before = (copy / "seed-5" / "final.pt").stat().st_mtime_ns
    assert call("--resume", "copy").returncode == 0
    assert (copy / "seed-5" / "final.pt").stat().st_mtime_ns == before
    for seed in ("seed-6", "seed-7"):
        assert_same_run(copy / seed, trained[0] / seed)
    assert result(copy)["accuracy"] == result(trained[0])["accuracy"]


@pytest.mark.parametrize(
    "flag", ["--epochs=3", "--lr=0.1", "--evaluate=x", "--holdout=9", "--out=x"]
)
def test_another_flag_beside_resume_is_refused_by_name(copy, call, flag):
    name = flag[2:].split("=")[0]
    assert_one_line(call("--resume", "copy", flag), 1, f"different {name}")


def test_resuming_with_another_script_is_refused(copy, call, monkeypatch):
    monkeypatch.setattr(mnist_cnn, "SOURCE", mnist_cnn.SOURCE + b"# changed")
    command = "python copy/mnist_cnn.py --resume copy --runs 4"
    process = call("--resume", "copy", "--runs", 4)
    assert_one_line(process, 1, "different script", command)


def test_resuming_on_other_data_is_refused(copy, call, datasets, tmp_path):
    (images, labels), test_set = datasets
    write_idx(tmp_path / "other", [(images.flip(0), labels.flip(0)), test_set])
    process = call("--resume", "copy", "--data-dir", "other")
    assert_one_line(process, 1, "different data", "copy")


@pytest.fixture
def set_threads():
    yield torch.set_num_threads
    torch.set_num_threads(1)


def test_a_resumed_run_has_the_number_of_threads_it_had(
    data, call, tmp_path, set_threads
):
    set_threads(2)
    call("--data-dir", data, "--device", "cpu", "--epochs", 2, "--out", "whole")
    set_threads(1)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    unfinish(tmp_path / "resumed" / "seed-1", 0)
    assert call("--resume", "resumed").returncode == 0
    assert torch.get_num_threads() == 2
    assert_same_weights(tmp_path / "whole" / "seed-1", tmp_path / "resumed" / "seed-1")


@pytest.mark.parametrize(
    "changed", [{"device": "cuda, NVIDIA Imaginary"}, {"torch": "2.0.0"}]
)
def test_resuming_elsewhere_says_that_it_is_not_identical(copy, call, changed):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changed))
    process = call("--resume", "copy")
    assert process.returncode == 0
    assert "not bit-identical" in process.stdout


def test_a_relative_data_folder_is_found_from_another_folder(
    call, run, datasets, tmp_path
):
    write_idx(tmp_path / "small", datasets)
    call("--data-dir", "small", "--epochs", 1, "--out", "run")
    unfinish(tmp_path / "run" / "seed-1", 0)
    (tmp_path / "elsewhere").mkdir()
    process = run("--resume", "../run", cwd=tmp_path / "elsewhere")
    assert process.returncode == 0, process.stderr


def test_two_processes_in_one_folder_both_finish(copy, trained):
    unfinish(copy / "seed-6", 0)
    both = [start("--resume", "copy", cwd=copy.parent) for _ in range(2)]
    for process in both:
        assert process.communicate(timeout=120)[1] == ""
    assert_same_run(copy / "seed-6", trained[0] / "seed-6")
    assert names(copy / "seed-6") == SEED_FILES


def test_no_file_is_left_unfinished(trained):
    assert not list(trained[0].rglob("*.new"))


# Files that are not what they should be


class Payload:
    """What a malicious pickle holds: loading it would make a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def bad_files(folder):
    """Write a file for each way to be no file of weights and no checkpoint."""
    executed, good = folder / "executed", folder / "good.pt"
    torch.save(mnist_cnn.Net().state_dict(), good)
    contents = {
        "empty.pt": b"",
        "truncated.pt": good.read_bytes()[:-2000],
        "foreign.pt": b"not tensors at all",
        "pickle.pt": pickle.dumps(Payload(executed), protocol=2),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    torch.save(Payload(executed), folder / "code.pt")
    torch.save({name: torch.zeros(3) for name in tensors(good)}, folder / "shapes.pt")
    torch.save(torch.zeros(3), folder / "one-tensor.pt")
    return [*contents, "code.pt", "shapes.pt", "one-tensor.pt"]


def test_bad_weights_are_refused_by_name_and_do_not_run(call, data, tmp_path):
    for name in [*bad_files(tmp_path), "missing.pt"]:
        process = call("--data-dir", data, "--evaluate", name)
        assert_one_line(process, 1, f"cannot use {name}")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "runs").exists()


def test_bad_checkpoints_are_refused_by_name_and_left_alone(call, copy, tmp_path):
    unfinish(copy / "seed-5", 2)
    checkpoint = copy / "seed-5" / "checkpoint.pt"
    for name in bad_files(tmp_path):
        content = (tmp_path / name).read_bytes()
        checkpoint.write_bytes(content)
        assert_one_line(call("--resume", "copy"), 1, os.path.join("seed-5", "check"))
        assert checkpoint.read_bytes() == content
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("history", [["x"], [(1, 2)], None, [(1, *"abcdef")]])
def test_a_damaged_history_is_refused(call, copy, history):
    unfinish(copy / "seed-5", 2)
    checkpoint = copy / "seed-5" / "checkpoint.pt"
    states, _ = tensors(checkpoint)
    torch.save((states, history), checkpoint)
    assert_one_line(call("--resume", "copy"), 1, "checkpoint.pt")


@pytest.mark.parametrize("content", ["{}", "[]", "", '{"accuracy": '])
def test_a_damaged_result_is_refused(call, copy, content):
    (copy / "seed-5" / "result.json").write_text(content)
    assert_one_line(call("--resume", "copy"), 1, os.path.join("seed-5", "result.json"))


@pytest.mark.parametrize("content", ["{}", "[]", '{"arguments": ', '{"arguments": 1}'])
def test_a_damaged_config_is_refused(call, copy, content):
    (copy / "config.json").write_text(content)
    assert_one_line(call("--resume", "copy"), 1, "config.json")


def test_a_folder_that_is_no_run_cannot_be_resumed(call):
    assert_one_line(call("--resume", "none"), 1, os.path.join("none", "config.json"))


# Disks that are full and pictures that cannot be drawn


def run_with_file_limit(run, limit, *flags):
    """Run the command where no file can grow beyond so many bytes."""
    limits = pytest.importorskip("resource", reason="limits files as POSIX does")
    limit = (limit, limit)
    return run(*flags, preexec_fn=lambda: limits.setrlimit(limits.RLIMIT_FSIZE, limit))


def test_a_full_disk_at_the_start_leaves_no_folder(run, data, tmp_path):
    flags = ["--data-dir", data, "--epochs", 1, "--out", "run"]
    assert_one_line(run_with_file_limit(run, 20_000, *flags), 1, "cannot make run")
    assert names(tmp_path) == set()


def test_a_full_disk_ends_a_run_with_one_line_and_a_good_checkpoint(
    run, call, data, tmp_path
):
    flags = ["--data-dir", data, "--device", "cpu", "--epochs", 3, "--out"]
    call(*flags, "whole")
    checkpoint = tmp_path / "whole" / "seed-1" / "checkpoint.pt"
    limit = checkpoint.stat().st_size - 100  # it grows by a row an epoch
    process = run_with_file_limit(run, limit, *flags, "full")
    assert_one_line(process, 1, "cannot write full")
    assert not list((tmp_path / "full").rglob("*.new"))
    assert call("--resume", "full").returncode == 0
    assert_same_run(tmp_path / "whole" / "seed-1", tmp_path / "full" / "seed-1")


def test_a_failed_write_at_the_end_does_not_hide_the_result(call, copy):
    unfinish(copy / "seed-5", 2)
    (copy / "seed-5" / "final.pt").mkdir()  # nothing can take this name now
    process = call("--resume", "copy")
    assert_one_line(process, 1, os.path.join("seed-5", "final.pt"))
    assert re.search(r"Test accuracy \d+\.\d\d %", process.stdout)


def test_a_picture_that_cannot_be_drawn_is_a_warning(run, data, tmp_path):
    flags = ["--data-dir", data, "--epochs", 1, "--runs", 2, "--out", "run"]
    process = run(*flags, env={"MPLBACKEND": "junk"})
    assert process.returncode == 0
    assert process.stderr.count("warning") == process.stderr.count("\n") == 2
    assert names(tmp_path / "run" / "seed-2") == SEED_FILES - {"report.png"}


# Evaluating


def test_evaluating_gives_the_accuracy_of_the_run(trained, data, call, tmp_path):
    weights = trained[0] / "seed-5" / "final.pt"
    process = call("--data-dir", data, "--evaluate", weights, "--tta", "--out", "test")
    assert process.returncode == 0, process.stderr
    found, expected = result(tmp_path / "test"), result(trained[0] / "seed-5")
    for name in ("accuracy", "tta_accuracy", "accuracy_by_digit"):
        assert found[name] == expected[name]
    assert found["loss"] == pytest.approx(expected["loss"])
    assert "epoch" not in process.stdout
    assert (tmp_path / "test" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_evaluating_leaves_nothing_unless_asked(trained, data, call, tmp_path):
    weights = trained[0] / "seed-5" / "final.pt"
    assert call("--data-dir", data, "--evaluate", weights).returncode == 0
    assert names(tmp_path) == set()


def test_weights_that_are_not_numbers_are_refused(trained, data, call, tmp_path):
    weights = tensors(trained[0] / "seed-5" / "final.pt")
    weights["conv1.weight"][0] = float("nan")
    torch.save(weights, tmp_path / "nan.pt")
    flags = ["--data-dir", data, "--evaluate", "nan.pt", "--out", "test"]
    assert_one_line(call(*flags), 1, "nan.pt", "not finite")
    assert not (tmp_path / "test").exists()


def test_a_digit_that_is_absent_is_absent_from_the_table(
    trained, datasets, call, tmp_path
):
    images, labels = datasets[1]
    kept = labels != 3
    write_idx(tmp_path / "small", [datasets[0], (images[kept], labels[kept])])
    weights = trained[0] / "seed-5" / "final.pt"
    process = call("--data-dir", "small", "--evaluate", weights)
    digits = process.stdout.splitlines()[-2].split()[1:]
    assert digits == ["0", "1", "2", "4", "5", "6", "7", "8", "9"]


def test_metrics_have_no_row_of_another_run(trained):
    assert metrics(trained[0] / "seed-5") != metrics(trained[0] / "seed-6")
