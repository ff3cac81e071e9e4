# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision>=0.21", "tqdm>=4.66", "torchsummary>=1.5.1"]
# ///
"""Train a 9,798-parameter convolutional network with global average pooling on MNIST.

python mnist_cnn.py                         # the reference run: 19 epochs
python mnist_cnn.py --lr 0.05 --seed 2      # an experiment: every number is a flag
python mnist_cnn.py --synthetic --epochs 1  # is it installed right? needs no download
"""

import argparse
import ctypes
import math
import platform
import signal
import sys
import time
from collections import namedtuple
from contextlib import suppress
from functools import partial
from itertools import accumulate, islice
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while the libraries load: end without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.datasets.mnist import MNIST, read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

try:
    from torchsummary import summary
except ImportError:
    summary = None

MEAN, STD = 0.1307, 0.3081  # of the training pixels, which lie in [0, 1]
Epoch = namedtuple(
    "Epoch", "epoch lr train_loss train_accuracy test_loss test_accuracy seconds"
)
ROW = "{:5d}  {:8.6f}  {:11.4f}  {:6.2f} %  {:11.4f}  {:6.2f} %  {:8.1f}"


# ---- Data: a split is (images (N, 28, 28) uint8, labels (N,) int64), moved once ----


def load_mnist(data_dir):
    """Return the training and the test split; torchvision downloads what is absent.

    Ends the program with status 1 when that fails, naming the file that is the cause.
    """
    raw = Path(data_dir, "MNIST", "raw")
    try:
        splits = [MNIST(data_dir, train, download=True) for train in (True, False)]
        splits = [(split.data, split.targets) for split in splits]
        for name, (images, labels) in zip(("train", "t10k"), splits):
            if images.shape != (len(labels), 28, 28) or labels.max() > 9:
                problem = "do not hold a 28x28 image and a digit for each other"
                raise ValueError(f"{name}-images* and {name}-labels* {problem}")
    except Exception as error:  # noqa: BLE001 - torchvision lets all through, asserts too
        files = ", ".join(name for name, _ in MNIST.resources)
        cause = f"cannot load MNIST from {raw}: {damaged_file(raw) or error}"
        fail(f"{cause}; put {files} there, or use --synthetic")
    return splits


def damaged_file(raw):
    """Return which of the four files in the folder is damaged and how, if one is."""
    for name, md5 in MNIST.resources:
        archive, path = raw / name, (raw / name).with_suffix("")
        try:
            if path.exists():
                read_image_file(path) if "images" in name else read_label_file(path)
            elif archive.exists() and not check_integrity(archive, md5):
                return f"{archive} is damaged (wrong MD5 sum), delete it"
        except Exception as error:  # noqa: BLE001 - the same
            return f"{path} is damaged ({error!r}), delete it"


def synthetic_digits(count, seed):
    """Return a split of digits in Pillow's built-in font, each distorted at random.

    They need no download and no file; accuracy on them says nothing about MNIST.
    """
    font = ImageFont.load_default(size=24)
    glyphs = torch.empty(10, 1, 28, 28)
    for digit, glyph in enumerate(glyphs):
        picture = Image.new("L", (28, 28))
        ImageDraw.Draw(picture).text((14, 14), str(digit), 255, font, anchor="mm")
        glyph.copy_(pil_to_tensor(picture))
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=random)
    matrices = rotation_matrices(torch.randn(count, generator=random) * 10)
    matrices += (
        torch.randn(matrices.shape, generator=random) / 10
    )  # scale, shear, shift
    pieces = zip(labels.split(5000), matrices.split(5000))  # 0.6 GB if done at once
    images = [warp(glyphs[label], matrix).byte() for label, matrix in pieces]
    return torch.cat(images).squeeze(1), labels


def rotation_matrices(degrees):
    """Return the (N, 2, 3) matrices that turn images by (N,) degrees counter-clockwise."""
    cosine, sine = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    zero = torch.zeros_like(degrees)
    return torch.stack((cosine, -sine, zero, sine, cosine, zero), dim=1).view(-1, 2, 3)


def warp(pixels, matrices):
    """Transform images (N, 1, H, W) by (N, 2, 3) affine matrices: bilinear, zeros outside."""
    grid = F.affine_grid(matrices, pixels.shape, align_corners=False)
    return F.grid_sample(pixels, grid, align_corners=False)


def normalise(pixels):
    """Return pixels, (N, 1, 28, 28) in 0 to 255, with about zero mean and unit variance."""
    return (pixels / 255 - MEAN) / STD


def training_batches(images, labels, batch_size, rotation):
    """Yield each image once, in a fresh random order, each turned by its own angle.

    A batch is (B, 1, 28, 28), normalised, with its labels (B,); the last may be shorter.
    It takes a few operations on the device for all B images, where torchvision's
    transforms would take the CPU about 0.1 ms for each.
    """
    device = images.device
    for index in torch.randperm(len(images), device=device).split(batch_size):
        pixels = images[index].unsqueeze(1).float()
        if rotation:
            turn = torch.empty(len(index), device=device).uniform_(-rotation, rotation)
            pixels = warp(pixels, rotation_matrices(turn))
        yield normalise(pixels), labels[index]


# ---- Model ----


class Net(nn.Module):
    """Three blocks of two 3x3 convolutions, 1x1 convolutions between them, global average pooling.

    Input (N, 1, 28, 28), output log-probabilities (N, 10); 9,798 parameters. Inside a block:
    convolution, ReLU, BatchNorm (Ioffe and Szegedy 2015), dropout (Srivastava et al. 2014).
    Averaging each class's map in place of a dense layer: Network in Network (Lin et al. 2013).
    """

    def __init__(self, dropout=0.05):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 10, 3, padding=1), nn.BatchNorm2d(10)
        self.conv2, self.norm2 = nn.Conv2d(10, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.squeeze1 = nn.Conv2d(16, 10, 1)
        self.conv3, self.norm3 = nn.Conv2d(10, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv4, self.norm4 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.squeeze2 = nn.Conv2d(16, 10, 1)
        self.conv5, self.norm5 = nn.Conv2d(10, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv6, self.norm6 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.classify = nn.Conv2d(16, 10, 1)
        self.dropout = Dropout(dropout)
        self.pool = nn.MaxPool2d(2)
        self.average = nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        x = self.dropout(self.norm1(F.relu(self.conv1(x))))  # 10 x 28 x 28
        x = self.dropout(self.norm2(F.relu(self.conv2(x))))  # 16 x 28 x 28
        x = F.relu(self.squeeze1(self.pool(x)))  # 10 x 14 x 14
        x = self.dropout(self.norm3(F.relu(self.conv3(x))))  # 16 x 14 x 14
        x = self.dropout(self.norm4(F.relu(self.conv4(x))))  # 16 x 14 x 14
        x = F.relu(self.squeeze2(self.pool(x)))  # 10 x 7 x 7
        x = self.dropout(self.norm5(F.relu(self.conv5(x))))  # 16 x 7 x 7
        x = self.dropout(self.norm6(F.relu(self.conv6(x))))  # 16 x 7 x 7
        x = self.average(self.classify(x))  # 10 x 1 x 1
        return F.log_softmax(x.flatten(1).float(), dim=1)


class Dropout(nn.Dropout):
    """``nn.Dropout``, with a faster way to draw on the CPU: see ``SparseDropout``."""

    def forward(self, x):
        if self.training and self.p and x.device.type == "cpu":
            return SparseDropout.apply(x, self.p)
        return super().forward(x)


class SparseDropout(torch.autograd.Function):
    """Dropout that draws the gaps between dropped elements, for p = 0.05 1 number in 20.

    PyTorch's draws one for each element, in one thread. The gaps between successes of
    independent trials are geometric, so the distribution is the same.
    """

    @staticmethod
    def forward(context, x, p):
        mean = x.numel() * p
        enough = int(mean + 6 * mean**0.5) + 16  # to run past the end: 6 sigma and more
        gaps = torch.rand(enough).neg_().log1p_().div_(math.log1p(-p)).long()
        dropped = (gaps + 1).cumsum(0) - 1
        context.dropped = dropped[: int(torch.searchsorted(dropped, x.numel()))]
        context.scale, context.layout = 1 / (1 - p), (x.shape, x.stride())
        return SparseDropout.drop(context, x)

    @staticmethod
    def backward(context, gradient):
        return SparseDropout.drop(context, gradient), None

    @staticmethod
    def drop(context, x):
        # Elements are numbered in memory order, which must then be the same both times.
        result = torch.empty_strided(*context.layout, dtype=x.dtype)
        torch.mul(x, context.scale, out=result)
        result.as_strided((x.numel(),), (1,)).index_fill_(0, context.dropped, 0)
        return result


def make_model(dropout, device, precision="fp32"):
    """Return a new ``Net`` on the device, in the memory order fastest there.

    With precision "bf16" it computes in bfloat16 where autocast thinks it safe.
    """
    model, device = Net(dropout), torch.device(device)
    if precision == "bf16":
        model.forward = torch.autocast(device.type, torch.bfloat16)(model.forward)
    if device.type == "cpu":
        # By default the C library gives freed activations back to the system, and fetching
        # them anew takes a sixth of a step. (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of glibc)
        with suppress(AttributeError, OSError, TypeError):  # another C library
            ctypes.CDLL(None).mallopt(-1, 2**31 - 1)
            ctypes.CDLL(None).mallopt(-3, 2**30)
        # Channels last saves a third of a step. But not for conv1: normalising 10
        # channels, which do not fill the processor's vectors, is faster channels first.
        for layer in model.children():
            if layer is not model.conv1:
                layer.to(memory_format=torch.channels_last)
    return model.to(device)


# ---- Training and testing ----


def train(model, batches, optimizer, scheduler, bar):
    """Train for one epoch; return the mean loss and the accuracy in % on the way."""
    model.train()
    seen, loss_sum, hits = 0, 0, 0  # the last two stay on the device
    for pixels, labels in batches:
        optimizer.zero_grad()
        output = model(pixels)
        loss = F.nll_loss(output, labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        seen += len(labels)
        loss_sum += loss.detach() * len(labels)
        hits += (output.argmax(dim=1) == labels).sum()
        if bar.update():  # true when it was redrawn: only then wait for the device
            bar.set_postfix(loss=loss_sum.item() / seen, accuracy=hits.item() / seen)
    return loss_sum.item() / seen, 100 * hits.item() / seen


@torch.no_grad()
def test(model, images, labels, batch_size):
    """Return the mean loss and the accuracy in % on a split."""
    model.eval()
    batches = images.unsqueeze(1).split(batch_size)
    output = torch.cat([model(normalise(batch)) for batch in batches])
    hits = (output.argmax(dim=1) == labels).sum()
    return F.nll_loss(output, labels).item(), 100 * hits.item() / len(labels)


def prepare(args, images):
    """Return a new model, its optimizer and its schedule for a training set of that size."""
    torch.manual_seed(args.seed)
    model = make_model(args.dropout, args.device, args.precision)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay
    )
    steps = args.epochs * math.ceil(images / args.batch_size)
    warm_up = args.pct_start * steps
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        args.lr,
        total_steps=steps,
        pct_start=args.pct_start if warm_up != 1 else 0.0,  # warm_up - 1 divides
        div_factor=args.div_factor,
        final_div_factor=args.final_div_factor,
        cycle_momentum=False,
    )
    return model, optimizer, scheduler


def fit(args, training_split, test_split, history):
    """Train a new model as the flags say and return it; add a row an epoch to history.

    Ends the program with status 1 when the loss is no longer finite.
    """
    model, optimizer, scheduler = prepare(args, len(training_split[0]))
    steps = math.ceil(len(training_split[0]) / args.batch_size)
    print("epoch        lr   train loss  accuracy    test loss  accuracy   seconds")
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        batches = training_batches(*training_split, args.batch_size, args.rotation)
        if args.dry_run:
            batches, steps = islice(batches, 1), 1
            test_split = [part[: args.test_batch_size] for part in test_split]
        # disable=None: no bar where stderr is no terminal
        bar = tqdm(total=steps, mininterval=0.25, leave=False, disable=None)
        with bar:
            trained = train(model, batches, optimizer, scheduler, bar)
        tested = test(model, *test_split, args.test_batch_size)
        if not math.isfinite(trained[0] + tested[0]):
            fail(
                f"the loss is not finite in epoch {epoch}: try a lower --lr than {args.lr}"
            )
        seconds = time.perf_counter() - start
        row = Epoch(epoch, scheduler.get_last_lr()[0], *trained, *tested, seconds)
        print(ROW.format(*row), flush=True)
        history.append(row)
        if args.dry_run:
            break
    return model


def print_result(history):
    """Print the final and the best accuracy and how soon 99.0 and 99.4 % were reached."""
    final, best = history[-1], max(history, key=lambda row: row.test_accuracy)
    print(f"final {final.test_accuracy:.2f} % after epoch {final.epoch}: the result")
    print(
        f"best  {best.test_accuracy:.2f} % after epoch {best.epoch}: "
        "picked by looking at the test images, so no result"
    )
    elapsed = list(accumulate(row.seconds for row in history))
    for goal in (99.0, 99.4):
        at = [i for i, row in enumerate(history) if row.test_accuracy >= goal][:1]
        when = [f"in epoch {i + 1}, after {elapsed[i]:.1f} s" for i in at]
        print(f"{goal}  first reached {''.join(when) or 'never'}")
    print(f"total {elapsed[-1]:.1f} s")


# ---- Command line ----


def number(interval, kind=float):
    """Return an argparse type: a number inside the interval, such as "[0, 1)"."""
    low, high = map(float, interval[1:-1].split(","))

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        at_low = value == low and interval[0] == "["
        at_high = value == high and interval[-1] == "]"
        if low < value < high or at_low or at_high:
            return value
        noun = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{text!r} is not a {noun} in {interval}")

    return parse


def parse_arguments(arguments=None):
    """Return the flags; ends the program with status 2 and one line on a bad one."""
    parser = argparse.ArgumentParser(
        description="Train a 9,798-parameter CNN on MNIST; test it after every epoch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: fail(f"{message} (see --help)", status=2)

    def add(flag, default, valid, text):
        parser.add_argument(flag, default=default, type=valid, help=text, metavar="X")

    count, size = number("[1, 100000]", int), number("[1, 60000]", int)
    add("--epochs", 19, count, "passes over the training images")
    add("--batch-size", 128, size, "images in a training batch")
    add("--test-batch-size", 1000, size, "images in a test batch")
    add("--lr", 0.015, number("(0, inf)"), "maximum learning rate, see OneCycleLR")
    add("--momentum", 0.9, number("[0, 1)"), "momentum of SGD, the same throughout")
    add("--weight-decay", 1e-4, number("[0, inf)"), "L2 penalty on every parameter")
    add("--dropout", 0.05, number("[0, 1)"), "probability of dropping an activation")
    add("--rotation", 7.0, number("[0, 180]"), "largest random turn, in degrees")
    add("--pct-start", 0.2, number("[0, 1)"), "fraction of the run in which lr rises")
    add("--div-factor", 10.0, number("[1, inf)"), "maximum lr / lr at the start")
    add("--final-div-factor", 100.0, number("[1, inf)"), "lr at start / lr at the end")
    add("--seed", 1, number("[0, 4294967295]", int), "fixes all random numbers")
    add("--device", "auto", str, "cuda, cuda:N, mps, cpu; auto: the first there is")
    add("--data-dir", "data", str, "folder with MNIST/raw, or to download it to")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the arithmetic; bf16 is faster where the hardware has it",
    )
    switch = partial(parser.add_argument, action="store_true")
    switch("--synthetic", help="train on digits rendered here, with no download")
    switch("--dry-run", help="do one training and one test batch and stop")
    args = parser.parse_args(arguments)
    available = ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if torch.cuda.is_available():
        numbered = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        available = ["cuda", *numbered, *available]
    if args.device == "auto":
        args.device = available[0]
    if args.device not in available:
        here = ", ".join(available)
        parser.error(f"argument --device: {args.device!r} is not here, there is {here}")
    return args


def fail(message, status=1):
    """End the program with one line on stderr."""
    print("mnist_cnn.py: error:", *str(message).split(), file=sys.stderr)
    sys.exit(status)


def interrupt(signal_number, frame):
    raise KeyboardInterrupt(signal_number)


def print_header(device):
    """Print what runs where and, when torchsummary is installed, the layers."""
    model = Net()
    count = sum(weight.numel() for weight in model.parameters())
    detail = f"{torch.get_num_threads()} threads" if device == "cpu" else ""
    if device.startswith("cuda"):
        detail = torch.cuda.get_device_name(device)
    print(f"{count:,} parameters on {device} {detail}".rstrip())
    libraries = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    print(f"Python {platform.python_version()}, {libraries}")
    if summary:
        # It trains what it is shown: BatchNorm's averages move, random numbers are drawn.
        # So it gets a network of its own, and fit() sets the seed afterwards.
        summary(model, (1, 28, 28), device="cpu")


def main():
    args = parse_arguments()
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, interrupt)
    torch.backends.cudnn.deterministic = True  # else the same seed could differ
    history = []
    try:
        print_header(args.device)
        if args.synthetic:
            print("Synthetic digits: accuracy on them says nothing about MNIST.")
            splits = synthetic_digits(60000, seed=0), synthetic_digits(10000, seed=1)
        else:
            splits = load_mnist(args.data_dir)
        splits = [[part.to(args.device) for part in split] for split in splits]
        fit(args, *splits, history)
    except KeyboardInterrupt as stop:
        name = signal.Signals(stop.args[0]).name
        done = f"{len(history)} of {args.epochs} epochs"
        fail(f"stopped by {name} after {done}", status=128 + stop.args[0])
    print_result(history)


if __name__ == "__main__":
    main()
