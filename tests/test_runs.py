"""What a run leaves behind: folders, checkpoints, resuming, statistics, the picture."""

import csv
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import SCRIPT, start_script, write_idx

import mnist_cnn

FILES = {
    "config.json",
    "metrics.csv",
    "checkpoint.pt",
    "best.pt",
    "final.pt",
    "result.json",
    "report.png",
}


def tensors(path):
    return torch.load(path, weights_only=True)


def same(first, second):
    """Whether two nested structures of tensors and numbers are equal, bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            same(value, second[key]) for key, value in first.items()
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def metrics(folder):
    """The rows of metrics.csv but for the seconds, which no two runs share."""
    with open(folder / "metrics.csv") as file:
        return [row[:-1] for row in csv.reader(file)]


def assert_same_run(first, second):
    assert metrics(first) == metrics(second)
    for name in ("final.pt", "best.pt"):
        assert same(tensors(first / name), tensors(second / name)), name
    one, other = (tensors(folder / "checkpoint.pt") for folder in (first, second))
    for key in one.keys() - {"history", "flags"}:
        assert same(one[key], other[key]), key


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture
def train_here(flags, small_splits, tmp_path):
    """Train on the small data in this process; return the run's folder."""

    def train(*arguments):
        folder = tmp_path / "here"
        folder.mkdir()
        mnist_cnn.run_seed(flags(*arguments), small_splits, [], folder)
        return folder

    return train


def script_run(folder, small_splits, *flags):
    """Train on the small data with the script; return the run's folder and its output."""
    write_idx(folder / "small", small_splits)
    flags = ["--data-dir", folder / "small", "--device", "cpu", "--epochs", 2, *flags]
    with start_script(*flags, "--out", folder / "run", cwd=folder) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return folder / "run", output


@pytest.fixture(scope="module")
def one_run(tmp_path_factory, small_splits):
    """The folder of a finished run of two epochs."""
    return script_run(tmp_path_factory.mktemp("one"), small_splits)[0]


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory, small_splits):
    """The folder of three finished runs of two epochs, and what they printed."""
    folder = tmp_path_factory.mktemp("three")
    return script_run(folder, small_splits, "--runs", 3, "--seed", 5)


# The folder


def test_a_run_leaves_its_files(one_run):
    assert {path.name for path in one_run.iterdir()} == FILES


def test_config_tells_flags_command_versions_and_device(one_run):
    config = json.loads((one_run / "config.json").read_text())
    assert config["flags"]["epochs"] == 2
    assert config["flags"]["lr"] == 0.015
    assert "--epochs 2" in config["command"]
    assert torch.__version__ in config["versions"]
    assert config["device"].startswith("cpu")


def test_metrics_have_a_row_an_epoch_and_agree_with_the_result(one_run):
    with open(one_run / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    accuracies = [float(row["test_accuracy"]) for row in rows]
    assert result(one_run)["final_accuracy"] == accuracies[-1]
    assert result(one_run)["best_accuracy"] == max(accuracies)
    assert result(one_run)["best_epoch"] == accuracies.index(max(accuracies)) + 1
    seconds = sum(float(row["seconds"]) for row in rows)
    assert result(one_run)["seconds"] == pytest.approx(seconds)


def test_saved_weights_score_what_the_result_says(train_here, small_splits):
    folder = train_here("--epochs", 5, "--lr", 0.3)  # so high that the best is not last
    for name in ("final", "best"):
        model = mnist_cnn.Net()
        model.load_state_dict(tensors(folder / f"{name}.pt"))
        output = mnist_cnn.predict(model, small_splits[1][0], 1000)
        _, accuracy = mnist_cnn.score(output, small_splits[1][1])
        assert accuracy == result(folder)[f"{name}_accuracy"]


def test_result_tells_when_99_0_and_99_4_percent_were_first_reached():
    accuracies = [98.0, 99.1, 98.9, 99.2, 99.3]
    rows = enumerate(accuracies, start=1)
    history = [mnist_cnn.Epoch(i, 0, 0, 0, 0, accuracy, 2.0) for i, accuracy in rows]
    output, labels = torch.eye(10).log_softmax(1), torch.arange(10)
    found = mnist_cnn.result_of(1, history, output, labels)
    assert (found["epochs_to_99.0"], found["seconds_to_99.0"]) == (2, 4.0)
    assert (found["epochs_to_99.4"], found["seconds_to_99.4"]) == (None, None)
    assert (found["best_accuracy"], found["best_epoch"]) == (99.3, 5)
    assert (found["epochs"], found["seconds"]) == (5, 10)


def test_result_tells_the_accuracy_digit_by_digit():
    output = torch.eye(10).log_softmax(1)[[0, 0, 1, 1]]  # says 0, 0, 1, 1
    found = mnist_cnn.result_of(1, [], output, torch.tensor([0, 1, 1, 1]))
    assert found["final_accuracy"] == 75
    assert found["by_digit"] == [100, pytest.approx(200 / 3)]


def test_two_runs_started_in_the_same_second_have_a_folder_each(small_data, tmp_path):
    flags = ["--data-dir", small_data, "--epochs", 1]
    both = [start_script(*flags, cwd=tmp_path) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert re.match(r"\d{4}-\d\d-\d\d-\d{6}", folder.name)
        assert {path.name for path in folder.iterdir()} == FILES


def test_a_folder_that_exists_is_not_overwritten(error_of, small_data, tmp_path):
    (tmp_path / "mine").mkdir()
    error = error_of("--data-dir", small_data, "--out", tmp_path / "mine", status=1)
    assert str(tmp_path / "mine") in error
    assert "--resume" in error
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(error_of, small_data, tmp_path):
    (tmp_path / "file").touch()
    error = error_of("--data-dir", small_data, "--out", tmp_path / "file/run", status=1)
    assert str(tmp_path / "file/run") in error


# Many seeds


def test_each_of_several_runs_equals_the_run_of_its_seed_alone(three_runs, train_here):
    alone = train_here("--epochs", 2, "--seed", 6)
    assert_same_run(three_runs[0] / "seed-6", alone)


def test_the_result_of_several_runs_is_their_statistics(three_runs):
    total = result(three_runs[0])
    runs = [result(three_runs[0] / f"seed-{seed}") for seed in (5, 6, 7)]
    assert total["runs"] == runs
    finals = torch.tensor([run["final_accuracy"] for run in runs], dtype=torch.float64)
    assert total["n"] == 3
    assert total["final_accuracy"] == pytest.approx(finals.mean().item())
    assert total["standard_deviation"] == pytest.approx(finals.std().item())
    half = 4.302652729749462 * finals.std().item() / 3**0.5  # scipy: t.ppf(0.975, 2)
    assert total["interval_95"] == pytest.approx(half, rel=1e-5)


def test_several_runs_print_a_table_and_the_line_to_quote(three_runs):
    output = three_runs[1]
    row = r"^seed +(\d+)  final +\d+\.\d\d %  best +\d+\.\d\d % @ +\d  "
    assert re.findall(row, output, re.MULTILINE) == ["5", "6", "7"]
    assert re.search(r"\d+\.\d{3} ± \d+\.\d{3} %, n = 3: the line to quote", output)


# scipy.stats: t.ppf(0.975, freedom)
@pytest.mark.parametrize(
    ("freedom", "expected"),
    [
        (1, 12.706204736174694),
        (2, 4.302652729749462),
        (4, 2.7764451051977934),
        (9, 2.2621571628540993),
        (19, 2.093024054408263),
        (99, 1.9842169515086827),
    ],
)
def test_students_t_agrees_with_scipy(freedom, expected):
    assert mnist_cnn.student_t(freedom) == pytest.approx(expected, rel=1e-5)


def test_interval_and_mean_agree_with_scipy():
    finals = [99.30, 99.14, 99.32, 99.41, 99.27]
    outputs = [torch.zeros(4, 10).log_softmax(1)] * 5
    runs = [{"final_accuracy": final} for final in finals]
    total = mnist_cnn.statistics_of(runs, outputs, torch.zeros(4, dtype=torch.long))
    # scipy.stats.t.interval(0.95, 4, numpy.mean(finals), scipy.stats.sem(finals))
    assert total["final_accuracy"] == pytest.approx(99.288)
    assert total["interval_95"] == pytest.approx(0.12146749016113745, rel=1e-5)
    assert total["standard_deviation"] == pytest.approx(0.09782637681116306)


def test_models_are_averaged_by_their_probabilities():
    # Two hesitate for digit 0, one is sure of digit 1: on average digit 1 wins.
    hesitant, sure = [0.5, 0.4] + [0.0125] * 8, [0.01, 0.91] + [0.01] * 8
    outputs = [torch.tensor([row]).log() for row in (hesitant, hesitant, sure)]
    runs = [{"final_accuracy": 0.0}] * 3
    total = mnist_cnn.statistics_of(runs, outputs, torch.tensor([1]))
    assert total["models_averaged_accuracy"] == 100


def test_torchrun_ranks_share_the_seeds_with_the_same_result(
    flags, small_splits, small_data, tmp_path
):
    shared = tmp_path / "shared"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", str(SCRIPT), "--device", "cpu", "--runs", "3"]
    process = subprocess.run(
        [*torchrun, "--data-dir", small_data, "--epochs", "2", "--out", shared],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("the line to quote") == 1
    outcomes = []
    for seed in (1, 2, 3):
        folder = tmp_path / f"alone-{seed}"
        folder.mkdir()
        args = flags("--epochs", 2, "--seed", seed)
        outcomes.append(mnist_cnn.run_seed(args, small_splits, [], folder))
        assert_same_run(folder, shared / f"seed-{seed}")
    alone = mnist_cnn.statistics_of(*zip(*outcomes, strict=True), small_splits[1][1])
    for key in ("n", "final_accuracy", "interval_95", "models_averaged_accuracy"):
        assert result(shared)[key] == alone[key]


# Nothing is lost


def test_runs_killed_at_ten_random_moments_end_like_one_that_was_not(
    train_here, small_data, tmp_path
):
    whole = train_here("--epochs", 30)
    moments = random.Random(0)
    chains = [tmp_path / "first", tmp_path / "second"]  # side by side, to save time
    flags = ["--data-dir", small_data, "--device", "cpu", "--epochs", 30, "--out"]
    starts = [[*flags, folder] for folder in chains]
    kills = 0
    for _ in range(5):
        processes = [start_script(*flags, cwd=tmp_path) for flags in starts]
        for process in processes:
            while line := process.stdout.readline():
                if line.startswith("epoch"):  # from here on it trains and writes
                    break
            time.sleep(moments.uniform(0, 0.4))
            process.kill()
            process.communicate(timeout=20)
            kills += process.returncode == -signal.SIGKILL
        starts = [["--resume", folder] for folder in chains]
    assert kills == 10
    processes = [start_script(*flags, cwd=tmp_path) for flags in starts]
    for process, folder in zip(processes, chains, strict=True):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert_same_run(whole, folder)


def test_a_kill_while_a_file_is_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "checkpoint.pt"
    mnist_cnn.write(path, {"epoch": torch.tensor(1)})
    writer = (
        "import mnist_cnn, pathlib, torch; path = pathlib.Path('checkpoint.pt')\n"
        "print('ready', flush=True)\n"
        "while True: mnist_cnn.write(path, {'epoch': torch.full((300_000,), 2)})"
    )
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    for pause in (0.001, 0.005):
        process = subprocess.Popen(
            [sys.executable, "-c", writer],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        time.sleep(pause)
        process.kill()
        process.communicate()
        assert tensors(path)["epoch"].max() in (1, 2)


def test_a_signal_leaves_a_folder_that_the_printed_command_resumes(
    train_here, small_data, tmp_path
):
    folder = tmp_path / "stopped"
    flags = [
        "--data-dir",
        small_data,
        "--device",
        "cpu",
        "--epochs",
        10,
        "--out",
        folder,
    ]
    with start_script(*flags, cwd=tmp_path) as process:
        while not (folder / "checkpoint.pt").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 143
    assert errors.count("\n") == 1
    command = re.search(r"go on with: python (.*)", errors)[1].split()
    subprocess.run([sys.executable, *command], cwd=tmp_path, check=True)
    assert_same_run(train_here("--epochs", 10), folder)


def test_resuming_several_runs_skips_the_finished_seeds(three_runs, call, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(three_runs[0], folder)
    (folder / "result.json").unlink()
    (folder / "seed-6" / "result.json").unlink()
    before = (folder / "seed-5" / "checkpoint.pt").stat().st_mtime_ns
    assert call("--resume", folder).returncode == 0
    assert (folder / "seed-5" / "checkpoint.pt").stat().st_mtime_ns == before
    assert result(folder) == result(three_runs[0])


def test_resuming_a_finished_run_only_shows_its_result(one_run, call):
    before = {path.name: path.stat().st_mtime_ns for path in one_run.iterdir()}
    process = call("--resume", one_run, "--epochs", 2)  # a flag that agrees is welcome
    assert process.returncode == 0
    assert "final accuracy" in process.stdout
    assert {path.name: path.stat().st_mtime_ns for path in one_run.iterdir()} == before


@pytest.mark.parametrize(
    "flag", ["--epochs=3", "--lr=0.1", "--seed=2", "--runs=2", "--synthetic", "--out=x"]
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused_by_name(
    one_run, flag, capsys
):
    with pytest.raises(SystemExit) as end:
        mnist_cnn.parse_arguments(["--resume", str(one_run), flag])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert flag.split("=")[0] in error
    assert "contradicts" in error
    assert error.count("\n") == 1


# Files that are not what they should be


class Payload:
    """What a malicious pickle holds: loading it would make a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def bad_files(folder):
    """One file for each way to be no file of weights or checkpoint."""
    good = folder / "good.pt"
    torch.save(mnist_cnn.Net().state_dict(), good)
    contents = {
        "empty": b"",
        "truncated": good.read_bytes()[:-2000],
        "foreign": b"not tensors at all",
        "pickle": pickle.dumps(Payload(folder / "executed"), protocol=2),
    }
    for name, content in contents.items():
        (folder / f"{name}.pt").write_bytes(content)
    torch.save(Payload(folder / "executed"), folder / "code.pt")
    shapes = {name: torch.zeros(3) for name in mnist_cnn.Net().state_dict()}
    torch.save(shapes, folder / "wrong-shapes.pt")
    torch.save(torch.zeros(3), folder / "one-tensor.pt")
    return [*contents, "code", "wrong-shapes", "one-tensor", "missing"]


def test_bad_weights_are_refused_by_name_and_code_in_them_does_not_run(
    tmp_path, small_splits, flags, capsys
):
    for name in bad_files(tmp_path):
        args = flags("--evaluate", tmp_path / f"{name}.pt")
        with pytest.raises(SystemExit) as end:
            mnist_cnn.run_seed(args, small_splits, [], None)
        error = capsys.readouterr().err
        assert end.value.code == 1
        assert f"cannot use {tmp_path / name}.pt" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "executed").exists()


def test_a_bad_checkpoint_is_refused_by_name_and_left_alone(
    tmp_path, small_splits, flags, capsys
):
    for name in bad_files(tmp_path)[:-1]:
        content = (tmp_path / f"{name}.pt").read_bytes()
        (tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(SystemExit) as end:
            mnist_cnn.fit(flags("--epochs", 2), *small_splits, [], tmp_path)
        error = capsys.readouterr().err
        assert end.value.code == 1
        assert f"cannot use {tmp_path / 'checkpoint.pt'}" in error
        assert error.count("\n") == 1
        assert (tmp_path / "checkpoint.pt").read_bytes() == content
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_a_run_with_other_flags_is_refused(
    tmp_path, small_splits, flags, capsys
):
    mnist_cnn.fit(flags("--epochs", 1), *small_splits, [], tmp_path)
    with pytest.raises(SystemExit):
        mnist_cnn.fit(flags("--epochs", 2), *small_splits, [], tmp_path)
    assert "a run with other flags" in capsys.readouterr().err


def test_bad_weights_leave_no_folder(error_of, small_data, tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"bad")
    flags = ["--data-dir", small_data, "--evaluate", tmp_path / "bad.pt"]
    assert "bad.pt" in error_of(*flags, status=1)
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_is_no_run_cannot_be_resumed(error_of, tmp_path):
    error = error_of("--resume", tmp_path / "none", status=1)
    assert str(tmp_path / "none" / "config.json") in error


def test_a_damaged_config_is_named(error_of, tmp_path):
    (tmp_path / "config.json").write_text('{"flags": ')
    assert "config.json" in error_of("--resume", tmp_path, status=1)


@pytest.mark.parametrize(
    ("flag", "value"), [("epochs", -5), ("epochs", [2]), ("lr", "a"), ("seed", 1.5)]
)
def test_a_value_changed_in_a_config_is_checked_like_a_flag(
    one_run, tmp_path, flag, value, capsys
):
    config = json.loads((one_run / "config.json").read_text())
    config["flags"][flag] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as end:
        mnist_cnn.parse_arguments(["--resume", str(tmp_path)])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert f"config.json: argument --{flag}: '{value}' is not a" in error
    assert error.count("\n") == 1


def start_on_a_full_disk(limit, *flags, **options):
    """Start the script where no file can grow beyond so many bytes."""

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return start_script(*flags, preexec_fn=fill, **options)


def test_a_full_disk_ends_the_run_with_one_line_and_the_last_checkpoint(
    train_here, flags, small_data, small_splits, tmp_path
):
    whole, folder = train_here("--epochs", 3), tmp_path / "full"
    limit = (whole / "checkpoint.pt").stat().st_size - 100  # it grows by a row an epoch
    given = [
        "--data-dir",
        small_data,
        "--device",
        "cpu",
        "--epochs",
        3,
        "--out",
        folder,
    ]
    process = start_on_a_full_disk(limit, *given, cwd=tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.count("\n") == 1
    assert f"cannot write {folder}" in errors
    assert not list(folder.glob("*.new"))
    mnist_cnn.run_seed(flags("--epochs", 3), small_splits, [], folder)
    assert_same_run(whole, folder)


def test_a_failed_write_at_the_end_does_not_hide_the_result(one_run, call, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(one_run, folder)
    for name in ("result.json", "report.png"):
        (folder / name).unlink()
    (folder / "report.png").mkdir()  # nothing can take this name now
    process = call("--resume", folder)
    assert process.returncode == 1
    assert re.search(r"final accuracy +\d", process.stdout)
    assert f"cannot write {folder / 'report.png'}" in process.stderr
    assert same(tensors(folder / "final.pt"), tensors(one_run / "final.pt"))


# Evaluation and the picture


def test_evaluate_scores_saved_weights_digit_by_digit(one_run, call, tmp_path):
    data = one_run.parent / "small"
    flags = ["--evaluate", one_run / "final.pt", "--out", tmp_path / "test"]
    process = call("--data-dir", data, *flags)
    assert process.returncode == 0, process.stderr
    found, trained = result(tmp_path / "test"), result(one_run)
    assert found["final_accuracy"] == trained["final_accuracy"]
    assert found["final_loss"] == pytest.approx(trained["final_loss"])
    assert len(found["by_digit"]) == 10
    assert re.search(r"^by digit +(\d\S* ?){10}$", process.stdout, re.MULTILINE)
    assert (tmp_path / "test" / "report.png").stat().st_size > 10_000


def test_the_picture_has_curves_confusions_and_mistakes(
    small_splits, tmp_path, monkeypatch
):
    drawn = []
    write = mnist_cnn.write
    monkeypatch.setattr(
        mnist_cnn,
        "write",
        lambda path, figure: (drawn.append(figure), write(path, figure)),
    )
    images, labels = small_splits[1]
    output = torch.randn(len(images), 10).log_softmax(1)
    history = [
        mnist_cnn.Epoch(i, 0.1 / i, 1 / i, 90 + i, 1 / i, 91 + i, 1)
        for i in range(1, 9)
    ]
    path = tmp_path / "report.png"
    mnist_cnn.draw_report(path, history, images, labels, output)
    assert path.read_bytes().startswith(b"\x89PNG")
    titles = [axis.get_title() for axis in drawn[0].axes]
    assert titles[:4] == ["loss", "accuracy in %", "learning rate", "confusion matrix"]
    assert all(re.match(r"\d as \d, \d+%", title) for title in titles[4:])
    assert len(titles) == 4 + 12
    low, high = drawn[0].axes[1].get_ylim()
    assert low > 90
    assert high < 100
