"""Comparing runs: statistics against scipy, the words for them, and the table."""

import json
import re

import pytest
import torch
from conftest import assert_one_line


def sample(n, mean, deviation):
    """Return n numbers with exactly this mean and standard deviation."""
    numbers = torch.arange(n, dtype=torch.float64)
    numbers -= numbers.mean()
    scale = deviation / numbers.std() if deviation else 0
    return (mean + numbers * scale).tolist()


@pytest.fixture
def compare(call, tmp_path):
    """Compare finished runs, run-1 and so on, that have these accuracies."""

    def compare_runs(*runs):
        names = [f"run-{number}" for number in range(1, 1 + len(runs))]
        for name, accuracies in zip(names, runs, strict=True):
            for seed, accuracy in enumerate(accuracies, 1):
                path = tmp_path / name / f"seed-{seed}" / "result.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"accuracy": accuracy}))
            config = {"seed": 1, "runs": len(accuracies), "data": 5}
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        return call("--compare", *names)

    return compare_runs


def rows(process):
    """The table's rows: name, n, mean and interval, strip, words."""
    assert process.returncode == 0, process.stderr
    pattern = r"^(\S+) +(\d+)  (\S+(?: ± \S+)?) +\|(.{24})\|(?:  (.*))?$"
    return re.findall(pattern, process.stdout, re.MULTILINE)


@pytest.fixture
def verdict(compare):
    """The words for the difference of two runs."""
    return lambda *runs: rows(compare(*runs))[1][4]


# scipy.stats.ttest_ind(second, first, equal_var=False).confidence_interval(level)
@pytest.mark.parametrize(
    ("first", "second", "level", "half_width", "word"),
    [
        ((5, 33, 6), (5, 56, 2), 95, 7.325716591730015, "better"),
        ((5, 33, 6), (5, 38, 7), 97.5, 11.404033772859355, "cannot tell"),
        ((2, 30, 5), (50, 40, 10), 95, 27.003149404495513, "cannot tell"),
        ((7, 0, 0), (2, 20, 10), 95, 89.84643530730345, "cannot tell"),
        ((7, 0, 0), (3, 20, 10), 95, 24.84137711750385, "cannot tell"),
        ((10, 99, 30), (12, 0, 10), 99, 30.99113599252201, "worse"),
    ],
)
def test_a_verdict_is_welchs_interval_of_the_difference_and_a_word(
    compare, first, second, level, half_width, word
):
    others = round(5 / (100 - level))  # for so many differences, by Bonferroni
    process = compare(sample(*first), *[sample(*second)] * others)
    assert f"difference from the first ({level} % CI)" in process.stdout
    difference = second[1] - first[1]
    expected = f"{difference:+.3f} ± {half_width:.3f}  {word}"
    for row in rows(process)[1:]:
        assert row[4].startswith(expected)


# Solved for a power of 0.8 with scipy.stats.nct; the last is more than did not tell.
@pytest.mark.parametrize(
    ("effect", "seeds"), [(0.2, 394), (0.5, 64), (0.8, 26), (4.2, 3)]
)
def test_the_number_of_seeds_is_that_of_a_power_table(verdict, effect, seeds):
    text = verdict(sample(2, 99, 1), sample(2, 99 + effect, 1))
    assert text.endswith(f"cannot tell; about {seeds} seeds each would")


def test_equal_results_are_no_difference_and_ask_for_no_seeds(verdict):
    values = sample(5, 99.3, 0.05)
    assert verdict(values, values[::-1]) == "no difference"
    assert verdict([99.1, 99.2, 99.3], [99.1, 99.3]) == "no difference"


def test_without_a_spread_there_is_no_verdict(verdict):
    assert "cannot tell" in verdict([99.5], [99.5, 99.6])
    assert "cannot tell" in verdict([99.5] * 5, [99.6] * 5)


def test_each_run_has_a_row_and_its_interval_a_strip_on_one_scale(compare):
    process = compare([97.0, 97.1, 97.2], [99.0, 99.1, 99.2], [99.5])
    assert "test accuracy" in process.stdout.splitlines()[0]
    # 0.1 / 3 ** 0.5 * scipy.stats.t.ppf(0.975, 2)
    assert [row[:4] for row in rows(process)] == [
        ("run-1", "3", "97.10 ± 0.25", "--o--                   "),
        ("run-2", "3", "99.10 ± 0.25", "                 ---o-- "),
        ("run-3", "1", "99.50", "                       o"),
    ]


def test_results_on_other_images_are_not_compared(compare, call, tmp_path):
    compare([99.0], [99.1])
    (tmp_path / "run-2" / "config.json").write_text('{"seed": 1, "runs": 1, "data": 6}')
    process = call("--compare", "run-1", "run-2")
    assert_one_line(process, 1, "not the same data", "--holdout")


def test_a_run_that_lacks_a_result_is_named(compare, call, tmp_path):
    compare([99.0], [99.1, 99.2])
    (tmp_path / "run-2" / "seed-2" / "result.json").unlink()
    assert_one_line(call("--compare", "run-1", "run-2"), 1, "run-2", "seed-2")
