# /// script
# dependencies = ["torch>=2.6", "torchvision", "tqdm", "torchsummary", "matplotlib"]
# ///
"""Train a 9,798-parameter convolutional network with global average pooling on MNIST.

    python mnist_cnn.py                         # the reference recipe: 19 epochs
    python mnist_cnn.py --recipe best           # the same network, better trained
    python mnist_cnn.py --lr 0.05 --runs 5      # five seeds: mean and interval
    python mnist_cnn.py --resume runs/NAME      # continue a run that was stopped
    python mnist_cnn.py --evaluate runs/NAME/seed-1/final.pt
    python mnist_cnn.py --synthetic --epochs 1  # is it installed right? no download

Test accuracy after the last epoch, mean and 95 % confidence interval of five seeds:
best 99.56 ± 0.02 %, reference 99.33 ± 0.07 %, both 19 epochs in fp32 on a CPU, where
either takes minutes on two cores. Not yet run on a GPU.
"""

import argparse
import ctypes
import io
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
import textwrap
import time
import zlib
from collections import namedtuple
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while the libraries load: no traceback
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import distributed, nn
from torchvision.datasets import MNIST
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

MEAN, STD = 0.1307, 0.3081  # of the training set's pixels, scaled to [0, 1]
BETTER = "--weight-decay 5e-4 --dropout 0 --precise-bn"
RECIPES = {  # flags, each of which gives way to the same flag on the command line
    "reference": "",
    "best": f"--lr 0.2 --rotation 10 --shift 1.5 {BETTER}",
    "quick": f"--epochs 6 --batch-size 64 --lr 0.15 --rotation 5 --shift 0.5 {BETTER}",
}


def fail(message, status=1):
    """End the program with one line on stderr."""
    print("mnist_cnn.py: error:", *message.splitlines(), file=sys.stderr)
    sys.exit(status)


@contextmanager
def failing_with(problem):
    """End the program with one line that begins with the problem if the block fails."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a damaged file can fail in any way
        fail(f"{problem}: {type(error).__name__}: {error}")


# ---- Data: a dataset is (images (N, 28, 28) uint8, labels (N,) int64) on the device ----


def load_mnist(data_dir, train):
    """Return the train set or the test set; torchvision downloads what is absent."""
    raw = Path(data_dir, "MNIST", "raw")
    mend = "put its four .gz files there, delete damaged files, or use --synthetic"
    with failing_with(f"cannot read MNIST in {raw} ({mend})"):
        dataset = MNIST(data_dir, train, download=True)
        images, labels = dataset.data, dataset.targets
        if images.shape != (len(labels), 28, 28) or labels.max() > 9:
            raise ValueError("no digit from 0 to 9 for each image of 28x28 pixels")
    return images, labels


def synthetic_digits(count, seed):
    """Return digits in Pillow's own font, rotated and shifted at random; no download."""
    font = ImageFont.load_default(size=24)
    glyphs = torch.empty(10, 1, 28, 28)
    for digit in range(10):
        picture = Image.new("L", (28, 28))
        ImageDraw.Draw(picture).text((14, 14), str(digit), 255, font, anchor="mm")
        glyphs[digit] = pil_to_tensor(picture)
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=random)
    degrees = torch.randn(count, generator=random) * 15
    shifts = torch.randn(count, 2, generator=random) * 2
    return affine(glyphs[labels], degrees, shifts).squeeze(1).byte(), labels


def load_datasets(args):
    """Return the train set and the test set; with --holdout the latter is not read."""
    if args.synthetic:
        print("Synthetic digits: accuracy on them says nothing about MNIST.")
        train_set, test_set = synthetic_digits(12_000, 0), synthetic_digits(2_000, 1)
    else:
        train_set = load_mnist(args.data_dir, train=True)
        test_set = None if args.holdout else load_mnist(args.data_dir, train=False)
    if args.holdout:
        if args.holdout >= (count := len(train_set[0])):
            fail(f"--holdout {args.holdout} leaves none of {count} images to train on")
        print(f"Validation set: the last {args.holdout:,} training images.")
        test_set = [part[-args.holdout :] for part in train_set]
        train_set = [part[: -args.holdout] for part in train_set]
    limits = (args.batch_size, args.test_batch_size) if args.dry_run else (None, None)
    pairs = zip((train_set, test_set), limits)
    return [[part[:limit].to(args.device) for part in pair] for pair, limit in pairs]


def affine(images, degrees, shifts):
    """Return float images (N, 1, 28, 28) shifted and then rotated about their centre.

    ``shifts`` (N, 2) are pixels to the right and down, ``degrees`` (N,) counter-clockwise.
    """
    cosine, sine = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    # The matrix leads from a pixel to where it comes from; an image spans -1 to 1.
    x, y = (-shifts / 14).unbind(dim=1)
    matrix = torch.stack((cosine, -sine, x, sine, cosine, y), dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def normalise(images):
    """Return images with pixels from 0 to 255 as inputs with mean 0 and deviation 1."""
    return (images / 255 - MEAN) / STD


def train_batches(images, labels, batch_size, rotation, shift):
    """Yield (inputs (B, 1, 28, 28), labels (B,)): each image once, in random order.

    Each is rotated by up to ``rotation`` degrees and shifted by up to ``shift`` pixels.
    """
    for index in torch.randperm(len(images), device=images.device).split(batch_size):
        batch = images[index].unsqueeze(1).float()
        if rotation or shift:
            degrees = batch.new_empty(len(index)).uniform_(-rotation, rotation)
            shifts = batch.new_empty(len(index), 2).uniform_(-shift, shift)
            batch = affine(batch, degrees, shifts)
        yield normalise(batch), labels[index]


# ---- Model ----


class Net(nn.Module):
    """Three blocks of two 3x3 convolutions, 1x1 convolutions between, average pooling.

    Inputs (N, 1, 28, 28), outputs log-probabilities (N, 10); 9,798 parameters. Global
    average pooling in place of a dense layer: Network in Network (Lin et al. 2013).
    """

    def __init__(self, dropout=0.05):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.conv2, self.norm2 = nn.Conv2d(10, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.transition1 = nn.Conv2d(16, 10, 1)
        self.conv3, self.norm3 = nn.Conv2d(10, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv4, self.norm4 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.transition2 = nn.Conv2d(16, 10, 1)
        self.conv5, self.norm5 = nn.Conv2d(10, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv6, self.norm6 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.classifier = nn.Conv2d(16, 10, 1)
        self.dropout = Dropout(dropout)
        self.pool = nn.MaxPool2d(2)
        self.average = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        # channels x height x width, and the receptive field in pixels
        x = self.dropout(self.norm1(F.relu_(self.conv1(x))))  # 10 x 28 x 28, 3
        x = self.dropout(self.norm2(F.relu_(self.conv2(x))))  # 16 x 28 x 28, 5
        x = F.relu_(self.transition1(self.pool(x)))  # 10 x 14 x 14, 6
        x = self.dropout(self.norm3(F.relu_(self.conv3(x))))  # 16 x 14 x 14, 10
        x = self.dropout(self.norm4(F.relu_(self.conv4(x))))  # 16 x 14 x 14, 14
        x = F.relu_(self.transition2(self.pool(x)))  # 10 x 7 x 7, 16
        x = self.dropout(self.norm5(F.relu_(self.conv5(x))))  # 16 x 7 x 7, 24
        x = self.dropout(self.norm6(F.relu_(self.conv6(x))))  # 16 x 7 x 7, 32
        x = self.average(self.classifier(x))  # 10 x 1 x 1, all
        return F.log_softmax(x.flatten(1).float(), dim=1)


class Dropout(nn.Dropout):
    """``nn.Dropout``, which on a CPU draws a number for each element that it drops.

    PyTorch draws one for every element, in one thread: a third of a step.
    """

    def forward(self, x):
        if not (self.training and self.p and x.device.type == "cpu"):
            return super().forward(x)
        # Poisson many random positions hit each element independently, and miss it with
        # probability exp(log(1 - p)).
        hits = torch.poisson(torch.tensor(-x.numel() * math.log1p(-self.p)))
        dropped = torch.randint(x.numel(), (int(hits),))
        mask = x.new_full((x.numel(),), 1 / (1 - self.p)).index_fill_(0, dropped, 0)
        return x * mask.as_strided(x.shape, x.stride())


def make_model(dropout, device, precision):
    """Return a new ``Net`` on the device, in the memory format that is fastest there."""
    model = Net(dropout)
    # By default cuDNN rounds fp32 to TF32: 10 bits of mantissa in place of 23.
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    if precision == "bf16":
        autocast = torch.autocast(torch.device(device).type, torch.bfloat16)
        model.forward = autocast(model.forward)
    if device == "cpu":
        # The C library gives freed activations back to the system, and fetching them anew
        # takes a fifth of a step. (M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc)
        with suppress(AttributeError, OSError, TypeError):  # another C library
            ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
            ctypes.CDLL(None).mallopt(-3, 2**30)
        # Channels last saves a tenth of a step, but not with the 10 channels of conv1.
        for layer in model.children():
            if layer is not model.conv1:
                layer.to(memory_format=torch.channels_last)
    return model.to(device)


# ---- Training and testing ----

Epoch = namedtuple(  # a row of the history: accuracies in %; eval is test or validation
    "Epoch",
    "epoch learning_rate train_loss train_accuracy eval_loss eval_accuracy seconds",
)
ROW = "{:5d}  {:8.6f}  {:11.4f}  {:6.2f} %  {:15.4f}  {:6.2f} %  {:8.1f}\n"


def make_training(args, seed, train_images):
    """Return a new model, its optimizer and its scheduler, which steps every batch."""
    torch.manual_seed(seed * 10_000)
    torch.backends.cudnn.deterministic = True  # the same seed gives the same weights
    model = make_model(args.dropout, args.device, args.precision)
    decay = args.weight_decay
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=decay, fused=True
    )
    steps = args.epochs * math.ceil(train_images / args.batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        args.lr,
        steps,
        # It divides by the steps of the warm-up less one.
        pct_start=args.pct_start if args.pct_start * steps != 1 else 0.0,
        div_factor=args.div_factor,
        final_div_factor=args.final_div_factor,
        cycle_momentum=False,
    )
    return model, optimizer, scheduler


def train_epoch(model, optimizer, scheduler, batches, steps):
    """Train for an epoch; return its last learning rate, mean loss and accuracy in %."""
    model.train()
    count, loss_sum, correct = 0, 0, 0  # the sums stay on the device
    bar = tqdm(total=steps, file=sys.stdout, disable=None, leave=False)
    for inputs, labels in batches:
        optimizer.zero_grad()
        output = model(inputs)
        loss = F.nll_loss(output, labels)
        loss.backward()
        optimizer.step()
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        count += len(labels)
        loss_sum += loss.detach() * len(labels)
        correct += (output.argmax(dim=1) == labels).sum()
        if bar.update():  # true when it was redrawn: only then wait for the device
            mean_loss, accuracy = loss_sum.item() / count, correct.item() / count
            bar.set_postfix(loss=mean_loss, accuracy=accuracy)
    bar.close()
    return learning_rate, loss_sum.item() / count, 100 * correct.item() / count


@torch.no_grad()
def precise_batch_norm(model, images):
    """Give BatchNorm the statistics of all training images (Wu and Johnson 2021)."""
    model.eval()  # no dropout
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    count = 0
    for batch in images.unsqueeze(1).split(1000):
        count += len(batch)
        for norm in norms:  # with this momentum each image so far weighs the same
            norm.train().momentum = len(batch) / count
        model(normalise(batch))


@torch.no_grad()
def predict(model, images, batch_size):
    """Return the log-probabilities (N, 10) of the digits in uint8 images (N, 28, 28)."""
    model.eval()
    batches = images.unsqueeze(1).split(batch_size)
    return torch.cat([model(normalise(batch)) for batch in batches])


def predict_tta(model, images, batch_size):
    """Return ``predict`` with the probabilities averaged over nine shifts (TTA)."""
    padded = F.pad(images, (1, 1, 1, 1))  # shifts of -1, 0 and 1 pixel on both axes
    corners = itertools.product(range(3), repeat=2)
    shifted = (padded[:, y : y + 28, x : x + 28] for y, x in corners)
    outputs = [predict(model, images, batch_size) for images in shifted]
    return torch.stack(outputs).logsumexp(dim=0) - math.log(len(outputs))


def loss_and_accuracy(output, labels):
    """Return the mean loss and the accuracy in % of log-probabilities (N, 10)."""
    correct = (output.argmax(dim=1) == labels).sum().item()
    return F.nll_loss(output, labels).item(), 100 * correct / len(labels)


def train(args, seed, train_set, test_set, folder):
    """Return a trained model and its history; continue from the folder's checkpoint."""
    history, parts = [], make_training(args, seed, len(train_set[0]))
    model, optimizer, scheduler = parts
    if folder and (folder / "checkpoint.pt").exists():
        history = load_checkpoint(folder / "checkpoint.pt", parts)
    title = f"{args.test_name} loss"
    print(f"epoch        lr   train loss  accuracy  {title:>15}  accuracy   seconds")
    print("".join(ROW.format(*row) for row in history), end="")
    start = time.perf_counter() - (history[-1].seconds if history else 0)
    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(
            seed * 10_000 + epoch
        )  # so a checkpoint needs no random state
        batches = train_batches(*train_set, args.batch_size, args.rotation, args.shift)
        steps = scheduler.total_steps // args.epochs
        trained = train_epoch(model, optimizer, scheduler, batches, steps)
        if args.precise_bn and epoch == args.epochs:
            precise_batch_norm(model, train_set[0])
        output = predict(model, test_set[0], args.test_batch_size)
        tested = loss_and_accuracy(output, test_set[1])
        if not math.isfinite(trained[1] + tested[0]):
            fail(f"loss not finite in epoch {epoch}: try a lower --lr than {args.lr}")
        history.append(Epoch(epoch, *trained, *tested, time.perf_counter() - start))
        print(ROW.format(*history[-1]), end="", flush=True)
        if folder:
            save_checkpoint(folder, parts, history)
    return model, history


# ---- Files ----


def save(path, content):
    """Write bytes, tensors (.pt) or JSON in one step: old content or new, no mixture."""
    if path.suffix == ".pt":
        torch.save(content, buffer := io.BytesIO())
        content = buffer.getvalue()
    elif path.suffix == ".json":
        content = json.dumps(content, indent=2).encode()
    unfinished = Path(f"{path}.{os.getpid()}.new")
    with failing_with(f"cannot write {path} (mend that, then --resume the run)"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(unfinished, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def load(path):
    """Return the content of a file of tensors (.pt) or JSON; code in it does not run."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return torch.load(path, map_location="cpu", weights_only=True)


def save_checkpoint(folder, parts, history):
    """Write metrics.csv, and checkpoint.pt with all that ``load_checkpoint`` needs."""
    lines = [",".join(map(str, row)) for row in (Epoch._fields, *history)]
    save(folder / "metrics.csv", "\n".join([*lines, ""]).encode())
    state = [part.state_dict() for part in parts], [tuple(row) for row in history]
    save(folder / "checkpoint.pt", state)


def load_checkpoint(path, parts):
    """Put model, optimizer and scheduler back as they were saved; return the history."""
    with failing_with(f"cannot use {path}"):
        states, history = load(path)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
        return [Epoch(int(epoch), *map(float, row)) for epoch, *row in history]


def draw_report(path, history, images, labels, output):
    """Draw a training's curves, if there was one, confusion matrix and worst mistakes."""
    try:
        from matplotlib.figure import Figure
    except Exception as error:  # noqa: BLE001 - absent, or broken, or badly configured
        return print(f"mnist_cnn.py: warning: no {path}: {error}", file=sys.stderr)
    figure = Figure(figsize=(13, 10 if history else 6), layout="constrained")
    panels = figure.subfigures(2 if history else 1, 1, squeeze=False)[:, 0]
    if history:
        epochs, _, *curves, _ = zip(*history)
        for axis, title in zip(panels[0].subplots(1, 2), ("loss", "accuracy in %")):
            axis.plot(epochs, curves.pop(0), ".-", epochs, curves[1], ".-")
            axis.set(title=title, xlabel="epoch")
            axis.legend(["training, augmented", "after the epoch"])
    left, right = panels[-1].subfigures(1, 2)
    probability, predicted = output.exp().max(dim=1)
    counts = torch.bincount(labels * 10 + predicted, minlength=100).view(10, 10)
    axis = left.subplots()
    axis.imshow((counts - counts.diag().diag()).numpy(), cmap="Oranges")
    axis.set(xlabel="predicted digit", ylabel="true digit", title="confusion matrix")
    axis.set(xticks=range(10), yticks=range(10))
    for true, other in counts.nonzero().tolist():
        axis.text(other, true, counts[true, other].item(), ha="center", va="center")
    right.suptitle("the most confident mistakes: true as predicted, probability")
    order = (probability * (predicted != labels)).argsort(descending=True)
    for axis, index in zip(right.subplots(3, 4).flat, order):
        axis.axis("off")
        if predicted[index] != labels[index]:
            axis.imshow(images[index].numpy(), cmap="gray_r")
            title = f"{labels[index]} as {predicted[index]}, {probability[index]:.0%}"
            axis.set_title(title, fontsize=10)
    figure.savefig(buffer := io.BytesIO(), format="png")
    save(path, buffer.getvalue())


# ---- Statistics ----


def summarise(args, results, folder):
    """Print and save the statistics of the seeds' results."""
    summary = {"n": len(results), "seeds": dict(sorted(results.items()))}
    for seed, result in summary["seeds"].items() if args.runs > 1 else ():
        print(f"seed {seed}: {result['accuracy']:.2f} % in {result['seconds']:.0f} s")
    for name, label in (("tta_accuracy", " with TTA"), ("accuracy", "")):
        values = [result[name] for result in results.values() if name in result]
        if values:
            summary[name] = statistics.mean(values)
        if len(values) > 1:
            deviation = statistics.stdev(values)
            interval = student_t(len(values) - 1) * deviation / len(values) ** 0.5
            summary |= {f"{name}_deviation": deviation, f"{name}_interval": interval}
            print(
                f"{args.test_name} accuracy{label} {summary[name]:.2f} ± {interval:.2f} %"
            )
    if args.runs > 1:
        print(f"(mean and 95 % confidence interval of {args.runs} seeds, last epoch)")
    if folder:
        save(folder / "result.json", summary)


def student_t(freedom, confidence=0.95):
    """Return the two-sided critical value of Student's t distribution.

    With t = sqrt(freedom) tan(angle) its density is proportional to cos(angle)^(freedom-1).
    """
    angle = torch.linspace(0, math.pi / 2, 1_000_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angle.cos() ** (freedom - 1), angle)
    index = torch.searchsorted(mass, confidence * mass[-1])
    return freedom**0.5 * angle[index + 1].tan().item()


# ---- Command line ----

# flag, default, what is valid (low <= number < high, a choice, or else a path), meaning
FLAGS = {
    "recipe": [
        ("--recipe", "reference", list(RECIPES), "preset; explicit flags override it"),
        ("--epochs", 19, (1, 10_000), "passes over the train set"),
        ("--batch-size", 128, (1, 1_000_000), "images in a training batch"),
        ("--lr", 0.015, (1e-9, math.inf), "maximum learning rate of OneCycleLR"),
        ("--momentum", 0.9, (0, 1), "momentum of SGD, not cycled"),
        ("--weight-decay", 1e-4, (0, math.inf), "L2 penalty on all parameters"),
        ("--dropout", 0.05, (0, 1), "probability of dropping an activation"),
        ("--rotation", 7.0, (0, math.inf), "maximum random rotation, degrees"),
        ("--shift", 0.0, (0, math.inf), "maximum random shift on each axis, pixels"),
        ("--pct-start", 0.2, (0, 1), "fraction of the steps that warm up"),
        ("--div-factor", 10.0, (1, math.inf), "maximum / initial learning rate"),
        ("--final-div-factor", 100.0, (1, math.inf), "initial / final learning rate"),
        ("--precise-bn", False, None, "end with BatchNorm statistics of all images"),
    ],
    "run": [
        ("--seed", 1, (0, 100_000), "seed of all random numbers"),
        ("--runs", 1, (1, 100_000), "models to train, with seeds from --seed upwards"),
        ("--holdout", 0, (0, 1_000_000), "validate on the last N training images"),
        ("--test-batch-size", 1000, (1, 1_000_000), "images in a test batch"),
        ("--device", "auto", "NAME", "cpu, or an accelerator as in cuda, cuda:1"),
        ("--precision", "fp32", ["fp32", "tf32", "bf16"], "of the arithmetic"),
        ("--tta", False, None, "also test with the average over nine shifts"),
        ("--synthetic", False, None, "train on digits drawn here; needs no download"),
        ("--dry-run", False, None, "one training and one test batch, no files"),
    ],
    "files": [
        ("--data-dir", "data", "DIR", "where MNIST/raw is, or is downloaded to"),
        ("--out", None, "DIR", "new folder for output files, else runs/DATE-TIME-ID"),
        ("--resume", None, "DIR", "continue the run in a folder, with its own flags"),
        ("--evaluate", None, "FILE", "test the weights in a file, without training"),
    ],
}


def number(kind, low, high, text):
    """Return the number of a kind in a text, which must be at least low and below high."""
    with suppress(ValueError):
        if low <= (value := kind(text)) < high:
            return value
    valid = f"{kind.__name__} in [{low}, {high})"
    raise argparse.ArgumentTypeError(f"{text!r} is no {valid}")


def make_parser():
    """Return the parser of the command line; its defaults are the reference recipe."""
    text = "Train a 9,798-parameter CNN on MNIST; test it after every epoch."
    parser = argparse.ArgumentParser(description=text, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (see --help)", status=2)
    for name, rows in FLAGS.items():
        group = parser.add_argument_group(name)
        for flag, default, valid, text in rows:
            more = {"help": text + " (default: %(default)s)" * (default is not None)}
            if isinstance(default, bool):
                more |= {"action": argparse.BooleanOptionalAction}
            elif isinstance(valid, list):
                more |= {"choices": valid}
            elif isinstance(valid, tuple):
                kind = type(default)
                metavar = "N" if kind is int else "X"
                more |= {"type": partial(number, kind, *valid), "metavar": metavar}
            else:
                more |= {"type": os.path.expanduser, "metavar": valid}
            group.add_argument(flag, **more)
            parser.set_defaults(**{flag[2:].replace("-", "_"): default})
    return parser


def parse_arguments(arguments):
    """Return the flags; ends the program with status 2 and one line on a wrong one."""
    parser = make_parser()
    no_help = [word for word in arguments if word not in ("-h", "--help")]
    recipe = RECIPES[parser.parse_args(no_help).recipe]
    parser.set_defaults(**vars(parser.parse_args(recipe.split())))
    args = parser.parse_args(arguments)
    if "" in vars(args).values():
        parser.error("a path is empty")
    if args.evaluate and args.runs > 1:
        parser.error("--evaluate tests one model: leave out --runs")
    devices = ["cpu"]
    if torch.accelerator.is_available():
        name = torch.accelerator.current_accelerator().type
        indices = range(torch.accelerator.device_count())
        devices = [name, *(f"{name}:{index}" for index in indices), "cpu"]
    args.device = devices[0] if args.device == "auto" else args.device
    if args.device not in devices:
        available = ", ".join(devices)
        parser.error(f"--device {args.device} is not available; available: {available}")
    args.epochs = 1 if args.dry_run else args.epochs
    args.test_name = "Validation" if args.holdout else "Test"
    return args


def decisive(args):
    """Return the flags that decide what a run computes."""
    others = ("data_dir", "device", "out", "resume")
    return {flag: value for flag, value in vars(args).items() if flag not in others}


def parse_resumed(folder, arguments):
    """Return the flags of the run in a folder, as if typed again, and its config.json."""
    given = {word.split("=")[0] for word in arguments if word.startswith("-")}
    if extra := ", ".join(sorted(given - {"--resume", "--data-dir", "--device"})):
        fail(f"--resume goes by the flags of the run: leave out {extra}", status=2)
    with failing_with(f"cannot use {folder}/config.json"):
        config = load(Path(folder, "config.json"))
        data_dir = ["--data-dir", config["data_dir"]]
        args = parse_arguments([*config["arguments"], *data_dir, *arguments])
        if decisive(args) != config["flags"]:
            raise ValueError("its flags mean something else in this script")
        torch.set_num_threads(config["threads"])
    return args, config


def join_torchrun(device):
    """Return the rank of this process and their number: 0 and 1 without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    distributed.init_process_group("gloo", timeout=timedelta(days=30))
    if device != "cpu" and ":" not in device:
        index = int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count()
        torch.accelerator.set_device_index(index)
    if distributed.get_rank() > 0:  # rank 0 speaks for all
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return distributed.get_rank(), distributed.get_world_size()


def print_header(device):
    """Print what runs where and, with torchsummary, the layers; return where."""
    where = f"{device}, {torch.get_num_threads()} threads"
    if device.startswith("cuda"):
        where = f"{device}, {torch.cuda.get_device_name(device)}"
    count = sum(weight.numel() for weight in Net().parameters())
    print(f"{count:,} parameters on {where}, torch {torch.__version__}")
    with suppress(ImportError):
        from torchsummary import summary

        summary(Net(), (1, 28, 28), device="cpu")  # a network of its own: it trains it
    return where


def make_folder(args, config):
    """Return a new folder, which appears at once with all that a resumed run needs."""
    folder = Path(args.out or time.strftime(f"runs/%Y-%m-%d-%H%M%S-{os.getpid()}"))
    unfinished = Path(f"{folder}.{os.getpid()}.new")
    if folder.exists():
        fail(f"{folder} already exists: choose another --out, or --resume it")
    try:
        unfinished.mkdir(parents=True)
        shutil.copy(__file__, unfinished / "mnist_cnn.py")
        (unfinished / "config.json").write_text(json.dumps(config, indent=2))
        unfinished.rename(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        fail(f"cannot make {folder}: {error.strerror}; choose another --out")
    return folder


def open_folder(args, arguments, config, where, datasets):
    """Return the folder of a new run, or of the one to resume if its data is the same."""
    parts = [part.cpu().numpy() for pair in datasets for part in pair]
    data = zlib.crc32(b"".join(parts))
    if args.resume:
        folder = Path(args.resume)
        if config["data"] != data:
            fail(f"{folder} was trained on other data than that in {args.data_dir}")
        if config["device"] != where:
            print(f"It ran on {config['device']}: from here it is not bit-identical.")
    else:
        config = {"arguments": arguments, "flags": decisive(args), "data": data}
        config |= {"data_dir": os.path.abspath(args.data_dir), "device": where}
        config |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
        folder = make_folder(args, config)
    command = shlex.join(["python", sys.argv[0], "--resume", str(folder)])
    print(f"Output files in {folder}; to continue after a stop:\n{command}")
    return folder


def test(args, model, history, test_set, folder):
    """Test a model; print its result, save it in the folder, if given, and return it."""
    images, labels = test_set
    output = predict(model, images, args.test_batch_size)
    loss, accuracy = loss_and_accuracy(output, labels)
    if not math.isfinite(loss):
        fail(f"{args.evaluate} gives a loss that is not finite: damaged weights")
    result, text = {"accuracy": accuracy, "loss": loss}, f"accuracy {accuracy:.2f} %"
    if history:
        best, last = max(history, key=lambda row: row.eval_accuracy), history[-1]
        result |= {"best_accuracy": best.eval_accuracy, "best_epoch": best.epoch}
        result |= {"epochs": last.epoch, "seconds": last.seconds}
        text += f" after epoch {last.epoch} (best {best.eval_accuracy:.2f} % in epoch "
        text += f"{best.epoch}, chosen on the {args.test_name.lower()} set)"
    for goal in (99.0, 99.4):
        for row in [row for row in history if row.eval_accuracy >= goal][:1]:
            result[f"epochs_to_{goal}"] = row.epoch
            result[f"seconds_to_{goal}"] = row.seconds
            text += f"; {goal} % after {row.seconds:.0f} s, epoch {row.epoch}"
    if args.tta:
        shifted = predict_tta(model, images, args.test_batch_size)
        result["tta_accuracy"] = loss_and_accuracy(shifted, labels)[1]
        text += f"; with TTA {result['tta_accuracy']:.2f} %"
    print(textwrap.fill(f"{args.test_name} {text}", 80))
    masks = {str(digit): labels == digit for digit in sorted(set(labels.tolist()))}
    digits = {d: loss_and_accuracy(output[m], labels[m])[1] for d, m in masks.items()}
    print("digit   ", *(f"{digit:>6}" for digit in digits))
    print("accuracy", *(f"{x:6.2f}" for x in digits.values()), flush=True)
    if folder and history:
        save(folder / "final.pt", model.state_dict())
    if folder:
        save(folder / "result.json", result | {"accuracy_by_digit": digits})
        tensors = (tensor.cpu() for tensor in (images, labels, output))
        draw_report(folder / "report.png", history, *tensors)
    return result


def run_seed(args, seed, datasets, folder):
    """Train and test one model, or read its result if it has one; return the result."""
    if folder and (folder / "result.json").exists():
        with failing_with(f"cannot use {folder / 'result.json'}"):
            result = load(folder / "result.json")
            print(f"Seed {seed} is finished, accuracy {result['accuracy']:.2f} %")
        return result
    print(f"Seed {seed}")
    model, history = train(args, seed, *datasets, folder)
    return test(args, model, history, datasets[1], folder)


def main(arguments):
    args, config = parse_arguments(arguments), None
    if args.resume:
        args, config = parse_resumed(args.resume, arguments)
    rank, ranks = join_torchrun(args.device)
    where, folder = print_header(args.device), None
    if rank == 0:
        datasets = load_datasets(args)
        if not (args.dry_run or args.evaluate):
            folder = open_folder(args, arguments, config, where, datasets)
    if ranks > 1:
        distributed.broadcast_object_list(shared := [folder])
        folder = shared[0]
    if rank > 0:  # now that rank 0 has downloaded and unpacked the files
        datasets = load_datasets(args)
    if args.evaluate:
        model = make_model(0, args.device, args.precision)
        with failing_with(f"cannot use {args.evaluate}"):
            model.load_state_dict(load(Path(args.evaluate)))
        return test(args, model, [], datasets[1], args.out and Path(args.out))
    results = {}
    for seed in range(args.seed, args.seed + args.runs)[rank::ranks]:
        seed_folder = folder and folder / f"seed-{seed}"
        results[seed] = run_seed(args, seed, datasets, seed_folder)
    if ranks > 1:
        distributed.all_gather_object(gathered := [None] * ranks, results)
        distributed.destroy_process_group()  # its threads could abort the exit
        results = {seed: result for part in gathered for seed, result in part.items()}
    if rank == 0:
        summarise(args, results, folder)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_ctrl_c)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - it was closed
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="replace")  # ± where the encoding is ASCII
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except OSError as error:  # stdout leads to a closed pipe or a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(f"stopped: {error}")
    except (MemoryError, RuntimeError) as error:
        if "memory" not in repr(error).lower():
            raise
        fail("out of memory: try a lower --batch-size or --test-batch-size")
