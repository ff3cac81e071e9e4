"""The command line: what it prints, and one line for each kind of bad input."""

import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from unittest.mock import Mock

import pytest
from conftest import ROW, SCRIPT, assert_one_line, result, run, start

import mnist_cnn


def test_a_run_prints_layers_resume_command_rows_and_result(trained):
    folder, output = trained
    command = 'On cpu; to continue after a stop: --resume "run"\n'
    assert output.index("params") < output.index(command) < output.index("epoch")
    assert ROW.findall(output) == ["1", "2"] * 3
    accuracies = [result(seed)["accuracy"] for seed in folder.glob("seed-*")]
    last = output.splitlines()[-1]
    assert re.match(rf"run +3  {statistics.mean(accuracies):.2f} ± ", last)
    assert max(map(len, output.splitlines())) <= 80


def test_a_run_needs_no_torchsummary_and_no_temporary_folder(call, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsummary", None)
    monkeypatch.setattr("tempfile.TemporaryDirectory", Mock(side_effect=OSError))
    process = call("--data-dir", data, "--epochs", 1, "--out", "run")
    assert process.returncode == 0
    assert "Conv2d" not in process.stdout


def test_only_the_first_process_of_torchrun_prints(call, trained, data, monkeypatch):
    evaluate = ["--evaluate", trained[0] / "seed-5" / "final.pt", "--data-dir", data]
    for rank, job in itertools.product((0, 1), (["--compare", trained[0]], evaluate)):
        monkeypatch.setattr("mnist_cnn.RANK", rank)
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # to restore it in the end
        process = call(*job)
        assert process.returncode == 0
        assert bool(process.stdout) == (rank == 0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_has_a_bar_with_loss_and_accuracy_that_ctrl_c_erases(data, tmp_path):
    controller, terminal = os.openpty()

    def resize(columns):
        command = ["stty", "rows", "24", "cols", columns]
        subprocess.run(command, stdin=terminal, check=True)

    def bars():
        lines = shown.decode(errors="ignore").split("\r")[:-1]
        return [line for line in lines if re.search(r"/300.*accuracy=.*loss=", line)]

    flags = ["--data-dir", data, "--epochs", 99, "--batch-size", 2]
    shown = b""
    resize("100")
    with start(*flags, cwd=tmp_path, stdout=terminal, stderr=terminal) as process:
        while not bars():
            shown += os.read(controller, 100_000)
        assert max(map(len, bars())) <= 98  # leaves room for ^C
        resize("80")
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


@pytest.mark.parametrize("flags", ["--recipe=best --lr=0.5", "--lr=0.5 --recipe=best"])
def test_an_explicit_flag_overrides_the_recipe(train, flags):
    config = train("--dry-run", *flags.split()).parent / "config.json"
    expected = mnist_cnn.RECIPES["best"] | {"lr": 0.5}
    assert expected.items() <= json.loads(config.read_text()).items()


@pytest.mark.parametrize(
    ("flags", "values", "valid"),
    [
        ("--epochs", "0 -1 10000", "[1, 10000)"),
        ("--batch-size --runs", "0 -128 100000", "[1, 100000)"),
        ("--seed", "-1 100000", "[0, 100000)"),
        ("--holdout", "-1 60000", "[0, 60000)"),
        ("--width", "0 100", "[1, 100)"),
        ("--lr --weight-decay", "-1e-09 nan inf", "[0, inf)"),
        ("--momentum --dropout --pct-start", "1.0 -0.1 nan", "[0, 1)"),
        ("--rotation --shift", "-0.1 nan 360.0", "[0, 360)"),
        ("--div-factor --final-div-factor", "0.9 0.0 inf nan", "[1, inf)"),
        ("--epochs", "1.5 ten", "int"),
        ("--device", "cuda:99 mps:7 gpu meta", "does not work (cpu does)"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_valid(call, flags, values, valid):
    for flag, value in itertools.product(flags.split(), values.split()):
        assert_one_line(call(f"{flag}={value}"), 2, flag, value, valid)


@pytest.mark.parametrize("flag", ["--evaluate", "--resume", "--device"])
def test_an_empty_value_is_not_taken_for_a_missing_flag(call, flag):
    assert call(flag, "").stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ("--compare a b --width 5", "--width does not go with --compare"),
        ("--evaluate f --holdout=9", "--holdout does not go with --evaluate"),
        (
            "--data-dir=d --evaluate=f --predict=p",
            "--data-dir does not go with --predict",
        ),
        ("--resume x --dry-run", "--dry-run does not go with --resume"),
        ("--resume x --compare y", "--resume does not go with --compare"),
        ("--resume=x --lr=0.015", "--lr does not go with --resume"),
        ("--predict x.png", "--predict needs --evaluate FILE"),
        ("--learning-rate=1", "--learning-rate"),
        ("--epoch=1", "--epoch"),
    ],
)
def test_a_flag_that_is_unknown_or_does_not_fit_is_refused(call, flags, text):
    assert_one_line(call(*flags.split()), 2, text)


def test_ctrl_c_any_number_of_times_ends_with_one_line_and_status_130(long_run):
    for _ in range(5):
        long_run.send_signal(signal.SIGINT)
        time.sleep(0.01)
    errors = long_run.communicate(timeout=60)[1]
    assert errors == "mnist_cnn.py: error: stopped by KeyboardInterrupt\n"
    assert long_run.returncode == 130


@pytest.mark.parametrize("ctrl_c", [False, True])
def test_a_reader_of_the_output_that_goes_away_leaves_one_line(long_run, ctrl_c):
    """As in ``python mnist_cnn.py | tee log``, where Ctrl-C reaches both sides."""
    long_run.stdout.close()
    if ctrl_c:
        long_run.send_signal(signal.SIGINT)
    errors = long_run.stderr.read()
    assert errors.startswith("mnist_cnn.py: error: ")
    assert errors.count("\n") == 1
    assert long_run.wait(timeout=60) in (1, 130)  # closed pipe, Ctrl-C


def run_code(code, *flags):
    """Run Python code, then the script with flags; then print how Ctrl-C is handled."""
    script = f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    code = f"import io, runpy, signal, sys, torch, unittest.mock as mock\n{code}\n"
    code += f"try: {script}\nfinally: print(signal.getsignal(2), file=sys.__stdout__)"
    command = [sys.executable, "-c", code, *map(str, flags)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


WENT_ON = f"{signal.default_int_handler}\n"


def test_after_ctrl_c_a_notebook_prints_and_can_be_stopped_again(data):
    code = "torch.Tensor.backward = mock.Mock(side_effect=KeyboardInterrupt)"
    code += "\nsys.ps1 = '>'"
    process = run_code(code, "--data-dir", data, "--dry-run")
    assert_one_line(process, 130, "KeyboardInterrupt")
    assert process.stdout.endswith(WENT_ON)


@pytest.mark.parametrize("stdout", ["io.StringIO()", "None"])
def test_a_notebook_can_run_it_and_so_can_pythonw_without_stdout(
    data, tmp_path, stdout
):
    """``%run`` gives it a stdout without reconfigure, and goes on after it."""
    flags = ["--data-dir", data, "--epochs", 1, "--out", tmp_path / "run"]
    process = run_code(f"sys.stdout = {stdout}", *flags)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == WENT_ON
    assert (tmp_path / "run" / "seed-1" / "result.json").exists()


def test_exhausted_memory_of_a_gpu_ends_with_one_line(data):
    error = "torch.OutOfMemoryError('CUDA out of memory. Tried 48 GiB')"
    code = f"torch.Tensor.backward = mock.Mock(side_effect={error})"
    process = run_code(code, "--data-dir", data, "--dry-run")
    assert_one_line(process, 1, "CUDA out of memory. Tried 48 GiB")
