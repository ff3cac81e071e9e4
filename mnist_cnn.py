"""Train a CNN of 9,798 parameters with global average pooling on MNIST.

    python mnist_cnn.py                      # the reference: 19 epochs
    python mnist_cnn.py --recipe best        # the same, better trained
    python mnist_cnn.py --lr 0.05 --runs 5   # mean and interval of 5 seeds
    python mnist_cnn.py --resume runs/NAME   # continue a stopped run

Test accuracy, 20 seeds each: reference 99.33 ± 0.04 %, best 99.50 ± 0.02 %, in 23 s on
an H100; best --epochs 76 --tta --precision bf16: 99.63 ± 0.04 % (5 seeds).
"""

import argparse
import ctypes
import gzip
import io
import json
import math
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
import zlib
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import distributed, nn
from tqdm import tqdm

SOURCE = Path(__file__).read_bytes()  # saved with the results
TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if TORCHRUN else 0
RANKS = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1
MEAN, STD = 0.1307, 0.3081  # of the training pixels, from 0 to 1


def warn(message, kind="warning"):
    """Print one line on stderr."""
    lines = message[:500].splitlines()
    print(f"mnist_cnn.py: {kind}:", *map(str.strip, lines), file=sys.stderr)


def fail(message, status=1):
    """End the program with one line on stderr."""
    warn(message, "error")
    sys.exit(status)


@contextmanager
def exit_on_error(problem, status=1):
    """End the program with one line if the block fails."""
    try:
        yield
    except Exception as error:  # noqa: BLE001
        fail(f"{problem}: {type(error).__name__}: {error}", status)


# ---- Data: images (N, 1, 28, 28) uint8, labels (N,) int64 ----
def read_idx(path):
    """Return the tensor in an IDX file of bytes, unpacked or as .gz."""
    path = path if path.exists() else Path(f"{path}.gz")
    read = gzip.open if path.suffix == ".gz" else open
    with exit_on_error(f"cannot read {path}"), read(path, "rb") as file:
        content = file.read()
        shape = np.frombuffer(content, ">u4", content[3], offset=4)
        pixels = np.frombuffer(content, "u1", offset=4 + 4 * len(shape))
        return torch.tensor(pixels.reshape(shape))


def load_mnist(data_dir, part):
    """Return images and labels of "train" or "t10k", the test set."""
    raw = Path(data_dir, "MNIST", "raw")
    if not any(raw.glob("*-ubyte*")):
        print(f"Downloading MNIST to {raw} (offline: README)")
        socket.setdefaulttimeout(20)  # seconds of silence
        existing = next(path for path in raw.absolute().parents if path.exists())
        with exit_on_error(f"no MNIST in {raw}, no download (offline: README)"):
            from torchvision.datasets import MNIST  # takes a second

            with tempfile.TemporaryDirectory(dir=existing) as folder:
                MNIST(folder, download=True)
                raw.parent.mkdir(parents=True, exist_ok=True)
                with suppress(OSError):  # another run was faster
                    Path(folder, "MNIST", "raw").rename(raw)
    images = read_idx(raw / f"{part}-images-idx3-ubyte")
    labels = read_idx(raw / f"{part}-labels-idx1-ubyte").long()
    if len(labels) == 0 or images.shape != (len(labels), 28, 28) or labels.max() > 9:
        fail(f"{raw}/{part}-*: needs a label from 0 to 9 for each 28x28 image")
    return images.unsqueeze(1), labels


def augment(images, args):
    """Return images (N, 1, 28, 28), 0 to 255, shifted (pixels) and rotated (degrees)."""
    # Only training calls this, outside of the CUDA graph. Only torch's draws are seeded.
    images = images.float()
    if args.rotation or args.shift:
        degrees = images.new_empty(len(images)).uniform_(-args.rotation, args.rotation)
        shifts = images.new_empty(len(images), 2).uniform_(-args.shift, args.shift)
        cosine, sine = degrees.deg2rad().cos(), degrees.deg2rad().sin()
        # Output at p is the input at rotation * p - shift, p from -1 to 1.
        x, y = (-shifts / 14).unbind(dim=1)
        matrix = torch.stack((cosine, -sine, x, sine, cosine, y), dim=1).view(-1, 2, 3)
        grid = F.affine_grid(matrix, images.shape, align_corners=False)
        images = F.grid_sample(images, grid, align_corners=False)
    return images


def normalise(images):
    """Return the network's inputs for images from 0 to 255."""
    return (images / 255 - MEAN) / STD


def load_datasets(args):
    """Return training set and test set, or validation set with --holdout."""
    train_set = load_mnist(args.data_dir, "train")
    if args.holdout:
        eval_set = [x[-args.holdout :] for x in train_set]
        train_set = [x[: -args.holdout] for x in train_set]
    else:
        eval_set = load_mnist(args.data_dir, "t10k")
    limit = args.batch_size if args.dry_run else None
    datasets = train_set, eval_set
    return [[x[:limit].to(args.device) for x in dataset] for dataset in datasets]


# ---- Model ----
class Dropout(nn.Dropout):
    """nn.Dropout that draws only what it drops: saves a third of a CPU step."""

    def forward(self, x):
        if not (self.training and self.p and x.device.type == "cpu"):
            return super().forward(x)
        # So many draws with replacement miss an element with probability 1 - p.
        draws = torch.poisson(torch.tensor(-x.numel() * math.log1p(-self.p)))
        dropped = torch.randint(x.numel(), (int(draws),))
        mask = torch.full_like(x, 1 / (1 - self.p))
        mask.as_strided((x.numel(),), (1,)).index_fill_(0, dropped, 0)
        return x * mask


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


def make_model(args):
    """Return a new Net in the memory layout that is fastest on its device."""
    model, device = Net(args.width, args.dropout), torch.device(args.device)
    if device.type == "cpu":
        # saves a tenth of a step, but not in the first convolution
        layers = [x for x in model.modules() if isinstance(x, nn.Conv2d)]
        for layer in layers[1:]:
            layer.to(memory_format=torch.channels_last)
    elif device.type == "cuda" and args.precision != "fp32":
        # saves a third of a step with bf16
        return model.to(device, memory_format=torch.channels_last)
    return model.to(device)


# ---- Training and testing ----
# Accuracies in %; eval: test or validation set; seconds since the start.
HEAD = " seed epoch        lr train_loss train_accuracy eval_loss eval_accuracy seconds"
COLUMNS = HEAD.split()
ROW = "{:5}{:6}{:10.4g}{:11.4g}{:15.2f}{:10.4g}{:14.2f}{:8.1f}"


def set_up_torch(args):
    """Set what holds for the whole process."""
    torch.backends.cudnn.deterministic = True  # the seed fixes the weights
    torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    if args.resume:  # another number of threads rounds differently
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 10**9
        if args.threads > cores:
            warn(f"{cores} threads, not {args.threads}: bits may differ")
        torch.set_num_threads(min(args.threads, cores))
    with suppress(AttributeError, OSError, TypeError):  # needs glibc
        # Keeping freed memory saves a fifth of a CPU step.
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 2**25)  # M_MMAP_THRESHOLD


def make_training(args, seed, total_steps):
    """Return a new model, its optimizer and scheduler, which steps per batch."""
    torch.manual_seed(seed * 10_000)
    model = make_model(args)
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
        # A warm-up of one step would divide by zero: none then.
        pct_start=args.pct_start if args.pct_start * total_steps != 1 else 0.0,
        div_factor=args.div_factor,
        final_div_factor=args.final_div_factor,
        cycle_momentum=False,
    )
    return model, optimizer, scheduler


def make_step(model, optimizer, args, sums):
    """Return step(inputs, labels); it adds loss and correct answers to sums (2,)."""
    bf16 = torch.autocast(sums.device.type, torch.bfloat16, args.precision == "bf16")

    def step(inputs, labels):
        optimizer.zero_grad()
        with bf16:
            output = model(inputs)
        loss = F.nll_loss(output, labels)
        loss.backward()
        optimizer.step()
        correct = (output.argmax(dim=1) == labels).sum()
        sums.add_(torch.stack((loss.detach() * len(labels), correct)))

    return step


def use_cuda_graph(step, optimizer, eager):
    """Return a step that replays a CUDA graph: 1.4 ms, not 3 (H100).

    Batch and learning rates are fed to it. What else Python decides in the model, the
    loss and the optimizer is frozen, unless eager.
    """
    groups, graph = optimizer.param_groups, torch.cuda.CUDAGraph()
    lr_tensors = [torch.zeros((), device=x["params"][0].device) for x in groups]
    held = captured = None

    def graph_step(*batch):
        nonlocal held, captured
        rates = [group["lr"] for group in groups]
        for group, tensor in zip(groups, lr_tensors):
            group["lr"] = tensor.fill_(group["lr"])
        if captured and groups != captured:
            warn("a parameter group has changed: no CUDA graph")
            captured = None
        if captured and len(batch[0]) == len(held[0]):
            for static, new in zip(held, batch):
                static.copy_(new)
            graph.replay()
        else:
            step(*batch)
        if held is None and not eager:  # that step warmed up for the capture
            held = [x.clone() for x in batch]
            try:
                with torch.cuda.graph(graph):  # executes nothing
                    step(*held)
                captured = [dict(group) for group in groups]
            except RuntimeError as error:
                warn(f"no CUDA graph: {error}")
                # The generator may still be capturing: a copy of its state is not.
                generator = torch.cuda.default_generators[batch[0].device.index]
                generator.graphsafe_set_state(generator.clone_state())
        for group, rate in zip(groups, rates):
            group["lr"] = rate

    return graph_step


def train_epoch(step, scheduler, train_set, sums, args):
    """Train on each image once; return learning rate, mean loss, accuracy in %."""
    (images, labels), seen = train_set, 0
    sums.zero_()  # of loss and correct, on the device: no step waits for it
    batches = torch.randperm(len(labels), device=sums.device).split(args.batch_size)
    # No bar on a GPU (an epoch takes a second), nor (None) without a terminal.
    with tqdm(
        total=len(batches),
        disable=sums.is_cuda or not sys.stdout or None,
        file=sys.stdout,
        leave=False,
        dynamic_ncols=True,
        bar_format="{l_bar}{bar:-4}{r_bar}",  # leaves room for ^C
    ) as bar:
        for index in batches:
            inputs = normalise(augment(images[index], args))
            step(inputs, labels[index])
            yield  # to train_side_by_side
            lr = scheduler.get_last_lr()[0]
            scheduler.step()
            seen += len(index)
            if bar.update():  # redrawn: only then wait for the device
                loss, correct = sums.tolist()
                bar.set_postfix(loss=loss / seen, accuracy=100 * correct / seen)
    loss, correct = sums.tolist()
    return lr, loss / seen, 100 * correct / seen


@torch.no_grad()
def predict(model, images, precision, tta=False):
    """Return log-probabilities (N, 10) for uint8 images (N, 1, 28, 28)."""
    model.eval()
    if tta:  # test-time augmentation: nine shifts
        views = F.pad(images, (1, 1, 1, 1)).unfold(2, 28, 1).unfold(3, 28, 1)
        shifts = [views[:, :, y, x] for y in range(3) for x in range(3)]
        outputs = [predict(model, shifted, precision) for shifted in shifts]
        return torch.stack(outputs).logsumexp(dim=0) - math.log(9)
    with torch.autocast(images.device.type, torch.bfloat16, precision == "bf16"):
        return torch.cat([model(normalise(batch)) for batch in images.split(1000)])


def test(model, dataset, precision, tta=False):
    """Return mean loss and accuracy in % on images and labels."""
    images, labels = dataset
    output = predict(model, images, precision, tta)
    correct = (output.argmax(dim=1) == labels).sum().item()
    return F.nll_loss(output, labels).item(), 100 * correct / len(labels)


def train_seed(args, seed, train_set, eval_set, run_folder):
    """Train the model of a seed and leave its files in a folder; a generator."""
    folder = run_folder / f"seed-{seed}"
    folder.mkdir(exist_ok=True)
    steps = math.ceil(len(train_set[0]) / args.batch_size)
    model, optimizer, scheduler = make_training(args, seed, args.epochs * steps)
    stateful = model, optimizer, scheduler
    history = []
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        with exit_on_error(f"cannot use {checkpoint} (delete it to start again)"):
            states, history = torch.load(checkpoint, "cpu", weights_only=True)
            for item, state in zip(stateful, states, strict=True):
                item.load_state_dict(state)
        # Saved in the memory layout of another device? Fused SGD would not notice.
        for weights, state in optimizer.state.items():
            for name, value in state.items():
                if getattr(value, "shape", None) == weights.shape:
                    state[name] = torch.empty_like(weights).copy_(value)
        save(folder / "metrics.csv", history)  # a stop may precede it

    sums = torch.zeros(2, device=args.device)
    step = make_step(model, optimizer, args, sums)
    if sums.is_cuda:
        step = use_cuda_graph(step, optimizer, args.eager)
    start = time.perf_counter() - (history[-1]["seconds"] if history else 0)
    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(seed * 10_000 + epoch)  # resuming needs no RNG state
        model.train()
        trained = yield from train_epoch(step, scheduler, train_set, sums, args)
        tested = test(model, eval_set, args.precision)
        values = seed, epoch, *trained, *tested, time.perf_counter() - start
        row = dict(zip(COLUMNS, values, strict=True))
        history.append(row)
        if not (math.isfinite(row["train_loss"]) and 0 <= row["eval_loss"] < math.inf):
            print(f"Seed {seed} diverged: high --lr, or no log-probabilities")
            save(folder / "result.json", {"diverged_in_epoch": epoch})
            return
        save(checkpoint, ([item.state_dict() for item in stateful], history))
        save(folder / "metrics.csv", history)
        print(ROW.format(*values))
    accuracy = test(model, eval_set, args.precision, args.tta)[1]
    save(folder / "final.pt", model.state_dict())
    save(folder / "result.json", history[-1] | {"accuracy": accuracy})  # finished
    try:
        draw_report(folder / "report.png", args, history)
    except (Exception, SystemExit) as error:  # noqa: BLE001
        warn(f"no report.png: {error}")


def train_side_by_side(trainings, device):
    """Run trainings on a GPU, ten at a time: in a third of the time."""
    torch.cuda.set_device(device)
    cuda = torch.cuda.default_generators[device.index]
    # Each has a stream and a state of the random generator.
    active = [[x, torch.cuda.Stream(), cuda.clone_state()] for x in trainings]
    while active:
        for entry in active[:10]:  # a copy: the next moves up
            training, stream, state = entry
            cuda.graphsafe_set_state(state)
            with torch.cuda.stream(stream):
                if next(training, "finished") == "finished":
                    active.remove(entry)
            entry[2] = cuda.graphsafe_get_state()


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


def draw_report(path, args, rows):
    """Draw the curves of the training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    sets = ["training", "validation" if args.holdout else "test"]
    losses = [(row["train_loss"], row["eval_loss"]) for row in rows]
    errors = [(100 - row["train_accuracy"], 100 - row["eval_accuracy"]) for row in rows]
    for place, title, curves in ((1, "loss", losses), (2, "error in %", errors)):
        ax = figure.add_subplot(1, 2, place)
        ax.plot(epochs, curves, ".-", label=sets)
        ax.set(title=title, xlabel="epoch", xticks=epochs[:: len(epochs) // 10 + 1])
        ax.set_yscale("log", subs=(2, 5))
        ax.yaxis.set_major_formatter("{x:g}")  # not powers of ten
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.legend()
    figure.savefig(buffer := io.BytesIO())
    save(path, buffer.getvalue())


def half_width(*samples, level=0.95):
    """Return half the interval of a mean, or of the difference of two (Welch 1947)."""
    from scipy.special import stdtrit  # Student's t

    errors = [statistics.variance(x) / len(x) for x in samples]  # squared
    if not any(errors):
        return 0
    df = sum(errors) ** 2 / sum(e**2 / (len(x) - 1) for e, x in zip(errors, samples))
    return sum(errors) ** 0.5 * stdtrit(df, (1 + level) / 2).item()


def interval(values):
    """Return the mean and its 95 % confidence interval as text."""
    half = f" ± {half_width(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{half}"


def difference(first, second, level):
    """Say how the second mean differs from the first."""
    mean = statistics.mean(second) - statistics.mean(first)
    if min(len(first), len(second)) == 1:
        return f"{mean:+.3f}  cannot tell: one seed"
    half = half_width(first, second, level=level)
    if half == 0:
        return f"{mean:+.3f}  cannot tell: no spread" if mean else "no difference"
    word = "cannot tell" if abs(mean) <= half else "better" if mean > 0 else "worse"
    return f"{mean:+.3f} ± {half:.3f}  {word}"


# ---- Jobs: train, evaluate, predict, compare ----
@contextmanager
def open_folder(args, datasets):
    """Make the folder of a run, or check a resumed one's, and lock it."""
    name = time.strftime(f"runs/%Y-%m-%d-%H%M%S-{os.urandom(3).hex()}")
    folder = Path(args.resume or args.out or name)
    data = zlib.crc32(b"".join(x.cpu().numpy() for pair in datasets for x in pair))
    config = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    config |= vars(args) | {"data_dir": os.path.abspath(args.data_dir), "data": data}
    script = folder / "mnist_cnn.py"
    if args.resume:
        if script.read_bytes() != SOURCE:
            fail(f"{folder} has another script: continue with {script}")
        if data != args.data:
            fail(f"{folder} has seen other images: give their --data-dir")
    elif folder.exists() and any(folder.iterdir()):
        fail(f"{folder} exists: choose another --out, or --resume it")
    else:  # it appears whole
        new = Path(f"{folder}.new")
        new.mkdir(parents=True, exist_ok=True)
        save(new / script.name, SOURCE)
        save(new / "config.json", config)
        new.replace(folder)

    with open(script, "r+b") as file:
        with suppress(ImportError, OSError):  # Windows, some network disks
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fail(f"{folder} is in use by another process")
        save(folder / "config.json", config)
        if not args.dry_run:
            print(f'On {args.device}; to continue after a stop: --resume "{folder}"')
        yield folder


def train(args):
    """Train --runs models and print their mean accuracy."""
    if TORCHRUN:  # its processes share the seeds
        distributed.init_process_group("gloo", timeout=timedelta(days=30))
    with suppress(ImportError):
        from torchsummary import summary

        summary(Net(args.width), (1, 28, 28), device="cpu")
    datasets = load_datasets(args)
    with nullcontext() if RANK else open_folder(args, datasets) as folder:
        shared = [folder]
        if TORCHRUN:
            distributed.broadcast_object_list(shared)
        folder = shared[0]
        seeds = range(args.seed, args.seed + args.runs)[RANK::RANKS]
        todo = [x for x in seeds if not (folder / f"seed-{x}" / "result.json").exists()]
        trainings = [train_seed(args, seed, *datasets, folder) for seed in todo]
        if trainings:
            print(HEAD)
        if datasets[0][0].is_cuda:
            train_side_by_side(trainings, datasets[0][0].device)
        else:
            for training in trainings:
                list(training)  # runs it to its end
        if TORCHRUN:
            distributed.barrier()
            distributed.destroy_process_group()
    if RANK:
        return
    compare([str(folder)])
    if note := read_run(folder)[2]:
        fail(f"{note}: not in the mean")


def evaluate(args):
    """Test the weights in a file, or read pictures with them."""
    model, path = make_model(args), Path(args.evaluate)
    script = path.parent.parent / "mnist_cnn.py"
    with exit_on_error(f"{path} is no final.pt of this Net and --width (see {script})"):
        model.load_state_dict(torch.load(path, "cpu", weights_only=True))
        if not all(x.isfinite().all() for x in model.state_dict().values()):
            raise ValueError("not all weights are finite")
    if args.predict:
        return predict_pictures(args, model)
    test_set = [x.to(args.device) for x in load_mnist(args.data_dir, "t10k")]
    loss, accuracy = test(model, test_set, args.precision, args.tta)
    print(f"Test loss {loss:.4f}, accuracy {accuracy:.2f} %")


def read_picture(path):
    """Return a drawn or photographed digit as in MNIST: (1, 1, 28, 28) uint8."""
    from scipy import ndimage  # takes a while

    with exit_on_error(f"{path}: cannot open (save it as JPEG or PNG?)"):
        image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":  # 12 or 16 bits, or floats
        image = Image.fromarray(np.interp(image, np.quantile(image, (0, 1)), (0, 255)))
    page = Image.new("L", image.size, 128)
    page.paste(image, mask=image.convert("LA"))
    for smallest in (6, 35):  # first find the digit, then look closer
        view = ImageOps.contain(page, (200, 200))
        blurs = [view.filter(ImageFilter.GaussianBlur(radius)) for radius in (1, 40)]
        grey, paper = np.array(blurs, float)
        ink = max(paper - grey, grey - paper, key=np.max)  # dark or light
        if ink.max() < 40:
            raise ValueError("nothing is darker or lighter than the paper")
        mask = ink > 0.45 * ink[ink > 0.3 * ink.max()].mean()
        regions = ndimage.label(ndimage.maximum_filter(mask, 9))[0]
        weights = np.pad(21.0 * mask[1:-1, 1:-1], 1) - 20  # against frames, shadows
        sizes = np.bincount(regions[mask], weights[mask])
        region = regions == max(1, sizes.argmax())
        y, x = (mask & region).nonzero()
        half = 0.7 * max(np.ptp(x), np.ptp(y)) + 2  # 20 of 28 pixels, as in MNIST
        least = 2 * half * ndimage.label(~mask)[1]  # squared paper has many gaps
        if half < smallest or sizes.max() < least or np.ptp(x) > 2.5 * np.ptp(y):
            raise ValueError("no digit, or too small: crop the picture around it")
        box = x.mean() - half, y.mean() - half, x.mean() + half, y.mean() + half
        closer = np.multiply(box, max(page.size) / 200)
        page = page.crop(tuple(np.clip(closer, 0, page.size * 2)))
    contour = region & (mask ^ ndimage.binary_erosion(mask))
    if np.median(np.hypot(*np.gradient(grey))[contour]) < 5:
        raise ValueError("blurred, or a shadow")
    ink = Image.fromarray((ink.clip(0) * region).astype("u1")).crop(box)
    return torch.tensor(np.array([[ImageOps.autocontrast(ink.resize((28, 28)))]]))


def predict_pictures(args, model):
    """Print the digit in each picture, below what the network sees."""
    failed = len(args.predict)
    for path in args.predict:
        with suppress(SystemExit), exit_on_error(path):  # and go on
            image = read_picture(path).to(args.device)
            output = predict(model, image, args.precision, args.tta)[0]
            for row in image.view(14, 2, 28).amax(dim=1).tolist():
                print("".join(" .:-=+*#%@"[value // 26] for value in row))
            percent, digit = (100 * output.exp()).max(dim=0)
            print(f"{path}: {digit} ({percent:.1f} %)")
            failed -= 1
    sys.exit(failed > 0)


def read_run(folder):
    """Return a run's settings and accuracies, and what is missing, as text."""
    with exit_on_error(f"cannot use {folder}"):
        config = json.loads(Path(folder, "config.json").read_text())
        runs = int(config["runs"])
    results = []
    for path in Path(folder).glob("seed-*/result.json"):
        with exit_on_error(f"cannot use {path} (without it --resume trains the seed)"):
            result = json.loads(path.read_text(), parse_constant=int)  # refuses NaN
            diverged = "diverged_in_epoch" in result
            results.append(None if diverged else float(result["accuracy"]))
    counts = {"diverged": results.count(None), "not finished": runs - len(results)}
    note = ", ".join(f"{n} of {runs} {word}" for word, n in counts.items() if n > 0)
    return config, [x for x in results if x is not None], note


def compare(folders):
    """Print each run's mean accuracy, compared with the first one's."""
    runs = [(folder, *read_run(folder)) for folder in folders]
    complain = warn if any(run[2] for run in runs) else fail
    for folder, _, accuracies, note in runs:
        if not accuracies:
            complain(f"{folder} has no result: {note}")
    runs = [run for run in runs if run[2]]
    configs, first = [run[1] for run in runs], runs[0][2]
    script = Path(runs[0][0], "mnist_cnn.py").read_bytes()
    if len({config.get("data") for config in configs}) > 1:
        fail("cannot compare: not the same data and --holdout")
    names = sorted({x for config in configs for x in config} - UNCOMPARED)
    names = [x for x in names if len({str(config.get(x)) for config in configs}) > 1]

    level = 1 - 0.05 / max(1, len(runs) - 1)  # Bonferroni's correction
    kind = "validation" if configs[0].get("holdout") else "test"
    table = [["run", "n", f"{kind} accuracy, % (95 % CI)", "", ""]]
    if len(runs) > 1:
        table[0][3:] = f"difference from the first ({100 * level:.4g} % CI)", "settings"
    for folder, config, accuracies, note in runs:
        words = "" if accuracies is first else difference(first, accuracies, level)
        if Path(folder, "mnist_cnn.py").read_bytes() != script:
            note = f"another mnist_cnn.py  {note}"
        flags = [f"--{x.replace('_', '-')} {config.get(x)}" for x in names]
        flags = [x for x in flags if not x.endswith((" None", " False"))]
        note = "  ".join([*(x.removesuffix(" True") for x in flags), note])
        row = folder, str(len(accuracies)), interval(accuracies), words
        table.append([*row, note])
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        print("  ".join(map(str.ljust, row, widths)).rstrip())


# ---- Command line ----
NUMBERS = {  # default, lowest, below, help
    "epochs": (19, 1, 10_000, "passes over the training set"),
    "batch-size": (128, 1, 100_000, "images in a training batch"),
    "lr": (0.015, 0, math.inf, "maximum learning rate"),
    "momentum": (0.9, 0, 1, "momentum of SGD"),
    "weight-decay": (1e-4, 0, math.inf, "L2 penalty"),
    "width": (1, 1, 100, "multiplies the channels"),
    "dropout": (0.05, 0, 1, "dropout probability"),
    "rotation": (7.0, 0, 360, "maximum random rotation, degrees"),
    "shift": (0.0, 0, 360, "maximum random shift, pixels"),
    "pct-start": (0.2, 0, 1, "warm-up, fraction of all steps"),
    "div-factor": (10.0, 1, math.inf, "maximum / initial learning rate"),
    "final-div-factor": (100.0, 1, math.inf, "initial / final learning rate"),
    "seed": (1, 0, 100_000, "seed of the first model"),
    "runs": (1, 1, 100_000, "models to train, from --seed up"),
    "holdout": (0, 0, 60_000, "validate on the last N images"),
}
BEST = {"lr": 0.2, "weight_decay": 5e-4, "dropout": 0.0, "rotation": 10.0, "shift": 1.5}
QUICK = BEST | {"epochs": 6, "batch_size": 64, "lr": 0.15, "rotation": 5, "shift": 0.5}
UNCOMPARED = {"recipe", "runs", "out", "resume", "data_dir", "threads", "torch"}
RECIPES = {"reference": {}, "best": BEST, "quick": QUICK}  # what they change
# The jobs other than training, in order, and the flags that go with them.
JOBS = {
    "--compare": [],
    "--predict": ["--evaluate", "--width", "--precision", "--device", "--tta"],
    "--evaluate": ["--width", "--precision", "--device", "--tta", "--data-dir"],
    "--resume": ["--runs", "--device", "--data-dir", "--eager"],
}


def make_parser():
    """Return the command line's parser."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (see --help)", 2)
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="reference", help="sets the defaults")
    for name, (default, _, _, text) in NUMBERS.items():
        text = f"{text} (default: {default})"
        add(f"--{name}", type=type(default), default=default, help=text)
    add("--precision", choices=("fp32", "tf32", "bf16"), default="fp32")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps, ...")
    add("--data-dir", default="data", help="has MNIST/raw, or gets it")
    add("--tta", action="store_true", help="average nine shifts of an image")
    add("--eager", action="store_true", help="no CUDA graph: for Python in a step")
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
        parser.set_defaults(**read_run(args.resume)[0])
    args = parser.parse_args(argv)
    args.epochs = 1 if args.dry_run else args.epochs
    for name, (_, low, below, _) in NUMBERS.items():
        if not low <= (value := getattr(args, name.replace("-", "_"))) < below:
            parser.error(f"--{name} {value} is not in [{low}, {below})")
    return args


def main(argv):
    """Choose the device and the job."""
    args = parse_arguments(argv)
    if RANK:  # torchrun's first process prints
        sys.stdout = io.StringIO()
    if args.compare:
        return compare(args.compare)
    if args.device == "auto":
        found = torch.accelerator.is_available()
        args.device = torch.accelerator.current_accelerator().type if found else "cpu"
    if TORCHRUN and (count := torch.accelerator.device_count()):  # a GPU for each
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]) % count)
    with exit_on_error(f"--device {args.device} does not work (cpu does)", 2):
        torch.ones(1, device=args.device).add(1).item()
    set_up_torch(args)
    if args.evaluate is not None:
        evaluate(args)
    elif args.dry_run and not args.out:
        with tempfile.TemporaryDirectory() as folder:
            args.out = f"{folder}/run"
            train(args)
    else:
        train(args)


if __name__ == "__main__":
    with suppress(AttributeError):  # in a notebook
        # Lines go through pipes at once; the encoding may lack ±.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    notebook = hasattr(sys, "ps1")  # %run goes on
    if not notebook:
        os.environ["MPLBACKEND"] = "agg"  # a notebook's may be missing here
    try:
        main(sys.argv[1:])
    except (KeyboardInterrupt, OSError, torch.OutOfMemoryError) as error:
        if not notebook:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # one line for many Ctrl-C
        warn(f"stopped by {type(error).__name__} {error}".rstrip(), "error")
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        sys.exit(status) if notebook else os._exit(status)  # no flush: it may fail
