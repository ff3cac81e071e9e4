"""Train a CNN of 9,798 parameters with global average pooling on MNIST.

    python mnist_cnn.py                      # the reference recipe: 19 epochs
    python mnist_cnn.py --recipe best        # the same network, better trained
    python mnist_cnn.py --lr 0.05 --runs 5   # mean and interval of five seeds
    python mnist_cnn.py --resume runs/NAME   # continue a run that was stopped

Test accuracy on a CPU: reference 99.33 ± 0.07 %, best 99.49 ± 0.01 % (5 seeds each),
best with --epochs 76 --tta --precision bf16 99.64 ± 0.10 % (3 seeds).
"""

import argparse
import ctypes
import gzip
import io
import json
import math
import os
import statistics
import struct
import sys
import tempfile
import time
import zlib
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import distributed, nn
from torch.optim.lr_scheduler import OneCycleLR
from torchvision.datasets import MNIST
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

SOURCE = Path(__file__).read_bytes()  # saved with the results
MEAN, STD = 0.1307, 0.3081  # of the training set's pixels, scaled to [0, 1]


def fail(message, status=1):
    """End the program with one line on stderr."""
    print("mnist_cnn.py: error:", *message.splitlines(), file=sys.stderr)
    sys.exit(status)


@contextmanager
def exit_on_error(problem, status=1):
    """End the program with one line if the block fails."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        fail(f"{problem}: {type(error).__name__}: {error}", status)


# ---- Data: images (N, 28, 28) uint8, labels (N,) int64 ----
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


def read_idx(path, dimensions):
    """Return the bytes in an IDX file, unpacked or as .gz, as a tensor."""
    path = path if path.exists() else Path(f"{path}.gz")
    read = gzip.open if path.suffix == ".gz" else open
    with exit_on_error(f"cannot read {path}"), read(path, "rb") as file:
        header = file.read(4 + 4 * dimensions)
        magic, *shape = struct.unpack(f">{1 + dimensions}I", header)
        if magic != 0x800 + dimensions:
            raise ValueError(f"not an IDX file of bytes in {dimensions} dimensions")
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).view(shape)


def load_mnist(data_dir, part):
    """Return images and labels of part "train" or "t10k", the test set."""
    raw = Path(data_dir, "MNIST", "raw")
    if not any(raw.glob("*-ubyte*")):
        with exit_on_error(f"no MNIST in {raw}, and no download (try --synthetic)"):
            raw.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=raw.parent) as temporary:
                MNIST(temporary, download=True)
                with suppress(OSError):  # another process was faster
                    Path(temporary, "MNIST", "raw").rename(raw)
    images = read_idx(raw / f"{part}-images-idx3-ubyte", 3)
    labels = read_idx(raw / f"{part}-labels-idx1-ubyte", 1).long()
    if images.shape != (len(labels), 28, 28) or labels.max() > 9:
        fail(f"{raw}/{part}-*: needs a label from 0 to 9 for each image of 28x28")
    return images, labels


def load_datasets(args):
    """Return the training set and the test set, or --holdout's validation set."""
    if args.synthetic:
        print("Synthetic digits: accuracy on them says nothing about MNIST.")
        train_set, test_set = synthetic_digits(12_000, 0), synthetic_digits(2_000, 1)
    else:
        train_set = load_mnist(args.data_dir, "train")
        test_set = None if args.holdout else load_mnist(args.data_dir, "t10k")
    if args.holdout >= (count := len(train_set[0])):
        fail(f"--holdout {args.holdout} leaves none of {count} images", status=2)
    if args.holdout:
        divided = (part.tensor_split([-args.holdout]) for part in train_set)
        train_set, test_set = zip(*divided)
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
    if torch.device(device).type == "cpu":
        with suppress(AttributeError, OSError, TypeError):  # needs glibc
            # Not returning freed memory saves a fifth of a step.
            ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its largest
        for layer in list(model.children())[1:]:  # conv1 is faster without
            layer.to(memory_format=torch.channels_last)  # saves a tenth of a step
    return model.to(device)


def load_model(path, device="cpu", precision="fp32"):
    """Return the model whose weights, and with them its width, are in a file."""
    with exit_on_error(f"cannot use {path} as a final.pt"):
        weights = torch.load(path, "cpu", weights_only=True)
        width = len(dict(weights)["conv1.bias"]) // 10 or 1
        model = make_model(width, 0, device, precision)
        model.load_state_dict(weights)
    return model


# ---- Training and testing ----

# A row of metrics.csv: accuracies in %; eval is the test or the validation set.
COLUMNS = "epoch,lr,train_loss,train_accuracy,eval_loss,eval_accuracy,seconds"


def make_training(args, seed, total_steps):
    """Return a new model, its optimizer and its scheduler, which steps per batch."""
    torch.manual_seed(seed * 10_000)
    torch.backends.cudnn.deterministic = True  # the seed fixes the weights
    model = make_model(args.width, args.dropout, args.device, args.precision)
    decay = args.weight_decay
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=decay, fused=True
    )
    scheduler = OneCycleLR(
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


def train_epoch(model, optimizer, scheduler, batches, steps):
    """Train for an epoch; return last learning rate, mean loss, accuracy in %."""
    model.train()
    count, loss_sum, correct = 0, 0, 0  # the sums stay on the device: no wait in a step
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
        if bar.update():  # redrawn: only then wait for the device
            accuracy = 100 * correct.item() / count
            bar.set_postfix(loss=loss_sum.item() / count, accuracy=accuracy)
    bar.close()
    return learning_rate, loss_sum.item() / count, 100 * correct.item() / count


@torch.no_grad()
def predict(model, images, tta=False):
    """Return log-probabilities (N, 10) for uint8 images (N, 28, 28).

    ``tta``, test-time augmentation, averages the probabilities of nine shifts.
    """
    model.eval()
    if tta:
        padded = F.pad(images, (1, 1, 1, 1))  # by -1, 0 and 1 pixel on both axes
        shifts = [padded[:, y : y + 28, x : x + 28] for y in range(3) for x in range(3)]
        outputs = torch.stack([predict(model, shifted) for shifted in shifts])
        return outputs.logsumexp(dim=0) - math.log(9)
    batches = images.unsqueeze(1).split(1000)
    return torch.cat([model(normalise(batch)) for batch in batches])


def loss_and_accuracy(output, labels):
    """Return mean loss and accuracy in % of log-probabilities (N, 10)."""
    correct = (output.argmax(dim=1) == labels).sum().item()
    return F.nll_loss(output, labels).item(), 100 * correct / len(labels)


def train_seed(args, seed, train_set, test_set, folder):
    """Train the model of a seed and leave its files in a folder."""
    folder.mkdir(exist_ok=True)
    steps = math.ceil(len(train_set[0]) / args.batch_size)
    training = make_training(args, seed, args.epochs * steps)
    model, history, checkpoint = training[0], [], folder / "checkpoint.pt"
    if checkpoint.exists():
        with exit_on_error(f"cannot use {checkpoint} (delete it to restart the seed)"):
            states, history = torch.load(checkpoint, "cpu", weights_only=True)
            for part, state in zip(training, states, strict=True):
                part.load_state_dict(state)
    print(f"Seed {seed}")
    print(*(f"{name:>8}" for name in COLUMNS.split(",")))
    start = time.perf_counter() - (history[-1]["seconds"] if history else 0)
    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(seed * 10_000 + epoch)  # no generator state to save
        batches = train_batches(*train_set, args.batch_size, args.rotation, args.shift)
        trained = train_epoch(*training, batches, steps)
        tested = loss_and_accuracy(predict(model, test_set[0]), test_set[1])
        values = (epoch, *trained, *tested, time.perf_counter() - start)
        history.append(row := dict(zip(COLUMNS.split(","), values, strict=True)))
        if not math.isfinite(row["train_loss"] + row["eval_loss"]):
            save(folder / "result.json", {"diverged_in_epoch": epoch})
            return print(f"Diverged: the loss is not finite in epoch {epoch}")
        save(checkpoint, ([part.state_dict() for part in training], history))
        save(folder / "metrics.csv", history)
        print(*(f"{value:{max(8, len(name))}.5g}" for name, value in row.items()))
    save(folder / "metrics.csv", history)  # again, if a stop came before it
    output = predict(model, test_set[0], args.tta)
    result = history[-1] | {"accuracy": loss_and_accuracy(output, test_set[1])[1]}
    result["best"] = max(history, key=lambda row: row["eval_accuracy"])
    save(folder / "final.pt", model.state_dict())
    save(folder / "result.json", result)  # with it the seed is finished
    try:
        draw_report(folder / "report.png", args, history, *test_set, output)
    except (Exception, SystemExit) as error:  # noqa: BLE001
        print(f"mnist_cnn.py: warning: no report.png: {error}", file=sys.stderr)


# ---- Files, picture, statistics ----
def save(path, content):
    """Write tensors (.pt), JSON, rows (.csv) or bytes: whole or not at all."""
    if path.suffix == ".pt":
        torch.save(content, buffer := io.BytesIO())
        content = buffer.getvalue()
    elif path.suffix == ".json":
        content = json.dumps(content, indent=2).encode()
    elif path.suffix == ".csv":
        lines = [COLUMNS, *(",".join(map(str, row.values())) for row in content)]
        content = "\n".join([*lines, ""]).encode()
    unfinished = Path(f"{path}.{os.getpid()}.new")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def draw_report(path, args, history, images, labels, output):
    """Draw training curves, confusion matrix and most confident mistakes."""
    os.environ.pop("MPLBACKEND", None)  # a notebook's may not load here
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 10), layout="constrained")
    (top_left, top_right), (bottom_left, bottom_right) = figure.subfigures(2, 2)
    left, right = top_left.subplots(), top_right.subplots()
    eval_set = "validation set" if args.holdout else "test set"
    for name, label in (("train", "training set"), ("eval", eval_set)):
        epochs = [row["epoch"] for row in history]
        errors = [100 - row[f"{name}_accuracy"] for row in history]
        left.plot(epochs, [row[f"{name}_loss"] for row in history], ".-", label=label)
        right.plot(epochs, errors, ".-", label=label)
    for ax, title in ((left, "loss"), (right, "error in %")):
        ax.set(title=title, xlabel="epoch", yscale="log")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend()
    images, labels, output = images.cpu(), labels.cpu(), output.cpu()
    probability, predicted = output.exp().max(dim=1)
    counts = torch.bincount(labels * 10 + predicted, minlength=100).view(10, 10)
    ax = bottom_left.subplots()
    ax.imshow((counts - counts.diag().diag()).numpy(), cmap="Oranges")
    ax.set(xlabel="predicted digit", ylabel="true digit", title="confusion matrix")
    ax.set(xticks=range(10), yticks=range(10))
    for true, other in counts.nonzero().tolist():
        ax.text(other, true, counts[true, other].item(), ha="center", va="center")
    bottom_right.suptitle("most confident mistakes: true as predicted, probability")
    order = (probability * (predicted != labels)).argsort(descending=True)[:12]
    for place, index in enumerate(order[predicted[order] != labels[order]], start=1):
        ax = bottom_right.add_subplot(3, 4, place)
        ax.imshow(images[index].numpy(), cmap="gray_r")
        ax.axis("off")
        title = f"{labels[index]} as {predicted[index]}, {probability[index]:.0%}"
        ax.set_title(title, fontsize=10)
    figure.savefig(buffer := io.BytesIO(), bbox_inches="tight")
    save(path, buffer.getvalue())


def student_t(freedom, confidence=0.95):
    """Return the two-sided critical value of Student's t distribution."""
    # Its density over angle = arctan(t / sqrt(freedom)) goes as cos^(freedom - 1).
    angle = torch.linspace(0, math.pi / 2, 1_000_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angle.cos() ** (freedom - 1), angle)
    index = torch.searchsorted(mass, confidence * mass[-1])
    return freedom**0.5 * angle[index + 1].tan().item()


def interval(values):
    """Return the 95 % confidence interval of a mean, around it: low, mean, high."""
    n, mean = len(values), statistics.mean(values)
    half_width = student_t(n - 1) * statistics.stdev(values) / n**0.5 if n > 1 else 0
    return mean - half_width, mean, mean + half_width


def verdict(first, second, confidence):
    """Return in words how the second mean differs, and how many seeds would tell."""
    n, m = len(first), len(second)
    # The squared errors of both means: variance / n = pvariance / (n - 1).
    a = statistics.pvariance(first) / max(n - 1, 1)
    b = statistics.pvariance(second) / max(m - 1, 1)
    difference = statistics.mean(second) - statistics.mean(first)
    if min(n, m) == 1 or a + b == 0:
        return "cannot tell: no spread between seeds"
    if abs(difference) < 1e-9:
        return "no difference"
    # Welch (1947); seeds for a power of 80 %: Guenther (1981), 0.84 = quantile of 0.8
    freedom = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))
    half_width = (a + b) ** 0.5 * student_t(freedom, confidence)
    text = f"{difference:+.3f} ± {half_width:.3f}  "
    if abs(difference) > half_width:
        return text + ("better" if difference > 0 else "worse")
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    seeds = (z + 0.8416) ** 2 * (n * a + m * b) / difference**2 + z**2 / 4
    seeds = max(math.ceil(seeds), min(n, m) + 1)  # more than did not tell
    return f"{text}cannot tell; about {seeds:,} seeds each would"


# ---- Jobs: train, evaluate, predict, compare ----
def open_folder(folder, config, resume):
    """Make the folder of a new run, or continue one with its own script and data."""
    if resume:
        saved = json.loads((folder / "config.json").read_text())
        if config["script"] != saved["script"]:
            fail(f"{folder} has another script: continue with {folder}/mnist_cnn.py")
        if config["data"] != saved["data"]:
            fail(f"{folder} has seen other images: give the --data-dir that holds them")
        if config["runs"] < saved["runs"]:
            fail(f"{folder} has --runs {saved['runs']}: give as many or more", status=2)
        for path in folder.rglob("*.[0-9]*.new"):  # of a process that was killed
            path.unlink(missing_ok=True)
    elif folder.exists():
        fail(f"{folder} already exists: choose another --out, or --resume it")
    else:
        folder.mkdir(parents=True)
        save(folder / "mnist_cnn.py", SOURCE)
    save(folder / "config.json", config | {"resume": None})


def train(args):
    """Train --runs models, shared among torchrun's processes, and print their mean."""
    rank, ranks = 0, 1
    if torchrun := "TORCHELASTIC_RUN_ID" in os.environ:
        distributed.init_process_group("gloo", timeout=timedelta(days=30))
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
        sys.stdout = io.StringIO() if rank else sys.stdout  # only rank 0 prints
    with suppress(ImportError):
        from torchsummary import summary

        summary(Net(args.width), (1, 28, 28), device="cpu")
    datasets = load_datasets(args)
    tensors = (part.cpu().numpy() for pair in datasets for part in pair)
    config = vars(args) | {
        "data_dir": os.path.abspath(args.data_dir),
        "data": zlib.crc32(b"".join(tensors)),
        "script": zlib.crc32(SOURCE),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    now = time.strftime("%Y-%m-%d-%H%M%S")
    folder = Path(args.resume or args.out or f"runs/{now}-{os.getpid()}")
    if rank == 0:
        open_folder(folder, config, args.resume)
        print(f"On {args.device}, torch {torch.__version__}; output files in {folder}")
        if not args.dry_run:
            print(f"to continue after a stop: --resume {folder}")
    if torchrun:
        distributed.broadcast_object_list(shared := [folder])
        folder = shared[0]
    for seed in range(args.seed, args.seed + args.runs)[rank::ranks]:
        if not (folder / f"seed-{seed}" / "result.json").exists():
            train_seed(args, seed, *datasets, folder / f"seed-{seed}")
    if torchrun:
        distributed.barrier()
        distributed.destroy_process_group()  # its threads could abort the exit
    if rank == 0:
        (accuracies,) = compare([str(folder)])
        if diverged := args.runs - len(accuracies):
            fail(f"{diverged} of {args.runs} seeds diverged and are in no mean")


def evaluate(args):
    """Test the weights in a file."""
    model = load_model(args.evaluate, args.device, args.precision)
    images, labels = load_datasets(args)[1]
    loss, accuracy = loss_and_accuracy(predict(model, images, args.tta), labels)
    print(f"Test loss {loss:.4f}, accuracy {accuracy:.2f} %")


def read_picture(path):
    """Return a drawn or photographed digit as MNIST has them: (1, 28, 28) uint8."""
    picture = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    picture = ImageOps.contain(picture, (200, 200))
    paper = Image.new("RGBA", picture.size, "grey")
    grey = Image.alpha_composite(paper, picture).convert("L")
    near, far = (grey.filter(ImageFilter.GaussianBlur(radius)) for radius in (3, 25))
    grey, near, far = (pil_to_tensor(part).float() for part in (grey, near, far))
    # Ink differs from its surroundings, whatever the paper and the light on it.
    ink = far - grey if (far - grey).max() > (grey - far).max() else grey - far
    ink = F.threshold(ink, max(40, 0.4 * ink.max().item()), 0)
    # What hangs together takes its largest number; at the picture's edge that is 1e6.
    regions = torch.arange(1.0, 1 + ink.numel()).view(ink.shape)[:, 1:-1, 1:-1]
    regions = F.pad(regions, (1, 1, 1, 1), value=1e6) * ink.sign()
    while not regions.equal(grown := F.max_pool2d(regions, 9, 1, 4) * ink.sign()):
        regions = grown
    sizes = regions[(0 < regions) & (regions < 1e6)].long().bincount(minlength=1)
    ink = ink * (regions == sizes.argmax())
    sharpness = ((near - grey) * ink.sign()).abs().max()  # low: a shadow, a lamp
    if sizes.max() < 40 or sharpness < 0.19 * ink.max():
        raise ValueError("no digit on it, at a distance from its edges")
    picture = to_pil_image(ink.byte())
    picture = picture.crop(picture.getbbox())
    border = max(picture.size) // 20 + 1  # so that a thin line keeps a width
    picture = ImageOps.pad(ImageOps.expand(picture, border), (22, 22))
    image = pil_to_tensor(ImageOps.expand(ImageOps.autocontrast(picture), 3))
    rows, columns = image.sum(dim=2), image.sum(dim=1)  # to the centre of mass
    y, x = (part[0] @ torch.arange(28) / part.sum() for part in (rows, columns))
    return image.roll((round(13.5 - y.item()), round(13.5 - x.item())), dims=(1, 2))


def predict_pictures(args):
    """Print the digit in each picture, below the image that the network sees."""
    model, failed = load_model(args.evaluate, args.device, args.precision), False
    for path in args.predict:
        try:
            image = read_picture(path)
        except Exception as error:  # noqa: BLE001
            print(f"mnist_cnn.py: error: {path}: {error}", file=sys.stderr)
            failed = True
            continue
        for row in image.float().view(14, 2, 28).mean(dim=1).tolist():
            print("".join(" .:-=+*#%@"[int(value / 25.6)] for value in row))
        output = predict(model, image.to(args.device), args.tta)[0]
        share, digit = output.exp().topk(2)
        text = f"{path}: {digit[0]} ({share[0]:.1%})"
        print(text if share[0] >= 0.9 else f"{text}, or {digit[1]} ({share[1]:.1%})")
    sys.exit(failed)


def read_run(folder):
    """Return the settings of a run, and the accuracies of its seeds."""
    with exit_on_error(f"cannot use {folder}"):
        config = json.loads(Path(folder, "config.json").read_text())
        seeds = range(config["seed"], config["seed"] + config["runs"])
    accuracies = []
    for path in (Path(folder, f"seed-{seed}", "result.json") for seed in seeds):
        with exit_on_error(f"cannot use {path} (without it, --resume trains the seed)"):
            result = json.loads(path.read_text(), parse_constant=int)  # refuses NaN
            if "diverged_in_epoch" not in result:
                accuracies.append(float(result["accuracy"]))
    if not accuracies:
        fail(f"every seed of {folder} diverged: try, for example, a lower --lr")
    return config, accuracies


def compare(folders):
    """Print how accuracies and settings differ from the first's; return accuracies."""
    configs, runs = zip(*map(read_run, folders))
    if any(config.get("data") != configs[0].get("data") for config in configs):
        fail("cannot compare: the runs have other data, or another --holdout")
    intervals = [interval(values) for values in runs]
    lowest, highest = min(intervals)[0], max(end for _, _, end in intervals)
    scale = 23 / (highest - lowest or 1)
    confidence = 1 - 0.05 / max(1, len(runs) - 1)  # Bonferroni's correction
    kind = "validation" if configs[0].get("holdout") else "test"
    width = max(map(len, folders))
    print(f"{'run':{width}}    n  {kind} accuracy, %; difference from the first")
    for folder, config, values, ends in zip(folders, configs, runs, intervals):
        low, mean, high = (round((end - lowest) * scale) for end in ends)
        strip = " " * low + "-" * (mean - low) + "o" + "-" * (high - mean)
        spread = f" ± {ends[2] - ends[1]:.2f}" if len(values) > 1 else ""
        words = verdict(runs[0], values, confidence) if values is not runs[0] else ""
        if diverged := config["runs"] - len(values):
            words += f"  {diverged} of {config['runs']} diverged"
        text = f"{len(values):4}  {ends[1]:.2f}{spread:7} |{strip:24}|  {words}"
        print(f"{folder:{width}} {text}".rstrip())
    print(f"Confidence 95 % (of a mean), {100 * confidence:.4g} % (of a difference)")
    for name in dict.fromkeys(name for config in configs for name in config):
        values = [str(config.get(name)) for config in configs]
        if len(set(values)) > 1:
            print(f"{name:16}", *(f"{value:>9}" for value in values))
    return runs


# ---- Command line ----

# The flags that choose another job than training, and those that go with each.
JOBS = {
    "--compare": [],
    "--predict": ["--evaluate", "--tta", "--device", "--precision"],
    "--evaluate": ["--tta", "--device", "--precision", "--data-dir", "--synthetic"],
    "--resume": ["--runs", "--device", "--data-dir"],
}
# What the other recipes change in the defaults.
BETTER = {"weight_decay": 5e-4, "dropout": 0.0}
BEST = {"lr": 0.2, "rotation": 10.0, "shift": 1.5}
QUICK = {"epochs": 6, "batch_size": 64, "lr": 0.15, "rotation": 5.0, "shift": 0.5}
RECIPES = {"reference": {}, "best": BETTER | BEST, "quick": BETTER | QUICK}


def number(kind, low, below):
    """Return a type for argparse: numbers with low <= number < below."""

    def parse(text):
        if not low <= (value := kind(text)) < below:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {below})")
        return value

    parse.__name__ = kind.__name__
    return parse


def make_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Train on MNIST.")
    parser.error = lambda message: fail(f"{message} (see --help)", status=2)
    count, natural = number(int, 1, 100_000), number(int, 0, 100_000)
    positive, share = number(float, 0, math.inf), number(float, 0, 1)
    ratio, size = number(float, 1, math.inf), number(float, 0, 360)
    add = parser.add_argument

    def setting(flag, kind, default, text):
        add(flag, type=kind, default=default, help=f"{text} (default: {default})")

    add("--recipe", choices=RECIPES, default="reference", help="sets what is not given")
    setting("--epochs", number(int, 1, 10_000), 19, "passes over the training set")
    setting("--batch-size", count, 128, "images in a training batch")
    setting("--lr", positive, 0.015, "maximum learning rate of OneCycleLR")
    setting("--momentum", share, 0.9, "momentum of SGD, not cycled")
    setting("--weight-decay", positive, 1e-4, "L2 penalty on all parameters")
    setting("--width", number(int, 1, 100), 1, "multiple of all hidden channels")
    setting("--dropout", share, 0.05, "probability of dropping an activation")
    setting("--rotation", size, 7.0, "maximum random rotation, degrees")
    setting("--shift", size, 0.0, "maximum random shift, pixels")
    setting("--pct-start", share, 0.2, "fraction of the steps that warm up")
    setting("--div-factor", ratio, 10.0, "maximum / initial learning rate")
    setting("--final-div-factor", ratio, 100.0, "initial / final learning rate")
    setting("--seed", natural, 1, "seed of the first model")
    setting("--runs", count, 1, "models to train, seeds from --seed up")
    setting("--holdout", natural, 0, "hold out the last N images to validate on")
    setting("--device", str, "auto", "cpu, or an accelerator as in cuda, cuda:1")
    setting("--data-dir", str, "data", "where MNIST/raw is, or is downloaded to")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    add("--tta", action="store_true", help="average nine shifts of each test image")
    add("--synthetic", action="store_true", help="use generated digits, no download")
    add("--dry-run", action="store_true", help="one batch; files only with --out")
    add("--out", metavar="DIR", help="new folder for the output files")
    add("--resume", metavar="RUN", help="continue the run in a folder")
    add("--evaluate", metavar="FILE", help="test the weights in a file")
    add("--predict", metavar="IMAGE", nargs="+", help="read digits in pictures")
    add("--compare", metavar="RUN", nargs="+", help="compare finished runs")
    return parser


def parse_arguments(arguments):
    """Return the settings: the arguments over a resumed run's or a recipe's."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    flags = [word.split("=")[0] for word in arguments if word.startswith("--")]
    job = next((job for job in JOBS if job in flags), None)
    for flag in flags:
        if job and flag not in (job, *JOBS[job]):
            parser.error(f"{flag} does not go with {job}")
    if "" in vars(args).values():
        parser.error("the value of a flag is empty")
    if args.predict and not args.evaluate:
        parser.error("--predict needs --evaluate FILE, the weights to use")
    parser.set_defaults(**RECIPES[args.recipe])
    if args.resume:
        with exit_on_error(f"cannot resume {args.resume}"):
            config = json.loads(Path(args.resume, "config.json").read_text())
            torch.set_num_threads(config["threads"])  # others round differently
            parser.set_defaults(**config)
    return parser.parse_args(arguments)


def main(arguments):
    """Choose the device and the job."""
    args = parse_arguments(arguments)
    if args.compare:
        return compare(args.compare)
    if count := torch.accelerator.device_count():  # torchrun: one for each process
        rank = int(os.environ.get("LOCAL_RANK") or 0)
        torch.accelerator.set_device_index(rank % count)
    if args.device == "auto":
        args.device = torch.accelerator.current_accelerator().type if count else "cpu"
    with exit_on_error(f"--device {args.device} does not work (cpu does)", status=2):
        torch.ones(1, device=args.device).add(1).item()
    if args.predict:
        return predict_pictures(args)
    if args.evaluate:
        return evaluate(args)
    with tempfile.TemporaryDirectory() as temporary:
        if args.dry_run:
            args.epochs, args.out = 1, args.out or f"{temporary}/run"
        train(args)


if __name__ == "__main__":
    with suppress(AttributeError):  # a notebook's stdout has no reconfigure
        # Lines appear in a pipe at once; ± may be missing from the encoding.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main(sys.argv[1:])
    except (KeyboardInterrupt, OSError, MemoryError, torch.OutOfMemoryError) as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # stdout may be what failed
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        fail(f"stopped by {type(error).__name__} {error}".rstrip(), status)
