"""The CUDA path on fake tensors, no GPU needed: devices do not mix, no step waits."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mnist_cnn

if not (torch.version.cuda and hasattr(torch._C, "_ensureCUDADeviceGuardSet")):
    pytest.skip("needs torch 2.10 or later, built for CUDA", allow_module_level=True)


class Watch(TorchDispatchMode):
    """Lists waits for the device and dtypes, and does what fake tensors cannot."""

    def __init__(self):
        super().__init__()
        self.waits, self.dtypes = [], set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, tags, result = operation.name(), operation.tags, None
        if reads := torch.Tag.data_dependent_output in tags:
            result = True  # for any number that .item() and its like may return
        elif operation._schema.returns:  # a fused optimizer's step has none
            result = operation(*args, **(kwargs or {}))
        waits = reads or torch.Tag.dynamic_output_shape in tags
        if name in ("aten::index.Tensor", "aten::index_put_"):  # x[mask], not x[index]
            waits = any(getattr(x, "dtype", None) is torch.bool for x in args[1])
        leaves = tree_leaves((args, kwargs, result))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if len(devices) > 1 or (waits and "cuda" in devices):  # two: a copy
            self.waits.append(name)
        self.dtypes.update(tensor.dtype for tensor in tensors)
        return result


@pytest.fixture(params=[*mnist_cnn.RECIPES, "reference --precision=bf16"])
def started(request, monkeypatch):
    """The arguments and a training on a GPU whose tensors have no data."""
    # Module.to makes fake weights from real ones only; bf16 and autograd want a GPU.
    monkeypatch.setattr(mnist_cnn, "Net", unset_fake_temporarily()(mnist_cnn.Net))
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", bool)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)

    def backward(loss):
        for weights in training[0].parameters():
            weights.grad = torch.zeros_like(weights)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    args = mnist_cnn.parse_arguments(["--recipe", *request.param.split()])
    args.device = "cuda"
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        training = mnist_cnn.make_training(args, 1, 100)
        yield args, training


def dataset(count):
    """So many images and labels on the GPU."""
    images = torch.zeros(count, 1, 28, 28, device="cuda").byte()
    return images, images[:, 0, 0, 0].long()


@pytest.mark.parametrize("steps", [3, 6])
def test_an_epoch_and_its_test_mix_no_devices_and_wait_only_at_the_end(started, steps):
    args, (model, optimizer, scheduler) = started
    train_set = dataset(steps * args.batch_size - 1)  # the last batch is smaller
    sums = torch.zeros(2, device="cuda")
    step = mnist_cnn.make_step(model, optimizer, args, sums)
    with Watch() as watch:
        epoch = mnist_cnn.train_epoch(step, scheduler, train_set, sums, args)
        assert len(list(epoch)) == steps
    assert watch.waits == ["aten::_local_scalar_dense"] * 2
    assert (torch.bfloat16 in watch.dtypes) == (args.precision == "bf16")
    for count, tta in ((1001, False), (1001, True), (1, True)):
        with Watch():
            mnist_cnn.test(model, dataset(count), args.precision, tta)
