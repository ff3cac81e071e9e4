"""The loop: learning-rate curve, what a seed fixes, and real MNIST."""

import os

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook

import mnist_cnn
from mnist_cnn import fit, load_mnist, predict, print_header


@pytest.fixture
def step_settings():
    """The optimizer's settings in each step that it takes during the test."""
    settings = []

    def note(optimizer, arguments, keywords):
        settings.append(dict(optimizer.param_groups[0]))

    handle = register_optimizer_step_post_hook(note)
    yield settings
    handle.remove()


def weights(*arguments, **keywords):
    return fit(*arguments, [], **keywords).state_dict()


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def one_cycle_rates(steps, lr, **settings):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr)
    schedule = OneCycleLR(optimizer, lr, total_steps=steps, **settings)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def test_learning_rate_of_each_batch_is_that_of_one_cycle_lr(
    flags, small_splits, step_settings
):
    fit(flags("--epochs", 3, "--batch-size", 64), *small_splits, [])
    rates = [step["lr"] for step in step_settings]
    settings = {"pct_start": 0.2, "div_factor": 10, "final_div_factor": 100}
    assert rates == one_cycle_rates(3 * 10, 0.015, **settings)


def test_schedule_flags_shape_the_curve(flags, small_splits, step_settings):
    given = ["--lr", 0.1, "--pct-start", 0.5, "--div-factor", 4]
    given += ["--final-div-factor", 50, "--epochs", 2, "--batch-size", 100]
    fit(flags(*given), *small_splits, [])
    rates = [step["lr"] for step in step_settings]
    assert rates[0] == pytest.approx(0.1 / 4)
    assert rates[5] == max(rates) == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.1 / 4 / 50)


def test_optimizer_flags_hold_in_every_step(flags, small_splits, step_settings):
    given = ["--momentum", 0.7, "--weight-decay", 0.003, "--epochs", 2]
    fit(flags(*given), *small_splits, [])
    assert {step["momentum"] for step in step_settings} == {0.7}
    assert {step["weight_decay"] for step in step_settings} == {0.003}


@pytest.mark.parametrize("pct_start", ["0", "0.2", "0.5", "0.99"])
def test_any_share_of_warm_up_works_in_a_run_of_five_batches(
    flags, small_splits, step_settings, pct_start
):
    given = ["--epochs", 1, "--batch-size", 120, "--pct-start", pct_start]
    fit(flags(*given), *small_splits, [])
    assert len(step_settings) == 5


def test_a_batch_larger_than_the_training_set_holds_all_of_it(
    flags, small_splits, step_settings
):
    fit(flags("--epochs", 2, "--batch-size", 60000), *small_splits, [])
    assert len(step_settings) == 2


def test_the_same_seed_gives_the_same_weights(flags, small_splits):
    args = flags("--epochs", 2)
    assert_same(weights(args, *small_splits), weights(args, *small_splits))


def test_another_seed_gives_other_weights(flags, small_splits):
    first, second = (
        weights(flags("--epochs", 1, "--seed", seed), *small_splits) for seed in (1, 2)
    )
    assert not torch.equal(first["conv1.weight"], second["conv1.weight"])


def test_torchsummary_leaves_no_trace_in_the_weights(
    flags, small_splits, monkeypatch, capsys
):
    args = flags("--epochs", 1)
    print_header("cpu")
    assert "AdaptiveAvgPool2d-24" in capsys.readouterr().out
    with_summary = weights(args, *small_splits)
    monkeypatch.setattr(mnist_cnn, "summary", None)
    print_header("cpu")
    assert "AdaptiveAvgPool2d-24" not in capsys.readouterr().out
    assert_same(with_summary, weights(args, *small_splits))


def test_dropout_and_rotation_flags_reach_the_training(flags, small_splits):
    default = weights(flags("--epochs", 1), *small_splits)
    for flag in ("--dropout", "--rotation"):
        without = weights(flags("--epochs", 1, flag, 0), *small_splits)
        assert not torch.equal(default["conv1.weight"], without["conv1.weight"])


def test_bf16_computes_in_less_precision_and_learns_nearly_the_same(
    flags, small_splits
):
    fp32, bf16 = [], []
    fit(flags("--epochs", 3), *small_splits, fp32)
    model = fit(flags("--epochs", 3, "--precision", "bf16"), *small_splits, bf16)
    assert bf16[-1].train_loss != fp32[-1].train_loss
    assert bf16[-1].train_loss == pytest.approx(fp32[-1].train_loss, rel=0.05)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert predict(model, small_splits[1][0], 200).dtype == torch.float32


def test_history_tells_what_the_model_scores(flags, small_splits):
    args, history = flags("--epochs", 2), []
    model = fit(args, *small_splits, history)
    images, labels = small_splits[1]
    model.eval()
    output = model(mnist_cnn.normalise(images.unsqueeze(1)))
    accuracy = 100 * (output.argmax(dim=1) == labels).float().mean().item()
    assert [row.epoch for row in history] == [1, 2]
    assert history[-1].test_accuracy == pytest.approx(accuracy)
    assert history[-1].test_loss == pytest.approx(
        torch.nn.functional.nll_loss(output, labels).item(), abs=1e-5
    )


def test_the_size_of_test_batches_does_not_change_the_result(flags, small_splits):
    model = fit(flags("--epochs", 1), *small_splits, [])
    images = small_splits[1][0]
    whole, pieces = (predict(model, images, size) for size in (200, 33))
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run(flags, small_splits, capsys):
    with pytest.raises(SystemExit) as end:
        fit(flags("--lr", 1e9, "--epochs", 3), *small_splits, [])
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert "not finite in epoch" in error
    assert "lower --lr" in error


def test_two_epochs_of_real_mnist_reach_95_percent(flags, real_mnist):
    history = []
    torch.set_num_threads(os.cpu_count())
    try:
        splits = load_mnist(real_mnist, train=True), load_mnist(real_mnist, train=False)
        fit(flags("--epochs", 2), *splits, history)
    finally:
        torch.set_num_threads(1)
    assert history[-1].test_accuracy >= 95
