"""Test saved models on rotated and shifted test images: python tests/robustness.py RUN...

RUN is the folder that `mnist_cnn.py --runs N` left. The table gives the mean accuracy of
its models in % and the 95 % confidence interval. It is no test: nothing passes or fails.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

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
    """Return uint8 images (N, 28, 28), shifted and rotated."""
    degrees = torch.full((len(images),), float(degrees))
    shifts = torch.tensor([[right, down]]).float().expand(len(images), 2)
    pixels = mnist_cnn.affine(images.unsqueeze(1).float(), degrees, shifts)
    return pixels.squeeze(1).round().byte()


def accuracies(run, images, labels):
    """Return the accuracy of each model of a run."""
    paths = sorted(Path(run).glob("seed-*/final.pt"))
    outputs = [mnist_cnn.predict(mnist_cnn.load_model(path), images) for path in paths]
    return [mnist_cnn.loss_and_accuracy(output, labels)[1] for output in outputs]


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
        variants = [changed(images, *change) for change in changes]
        data = torch.cat(variants), labels.repeat(len(variants))
        cells = [mnist_cnn.interval(accuracies(run, *data))[3] for run in args.runs]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
