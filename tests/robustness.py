"""Test saved models on rotated and shifted test images: python tests/robustness.py RUN...

RUN is the folder that `mnist_cnn.py --runs N` left. The table gives the mean accuracy of
its models in % and the 95 % confidence interval. It is no test: nothing passes or fails.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mnist_cnn

# Each change is a list of (degrees counter-clockwise, pixels to the right, pixels down).
SIDES = [(0, 2, 0), (0, -2, 0), (0, 0, 2), (0, 0, -2)]
CORNERS = [(0, x, y) for x in (-2, 2) for y in (-2, 2)]
BOTH = [(degrees, x, y) for degrees in (15, -15) for _, x, y in CORNERS]
CHANGES = {
    "as they are": [(0, 0, 0)],
    "rotated by 15° either way": [(15, 0, 0), (-15, 0, 0)],
    "shifted by 2 pixels to each side": SIDES,
    "shifted by 2 pixels to each corner": CORNERS,
    "rotated by 15° and shifted to each corner": BOTH,
}


def changed(images, degrees, right, down):
    """Return uint8 images (N, 28, 28), shifted and rotated."""
    count = len(images)
    shifts = torch.tensor([[right, down]]).float().expand(count, 2)
    degrees = torch.full((count,), float(degrees))
    pixels = mnist_cnn.affine(images.unsqueeze(1).float(), degrees, shifts)
    return pixels.squeeze(1).round().byte()


def accuracies(run, variants, labels):
    """Return for each model of a run the mean accuracy over variants of the images."""
    means = []
    for path in sorted(Path(run).glob("seed-*/final.pt")):
        model = mnist_cnn.load_model(path)
        outputs = [mnist_cnn.predict(model, images) for images in variants]
        scores = [mnist_cnn.loss_and_accuracy(output, labels)[1] for output in outputs]
        means.append(statistics.mean(scores))
    return means


def cell(values):
    """Return "mean ± interval", or the one value of a single model."""
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    low, _, high = mnist_cnn.interval(values)
    return f"{mean} ± {(high - low) / 2:.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    for run in args.runs:
        if not any(Path(run).glob("seed-*/final.pt")):
            mnist_cnn.fail(
                f"{run} has no seed-*/final.pt: give a finished run's folder"
            )
    images, labels = mnist_cnn.load_mnist(args.data_dir, "t10k")
    print(f"| test images | {' | '.join(Path(run).name for run in args.runs)} |")
    print("| --- |" + " ---: |" * len(args.runs))
    for name, changes in CHANGES.items():
        variants = [changed(images, *change) for change in changes]
        cells = [cell(accuracies(run, variants, labels)) for run in args.runs]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
