"""What the tests share: the script as a command, small IDX files, the real MNIST."""

import json
import os
import re
import signal
import struct
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import mnist_cnn

# One thread, here and in the scripts that the tests start: results are compared bit for
# bit, which takes the same number, and two scripts at a time would fight for the cores.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The scripts buffer their output and draw as they do for a user.
for name in ("PYTHONUNBUFFERED", "MPLBACKEND"):
    os.environ.pop(name, None)

# A shell starts a background job with Ctrl-C ignored, which the scripts would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

SCRIPT = Path(mnist_cnn.__file__).resolve()


def start(*flags, until=None, env=(), **options):
    """Start the command; return the process after the first line like ``until``."""
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=os.environ | dict(env), **pipes | options)
    while until and not re.match(until, process.stdout.readline()):
        assert process.poll() is None
    return process


def run(*flags, **options):
    """Run the command as a process and return it when it has finished."""
    with start(*flags, **options) as process:
        output, errors = process.communicate(timeout=600)
    return subprocess.CompletedProcess(flags, process.returncode, output, errors)


@pytest.fixture
def long_run(data, tmp_path):
    """A run of very many epochs in the folder "run", after its first one."""
    if sys.platform == "win32":
        pytest.skip("needs POSIX's signals, locks and files")
    flags = ["--data-dir", data, "--epochs", 9999, "--out", "run"]
    with start(*flags, until=ROW, cwd=tmp_path) as process:
        yield process
        process.kill()


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Run the command in this process, without the time for imports and pictures."""
    saved = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(saved, lambda _, file: file.write(b"a picture"))

    def call_main(*flags):
        monkeypatch.chdir(tmp_path)
        capsys.readouterr()
        status = 0
        try:
            mnist_cnn.main([*map(str, flags)])
        except SystemExit as end:
            status = end.code
        output, errors = capsys.readouterr()
        return subprocess.CompletedProcess(flags, status, output, errors)

    return call_main


def assert_one_line(process, status, *parts):
    """Whether a process ended with one line on stderr that holds these parts."""
    assert process.returncode == status, process.stderr
    assert process.stderr.startswith("mnist_cnn.py: error: ")
    assert process.stderr.count("\n") == 1
    for part in parts:
        assert str(part) in process.stderr


@pytest.fixture
def photo(tmp_path):
    """The name of a picture of a one, beside which the command runs."""
    picture = Image.new("L", (200, 200), 200)
    ImageDraw.Draw(picture).line([(100, 40), (100, 160)], 20, 12)
    picture.save(tmp_path / "photo.jpg")
    return "photo.jpg"


def write_idx(folder, datasets):
    """Write (images, labels) datasets as the four files of MNIST, unpacked."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, (images, labels) in zip(("train", "t10k"), datasets, strict=True):
        images = images.squeeze(1)
        pixels = struct.pack(">4i", 2051, *images.shape) + images.numpy().tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(pixels)
        digits = struct.pack(">2i", 2049, len(labels)) + labels.byte().numpy().tobytes()
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(digits)
    return folder


def digits(count, seed):
    """Digits in Pillow's font, rotated at random: images and labels as in MNIST."""
    picture = Image.new("L", (28, 10 * 28))
    for digit in range(10):
        ImageDraw.Draw(picture).text((8, 28 * digit), str(digit), 255, font_size=24)
    torch.manual_seed(seed)
    labels = torch.randint(10, (count,))
    images = torch.tensor(np.array(picture)).view(10, 1, 28, 28)[labels]
    return mnist_cnn.augment(images, Namespace(rotation=30, shift=0)).byte(), labels


@pytest.fixture(scope="session")
def datasets():
    """600 training and 200 test digits."""
    return digits(600, 0), digits(200, 1)


@pytest.fixture(scope="session")
def data(datasets, tmp_path_factory):
    """A --data-dir that holds them as IDX files."""
    return write_idx(tmp_path_factory.mktemp("data"), datasets)


THREE = "--device cpu --epochs 2 --batch-size 64 --lr 0.3 --tta --runs 3 --seed 5"


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """The finished folder of three seeds, 5 to 7, and what was printed."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*THREE.split(), "--data-dir", data, "--out", "run"]
    # A notebook's, which lives in another environment.
    notebook = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    process = run(*flags, cwd=folder, env=notebook)
    assert (process.returncode, process.stderr) == (0, "")
    return folder / "run", process.stdout


@pytest.fixture
def train(call, data, tmp_path):
    """Train with the command; return the folder of its only seed."""

    def train_with(*flags):
        number = len(list(tmp_path.glob("run-?")))
        folder = tmp_path / f"run-{number}"
        process = call("--data-dir", data, "--device", "cpu", "--out", folder, *flags)
        assert process.returncode == 0, process.stderr
        return next(folder.glob("seed-*"))

    return train_with


@pytest.fixture
def stopped(train, monkeypatch):
    """Train until a file of this name is to appear; return the folder that lacks it."""

    def stop_at(name, *flags):
        def replace_or_stop(path, target):
            if Path(target).name == name:
                raise KeyboardInterrupt(Path(target).parent)
            return replace(path, target)

        replace = Path.replace
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as stop:
            patch.setattr(Path, "replace", replace_or_stop)
            train(*flags)
        return stop.value.args[0]

    return stop_at


# A row of the table of epochs; the group is the epoch.
ROW = re.compile(r"^ +\d+ +(\d+) +\S+(?: +\d+(?:\.\d+)?){5}$", re.MULTILINE)


def load(path):
    return torch.load(path, weights_only=True)


def result(folder):
    return json.loads((folder / "result.json").read_text())


def metrics(folder):
    """The rows of metrics.csv but for the seconds, which no two runs share."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    return [line.rsplit(",", 1)[0] for line in lines]


def assert_same_run(first, second):
    """Whether two seed folders agree bit for bit."""
    assert metrics(first) == metrics(second)
    weights = [load(folder / "final.pt") for folder in (first, second)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


@pytest.fixture(scope="session")
def real_mnist():
    """A --data-dir with the real MNIST: MNIST_DIR, else data/, else a download."""
    folder = Path(os.environ.get("MNIST_DIR", SCRIPT.parent / "data"))
    try:
        mnist_cnn.load_mnist(folder, "t10k")
    except SystemExit:
        if "MNIST_DIR" in os.environ:
            raise
        pytest.skip(f"no MNIST in {folder} and no download")
    return folder


@pytest.fixture(scope="session")
def real_run(real_mnist, tmp_path_factory):
    """The folder of a model trained with the recipe quick on half of MNIST, once."""
    folder = tmp_path_factory.mktemp("real")
    images, labels = mnist_cnn.load_mnist(real_mnist, "train")
    halves = (images[:30_000], labels[:30_000]), (images[-2000:], labels[-2000:])
    flags = ["--data-dir", write_idx(folder, halves), "--out", "run"]
    flags += ["--recipe", "quick", "--epochs", 1]
    process = run(*flags, cwd=folder, env={"OMP_NUM_THREADS": "2"})
    assert process.returncode == 0, process.stderr
    return folder / "run" / "seed-1"
