"""Test models on rotated and shifted test images: python tests/robustness.py RUN...

RUN is the folder that `mnist_cnn.py --runs N` left. Mean accuracy in %, 95 % interval.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path

import torch
from torchvision.transforms import InterpolationMode, functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mnist_cnn

# Each change: degrees counter-clockwise, and pixels to the right and down.
CHANGES = {
    "as they are": ([0], [0]),
    "rotated by 15° either way": ([-15, 15], [0]),
    "shifted by 2 pixels to each corner": ([0], [-2, 2]),
    "rotated by 15° and shifted to each corner": ([-15, 15], [-2, 2]),
}


def changed(images, degrees, right, down):
    """Return images, from 0 to 255, shifted and then rotated."""
    # torchvision rotates first (and clockwise), so the shift rotates with the image.
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    shift = [right * cosine + down * sine, down * cosine - right * sine]
    bilinear = InterpolationMode.BILINEAR
    return functional.affine(images.float(), -degrees, shift, 1.0, [0.0], bilinear)


def accuracies(run, dataset):
    """Return the accuracy of each model of a run."""
    model = mnist_cnn.Net(json.loads(Path(run, "config.json").read_text())["width"])
    for path in Path(run).glob("seed-*/final.pt"):
        model.load_state_dict(torch.load(path, "cpu", weights_only=True))
        yield mnist_cnn.test(model, dataset, "fp32")[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    images, labels = mnist_cnn.load_mnist(args.data_dir, "t10k")
    print(f"| test images | {' | '.join(Path(run).name for run in args.runs)} |")
    print("| --- |" + " ---: |" * len(args.runs))
    for name, (degrees, pixels) in CHANGES.items():
        changes = itertools.product(degrees, pixels, pixels)
        variants = torch.cat([changed(images, *change) for change in changes])
        data = variants.round().byte(), labels.repeat(len(variants) // len(labels))
        cells = [mnist_cnn.interval([*accuracies(run, data)]) for run in args.runs]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
