"""The script is meant to be changed: copies of it with another network or optimizer."""

import importlib.util
import re
from contextlib import contextmanager

import pytest
import torch
from conftest import SCRIPT, metrics, result
from PIL import Image, ImageDraw

import mnist_cnn

NETWORKS = {
    "one Sequential without a bias": """
        c = 8 * width
        self.layers = nn.Sequential(
            nn.Conv2d(1, c, 3, bias=False), nn.BatchNorm2d(c), nn.ReLU(),
            nn.MaxPool2d(2), nn.Conv2d(c, 2 * c, 3, bias=False), nn.ReLU(),
            Dropout(dropout), nn.Conv2d(2 * c, 10, 1, bias=False),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LogSoftmax(dim=1),
        )

    def forward(self, x):
        return self.layers(x)
""",
    "GroupNorm and a Linear": """
        self.first, self.second = nn.Conv2d(1, 4, 5), nn.Conv2d(4, 8 * width, 3)
        self.norm = nn.GroupNorm(2, 8 * width)
        self.last = nn.Linear(8 * width * 25, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.norm(self.second(x))), 2)
        return F.log_softmax(self.last(x.flatten(1)).float(), dim=1)
""",
    "20 channels in the first layer": """
        self.conv1 = nn.Conv2d(1, 20, 3)
        self.conv2 = nn.Conv2d(20, 10 * width, 3)
        self.out = nn.Conv2d(10 * width, 10, 1)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = self.out(F.relu(self.conv2(x)))
        return F.log_softmax(x.mean(dim=(2, 3)).float(), dim=1)
""",
}


@pytest.fixture
def changed(tmp_path, monkeypatch, call):
    """Make `call` run a copy of the script in which a pattern is replaced."""

    def change(pattern, text):
        source = SCRIPT.read_text(encoding="utf-8")
        source, count = re.subn(pattern, lambda _: text, source, flags=re.DOTALL)
        assert count == 1
        path = tmp_path / "changed.py"
        path.write_text(source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("changed", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(mnist_cnn, "main", module.main)
        return module

    return change


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("flags", [[], ["--width", 2, "--precision", "bf16", "--tta"]])
def test_any_network_trains_resumes_is_evaluated_and_predicts(
    changed, call, data, tmp_path, name, flags
):
    init = "class Net(nn.Module):\n    def __init__(self, width=1, dropout=0.05):"
    init += f"\n        super().__init__(){NETWORKS[name]}\n\ndef make_model"
    changed(r"class Net\(.*?\ndef make_model", init)
    train = ["--data-dir", data, "--device", "cpu", *flags]
    for epochs, folder in ((1, "short"), (2, "whole")):
        process = call(*train, "--epochs", epochs, "--out", folder)
        assert process.returncode == 0, process.stderr
    weights = tmp_path / "whole" / "seed-1" / "final.pt"
    process = call("--evaluate", weights, "--data-dir", data, *flags)
    accuracy = result(weights.parent)["accuracy"]
    assert process.stdout.endswith(f"accuracy {accuracy:.2f} %\n")
    picture = Image.new("L", (200, 200), 200)
    ImageDraw.Draw(picture).line([(100, 40), (100, 160)], 20, 12)
    picture.save(tmp_path / "one.png")
    process = call("--evaluate", weights, "--predict", "one.png", *flags)
    assert re.search(r"one.png: \d \(\d+\.\d %\)", process.stdout), process.stderr
    for file in ("result.json", "final.pt"):
        (tmp_path / "whole" / "seed-1" / file).unlink()
    assert call("--resume", "whole").returncode == 0
    assert result(weights.parent)["accuracy"] == accuracy


def test_what_is_added_to_augment_reaches_every_step_and_no_test(
    changed, call, data, tmp_path
):
    """A transform that blackens all images of the first epoch."""
    module = changed(
        r"    return images\n\n\ndef normalise",
        "    return spy(images)\n\n\ndef normalise",
    )
    shown = []
    module.spy = lambda images: shown.append(len(images)) or images * 0
    flags = ["--data-dir", data, "--epochs", 1, "--batch-size", 100, "--out", "run"]
    assert call(*flags).returncode == 0
    assert shown == [100] * 6


def test_another_schedule_takes_effect(changed, call, data, tmp_path):
    schedule = "scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5)"
    changed(r"scheduler = .*?(?=\n    return model)", schedule)
    flags = ["--data-dir", data, "--epochs", 2, "--lr", 0.16, "--out", "run"]
    assert call(*flags, "--batch-size", 60).returncode == 0
    rates = [row.split(",")[2] for row in metrics(tmp_path / "run" / "seed-1")]
    assert rates == ["lr", "0.08", "0.04"]  # 10 batches an epoch


class RecordedGraph:
    """A CUDA graph without a GPU: replays a step with the numbers of its capture."""

    recording, replays = None, 0

    def replay(self):
        RecordedGraph.replays += 1
        now = [dict(group) for group in self.groups]
        for group, frozen in zip(self.groups, self.frozen, strict=True):
            group.update(frozen)
        self.step()
        for group, values in zip(self.groups, now, strict=True):
            group.update(values)


@contextmanager
def recording(graph):
    RecordedGraph.recording = graph
    yield
    RecordedGraph.recording = None


def train_with_graph(eager, change):
    """Train two groups of weights for nine steps, one of a smaller batch."""
    torch.manual_seed(0)
    weights = [torch.ones(3, requires_grad=True) for _ in range(2)]
    groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.05}]
    optimizer = torch.optim.SGD(groups, 0.2, 0.9, weight_decay=0.01, fused=True)

    def step(inputs, labels):
        if graph := RecordedGraph.recording:
            graph.groups = optimizer.param_groups
            graph.frozen = [dict(group) for group in graph.groups]
            graph.step = lambda: step(inputs, labels)
        else:
            optimizer.zero_grad()
            output = (inputs * weights[0] + weights[1]).sum(dim=1)
            (output - labels).square().mean().backward()
            optimizer.step()

    graph_step = mnist_cnn.use_cuda_graph(step, optimizer, eager)
    for number in range(9):
        change(number, *optimizer.param_groups)
        size = 2 if number == 3 else 4
        graph_step(torch.rand(size, 3), torch.rand(size))
        assert all(isinstance(x["lr"], float) for x in optimizer.param_groups)
    return weights


CHANGES = {
    "nothing": (lambda step, first, second: None, 7),
    "a learning rate": (
        lambda step, first, second: second.update(lr=0.1 / (step + 1)),
        7,
    ),
    "momentum": (
        lambda step, _, second: second.update(momentum=0.9 - step // 5 / 2),
        3,
    ),
    "decay": (lambda step, first, _: first.update(weight_decay=0.01 * step), 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_a_parameter_group_takes_effect_under_a_cuda_graph(
    monkeypatch, capsys, name
):
    monkeypatch.setattr(RecordedGraph, "replays", 0)
    monkeypatch.setattr("torch.cuda.CUDAGraph", RecordedGraph)
    monkeypatch.setattr("torch.cuda.graph", recording)
    change, replays = CHANGES[name]
    expected = train_with_graph(True, change)
    assert RecordedGraph.replays == 0
    trained = train_with_graph(False, change)
    torch.testing.assert_close(trained, expected, rtol=0, atol=0)
    assert RecordedGraph.replays == replays
    warnings = capsys.readouterr().err.count("a parameter group has changed")
    assert warnings == (replays < 7)
