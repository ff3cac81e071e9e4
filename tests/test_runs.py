"""Output files, several seeds, resuming, evaluating: what a run leaves and what reads it."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import THREE, assert_one_line, assert_same_run, load, result, run, start
from torch.utils._pytree import tree_leaves, tree_map_only

import mnist_cnn

SEED_FILES = {"metrics.csv", "checkpoint.pt", "final.pt", "result.json", "report.png"}


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the finished run, seed 6 of which was killed after its last epoch."""
    shutil.copytree(trained[0], tmp_path / "copy")
    for name in ("final.pt", "result.json", "report.png"):
        (tmp_path / "copy" / "seed-6" / name).unlink()
    return tmp_path / "copy"


def test_a_run_leaves_its_files(trained):
    folder = trained[0]
    seeds = {"seed-5", "seed-6", "seed-7"}
    assert names(folder) == {"config.json", "mnist_cnn.py"} | seeds
    assert (folder / "mnist_cnn.py").read_bytes() == mnist_cnn.SOURCE
    config = json.loads((folder / "config.json").read_text())
    expected = {"epochs": 2, "lr": 0.3, "tta": True, "device": "cpu", "threads": 1}
    assert (expected | {"torch": torch.__version__}).items() <= config.items()
    for seed in seeds:
        assert names(folder / seed) == SEED_FILES


def test_the_result_is_the_last_row_of_the_metrics(train):
    folder = train("--epochs", 2)
    lines = (folder / "metrics.csv").read_text().splitlines()
    head, *rows = [line.split(",") for line in lines]
    assert [row[1] for row in rows] == ["1", "2"]
    last = dict(zip(head, map(float, rows[-1]), strict=True))
    assert result(folder) == last | {"accuracy": last["eval_accuracy"]}


def test_a_folder_that_is_not_empty_is_left_alone(call, data, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    process = call("--data-dir", data, "--out", "mine")
    assert_one_line(process, 1, "mine exists", "--out", "--resume")
    assert names(tmp_path / "mine") == {"thesis.txt"}


@pytest.mark.parametrize("file", ["mnist_cnn.py", "config.json"])
def test_a_run_stopped_making_its_folder_starts_again(train, stopped, tmp_path, file):
    stopped(file)
    assert names(tmp_path) == {"run-0.new"}
    assert train("--epochs", 1).parent == tmp_path / "run-0"


def test_two_runs_of_one_second_have_two_folders(call, data, tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda text: text.replace("%", ""))
    monkeypatch.setattr("os.getpid", lambda: 1)  # as in two containers
    for _ in range(2):
        assert call("--data-dir", data, "--epochs", 1).returncode == 0
    assert len(names(tmp_path / "runs")) == 2


def test_a_run_that_another_process_continues_is_refused(call, long_run):
    assert_one_line(call("--resume", "run"), 1, "run is in use")


def test_a_seed_of_several_runs_equals_that_seed_alone(trained, train):
    alone = train("--epochs", 2, "--batch-size", 64, "--lr", 0.3, "--seed", 6)
    assert_same_run(trained[0] / "seed-6", alone)


@pytest.mark.skipif(sys.platform == "win32", reason="torchrun needs libuv there")
def test_torchrun_shares_the_seeds_and_prints_one_table(trained, data, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    flags = [*THREE.split(), "--data-dir", data, "--out", "run"]
    command = [*torchrun, mnist_cnn.__file__, *flags]
    output = subprocess.check_output(command, cwd=tmp_path, text=True)
    assert output.splitlines()[-2:] == trained[1].splitlines()[-2:]
    assert output.count("Total params") == 1
    for seed in ("seed-5", "seed-6", "seed-7"):
        assert_same_run(tmp_path / "run" / seed, trained[0] / seed)


def test_each_process_of_torchrun_has_a_gpu(call, monkeypatch):
    monkeypatch.setattr("mnist_cnn.TORCHRUN", True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    monkeypatch.setattr("torch.accelerator.set_device_index", print)
    assert call("--evaluate", "none.pt", "--device", "cpu").stdout == "1\n"


def test_a_diverged_seed_is_recorded_and_skipped(call, data, monkeypatch, tmp_path):
    losses = iter([1, 1, 1, math.nan, 1, 1])  # of three seeds, two epochs each

    def train_epoch(*_):
        yield
        return 0.1, next(losses), 90

    monkeypatch.setattr(mnist_cnn, "train_epoch", train_epoch)
    flags = ["--data-dir", data, "--device", "cpu", "--epochs", 2, "--runs", 3]
    for process in (call(*flags, "--out", "run"), call("--resume", "run")):
        assert_one_line(process, 1, "1 of 3 diverged")
        assert re.search(r"^run +2 .* 1 of 3 diverged$", process.stdout, re.MULTILINE)
        assert result(tmp_path / "run" / "seed-2") == {"diverged_in_epoch": 2}
    assert "1 of 3 diverged" in call("--compare", "run").stdout


def test_seeds_that_diverge_are_recorded_with_what_to_try(call, data, tmp_path):
    flags = ["--data-dir", data, "--lr", 1e9, "--epochs", 3, "--runs", 2]
    process = call(*flags, "--out", "run")
    assert_one_line(process, 1, "run has no result: 2 of 2 diverged")
    assert "Seed 2 diverged: high --lr" in process.stdout
    for seed in ("seed-1", "seed-2"):
        assert result(tmp_path / "run" / seed) == {"diverged_in_epoch": 1}


@pytest.mark.skipif(sys.platform == "win32", reason="kills as POSIX does")
@pytest.mark.parametrize("moment", [random.Random(n).uniform(0, 1) for n in (0, 1)])
def test_a_run_killed_at_any_moment_ends_alike(call, trained, data, tmp_path, moment):
    flags = [*THREE.split(), "--data-dir", data, "--out", "run"]
    with start(*flags, until=" seed", cwd=tmp_path) as process:
        time.sleep(moment)
        process.kill()
    assert call("--resume", "run").returncode == 0
    for seed in ("seed-5", "seed-6", "seed-7"):
        assert_same_run(tmp_path / "run" / seed, trained[0] / seed)
    assert not list((tmp_path / "run").rglob("*.new"))


def test_resuming_trains_only_what_is_not_finished(trained, copy, call):
    (copy / "seed-6" / "metrics.csv").unlink()  # the checkpoint is written before it
    shutil.rmtree(copy / "seed-7")
    (copy / "seed-6" / "metrics.csv.new").touch()  # of a killed process
    before = (copy / "seed-5" / "final.pt").stat().st_mtime_ns
    process = call("--resume", "copy")
    assert process.returncode == 0, process.stderr
    assert (copy / "seed-5" / "final.pt").stat().st_mtime_ns == before
    for seed in ("seed-6", "seed-7"):
        assert_same_run(copy / seed, trained[0] / seed)
        assert result(copy / seed)["accuracy"] == result(trained[0] / seed)["accuracy"]
    assert names(copy / "seed-6") == SEED_FILES
    row = re.compile(r"^\S+ +(3  \d+\.\d\d ± \d+\.\d\d)", re.MULTILINE)
    assert row.findall(process.stdout) == row.findall(trained[1]) != []


def test_resuming_can_add_seeds_and_takes_none_away(copy, call):
    for flags, seeds in ((["--runs", 2], 3), (["--runs", 4], 4), ([], 4)):
        process = call("--resume", "copy", *flags)
        assert process.returncode == 0
        assert re.search(rf"^copy +{seeds} ", process.stdout, re.MULTILINE)


def test_other_data_or_script_is_refused(copy, call, data, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / "other")
    path = tmp_path / "other" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-392] + b"\1" * 392)  # half an image
    process = call("--resume", "copy", "--data-dir", "other")
    assert_one_line(process, 1, "other images", "copy", "--data-dir")
    monkeypatch.setattr(mnist_cnn, "SOURCE", mnist_cnn.SOURCE + b"# changed")
    process = call("--resume", "copy")
    assert_one_line(process, 1, "copy has another script", "mnist_cnn.py")


def test_a_resumed_run_has_as_many_threads_or_warns(train, call, tmp_path, request):
    request.addfinalizer(lambda: torch.set_num_threads(1))
    torch.set_num_threads(2)
    seed_folder = train("--epochs", 1)
    torch.set_num_threads(1)
    seed_folder.rename(tmp_path / "whole")
    folder = seed_folder.parent
    assert call("--resume", folder).returncode == 0
    assert torch.get_num_threads() == 2
    assert_same_run(seed_folder, tmp_path / "whole")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"threads": 10_000}))
    process = call("--resume", folder)
    assert process.returncode == 0
    assert "not 10000" in process.stderr
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))


def test_momentum_in_another_devices_layout_changes_nothing(call, train, stopped):
    folder = stopped("metrics.csv", "--epochs", 2)
    path = folder / "checkpoint.pt"
    saved = load(path)
    assert len(saved[1]) == 1  # the checkpoint has the epoch before the table has it
    leaves = filter(torch.is_tensor, tree_leaves(saved))
    assert not all(leaf.is_contiguous() for leaf in leaves)
    torch.save(tree_map_only(torch.Tensor, torch.Tensor.contiguous, saved), path)
    assert call("--resume", folder.parent).returncode == 0
    assert_same_run(folder, train("--epochs", 2))


def test_a_run_whose_folder_is_moved_ends_and_makes_no_other(long_run, tmp_path):
    (tmp_path / "run").rename(tmp_path / "moved")
    errors = long_run.communicate(timeout=60)[1]
    assert long_run.returncode == 1
    assert errors.count("\n") == 1
    assert os.path.join("run", "seed-1") in errors
    assert names(tmp_path) == {"moved"}


@pytest.fixture
def bad_files(tmp_path):
    """A file for each way to be no file of weights and no checkpoint."""
    bad = tmp_path / "bad"
    bad.mkdir()
    weights = mnist_cnn.Net().state_dict()
    torch.save(weights, tmp_path / "good.pt")
    (bad / "truncated.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:-2000])
    (bad / "foreign.pt").write_bytes(b"not tensors at all")
    # A malicious pickle: loading it as Python does would open, so make, a file.
    (bad / "code.pt").write_bytes(b"cio\nopen\n(Vexecuted\nVw\ntR.")
    torch.save({name: torch.zeros(3) for name in weights}, bad / "shapes.pt")
    torch.save({name: x * math.nan for name, x in weights.items()}, bad / "nan.pt")
    yield list(bad.iterdir())
    assert not (tmp_path / "executed").exists()


def test_bad_weights_are_refused_with_the_script_that_fits(call, trained, bad_files):
    folder = trained[0] / "seed-5"
    for path in [*bad_files, folder / "checkpoint.pt", folder / "missing.pt"]:
        for job in ([], ["--predict", "picture.png"]):
            assert_one_line(call("--evaluate", path, *job), 1, path, "final.pt")
    weights, script = folder / "final.pt", trained[0] / "mnist_cnn.py"
    process = call("--evaluate", weights, "--width", 2)
    assert_one_line(process, 1, weights, "--width", script, "size mismatch")


def test_bad_checkpoints_are_refused_by_name_and_left_alone(call, copy, bad_files):
    checkpoint = copy / "seed-6" / "checkpoint.pt"
    for path in bad_files:
        checkpoint.write_bytes(path.read_bytes())
        assert_one_line(call("--resume", copy), 1, checkpoint, "delete")
        assert checkpoint.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "content", ["[]", "", '{"accuracy": "high"}', '{"accuracy": NaN}', '{"seed": "x"}']
)
@pytest.mark.parametrize("job", ["--resume", "--compare"])
@pytest.mark.parametrize("name", ["config.json", os.path.join("seed-5", "result.json")])
def test_a_damaged_file_ends_with_one_line_and_no_table(
    call, trained, tmp_path, name, content, job
):
    shutil.copytree(trained[0], tmp_path / "copy")
    (tmp_path / "copy" / name).write_text(content)
    process = call(job, "copy")
    cure = "without it --resume trains" if "seed" in name else "cannot"
    assert_one_line(process, 1, name if "seed" in name else "copy", cure)
    assert "accuracy" not in process.stdout


def test_a_full_disk_ends_a_run_with_a_good_checkpoint(train, call, data, tmp_path):
    limits = pytest.importorskip("resource", reason="limits files as POSIX does")
    whole = train("--epochs", 3)
    # A checkpoint grows by a row an epoch.
    limit = ((whole / "checkpoint.pt").stat().st_size - 200,) * 2
    limit_files = partial(limits.setrlimit, limits.RLIMIT_FSIZE, limit)
    flags = ["--data-dir", data, "--device", "cpu", "--epochs", 3, "--out", "full"]
    process = run(*flags, cwd=tmp_path, preexec_fn=limit_files)
    assert_one_line(process, 1, "File too large")
    assert call("--resume", "full").returncode == 0
    assert not list((tmp_path / "full").rglob("*.new"))
    assert_same_run(whole, tmp_path / "full" / "seed-1")


@pytest.mark.parametrize(
    "failure", [RuntimeError("no font"), SystemExit(3), OSError(28, "disk full")]
)
def test_whatever_drawing_does_is_a_warning(copy, call, monkeypatch, failure):
    savefig = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(savefig, Mock(side_effect=failure))
    process = call("--resume", "copy")
    assert process.returncode == 0
    assert process.stderr.startswith("mnist_cnn.py: warning: no report.png: ")
    assert process.stderr.count("\n") == 1
    assert names(copy / "seed-6") == SEED_FILES - {"report.png"}
    assert call("--resume", "copy").stderr == ""


def test_the_report_has_logarithmic_axes_with_plain_numbers(monkeypatch, tmp_path):
    drawn, savefig = [], "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(savefig, lambda figure, *_: drawn.append(figure))
    row = {"train_loss": 1, "eval_loss": 0.02, "train_accuracy": 50}
    history = [row | {"epoch": n, "eval_accuracy": 98 + n / 2} for n in (1, 2, 3)]
    args = mnist_cnn.parse_arguments(["--holdout", "9"])
    mnist_cnn.draw_report(tmp_path / "report.png", args, history)
    loss, error = drawn[0].axes
    drawn[0].draw_without_rendering()
    for ax, numbers in ((loss, {"0.02", "0.1", "1"}), (error, {"0.5", "1", "50"})):
        assert ax.get_yscale() == "log"
        labels = ax.get_yticklabels(which="both")
        assert numbers <= {label.get_text() for label in labels}
        names = [text.get_text() for text in ax.get_legend().get_texts()]
        assert names == ["training", "validation"]
    assert error.get_lines()[1].get_ydata().tolist() == [1.5, 1, 0.5]


@pytest.mark.parametrize("flags", [[], ["--tta"]])
def test_evaluating_is_the_mean_probability_and_agrees_with_the_run(
    trained, data, datasets, call, tmp_path, flags
):
    moves, name = ([0, 1, 2], "accuracy") if flags else ([1], "eval_accuracy")
    weights, (images, labels) = trained[0] / "seed-5" / "final.pt", datasets[1]
    model = mnist_cnn.Net().eval()
    model.load_state_dict(load(weights))
    padded = mnist_cnn.normalise(F.pad(images, (1, 1, 1, 1)))
    shifts = [padded[..., y : y + 28, x : x + 28] for y in moves for x in moves]
    mean = torch.stack([model(shift).softmax(dim=1) for shift in shifts]).mean(dim=0)
    loss = F.nll_loss(mean.log(), labels).item()
    accuracy = 100 * (mean.argmax(dim=1) == labels).double().mean().item()
    shutil.copytree(data, tmp_path / "data", ignore=shutil.ignore_patterns("train-*"))
    process = call("--evaluate", weights, *flags)
    assert process.returncode == 0, process.stderr
    assert process.stdout == f"Test loss {loss:.4f}, accuracy {accuracy:.2f} %\n"
    assert result(weights.parent)[name] == pytest.approx(accuracy)
    assert names(tmp_path) == {"data"}
