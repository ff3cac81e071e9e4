"""The README: its commands run, its flags are those of --help, its snippet reads digits."""

import re
import shlex

import pytest
from conftest import SCRIPT, rows
from PIL import Image, ImageDraw, ImageOps

import mnist_cnn

README = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_every_command_runs(call, data):
    """In order, each training on small data for one epoch and with few seeds."""
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    commands = [line for line in commands if line.startswith("python mnist_cnn.py")]
    assert len(commands) >= 6
    for command in commands:
        flags = shlex.split(command, comments=True)[2:]
        if "--holdout" in flags:
            flags += ["--holdout", 100]
        if "--runs" in flags:
            flags += ["--runs", 3 if "--resume" in flags else 2]
        if not {"--resume", "--compare", "--evaluate"} & set(flags):
            flags += ["--epochs", 1]
        if not {"--resume", "--compare"} & set(flags):
            flags += ["--data-dir", data]
        process = call(*flags)
        assert process.returncode == 0, (command, process.stderr)


def test_the_commands_of_the_table_are_valid():
    commands = re.findall(r"^\| `python mnist_cnn.py(.*?)`", README, re.MULTILINE)
    recipes = [mnist_cnn.parse_arguments(shlex.split(flags)) for flags in commands]
    assert [args.recipe for args in recipes] == list(mnist_cnn.RECIPES)
    epochs = re.findall(r"^\| `python mnist_cnn.py.*?` \| (\d+) ", README, re.MULTILINE)
    assert [args.epochs for args in recipes] == [int(text) for text in epochs]


def test_the_spelt_out_recipes_set_the_same_flags():
    rows = re.findall(r"^\| `(\w+)` \| `(--.*)` \|$", README, re.MULTILINE)
    assert [name for name, _ in rows] == ["best", "quick"]
    for name, flags in rows:
        spelt_out = vars(mnist_cnn.parse_arguments(shlex.split(flags)))
        recipe = vars(mnist_cnn.parse_arguments(["--recipe", name]))
        assert spelt_out | {"recipe": name} == recipe


def test_the_flags_are_those_of_help(call):
    def flags(text):
        """Each flag with its help, however the lines are broken."""
        text = text[text.index("\nrecipe:") :]
        parts = [" ".join(part.split()) for part in re.split(r"\n  (?=-)", text)]
        # Python 3.10 gives the default of a switch twice.
        return [re.sub(r"(\(default: False\)) \1", r"\1", part) for part in parts]

    (listed,) = (text for text in blocks("text") if "usage:" in text)
    assert flags(listed) == flags(call("--help").stdout)


def test_the_shown_output_has_the_shape_of_the_real_one():
    (shown,) = (text for text in blocks("text") if "epoch        lr" in text)
    assert len(rows(shown)) >= 3


def test_links_lead_to_files_and_headings():
    headings = re.findall(r"^## (.*)$", README, re.MULTILINE)
    anchors = {
        "#" + re.sub("[^a-z -]", "", h.lower()).replace(" ", "-") for h in headings
    }
    targets = re.findall(r"\]\(([^)]+)\)", README)
    for target in {*targets, *re.findall(r'src="([^"]+)"', README)} - anchors:
        assert target.startswith("https://") or (SCRIPT.parent / target).exists()


# Digits as strokes: points on a grid 10 wide and 15 high, in hexadecimal.
STROKES = {
    0: "50 22 17 2c 5e 8c 97 82 50",
    1: "50 5e",
    2: "13 30 70 93 86 1e 9e",
    3: "11 40 81 85 47 88 9b 6e 1d",
    4: "30 18 98,72 6e",
    5: "90 20 26 65 98 8c 5e 1d",
    6: "70 34 1a 3e 7e 9b 78 38 1a",
    7: "10 90 5e",
    8: "57 25 22 50 82 85 57 29 1c 5e 9c 89 57",
    9: "94 67 26 13 30 70 93 94 7e",
}


def draw(digit, scale, width, left, top):
    """A drawing of light strokes on dark, ``scale`` pixels for a step of the grid."""
    picture = Image.new("L", (240, 200))
    pen = ImageDraw.Draw(picture)
    for stroke in STROKES[digit].split(","):
        points = [[int(axis, 16) * scale for axis in point] for point in stroke.split()]
        points = [(left + x, top + y) for x, y in points]
        pen.line(points, 255, width, joint="curve")
        for x, y in points:
            box = (x - width / 2, y - width / 2, x + width / 2, y + width / 2)
            pen.ellipse(box, 255)
    return picture


@pytest.mark.parametrize(
    ("scale", "width", "left", "top", "dark_on_light"),
    [
        (10, 6, 70, 30, False),
        (10, 18, 110, 20, False),
        (9, 12, 20, 50, True),
        (5, 7, 150, 100, True),
    ],
    ids=["thin", "thick", "dark on light", "small"],
)
def test_the_snippet_reads_drawn_digits(
    real_run, tmp_path, monkeypatch, capsys, scale, width, left, top, dark_on_light
):
    monkeypatch.chdir(tmp_path)
    (code,) = (block for block in blocks("python") if "digit.png" in block)
    assert len([line for line in code.splitlines() if line]) <= 12
    code = code.replace("runs/NAME/seed-1/final.pt", str(real_run / "final.pt"))
    right = 0
    for digit in STROKES:
        picture = draw(digit, scale, width, left, top)
        picture = ImageOps.invert(picture) if dark_on_light else picture
        picture.convert("RGB").save("digit.png")
        exec(code, {})  # noqa: S102
        right += int(capsys.readouterr().out) == digit
    assert right >= 9
