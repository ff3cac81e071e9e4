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
    return (mean + deviation * numbers / numbers.std()).tolist()


@pytest.fixture
def compare(call, tmp_path):
    """Compare finished runs, run-1 and so on, that have these accuracies."""

    def compare_runs(*runs, settings=None):
        names = [f"run-{number}" for number in range(1, 1 + len(runs))]
        settings = settings or [{}] * len(runs)
        for name, accuracies, config in zip(names, runs, settings, strict=True):
            for seed, accuracy in enumerate(accuracies, 1):
                folder = tmp_path / name / f"seed-{seed}"
                folder.mkdir(parents=True)
                (folder / "result.json").write_text(json.dumps({"accuracy": accuracy}))
            config = {"runs": len(accuracies), "data": 5} | config
            (tmp_path / name / "config.json").write_text(json.dumps(config))
            (tmp_path / name / "mnist_cnn.py").write_text(config.get("script", ""))
        return call("--compare", *names)

    return compare_runs


def rows(process):
    """The table's rows: name, n, mean and interval, difference and word, settings."""
    assert process.returncode == 0, process.stderr
    head, *lines = process.stdout.splitlines()
    starts = [title.start() for title in re.finditer(r"\S+( \S+)*", head)]
    columns = [slice(a, b) for a, b in zip(starts, [*starts[1:], None])]
    return [[line[column].strip() for column in columns] for line in lines]


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
        ((3, 99, 0.5), (5, 99, 0.5), 95, 0.9833289242949909, "cannot tell"),
    ],
)
def test_a_difference_has_welchs_interval_and_a_word(
    compare, first, second, level, half_width, word
):
    others = round(5 / (100 - level))  # for so many differences, by Bonferroni
    process = compare(sample(*first), *[sample(*second)] * others)
    assert f"difference from the first ({level} % CI)" in process.stdout
    difference = second[1] - first[1]
    expected = f"{difference:+.3f} ± {half_width:.3f}  {word}"
    assert [row[3] for row in rows(process)] == ["", *[expected] * others]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([99.5] * 5, [99.6] * 3, "+0.100  cannot tell: no spread"),
        ([99.5] * 5, [99.5] * 3, "no difference"),
        ([99.5], [99.5, 99.7], "+0.100  cannot tell: one seed"),
        ([99.5], [99.5], "+0.000  cannot tell: one seed"),
    ],
)
def test_equal_results_or_one_seed_have_no_interval(compare, first, second, words):
    assert rows(compare(first, second))[1][3] == words


def test_each_run_has_a_row_whose_columns_hold_for_every_accuracy(compare):
    process = compare([100.0, 100.0], [9.8, 22.0], [99.5], [97.0, 97.1, 97.2])
    assert "test accuracy" in process.stdout.splitlines()[0]
    # deviation / n ** 0.5 * scipy.stats.t.ppf(0.975, n - 1)
    assert [row[:3] for row in rows(process)] == [
        ["run-1", "2", "100.00 ± 0.00"],
        ["run-2", "2", "15.90 ± 77.51"],
        ["run-3", "1", "99.50"],
        ["run-4", "3", "97.10 ± 0.25"],
    ]


def test_a_row_names_the_settings_that_are_not_the_same_in_all_runs(compare):
    first = {"epochs": 2, "weight_decay": 0.0, "tta": False, "out": "run-1"}
    second = {"epochs": 2, "weight_decay": 5e-4, "tta": True, "out": None}
    third = first | {"yours": [1, 2], "out": "run-3"}
    table = rows(compare([99.0], [99.1], [99.2], settings=[first, second, third]))
    assert [row[4] for row in table] == [
        "--weight-decay 0.0",
        "--tta  --weight-decay 0.0005",
        "--weight-decay 0.0  --yours [1, 2]",
    ]


def test_a_row_says_that_a_run_is_of_another_script(compare):
    settings = [{"script": "# mine"}, {"script": "# mine"}, {"script": "# yours"}]
    table = rows(compare([99.0], [99.1], [99.2], settings=settings))
    assert ["another mnist_cnn.py" in row[4] for row in table] == [False, False, True]


def test_results_on_other_images_are_not_compared(compare):
    process = compare([99.0], [99.1], settings=[{}, {"data": 6}])
    assert_one_line(process, 1, "not the same data", "--holdout")


def test_an_unfinished_run_is_compared_with_the_seeds_that_it_has(compare):
    process = compare([99.0], [99.1, 99.2], settings=[{}, {"runs": 5}])
    assert rows(process)[1][:3] == ["run-2", "2", "99.15 ± 0.64"]
    assert rows(process)[1][4] == "3 of 5 not finished"


def test_a_run_without_a_finished_seed_is_named_and_left_out(compare, call, tmp_path):
    compare([99.0], [99.1], [99.2])
    (tmp_path / "run-1" / "seed-1" / "result.json").unlink()
    process = call("--compare", "run-1", "run-2", "run-3")
    assert [row[0] for row in rows(process)] == ["run-2", "run-3"]
    assert process.stderr.startswith("mnist_cnn.py: warning: run-1 has no result")
    assert_one_line(call("--compare", "run-1"), 1, "run-1", "1 of 1 not finished")
