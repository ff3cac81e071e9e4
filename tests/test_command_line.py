"""The command line: what it prints, and one line for each kind of bad input."""

import contextlib
import itertools
import os
import re
import signal
import statistics
import struct
import subprocess
import sys

import pytest
from conftest import ROW, SCRIPT, assert_one_line, result, rows, run, start


def test_a_run_prints_layers_resume_command_rows_and_result(trained):
    folder, output = trained
    command = "On cpu; to continue after a stop: --resume run\n"
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


def test_a_synthetic_run_needs_no_download(call, no_network):
    assert call("--synthetic", "--dry-run").returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_shows_a_bar_with_loss_and_accuracy_that_ctrl_c_erases(
    data, tmp_path
):
    import fcntl
    import termios

    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    flags = ["--data-dir", data, "--epochs", 9, "--batch-size", 2]
    shown = b""
    with start(*flags, cwd=tmp_path, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        while not re.search(rb"/300.*accuracy=\d.*loss=\d", shown):
            shown += os.read(controller, 100_000)  # fails when the run has ended
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # Linux's word for the end
            while more := os.read(controller, 100_000):
                shown += more
    assert re.search(rb"[\r\n]mnist_cnn.py: error: stopped", shown)


def test_an_ascii_terminal_gets_the_whole_result(trained):
    process = run("--compare", ".", cwd=trained[0], env={"PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0, process.stderr
    assert re.search(r" 3  \d+\.\d\d \? \d", process.stdout)


def test_an_explicit_flag_overrides_the_recipe(call, data):
    flags = ["--data-dir", data, "--dry-run", "--div-factor", 1, "--pct-start", 0]
    for order in (["--recipe", "best", "--lr", 0.5], ["--lr", 0.5, "--recipe", "best"]):
        # The only step is the last: a hundredth of the maximum.
        assert rows(call(*flags, *order).stdout)[0][2] == "0.005"


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
        ("--evaluate f --width 5", "--width does not go with --evaluate"),
        ("--evaluate f --holdout=9", "--holdout does not go with --evaluate"),
        (
            "--evaluate f --predict p --data-dir d",
            "--data-dir does not go with --predict",
        ),
        ("--resume x --dry-run", "--dry-run does not go with --resume"),
        ("--resume x --compare y", "--resume does not go with --compare"),
        ("--resume=x --lr=0.015", "--lr does not go with --resume"),
        ("--predict x.png", "--predict needs --evaluate FILE"),
        ("--synthetic --holdout 12000", "--holdout 12000 leaves nothing to train on"),
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
def test_ctrl_c_ends_with_one_line_and_status_130(data, tmp_path):
    with start_long_run(data, tmp_path) as process:
        process.send_signal(signal.SIGINT)
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
    script = "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    code = f"import io, runpy, sys\n{code}\n{script}\nsys.stderr.write('on')"
    command = [sys.executable, "-c", code, SCRIPT, *map(str, flags)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_a_notebook_can_run_it(trained):
    """``%run`` gives it a stdout without reconfigure, and goes on after it."""
    process = run_code("sys.stdout = io.StringIO()", "--compare", trained[0])
    assert (process.returncode, process.stderr) == (0, "on")


def test_exhausted_memory_of_a_gpu_ends_with_one_line(data):
    code = """import torch
def fail(*_): raise torch.OutOfMemoryError("CUDA out of memory. Tried 48 GiB")
torch.Tensor.backward = fail"""
    process = run_code(code, "--data-dir", data, "--dry-run")
    assert_one_line(process, 1, "CUDA out of memory. Tried 48 GiB")
