"""What the tests share: the script as a subprocess, small IDX files, the real MNIST."""

import contextlib
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.datasets import MNIST

import mnist_cnn

# One thread, here and in the scripts that the tests start: their results are compared bit
# for bit, which takes the same number, and two scripts at a time would fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

SCRIPT = Path(mnist_cnn.__file__).resolve()
ARCHIVES = [name for name, _ in MNIST.resources]


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs an NVIDIA GPU")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def start_script(*flags, cwd, **options):
    """Start the script in a folder and return the process; its output is text."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, flags)],
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **options.pop("env", {})},
        **{
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            **options,
        },
    )


@pytest.fixture
def run(tmp_path):
    """Run the script in an empty folder and return the finished process."""

    def run_script(*flags, **options):
        with start_script(*flags, cwd=tmp_path, **options) as process:
            output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(flags, process.returncode, output, errors)

    return run_script


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run main() in this process and an empty folder; return status, output and errors.

    It is ``run`` without the seconds that loading the libraries anew takes.
    """
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }

    def call_main(*flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["mnist_cnn.py", *map(str, flags)])
        capsys.readouterr()
        status = 0
        try:
            mnist_cnn.main()
        except SystemExit as end:
            status = end.code
        output, errors = capsys.readouterr()
        return subprocess.CompletedProcess(flags, status, output, errors)

    yield call_main
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def error_of(call):
    """Run main() with bad input and return its one line of stderr."""

    def one_line(*flags, status):
        process = call(*flags)
        assert process.returncode == status
        assert process.stderr.startswith("mnist_cnn.py: error: ")
        assert process.stderr.count("\n") == 1
        return process.stderr

    return one_line


@pytest.fixture
def no_network(monkeypatch):
    """Send downloads to a port where nobody listens, here and in started scripts."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


def write_idx(folder, splits):
    """Write (images, labels) splits as the four unpacked files of MNIST under folder."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, (images, labels) in zip(("train", "t10k"), splits, strict=True):
        pixels = struct.pack(">4i", 2051, *images.shape) + images.numpy().tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(pixels)
        digits = struct.pack(">2i", 2049, len(labels)) + labels.byte().numpy().tobytes()
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(digits)
    return raw


@pytest.fixture(scope="session")
def small_splits():
    """600 training and 200 test digits."""
    digits = mnist_cnn.synthetic_digits
    return digits(600, seed=0), digits(200, seed=1)


@pytest.fixture
def small_data(tmp_path, small_splits):
    """A --data-dir that holds the small splits as IDX files."""
    write_idx(tmp_path / "small", small_splits)
    return tmp_path / "small"


@pytest.fixture
def flags():
    """The parsed flags of a command line, on the CPU."""

    def parse(*arguments):
        arguments = [str(argument) for argument in arguments]
        return mnist_cnn.parse_arguments(["--device", "cpu", *arguments])

    return parse


@pytest.fixture(scope="session")
def real_mnist(tmp_path_factory):
    """A --data-dir with the real MNIST: MNIST_DIR, else data/, else a download."""
    if "MNIST_DIR" in os.environ:
        folder = Path(os.environ["MNIST_DIR"])
        found = [(folder / "MNIST" / "raw" / name).exists() for name in ARCHIVES]
        assert all(found), f"MNIST_DIR is set, but {folder}/MNIST/raw lacks {ARCHIVES}"
        return folder
    folder = SCRIPT.parent / "data"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            MNIST(folder, download=True)
    except (OSError, RuntimeError) as error:
        pytest.skip(f"no MNIST in {folder} and no download: {error}")
    return folder
