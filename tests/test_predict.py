"""--predict reads digits as people draw and photograph them, and says so if it cannot."""

import random
import re

import numpy as np
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


def ink(strokes, pen=22, height=280, left=120, top=100):
    """A picture of light strokes on black: pen and height in pixels."""
    picture = Image.new("L", SIZE)
    draw, scale = ImageDraw.Draw(picture), height / 14
    for stroke in strokes.split(",") if strokes else []:
        points = [(int(x, 16), int(y, 16)) for x, y in stroke.split()]
        points = [(left + x * scale, top + y * scale) for x, y in points]
        draw.line(points, 255, pen, joint="curve")
        for x, y in points:
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), 255)
    return picture


def paper(light, shade=0, shapes=(), blur=0):
    """Paper of a grey value, with polygons of another that are blurred."""
    picture = Image.new("L", SIZE, light)
    for shape in shapes:
        ImageDraw.Draw(picture).polygon(shape, shade)
    return picture.filter(ImageFilter.GaussianBlur(blur))


EVEN = paper(210)


def photograph(mask, background=EVEN, colour=20, noise=6):
    """Ink of a grey value on paper, a little blurred and noisy."""
    mask = mask.filter(ImageFilter.GaussianBlur(1))
    picture = Image.composite(Image.new("L", mask.size, colour), background, mask)
    grain = np.random.default_rng(0).normal(0, noise, picture.size[::-1])
    return Image.fromarray((picture + grain).clip(0, 255).astype("uint8"))


def transparent(mask, colour):
    picture = Image.new("RGB", SIZE, (colour,) * 3)
    picture.putalpha(mask)
    return picture


def turned_by_a_phone(picture):
    turned = picture.rotate(90, expand=True)
    turned.getexif()[0x112] = 6  # orientation: to be turned by a quarter, clockwise
    return turned


place = random.Random(1)
DOTS = [(place.randrange(400), place.randrange(500)) for _ in range(25)]
SPECKS = [[(x, y), (x + 5, y), (x + 5, y + 5), (x, y + 5)] for x, y in DOTS]
LINES, LOWER = (
    [[(0, y), (400, y), (400, y + 2), (0, y + 2)] for y in range(start, 500, 125)]
    for start in (59, 60)
)
COLUMNS = [[(x, 0), (x, 500), (x + 2, 500), (x + 2, 0)] for x in range(49, 400, 100)]
SPOT = [[(120, 150), (280, 150), (280, 350), (120, 350)]]
SLOPE = Image.linear_gradient("L").rotate(90).resize(SIZE)
UNEVEN = SLOPE.point(lambda value: 80 + value * 150 / 255)
PAPERS = {
    "white paper": paper(255),
    "even light": EVEN,
    "grey paper": paper(120),
    "light from one side": UNEVEN,
    "a shadow across": paper(200, 90, [[(0, 0), (240, 0), (140, 500), (0, 500)]], 10),
    "a soft shadow": paper(150, 90, SPOT, 25),
    "the light of a lamp": paper(120, 190, SPOT, 25),
    "a dark corner": paper(200, 60, [[(300, 500), (400, 500), (400, 390)]], 3),
    "ruled paper": paper(215, 170, LINES),
    "ruled paper, a pixel lower": paper(215, 170, LOWER),
    "squared paper": paper(215, 130, LINES + COLUMNS),
    "specks": paper(200, 60, SPECKS),
}
OTHERS = {
    "dark on light": lambda digit: ImageOps.invert(ink(digit)),
    "light on dark": ink,
    "thick marker": lambda digit: photograph(ink(digit, 55, 250)),
    "bold": lambda digit: photograph(ink(digit, 65, 300)),
    "partly faint": lambda digit: photograph(ImageChops.multiply(ink(digit), UNEVEN)),
    "thin pen": lambda digit: photograph(ink(digit, 6), colour=60),
    "EXIF 6": lambda digit: turned_by_a_phone(photograph(ink(digit))),
    "transparent, black ink": lambda digit: transparent(ink(digit), 0),
    "transparent, white ink": lambda digit: transparent(ink(digit), 255),
    "near the border": lambda digit: photograph(ink(digit, 18, 200, 12, 14)),
    "3000 x 4000": lambda digit: photograph(ink(digit)).resize((3000, 4000)),
    "16 bits": lambda digit: Image.fromarray(np.uint16(ink(digit)) * 257),
    "floats": lambda digit: Image.fromarray(np.float32(ink(digit)) / 255),
    "12 bits": lambda digit: Image.fromarray(np.uint16(ink(digit)) * 16),
    "28 x 28": lambda digit: ink(digit, 34, 340, 90, 80).resize((28, 28)),
    "28 x 28, a thin line": lambda digit: ink(digit, 16, 340, 90, 80).resize((28, 28)),
    "in a frame": lambda digit: ImageOps.expand(ink(digit), 15, 255).resize((28, 28)),
    "cropped tightly": lambda digit: photograph(ink(digit)).crop(ink(digit).getbbox()),
    "5 % of the height": lambda digit: ImageOps.expand(ink(digit, 9, 100), 750),
}


def draw(kind, strokes):
    if kind in PAPERS:
        return photograph(ink(strokes), PAPERS[kind])
    return OTHERS[kind](strokes)


@pytest.fixture
def predict(real_run, call, tmp_path):
    """Read pictures, given as (name, picture), with the command."""

    def predict_pictures(*pictures, flags=()):
        for name, picture in pictures:
            picture.save(tmp_path / name, exif=picture.getexif())
        paths = [tmp_path / name for name, _ in pictures]
        return call("--evaluate", real_run / "final.pt", "--predict", *paths, *flags)

    return predict_pictures


@pytest.mark.parametrize("kind", [*PAPERS, *OTHERS])
def test_nine_of_ten_digits_are_read(predict, kind):
    """Five digits in each of two handwritings."""
    hands = {n: (ANGULAR, ROUND)[(n + len(kind)) % 2] for n in range(10)}
    suffix = {"EXIF 6": "jpg", "3000 x 4000": "jpg", "floats": "tif"}.get(kind, "png")
    pictures = [(f"{n}.{suffix}", draw(kind, hand[n])) for n, hand in hands.items()]
    process = predict(*pictures)
    read = re.findall(r"(\d)\.\w+: (\d) \(\d+\.\d %\)", process.stdout)
    if kind != "cropped tightly":  # where a straight 1 has no paper around it
        assert process.returncode == 0, process.stderr
    assert sum(drawn == seen for drawn, seen in read) >= 9, read


@pytest.mark.parametrize("kind", [*PAPERS, "transparent, black ink", "28 x 28"])
def test_no_digit_is_printed_for_a_blank_page(predict, kind):
    process = predict(("blank.png", draw(kind, "")))
    assert_one_line(process, 1, "blank.png: ValueError: ")
    assert process.stdout == ""


def test_neither_strong_noise_nor_a_single_pixel_is_a_digit(predict):
    noisy = photograph(ink(""), noise=12)
    process = predict(("noisy.png", noisy), ("pixel.png", Image.new("L", (1, 1))))
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr.count("ValueError") == 2


def test_the_message_names_what_is_wrong(predict):
    blurred = photograph(ink(ANGULAR[4]).filter(ImageFilter.GaussianBlur(30)))
    tiny = photograph(ink(ANGULAR[4], 2, 8))
    assert_one_line(predict(("tiny.png", tiny)), 1, "crop the picture")
    assert_one_line(predict(("blurred.png", blurred)), 1, "blurred")
    assert_one_line(predict(("empty.png", EVEN)), 1, "nothing is darker or lighter")


def test_what_the_network_sees_is_shown(predict):
    """A zero in the middle: ink all around, none inside; two rows of pixels a line."""
    process = predict(("zero.png", draw("dark on light", ANGULAR[0])))
    *shown, result = process.stdout.splitlines()
    assert "zero.png: 0 (" in result
    assert [len(line) for line in shown] == [28] * 14
    assert shown[0].isspace() and shown[13].isspace()
    assert re.fullmatch(r" +\S+ +\S+ +", shown[7])


def test_a_thin_upright_line_is_a_one(predict):
    picture = Image.new("L", (800, 600), 240)
    ImageDraw.Draw(picture).line((400, 100, 400, 500), 20, 4)
    assert "one.png: 1 (" in predict(("one.png", picture)).stdout


def test_what_is_no_picture_is_named_and_the_others_are_read(predict, tmp_path):
    bad = [tmp_path / name for name in ("text.png", "cut.png", "missing.png", ".")]
    bad[0].write_bytes(b"text")
    ink(ANGULAR[7]).save(bad[1])
    bad[1].write_bytes(bad[1].read_bytes()[:200])
    process = predict(("seven.png", ink(ANGULAR[7])), flags=[*bad, "--tta"])
    assert process.returncode == 1
    for path, error in zip(bad, process.stderr.splitlines(), strict=True):
        assert error.startswith(f"mnist_cnn.py: error: {path}: ")
    assert "JPEG or PNG" in process.stderr.splitlines()[0]
    assert "seven.png: 7 (" in process.stdout
