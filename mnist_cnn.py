"""Train a CNN of 9,798 parameters with global average pooling on MNIST.

    python mnist_cnn.py                      # the reference: 19 epochs
    python mnist_cnn.py --recipe best        # the same, better trained
    python mnist_cnn.py --lr 0.05 --runs 5   # mean and interval of 5 seeds
    python mnist_cnn.py --resume runs/NAME   # continue a stopped run

Test accuracy, 20 seeds each: reference 99.33 ± 0.04 %, best 99.50 ± 0.02 %; a run takes
23 s on an H100. best --epochs 76 --tta --precision bf16: 99.63 ± 0.04 % (5 seeds).
"""

import argparse
import ctypes
import gzip
import io
import json
import math
import os
import statistics
import sys
import tempfile
import time
import zlib
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import distributed, nn
from tqdm import tqdm

SOURCE = Path(__file__).read_bytes()  # saved with the results
MEAN, STD = 0.1307, 0.3081  # of the training pixels, from 0 to 1


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
def read_idx(path):
    """Return the tensor in an IDX file of bytes, unpacked or as .gz."""
    path = path if path.exists() else Path(f"{path}.gz")
    read = gzip.open if path.suffix == ".gz" else open
    with exit_on_error(f"cannot read {path}"), read(path, "rb") as file:
        content = file.read()
        if content[:3] != b"\0\0\x08":
            raise ValueError("not an IDX file of bytes")
        shape = np.frombuffer(content, ">u4", content[3], offset=4)
        pixels = np.frombuffer(content, "u1", offset=4 + 4 * len(shape))
        return torch.tensor(pixels.reshape(shape))


def load_mnist(data_dir, part):
    """Return images and labels of "train" or "t10k", the test set."""
    raw = Path(data_dir, "MNIST", "raw")
    if not any(raw.glob("*-ubyte*")):
        with exit_on_error(f"no MNIST in {raw}, no download (try --synthetic)"):
            from torchvision.datasets import MNIST  # takes a second

            raw.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=raw.parent) as folder:
                MNIST(folder, download=True)
                with suppress(OSError):  # another run was faster
                    Path(folder, "MNIST", "raw").rename(raw)
    images = read_idx(raw / f"{part}-images-idx3-ubyte")
    labels = read_idx(raw / f"{part}-labels-idx1-ubyte").long()
    if len(labels) == 0 or images.shape != (len(labels), 28, 28) or labels.max() > 9:
        fail(f"{raw}/{part}-*: needs a label from 0 to 9 for each 28x28 image")
    return images, labels


def affine(images, degrees, shifts):
    """Return images (N, 1, 28, 28) shifted, then rotated about their centre.

    degrees (N,): counter-clockwise; shifts (N, 2): pixels right and down.
    """
    cosine, sine = degrees.deg2rad().cos(), degrees.deg2rad().sin()
    # Output at p is the input at rotation * p - shift, p from -1 to 1.
    x, y = (-shifts / 14).unbind(dim=1)
    matrix = torch.stack((cosine, -sine, x, sine, cosine, y), dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def prepare(images, rotation=0, shift=0):
    """Return normalised inputs (N, 1, 28, 28) of images (N, 28, 28).

    Each is rotated (at most so many degrees) and shifted (pixels) at random.
    """
    images = images[:, None].float()
    if rotation or shift:
        degrees = images.new_empty(len(images)).uniform_(-rotation, rotation)
        shifts = images.new_empty(len(images), 2).uniform_(-shift, shift)
        images = affine(images, degrees, shifts)
    return (images / 255 - MEAN) / STD


def synthetic_digits(count, seed):
    """Return digits in Pillow's font, rotated at random."""
    picture = Image.new("L", (28, 10 * 28))
    for digit in range(10):
        ImageDraw.Draw(picture).text((8, 28 * digit), str(digit), 255, font_size=24)
    glyphs = torch.tensor(np.array(picture)).float().view(10, 1, 28, 28)
    torch.manual_seed(seed)
    labels = torch.randint(10, (count,))
    images = affine(glyphs[labels], torch.randn(count) * 15, torch.zeros(count, 2))
    return images.squeeze(1).byte(), labels


def load_datasets(args):
    """Return training set and test set, or validation set with --holdout."""
    if args.synthetic:
        train_set, test_set = synthetic_digits(12_000, 0), synthetic_digits(2_000, 1)
    else:
        train_set = load_mnist(args.data_dir, "train")
        test_set = None if args.holdout else load_mnist(args.data_dir, "t10k")
    if args.holdout:
        test_set = [x[-args.holdout :] for x in train_set]
        train_set = [x[: -args.holdout] for x in train_set]
        if len(train_set[0]) == 0:
            fail(f"--holdout {args.holdout} leaves nothing to train on", 2)
    limit = args.batch_size if args.dry_run else None
    return [[x[:limit].to(args.device) for x in y] for y in (train_set, test_set)]


# ---- Model ----
class Dropout(nn.Dropout):
    """nn.Dropout that draws only what it drops: saves a third of a CPU step."""

    def forward(self, x):
        if not (self.training and self.p and x.device.type == "cpu"):
            return super().forward(x)
        # With so many draws each element is kept with probability 1 - p.
        draws = torch.poisson(torch.tensor(-x.numel() * math.log1p(-self.p)))
        dropped = torch.randint(x.numel(), (int(draws),))
        mask = x.new_full((x.numel(),), 1 / (1 - self.p)).index_fill_(0, dropped, 0)
        return x * mask.as_strided(x.shape, x.stride())


class Net(nn.Module):
    """Map inputs (N, 1, 28, 28) to log-probabilities (N, 10)."""

    def __init__(self, width=1, dropout=0.05):
        super().__init__()
        c10, c16 = 10 * width, 16 * width  # channels
        self.conv1 = nn.Conv2d(1, c10, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(c10)
        self.conv2 = nn.Conv2d(c10, c16, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(c16)
        self.transition1 = nn.Conv2d(c16, c10, 1)
        self.conv3 = nn.Conv2d(c10, c16, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(c16)
        self.conv4 = nn.Conv2d(c16, c16, 3, padding=1)
        self.norm4 = nn.BatchNorm2d(c16)
        self.transition2 = nn.Conv2d(c16, c10, 1)
        self.conv5 = nn.Conv2d(c10, c16, 3, padding=1)
        self.norm5 = nn.BatchNorm2d(c16)
        self.conv6 = nn.Conv2d(c16, c16, 3, padding=1)
        self.norm6 = nn.BatchNorm2d(c16)
        self.classifier = nn.Conv2d(c16, 10, 1)
        self.drop = Dropout(dropout)
        self.pool = nn.MaxPool2d(2)
        self.global_pool = nn.AdaptiveAvgPool2d(1)  # Network in Network (Lin 2013)

    def forward(self, x):
        # the shape with width 1, and the receptive field in pixels
        x = self.drop(self.norm1(F.relu_(self.conv1(x))))  # 10x28x28, 3
        x = self.drop(self.norm2(F.relu_(self.conv2(x))))  # 16x28x28, 5
        x = F.relu_(self.transition1(self.pool(x)))  # 10x14x14, 6
        x = self.drop(self.norm3(F.relu_(self.conv3(x))))  # 16x14x14, 10
        x = self.drop(self.norm4(F.relu_(self.conv4(x))))  # 16x14x14, 14
        x = F.relu_(self.transition2(self.pool(x)))  # 10x7x7, 16
        x = self.drop(self.norm5(F.relu_(self.conv5(x))))  # 16x7x7, 24
        x = self.drop(self.norm6(F.relu_(self.conv6(x))))  # 16x7x7, 32
        x = self.global_pool(self.classifier(x))  # 10x1x1, all
        return F.log_softmax(x.flatten(1).float(), dim=1)


def make_model(width, dropout, device, precision):
    """Return a new Net for a device and a precision."""
    model = Net(width, dropout)
    device = torch.device(device)
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if precision == "bf16":
        autocast = torch.autocast(device.type, torch.bfloat16)
        model.forward = autocast(model.forward)
    if device.type == "cpu":
        with suppress(AttributeError, OSError, TypeError):  # needs glibc
            # Keeping freed memory saves a fifth of a step.
            ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        for layer in list(model.children())[1:]:  # conv1 is faster without
            layer.to(memory_format=torch.channels_last)  # saves a tenth of a step
    elif device.type == "cuda" and precision != "fp32":
        # saves a third of a step with bf16
        return model.to(device, memory_format=torch.channels_last)
    return model.to(device)


def load_model(path, device="cpu", precision="fp32"):
    """Load a model from a file of weights, which tell its width."""
    with exit_on_error(f"{path} is no final.pt"):
        weights = torch.load(path, "cpu", weights_only=True)
        width = len(weights["conv1.bias"]) // 10 or 1
        model = make_model(width, 0, device, precision)
        model.load_state_dict(weights)
    return model


# ---- Training and testing ----
# Accuracies in %; eval: test or validation set; seconds since the start.
HEAD = " seed epoch        lr train_loss train_accuracy eval_loss eval_accuracy seconds"
ROW = "{:5}{:6}{:10.4g}{:11.4g}{:15.2f}{:10.4g}{:14.2f}{:8.1f}"


def make_training(args, seed, total_steps):
    """Return a new model, its optimizer, and its scheduler, which steps per batch."""
    torch.manual_seed(seed * 10_000)
    torch.backends.cudnn.deterministic = True  # the seed fixes the weights
    model = make_model(args.width, args.dropout, args.device, args.precision)
    optimizer = torch.optim.SGD(
        model.parameters(),
        args.lr,
        args.momentum,
        weight_decay=args.weight_decay,
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        args.lr,
        total_steps,
        # OneCycleLR divides by (warm-up steps - 1).
        pct_start=args.pct_start if args.pct_start * total_steps != 1 else 0.0,
        div_factor=args.div_factor,
        final_div_factor=args.final_div_factor,
        cycle_momentum=False,
    )
    return model, optimizer, scheduler


def make_step(model, optimizer, args, images, labels, sums):
    """Return step(index), which trains on the images of an index (B,).

    It adds their loss and the number of correct answers to sums (2,).
    """

    def step(index):
        target = labels[index]
        optimizer.zero_grad()
        output = model(prepare(images[index], args.rotation, args.shift))
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()
        correct = (output.argmax(dim=1) == target).sum()
        sums.add_(torch.stack((loss.detach() * len(index), correct)))

    return step


def capture(step, index):
    """Return a function that replays the step as a CUDA graph, in one launch."""
    graph, batch = torch.cuda.CUDAGraph(), index.clone()
    try:
        with torch.cuda.graph(graph):  # executes nothing
            step(batch)
    except RuntimeError as error:
        print(f"mnist_cnn.py: warning: no CUDA graph: {error}", file=sys.stderr)
        # The random generator may still be capturing: a copy of its state is not.
        generator = torch.cuda.default_generators[index.device.index]
        generator.graphsafe_set_state(generator.clone_state())
        return step

    def replay(index):
        batch.copy_(index)
        graph.replay()

    return replay


def use_cuda_graphs(step, optimizer):
    """Return a step that replays a CUDA graph per batch size: 1.4 ms, not 3 (H100)."""
    lr_tensor = torch.zeros((), device="cuda")  # a number would be a constant
    steps = {}

    def graph_step(index):
        group, size = optimizer.param_groups[0], len(index)
        lr = group["lr"]
        group["lr"] = lr_tensor.fill_(lr)
        steps.get(size, step)(index)
        if size not in steps:  # its first step was the warm-up
            steps[size] = capture(step, index)
        group["lr"] = lr

    return graph_step


def train_epoch(step, scheduler, sums, count, args):
    """Train on count images; return learning rate, mean loss, accuracy in %.

    A generator: it yields after each step, so that trainings can take turns.
    """
    seen = 0
    sums.zero_()  # of loss and correct, on the device: no step waits for it
    batches = torch.randperm(count, device=sums.device).split(args.batch_size)
    # No bar on a GPU, where an epoch takes a second, nor (None) without a terminal.
    disable = sums.is_cuda or None
    with tqdm(total=len(batches), file=sys.stdout, disable=disable, leave=False) as bar:
        for index in batches:
            step(index)
            yield
            lr = scheduler.get_last_lr()[0]
            scheduler.step()
            seen += len(index)
            if bar.update():  # redrawn: only then wait for the device
                loss, correct = sums.tolist()
                bar.set_postfix(loss=loss / seen, accuracy=100 * correct / seen)
    loss, correct = sums.tolist()
    return lr, loss / count, 100 * correct / count


@torch.no_grad()
def predict(model, images, tta=False):
    """Return log-probabilities (N, 10) for uint8 images (N, 28, 28)."""
    model.eval()
    if tta:  # test-time augmentation: nine shifts
        padded = F.pad(images, (1, 1, 1, 1))
        shifts = [padded[:, y : y + 28, x : x + 28] for y in range(3) for x in range(3)]
        outputs = torch.stack([predict(model, shifted) for shifted in shifts])
        return outputs.logsumexp(dim=0) - math.log(9)
    return torch.cat([model(prepare(batch)) for batch in images.split(1000)])


def loss_and_accuracy(output, labels):
    """Return mean loss and accuracy in % of log-probabilities (N, 10)."""
    correct = (output.argmax(dim=1) == labels).sum().item()
    return F.nll_loss(output, labels).item(), 100 * correct / len(labels)


def train_seed(args, seed, train_set, test_set, folder):
    """Train the model of a seed and leave its files in a folder; a generator."""
    folder.mkdir(exist_ok=True)
    images, labels = test_set
    steps = math.ceil(len(train_set[0]) / args.batch_size)
    training = make_training(args, seed, args.epochs * steps)
    model, optimizer, scheduler = training
    history = []
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        with exit_on_error(f"cannot use {checkpoint} (delete it to start again)"):
            states, history = torch.load(checkpoint, "cpu", weights_only=True)
            for part, state in zip(training, states, strict=True):
                part.load_state_dict(state)
        save(folder / "metrics.csv", history)  # the stop may have preceded it
    sums = torch.zeros(2, device=args.device)
    step = make_step(model, optimizer, args, *train_set, sums)
    if sums.is_cuda:
        step = use_cuda_graphs(step, optimizer)
    start = time.perf_counter() - (history[-1]["seconds"] if history else 0)
    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(seed * 10_000 + epoch)  # resuming needs no RNG state
        model.train()
        trained = yield from train_epoch(step, scheduler, sums, len(train_set[0]), args)
        tested = loss_and_accuracy(predict(model, images), labels)
        values = seed, epoch, *trained, *tested, time.perf_counter() - start
        row = dict(zip(HEAD.split(), values, strict=True))
        history.append(row)
        if not math.isfinite(row["train_loss"] + row["eval_loss"]):
            print(f"Seed {seed} diverged: no finite loss in epoch {epoch}")
            return save(folder / "result.json", {"diverged_in_epoch": epoch})
        save(checkpoint, ([part.state_dict() for part in training], history))
        save(folder / "metrics.csv", history)
        print(ROW.format(*row.values()))
    output = predict(model, images, args.tta)
    accuracy = loss_and_accuracy(output, labels)[1]
    save(folder / "final.pt", model.state_dict())
    save(folder / "result.json", history[-1] | {"accuracy": accuracy})  # finished
    try:
        draw_report(folder / "report.png", args, history, images, labels, output)
    except (Exception, SystemExit) as error:  # noqa: BLE001
        print(f"mnist_cnn.py: warning: no report.png: {error}", file=sys.stderr)


def take_turns(trainings, device):
    """Run trainings on a GPU, ten side by side: in a third of the time.

    Each has a stream, and a state of the random generator, of its own.
    """
    torch.cuda.set_device(device)
    generator = torch.cuda.default_generators[device.index]
    turns = [[x, torch.cuda.Stream(), generator.clone_state()] for x in trainings]
    while turns:
        for turn in turns[:10]:  # a copy: when one ends, the next moves up
            training, stream, state = turn
            generator.graphsafe_set_state(state)
            with torch.cuda.stream(stream):
                if next(training, "finished") == "finished":
                    turns.remove(turn)
            turn[2] = generator.graphsafe_get_state()


# ---- Files, picture, statistics ----
def save(path, content):
    """Write tensors (.pt), JSON, rows (.csv) or bytes: whole or not at all."""
    if path.suffix == ".pt":
        torch.save(content, buffer := io.BytesIO())
        content = buffer.getvalue()
    elif path.suffix == ".json":
        content = json.dumps(content, indent=2).encode()
    elif path.suffix == ".csv":
        rows = [content[0].keys(), *(row.values() for row in content)]
        content = "".join(",".join(map(str, row)) + "\n" for row in rows).encode()
    new = Path(f"{path}.new")
    new.write_bytes(content)
    new.replace(path)


def draw_report(path, args, rows, images, labels, output):
    """Draw training curves, confusion matrix, most confident mistakes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    grid = figure.add_gridspec(4, 12)
    loss, error, matrix = (figure.add_subplot(grid[:3, x : x + 4]) for x in (0, 4, 8))

    epochs = [row["epoch"] for row in rows]
    sets = ["training", "validation" if args.holdout else "test"]
    losses = [(row["train_loss"], row["eval_loss"]) for row in rows]
    errors = [(100 - row["train_accuracy"], 100 - row["eval_accuracy"]) for row in rows]
    for ax, title, curves in ((loss, "loss", losses), (error, "error in %", errors)):
        ax.plot(epochs, curves, ".-", label=sets)
        ax.set(title=title, xlabel="epoch", yscale="log")
        ax.set_xticks(epochs[:: len(epochs) // 10 + 1])
        ax.legend()

    images, labels = images.cpu(), labels.cpu()
    confidence, predicted = output.cpu().max(dim=1)
    counts = torch.bincount(labels * 10 + predicted, minlength=100).view(10, 10)
    matrix.imshow((counts - counts.diag().diag()).numpy(), cmap="Oranges")
    matrix.set(title="confusion matrix", xlabel="predicted digit", ylabel="true digit")
    matrix.set(xticks=range(10), yticks=range(10))
    for y, x in counts.nonzero().tolist():
        matrix.text(x, y, counts[y, x].item(), ha="center", va="center")

    wrong = (predicted != labels).nonzero().flatten()
    wrong = wrong[confidence[wrong].argsort(descending=True)[:12]]
    for place, i in enumerate(wrong):
        ax = figure.add_subplot(grid[3, place], xticks=[], yticks=[])
        ax.set_title(f"{labels[i]} as {predicted[i]}")
        ax.imshow(images[i].numpy(), cmap="gray_r")
    figure.supxlabel("most confident mistakes")
    figure.savefig(buffer := io.BytesIO())
    save(path, buffer.getvalue())


def student_t(df, level=0.95):
    """Return Student's t for a two-sided confidence level."""
    # Over angle = arctan(t / sqrt(df)), its density is cos^(df - 1).
    angle = torch.linspace(0, math.pi / 2, 1_000_001, dtype=torch.float64)
    mass = torch.cumulative_trapezoid(angle.cos() ** (df - 1), angle)
    index = torch.searchsorted(mass, level * mass[-1])
    return df**0.5 * angle[index + 1].tan().item()


def interval(values):
    """Return low, mean, high and text of the 95 % confidence interval of a mean."""
    n, mean = len(values), statistics.mean(values)
    if n == 1:
        return mean, mean, mean, f"{mean:.2f}"
    half = student_t(n - 1) * statistics.stdev(values) / n**0.5
    return mean - half, mean, mean + half, f"{mean:.2f} ± {half:.2f}"


def verdict(first, second, level):
    """Say how the second mean differs, or how many seeds would tell."""
    n, m = len(first), len(second)
    if min(n, m) == 1 or len({*first}) == len({*second}) == 1:
        return "cannot tell: too few seeds for a spread"
    a = statistics.variance(first) / n  # squared standard errors
    b = statistics.variance(second) / m
    difference = statistics.mean(second) - statistics.mean(first)
    if abs(difference) < 1e-9:
        return "no difference"
    # Welch (1947); seeds for a power of 80 % (z = 0.84): Guenther (1981)
    df = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))
    half = (a + b) ** 0.5 * student_t(df, level)
    text = f"{difference:+.3f} ± {half:.3f}  "
    if abs(difference) > half:
        return text + ("better" if difference > 0 else "worse")
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    seeds = (z + 0.8416) ** 2 * (n * a + m * b) / difference**2 + z**2 / 4
    seeds = max(math.ceil(seeds), min(n, m) + 1)  # more than did not tell
    return f"{text}cannot tell; about {seeds:,} seeds each would"


# ---- Jobs: train, evaluate, predict, compare ----
def open_folder(args, datasets):
    """Make the folder of a run, or check that of a resumed one; return it."""
    name = time.strftime(f"runs/%Y-%m-%d-%H%M%S-{os.getpid()}")
    folder = Path(args.resume or args.out or name)
    data = zlib.crc32(b"".join(x.cpu().numpy() for pair in datasets for x in pair))
    config = vars(args) | {"data_dir": os.path.abspath(args.data_dir), "data": data}
    config |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    script = folder / "mnist_cnn.py"
    if args.resume:
        saved = json.loads((folder / "config.json").read_text())
        if script.read_bytes() != SOURCE:
            fail(f"{folder} has another script: continue with {script}")
        if data != saved["data"]:
            fail(f"{folder} has seen other images: give their --data-dir")
        if args.runs < saved["runs"]:
            fail(f"{folder} has --runs {saved['runs']}: give no fewer", 2)
    elif folder.exists():
        fail(f"{folder} exists: choose another --out, or --resume it")
    else:
        folder.mkdir(parents=True)
        save(script, SOURCE)
    save(folder / "config.json", config)
    print(f"On {args.device}; to continue after a stop: --resume {folder}")
    return folder


def train(args):
    """Train --runs models and print their mean accuracy."""
    # Processes that torchrun started share the seeds; the first one prints.
    rank, ranks = 0, 1
    if torchrun := "TORCHELASTIC_RUN_ID" in os.environ:
        distributed.init_process_group("gloo", timeout=timedelta(days=30))
        rank, ranks = distributed.get_rank(), distributed.get_world_size()
        sys.stdout = io.StringIO() if rank else sys.stdout
    with suppress(ImportError):
        from torchsummary import summary

        summary(Net(args.width), (1, 28, 28), device="cpu")
    datasets = load_datasets(args)
    shared = [open_folder(args, datasets) if rank == 0 else None]
    if torchrun:
        distributed.broadcast_object_list(shared)
    folder = shared[0]
    trainings = []
    for seed in range(args.seed, args.seed + args.runs)[rank::ranks]:
        seed_folder = folder / f"seed-{seed}"
        if not (seed_folder / "result.json").exists():
            trainings.append(train_seed(args, seed, *datasets, seed_folder))
    if trainings:
        print(HEAD)
    if datasets[0][0].is_cuda:
        take_turns(trainings, datasets[0][0].device)
    else:
        for training in trainings:
            list(training)  # runs the generator to its end
    if torchrun:
        distributed.barrier()
        distributed.destroy_process_group()
    if rank:
        return
    (accuracies,) = compare([str(folder)])
    if diverged := args.runs - len(accuracies):
        fail(f"{diverged} of {args.runs} seeds diverged: not in the mean")


def evaluate(args, model):
    """Print loss and accuracy on the test set."""
    images, labels = load_datasets(args)[1]
    loss, accuracy = loss_and_accuracy(predict(model, images, args.tta), labels)
    print(f"Test loss {loss:.4f}, accuracy {accuracy:.2f} %")


def read_picture(path):
    """Return a drawn or photographed digit as in MNIST: (1, 28, 28) uint8."""
    picture = ImageOps.exif_transpose(Image.open(path))
    if picture.mode.startswith("I"):  # 16 bits
        picture = picture.point(lambda value: value / 256)
    picture = picture.convert("RGBA")
    picture.thumbnail((200, 200))
    grey = Image.new("L", picture.size, 128)
    grey.paste(picture, mask=picture)
    blur, paper = (grey.filter(ImageFilter.GaussianBlur(radius)) for radius in (3, 25))
    grey, blur, paper = torch.tensor(np.stack([grey, blur, paper])).float().split(1)
    # Ink, dark or light, differs from the paper around it, in any light.
    ink = max(paper - grey, grey - paper, key=torch.max)
    ink = F.threshold(ink, max(20, 0.4 * ink.max().item()), 0)
    # Connected ink takes its largest number, 1e6 at the picture's edge.
    regions = torch.arange(1.0, 1 + ink.numel()).view(ink.shape)[:, 1:-1, 1:-1]
    regions = F.pad(regions, (1, 1, 1, 1), value=1e6) * ink.sign()
    while not regions.equal(grown := F.max_pool2d(regions, 9, 1, 4) * ink.sign()):
        regions = grown
    sizes = regions[(regions > 0) & (regions < 1e6)].long().bincount(minlength=1)
    ink = ink * (regions == sizes.argmax())
    sharpness = ((blur - grey) * ink.sign()).abs().max()  # low: a shadow
    if sizes.max() < 40 or ink.max() < 32 or sharpness < 0.26 * ink.max():
        raise ValueError("no sharp digit clear of the picture's edges")
    y, x = ink[0].nonzero().numpy().T
    half = 0.7 * max(np.ptp(x), np.ptp(y)) + 1  # 20 of 28 pixels, as in MNIST
    box = x.mean() - half, y.mean() - half, x.mean() + half, y.mean() + half
    picture = Image.fromarray(ink[0].byte().numpy()).crop(box).resize((28, 28))
    return torch.tensor(np.array(ImageOps.autocontrast(picture)))[None]


def predict_pictures(args, model):
    """Print the digit in each picture, below what the network sees."""
    failed = len(args.predict)
    for path in args.predict:
        with suppress(SystemExit), exit_on_error(path):  # and go on
            image = read_picture(path).to(args.device)
            for row in image.view(14, 2, 28).amax(dim=1).tolist():
                print("".join(" .:-=+*#%@"[value // 26] for value in row))
            percent, digit = (100 * predict(model, image, args.tta)[0].exp()).topk(2)
            print(f"{path}: {digit[0]} ({percent[0]:.1f} %)", end="")
            print(f", or {digit[1]} ({percent[1]:.1f} %)" if percent[0] < 90 else "")
            failed -= 1
    sys.exit(failed > 0)


def read_run(folder):
    """Return a run's settings and its seeds' accuracies."""
    with exit_on_error(f"cannot use {folder}"):
        config = json.loads(Path(folder, "config.json").read_text())
        seeds = range(config["seed"], config["seed"] + config["runs"])
    accuracies = []
    for path in (Path(folder, f"seed-{seed}", "result.json") for seed in seeds):
        with exit_on_error(f"cannot use {path} (without it --resume trains the seed)"):
            result = json.loads(path.read_text(), parse_constant=int)  # refuses NaN
            if "diverged_in_epoch" not in result:
                accuracies.append(float(result["accuracy"]))
    if not accuracies:
        fail(f"every seed of {folder} diverged: try, for example, a lower --lr")
    return config, accuracies


def compare(folders):
    """Print how mean accuracies differ from the first; return them all."""
    configs, runs = zip(*map(read_run, folders))
    if len({config.get("data") for config in configs}) > 1:
        fail("cannot compare: not the same data and --holdout")
    intervals = [interval(values) for values in runs]
    lowest, highest = min(intervals)[0], max(high for _, _, high, _ in intervals)
    scale = 23 / (highest - lowest or 1)  # characters per percentage point
    level = 1 - 0.05 / max(1, len(runs) - 1)  # Bonferroni's correction
    kind = "validation" if configs[0].get("holdout") else "test"
    width = max(map(len, folders))
    head = f"{'run':{width}}    n  {kind} accuracy, % (95 % CI)"
    if len(runs) > 1:
        head += f"; difference from the first ({100 * level:.4g} % CI)"
    print(head)
    for folder, config, values, (*ends, text) in zip(folders, configs, runs, intervals):
        left, middle, right = (round((end - lowest) * scale) for end in ends)
        strip = " " * left + "-" * (middle - left) + "o" + "-" * (right - middle)
        row = f"{folder:{width}} {len(values):4}  {text:12} |{strip:24}|"
        if values is not runs[0]:
            row += f"  {verdict(runs[0], values, level)}"
        if diverged := config["runs"] - len(values):
            row += f"  {diverged} of {config['runs']} diverged"
        print(row)
    return runs


# ---- Command line ----
# The flags of jobs other than training, and those that go with them.
JOBS = {
    "--compare": [],
    "--predict": ["--evaluate", "--tta", "--device", "--precision"],
    "--evaluate": ["--tta", "--device", "--precision", "--data-dir", "--synthetic"],
    "--resume": ["--runs", "--device", "--data-dir"],
}
BEST = {"lr": 0.2, "weight_decay": 5e-4, "dropout": 0.0, "rotation": 10.0, "shift": 1.5}
QUICK = BEST | {"epochs": 6, "batch_size": 64, "lr": 0.15, "rotation": 5, "shift": 0.5}
RECIPES = {"reference": {}, "best": BEST, "quick": QUICK}  # what they change


def number(kind, low, below):
    """Return a type for argparse: low <= number < below."""

    def parse(text):
        if low <= (value := kind(text)) < below:
            return value
        raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {below})")

    parse.__name__ = kind.__name__
    return parse


def make_parser():
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (see --help)", 2)
    count, natural = number(int, 1, 100_000), number(int, 0, 100_000)
    at_least_0, fraction = number(float, 0, math.inf), number(float, 0, 1)
    ratio, below_360 = number(float, 1, math.inf), number(float, 0, 360)
    add = parser.add_argument

    def flag(name, kind, default, text):
        add(name, type=kind, default=default, help=f"{text} (default: {default})")

    add("--recipe", choices=RECIPES, default="reference", help="sets the defaults")
    flag("--epochs", number(int, 1, 10_000), 19, "passes over the training set")
    flag("--batch-size", count, 128, "images in a training batch")
    flag("--lr", at_least_0, 0.015, "maximum learning rate")
    flag("--momentum", fraction, 0.9, "momentum of SGD")
    flag("--weight-decay", at_least_0, 1e-4, "L2 penalty")
    flag("--width", number(int, 1, 100), 1, "multiplies the channels")
    flag("--dropout", fraction, 0.05, "dropout probability")
    flag("--rotation", below_360, 7.0, "maximum random rotation, degrees")
    flag("--shift", below_360, 0.0, "maximum random shift, pixels")
    flag("--pct-start", fraction, 0.2, "warm-up, fraction of all steps")
    flag("--div-factor", ratio, 10.0, "maximum / initial learning rate")
    flag("--final-div-factor", ratio, 100.0, "initial / final learning rate")
    flag("--seed", natural, 1, "seed of the first model")
    flag("--runs", count, 1, "models to train, from --seed up")
    flag("--holdout", natural, 0, "validate on the last N images")
    flag("--device", str, "auto", "cpu, cuda, cuda:1, mps, ...")
    flag("--data-dir", str, "data", "has MNIST/raw, or gets it")
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    add("--tta", action="store_true", help="average nine shifts of an image")
    add("--synthetic", action="store_true", help="drawn digits, no download")
    add("--dry-run", action="store_true", help="one batch; files only with --out")
    add("--out", metavar="DIR", help="folder to make for the output")
    add("--resume", metavar="RUN", help="continue a run")
    add("--evaluate", metavar="FILE", help="test saved weights")
    add("--predict", metavar="IMAGE", nargs="+", help="read digits in pictures")
    add("--compare", metavar="RUN", nargs="+", help="compare finished runs")
    return parser


def parse_arguments(argv):
    """Return the settings: a recipe's or a resumed run's where not given."""
    parser = make_parser()
    args = parser.parse_args(argv)
    flags = [word.split("=")[0] for word in argv if word.startswith("--")]
    job = next((job for job in JOBS if job in flags), None)
    for flag in flags:
        if job and flag not in (job, *JOBS[job]):
            parser.error(f"{flag} does not go with {job}")
    if args.predict and not args.evaluate:
        parser.error("--predict needs --evaluate FILE")
    parser.set_defaults(**RECIPES[args.recipe])
    if args.resume is not None:
        with exit_on_error(f"cannot resume {args.resume}"):
            config = json.loads(Path(args.resume, "config.json").read_text())
            torch.set_num_threads(config["threads"])  # others round differently
            parser.set_defaults(**config)
    return parser.parse_args(argv)


def main(argv):
    """Choose the device and the job."""
    args = parse_arguments(argv)
    if args.compare:
        return compare(args.compare)
    if args.device == "auto":
        found = torch.accelerator.is_available()
        args.device = torch.accelerator.current_accelerator().type if found else "cpu"
    rank = os.environ.get("LOCAL_RANK")  # torchrun: a GPU for each process
    if rank and (count := torch.accelerator.device_count()):
        torch.accelerator.set_device_index(int(rank) % count)
    with exit_on_error(f"--device {args.device} does not work (cpu does)", 2):
        torch.ones(1, device=args.device).add(1).item()
    if args.evaluate is not None:
        model = load_model(args.evaluate, args.device, args.precision)
        return predict_pictures(args, model) if args.predict else evaluate(args, model)
    with tempfile.TemporaryDirectory() as folder:
        if args.dry_run:
            args.epochs, args.out = 1, args.out or f"{folder}/run"
        train(args)


if __name__ == "__main__":
    with suppress(AttributeError):  # a notebook's stdout has no reconfigure
        # Lines go through pipes at once; the encoding may lack ±.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main(sys.argv[1:])
    except (KeyboardInterrupt, OSError, MemoryError, torch.OutOfMemoryError) as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # it may have failed
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        fail(f"stopped by {type(error).__name__} {error}".rstrip(), status)
