# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "torchvision", "tqdm", "torchsummary", "matplotlib"]
# ///
"""Train a CNN of 9,798 parameters with global average pooling on MNIST.

    python mnist_cnn.py                      # the reference recipe: 19 epochs
    python mnist_cnn.py --recipe best        # the same network, better trained
    python mnist_cnn.py --lr 0.05 --runs 5   # mean and interval of five seeds
    python mnist_cnn.py --resume runs/NAME   # continue a run that was stopped

Test accuracy on a CPU, 5 seeds: reference 99.33 ± 0.07 %, best 99.56 ± 0.02 %,
best with --epochs 76 --tta --precision bf16 99.63 ± 0.04 %.
"""

import argparse
import ctypes
import io
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
import time
import zlib
from collections import namedtuple
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import chain
from pathlib import Path

SOURCE = Path(__file__).read_bytes()  # saved with the results

if __name__ == "__main__":  # Ctrl-C while the libraries load: no traceback
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import distributed, nn
from torch.optim.swa_utils import update_bn
from torchvision.datasets import MNIST
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

MEAN, STD = 0.1307, 0.3081  # of the training set's pixels, scaled to [0, 1]
SHARED = {"weight_decay": 5e-4, "dropout": 0.0, "precise_bn": True}
BEST = {"lr": 0.2, "rotation": 10.0, "shift": 1.5}
QUICK = {"epochs": 6, "batch_size": 64, "lr": 0.15, "rotation": 5.0, "shift": 0.5}
RECIPES = {"reference": {}, "best": SHARED | BEST, "quick": SHARED | QUICK}


def fail(message, status=1):
    """End the program with one line on stderr."""
    print("mnist_cnn.py: error:", *message.splitlines(), file=sys.stderr)
    sys.exit(status)


@contextmanager
def failing_with(problem):
    """End the program with one line if the block fails."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        fail(f"{problem}: {type(error).__name__}: {error}")


# ---- Data: (images (N, 28, 28) uint8, labels (N,) int64) on the device ----


def load_mnist(data_dir, train):
    """Return the train set or the test set, downloaded if absent."""
    raw = Path(data_dir, "MNIST", "raw")
    remedy = "give --data-dir, put its four .gz files there, or use --synthetic"
    with failing_with(f"cannot read MNIST in {raw} ({remedy})"):
        dataset = MNIST(data_dir, train, download=True)
        images, labels = dataset.data, dataset.targets
        if images.shape != (len(labels), 28, 28) or labels.max() > 9:
            raise ValueError("no digit from 0 to 9 for each image of 28x28 pixels")
    return images, labels


def synthetic_digits(count, seed):
    """Return digits in Pillow's font, rotated and shifted at random."""
    font = ImageFont.load_default(size=24)
    glyphs = torch.empty(10, 1, 28, 28)
    for digit in range(10):
        picture = Image.new("L", (28, 28))
        ImageDraw.Draw(picture).text((14, 14), str(digit), 255, font, anchor="mm")
        glyphs[digit] = pil_to_tensor(picture)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    degrees = torch.randn(count, generator=generator) * 15
    shifts = torch.randn(count, 2, generator=generator) * 2
    return affine(glyphs[labels], degrees, shifts).squeeze(1).byte(), labels


def load_datasets(args):
    """Return the train set and the test set, or --holdout's validation set."""
    if args.synthetic:
        print("Synthetic digits: accuracy on them says nothing about MNIST.")
        train_set, test_set = synthetic_digits(12_000, 0), synthetic_digits(2_000, 1)
    else:
        train_set = load_mnist(args.data_dir, train=True)
        test_set = None if args.holdout else load_mnist(args.data_dir, train=False)
    if args.holdout:
        if args.holdout >= (count := len(train_set[0])):
            fail(f"--holdout {args.holdout} leaves none of {count} images", status=2)
        test_set = [part[-args.holdout :] for part in train_set]
        train_set = [part[: -args.holdout] for part in train_set]
    limit = args.batch_size if args.dry_run else None
    pairs = train_set, test_set
    return [[part[:limit].to(args.device) for part in pair] for pair in pairs]


def affine(images, degrees, shifts):
    """Return float images (N, 1, 28, 28) shifted, then rotated about their centre.

    ``shifts`` (N, 2): pixels right and down; ``degrees`` (N,): counter-clockwise.
    """
    cosine, sine = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    # Each output pixel samples the input at rotation * itself - shift, from -1 to 1.
    x, y = (-shifts / 14).unbind(dim=1)
    matrix = torch.stack((cosine, -sine, x, sine, cosine, y), dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def normalise(images):
    """Return pixels of 0 to 255 as inputs of mean 0 and standard deviation 1."""
    return (images / 255 - MEAN) / STD


def train_batches(images, labels, batch_size, rotation, shift):
    """Yield (inputs (B, 1, 28, 28), labels (B,)): each image once, in random order.

    ``rotation`` in degrees and ``shift`` in pixels are the largest either way.
    """
    for index in torch.randperm(len(images), device=images.device).split(batch_size):
        batch = images[index].unsqueeze(1).float()
        if rotation or shift:
            degrees = batch.new_empty(len(index)).uniform_(-rotation, rotation)
            shifts = batch.new_empty(len(index), 2).uniform_(-shift, shift)
            batch = affine(batch, degrees, shifts)
        yield normalise(batch), labels[index]


# ---- Model ----


class Dropout(nn.Dropout):
    """``nn.Dropout`` drawing only what it drops: saves a third of a step on a CPU."""

    def forward(self, x):
        if not (self.training and self.p and x.device.type == "cpu"):
            return super().forward(x)
        # So many, with replacement, leave each element out with probability 1 - p.
        draws = torch.poisson(torch.tensor(-x.numel() * math.log1p(-self.p)))
        dropped = torch.randint(x.numel(), (int(draws),))
        mask = x.new_full((x.numel(),), 1 / (1 - self.p)).index_fill_(0, dropped, 0)
        return x * mask.as_strided(x.shape, x.stride())


class Net(nn.Module):
    """Map inputs (N, 1, 28, 28) to log-probabilities (N, 10).

    Global average pooling in place of a dense layer: Network in Network (Lin et al.
    2013). 9,798 parameters with width 1; ``width`` multiplies all hidden channels.
    """

    def __init__(self, width=1, dropout=0.05):
        super().__init__()
        c10, c16 = 10 * width, 16 * width  # channels
        self.conv1, self.norm1 = nn.Conv2d(1, c10, 3, padding=1), nn.BatchNorm2d(c10)
        self.conv2, self.norm2 = nn.Conv2d(c10, c16, 3, padding=1), nn.BatchNorm2d(c16)
        self.transition1 = nn.Conv2d(c16, c10, 1)
        self.conv3, self.norm3 = nn.Conv2d(c10, c16, 3, padding=1), nn.BatchNorm2d(c16)
        self.conv4, self.norm4 = nn.Conv2d(c16, c16, 3, padding=1), nn.BatchNorm2d(c16)
        self.transition2 = nn.Conv2d(c16, c10, 1)
        self.conv5, self.norm5 = nn.Conv2d(c10, c16, 3, padding=1), nn.BatchNorm2d(c16)
        self.conv6, self.norm6 = nn.Conv2d(c16, c16, 3, padding=1), nn.BatchNorm2d(c16)
        self.classifier = nn.Conv2d(c16, 10, 1)
        self.dropout = Dropout(dropout)
        self.pool = nn.MaxPool2d(2)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.width = width

    def forward(self, x):
        # the shape with width 1, and the receptive field in pixels
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


def make_model(width, dropout, device, precision):
    """Return a new ``Net``, set up for the device and the precision."""
    model = Net(width, dropout)
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # on by default
    if precision == "bf16":
        autocast = torch.autocast(torch.device(device).type, torch.bfloat16)
        model.forward = autocast(model.forward)
    if device == "cpu":
        with suppress(AttributeError, OSError, TypeError):  # needs glibc
            # Not returning freed memory saves a fifth of a step.
            ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its largest
        for layer in list(model.children())[1:]:  # conv1 is faster without
            layer.to(memory_format=torch.channels_last)  # saves a tenth of a step
    return model.to(device)


def load_model(path, device="cpu", precision="fp32"):
    """Return the model whose weights, and with them its width, are in a file."""
    with failing_with(f"cannot use {path}"):
        weights = torch.load(path, "cpu", weights_only=True)
        width = len(dict(weights)["conv1.bias"]) // 10 or 1
        model = make_model(width, 0, device, precision)
        model.load_state_dict(weights)
        if not model.eval()(torch.zeros(1, 1, 28, 28, device=device)).isfinite().all():
            raise ValueError("damaged: its output is not finite")
    return model


# ---- Training and testing ----

# A row of the history; accuracy in %; eval is the test or validation set.
FIELDS = "epoch learning_rate train_loss train_accuracy eval_loss eval_accuracy seconds"
Epoch = namedtuple("Epoch", FIELDS)
HEADER = "epoch        lr   train loss  accuracy  {:>15}  accuracy   seconds"
ROW = "{:5d}  {:8.6f}  {:11.4f}  {:6.2f} %  {:15.4f}  {:6.2f} %  {:8.1f}"


def make_training(args, seed, total_steps):
    """Return a new model, its optimizer and its scheduler, which steps per batch."""
    torch.manual_seed(seed * 10_000)
    torch.backends.cudnn.deterministic = True  # the seed fixes the weights
    model = make_model(args.width, args.dropout, args.device, args.precision)
    decay = args.weight_decay
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=decay, fused=True
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        args.lr,
        total_steps,
        # OneCycleLR divides by (steps of the warm-up - 1).
        pct_start=args.pct_start if args.pct_start * total_steps != 1 else 0.0,
        div_factor=args.div_factor,
        final_div_factor=args.final_div_factor,
        cycle_momentum=False,
    )
    return model, optimizer, scheduler


def distillation_loss(output, teacher_outputs, temperature):
    """Return a student's loss, without labels (Hinton, Vinyals and Dean 2015).

    ``output`` (N, 10), ``teacher_outputs`` (teachers, N, 10): log-probabilities.
    """
    soft_labels = (teacher_outputs / temperature).softmax(dim=2).mean(dim=0)
    softened = (output / temperature).log_softmax(dim=1)
    divergence = F.kl_div(softened, soft_labels, reduction="batchmean")
    return divergence * temperature**2  # keeps the size of its gradient


def train_epoch(args, teachers, model, optimizer, scheduler, batches, steps):
    """Train an epoch; return last learning rate, mean loss, accuracy in %."""
    model.train()
    count, loss_sum, correct = 0, 0, 0  # on the device: no wait for it in every step
    bar = tqdm(total=steps, file=sys.stdout, disable=None, leave=False)
    for inputs, labels in batches:
        optimizer.zero_grad()
        output = model(inputs)
        if teachers:
            with torch.no_grad():  # of what the student sees: Beyer et al. (2022)
                outputs = torch.stack([teacher(inputs) for teacher in teachers])
            loss = distillation_loss(output, outputs, args.temperature)
        else:
            loss = F.nll_loss(output, labels)
        loss.backward()
        optimizer.step()
        learning_rate = scheduler.get_last_lr()[0]
        scheduler.step()
        count += len(labels)
        loss_sum += loss.detach() * len(labels)
        correct += (output.argmax(dim=1) == labels).sum()
        if bar.update():  # redrawn: only then wait for the device
            accuracy = 100 * correct.item() / count
            bar.set_postfix(loss=loss_sum.item() / count, accuracy=accuracy)
    bar.close()
    return learning_rate, loss_sum.item() / count, 100 * correct.item() / count


def precise_batch_norm(model, images):
    """Give BatchNorm the statistics of the images as they are (Wu and Johnson 2021)."""
    model.dropout.p = 0  # the model will be tested without
    # Batches of one size, because each weighs the same.
    batches = images.unsqueeze(1).tensor_split(math.ceil(len(images) / 1000))
    update_bn((normalise(batch) for batch in batches), model)


@torch.no_grad()
def predict(model, images, batch_size):
    """Return log-probabilities (N, 10) for uint8 images (N, 28, 28)."""
    model.eval()
    batches = images.unsqueeze(1).split(batch_size)
    return torch.cat([model(normalise(batch)) for batch in batches])


def predict_tta(model, images, batch_size):
    """Return ``predict`` averaged over nine shifts: test-time augmentation."""
    padded = F.pad(images, (1, 1, 1, 1))  # by -1, 0 and 1 pixel on both axes
    shifted = [padded[:, y : y + 28, x : x + 28] for y in range(3) for x in range(3)]
    outputs = torch.stack([predict(model, part, batch_size) for part in shifted])
    return outputs.logsumexp(dim=0) - math.log(9)


def loss_and_accuracy(output, labels):
    """Return mean loss and accuracy in % of log-probabilities (N, 10)."""
    correct = (output.argmax(dim=1) == labels).sum().item()
    return F.nll_loss(output, labels).item(), 100 * correct / len(labels)


def train(args, seed, teachers, train_set, test_set, folder):
    """Train a model, from its checkpoint if any; return it and its history."""
    steps = math.ceil(len(train_set[0]) / args.batch_size)
    training = make_training(args, seed, args.epochs * steps)
    model, history = training[0], []
    if folder and (folder / "checkpoint.pt").exists():
        history = load_checkpoint(folder / "checkpoint.pt", training)
    print(HEADER.format(f"{args.test_name.lower()} loss"))
    start = time.perf_counter() - (history[-1].seconds if history else 0)
    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(seed * 10_000 + epoch)  # no generator state to save
        batches = train_batches(*train_set, args.batch_size, args.rotation, args.shift)
        trained = train_epoch(args, teachers, *training, batches, steps)
        if args.precise_bn and epoch == args.epochs:
            precise_batch_norm(model, train_set[0])
        output = predict(model, test_set[0], args.test_batch_size)
        tested = loss_and_accuracy(output, test_set[1])
        history.append(Epoch(epoch, *trained, *tested, time.perf_counter() - start))
        if not math.isfinite(history[-1].train_loss + history[-1].eval_loss):
            fail(f"loss not finite in epoch {epoch}: try a lower --lr than {args.lr}")
        print(ROW.format(*history[-1]))
        if folder:
            save_checkpoint(folder, training, history)
    return model, history


# ---- Files and results ----


def save(path, content):
    """Write tensors (.pt), a figure (.png), JSON or bytes to a file, atomically."""
    if path.suffix == ".pt":
        torch.save(content, buffer := io.BytesIO())
        content = buffer.getvalue()
    elif path.suffix == ".png":
        content.savefig(buffer := io.BytesIO(), bbox_inches="tight")
        content = buffer.getvalue()
    elif path.suffix == ".json":
        content = json.dumps(content, indent=2).encode()
    unfinished = Path(f"{path}.{os.getpid()}.new")
    with failing_with(f"cannot write {path}"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(unfinished, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


def save_checkpoint(folder, training, history):
    """Write metrics.csv, and checkpoint.pt for ``load_checkpoint``."""
    lines = [",".join(map(str, row)) for row in (Epoch._fields, *history)]
    save(folder / "metrics.csv", "\n".join([*lines, ""]).encode())
    states = [part.state_dict() for part in training]
    save(folder / "checkpoint.pt", (states, [tuple(row) for row in history]))


def load_checkpoint(path, training):
    """Restore model, optimizer and scheduler; return the history."""
    with failing_with(f"cannot use {path}"):
        states, history = torch.load(path, "cpu", weights_only=True)
        for part, state in zip(training, states, strict=True):
            part.load_state_dict(state)
        return [Epoch(int(epoch), *map(float, row)) for epoch, *row in history]


def test(args, model, history, test_set, folder):
    """Print a model's result; save it, weights and picture if there is a folder."""
    images, labels = test_set
    output = predict(model, images, args.test_batch_size)
    loss, accuracy = loss_and_accuracy(output, labels)
    result = {"accuracy": accuracy, "loss": loss}
    print(f"{args.test_name} accuracy {accuracy:.2f} %")
    if args.tta:
        averaged = predict_tta(model, images, args.test_batch_size)
        result["tta_accuracy"] = loss_and_accuracy(averaged, labels)[1]
        print(f"{args.test_name} TTA accuracy {result['tta_accuracy']:.2f} %")
    if history:
        best = max(history, key=lambda row: row.eval_accuracy)
        result |= {"best": best._asdict(), "seconds": history[-1].seconds}
        text = f"{best.eval_accuracy:.2f} % in epoch {best.epoch}"
        print(f"Best {text}, chosen on the {args.test_name.lower()} set")
        for goal in (99.0, 99.4):
            if row := next((row for row in history if row.eval_accuracy >= goal), None):
                result[f"epochs_to_{goal}"] = row.epoch
                print(f"{goal} % after {row.seconds:.0f} s, in epoch {row.epoch}")
    masks = {digit: labels == digit for digit in labels.unique().tolist()}
    digits = {d: loss_and_accuracy(output[m], labels[m])[1] for d, m in masks.items()}
    print("digit   ", *(f"{digit:>6}" for digit in digits))
    print("accuracy", *(f"{value:6.2f}" for value in digits.values()))
    if folder:
        save(folder / "final.pt", model.state_dict())
        try:
            tensors = (tensor.cpu() for tensor in (images, labels, output))
            draw_report(folder / "report.png", history, *tensors)
        except Exception as error:  # noqa: BLE001
            print(f"mnist_cnn.py: warning: no report.png: {error}", file=sys.stderr)
        # The last file: with it the seed is finished.
        save(folder / "result.json", result | {"accuracy_by_digit": digits})


def draw_report(path, history, images, labels, output):
    """Draw training curves, confusion matrix and most confident mistakes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 10), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    if history:
        epochs, _, *curves, _ = zip(*history)
        axes, titles = top.subplots(1, 2), ("loss", "accuracy in %")
        for ax, title, train, tested in zip(axes, titles, curves[:2], curves[2:]):
            ax.plot(epochs, train, ".-", label="training")
            ax.plot(epochs, tested, ".-", label="test or validation")
            ax.set(title=title, xlabel="epoch")
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.legend()
    left, right = bottom.subfigures(1, 2)
    probability, predicted = output.exp().max(dim=1)
    counts = torch.bincount(labels * 10 + predicted, minlength=100).view(10, 10)
    ax = left.subplots()
    ax.imshow((counts - counts.diag().diag()).numpy(), cmap="Oranges")
    ax.set(xlabel="predicted digit", ylabel="true digit", title="confusion matrix")
    ax.set(xticks=range(10), yticks=range(10))
    for true, other in counts.nonzero().tolist():
        ax.text(other, true, counts[true, other].item(), ha="center", va="center")
    right.suptitle("most confident mistakes: true as predicted, probability")
    order = (probability * (predicted != labels)).argsort(descending=True)
    for ax, index in zip(right.subplots(3, 4).flat, order):
        ax.axis("off")
        if predicted[index] != labels[index]:
            ax.imshow(images[index].numpy(), cmap="gray_r")
            title = f"{labels[index]} as {predicted[index]}, {probability[index]:.0%}"
            ax.set_title(title, fontsize=10)
    save(path, figure)


def summarise(args, folder):
    """Print and save the seeds' mean accuracy and its confidence interval."""
    results = {}
    for seed in range(args.seed, args.seed + args.runs):
        path = folder / f"seed-{seed}" / "result.json"
        with failing_with(f"cannot use {path}"):
            results[seed] = result = json.loads(path.read_text())
            row = "{accuracy:.2f} % in {seconds:.0f} s".format_map(result)
        if args.runs > 1:
            print(f"seed {seed}: {row}")
    summary = {"seeds": results}
    for name in ("tta_accuracy", "accuracy") if args.tta else ("accuracy",):
        values = [result[name] for result in results.values()]
        summary[name] = mean = {"n": args.runs, "mean": statistics.mean(values)}
        if args.runs > 1:
            deviation = statistics.stdev(values)
            interval = student_t(args.runs - 1) * deviation / args.runs**0.5
            mean |= {"deviation": deviation, "interval": interval}
            title = f"{args.test_name} {name}".replace("tta_", "TTA ")
            text = f"{title} {mean['mean']:.2f} ± {interval:.2f} %"
            print(f"{text} (mean and 95 % confidence interval, n = {args.runs})")
    save(folder / "result.json", summary)


def student_t(freedom, confidence=0.95):
    """Return the two-sided critical value of Student's t distribution."""
    # Its density over angle = arctan(t / sqrt(freedom)) goes as cos^(freedom - 1).
    angle = torch.linspace(0, math.pi / 2, 1_000_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angle.cos() ** (freedom - 1), angle)
    index = torch.searchsorted(mass, confidence * mass[-1])
    return freedom**0.5 * angle[index + 1].tan().item()


def compare(folders, picture):
    """Print how finished runs differ from the first, in accuracy and in flags."""
    confidence = 1 - 0.05 / max(1, len(folders) - 1)  # Bonferroni's correction
    runs = []
    for folder in folders:
        with failing_with(f"cannot compare {folder} (if unfinished, --resume it)"):
            run = json.loads(Path(folder, "config.json").read_text())
            run |= json.loads(Path(folder, "result.json").read_text())
            runs.append(run | run["accuracy"] | {"name": folder})
            if runs[-1]["n"] != run["runs"]:
                raise ValueError("seeds are missing")
            if run["flags"]["data"] != runs[0]["flags"]["data"]:
                raise ValueError(f"other data or --holdout than in {folders[0]}")
    kind = "validation" if runs[0]["flags"]["holdout"] else "test"
    width = max(3, *map(len, folders))
    print(f"{'run':{width}}    n  {kind} accuracy, %; difference from the first")
    advice = {}  # the number of seeds that each run should have
    for index, run in enumerate(runs):
        text, seeds = verdict(runs[0], run, confidence) if index else ("", 0)
        interval = f"± {run['interval']:.2f}" if run["n"] > 1 else ""
        row = f"{run['name']:{width}} {run['n']:4}  {run['mean']:.2f} {interval:6}"
        print(f"{row}  {text}".rstrip())
        for each in (runs[0], run):
            if each["n"] < seeds <= 1000:
                advice[each["name"]] = max(seeds, advice.get(each["name"], 0))
    for name, seeds in advice.items():
        print(f"    {resume_command(name)} --runs {seeds}")
    print(f"Confidence 95 % (of a mean), {100 * confidence:.4g} % (of a difference)")
    for name in dict.fromkeys(chain(*(run["flags"] for run in runs))):
        values = [str(run["flags"].get(name)) for run in runs]
        if name not in ("recipe", "out", "tta") and len(set(values)) > 1:
            print(f"{name:16}", *(f"{value:>9}" for value in values))
    if picture:
        with failing_with(f"cannot draw {picture}"):
            draw_comparison(Path(f"{picture.removesuffix('.png')}.png"), runs)


def verdict(a, b, confidence):
    """Return in words how b's mean differs from a's, and how many seeds would tell."""
    first, second = (run.get("deviation", 0) ** 2 / run["n"] for run in (a, b))
    if min(a["n"], b["n"]) == 1 or first + second == 0:
        return "cannot tell: no interval without a spread between seeds", 5
    # Welch (1947); seeds for a power of 80 %: Guenther (1981), 0.84 = quantile of 0.8
    difference, error = b["mean"] - a["mean"], (first + second) ** 0.5
    freedom = error**4 / (first**2 / (a["n"] - 1) + second**2 / (b["n"] - 1))
    half_width = error * student_t(freedom, confidence)
    text = f"{difference:+.3f} ± {half_width:.3f}  "
    if abs(difference) > half_width:
        return text + ("better" if difference > 0 else "worse"), 0
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    effect = difference**2 / (a["deviation"] ** 2 + b["deviation"] ** 2)
    seeds = math.ceil((z + 0.8416) ** 2 / max(effect, 1e-9) + z**2 / 4)
    seeds = max(seeds, min(a["n"], b["n"]) + 1)  # so few did not tell
    about = f"about {seeds}" if seeds <= 1000 else "more than 1,000"
    return f"{text}cannot tell; {about} seeds each would", seeds


def draw_comparison(path, runs):
    """Draw a dot for each seed, and each run's mean with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + len(runs) / 2))
    ax = figure.subplots()
    for run in runs:
        dots = [result["accuracy"] for result in run["seeds"].values()]
        ax.plot(dots, [run["name"]] * len(dots), "o", alpha=0.4)
        interval = run.get("interval")
        ax.errorbar(run["mean"], run["name"], xerr=interval, fmt="k|", capsize=4)
    ax.set(xlabel="accuracy in %")
    ax.margins(y=0.3 / len(runs))
    ax.invert_yaxis()
    save(path, figure)


# ---- Command line ----

# flag, default, valid (low <= number < high, choices, metavar, None: switch), help
FLAGS = {
    "recipe": [
        ("--recipe", "reference", list(RECIPES), "preset; explicit flags override it"),
        ("--epochs", 19, (1, 10_000), "passes over the train set"),
        ("--batch-size", 128, (1, 100_000), "images in a training batch"),
        ("--lr", 0.015, (0, math.inf), "maximum learning rate of OneCycleLR"),
        ("--momentum", 0.9, (0, 1), "momentum of SGD, not cycled"),
        ("--weight-decay", 1e-4, (0, math.inf), "L2 penalty on all parameters"),
        ("--width", 1, (1, 100), "multiple of all hidden channels"),
        ("--dropout", 0.05, (0, 1), "probability of dropping an activation"),
        ("--rotation", 7.0, (0, 360), "maximum random rotation, degrees"),
        ("--shift", 0.0, (0, 28), "maximum random shift, pixels"),
        ("--pct-start", 0.2, (0, 1), "fraction of the steps that warm up"),
        ("--div-factor", 10.0, (1, math.inf), "maximum / initial learning rate"),
        ("--final-div-factor", 100.0, (1, math.inf), "initial / final learning rate"),
        ("--precise-bn", False, None, "recompute BatchNorm statistics at the end"),
    ],
    "distillation": [
        ("--teacher", [], "FILE...", "learn from these networks, not from labels"),
        ("--temperature", 2.0, (0.01, 1000), "softens the teachers' probabilities"),
    ],
    "run": [
        ("--seed", 1, (0, 100_000), "seed of the first model"),
        ("--runs", 1, (1, 100_000), "models to train, seeds from --seed up"),
        ("--holdout", 0, (0, 100_000), "hold out the last N images to validate on"),
        ("--test-batch-size", 1000, (1, 100_000), "images in a test batch"),
        ("--device", "auto", "NAME", "cpu, or an accelerator as in cuda, cuda:1"),
        ("--precision", "fp32", ["fp32", "tf32", "bf16"], "numerical precision"),
        ("--tta", False, None, "test-time augmentation: average nine shifts"),
        ("--synthetic", False, None, "use generated digits, no download"),
        ("--dry-run", False, None, "train and test on one batch, leave no files"),
    ],
    "files": [
        ("--data-dir", "data", "DIR", "where MNIST/raw is, or is downloaded to"),
        ("--out", None, "DIR", "new folder for the output files"),
        ("--resume", None, "DIR", "continue the run in a folder"),
        ("--evaluate", None, "FILE", "only test the weights in a file"),
        ("--compare", None, "RUN...", "compare the accuracies of finished runs"),
    ],
}


def parse_arguments(arguments):
    """Return the parsed flags; exit with status 2 on an invalid one."""
    description = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (see --help)", status=2)
    for title, rows in FLAGS.items():
        group = parser.add_argument_group(title)
        for flag, default, valid, text in rows:
            kind = type(default)
            options = {"type": kind, "metavar": "N" if kind is int else None}
            if valid is None:
                options = {"action": argparse.BooleanOptionalAction}
            elif isinstance(valid, list):
                options = {"choices": valid}
            elif isinstance(valid, str):
                options = {"type": os.path.expanduser, "metavar": valid.strip(".")}
                options["nargs"] = "+" if valid.endswith("...") else None
            text += " (default: %(default)s)" * (default not in (None, []))
            group.add_argument(flag, default=default, help=text, **options)
    # Once for the recipe alone, whose defaults --help then shows.
    no_help = [word for word in arguments if word not in ("-h", "--help")]
    parser.set_defaults(**RECIPES[parser.parse_args(no_help).recipe])
    args = parser.parse_args(arguments)
    for flag, _, valid, _ in chain(*FLAGS.values()):
        value = vars(args)[flag[2:].replace("-", "_")]
        if isinstance(valid, tuple) and not valid[0] <= value < valid[1]:
            parser.error(f"{flag} {value} is not in [{valid[0]}, {valid[1]})")
        if value == "":
            parser.error(f"{flag} is empty")
    count = torch.accelerator.device_count()
    accelerator = torch.accelerator.current_accelerator().type if count else "cpu"
    devices = [*(f"{accelerator}:{index}" for index in range(count)), "cpu"]
    if args.device in ("auto", accelerator):
        args.device = devices[int(os.environ.get("LOCAL_RANK", "0")) % max(count, 1)]
    if args.device not in devices:
        available = ", ".join(devices)
        parser.error(f"--device {args.device} is not available; available: {available}")
    args.epochs = 1 if args.dry_run else args.epochs
    args.test_name = "Validation" if args.holdout else "Test"
    return args


def describe_run(args, arguments, where, datasets):
    """Return what config.json holds: what a run was given and what it runs on."""
    varies = ("data_dir", "device", "resume", "runs", "test_name")  # when resumed
    flags = {name: value for name, value in vars(args).items() if name not in varies}
    tensors = b"".join(part.cpu().numpy() for pair in datasets for part in pair)
    flags["data"] = zlib.crc32(tensors)
    flags["script"] = f"{zlib.crc32(SOURCE):08x}"
    flags["teacher"] = [zlib.crc32(Path(path).read_bytes()) for path in args.teacher]
    arguments = [*arguments, "--data-dir", os.path.abspath(args.data_dir)]
    if args.teacher:
        arguments += ["--teacher", *map(os.path.abspath, args.teacher)]
    return {
        "arguments": arguments,
        "flags": flags,
        "device": where,
        "runs": args.runs,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def open_folder(args, saved, config):
    """Create a run's folder, or check that --resume may continue it; return it."""
    for path in args.teacher if args.holdout else ():
        check_teacher(path, config["flags"]["data"])
    now = time.strftime("%Y-%m-%d-%H%M%S")
    folder = Path(args.resume or args.out or f"runs/{now}-{os.getpid()}")
    if saved:
        check_resume(args, folder, saved, config)
        save(folder / "config.json", saved | {"runs": args.runs})
    else:
        make_folder(folder, config)
    print(f"Output files in {folder}; to continue after a stop:")
    print(resume_command(folder))
    return folder


def check_resume(args, folder, saved, config):
    """Refuse to continue a run with other flags, data, script or teachers."""
    old, new = saved["flags"], config["flags"]
    if changed := ", ".join(name for name in new if old.get(name) != new[name]):
        command = f"{resume_command(folder)} --runs {max(args.runs, saved['runs'])}"
        fail(f"{folder} was started with different {changed}; continue with: {command}")
    if args.runs < saved["runs"]:
        fail(f"{folder} has --runs {saved['runs']} already, not {args.runs}", status=2)
    if saved["device"] != config["device"] or saved["torch"] != config["torch"]:
        started = f"{saved['device']}, torch {saved['torch']}"
        print(f"Started on {started}: from here on not bit-identical.")


def check_teacher(path, data):
    """Refuse a teacher that may have been trained on the validation images."""
    teacher_data = None
    run = Path(path).resolve().parent.parent  # of run/seed-N/final.pt
    with suppress(OSError, ValueError, KeyError, TypeError):
        teacher_data = json.loads((run / "config.json").read_text())["flags"]["data"]
    problem = f"{path} may have seen the validation images"
    if teacher_data is None:
        print(f"mnist_cnn.py: warning: {problem}: no config.json", file=sys.stderr)
    elif teacher_data != data:
        fail(f"{problem}: train it with the same --holdout and data")


def resume_command(folder):
    """Return the command that continues a run with its own copy of the script."""
    script = Path(folder, "mnist_cnn.py")
    return shlex.join(["python", str(script), "--resume", str(folder)])


def make_folder(folder, config):
    """Create a folder with config.json and the script, or nothing."""
    unfinished = Path(f"{folder}.{os.getpid()}.new")
    with failing_with(f"cannot make {folder}"):
        try:
            save(unfinished / "config.json", config)
            (unfinished / "mnist_cnn.py").write_bytes(SOURCE)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def print_header(width, device):
    """Print the device and the layers; return the device's description."""
    where = f"{device}, {torch.get_num_threads()} threads"
    if device.startswith("cuda"):
        where = f"{device}, {torch.cuda.get_device_name(device)}"
    count = sum(weight.numel() for weight in Net(width).parameters())
    print(f"{count:,} parameters on {where}, torch {torch.__version__}")
    with suppress(ImportError):
        from torchsummary import summary

        summary(Net(width), (1, 28, 28), device="cpu")
    return where


def main(arguments):
    """Train, evaluate or compare, as the flags say."""
    args, saved, rank, ranks = parse_arguments(arguments), None, 0, 1
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if args.compare:
        return compare(args.compare, args.out)
    if args.out and not args.resume and Path(args.out).exists():
        fail(f"{args.out} already exists: choose another --out, or --resume it")
    if args.evaluate and not args.resume:
        model = load_model(args.evaluate, args.device, args.precision)
        print_header(model.width, args.device)
        out = Path(args.out) if args.out and not args.dry_run else None
        return test(args, model, [], load_datasets(args)[1], out)
    if args.resume:
        with failing_with(f"cannot use {args.resume}/config.json"):
            saved = json.loads(Path(args.resume, "config.json").read_text())
            runs = ["--runs", str(saved["runs"])]
            args = parse_arguments([*saved["arguments"], *runs, *arguments])
            torch.set_num_threads(saved["threads"])
    if torchrun:  # its ranks share the seeds
        distributed.init_process_group("gloo", timeout=timedelta(days=30))
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
        sys.stdout = io.StringIO() if rank > 0 else sys.stdout  # only rank 0 prints
    teachers = [load_model(path, args.device, args.precision) for path in args.teacher]
    where, folder = print_header(args.width, args.device), None
    if rank == 0:
        datasets = load_datasets(args)
        if not args.dry_run:
            config = describe_run(args, arguments, where, datasets)
            folder = open_folder(args, saved, config)
    if torchrun:
        distributed.broadcast_object_list(shared := [folder])
        folder = shared[0]
    if rank > 0:  # rank 0 has downloaded the files
        datasets = load_datasets(args)
    for seed in range(args.seed, args.seed + args.runs)[rank::ranks]:
        seed_folder = folder and folder / f"seed-{seed}"
        if seed_folder and (seed_folder / "result.json").exists():
            continue  # it is finished
        print(f"Seed {seed}")
        model, history = train(args, seed, teachers, *datasets, seed_folder)
        test(args, model, history, datasets[1], seed_folder)
    if torchrun:
        distributed.barrier()
        distributed.destroy_process_group()  # its threads could abort the exit
    if folder and rank == 0:
        summarise(args, folder)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, on_ctrl_c)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - it was closed
    # Lines appear in a pipe at once; ± may be missing from the encoding.
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        fail("interrupted", 130)
    except OSError as error:  # such as stdout on a closed pipe or a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        fail(f"stopped: {error}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "alloc" not in str(error).lower():
            raise
        fail("out of memory: try a lower --batch-size, --test-batch-size or --width")
