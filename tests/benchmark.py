"""Time the usual MNIST loop against mnist_cnn.py, in one run: python tests/benchmark.py

Each variant lives in a process of its own. They take turns, a block of steps each, so
that a machine whose speed drifts slows them all alike; the median block counts. Needs
the real MNIST in --data-dir. It is no test: nothing passes or fails here.
"""

import argparse
import multiprocessing
import platform
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision import transforms
from torchvision.datasets import MNIST

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mnist_cnn


def usual_loop(args, workers):
    """Train as tutorials do, image by image; a generator, as is the next one."""
    rotate = transforms.RandomRotation(7, transforms.InterpolationMode.BILINEAR)
    normalise = transforms.Normalize((mnist_cnn.MEAN,), (mnist_cnn.STD,))
    transform = transforms.Compose([rotate, transforms.ToTensor(), normalise])
    data = MNIST(args.data_dir, transform=transform, download=True)
    pin = args.device.startswith("cuda")
    options = {"shuffle": True, "num_workers": workers, "pin_memory": pin}
    loader = torch.utils.data.DataLoader(data, 128, **options)
    model = mnist_cnn.Net()
    model.drop = torch.nn.Dropout(0.05)
    model.to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.015, 0.9, weight_decay=1e-4)
    while True:
        for pixels, labels in loader:
            pixels, labels = pixels.to(args.device), labels.to(args.device)
            optimizer.zero_grad()
            output = model(pixels)
            loss = F.nll_loss(output, labels)
            loss.backward()
            optimizer.step()
            loss.item()
            (output.argmax(dim=1) == labels).sum().item()
            yield


def this_script(args, precision):
    """Train as the script does."""
    flags = ["--device", args.device, "--precision", precision]
    flags = mnist_cnn.parse_arguments([*flags, "--data-dir", args.data_dir])
    mnist_cnn.set_up_torch(flags)
    train_set, _ = mnist_cnn.load_datasets(flags)
    model, optimizer, scheduler = mnist_cnn.make_training(flags, 1, 60_000)
    sums = torch.zeros(2, device=args.device)
    step = mnist_cnn.make_step(model, optimizer, flags, sums)
    if sums.is_cuda:
        step = mnist_cnn.use_cuda_graph(step, optimizer, eager=False)
    while True:
        yield from mnist_cnn.train_epoch(step, scheduler, train_set, sums, flags)


VARIANTS = {
    "usual loop": (usual_loop, 0),
    "usual loop, 1 worker": (usual_loop, 1),
    "mnist_cnn.py": (this_script, "fp32"),
    "mnist_cnn.py, bf16": (this_script, "bf16"),
}


def prepare(name, args):
    """Make this process that of a variant."""
    global training
    sys.stdout = None  # the script's bar
    torch.manual_seed(1)
    make, option = VARIANTS[name]
    training = make(args, option)
    measure(args, 10)  # the first steps choose algorithms and fill caches


def measure(args, steps):
    """Take a block of steps; return ms a step and this process's peak of MB so far."""
    start = time.perf_counter()
    for _ in range(steps):
        next(training)
    torch.ones(1, device=args.device).item()  # waits until the device has finished too
    ms = 1000 * (time.perf_counter() - start) / steps
    if args.device.startswith("cuda"):
        return ms, torch.cuda.max_memory_allocated() / 1e6
    with suppress(ImportError):  # on Windows
        import resource

        return ms, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000  # Linux
    return ms, float("nan")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--steps", type=int, default=40, help="steps in a block")
    parser.add_argument("--blocks", type=int, default=7, help="blocks of each variant")
    args = parser.parse_args()
    name = f"{torch.get_num_threads()} threads of {platform.machine()}"
    if args.device.startswith("cuda"):
        name = torch.cuda.get_device_name(args.device)
    print(f"{args.device}, {name}, torch {torch.__version__}\n")
    spawn = multiprocessing.get_context("spawn")
    processes = [ProcessPoolExecutor(1, spawn, prepare, (x, args)) for x in VARIANTS]
    blocks = [
        [process.submit(measure, args, args.steps).result() for process in processes]
        for _ in range(args.blocks)
    ]
    medians = [statistics.median(ms for ms, _ in turns) for turns in zip(*blocks)]
    print("| variant | ms a step | x faster usual | peak MB |")
    print("| --- | ---: | ---: | ---: |")
    for name, ms, (_, peak) in zip(VARIANTS, medians, blocks[-1]):
        print(f"| {name} | {ms:.2f} | {min(medians[:2]) / ms:.2f} | {peak:,.0f} |")


if __name__ == "__main__":
    main()
