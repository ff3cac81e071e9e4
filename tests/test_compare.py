"""Comparing runs: statistics against scipy, the words for them, and adding seeds."""

import json
import re
import shutil
import sys

import pytest
from conftest import assert_one_line, result

import mnist_cnn


def verdict(first, second, confidence=0.95):
    """What the script says of two runs, each given as (n, mean, deviation)."""
    names = ("n", "mean", "deviation")
    runs = (dict(zip(names, run, strict=True)) for run in (first, second))
    return mnist_cnn.verdict(*runs, confidence)


# scipy.stats.ttest_ind(second, first, equal_var=False).confidence_interval(confidence),
# on samples with exactly these means and deviations.
@pytest.mark.parametrize(
    ("first", "second", "confidence", "half_width"),
    [
        ((5, 99.33, 0.06), (5, 99.56, 0.02), 0.95, 0.07325716591730015),
        ((5, 99.33, 0.06), (5, 99.38, 0.07), 0.975, 0.11404033772859355),
        ((2, 99.3, 0.05), (50, 99.4, 0.1), 0.95, 0.27003149404495513),
        ((7, 99.0, 0.0), (3, 99.2, 0.1), 0.95, 0.2484137711750385),
        ((2, 99.3, 0.05), (2, 99.31, 0.2), 0.95, 1.4314230499262264),
        ((10, 99.0, 0.3), (12, 98.0, 0.1), 0.99, 0.3099113599252201),
    ],
)
def test_the_interval_of_a_difference_is_welchs(first, second, confidence, half_width):
    text, _ = verdict(first, second, confidence)
    difference, found = map(float, re.match(r"(\S+) ± (\S+) ", text).groups())
    assert difference == pytest.approx(second[1] - first[1])
    assert found == pytest.approx(half_width, abs=6e-4)  # printed with three decimals


@pytest.mark.parametrize(
    ("mean", "word"), [(99.5, "better"), (99.1, "worse"), (99.31, "cannot tell")]
)
def test_a_difference_beyond_its_interval_has_a_word(mean, word):
    assert word in verdict((5, 99.3, 0.05), (5, mean, 0.05))[0]


# Solved for a power of 0.8 with scipy.stats.nct, as in Cohen's tables (1988).
@pytest.mark.parametrize(
    ("effect", "confidence", "seeds"),
    [(0.2, 0.95, 394), (0.5, 0.95, 64), (0.8, 0.95, 26), (1, 0.95, 17)],
)
def test_the_number_of_seeds_is_that_of_a_power_table(effect, confidence, seeds):
    text, found = verdict((2, 99, 1), (2, 99 + effect, 1), confidence)
    assert found == seeds
    assert f"cannot tell; about {seeds} seeds each would" in text


@pytest.mark.parametrize("difference", [0, 0.001])
def test_more_than_a_thousand_seeds_are_not_counted(difference):
    text, _ = verdict((5, 99, 0.1), (5, 99 + difference, 0.1))
    assert "more than 1,000 seeds" in text


@pytest.mark.parametrize("n", [1, 5])
def test_without_a_spread_there_is_no_verdict(n):
    assert "cannot tell" in verdict((n, 99.5, 0), (n, 99.6, 0))[0]


def test_the_seeds_that_would_tell_are_more_than_those_that_did_not():
    assert "about 3 seeds" in verdict((2, 99.35, 0.0707), (2, 99.65, 0.0707))[0]


@pytest.fixture
def other(trained, tmp_path):
    """Two copies, ``copy`` and ``other``, of a finished run of three seeds."""
    for name in ("copy", "other"):
        shutil.copytree(trained[0], tmp_path / name)
    return tmp_path / "other"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_flags(folder, **changes):
    """Change flags in a run's configuration; return what they were."""
    flags = json.loads((folder / "config.json").read_text())["flags"]
    edit(folder / "config.json", flags=flags | changes)
    return flags


def add(folder, points):
    """Raise the accuracy of a finished run."""
    accuracy = result(folder)["accuracy"]
    accuracy |= {"mean": accuracy["mean"] + points}
    edit(folder / "result.json", accuracy=accuracy)


def test_a_comparison_has_a_row_for_each_run_and_for_each_flag(call, other):
    add(other, 50)
    edit_flags(other, lr=0.5, recipe="best")
    process = call("--compare", "copy", "other")
    assert process.returncode == 0
    header, first, second, confidence, *flags = process.stdout.splitlines()
    assert "test accuracy" in header
    accuracy = result(other)["accuracy"]
    cell = rf" +3 +{accuracy['mean']:.2f} ± {accuracy['interval']:.2f} "
    assert re.match("other" + cell, second)
    assert re.match("copy +3 ", first)
    assert second.endswith("better")
    assert "95 %" in confidence
    assert [line.split() for line in flags] == [["lr", "0.015", "0.5"]]


def test_with_three_runs_each_interval_is_wider(call, other):
    two = call("--compare", "copy", "other").stdout
    three = call("--compare", "copy", "other", "other").stdout
    widths = [
        float(re.search(r"^other .* ± (\S+)  ", text, re.MULTILINE)[1])
        for text in (two, three)
    ]
    # scipy.stats.t.ppf(1 - 0.025 / 2, 4) / scipy.stats.t.ppf(1 - 0.05 / 2, 4)
    assert widths[1] / widths[0] == pytest.approx(3.495 / 2.776, rel=1e-3)
    assert "97.5 %" in three


def test_other_scripts_are_named(call, other):
    before = edit_flags(other, script="0badcafe")
    last = call("--compare", "copy", "other").stdout.splitlines()[-1]
    assert last.split() == ["script", before["script"], "0badcafe"]


def test_a_flag_that_only_one_run_has_is_listed(call, other):
    edit_flags(other, smoothing=0.1)
    last = call("--compare", "copy", "other").stdout.splitlines()[-1]
    assert last.split() == ["smoothing", "None", "0.1"]


def test_each_command_is_printed_once_with_the_most_seeds(call, other):
    add(other, 1)
    output = call("--compare", "copy", "other", "other").stdout
    commands = re.findall(r"^ +python .* --resume (\w+) --runs", output, re.MULTILINE)
    assert commands == ["copy", "other"]


def test_a_comparison_that_cannot_be_drawn_ends_in_one_line(call, other, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    process = call("--compare", "copy", "other", "--out", "both.png")
    assert_one_line(process, 1, "cannot draw both.png")
    assert "cannot tell" in process.stdout


def test_a_comparison_is_drawn_on_request(call, other, tmp_path):
    assert call("--compare", "copy", "other", "--out", "both.png").returncode == 0
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_of_one_run_gives_its_mean(call, other):
    output = call("--compare", "copy").stdout
    assert f"{result(other)['accuracy']['mean']:.2f} ± " in output


def test_results_on_other_images_are_not_compared(call, other):
    edit_flags(other, data=0)
    process = call("--compare", "copy", "other")
    assert_one_line(process, 1, "cannot compare other", "data", "copy")


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_run_that_lacks_a_file_is_named(call, other, name):
    (other / name).unlink()
    assert_one_line(call("--compare", "copy", "other"), 1, "cannot compare other")


def test_an_unfinished_run_is_named(call, other):
    edit(other / "config.json", runs=4)
    process = call("--compare", "copy", "other")
    assert_one_line(process, 1, "cannot compare other", "--resume", "seeds are missing")


def test_the_printed_command_adds_seeds_to_a_run_of_one(call, data, tmp_path):
    flags = ["--data-dir", data, "--epochs", 1, "--out"]
    for name in ("one", "other"):
        call(*flags, name)
    output = call("--compare", "one", "other").stdout
    assert "cannot tell" in output
    command = re.search(r"^ +python \S+ (--resume one .*)$", output, re.MULTILINE)[1]
    assert call(*command.split()).returncode == 0
    assert result(tmp_path / "one")["accuracy"]["n"] == 5


def test_fewer_seeds_than_a_run_has_are_refused(call, other):
    assert_one_line(call("--resume", "copy", "--runs", 2), 2, "--runs")
