"""Test saved models on turned and moved test images: python tests/robustness.py RUN...

RUN is the folder that `mnist_cnn.py --runs N` left. The table gives the mean accuracy of
its models in % and the 95 % interval. It is no test: nothing passes or fails here.
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
CHANGES = {
    "as they are": [(0, 0, 0)],
    "turned by 15° either way": [(15, 0, 0), (-15, 0, 0)],
    "moved by 2 pixels to each side": SIDES,
    "moved by 2 pixels to each corner": CORNERS,
    "turned by 15° and moved to each corner": [
        (degrees, x, y) for degrees in (15, -15) for _, x, y in CORNERS
    ],
}


def changed(images, degrees, right, down):
    """Return uint8 images (N, 28, 28), moved and turned."""
    count = len(images)
    move = torch.tensor([[right, down]]).float().expand(count, 2)
    matrices = mnist_cnn.affine_matrices(torch.full((count,), float(degrees)), move)
    pixels = mnist_cnn.warp(images.unsqueeze(1).float(), matrices)
    return pixels.squeeze(1).round().byte()


def accuracies(run, variants, labels):
    """Return for each model of a run the mean accuracy over variants of the images."""
    result = []
    for path in sorted(Path(run).glob("**/final.pt")):
        model = mnist_cnn.make_model(0, "cpu")
        with mnist_cnn.reading(path) as state:
            model.load_state_dict(state)
        outputs = [mnist_cnn.predict(model, images, 1000) for images in variants]
        scores = [mnist_cnn.score(output, labels)[1] for output in outputs]
        result.append(statistics.mean(scores))
    return result


def cell(values):
    """Return "mean ± interval", or the one value of a single model."""
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {mnist_cnn.interval_95(values):.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    for run in args.runs:
        if not any(Path(run).glob("**/final.pt")):
            mnist_cnn.fail(f"{run} has no final.pt: give the folder of a finished run")
    images, labels = mnist_cnn.load_mnist(args.data_dir, train=False)
    print(f"| test images | {' | '.join(Path(run).name for run in args.runs)} |")
    print("| --- |" + " ---: |" * len(args.runs))
    for name, moves in CHANGES.items():
        variants = [changed(images, *move) for move in moves]
        cells = [cell(accuracies(run, variants, labels)) for run in args.runs]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
