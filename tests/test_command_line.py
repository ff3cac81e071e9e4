"""The command line: what it prints, and one line for each kind of bad input."""

import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import struct
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
from conftest import ROW, SCRIPT, assert_one_line, result, rows, run, start

import mnist_cnn


def test_a_run_prints_layers_resume_command_rows_and_result(trained):
    folder, output = trained
    command = 'On cpu; to continue after a stop: --resume "run"\n'
    assert output.index("params") < output.index(command) < output.index("epoch")
    assert [row[1] for row in rows(output)] == ["1", "2"] * 3
    accuracies = [result(seed)["accuracy"] for seed in folder.glob("seed-*")]
    last = output.splitlines()[-1]
    assert re.match(rf"run +3  {statistics.mean(accuracies):.2f} ± ", last)
    assert max(map(len, output.splitlines())) <= 80


def test_a_run_without_torchsummary_works(call, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsummary", None)
    process = call("--data-dir", data, "--dry-run")
    assert process.returncode == 0
    assert "Conv2d" not in process.stdout


def test_a_dry_run_recommends_no_folder(call, data):
    assert "--resume" not in call("--data-dir", data, "--dry-run").stdout


def test_only_a_dry_run_needs_a_temporary_folder(call, data, monkeypatch):
    monkeypatch.setattr("tempfile.TemporaryDirectory", Mock(side_effect=OSError))
    flags = ["--data-dir", data, "--epochs", 1]
    assert call(*flags, "--out", "run").returncode == 0


@pytest.mark.parametrize("job", [["--compare", "x"], ["--evaluate", "x"]])
def test_only_the_first_process_of_torchrun_compares_and_evaluates(
    call, monkeypatch, job
):
    monkeypatch.setattr("mnist_cnn.TORCHRUN", True)
    for rank, status in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert call(*job).returncode == status


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_shows_a_bar_with_loss_and_accuracy_that_ctrl_c_erases(
    data, tmp_path
):
    import fcntl
    import termios

    controller, terminal = os.openpty()

    def resize(columns):
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))

    def bars():
        lines = shown.decode(errors="ignore").split("\r")[:-1]
        return [line for line in lines if re.search(r"/300.*accuracy=.*loss=", line)]

    flags = ["--data-dir", data, "--epochs", 99, "--batch-size", 2]
    shown = b""
    resize(100)
    with start(*flags, cwd=tmp_path, stdout=terminal, stderr=terminal) as process:
        while not bars():
            shown += os.read(controller, 100_000)
        assert max(map(len, bars())) <= 98  # leaves room for ^C
        resize(80)
        while min(map(len, bars())) > 80:  # fails when the run has ended
            shown += os.read(controller, 100_000)
        os.close(terminal)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # Linux's word for the end
            while more := os.read(controller, 100_000):
                shown += more
    assert re.search(rb"[\r\n]mnist_cnn.py: error: stopped", shown)


def test_an_ascii_terminal_gets_the_whole_result(trained):
    process = run("--compare", ".", cwd=trained[0], env={"PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0, process.stderr
    assert re.search(r" 3  \d+\.\d\d \? \d", process.stdout)


def test_an_explicit_flag_overrides_the_recipe(call, data, tmp_path):
    best = mnist_cnn.RECIPES["best"]
    for order in (["--recipe", "best", "--lr", 0.5], ["--lr", 0.5, "--recipe", "best"]):
        folder = tmp_path / order[0]
        call("--data-dir", data, "--dry-run", "--out", folder, *order)
        config = json.loads((folder / "config.json").read_text())
        assert (best | {"lr": 0.5}).items() <= config.items()


@pytest.mark.parametrize(
    ("flags", "values", "valid"),
    [
        ("--epochs", "0 -1 10000", "[1, 10000)"),
        ("--batch-size --runs", "0 -128 100000", "[1, 100000)"),
        ("--seed --holdout", "-1 100000", "[0, 100000)"),
        ("--width", "0 100", "[1, 100)"),
        ("--lr --weight-decay", "-1e-09 nan inf", "[0, inf)"),
        ("--momentum --dropout --pct-start", "1.0 -0.1 nan", "[0, 1)"),
        ("--rotation --shift", "-0.1 nan 360.0", "[0, 360)"),
        ("--div-factor --final-div-factor", "0.9 0.0 inf nan", "[1, inf)"),
        ("--epochs", "1.5 ten", "int"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_valid(call, flags, values, valid):
    for flag, value in itertools.product(flags.split(), values.split()):
        assert_one_line(call(f"{flag}={value}"), 2, flag, value, valid)


@pytest.mark.parametrize("flag", ["--evaluate", "--resume", "--device"])
def test_an_empty_value_is_not_taken_for_a_missing_flag(call, flag):
    assert call(flag, "").stderr.count("\n") == 1


@pytest.mark.parametrize("device", ["cuda:99", "mps:7", "gpu", "meta"])
def test_a_device_that_cannot_compute_is_refused(call, device):
    assert_one_line(call("--device", device), 2, device, "does not work (cpu does)")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--compare a b --lr 5", "--lr does not go with --compare"),
        ("--evaluate f --holdout=9", "--holdout does not go with --evaluate"),
        (
            "--evaluate f --predict p --data-dir d",
            "--data-dir does not go with --predict",
        ),
        ("--resume x --dry-run", "--dry-run does not go with --resume"),
        ("--resume x --compare y", "--resume does not go with --compare"),
        ("--resume=x --lr=0.015", "--lr does not go with --resume"),
        ("--predict x.png", "--predict needs --evaluate FILE"),
        ("--compare a --width 5", "--width does not go with --compare"),
        ("--learning-rate=1", "--learning-rate"),
        ("--epoch=1", "--epoch"),
    ],
)
def test_a_flag_that_is_unknown_or_does_not_fit_is_refused(call, flags, text):
    assert_one_line(call(*flags.split()), 2, text)


def start_long_run(data, folder, **options):
    """Start a run of very many epochs and return it after its first one."""
    process = start("--data-dir", data, "--epochs", 9999, cwd=folder, **options)
    while not ROW.match(process.stdout.readline()):
        assert process.poll() is None
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("times", [1, 5])
def test_ctrl_c_ends_with_one_line_and_status_130(data, tmp_path, times):
    with start_long_run(data, tmp_path) as process:
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.01)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert errors == "mnist_cnn.py: error: stopped by KeyboardInterrupt\n"


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("ctrl_c", [False, True])
def test_a_reader_of_the_output_that_goes_away_leaves_one_line(data, tmp_path, ctrl_c):
    """As in ``python mnist_cnn.py | tee log``, where Ctrl-C reaches both sides."""
    with start_long_run(data, tmp_path) as process:
        process.stdout.close()
        process.send_signal(signal.SIGINT) if ctrl_c else None
        errors = process.stderr.read()
        process.wait(timeout=60)
    assert errors.startswith("mnist_cnn.py: error: ")
    assert errors.count("\n") == 1
    assert process.returncode in (1, 130)  # Ctrl-C or the closed pipe may be first


def run_code(code, *flags):
    """Run Python code, then the script with flags in the same process."""
    script = "runpy.run_path(sys.argv[0], run_name='__main__')"
    code = f"import io, runpy, sys\nsys.argv = sys.argv[1:]\n{code}\n"
    code += f"try: {script}\nfinally: print('on', file=sys.__stdout__)"
    command = [sys.executable, "-c", code, SCRIPT, *map(str, flags)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_a_notebook_can_run_it(trained):
    """``%run`` gives it a stdout without reconfigure, and goes on after it."""
    process = run_code("sys.stdout = io.StringIO()", "--compare", trained[0])
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == "on\n"


def test_after_ctrl_c_a_notebook_prints_and_can_be_stopped_again(data):
    code = """import signal, torch
sys.ps1 = ">"
def stop(*_): raise KeyboardInterrupt
torch.Tensor.backward = stop"""
    process = run_code(code, "--data-dir", data, "--dry-run")
    assert_one_line(process, 130, "KeyboardInterrupt")
    assert process.stdout.endswith("on\n")


def test_without_stdout_a_run_works(data, tmp_path):
    """As with pythonw on Windows, or after ``>&-``."""
    flags = ["--data-dir", data, "--epochs", 1, "--out", tmp_path / "run"]
    process = run_code("sys.stdout = None", *flags)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == "on\n"
    assert (tmp_path / "run" / "seed-1" / "result.json").exists()


def test_exhausted_memory_of_a_gpu_ends_with_one_line(data):
    code = """import torch
def fail(*_): raise torch.OutOfMemoryError("CUDA out of memory. Tried 48 GiB")
torch.Tensor.backward = fail"""
    process = run_code(code, "--data-dir", data, "--dry-run")
    assert_one_line(process, 1, "CUDA out of memory. Tried 48 GiB")
