"""Comparing runs: statistics against scipy, the words for them, and the table."""

import json
import re
import shutil

import pytest
import torch
from conftest import assert_one_line

import mnist_cnn
from mnist_cnn import verdict


def sample(n, mean, deviation):
    """Return n numbers with exactly this mean and standard deviation."""
    numbers = torch.arange(n, dtype=torch.float64)
    numbers -= numbers.mean()
    scale = deviation / numbers.std() if deviation else 0
    return (mean + numbers * scale).tolist()


# scipy.stats: t.ppf(0.5 + confidence / 2, freedom)
@pytest.mark.parametrize(
    ("freedom", "confidence", "expected"),
    [
        (1, 0.95, 12.706204736174694),
        (4, 0.95, 2.7764451051977934),
        (5.5, 0.95, 2.501858617589239),
        (99, 0.95, 1.9842169515086827),
        (9, 0.99, 3.2498355415921263),
    ],
)
def test_students_t_agrees_with_scipy(freedom, confidence, expected):
    found = mnist_cnn.student_t(freedom, confidence)
    assert found == pytest.approx(expected, rel=1e-4)


# scipy.stats.ttest_ind(second, first, equal_var=False).confidence_interval(confidence)
@pytest.mark.parametrize(
    ("first", "second", "confidence", "half_width"),
    [
        ((5, 99.33, 0.06), (5, 99.56, 0.02), 0.95, 0.07325716591730015),
        ((5, 99.33, 0.06), (5, 99.38, 0.07), 0.975, 0.11404033772859355),
        ((2, 99.3, 0.05), (50, 99.4, 0.1), 0.95, 0.27003149404495513),
        ((7, 99.0, 0.0), (3, 99.2, 0.1), 0.95, 0.2484137711750385),
        ((10, 99.0, 0.3), (12, 98.0, 0.1), 0.99, 0.3099113599252201),
    ],
)
def test_the_interval_of_a_difference_is_welchs(first, second, confidence, half_width):
    text = verdict(sample(*first), sample(*second), confidence)
    difference, found = map(float, re.match(r"(\S+) ± (\S+) ", text).groups())
    assert difference == pytest.approx(second[1] - first[1])
    assert found == pytest.approx(half_width, abs=6e-4)  # printed with three decimals


def test_a_difference_beyond_its_interval_has_a_word():
    for mean, words in (99.5, "better"), (99.1, "worse"), (99.31, "cannot tell"):
        assert words in verdict(sample(5, 99.3, 0.05), sample(5, mean, 0.05), 0.95)


# Solved for a power of 0.8 with scipy.stats.nct, as in Cohen's tables (1988).
@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 394), (0.5, 64), (0.8, 26)])
def test_the_number_of_seeds_is_that_of_a_power_table(effect, seeds):
    text = verdict(sample(2, 99, 1), sample(2, 99 + effect, 1), 0.95)
    assert text.endswith(f"cannot tell; about {seeds} seeds each would")


def test_the_seeds_that_would_tell_are_more_than_those_that_did_not():
    text = verdict(sample(2, 99.35, 0.0707), sample(2, 99.65, 0.0707), 0.95)
    assert "about 3 seeds" in text


def test_equal_results_are_no_difference_and_ask_for_no_seeds():
    values = sample(5, 99.3, 0.05)
    assert verdict(values, values[::-1], 0.95) == "no difference"
    assert verdict([99.1, 99.2, 99.3], [99.1, 99.3], 0.95) == "no difference"


def test_without_a_spread_there_is_no_verdict():
    assert "cannot tell" in verdict([99.5], [99.5, 99.6], 0.95)
    assert "cannot tell" in verdict([99.5] * 5, [99.6] * 5, 0.95)


@pytest.fixture
def other(trained, tmp_path):
    """Two copies, ``copy`` and ``other``, of a finished run of three seeds."""
    for name in ("copy", "other"):
        shutil.copytree(trained[0], tmp_path / name)
    return tmp_path / "other"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def set_accuracies(folder, values):
    for seed, value in zip((5, 6, 7), values, strict=True):
        edit(folder / f"seed-{seed}" / "result.json", accuracy=value)


def rows(process):
    """The table's rows: name, n, mean and interval, words."""
    pattern = r"^(\S+) +(\d+)  (\S+(?: ± \S+)?)(?:  (.*))?$"
    return re.findall(pattern, process.stdout, re.MULTILINE)


def test_a_comparison_has_a_row_for_each_run(call, other):
    set_accuracies(other.parent / "copy", [97.0, 97.1, 97.2])
    set_accuracies(other, [99.0, 99.1, 99.2])
    process = call("--compare", "copy", "other")
    assert process.returncode == 0, process.stderr
    assert "test accuracy" in process.stdout.splitlines()[0]
    first, second = rows(process)
    # 0.1 / 3 ** 0.5 * scipy.stats.t.ppf(0.975, 2)
    assert first[:3] == ("copy", "3", "97.10 ± 0.25")
    assert second[:3] == ("other", "3", "99.10 ± 0.25")
    assert second[3].startswith("+2.000 ± ") and second[3].endswith("better")


def test_with_three_runs_each_interval_is_wider(call, other):
    set_accuracies(other, [99.0, 99.1, 99.2])
    two = call("--compare", "copy", "other")
    three = call("--compare", "copy", "other", "other")
    widths = [float(re.match(r"\S+ ± (\S+)", rows(p)[1][3])[1]) for p in (two, three)]
    assert widths[1] > 1.2 * widths[0]
    assert "97.5 % of a difference" in three.stdout


def test_a_comparison_of_one_run_gives_its_mean(call, other):
    set_accuracies(other, [99.0, 99.1, 99.2])
    assert [row[1:3] for row in rows(call("--compare", "other"))] == [
        ("3", "99.10 ± 0.25")
    ]


def test_one_seed_has_no_interval(call, other):
    edit(other / "config.json", runs=1)
    edit(other / "seed-5" / "result.json", accuracy=99.0)
    assert [row[1:3] for row in rows(call("--compare", "other"))] == [("1", "99.00")]


def test_results_on_other_images_are_not_compared(call, other):
    edit(other / "config.json", data=0)
    process = call("--compare", "copy", "other")
    assert_one_line(process, 1, "not the same data", "--holdout")


def test_a_run_that_lacks_a_result_is_named(call, other):
    (other / "seed-6" / "result.json").unlink()
    assert_one_line(call("--compare", "copy", "other"), 1, "other", "seed-6")
