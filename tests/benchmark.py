"""Time the usual MNIST loop against mnist_cnn.py, in one run: python tests/benchmark.py

Each variant lives in a process of its own. They take turns, a block of steps each, so that
a machine whose speed drifts slows them all alike; the table gives the median block.
Needs the real MNIST in --data-dir. It is no test: nothing passes or fails here.
"""

import argparse
import functools
import itertools
import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision import transforms
from torchvision.datasets import MNIST

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mnist_cnn

BATCH_SIZE, IMAGES = 128, 60_000


def usual_loop(args, workers):
    """Return a function that trains for some steps as tutorials do, image by image."""
    transform = transforms.Compose(
        [
            transforms.RandomRotation(7, transforms.InterpolationMode.BILINEAR),
            transforms.ToTensor(),
            transforms.Normalize((mnist_cnn.MEAN,), (mnist_cnn.STD,)),
        ]
    )
    loader = torch.utils.data.DataLoader(
        MNIST(args.data_dir, transform=transform, download=True),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=workers,
        pin_memory=args.device.startswith("cuda"),
    )
    model = mnist_cnn.Net()
    model.drop = torch.nn.Dropout(0.05)
    model.to(args.device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.015, 0.9, weight_decay=1e-4)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def run(steps):
        for pixels, labels in itertools.islice(batches, steps):
            pixels, labels = pixels.to(args.device), labels.to(args.device)
            optimizer.zero_grad()
            output = model(pixels)
            loss = F.nll_loss(output, labels)
            loss.backward()
            optimizer.step()
            loss.item()
            (output.argmax(dim=1) == labels).sum().item()

    return run


def this_script(args, *flags):
    """Return a function that trains for some steps as the script does with the flags."""
    flags = mnist_cnn.parse_arguments(["--device", args.device, *flags])
    train_set = mnist_cnn.load_mnist(args.data_dir, "train")
    train_set = [part.to(args.device) for part in train_set]
    model, optimizer, scheduler = mnist_cnn.make_training(flags, 1, IMAGES)
    sums = torch.zeros(2, device=args.device)
    step = mnist_cnn.make_step(model, optimizer, flags, *train_set, sums)
    if sums.is_cuda:
        step = mnist_cnn.use_cuda_graphs(step, optimizer)
    model.train()

    def run(steps):
        images = steps * flags.batch_size
        list(mnist_cnn.train_epoch(step, scheduler, sums, images, flags))

    return run


VARIANTS = {
    "usual loop": functools.partial(usual_loop, workers=0),
    "usual loop, 1 worker": functools.partial(usual_loop, workers=1),
    "mnist_cnn.py": this_script,
    "mnist_cnn.py, bf16": lambda args: this_script(args, "--precision", "bf16"),
}


def peak_megabytes(device):
    """Return the most memory that this process had so far; on Windows not a number."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000  # kB on Linux


def serve(name, args, connection):
    """Run blocks of a variant's steps on request; answer with ms a step and peak MB."""
    torch.manual_seed(1)
    run = VARIANTS[name](args)
    run(10)  # the first steps choose algorithms and fill caches
    connection.send("ready")
    while steps := connection.recv():
        start = time.perf_counter()
        run(steps)  # ends with .item(), so the device has finished too
        milliseconds = 1000 * (time.perf_counter() - start) / steps
        peak = peak_megabytes(args.device)
        connection.send((milliseconds, peak))


def take_turns(args):
    """Return for each variant its median ms a step and its peak MB."""
    context = multiprocessing.get_context("spawn")
    connections = {}
    for name in VARIANTS:
        connections[name], end = context.Pipe()
        context.Process(target=serve, args=(name, args, end)).start()
        end.close()  # so that a variant that dies ends the benchmark too
        connections[name].recv()
    results = {name: [] for name in VARIANTS}
    for _ in range(args.blocks):
        for name, connection in connections.items():
            connection.send(args.steps)
            results[name].append(connection.recv())
    for connection in connections.values():
        connection.send(0)
    return {
        name: (statistics.median(ms for ms, _ in blocks), blocks[-1][1])
        for name, blocks in results.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=best)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--steps", type=int, default=40, help="steps in a block")
    parser.add_argument("--blocks", type=int, default=7, help="blocks of each variant")
    args = parser.parse_args()
    name = f"{torch.get_num_threads()} threads of {platform.machine()}"
    if args.device.startswith("cuda"):
        name = torch.cuda.get_device_name(args.device)
    date = time.strftime("%Y-%m-%d")
    print(f"{args.device}, {name}, torch {torch.__version__}, {date}\n")
    results = take_turns(args)
    usual = min(ms for name, (ms, _) in results.items() if name.startswith("usual"))
    print("| variant | ms a step | s an epoch | images/s | x faster usual | peak MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, (ms, peak) in results.items():
        epoch, speed = ms * IMAGES / BATCH_SIZE / 1000, 1000 * BATCH_SIZE / ms
        times = f"{ms:.2f} | {epoch:.1f} | {speed:,.0f} | {usual / ms:.2f}"
        print(f"| {name} | {times} | {peak:,.0f} |")


if __name__ == "__main__":
    main()
