"""The script is meant to be changed: copies of it with another network or optimizer."""

import re
import runpy

import pytest
import torch
from conftest import SCRIPT, assert_one_line, assert_same_run, metrics, result

import mnist_cnn

NET = """class Net(nn.Module):
    def __init__(self, width=1, dropout=0.05):
        super().__init__()
        self.layers = nn.Sequential({}, nn.LogSoftmax(dim=1))

    def forward(self, x):
        return self.layers(x)


def make_model"""
NETWORKS = {
    "no bias": """nn.Conv2d(1, 8 * width, 5, bias=False), nn.BatchNorm2d(8 * width),
        nn.ReLU(), Dropout(dropout), nn.Conv2d(8 * width, 10, 3, bias=False),
        nn.AdaptiveAvgPool2d(1), nn.Flatten()""",
    "GroupNorm and a Linear": """nn.Conv2d(1, 8 * width, 5), nn.MaxPool2d(4), nn.ReLU(),
        nn.GroupNorm(2, 8 * width), nn.Flatten(), nn.Linear(288 * width, 10)""",
    "20 channels in the first layer": """nn.Conv2d(1, 20 * width, 3), nn.MaxPool2d(2),
        nn.ReLU(), nn.Conv2d(20 * width, 10, 13), nn.Flatten()""",
}


@pytest.fixture
def changed(tmp_path, monkeypatch, call):
    """Make `call` run a copy of the script in which a pattern is replaced."""

    def change(pattern, text):
        source = SCRIPT.read_text(encoding="utf-8")
        source, count = re.subn(pattern, lambda _: text, source, flags=re.DOTALL)
        assert count == 1
        (tmp_path / "changed.py").write_text(source, encoding="utf-8")
        module = runpy.run_path(str(tmp_path / "changed.py"))
        monkeypatch.setattr(mnist_cnn, "main", module["main"])

    return change


@pytest.mark.parametrize("flags", [[], ["--width", 2, "--precision", "bf16", "--tta"]])
@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_trains_resumes_is_evaluated_and_predicts(
    changed, call, train, stopped, data, photo, name, flags
):
    changed(r"class Net\(.*?def make_model", NET.format(NETWORKS[name]))
    folder = train("--epochs", 2, *flags)
    evaluate = ["--evaluate", folder / "final.pt", *flags]
    process = call(*evaluate, "--data-dir", data)
    assert process.stdout.endswith(f"accuracy {result(folder)['accuracy']:.2f} %\n")
    process = call(*evaluate, "--predict", photo)
    assert re.search(rf"{photo}: \d \(\d+\.\d %\)", process.stdout), process.stderr
    cut = stopped("metrics.csv", "--epochs", 2, *flags)
    assert call("--resume", cut.parent).returncode == 0
    assert_same_run(cut, folder)


def test_a_network_without_log_probabilities_is_named(changed, call, data):
    changed(r", dim=1\)(?=\n\n\ndef make_model)", ", dim=1).exp() * 9")
    process = call("--data-dir", data, "--epochs", 2)
    assert_one_line(process, 1, "1 of 1 diverged")
    assert "no log-probabilities" in process.stdout


def test_another_schedule_takes_effect(changed, train):
    schedule = "scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5)"
    changed(r"scheduler = .*?(?=\n    return model)", schedule)
    folder = train("--epochs", 2, "--lr", 0.16, "--batch-size", 60)
    rates = [row.split(",")[2] for row in metrics(folder)]
    assert rates == ["lr", "0.08", "0.04"]  # 10 batches an epoch


class RecordedGraph:
    """A CUDA graph without a GPU: replays a step with the numbers of its capture."""

    recording, replays = None, 0

    def __enter__(self):
        RecordedGraph.recording = self

    def __exit__(self, *_):
        RecordedGraph.recording = None

    def replay(self):
        RecordedGraph.replays += 1
        for group, frozen in zip(self.groups, self.frozen, strict=True):
            group.update(frozen)
        self.step()


def train_with_graph(eager, number, name, value):
    """Train for nine steps, one of a smaller batch; a number of a group may change."""
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
    for i in range(9):
        optimizer.param_groups[number][name] = value(i)
        size = 2 if i == 3 else 4
        graph_step(torch.rand(size, 3), torch.rand(size))
        assert all(isinstance(x["lr"], float) for x in optimizer.param_groups)
    return weights


@pytest.mark.parametrize(
    ("change", "replays"),
    [
        ((1, "lr", lambda _: 0.05), 7),  # that is no change
        ((1, "lr", lambda step: 0.1 / (step + 1)), 7),
        ((1, "momentum", lambda step: 0.9 - step // 5 / 2), 3),
        ((0, "weight_decay", lambda step: 0.01 * step), 0),
    ],
)
def test_a_change_of_a_parameter_group_takes_effect_under_a_cuda_graph(
    monkeypatch, capsys, change, replays
):
    monkeypatch.setattr(RecordedGraph, "replays", 0)
    monkeypatch.setattr("torch.cuda.CUDAGraph", RecordedGraph)
    monkeypatch.setattr("torch.cuda.graph", lambda graph: graph)
    expected = train_with_graph(True, *change)
    assert RecordedGraph.replays == 0
    trained = train_with_graph(False, *change)
    torch.testing.assert_close(trained, expected, rtol=0, atol=0)
    assert RecordedGraph.replays == replays
    warnings = capsys.readouterr().err.count("a parameter group has changed")
    assert warnings == (replays < 7)
