"""--predict reads digits as people draw and photograph them, and says so if it cannot."""

import io
import itertools
import random
import re

import pytest
from conftest import assert_one_line
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageOps

# Digits as strokes: points on a grid 10 wide and 15 high, in hexadecimal.
ANGULAR = {
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
ROUND = {
    0: "60 31 14 08 0b 2d 4e 7d 9a a6 93 81 60",
    1: "24 70 5e",
    2: "13 21 40 70 82 84 67 3b 1e 4d 7e 9d",
    3: "12 30 60 82 83 65 46 66 88 9a 8c 6e 3e 1c",
    4: "40 27 19 59 99,62 5e",
    5: "30 25 45 76 98 9a 8c 6e 3e 1c,30 90",
    6: "80 51 24 18 1b 2d 4e 6e 8c 8a 79 58 39 1b",
    7: "11 40 90 74 57 4e,37 77",
    8: "81 50 31 23 35 67 89 8c 6e 4e 2c 29 47 75 83 81",
    9: "93 71 41 23 25 37 57 85 93 8a 7e",
}
SIZE = (400, 500)


def rounded(points):
    """Cut the corners of a stroke twice (Chaikin)."""
    for _ in range(2):
        cut = [points[0]]
        for (a, b), (c, d) in itertools.pairwise(points):
            cut += [(0.75 * a + 0.25 * c, 0.75 * b + 0.25 * d)]
            cut += [(0.25 * a + 0.75 * c, 0.25 * b + 0.75 * d)]
        points = [*cut, points[-1]]
    return points


def ink(strokes, pen=22, height=280, left=120, top=100):
    """A picture of light strokes on black: pen and height in pixels."""
    picture = Image.new("L", SIZE)
    draw, scale = ImageDraw.Draw(picture), height / 14
    for stroke in strokes.split(","):
        points = [(int(x, 16) * scale, int(y, 16) * scale) for x, y in stroke.split()]
        points = [(left + x, top + y) for x, y in points]
        points = rounded(points) if strokes in ROUND.values() else points
        draw.line(points, 255, pen, joint="curve")
        for x, y in points:
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), 255)
    return picture


def paper(light, other=None):
    """Paper of a grey value, or from one on the left to another on the right."""
    slope = Image.linear_gradient("L").rotate(90).resize(SIZE)
    other = light if other is None else other
    return slope.point(lambda value: light + (other - light) * value / 255)


def shadow():
    edge = Image.new("L", SIZE)
    ImageDraw.Draw(edge).polygon([(0, 0), (240, 0), (140, 500), (0, 500)], 255)
    edge = edge.filter(ImageFilter.GaussianBlur(10))
    return Image.composite(paper(90), paper(200), edge)


def soft(light):
    spot = paper(150)
    ImageDraw.Draw(spot).ellipse((120, 150, 280, 350), light)
    return photograph(
        Image.new("L", SIZE), spot.filter(ImageFilter.GaussianBlur(25)), noise=3
    )


def lines():
    picture = paper(215)
    for y in range(60, 500, 125):
        ImageDraw.Draw(picture).line([(0, y), (400, y)], 170, 3)
    return picture


def photograph(mask, background, colour=20, noise=6):
    """Ink of a grey value on paper, a little blurred and noisy."""
    mask = mask.filter(ImageFilter.GaussianBlur(1))
    picture = Image.composite(Image.new("L", mask.size, colour), background, mask)
    return ImageChops.add(picture, Image.effect_noise(mask.size, noise), 1, -128)


def specks(mask):
    picture, place = photograph(mask, paper(200)), random.Random(1)
    for _ in range(25):
        x, y, size = place.randrange(400), place.randrange(500), place.randrange(1, 5)
        ImageDraw.Draw(picture).ellipse((x, y, x + 2 * size, y + 2 * size), 60)
    return picture


def transparent(strokes, colour):
    picture = Image.new("RGB", SIZE, (colour,) * 3)
    picture.putalpha(ink(strokes))
    return picture


def turned_by_a_phone(strokes):
    picture = photograph(ink(strokes), paper(150, 210)).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x112] = 6  # orientation: to be turned by a quarter, clockwise
    picture.save(file := io.BytesIO(), "JPEG", exif=exif)
    return file.getvalue()


KINDS = {
    "dark on light": lambda digit: ImageOps.invert(ink(digit)),
    "light on dark": ink,
    "thick marker": lambda digit: photograph(ink(digit, 55, 250), paper(225)),
    "thin pen": lambda digit: photograph(ink(digit, 6), paper(225), colour=60),
    "grey paper": lambda digit: photograph(ink(digit), paper(120)),
    "even light": lambda digit: photograph(ink(digit), paper(210)),
    "light from one side": lambda digit: photograph(ink(digit), paper(80, 230)),
    "a shadow across": lambda digit: photograph(ink(digit), shadow()),
    "ruled paper": lambda digit: photograph(ink(digit), lines()),
    "EXIF 6": turned_by_a_phone,
    "transparent, black ink": lambda digit: transparent(digit, 0),
    "transparent, white ink": lambda digit: transparent(digit, 255),
    "near the border": lambda digit: photograph(
        ink(digit, 18, 200, 12, 14), paper(190)
    ),
    "specks": lambda digit: specks(ink(digit)),
    "3000 x 4000": lambda digit: photograph(ink(digit), paper(210)).resize(
        (3000, 4000)
    ),
    "28 x 28": lambda digit: ink(digit, 34, 340, 90, 80).resize(
        (28, 28), box=(0, 50, 400, 450)
    ),
}


def save(picture, path):
    path.write_bytes(picture) if isinstance(picture, bytes) else picture.save(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_nine_of_ten_digits_are_read(real_run, call, tmp_path, kind):
    for hand, digits in (("angular", ANGULAR), ("round", ROUND)):
        suffix = "jpg" if kind in ("EXIF 6", "3000 x 4000") else "png"
        pictures = [
            save(KINDS[kind](strokes), tmp_path / f"{hand}-{digit}.{suffix}")
            for digit, strokes in digits.items()
        ]
        process = call("--evaluate", real_run / "final.pt", "--predict", *pictures)
        assert process.returncode == 0, process.stderr
        read = re.findall(r"-(\d)\.\w+: (\d) \(\d+\.\d%\)", process.stdout)
        assert len(read) == 10
        assert sum(drawn == seen for drawn, seen in read) >= 9, (hand, read)


def test_what_the_network_sees_is_shown(real_run, call, tmp_path):
    """A zero in the middle: ink all around, none inside; two rows of pixels a line."""
    path = save(KINDS["dark on light"](ANGULAR[0]), tmp_path / "zero.png")
    process = call("--evaluate", real_run / "final.pt", "--predict", path)
    *shown, result = process.stdout.splitlines()
    assert result.startswith(f"{path}: 0 (")
    assert [len(line) for line in shown] == [28] * 14
    assert shown[0].isspace() and shown[13].isspace()
    assert re.fullmatch(r" +\S+ +\S+ +", shown[7])


def test_a_doubtful_digit_has_a_runner_up(real_run, call, tmp_path):
    blob = Image.new("L", SIZE)
    ImageDraw.Draw(blob).polygon([(120, 90), (300, 120), (260, 400), (150, 380)], 255)
    path = save(blob, tmp_path / "blob.png")
    process = call("--evaluate", real_run / "final.pt", "--predict", path)
    text = process.stdout.splitlines()[-1]
    share = float(re.search(r": \d \((\d+\.\d)%\)", text)[1])
    assert (", or " in text) == (share < 90)


def test_a_thin_upright_line_is_a_one(real_run, call, tmp_path):
    picture = Image.new("L", (800, 600), 240)
    ImageDraw.Draw(picture).line((400, 100, 400, 500), 20, 4)
    path = save(picture, tmp_path / "one.png")
    process = call("--evaluate", real_run / "final.pt", "--predict", path)
    assert f"{path}: 1 (" in process.stdout, process.stderr


BLANK = {
    "white": lambda: paper(255),
    "black": lambda: paper(0),
    "noisy": lambda: photograph(Image.new("L", SIZE), paper(200), noise=12),
    "light from one side": lambda: photograph(Image.new("L", SIZE), paper(60, 230)),
    "a shadow": lambda: photograph(Image.new("L", SIZE), shadow()),
    "a soft shadow": lambda: soft(60),
    "the light of a lamp": lambda: soft(250),
    "lines": lambda: photograph(Image.new("L", SIZE), lines()),
    "specks": lambda: specks(Image.new("L", SIZE)),
    "transparent": lambda: Image.new("RGBA", SIZE),
    "one pixel": lambda: Image.new("L", (1, 1)),
}


@pytest.mark.parametrize("kind", BLANK)
def test_no_digit_is_printed_for_a_blank_page(real_run, call, tmp_path, kind):
    path = save(BLANK[kind](), tmp_path / "blank.png")
    process = call("--evaluate", real_run / "final.pt", "--predict", path)
    assert_one_line(process, 1, path, "no digit")
    assert process.stdout == ""


def test_what_is_no_picture_is_named_and_the_others_are_read(real_run, call, tmp_path):
    good = save(ink(ANGULAR[7]), tmp_path / "good.png")
    bad = [tmp_path / "missing.png", save(b"text", tmp_path / "text.png"), tmp_path]
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    bad.append(tmp_path / "cut.png")
    weights = real_run / "final.pt"
    process = call("--evaluate", weights, "--predict", *bad, good, "--tta")
    assert process.returncode == 1
    errors = process.stderr.splitlines()
    assert len(errors) == len(bad)
    for path, error in zip(bad, errors, strict=True):
        assert error.startswith(f"mnist_cnn.py: error: {path}: ")
    assert f"{good}: 7 (" in process.stdout


def test_predicting_without_weights_is_refused(call):
    assert_one_line(call("--predict", "x.png"), 2, "--evaluate FILE")
