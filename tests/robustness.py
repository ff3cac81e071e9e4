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
CORNERS = [(0, x, y) for x in (-2, 2) for y in (-2, 2)]
CHANGES = {
    "as they are": [(0, 0, 0)],
    "rotated by 15° either way": [(15, 0, 0), (-15, 0, 0)],
    "shifted by 2 pixels to each corner": CORNERS,
    "rotated by 15° and shifted to each corner": [
        (degrees, x, y) for degrees in (15, -15) for _, x, y in CORNERS
    ],
}


def changed(images, degrees, right, down):
    """Return uint8 images (N, 28, 28), shifted and rotated."""
    degrees = torch.full((len(images),), float(degrees))
    shifts = torch.tensor([[right, down]]).float().expand(len(images), 2)
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
    return means or mnist_cnn.fail(f"{run} has no seed-*/final.pt: give a run's folder")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    images, labels = mnist_cnn.load_mnist(args.data_dir, "t10k")
    print(f"| test images | {' | '.join(Path(run).name for run in args.runs)} |")
    print("| --- |" + " ---: |" * len(args.runs))
    for name, changes in CHANGES.items():
        variants = [changed(images, *change) for change in changes]
        cells = []
        for run in args.runs:
            cells.append(mnist_cnn.mean_text(accuracies(run, variants, labels)))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
