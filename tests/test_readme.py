"""The README: its commands run, its output has the shape of the real one."""

import itertools
import re
import shlex
from argparse import Namespace

import pytest
from benchmark import VARIANTS
from conftest import SCRIPT

import mnist_cnn

README = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")


def shown(words):
    """The one block of output that holds these words."""
    blocks = re.findall(r"^```text\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    (text,) = (text for text in blocks if words in text)
    return text


def shape(line):
    """Numbers, words and drawings do not matter, nor how wide a column is."""
    line = re.sub(r"^[ .:=+*#%@-]+$", "drawing", line)
    line = re.sub(r"(runs/[\d-]{17})-[0-9a-f]{6}", r"\1", line)
    line = re.sub(r"[-+]?\d[\d.,e-]*", "0", line)
    line = re.sub(r"(0 ± 0  )?(better|worse|no difference|cannot tell)", "word", line)
    return re.sub(r" +", " ", line)


def test_every_command_runs_and_the_shown_output_has_its_shape(call, data, photo):
    commands = re.findall(r"^python mnist_cnn.py.*", README, re.MULTILINE)
    assert len(commands) >= 9
    printed = []
    for command in commands:
        flags = shlex.split(command, comments=True)[2:]
        if "--holdout" in flags:
            flags += ["--holdout", 100]
        if "--runs" in flags:
            flags += ["--runs", 3 if "--resume" in flags else 2]
        if not {"--resume", "--compare", "--evaluate"} & set(flags):
            flags += ["--epochs", 1]
        if not {"--resume", "--compare", "--predict"} & set(flags):
            flags += ["--data-dir", data]
        process = call(*flags)
        assert process.returncode == 0, (command, process.stderr)
        printed += process.stdout.splitlines()
    shapes = [shape(line) for line in printed]
    for words in ("eval_loss", "runs/lr", "photo.jpg"):
        for line in shown(words).splitlines():
            assert shape(line) in shapes
    assert shown("eval_loss").splitlines()[0] in printed


def test_the_commands_of_the_table_are_valid():
    commands = re.findall(r"\n\| `python mnist_cnn.py(.*?)` \| (\d+) ", README)
    assert len(commands) == 4
    for flags, epochs in commands:
        assert mnist_cnn.parse_arguments(shlex.split(flags)).epochs == int(epochs)


def test_the_spelt_out_recipes_set_the_same_flags():
    recipes = re.findall(r"^\| `(\w+)` \| `(--.*)` \|$", README, re.MULTILINE)
    assert [name for name, _ in recipes] == ["best", "quick"]
    for name, flags in recipes:
        spelt_out = vars(mnist_cnn.parse_arguments(shlex.split(flags)))
        recipe = vars(mnist_cnn.parse_arguments(["--recipe", name]))
        assert spelt_out | {"recipe": name} == recipe


def test_the_flags_are_those_of_help(call):
    def flags(text):
        text = text[text.index("options:") :]  # its lines may be broken anywhere
        return [" ".join(part.split()) for part in re.split(r"\n  (?=-)", text)]

    assert flags(shown("options:")) == flags(call("--help").stdout)


def test_links_lead_to_files_and_headings():
    targets = re.findall(r"(?:\]\(|src=\")([^)\"]+)", README)
    headings = re.findall(r"^## (.*)$", README.lower(), re.MULTILINE)
    anchors = {f"#{re.sub('[^a-z -]', '', x).replace(' ', '-')}" for x in headings}
    for target in {*targets} - anchors:
        assert target.startswith("https://") or (SCRIPT.parent / target).exists()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_for_more_steps_than_an_epoch_has(variant, data):
    make, option = VARIANTS[variant]
    training = make(Namespace(device="cpu", data_dir=str(data)), option)
    assert len(list(itertools.islice(training, 7))) == 7  # an epoch has 5
