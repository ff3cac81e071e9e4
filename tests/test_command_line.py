"""The command line: what it prints, and one line for each kind of bad input."""

import gzip
import os
import re
import signal
import struct
import sys
import time

import pytest
from conftest import ARCHIVES, start_script, write_idx

import mnist_cnn

ROW = re.compile(
    r"^ +(\d+)  (\d\.\d{6}) +\d+\.\d{4} +\d+\.\d\d % +\d+\.\d{4} +\d+\.\d\d %"
)


def test_a_run_prints_header_rows_and_result(run, small_data):
    process = run("--data-dir", small_data, "--epochs", 2, "--device", "cpu")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""  # no bar where there is no terminal
    header = (
        r"9,798 parameters on cpu, \d+ threads, Python \S+, torch \S+, torchvision \S+"
    )
    assert re.match(header, process.stdout)
    assert "AdaptiveAvgPool2d-24" in process.stdout
    rows = [ROW.match(line) for line in process.stdout.splitlines()]
    assert [row[1] for row in rows if row] == ["1", "2"]
    for line in (
        r"final accuracy +\d+\.?\d*",
        r"best accuracy +\d+\.?\d*",
        r"best epoch +[12]",
        r"epochs to 99\.0 +([12]|None)",
        r"seconds to 99\.4 +(\d+\.?\d*|None)",
        r"seconds +\d+\.?\d*",
        r"The final accuracy is the result; the best was picked on test images\.",
    ):
        assert re.search(f"^{line}$", process.stdout, re.MULTILINE), line


def test_a_run_without_torchsummary_works(run, small_data, tmp_path):
    missing = tmp_path / "missing"
    missing.mkdir()
    (missing / "torchsummary.py").write_text("raise ImportError")
    flags = ["--data-dir", small_data, "--epochs", 1]
    process = run(*flags, env={"PYTHONPATH": str(missing)})
    assert process.returncode == 0
    assert "Conv2d" not in process.stdout


def test_a_dry_run_does_one_training_and_one_test_batch(call, small_data):
    process = call("--data-dir", small_data, "--dry-run")
    assert process.returncode == 0
    assert [line[4] for line in process.stdout.splitlines() if ROW.match(line)] == ["1"]


def test_a_synthetic_run_needs_no_files_and_says_it_means_nothing(
    call, tmp_path, no_network
):
    process = call("--synthetic", "--dry-run")
    assert process.returncode == 0
    assert "says nothing about MNIST" in process.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_archives_as_downloaded_are_enough(call, tmp_path, real_mnist, no_network):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ARCHIVES:
        (raw / name).symlink_to((real_mnist / "MNIST" / "raw" / name).resolve())
    process = call("--dry-run")
    assert process.returncode == 0, process.stderr


def test_help_gives_each_flag_with_its_default(call):
    text = " ".join(call("--help").stdout.split())
    for flag, default in {
        "--epochs": 19,
        "--batch-size": 128,
        "--test-batch-size": 1000,
        "--lr": 0.015,
        "--momentum": 0.9,
        "--no-precise-bn": False,
        "--weight-decay": 0.0001,
        "--dropout": 0.05,
        "--rotation": 7.0,
        "--shift": 0.0,
        "--pct-start": 0.2,
        "--div-factor": 10.0,
        "--final-div-factor": 100.0,
        "--seed": 1,
        "--holdout": 0,
        "--recipe": "reference",
        "--tta": False,
        "--device": "auto",
        "--data-dir": "data",
        "--synthetic": False,
        "--dry-run": False,
    }.items():
        assert re.search(rf"{flag} [^()]*\(default: {default}\)", text), flag


@pytest.mark.parametrize(
    ("flag", "values", "valid"),
    [
        ("--epochs", "0 -1 1.5 ten nan", "whole number from 1 to 100000"),
        ("--batch-size", "0 -128 1e3 60001", "whole number from 1 to 60000"),
        ("--test-batch-size", "0 60001", "whole number from 1 to 60000"),
        ("--lr", "0 -0.1 nan inf x", "number from 1e-09 to 1000000000.0"),
        ("--momentum", "1 -0.1 nan", "number from 0 to 0.9999"),
        ("--weight-decay", "-1e-9 inf nan", "number from 0 to 1000000000.0"),
        ("--dropout", "1 -0.1 nan", "number from 0 to 0.99"),
        ("--rotation", "180.1 -1 nan inf", "number from 0 to 180"),
        ("--shift", "-0.1 28.1 nan", "number from 0 to 28"),
        ("--pct-start", "1 -0.1 nan", "number from 0 to 0.99"),
        ("--div-factor", "0.9 inf nan", "number from 1 to 1000000000.0"),
        ("--final-div-factor", "0 inf nan", "number from 1 to 1000000000.0"),
        ("--seed", "-1 4294967296 1.0", "whole number from 0 to 4294967295"),
        ("--holdout", "-1 60000 0.5", "whole number from 0 to 59999"),
        ("--recipe", "fast", "reference"),
        ("--runs", "0 x", "whole number from 1 to 100000"),
        ("--precision", "fp16", "fp32"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_valid(flag, values, valid, capsys):
    for value in values.split():
        with pytest.raises(SystemExit) as end:
            mnist_cnn.parse_arguments([f"{flag}={value}"])
        error = capsys.readouterr().err
        assert end.value.code == 2
        assert error.startswith("mnist_cnn.py: error: ")
        assert error.count("\n") == 1
        for part in (f"argument {flag}:", f"'{value}'", valid):
            assert part in error


@pytest.mark.parametrize(
    "flags",
    ["--rotation=180", "--seed=4294967295", "--batch-size=60000", "--dropout=0"],
)
def test_the_ends_of_a_closed_range_are_valid(flags):
    mnist_cnn.parse_arguments([flags])


@pytest.mark.parametrize("device", ["cuda:99", "mps:7", "gpu", ""])
def test_a_device_that_is_not_there_is_refused(error_of, device):
    error = error_of(f"--device={device}", status=2)
    assert f"--device: '{device}'" in error
    assert "cpu" in error


def test_several_runs_of_an_evaluation_are_refused(error_of):
    assert "--runs" in error_of("--evaluate", "x.pt", "--runs", 2, status=2)


@pytest.mark.parametrize(
    ("flags", "status"), [(["--epochs", "0"], 2), (["--resume", "nowhere"], 1)]
)
def test_bad_input_ends_the_process_with_one_line_and_no_traceback(run, flags, status):
    process = run(*flags)
    assert process.returncode == status
    assert process.stderr.startswith("mnist_cnn.py: error: ")
    assert process.stderr.count("\n") == 1
    assert process.stdout == ""


def test_an_unknown_flag_is_refused(error_of):
    assert "--learning-rate" in error_of("--learning-rate", "1", status=2)


def test_an_abbreviated_flag_is_refused(error_of):
    assert "--epoch" in error_of("--epoch", "1", status=2)


def test_no_data_and_no_network_names_folder_files_and_synthetic(
    error_of, tmp_path, no_network
):
    error = error_of("--data-dir", tmp_path / "none", status=1)
    for part in (tmp_path / "none" / "MNIST" / "raw", *ARCHIVES, "--synthetic"):
        assert str(part) in error


def test_a_folder_that_cannot_be_made_is_named(error_of, tmp_path):
    (tmp_path / "file").write_text("in the way")
    error = error_of("--data-dir", tmp_path / "file", status=1)
    assert f"'{tmp_path / 'file'}" in error


@pytest.mark.parametrize(
    "content", [b"", b"no archive", gzip.compress(b"digits" * 999)[:-20]]
)
def test_a_corrupt_archive_is_named(error_of, tmp_path, content, no_network):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / ARCHIVES[0]).write_bytes(content)
    error = error_of("--data-dir", tmp_path / "data", status=1)
    assert f"downloading {ARCHIVES[0]}" in error or str(raw / ARCHIVES[0]) in error


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def change_the_magic_number(path):
    path.write_bytes(b"\xff" * 4 + path.read_bytes()[4:])


@pytest.mark.parametrize("name", [archive[:-3] for archive in ARCHIVES])
@pytest.mark.parametrize("harm", [truncate, empty, change_the_magic_number])
def test_a_damaged_idx_file_is_named(name, harm, small_data, capsys):
    path = small_data / "MNIST" / "raw" / name
    harm(path)
    with pytest.raises(SystemExit) as end:
        mnist_cnn.load_mnist(small_data, train=name.startswith("train"))
    error = capsys.readouterr().err
    assert end.value.code == 1
    assert f"cannot read {path}" in error
    assert "delete it" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("problem", ["size", "count", "label", "none"])
def test_idx_files_that_are_not_mnist_are_named(
    tmp_path, small_splits, capsys, split, problem
):
    images, labels = (part.clone() for part in small_splits[split])
    if problem == "size":
        images = images[:, :27]
    elif problem == "count":
        labels = labels[1:]
    elif problem == "label":
        labels[7] = 10
    else:
        images, labels = images[:0], labels[:0]
    splits = list(small_splits)
    splits[split] = images, labels
    write_idx(tmp_path, splits)
    with pytest.raises(SystemExit) as end:
        mnist_cnn.load_mnist(tmp_path, train=split == 0)
    assert end.value.code == 1
    assert (
        f"{tmp_path}/MNIST/raw/{('train', 't10k')[split]}-" in capsys.readouterr().err
    )


def start_long_run(small_data, **options):
    """Start a run of very many epochs and return it after its first one."""
    flags = ["--data-dir", small_data, "--epochs", 100000]
    process = start_script(*flags, cwd=small_data, **options)
    while not ROW.match(process.stdout.readline()):
        assert process.poll() is None
    return process


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_stops_at_once_and_says_how_far_it_came(small_data, number, status):
    with start_long_run(small_data) as process:
        process.send_signal(getattr(signal, number))
        _, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert re.search(
        rf"stopped by {number} after \d+ of 100000 epochs of seed 1", errors
    )
    assert errors.count("\n") == 1


def test_a_reader_of_the_output_that_goes_away_ends_the_run_without_a_traceback(
    small_data,
):
    with start_long_run(small_data) as process:
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(timeout=20)
    assert process.returncode == 1
    assert "stdout was closed" in errors
    assert errors.count("\n") == 1


def test_ctrl_c_while_libraries_load_ends_without_a_traceback(tmp_path):
    with start_script("--synthetic", cwd=tmp_path) as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode in (-signal.SIGINT, 130)
    assert "Traceback" not in errors


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_shows_a_bar_with_loss_and_accuracy(small_data):
    import fcntl
    import termios

    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    flags = ["--data-dir", small_data, "--epochs", 1, "--batch-size", 1]
    with start_script(*flags, cwd=small_data, stderr=terminal) as process:
        process.communicate(timeout=60)
    os.set_blocking(controller, False)
    shown = os.read(controller, 100_000).decode()
    assert "/600" in shown
    assert re.search(r"accuracy=\d.*loss=\d|loss=\d.*accuracy=\d", shown)
