"""The command line: what it prints, and one line for each kind of bad input."""

import contextlib
import gzip
import os
import re
import shutil
import signal
import struct
import sys

import pytest
import torch
from conftest import ARCHIVES, ROW, assert_one_line, result, rows, start, write_idx


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    return tmp_path / "home"


# What it prints


def test_a_run_prints_header_folder_rows_and_result(run, data):
    process = run("--data-dir", data, "--epochs", 2, "--device", "cpu", "--out", "run")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    lines = process.stdout.splitlines()
    assert re.match(r"9,798 parameters on cpu, \d+ threads, torch \S+", lines[0])
    assert "AdaptiveAvgPool2d-24" in process.stdout
    assert process.stdout.index("--resume run") < process.stdout.index("epoch")
    assert [row[1] for row in rows(process.stdout)] == ["1", "2"]
    assert re.fullmatch(r"Test accuracy \d+\.\d\d %", lines[-4])
    best = r"Best \d+\.\d\d % in epoch [12], chosen on the test set"
    assert re.fullmatch(best, lines[-3])
    assert lines[-2].split() == ["digit", *map(str, range(10))]
    assert len(lines[-1].split()) == 11
    assert max(map(len, lines[:-3])) <= 80 or "--resume" in process.stdout


def test_several_seeds_end_with_mean_and_interval(trained):
    folder, output = trained
    for seed in (5, 6, 7):
        assert re.search(rf"^seed {seed}: \d+\.\d\d % in \d+ s$", output, re.MULTILINE)
    total = result(folder)["accuracy"]
    text = f"Test accuracy {total['mean']:.2f} ± {total['interval']:.2f} % "
    text += "(mean and 95 % confidence interval, n = 3)"
    assert output.splitlines()[-1] == text


def test_a_run_without_torchsummary_works(call, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsummary", None)
    process = call("--data-dir", data, "--dry-run")
    assert process.returncode == 0
    assert "Conv2d" not in process.stdout


def test_torchsummary_leaves_no_trace_in_the_weights(call, data, tmp_path, monkeypatch):
    flags = ["--data-dir", data, "--epochs", 1, "--out"]
    call(*flags, "with")
    monkeypatch.setitem(sys.modules, "torchsummary", None)
    call(*flags, "without")
    first, second = ((tmp_path / name / "seed-1") for name in ("with", "without"))
    assert result(first)["loss"] == result(second)["loss"]


def test_a_dry_run_takes_one_batch_and_leaves_no_files(call, data, tmp_path):
    process = call("--data-dir", data, "--dry-run", "--epochs", 7)
    assert process.returncode == 0
    assert len(rows(process.stdout)) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_synthetic_run_needs_no_download_and_says_it_means_nothing(call, no_network):
    process = call("--synthetic", "--dry-run")
    assert process.returncode == 0
    assert "says nothing about MNIST" in process.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_shows_a_bar_with_loss_and_accuracy(data, tmp_path):
    import fcntl
    import termios

    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    flags = ["--data-dir", data, "--epochs", 1, "--batch-size", 2]
    with start(*flags, cwd=tmp_path, stdout=terminal, stderr=terminal):
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # Linux's word for the end
            while more := os.read(controller, 100_000):
                shown += more
    assert b"/300" in shown
    assert re.search(rb"accuracy=\d.*loss=\d|loss=\d.*accuracy=\d", shown)


def test_an_ascii_terminal_gets_the_whole_result(run, data, tmp_path):
    flags = ["--data-dir", data, "--epochs", 1, "--runs", 2, "--out", "run"]
    process = run(*flags, env={"PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0, process.stderr
    assert "confidence interval" in process.stdout
    assert result(tmp_path / "run")["seeds"].keys() == {"1", "2"}


# Help


def test_help_gives_the_defaults_of_the_reference(call):
    text = " ".join(call("--help").stdout.split())
    for flag, default in {
        "--recipe": "reference",
        "--epochs": 19,
        "--batch-size": 128,
        "--lr": 0.015,
        "--momentum": 0.9,
        "--weight-decay": 0.0001,
        "--dropout": 0.05,
        "--rotation": 7.0,
        "--shift": 0.0,
        "--pct-start": 0.2,
        "--div-factor": 10.0,
        "--final-div-factor": 100.0,
        "--precise-bn": False,
        "--seed": 1,
        "--runs": 1,
        "--holdout": 0,
        "--test-batch-size": 1000,
        "--device": "auto",
        "--precision": "fp32",
        "--data-dir": "data",
    }.items():
        assert re.search(rf"{flag}\b[^()]*\(default: {default}\)", text), flag
    assert "None" not in text


BETTER = {"weight_decay": 5e-4, "dropout": 0, "precise_bn": True}
BEST = BETTER | {"lr": 0.2, "rotation": 10, "shift": 1.5}
QUICK = BETTER | {"epochs": 6, "batch_size": 64, "lr": 0.15}
QUICK |= {"rotation": 5, "shift": 0.5}


@pytest.mark.parametrize(("recipe", "changes"), [("best", BEST), ("quick", QUICK)])
def test_help_gives_the_defaults_of_a_recipe(call, recipe, changes):
    text = call("--recipe", recipe, "--help").stdout
    text = " ".join(text[text.index("options:") :].split())
    for name, default in changes.items():
        flag = f"--{name.replace('_', '-')}"
        found = re.search(rf"{flag}\b[^()]*\(default: ([^)]*)\)", text)[1]
        assert eval(found) == default, flag


def test_an_explicit_flag_overrides_the_recipe(call, data):
    flags = ["--data-dir", data, "--dry-run", "--div-factor", 1, "--pct-start", 0]
    for order in (["--recipe", "best", "--lr", 0.5], ["--lr", 0.5, "--recipe", "best"]):
        # The only step is the last: a hundredth of the maximum.
        assert rows(call(*flags, *order).stdout)[0][2] == "0.005000"


# Bad input


@pytest.mark.parametrize(
    ("flag", "values", "valid"),
    [
        ("--epochs", "0 -1 10000", "[1, 10000)"),
        ("--batch-size", "0 -128 100000", "[1, 100000)"),
        ("--test-batch-size", "0", "[1, 100000)"),
        ("--lr", "-0.1 nan inf", "[0, inf)"),
        ("--momentum", "1.0 -0.1 nan", "[0, 1)"),
        ("--weight-decay", "-1e-09 inf nan", "[0, inf)"),
        ("--dropout", "1.0 -0.1 nan", "[0, 1)"),
        ("--rotation", "-1.0 nan 360.0", "[0, 360)"),
        ("--shift", "-0.1 nan 28.0", "[0, 28)"),
        ("--pct-start", "1.0 -0.1 nan", "[0, 1)"),
        ("--div-factor", "0.9 inf nan", "[1, inf)"),
        ("--final-div-factor", "0.0 inf nan", "[1, inf)"),
        ("--width", "0", "[1, 100)"),
        ("--temperature", "0 -1 1000 nan", "[0.01, 1000)"),
        ("--seed", "-1 100000", "[0, 100000)"),
        ("--holdout", "-1", "[0, 100000)"),
        ("--runs", "0", "[1, 100000)"),
        ("--epochs", "1.5 ten", "int"),
        ("--lr", "x", "float"),
        ("--recipe", "fast", "reference"),
        ("--precision", "fp16", "fp32"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_valid(call, flag, values, valid):
    for value in values.split():
        assert_one_line(call(f"{flag}={value}"), 2, flag, value, valid)


@pytest.mark.parametrize("flag", ["--evaluate", "--resume", "--out", "--data-dir"])
def test_an_empty_path_is_refused(call, flag):
    assert_one_line(call(flag, ""), 2, "empty")


@pytest.mark.parametrize("device", ["cuda:99", "mps:7", "gpu"])
def test_a_device_that_is_not_there_is_refused(call, device):
    assert_one_line(call("--device", device), 2, device, "available: ", "cpu")


@pytest.mark.parametrize("flag", ["--learning-rate=1", "--epoch=1"])
def test_an_unknown_or_abbreviated_flag_is_refused(call, flag):
    assert_one_line(call(flag), 2, flag)


def test_bad_input_ends_the_process_too(run):
    assert_one_line(run("--epochs", 0), 2, "--epochs")


def test_a_loss_that_is_not_finite_ends_the_run(call, data):
    process = call("--data-dir", data, "--lr", 1e9, "--epochs", 3)
    assert_one_line(process, 1, "not finite in epoch", "lower --lr")


# Data that is not there, or is not MNIST


def test_the_archives_as_downloaded_are_enough(call, tmp_path, real_mnist, no_network):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ARCHIVES:
        shutil.copy(real_mnist / "MNIST" / "raw" / name, raw)
    assert call("--dry-run").returncode == 0


def test_no_data_and_no_network_names_the_folder_and_the_way_out(call, no_network):
    process = call("--data-dir", "none")
    assert_one_line(process, 1, os.path.join("none", "MNIST", "raw"), "--synthetic")


def cut(content):
    return content[:-100]


def wrong_magic_number(content):
    return b"\xff" * 4 + content[4:]


@pytest.mark.parametrize("name", [archive[:-3] for archive in ARCHIVES])
@pytest.mark.parametrize("harm", [cut, wrong_magic_number, lambda _: b""])
def test_a_damaged_file_ends_with_one_line(call, datasets, tmp_path, name, harm):
    raw = write_idx(tmp_path / "small", datasets) / "MNIST" / "raw"
    (raw / name).write_bytes(harm((raw / name).read_bytes()))
    assert_one_line(call("--data-dir", "small"), 1, os.path.join("small", "MNIST"))


@pytest.mark.parametrize("content", [b"", b"x", gzip.compress(b"digits" * 999)[:-20]])
def test_a_damaged_archive_ends_with_one_line(call, tmp_path, content, no_network):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / ARCHIVES[0]).write_bytes(content)
    assert_one_line(call(), 1, os.path.join("data", "MNIST", "raw"))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("problem", ["size", "count", "label", "none"])
def test_files_that_are_not_mnist_end_with_one_line(
    call, tmp_path, datasets, which, problem
):
    images, labels = (part.clone() for part in datasets[which])
    labels[7] = 10 if problem == "label" else labels[7]
    changed = {
        "size": (images[:, :27], labels),
        "count": (images, labels[1:]),
        "label": (images, labels),
        "none": (images[:0], labels[:0]),
    }[problem]
    pairs = list(datasets)
    pairs[which] = changed
    write_idx(tmp_path / "small", pairs)
    assert_one_line(call("--data-dir", "small"), 1, "small")


# The validation set


def test_with_a_holdout_the_test_set_is_not_read(call, tmp_path, datasets, no_network):
    raw = write_idx(tmp_path / "small", datasets) / "MNIST" / "raw"
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (raw / name).write_bytes(b"not to be read")
    flags = ["--data-dir", "small", "--epochs", 1]
    assert call(*flags).returncode == 1
    process = call(*flags, "--holdout", 100)
    assert process.returncode == 0, process.stderr
    assert "Validation accuracy" in process.stdout
    assert "Test" not in process.stdout


def test_the_validation_set_is_the_end_of_the_train_set(call, tmp_path, datasets):
    (images, labels), test_set = datasets
    labels = labels.clone()
    labels[-100:] = 3  # only this digit is in the validation set
    write_idx(tmp_path / "small", [(images, labels), test_set])
    flags = ["--data-dir", "small", "--epochs", 1, "--out", "run", "--holdout"]
    assert call(*flags, 100).returncode == 0
    assert result(tmp_path / "run" / "seed-1")["accuracy_by_digit"].keys() == {"3"}


def test_a_holdout_that_leaves_nothing_to_train_on_is_refused(call, data):
    process = call("--data-dir", data, "--holdout", 600)
    assert_one_line(process, 2, "--holdout 600 leaves none of 600 images")


# Paths


def test_the_home_folder_may_be_written_as_a_tilde(call, datasets, home):
    write_idx(home / "small", datasets)
    process = call("--data-dir=~/small", "--out=~/run", "--epochs", 1)
    assert process.returncode == 0, process.stderr
    assert (home / "run" / "seed-1" / "final.pt").exists()


def test_two_spaces_in_a_path_survive_in_the_printed_command(call, data):
    process = call("--data-dir", data, "--epochs", 1, "--out", "two  spaces")
    assert "--resume 'two  spaces'" in process.stdout
    assert_one_line(call("--resume", "no  run"), 1, "no  run")


# Signals and broken streams


def start_long_run(data, folder, **options):
    """Start a run of very many epochs and return it after its first one."""
    process = start("--data-dir", data, "--epochs", 9999, cwd=folder, **options)
    while not ROW.match(process.stdout.readline()):
        assert process.poll() is None
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_ctrl_c_ends_with_one_line_and_status_130(data, tmp_path):
    with start_long_run(data, tmp_path) as process:
        process.send_signal(signal.SIGINT)
        _, process.stderr_text = process.communicate(timeout=60)
    assert process.returncode == 130
    assert process.stderr_text == "mnist_cnn.py: error: interrupted\n"


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_ctrl_c_that_ends_the_reader_of_the_output_too_gives_one_line(data, tmp_path):
    """As a terminal sends it to both sides of ``python mnist_cnn.py | tee log``."""
    process = start("--data-dir", data, "--epochs", 9999, cwd=tmp_path)
    with process:
        assert process.stdout.readline().startswith("9,798 parameters")
        process.stdout.close()
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        process.wait(timeout=60)
    assert errors.count("\n") == 1
    assert process.returncode in (1, 130)  # the closed pipe may be met first


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_ctrl_c_while_libraries_load_ends_without_a_traceback(tmp_path):
    with start("--synthetic", cwd=tmp_path) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "torch" not in errors


def test_a_reader_of_the_output_that_goes_away_ends_the_run_with_one_line(
    data, tmp_path
):
    with start_long_run(data, tmp_path) as process:
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 1
    assert errors.startswith("mnist_cnn.py: error: ")
    assert errors.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_ends_with_one_line(run, data):
    with open("/dev/full", "w") as full:
        process = run("--data-dir", data, "--epochs", 1, stdout=full)
    assert_one_line(process, 1, "No space left")


@pytest.mark.skipif(sys.platform == "win32", reason="closes POSIX descriptors")
@pytest.mark.parametrize("closed", [(1,), (1, 2)])
def test_closed_streams_do_not_stop_a_run(run, data, tmp_path, closed):
    flags = ["--data-dir", data, "--epochs", 1, "--out", "run"]

    def close():
        for descriptor in closed:
            os.close(descriptor)

    process = run(*flags, preexec_fn=close)
    assert process.returncode == 0, process.stderr
    assert torch.load(tmp_path / "run/seed-1/final.pt", weights_only=True)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
def test_exhausted_memory_ends_with_one_line(run):
    import resource

    limit = 3 * 10**9
    process = run(
        *["--synthetic", "--batch-size", 12000, "--device", "cpu"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    assert_one_line(process, 1, "out of memory", "--batch-size")
